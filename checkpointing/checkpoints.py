"""Checkpoint directories: write one, read a policy from one, delete old ones.

A checkpoint is a directory that appears whole or not at all. It contains:
- the original's files, `policy.pt`, `optimizer.pt` and `scheduler.pt`, and `reference.pt` if the reference moves, each
  {'step_idx': training examples seen, 'state': a state dict, 'metrics': those of the last evaluation};
- model and tokenizer for `from_pretrained` (if the policy has an adapter, only the adapter, in PEFT's format, and no
  `policy.pt`);
- `README.md`, a model card;
- `state.json` and `rng.pt`, the train state;
- `SHA256SUMS`, to detect damage.

A sharded checkpoint keeps the tensors of policy, reference and optimizer in one file per worker
(`checkpointing.sharded`); an adapter and all other files are as above. Without an adapter, only a run's last
checkpoint also has the model for `from_pretrained` (`checkpointing.model_files`) and its card.
"""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from omegaconf import DictConfig
from torch import nn

from basics.checksums import read_checksums
from basics.links import followed, link_target, make_link
from basics.outputs import is_sharded
from checkpointing.archives import (
    UNREADABLE,
    describe,
    export_command,
    fit_state,
    load_fitting,
    read_state_dict,
    write_tensors,
)
from checkpointing.atomic_directory import atomic_directory, remove_whole, replace_path, write_errors_explained
from checkpointing.model_card import write_card
from checkpointing.resume import is_last
from checkpointing.sharded import ShardedCheckpoint, not_shared, shard_of, without_tensors, write_shard
from checkpointing.train_state import TrainState, read_state_json
from distributed import collectives
from distributed.dtensor import distribute_like, full_state_dict
from references import REFERENCE_ADAPTER
from utils import UserError, on_rank0, rank0_print


