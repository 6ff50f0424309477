"""Check at the start that a float16 reference doesn't overflow; in training, that would look like too high an lr."""

from collections.abc import Callable

import torch
from torch import nn

from utils import UserError


def check_no_overflow(model: nn.Module, compute: Callable[[nn.Module], torch.Tensor]):
    """Refuse a float16 reference whose log-probabilities of a few examples are not finite.

    `compute`: returns a model's log-probabilities of these examples, which are the same on all workers.

    Raises: UserError that names the first layer to overflow.
    """
    with torch.no_grad():
        if bool(compute(model).isfinite().all()):
            return
        layer = _first_overflow(model, compute)
    raise UserError(
        f"model.reference_dtype=float16: the reference's log-probabilities are not finite: {layer} returns values "
        f"beyond {torch.finfo(torch.float16).max:g}, the largest in float16. Models trained in bfloat16 can do that; "
        "use model.reference_dtype=bfloat16"
    )


def _first_overflow(model: nn.Module, compute: Callable[[nn.Module], torch.Tensor]) -> str:
    """Return the name of the first layer whose output isn't finite."""
    found: list[str] = []

    def note_overflow(name: str, output: object):
        if isinstance(output, torch.Tensor) and output.is_floating_point() and not output.isfinite().all():
            found.append(name)

    layers = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: note_overflow(name, output))
        for name, module in layers
    ]
    try:
        compute(model)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "a step between its layers"
