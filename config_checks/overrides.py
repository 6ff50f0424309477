"""Write command-line words in Hydra's grammar, and explain those that it can't read."""

import re
import shlex

from hydra.core.override_parser.types import Quote, QuotedString

_PAIRS = {"[": "]", "{": "}", "(": ")"}
_UNQUOTED = re.compile(r"[\w/\-%+.$:*@?|\\ \t,\[\]{}()=]", re.ASCII)  # allowed without quotes by Hydra's grammar


def override_value(value: object) -> str:
    """Format a value for an override."""
    if isinstance(value, str):
        return QuotedString(value, Quote.single).with_quotes()
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{override_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(override_value, value)) + "]"
    return "null" if value is None else str(value).lower()


def quoted_path(path: str) -> str:
    """Quote a path for an override, if Hydra's grammar requires it."""
    return path if re.fullmatch(r"[\w./-]+", path, re.ASCII) else override_value(path)


def typed_string(key: str, value: str) -> str:
    """Return an override with a string value as it is typed: quoted for Hydra, and once more for the shell."""
    word = f"{key}={override_value(value)}"
    return shlex.quote(word) if re.search(r'[$`\\!"]', word) else f'"{word}"'


def explain_override(word: str, words: list[str]) -> str:
    """Return why Hydra can't read a word as an override, and how to type what is probably meant.

    Args:
        words: all words of the command line.
    """
    word = word.lstrip("+")
    key, is_assigned, value = word.partition("=")
    if not is_assigned:
        return _explain_without_sign(word, words)
    if key != key.strip() or not key.strip():
        fault, name = ("a space before '='", key.strip()) if key.strip() else ("no key before '='", "KEY")
        return f"can't read {word!r}: there is {fault}; type {shlex.quote(f'{name}={value.strip()}')}"
    if value.startswith("="):
        return f"can't read {word!r}: there are two '='; type {shlex.quote(key + value)}"
    remedy = "" if value.lstrip()[:1] in _PAIRS else f". As a string it is typed {typed_string(key, value.strip())}"
    return f"can't read {word!r}: {_reason(value)}{remedy}"


def _explain_without_sign(word: str, words: list[str]) -> str:
    """Explain a word without `=`, such as half of `key = value`, or `key: value`."""
    at = words.index(word) if word in words else 0
    before, after = words[at - 1] if at else "", words[at + 1] if at + 1 < len(words) else ""
    if before.endswith("=") and before != "=":
        return f"can't read {word!r}: there is a space after '='; type {shlex.quote(before + word)}"
    if after.startswith("="):
        value = after[1:] or " ".join(words[at + 2 : at + 3])
        return f"can't read {word!r}: there is a space before '='; type {shlex.quote(f'{word}={value}')}"
    if found := re.match(r"([\w./]+):\s*(.+)", word):
        return f"can't read {word!r}: settings are key=value; type {shlex.quote(f'{found[1]}={found[2]}')}"
    return f"can't read {word!r}: settings are given as key=value, e.g. lr=1e-6; a value with spaces is quoted"


def _reason(value: str) -> str:
    """Return why Hydra can't read a value."""
    is_inside = value.lstrip()[:1] in _PAIRS
    must_be_quoted = "must be quoted" + (
        ": put quotes '...' around the whole item that contains it" if is_inside else ""
    )
    open_brackets, quote = [], ""
    for position, character in enumerate(value):
        before = value[:position].rstrip()[-1:]
        if quote:
            quote = "" if character == quote and value[position - 1] != "\\" else quote
        elif character in "'\"":
            if before not in ("", "[", "{", "(", ",", ":"):
                return f"a quote {character} in the middle of a value"
            quote = character
        elif character in _PAIRS:
            if character == "{" and before not in ("", "[", ",", ":", "$"):
                return f"'{{' in the middle of a value {must_be_quoted}"
            open_brackets.append(character)
        elif character in _PAIRS.values():
            if not open_brackets or _PAIRS[open_brackets.pop()] != character:
                return f"{character!r} closes nothing"
        elif character == "=":
            is_in_mapping = open_brackets[-1:] == ["{"]
            return "inside { } write key:value, not key=value" if is_in_mapping else f"a second '=' {must_be_quoted}"
        elif not _UNQUOTED.match(character):
            return f"{character!r} {must_be_quoted}"
    if quote:
        return f"the quote {quote} is never closed"
    if open_brackets:
        return f"{open_brackets[-1]!r} is never closed"
    return _reason_despite_valid_characters(value)


def _reason_despite_valid_characters(value: str) -> str:
    """Return why Hydra can't read a value whose characters and brackets are right."""
    if "(" in value:
        return "lists are written with [ ], not with ( )"
    if re.search(r"""[{,]\s*(['"])\w+\1\s*:""", value):
        return "keys inside { } are written without quotes"
    if re.search(r"^\s*,|[\[{,]\s*,|,\s*([\]}]|$)", value):
        return "there is nothing before or after a comma"
    if value[:1] in _PAIRS and not value.rstrip().endswith(_PAIRS[value[0]]):
        return f"something follows the closing {_PAIRS[value[0]]!r}"
    return "it isn't a valid value (a number, a word, a list, a mapping or a quoted string)"


def explain_commas(word: str) -> str:
    """Explain a value with commas outside brackets, which Hydra reads as a sweep."""
    key, _, value = word.lstrip("+").partition("=")
    return (
        f"{word}: a list is typed {shlex.quote(f'{key}=[{value}]')}, a string {typed_string(key, value)}; several "
        "runs, one for each value, need -m"
    )
