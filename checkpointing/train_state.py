"""The state of training in a checkpoint: counters and random generators."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import random
import typing
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig

from basics.files import open_regular
from basics.printing import counted
from basics.saved_config import flatten
from utils import UserError, rank0_print

# fields that checkpoints of earlier versions lack
_ADDED_LATER = ("inputs", "log_sha256", "best", "best_at", "worse", "max_tokens", "loss_memory")


@dataclass
class TrainState:
    """The progress of a run. A checkpoint keeps it in `state.json`, and the random generators in `rng.pt`.

    state.json also records the config, trainer, optimizer and versions under which it was written.
    """

    examples: int = 0  # trained on
    updates: int = 0  # optimizer steps
    batches: int = 0  # training batches used so far; training resumes after them
    evaluated_at: int | None = None  # `examples` at the last evaluation
    saved_at: int | None = None  # `examples` at the last step-N
    complete: bool = False  # trained to the end, and evaluated there
    best: dict[str, float] = field(default_factory=dict)  # the best value so far of the metric that `keep_best` names
    best_at: int | None = None  # `examples` at that evaluation
    worse: int = 0  # number of evaluations since the best one
    max_tokens: int | None = None  # the limit on tokens in a microbatch; another value would change rounding
    loss_memory: dict[str, float] = field(default_factory=dict)  # moving averages of the loss, if it keeps any
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    wandb_run_id: str | None = None
    log_bytes: dict[str, int] = field(default_factory=dict)  # size of each log file
    log_sha256: dict[str, str] = field(default_factory=dict)  # of each log file
    inputs: dict[str, str] = field(default_factory=dict)  # fingerprints of what the run started from
    rng_states: list[dict] = field(default_factory=list)  # one per batch shard, see `get_rng_state`

    def save(self, directory: str, config: DictConfig):
        """Write state.json and rng.pt."""
        counters = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "rng_states"}
        origin = {"trainer": config.trainer, "optimizer": config.optimizer, "config": training_settings(config),
                  "versions": versions()}  # fmt: skip
        from checkpointing.archives import write_tensors  # loads Transformers, which takes seconds

        write_tensors({"workers": self.rng_states}, os.path.join(directory, "rng.pt"))
        with open(os.path.join(directory, "state.json"), "w", encoding="utf-8") as file:
            json.dump({**counters, **origin}, file, indent=2)

    @classmethod
    def load(cls, checkpoint: str) -> "TrainState":
        """Read state.json and rng.pt. Raises: UserError if they can't be read, or lack values."""
        from checkpointing.archives import read_tensors

        saved, path = read_state_json(checkpoint), os.path.join(checkpoint, "rng.pt")
        names = [f.name for f in dataclasses.fields(cls) if f.name != "rng_states"]
        try:
            state = cls(**{name: saved[name] for name in names if name in saved or name not in _ADDED_LATER})
        except KeyError as error:
            raise UserError(f"{checkpoint}: its train state lacks {error}: another program wrote it") from error
        try:
            state.rng_states = read_tensors(path)["workers"]
            _check_rng_states(state.rng_states)
        except BAD_STATE_ERRORS as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: it doesn't hold the states of random generators: {str(error)[:300]}") from error
        return state


# raised for content of an unexpected form
BAD_STATE_ERRORS = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError)


def read_state_json(checkpoint: str) -> dict:
    """Return a checkpoint's state.json: the fields of `TrainState`, config, trainer, optimizer and versions.

    Raises: UserError if it can't be read, or a field is not of its type.
    """
    path = os.path.join(checkpoint, "state.json")
    try:
        with open_regular(path) as file:
            state = json.load(file)
        if not isinstance(state, dict):
            raise ValueError("it holds no object")
        kinds = {f.name: f.type for f in dataclasses.fields(TrainState)} | {"config": dict[str, object]}
        for name in state.keys() & kinds.keys() - {"rng_states"}:
            if not _is_of_type(state[name], kinds[name]):
                raise ValueError(f"{name} is {str(state[name])[:100]!r}")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: can't read it ({type(error).__name__}: {error})") from error
    return state


def _is_of_type(value: object, kind: object) -> bool:
    """True if a value read from JSON is of a field's type; counts and sizes are 0 or more."""
    if typing.get_origin(kind) is dict:
        of_values = typing.get_args(kind)[1]
        return isinstance(value, dict) and all(_is_of_type(v, of_values) for v in value.values())
    if kind in (int, int | None) and isinstance(value, int):
        return not isinstance(value, bool) and value >= 0
    return isinstance(value, int | float if kind is float else kind)


def training_settings(config: DictConfig) -> dict[str, object]:
    """Return the flat config, without the run's directory and the keys that resume it."""
    left_out = ("local_run_dir", "resume", "resume_anyway")
    return {key: value for key, value in flatten(config).items() if key not in left_out}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that influence a run's numbers."""
    transformers = importlib.metadata.version("transformers")  # without importing it
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers}


# ---- random generators ----------------------------------------------------------------------------------------------


def _gpus() -> list[int]:
    """Return the GPUs whose random generators this worker uses."""
    return [torch.cuda.current_device()] if dist.is_initialized() else list(range(torch.cuda.device_count()))


def seed_generators(seed: int):
    """Seed torch, numpy and Python."""
    for set_seed in (torch.manual_seed, np.random.seed, random.seed):
        set_seed(seed % 2**32)


def get_rng_state() -> dict:
    """Return the states of this worker's random generators, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(gpu) for gpu in _gpus()] if torch.cuda.is_available() else [],
        "mps": [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else [],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def restore_rng_state(states: list[dict], shard: int, n_shards: int):
    """Restore this worker's random generators from a checkpoint, if it has a state for the worker's batch shard.

    Workers that compute the same shard must draw the same numbers, so they all get its state.

    Args:
        states: one per batch shard when the checkpoint was saved.
    """
    if states and len(states) != n_shards:
        saved = counted(len(states), "shard")
        rank0_print(
            f"WARNING: the checkpoint's run divided batches into {saved}, this run into {n_shards}: samples will differ"
        )
    if shard < len(states):
        set_rng_state(states[shard])


def set_rng_state(state: dict):
    """Restore this worker's random generators."""
    _set_cpu_rng_state(state)
    gpus = _gpus() if torch.cuda.is_available() else []
    if len(state["cuda"]) != len(gpus):
        saved = counted(len(state["cuda"]), "GPU")
        rank0_print(f"WARNING: saved with {saved}, resumed with {len(gpus)}: samples will differ")
    for gpu, gpu_state in zip(gpus, state["cuda"], strict=False):
        torch.cuda.set_rng_state(gpu_state, gpu)
    if state.get("mps") and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"][0])


def _set_cpu_rng_state(state: dict):
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


def _check_rng_states(states: list[dict]):
    """Raise an error of any kind unless these are states that `get_rng_state` has returned."""
    former = get_rng_state()
    try:
        for state in states:
            _set_cpu_rng_state(state)
            if not all(gpu_state.dtype == torch.uint8 for gpu_state in state["cuda"]):
                raise ValueError("a GPU's state is not made of bytes")
    finally:
        _set_cpu_rng_state(former)
