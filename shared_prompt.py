"""Prefix sharing: the rows that a model computes, and the log-probabilities of the responses in them.

A batch of pairs can be laid out in two ways. As the original does: 2B rows, [prompt, chosen] and [prompt, rejected],
padded to the longest. Or with prefix sharing (https://arxiv.org/abs/2410.20305): B rows [prompt, chosen, rejected], in
which positions start again for the rejected response and attention is a tree (each response sees the prompt and
itself), so that every prompt is computed once. Both give the same log-probabilities. In either, the output head runs
only where a response token is predicted.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from data.batches import part_lengths
from distributed.strategies import SingleProcess
from losses import _get_batch_logps
from utils import UserError, concatenated_inputs, take, unwrap_adapter

# The head's logits are made in chunks of this many bytes, which suit a CPU's caches or a GPU's throughput ...
_CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**28}
# ... and made again in the backward pass where all of them together would take more than this.
_KEPT_LOGITS_BYTES = 2**30


@dataclass
class Rows:
    """What one forward pass computes: B rows of length T that hold S responses with N predicted tokens in all."""

    input_ids: torch.Tensor  # (B, T)
    predictors: torch.Tensor  # (N,) place among the B * T positions of the one that predicts each response token
    targets: torch.Tensor  # (N,) the token that is predicted
    sequences: torch.Tensor  # (N,) which of the S responses it belongs to
    offsets: torch.Tensor  # (N,) its place in the response
    n_sequences: int  # S
    position_ids: torch.Tensor | None = None  # (B, T)
    segments: torch.Tensor | None = None  # (B, T) 0: prompt, 1: chosen, 2: rejected; None: plain causal attention

    def to(self, device: torch.device) -> "Rows":
        """The same rows on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in values.items()}
        return Rows(**moved)


def _predictions(input_ids: torch.Tensor, is_target: torch.Tensor, predictors: torch.Tensor, first_sequence: int):
    """predictors, targets, sequences and offsets of the tokens in `is_target`, one response a row: (B, T) to (N,) each.

    A token with nothing before it (an empty prompt's first) is not predicted.
    """
    rows, columns = (is_target & (predictors >= 0)).nonzero(as_tuple=True)
    offsets = ((is_target & (predictors >= 0)).cumsum(1) - 1)[rows, columns]
    return (
        rows * input_ids.shape[1] + predictors[rows, columns],
        input_ids[rows, columns],
        rows + first_sequence,
        offsets,
    )


def padded_rows(batch: dict) -> Rows:
    """A batch with one sequence a row: chosen over rejected, or the SFT targets alone. S is B."""
    if "rejected_input_ids" in batch:
        inputs = concatenated_inputs(batch)
        input_ids, labels = inputs["concatenated_input_ids"], inputs["concatenated_labels"]
    else:
        input_ids, labels = batch["chosen_input_ids"], batch["chosen_labels"]
    longest = int((labels != -100).int().mul(torch.arange(1, labels.shape[1] + 1)).max())
    input_ids, labels = input_ids[:, :longest], labels[:, :longest]
    before = torch.arange(-1, longest - 1).expand_as(input_ids)
    # padding stands at the end, where causal attention never looks: no mask is needed
    return Rows(input_ids, *_predictions(input_ids, labels != -100, before, 0), n_sequences=len(input_ids))


