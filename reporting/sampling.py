"""Sampling responses from a model."""

from collections.abc import Callable

import torch
from torch import nn

from utils import pad_to_length


def generate(
    model: nn.Module, tokenizer, batch: dict, max_length: int, stops: Callable[[], bool], synced: bool
) -> list[str]:
    """A sample for each of the batch's prompts, prompt and response, from the model itself.

    Args:
        max_length: of prompt and response, in tokens.
        stops: asked at every token; if True the samples end there.
        synced: several workers gather the model for each token; those that are done go on with those that aren't.
    """
    prompt_ids = batch["prompt_input_ids"]  # (batch_size, longest prompt)
    with torch.no_grad():
        output = model.generate(
            prompt_ids,
            attention_mask=batch["prompt_attention_mask"],
            max_new_tokens=max_length - prompt_ids.shape[1],
            do_sample=True,
            temperature=1.0,  # whatever its generation config says
            top_k=0,
            top_p=1.0,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=[lambda ids, _: ids.new_full(ids.shape[:1], stops(), dtype=torch.bool)],
            synced_gpus=synced,
        )
    output = pad_to_length(output, max_length, tokenizer.pad_token_id)
    return tokenizer.batch_decode(output, skip_special_tokens=True)
