"""A weighted sum of losses: `loss=mix loss.parts={dpo: 0.8, sft: 0.2} loss.dpo.beta=0.3`."""

from collections.abc import Mapping

import torch

from objectives.declaration import Loss, Result

MIX = "mix"  # its name in the config


class Mix:
    """The weighted sum of other losses, which behaves as a `Loss`.

    In the config, `loss.parts` has each loss's weight, and `loss.NAME` the options of the loss NAME. The rewards are
    those of the first part that has any.
    """

    def __init__(self, parts: Mapping[str, Loss]):
        self.parts = parts
        losses = parts.values()
        self.inputs = tuple({name: None for loss in losses for name in loss.inputs})
        self.needs_pairs = any(loss.needs_pairs for loss in losses)
        self.accepts_unpaired = all(loss.accepts_unpaired or not loss.needs_pairs for loss in losses)
        self.takes_kl_estimate = any(loss.takes_kl_estimate for loss in losses)
        self.takes_mean_length = any(loss.takes_mean_length for loss in losses)
        self.takes_whole_batch = any(loss.takes_whole_batch for loss in losses)
        self.needs_batch = any(loss.needs_batch for loss in losses)

    def needs_reference(self, loss_config) -> bool:
        """True if a part compares the policy with a reference under its options."""
        return any(loss.needs_reference(loss_config[name]) for name, loss in self.parts.items())

    def needs_shared_logps(self, loss_config) -> bool:
        """True if a part needs, under its options, log-probabilities up to the length of the shorter response."""
        return any(loss.needs_shared_logps(loss_config[name]) for name, loss in self.parts.items())

    def needs_weights(self, loss_config) -> bool:
        """True if a part needs the weights of the responses (WPO) under its options."""
        return any(loss.needs_weights(loss_config[name]) for name, loss in self.parts.items())

    def compute(self, inputs: dict, loss_config) -> Result:
        """Return the weighted sum for a batch, and each part alone."""
        results = {}
        for name, loss in self.parts.items():
            seen = inputs if loss.needs_reference(loss_config[name]) else _without_reference(inputs)
            results[name] = loss.compute(seen, loss_config[name])
        losses = sum(loss_config["parts"][name] * result.losses for name, result in results.items())
        rewards = next((result.rewards for result in results.values() if result.rewards), ())
        return Result(losses, rewards, {name: result.losses.detach() for name, result in results.items()})


def _without_reference(inputs: dict) -> dict:
    """Return the inputs of a part with `reference_free`: the reference's log-probabilities are zeros."""
    zeros = {name: torch.zeros_like(value) for name, value in inputs.items() if name.startswith("reference_")}
    return {**inputs, **zeros}
