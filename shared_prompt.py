"""Prefix sharing: the rows that a model computes, and the log-probabilities of the responses in them.

A batch of pairs can be laid out in two ways. As the original does: 2B rows, [prompt, chosen] and [prompt, rejected],
padded to the longest. Or with prefix sharing (https://arxiv.org/abs/2410.20305): B rows [prompt, chosen, rejected], in
which positions start again for the rejected response and attention is a tree (each response sees the prompt and
itself), so that every prompt is computed once. Both give the same log-probabilities. In either, the output head runs
only where a response token is predicted.
"""

import contextlib
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from data.batches import part_lengths
from distributed import collectives
from distributed.strategies import SingleProcess
from utils import UserError, concatenated_inputs, take, unwrap_adapter

# The head's logits are made in chunks of this many bytes, which suit a CPU's caches or an accelerator's throughput ...
_CHUNK_BYTES = {"cpu": 2**25}
_ACCELERATOR_CHUNK_BYTES = 2**28
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
    padding_mask: torch.Tensor | None = None  # (B, T) 1: a token, 0: padding; None: the model is given no mask

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
    n_tokens = torch.bincount(rows.sequences, minlength=rows.n_sequences)  # (S,)
    logps = token_logps(model, rows, whole_logits, strategy)
    # summed over a table, as atomic additions on a GPU would come out differently every time
    table = logps.new_zeros(rows.n_sequences, int(n_tokens.max()))
    return table.index_put((rows.sequences.to(logps.device), rows.offsets.to(logps.device)), logps).sum(1)


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


# ---- which way a model can take -------------------------------------------------------------------------------------

# How far a way of computing may be from the model's own forward, as a multiple of what rounding does to that forward
# (`OwnForward`), if it is to be chosen, and if there is no other and training would be refused. Over the architectures
# of benchmarks/architectures.py right ways differ by at most 0.5 times that (one by 2.8), wrong ones by 1.7 times
# or more; those of models that must be refused, by 10 or more. In float32, all wrong ones differ 2,000 times ...
CHOSEN_WITHIN, REFUSED_BEYOND = 1, 5
# ... save, in 16 bits, in this share of the tokens: a single rounding may send a token to another expert.
_FREE_SHARE = 0.01
# A sum of float32 in float32 is off by so many times its last digit; in 16 bits, what is rounded was summed in float32.
_ACCUMULATED = 32
_DENSE_MASKS = ("eager", "sdpa")  # attention implementations that take a (B, 1, T, T) mask; others may crash on one
_PROBE_TOKENS = 64  # of a row, where a few are enough


def choose_rows(
    model: nn.Module, batch: dict, setting: bool | str, max_length: int, strategy: type[SingleProcess] = SingleProcess
) -> tuple[Callable[[dict], Rows], bool, str]:
    """Find out, on a few examples and on ones of full length, how a model may be computed. All workers decide alike.

    The standard is the model's own forward with a padding mask, at every token; see `OwnForward`. What can be computed
    is not guessed from a model's name or config. It costs a dozen forward passes of at most two examples, five of them
    of full length.

    Args:
        setting: the config's `shared_prompt`: 'auto', True (an error if the model can't) or False.
        max_length: of a sequence, in tokens.
        strategy: where the model's tensors live.

    Returns: `shared_rows` or `padded_rows`, whether the logits must be taken whole, and why, to be logged.
    Raises: UserError if `setting` is True and the model can't, or if no way gives what the model's own forward does.
    """
    model, batch = unwrap_adapter(model), take(batch, torch.arange(min(2, len(batch["prompt"]))))
    with _evaluating(model), torch.no_grad():
        _check_training_forward(model, batch)
        short = OwnForward(model, batch, True, strategy)
        whole_logits = not _head_gives_logits(model, batch)
        whole_logits = whole_logits or short.difference(padded_rows(batch), False, REFUSED_BEYOND) is not None
        full = OwnForward(model, full_length_pair(batch, max_length), whole_logits, strategy)
        for own in (short, full) if whole_logits else (full,):
            if (difference := own.difference(padded_rows(own.batch), whole_logits, REFUSED_BEYOND)) is not None:
                raise UserError(
                    f"{_name(model)}: without a padding mask {difference}. Is it a causal language model? An encoder "
                    "can't be trained so, nor can a model whose tokens depend on the padding behind them"
                )
        logits = ", its logits whole, as the model does more than apply its output head" if whole_logits else ""
        if setting is False or "rejected_labels" not in batch:
            return padded_rows, whole_logits, f"one sequence a row{logits}"
        reason = _why_not_shared(short, full, max_length, whole_logits)
    if reason is None:
        return shared_rows, whole_logits, f"each prompt is computed once a pair{logits}"
    if setting is True:
        raise UserError(f"shared_prompt=true, but the model {_name(model)} can't: {reason}; use shared_prompt=auto")
    return (
        padded_rows,
        whole_logits,
        f"prompts are computed twice a pair: {_name(model)} can't share them: {reason}{logits}",
    )


