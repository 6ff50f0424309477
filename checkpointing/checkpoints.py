"""Checkpoint directories: writing one, reading a policy from one, and deleting old ones.

A checkpoint is a directory that appears whole or not at all. It contains:
- the original's files, `policy.pt`, `optimizer.pt` and `scheduler.pt`, each {'step_idx': training examples seen,
  'state': a state dict, 'metrics': those of the last evaluation};
- model and tokenizer for `from_pretrained` (if the policy has an adapter, only that, in PEFT's format), a model card;
- `state.json` and `rng.pt`, the train state;
- `SHA256SUMS`, to detect damage.
"""

import json
import os
import time
import uuid

import torch
import transformers
from omegaconf import DictConfig
from torch import nn

from basics.checksums import read_checksums
from basics.links import followed, link_target, make_link
from checkpointing.archives import UNREADABLE, describe, fit_state, read_state_dict, write_tensors
from checkpointing.atomic_directory import atomic_directory, remove_whole, replace_path
from checkpointing.model_card import write_card
from checkpointing.train_state import TrainState, read_state_json
from distributed.dtensor import distribute_like, full_state_dict
from references import REFERENCE_ADAPTER
from utils import UserError, rank0_print


def full_state_dicts(
    policy: nn.Module,
    reference_model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> dict[str, dict]:
    """Return the state dicts that a checkpoint holds, with full tensors on rank 0; all workers must call it.

    For a policy with an adapter they hold the trained weights and the adapter's frozen parts.
    """
    policy_state = dict(policy.state_dict(keep_vars=True))
    if hasattr(policy, "peft_config"):
        trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
        frozen = {name for name in policy_state if ".lora_" in name and f".{REFERENCE_ADAPTER}" not in name}
        policy_state = {name: policy_state[name] for name in sorted(trained | frozen)}
    state_dicts = {"policy": full_state_dict(policy_state)}
    if optimizer is not None:
        state_dicts["optimizer"] = full_state_dict(optimizer.state_dict())
    if scheduler is not None:
        state_dicts["scheduler"] = scheduler.state_dict()
    if reference_model is not None:
        state_dicts["reference"] = full_state_dict(dict(reference_model.state_dict(keep_vars=True)))
    return state_dicts


def write_state_dict(step: int, state: dict, metrics: dict | None, filename: str, dir_name: str):
    """Write one file of a checkpoint, in the original's format."""
    write_tensors({"step_idx": step, "state": state, "metrics": metrics or {}}, os.path.join(dir_name, filename))


def write_checkpoint(
    path: str,
    policy: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    state_dicts: dict[str, dict],
    train_state: TrainState,
    config: DictConfig,
    dropout_rates: dict[str, float],
    n_eval_examples: int,
):
    """Write a checkpoint directory; it replaces an earlier one.

    Args:
        state_dicts: by 'policy' and, optionally, 'optimizer' and 'scheduler', with full tensors. For a policy with an
            adapter, the trained weights and the adapter's other parts are enough.
        config: the run's config.
        dropout_rates: written to the model's config.json in place of the policy's, which are 0.
        n_eval_examples: the number of examples in an evaluation, for the model card.

    Raises: UserError if it can't be written; an earlier checkpoint is then unchanged.
    """
    start_time = time.perf_counter()
    rank0_print(f"writing checkpoint to {path}...")
    with atomic_directory(path) as partial:
        has_adapter = hasattr(policy, "peft_config")
        for name, state in state_dicts.items():
            if name != "policy" or not has_adapter:
                write_state_dict(train_state.examples, state, train_state.metrics, f"{name}.pt", partial)
        if has_adapter:
            policy.save_pretrained(
                partial, selected_adapters=["default"], save_embedding_layers=False, state_dict=state_dicts["policy"]
            )
        else:
            _export_model(policy, state_dicts["policy"], partial, dropout_rates)
        tokenizer.save_pretrained(partial)
        train_state.save(partial, config)
        write_card(partial, config, read_state_json(partial), has_adapter, n_eval_examples)
    size = sum(os.path.getsize(os.path.join(path, name)) for name in os.listdir(path))
    rank0_print(f"wrote {size / 1e6:.1f} MB to {path} in {time.perf_counter() - start_time:.2f} s")


def _export_model(policy: nn.Module, state: dict, directory: str, dropout_rates: dict[str, float]):
    """Write the policy for `from_pretrained`, with the model's own code if it has any."""
    # FSDP replaces the class by one that the model's code lacks
    model_class = next(base for base in type(policy).__mro__ if not base.__module__.startswith("torch."))
    model = model_class.__new__(model_class)
    model.__dict__ = policy.__dict__
    model.save_pretrained(directory, state_dict=dict(state))
    path = os.path.join(directory, "config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    config |= dropout_rates
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)


def load_model_state(path: str, model: nn.Module):
    """Load the weights in one file of a checkpoint into a model, bit for bit.

    Raises: UserError if it isn't there or doesn't fit.
    """
    model.load_state_dict(fit_state(read_state_dict(path, mmap=True), model, path))


def load_policy_state(directory: str, policy: nn.Module):
    """Load the weights of a checkpoint into a policy, bit for bit."""
    if not hasattr(policy, "peft_config"):
        load_model_state(os.path.join(directory, "policy.pt"), policy)
        return
    import peft

    targets = peft.get_peft_model_state_dict(policy, adapter_name="default", save_embedding_layers=False)
    try:
        weights = peft.utils.load_peft_weights(directory, device="cpu")
        if differing := sorted(weights.keys() ^ targets.keys()):
            raise ValueError(f"only one of them has {', '.join(differing[:10])}")
        for name, target in targets.items():
            target.copy_(distribute_like(target, weights[name]))
    except UNREADABLE as error:
        raise UserError(f"{directory}: its adapter doesn't fit the policy: {describe(error)}") from error


def point_latest(run_dir: str, name: str):
    """Make LATEST a link to the checkpoint `name`."""
    point_to(run_dir, "LATEST", name)


def point_to(run_dir: str, link: str, name: str):
    """Make `link` a link to the checkpoint `name`."""
    partial = os.path.join(run_dir, f"{link}.partial-{uuid.uuid4().hex[:8]}")
    try:
        make_link(name, partial)
        replace_path(partial, os.path.join(run_dir, link))
    except OSError as error:
        raise UserError(f"can't link {run_dir}/{link} to {name} (the checkpoint is complete): {error}") from error


def delete_oldest(run_dir: str, n_kept: int | None, examples: int):
    """Delete the step-N checkpoints with N up to `examples`, except the last `n_kept` and the one that BEST links to.

    Directories that no run wrote are neither counted nor deleted. None keeps all.
    """
    best = os.path.realpath(followed(os.path.join(run_dir, "BEST")))
    names = [name for name in os.listdir(run_dir) if name.startswith("step-") and name[5:].isdecimal()]
    steps = [int(name[5:]) for name in names if _is_checkpoint(os.path.join(run_dir, name))]
    for step in sorted(step for step in steps if step <= examples)[: -n_kept if n_kept else 0]:
        doomed = os.path.join(run_dir, f"step-{step}")
        if os.path.realpath(doomed) != best:
            remove_whole(doomed)


def _is_checkpoint(path: str) -> bool:
    """True if a run wrote this directory: its checksums list the train state."""
    try:
        return link_target(path) is None and "state.json" in read_checksums(path)
    except (OSError, ValueError):
        return False
