"""Pretend GPUs on a build of PyTorch without CUDA: tensors have devices, dtypes, shapes and graphs, but no data.

Forward passes run under autocast as on a GPU, and autograd saves what it would save there. Kernels and backward passes
don't run. As it registers a device guard with PyTorch, it is for a process of its own.
"""

import contextlib
import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import cpp_extension
from transformers.integrations import moe

SOURCE = Path(__file__).with_name("pretend_guard.cpp")


def reason_unavailable() -> str | None:
    """Return why pretend GPUs don't work here; None if they do."""
    if torch.cuda.is_available():
        return "there is a real GPU"
    return None if shutil.which("g++") else "there is no C++ compiler (g++) for the device guard"


def compile_guard(directory: Path) -> Path:
    """Compile the device guard, which takes some seconds; returns the library."""
    library = directory / "pretend_guard.so"
    torch_libraries = Path(torch.__file__).parent / "lib"
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-std=c++20", str(SOURCE), "-o", str(library), *includes, f"-L{torch_libraries}",
         "-lc10", f"-Wl,-rpath,{torch_libraries}"],
        check=True,
    )  # fmt: skip
    return library


def load_guard(library: Path):
    """Register the guard, for the rest of this process."""
    ctypes.CDLL(str(library))
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    # a GPU's kernel for experts accepts float32, but PyTorch's version for fake tensors doesn't
    moe._can_use_grouped_mm = lambda input, weight, offs: weight.dtype == torch.bfloat16


@contextlib.contextmanager
def pretend_gpus() -> Iterator[FakeTensorMode]:
    """Make tensors without data, on any device, inside the block."""
    with FakeTensorMode() as mode:
        yield mode


@contextlib.contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Cast as `torch.autocast("cuda", dtype)`, which itself refuses to work without CUDA; with None, don't cast."""
    if dtype is None:
        yield
        return
    former = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", former[0])
        torch.set_autocast_dtype("cuda", former[1])


def move(model: nn.Module, device_of: Callable[[str], str]):
    """Put a meta model's tensors on pretend devices, by the names of the modules that hold them."""
    made: dict[int, torch.Tensor] = {}

    def on_device(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=device_of(name))
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(moved, requires_grad=tensor.requires_grad) if is_parameter else moved
        return made[id(tensor)]

    for name, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({key: on_device(name, value) for key, value in tensors.items() if value is not None})
        attributes = {key: value for key, value in vars(module).items() if isinstance(value, torch.Tensor)}
        vars(module).update({key: on_device(name, value) for key, value in attributes.items()})


def like_on_gpu(tensor: torch.Tensor, device: str = "cuda:0") -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
