"""Find what the assistant wrote in a rendered dialogue, and the parts of messages that the rendering leaves out.

A chat template doesn't show who wrote what, unless it marks the assistant's turns by `{% generation %}`. So each turn
is found by rendering the dialogue up to it. Some templates write an unfinished dialogue differently (Qwen 3 drops
reasoning from earlier turns, Mistral moves tools to the last question); then the dialogue is rendered again with the
turn changed.
"""

import bisect
import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator

from data.messages import BadExample
from data.rows import shared_start

Span = tuple[int, int]  # start and end, in characters
STAND_IN = "\ue000"  # a private-use character: not in any message, and unchanged by trimming, changing case or JSON
REASONING = ("reasoning_content", "reasoning", "thinking")
_REFUSED = "refused by the chat template"


def is_assistants(message: dict) -> bool:
    """True for a message of the assistant."""
    return message["role"] == "assistant"


class Dialogue:
    """A prompt and a response to it, rendered by a chat template, with the assistant's parts marked."""

    def __init__(
        self,
        apply: Callable[..., tuple[str, list[Span]]],
        prompt: list[dict],
        response: list[dict],
        end_token: re.Pattern,
        is_marked: bool,
    ):
        """Args:
        apply: renders messages; returns the text and the parts that the template marks as the assistant's. With
            `add_generation_prompt`, it opens the assistant's next turn.
        end_token: matches tokens that may end a turn.
        is_marked: the template marks the assistant's turns.
        """
        self.apply, self.end_token, self.is_marked = apply, end_token, is_marked
        self.messages, self.n_prompt = prompt + response, len(prompt)
        self._stand_ins: dict[int, str] = {}  # maps id(message) to a placeholder rendered in place of its content
        self.text = self.render(self.messages)

    def render(self, messages: list[dict], **kwargs) -> str:
        """Return some of the messages as the template writes them."""
        return self._render(messages, **kwargs)[0]

    def _render(self, messages: list[dict], **kwargs) -> tuple[str, list[Span]]:
        shown = [
            message | {"content": self._stand_ins[id(message)]} if id(message) in self._stand_ins else message
            for message in messages
        ]
        text, spans = self.apply(shown, **kwargs)
        for message in messages:
            stand_in = self._stand_ins.get(id(message))
            if stand_in is not None and (at := text.find(stand_in)) >= 0:
                text = text[:at] + message["content"] + text[at + len(stand_in) :]
                grown = len(message["content"]) - len(stand_in)
                spans = [(start + grown * (start > at), end + grown * (end > at)) for start, end in spans]
        return text, spans

    def keep_unaltered(self, numbers: list[int]):
        """Render these messages with their contents verbatim, even if the template would alter them."""
        for number in numbers:
            self._stand_ins[id(self.messages[number])] = f"{STAND_IN}{number}{STAND_IN}"
        self.text = self.render(self.messages)

    @property
    def begins_with_assistant(self) -> bool:
        """True if the response begins with a turn of the assistant."""
        return is_assistants(self.messages[self.n_prompt])

    @property
    def has_several_messages(self) -> bool:
        """True if the response has several messages."""
        return len(self.messages) > self.n_prompt + 1

    @functools.cached_property
    def prompt_text(self) -> str:
        """The prompt alone."""
        return self.render(self.messages[: self.n_prompt])

    @functools.cached_property
    def opened(self) -> str:
        """The prompt and the opening of the assistant's turn."""
        return self.render(self.messages[: self.n_prompt], add_generation_prompt=True)

    def missing_parts(self) -> dict[int, str]:
        """Map the number of each message that isn't rendered whole to the first part that is missing."""
        return dict(_missing_parts(self.messages, self.n_prompt, self.text))

    def ignored_calls(self) -> list[int]:
        """Return the numbers of messages whose tool calls the template left out."""
        ignored = []
        for number, message in enumerate(self.messages):
            if message.get("tool_calls"):
                without = {key: value for key, value in message.items() if key != "tool_calls"}
                with contextlib.suppress(BadExample):  # a template may refuse a message that is now empty
                    if self.render([*self.messages[:number], without, *self.messages[number + 1 :]]) == self.text:
                        ignored.append(number)
        return ignored

    def spans(self, opening: int | None) -> list[Span]:
        """Return the parts of the response that the assistant wrote, each turn with its end token.

        Args:
            opening: the start of the response, if its first message is the assistant's; None if it must be found.

        Raises: BadExample if the turns can't be found, or the assistant wrote nothing.
        """
        found = self._marked_spans() if self.is_marked else self._unmarked_spans(opening)
        if not found:
            raise BadExample("no response", "the assistant wrote nothing in a response")
        return found

    def _marked_spans(self) -> list[Span]:
        n_before = len(self._render(self.messages[: self.n_prompt])[1]) if self.n_prompt else 0
        return [(start, end) for start, end in self._render(self.messages)[1][n_before:] if start < end]

    def _unmarked_spans(self, opening: int | None) -> list[Span]:
        found, position = [], 0
        for number in range(self.n_prompt, len(self.messages)):
            if is_assistants(self.messages[number]):
                is_first = number == self.n_prompt and opening is not None
                start = opening if is_first else self._start(number, position)
                position = self._end(number, start)
                found.append((start, position))
        return found

    def _start(self, number: int, position: int) -> int:
        """Return where the assistant's part of a turn begins: after its opening, which the generation prompt shows.

        Args:
            position: the end of the assistant's previous turn.
        """
        opened = self.render(self.messages[:number], add_generation_prompt=True)
        if self.text.startswith(opened):
            return len(opened)
        before, (content, _) = self.render(self.messages[:number]), self._changed(number)
        header = opened[len(before) :] if opened.startswith(before) else ""
        cuts = {len(header), *(match.end() for match in re.finditer(rf"\n|{self.end_token.pattern}", header))}
        for cut in sorted(cuts - {0}, reverse=True):  # the dialogue may have only the beginning of the opening
            if (at := self.text.rfind(header[:cut], position, content)) >= 0:
                return at + cut
        if not header:  # the turn includes the white space before its first word
            return max(position, len(self.text[:content].rstrip()))
        return content

    def _end(self, number: int, start: int) -> int:
        """Return where a turn ends: after its end token, or after its last word if the template has no end token."""
        is_last = number == len(self.messages) - 1
        closed = self.text if is_last else self.render(self.messages[: number + 1])
        token = self._last_token(closed)
        if self.text.startswith(closed):
            if token is not None:
                return token.end()
            content, end = str(self.messages[number].get("content", "")), max(start, len(closed.rstrip()))
            own_space = content[len(content.rstrip()) :]  # the template may trim it, and add other white space
            return end + len(shared_start([own_space, closed[end:]]))
        if token is not None and (at := self.text.find(token[0], start)) >= 0:
            return at + len(token[0])
        return max(start, self._changed(number)[1])

    def _last_token(self, text: str) -> re.Match | None:
        """Return the end token at the end of a text, before any white space; None if there is none."""
        found = list(self.end_token.finditer(text))
        return found[-1] if found and not text[found[-1].end() :].strip() else None

    def _changed(self, number: int) -> Span:
        """Return the part of the text that changes if a message gets another content."""
        message = self.messages[number]
        for other in ({"role": message["role"], "content": STAND_IN}, {**message, "content": STAND_IN}):
            try:
                changed = self.render([*self.messages[:number], other, *self.messages[number + 1 :]])
            except BadExample:  # e.g. the output of a tool, without a call before it
                continue
            if changed != self.text:
                start = len(shared_start([self.text, changed]))
                n_after = len(shared_start([self.text[start:][::-1], changed[start:][::-1]]))
                return start, len(self.text) - n_after
        raise BadExample(_REFUSED, f"can't tell which part of the rendered dialogue is message {number}")


