"""Read the lines that an earlier command wrote to an output file, so that only the missing ones are added."""

from collections.abc import Callable

from basics.files import read_json_lines
from utils import UserError


def read_kept_lines(
    path: str, what: str, settings: str, key_of: Callable[[dict], tuple]
) -> tuple[dict[tuple, dict], int]:
    """Read a file of JSON Lines, each of which has a hash of the settings that decided it.

    Args:
        what: the kind of content, for messages.
        settings: the hash of the current settings.
        key_of: returns a line's key; raises ValueError, KeyError or TypeError for a line of another kind.

    Returns: the last line with each key; and the size of the file (bytes) without a line that a crash cut off.
    Raises: UserError if the file holds something else, or was written under other settings.
    """
    lines, size = {}, 0
    try:
        for line, end in read_json_lines(path):
            key = key_of(line)
            if line["settings"] != settings:
                raise UserError(
                    f"output={path} has {what} that were written under other settings; give another file, or delete it"
                )
            lines[key], size = line, end
    except UserError:
        raise
    except (ValueError, KeyError, TypeError):
        raise UserError(f"output={path}: it exists, but doesn't hold {what}; give another file") from None
    return lines, size
