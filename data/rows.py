"""Read the rows of each format into examples: a prompt, responses, and preferences between them."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from data.columns import RANKS, value_at
from data.messages import (
    BadExample,
    as_turn,
    decoded,
    history_messages,
    is_blank,
    is_message,
    is_messages,
    message_list,
    system_messages,
    tool_list,
)

Text = str | list[dict]  # a string, or messages
TURN = "\n\nAssistant:"  # the end of a prompt, in dialogues as one string

# possible keys of a response that is an object
_TEXT_KEYS = ("content", "text", "response", "completion", "value")
_SCORE_KEYS = ("score", "overall_score", "pm_score", "rating")
_RANK_KEY = "rank"
_LABELS = {1: True, 0: False, "1": True, "0": False, "true": True, "false": False}  # CSV has only strings


@dataclass
class Example:
    """A prompt, responses to it, and preferences between them.

    Prompt and responses are all strings or all messages.
    """

    prompt: Text
    responses: list[Text]
    pairs: list[tuple[int, int]] = field(default_factory=list)  # indices into responses: preferred, dispreferred
    target: int = 0  # index of the response that SFT imitates
    tools: list | None = None  # for the chat template
    label: bool | None = None  # unpaired data: True if the only response is desirable


@dataclass(frozen=True)
class Row:
    """A row, whose values are read by the names of the format's fields."""

    values: dict
    columns: Mapping[str, str]  # maps a field to the column that holds it
    kinds: Mapping[str, str]  # maps a field to the kind of its values in most rows
    is_chat: bool  # prompt and responses are messages, or are turned into messages

    def name(self, field: str) -> str:
        """Return the column of a field, for error messages."""
        return self.columns[field]

    def get(self, field: str) -> object:
        """Return the value of a field; None if it isn't read. Messages stored as JSON are decoded."""
        if field not in self.columns:
            return None
        value = value_at(self.values, self.columns[field])
        return decoded(value) if self.kinds.get(field) == "messages" else value

    def value(self, field: str) -> object:
        """Return the value of a field. Raises: BadExample if it is missing or null."""
        if (value := self.get(field)) is None:
            raise BadExample("missing field", f"field {self.name(field)!r} is missing or empty")
        return value

    def text(self, field: str, may_be_empty: bool = False) -> str:
        """Return the string in a field. Raises: BadExample if it isn't a string, or is empty."""
        value = self.value(field)
        if not isinstance(value, str):
            raise BadExample("wrong type", f"field {self.name(field)!r} is {value!r:.60}, expected a string")
        if not may_be_empty and not value.strip():
            raise BadExample("empty response", f"field {self.name(field)!r} is an empty string")
        whole = decoded(value)
        if isinstance(whole, dict) and (found := [key for key, item in whole.items() if is_messages(item)]):
            raise BadExample(
                "messages within JSON",
                f"field {self.name(field)!r} is JSON of an object whose {found[0]!r} holds messages: store only the "
                "messages in the field, and the object's other values in columns of their own",
            )
        return value

    def turns(self, field: str, role: str) -> list[dict]:
        """Return the value of a field as messages; a string becomes a turn of `role`."""
        value = self.value(field)
        if isinstance(value, str) and self.kinds[field] != "messages":
            return as_turn(self.text(field, may_be_empty=role == "user"), role)
        return message_list(value, self.name(field))

    def tools(self) -> list | None:
        """Return the tools in the row; None if there are none."""
        return tool_list(self.get("tools"), self.name("tools")) if "tools" in self.columns else None


# ---- prompts --------------------------------------------------------------------------------------------------------


def read_prompt(row: Row) -> Text:
    """Return the prompt with its input appended; in a chat, as messages, after system message and history."""
    if not row.is_chat:
        return _with_input(row, row.text("prompt", may_be_empty=True))
    value = row.value("prompt")
    if isinstance(value, str):
        return _in_context(row, as_turn(_with_input(row, row.text("prompt", may_be_empty=True)), "user"))
    if not is_blank(row.get("input")):
        raise BadExample("wrong type", f"field {row.name('input')!r} can't be appended to messages")
    return _in_context(row, message_list(value, row.name("prompt")))


def _with_input(row: Row, prompt: str) -> str:
    """Return the prompt and, on a new line, its input if it has one (Alpaca)."""
    return prompt if is_blank(row.get("input")) else f"{prompt}\n{row.text('input')}"


def _in_context(row: Row, messages: list[dict]) -> list[dict]:
    """Return messages, preceded by the row's system message and earlier turns."""
    system = system_messages(row.get("system"), row.name("system")) if "system" in row.columns else []
    history = history_messages(row.get("history"), row.name("history")) if "history" in row.columns else []
    if system and messages and messages[0] == system[0]:
        system = []  # the messages already begin with it
    if any(message["role"] == "system" for message in messages) and (system or history):
        raise BadExample(
            "two system texts", "the messages include a system message, but the row also has a system text or a history"
        )
    return system + history + messages


