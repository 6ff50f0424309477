"""Classify a dataset's columns: fields of its format, metadata, or further parts of the prompt.

An unread column that may belong to the prompt is an error, because the prompts would be incomplete without it.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from data.messages import MEDIA, decoded, is_blank, is_message, is_messages
from utils import UserError, closest_match

# alternative column names of each field
PROMPT = ("prompt", "instruction", "question", "query", "input", "context")
COMPLETIONS = ("completions", "responses", "answers")
COMPLETION = ("completion", "response", "output", "answer")
DIALOGUE = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
SYSTEM = ("system", "system_prompt", "system_message")
LABEL = ("label", "kto_tag")
SCORES, RANKS = "scores", "ranks"
FIELDS = (
    *PROMPT, *COMPLETIONS, *COMPLETION, *DIALOGUE, *SYSTEM, *LABEL, SCORES, RANKS, "history", "tools", "chosen",
    "rejected", "text", "labels",
)  # fmt: skip
_PROMPT_PARTS = (*PROMPT, *DIALOGUE, *SYSTEM, "history", "tools", "contexts", "documents", "passages", "functions",
                 "chat_template_kwargs")  # fmt: skip
_RESPONSE_NAMES = (  # other names for chosen and rejected
    ("winner", "loser"), ("winning", "losing"), ("win", "lose"), ("won", "lost"), ("preferred", "dispreferred"),
    ("preferred", "rejected"), ("accepted", "rejected"), ("better", "worse"), ("best", "worst"), ("good", "bad"),
    ("positive", "negative"), ("pos", "neg"), ("y_w", "y_l"), ("yw", "yl"), ("response_w", "response_l"),
    ("response_j", "response_k"), ("chosen_response", "rejected_response"), ("response_chosen", "response_rejected"),
    ("chosen_answer", "rejected_answer"), ("winner_response", "loser_response"), ("choose", "reject"),
    ("chosen_text", "rejected_text"), ("chosen_completion", "rejected_completion"), ("selected", "rejected"),
    ("preferred_output", "non_preferred_output"),
)  # fmt: skip
_METADATA = re.compile(  # words in the names of metadata columns
    r"(^|_)(ids?|idx|index|uid|uuid|guid|hash|md5|sha\d*|sources?|origin|dataset|subset|split|urls?|uri|links?|models?|"
    r"authors?|annotators?|worker|date|time|timestamp|created|updated|lang|language|category|categories|type|task|tags?|"
    r"domain|licen[sc]e|version|meta|metadata|status|scores?|ratings?|margin|difficulty|file|filename|path)(_|$)"
)
_IDENTIFIER = re.compile(r"\S*[\d/:_.@-]\S*")  # one word that may be an id, a number, a date, a path or an address


def kind_of(value: object) -> str:
    """Return the kind of a value: 'string', 'messages', 'list of strings', ..., or 'empty'."""
    whole = decoded(value)
    if is_messages(whole) or is_message(whole):
        return "messages"
    if isinstance(value, list) and value:
        inner = {type(item) for item in value}
        return "list of strings" if inner == {str} else "list of objects" if inner == {dict} else "list"
    names = {str: "string", bool: "boolean", int: "number", float: "number", list: "list", dict: "object"}
    return names.get(type(value), "empty")


@dataclass
class Columns:
    """The columns of a dataset's first rows, and the fields of the formats that they hold."""

    rows: list[dict]  # the first rows of the dataset
    fields: dict[str, str] = field(default_factory=dict)  # maps a field of the format to the column that holds it
    ignored: tuple[str, ...] = ()
    # maps a column to the kind of most of its values, as single rows may be bad
    kinds: dict[str, str] = field(init=False)
    known: dict[str, str] = field(init=False)  # maps fields, and columns that are neither mapped nor ignored, to kinds

    def __post_init__(self):
        counts: dict[str, Counter] = {}
        for row in self.rows:
            for name, value in row.items():
                counts.setdefault(name, Counter())[kind_of(value)] += value is not None and value != []
        self.kinds = {name: column_counts.most_common(1)[0][0] for name, column_counts in counts.items()}
        skipped = {*self.fields.values(), *self.ignored}
        self.known = {name: kind for name, kind in self.kinds.items() if name not in skipped}
        for ours in self.fields:
            field_counts = Counter(map(kind_of, self.values(ours))) or Counter(["empty"])
            self.known[ours] = field_counts.most_common(1)[0][0]

    def values(self, name: str) -> list:
        """Return the values of a field in the first rows, without nulls."""
        values = (value_at(row, self.fields.get(name, name)) for row in self.rows)
        return [value for value in values if value is not None]

    def first(self, names: tuple[str, ...], *kinds: str) -> str | None:
        """Return the first of these names that is the name of a column (of one of the kinds, if any are given)."""
        return next((name for name in names if name in self.known and (not kinds or self.known[name] in kinds)), None)

    def is_empty(self, name: str) -> bool:
        """True if the first rows hold nothing in this column."""
        return all(is_blank(decoded(value)) for value in self.values(name))


