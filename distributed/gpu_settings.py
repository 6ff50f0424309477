"""Settings of a process that trains on a GPU; on a CPU they change nothing."""

import os

import torch


def use_expandable_segments():
    """Let PyTorch's allocator grow its segments, as rows of ever other lengths would leave gaps between fixed ones.

    It reads the environment when CUDA is first used: call this before. What the user's environment says stays.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def use_deterministic_algorithms(use: bool):
    """Let kernels add up in the same order every time, or raise a RuntimeError where there are none that do.

    cuBLAS reads its variable when it is first used: call this before (https://docs.pytorch.org/docs/stable/notes/
    randomness.html).
    """
    if use:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(use)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it is for finding bugs, and takes time
