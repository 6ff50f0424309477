"""Which way a model can be computed: each way's log-probabilities against those of the model's own forward.

What can be computed is not guessed from a model's name or config, but found out where training starts, on the device
and in the precision that it trains in.
"""

import contextlib
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from omegaconf import DictConfig
from torch import nn

from acceleration.layout import PLAIN, Layout
from acceleration.packed_attention import supports_packed_attention, use_packed_attention
from acceleration.prefix_sharing import PACKED, SHARED, Rows, packed_rows, packed_shared_rows, padded_rows, shared_rows
from acceleration.response_head import token_logps
from distributed import collectives
from distributed.strategies import SingleProcess
from log_probabilities import concatenated_inputs
from utils import UserError, computed_dtype, rank0_print, take, unwrap_adapter

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


# What is said of each way, fastest first.
_SAID = {
    packed_shared_rows: "each prompt is computed once a pair, in rows without padding",
    shared_rows: "each prompt is computed once a pair",
    packed_rows: "each sequence is computed by itself, in rows without padding",
    padded_rows: "one sequence a row",
}


def choose_layout(
    model: nn.Module,
    plain: Callable[[nn.Module, dict], torch.Tensor],
    batch: dict,
    config: DictConfig,
    strategy: type[SingleProcess],
    autocast: Callable[[], contextlib.AbstractContextManager],
    is_unpaired: bool = False,
) -> Layout:
    """Choose the fastest way to compute a model that gives what the plain forward does; all workers decide alike."""
    shared_prompt = config.shared_prompt
    if is_unpaired:
        if shared_prompt is True:
            raise UserError("shared_prompt=true: the two responses of unpaired data have prompts of their own")
        shared_prompt = False
    if shared_prompt is False and config.padding_free is False:
        return PLAIN
    make_rows, whole_logits, why = choose_rows(
        model, batch, shared_prompt, config.max_length, strategy, config.padding_free, autocast
    )
    rank0_print(f"Shared prompts: {why}")
    return Layout(make_rows, whole_logits)


