"""Losses that depend on a whole batch (KTO, BCO, AOT, ...), computed in microbatches and by several workers.

A loss that sorts or averages the batch is first computed on the whole batch, of all microbatches and workers, from
log-probabilities without a gradient. The results are each example's loss and its derivative with respect to each
log-probability. Then each microbatch computes its log-probabilities again, with a gradient. Its losses have the values
of the first pass, and these derivatives as their gradient.
"""

import functools
import itertools
import operator
from collections.abc import Callable

import torch
from torch.utils._pytree import tree_map

from data.batches import mismatched_batch
from distributed import collectives
from distributed.strategies import SingleProcess
from log_probabilities import response_lengths, shared_lengths
from objectives.declaration import Result
from utils import widest_dtype


def whole_batch_losses(trainer, batch: dict, microbatches: list[dict], train: bool) -> list[Callable]:
    """Return a loss function of inputs and options for each of this worker's microbatches.

    Inputs of shape (), which depend on the whole batch, are computed here; see `objectives.declaration.Loss`.

    Args:
        batch: this worker's shard of the whole batch.
    """
    loss, batch_inputs = trainer.loss, {"memory": trainer.loss_memory}
    trainer.loss_memory.is_frozen = not train
    if loss.takes_kl_estimate:
        batch_inputs["kl_estimate"] = estimate_kl(trainer, batch)
    if loss.takes_mean_length:
        batch_inputs["mean_chosen_length"] = _mean_length(trainer, batch)

    def compute(inputs: dict, loss_config) -> Result:
        return loss.compute(inputs | batch_inputs, loss_config)

    if not loss.takes_whole_batch or (len(microbatches) == 1 and not trainer.is_sharded):
        return [compute] * len(microbatches)
    with torch.no_grad():
        inputs = [_loss_inputs(trainer, microbatch) for microbatch in microbatches]
    counted = [trainer.is_counted(microbatch) for microbatch in microbatches]
    return _linearized(functools.partial(compute, loss_config=trainer.config.loss), inputs, counted, trainer.strategy)


def _loss_inputs(trainer, batch: dict) -> dict[str, torch.Tensor]:
    """Run the policy's forward pass and return the inputs of a loss."""
    n_first = shared_lengths(batch) if trainer.loss.needs_shared_logps(trainer.config.loss) else None
    policy_logps = trainer.response_logps(trainer.policy, batch, n_first)
    return trainer.loss_inputs(batch, policy_logps, n_first, trainer.config.loss)


def estimate_kl(trainer, batch: dict) -> torch.Tensor:
    """Estimate the policy's KL divergence from the reference (nats) for a whole batch of all workers, as KTO does.

    It is the mean log-ratio of responses to other prompts of the batch, or 0 if that is negative; shape (), without
    gradient (Section 4.1 of https://arxiv.org/abs/2402.01306).
    """
    sum_and_count = torch.zeros(2, dtype=widest_dtype(trainer.device), device=trainer.device)
    for microbatch in trainer.microbatches(mismatched_batch(batch), min_microbatches=1):
        with torch.no_grad():
            policy_logps = trainer.response_logps(trainer.policy, microbatch).view(2, -1)  # (2, B)
        counted = trainer.is_counted(microbatch)
        logratios = (policy_logps - torch.stack(trainer.reference_logps(microbatch))).where(counted, 0)
        sum_and_count += torch.stack([logratios.sum(), 2 * counted.sum()]).to(sum_and_count.dtype)
    if trainer.is_sharded:  # several workers may add the same shard: sum and count grow alike, so the mean is right
        sum_and_count = collectives.all_reduce_sum(sum_and_count)
    kl_estimate = (sum_and_count[0] / sum_and_count[1]).clamp(min=0)
    return kl_estimate.to(torch.promote_types(trainer.policy.dtype, torch.float32))


def _mean_length(trainer, batch: dict) -> torch.Tensor:
    """Return the mean number of trained tokens of the whole batch's chosen responses, shape ()."""
    counted = trainer.is_counted(batch)
    lengths = response_lengths(batch["chosen_labels"]).to(counted.device)
    sum_and_count = torch.stack([(lengths * counted).sum(), counted.sum()]).to(torch.float32)
    if trainer.is_sharded:
        sum_and_count = collectives.all_reduce_sum(sum_and_count)
    return sum_and_count[0] / sum_and_count[1]


def _linearized(
    loss: Callable[[dict], Result], inputs: list[dict], counted: list[torch.Tensor], strategy: SingleProcess
) -> list[Callable]:
    """Return a loss for each microbatch, which has the values and the gradient of the loss of the whole batch.

    Args:
        loss: computes a whole batch from its inputs.
        inputs: the inputs of this worker's microbatches, without gradient.
        counted: a mask for each microbatch, which is False for examples that only fill up the batch.
        strategy: gathers the inputs of the other workers' microbatches.
    """
    sizes = [len(part) for part in counted]
    own = {name: torch.cat([part[name] for part in inputs]) for name in inputs[0]} | {"counted": torch.cat(counted)}
    whole, start = _gathered(own, strategy)
    is_counted = whole.pop("counted")
    leaves = {name: values[is_counted] for name, values in whole.items()}
    trained = [name for name in leaves if name.startswith("policy_")]
    with torch.enable_grad():
        result = loss(leaves | {name: leaves[name].requires_grad_() for name in trained})
        gradients = torch.autograd.grad(result.losses.sum(), [leaves[name] for name in trained], allow_unused=True)
    slopes = {name: slope for name, slope in zip(trained, gradients, strict=True) if slope is not None}

    def with_zeros(values: torch.Tensor) -> torch.Tensor:  # for the examples that don't count
        return values.new_zeros(len(is_counted)).masked_scatter(is_counted, values.detach())

    values = tree_map(with_zeros, (result, slopes))
    bounds = itertools.pairwise(itertools.accumulate(sizes, initial=start))
    parts = [tree_map(operator.itemgetter(slice(first, end)), values) for first, end in bounds]
    return [functools.partial(_linear_loss, *part) for part in parts]


def _linear_loss(result: Result, slopes: dict[str, torch.Tensor], inputs: dict, _loss_config) -> Result:
    """Return the result of a microbatch, with a gradient: `slopes` holds the losses' derivatives by each input."""
    zeros = sum(slope * (inputs[name] - inputs[name].detach()) for name, slope in slopes.items())
    return result._replace(losses=result.losses + zeros)


def _gathered(own: dict[str, torch.Tensor], strategy: SingleProcess) -> tuple[dict[str, torch.Tensor], int]:
    """Return the tensors of all batch shards, one after the other, and the index of this shard's first example."""
    index, count = strategy.batch_shard
    if count == 1:
        return own, 0
    shards = strategy.gather_shards({name: values.cpu() for name, values in own.items()})
    whole = {name: torch.cat([shard[name] for shard in shards]).to(own[name].device) for name in own}
    return whole, sum(len(shard["counted"]) for shard in shards[:index])
