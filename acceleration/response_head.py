"""Log-probabilities of responses from rows of tokens: the output head runs only where a response token is predicted."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from acceleration.packed_attention import no_mask
from acceleration.prefix_sharing import Rows
from distributed.strategies import SingleProcess
from utils import unwrap_adapter

# The head's logits are computed in chunks of this many bytes, chosen for a CPU's caches or an accelerator's throughput.
_CHUNK_BYTES = {"cpu": 2**25}
_ACCELERATOR_CHUNK_BYTES = 2**28
_KEPT_LOGITS_BYTES = 2**30  # if all logits would need more, they are recomputed in the backward pass
# The largest memory for logits: the kept ones, and for one chunk its logits, their log-softmax and its gradient.
LOGITS_BYTES = _KEPT_LOGITS_BYTES + 3 * _ACCELERATOR_CHUNK_BYTES


def response_logps(
    model: nn.Module,
    rows: Rows,
    whole_logits: bool = False,
    strategy: type[SingleProcess] = SingleProcess,
    n_first: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the log-probability of each response in `rows` under `model`: (S,), in nats, in float32 or better.

    Args:
        whole_logits: take the logits of every position from the whole model, because it modifies its output head's
            result.
        strategy: the trainer's strategy; its `token_logps` knows how the output head is sharded.
        n_first: (S,); if given, also return the log-probability of each response's first `n_first` tokens: (2, S).
    """
    model = unwrap_adapter(model)
    device = model.get_input_embeddings().weight.device
    rows = rows if rows.input_ids.device == device else rows.to(device)
    kwargs = _mask_and_positions(model, rows, device)
    if whole_logits:
        outputs, head = model(rows.input_ids, use_cache=False, **kwargs).logits, nn.Identity()  # (B, T, V)
    else:
        outputs, head = model.base_model(rows.input_ids, use_cache=False, **kwargs)[0], model.get_output_embeddings()
    predicting = outputs.flatten(0, 1).index_select(0, rows.predictors.to(outputs.device))  # (N, H or V)
    vocab_size = model.config.get_text_config().vocab_size
    logps = chunked_token_logps(predicting, head, rows.targets, vocab_size, strategy).to(device)
    # fill a table and sum its rows: atomic additions on a GPU would round differently every time
    table = logps.new_zeros(rows.n_sequences, rows.longest_response)
    table = table.index_put((rows.sequences, rows.offsets), logps)
    if n_first is None:
        return table.sum(1)
    is_first = torch.arange(table.shape[1], device=device) < n_first.to(device)[:, None]
    return torch.stack([table.sum(1), (table * is_first).sum(1)])


def _mask_and_positions(model: nn.Module, rows: Rows, device: torch.device) -> dict[str, object]:
    """Return the keyword arguments for a model's forward."""
    if rows.packing is not None:
        return {"attention_mask": no_mask(device), "position_ids": rows.position_ids, "packing": rows.packing}
    if rows.roles is not None:
        additive = model.config._attn_implementation == "eager"  # under autocast, SDPA takes only booleans
        mask = tree_mask(rows.roles, model.dtype if additive else None)
        return {"attention_mask": mask, "position_ids": rows.position_ids}
    return {}


def head_gives_logits(model: nn.Module, batch: dict) -> bool:
    """True if a model's logits are exactly its output head applied to its base's output.

    The two must be equal bit for bit. The base's output is multiplied by 64 first: untrained weights give small logits,
    for which a soft cap would vanish in rounding.
    """
    ids = batch["chosen_input_ids"][:1].to(model.get_input_embeddings().weight.device)
    head, expected = model.get_output_embeddings(), []
    if head is None or model.base_model is model:
        return False
    hook = model.base_model.register_forward_hook(lambda *call: expected.append(head(call[-1][0].mul_(64))))
    try:
        with torch.no_grad():
            logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        return torch.equal(expected.pop().to(logits), logits)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a base or a head with other arguments or results
        return False
    finally:
        hook.remove()


def chunked_token_logps(
    hidden_states: torch.Tensor, head: nn.Module, targets: torch.Tensor, vocab_size: int, strategy: type[SingleProcess]
) -> torch.Tensor:
    """Return log softmax(head(h))[target] of every token: (N, H) and (N,) to (N,), in float32 or better.

    The logits are computed in chunks; if they are large, they are never all in memory.
    """
    bytes_per_token = 4 * vocab_size
    chunk_bytes = _CHUNK_BYTES.get(hidden_states.device.type, _ACCELERATOR_CHUNK_BYTES)
    chunk_size = max(1, chunk_bytes // bytes_per_token)
    recompute = torch.is_grad_enabled() and len(targets) * bytes_per_token > _KEPT_LOGITS_BYTES

    logps = []
    for chunk in zip(hidden_states.split(chunk_size), targets.split(chunk_size), strict=True):
        if recompute:
            logps.append(checkpoint(strategy.token_logps, head, *chunk, use_reentrant=False))
        else:
            logps.append(strategy.token_logps(head, *chunk))
    return torch.cat(logps)


def tree_mask(roles: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return the attention mask: causal, but rejected responses don't see chosen ones. (B, T) to (B, 1, T, T).

    With a dtype, the mask is for adding to attention scores; without one, it is boolean. Padding is at the end: no
    other token sees it, and it sees earlier tokens, so that no softmax is empty.
    """
    length = roles.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=roles.device).tril()
    mask = causal & ~((roles[:, :, None] == 2) & (roles[:, None, :] == 1))
    if dtype is not None:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return mask[:, None]
