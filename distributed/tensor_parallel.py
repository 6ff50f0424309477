"""Tensor parallelism: every worker holds a shard of each layer's weights, and computes that shard for all tokens.

Layers come in pairs (https://arxiv.org/abs/1909.08053). The first is column-parallel, split by its outputs (the query,
key and value projections by whole heads), the second row-parallel, split by its inputs, and the workers' partial sums
are added: two all-reduces a block forward, two backward. Between the pairs all workers hold the same hidden states, and
the same norms. Parameters become DTensors, whose `full_tensor()`
is the dense model's; each layer computes with its local part, as plain tensors, so that attention, autocast,
checkpointing and the key-value cache work as ever.
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

_REMEDY = "use trainer=FSDPTrainer, which splits any model"


def parallelize(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split a transformers causal LM, or the one in a PeftModel, over the workers of a 1-D mesh, in place.

    The parameters are equal on all workers, or all on the meta device: then give each its values afterwards, those of
    a DTensor by `distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)`.

    Raises: UserError if the model's layers or heads can't be split so.
    """
    model = unwrap_adapter(model)
    plan = _plan(model)
    _check_heads(model, mesh.size())
    styles = {}
    for name, module in model.named_modules():
        style = plan.get(_pattern(name))
        styles |= _layer_styles(name, module, style, model) if style else {}

    names_of = {}  # of each parameter; tied ones have several
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)
    parallelize_module(model, mesh, styles, src_data_rank=None)
    for first, *others in names_of.values():
        for name in others:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, model.get_parameter(first))

    attribute = _SIZES_IN_ATTENTION.get(model.config.model_type)
    for module in model.modules() if attribute else ():
        if hasattr(module, attribute):
            setattr(module, attribute, getattr(module, attribute) // mesh.size())


# ---- how one layer is split -----------------------------------------------------------------------------------------


class _ColumnParallel(ParallelStyle):
    """Each worker computes its shard of a linear layer's outputs: (..., I) to (..., O / workers), to all if `gather`.

    With `n_fused` layers in one, one's outputs after the other's, it computes its shard of each.
    """

    def __init__(self, gather: bool = False, n_fused: int = 1):
        self.gather = gather
        self.n_fused = n_fused

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        split = Shard if self.n_fused == 1 else partial(_StridedShard, split_factor=self.n_fused)
        _distribute(module, "weight", mesh, split(1 if isinstance(module, Conv1D) else 0))
        _distribute(module, "bias", mesh, split(0))
        module.forward = partial(self._forward, module, mesh)
        return module

    def _forward(self, module: nn.Module, mesh: DeviceMesh, inputs: torch.Tensor) -> torch.Tensor:
        outputs = _local_outputs(module, mesh, inputs)
        if not self.gather:
            return outputs
        size = module.nf if isinstance(module, Conv1D) else module.out_features
        shape = (*outputs.shape[:-1], size)  # said, as the shards may differ
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(outputs, mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride).full_tensor()


class _RowParallel(ParallelStyle):
    """Each worker takes its shard of a linear layer's inputs; the outputs are added: (..., I / workers) to (..., O).

    The inputs are that shard already, or, with `shard_inputs`, all of them.
    """

    def __init__(self, shard_inputs: bool = False):
        self.shard_inputs = shard_inputs

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        _distribute(module, "weight", mesh, Shard(0 if isinstance(module, Conv1D) else 1))
        module.forward = partial(self._forward, module, mesh)
        return module

    def _forward(self, module: nn.Module, mesh: DeviceMesh, inputs: torch.Tensor) -> torch.Tensor:
        if self.shard_inputs:
            replicated = DTensor.from_local(inputs, mesh, [Replicate()], run_check=False)
            inputs = replicated.redistribute(placements=[Shard(-1)]).to_local()
        outputs = _sum(F.linear(inputs, _local_weight(module)), mesh)
        return outputs if module.bias is None else outputs + module.bias.to(outputs.dtype)


class _VocabularyParallelEmbedding(ParallelStyle):
    """Each worker holds its shard of an embedding's rows and looks those tokens up: (B, T) to (B, T, H) on all.

    torch's RowwiseParallel would take `padding_idx` as a row of each worker's shard, and leave that without gradient.
    """

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        _distribute(module, "weight", mesh, Shard(0))
        module.forward = partial(self._forward, module, mesh)
        return module

    def _forward(self, module: nn.Embedding, mesh: DeviceMesh, input_ids: torch.Tensor) -> torch.Tensor:
        weight = module.weight.to_local()
        first = _first_token(module.num_embeddings, mesh)
        is_here = (first <= input_ids) & (input_ids < first + len(weight))
        padding = None if module.padding_idx is None else module.padding_idx - first
        padding = padding if padding in range(len(weight)) else None
        vectors = F.embedding(torch.where(is_here, input_ids - first, 0), weight, padding)
        return _sum(vectors.masked_fill(~is_here[..., None], 0), mesh)


class _ReplicatedWithSummedGradient(ParallelStyle):
    """A norm that each worker applies to its own heads: the gradient of its parameters is the sum over the workers."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(partial(self._sum_gradients, mesh))
        return module

    @staticmethod
    def _sum_gradients(mesh: DeviceMesh, module: nn.Module, inputs: tuple) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and not hasattr(parameter, "_is_summed"):
                parameter.register_hook(partial(_sum, mesh=mesh))
                parameter._is_summed = True


def _distribute(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Keep this worker's part of a parameter, if the module has it."""
    if (parameter := getattr(module, name)) is not None:
        split = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(split, requires_grad=parameter.requires_grad))