def _why_not_shared(short: "OwnForward", full: "OwnForward", max_length: int, whole_logits: bool) -> str | None:
    """Why a model can't compute rows that share a prompt; None if it can."""
    attention = short.model.config._attn_implementation
    if attention not in _DENSE_MASKS:
        return f"attn_implementation={attention} takes no tree mask; {' and '.join(_DENSE_MASKS)} do"
    for own in (short, full):
        if (difference := own.difference(shared_rows(own.batch), whole_logits, CHOSEN_WITHIN)) is not None:
            known = _known_reason(own.model, max_length)
            return f"where the two responses share a row, {difference}{f' ({known})' if known else ''}"
    longest = synthetic_pair(short.batch, 0, max_length, max_length)
    difference = short.failure(shared_rows(longest), whole_logits)
    return None if difference is None else f"where a row has {2 * max_length} tokens, {difference}"


def _known_reason(model: nn.Module, max_length: int) -> str | None:
    """What of a model's design forbids rows that share a prompt, to explain what was measured; None if not known."""
    config = model.config.get_text_config()
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no position_ids"
    kinds = getattr(config, "layer_types", None) or []
    if getattr(model, "_is_stateful", False) or any("attention" not in kind or "linear" in kind for kind in kinds):
        return "it has recurrent layers"
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "") == "alibi":
        return "its positions are ALiBi biases"
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    windows = [window for window in windows if isinstance(window, int) and 0 < window < max_length]
    return f"it attends to a window of {min(windows)} tokens, max_length is {max_length}" if windows else None


def _name(model: nn.Module) -> str:
    return type(model).__name__.removeprefix("FSDP")


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without what a model does at random in training."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _check_training_forward(model: nn.Module, batch: dict):
    """Raises: UserError if the model's forward fails where gradients are wanted, on the first tokens of a batch."""
    ids = _first_tokens(model, batch)
    try:
        with torch.enable_grad():
            model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise _cannot_compute(model, ids.shape[1], error) from error


def _cannot_compute(model: nn.Module, length: int, error: Exception) -> UserError:
    return UserError(
        f"{_name(model)}: its own forward fails on sequences of {length} tokens, with {_shortened(error)}. If they are "
        "too long for it, lower max_length; if it is the attention that fails, name another in the model's config.json "
        f"(attn_implementation={model.config._attn_implementation} now; sdpa and eager are computed everywhere)"
    )


def _first_tokens(model: nn.Module, batch: dict) -> torch.Tensor:
    """One row of a few tokens, on the model's device: (1, T)."""
    ids = batch["chosen_input_ids"][:1, : int(batch["chosen_attention_mask"][0].sum())]
    return ids[:, :_PROBE_TOKENS].to(model.get_input_embeddings().weight.device)


class OwnForward:
    """The log-probabilities of a batch by the model's own forward with a padding mask, and how far rounding moves them.

    How far, depends on dtype, depth and weights; so it is measured: the same forward again, in which the output of
    every layer is off by as much as rounding it once could make it, at random.
    """

    def __init__(
        self, model: nn.Module, batch: dict, whole_logits: bool, strategy: type[SingleProcess] = SingleProcess
    ):
        """Raises: UserError if the model can't compute the batch at all."""
        self.model, self.batch, self.strategy = model, batch, strategy
        rows = padded_rows(batch)
        pairs = "rejected_labels" in batch
        mask = concatenated_inputs(batch)["concatenated_attention_mask"] if pairs else batch["chosen_attention_mask"]
        rows = replace(rows, padding_mask=mask[:, : rows.input_ids.shape[1]])
        try:
            self.logps = token_logps(model, rows, whole_logits, strategy)
            with _rounded_otherwise(model) as dtypes:
                rounded_otherwise = token_logps(model, rows, whole_logits, strategy)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise _cannot_compute(model, rows.input_ids.shape[1], error) from error
        self.rounding = self._sorted_differences(rounded_otherwise).nan_to_num(math.inf, math.inf)
        self.n_free = int(_FREE_SHARE * len(self.logps)) if dtypes & {torch.bfloat16, torch.float16} else 0

    def _sorted_differences(self, logps: torch.Tensor) -> torch.Tensor:
        """How far each token's log-probability is from its own, in nats, ascending, NaN last: (N,).

        One that is undefined by the own forward can't be got wrong; if it matters, training will say so.
        """
        return (logps - self.logps).abs().masked_fill(~self.logps.isfinite(), 0).sort().values

    def difference(self, rows: Rows, whole_logits: bool, slack: float) -> str | None:
        """In words, by how much these rows' log-probabilities differ from its own; None: by no more than `slack` times
        what rounding makes."""
        failure, logps = self._compute(rows, whole_logits)
        if logps is not None:
            differences = self._sorted_differences(logps)
            if not self.within_rounding(differences, slack):
                failure = (
                    f"its log-probabilities differ from its own forward's by up to {differences[-1]:.2g} nats a token, "
                    f"by rounding they would by {self.rounding[-1]:.2g}"
                )
        return self._agreed(failure)

    def within_rounding(self, differences: torch.Tensor, slack: float) -> bool:
        """Whether differences from the own forward, (N,), ascending, are within `slack` times what rounding makes: the
        n-th within the n-th, so that many small ones don't hide behind the few large ones that rounding may make."""
        compared = len(differences) - self.n_free
        last_digits = 4 * torch.finfo(self.logps.dtype).eps * self.logps.abs().nan_to_num(0, 0, 0).max()
        return bool((differences[:compared] <= slack * self.rounding[:compared] + last_digits).all())

    def failure(self, rows: Rows, whole_logits: bool) -> str | None:
        """The error that computing these rows ends in, in words; None: they can be computed."""
        return self._agreed(self._compute(rows, whole_logits)[0])

    def _compute(self, rows: Rows, whole_logits: bool) -> tuple[str | None, torch.Tensor | None]:
        try:
            return None, token_logps(self.model, rows, whole_logits, self.strategy)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a forward of another form, or a compiler, may raise
            return f"its forward fails with {_shortened(error)}", None

    @staticmethod
    def _agreed(failure: str | None) -> str | None:
        """The same decision on all workers: what fails on one fails."""
        fails = collectives.all_reduce_max(int(failure is not None))
        return (failure or "another worker found that it can't be computed") if fails else None


def _shortened(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


def synthetic_pair(batch: dict, n_prompt: int, n_chosen: int, n_rejected: int) -> dict:
    """A batch of one pair with so many tokens, drawn from the batch's own, so that none means something special."""
    seen = batch["chosen_input_ids"][batch["chosen_attention_mask"].bool()]
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> torch.Tensor:
        return seen[torch.randint(len(seen), (n,), generator=generator)]

    prompt, pair = draw(n_prompt), {"prompt": [""]}
    for side, n_tokens in (("chosen", n_chosen), ("rejected", n_rejected)):
        ids = torch.cat([prompt, draw(n_tokens)])
        labels = ids.clone()
        labels[:n_prompt] = -100
        parts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        pair |= {f"{side}_{kind}": value[None] for kind, value in parts.items()}
    return pair


def full_length_pair(batch: dict, max_length: int) -> dict:
    """A synthetic pair whose chosen sequence has `max_length` tokens, the rejected one fewer, a quarter the prompt."""
    n_prompt = max(1, max_length // 4)
    n_chosen = max_length - n_prompt
    return synthetic_pair(batch, n_prompt, n_chosen, max(1, 3 * n_chosen // 4))


def _head_gives_logits(model: nn.Module, batch: dict) -> bool:
    """Whether a model's logits are its output head, applied to what its base puts out, and nothing more.

    Seen in one forward of the model, at every logit, and to the last bit: it is the same operation on the same tensor.
    Once more with the base's output times 64 (a power of two, so that nothing is rounded): a soft cap shows there even
    if the logits of untrained weights are so small that it is lost in their rounding.
    """
    ids = _first_tokens(model, batch)
    head, caught = model.get_output_embeddings(), []
    if head is None or model.base_model is model:
        return False

    def catch(scale: int, module: nn.Module, inputs: tuple, output: object):
        caught.append(head(output[0].mul_(scale)))

    for scale in (1, 64):
        hook = model.base_model.register_forward_hook(functools.partial(catch, scale))
        try:
            logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            same = torch.equal(caught.pop().to(logits), logits)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a base or a head of another form
            same = False
        finally:
            hook.remove()
        if collectives.all_reduce_max(int(not same)):
            return False
    return True


@contextlib.contextmanager
def _rounded_otherwise(model: nn.Module) -> Iterator[set[torch.dtype]]:
    """Let the output of every layer but the head be off by up to its rounding, at random.

    This is Monte Carlo arithmetic (D. S. Parker, UCLA CSD-970002, 1997) at the granularity of layers. The noise of the
    n-th output is drawn from the seed n, so that workers that compute the same draw the same.

    Yields: the dtypes of the outputs, as they come.
    """
    counter, dtypes = itertools.count(), set()

    def perturb(module: nn.Module, inputs: tuple, output: object) -> torch.Tensor | None:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return None
        dtypes.add(output.dtype)
        generator = torch.Generator(output.device).manual_seed(next(counter))
        error = torch.empty(output.shape, device=output.device).uniform_(-1, 1, generator=generator)
        return (output * (1 + _rounding_error(output) * error)).to(output.dtype)

    layers = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    hooks = [layer.register_forward_hook(perturb) for layer in layers if layer is not model.get_output_embeddings()]
    try:
        yield dtypes
    finally:
        for hook in hooks:
            hook.remove()


def _rounding_error(tensor: torch.Tensor) -> float:
    """How far what is computed in a tensor's dtype may be off by rounding, relative to its size."""
    if tensor.dtype not in (torch.float32, torch.float64):  # float64: parts of some models are in float32 even then
        return torch.finfo(tensor.dtype).eps / 2
    if tensor.is_cuda and torch.backends.cuda.matmul.allow_tf32:  # which has as many digits as float16
        return torch.finfo(torch.float16).eps / 2
    return _ACCUMULATED * torch.finfo(torch.float32).eps / 2