def state_dicts_to_save(
    policy: nn.Module,
    reference_model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> dict[str, dict]:
    """Return the state dicts that a checkpoint holds, with this worker's tensors.

    For a policy with an adapter, 'policy' has only the trained weights and the adapter's frozen parts.
    """
    policy_state = dict(policy.state_dict(keep_vars=True))
    if hasattr(policy, "peft_config"):
        trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
        frozen = {name for name in policy_state if ".lora_" in name and f".{REFERENCE_ADAPTER}" not in name}
        policy_state = {name: policy_state[name] for name in sorted(trained | frozen)}
    state_dicts = {"policy": policy_state}
    if optimizer is not None:
        state_dicts["optimizer"] = optimizer.state_dict()
    if scheduler is not None:
        state_dicts["scheduler"] = scheduler.state_dict()
    if reference_model is not None:
        state_dicts["reference"] = dict(reference_model.state_dict(keep_vars=True))
    return state_dicts


# ---- writing --------------------------------------------------------------------------------------------------------


@dataclass
class Contents:
    """The content of a checkpoint to be written."""

    policy: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    state_dicts: dict[str, dict]  # see `state_dicts_to_save`
    train_state: TrainState
    config: DictConfig  # the run's
    dropout_rates: dict[str, float]  # written to the model's config.json in place of the policy's, which are 0
    n_eval_examples: int  # the number of examples in an evaluation, for the model card

    @property
    def has_adapter(self) -> bool:
        """True if the policy is a model with an adapter."""
        return hasattr(self.policy, "peft_config")

    def write_state_dict(self, directory: str, name: str, state: dict):
        """Write NAME.pt, in the original's format."""
        value = {"step_idx": self.train_state.examples, "state": state, "metrics": self.train_state.metrics or {}}
        write_tensors(value, os.path.join(directory, f"{name}.pt"))

    def write_model(self, directory: str, state: dict):
        """Write the policy, or only its adapter, for `from_pretrained`, with the tensors of `state`.

        If `state` is empty, write no weights. The model's own code is written, too, if it has any.
        """
        if self.has_adapter:
            options = {"selected_adapters": ["default"], "save_embedding_layers": False}
            self.policy.save_pretrained(directory, state_dict=state, **options)
            return
        _as_loaded(self.policy).save_pretrained(directory, state_dict=dict(state))
        path = os.path.join(directory, "config.json")
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(config | self.dropout_rates, file, indent=2)

    def write_tokenizer_and_state(self, directory: str):
        """Write the tokenizer, for `from_pretrained`, and the train state."""
        self.tokenizer.save_pretrained(directory)
        self.train_state.save(directory, self.config)

    def write_card(self, directory: str):
        """Write the model card; the train state must have been written."""
        write_card(directory, self.config, read_state_json(directory), self.has_adapter, self.n_eval_examples)


def write_whole(path: str, contents: Contents, then: Callable[[TrainState], None]):
    """Write a checkpoint with whole tensors on rank 0; it replaces an earlier one. All workers must call this.

    Args:
        then: called on rank 0, with the train state, once the checkpoint is on disk.

    Raises: UserError if it can't be written; an earlier checkpoint is then unchanged.
    """
    state_dicts = {name: full_state_dict(state) for name, state in contents.state_dicts.items()}
    if on_rank0():
        start_time = _print_start(path)
        with atomic_directory(path) as partial:
            for name, state in state_dicts.items():
                if name != "policy" or not contents.has_adapter:
                    contents.write_state_dict(partial, name, state)
            contents.write_model(partial, state_dicts["policy"])
            contents.write_tokenizer_and_state(partial)
            contents.write_card(partial)
        _print_end(path, start_time)
        then(contents.train_state)
    collectives.barrier()


def begin_sharded(path: str, contents: Contents, then: Callable[[TrainState], None]) -> Callable[[], None]:
    """Begin a sharded checkpoint, which replaces an earlier one; return the function that writes the tensors.

    With `checkpoint_async`, this function copies the tensors, so that the returned one may run in another thread while
    training changes them. All workers must call both functions. Arguments and errors: see `write_whole`.
    """
    in_thread, train_state, digests = contents.config.checkpoint_async, contents.train_state, {}
    start_time = _print_start(path)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(atomic_directory(path, known=digests)) if on_rank0() else None
        directory = collectives.broadcast_object(directory)
        stack.enter_context(write_errors_explained(path))
        state_dicts = dict(contents.state_dicts)
        adapter = full_state_dict(state_dicts.pop("policy")) if contents.has_adapter else {}
        if on_rank0():
            _write_small_files(directory, contents, adapter)
        shard = shard_of(state_dicts, copies=in_thread)
        group = collectives.thread_group("checkpoints") if in_thread else None
        unfinished = stack.pop_all()

    def finish():
        problem = None
        try:
            with unfinished:
                digests.update(write_shard(directory, shard, group))
                shard.pieces.clear()  # frees their memory
                if train_state.complete and is_last(path) and not contents.has_adapter:
                    digests.update(_add_model(directory, contents, group, path))
            if on_rank0():
                _print_end(path, start_time)
                then(train_state)
        except UserError as error:
            problem = str(error)
        for reason in collectives.all_gather_object(problem, group):  # no worker leaves before rank 0 is done
            if reason is not None:
                raise UserError(reason)

    return finish


def _write_small_files(directory: str, contents: Contents, adapter: dict):
    """Write all files of a sharded checkpoint except the shards."""
    if "optimizer" in contents.state_dicts:
        contents.write_state_dict(directory, "optimizer", without_tensors(contents.state_dicts["optimizer"]))
        contents.write_state_dict(directory, "scheduler", contents.state_dicts["scheduler"])
    contents.write_model(directory, adapter)
    contents.write_tokenizer_and_state(directory)
    if contents.has_adapter:
        contents.write_card(directory)


def _add_model(
    directory: str, contents: Contents, group: torch.distributed.ProcessGroup | None, path: str
) -> dict[str, str]:
    """Add the model for `from_pretrained` to a run's last sharded checkpoint; see `add_model_files`.

    Args:
        path: where the checkpoint will be.
    """
    from checkpointing.model_files import add_model_files  # only some runs need it

    remedy = f"{export_command(path)} writes one"
    digests = add_model_files(directory, _as_loaded(contents.policy), group, remedy)
    if on_rank0() and digests:
        contents.write_card(directory)
    return digests


def check_shared(run_dir: str):
    """Raise UserError unless all workers see the run directory, which rank 0 has created; all must call this."""
    collectives.barrier()
    seen = collectives.all_gather_object(os.path.isdir(run_dir))
    if seen[0] and False in seen:
        raise UserError(f"local_run_dir={run_dir}: {not_shared(seen.index(False))}")


def _print_start(path: str) -> float:
    rank0_print(f"writing checkpoint to {path}...")
    return time.perf_counter()


def _print_end(path: str, start_time: float):
    size = sum(os.path.getsize(os.path.join(path, name)) for name in os.listdir(path))
    rank0_print(f"wrote {size / 1e6:.1f} MB to {path} in {time.perf_counter() - start_time:.2f} s")


def _as_loaded(policy: nn.Module) -> nn.Module:
    """Return a view of the model with the class that it was loaded as; transformers doesn't know FSDP's classes."""
    model_class = next(base for base in type(policy).__mro__ if not base.__module__.startswith("torch."))
    model = model_class.__new__(model_class)
    model.__dict__ = policy.__dict__
    return model


# ---- reading --------------------------------------------------------------------------------------------------------


def load_model_state(directory: str, name: str, model: nn.Module):
    """Load the weights of a checkpoint's 'policy' or 'reference' into a model, bit for bit.

    Raises: UserError if the weights aren't there or don't fit.
    """
    if is_sharded(directory):
        load_fitting(ShardedCheckpoint(directory).state_dict(name), model, f"{directory}, {name}")
    else:
        path = os.path.join(directory, f"{name}.pt")
        load_fitting(read_state_dict(path, mmap=True), model, path)


def empty_model(directory: str, trust_remote_code: bool) -> nn.Module:
    """Return the model that a checkpoint's config.json describes, on the meta device.

    Raises: UserError if config.json can't be read.
    """
    options = {"trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(directory, **options)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, **options)
    except (*UNREADABLE, ImportError) as error:
        raise UserError(f"{directory}: can't read its config.json ({describe(error, 1000)})") from error


def fill_model(model: nn.Module, directory: str):
    """Move a model from the meta device to the CPU, with the weights of a sharded checkpoint's policy.

    Raises: UserError if the weights can't be read or don't fit.
    """
    state = fit_state(ShardedCheckpoint(directory).state_dict("policy"), model, directory)
    model.load_state_dict({name: tensor.full() for name, tensor in state.items()}, assign=True)
    model.tie_weights()


def load_policy_state(directory: str, policy: nn.Module):
    """Load the weights of a checkpoint into a policy, bit for bit."""
    if not hasattr(policy, "peft_config"):
        load_model_state(directory, "policy", policy)
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


# ---- links and old checkpoints --------------------------------------------------------------------------------------


def point_to(run_dir: str, link: str, name: str):
    """Make `link`, such as LATEST, a link to the checkpoint `name`."""
    partial = os.path.join(run_dir, f"{link}.partial-{uuid.uuid4().hex[:8]}")
    try:
        make_link(name, partial)
        replace_path(partial, os.path.join(run_dir, link))
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise UserError(f"can't link {run_dir}/{link} to {name} (the checkpoint is complete): {error}") from error


def delete_oldest(run_dir: str, n_kept: int | None, examples: int):
    """Delete the step-N checkpoints with N up to `examples`, except the last `n_kept` and the one that BEST links to.

    Directories that no run wrote are neither counted nor deleted. `n_kept=None` keeps all.
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
