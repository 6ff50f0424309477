"""Gradient clipping under FSDP and tensor parallelism."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from distributed.dtensor import full_tensor


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip like `torch.nn.utils.clip_grad_norm_`; the parameters may be on different meshes, or on none."""
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault(mesh, []).append(parameter)
    norms = [full_tensor(nn.utils.get_total_norm([p.grad for p in group])) for group in groups.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm
