"""Writing and reading checkpoints, in the original's format: `policy.pt`, `optimizer.pt`, `scheduler.pt`.

Each file holds {'step_idx': training examples seen, 'state': a state dict, 'metrics': of the last evaluation}.
"""

import json
import os
import pickle
from collections.abc import Iterable

import torch
from torch import nn

from utils import UserError, rank0_print

# Buffers that transformers wrote into state dicts in 2023; today's models compute them, so they are left out.
_LEGACY_BUFFERS = (
    *(f".{module}.{buffer}" for module in ("attn", "attention") for buffer in ("bias", "masked_bias")),
    ".rotary_emb.inv_freq",
)


def write_state_dict(step: int, state: dict, metrics: dict | None, filename: str, dir_name: str):
    """Write one file of a checkpoint; it appears under its name only when it is whole."""
    os.makedirs(dir_name, exist_ok=True)
    path = os.path.join(dir_name, filename)
    rank0_print(f"writing checkpoint to {path}...")
    torch.save({"step_idx": step, "state": state, "metrics": metrics or {}}, f"{path}.partial")
    os.replace(f"{path}.partial", path)


def load_archive(path: str, models: Iterable[nn.Module]):
    """Replace the models' weights by those of an archive: a `policy.pt`, or a checkpoint directory that holds one.

    Archives that the original wrote under transformers 4.29 load too.

    Raises: UserError if the file can't be read or doesn't fit, with the weights that are missing, left over or of
        another shape.
    """
    if os.path.isdir(path):
        path = os.path.join(path, "policy.pt")
    try:
        archive = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        step, metrics, state = archive["step_idx"], archive["metrics"], archive["state"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"model.archive={path}: can't read it as a checkpoint ({type(error).__name__}: {str(error)[:200]}). "
            "Expected is a policy.pt as training writes it"
        ) from error
    rank0_print(f"loading pre-trained weights at step {step} from {path} with metrics {json.dumps(metrics, indent=2)}")
    for model in models:
        model.load_state_dict(_fit_state(state, model, path))
    rank0_print("loaded pre-trained weights")


def _fit_state(state: dict, model: nn.Module, path: str) -> dict:
    """`state` under the names of `model`'s parameters; see `load_archive` for what is raised."""
    expected = model.state_dict()
    fitted = {}
    for name, tensor in state.items():
        new_name = "lm_head.weight" if name == "embed_out.weight" and name not in expected else name
        if new_name in expected or not new_name.endswith(_LEGACY_BUFFERS):
            fitted[new_name] = tensor

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
        raise UserError(f"model.archive={path} doesn't fit the model; is it of another model=...?\n  {shown}{more}")
    return fitted
