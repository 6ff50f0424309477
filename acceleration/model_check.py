"""Choose the fastest way to compute a model that agrees with the trainer's plain forward.

The check runs at the start of training: on the model, the device and the precision of the run, in training mode. The
standard is the plain forward (`concatenated_forward`) of one pair at a time, without padding: log-probabilities and one
gradient of short pairs, and the log-probabilities of a pair of full length, which attention windows alter. A faster
layout computes the same pairs together, and is used if it agrees up to rounding. How far rounding moves the standard
depends on dtype, depth and weights, so it is measured.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

from acceleration.layout import PLAIN, Layout
from acceleration.measurement import (
    Numbers,
    Standard,
    full_length_batch,
    measure,
    perturbed_by_rounding,
    synthetic_batch,
)
from acceleration.packed_attention import packed_attention_used, supports_packed_attention, use_packed_attention
from acceleration.response_head import head_gives_logits
from distributed import collectives
from distributed.strategies import SingleProcess
from reporting.terminal import still_working
from utils import UserError, first_line, rank0_print, unwrap_adapter

# Limits on a layout's distance from the standard: a multiple of the standard's rounding noise, and absolute limits for
# log-probabilities (nats / √tokens of the response) and gradients (relative). For docs/architectures.md's models,
# correct layouts stay within 0.6 times rounding. In 16 bits, some wrong ones do, too; the absolute limits catch them.
CHOSEN_WITHIN, CHOSEN_AT_MOST = 2, (0.1, 0.15)
REFUSED_BEYOND = 8  # the multiple for the plain forward of a padded batch, which is all that is left
_RANDOM_BEYOND = 0.1  # the multiple for a second computation of the same batch, if the model draws random numbers
_LEAK = 5e-4  # a causal model's `leak` (see `Numbers`) is 0, or at most this after rounding
_DENSE_MASKS = ("eager", "sdpa")  # attention implementations that take a (B, 1, T, T) mask; others may crash on one
_PLAIN_LAYERS = {"attention", "full_attention", "sliding_attention", "chunked_attention", "mlp", "moe"}  # `layer_types`
_SLOW_PARAMETERS = 50_000_000  # larger models take long enough to check that progress is printed


def choose_layout(model: nn.Module, *args, is_trained: bool = True, **kwargs) -> Layout:
    """Choose the fastest correct layout for a model, and print it; takes the arguments of `find_layout`."""
    is_slow = sum(parameter.numel() for parameter in model.parameters()) > _SLOW_PARAMETERS
    work = f"Comparing faster ways to compute {_name(model)} with the plain forward"
    if is_slow:
        rank0_print(f"{work} ...")
    with still_working(work) if is_slow else contextlib.nullcontext():
        layout, message = find_layout(model, *args, is_trained=is_trained, **kwargs)
    if message:
        rank0_print(message if is_trained else f"Reference model: {message}")
    return layout


def find_layout(
    model: nn.Module,
    plain: Callable[[nn.Module, dict], torch.Tensor],
    batch: dict,
    config,
    strategy: type[SingleProcess] = SingleProcess,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    is_unpaired: bool = False,
    is_trained: bool = True,
) -> tuple[Layout, str]:
    """Return the fastest layout that agrees with `plain`, and the line to print; the same on all workers.

    The model is then ready to be computed in that layout.

    Args:
        plain: returns the log-probability of each of a batch's S responses, chosen before rejected: (S,), in nats.
        batch: examples; the check uses their tokens in examples of its own.
        config: its `shared_prompt`, `padding_free` and `max_length` are read.
        strategy: where the model's tensors live.
        autocast: the context that the model is computed in.
        is_unpaired: the two responses of an example have different prompts.
        is_trained: check the model in training mode; a reference is computed in evaluation mode.

    Raises: UserError if the model can't be trained even by the plain forward, or if it doesn't support
        `shared_prompt=true` or `padding_free=true`.
    """
    if is_unpaired and config.shared_prompt is True:
        raise UserError("shared_prompt=true: in unpaired data, no two responses share a prompt; use shared_prompt=auto")
    check = ModelCheck(model, plain, batch, config.max_length, strategy, autocast)
    may_share = "rejected_labels" in batch and not is_unpaired and config.shared_prompt is not False
    with check.mode(is_trained):
        check.measure_plain()
        layouts = _allowed_layouts(config, may_share, check.device.type == "cuda")
        # if one worker must take the logits of every position from the model, all do, so that they run the same code
        must_take_logits = bool(layouts) and not head_gives_logits(check.base, check.short)
        whole_logits = bool(collectives.all_reduce_max(int(must_take_logits)))
        reasons: dict[Layout, str] = {}
        for layout in layouts:
            layout = replace(layout, whole_logits=whole_logits)
            if (reason := check.why_not(layout)) is None:
                break
            reasons[layout] = reason
        else:
            if config.padding_free is True or (may_share and config.shared_prompt is True):
                key = "padding_free" if config.padding_free is True else "shared_prompt"
                why = "; ".join(dict.fromkeys(reasons.values()))
                raise UserError(f"{key}=true, but the model {_name(model)} can't: {why}; use {key}=auto")
            check.check_padding()
            layout = PLAIN
    if layout.is_packed:
        use_packed_attention(check.base)
    return layout, _layout_message(layout, reasons, may_share, check.plain_name)


def _allowed_layouts(config, may_share: bool, on_gpu: bool) -> list[Layout]:
    """Return the faster layouts that the config allows, fastest first; with both settings false, none."""
    if config.shared_prompt is False and config.padding_free is False:
        return []
    sharing = {True: [True], "auto": [True, False], False: [False]}[config.shared_prompt] if may_share else [False]
    packing = {True: [True], "auto": [True, False] if on_gpu else [False], False: [False]}[config.padding_free]
    return [Layout(shares_prompts, is_packed) for shares_prompts in sharing for is_packed in packing]


def _layout_message(layout: Layout, reasons: dict[Layout, str], may_share: bool, plain_name: str) -> str:
    """Return the line that names the chosen layout, and why no faster one is used; it may be empty."""
    # if two layouts that share prompts (or have no padding) were tried, the later reason is given: the slower one's
    unshared = {tried.shares_prompts: reason for tried, reason in reasons.items()}.get(True)
    unpacked = {tried.is_packed: reason for tried, reason in reasons.items()}.get(True)
    parts = []
    if may_share:
        parts.append("Prefix sharing: on" if layout.shares_prompts else f"Prefix sharing: off; {unshared}")
    elif layout.is_plain and reasons:
        parts.append(f"Output head at responses only: off; {list(reasons.values())[-1]}")
    if layout.is_plain and reasons:
        parts.append(f"{plain_name} is used instead")
    elif layout.is_packed:
        parts.append("rows have no padding")
    elif unpacked and unpacked != unshared:
        parts.append(f"rows are padded: {unpacked}")
    if layout.whole_logits:
        parts.append("logits at every position, because the model modifies its output head's result")
    line = "; ".join(parts)
    return line[:1].upper() + line[1:]


class ModelCheck:
    """Compares layouts of batches with the plain forward of each example alone."""

    def __init__(self, model: nn.Module, plain: Callable, batch: dict, max_length: int, strategy, autocast: Callable):
        self.model, self.base, self.plain = model, unwrap_adapter(model), plain
        self.strategy, self.autocast, self.max_length = strategy, autocast, max_length
        self.device = self.base.get_input_embeddings().weight.device
        self.gpus = list({parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"})
        self.short = synthetic_batch(batch, [(min(n, max_length) // 2, min(n, max_length)) for n in (12, 32, 64)])
        self.full_length = full_length_batch(batch, max_length)
        self.longest = synthetic_batch(batch, [(0, max_length)])  # a row of both responses without a prompt
        self.plain_name = "concatenated_forward" if "rejected_labels" in batch else "plain_logps"

    @contextlib.contextmanager
    def mode(self, is_trained: bool) -> Iterator[None]:
        """Put the model into training or evaluation mode; restore its mode and the random generators afterwards."""
        was_training = self.model.training
        self.model.train(is_trained)
        try:
            with torch.random.fork_rng(self.gpus):
                yield
        finally:
            self.model.train(was_training)

    def measure_plain(self):
        """Compute the standard, and how far rounding moves it.

        Raises: UserError if the model fails, sees the tokens that it must predict, or gives random results.
        """
        try:
            numbers, draws = self._alone(self.full_length, seed=0)
            with perturbed_by_rounding(self.base):
                perturbed = self._alone(None, seed=0)[0]
            again = self._alone(None, seed=1)[0] if collectives.all_reduce_max(int(draws)) else None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise self._cannot_compute(error) from error
        self.standard = Standard(numbers, perturbed, [self.short, self.full_length])
        problem = None
        if not (numbers.logps.isfinite().all() and numbers.gradient.isfinite().all()):
            problem = "its log-probabilities or their gradient aren't finite. Check its weights, or try a wider dtype"
        elif numbers.leak > _LEAK:
            problem = (
                "its predictions depend on the very tokens that they predict. Is it a causal language model? An "
                "encoder can't be trained this way; some can be set up as decoders in their config.json (is_decoder)"
            )
        elif again is not None and self.standard.distances(again)[0] > _RANDOM_BEYOND * self.standard.rounding[0]:
            problem = (
                "its results are random in training, although dropout is off: two forward passes of the same tokens "
                f"differ by {self.standard.nats(again):.2g} nats. Choose a model without random routing"
            )
        if problem := self._agreed(problem):
            raise UserError(f"{_name(self.model)}: {problem}")

    def check_padding(self):
        """Raise UserError if the plain forward of a padded batch differs from that of each example alone."""
        if problem := self._compare(self.plain, None, REFUSED_BEYOND):
            raise UserError(
                f"{_name(self.model)} is wrong on padded batches: {problem}. padding_free=true computes without "
                "padding, if the model's attention supports it; otherwise choose another model"
            )

    def why_not(self, layout: Layout) -> str | None:
        """Return why a layout can't be used; None if it agrees with the standard."""
        attention, reads_masks = self.base.config._attn_implementation, layout.shares_prompts and not layout.is_packed
        if layout.is_packed and not supports_packed_attention(self.base):
            return f"model.attn_implementation={attention} doesn't support packed rows; sdpa does"
        if reads_masks and attention not in _DENSE_MASKS:
            return f"model.attn_implementation={attention} doesn't support tree masks; {' and '.join(_DENSE_MASKS)} do"
        if reason := _excluding_design(self.base, layout, self.max_length):
            return reason
        compute = functools.partial(layout.response_logps, strategy=self.strategy)
        n_positions = getattr(self.base.config.get_text_config(), "max_position_embeddings", None) or 0
        longest = self.longest if reads_masks and n_positions < 2 * self.max_length else None
        with packed_attention_used(self.base) if layout.is_packed else contextlib.nullcontext():
            reason = self._compare(compute, self.full_length, CHOSEN_WITHIN, CHOSEN_AT_MOST, longest)
        if reason and reads_masks and "position_ids" not in inspect.signature(self.base.forward).parameters:
            reason += "; the model takes no position_ids"
        return reason

    def _alone(self, full_length: dict | None, seed: int) -> tuple[Numbers, bool]:
        """Return the plain numbers of each example alone, and True if the model drew random numbers for them."""
        torch.manual_seed(seed)
        before = self._random_state()
        numbers = measure(self.model, self.plain, self.short, full_length, self.autocast, alone=True)
        return numbers, not torch.equal(self._random_state(), before)

    def _random_state(self) -> torch.Tensor:
        return torch.cat([torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in self.gpus)])

    def _compare(
        self,
        compute: Callable,
        full_length: dict | None,
        within: float,
        at_most: tuple[float, float] = (float("inf"), float("inf")),
        longest: dict | None = None,
    ) -> str | None:
        """Return how a computation differs from the standard, or how it fails; None if it is correct.

        Args:
            compute: see `measure`.
            within, at_most: see `Standard.difference`.
            longest: a batch that must also be computed without an error; its results aren't compared.
        """
        try:
            numbers = measure(self.model, compute, self.short, full_length, self.autocast)
            reason = self.standard.difference(numbers, within, at_most)
            if longest is not None and reason is None:
                with torch.no_grad(), self.autocast():
                    compute(self.model, longest)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a forward of another form, or a compiler, may raise anything
            reason = f"the forward pass fails with {_shortened(error)}"
        return self._agreed(reason)

    @staticmethod
    def _agreed(problem: str | None) -> str | None:
        """Return a problem on all workers if any worker has one."""
        is_any = collectives.all_reduce_max(int(problem is not None))
        return (problem or "it failed the check on another worker") if is_any else None

    def _cannot_compute(self, error: Exception) -> UserError:
        return UserError(
            f"{_name(self.model)}: {self.plain_name} fails on sequences of up to {self.max_length} tokens, with "
            f"{_shortened(error)}. If they are too long for the model, lower max_length; if its attention fails, set "
            f"model.attn_implementation to sdpa or eager (now {self.base.config._attn_implementation})"
        )


def _excluding_design(model: nn.Module, layout: Layout, max_length: int) -> str | None:
    """Return why a model's design makes a layout's numbers wrong; None if it doesn't.

    A comparison isn't enough: in 16 bits, the error may be within rounding. Attention windows rule out only layouts
    with a tree mask, where the rejected response lies behind the chosen one; packed attention applies windows itself. A
    window of max_length - 1 tokens is long enough, because the output of a sequence's last token is never used.
    """
    if not (layout.shares_prompts or layout.is_packed):
        return None
    config = model.config.get_text_config()
    kinds, is_stateful = set(getattr(config, "layer_types", None) or ()), getattr(model, "_is_stateful", False)
    others = kinds - _PLAIN_LAYERS
    if (is_stateful and (others or not kinds)) or any("attention" not in kind or "linear" in kind for kind in others):
        return "the model has recurrent layers"
    if layout.is_packed:
        return None
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "") == "alibi":
        return "the model's positions are ALiBi biases"
    if "local" in getattr(config, "attention_layers", ()) and config.window_size < 2 * max_length:  # GPT-Neo's
        return f"the model's local attention (window of {config.window_size}) ignores position_ids"
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    windows = [window for window in windows if isinstance(window, int) and 0 < window < max_length - 1]
    return f"the model attends to a window of {min(windows)} tokens, max_length is {max_length}" if windows else None


def _name(model: nn.Module) -> str:
    return type(unwrap_adapter(model)).__name__.removeprefix("FSDP")


def _shortened(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)[:200]}"