# ---- missing parts --------------------------------------------------------------------------------------------------


def _missing_parts(messages: list[dict], n_prompt: int, text: str) -> Iterator[tuple[int, str]]:
    """For each message with a part that the rendered text lacks, yield the message's number and that part.

    White space around a content may be missing, and so may the reasoning in the prompt's earlier answers, because a
    model in use doesn't see it again. Tools' outputs may be rendered as JSON.
    """
    position = 0  # each message is searched for after the previous one, so that it isn't found inside that one
    for number, message in enumerate(messages):
        is_movable = message["role"] in ("system", "developer")  # the template may move it into a question
        may_lack_reasoning = number < n_prompt and is_assistants(message)
        ends = [position]
        for part in _parts(message, with_reasoning=number >= n_prompt):
            end = _find(part, text, 0 if is_movable else position, may_lack_reasoning)
            if end is None:
                yield number, _missing_words(part.strip(), text, position)
                break
            ends.append(end)
        position = position if is_movable else max(ends[:2])


def _parts(message: dict, with_reasoning: bool) -> list[str]:
    """Return a message's strings that must be rendered: content, reasoning, names and arguments of function calls."""
    values = [message.get(key) for key in ("content", *(REASONING if with_reasoning else ()))]
    parts = [value for value in values if isinstance(value, str)]
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        parts += _strings([function.get("name"), function.get("arguments")])
    return list(dict.fromkeys(parts))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _find(part: str, text: str, position: int, may_lack_reasoning: bool) -> int | None:
    """Return where the first occurrence of a part at or after a position ends in the text; None if there is none."""
    forms = [part, *(json.dumps(part, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))]
    if may_lack_reasoning:
        forms.append(part.rpartition("</think>")[2])
    found = [(at, form) for form in map(str.strip, forms) if (at := text.find(form, position)) >= 0]
    return min(at + len(form) for at, form in found) if found else None


def holds(text: str, part: str) -> bool:
    """True if a text holds a string, as it is or as JSON."""
    return _find(part, text, 0, may_lack_reasoning=False) is not None


def _missing_words(part: str, text: str, position: int) -> str:
    """Return the words that are left of a part after removing its longest prefix, or suffix, found in the text."""
    sizes = range(1, len(part) + 1)
    n_start = bisect.bisect_left(sizes, True, key=lambda n: text.find(part[:n], position) < 0)
    n_end = bisect.bisect_left(sizes, True, key=lambda n: text.find(part[-n:], position) < 0)
    if n_start > n_end:
        return part[re.search(r"\S*$", part[:n_start]).start() :].strip()
    cut = len(part) - n_end
    return part[: re.compile(r"\S*").match(part, cut).end()].strip()
