"""Render messages by a model's chat template, and tokenize them.

A template is a program in a tokenizer's files (https://huggingface.co/docs/transformers/chat_templating) that writes
messages, and the tokens between them, as one string. Only the text of the assistant is trained (`data.turns`).
"""

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from basics.repository import REPOSITORY
from data.messages import BadExample
from data.rows import Example, shared_start
from data.template_limits import TemplateLimit, check_length, limited
from data.turns import STAND_IN, Dialogue, Span, holds, is_assistants
from utils import UserError

_REFUSED, _ALTERED = "refused by the chat template", "altered by the chat template"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class Rendered:
    """An example as strings.

    If a template wrote it, all special tokens are in it, and each response ends with its last trained turn.
    """

    prompt: str
    responses: list[str]
    trained: list[list[Span]] | None = None  # each response's trained parts; None without a template: all is trained

    @property
    def is_templated(self) -> bool:
        """True if a chat template wrote the example."""
        return self.trained is not None


@dataclass
class Tokenized:
    """Token ids of a prompt and of its responses, each response with the end token."""

    prompt_ids: list[int]
    response_ids: list[list[int]]
    trained: list[list[int]]  # each response's runs of trained tokens, as start, end, start, end, ...


class Renderer:
    """Turns examples into strings, and tokenizes them."""

    def __init__(
        self,
        tokenizer,
        template_path: str | None,
        verbatim_responses: bool = False,
        last_turn_only: bool = False,
    ):
        """Args:
        template_path: a file with the chat template; by default, the tokenizer's own template.
        verbatim_responses: write responses verbatim if the template alters them, rather than refuse them.
        last_turn_only: train only the last of the assistant's turns in a response.

        Raises: UserError if the file can't be read or isn't a template.
        """
        self.tokenizer, self.verbatim_responses = tokenizer, verbatim_responses
        self.last_turn_only = last_turn_only
        self.template = read_template(tokenizer, template_path)
        self.origin = _template_name(tokenizer, template_path)
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= {*tokenizer.all_special_tokens}
        self.special_token = _any_of(special)
        end = turn_end(tokenizer, self.template)
        self.end_token = _any_of({*special, *([end] if end else [])})
        self.marks_turns = bool(self.template and _GENERATION.search(self.template))
        self.missing_openings: set[str] = set()  # last parts of the generation prompt, which rendered dialogues lack

    # ---- rendering --------------------------------------------------------------------------------------------------

    def render(self, example: Example) -> Rendered:
        """Return an example's strings, after rendering messages by the chat template.

        Raises: BadExample if a text contains special tokens, which only the template may write, or if the template
            refuses the messages or leaves something out.
        """
        if isinstance(example.prompt, str):
            for text in (example.prompt, *example.responses):
                if self.tokenizer.eos_token in text:
                    _raise_special(text, self.tokenizer.eos_token, self.tokenizer.eos_token)
            return Rendered(example.prompt, list(example.responses))
        prompt, responses = _with_shared_start(example.prompt, example.responses)
        for messages in (prompt, *responses):
            self._check_messages(messages)
        with limited(self.origin):
            dialogues = [self._dialogue(prompt, response, example.tools) for response in responses]
            if dialogues:
                return self._divide_dialogues(dialogues)
            return Rendered(self._dialogue(prompt, [], example.tools).opened, [], [])

    def render_dialogue(self, messages: list[dict]) -> str:
        """Return whole messages as the template writes them. Raises: BadExample as `render` does."""
        self._check_messages(messages)
        with limited(self.origin):
            return self._apply(None, messages)[0]

    def _check_messages(self, messages: list[dict]):
        for message in messages:
            if isinstance(message.get("content"), str) and (found := self.special_token.search(message["content"])):
                _raise_special(message["content"], found[0], self.tokenizer.eos_token)
        if self.template is None:
            raise UserError(
                "messages need a chat template, and the tokenizer has none; take an instruct model's "
                "(model.tokenizer_name_or_path), or give one: chat_template=FILE, e.g. "
                f"chat_template={REPOSITORY}/assets/human_assistant.jinja for 'Human:' and 'Assistant:'"
            )

    def _apply(self, tools: list | None, messages: list[dict], **kwargs) -> tuple[str, list[Span]]:
        """Return messages as the template writes them, and the parts that it marks as the assistant's."""
        kwargs |= {"chat_template": self.template, "tools": tools}
        try:
            if not self.marks_turns:
                text, spans = self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs), []
            else:
                from transformers.utils.chat_template_utils import render_jinja_template  # takes seconds

                kwargs |= self.tokenizer.special_tokens_map
                (text,), (spans,) = render_jinja_template([messages], return_assistant_tokens_mask=True, **kwargs)
        except Exception as error:  # templates may raise anything, e.g. if roles don't alternate
            raise BadExample(_REFUSED, f"the chat template refuses it: {error}") from error
        check_length(text, self.origin, messages, tools)
        return text, spans

    def _dialogue(self, prompt: list[dict], response: list[dict], tools: list | None) -> Dialogue:
        """Render a prompt and a response. Raises: BadExample if the template leaves something out."""
        apply = functools.partial(self._apply, tools)
        dialogue = Dialogue(apply, prompt, response, self.end_token, self.marks_turns)
        missing = dialogue.missing_parts()
        answers = {n: m for n, m in enumerate(dialogue.messages) if n >= len(prompt) and is_assistants(m)}
        altered = [n for n in missing if n in answers and isinstance(answers[n].get("content"), str)]
        remedy = "give a template that does, by chat_template=FILE"
        if altered:
            dialogue.keep_unaltered(altered)
            still_missing = dialogue.missing_parts()
            # tool calls and reasoning can't be written verbatim: only the template knows their form
            if self.verbatim_responses or still_missing:
                missing = still_missing
            else:
                remedy = "verbatim_responses=true writes such responses as they are"
        for number, part in missing.items():
            role = dialogue.messages[number]["role"]
            raise BadExample(
                _ALTERED, f"the chat template doesn't write {part!r:.100} of the {role}'s message; {remedy}"
            )
        for fault, other_remedy in self._missing_tools(dialogue, tools):
            raise BadExample(_ALTERED, f"the chat template doesn't write {fault}; {remedy}{other_remedy}")
        return dialogue

    def _missing_tools(self, dialogue: Dialogue, tools: list | None) -> Iterator[tuple[str, str]]:
        """Yield the parts of tools and tool calls that the template leaves out, each with a second remedy or ''."""
        for tool in tools or []:
            function = tool.get("function", tool)
            for part in (function.get("name"), function.get("description")):
                if isinstance(part, str) and not holds(dialogue.text, part):
                    yield f"{part!r:.100} of the row's tools", ", or leave them out by ignored_columns=[tools]"
        if tools and self._apply(None, dialogue.messages)[0] == dialogue.text:
            yield "the row's tools", ", or leave them out by ignored_columns=[tools]"
        if ignored := dialogue.ignored_calls():
            yield f"the tool calls of message {ignored[0]}", ""

    def _divide_dialogues(self, dialogues: list[Dialogue]) -> Rendered:
        """Split rendered dialogues that share a prompt into the prompt and the responses."""
        wholes = [dialogue.text for dialogue in dialogues]
        opening = None if self.marks_turns else self._opening(dialogues)
        spans = [dialogue.spans(opening) for dialogue in dialogues]
        if self.last_turn_only:
            spans = [found[-1:] for found in spans]
        border, shared = min(found[0][0] for found in spans), shared_start(wholes)
        if border > len(shared):  # the dialogues differ before the first trained character
            border = max(self._cuts(shared))
        prompt, opened = wholes[0][:border], dialogues[0].opened
        if dialogues[0].begins_with_assistant and not wholes[0].startswith(opened) and opened.startswith(prompt):
            self.missing_openings.add(opened[border:])
        responses = [whole[border : found[-1][1]] for whole, found in zip(wholes, spans, strict=True)]
        trained = [[(start - border, end - border) for start, end in found] for found in spans]
        return Rendered(prompt, responses, trained)

    def _opening(self, dialogues: list[Dialogue]) -> int | None:
        """Return where the responses begin, after the opening of the assistant's turn.

        Some templates open a turn differently in a prompt than in a dialogue. Then the responses begin after the last
        line or special token that both have in common.

        Returns: None if the responses may begin at different places, so that each dialogue must be searched.
        """
        if not all(dialogue.begins_with_assistant for dialogue in dialogues):
            return None
        prompt_text, opened = dialogues[0].prompt_text, dialogues[0].opened
        wholes = [dialogue.text for dialogue in dialogues]
        if all(whole.startswith(opened) for whole in wholes):
            return len(opened)
        shared = shared_start([opened, *wholes])
        if shared.startswith(prompt_text):
            return max(len(prompt_text), *self._cuts(shared))
        if any(dialogue.has_several_messages for dialogue in dialogues):  # later turns may alter earlier ones
            return None
        if dialogues[0].n_prompt and is_assistants(dialogues[0].messages[dialogues[0].n_prompt - 1]):
            remedy = "the prompt ends with an answer: end it with a question, and begin both responses with that answer"
        else:
            remedy = "give a template that writes it the same way, by chat_template=FILE"
        raise BadExample(_REFUSED, f"the chat template writes the prompt differently if a response follows; {remedy}")

    def _cuts(self, text: str) -> list[int]:
        """Return where a prompt may end: at the start of a text, after its last line break or any special token."""
        return [0, text.rfind("\n") + 1, *(match.end() for match in self.special_token.finditer(text))]

    # ---- tokenizing -------------------------------------------------------------------------------------------------

    def tokenize(self, rendered: list[Rendered]) -> list[Tokenized]:
        """Tokenize the strings of several examples, all in one call of the tokenizer.

        Without a template, prompt and response are tokenized separately, as in the original, and the end-of-sequence
        token is added to the response. With a template, they are tokenized together, and split at the borders of turns;
        if a token crosses a border, both sides are tokenized separately. The end-of-sequence token is added only if the
        template neither ends the response with a special token nor marks the assistant's turns.
        """
        borders = [_borders(one) for one in rendered]
        texts = []
        for one, response_borders in zip(rendered, borders, strict=True):
            texts.append(one.prompt)
            for response, ends in zip(one.responses, response_borders, strict=True):
                whole = one.prompt + response if one.is_templated else response
                texts += [whole, *(whole[:end] for end in ends)]
        ids = iter(token_ids(texts, self.tokenizer))
        return [self._tokenized(*both, ids) for both in zip(rendered, borders, strict=True)]

    def _tokenized(self, one: Rendered, borders: list[list[int]], ids: Iterator[list[int]]) -> Tokenized:
        """Return one example's tokens.

        Args:
            borders: the positions of borders inside each response.
            ids: yields the token ids of the prompt, then of each response, whole and up to each border.
        """
        prompt_ids, response_ids, trained = next(ids), [], []
        for number, (response, ends) in enumerate(zip(one.responses, borders, strict=True)):
            whole, starts = next(ids), [next(ids) for _ in ends]
            if not one.is_templated:
                response_ids.append([*whole, self.tokenizer.eos_token_id])
                trained.append([0, len(whole) + 1])
                continue
            places = [len(one.prompt), *ends]
            divided, counts = self._divided(one.prompt + response, places, whole, [prompt_ids, *starts])
            tokens = divided[counts[0] :]
            at = {place: count - counts[0] for place, count in zip(places, counts, strict=True)}
            at[len(one.prompt) + len(response)] = len(tokens)
            runs = [at[len(one.prompt) + place] for span in one.trained[number] for place in span]
            if not self._ends_turn(response):
                tokens.append(self.tokenizer.eos_token_id)
                runs[-1] += 1
            response_ids.append(tokens)
            trained.append(runs)
        return Tokenized(prompt_ids, response_ids, trained)

    def _divided(
        self, text: str, borders: list[int], ids: list[int], starts: list[list[int]]
    ) -> tuple[list[int], list[int]]:
        """Return the ids of a text, and the number of ids before each border.

        Args:
            ids: the token ids of the whole text.
            starts: the ids of the text up to each border.
        """
        counts = []
        for index, (border, start) in enumerate(zip(borders, starts, strict=True)):
            if ids[: len(start)] != start:  # a token crosses the border
                rest, later = text[border:], [other - border for other in borders[index + 1 :]]
                rest_ids, *rest_starts = token_ids([rest, *(rest[:other] for other in later)], self.tokenizer)
                rest_ids, rest_counts = self._divided(rest, later, rest_ids, rest_starts)
                return start + rest_ids, [*counts, len(start), *(len(start) + count for count in rest_counts)]
            counts.append(len(start))
        return ids, counts

    def _ends_turn(self, response: str) -> bool:
        """True if a response ends with an end token (before white space), or if the template marks where turns end."""
        return self.marks_turns or any(
            not response[match.end() :].strip() for match in self.end_token.finditer(response)
        )


