"""What a trainer computes: the log-probabilities of responses under policy and reference, a microbatch at a time."""

import contextlib
import functools
from collections.abc import Callable

import torch
from omegaconf import DictConfig
from torch import nn

from acceleration import memory_plan
from acceleration.capacity import measure_activations, microbatch_overhead
from acceleration.compiled import compile_blocks
from acceleration.model_check import choose_rows, full_length_pair
from acceleration.overflow import check_no_overflow
from acceleration.prefix_sharing import Layout
from acceleration.reference_cache import LogpsCache, open_cache
from acceleration.response_head import response_logps
from acceleration.shadow_weights import shadow_linear_weights
from checkpointing.preemption import StopSignal
from data.batches import BatchIterator, mismatch
from data.microbatches import microbatches
from distributed import collectives
from distributed.strategies import SingleProcess
from losses import Loss
from models import check_reference_fits
from optimization import state_bytes, step_one_by_one, steps_by_foreach
from references import Reference, make_reference, make_starting_reference, reference_source, resolved_reference
from utils import UserError, rank0_print


class PolicyAndReference:
    """Two models and what lies between a batch and the log-probabilities that a loss takes.

    The trainers set what is declared here.
    """

    config: DictConfig
    policy: nn.Module
    policy_mp: torch.dtype | None  # what the policy is computed in; None: in the dtype of its weights
    reference: Reference | None
    reference_cache: LogpsCache | None
    loss: Loss
    strategy: SingleProcess
    device: torch.device
    optimizer: torch.optim.Optimizer
    stop: StopSignal
    layout: Layout  # of batches for the policy ...
    reference_layout: Layout  # ... and for the reference
    train_iterator: BatchIterator
    eval_iterator: BatchIterator

    # ---- setting up -------------------------------------------------------------------------------------------------

    def _choose_layout(self, model: nn.Module) -> Layout:
        """How this model is computed; see `model_check.choose_rows`."""
        config, shared_prompt = self.config, self.config.shared_prompt
        if self.eval_iterator.is_unpaired or self.train_iterator.is_unpaired:
            if shared_prompt is True:
                raise UserError("shared_prompt=true: the two responses of unpaired data have prompts of their own")
            shared_prompt = False
        make_rows, whole_logits, why = choose_rows(
            model, self.eval_iterator.first(2), shared_prompt, config.max_length, self.strategy, config.padding_free,
            functools.partial(self.autocast, model),
        )  # fmt: skip
        rank0_print(f"Shared prompts: {why}")
        return Layout(make_rows, whole_logits)

    def _set_up_reference(self, reference_model: nn.Module | Callable[[], nn.Module | None] | None):
        """Get the reference ready: a model, or the policy under another adapter. One that is to be precomputed is left
        to `precompute_reference`."""
        self.reference: Reference | None = None
        self.reference_cache: LogpsCache | None = None
        config = self.config
        if not self.loss.needs_reference(config.loss):
            return
        if reference_model is None:
            raise ValueError(f"loss={config.loss.name} needs a reference_model")

        def load() -> nn.Module:
            model = reference_model if isinstance(reference_model, nn.Module) else reference_model()
            model = self.strategy.distribute(model, is_policy=False)
            if reference_source(config).given:
                check_reference_fits(model, self.policy, self.tokenizer, config)
            if reference_source(config).given or self.layout.is_packed:  # which depends on its dtype, too
                self.reference_layout = self._choose_layout(model)
            batch, layout = self.eval_iterator.first(2), self.reference_layout
            check_no_overflow(
                model, lambda model: response_logps(model, layout.rows(batch), layout.whole_logits, self.strategy)
            )
            if config.compile:
                compile_blocks(model, None if reference_source(config).given else config.model.block_name)
            return model

        kind = resolved_reference(config)
        rank0_print(f"Reference: {kind}{', precomputed' if config.precompute_ref_log_probs else ''}")
        self._load_reference = load
        if not config.precompute_ref_log_probs:
            self.reference = make_reference(kind, self.policy, load)

    def _set_up_computation(self):
        """Prepare what depends on device and optimizer: copies of weights, the largest microbatch, compiled blocks."""
        config = self.config
        if self.policy_mp is not None and not self.strategy.splits_tensors:
            shadow_linear_weights(self.policy, self.optimizer)
        self.microbatch_overhead = microbatch_overhead(self.policy, self.device)
        fitting = self._plan_memory() if self.device.type == "cuda" else None
        self.max_tokens = config.max_tokens_per_microbatch or fitting
        if config.compile:
            compile_blocks(self.policy, config.model.block_name)

    def _plan_memory(self) -> int | None:
        """Print what the GPU will hold; return the most tokens of a microbatch for which there is memory.

        Raises: UserError if the run doesn't fit.
        """
        config = self.config
        rows = self.layout.rows(full_length_pair(self.eval_iterator.first(2), config.max_length))
        reference = self.reference.model if self.reference is not None else None
        with memory_plan.explained_out_of_memory(config):
            activations = measure_activations(
                self.policy,
                rows,
                functools.partial(self.autocast, self.policy),
                self.layout.whole_logits,
                self.strategy,
            )
        plans = memory_plan.memory_plans(
            self.policy,
            None if reference is self.policy else reference,
            state_bytes(self.optimizer),
            activations,
            self.policy_mp or self.policy.dtype,
            gathers_blocks=self.strategy.shards_batches,
        )
        for plan in plans:
            rank0_print(plan)
        if warning := memory_plan.check_fits(plans, config, rows.input_ids.numel() // len(rows.input_ids)):
            rank0_print(warning)
        if steps_by_foreach(self.optimizer, self.device) and not all(plan.foreach_fits for plan in plans):
            rank0_print("Optimizer: one weight tensor after the other, as memory is short")
            step_one_by_one(self.optimizer)
        cap = memory_plan.cap_of(plans)
        return cap and -collectives.all_reduce_max(-cap)  # all workers alike

    def precompute_reference(self):
        """With `precompute_ref_log_probs`, fill the cache with the reference's log-probabilities of all pairs, once.

        The reference is made of the weights that the policy starts from, and loaded only if some pairs are missing.
        Then it leaves memory, unless it is the policy under another adapter.

        Raises: Stopped if a signal asked for it; what had been computed by then is in the cache, to 1,024 pairs.
        """
        config = self.config
        to_do = self.loss.needs_reference(config.loss) and config.precompute_ref_log_probs
        if not to_do or self.reference_cache is not None:
            return
        kind = resolved_reference(config)
        reference = functools.cache(lambda: make_starting_reference(kind, self.policy, config, self._load_reference))
        cache = open_cache(self.policy, kind, config, reference)

        def compute(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
            self.stop.check()
            with reference().active() as model:
                return self.concatenated_forward(model, batch)

        def split(batch: dict) -> list[dict]:
            return self.microbatches(batch, n_least=-(-len(batch["prompt"]) // config.eval_batch_size))

        cache.fill({"training": self.train_iterator, "evaluation": self.eval_iterator}, compute, split)
        self.reference_cache = cache
        if kind != "model":  # it costs no memory: keep it for sampling
            self.reference = make_reference(kind, self.policy, self._load_reference)
        elif config.sample_during_eval:
            rank0_print("The reference leaves memory: samples are drawn from the policy alone")

    # ---- log-probabilities ------------------------------------------------------------------------------------------

    def response_logps(self, model: nn.Module, batch: dict) -> torch.Tensor:
        """Log-probability of each of the batch's responses under `model`, chosen before rejected, in nats."""
        layout = self.layout if model is self.policy else self.reference_layout
        with self.autocast(model):
            return response_logps(model, layout.rows(batch), layout.whole_logits, self.strategy)

    def autocast(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """What a model is computed under: mixed precision is the policy's."""
        if self.policy_mp is None or model is not self.policy:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.policy_mp)

    def concatenated_forward(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the chosen and the rejected responses, each (batch_size,), in one pass over both."""
        chosen_logps, rejected_logps = self.response_logps(model, batch).chunk(2)
        return chosen_logps, rejected_logps

    def reference_logps(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference's log-probabilities of both responses; without a reference (reference_free), zeros."""
        if self.reference_cache is not None:
            dtype = torch.promote_types(self.policy.dtype, torch.float32)
            return self.reference_cache.lookup(batch, dtype, self.device)
        if self.reference is None:
            zeros = torch.zeros(len(batch["prompt"]), device=self.device)
            return zeros, zeros
        with self.reference.active() as model:
            chosen_logps, rejected_logps = self.concatenated_forward(model, batch)
        return chosen_logps.to(self.device), rejected_logps.to(self.device)  # the reference may be on another GPU

    def estimate_kl(self, batch: dict) -> torch.Tensor:
        """KL divergence of the policy from the reference (nats), as KTO estimates it for a whole batch of all workers.

        It is the mean log-ratio of responses to other prompts of the batch, or 0 if that is negative; shape (), without
        gradient (Section 4.1 of https://arxiv.org/abs/2402.01306).
        """
        sum_and_count = torch.zeros(2, dtype=torch.float64, device=self.device)
        for microbatch in self.microbatches(mismatch(batch), n_least=1):
            with torch.no_grad():
                policy_logps = torch.stack(self.concatenated_forward(self.policy, microbatch))  # (2, B)
            counted = self._counted(microbatch)
            logratios = (policy_logps - torch.stack(self.reference_logps(microbatch))).where(counted, 0)
            sum_and_count += torch.stack([logratios.sum(), 2 * counted.sum()]).double()
        if self.is_sharded:
            sum_and_count = collectives.all_reduce_sum(sum_and_count)
        kl_estimate = (sum_and_count[0] / sum_and_count[1]).clamp(min=0)
        return kl_estimate.to(torch.promote_types(self.policy.dtype, torch.float32))

    # ---- microbatches -----------------------------------------------------------------------------------------------

    def microbatches(self, batch: dict, n_least: int, agree: Callable[[int], int] | None = None) -> list[dict]:
        """The batch cut into microbatches of similar length; see `data.microbatches`.

        `agree`: how workers agree on their number; None: as the main thread does.
        """
        agree = {"agree": agree or collectives.all_reduce_max} if self.is_sharded else {}
        return microbatches(
            batch, n_least, self.layout.is_shared, self.microbatch_overhead, self.layout.is_packed,
            self.max_tokens, **agree,
        )  # fmt: skip

    def _prepared(self, batch: dict, agree: Callable[[int], int] | None = None) -> dict:
        """The batch with its microbatches, and these with their rows; `agree`: see `microbatches`."""
        layouts, pin_memory = dict.fromkeys([self.layout, self.reference_layout]), self.device.type == "cuda"
        parts = self.microbatches(batch, self.config.gradient_accumulation_steps, agree)
        for layout in layouts:
            parts = [layout.prepare(part, pin_memory) for part in parts]
        return batch | {"microbatches": parts}

    def _counted(self, batch: dict) -> torch.Tensor:
        """Which examples count, (batch_size,): not those that fill up an evaluation batch for all workers."""
        if "index" not in batch:  # of training
            return torch.ones(len(batch["prompt"]), dtype=torch.bool, device=self.device)
        return torch.tensor([i is not None for i in batch["index"]], device=self.device)

    @property
    def is_sharded(self) -> bool:
        """Whether other workers compute other shards of each batch."""
        return self.strategy.batch_shard[1] > 1
