"""Keep copies of float32 weights in autocast's dtype, so that they are cast once per step.

Autocast casts the weights of every linear layer again in every forward pass: with eight microbatches, eight times
per step. Here the copy is kept until its master, the float32 weight, has changed. Gradients pass through the copy to
the master; the optimizer, checkpoints and all other code see only masters. All numbers equal autocast's bit for bit,
with one exception: if an output head computes its logits in several chunks, the chunks' gradients of its weight are
summed in float32; autocast sums them in its own dtype. A copy needs 2 bytes per weight, like autocast's own copies
during a forward pass.
"""

import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from distributed import collectives
from utils import computed_dtype


class _AsCopied(torch.autograd.Function):
    """Returns a master's copy, and passes gradients on to the master."""

    @staticmethod
    def forward(ctx, master: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        ctx.dtype = master.dtype
        return copy.detach()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient.to(ctx.dtype), None


class ShadowedLinear(nn.Linear):
    """A linear layer that keeps 16-bit copies of its weight and bias; see `shadow_linear_weights`."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        dtype = computed_dtype(self.weight)
        if dtype == self.weight.dtype:
            return super().forward(inputs)
        weight, bias = (None if p is None else self._in_dtype(name, p, dtype) for name, p in self._parameters.items())
        return F.linear(inputs, weight, bias)

    def _in_dtype(self, name: str, master: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
        if master.dtype == dtype:
            return master
        copies = self.__dict__.setdefault("_copies", {})
        source, version, copy = copies.get(name, (None, None, None))
        if source is not master or version != master._version or copy.dtype != dtype or copy.device != master.device:
            copy = master.detach().to(dtype)
            copies[name] = master, master._version, copy
        return _AsCopied.apply(master, copy)

    def free_copies(self):
        """Free the copies; they are made again when they are next used."""
        self.__dict__.pop("_copies", None)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_copies"}


def shadow_linear_weights(model: nn.Module, optimizer: torch.optim.Optimizer | None = None):
    """Let a model's plain linear layers keep 16-bit copies, except those that share their weight with an embedding.

    `optimizer`: the optimizer that trains the model. Before each of its steps, the copies of trained weights are freed,
    so that the step can use their memory. Besides, a fused optimizer changes weights without raising their `_version`,
    so outdated copies would not be noticed.
    """
    for module in _linear_layers(model):
        _set_class(module, ShadowedLinear)
    if optimizer is not None:
        optimizer.register_step_pre_hook(lambda *_: free_trained_copies(model))


def unshadow_linear_weights(model: nn.Module):
    """Turn layers that keep copies back into plain linear layers."""
    for module in model.modules():
        if isinstance(module, ShadowedLinear):
            module.free_copies()
            _set_class(module, nn.Linear)


def _set_class(module: nn.Linear, linear_class: type[nn.Linear]):
    module.__class__ = linear_class
    if hasattr(module, "_old_forward"):  # accelerate's hooks, which move activations between GPUs, call it
        module._old_forward = types.MethodType(linear_class.forward, module)


def free_trained_copies(model: nn.Module):
    """Free the copies of the weights that are trained."""
    for module in model.modules():
        if isinstance(module, ShadowedLinear) and module.weight.requires_grad:
            module.free_copies()


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    """Return the plain linear layers with float32 weights that no other layer uses."""
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    return [
        module
        for module in model.modules()
        if type(module) is nn.Linear and users[id(module.weight)] == 1 and module.weight.dtype == torch.float32
    ]


def shadow_if_equal(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, compute: Callable[[], torch.Tensor]
) -> bool:
    """Let a model keep 16-bit copies if that gives the same numbers on this device, bit for bit; True if it does.

    `compute`: returns log-probabilities of a few examples, computed as in training.
    """
    with torch.no_grad():
        expected = compute()
        shadow_linear_weights(model, optimizer)
        if torch.equal(compute(), expected):
            return True
    unshadow_linear_weights(model)
    return False


def round_if_equal(model: nn.Module, dtype: torch.dtype, compute: Callable[[], torch.Tensor]) -> bool:
    """Round a frozen model's linear weights to autocast's dtype if its numbers stay the same, bit for bit.

    Autocast would round them in every forward pass. Rounded once, they need half the memory.

    `compute`: returns log-probabilities of a few examples under the model and autocast.

    Returns: True if the weights are now rounded.
    """
    with torch.no_grad():
        expected = compute()
        masters = [(layer, name, p) for layer in _linear_layers(model) for name, p in layer.named_parameters()]
        for layer, name, master in masters:
            layer._parameters[name] = nn.Parameter(master.to(dtype), requires_grad=False)
        if not collectives.all_reduce_max(int(not torch.equal(compute(), expected))):
            return True
    for layer, name, master in masters:
        layer._parameters[name] = master
    return False