def shared_rows(batch: dict) -> Rows:
    """A batch of B pairs as B rows [prompt, chosen, rejected]. S is 2 B: the chosen responses, then the rejected."""
    n_prompt, n_chosen, n_rejected = (lengths[:, None] for lengths in part_lengths(batch))
    end_of_chosen = n_prompt + n_chosen
    t = torch.arange(int((end_of_chosen + n_rejected).max())).expand(len(n_prompt), -1)  # (B, T)
    is_chosen = (n_prompt <= t) & (t < end_of_chosen)
    is_rejected = (end_of_chosen <= t) & (t < end_of_chosen + n_rejected)

    position_ids = torch.where(t < end_of_chosen, t, t - n_chosen)  # the rejected response starts after the prompt too
    chosen_ids, rejected_ids = batch["chosen_input_ids"], batch["rejected_input_ids"]
    from_chosen = chosen_ids.gather(1, t.clamp(max=chosen_ids.shape[1] - 1))
    from_rejected = rejected_ids.gather(1, position_ids.clamp(max=rejected_ids.shape[1] - 1))
    input_ids = torch.where(is_rejected, from_rejected, torch.where(t < end_of_chosen, from_chosen, 0))

    before = torch.where(t == end_of_chosen, n_prompt, t) - 1  # the prompt's last token predicts the first of both
    chosen = _predictions(input_ids, is_chosen, before, 0)
    rejected = _predictions(input_ids, is_rejected, before, len(n_prompt))
    return Rows(
        input_ids,
        *(torch.cat(parts) for parts in zip(chosen, rejected, strict=True)),
        n_sequences=2 * len(n_prompt),
        position_ids=torch.where(is_rejected | (t < end_of_chosen), position_ids, 0),
        segments=is_chosen.to(torch.uint8) + 2 * is_rejected.to(torch.uint8),
    )


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


def response_logps(
    model: nn.Module, rows: Rows, whole_logits: bool = False, strategy: type[SingleProcess] = SingleProcess
) -> torch.Tensor:
    """Log-probability of each response in `rows` under `model`: (S,), in nats, in float32 or better.

    Args:
        whole_logits: take the logits from the whole model at every position: for models that do more to them than
            apply the output head.
        strategy: where the model's tensors live.
    """
    model = unwrap_adapter(model)
    return strategy.run_as_forward(model, _response_logps, model, rows, whole_logits, strategy)


def _response_logps(model: nn.Module, rows: Rows, whole_logits: bool, strategy: type[SingleProcess]) -> torch.Tensor:
    n_tokens = torch.bincount(rows.sequences, minlength=rows.n_sequences)  # (S,)
    device = model.get_input_embeddings().weight.device
    rows = rows.to(device)
    kwargs = {}
    if rows.segments is not None:
        additive = model.config._attn_implementation == "eager"  # SDPA takes booleans, under autocast nothing else
        kwargs["attention_mask"] = tree_mask(rows.segments, model.dtype if additive else None)
        kwargs["position_ids"] = rows.position_ids
    if whole_logits:
        outputs, head = model(rows.input_ids, use_cache=False, **kwargs).logits, nn.Identity()  # (B, T, V)
    else:
        outputs, head = model.base_model(rows.input_ids, use_cache=False, **kwargs)[0], model.get_output_embeddings()
    predicting = outputs.flatten(0, 1).index_select(0, rows.predictors.to(outputs.device))  # (N, H or V)
    vocab_size = model.config.get_text_config().vocab_size
    logps = chunked_token_logps(predicting, head, rows.targets, vocab_size, strategy).to(device)

    # summed over a table, as atomic additions on a GPU would come out differently every time
    table = logps.new_zeros(rows.n_sequences, int(n_tokens.max()))
    return table.index_put((rows.sequences, rows.offsets), logps).sum(1)