def _any_of(tokens: Iterable[str]) -> re.Pattern:
    """Return a pattern for any of the tokens; it tries longer ones first, because one may be the prefix of another."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _with_shared_start(prompt: list[dict], responses: list[list[dict]]) -> tuple[list[dict], list[list[dict]]]:
    """Move the turns that all responses begin with to the prompt, if they aren't the assistant's.

    Such a turn is, for example, the output of a tool.
    """
    n = 0
    while responses and all(
        len(response) > n + 1 and not is_assistants(response[n]) and response[n] == responses[0][n]
        for response in responses
    ):
        n += 1
    return (prompt + responses[0][:n] if n else prompt), [response[n:] for response in responses]


def _borders(one: Rendered) -> list[list[int]]:
    """Return the positions where trained turns begin or end in each response, counted from the start of the prompt."""
    if not one.is_templated:
        return [[] for _ in one.responses]
    return [
        sorted({len(one.prompt) + place for span in spans for place in span if 0 < place < len(response)})
        for response, spans in zip(one.responses, one.trained, strict=True)
    ]


# ---- templates and end tokens ---------------------------------------------------------------------------------------


def read_template(tokenizer, path: str | None) -> str | None:
    """Return the chat template in a file, or the tokenizer's own.

    Raises: UserError if the file can't be read or isn't a template.
    """
    if path is None:
        return tokenizer.chat_template and tokenizer.get_chat_template()
    try:
        with open(path, encoding="utf-8") as file:
            template = file.read()
        with limited(_template_name(tokenizer, path)):
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=template, tokenize=False)
    except TemplateLimit:
        raise
    except Exception as error:  # Jinja may raise anything
        raise UserError(f"chat_template={path}: {error}; give a file with a Jinja chat template") from error
    return template


def _template_name(tokenizer, path: str | None = None) -> str:
    return f"chat_template={path}" if path is not None else f"the chat template of {tokenizer.name_or_path}"


def turn_end(tokenizer, template: str | None) -> str | None:
    """Return the token that ends an assistant's turn in a chat template; None if there is none."""
    if template is None:
        return None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": STAND_IN}]
    with limited(_template_name(tokenizer)):
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except Exception:  # a template may refuse any messages
            return None
    known = _any_of({str(token) for token in tokenizer.added_tokens_decoder.values()} | {*tokenizer.all_special_tokens})
    found = known.search(text, text.rfind(STAND_IN) + 1) if STAND_IN in text else None
    return found and found[0]


def end_token_ids(generation_config, tokenizer) -> list[int]:
    """Return the ids that end a response: those of the tokenizer, the model and the chat template."""
    ends = generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    if getattr(tokenizer, "chat_template", None):
        end = turn_end(tokenizer, tokenizer.get_chat_template())
        ends |= {tokenizer.convert_tokens_to_ids(end)} if end else set()
    return sorted(ends - {None})


def _raise_special(text: str, token: str, eos_token: str):
    around = text[max(0, text.index(token) - 40) :]
    if token == eos_token and text.rstrip().endswith(token) and text.count(token) == 1:
        reason = f"the text contains {token!r} at its end; the end token is added to every response, so leave it out"
        raise BadExample("special token in a text", f"{reason}: ...{around!r:.100}")
    raise BadExample("special token in a text", f"the text contains {token!r}: ...{around!r:.100}")


def token_ids(texts: list[str], tokenizer) -> list[list[int]]:
    """Return the token ids of each text, without added special tokens; a fast tokenizer uses all cores."""
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    backend.no_truncation()  # a tokenizer's file may turn on truncation and padding
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
