"""Files of tensors: weights that a run starts from, of today and of 2023, and what checkpoints hold."""

import json
import os
import pickle

import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from checkpointing.integrity import CHECKSUMS, read_checksums, verify_checksum
from data import hub
from distributed.dtensor import distribute_like
from utils import UserError, rank0_print

# Buffers that transformers wrote into state dicts in 2023; today's models compute them, so they are left out.
_LEGACY_BUFFERS = (
    *(f".{module}.{buffer}" for module in ("attn", "attention") for buffer in ("bias", "masked_bias")),
    ".rotary_emb.inv_freq",
)
UNREADABLE = (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError,
              SafetensorError)  # fmt: skip


def write_tensors(value: dict, path: str):
    """`torch.save` through a Python file, which reports a full disk as an OSError."""
    with open(path, "wb") as file:
        torch.save(value, file)


def read_tensors(path: str, mmap: bool = False) -> dict:
    """What `write_tensors` wrote; with `mmap` the tensors stay in the file until they are used.

    Raises: UserError if it can't be read, or holds anything but tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UNREADABLE as error:
        raise UserError(f"{path}: can't read it ({type(error).__name__}: {str(error)[:300]})") from error


def read_state_dict(path: str, mmap: bool = False) -> dict:
    """The state dict in one of a checkpoint's .pt files.

    Raises: UserError if it can't be read, or holds none.
    """
    saved = read_tensors(path, mmap)
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        raise UserError(f"{path}: can't read it: it holds no state dict")
    return saved["state"]


def load_archive(path: str, model: nn.Module):
    """Replace a model's weights by those of an archive.

    It is a `policy.pt` (one that the original wrote under transformers 4.29, too), a .safetensors file, a checkpoint
    directory, a directory that `save_pretrained` wrote, or a model on the hub.

    Raises: UserError if it can't be read or doesn't fit, with the weights that are missing, left over or of another
        shape.
    """
    if os.path.exists(os.path.join(path, "adapter_config.json")):
        raise UserError(f"model.archive={path} holds a LoRA adapter, not a model: give it as model.adapter={path}")
    if os.path.exists(os.path.join(path, "policy.pt")):
        path = os.path.join(path, "policy.pt")
    try:
        directory, name = os.path.split(path)
        if os.path.exists(os.path.join(directory, CHECKSUMS)):
            verify_checksum(directory, name, read_checksums(directory).get(name))
        if path.endswith(".safetensors"):
            state, origin = safetensors.torch.load_file(path), ""
        elif os.path.isfile(path):
            archive = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            state = archive["state"]
            origin = f" at step {archive['step_idx']} with metrics {json.dumps(archive['metrics'], indent=2)}"
        else:
            state, origin = _pretrained_state(path, model), ""
        if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise ValueError("its state holds more than tensors")
    except (*UNREADABLE, AttributeError) as error:
        if explanation := hub.why_not(error, path, "model"):
            raise UserError(f"model.archive={path}: {explanation[0]}\n{explanation[1]}") from error
        raise UserError(
            f"model.archive={path}: can't read it as a checkpoint ({type(error).__name__}: {str(error)[:300]}). "
            "Expected is a policy.pt as training writes it, a .safetensors file, or what from_pretrained takes"
        ) from error
    rank0_print(f"loading pre-trained weights from {path}{origin}")
    model.load_state_dict(fit_state(state, model, path))
    rank0_print("loaded pre-trained weights")


def _pretrained_state(name: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that `from_pretrained` finds under `name`, under the names of its own architecture."""
    other, info = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=model.dtype, output_loading_info=True)
    missing = set(info["missing_keys"])  # these were drawn at random
    return {key: tensor for key, tensor in other.state_dict().items() if key not in missing}


def fit_state(state: dict, model: nn.Module, path: str) -> dict:
    """`state` under the names of `model`'s parameters, sharded as they are; see `load_archive` for what is raised."""
    expected = model.state_dict(keep_vars=True)
    fitted = {}
    if strange := sorted(str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)):
        raise UserError(f"{path} holds more than tensors: {', '.join(strange[:10])}")
    for name, tensor in state.items():
        new_name = "lm_head.weight" if name == "embed_out.weight" and name not in expected else name
        if new_name in expected or not new_name.endswith(_LEGACY_BUFFERS):
            fitted[new_name] = tensor
    by_parameter = {id(expected[name]): name for name in fitted.keys() & expected.keys()}
    for name, parameter in expected.items():  # .safetensors hold tied weights once
        if name not in fitted and id(parameter) in by_parameter:
            fitted[name] = fitted[by_parameter[id(parameter)]]

    problems = [f"missing: {name}" for name in expected.keys() - fitted.keys()]
    problems += [f"left over: {name}" for name in fitted.keys() - expected.keys()]
    problems += [
        f"{name}: shape {tuple(fitted[name].shape)}, the model's is {tuple(expected[name].shape)}"
        for name in expected.keys() & fitted.keys()
        if fitted[name].shape != expected[name].shape
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(f"{path} doesn't fit the model; is it of another model=...?\n  {shown}{more}")
    return {name: distribute_like(expected[name], tensor) for name, tensor in fitted.items()}
