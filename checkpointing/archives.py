"""Read and write files of tensors, also in the original's format: checkpoints, and weights to start from."""

import contextlib
import glob
import json
import logging
import os
import pickle
import re
import shlex
from collections.abc import Iterable, Iterator

import safetensors.torch
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor

from basics.checksums import read_checksums, verify_checksum
from basics.files import LFS_POINTER, open_regular
from basics.outputs import CHECKSUMS, SHARDS, holds_model, is_sharded
from checkpointing.sharded import SavedTensor, ShardedCheckpoint, is_tensor, placed_like
from config_checks.overrides import quoted_path
from data import hub
from utils import UserError, rank0_print

# Buffers that transformers wrote into state dicts in 2023; today's models compute them, so they are left out.
COMPUTED_BUFFERS = (
    *(f".{module}.{buffer}" for module in ("attn", "attention") for buffer in ("bias", "masked_bias")),
    ".rotary_emb.inv_freq",
)
UNREADABLE = (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError,
              SafetensorError)  # fmt: skip


def write_tensors(value: dict, path: str):
    """Save with `torch.save`, through a Python file: a full disk then raises OSError."""
    with open(path, "wb") as file:
        torch.save(value, file)


def read_tensors(path: str, mmap: bool = False) -> dict:
    """Read a file that `write_tensors` wrote; with `mmap`, a tensor is read when it is used.

    Raises: UserError if the file can't be read, or holds more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UNREADABLE as error:
        raise UserError(f"{path}: can't read it ({describe(error)})") from error


def read_state_dict(path: str, mmap: bool = False) -> dict:
    """Read the state dict in one of a checkpoint's .pt files.

    Raises: UserError if the file can't be read, or holds no state dict.
    """
    saved = read_tensors(path, mmap)
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        raise UserError(f"{path}: can't read it: it holds no state dict")
    return saved["state"]


def describe(error: Exception, n_characters: int = 300) -> str:
    """Describe why a file can't be read.

    Torch's own message advises `weights_only=False`, which would run code in the file: only its reason is kept.
    """
    text = str(error).strip()
    if "weights_only" in text:
        reason = re.search(r"WeightsUnpickler error: (.*?)(?:\. Please use|\n|$)", text)
        text = reason[1] if reason else "it is not a file of tensors"
    return f"{type(error).__name__}: {text[:n_characters]}"


def verify_weights(directory: str):
    """Compare a folder's files of weights with its SHA256SUMS, if there is one.

    Raises: ValueError if a file is damaged, or only points to one.
    """
    for path in glob.glob(os.path.join(glob.escape(directory), "*.safetensors")):
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(f"{path} is a Git LFS pointer, not the weights: get them with git lfs pull")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        with open_regular(os.path.join(directory, CHECKSUMS)) as file:
            text = file.read().decode(errors="replace")
        listed = re.findall(r"^([0-9a-f]{64}) [ *](?:\./)?([^/\0\n]+)$", text, re.MULTILINE)
        for digest, name in listed:
            if name.endswith((".safetensors", ".bin")) and os.path.exists(os.path.join(directory, name)):
                verify_checksum(directory, name, digest)


def load_archive(path: str, model: nn.Module, key: str = "model.archive", trust_remote_code: bool = False):
    """Replace a model's weights by those of an archive.

    An archive is a `policy.pt` (also one that the original wrote), a .safetensors file, a checkpoint directory, whole
    or sharded, a directory that `save_pretrained` wrote, or a model on the hub.

    Args:
        key: the config's key that names the archive, for messages.
        trust_remote_code: see `model.trust_remote_code` in the config.

    Raises: UserError if it can't be read, or naming the weights that are missing, left over, of another shape, or not
        finite.
    """
    if os.path.exists(os.path.join(path, "adapter_config.json")):
        raise UserError(
            f"{key}={path} holds a LoRA adapter, not a model: give it as {key.replace('archive', 'adapter')}={path}"
        )
    if os.path.exists(os.path.join(path, "policy.pt")):
        path = os.path.join(path, "policy.pt")
    try:
        verify_weights(path)
        directory, name = os.path.split(path)
        if os.path.exists(os.path.join(directory, CHECKSUMS)):
            verify_checksum(directory, name, read_checksums(directory).get(name))
        if is_sharded(path):
            verify_checksum(path, SHARDS, read_checksums(path).get(SHARDS))
            state, origin = ShardedCheckpoint(path).state_dict("policy"), ""
        elif path.endswith(".safetensors"):
            state, origin = safetensors.torch.load_file(path), ""
        elif os.path.isfile(path):
            archive = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            state = archive["state"]
            origin = f" at step {archive['step_idx']} with metrics {json.dumps(archive['metrics'], indent=2)}"
        else:
            options = {"dtype": model.dtype, "trust_remote_code": trust_remote_code}
            state, origin = load_pretrained(path, f"{key}={path}", **options).state_dict(), ""
        if not isinstance(state, dict):
            raise ValueError(f"its state is a {type(state).__name__}")
    except UserError:
        raise
    except Exception as error:  # a file in another format can raise any error
        if explanation := hub.explain_failure(error, path, "model"):
            raise UserError(f"{key}={path}: {explanation[0]}\n{explanation[1]}") from error
        raise UserError(
            f"{key}={path}: can't read it as a checkpoint ({describe(error)}). "
            f"Expected a policy.pt that training wrote, a .safetensors file, or a folder or hub id for from_pretrained"
        ) from error
    rank0_print(f"loading pre-trained weights from {path}{origin}")
    load_fitting(state, model, f"{key}={path}")
    check_finite(model, f"{key}={path}")
    rank0_print("loaded pre-trained weights")


def _check_tensors(state: dict, path: str):
    """Raise UserError unless a state dict holds only named tensors that have values."""
    for name, tensor in state.items():
        if not isinstance(name, str) or not is_tensor(tensor):
            kind = type(tensor).__name__
            raise UserError(f"{path} holds more than named tensors: {name!r} is a {kind}; save the weights alone")
        if isinstance(tensor, SavedTensor):
            continue
        if tensor.is_meta or tensor.layout != torch.strided:
            kind = "without values (on the meta device)" if tensor.is_meta else f"of the layout {tensor.layout}"
            raise UserError(f"{path}: {name} is a tensor {kind}; save it as a dense tensor, with its values")


def load_pretrained(
    name: str, origin: str, auto_class: type = transformers.AutoModelForCausalLM, **options
) -> nn.Module:
    """Call `auto_class.from_pretrained(name, **options)`, and check that its files hold exactly the model's weights.

    Weights of parts that the model lacks, such as a reward head, are ignored with a message; buffers that models
    compute are ignored silently.

    Args:
        origin: where the model comes from, for messages.

    Raises: UserError naming the weights that are missing, left over or of another shape.
    """
    has_config = os.path.exists(os.path.join(name, "config.json"))  # an adapter's checkpoint has none
    if is_sharded(name) and has_config and not holds_model(name):
        raise UserError(f"{origin} is a sharded checkpoint. Make a model of it first: {export_command(name)}")
    with _without_report():
        model, info = auto_class.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    buffers = {key for key, _ in model.named_buffers() if key.endswith(COMPUTED_BUFFERS)}
    left_over = {key for key in info["unexpected_keys"] if not key.endswith(COMPUTED_BUFFERS)}
    missing = set(info["missing_keys"]) - buffers
    shapes = [(key, tuple(found), tuple(own)) for key, found, own in info["mismatched_keys"]]
    is_whole = not missing and not shapes
    ignored = sorted(key for key in left_over if is_whole and not _belongs_to_model(key, model))
    _refuse_misfits(origin, missing, left_over - set(ignored), shapes)
    if ignored:
        shown = ", ".join(ignored[:5]) + (f" and {len(ignored) - 5} more" if len(ignored) > 5 else "")
        rank0_print(f"{origin}: ignored weights of parts that {type(model).__name__} lacks: {shown}")
    return model


def export_command(checkpoint: str) -> str:
    """Return the command that makes a model for `from_pretrained` of a checkpoint."""
    run_dir, name = os.path.split(os.path.abspath(checkpoint))
    return shlex.join(["python", "export.py", f"run={quoted_path(run_dir)}", f"checkpoint={name}", "output=DIR"])


def _belongs_to_model(key: str, model: nn.Module) -> bool:
    """True if a weight's name begins with one of the model's own parts: embeddings, blocks, norms or head."""
    parts = {name for module in (model, model.base_model) for name, _ in module.named_children()}
    first = key.removeprefix(f"{model.base_model_prefix}.").split(".")[0]
    return first in parts


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from logging its table of weights that don't fit; the error lists them."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def check_finite(model: nn.Module, origin: str, group: dist.ProcessGroup | None = None):
    """Raise UserError naming the weights that hold NaN or infinity.

    Args:
        origin: where the weights come from, for the message.
        group: the workers that hold the other parts of these weights, if there are any; all of them must call this.
    """
    bad = set()
    for name, parameter in model.named_parameters():
        part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if part.numel() > 0 and part.is_floating_point():  # 4-bit weights are integers
            bounds = part.detach().aminmax()  # needs no memory of the tensor's size
            if not all(bound.isfinite() for bound in bounds):
                bad.add(name)
    if group is not None:
        by_worker: list[set[str]] = [set()] * dist.get_world_size(group)
        dist.all_gather_object(by_worker, bad, group)
        bad = set().union(*by_worker)
    if bad:
        names = [name for name, _ in model.named_parameters() if name in bad]
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        raise UserError(f"{origin}: weights that are NaN or infinite in {str(model.dtype)[6:]}: {shown}")


def load_fitting(state: dict, model: nn.Module, path: str):
    """Copy a state dict into a model, one tensor after another. Raises: see `load_archive`."""
    targets = model.state_dict(keep_vars=True)
    fitted = fit_state(state, model, path)
    with torch.no_grad():
        for name in {id(targets[name]): name for name in fitted}.values():  # tied weights once
            targets[name].copy_(placed_like(targets[name], fitted[name]))


def fit_state(state: dict, model: nn.Module, path: str) -> dict:
    """Rename a state dict's tensors as the model's are, and check that they fit it. Raises: see `load_archive`."""
    expected = model.state_dict(keep_vars=True)
    fitted = {}
    _check_tensors(state, path)
    for name, tensor in state.items():
        new_name = "lm_head.weight" if name == "embed_out.weight" and name not in expected else name
        if new_name in expected or not new_name.endswith(COMPUTED_BUFFERS):
            fitted[new_name] = tensor
    by_parameter = {id(expected[name]): name for name in fitted.keys() & expected.keys()}
    for name, parameter in expected.items():  # .safetensors files hold tied weights once
        if name not in fitted and id(parameter) in by_parameter:
            fitted[name] = fitted[by_parameter[id(parameter)]]

    untied = [
        f"{name}: is not equal to {by_parameter[id(expected[name])]}, which the model ties it to"
        for name in fitted.keys() & expected.keys()
        if not _is_same(fitted[name], fitted[by_parameter[id(expected[name])]])
    ]
    both = sorted(expected.keys() & fitted.keys())
    shapes = [(name, tuple(fitted[name].shape), tuple(expected[name].shape)) for name in both]
    kinds = [
        f"{name}: {str(fitted[name].dtype)[6:]}, the model's is {str(expected[name].dtype)[6:]}"
        for name in both
        if expected[name].is_floating_point() and not fitted[name].is_floating_point()
    ]
    left_over = fitted.keys() - expected.keys()
    _refuse_misfits(path, expected.keys() - fitted.keys(), left_over, shapes, kinds + untied)
    return fitted


def _is_same(tensor: torch.Tensor | SavedTensor, other: torch.Tensor | SavedTensor) -> bool:
    return tensor is other or torch.equal(*(t.full() if isinstance(t, SavedTensor) else t for t in (tensor, other)))


def _refuse_misfits(
    origin: str,
    missing: Iterable[str],
    left_over: Iterable[str],
    shapes: Iterable[tuple[str, tuple, tuple]],
    others: Iterable[str] = (),
):
    """Raise UserError if any weights don't fit; `shapes`: (name, the shape found, the model's shape)."""
    by_kind = [
        [f"missing: {name}" for name in missing],
        [f"left over: {name}" for name in left_over],
        [f"{name}: shape {found}, the model's is {own}" for name, found, own in shapes if found != own],
        list(others),
    ]
    by_kind = [sorted(problems) for problems in by_kind if problems]
    if by_kind:
        n_shown = 10 if len(by_kind) == 1 else 5
        first = sorted(problem for problems in by_kind for problem in problems[:n_shown])
        n_more = sum(map(len, by_kind)) - len(first)
        shown = "\n  ".join(first)
        more = f"\n  and {n_more} more" if n_more else ""
        raise UserError(f"{origin} doesn't fit the model. Was it trained with another model=NAME?\n  {shown}{more}")
