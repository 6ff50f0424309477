"""What a device can do with a model: how many tokens fit into its memory, and how many one more microbatch costs."""

import torch
from torch import nn

from data.microbatches import CPU_OVERHEAD

# Launching the kernels of one layer, forward and backward, takes a host about so long (seconds), during which ...
_LAUNCH_SECONDS = 5e-4
_OPERATIONS_PER_SECOND = 4e14  # ... a GPU of today does so many operations a second in bfloat16.
_OPERATIONS_PER_PARAMETER = 6  # for a token, forward and backward
_SHARE_FOR_ACTIVATIONS = 0.7  # of memory that is free: the rest is for logits, gathered weights and fragments
_NORMS_AND_SUMS = 1.25  # what is kept for the backward pass in all, as a multiple of what matrix products keep


def microbatch_overhead(policy: nn.Module, device: torch.device) -> float:
    """What one more microbatch costs, in tokens that could be computed in its time.

    On a GPU these are the launches of its kernels, which a small model waits for: by the constants above about 400
    tokens for 2.8 billion parameters, 10,000 for 70 million (with 19 million outside the embeddings). Not measured.
    """
    if device.type == "cpu":
        return CPU_OVERHEAD
    embeddings = {id(embedding.weight) for embedding in (policy.get_input_embeddings(), policy.get_output_embeddings())
                  if embedding is not None}  # fmt: skip
    n_parameters = sum(parameter.numel() for parameter in policy.parameters() if id(parameter) not in embeddings)
    n_layers = policy.config.get_text_config().num_hidden_layers
    return n_layers * _LAUNCH_SECONDS * _OPERATIONS_PER_SECOND / (_OPERATIONS_PER_PARAMETER * max(1, n_parameters))


def activation_bytes(policy: nn.Module, compute_dtype: torch.dtype, recomputed: bool) -> float:
    """Bytes that a token takes from its forward to its backward pass: inputs and outputs of all matrix products, and
    what is between them (as counted in Section 4.1 of https://arxiv.org/abs/2205.05198, attention scores not kept).

    `recomputed`: by activation checkpointing, which keeps what goes into a layer, and everything of one.
    """
    head, config = policy.get_output_embeddings(), policy.config.get_text_config()
    linear = [module for module in policy.modules() if isinstance(module, nn.Linear) and module is not head]
    values = sum(module.in_features + module.out_features for module in linear) * _NORMS_AND_SUMS
    if recomputed:
        values = values / config.num_hidden_layers + config.num_hidden_layers * config.hidden_size
    return values * compute_dtype.itemsize


def tokens_that_fit(
    policy: nn.Module, compute_dtype: torch.dtype, recomputed: bool, n_optimizer_states: int
) -> int | None:
    """Tokens of a microbatch for which a GPU has memory, by an estimate; None where the model isn't on one GPU alone.

    Args:
        n_optimizer_states: tensors that the optimizer will keep of each trained parameter.
    """
    devices = {parameter.device for parameter in policy.parameters()}
    device = devices.pop()
    if devices or device.type != "cuda":
        return None
    local = [getattr(parameter, "_local_tensor", parameter) for parameter in policy.parameters()]
    trained = sum(parameter.nbytes for parameter in local if parameter.requires_grad)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free -= trained * (1 + n_optimizer_states)
    if compute_dtype.itemsize < 4:  # copies of float32 weights in that dtype, as autocast or FSDP makes them
        free -= sum(p.numel() * compute_dtype.itemsize for p in local if p.dtype == torch.float32)
    return max(1, int(_SHARE_FOR_ACTIVATIONS * free / activation_bytes(policy, compute_dtype, recomputed)))
