"""Rows that a model computes, and the log-probabilities of the responses in them.

A batch of pairs can be laid out in two ways. As the original does: 2B rows, [prompt, chosen] and [prompt, rejected],
padded to the longest. Or with shared prompts: B rows [prompt, chosen, rejected], in which positions start again for the
rejected response and attention is a tree (each response sees the prompt and itself), so that every prompt is computed
once. Both give the same log-probabilities. In either, the output head runs only where a response token is predicted.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from losses import _get_batch_logps
from utils import UserError, concatenated_inputs, take, without_wrapper

# The head's logits are made in chunks of this many bytes, which suit a CPU's caches or a GPU's throughput ...
_CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**28}
# ... and made again in the backward pass where all of them together would take more than this.
_KEPT_LOGITS_BYTES = 2**30

# What starting one more microbatch costs, in tokens that could be computed in its time.
_MICROBATCH_OVERHEAD = {"cpu": 64, "cuda": 4096}


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
    n_prompt, n_chosen, n_rejected = (lengths[:, None] for lengths in _part_lengths(batch))
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


def _part_lengths(batch: dict) -> list[torch.Tensor]:
    """Tokens in each example's prompt and in its response or responses, each of shape (batch_size,)."""
    sides = [side for side in ("chosen", "rejected") if f"{side}_labels" in batch]
    prompts = batch["chosen_attention_mask"].sum(1) - (batch["chosen_labels"] != -100).sum(1)
    return [prompts, *((batch[f"{side}_labels"] != -100).sum(1) for side in sides)]


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
    model: nn.Module, rows: Rows, average_log_prob: bool = False, whole_logits: bool = False
) -> torch.Tensor:
    """Log-probability of each response in `rows` under `model`: (S,), in nats, in float32 or better.

    Args:
        average_log_prob: per token instead of summed.
        whole_logits: take the logits from the whole model at every position: for models that do more to them than
            apply the output head.
    """
    model = without_wrapper(model)
    if hasattr(model, "within_forward"):  # it is sharded
        return model.within_forward(_response_logps, model, rows, average_log_prob, whole_logits)
    return _response_logps(model, rows, average_log_prob, whole_logits)


def _response_logps(model: nn.Module, rows: Rows, average_log_prob: bool, whole_logits: bool) -> torch.Tensor:
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
    logps = token_logps(predicting, head, rows.targets, model.config.get_text_config().vocab_size).to(device)

    # summed over a table, as atomic additions on a GPU would come out differently every time
    table = logps.new_zeros(rows.n_sequences, int(n_tokens.max()))
    sums = table.index_put((rows.sequences, rows.offsets), logps).sum(1)
    return sums / n_tokens.to(device) if average_log_prob else sums


