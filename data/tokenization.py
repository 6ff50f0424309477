"""Tokenize preference pairs, cut them to length, label what is trained, and collate them into batches."""

from collections.abc import Callable

import torch
from torch.nn.utils.rnn import pad_sequence

from utils import UserError


def get_collate_fn(tokenizer) -> Callable[[list[dict]], dict[str, list | torch.Tensor]]:
    """Return a function that turns a list of tokenized examples into a batch.

    Ids, masks and labels become tensors of shape (batch_size, longest): prompts are padded on the left (for sampling),
    everything else on the right. Strings become lists of strings.

    Raises: UserError if the tokenizer has no padding token.
    """
    if tokenizer.pad_token_id is None:
        raise UserError("the tokenizer has no padding token: set tokenizer.pad_token_id = tokenizer.eos_token_id")
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
    """Tokenize several examples (prompt, chosen, rejected, truncation_mode) in one call of the tokenizer.

    An example's longer sequence decides how both are cut. If it exceeds `max_length` tokens, the prompt is cut to
    `max_prompt_length` tokens: `truncation_mode` says whether its start or its end is kept. If the sequence is still
    too long, the responses are cut to `max_length - max_prompt_length` tokens. A response ends with the end-of-sequence
    token unless it was cut. Labels are the sequence's ids, with -100 in place of the prompt. With `add_bos`, every
    prompt begins with the beginning-of-sequence token, even after a cut; both lengths count it.

    Raises: UserError if a string contains the end-of-sequence token.
    """
    texts = [text for example in examples for text in example[:3]]
    ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    elements = []
    for *texts, truncation_mode in examples:
        prompt_ids, *response_ids = [next(ids) for _ in texts]
        for text, tokens in zip(texts, (prompt_ids, *response_ids), strict=True):
            if tokenizer.eos_token_id in tokens:
                raise UserError(f"a text contains the tokenizer's end-of-sequence token: {text!r:.200}")
        if add_bos:
            prompt_ids = [tokenizer.bos_token_id, *prompt_ids]
        response_ids = [[*tokens, tokenizer.eos_token_id] for tokens in response_ids]
        lengths = max_length, max_prompt_length, int(add_bos)
        elements.append(make_element(texts, prompt_ids, response_ids, truncation_mode, *lengths))
    return elements


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


def make_element(
    texts: list[str],
    prompt_ids: list[int],
    response_ids: list[list[int]],
    truncation_mode: str,
    max_length: int,
    max_prompt_length: int,
    n_kept: int = 0,
    trained: list[list[int]] | None = None,
) -> dict:
    """Cut a tokenized pair to length and label it; see `tokenize_batch`.

    Args:
        texts: prompt, chosen, rejected.
        response_ids: the ids of both responses, each with its end token.
        n_kept: the number of leading tokens of the prompt (such as BOS) that truncation never removes.
        trained: the runs of trained tokens in each response, as start, end, start, end, ...; None: all are trained.
    """
    longest = max(map(len, response_ids))
    if len(prompt_ids) + longest > max_length:
        if truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(f"unknown truncation mode {truncation_mode!r}; there are keep_start and keep_end")
        n_dropped = max(0, len(prompt_ids) - max_prompt_length)
        start = n_kept if truncation_mode == "keep_end" else len(prompt_ids) - n_dropped
        prompt_ids = prompt_ids[:start] + prompt_ids[start + n_dropped :]
    response_length = None
    if len(prompt_ids) + longest > max_length:
        response_length = max_length - max_prompt_length

    prompt, chosen, rejected = texts
    element = {
        "prompt": prompt,
        "chosen": prompt + chosen,
        "rejected": prompt + rejected,
        "chosen_response_only": chosen,
        "rejected_response_only": rejected,
    }
    trained = trained or [[0, len(tokens)] for tokens in response_ids]
    for side, tokens, runs in zip(("chosen", "rejected"), response_ids, trained, strict=True):
        tokens = tokens[:response_length]
        labels = [-100] * len(tokens)
        for start, end in zip(runs[::2], runs[1::2], strict=True):
            labels[start:end] = tokens[start:end]
        element[f"{side}_input_ids"] = prompt_ids + tokens
        element[f"{side}_attention_mask"] = [1] * (len(prompt_ids) + len(tokens))
        element[f"{side}_labels"] = [-100] * len(prompt_ids) + labels
    element["prompt_input_ids"] = prompt_ids
    element["prompt_attention_mask"] = [1] * len(prompt_ids)
    return element


def decode_response(prompt_ids: list[int], response_ids: list[int], tokenizer) -> str:
    """Decode the tokens of a response, without special tokens.

    They are decoded together with their prompt, because some tokenizers drop the space before the first word.
    """
    prompt, whole = (
        tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt_ids, [*prompt_ids, *response_ids])
    )
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    return tokenizer.decode(response_ids, skip_special_tokens=True)
