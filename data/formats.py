"""Recognize the format of preference data by its columns.

The formats are those of TRL (https://huggingface.co/docs/trl/dataset_formats), UltraFeedback, Alpaca and ShareGPT, and
dialogues as one string each, like Anthropic's. Strings may be replaced by messages: lists of {"role": ..., "content":
...}, or anything that `data.messages` turns into such lists. `data.rows` reads the rows of each format.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from data import columns as names
from data import rows as read
from data.columns import Columns
from data.messages import BadExample, is_messages, message_list
from data.rows import Example, Row
from utils import UserError


@dataclass(frozen=True)
class Format:
    """The format of a dataset: a reader of its rows, and the columns of the reader's fields."""

    description: str
    read_row: Callable[[Row], Example]
    columns: dict[str, str]  # name of a field that is read: the data's column
    kinds: dict[str, str] = field(default_factory=dict)  # of these fields
    is_chat: bool = False  # prompt and responses are messages, or are turned into messages
    has_pairs: bool = True
    is_unpaired: bool = False
    unread: tuple[str, ...] = ()  # columns without a field
    empty: tuple[str, ...] = ()  # unread columns that were empty in the rows that decided the format

    def read(self, row: dict) -> Example:
        """Return the example in a row. Raises: BadExample if it can't be used."""
        for name in self.empty:
            if names.is_lost(name, row.get(name)):
                raise BadExample(
                    "unread column",
                    f"column {name!r} is {row[name]!r:.60}, but was empty in the first rows, which decided the "
                    f"format: map it with fields={{system: {name}}}, or ignore it with ignored_columns=[{name}]",
                )
        return self.read_row(Row(row, self.columns, self.kinds, self.is_chat))

    def check_columns(self, rows: Sequence[dict], ignored: Sequence[str], where: str):
        """Raise UserError if rows have unread columns that may belong to the prompt."""
        names.check_unread(Columns(list(rows), ignored=tuple(ignored)), self.columns.values(), where, self.has_prompt)

    @property
    def could_be_chat(self) -> bool:
        """True if prompts and responses are strings that `texts_as_messages` would turn into messages."""
        return not self.is_chat and "prompt" in self.columns

    @property
    def is_ranked(self) -> bool:
        """True if a row has several responses with scores."""
        return self.read_row is read.read_ranked

    @property
    def has_prompt(self) -> bool:
        """False if the prompt is the shared start of chosen and rejected strings."""
        return self.read_row is not read.read_transcripts


def recognize(
    rows: Sequence[dict],
    fields: dict[str, str],
    where: str,
    ignored: Sequence[str] = (),
    texts_as_messages: bool = False,
) -> Format:
    """Return the format of a dataset, from the columns of its first rows.

    Args:
        fields: columns of fields whose names differ, such as {'prompt': 'question'}.
        where: the dataset, for error messages.
        ignored: columns not to read.
        texts_as_messages: turn plain prompts and responses into user and assistant messages.

    Raises: UserError with the remedy if no format fits, or a column that may belong to the prompt isn't read.
    """
    columns = Columns(list(rows), dict(fields), tuple(ignored))
    names.check_names(columns, where)
    found = _format_of(columns, texts_as_messages)
    if isinstance(found, str):
        listed = ", ".join(f"{name} ({kind})" for name, kind in columns.kinds.items())
        raise UserError(f"{where}: {found}; its fields are {listed or 'none'}\nSee docs/data.md for the formats")
    found.check_columns(rows, ignored, where)
    unread = names.unread(columns, found.columns.values())
    empty = tuple(name for name in unread if columns.is_empty(name) and name not in ignored)
    return replace(found, unread=tuple(name for name in unread if name not in empty), empty=empty)


def _format_of(columns: Columns, texts_as_messages: bool) -> Format | str:
    """Return the format with these columns, or the reason why there is none."""
    prompt, completions = _prompt_column(columns), columns.first(names.COMPLETIONS)
    completion, label = columns.first(names.COMPLETION), columns.first(names.LABEL)
    dialogue = columns.first(names.DIALOGUE, "messages")
    make = _Maker(columns, prompt, texts_as_messages)
    if "chosen" in columns.known and "rejected" in columns.known:
        return make.preferences()
    if prompt and completions and columns.known[completions].startswith(("list", "messages")):
        if "labels" in columns.known:
            return "labelled steps (stepwise supervision) are for reward models, which aren't trained here"
        return make.ranked(completions)
    if prompt and completion:
        if label and (completion == "completion" or _holds_labels(columns, label)):
            fields = {"completion": completion, "label": label}
            return make("single responses with a label", read.read_single, fields, has_pairs=False, is_unpaired=True)
        return make("a response to each prompt", read.read_single, {"completion": completion}, "for loss=sft",
                    has_pairs=False)  # fmt: skip
    if dialogue and label and _holds_labels(columns, label):
        fields = {"dialogue": dialogue, "label": label}
        return make("dialogues as messages with a label", read.read_dialogue, fields, has_pairs=False, is_unpaired=True)
    if dialogue and dialogue != prompt:
        return make("dialogues as messages", read.read_dialogue, {"dialogue": dialogue}, "for loss=sft",
                    has_pairs=False)  # fmt: skip
    if "text" in columns.known:
        return make.text()
    if hint := names.hint_for(columns):
        return f"unknown format: {hint}"
    if prompt:
        return "there are prompts but no responses to train on; add responses"
    return (
        "unknown format: expected e.g. prompt, chosen and rejected; map other names with fields={prompt: ..., "
        "chosen: ..., rejected: ...}"
    )


