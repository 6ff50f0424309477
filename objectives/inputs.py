"""What a loss and its modifiers are computed from, once a trainer has the policy's log-probabilities."""

import torch

from log_probabilities import concatenated_inputs, on_policy_weights, response_lengths, shared_lengths
from utils import on_device


def tokens_that_count(trainer, batch: dict) -> torch.Tensor | None:
    """Return how many tokens of each response count in full with `ld_alpha`, (S,); None if all do."""
    return shared_lengths(batch) if trainer.loss.needs_shared_logps(trainer.config.loss) else None


def loss_inputs(trainer, batch: dict, policy_logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the inputs of a loss, (batch_size,) each: log-probabilities (nats), lengths (tokens) and weights.

    Args:
        policy_logps: those of the batch's S responses, chosen before rejected, (S,); or also those of the tokens that
            count in full, (2, S).
    """
    sides = ("chosen", "rejected") if trainer.loss.needs_pairs else ("chosen",)
    lengths = torch.cat([response_lengths(batch[f"{side}_labels"]) for side in sides])
    stacked = {"{}_lengths": lengths.to(trainer.device, non_blocking=True), "policy_{}_logps": policy_logps}
    if trainer.loss.needs_pairs:
        stacked["reference_{}_logps"] = torch.cat(trainer.reference_logps(batch, tokens_that_count(trainer, batch)), -1)
    if trainer.loss.needs_weights(trainer.config.loss):
        stacked["{}_weights"] = _on_policy_weights(trainer, batch)
    inputs = {}
    for name, values in stacked.items():
        for side, of_side in zip(sides, values.chunk(len(sides), -1), strict=True):
            if of_side.ndim == 2:
                of_side, inputs[name.format(side).replace("_logps", "_shared_logps")] = of_side
            inputs[name.format(side)] = of_side
    return inputs


def forward(trainer, batch: dict) -> dict[str, torch.Tensor]:
    """Return the inputs of a loss, with the policy's forward pass."""
    return loss_inputs(trainer, batch, trainer.response_logps(trainer.policy, batch, tokens_that_count(trainer, batch)))


def _on_policy_weights(trainer, batch: dict) -> torch.Tensor:
    """Return WPO's weight of each response, (S,), without gradient, by another forward pass, the plain one."""
    inputs = on_device(concatenated_inputs(batch), trainer.device)
    names = ("concatenated_input_ids", "concatenated_attention_mask", "concatenated_labels")
    input_ids, attention_mask, labels = (inputs[name] for name in names)
    with torch.no_grad(), trainer.autocast(trainer.policy):
        logits = trainer.policy(input_ids, attention_mask=attention_mask, use_cache=False).logits  # (2B, T, V)
    return on_policy_weights(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
