"""Read what a row of each format says: a prompt, responses, and which of them is preferred."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from data.columns import RANKS, is_blank, value_at
from data.messages import (
    BadExample,
    as_turn,
    decoded,
    history_messages,
    is_message,
    is_messages,
    message_list,
    system_messages,
    tool_list,
)

Text = str | list[dict]  # a string, or messages
TURN = "\n\nAssistant:"  # what the last turn of a prompt ends with, in dialogues as one string

# keys of a response that is an object
_TEXT_OF = ("content", "text", "response", "completion", "value")
_SCORE_OF = ("score", "overall_score", "pm_score", "rating")
_RANK_OF = "rank"
_LABELS = {1: True, 0: False, "1": True, "0": False, "true": True, "false": False}  # as strings: in CSV


@dataclass
class Example:
    """What a row says: a prompt, responses to it, and which is preferred to which.

    Prompt and responses are all strings or all messages.
    """

    prompt: Text
    responses: list[Text]
    pairs: list[tuple[int, int]] = field(default_factory=list)  # indices into responses: preferred, dispreferred
    target: int = 0  # which response SFT imitates
    tools: list | None = None  # for the chat template
    label: bool | None = None  # of unpaired data: True if the only response is desirable


@dataclass(frozen=True)
class Row:
    """The fields of a row, under the names that formats know."""

    values: dict
    columns: Mapping[str, str]  # name of a field that is read: the data's column
    kinds: Mapping[str, str]  # of most rows, by the names of fields
    is_chat: bool  # prompt and responses are messages, or are made into such

    def name(self, field: str) -> str:
        """The data's name of a field, for messages."""
        return self.columns[field]

    def get(self, field: str) -> object:
        """The value of a field, decoded where messages are stored as JSON; None if it isn't read."""
        if field not in self.columns:
            return None
        value = value_at(self.values, self.columns[field])
        return decoded(value) if self.kinds.get(field) == "messages" else value

    def value(self, field: str) -> object:
        """The value of a field. Raises: BadExample if there is none."""
        if (value := self.get(field)) is None:
            raise BadExample("missing field", f"field {self.name(field)!r} is missing or empty")
        return value

    def text(self, field: str, may_be_empty: bool = False) -> str:
        """The value of a field that must be a string. Raises: BadExample if it isn't, or is empty."""
        value = self.value(field)
        if not isinstance(value, str):
            raise BadExample("wrong type", f"field {self.name(field)!r} is {value!r:.60}, expected a string")
        if not may_be_empty and not value.strip():
            raise BadExample("empty response", f"field {self.name(field)!r} is an empty string")
        return value

    def turns(self, field: str, role: str) -> list[dict]:
        """The value of a field as messages; a string is the turn of this role."""
        value = self.value(field)
        if isinstance(value, str) and self.kinds[field] != "messages":
            return as_turn(self.text(field, may_be_empty=role == "user"), role)
        return message_list(value, self.name(field))

    def tools(self) -> list | None:
        """The tools that the row offers; None if there are none."""
        return tool_list(self.get("tools"), self.name("tools")) if "tools" in self.columns else None


# ---- prompts --------------------------------------------------------------------------------------------------------


def read_prompt(row: Row) -> Text:
    """The prompt, with an input below it, and in a chat with the system text and the history before it."""
    if not row.is_chat:
        return _with_input(row, row.text("prompt", may_be_empty=True))
    value = row.value("prompt")
    if isinstance(value, str):
        return _in_context(row, as_turn(_with_input(row, row.text("prompt", may_be_empty=True)), "user"))
    if not is_blank(row.get("input")):
        raise BadExample("wrong type", f"field {row.name('input')!r} can't be appended to messages")
    return _in_context(row, message_list(value, row.name("prompt")))


def _with_input(row: Row, prompt: str) -> str:
    """Alpaca's prompt: the instruction and, on a line of its own, the input that it is about."""
    return prompt if is_blank(row.get("input")) else f"{prompt}\n{row.text('input')}"


