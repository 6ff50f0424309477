"""Tensor parallelism: every worker holds a shard of each layer's weights, and computes that shard for all tokens.

Layers are split in pairs (https://arxiv.org/abs/1909.08053). The first of a pair is column-parallel: it is split by its
outputs (query, key and value projections by whole heads). The second is row-parallel: it is split by its inputs, and
the workers' partial sums are all-reduced. Each block needs two all-reduces forward and two backward. Between pairs, all
workers hold the same hidden states; norms are replicated.

Parameters become DTensors, whose `full_tensor()` is the dense model's parameter. Each layer computes with its local
shard as a plain tensor, so attention, autocast, activation checkpointing and the key-value cache work unchanged.
"""

import re
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from transformers.pytorch_utils import Conv1D

from utils import UserError, unwrap_adapter

_REMEDY = "use trainer=FSDPTrainer with tensor_parallel=1, which splits any model"


def parallelize(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split a transformers causal LM, also inside a PeftModel, over the workers of a 1-D mesh, in place.

    All workers must pass equal parameters, or parameters on the meta device, to be filled afterwards (see
    `dtensor.distribute_like`).

    Raises: UserError if the model's layers or heads can't be split.
    """
    model = unwrap_adapter(model)
    plan = _plan(model)
    _check_heads(model, mesh.size())
    styles = {}
    for name, module in model.named_modules():
        style = plan.get(_pattern(name))
        styles |= _layer_styles(name, module, style, model) if style else {}

    parameter_names = {}  # a tied parameter has several names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter_names.setdefault(parameter, []).append(name)
    parallelize_module(model, mesh, styles, src_data_rank=None)
    for first_name, *tied_names in parameter_names.values():
        for name in tied_names:
            module_name, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module_name), attribute, model.get_parameter(first_name))

    attribute = _SIZES_IN_ATTENTION.get(model.config.model_type)
    for module in model.modules() if attribute else ():
        if hasattr(module, attribute):
            setattr(module, attribute, getattr(module, attribute) // mesh.size())


# ---- how one layer is split -----------------------------------------------------------------------------------------


class _ColumnParallel(ParallelStyle):
    """Each worker computes its shard of a linear layer's outputs: (..., I) to (..., O / workers).

    Args:
        gather: return all outputs, (..., O), on every worker.
        n_fused: number of layers that are fused into this one, their outputs one after the other. Each of them is
            split, so a worker's shard consists of several pieces. A DTensor can't describe that if FSDP shards
            dimension 0 as well. So parameters that would be split along dimension 0 are kept whole, and each forward
            pass cuts the local shard out of them.
    """

    def __init__(self, gather: bool = False, n_fused: int = 1):
        self.gather = gather
        self.n_fused = n_fused

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        for name, dim in (("weight", _output_dim(module)), ("bias", 0)):
            if self.n_fused == 1:
                _distribute(module, name, mesh, Shard(dim))
            elif dim > 0:
                _distribute(module, name, mesh, _StridedShard(dim, split_factor=self.n_fused))
        module.forward = partial(self._forward, module, mesh)
        return module

    def _forward(self, module: nn.Module, mesh: DeviceMesh, inputs: torch.Tensor) -> torch.Tensor:
        outputs = _local_outputs(module, mesh, inputs, self.n_fused)
        if not self.gather:
            return outputs
        size = module.weight.shape[_output_dim(module)]
        shape = (*outputs.shape[:-1], size)  # DTensor can't infer it: shards may differ in size
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(outputs, mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride).full_tensor()


class _RowParallel(ParallelStyle):
    """Each worker multiplies its shard of a linear layer's inputs; outputs are summed: (..., I / workers) to (..., O).

    Args:
        shard_inputs: the inputs are whole, so each worker first takes its shard of them.
    """

    def __init__(self, shard_inputs: bool = False):
        self.shard_inputs = shard_inputs

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        _distribute(module, "weight", mesh, Shard(1 - _output_dim(module)))
        module.forward = partial(self._forward, module, mesh)
        return module

    def _forward(self, module: nn.Module, mesh: DeviceMesh, inputs: torch.Tensor) -> torch.Tensor:
        if self.shard_inputs:
            replicated = DTensor.from_local(inputs, mesh, [Replicate()], run_check=False)
            inputs = replicated.redistribute(placements=[Shard(-1)]).to_local()
        outputs = _all_reduce(_linear(module, inputs, module.weight.to_local()), mesh)
        return outputs if module.bias is None else outputs + module.bias.to(outputs.dtype)


class _VocabularyParallelEmbedding(ParallelStyle):
    """Each worker looks up the tokens in its shard of the vocabulary; the results are summed: (B, T) to (B, T, H).

    torch's RowwiseParallel is not used: it would treat row `padding_idx` of every worker's shard as padding, without a
    gradient.
    """

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        _distribute(module, "weight", mesh, Shard(0))
        module.forward = partial(self._forward, module, mesh)
        return module

    def _forward(self, module: nn.Embedding, mesh: DeviceMesh, input_ids: torch.Tensor) -> torch.Tensor:
        weight = module.weight.to_local()
        first_token = _first_token(module.num_embeddings, mesh)
        is_local = (first_token <= input_ids) & (input_ids < first_token + len(weight))
        padding = None if module.padding_idx is None else module.padding_idx - first_token
        padding = padding if padding in range(len(weight)) else None
        vectors = F.embedding(torch.where(is_local, input_ids - first_token, 0), weight, padding)
        return _all_reduce(vectors.masked_fill(~is_local[..., None], 0), mesh)


class _ReplicatedWithSummedGradient(ParallelStyle):
    """A norm that each worker applies to its own heads; the gradients of its parameters are summed over the workers."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(partial(self._sum_gradients, mesh))
        return module

    @staticmethod
    def _sum_gradients(mesh: DeviceMesh, module: nn.Module, inputs: tuple) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and not hasattr(parameter, "_is_summed"):
                parameter.register_hook(partial(_all_reduce, mesh=mesh))
                parameter._is_summed = True


def _output_dim(module: nn.Module) -> int:
    """Return the dimension of a linear layer's weight along which its outputs lie."""
    return 1 if isinstance(module, Conv1D) else 0


def _linear(
    module: nn.Module, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute a linear layer with this shard of its weight."""
    return F.linear(inputs, weight.T if isinstance(module, Conv1D) else weight, bias)


def _distribute(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Replace a parameter by its DTensor, if the module has it."""
    if (parameter := getattr(module, name)) is not None:
        distributed = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(distributed, requires_grad=parameter.requires_grad))


def _local_outputs(module: nn.Module, mesh: DeviceMesh, inputs: torch.Tensor, n_fused: int = 1) -> torch.Tensor:
    """Compute this worker's shard of a column-parallel layer's outputs: (..., I) to (..., O / workers)."""
    weight = _local_shard(module.weight, mesh, n_fused)
    bias = None if module.bias is None else _local_shard(module.bias, mesh, n_fused)
    return _linear(module, _with_summed_gradient(inputs, mesh), weight, bias)


def _local_shard(parameter: torch.Tensor, mesh: DeviceMesh, n_fused: int) -> torch.Tensor:
    """Return this worker's shard of a column-parallel layer's parameter, which may be whole (see `n_fused`)."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    whole = DTensor.from_local(parameter, mesh, [Replicate()], run_check=False)
    return whole.redistribute(placements=[_StridedShard(0, split_factor=n_fused)]).to_local()


def _all_reduce(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Sum a tensor over the workers; in the backward pass, each worker's tensor gets the gradient of the sum."""
    return DTensor.from_local(tensor, mesh, [Partial()], run_check=False).full_tensor()


def _with_summed_gradient(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Return a tensor that is equal on all workers; in the backward pass, sum its gradient over the workers.

    The result is cached on the tensor, so that layers with the same input (q, k and v) share one all-reduce.
    """
    if not hasattr(tensor, "_with_summed_gradient"):
        replicated = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
        tensor._with_summed_gradient = replicated.to_local(grad_placements=[Partial()])
    return tensor._with_summed_gradient


def _first_token(vocab_size: int, mesh: DeviceMesh) -> int:
    """Return the first token of this worker's shard of the vocabulary, which is split like torch.chunk does."""
    return min(-(-vocab_size // mesh.size()) * mesh.get_local_rank(), vocab_size)


def is_vocabulary_parallel(head: nn.Module) -> bool:
    """True if this output head is split over the workers by tokens, and no adapter wraps it."""
    return type(head) is nn.Linear and isinstance(head.weight, DTensor)


def vocabulary_parallel_logps(head: nn.Linear, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return log softmax(head(h))[target] when each worker has the logits of only some tokens: (N, H), (N,) to (N,).

    Workers exchange three numbers per position instead of all logits.
    """
    mesh = head.weight.device_mesh
    logits = _local_outputs(head, mesh, hidden_states)  # (N, V / workers)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    local_targets = targets - _first_token(head.out_features, mesh)
    is_local = (local_targets >= 0) & (local_targets < logits.shape[1])
    target_logits = logits.gather(1, torch.where(is_local, local_targets, 0)[:, None])[:, 0].masked_fill(~is_local, 0)

    local_logsumexp = logits.logsumexp(1)  # (N,)
    # subtract the largest before exponentiating, so that the sum over workers can't overflow
    largest = DTensor.from_local(local_logsumexp.detach(), mesh, [Partial("max")], run_check=False).full_tensor()
    target_logits, normalizers = _all_reduce(torch.stack([target_logits, (local_logsumexp - largest).exp()]), mesh)
    return target_logits - largest - normalizers.log()


# ---- the plan: a style for each layer -------------------------------------------------------------------------------

_STYLES = {
    "colwise": _ColumnParallel(),
    "colwise_gather_output": _ColumnParallel(gather=True),
    "rowwise": _RowParallel(),
    "rowwise_split_input": _RowParallel(shard_inputs=True),
    "embedding_rowwise": _VocabularyParallelEmbedding(),
    "replicated_with_grad_allreduce": _ReplicatedWithSummedGradient(),
    "fused_qkv": _ColumnParallel(n_fused=3),  # our own name; the others are names in transformers' plans
}

_PLANS = {  # for models without a plan in transformers
    "gpt2": {
        "transformer.h.*.attn.c_attn": "fused_qkv",
        "transformer.h.*.attn.c_proj": "rowwise",
        "transformer.h.*.mlp.c_fc": "colwise",
        "transformer.h.*.mlp.c_proj": "rowwise",
    },
    "gptj": {
        "transformer.h.*.attn.q_proj": "colwise",
        "transformer.h.*.attn.k_proj": "colwise",
        "transformer.h.*.attn.v_proj": "colwise",
        "transformer.h.*.attn.out_proj": "rowwise",
        "transformer.h.*.mlp.fc_in": "colwise",
        "transformer.h.*.mlp.fc_out": "rowwise",
    },
}
# The size in these models' attention that must be divided by the number of workers; others read it from the tensors.
_SIZES_IN_ATTENTION = {"gpt2": "split_size", "gptj": "num_attention_heads"}


def _plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """Return the style of each layer that is split, by its name with * in place of the block's number."""
    own_plan = _PLANS.get(model.config.model_type)
    if not (own_plan or model.config.get_text_config().base_model_tp_plan):
        raise UserError(f"{type(model).__name__} has no plan for tensor parallelism; {_REMEDY}")
    plan = dict(own_plan or model.tp_plan)
    names = {module: name for name, module in model.named_modules()}
    plan[names[model.get_input_embeddings()]] = "embedding_rowwise"
    plan[names[model.get_output_embeddings()]] = "colwise_gather_output"
    # some plans split a bare parameter, rather than a layer; we have no style for that
    parameters = {_pattern(name) for name, _ in model.named_parameters()}
    unknown = [f"{style} for {name}" for name, style in plan.items() if style not in _STYLES or name in parameters]
    if unknown:
        raise UserError(
            f"tensor parallelism can't split {type(model).__name__}: its plan needs {', '.join(unknown)}, which isn't "
            f"supported; {_REMEDY}"
        )
    return {name: _STYLES[style] for name, style in plan.items()}


def _pattern(name: str) -> str:
    """Return the name of a module or parameter with * in place of the block's number."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _check_heads(model: nn.Module, world_size: int) -> None:
    """Raise UserError if the attention heads can't be divided evenly among the workers."""
    config = model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        n_heads = getattr(config, name, None) or config.num_attention_heads
        if n_heads % world_size:
            raise UserError(
                f"tensor parallelism over {world_size} workers can't split {type(model).__name__}, which has "
                f"{name}={n_heads}: use a number of workers that divides {n_heads}, or {_REMEDY}"
            )


def _layer_styles(name: str, module: nn.Module, style: ParallelStyle, model: nn.Module) -> dict[str, ParallelStyle]:
    """Return the styles of one layer and of PEFT's adapters around it, by their full names."""
    if isinstance(style, _ReplicatedWithSummedGradient) or type(module) in (nn.Linear, Conv1D, nn.Embedding):
        return {name: style}
    if hasattr(module, "modules_to_save"):
        copies = (f"{name}.modules_to_save.{adapter}" for adapter in module.modules_to_save)
        return dict.fromkeys([f"{name}.original_module", *copies], style)
    if getattr(module, "lora_A", None) and not module.lora_variant:
        split_half = "lora_B" if isinstance(style, _ColumnParallel) else "lora_A"  # the other half is replicated
        return {f"{name}.base_layer": style, **{f"{name}.{split_half}.{adapter}": style for adapter in module.lora_A}}
    raise UserError(
        f"tensor parallelism can't split {type(model).__name__}: its layer {name} is of the class "
        f"{type(module).__module__}.{type(module).__name__}; {_REMEDY}"
    )
