"""The training loop, and the trainers, which differ only in where a model's tensors live."""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.distributed import ProcessGroup

import models
import references
from acceleration.compiled import compile_blocks
from acceleration.layout import PLAIN, Layout
from acceleration.model_check import choose_layout
from acceleration.out_of_memory import out_of_memory_explained
from acceleration.overflow import check_no_overflow
from acceleration.packed_attention import use_packed_attention
from acceleration.reference_cache import LogpsCache, fill_cache
from acceleration.speed_up import speed_up
from acceleration.whole_batch_losses import whole_batch_losses
from basics.printing import counted
from checkpointing import best, train_state
from checkpointing.background import Background
from checkpointing.checkpoints import check_shared
from checkpointing.saving import begin_save, save_step
from checkpointing.stop_signal import Stopped, StopSignal
from commands.output import quiet_libraries
from config_checks.datasets import chosen_datasets, hub_names
from data import hub
from data.batches import prefetched
from data.microbatches import computed_tokens, microbatches
from distributed import collectives
from distributed.environment import use_deterministic_algorithms, use_expandable_segments
from distributed.strategies import STRATEGIES
from evaluation import sampling
from log_probabilities import (
    _get_batch_logps,
    concatenated_inputs,
    on_policy_weights,
    response_lengths,
    shared_lengths,
    with_first_labels,
)
from losses import find_loss, preference_loss  # noqa: F401 (users of the original import it from here)
from objectives.declaration import Memory
from optimization import lr_multiplier, make_optimizer, rate_warning
from preference_datasets import open_batches
from reporting.metrics import check_finite, mean_metrics, response_metrics, reward_metrics
from reporting.run_log import RunLog
from reporting.terminal import progressing, training_bar
from reporting.usage import Throughput, n_parameters, parameters_in_words
from utils import (
    UserError,
    get_block_class_from_model,
    get_local_dir,
    on_device,
    rank0_print,
    unwrap_adapter,
    widest_dtype,
)

torch.backends.cuda.matmul.allow_tf32 = True
ModelOrLoader = nn.Module | Callable[[], nn.Module | None]  # a model, or a function that loads it