def _in_context(row: Row, messages: list[dict]) -> list[dict]:
    """The messages with the row's system message and earlier turns before them."""
    system = system_messages(row.get("system"), row.name("system")) if "system" in row.columns else []
    history = history_messages(row.get("history"), row.name("history")) if "history" in row.columns else []
    if system and messages and messages[0] == system[0]:
        system = []  # they begin with it already
    if any(message["role"] == "system" for message in messages) and (system or history):
        raise BadExample("two system texts", "the messages have a system message besides the row's other fields")
    return system + history + messages


# ---- preferences ----------------------------------------------------------------------------------------------------


def read_texts(row: Row) -> Example:
    """A prompt, a chosen and a rejected response, all strings."""
    responses = [row.text("chosen"), row.text("rejected")]
    return Example(read_prompt(row), _differing(responses), [(0, 1)])


def _differing(responses: list[Text]) -> list[Text]:
    if responses[0] == responses[1]:
        raise BadExample("identical responses", "chosen and rejected are the same")
    return responses


def shared_start(texts: list[str]) -> str:
    """The longest string that all of these begin with."""
    shortest = min(texts, key=len)
    low, high = 0, len(shortest)  # the first `low` characters are shared; found in a few comparisons of whole slices
    while low < high:
        middle = (low + high + 1) // 2
        if all(text.startswith(shortest[low:middle], low) for text in texts):
            low = middle
        else:
            high = middle - 1
    return shortest[:low]


def read_transcripts(row: Row) -> Example:
    """Two whole dialogues as strings; the prompt is what they have in common, up to the last turn or word."""
    chosen, rejected = row.text("chosen"), row.text("rejected")
    _differing([chosen, rejected])
    shared = shared_start([chosen, rejected])
    if (turn := shared.rfind(TURN)) >= 0:
        border = turn + len(TURN)
    elif TURN in chosen and TURN in rejected:
        raise BadExample("no shared prompt", f"chosen and rejected differ before the first {TURN!r}")
    else:
        border = _word_border(shared, chosen, rejected)
    responses = [chosen[border:], rejected[border:]]
    if not all(response.strip() for response in responses):
        raise BadExample("empty response", "one of chosen and rejected is the beginning of the other")
    return Example(chosen[:border], responses, [(0, 1)])


def _word_border(shared: str, *texts: str) -> int:
    """Where the shared start of texts ends between words, which are tokens with the space before them."""
    border = len(shared)
    if any(_is_of_word(text[border : border + 1]) for text in texts):
        while border > 0 and _is_of_word(shared[border - 1]):
            border -= 1
    return border - 1 if shared[:border].endswith(" ") else border


def _is_of_word(character: str) -> bool:
    return character.isalnum() and character < "\u2e80"  # from there on scripts put no spaces between words


def read_messages(row: Row) -> Example:
    """A prompt, a chosen and a rejected response as messages; responses may hold the prompt once more."""
    sides = [row.turns(side, "assistant") for side in ("chosen", "rejected")]
    prompt, sides = _divided(row, sides)
    if not prompt:
        raise BadExample("no shared prompt", "chosen and rejected share no messages to begin with")
    for response in _differing(sides):
        _check_response(response)
    return Example(prompt, sides, [(0, 1)], tools=row.tools())


def _divided(row: Row, sides: list[list[dict]]) -> tuple[list[dict], list[list[dict]]]:
    """The prompt, and both sides without it."""
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
            reason = f"chosen and rejected begin with other messages than field {row.name('prompt')!r}"
            raise BadExample("no shared prompt", reason)
        return _in_context(row, shared), after_shared
    given = message_list(given, row.name("prompt"))
    if shared[-len(given) :] == given:  # with more before it, such as a system message
        return _in_context(row, shared), after_shared
    return read_prompt(row), [_without_start(side, given) for side in sides]


