"""Recognize the format of preference data by its columns.

The formats are those of TRL (https://huggingface.co/docs/trl/dataset_formats), UltraFeedback, Alpaca and ShareGPT, and
dialogues as one string each, like Anthropic's. Strings may be replaced by messages: lists of {"role": ..., "content":
...}, or anything that `data.messages` turns into such lists. `data.rows` reads the rows of each format.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from data import columns, rows
from data.columns import Columns
from data.messages import BadExample, is_messages, message_list
from data.rows import Example, Row
from utils import UserError


@dataclass(frozen=True)
class Format:
    """The format of a dataset: the function that reads its rows, and the columns of the fields that it reads."""

    description: str  # for the log
    read_row: Callable[[Row], Example]
    columns: dict[str, str] = field(default_factory=dict)  # maps a field to the column that holds it
    kinds: dict[str, str] = field(default_factory=dict)  # maps a field to the kind of most of its values
    is_chat: bool = False  # prompt and responses are messages, or are turned into messages
    has_pairs: bool = True
    is_unpaired: bool = False
    unread: tuple[str, ...] = ()  # columns without a field
    empty: tuple[str, ...] = ()  # unread columns that were empty in the rows that decided the format

    def read(self, row: dict) -> Example:
        """Return the example in a row. Raises: BadExample if it can't be used."""
        for name in self.empty:
            if columns.value_may_belong_to_prompt(name, row.get(name)):
                raise BadExample(
                    "unread column",
                    f"column {name!r} is {row[name]!r:.60}, but was empty in the first rows, which decided the "
                    f"format: map it with fields={{system: {name}}}, or ignore it with ignored_columns=[{name}]",
                )
        return self.read_row(Row(row, self.columns, self.kinds, self.is_chat))

    def check_columns(self, first_rows: Sequence[dict], ignored: Sequence[str], where: str):
        """Raise UserError if rows have unread columns that may belong to the prompt."""
        found = Columns(list(first_rows), ignored=tuple(ignored))
        columns.check_unread(found, self.columns.values(), where, self.has_prompt)

    @property
    def could_be_chat(self) -> bool:
        """True if prompts and responses are strings that `texts_as_messages` would turn into messages."""
        return not self.is_chat and "prompt" in self.columns

    @property
    def is_ranked(self) -> bool:
        """True if a row has several responses with scores."""
        return self.read_row is rows.read_ranked

    @property
    def takes_context(self) -> bool:
        """True if rows are read with their system text, history and tools."""
        return self.read_row not in (rows.read_transcripts, rows.read_text)

    @property
    def has_prompt(self) -> bool:
        """False if the prompt is the shared start of chosen and rejected strings."""
        return self.read_row is not rows.read_transcripts


def recognize(
    first_rows: Sequence[dict],
    fields: dict[str, str],
    where: str,
    ignored: Sequence[str] = (),
    texts_as_messages: bool = False,
) -> Format:
    """Return the format of a dataset, from the columns of its first rows.

    Args:
        fields: maps fields to the columns that hold them under another name, such as {'prompt': 'question'}.
        where: the dataset, for error messages.
        ignored: columns not to read.
        texts_as_messages: turn plain prompts and responses into user and assistant messages.

    Raises: UserError with the remedy if no format fits, or a column that may belong to the prompt isn't read.
    """
    found = Columns(list(first_rows), dict(fields), tuple(ignored))
    columns.check_names(found, where)
    data_format = _format_of(found, texts_as_messages)
    if isinstance(data_format, str):
        listed = ", ".join(f"{name} ({kind})" for name, kind in found.kinds.items())
        raise UserError(f"{where}: {data_format}; its fields are {listed or 'none'}\nSee docs/data.md for the formats")
    data_format.check_columns(first_rows, ignored, where)
    unread = columns.unread(found, data_format.columns.values())
    empty = tuple(name for name in unread if found.is_empty(name) and name not in ignored)
    return replace(data_format, unread=tuple(name for name in unread if name not in empty), empty=empty)


# the fields by which each format is recognized, and the format; the first one whose fields are all found is taken, but
# those with is_chat only if chosen or rejected holds messages
_FORMATS = [
    ("prompt chosen rejected", Format("preferences{as_messages} ({columns})", rows.read_preferences)),
    ("chosen rejected", Format("preferences as messages ({columns}, their shared start is the prompt)",
                               rows.read_preferences, is_chat=True)),
    ("chosen rejected", Format("preferences as whole dialogues ({columns}, their shared start is the prompt)",
                               rows.read_transcripts)),
    ("prompt completions scores", Format("several responses to a prompt{as_messages} ({columns})", rows.read_ranked)),
    ("prompt completions ranks", Format("several responses to a prompt{as_messages} ({columns})", rows.read_ranked)),
    ("prompt completions", Format("several responses to a prompt{as_messages} ({columns} with their scores)",
                                  rows.read_ranked)),
    ("prompt completion label", Format("single responses with a label{as_messages} ({columns})", rows.read_single,
                                       has_pairs=False, is_unpaired=True)),
    ("prompt completion", Format("a response to each prompt{as_messages} ({columns}, for loss=sft)", rows.read_single,
                                 has_pairs=False)),
    ("dialogue label", Format("dialogues as messages with a label ({columns})", rows.read_dialogue, has_pairs=False,
                              is_unpaired=True)),
    ("dialogue", Format("dialogues as messages ({columns}, for loss=sft)", rows.read_dialogue, has_pairs=False)),
    ("text", Format("texts without a prompt ({columns}, for loss=sft)", rows.read_text, has_pairs=False)),
]  # fmt: skip


