"""From texts to token ids: preference pairs tokenized, cut to length, labelled, and collated into batches."""

from collections.abc import Callable

import torch
from torch.nn.utils.rnn import pad_sequence

from utils import UserError


def get_collate_fn(tokenizer) -> Callable[[list[dict]], dict[str, list | torch.Tensor]]:
    """A function that turns a list of tokenized examples into a batch.

    Lists of ids, masks and labels become tensors of shape (batch_size, longest): prompts padded on the left (for
    sampling), all else on the right. Strings are passed through as lists.
    """
    pad_values = {"_input_ids": tokenizer.pad_token_id, "_attention_mask": 0, "_labels": -100}

    def collate_fn(examples: list[dict]) -> dict[str, list | torch.Tensor]:
        batch = {}
        for key in examples[0]:
            suffix = next((suffix for suffix in pad_values if key.endswith(suffix)), None)
            values = [example[key] for example in examples]
            if suffix is None:
                batch[key] = values
            else:
                side = "left" if key.startswith("prompt") else "right"
                tensors = [torch.tensor(value, dtype=torch.long) for value in values]
                batch[key] = pad_sequence(tensors, True, pad_values[suffix], padding_side=side)
        return batch

    return collate_fn


def tokenize_batch(
    examples: list[tuple[str, str, str, str]],
    tokenizer,
    max_length: int,
    max_prompt_length: int,
    add_bos: bool = False,
) -> list[dict]:
    """Tokenize several (prompt, chosen, rejected, truncation_mode), all their texts in one call of the tokenizer.

    The longer of an example's two sequences decides for both how they are cut: if prompt and response exceed
    `max_length` tokens, the prompt is cut to `max_prompt_length` ('keep_start' or 'keep_end' of it); if they still do,
    the responses are cut to `max_length - max_prompt_length`. A response ends with the end-of-sequence token unless it
    was cut. Labels are the sequence's ids with -100 over the prompt. With `add_bos` every prompt, however it is cut,
    begins with the beginning-of-sequence token, which is one of the tokens that both lengths count.

    Raises: UserError if a text contains the end-of-sequence token.
    """
    texts = [text for example in examples for text in example[:3]]
    ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    bos_ids = [tokenizer.bos_token_id] if add_bos else []
    return [
        _element(example, [next(ids) for _ in range(3)], bos_ids, tokenizer.eos_token_id, max_length, max_prompt_length)
        for example in examples
    ]


def tokenize_batch_element(
    prompt: str,
    chosen: str,
    rejected: str,
    truncation_mode: str,
    tokenizer,
    max_length: int,
    max_prompt_length: int,
    add_bos: bool = False,
) -> dict:
    """Tokenize a single pair; see `tokenize_batch`."""
    example = prompt, chosen, rejected, truncation_mode
    return tokenize_batch([example], tokenizer, max_length, max_prompt_length, add_bos)[0]


def _element(
    example: tuple[str, str, str, str],
    ids: list[list[int]],
    bos_ids: list[int],
    eos_token_id: int,
    max_length: int,
    max_prompt_length: int,
) -> dict:
    prompt, chosen, rejected, truncation_mode = example
    for text, tokens in zip(example, ids, strict=False):
        if eos_token_id in tokens:
            raise UserError(f"a text contains the tokenizer's end-of-sequence token: {text!r:.200}")

    prompt_ids, *response_ids = ids
    longer_response_length = max(len(tokens) for tokens in response_ids) + 1
    if len(bos_ids) + len(prompt_ids) + longer_response_length > max_length:
        if truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(f"unknown truncation mode {truncation_mode!r}; there are keep_start and keep_end")
        n_dropped = max(0, len(bos_ids) + len(prompt_ids) - max_prompt_length)
        n_kept = len(prompt_ids) - n_dropped
        prompt_ids = prompt_ids[:n_kept] if truncation_mode == "keep_start" else prompt_ids[n_dropped:]
    prompt_ids = bos_ids + prompt_ids
    response_length = None
    if len(prompt_ids) + longer_response_length > max_length:
        response_length = max_length - max_prompt_length

    element = {
        "prompt": prompt,
        "chosen": prompt + chosen,
        "rejected": prompt + rejected,
        "chosen_response_only": chosen,
        "rejected_response_only": rejected,
    }
    for side, tokens in zip(("chosen", "rejected"), response_ids, strict=True):
        tokens = [*tokens, eos_token_id][:response_length]
        element[f"{side}_input_ids"] = prompt_ids + tokens
        element[f"{side}_attention_mask"] = [1] * (len(prompt_ids) + len(tokens))
        element[f"{side}_labels"] = [-100] * len(prompt_ids) + tokens
    element["prompt_input_ids"] = prompt_ids
    element["prompt_attention_mask"] = [1] * len(prompt_ids)
    return element
