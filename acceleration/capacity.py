"""Estimate the memory that a microbatch needs, and the time that one more microbatch costs."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from acceleration.response_head import LOGITS_BYTES
from acceleration.shadow_weights import free_trained_copies
from utils import n_weights, transformer_blocks, unwrap_adapter

_LAUNCH_SECONDS = 5e-4  # for a host to launch the kernels of one layer, forward and backward
_OPERATIONS_PER_SECOND = 4e14  # of a current GPU, in bfloat16
_OPERATIONS_PER_PARAMETER = 6  # for each token, forward and backward


def microbatch_overhead(policy: nn.Module) -> float:
    """Return the cost of one more microbatch on a GPU, in tokens that could be computed in the same time.

    A GPU that computes a small model waits for the host to launch kernels. The constants above are estimates, not
    measurements; they give 400 tokens for 2.8 billion parameters, and 10,000 for 70 million (19 million outside the
    embeddings).
    """
    embeddings = {id(embedding.weight) for embedding in (policy.get_input_embeddings(), policy.get_output_embeddings())
                  if embedding is not None}  # fmt: skip
    n_parameters = sum(n_weights(parameter) for parameter in policy.parameters() if id(parameter) not in embeddings)
    n_layers = policy.config.get_text_config().num_hidden_layers
    return n_layers * _LAUNCH_SECONDS * _OPERATIONS_PER_SECOND / (_OPERATIONS_PER_PARAMETER * max(1, n_parameters))


@dataclass(frozen=True)
class Activations:
    """Measured bytes that a training forward pass keeps on each device."""

    kept: dict[torch.device, float]  # for each token, from the forward to the backward pass
    backward: dict[torch.device, float]  # for each token, gradients inside a block: as many bytes as the block keeps
    casts: dict[torch.device, int]  # copies of weights cast for computing; they don't grow with the tokens


def microbatch_bytes(policy: nn.Module, activations: Activations, device: torch.device) -> tuple[int, float]:
    """Return the peak bytes of a microbatch on a device, besides copies of weights: a constant, and bytes per token."""
    trained = (parameter for parameter in policy.parameters() if parameter.requires_grad and parameter.device == device)
    largest = max((4 * parameter.numel() for parameter in trained), default=0)
    # the largest weight's gradient is held twice, in float32: the new one, and the sum to which it is added
    return LOGITS_BYTES + 2 * largest, activations.kept[device] + activations.backward.get(device, 0)


def measure_activations(
    policy: nn.Module, compute: Callable[[], torch.Tensor], n_tokens: int, counts_logits: bool = False
) -> Activations:
    """Run one forward pass with gradients as in training, and count the storages that its graph keeps, each once.

    Under activation checkpointing, the last block is computed without it: in the backward pass, one block at a time is
    recomputed and keeps everything. Blocks must not be compiled yet. The policy and the random generators are restored.

    Args:
        compute: returns the log-probabilities of a few responses under the policy.
        n_tokens: tokens in these responses and their prompts.
        counts_logits: False if the memory for logits doesn't grow with the number of tokens (`response_head`).
    """
    free_trained_copies(policy)
    graph, weights = _Graph(), _WeightStorages(policy)
    with (
        _training(policy),
        _watched_modules(policy, graph, counts_logits),
        torch.random.fork_rng(_gpus(policy)),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(graph.pack, lambda tensor: tensor),
        weights,
    ):
        logps = compute()
    # count before the graph is freed; FSDP has already freed the weights that it gathered, so they count as 0 bytes
    of_tokens = {key: tensor for key, tensor in graph.kept.items() if key not in weights.storages}
    of_weights = {key: tensor for key, tensor in graph.kept.items() if key in weights.derived}
    kept = _bytes_by_device(of_tokens)
    if counts_logits:  # the logits of every position, in float32, and their gradient
        vocabulary = policy.config.get_text_config().vocab_size
        kept[logps.device] = kept.get(logps.device, 0) + 2 * logps.element_size() * vocabulary * n_tokens
    in_block = _bytes_by_device({key: tensor for key, tensor in of_tokens.items() if key in graph.of_block})
    return Activations(
        {device: n_bytes / n_tokens for device, n_bytes in kept.items()},
        {device: n_bytes / n_tokens for device, n_bytes in in_block.items()},
        _bytes_by_device({**weights.casts, **of_weights}),
    )


@contextlib.contextmanager
def _watched_modules(policy: nn.Module, graph: "_Graph", counts_logits: bool) -> Iterator[None]:
    """Tell the graph when the last block runs and when the output head begins; let the last block keep everything."""
    base, block = unwrap_adapter(policy).base_model, _last_block(policy)
    hooks = [
        block.register_forward_pre_hook(lambda *_: graph.enter_block(), prepend=True),
        block.register_forward_hook(lambda *_: graph.leave_block()),
    ]
    if not counts_logits:
        hooks.append(base.register_forward_hook(lambda *_: graph.stop()))
    was_checkpointed = _is_checkpointed(block)
    if was_checkpointed:
        block.gradient_checkpointing = False
    try:
        yield
    finally:
        if was_checkpointed:
            block.gradient_checkpointing = True
        for hook in hooks:
            hook.remove()


class _Graph:
    """Records the storages of the tensors that autograd saves."""

    def __init__(self):
        self.kept: dict[int, torch.Tensor] = {}
        self.of_block: set[int] = set()
        self.is_in_block = self.is_stopped = False

    def enter_block(self):
        self.is_in_block = True

    def leave_block(self):
        self.is_in_block = False

    def stop(self):
        self.is_stopped = True

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.is_stopped:
            self.kept[_storage_id(tensor)] = _local(tensor)
            if self.is_in_block:
                self.of_block.add(_storage_id(tensor))
        return tensor


def _bytes_by_device(tensors: dict[int, torch.Tensor]) -> dict[torch.device, int]:
    n_bytes: Counter[torch.device] = Counter()
    for tensor in tensors.values():
        n_bytes[tensor.device] += tensor.untyped_storage().nbytes()
    return dict(n_bytes)


class _WeightStorages(TorchDispatchMode):
    """Records the storages of a model's weights and buffers, and of tensors computed from these alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        # keep the tensors alive, so that no other tensor gets the same address
        self.storages = {_storage_id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.derived: set[int] = set()
        self.casts: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if isinstance(result, torch.Tensor) and inputs and all(_storage_id(t) in self.storages for t in inputs):
            key = _storage_id(result)
            if key not in self.storages:  # no view
                self.storages[key] = result
                self.derived.add(key)
                if function is torch.ops.aten._to_copy.default:
                    self.casts[key] = _local(result)
        return result


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this worker's part of a DTensor, or any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def _storage_id(tensor: torch.Tensor) -> int:
    return _local(tensor).untyped_storage()._cdata


def _last_block(policy: nn.Module) -> nn.Module:
    """Return the last transformer block, or the whole base model if the model doesn't name its blocks."""
    base = unwrap_adapter(policy)
    checkpointed = [module for module in base.modules() if _is_checkpointed(module)]
    return (checkpointed or transformer_blocks(base, None) or [base.base_model])[-1]


def _is_checkpointed(module: nn.Module) -> bool:
    return getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func")


@contextlib.contextmanager
def _training(policy: nn.Module) -> Iterator[None]:
    """Put the policy into training mode inside the block; activations are only checkpointed in that mode."""
    modes = {module: module.training for module in policy.modules()}
    policy.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _gpus(policy: nn.Module) -> list[torch.device]:
    devices = {parameter.device for parameter in policy.parameters()}
    return [device for device in devices if device.type == "cuda" and torch.cuda.is_available()]