def token_logps(hidden_states: torch.Tensor, head: nn.Module, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """log softmax(head(h))[target] of every token, (N, H) and (N,) to (N,): in float32, without all logits at once."""
    device = hidden_states.device.type
    bytes_per_token = 4 * vocab_size
    chunk_size = max(1, _CHUNK_BYTES[device] // bytes_per_token)
    recompute = torch.is_grad_enabled() and len(targets) * bytes_per_token > _KEPT_LOGITS_BYTES

    def chunk_logps(hidden_chunk: torch.Tensor, target_chunk: torch.Tensor) -> torch.Tensor:
        if hasattr(head, "token_logps"):  # split over workers by vocabulary: none needs all logits
            return head.token_logps(hidden_chunk, target_chunk)
        logits = head(hidden_chunk)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -F.cross_entropy(logits, target_chunk.to(logits.device), reduction="none")

    chunks = zip(hidden_states.split(chunk_size), targets.split(chunk_size), strict=True)
    if recompute:
        return torch.cat([checkpoint(chunk_logps, *chunk, use_reentrant=False) for chunk in chunks])
    return torch.cat([chunk_logps(*chunk) for chunk in chunks])


# ---- cutting a batch into microbatches ------------------------------------------------------------------------------


def microbatches(
    batch: dict, n_least: int, device: str, shared: bool, agree: Callable[[int], int] = lambda n: n
) -> list[dict]:
    """Cut a batch into microbatches, at least `n_least`, none with more than its `n_least`-th part of the examples.

    The examples are sorted by length first and cut where padding and the cost of one more microbatch come to least, so
    a microbatch pads little. Together they hold each example once; weigh each by its number of examples. Where several
    workers must make equally many, `agree` tells each the most that any of them makes.
    """
    parts = _part_lengths(batch)
    lengths = sum(parts) if shared else parts[0] + torch.stack(parts[1:]).amax(0)
    order = lengths.argsort(descending=True, stable=True)
    overhead = _MICROBATCH_OVERHEAD[device] / (1 if shared else len(parts) - 1)
    sizes = _cheapest_cuts(lengths[order].tolist(), max_size=len(order) // n_least, overhead=overhead)
    for _ in range(agree(len(sizes)) - len(sizes)):
        largest = sizes.index(max(sizes))
        sizes[largest : largest + 1] = [sizes[largest] - sizes[largest] // 2, sizes[largest] // 2]
    return [take(batch, indices) for indices in order.split(sizes)]


def _cheapest_cuts(lengths: list[int], max_size: int, overhead: float) -> list[int]:
    """Sizes of the consecutive groups, at most `max_size` each, that cost least in all; `lengths` fall.

    A group costs its rows times its longest, plus `overhead`.
    """
    best = [0.0] + [float("inf")] * len(lengths)  # cost of the first n rows
    last = [0] * (len(lengths) + 1)  # size of their last group
    for end in range(1, len(lengths) + 1):
        for size in range(1, min(max_size, end) + 1):
            cost = best[end - size] + size * lengths[end - size] + overhead
            if cost < best[end]:
                best[end], last[end] = cost, size
    sizes, end = [], len(lengths)
    while end > 0:
        sizes.append(last[end])
        end -= last[end]
    return sizes[::-1]


# ---- which way a model can take -------------------------------------------------------------------------------------


def choose_rows(
    model: nn.Module, batch: dict, setting: bool | str, max_length: int
) -> tuple[Callable[[dict], Rows], bool, str]:
    """Find out, on a few examples, how a model may be computed.

    Args:
        setting: the config's `shared_prompt`: 'auto', True (an error if the model can't) or False.
        max_length: of a sequence, in tokens.

    Returns: `shared_rows` or `padded_rows`, whether the logits must be taken whole, and why, to be logged.
    Raises: UserError if `setting` is True and the model can't.
    """
    model, batch = without_wrapper(model), take(batch, torch.arange(min(2, len(batch["prompt"]))))
    with torch.no_grad():
        plain = padded_rows(batch)
        expected = _plain_logps(model, batch)
        whole_logits = not _equal(model, plain, expected, whole_logits=False)
        if setting is False or "rejected_labels" not in batch:
            return padded_rows, whole_logits, "one sequence a row"
        reason = _why_not(model, max_length)
        if reason is None and not _equal(model, shared_rows(batch), expected, whole_logits):
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


def _equal(model: nn.Module, rows: Rows, expected: torch.Tensor, whole_logits: bool) -> bool:
    """Whether the log-probabilities of `rows` are as expected, to the rounding of the model's dtype."""
    try:
        logps = response_logps(model, rows, whole_logits=whole_logits)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):  # a forward of another form
        return False
    n_tokens = torch.bincount(rows.sequences, minlength=rows.n_sequences).to(logps.device)
    # Nats a token. On a GPU float32 is multiplied as TF32; parts of some models are in float32 even in float64.
    exact = 1e-4 if logps.device.type == "cpu" else 0.01
    tolerance = exact if model.dtype in (torch.float32, torch.float64) else 0.1
    return bool(((logps - expected.to(logps)).abs() <= tolerance * n_tokens.clamp(min=1)).all())
