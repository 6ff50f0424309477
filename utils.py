"""Small helpers that several files share: messages, signals, directories, batches, models."""

import contextlib
import difflib
import errno
import getpass
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime

import torch
from torch import nn

from basics.errors import UserError
from basics.printing import on_rank0, rank0_print  # noqa: F401 (users of the original import it from here)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_short_of_files(error: BaseException | None) -> bool:
    """True if an error, or an error that caused it, is "too many open files"."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        is_limit = getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)
        if is_limit or "too many open files" in str(error).lower():  # libraries in Rust and C++ have no errno
            return True
        error = error.__cause__ or error.__context__
    return False


def closest_match(name: str, options: Iterable[str]) -> str:
    """Return ' Did you mean X?' with the option most like `name`, or an empty string if none is similar."""
    options = list(options)
    if same := [option for option in options if option.lower() == name.lower()]:
        return f" Did you mean {same[0]}?"
    matches = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if not matches:  # a key may be given without its group: beta for loss.beta
        by_last_part = {option.rsplit(".", 1)[-1]: option for option in reversed(options)}
        matches = [by_last_part[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last_part, n=1)]
    return f" Did you mean {matches[0]}?" if matches else ""


def closest_sibling(path: str) -> str:
    """Return ' Did you mean X?' with the sibling most like a path that doesn't exist, or an empty string."""
    parent = os.path.dirname(path.rstrip("/" + os.sep))
    names = os.listdir(parent or ".") if os.path.isdir(parent or ".") else []
    return closest_match(path, [os.path.join(parent, name) for name in names])


# signals that ask a run to stop; schedulers can send SIGUSR1 before they kill, and Windows has SIGBREAK
_SIGNAL_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGBREAK")
SIGNALS = tuple(getattr(signal, name) for name in _SIGNAL_NAMES if hasattr(signal, name))


@contextlib.contextmanager
def signals_handled(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Let `handler` handle the signals that ask a run to stop, inside the block."""
    former = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def get_local_dir(prefixes_to_resolve: list[str]) -> str:
    """Return this user's directory under the first prefix that exists and is writable, else under the last.

    The directory isn't created here.

    Raises: UserError if `prefixes_to_resolve` isn't a list of directories.
    """
    is_list = isinstance(prefixes_to_resolve, Sequence) and not isinstance(prefixes_to_resolve, str)
    if not is_list or not prefixes_to_resolve or not all(isinstance(p, str) and p for p in prefixes_to_resolve):
        raise UserError(f"local_dirs={prefixes_to_resolve}: expected a list of directories, e.g. local_dirs=[.cache]")
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container may run under a user id that has no name
        user = f"uid{os.getuid()}" if hasattr(os, "getuid") else "user"
    prefixes = [os.path.expanduser(prefix) for prefix in prefixes_to_resolve]
    for prefix in prefixes:
        if os.access(prefix, os.W_OK | os.X_OK):
            return os.path.join(prefix, user)
    return os.path.join(prefixes[-1], user)


def get_local_run_dir(exp_name: str, local_dirs: list[str]) -> str:
    """Return a new path for this run's outputs; the directory isn't created yet.

    Raises: UserError if `exp_name` leads out of the local directory.
    """
    timestamp, local_dir = datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f"), get_local_dir(local_dirs)
    run_dir = os.path.join(local_dir, f"{exp_name}_{timestamp}")
    if not os.path.abspath(run_dir).startswith(os.path.abspath(local_dir) + os.sep):
        raise UserError(
            f"exp_name={exp_name} leads out of {local_dir} (local_dirs); give a name, or choose the directory by "
            "local_run_dir"
        )
    return run_dir


def slice_and_move_batch_for_device(batch: dict, rank: int, world_size: int, device: torch.device | str) -> dict:
    """Return the `rank`-th of `world_size` equal parts of a batch, its tensors on `device`.

    For users of the original; this repository's workers get their shards from `data.batches`.
    """
    chunk_size = len(next(iter(batch.values()))) // world_size
    part = slice(chunk_size * rank, chunk_size * (rank + 1))
    return on_device({key: value[part] for key, value in batch.items()}, device)


def on_device(batch: dict, device: torch.device | str) -> dict:
    """Return a batch with its tensors on `device`."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def default_device() -> str:
    """Return the kind of device for a single process: 'cuda' (NVIDIA or AMD), 'mps' (Apple) or 'cpu'."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for long sums on a device: float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def computed_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype in which matrix products of a tensor are computed: autocast's if it is active, else its own."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def select_examples(batch: dict, indices: torch.Tensor) -> dict:
    """Return the examples of a batch with these indices, in their order."""
    return {
        key: value[indices] if isinstance(value, torch.Tensor) else [value[i] for i in indices.tolist()]
        for key, value in batch.items()
    }


def pad_to_length(tensor: torch.Tensor, length: int, pad_value: int | float, dim: int = -1) -> torch.Tensor:
    """Pad `tensor` with `pad_value` at the end of `dim` up to `length`; return a longer tensor unchanged."""
    missing = length - tensor.size(dim)
    if missing <= 0:
        return tensor
    pad_shape = list(tensor.shape)
    pad_shape[dim] = missing
    return torch.cat([tensor, tensor.new_full(pad_shape, pad_value)], dim=dim)


def unwrap_adapter(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT model; return any other model unchanged."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def n_weights(parameter: torch.Tensor) -> int:
    """Return the number of weights in a parameter; bitsandbytes packs two 4-bit weights into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def disable_dropout(model: nn.Module):
    """Turn off all dropout: modules, and rates held as attributes (GPT-NeoX, Llama) or read from the config (GPT-J).

    Policy and reference must compute the same function, and gradients must not depend on a random mask. For
    the same reasons, the noise of routers in mixtures of experts (Mixtral, DBRX) is turned off, too.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero_dropout_rates(module)
        for name in ("jitter_noise", "input_jitter_noise", "moe_jitter_eps"):
            if getattr(module, name, None):
                setattr(module, name, 0.0)
    if hasattr(model, "config"):
        _zero_dropout_rates(model.config)


def _zero_dropout_rates(holder: object):
    for name, value in vars(holder).items():
        if "drop" in name and isinstance(value, float):  # attention_dropout, hidden_dropout, attn_pdrop, layerdrop, ...
            setattr(holder, name, 0.0)


def transformer_blocks(model: nn.Module, block_name: str | None) -> list[nn.Module]:
    """Return a model's transformer blocks: its modules of the class `block_name`, by default of `_no_split_modules`."""
    names = [block_name] if block_name is not None else list(model._no_split_modules or [])
    return [module for module in model.modules() if type(module).__name__ in names]


def get_block_class_from_model(model: nn.Module, block_class_name: str) -> type[nn.Module]:
    """Return the class of the model's transformer blocks by its name (e.g. GPTNeoXLayer).

    Raises: UserError if the model has no module of that class.
    """
    classes = {type(module).__name__: type(module) for module in model.modules()}
    if block_class_name not in classes:
        raise UserError(
            f"model.block_name={block_class_name}: the model has no module of that class."
            f"{closest_match(block_class_name, classes)} It has: {', '.join(sorted(classes))}"
        )
    return classes[block_class_name]
