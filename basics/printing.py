"""Print on rank 0, with secrets masked and control sequences escaped. It needs no torch."""

import os
import re
import sys
import unicodedata

from tqdm import tqdm


def on_rank0() -> bool:
    """True on rank 0, which writes and prints for all; launchers set the variable RANK."""
    return os.environ.get("RANK", "0") == "0"


_SECRETS = ("OPENAI_API_KEY", "WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # environment variables
_SHORTEST_SECRET = 6  # characters: local servers take any key, and masking "x" would spoil every message
_CREDENTIALS = re.compile(r"""(?<=://)[^/?#\s"<>]*@""")  # user and password in a URL
_JOINERS = "\u200c\u200d\u00ad"  # invisible, but parts of words and emoji


def masked(text: str) -> str:
    """Replace this process's API keys, and user names and passwords in URLs, by `***`."""
    for variable in _SECRETS:
        secret = os.environ.get(variable, "").strip()
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "***")
    return _CREDENTIALS.sub("***@", text)


def printable(text: object) -> str:
    """Return a string that is safe to print: secrets masked, control sequences escaped.

    All text from data, files, names, endpoints or errors passes through here before it reaches a terminal, a log, a
    model card or a table. Line breaks and tabs stay.
    """
    text = masked(str(text)).replace("\r\n", "\n")
    if text.isprintable():
        return text
    return "".join(c if _is_harmless(c) else c.encode("unicode_escape").decode() for c in text)


def _is_harmless(character: str) -> bool:
    """False for characters that move the cursor, hide text or reverse its direction."""
    if character in "\n\t" or character in _JOINERS:
        return True
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def one_line(error: object) -> str:
    """Return an error's message on one line, shortened; the name of its type if it has no message."""
    return " ".join((str(error) or type(error).__name__).split())[:400]


def markdown(text: object) -> str:
    """Return a string on one line for a Markdown paragraph or table, with its markup escaped."""
    line = " ".join(printable(text).split())
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", line)


def markdown_code(text: object) -> str:
    """Return a string as Markdown code on one line, even if it contains backticks."""
    line = " ".join(printable(text).split()).replace("|", "\\|")  # a bar would end a table's cell
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def counted(n: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: 1 step, 2 steps, 3 batches (with the plural `batches`)."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def rank0_print(*args, **kwargs):
    """Print on rank 0 only, above a progress bar if there is one."""
    if on_rank0():
        with tqdm.external_write_mode(kwargs.get("file")):
            print(*map(printable, args), **kwargs, flush=True)


def uses_color() -> bool:
    """True if standard output is a terminal that shows colours and NO_COLOR (https://no-color.org) isn't set."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def hides_progress() -> bool | None:
    """Return tqdm's `disable`: on rank 0 a bar is shown in a terminal, on other ranks never."""
    return None if on_rank0() else True