def _local_weight(module: nn.Module) -> torch.Tensor:
    """This worker's part of a linear layer's weight, as F.linear takes it: (outputs, inputs)."""
    weight = module.weight.to_local()
    return weight.T if isinstance(module, Conv1D) else weight


def _local_outputs(module: nn.Module, mesh: DeviceMesh, inputs: torch.Tensor) -> torch.Tensor:
    """This worker's shard of a column-parallel layer's outputs: (..., I) to (..., O / workers)."""
    bias = None if module.bias is None else module.bias.to_local()
    return F.linear(_with_summed_gradient(inputs, mesh), _local_weight(module), bias)


def _sum(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The sum over the workers, on all of them; each one's gradient is the sum's."""
    return DTensor.from_local(tensor, mesh, [Partial()], run_check=False).full_tensor()


def _with_summed_gradient(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The same tensor, equal on all workers, whose gradient is the sum of theirs.

    Kept beside the tensor: layers that read the same one (q, k and v) have their gradients summed in one go.
    """
    if not hasattr(tensor, "_with_summed_gradient"):
        replicated = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
        tensor._with_summed_gradient = replicated.to_local(grad_placements=[Partial()])
    return tensor._with_summed_gradient


def _first_token(vocab_size: int, mesh: DeviceMesh) -> int:
    """The first token of this worker's shard of the vocabulary, which is cut as torch.chunk does."""
    return min(-(-vocab_size // mesh.size()) * mesh.get_local_rank(), vocab_size)


def is_vocabulary_parallel(head: nn.Module) -> bool:
    """Whether each worker holds the rows of some tokens of this output head, and no adapter wraps it."""
    return type(head) is nn.Linear and isinstance(head.weight, DTensor)


def vocabulary_parallel_logps(head: nn.Linear, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log softmax(head(h))[target], (N, H) and (N,) to (N,), where each worker has the logits of some tokens only.

    Three numbers a token are exchanged instead of all logits.
    """
    mesh = head.weight.device_mesh
    logits = _local_outputs(head, mesh, hidden_states)  # (N, V / workers)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    local_targets = targets - _first_token(head.out_features, mesh)
    is_here = (local_targets >= 0) & (local_targets < logits.shape[1])
    target_logits = logits.gather(1, torch.where(is_here, local_targets, 0)[:, None])[:, 0].masked_fill(~is_here, 0)

    local = logits.logsumexp(1)  # (N,); the workers' are added without overflow
    largest = DTensor.from_local(local.detach(), mesh, [Partial("max")], run_check=False).full_tensor()
    target_logits, normalizers = _sum(torch.stack([target_logits, (local - largest).exp()]), mesh)
    return target_logits - largest - normalizers.log()


# ---- which layers are split how -------------------------------------------------------------------------------------

_STYLES = {
    "colwise": _ColumnParallel(),
    "colwise_gather_output": _ColumnParallel(gather=True),
    "rowwise": _RowParallel(),
    "rowwise_split_input": _RowParallel(shard_inputs=True),
    "embedding_rowwise": _VocabularyParallelEmbedding(),
    "replicated_with_grad_allreduce": _ReplicatedWithSummedGradient(),
    "fused_qkv": _ColumnParallel(n_fused=3),  # ours; the other names are transformers'
}

_PLANS = {  # of the models that transformers has none for
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
# What their attention modules say of the size of q, k and v; the other models' take it from the tensors.
_SIZES_IN_ATTENTION = {"gpt2": "split_size", "gptj": "num_attention_heads"}


def _plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """The style of each layer that is split, by its name in the model with * for the block's number."""
    blocks = _PLANS.get(model.config.model_type) or model.config.get_text_config().base_model_tp_plan
    if not blocks:
        raise UserError(f"{type(model).__name__} has no plan for tensor parallelism; {_REMEDY}")
    plan = dict(_PLANS.get(model.config.model_type) or model.tp_plan)
    names = {module: name for name, module in model.named_modules()}
    plan[names[model.get_input_embeddings()]] = "embedding_rowwise"
    plan[names[model.get_output_embeddings()]] = "colwise_gather_output"
    bare = {_pattern(name) for name, _ in model.named_parameters()}  # parameters that the plan splits without a layer
    unknown = [f"{style} for {name}" for name, style in plan.items() if style not in _STYLES or name in bare]
    if unknown:
        raise UserError(
            f"tensor parallelism can't split {type(model).__name__}: its plan wants {', '.join(unknown)}; {_REMEDY}"
        )
    return {name: _STYLES[style] for name, style in plan.items()}


def _pattern(name: str) -> str:
    """The name of a module or parameter with * for the block's number."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _check_heads(model: nn.Module, world_size: int) -> None:
    """Each worker computes whole attention heads.

    Raises: UserError if they can't be dealt out evenly.
    """
    config = model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        n_heads = getattr(config, name, None) or config.num_attention_heads
        if n_heads % world_size:
            raise UserError(
                f"tensor parallelism over {world_size} workers can't split {type(model).__name__}, which has "
                f"{name}={n_heads}: use a number of workers that divides {n_heads}, or {_REMEDY}"
            )


def _layer_styles(name: str, module: nn.Module, style: ParallelStyle, model: nn.Module) -> dict[str, ParallelStyle]:
    """The style of a layer that is split and of the adapters that PEFT has put around it, by their full names."""
    if isinstance(style, _ReplicatedWithSummedGradient) or type(module) in (nn.Linear, Conv1D, nn.Embedding):
        return {name: style}
    if hasattr(module, "modules_to_save"):
        copies = (f"{name}.modules_to_save.{adapter}" for adapter in module.modules_to_save)
        return dict.fromkeys([f"{name}.original_module", *copies], style)
    if getattr(module, "lora_A", None) and not module.lora_variant:
        half = "lora_B" if isinstance(style, _ColumnParallel) else "lora_A"  # the other half is whole on every worker
        return {f"{name}.base_layer": style, **{f"{name}.{half}.{adapter}": style for adapter in module.lora_A}}
    raise UserError(
        f"tensor parallelism can't split {type(model).__name__}: its layer {name} is of the class "
        f"{type(module).__module__}.{type(module).__name__}; {_REMEDY}"
    )