class BasicTrainer:
    """Trains a language model with SFT or a preference loss in one process.

    On a machine with several GPUs, loading spreads the model's layers over them: their memory adds up, but they compute
    in turn.
    """

    strategy_class = STRATEGIES["BasicTrainer"]

    def __init__(
        self,
        policy: ModelOrLoader,
        config: DictConfig | dict,
        seed: int,
        run_dir: str,
        reference_model: ModelOrLoader | None = None,
        rank: int = 0,
        world_size: int = 1,
        purpose: str = "train",
    ):
        """Load the data, then get the models and the optimizer ready.

        On each machine, only the first worker passes models, or functions that load them. The others pass functions
        that return None.

        Args:
            policy: the model to train, or a function that loads it, which is called after the data have been read.
            config: all keys, as `compose_config` returns them.
            reference_model: the model to compare with, or a function that loads it, which is called only if needed.
            purpose: "sample" loads only the models; "evaluate" loads evaluation data, too; "train" loads all data and
                makes an optimizer.
        """
        config = OmegaConf.create(config) if isinstance(config, dict) else config
        self.config, self.seed, self.run_dir = config, seed, run_dir
        self.rank, self.world_size = rank, world_size
        self.loss, self.loss_memory = find_loss(config.loss), Memory()
        self.policy_mp = getattr(torch, config.model.policy_mp) if config.model.policy_mp else None
        self.strategy = self.strategy_class(config)
        self.is_sharded = self.strategy.batch_shard[1] > 1  # other workers compute the other shards of each batch
        self.moves_reference = config.reference_update_every is not None
        self.state = train_state.TrainState()
        self.stop, self.background = StopSignal(), Background()
        self.run_log: RunLog | None = None
        self.tokenizer = models.load_tokenizer(config)
        self.train_iterator = self.eval_iterator = self.optimizer = self.scheduler = None
        if purpose != "sample":
            self._load_data(trains=purpose == "train")
        self._set_up_policy(policy)
        self._set_up_reference(reference_model)
        if purpose == "train":
            self._set_up_optimizer()
        self.microbatch_overhead, self.max_tokens = speed_up(self)
        rank0_print(parameters_in_words(*n_parameters(self.policy)))
        self.throughput = Throughput(self.policy, self.reference and self.reference.model, world_size)

    # ---- setting up -------------------------------------------------------------------------------------------------

    def _load_data(self, trains: bool):
        """Open the training batches and load all evaluation batches: this worker's shard of each."""
        config, shard = self.config, self.strategy.batch_shard
        self.train_iterator, self.eval_iterator = open_batches(
            config, chosen_datasets(config), self.tokenizer, self.seed, shard, trains
        )
        if self.world_size > 1:
            from data.shared_text import share_text

            share_text([self.train_iterator, self.eval_iterator], get_local_dir(config.local_dirs))
        if trains and (warning := rate_warning(config, self.train_iterator.n_batches)):
            rank0_print(warning)
        self.eval_batches = [
            {**batch, "index": self.eval_iterator.indices(number)} for number, batch in enumerate(self.eval_iterator)
        ]
        self.n_eval_examples = n_examples = self.eval_iterator.n_examples
        if config.sample_during_eval and config.n_eval_model_samples > n_examples:
            n_samples, all_examples = config.n_eval_model_samples, counted(n_examples, "example")
            rank0_print(f"WARNING: n_eval_model_samples={n_samples}, but the evaluation has only {all_examples}")

    def _set_up_policy(self, policy: ModelOrLoader):
        config = self.config
        policy = policy if isinstance(policy, nn.Module) else policy()
        if policy is not None and config.model.block_name is not None:  # sharding renames the blocks' classes
            get_block_class_from_model(policy, config.model.block_name)
        self.policy = self.strategy.distribute(policy, is_policy=True)
        models.set_end_tokens(self.policy, self.tokenizer)
        self.device = self.strategy.device(self.policy)
        # for checkpoints; read now, because the hub may be unreachable later
        self.dropout_rates = models.configured_dropout_rates(config) if self.rank == 0 else {}
        models.check_tokenizer_fits(self.policy, self.tokenizer, config)
        if config.model.router_aux_loss_coef is not None:
            models.check_has_router(self.policy, config.model.router_aux_loss_coef)
        self.layout = self.reference_layout = self._choose_layout(self.policy)

    def _choose_layout(self, model: nn.Module) -> Layout:
        """Compare the faster layouts with the plain forward, and choose the fastest that agrees with it."""
        if self.eval_iterator is None:  # no data to compare them on
            return PLAIN
        opened = [split for split in (self.train_iterator, self.eval_iterator) if split is not None]
        return choose_layout(
            model, self.plain_logps, self.eval_iterator.first_examples(2), self.config, self.strategy,
            functools.partial(self.autocast, model),
            is_unpaired=any(split.is_unpaired for split in opened),
            is_trained=model is self.policy,
        )  # fmt: skip

    def _set_up_reference(self, reference_model: ModelOrLoader | None):
        """Make the reference, unless it is precomputed; then `precompute_reference` makes it."""
        self.reference: references.Reference | None = None
        self.reference_cache: LogpsCache | None = None
        config = self.config
        if not self.loss.needs_reference(config.loss):
            return
        if config.reference == "auto":  # the config hasn't passed `check_config`
            is_model = isinstance(reference_model, nn.Module)
            config.reference = "model" if is_model else references.resolved_reference(config)
        if reference_model is None and config.reference == "model":
            raise UserError(
                f"loss={config.loss.name} needs a reference_model: BasicTrainer(..., reference_model=MODEL)"
            )
        if reference_model is self.policy:
            raise UserError("reference_model is the policy itself, so it would learn nothing: copy.deepcopy(policy)")
        self._reference_model = reference_model
        rank0_print(f"Reference: {config.reference}{', precomputed' if config.precompute_ref_log_probs else ''}")
        if not config.precompute_ref_log_probs:
            self.reference = references.make_reference(config.reference, self.policy, self.load_reference)

    def load_reference(self) -> nn.Module:
        """Load a second model as the reference, and check that the policy can be compared with it."""
        config, model = self.config, self._reference_model
        is_other_model = bool(references.reference_source(config).given)
        model = model if isinstance(model, nn.Module) else model()
        model = self.strategy.distribute(model, is_policy=False)
        if is_other_model:
            models.check_reference_fits(model, self.policy, self.tokenizer, config)
        if self.moves_reference:
            references.check_reference_can_move(model, self.policy, config)
        if self.eval_iterator is not None and model.dtype == torch.float16:
            check_no_overflow(model, lambda model: self.plain_logps(model, self.eval_iterator.first_examples(2)))
        if is_other_model or (self.layout.is_packed and not references.reference_has_policy_precision(config)):
            self.reference_layout = self._choose_layout(model)  # the dtype decides whether packed rows agree
        elif self.layout.is_packed:
            use_packed_attention(unwrap_adapter(model))
        if config.compile:
            compile_blocks(model, None if is_other_model else config.model.block_name)
        return model

    def precompute_reference(self):
        """With `precompute_ref_log_probs`, compute all log-probabilities of the reference; later calls do nothing.

        Raises: Stopped after a signal.
        """
        config = self.config
        is_needed = self.loss.needs_reference(config.loss) and config.precompute_ref_log_probs
        if is_needed and self.reference_cache is None:
            self.reference_cache = fill_cache(self)
            if config.reference != "model":  # this reference shares the policy's weights, so samples can use it
                self.reference = references.make_reference(config.reference, self.policy, self.load_reference)
            elif config.sample_during_eval:
                rank0_print("Reference freed: samples come from the policy only")

    def _set_up_optimizer(self):
        config = self.config
        if config.activation_checkpointing:
            self.policy.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self.optimizer = make_optimizer(self.policy, config, self.device, self.strategy.optimizer_args)
        multiplier = lr_multiplier(config, self.train_iterator.n_batches)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, multiplier)

    # ---- log-probabilities and loss -------------------------------------------------------------------------------

    def concatenated_forward(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probabilities of the chosen and the rejected responses, each (batch_size,), in nats.

        This forward pass and `_get_batch_logps` define the computation. A faster layout that gives other numbers isn't
        used (`acceleration.model_check`).
        """
        inputs = {key: value.to(self.device) for key, value in concatenated_inputs(batch).items()}
        logits = model(
            inputs["concatenated_input_ids"], attention_mask=inputs["concatenated_attention_mask"], use_cache=False
        ).logits  # (2B, T, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        all_logps = _get_batch_logps(logits, inputs["concatenated_labels"])
        return all_logps.chunk(2)

    def plain_logps(self, model: nn.Module, batch: dict) -> torch.Tensor:
        """Return the log-probability of each response by the plain forward, in nats: all chosen, then all rejected.

        Shape: (2 * batch_size,); in SFT, (batch_size,).
        """
        if "rejected_labels" in batch:
            return torch.cat(self.concatenated_forward(model, batch))
        keys = ("chosen_input_ids", "chosen_attention_mask", "chosen_labels")
        input_ids, attention_mask, labels = (batch[key].to(self.device) for key in keys)
        logits = model(input_ids, attention_mask=attention_mask, use_cache=False).logits  # (B, T, V)
        return _get_batch_logps(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)

    def response_logps(self, model: nn.Module, batch: dict, n_first: torch.Tensor | None = None) -> torch.Tensor:
        """Return the log-probabilities that `plain_logps` would return, (S,), computed in the model's layout.

        `n_first`: (S,); if given, also return the log-probability of each response's first `n_first` tokens: (2, S).
        """
        layout = self.layout if model is self.policy else self.reference_layout
        with self.autocast(model):
            if not layout.is_plain:
                return layout.response_logps(model, batch, self.strategy, n_first)
            if n_first is None:
                return self.plain_logps(model, batch)
            return torch.stack([self.plain_logps(model, part) for part in (batch, with_first_labels(batch, n_first))])

    def autocast(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """Return autocast to `model.policy_mp`; for a reference with a dtype of its own, a context that does nothing.

        FSDP also casts weights when it gathers them (`distributed.fsdp`); other trainers cast them once per step
        (`acceleration.shadow_weights`).
        """
        has_own_dtype = model is not self.policy and not references.reference_has_policy_precision(self.config)
        if self.policy_mp is None or has_own_dtype:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.policy_mp)

    def reference_logps(self, batch: dict, n_first: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the reference's log-probabilities of both responses; without a reference (reference_free), zeros."""
        if self.reference_cache is not None:
            dtype = torch.promote_types(self.policy.dtype, torch.float32)
            return self.reference_cache.lookup(batch, dtype, self.device)
        if self.reference is None:
            zeros = torch.zeros(len(batch["prompt"]), device=self.device)
            return zeros, zeros
        with self.reference.active() as model:
            logps = self.response_logps(model, batch, n_first).to(self.device)  # the reference may be on another GPU
        return logps.chunk(2, dim=-1)

    def loss_inputs(
        self, batch: dict, policy_logps: torch.Tensor, n_first: torch.Tensor | None, loss_config: Mapping
    ) -> dict[str, torch.Tensor]:
        """Return the inputs of a loss, (batch_size,) each: log-probabilities (nats), lengths (tokens) and weights.

        `policy_logps`: the policy's, as `response_logps` returns them for this `n_first`.
        """
        sides = ("chosen", "rejected") if self.loss.needs_pairs else ("chosen",)
        logps, inputs = {"policy": policy_logps}, {}
        if self.loss.needs_pairs:
            logps["reference"] = torch.cat(self.reference_logps(batch, n_first), -1)
        for model, of_model in logps.items():
            for side, values in zip(sides, of_model.chunk(len(sides), -1), strict=True):
                if values.ndim == 2:  # (2, batch_size)
                    values, inputs[f"{model}_{side}_shared_logps"] = values
                inputs[f"{model}_{side}_logps"] = values
        for side in sides:
            inputs[f"{side}_lengths"] = response_lengths(batch[f"{side}_labels"]).to(self.device, non_blocking=True)
        if self.loss.needs_weights(loss_config):
            inputs["chosen_weights"], inputs["rejected_weights"] = self._on_policy_weights(batch).chunk(2)
        return inputs

    def _on_policy_weights(self, batch: dict) -> torch.Tensor:
        """Return WPO's weight of each response, (2 * batch_size,), from another plain forward pass without gradient."""
        input_ids, attention_mask, labels = on_device(concatenated_inputs(batch), self.device).values()
        with torch.no_grad(), self.autocast(self.policy):
            logits = self.policy(input_ids, attention_mask=attention_mask, use_cache=False).logits  # (2B, T, V)
        return on_policy_weights(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)

    def _loss_functions(self, batch: dict, microbatches: list[dict], train: bool) -> list[Callable]:
        """Return a loss function of inputs and options for each microbatch of a batch."""
        if self.loss.needs_batch:
            return whole_batch_losses(self, batch, microbatches, train)
        return [self.loss.compute] * len(microbatches)

    def get_batch_metrics(
        self, batch: dict, loss_config: Mapping, train: bool = True, loss: Callable | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the mean loss of a batch, and each metric for every example: tensors of shape (batch_size,).

        Args:
            loss: the loss function of a microbatch (see `_loss_functions`); None if `batch` is a whole batch.
        """
        split, router_coef = "train" if train else "eval", self.config.model.router_aux_loss_coef
        n_first = shared_lengths(batch) if self.loss.needs_shared_logps(loss_config) else None
        with contextlib.nullcontext() if router_coef is None else models.router_losses(self.policy) as aux_losses:
            policy_logps = self.response_logps(self.policy, batch, n_first)
        inputs = self.loss_inputs(batch, policy_logps, n_first, loss_config)
        loss = loss or self._loss_functions(batch, [batch], train)[0]
        losses, rewards, parts = loss(inputs, loss_config)
        metrics = reward_metrics(split, *rewards) if rewards else {}
        if router_coef is not None:
            aux_loss = aux_losses[0].to(losses.device)
            losses = losses + router_coef * aux_loss
            metrics[f"aux_loss/{split}"] = aux_loss.detach().expand(len(losses))  # the microbatch's, for each example
        averaged = loss_config.get("average_log_prob", False)
        for side in ("rejected", "chosen") if self.loss.needs_pairs else ("chosen",):
            logps = inputs[f"policy_{side}_logps"].detach()
            metrics[f"logps_{split}/{side}"] = logps / inputs[f"{side}_lengths"] if averaged else logps
        metrics[f"loss/{split}"] = losses.detach()
        metrics |= {f"loss_{split}/{name}": values for name, values in parts.items()}
        return losses.mean(), metrics | response_metrics(split, inputs, self.loss.needs_reference(loss_config))

    # ---- training -------------------------------------------------------------------------------------------------

    def train(self):
        """Train to the end of the data, with evaluations and checkpoints on the way, and evaluate once more.

        Raises: Stopped after a signal; LATEST then holds the current state.
        """
        if self.config.precompute_ref_log_probs:
            self.precompute_reference()
        # workers with different prompts draw different samples
        train_state.seed_generators(self.seed + self.strategy.batch_shard[0])
        if self.state.rng_states:
            train_state.restore_rng_state(self.state.rng_states, *self.strategy.batch_shard)
        if self.rank == 0:
            self.run_log = RunLog(
                self.config, self.run_dir, self.train_iterator.n_examples, self.train_iterator.epoch_size, self.state
            )
        if self.config.checkpoint_format == "sharded":
            check_shared(self.run_dir)
        n_batches, n_done = self.train_iterator.n_batches, self.state.batches
        bar = training_bar(self._training_batches(skip=n_done), n_batches, n_done)
        with self.run_log or contextlib.nullcontext(), contextlib.closing(bar), self.background:
            try:
                for batch in bar:
                    self._evaluate_and_save_where_due()
                    if self.config.stop_when_worse and best.stops_early(self.state, self.config):
                        best.print_stop_reason(self.state)
                        break
                    self.log("train", self.train_step(batch))
                    bar.set_postfix_str(self.run_log.recent if self.run_log else "", refresh=False)
                    self.stop.check()
                if self.state.evaluated_at != self.state.examples:
                    self.evaluate_and_log()
                    if self.config.keep_best and best.should_save_best(self.state, self.config):
                        save_step(self)
            except Stopped:
                if self.state.saved_at != self.state.examples:
                    self.save()
                raise

    def _evaluate_and_save_where_due(self):
        """Evaluate every `eval_every` examples, save every `save_every`; never twice at the same number of examples."""
        examples = self.state.examples
        evaluates = examples % self.config.eval_every == 0 and (examples > 0 or self.config.do_first_eval)
        saves = examples % (self.config.save_every or self.config.eval_every) == 0 and examples > 0
        if evaluates and self.state.evaluated_at != examples:
            self.evaluate_and_log()
        is_best = self.config.keep_best and best.should_save_best(self.state, self.config)
        if (saves or is_best) and self.state.saved_at != examples:
            save_step(self)
        self.stop.check()

    def train_step(self, batch: dict) -> dict[str, float]:
        """Take one optimizer step on a batch, in at least `gradient_accumulation_steps` microbatches.

        The CPU waits for the GPU only once: for the metrics, before the weights change.

        Returns: mean metrics.
        Raises: UserError, before the weights change, if loss or gradient are not finite.
        """
        self.policy.train()
        start_time = time.perf_counter()
        all_metrics = []
        parts = batch.get("microbatches") or self.with_microbatches(batch)["microbatches"]
        loss_config = OmegaConf.to_container(self.config.loss)  # a dict is read faster
        losses = self._loss_functions(batch, parts, train=True)
        for number, (microbatch, loss_function) in enumerate(zip(parts, losses, strict=True), 1):
            loss, metrics = self.get_batch_metrics(microbatch, loss_config, True, loss_function)
            self.strategy.prepare_backward(self.policy, is_last=number == len(parts))
            # not divided by the number of workers, as FSDP averages their gradients
            (loss * len(microbatch["prompt"]) / len(batch["prompt"])).backward()
            n_tokens = computed_tokens(microbatch, self.layout.shares_prompts).to(widest_dtype(self.device))
            all_metrics.append(metrics | {"tokens": n_tokens.to(self.device, non_blocking=True)})

        grad_norm = self.strategy.clip_grad_norm(self.policy.parameters(), self.config.max_grad_norm)
        metrics = mean_metrics([*all_metrics, {"grad_norm": grad_norm[None]}])
        n_tokens = round(metrics.pop("tokens") * self.config.batch_size)
        where = f"step {self.state.updates + 1} (after {self.state.examples} examples)"
        numbers = {"loss": metrics["loss/train"], "grad_norm": metrics["grad_norm"]}
        check_finite(where, batch["prompt"], self.config, metrics, **numbers)
        metrics["lr"] = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

        self.state.updates += 1
        if self.moves_reference and self.state.updates % self.config.reference_update_every == 0:
            references.move_reference(self.reference, self.policy, self.config.reference_update_alpha)
        self.state.batches += 1
        self.state.examples += self.config.batch_size
        seconds = time.perf_counter() - start_time
        return {**metrics, **self.throughput.metrics(self.config.batch_size, n_tokens, seconds)}

    def _training_batches(self, skip: int) -> Iterator[dict]:
        """Yield the training batches after the first `skip`; a thread prepares them ahead of time.

        The thread needs a process group of its own, so that its collectives don't mix with those of training.
        """
        group = collectives.thread_group("batches") if self.is_sharded else None
        batches = (self.with_microbatches(batch, group) for batch in self.train_iterator.batches(skip))
        return prefetched(batches, n_ahead=2)

    def with_microbatches(self, batch: dict, group: ProcessGroup | None = None) -> dict:
        """Return the batch with its microbatches and their rows; `group`: see `microbatches`."""
        layouts, pin_memory = dict.fromkeys([self.layout, self.reference_layout]), self.device.type == "cuda"
        parts = self.microbatches(batch, self.config.gradient_accumulation_steps, group)
        for layout in layouts:
            parts = [layout.prepare(part, pin_memory) for part in parts]
        return batch | {"microbatches": parts}

    def microbatches(self, batch: dict, min_microbatches: int, group: ProcessGroup | None = None) -> list[dict]:
        """Cut the batch into microbatches of similar length, the same number on all workers; see `data.microbatches`.

        `group`: the process group in which workers agree on the number; None in the main thread.
        """
        return microbatches(
            batch, min_microbatches, self.layout.shares_prompts, self.microbatch_overhead, self.layout.is_packed,
            self.max_tokens,
            functools.partial(collectives.all_reduce_max, group=group) if self.is_sharded else lambda n: n,
        )  # fmt: skip

    # ---- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Return mean metrics over all evaluation batches.

        Raises: UserError if the loss of a batch isn't finite.
        """
        return mean_metrics(self.evaluate_examples()[0], self.n_eval_examples)

    def evaluate_examples(self) -> tuple[list[dict[str, torch.Tensor]], list[int]]:
        """Return the metrics of this worker's evaluation examples, by microbatch, and the indices of these examples.

        Raises: UserError if the loss of a batch isn't finite.
        """
        self.policy.eval()
        all_metrics, indices, loss_config = [], [], OmegaConf.to_container(self.config.loss)
        for batch in progressing(self.eval_batches, "Evaluating", "batches"):
            self.stop.check()
            batch_metrics = []
            parts = self.microbatches(batch, min_microbatches=1)
            for microbatch, loss in zip(parts, self._loss_functions(batch, parts, train=False), strict=True):
                with torch.no_grad():
                    metrics = self.get_batch_metrics(microbatch, loss_config, False, loss)[1]
                is_counted = self.is_counted(microbatch)
                batch_metrics.append({key: values[is_counted] for key, values in metrics.items()})
                indices += [index for index in microbatch["index"] if index is not None]
            where, means = f"evaluation after {self.state.examples} examples", mean_metrics(batch_metrics)
            check_finite(where, batch["prompt"], self.config, means, loss=means["loss/eval"])
            all_metrics += batch_metrics
        return all_metrics, indices

    def is_counted(self, batch: dict) -> torch.Tensor:
        """Return a mask, (batch_size,): False for repetitions that only fill up an evaluation's last shard."""
        if "index" not in batch:  # a training batch
            return torch.ones(len(batch["prompt"]), dtype=torch.bool, device=self.device)
        return torch.tensor([i is not None for i in batch["index"]], device=self.device)

    def get_batch_samples(self, batch: dict) -> tuple[list[str], list[str]]:
        """Sample a response from the policy, and one from the reference if there is one, for each prompt of the batch.

        Returns: the policy's and the reference's samples, each preceded by its prompt.
        """
        policy, reference, _ = sampling.sample_batch(self, batch)
        policy = [prompt + response for prompt, response in zip(batch["prompt"], policy, strict=True)]
        reference = [prompt + response for prompt, response in zip(batch["prompt"], reference, strict=bool(reference))]
        return policy, reference

    def evaluate_and_log(self):
        """Evaluate (with `sample_during_eval`, sample, too); log the results and keep them for the next checkpoint.

        Raises: Stopped after a signal; the state is then as if the evaluation had not begun.
        """
        rng_state = train_state.get_rng_state()
        try:
            start_time, metrics, samples, kl = time.perf_counter(), self.evaluate(), [], {}
            if self.config.sample_during_eval:
                samples, kl = sampling.sample_evaluation(self, time.perf_counter() - start_time)
            metrics |= kl
        except Stopped:
            train_state.set_rng_state(rng_state)
            raise
        self.state.metrics, self.state.evaluated_at = metrics, self.state.examples
        if self.state.examples > 0:  # the untrained model can't be the best
            best.record_evaluation(self.state, self.config)
        self.log("eval", metrics, samples)

    # ---- output ---------------------------------------------------------------------------------------------------

    def log(self, split: str, metrics: dict[str, float], samples: list[dict] | None = None):
        """Log metrics and samples with the current counters."""
        counters = {"counters/examples": self.state.examples, "counters/updates": self.state.updates}
        if self.run_log is not None:
            self.run_log.log(split, {**counters, **metrics}, samples or [])

    def save(self, output_dir: str | None = None, metrics: dict | None = None):
        """Write a checkpoint to `output_dir`, by default LATEST; `metrics` replaces those of the last evaluation."""
        begin_save(self, output_dir or os.path.join(self.run_dir, "LATEST"), metrics)
        self.background.wait()


class FSDPTrainer(BasicTrainer):
    """Trains in several processes, each of which computes a shard of every batch and keeps a shard of every tensor."""

    strategy_class = STRATEGIES["FSDPTrainer"]


class TensorParallelTrainer(BasicTrainer):
    """Trains in several processes, each of which computes its shard of every layer, for the same batches."""

    strategy_class = STRATEGIES["TensorParallelTrainer"]


def make_trainer(config: DictConfig, purpose: str = "train") -> BasicTrainer:
    """Load the tokenizer, data, policy and reference that the config names; for `purpose` see `BasicTrainer`."""
    quiet_libraries()
    use_expandable_segments()
    use_deterministic_algorithms(config.deterministic)
    hub.use_cache_if_unreachable(hub_names(config, reads_data=purpose != "sample"))
    if config.model.trust_remote_code:
        models.make_remote_code_importable()
    trainer_class = globals()[config.trainer]
    policy, reference_model = models.model_loaders(config, trainer_class.strategy_class.device_map)
    ranks = collectives.rank_and_world_size()
    with out_of_memory_explained(config):
        return trainer_class(policy, config, config.seed, config.local_run_dir, reference_model, *ranks, purpose)