def _format_of(found: Columns, texts_as_messages: bool) -> Format | str:
    """Return the format with these columns, or the reason why there is none."""
    fields, context = _recognized_fields(found), _context(found)
    has_chat_sides = "messages" in (found.known.get("chosen"), found.known.get("rejected"))
    for words, data_format in _FORMATS:
        needed = words.split()
        if not set(needed) <= fields.keys() or (data_format.is_chat and not has_chat_sides):
            continue
        if data_format.is_ranked and "labels" in found.known:
            return "labelled steps (stepwise supervision) are for reward models, which aren't trained here"
        own = {name: fields[name] for name in needed}
        if not data_format.takes_context:
            return _with_columns(data_format, found, own, is_chat=False)
        before = context | (_prompt_fields(found, fields["prompt"]) if "prompt" in needed else {})
        lists = [value for value in found.values(own.get("completions", "")) if isinstance(value, list)]
        has_dialogues = any(is_messages(response) for responses in lists for response in responses)
        is_chat = texts_as_messages or bool(context) or has_dialogues
        return _with_columns(data_format, found, before | own, is_chat)
    if hint := columns.hint_for(found):
        return f"unknown format: {hint}"
    if "prompt" in fields:
        return "there are prompts but no responses to train on; add responses"
    return (
        "unknown format: expected e.g. prompt, chosen and rejected; map other names with fields={prompt: ..., "
        "chosen: ..., rejected: ...}"
    )


def _recognized_fields(found: Columns) -> dict[str, str]:
    """Map the fields that decide the format to their columns; fields without a column are left out."""
    prompt, completion = _prompt_column(found), found.first(columns.COMPLETION)
    label, dialogue = found.first(columns.LABEL), found.first(columns.DIALOGUE, "messages")
    is_single = prompt and completion == "completion"
    if label == "label" and found.known[label] != "boolean" and not is_single:
        label = None  # it may be a class or a score
    fields = {
        "prompt": prompt,
        "completions": found.first(columns.COMPLETIONS, "list", "list of strings", "list of objects", "messages"),
        "completion": completion,
        "label": label,
        "dialogue": dialogue if label or dialogue != prompt else None,
    }
    fields |= {name: found.first((name,)) for name in ("chosen", "rejected", columns.SCORES, columns.RANKS, "text")}
    return {name: column for name, column in fields.items() if column}


def _with_columns(data_format: Format, found: Columns, fields: dict[str, str], is_chat: bool) -> Format:
    """Complete a format by its columns.

    Args:
        fields: maps the format's fields to the columns found.
    """
    kinds = {name: found.known[column] for name, column in fields.items()}
    is_chat = is_chat or "messages" in kinds.values()
    words = {"columns": ", ".join(fields.values()), "as_messages": " as messages" if is_chat else ""}
    return replace(
        data_format,
        description=data_format.description.format(**words),
        columns={name: found.fields.get(column, column) for name, column in fields.items()},
        kinds=kinds,
        is_chat=is_chat,
    )


def _prompt_column(found: Columns) -> str | None:
    """Return the column of the prompt: one with a prompt's name, or one whose dialogues mostly lack an answer."""
    if prompt := found.first(columns.PROMPT, "string", "messages") or found.first(columns.PROMPT):
        return prompt
    dialogue = found.first(columns.DIALOGUE, "messages")
    last_roles = [_last_role(value) for value in found.values(dialogue)] if dialogue else []
    return dialogue if sum(role != "assistant" for role in last_roles) > len(last_roles) / 2 else None


def _last_role(value: object) -> str:
    try:
        return message_list(value, "")[-1]["role"]
    except BadExample:
        return "assistant"  # count bad messages as a dialogue with an answer: its reader reports them


def _context(found: Columns) -> dict[str, str]:
    """Return the columns of the prompt's context, which only a chat template can render, without empty ones.

    A column that `fields` maps is returned even if it is empty.
    """
    context = {"system": found.first(columns.SYSTEM, "string", "messages")}
    context |= {name: found.first((name,)) for name in ("history", "tools")}
    if found.known.get("history") == "string" and "history" not in found.fields:
        del context["history"]  # a string may be the prompt itself
    return {
        name: column
        for name, column in context.items()
        if column and (column in found.fields or not found.is_empty(column))
    }


def _prompt_fields(found: Columns, prompt: str | None) -> dict[str, str]:
    """Map the field 'prompt' to its column, and 'input' to the column that continues the prompt, if there is one.

    That is a column `input` beside `instruction`, or one that `fields` maps.
    """
    if prompt is None:
        return {}
    may_have_input = prompt == "instruction" or "input" in found.fields
    has_input = may_have_input and prompt != "input" and "input" in found.known
    return {"prompt": prompt} | ({"input": "input"} if has_input else {})


# ---- prompts only ---------------------------------------------------------------------------------------------------


def prompt_example(row: dict, texts_as_messages: bool = False) -> Example:
    """Return the prompt in a row, with its context, as an example without responses.

    Raises: BadExample if the row has no prompt.
    """
    found = Columns([row])
    prompt = found.first(columns.PROMPT) or found.first(columns.DIALOGUE)
    if prompt is None or row[prompt] is None:
        raise BadExample("missing field", f"it has no field {', '.join(columns.PROMPT)} or messages")
    context = _context(found)
    prompt_fields, is_chat = context | _prompt_fields(found, prompt), texts_as_messages or bool(context)
    data_format = _with_columns(Format("", rows.read_prompt), found, prompt_fields, is_chat)
    values = Row(row, data_format.columns, data_format.kinds, data_format.is_chat)
    example = Example(rows.read_prompt(values), [], tools=values.tools())
    if isinstance(example.prompt, str):
        values.text("prompt")  # raises BadExample if it is empty
    elif example.prompt[-1]["role"] == "assistant":
        raise BadExample("no prompt", "its last turn is the assistant's; remove that turn")
    return example