def value_at(row: dict, path: str) -> object:
    """Return the value of a column; 'a.b' is key 'b' of the object in column 'a'."""
    if path in row:
        return row[path]
    outer, _, inner = path.partition(".")
    within = row.get(outer) if inner else None
    return value_at(within, inner) if isinstance(within, dict) else None


def check_names(columns: Columns, where: str):
    """Raise UserError if `fields` or `ignored_columns` name a field or column that doesn't exist."""
    for ours, theirs in columns.fields.items():
        if ours not in FIELDS:
            hint = closest_match(ours, FIELDS)
            raise UserError(f"{where}: fields.{ours}={theirs}: no format has a field {ours!r}.{hint}")
        if theirs not in columns.kinds and not any(value_at(row, theirs) is not None for row in columns.rows):
            hint = closest_match(theirs, columns.kinds)
            raise UserError(f"{where}: fields.{ours}={theirs}: there is no column {theirs!r}.{hint}")
    for name in columns.ignored:
        if name not in columns.kinds:
            hint = closest_match(name, columns.kinds)
            raise UserError(f"{where}: ignored_columns=[{name}]: there is no such column.{hint}")


# ---- unread columns -------------------------------------------------------------------------------------------------


def unread(columns: Columns, read: Iterable[str]) -> list[str]:
    """Return the columns that aren't read at all; reading 'a.b' counts as reading column 'a'."""
    outer = {name if name in columns.kinds else name.partition(".")[0] for name in read}
    return [name for name in columns.kinds if name not in outer]


def check_unread(columns: Columns, read: Iterable[str], where: str, has_prompt: bool):
    """Raise UserError, with remedies, for unread columns that may belong to the prompt.

    Args:
        read: the columns that are read.
        has_prompt: False if the prompt is the shared start of chosen and rejected.
    """
    read = list(read)
    left = [name for name in unread(columns, read) if name not in columns.ignored and not columns.is_empty(name)]
    if media := [name for name in left if _holds_media(columns, name)]:
        raise UserError(
            f"{where}: {_listed(media)}: images, audio and video can't be trained on; this program trains on text\n"
            f"Train on the text alone with {_ignoring(columns, media)}"
        )
    if lost := [name for name in left if _column_may_belong_to_prompt(columns, name, read, has_prompt)]:
        field, meaning = ("input", " to append it to the prompt") if has_prompt else ("prompt", "")
        raise UserError(
            f"{where}: {_listed(lost)} may belong to the prompt, but would not be read\nMap it to a field: fields="
            f"{{{field}: {lost[0]}}}{meaning}, fields={{system: {lost[0]}}} for a system message; or ignore it: "
            f"{_ignoring(columns, lost)}"
        )


def value_may_belong_to_prompt(name: str, value: object) -> bool:
    """True if a value may belong to the prompt, in a column that was empty in the first rows."""
    if is_blank(decoded(value)):
        return False
    return name.lower() in (*_PROMPT_PARTS, *MEDIA) or (
        kind_of(value) in ("string", "messages") and not _is_metadata(name, value)
    )


def _listed(names: list[str]) -> str:
    return f"column{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}"


def _ignoring(columns: Columns, names: list[str]) -> str:
    return f"ignored_columns=[{', '.join([*columns.ignored, *names])}]"


def _holds_media(columns: Columns, name: str) -> bool:
    """True if a column is named after media, or holds media in the library's form: {"bytes": ..., "path": ...}."""
    if set(_snake_case(name).split("_")) & set(MEDIA) and columns.kinds[name] not in ("number", "boolean"):
        return True
    items = [item for value in columns.values(name) for item in (value if isinstance(value, list) else [value])]
    return any(isinstance(item, dict) and {"bytes", "path"} <= set(item) for item in items)