# ---- preferences ----------------------------------------------------------------------------------------------------


def read_preferences(row: Row) -> Example:
    """Read a prompt, a chosen and a rejected response."""
    if row.is_chat:
        return _read_messages(row)
    responses = [row.text("chosen"), row.text("rejected")]
    _check_different(responses)
    return Example(read_prompt(row), responses, [(0, 1)])


def _check_different(responses: list[Text]):
    if responses[0] == responses[1]:
        raise BadExample("identical responses", "chosen and rejected are the same")


def shared_start(texts: list[str]) -> str:
    """Return the longest common prefix of strings."""
    shortest = min(texts, key=len)
    low, high = 0, len(shortest)  # binary search: the first `low` characters are shared
    while low < high:
        middle = (low + high + 1) // 2
        if all(text.startswith(shortest[low:middle], low) for text in texts):
            low = middle
        else:
            high = middle - 1
    return shortest[:low]


def read_transcripts(row: Row) -> Example:
    """Read two whole dialogues as strings; the prompt is their shared start, up to its last turn or word."""
    chosen, rejected = row.text("chosen"), row.text("rejected")
    _check_different([chosen, rejected])
    shared = shared_start([chosen, rejected])
    if (turn := shared.rfind(TURN)) >= 0:
        border = turn + len(TURN)
    elif TURN in chosen and TURN in rejected:
        raise BadExample("no shared prompt", f"chosen and rejected differ before the first {TURN!r}")
    else:
        border = _word_border(shared, chosen, rejected)
    responses = [chosen[border:], rejected[border:]]
    if not all(response.strip() for response in responses):
        raise BadExample("empty response", "chosen is the beginning of rejected, or the reverse")
    return Example(chosen[:border], responses, [(0, 1)])


def _word_border(shared: str, *texts: str) -> int:
    """Return where the shared start's last whole word ends; a space after it belongs to the responses' first token."""
    border = len(shared)
    if any(_is_word_character(text[border : border + 1]) for text in texts):
        while border > 0 and _is_word_character(shared[border - 1]):
            border -= 1
    return border - 1 if shared[:border].endswith(" ") else border


def _is_word_character(character: str) -> bool:
    return character.isalnum() and character < "\u2e80"  # later scripts (CJK) have no spaces between words


def _read_messages(row: Row) -> Example:
    """Read a prompt, a chosen and a rejected response as messages; the responses may repeat the prompt."""
    sides = [row.turns(side, "assistant") for side in ("chosen", "rejected")]
    prompt, sides = _split_off_prompt(row, sides)
    if not prompt:
        raise BadExample("no shared prompt", "chosen and rejected share no first messages")
    _check_different(sides)
    for response in sides:
        _check_response(response)
    return Example(prompt, sides, [(0, 1)], tools=row.tools())


def _split_off_prompt(row: Row, sides: list[list[dict]]) -> tuple[list[dict], list[list[dict]]]:
    """Return the prompt, and both sides without it."""
    shared = [a for a, b in itertools.takewhile(lambda both: both[0] == both[1], zip(*sides, strict=False))]
    while shared and shared[-1]["role"] == "assistant":  # a response isn't part of its prompt
        shared.pop()
    after_shared = [side[len(shared) :] for side in sides]
    if is_blank(row.get("prompt")):
        return (_in_context(row, shared) if shared else []), after_shared
    if not shared:
        given = read_prompt(row)
        return given, [_without_start(side, given) for side in sides]
    given = row.get("prompt")
    if isinstance(given, str):
        if not any(given.strip() in str(message.get("content", "")) for message in shared):
            reason = f"chosen and rejected don't begin with the prompt in field {row.name('prompt')!r}"
            raise BadExample("no shared prompt", reason)
        return _in_context(row, shared), after_shared
    given = message_list(given, row.name("prompt"))
    if shared[-len(given) :] == given:  # a system message or other messages may precede the prompt
        return _in_context(row, shared), after_shared
    return read_prompt(row), [_without_start(side, given) for side in sides]


def _without_start(side: list[dict], prompt: list[dict]) -> list[dict]:
    return side[len(prompt) :] if side[: len(prompt)] == prompt else side


def _check_response(response: list[dict]):
    """Raise BadExample if a response is empty, or begins with a turn of the user or the system."""
    if not any(str(message.get("content", "")).strip() or "tool_calls" in message for message in response):
        raise BadExample("empty response", "a response has no content")
    if response[0]["role"] in ("user", "system"):
        role = response[0]["role"]
        raise BadExample("no shared prompt", f"a response begins with a message of role {role!r}, not of the assistant")


# ---- several responses ----------------------------------------------------------------------------------------------