def choose_rows(
    model: nn.Module,
    batch: dict,
    setting: bool | str,
    max_length: int,
    strategy: type[SingleProcess] = SingleProcess,
    padding_free: bool | str = False,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> tuple[Callable[[dict], Rows], bool, str]:
    """Find out, on a few examples and on ones of full length, how a model may be computed. All workers decide alike.

    The standard is the model's own forward with a padding mask, at every token; see `OwnForward`. What can be computed
    is not guessed from a model's name or config. It costs a dozen forward passes of at most two examples, five of them
    of full length.

    Args:
        setting: the config's `shared_prompt`: 'auto', True (an error if the model can't) or False.
        max_length: of a sequence, in tokens.
        strategy: where the model's tensors live.
        padding_free: the config's; 'auto' is for GPUs. The model is then one that computes packed rows, too.
        autocast: what training computes under; packed rows are checked under it, as their attention depends on it.

    Returns: the way to lay out batches, whether the logits must be taken whole, and why, to be logged.
    Raises: UserError if a setting is True and the model can't, or if no way gives what the model's own forward does.
    """
    model, batch = unwrap_adapter(model), take(batch, torch.arange(min(2, len(batch["prompt"]))))
    may_share = setting is not False and "rejected_labels" in batch
    with _evaluating(model), torch.no_grad():
        short, full = _own_forwards(model, batch, max_length, strategy)
        whole_logits = full.whole_logits
        may_pack = padding_free is True or (padding_free == "auto" and short.logps.is_cuda)
        why_not = {
            packed_shared_rows: lambda: _why_not_packed(packed_shared_rows, short, full, autocast),
            shared_rows: lambda: _why_not_shared(short, full, max_length),
            packed_rows: lambda: _why_not_packed(packed_rows, short, full, autocast),
            padded_rows: lambda: None,
        }
        left_out = set() if may_pack else set(PACKED)
        left_out |= set() if may_share else set(SHARED)
        left_out |= {shared_rows, padded_rows} if padding_free is True else set()
        left_out |= {packed_rows, padded_rows} if may_share and setting is True else set()
        reasons: dict[Callable, str] = {}
        for make_rows in _SAID:
            if make_rows in left_out:
                continue
            if (reason := why_not[make_rows]()) is None:
                return make_rows, whole_logits, _in_words(model, make_rows, whole_logits, reasons)
            reasons[make_rows] = reason
    key = "padding_free" if padding_free is True else "shared_prompt"
    raise UserError(
        f"{key}=true, but the model {_name(model)} can't: {'; '.join(dict.fromkeys(reasons.values()))}; use {key}=auto"
    )


def _own_forwards(
    model: nn.Module, batch: dict, max_length: int, strategy: type[SingleProcess]
) -> tuple["OwnForward", "OwnForward"]:
    """What ways are held against, of a batch and of full length.

    Raises: UserError if the model's own forward can't compute them, or does something else without a padding mask.
    """
    _check_training_forward(model, batch)
    short = OwnForward(model, batch, True, strategy)
    whole_logits = not _head_gives_logits(model, batch)
    if not whole_logits:
        short.whole_logits = False
        whole_logits = short.difference(padded_rows(batch), REFUSED_BEYOND) is not None
    short.whole_logits = whole_logits
    full = OwnForward(model, full_length_pair(batch, max_length), whole_logits, strategy)
    for own in (short, full) if whole_logits else (full,):
        if (difference := own.difference(padded_rows(own.batch), REFUSED_BEYOND)) is not None:
            raise UserError(
                f"{_name(model)}: without a padding mask {difference}. Is it a causal language model? An encoder "
                "can't be trained so, nor can a model whose tokens depend on the padding behind them"
            )
    return short, full


def _in_words(model: nn.Module, make_rows: Callable, whole_logits: bool, reasons: dict[Callable, str]) -> str:
    """What was chosen, and why no other."""
    said = _SAID[make_rows]
    if shared_rows in reasons and make_rows not in SHARED:
        said = f"prompts are computed twice a pair: {_name(model)} can't share them: {reasons[shared_rows]}"
    if make_rows not in PACKED and (packed := [reasons[way] for way in PACKED if way in reasons]):
        said += f"; with padding: {packed[0]}"
    return f"{said}, its logits whole, as the model does more than apply its output head" if whole_logits else said


def _why_not_packed(make_rows: Callable, short: "OwnForward", full: "OwnForward", autocast: Callable) -> str | None:
    """Why a model can't compute packed rows; None if it can, and then it is ready to."""
    model = short.model
    if not supports_packed_attention(model):
        return f"attn_implementation={model.config._attn_implementation} takes no packed rows; sdpa does"
    use_packed_attention(model)
    with autocast():
        for batch in (short.batch, full.batch):
            own = OwnForward(model, batch, full.whole_logits, full.strategy)
            if (difference := own.difference(make_rows(batch), CHOSEN_WITHIN)) is not None:
                use_packed_attention(model, False)
                return f"in a packed row {difference}"
    return None


def _why_not_shared(short: "OwnForward", full: "OwnForward", max_length: int) -> str | None:
    """Why a model can't compute rows that share a prompt; None if it can."""
    attention = short.model.config._attn_implementation
    if attention not in _DENSE_MASKS:
        return f"attn_implementation={attention} takes no tree mask; {' and '.join(_DENSE_MASKS)} do"
    for own in (short, full):
        if (difference := own.difference(shared_rows(own.batch), CHOSEN_WITHIN)) is not None:
            known = _known_reason(own.model, max_length)
            return f"where the two responses share a row, {difference}{f' ({known})' if known else ''}"
    longest = synthetic_pair(short.batch, 0, max_length, max_length)
    difference = short.failure(shared_rows(longest))
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
        self.whole_logits = whole_logits  # whether it is what is compared that takes the logits whole, too
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

    def difference(self, rows: Rows, slack: float) -> str | None:
        """In words, by how much these rows' log-probabilities differ from its own; None: by no more than `slack` times
        what rounding makes."""
        failure, logps = self._compute(rows)
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

    def failure(self, rows: Rows) -> str | None:
        """The error that computing these rows ends in, in words; None: they can be computed."""
        return self._agreed(self._compute(rows)[0])

    def _compute(self, rows: Rows) -> tuple[str | None, torch.Tensor | None]:
        try:
            return None, token_logps(self.model, rows, self.whole_logits, self.strategy)
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
        dtypes.add(computed_dtype(output))
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
    dtype = computed_dtype(tensor)  # to which the next layer rounds what it takes, at the latest
    if dtype not in (torch.float32, torch.float64):  # float64: parts of some models are in float32 even then
        return torch.finfo(dtype).eps / 2
    if tensor.is_cuda and torch.backends.cuda.matmul.allow_tf32:  # which has as many digits as float16
        return torch.finfo(torch.float16).eps / 2
    return _ACCUMULATED * torch.finfo(torch.float32).eps / 2
