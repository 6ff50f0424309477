"""The formats of preference data, recognized by their fields, and what a row of each says.

They are those of TRL (https://huggingface.co/docs/trl/dataset_formats), of UltraFeedback, and dialogues as one text
each, like Anthropic's. Where texts stand there may be messages: lists of {"role": ..., "content": ...}.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from utils import UserError, closest_match

Text = str | list[dict]  # a text, or messages
TURN = "\n\nAssistant:"  # what the last turn of a prompt ends with, in dialogues as one text

# names of fields that say the same thing; the first is the one that formats are described with
_PROMPT = ("prompt", "instruction", "question")
_COMPLETIONS = ("completions", "responses", "answers")
_TEXT_OF = ("content", "text", "response", "completion")
_SCORES = ("scores", "score", "overall_score", "pm_score", "rating")
_RANKS = ("ranks", "rank")
_LABELS = {1: True, 0: False, "1": True, "0": False, "true": True, "false": False}  # as texts: in CSV


class BadExample(Exception):
    """A row can't be used: of which kind that is, for counts, and what exactly is wrong."""

    def __init__(self, kind: str, reason: str | None = None):
        super().__init__(reason or kind)
        self.kind = kind


@dataclass
class Example:
    """What a row says: a prompt, responses to it, and which is preferred to which.

    Prompt and responses are all texts or all messages.
    """

    prompt: Text
    responses: list[Text]
    pairs: list[tuple[int, int]] = field(default_factory=list)  # indices into responses: preferred, dispreferred
    target: int = 0  # which response SFT imitates
    tools: list | None = None  # for the chat template
    label: bool | None = None  # of unpaired data: whether the only response is desirable


@dataclass(frozen=True)
class Format:
    """A format: what it is called, and how its rows are read."""

    description: str
    read: Callable[[dict], Example]  # raises BadExample
    has_pairs: bool = True
    is_unpaired: bool = False


# ---- recognizing ----------------------------------------------------------------------------------------------------


def recognize(rows: Iterable[dict], fields: dict[str, str], where: str) -> Format:
    """The format of a dataset, by the fields of its first rows.

    Args:
        fields: names that a format's fields have in this data: {'prompt': 'question'}.
        where: the dataset, for messages.

    Raises: UserError if it is none that can be trained on, with the fields and the remedy.
    """
    counts: dict[str, Counter] = {}
    for row in rows:
        for name, value in row.items():
            counts.setdefault(name, Counter())[_kind(value)] += value is not None and value != []
    # what most rows hold: a bad one must not decide for the others
    kinds = {name: of_field.most_common(1)[0][0] for name, of_field in counts.items()}
    for ours, theirs in fields.items():
        if theirs not in kinds:
            raise UserError(
                f"{where}: fields.{ours}={theirs}: it has no field {theirs!r}.{closest_match(theirs, kinds)}"
            )
    known = {name: kind for name, kind in kinds.items() if name not in fields}
    known |= {ours: kinds[theirs] for ours, theirs in fields.items()}
    read = _reader_for(known)
    if isinstance(read, str):
        listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise UserError(f"{where}: {read}; its fields are {listed or 'none'}\nSee docs/data.md for the formats")
    return Format(read.description, lambda row: read.read(_renamed(row, fields)), read.has_pairs, read.is_unpaired)


def _renamed(row: dict, fields: dict[str, str]) -> dict:
    return row | {ours: row.get(theirs) for ours, theirs in fields.items()} if fields else row


def _reader_for(kinds: dict[str, str]) -> Format | str:
    """The format with these fields; or why there is none."""

    def first(names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in kinds), None)

    prompt, completions = first(_PROMPT), first(_COMPLETIONS)
    if "chosen" in kinds and "rejected" in kinds:
        return _of_preferences(kinds, prompt)
    if prompt and completions and kinds[completions] in ("list of texts", "list of objects", "list"):
        if "labels" in kinds:
            return "steps with labels each (stepwise supervision) are for reward models, which aren't trained here"
        scores = first(_SCORES[:1] + _RANKS[:1])
        given = f", {scores}" if scores else " with their scores"
        description = f"several responses to a prompt ({prompt}, {completions}{given})"
        return Format(description, lambda row: _ranked(row, prompt, completions, scores))
    if prompt and "completion" in kinds and "label" in kinds:
        return Format(f"single responses with a label ({prompt}, completion, label)",
                      lambda row: _unpaired(row, prompt), has_pairs=False, is_unpaired=True)  # fmt: skip
    if prompt and (completion := first(("completion", "response", "output", "answer"))):
        return Format(f"a response to each prompt ({prompt}, {completion}), for loss=sft",
                      lambda row: _single(row, prompt, completion), has_pairs=False)  # fmt: skip
    if "messages" in kinds:
        return Format("dialogues as messages (messages), for loss=sft", _dialogue, has_pairs=False)
    if "text" in kinds:
        return Format("texts without a prompt (text), for loss=sft", _plain, has_pairs=False)
    if prompt:
        return "prompts alone can't be trained on; give responses, too"
    return (
        "no format that is known: expected are e.g. prompt, chosen and rejected; fields={prompt: ..., chosen: ..., "
        "rejected: ...} maps other names"
    )


