"""Recognize the format of preference data by its columns.

The formats are those of TRL (https://huggingface.co/docs/trl/dataset_formats), UltraFeedback, Alpaca and ShareGPT, and
dialogues as one string each, like Anthropic's. Strings may be replaced by messages: lists of {"role": ..., "content":
...}, or anything that `data.messages` turns into such lists. `data.rows` reads the rows of each format.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from data import columns, rows
from data.columns import Columns
from data.messages import BadExample, is_messages, message_list
from data.rows import Example, Row
from utils import UserError


@dataclass(frozen=True)
class Format:
    """The format of a dataset: a reader of its rows, and the columns of the reader's fields."""

    description: str
    read_row: Callable[[Row], Example]
    columns: dict[str, str]  # by field: the data's column
    kinds: dict[str, str] = field(default_factory=dict)  # by field: the kind of most values
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
        fields: the data's columns of fields that have another name there, such as {'prompt': 'question'}.
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


def _format_of(found: Columns, texts_as_messages: bool) -> Format | str:
    """Return the format with these columns, or the reason why there is none."""
    known, prompt, context = found.known, _prompt_column(found), _context(found)
    completions, completion = found.first(columns.COMPLETIONS), found.first(columns.COMPLETION)
    label, dialogue = found.first(columns.LABEL), found.first(columns.DIALOGUE, "messages")
    has_label = label and (known[label] == "boolean" or label != "label")  # a 'label' may also be a class or a score
    prompt_fields, is_chat = context | _prompt_fields(found, prompt), texts_as_messages or bool(context)
    make = functools.partial(_make_format, found, prompt_fields, is_chat)
    make_of_dialogues = functools.partial(_make_format, found, context, is_chat, has_pairs=False)
    make_of_texts = functools.partial(_make_format, found, {}, False)
    if "chosen" in known and "rejected" in known:
        sides = {"chosen": "chosen", "rejected": "rejected"}
        if prompt:
            return make("preferences{as_messages} ({columns})", rows.read_preferences, sides)
        if "messages" in (known["chosen"], known["rejected"]):
            description = "preferences{as_messages} ({columns}, their shared start is the prompt)"
            return make(description, rows.read_preferences, sides)
        description = "preferences as whole dialogues ({columns}, their shared start is the prompt)"
        return make_of_texts(description, rows.read_transcripts, sides)
    if prompt and completions and known[completions].startswith(("list", "messages")):
        if "labels" in known:
            return "labelled steps (stepwise supervision) are for reward models, which aren't trained here"
        scores = found.first((columns.SCORES, columns.RANKS))
        fields = {"completions": completions} | ({scores: scores} if scores else {})
        description = (
            f"several responses to a prompt{{as_messages}} ({{columns}}{'' if scores else ' with their scores'})"
        )
        lists = (value for value in found.values(completions) if isinstance(value, list))
        has_messages = any(is_messages(one) for value in lists for one in value)
        return _make_format(found, prompt_fields, is_chat or has_messages, description, rows.read_ranked, fields)
    if prompt and completion:
        if label and (completion == "completion" or has_label):
            fields = {"completion": completion, "label": label}
            description = "single responses with a label{as_messages} ({columns})"
            return make(description, rows.read_single, fields, has_pairs=False, is_unpaired=True)
        description = "a response to each prompt{as_messages} ({columns}, for loss=sft)"
        return make(description, rows.read_single, {"completion": completion}, has_pairs=False)
    if dialogue and has_label:
        fields = {"dialogue": dialogue, "label": label}
        description = "dialogues as messages with a label ({columns})"
        return make_of_dialogues(description, rows.read_dialogue, fields, is_unpaired=True)
    if dialogue and dialogue != prompt:
        description = "dialogues as messages ({columns}, for loss=sft)"
        return make_of_dialogues(description, rows.read_dialogue, {"dialogue": dialogue})
    if "text" in known:
        description = "texts without a prompt ({columns}, for loss=sft)"
        return make_of_texts(description, rows.read_text, {"text": "text"}, has_pairs=False)
    if hint := columns.hint_for(found):
        return f"unknown format: {hint}"
    if prompt:
        return "there are prompts but no responses to train on; add responses"
    return (
        "unknown format: expected e.g. prompt, chosen and rejected; map other names with fields={prompt: ..., "
        "chosen: ..., rejected: ...}"
    )


def _make_format(
    found: Columns,
    prompt_fields: dict[str, str],
    is_chat: bool,
    description: str,
    read_row: Callable[[Row], Example],
    fields: dict[str, str],
    **flags: bool,
) -> Format:
    """Make a format.

    Args:
        prompt_fields: the fields of the prompt and its context, each with its name among the columns found.
        description: a format string with {columns} and {as_messages}, which is ' as messages' in a chat.
        fields: all other fields.
    """
    fields = prompt_fields | fields
    kinds = {name: found.known[column] for name, column in fields.items()}
    is_chat = is_chat or "messages" in kinds.values()
    described = description.format(columns=", ".join(fields.values()), as_messages=" as messages" if is_chat else "")
    data_columns = {name: found.fields.get(column, column) for name, column in fields.items()}
    return Format(described, read_row, data_columns, kinds, is_chat, **flags)


def _prompt_column(found: Columns) -> str | None:
    """Return a column with a prompt's name, or one of dialogues that don't end with an answer; None without either."""
    if prompt := found.first(columns.PROMPT, "string", "messages") or found.first(columns.PROMPT):
        return prompt
    dialogue = found.first(columns.DIALOGUE, "messages")
    last_roles = [_last_role(value) for value in found.values(dialogue)] if dialogue else []
    return dialogue if sum(role != "assistant" for role in last_roles) > len(last_roles) / 2 else None


def _last_role(value: object) -> str:
    try:
        return message_list(value, "")[-1]["role"]
    except BadExample:
        return "assistant"  # treat bad messages as a whole dialogue, whose reader reports them


def _context(found: Columns) -> dict[str, str]:
    """Return the non-empty columns of the prompt's context, which only a chat template can render."""
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
    """Return the prompt's column; also the column `input` if the prompt is an `instruction` or `fields` maps input."""
    if prompt is None:
        return {}
    may_have_input = prompt == "instruction" or "input" in found.fields
    has_input = may_have_input and prompt != "input" and "input" in found.known
    return {"prompt": prompt} | ({"input": "input"} if has_input else {})


# ---- prompts only ---------------------------------------------------------------------------------------------------


def prompt_example(row: dict, texts_as_messages: bool = False) -> Example:
    """Return an example without responses: the prompt in a row, with its context.

    Raises: BadExample if it has none.
    """
    found = Columns([row])
    prompt = found.first(columns.PROMPT) or found.first(columns.DIALOGUE)
    if prompt is None or row[prompt] is None:
        raise BadExample("missing field", f"it has no field {', '.join(columns.PROMPT)} or messages")
    context = _context(found)
    prompt_fields, is_chat = context | _prompt_fields(found, prompt), texts_as_messages or bool(context)
    data_format = _make_format(found, prompt_fields, is_chat, "", rows.read_prompt, {})
    values = Row(row, data_format.columns, data_format.kinds, data_format.is_chat)
    example = Example(rows.read_prompt(values), [], tools=values.tools())
    if isinstance(example.prompt, str):
        values.text("prompt")  # raises BadExample if it is empty
    elif example.prompt[-1]["role"] == "assistant":
        raise BadExample("no prompt", "its last turn is the assistant's; remove that turn")
    return example