def chunked_token_logps(
    hidden_states: torch.Tensor, head: nn.Module, targets: torch.Tensor, vocab_size: int, strategy: type[SingleProcess]
) -> torch.Tensor:
    """log softmax(head(h))[target] of every token, (N, H) and (N,) to (N,): in float32, without all logits at once."""
    device = hidden_states.device.type
    bytes_per_token = 4 * vocab_size
    chunk_size = max(1, _CHUNK_BYTES[device] // bytes_per_token)
    recompute = torch.is_grad_enabled() and len(targets) * bytes_per_token > _KEPT_LOGITS_BYTES

    chunks = zip(hidden_states.split(chunk_size), targets.split(chunk_size), strict=True)
    if recompute:
        kept = [checkpoint(strategy.token_logps, head, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        kept = [strategy.token_logps(head, *chunk) for chunk in chunks]
    return torch.cat(kept)


# ---- which way a model can take -------------------------------------------------------------------------------------


def choose_rows(
    model: nn.Module, batch: dict, setting: bool | str, max_length: int, strategy: type[SingleProcess] = SingleProcess
) -> tuple[Callable[[dict], Rows], bool, str]:
    """Find out, on a few examples, how a model may be computed.

    Args:
        setting: the config's `shared_prompt`: 'auto', True (an error if the model can't) or False.
        max_length: of a sequence, in tokens.
        strategy: where the model's tensors live.

    Returns: `shared_rows` or `padded_rows`, whether the logits must be taken whole, and why, to be logged.
    Raises: UserError if `setting` is True and the model can't.
    """
    model, batch = unwrap_adapter(model), take(batch, torch.arange(min(2, len(batch["prompt"]))))
    with torch.no_grad():
        plain = padded_rows(batch)
        expected = _plain_logps(model, batch)
        whole_logits = not _equal(model, plain, expected, False, strategy)
        if setting is False or "rejected_labels" not in batch:
            return padded_rows, whole_logits, "one sequence a row"
        reason = _why_not(model, max_length)
        if reason is None and not _equal(model, shared_rows(batch), expected, whole_logits, strategy):
            reason = "its log-probabilities differ when the two responses share a row"
    if reason is None:
        return shared_rows, whole_logits, "each prompt is computed once a pair"
    if setting is True:
        raise UserError(
            f"shared_prompt=true, but the model {type(model).__name__} can't: {reason}; use shared_prompt=auto"
        )
    return (
        padded_rows,
        whole_logits,
        f"prompts are computed twice a pair: {type(model).__name__} can't share them: {reason}",
    )


def _why_not(model: nn.Module, max_length: int) -> str | None:
    """What of a model's design forbids rows that share a prompt; None if nothing is known of."""
    config = model.config.get_text_config()
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no position_ids"
    kinds = getattr(config, "layer_types", None) or []
    if getattr(model, "_is_stateful", False) or any("attention" not in kind or "linear" in kind for kind in kinds):
        return "it has recurrent layers"
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "") == "alibi":
        return "its positions are ALiBi biases"
    windows = [w for w in (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")) if w]
    if windows and min(windows) < max_length and any("full" not in kind for kind in kinds or ["window"]):
        return f"it attends to a window of {min(windows)} tokens, max_length is {max_length}"
    return None


def _plain_logps(model: nn.Module, batch: dict) -> torch.Tensor:
    """Log-probabilities from the model's own forward, with mask and padding as the original has them."""
    prefix, inputs = ("concatenated", concatenated_inputs(batch)) if "rejected_labels" in batch else ("chosen", batch)
    ids, mask, labels = (
        inputs[f"{prefix}_{kind}"].to(model.get_input_embeddings().weight.device)
        for kind in ("input_ids", "attention_mask", "labels")
    )
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    return _get_batch_logps(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


def _equal(
    model: nn.Module, rows: Rows, expected: torch.Tensor, whole_logits: bool, strategy: type[SingleProcess]
) -> bool:
    """Whether the log-probabilities of `rows` are as expected, to the rounding of the model's dtype."""
    try:
        logps = response_logps(model, rows, whole_logits, strategy)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):  # a forward of another form
        return False
    n_tokens = torch.bincount(rows.sequences, minlength=rows.n_sequences).to(logps.device)
    # Nats a token. On a GPU float32 is multiplied as TF32; parts of some models are in float32 even in float64.
    exact = 1e-4 if logps.device.type == "cpu" else 0.01
    tolerance = exact if model.dtype in (torch.float32, torch.float64) else 0.1
    return bool(((logps - expected.to(logps)).abs() <= tolerance * n_tokens.clamp(min=1)).all())