def _of_preferences(kinds: dict[str, str], prompt: str | None) -> Format:
    if kinds["chosen"] == "messages" or kinds["rejected"] == "messages":
        start = f"{prompt}, " if prompt else ""
        how = "" if prompt else ", their shared start being the prompt"
        return Format(f"preferences as messages ({start}chosen, rejected{how})", lambda row: _messages(row, prompt))
    if prompt:
        return Format(f"preferences ({prompt}, chosen, rejected)", lambda row: _texts(row, prompt))
    return Format(
        "preferences as whole dialogues (chosen, rejected, their shared start being the prompt)", _transcripts
    )


def _kind(value: object) -> str:
    if isinstance(value, list) and value:
        if is_messages(value):
            return "messages"
        inner = {type(item) for item in value}
        return "list of texts" if inner == {str} else "list of objects" if inner == {dict} else "list"
    names = {str: "text", bool: "truth value", int: "number", float: "number", list: "list", dict: "object"}
    return names.get(type(value), "nothing")


def is_messages(value: object) -> bool:
    """Whether it looks like a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


# ---- reading a row --------------------------------------------------------------------------------------------------


def _value(row: dict, name: str) -> object:
    if row.get(name) is None:
        raise BadExample("missing field", f"field {name!r} is missing or empty")
    return row[name]


def _text(row: dict, name: str, may_be_empty: bool = False) -> str:
    value = _value(row, name)
    if not isinstance(value, str):
        raise BadExample("wrong type", f"field {name!r} is {value!r:.60}, expected a text")
    if not may_be_empty and not value.strip():
        raise BadExample("empty response", f"field {name!r} is an empty text")
    return value


def _message_list(value: object, name: str) -> list[dict]:
    """Messages without keys that have no value, at any depth; a library that reads columns has filled these in."""
    if not is_messages(value):
        raise BadExample("wrong type", f"field {name!r} is {value!r:.60}, expected messages with 'role' and 'content'")
    messages = _without_none(value)
    for number, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            message["content"] = content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(message["role"], str):
            raise BadExample("wrong type", f"field {name!r}, message {number}: its role is no text")
        if not isinstance(content, str) and "tool_calls" not in message:
            raise BadExample("wrong type", f"field {name!r}, message {number}: its content is {content!r:.60}, no text")
    return messages


def _tools(row: dict) -> list | None:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise BadExample("wrong type", "field 'tools' is a text that is no JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise BadExample("wrong type", f"field 'tools' is {tools!r:.60}, expected a list")
    return [_without_none(tool) for tool in tools]


def _without_none(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _differing(responses: list[Text]) -> list[Text]:
    if responses[0] == responses[1]:
        raise BadExample("identical responses", "chosen and rejected are the same")
    return responses


def _texts(row: dict, prompt: str) -> Example:
    if is_messages(row.get(prompt)):  # with texts for responses
        answers = [[{"role": "assistant", "content": _text(row, side)}] for side in ("chosen", "rejected")]
        return Example(_message_list(row[prompt], prompt), _differing(answers), [(0, 1)], tools=_tools(row))
    responses = [_text(row, "chosen"), _text(row, "rejected")]
    return Example(_text(row, prompt, may_be_empty=True), _differing(responses), [(0, 1)])


def shared_start(texts: list[str]) -> str:
    """The longest text that all of these begin with."""
    shortest = min(texts, key=len)
    low, high = 0, len(shortest)  # the first `low` characters are shared; found in a few comparisons of whole slices
    while low < high:
        middle = (low + high + 1) // 2
        if all(text.startswith(shortest[low:middle], low) for text in texts):
            low = middle
        else:
            high = middle - 1
    return shortest[:low]


def _transcripts(row: dict) -> Example:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if chosen == rejected:
        raise BadExample("identical responses", "chosen and rejected are the same")
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


def _messages(row: dict, prompt: str | None) -> Example:
    sides = [_message_list(_value(row, side), side) for side in ("chosen", "rejected")]
    given = row.get(prompt) if prompt else None
    if isinstance(given, list) and given:
        given = _message_list(given, prompt)
        # some give the prompt within the responses once more
        sides = [side[len(given) :] if side[: len(given)] == given else side for side in sides]
        return _checked_messages(given, sides, row)
    shared = [a for a, b in itertools.takewhile(lambda both: both[0] == both[1], zip(*sides, strict=False))]
    while shared and shared[-1]["role"] == "assistant":  # a response isn't part of its prompt
        shared.pop()
    if not shared and isinstance(given, str) and given.strip():
        return _checked_messages([{"role": "user", "content": given}], sides, row)
    return _checked_messages(shared, [side[len(shared) :] for side in sides], row)


def _checked_messages(prompt: list[dict], responses: list[list[dict]], row: dict) -> Example:
    if not prompt:
        raise BadExample("no shared prompt", "chosen and rejected share no messages to begin with")
    for response in _differing(responses):
        if not any(str(message.get("content", "")).strip() or "tool_calls" in message for message in response):
            raise BadExample("empty response", "a response has no content")
    return Example(prompt, responses, [(0, 1)], tools=_tools(row))


def _ranked(row: dict, prompt_field: str, completions_field: str, scores_field: str | None) -> Example:
    completions = _value(row, completions_field)
    if not isinstance(completions, list) or not completions:
        raise BadExample("wrong type", f"field {completions_field!r} is {completions!r:.60}, expected responses")
    if scores_field is not None:
        scores = _value(row, scores_field)
        if not isinstance(scores, list) or len(scores) != len(completions):
            reason = f"field {scores_field!r} is {scores!r:.60}, expected {len(completions)} numbers, one a response"
            raise BadExample("wrong type", reason)
    else:
        scores = [_score(completion, completions_field) for completion in completions]
    if not all(isinstance(score, int | float) and not isinstance(score, bool) for score in scores):
        raise BadExample("wrong type", f"scores {scores!r:.60}, expected numbers")
    if any(score != score for score in scores):
        raise BadExample("wrong type", "a score is not a number (NaN)")
    if scores_field in _RANKS:  # the first is the best
        scores = [-score for score in scores]
    texts = [_response_text(completion, completions_field) for completion in completions]
    pairs = []
    for i, j in itertools.combinations(range(len(texts)), 2):
        if scores[i] != scores[j] and texts[i] != texts[j]:
            pairs.append((i, j) if scores[i] > scores[j] else (j, i))
    best = scores.index(max(scores))
    prompt = _value(row, prompt_field)
    if is_messages(prompt):
        answers = [[{"role": "assistant", "content": text}] for text in texts]
        return Example(_message_list(prompt, prompt_field), answers, pairs, best, tools=_tools(row))
    return Example(_text(row, prompt_field, may_be_empty=True), texts, pairs, best)


def _response_text(completion: object, name: str) -> str:
    if isinstance(completion, dict):
        key = next((key for key in _TEXT_OF if isinstance(completion.get(key), str)), None)
        if key is None:
            raise BadExample("missing field", f"a response in {name!r} has no text ({', '.join(_TEXT_OF)})")
        completion = completion[key]
    if not isinstance(completion, str):
        raise BadExample("wrong type", f"a response in {name!r} is {completion!r:.60}, expected a text")
    if not completion.strip():
        raise BadExample("empty response", f"a response in {name!r} is empty")
    return completion


def _score(completion: object, name: str) -> float:
    keys = [
        key for key in (*_SCORES[1:], _RANKS[1]) if isinstance(completion, dict) and completion.get(key) is not None
    ]
    if not keys:
        raise BadExample("missing field", f"a response in {name!r} has no score ({', '.join(_SCORES[1:])})")
    value = completion[keys[0]]
    return -value if keys[0] in _RANKS and isinstance(value, int | float) else value


def _unpaired(row: dict, prompt: str) -> Example:
    label = _value(row, "label")
    is_desirable = _LABELS.get(label.lower() if isinstance(label, str) else label if _is_number(label) else None)
    if is_desirable is None:
        raise BadExample("wrong type", f"field 'label' is {label!r:.60}, expected true or false")
    example = _single(row, prompt, "completion")
    example.label = is_desirable
    return example


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)  # true and false are numbers, too


def _single(row: dict, prompt_field: str, completion: str) -> Example:
    prompt, response = _value(row, prompt_field), _value(row, completion)
    if is_messages(prompt) or is_messages(response):
        messages = _message_list(prompt, prompt_field) if not isinstance(prompt, str) else _as_turn(prompt, "user")
        answer = (
            _message_list(response, completion) if not isinstance(response, str) else _as_turn(response, "assistant")
        )
        return Example(messages, [answer], tools=_tools(row))
    return Example(_text(row, prompt_field, may_be_empty=True), [_text(row, completion)])


def prompt_of(row: dict) -> Text:
    """The prompt in a row of prompts: of a prompt's field, or messages.

    Raises: BadExample if it has none.
    """
    name = next((name for name in (*_PROMPT, "messages") if row.get(name) is not None), None)
    if name is None:
        raise BadExample("missing field", f"it has no field {', '.join(_PROMPT)} or messages")
    if isinstance(row[name], list):
        messages = _message_list(row[name], name)
        if messages[-1]["role"] == "assistant":
            raise BadExample("no prompt", "its last turn is the assistant's; leave it out")
        return messages
    return _text(row, name)


def _as_turn(text: str, role: str) -> list[dict]:
    return [{"role": role, "content": text}]


def _dialogue(row: dict) -> Example:
    """The last turn of the assistant is the response to what stands before it."""
    messages = _message_list(_value(row, "messages"), "messages")
    last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if not last:
        raise BadExample("no response", "field 'messages' has no assistant's turn after a prompt")
    if not str(messages[last].get("content", "")).strip() and "tool_calls" not in messages[last]:
        raise BadExample("empty response", "field 'messages': the assistant's last turn is empty")
    return Example(messages[:last], [[messages[last]]], tools=_tools(row))


def _plain(row: dict) -> Example:
    return Example("", [_text(row, "text")])