def _is_metadata(name: str, value: object) -> bool:
    """True if a column's name, or the form of a string in it, is typical of metadata about the row."""
    return bool(_METADATA.search(_snake_case(name))) or (
        isinstance(value, str) and bool(_IDENTIFIER.fullmatch(value.strip()))
    )


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[\s.-]+", "_", name).lower()


def _column_may_belong_to_prompt(columns: Columns, name: str, read: list[str], has_prompt: bool) -> bool:
    """True unless a column holds numbers, repetitions of other columns, metadata, or categories (recurring strings)."""
    kind, values = columns.kinds[name], [value for value in columns.values(name) if not is_blank(value)]
    if kind in ("number", "boolean", "empty"):
        return False
    if kind == "object" and name.lower() in _PROMPT_PARTS:  # it may have no strings to compare with other columns
        return True
    if all(_repeats_read_columns(row.get(name), row, read) for row in columns.rows):
        return False
    if name.lower() in _PROMPT_PARTS:
        return True
    if kind == "messages":
        return True
    if kind != "string" or all(_is_metadata(name, value) for value in values):
        return False
    n_distinct = len(set(map(str, values)))
    return n_distinct > len(columns.rows) / 2 or (not has_prompt and n_distinct > 1)


def _repeats_read_columns(value: object, row: dict, read: list[str]) -> bool:
    """True if every string in a value is in a column that is read, or if the value joins all their strings."""
    strings = list(_strings(value))
    known = {string for name in read for string in _strings(value_at(row, name))}
    if all(string in known for string in strings):
        return True
    # the whole example as one string, e.g. rendered by a template
    return isinstance(value, str) and len(known) > 1 and all(string in value for string in known)


def _strings(value: object):
    """Yield all strings in a value, stripped."""
    value = decoded(value)
    if isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("role", "from"):
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


# ---- unknown formats -----------------------------------------------------------------------------------------------


def hint_for(columns: Columns) -> str | None:
    """Suggest how to map the columns of data without a known format; None if no column looks like a field."""
    names, prompt = {name.lower(): name for name in columns.kinds}, columns.first(PROMPT)
    if other_case := [name for name in columns.kinds if name not in FIELDS and name.strip().lower() in FIELDS]:
        shown = (f"{name.strip().lower()}: {name if name == name.strip() else repr(name)}" for name in other_case)
        return f"field names are in lower case, without spaces: fields={{{', '.join(shown)}}}"
    if prompt and columns.values(f"{prompt}.messages"):
        prompt = f"{prompt}.messages"
    start = f"prompt: {prompt}, " if prompt not in (None, "prompt") else ""
    for chosen, rejected in _RESPONSE_NAMES:
        if chosen in names and rejected in names:
            return f"perhaps fields={{{start}chosen: {names[chosen]}, rejected: {names[rejected]}}}"
    if ("chosen" in columns.known) != ("rejected" in columns.known):
        present, missing = ("chosen", "rejected") if "chosen" in columns.known else ("rejected", "chosen")
        near = closest_match(missing, [name for name in columns.kinds if name != present])
        as_target = f"; for loss=sft on {present}: fields={{completion: {present}}}" if prompt else ""
        return (
            f"{present!r} is there, but {missing!r} is missing.{near} Map it: fields={{{missing}: COLUMN}}{as_target}"
        )
    if (dialogue := columns.first(DIALOGUE)) and columns.known[dialogue] != "messages":
        return f"{dialogue!r} holds no messages: expected lists of objects with 'role' and 'content', or JSON of such"
    for name, kind in columns.kinds.items():
        inner = {key for row in columns.rows if isinstance(row.get(name), dict) for key in row[name]}
        if kind == "object" and (found := [key for key in ("prompt", "chosen", "rejected") if key in inner]):
            return f"the fields are within {name!r}: fields={{{', '.join(f'{key}: {name}.{key}' for key in found)}}}"
        if kind == "list of objects" and len(columns.rows) == 1:
            return f"the rows are within {name!r}; write one per line: jq -c '.{name}[]' FILE > rows.jsonl"
    return None
