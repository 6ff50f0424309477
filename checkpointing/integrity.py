"""Find damaged checkpoints by their checksums."""

import os
from concurrent.futures import ThreadPoolExecutor

from basics.checksums import read_checksums, verify_checksum
from basics.files import sha256
from basics.outputs import CHECKSUMS


def content_digest(directory: str) -> str:
    """Return a hash of the content of a checkpoint."""
    return sha256(os.path.join(directory, CHECKSUMS))


def find_corruption(directory: str) -> str | None:
    """Describe the damage to a checkpoint directory; None if every file is as it was written."""
    try:
        checksums = read_checksums(directory)
        if "state.json" not in checksums:
            return f"{CHECKSUMS} doesn't list state.json"
        with ThreadPoolExecutor() as threads:  # hashing releases the GIL
            for _ in threads.map(lambda name: verify_checksum(directory, name, checksums[name]), checksums):
                pass
    except FileNotFoundError as error:
        return f"{os.path.basename(error.filename)} is missing"
    except (OSError, ValueError) as error:
        return str(error)
    return None
