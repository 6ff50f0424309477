"""Settings of a process that trains on a GPU; on a CPU they change nothing."""

import os

import torch


def use_expandable_segments():
    """Let PyTorch's allocator grow its memory segments: fixed ones fragment when every batch has another length.

    Call this before CUDA is first used, because the allocator reads its setting then. The user's own setting is kept.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def use_deterministic_algorithms(use: bool):
    """Use kernels that give the same result every time; operations without such a kernel raise a RuntimeError.

    Call this before cuBLAS is first used, because cuBLAS reads its environment variable then
    (https://docs.pytorch.org/docs/stable/notes/randomness.html).
    """
    if use:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(use)
    torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and only useful for finding bugs
