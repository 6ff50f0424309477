"""Messages as a model is used to see them: rendered by its chat template, and tokenized.

A template is a program in a tokenizer's files (https://huggingface.co/docs/transformers/chat_templating) that writes
turns, and the tokens between them, as one text.
"""

import os
from dataclasses import dataclass

from data.formats import BadExample, Example
from utils import UserError


@dataclass
class Rendered:
    """An example as texts, and whether these hold all special tokens that belong there."""

    prompt: str
    responses: list[str]
    is_templated: bool


def load_template(tokenizer, path: str | None) -> str | None:
    """The chat template in a file, or the tokenizer's own; None if it has none.

    Raises: UserError if the file can't be read or is no template.
    """
    if path is None:
        return tokenizer.chat_template and tokenizer.get_chat_template()
    try:
        with open(path, encoding="utf-8") as file:
            template = file.read()
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=template, tokenize=False)
    except Exception as error:  # jinja's
        raise UserError(f"chat_template={path}: {error}; give a file with a Jinja chat template") from error
    return template


def render(example: Example, tokenizer, template: str | None) -> Rendered:
    """An example's texts; messages are rendered by the chat template.

    Raises: BadExample if a text contains special tokens that are the template's to place, or the template refuses.
    """
    if isinstance(example.prompt, str):
        rendered = Rendered(example.prompt, list(example.responses), False)
        _check_no_special_tokens([rendered.prompt, *rendered.responses], [tokenizer.eos_token])
        return rendered
    for messages in (example.prompt, *example.responses):
        texts = [message["content"] for message in messages if isinstance(message.get("content"), str)]
        _check_no_special_tokens(texts, tokenizer.all_special_tokens)
    if template is None:
        raise UserError(
            "messages need a chat template, and the tokenizer has none; take an instruct model's "
            "(model.tokenizer_name_or_path), or give one: chat_template=FILE, e.g. "
            "chat_template=assets/human_assistant.jinja for 'Human:' and 'Assistant:'"
        )

    def text(messages: list[dict], **kwargs) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages, chat_template=template, tools=example.tools, tokenize=False, **kwargs
            )
        except Exception as error:  # templates raise whatever they like, e.g. where roles don't alternate
            raise BadExample("refused by the chat template", f"the chat template refuses it: {error}") from error

    before = text(example.prompt)
    wholes = [text(example.prompt + response) for response in example.responses]
    # what opens the answer's turn is the prompt's; some templates open it otherwise in a prompt than in a dialogue
    prompt = text(example.prompt, add_generation_prompt=True)
    prompt = os.path.commonprefix([prompt, *wholes])  # noqa: RUF071 (texts)
    if not prompt.startswith(before):
        reason = "the chat template writes the prompt otherwise where a response follows"
        raise BadExample("refused by the chat template", reason)
    return Rendered(prompt, [whole[len(prompt) :] for whole in wholes], True)


def _check_no_special_tokens(texts: list[str], special_tokens: list[str]):
    for text in texts:
        for token in special_tokens:
            if token in text:
                around = text[max(0, text.index(token) - 40) :]
                raise BadExample("special token in a text", f"the text contains {token!r}: ...{around!r:.100}")


# ---- tokens ---------------------------------------------------------------------------------------------------------


def tokenize(rendered: list[Rendered], tokenizer) -> list[tuple[list[int], list[list[int]]]]:
    """Token ids of each example's prompt and of its responses, each response with its end.

    Texts are tokenized apart, as in the original, and a response gets the end-of-sequence token. In a template's text
    prompt and response are tokenized together, as the template means it, and divided at the border; apart only where
    one token would reach over it, as no prompt ends in half a token. The end is the template's; where it puts no
    special token there, the end-of-sequence token.
    """
    texts = []
    for one in rendered:
        texts += [one.prompt, *(one.prompt + r if one.is_templated else r for r in one.responses)]
    ids = iter(token_ids(texts, tokenizer))
    tokenized, left = [], []
    for one in rendered:
        prompt, responses = next(ids), [next(ids) for _ in one.responses]
        if one.is_templated:
            for number, whole in enumerate(responses):
                is_continued = whole[: len(prompt)] == prompt
                responses[number] = whole[len(prompt) :] if is_continued else None
            left += [(responses, number, one.responses[number]) for number, r in enumerate(responses) if r is None]
        tokenized.append((prompt, responses))
    for (responses, number, _), apart in zip(left, token_ids([text for *_, text in left], tokenizer), strict=True):
        responses[number] = apart
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    for one, (_, responses) in zip(rendered, tokenized, strict=True):
        for response in responses:
            if not (one.is_templated and _ends_turn(response, special, tokenizer)):
                response.append(tokenizer.eos_token_id)
    return tokenized


def token_ids(texts: list[str], tokenizer) -> list[list[int]]:
    """Token ids of each text, without any that aren't in it; on all cores, where the tokenizer is a fast one."""
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _ends_turn(response: list[int], special: set[int], tokenizer) -> bool:
    """Whether a special token stands at the end, but for white space after it."""
    for token in reversed(response):
        if token in special:
            return True
        if tokenizer.decode([token]).strip():
            return False
    return False
