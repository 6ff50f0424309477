"""Losses that depend on a whole batch, computed in microbatches and by several workers.

Such a loss is computed twice. First on the whole batch, of all microbatches and workers, from log-probabilities without
a gradient; that also gives its derivative with respect to each of them. Then each microbatch computes its
log-probabilities once more, and has the same loss, with that derivative as its gradient.
"""

from collections.abc import Callable
from functools import partial

import torch

from distributed import collectives
from log_probabilities import response_lengths
from objectives.declaration import Result
from objectives.inputs import forward


def batch_losses(trainer, batch: dict, microbatches: list[dict], train: bool) -> list[Callable]:
    """Return the loss of each microbatch, a function of its inputs and options, for a batch of all workers.

    What the loss takes from the whole batch is computed here: see `objectives.declaration.Loss`.
    """
    loss, of_batch = trainer.loss, {"memory": trainer.loss_memory}
    trainer.loss_memory.is_frozen = not train
    if loss.takes_kl_estimate:
        of_batch["kl_estimate"] = trainer.estimate_kl(batch)
    if loss.takes_mean_length:
        of_batch["mean_chosen_length"] = _mean_length(trainer, batch)

    def compute(inputs: dict, loss_config) -> Result:
        return loss.compute(inputs | of_batch, loss_config)

    if not loss.takes_whole_batch or (len(microbatches) == 1 and not trainer.is_sharded):
        return [compute] * len(microbatches)
    with torch.no_grad():
        inputs = [forward(trainer, microbatch) for microbatch in microbatches]
    counted = [trainer.counted(microbatch) for microbatch in microbatches]
    return _linearized(partial(compute, loss_config=trainer.config.loss), inputs, counted, trainer.is_sharded)


def _mean_length(trainer, batch: dict) -> torch.Tensor:
    """Return the mean number of trained tokens of a batch's chosen responses, on all workers, shape ()."""
    counted = trainer.counted(batch)
    lengths = response_lengths(batch["chosen_labels"]).to(counted.device)
    sum_and_count = torch.stack([(lengths * counted).sum(), counted.sum()]).to(torch.float32)
    if trainer.is_sharded:
        sum_and_count = collectives.all_reduce_sum(sum_and_count)
    return sum_and_count[0] / sum_and_count[1]


def _linearized(
    loss: Callable[[dict], Result], inputs: list[dict], counted: list[torch.Tensor], is_sharded: bool
) -> list[Callable]:
    """Return a loss for each microbatch, which has the values and the gradient of the loss of the whole batch.

    Args:
        loss: computes a whole batch from its inputs.
        inputs: those of this worker's microbatches, without gradient.
        counted: a mask of the examples of each that aren't there to fill up the batch.
        is_sharded: the other workers have other examples of the batch.
    """
    sizes = [len(part) for part in counted]
    own = {name: torch.cat([part[name] for part in inputs]) for name in inputs[0]} | {"counted": torch.cat(counted)}
    whole, start = _gathered(own) if is_sharded else (own, 0)
    counts = whole.pop("counted")
    leaves = {name: values[counts] for name, values in whole.items()}
    trained = [name for name in leaves if name.startswith("policy_")]
    with torch.enable_grad():
        result = loss(leaves | {name: leaves[name].requires_grad_() for name in trained})
        gradients = torch.autograd.grad(result.losses.sum(), [leaves[name] for name in trained], allow_unused=True)

    def of_microbatches(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        filled = values.new_zeros(len(counts)).masked_scatter(counts, values.detach())
        return filled[start : start + sum(sizes)].split(sizes)

    losses, rewards = of_microbatches(result.losses), [of_microbatches(values) for values in result.rewards]
    parts = {name: of_microbatches(values) for name, values in result.parts.items()}
    slopes = {name: of_microbatches(slope) for name, slope in zip(trained, gradients, strict=True) if slope is not None}

    def of_microbatch(number: int) -> Callable:
        def linear(inputs: dict, _loss_config) -> Result:
            change = sum(of_all[number] * (inputs[name] - inputs[name].detach()) for name, of_all in slopes.items())
            of_parts = {name: of_all[number] for name, of_all in parts.items()}
            return Result(losses[number] + change, tuple(of_all[number] for of_all in rewards), of_parts)

        return linear

    return [of_microbatch(number) for number in range(len(inputs))]


def _gathered(own: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
    """Return the tensors of all workers, one after the other, and the place of this worker's first example."""
    of_workers = collectives.all_gather_object({name: values.cpu() for name, values in own.items()})
    whole = {name: torch.cat([of_worker[name] for of_worker in of_workers]).to(own[name].device) for name in own}
    rank = collectives.rank_and_world_size()[0]
    return whole, sum(len(of_worker["counted"]) for of_worker in of_workers[:rank])
