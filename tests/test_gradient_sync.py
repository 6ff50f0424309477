"""Collectives of a training step under FSDP: gradients are summed between replicas once per step."""

import collections
import functools

import pytest
import torch
from conftest import ORACLE
from omegaconf import OmegaConf
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from commands.command_line import compose_config
from config_checks.checks import check_config
from distributed.dtensor import full_tensor
from trainers import make_trainer

RUN = [
    "model=tiny", f"dataset_paths.hh={ORACLE}/hh", "model.policy_dtype=float64", "model.reference_dtype=float64",
    "max_length=48", "max_prompt_length=24", "batch_size=8", "n_examples=16", "n_eval_examples=4",
    "eval_batch_size=4", "sample_during_eval=false", "wandb.enabled=false", "loss=dpo", "precompute_ref_log_probs=true",
    "optimizer=SGD", "lr=0.1", "warmup_steps=0", "lr_scheduler=constant", "max_tokens_per_microbatch=10000",
]  # fmt: skip


class Collectives(TorchDispatchMode):
    """Inside the block, counts the collectives by which FSDP gathers weights and sums gradients."""

    NAMES = ("_allgather_base_", "_reduce_scatter_base_", "allreduce_")

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter(dict.fromkeys(self.NAMES, 0))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor then dispatches again with plain tensors
        name = function._schema.name.partition("::")[2]
        tensors = [tensor for arg in args for tensor in (arg if isinstance(arg, list) else [arg])]
        # up to 64 numbers are counts that workers agree on, not gradients
        if name in self.NAMES and max(t.numel() for t in tensors if isinstance(t, torch.Tensor)) > 64:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def two_steps(trainer_name: str, n_replicas: int, n_microbatches: int, directory: str):
    """Take two steps; return the second one's counts of collectives, and the weights after both."""
    config = compose_config(
        *RUN, f"trainer={trainer_name}", f"fsdp_replicate={n_replicas}", f"local_dirs=[{directory}/cache]",
        f"gradient_accumulation_steps={n_microbatches}", f"local_run_dir={directory}/run",
    )  # fmt: skip
    OmegaConf.resolve(config)
    check_config(config)
    trainer = make_trainer(config)
    trainer.precompute_reference()
    trainer.microbatch_overhead = 1e9  # no more microbatches than requested
    first, second = trainer.train_iterator
    trainer.train_step(first)
    batch = trainer.with_microbatches(second)
    assert len(batch["microbatches"]) == n_microbatches
    with Collectives() as counted:
        trainer.train_step(batch)
    weights = {name: full_tensor(parameter.detach()) for name, parameter in trainer.policy.named_parameters()}
    return dict(counted.counts), weights


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Return a function that returns the weights after the same two steps in one process."""
    directory = tmp_path_factory.mktemp("expected")

    @functools.cache
    def weights(n_microbatches: int) -> dict[str, torch.Tensor]:
        return two_steps("BasicTrainer", 1, n_microbatches, str(directory))[1]

    return weights


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("n_workers", "n_replicas", "n_microbatches", "n_all_reduces"),
    # the gradients of each of the model's 3 blocks, and of the rest, are summed by themselves
    [(2, 1, 4, 0), (4, 2, 1, 4), (4, 2, 2, 4)],
)
def test_gradients_are_summed_between_replicas_once_per_step(
    n_workers, n_replicas, n_microbatches, n_all_reduces, in_workers, expected, tmp_path
):
    for counts, weights in in_workers(n_workers, two_steps, "FSDPTrainer", n_replicas, n_microbatches, str(tmp_path)):
        assert counts["_reduce_scatter_base_"] == 4 * n_microbatches
        assert counts["allreduce_"] == n_all_reduces
        for name, tensor in expected(n_microbatches).items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-9, atol=1e-12)
