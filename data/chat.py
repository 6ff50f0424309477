"""Messages as a model is used to see them: rendered by its chat template, and tokenized.

A template is a program in a tokenizer's files (https://huggingface.co/docs/transformers/chat_templating) that writes
turns, and the tokens between them, as one text.
"""

import re
from dataclasses import dataclass

from data.messages import BadExample
from data.rows import Example, shared_start
from utils import UserError


@dataclass
class Rendered:
    """An example as texts, and whether these hold all special tokens that belong there."""

    prompt: str
    responses: list[str]
    is_templated: bool


class Renderer:
    """Writes examples as texts, and tokenizes them."""

    def __init__(self, tokenizer, template_path: str | None):
        """Args:
        template_path: a file with the chat template that messages are rendered with; None: the tokenizer's own.

        Raises: UserError if the file can't be read or is no template.
        """
        self.tokenizer = tokenizer
        self.template = _load_template(tokenizer, template_path)
        added = tokenizer.added_tokens_decoder.items()
        special = {str(token): number for number, token in added if token.special}
        special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.special_ids = set(special.values())
        # longest first, as one may begin like another
        self.is_special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))

    def render(self, example: Example) -> Rendered:
        """An example's texts; messages are rendered by the chat template.

        Raises: BadExample if a text contains special tokens that are the template's to place, or the template refuses.
        """
        if isinstance(example.prompt, str):
            for text in (example.prompt, *example.responses):
                if self.tokenizer.eos_token in text:
                    _raise_special(text, self.tokenizer.eos_token, self.tokenizer.eos_token)
            return Rendered(example.prompt, list(example.responses), False)
        for messages in (example.prompt, *example.responses):
            for message in messages:
                if isinstance(message.get("content"), str) and (found := self.is_special.search(message["content"])):
                    _raise_special(message["content"], found[0], self.tokenizer.eos_token)
        if self.template is None:
            raise UserError(
                "messages need a chat template, and the tokenizer has none; take an instruct model's "
                "(model.tokenizer_name_or_path), or give one: chat_template=FILE, e.g. "
                "chat_template=assets/human_assistant.jinja for 'Human:' and 'Assistant:'"
            )
        before = self._apply(example, example.prompt)
        wholes = [self._apply(example, example.prompt + response) for response in example.responses]
        # what opens the answer's turn is the prompt's
        prompt = self._apply(example, example.prompt, add_generation_prompt=True)
        if not all(whole.startswith(prompt) for whole in wholes):
            # some templates open it otherwise in a prompt than in a dialogue: to the end of a line or special token
            shared = shared_start([prompt, *wholes])
            ends = [shared.rfind("\n") + 1, *(match.end() for match in self.is_special.finditer(shared))]
            prompt = shared[: max(len(before) if shared.startswith(before) else 0, *ends)]
        if not prompt.startswith(before):
            reason = "the chat template writes the prompt otherwise where a response follows"
            raise BadExample("refused by the chat template", reason)
        return Rendered(prompt, [whole[len(prompt) :] for whole in wholes], True)

    def _apply(self, example: Example, messages: list[dict], **kwargs) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tools=example.tools, tokenize=False, **kwargs
            )
        except Exception as error:  # templates raise whatever they like, e.g. where roles don't alternate
            raise BadExample("refused by the chat template", f"the chat template refuses it: {error}") from error

    def tokenize(self, rendered: list[Rendered]) -> list[tuple[list[int], list[list[int]]]]:
        """Token ids of each example's prompt and of its responses, each response with its end.

        Texts are tokenized apart, as in the original, and a response gets the end-of-sequence token. In a template's
        text prompt and response are tokenized together, as the template means it, and divided at the border; apart only
        where one token would reach over it, as no prompt ends in half a token. The end is the template's; where it puts
        no special token there, the end-of-sequence token.
        """
        texts = []
        for one in rendered:
            texts += [one.prompt, *(one.prompt + r if one.is_templated else r for r in one.responses)]
        ids = iter(token_ids(texts, self.tokenizer))
        tokenized = []
        for one in rendered:
            prompt, responses = next(ids), [next(ids) for _ in one.responses]
            if one.is_templated:
                responses = [
                    whole[len(prompt) :] if whole[: len(prompt)] == prompt else token_ids([text], self.tokenizer)[0]
                    for whole, text in zip(responses, one.responses, strict=True)
                ]
            for response in responses:
                if not (one.is_templated and self._ends_turn(response)):
                    response.append(self.tokenizer.eos_token_id)
            tokenized.append((prompt, responses))
        return tokenized

    def _ends_turn(self, response: list[int]) -> bool:
        """Whether a special token stands at the end, but for white space after it."""
        for token in reversed(response):
            if token in self.special_ids:
                return True
            if self.tokenizer.decode([token]).strip():
                return False
        return False


def _load_template(tokenizer, path: str | None) -> str | None:
    if path is None:
        return tokenizer.chat_template and tokenizer.get_chat_template()
    try:
        with open(path, encoding="utf-8") as file:
            template = file.read()
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=template, tokenize=False)
    except Exception as error:  # jinja's
        raise UserError(f"chat_template={path}: {error}; give a file with a Jinja chat template") from error
    return template


def _raise_special(text: str, token: str, eos_token: str):
    around = text[max(0, text.index(token) - 40) :]
    if token == eos_token and text.rstrip().endswith(token) and text.count(token) == 1:
        reason = f"the text ends in {token!r}, which is added to every response: leave it out: ...{around!r:.100}"
        raise BadExample("end token in a text", reason)
    raise BadExample("special token in a text", f"the text contains {token!r}: ...{around!r:.100}")


def token_ids(texts: list[str], tokenizer) -> list[list[int]]:
    """Token ids of each text, without any that aren't in it; on all cores, where the tokenizer is a fast one."""
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    backend.no_truncation()  # a tokenizer's file may ask for both
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
