"""Load a model without its weights; then every worker reads its own part of them from the safetensors files.

`from_pretrained` gets placeholders, which need no memory, in place of the tensors in the files. It still finds and
downloads the files, renames and ties weights, checks shapes and computes buffers. A model for which it does more, such
as merging experts, is loaded the usual way: one worker reads it, and broadcasts each parameter.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from checkpointing.archives import COMPUTED_BUFFERS, check_finite, load_fitting, load_pretrained
from checkpointing.sharded import Box, Place, SavedTensor, TensorFiles
from distributed import collectives


class UnreadWeights(NamedTuple):
    """The weights of a model whose parameters are on the meta device."""

    tensors: dict[str, SavedTensor]  # by the parameters' names
    origin: str  # for messages

    def read_into(self, model: nn.Module):
        """Read this worker's part of each weight; all workers of the machine must call it.

        Args:
            model: the same model, its parameters distributed over the workers, with memory.

        Raises: UserError on all workers if a weight is NaN or infinite, and if a file can't be read.
        """
        load_fitting(self.tensors, model, self.origin)
        check_finite(model, self.origin, collectives.local_group()[1])


def load_unread(name: str, origin: str, dtype: torch.dtype, **options) -> nn.Module:
    """Load a model with its parameters on the meta device, and an attribute `unread` that reads their values.

    If its parameters aren't simply the tensors in safetensors files, cast to `dtype`, the model is loaded whole, on the
    CPU, and has no such attribute.
    """
    options |= {"dtype": dtype, "device_map": "cpu"}
    if not _is_plain(name, **options):
        return load_pretrained(name, origin, **options)
    placeholders = _Placeholders(dtype)
    with _files_opened_by(placeholders.open):
        model = load_pretrained(name, origin, **options)
    if not placeholders.tensors:  # it has no safetensors files
        return model
    unread = placeholders.used_by(model)
    if unread is None:
        return load_pretrained(name, origin, **options)
    _to_meta(model)
    model.unread = UnreadWeights(unread, origin)
    return model


@contextlib.contextmanager
def _files_opened_by(function: Callable) -> Iterator[None]:
    """Make transformers open safetensors files with this function instead of `safe_open`."""
    module = transformers.modeling_utils
    before = module.safe_open
    module.safe_open = function
    try:
        yield
    finally:
        module.safe_open = before


def _is_plain(name: str, quantization_config: object, trust_remote_code: bool, **options) -> bool:
    """False if transformers, or possibly code from the hub, computes weights from those in the files."""
    where = {key: options[key] for key in ("cache_dir", "revision") if key in options}
    config = None if trust_remote_code else transformers.AutoConfig.from_pretrained(name, **where)
    if config is None or quantization_config or getattr(config, "quantization_config", None):
        return False
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return not any(isinstance(step, WeightConverter) for step in get_model_conversion_mapping(model))


class _Placeholders:
    """Tensors that need no memory, in place of those in safetensors files."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.files = dtype, TensorFiles("")
        self.tensors: dict[int, tuple[torch.Tensor, SavedTensor]] = {}  # by the placeholders' addresses

    def open(self, path: str, **options) -> "_UnreadFile":
        """Open a file as `safe_open` does."""
        return _UnreadFile(self, path, **options)

    def make(self, path: str, key: str, shape: list[int]) -> torch.Tensor:
        """Return a placeholder for a tensor in a file."""
        start, placeholder = (0,) * len(shape), torch.zeros((), dtype=self.dtype).expand(shape)
        saved = SavedTensor(self.files, key, self.dtype, shape, [Place(path, key, Box(start, tuple(shape), start))])
        self.tensors[placeholder.data_ptr()] = placeholder, saved
        return placeholder

    def used_by(self, model: nn.Module) -> dict[str, SavedTensor] | None:
        """Return each parameter's tensor in the files, by name; None if the model must be loaded in the usual way."""
        left_over, used = {address: saved for address, (_, saved) in self.tensors.items()}, {}
        for name, parameter in model.named_parameters():
            tensor = left_over.pop(parameter.data_ptr(), None)
            if tensor is None or tensor.shape != parameter.shape:  # it was cast, merged or initialized
                return None
            used[name] = tensor
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        # transformers compares tied weights that are both in the files, but placeholders have no values
        both_in_files = len(names) > len(used) and left_over
        return None if both_in_files or model.state_dict().keys() != names else used


class _UnreadFile:
    """An open safetensors file that gives placeholders for weights."""

    def __init__(self, placeholders: _Placeholders, path: str, **options):
        self.placeholders, self.path, self.file = placeholders, path, safe_open(path, **options)
        self.keys, self.__exit__ = self.file.keys, self.file.__exit__

    def get_slice(self, key: str) -> object:
        """Return a placeholder; for a buffer, its values."""
        saved = self.file.get_slice(key)
        is_weight = saved.get_dtype() in ("F64", "F32", "F16", "BF16") and not key.endswith(COMPUTED_BUFFERS)
        return self.placeholders.make(self.path, key, saved.get_shape()) if is_weight else saved


def _to_meta(model: nn.Module):
    """Move a model's parameters, but not its buffers, to the meta device."""
    moved = {}  # tied parameters stay tied
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            on_meta = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
            module.register_parameter(name, moved.setdefault(parameter, on_meta))