def _without_start(side: list[dict], prompt: list[dict]) -> list[dict]:
    return side[len(prompt) :] if side[: len(prompt)] == prompt else side


def _check_response(response: list[dict]):
    """Raises: BadExample if a response says nothing, or begins with another's turn."""
    if not any(str(message.get("content", "")).strip() or "tool_calls" in message for message in response):
        raise BadExample("empty response", "a response has no content")
    if response[0]["role"] in ("user", "system"):
        role = response[0]["role"]
        raise BadExample("no shared prompt", f"a response begins with a message of role {role!r}, not of the assistant")


# ---- several responses ----------------------------------------------------------------------------------------------


def read_ranked(row: Row) -> Example:
    """A prompt and several responses with scores or ranks; each two that differ in them are a pair."""
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
    """A number for each response, the greater the better."""
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
    return [-score for score in scores] if scores_field == RANKS else scores  # the first is the best


def _response(completion: object, name: str) -> Text:
    if is_messages(completion) or (is_message(completion) and "tool_calls" in completion):
        messages = message_list(completion, name)
        _check_response(messages)
        return messages
    if isinstance(completion, dict):
        key = next((key for key in _TEXT_OF if isinstance(completion.get(key), str)), None)
        if key is None:
            raise BadExample("missing field", f"a response in {name!r} has no text ({', '.join(_TEXT_OF)})")
        completion = completion[key]
    if not isinstance(completion, str):
        raise BadExample("wrong type", f"a response in {name!r} is {completion!r:.60}, expected a string")
    if not completion.strip():
        raise BadExample("empty response", f"a response in {name!r} is empty")
    return completion


def _score(completion: object, name: str) -> float:
    keys = [key for key in (*_SCORE_OF, _RANK_OF) if isinstance(completion, dict) and completion.get(key) is not None]
    if not keys:
        raise BadExample("missing field", f"a response in {name!r} has no score ({', '.join(_SCORE_OF)})")
    value = completion[keys[0]]
    return -value if keys[0] == _RANK_OF and isinstance(value, int | float) else value


# ---- single responses -----------------------------------------------------------------------------------------------


def read_single(row: Row) -> Example:
    """A prompt and a response; with a label that says if it is desirable."""
    label = _label(row)
    prompt = read_prompt(row)
    if not row.is_chat:
        return Example(prompt, [row.text("completion")], label=label)
    response = _without_start(row.turns("completion", "assistant"), prompt)
    _check_response(response)
    return Example(prompt, [response], tools=row.tools(), label=label)


def _label(row: Row) -> bool | None:
    if "label" not in row.columns:
        return None
    label = row.value("label")
    is_number = isinstance(label, int | float)  # true and false are numbers, too
    is_desirable = _LABELS.get(label.lower() if isinstance(label, str) else label if is_number else None)
    if is_desirable is None:
        raise BadExample("wrong type", f"field {row.name('label')!r} is {label!r:.60}, expected true or false")
    return is_desirable


def read_dialogue(row: Row) -> Example:
    """A dialogue: the response is what follows its first question, or, if the row labels it, the assistant's last turn.

    What others say after the assistant's last turn is left out.
    """
    messages, name = message_list(row.value("dialogue"), row.name("dialogue")), row.name("dialogue")
    turns = [n for n, message in enumerate(messages) if n > 0 and message["role"] == "assistant"]
    if not turns:
        raise BadExample("no response", f"field {name!r} has no assistant's turn after a prompt")
    label = _label(row)
    first, last = turns[0 if label is None else -1], turns[-1]
    if not str(messages[last].get("content", "")).strip() and "tool_calls" not in messages[last]:
        raise BadExample("empty response", f"field {name!r}: the assistant's last turn is empty")
    prompt = _in_context(row, messages[:first])
    return Example(prompt, [messages[first : last + 1]], tools=row.tools(), label=label)


def read_text(row: Row) -> Example:
    """A text without a prompt."""
    return Example("", [row.text("text")])