def read_ranked(row: Row) -> Example:
    """Read a prompt and several responses with scores or ranks; any two with different scores are a pair."""
    completions, name = row.value("completions"), row.name("completions")
    if not isinstance(completions, list) or not completions:
        raise BadExample("wrong type", f"field {name!r} is {completions!r:.60}, expected responses")
    scores = _scores(row, completions)
    responses = [_response(completion, name) for completion in completions]
    if row.is_chat:
        responses = [as_turn(one, "assistant") if isinstance(one, str) else one for one in responses]
    pairs = [
        (i, j) if scores[i] > scores[j] else (j, i)
        for i, j in itertools.combinations(range(len(responses)), 2)
        if scores[i] != scores[j]
    ]
    best = scores.index(max(scores))
    return Example(read_prompt(row), responses, pairs, best, row.tools())


def _scores(row: Row, completions: list) -> list[float]:
    """Return a score for each response; a higher one is better."""
    scores_field = next((name for name in ("scores", RANKS) if name in row.columns), None)
    if scores_field is None:
        scores = [_score(completion, row.name("completions")) for completion in completions]
    else:
        scores = row.value(scores_field)
        if not isinstance(scores, list) or len(scores) != len(completions):
            reason = f"field {row.name(scores_field)!r} is {scores!r:.60}, expected {len(completions)} numbers"
            raise BadExample("wrong type", f"{reason}, one for each response")
    if not all(isinstance(score, int | float) and not isinstance(score, bool) for score in scores):
        raise BadExample("wrong type", f"scores {scores!r:.60}, expected numbers")
    if any(score != score for score in scores):
        raise BadExample("wrong type", "a score is not a number (NaN)")
    return [-score for score in scores] if scores_field == RANKS else scores  # rank 1 is the best


def _response(completion: object, name: str) -> Text:
    """Return the text or the messages of a response, which may be an object that contains its text."""
    if is_messages(completion) or (is_message(completion) and "tool_calls" in completion):
        messages = message_list(completion, name)
        _check_response(messages)
        return messages
    if isinstance(completion, dict):
        key = next((key for key in _TEXT_KEYS if isinstance(completion.get(key), str)), None)
        if key is None:
            raise BadExample("missing field", f"a response in {name!r} has no text ({', '.join(_TEXT_KEYS)})")
        completion = completion[key]
    if not isinstance(completion, str):
        raise BadExample("wrong type", f"a response in {name!r} is {completion!r:.60}, expected a string")
    if not completion.strip():
        raise BadExample("empty response", f"a response in {name!r} is empty")
    return completion


def _score(completion: object, name: str) -> float:
    """Return the score of a response that is an object with a score or rank."""
    keys = [
        key for key in (*_SCORE_KEYS, _RANK_KEY) if isinstance(completion, dict) and completion.get(key) is not None
    ]
    if not keys:
        raise BadExample("missing field", f"a response in {name!r} has no score ({', '.join(_SCORE_KEYS)})")
    value = completion[keys[0]]
    return -value if keys[0] == _RANK_KEY and isinstance(value, int | float) else value


# ---- single responses -----------------------------------------------------------------------------------------------


def read_single(row: Row) -> Example:
    """Read a prompt and a response, and the label if there is one."""
    label = _label(row)
    prompt = read_prompt(row)
    if not row.is_chat:
        return Example(prompt, [row.text("completion")], label=label)
    response = _without_start(row.turns("completion", "assistant"), prompt)
    _check_response(response)
    return Example(prompt, [response], tools=row.tools(), label=label)


def _label(row: Row) -> bool | None:
    """Return True for a desirable response, False for an undesirable one; None if rows have no label."""
    if "label" not in row.columns:
        return None
    label = row.value("label")
    is_number = isinstance(label, int | float)  # including booleans
    is_desirable = _LABELS.get(label.lower() if isinstance(label, str) else label if is_number else None)
    if is_desirable is None:
        raise BadExample("wrong type", f"field {row.name('label')!r} is {label!r:.60}, expected true or false")
    return is_desirable


def read_dialogue(row: Row) -> Example:
    """Read a dialogue. The response begins at the assistant's first turn or, with a label, at its last one.

    Turns after the assistant's last one are dropped.
    """
    messages, name = message_list(row.value("dialogue"), row.name("dialogue")), row.name("dialogue")
    turns = [n for n, message in enumerate(messages) if n > 0 and message["role"] == "assistant"]
    if not turns:
        raise BadExample("no response", f"field {name!r} has no turn of the assistant after a prompt")
    label = _label(row)
    first, last = turns[0 if label is None else -1], turns[-1]
    if not str(messages[last].get("content", "")).strip() and "tool_calls" not in messages[last]:
        raise BadExample("empty response", f"field {name!r}: the assistant's last turn is empty")
    prompt = _in_context(row, messages[:first])
    return Example(prompt, [messages[first : last + 1]], tools=row.tools(), label=label)


def read_text(row: Row) -> Example:
    """Read a text without a prompt."""
    return Example("", [row.text("text")])
