"""Attention over a packed row: many sequences one after the other, without padding and without a mask.

A row is cut into segments. The queries of a segment attend causally to that segment's keys, so that the last query
sees all of them. When a prompt is computed once for two responses, the segments are [prompt, chosen] and [rejected].
The keys of the first segment are its own tokens. The keys of the second are [prompt, rejected]: the prompt's keys and
values are used a second time.

On a GPU, one call of a kernel for sequences of varying length computes all segments (`torch.nn.attention.varlen`,
FlashAttention: https://arxiv.org/abs/2307.08691). Elsewhere, PyTorch's attention is called once per segment, so that
packed rows also work, and can be tested, on a CPU.

After `use_packed_attention(model)`, the model computes packed rows when its forward gets the argument `packing`, and
ordinary rows when it doesn't.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from utils import computed_dtype

NAME = "sdpa_or_packed"  # the name under which transformers knows this attention
# arguments that models pass to attention functions, and that make no difference here
_IGNORED = {"position_ids", "is_causal", "use_cache", "cache_position", "output_attentions", "position_embeddings"}


@dataclass
class Packing:
    """The S segments of a packed row of N tokens, which attend to M keys in total."""

    query_starts: torch.Tensor  # (S + 1,) int32; where each segment's queries start in the row, then the row's end
    key_starts: torch.Tensor  # (S + 1,) int32; where each segment's keys start among all keys, then their end
    longest_query: int  # queries in the longest segment
    longest_key: int  # keys in the segment with the most keys
    key_tokens: torch.Tensor | None = None  # (M,) index of each key's token in the row; None: key i is token i
    own_keys: torch.Tensor | None = None  # (N,) index of the key that each token computes
    repeated_keys: torch.Tensor | None = None  # (M - N,) indices of the keys that use a token for the second time

    def to(self, device: torch.device | int, non_blocking: bool = False) -> "Packing":
        """Return the same segments on another device; accelerate calls this for layers on another GPU."""
        return with_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))


def with_tensors(holder, change: Callable[[torch.Tensor], torch.Tensor]):
    """Copy a dataclass instance, applying `change` to its tensors and to those of dataclasses inside it."""
    copied = copy.copy(holder)
    for field in fields(holder):
        value = getattr(holder, field.name)
        if isinstance(value, torch.Tensor):
            setattr(copied, field.name, change(value))
        elif is_dataclass(value):
            setattr(copied, field.name, with_tensors(value, change))
    return copied


class _GatherKeys(torch.autograd.Function):
    """Gathers the keys or values of all segments from the row's tokens: (N, H, D) to (M, H, D).

    Each token is used once or twice, so the backward pass reads its gradient from one place or two. The backward of
    `index_select` adds atomically: order and rounding would change from run to run.
    """

    @staticmethod
    def forward(ctx, tokens: torch.Tensor, packing: Packing) -> torch.Tensor:
        ctx.packing = packing
        return tokens.index_select(0, packing.key_tokens)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        packing = ctx.packing
        token_gradient = gradient.index_select(0, packing.own_keys)
        used_twice = packing.key_tokens.index_select(0, packing.repeated_keys)
        sums = token_gradient.index_select(0, used_twice) + gradient.index_select(0, packing.repeated_keys)
        return token_gradient.index_copy(0, used_twice, sums), None


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packing: Packing | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Compute attention for transformers: queries (1, H, N, D), keys and values (1, H_kv, N, D) to (1, N, H, D).

    Without `packing`, this is 'sdpa'.

    Raises: NotImplementedError if the model passes an argument that packed rows don't support.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    unsupported = [name for name, argument in kwargs.items() if name not in _IGNORED and argument is not None]
    if dropout or query.shape[0] != 1:
        unsupported.append("dropout" if dropout else "several rows")
    if unsupported:
        raise NotImplementedError(f"attention over a packed row doesn't support {', '.join(unsupported)}")
    dtype = computed_dtype(query)
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))  # (N, H, D) each
    if packing.key_tokens is not None:
        key, value = _GatherKeys.apply(key, packing), _GatherKeys.apply(value, packing)  # (M, H_kv, D)
    attend = _by_segment if query.device.type in ("cpu", "mps") else _by_flash_attention
    return attend(query, key, value, packing, scaling, sliding_window)[None], None


def _by_flash_attention(query, key, value, packing: Packing, scale: float | None, window: int | None) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(
        query,
        key,
        value,
        packing.query_starts,
        packing.key_starts,
        packing.longest_query,
        packing.longest_key,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **({"enable_gqa": True} if query.shape[1] != key.shape[1] else {}),  # some versions of torch lack this argument
    )


def _by_segment(query, key, value, packing: Packing, scale: float | None, window: int | None) -> torch.Tensor:
    """Compute the same as the GPU kernel, one segment after the other."""
    query_starts, key_starts = packing.query_starts.tolist(), packing.key_starts.tolist()
    outputs = []
    for segment in range(len(query_starts) - 1):
        queries = slice(query_starts[segment], query_starts[segment + 1])
        keys = slice(key_starts[segment], key_starts[segment + 1])
        mask = _causal_mask(queries.stop - queries.start, keys.stop - keys.start, window, query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                *(states.transpose(0, 1)[None] for states in (query[queries], key[keys], value[keys])),
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )[0].transpose(0, 1)
        )
    return torch.cat(outputs)


def _causal_mask(n_queries: int, n_keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return a causal mask, (n_queries, n_keys), in which the last query sees the last key; None if none is needed."""
    if n_queries == n_keys and (window is None or window >= n_keys):
        return None
    mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(n_keys - n_queries)
    return mask if window is None else mask.triu(n_keys - n_queries - window + 1)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def supports_packed_attention(model: nn.Module) -> bool:
    """True if `use_packed_attention` can replace the model's attention."""
    return model.config._attn_implementation in ("sdpa", NAME)


def use_packed_attention(model: nn.Module):
    """Let a model whose attention is 'sdpa' compute packed rows too."""
    model.config._attn_implementation = NAME


@contextlib.contextmanager
def packed_attention_used(model: nn.Module) -> Iterator[None]:
    """Let a model compute packed rows inside the block, and restore its attention afterwards."""
    former = model.config._attn_implementation
    use_packed_attention(model)
    try:
        yield
    finally:
        model.config._attn_implementation = former


def no_mask(device: torch.device) -> torch.Tensor:
    """Return a placeholder mask for a packed row: transformers passes a 4-D mask through instead of building one."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
