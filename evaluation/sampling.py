"""Sampling responses from a model."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList

from utils import pad_to_length, unwrap_adapter


def generate(
    model: nn.Module, tokenizer, batch: dict, max_length: int, stops: Callable[[], bool], synced: bool
) -> list[str]:
    """A sample for each of the batch's prompts, prompt and response, from the model itself; see `generate_scorable`."""
    return generate_scorable(model, tokenizer, batch, max_length, stops, synced)[0]


def generate_scorable(
    model: nn.Module,
    tokenizer,
    batch: dict,
    max_length: int,
    stops: Callable[[], bool],
    synced: bool,
    processors: LogitsProcessorList | None = None,
) -> tuple[list[str], dict, torch.Tensor]:
    """A sample for each of the batch's prompts, prompt and response, from the model itself.

    An empty prompt has no token to predict the first one from, so its sample is empty, too.

    Returns: the texts; the samples' tokens as a batch of SFT targets, on the CPU; and which of them are whole, of shape
        (batch_size,): not those of empty prompts.

    Args:
        max_length: of prompt and response, in tokens.
        stops: asked at every token; if True the samples end there.
        synced: several workers gather the model for each token; those that are done go on with those that aren't.
        processors: change the logits, of which the largest is taken then; None: tokens are drawn.
    """
    prompt_ids, mask = batch["prompt_input_ids"], batch["prompt_attention_mask"]  # (batch_size, longest prompt)
    is_empty = mask.sum(1) == 0
    if is_empty.any():  # something to compute with, as all workers must
        prompt_ids = pad_to_length(prompt_ids, 1, tokenizer.pad_token_id)
        last = torch.arange(prompt_ids.shape[1], device=mask.device) == prompt_ids.shape[1] - 1
        mask = pad_to_length(mask, 1, 0) | (is_empty[:, None] & last)
    with torch.no_grad(), _unaltered_distribution(model, tokenizer):
        output = model.generate(
            prompt_ids,
            attention_mask=mask,
            max_new_tokens=max_length - prompt_ids.shape[1],
            stopping_criteria=[lambda ids, _: ids.new_full(ids.shape[:1], stops(), dtype=torch.bool)],
            synced_gpus=synced,
            do_sample=processors is None,
            logits_processor=processors,
        )
    output = pad_to_length(output, max_length, tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    texts = ["" if empty else text for text, empty in zip(texts, is_empty.tolist(), strict=True)]
    return texts, _as_targets(output.cpu(), mask.cpu(), end_tokens(model, tokenizer)), ~is_empty.cpu()


def end_tokens(model: nn.Module, tokenizer) -> list[int]:
    """The ids that end a sample."""
    return end_token_ids(model.generation_config, tokenizer)


def end_token_ids(generation_config: GenerationConfig, tokenizer) -> list[int]:
    ends = generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})


def _as_targets(output: torch.Tensor, prompt_mask: torch.Tensor, ends: list[int]) -> dict[str, torch.Tensor]:
    """Samples, their prompts padded on the left, as a batch of SFT targets: (batch_size, length) each.

    A response counts up to the first token that ends it, and with it.
    """
    n_before = prompt_mask.shape[1]
    is_end = torch.isin(output[:, n_before:], torch.tensor(ends))
    is_response = is_end.cumsum(1) - is_end.int() == 0
    mask = torch.cat([prompt_mask.bool(), is_response], dim=1)
    labels = output.masked_fill(torch.cat([torch.ones_like(prompt_mask).bool(), ~is_response], dim=1), -100)
    order = (~mask).int().argsort(dim=1, stable=True)  # padding goes to the end
    return {
        "chosen_input_ids": output.gather(1, order),
        "chosen_attention_mask": mask.long().gather(1, order),
        "chosen_labels": labels.gather(1, order),
    }


@contextlib.contextmanager
def _unaltered_distribution(model: nn.Module, tokenizer) -> Iterator[None]:
    """Inside, `model.generate` draws from the model's softmax: of its generation config only the token ids are left.

    The config itself must be replaced, as `generate` takes from it whatever it isn't given.
    """
    former = model.generation_config
    unaltered = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        bos_token_id=former.bos_token_id,
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    holders = {id(holder): holder for holder in (model, unwrap_adapter(model))}.values()
    for holder in holders:
        holder.generation_config = unaltered
    try:
        yield
    finally:
        for holder in holders:
            holder.generation_config = former
