"""Attention over a packed row: many sequences one after the other, without padding and without a mask.

A row is cut into segments of queries. Each attends, causally, to a stretch of keys of its own, whose end is aligned
with the segment's. Where a prompt is computed once for two responses the segments are [prompt, chosen] and [rejected];
the keys of the first are its own tokens, those of the second [prompt, rejected], for which the prompt's keys and values
are taken a second time. On a GPU this is one call of a kernel for sequences of any length
(`torch.nn.attention.varlen`, FlashAttention: https://arxiv.org/abs/2307.08691); elsewhere a call of PyTorch's attention
for each segment, with which the same rows can be computed, and tested, on a CPU.

A model is computed so once `use_packed_attention` has been called for it, and `packing` is among the arguments of its
forward; without that argument it computes as before.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from utils import computed_dtype

NAME = "sdpa_or_packed"  # as an attention implementation of transformers
# of what models hand to attention functions, that which changes nothing here
_IGNORED = {"position_ids", "is_causal", "use_cache", "cache_position", "output_attentions", "position_embeddings"}


@dataclass
class Packing:
    """The segments of a packed row of N tokens, whose S queries' segments see M keys in all."""

    query_starts: torch.Tensor  # (S + 1,) int32; where each segment begins in the row, and the end
    key_starts: torch.Tensor  # (S + 1,) int32; where its keys begin among all keys, and the end
    longest_query: int
    longest_key: int
    keys: torch.Tensor | None = None  # (M,) the token of each key; None: the row's own tokens, in their order
    first: torch.Tensor | None = None  # (N,) where each token comes first among the keys
    again: torch.Tensor | None = None  # (M - N,) where tokens come a second time

    def to(self, device: torch.device | int, non_blocking: bool = False) -> "Packing":
        """Return the same segments on another device; accelerate calls this for layers on another GPU."""
        return with_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))


def with_tensors(holder, change: Callable[[torch.Tensor], torch.Tensor]):
    """A copy of a dataclass's instance with its tensors changed, and those of dataclasses that it holds."""
    copied = copy.copy(holder)
    for field in fields(holder):
        value = getattr(holder, field.name)
        if isinstance(value, torch.Tensor):
            setattr(copied, field.name, change(value))
        elif is_dataclass(value):
            setattr(copied, field.name, with_tensors(value, change))
    return copied


class _TakeKeys(torch.autograd.Function):
    """Keys or values by their places: (N, H, D) to (M, H, D).

    Every token comes once or twice, so its gradient is gathered from one place or two: without the atomic additions
    of `index_select`, whose order, and rounding, changes from run to run.
    """

    @staticmethod
    def forward(ctx, tokens: torch.Tensor, packing: Packing) -> torch.Tensor:
        ctx.packing = packing
        return tokens.index_select(0, packing.keys)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        packing = ctx.packing
        of_tokens, twice = gradient.index_select(0, packing.first), packing.keys.index_select(0, packing.again)
        sums = of_tokens.index_select(0, twice) + gradient.index_select(0, packing.again)
        return of_tokens.index_copy(0, twice, sums), None


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
    """An attention function of transformers: of (1, H, N, D) queries and (1, H_kv, N, D) keys and values, to
    (1, N, H, D). Without `packing` it is 'sdpa'.

    Raises: NotImplementedError if the model asks for something that packed rows don't have.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    asked = [name for name, argument in kwargs.items() if name not in _IGNORED and argument is not None]
    if dropout or query.shape[0] != 1:
        asked.append("dropout" if dropout else "several rows")
    if asked:
        raise NotImplementedError(f"attention over a packed row has no {', '.join(asked)}")
    dtype = computed_dtype(query)
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))  # (N, H, D) each
    if packing.keys is not None:
        key, value = _TakeKeys.apply(key, packing), _TakeKeys.apply(value, packing)  # (M, H_kv, D)
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
        **({"enable_gqa": True} if query.shape[1] != key.shape[1] else {}),  # not in every version of torch
    )


def _by_segment(query, key, value, packing: Packing, scale: float | None, window: int | None) -> torch.Tensor:
    """What the kernel computes, one segment after the other."""
    query_starts, key_starts = packing.query_starts.tolist(), packing.key_starts.tolist()
    outputs = []
    for number in range(len(query_starts) - 1):
        queries = slice(query_starts[number], query_starts[number + 1])
        keys = slice(key_starts[number], key_starts[number + 1])
        mask = _causal_mask(queries.stop - queries.start, keys.stop - keys.start, window, query.device)
        states = query[queries], key[keys], value[keys]
        outputs.append(
            F.scaled_dot_product_attention(
                *(of_segment.transpose(0, 1)[None] for of_segment in states),
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )[0].transpose(0, 1)
        )
    return torch.cat(outputs)


def _causal_mask(n_queries: int, n_keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which keys each query sees, (n_queries, n_keys), the last query all of them; None: up to its own place."""
    if n_queries == n_keys and (window is None or window >= n_keys):
        return None
    mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(n_keys - n_queries)
    return mask if window is None else mask.triu(n_keys - n_queries - window + 1)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def takes_packed_attention(model: nn.Module) -> bool:
    """Whether a model's attention is one that `use_packed_attention` can stand for."""
    return model.config._attn_implementation in ("sdpa", NAME)


def use_packed_attention(model: nn.Module, use: bool = True):
    """Let a model that computes by 'sdpa' compute packed rows as well; or no longer."""
    model.config._attn_implementation = NAME if use else "sdpa"


def no_mask(device: torch.device) -> torch.Tensor:
    """What a model gets as the mask of a packed row: one of four dimensions is handed on as it is, so none is made."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