def _prompt_column(columns: Columns) -> str | None:
    """Return a column with a prompt's name, else one of dialogues that don't end with an answer; None if neither."""
    if prompt := columns.first(names.PROMPT, "string", "messages") or columns.first(names.PROMPT):
        return prompt
    dialogue = columns.first(names.DIALOGUE, "messages")
    last_roles = [_last_role(value) for value in columns.values(dialogue)] if dialogue else []
    return dialogue if sum(role != "assistant" for role in last_roles) > len(last_roles) / 2 else None


def _last_role(value: object) -> str:
    try:
        return message_list(value, "")[-1]["role"]
    except BadExample:
        return "assistant"  # treat bad messages as a whole dialogue, whose reader reports them


def _holds_labels(columns: Columns, label: str) -> bool:
    """True if the column has booleans, or a name other than 'label', which may also mean a class or a score."""
    return columns.known[label] == "boolean" or label != "label"


@dataclass
class _Maker:
    """Makes formats from a dataset's columns, and adds those of the prompt's context."""

    columns: Columns
    prompt: str | None
    texts_as_messages: bool

    def preferences(self) -> Format:
        fields, known = {"chosen": "chosen", "rejected": "rejected"}, self.columns.known
        shared = "" if self.prompt else "their shared start is the prompt"
        if "messages" in (known["chosen"], known["rejected"]):
            return self("preferences", read.read_messages, fields, shared, is_chat=True)
        if self.prompt is None:
            return self._plain("preferences as whole dialogues", read.read_transcripts, fields, shared)
        return self("preferences", None, fields)

    def text(self) -> Format:
        return self._plain("texts without a prompt", read.read_text, {"text": "text"}, "for loss=sft", has_pairs=False)

    def _plain(self, description: str, read_row: Callable, fields: dict[str, str], note: str, **kwargs) -> Format:
        """Make a format of strings without a prompt column, which can't have a context."""
        columns = {name: self.columns.fields.get(name, name) for name in fields}
        kinds = {name: self.columns.known[name] for name in fields}
        return Format(f"{description} ({', '.join(fields)}, {note})", read_row, columns, kinds, **kwargs)

    def ranked(self, completions: str) -> Format:
        scores = self.columns.first((names.SCORES, names.RANKS))
        fields = {"completions": completions} | ({scores: scores} if scores else {})
        note = "" if scores else " with their scores"
        has_messages = any(is_messages(one) for value in self.columns.values(completions) for one in value or [])
        return self("several responses to a prompt", read.read_ranked, fields, note, is_chat=has_messages)

    def __call__(
        self,
        description: str,
        read_row: Callable | None,
        fields: dict[str, str],
        note: str = "",
        is_chat: bool = False,
        **kwargs: bool,
    ) -> Format:
        """Make a format with a prompt or a dialogue.

        Args:
            read_row: None chooses a reader of preferences, as strings or as messages.
            fields: the fields besides the prompt and its context.
            note: an addition to the description.
        """
        prompt_fields = self._context() | ({} if "dialogue" in fields else self._prompt())
        is_chat = is_chat or self.texts_as_messages or bool({"system", "history", "tools"} & set(prompt_fields))
        fields = prompt_fields | fields
        kinds = {name: self.columns.known[column] for name, column in fields.items()}
        is_chat = is_chat or "messages" in kinds.values()
        if read_row is None:
            read_row = read.read_messages if is_chat else read.read_texts
        as_messages = " as messages" if is_chat and "as messages" not in description else ""
        note = note if not note or note.startswith(" ") else f", {note}"
        columns = {name: self.columns.fields.get(column, column) for name, column in fields.items()}
        described = f"{description}{as_messages} ({', '.join(fields.values())}{note})"
        return Format(described, read_row, columns, kinds, is_chat, **kwargs)

    def _context(self) -> dict[str, str]:
        """Return the non-empty columns of the prompt's context, which only a chat template can render."""
        found = {"system": self.columns.first(names.SYSTEM, "string", "messages")}
        found |= {name: self.columns.first((name,)) for name in ("history", "tools")}
        if self.columns.known.get("history") == "string" and "history" not in self.columns.fields:
            del found["history"]  # a string may be the prompt itself
        return {name: column for name, column in found.items() if column and self._is_filled(column)}

    def _prompt(self) -> dict[str, str]:
        """Return the prompt's column, and the input's after an instruction (Alpaca) or if `fields` has input."""
        if self.prompt is None:
            return {}
        may_have_input = self.prompt == "instruction" or "input" in self.columns.fields
        has_input = may_have_input and self.prompt != "input" and "input" in self.columns.known
        return {"prompt": self.prompt} | ({"input": "input"} if has_input else {})

    def _is_filled(self, column: str) -> bool:
        return column in self.columns.fields or not self.columns.is_empty(column)


# ---- prompts only ---------------------------------------------------------------------------------------------------


def prompt_example(row: dict, texts_as_messages: bool = False) -> Example:
    """Return an example without responses: the prompt in a row, with its context.

    Raises: BadExample if it has none.
    """
    columns = Columns([row])
    prompt = columns.first(names.PROMPT) or columns.first(names.DIALOGUE)
    if prompt is None or row[prompt] is None:
        raise BadExample("missing field", f"it has no field {', '.join(names.PROMPT)} or messages")
    found = _Maker(columns, prompt, texts_as_messages)("", read.read_prompt, {})
    values = Row(row, found.columns, found.kinds, found.is_chat)
    example = Example(read.read_prompt(values), [], tools=values.tools())
    if isinstance(example.prompt, str):
        values.text("prompt")
    elif example.prompt[-1]["role"] == "assistant":
        raise BadExample("no prompt", "its last turn is the assistant's; remove that turn")
    return example
