"""Log-probabilities of responses from rows of tokens: the output head runs only where a response token is predicted."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from acceleration.packed_attention import no_mask
from acceleration.prefix_sharing import Rows
from distributed.strategies import SingleProcess
from utils import unwrap_adapter

# The head's logits are made in chunks of this many bytes, which suit a CPU's caches or an accelerator's throughput ...
_CHUNK_BYTES = {"cpu": 2**25}
_ACCELERATOR_CHUNK_BYTES = 2**28
# ... and made again in the backward pass where all of them together would take more than this.
_KEPT_LOGITS_BYTES = 2**30
LOGITS_BYTES = _KEPT_LOGITS_BYTES + 3 * _ACCELERATOR_CHUNK_BYTES  # at most: those kept, a chunk and its gradient


def response_logps(
    model: nn.Module, rows: Rows, whole_logits: bool = False, strategy: type[SingleProcess] = SingleProcess
) -> torch.Tensor:
    """Log-probability of each response in `rows` under `model`: (S,), in nats, in float32 or better.

    Args:
        whole_logits: take the logits from the whole model at every position: for models that do more to them than
            apply the output head.
        strategy: where the model's tensors live.
    """
    rows = rows.to(unwrap_adapter(model).get_input_embeddings().weight.device)
    logps = token_logps(model, rows, whole_logits, strategy)
    # summed over a table, as atomic additions on a GPU would come out differently every time
    table = logps.new_zeros(rows.n_sequences, rows.longest_response)
    return table.index_put((rows.sequences, rows.offsets), logps).sum(1)


def token_logps(
    model: nn.Module, rows: Rows, whole_logits: bool = False, strategy: type[SingleProcess] = SingleProcess
) -> torch.Tensor:
    """Log-probability of each predicted token: (N,), in nats; otherwise as `response_logps`."""
    model = unwrap_adapter(model)
    return strategy.run_as_forward(model, _token_logps, model, rows, whole_logits, strategy)


def _token_logps(model: nn.Module, rows: Rows, whole_logits: bool, strategy: type[SingleProcess]) -> torch.Tensor:
    device = model.get_input_embeddings().weight.device
    rows = rows.to(device)
    kwargs = {} if rows.padding_mask is None else {"attention_mask": rows.padding_mask}
    if rows.segments is not None:
        additive = model.config._attn_implementation == "eager"  # SDPA takes booleans, under autocast nothing else
        kwargs["attention_mask"] = tree_mask(rows.segments, model.dtype if additive else None)
        kwargs["position_ids"] = rows.position_ids
    if rows.packing is not None:
        kwargs = {"attention_mask": no_mask(device), "position_ids": rows.position_ids, "packing": rows.packing}
    if whole_logits:
        outputs, head = model(rows.input_ids, use_cache=False, **kwargs).logits, nn.Identity()  # (B, T, V)
    else:
        outputs, head = model.base_model(rows.input_ids, use_cache=False, **kwargs)[0], model.get_output_embeddings()
    predicting = outputs.flatten(0, 1).index_select(0, rows.predictors.to(outputs.device))  # (N, H or V)
    vocab_size = model.config.get_text_config().vocab_size
    return chunked_token_logps(predicting, head, rows.targets, vocab_size, strategy).to(device)


def chunked_token_logps(
    hidden_states: torch.Tensor, head: nn.Module, targets: torch.Tensor, vocab_size: int, strategy: type[SingleProcess]
) -> torch.Tensor:
    """log softmax(head(h))[target] of every token, (N, H) and (N,) to (N,): in float32, without all logits at once."""
    bytes_per_token = 4 * vocab_size
    chunk_bytes = _CHUNK_BYTES.get(hidden_states.device.type, _ACCELERATOR_CHUNK_BYTES)
    chunk_size = max(1, chunk_bytes // bytes_per_token)
    recompute = torch.is_grad_enabled() and len(targets) * bytes_per_token > _KEPT_LOGITS_BYTES

    chunks = zip(hidden_states.split(chunk_size), targets.split(chunk_size), strict=True)
    if recompute:
        kept = [checkpoint(strategy.token_logps, head, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        kept = [strategy.token_logps(head, *chunk) for chunk in chunks]
    return torch.cat(kept)


def tree_mask(segments: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Who may attend to whom: causal, but nobody from a rejected response to a chosen one. (B, T) to (B, 1, T, T).

    With a dtype the mask is to be added to attention scores, without it is boolean. Padding stands at the end: no
    token sees it, and itself sees something, so that no softmax is empty.
    """
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    mask = causal & ~((segments[:, :, None] == 2) & (segments[:, None, :] == 1))
    if dtype is not None:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return mask[:, None]
