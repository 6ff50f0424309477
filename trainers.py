"""The training loop, and its trainers, which differ only in where tensors live."""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator

import torch
from omegaconf import DictConfig
from torch import nn

from acceleration.gpu_settings import use_deterministic_algorithms, use_expandable_segments
from acceleration.memory_plan import explained_out_of_memory, resumed_cap
from checkpointing import best
from checkpointing.checkpoints import (
    delete_oldest,
    load_model_state,
    load_policy_state,
    point_latest,
    write_checkpoint,
)
from checkpointing.preemption import Stopped, StopSignal
from checkpointing.train_state import (
    TrainState,
    get_rng_state,
    load_optimizer_state,
    restore_rng_state,
    seed_generators,
    set_rng_state,
)
from commands.output import quiet_libraries
from computation import PolicyAndReference
from config_checks.datasets import chosen_datasets, hub_names
from data.batches import prefetched
from data.microbatches import computed_tokens
from distributed import collectives, environment
from distributed.dtensor import full_state_dict
from distributed.strategies import STRATEGIES
from evaluation.sampling import end_tokens, generate_scorable
from log_probabilities import (  # noqa: F401
    _get_batch_logps,
    concatenated_inputs,
    response_lengths,
)
from losses import LOGPS, LOSSES, preference_loss  # noqa: F401
from models import check_tokenizer_fits, configured_dropout_rates, load_tokenizer
from optimization import make_optimizer, make_scheduler
from preference_datasets import open_batches
from references import (
    REFERENCE_ADAPTER,
    move_reference,
)
from reporting.metrics import TIE, check_finite, kl_metrics, mean_metrics, response_metrics
from reporting.run_log import RunLog
from reporting.terminal import RunTable, passing_bar, progress_bar
from reporting.usage import Throughput, n_parameters, parameters_in_words
from utils import UserError, get_block_class_from_model, rank0_print, slice_and_move_batch_for_device, take

torch.backends.cuda.matmul.allow_tf32 = True


class BasicTrainer(PolicyAndReference):
    """Trains a language model with SFT or a preference loss in one process.

    Where there are several GPUs, the model's layers have been spread over them as it was loaded: their memory adds up,
    they compute in turn.
    """

    strategy_class = STRATEGIES["BasicTrainer"]

    def __init__(
        self,
        policy: nn.Module | Callable[[], nn.Module | None] | None,
        config: DictConfig,
        seed: int,
        run_dir: str,
        reference_model: nn.Module | Callable[[], nn.Module | None] | None = None,
        rank: int = 0,
        world_size: int = 1,
        trains: bool = True,
    ):
        """Of a machine's workers the first gives `policy` and `reference_model`, the others None and a function that
        returns None.

        Args:
            policy: or a function that loads it, once the data are known to be good.
            config: one that `check_config` has checked.
            reference_model: where the loss needs one; or a function that loads it, which isn't called without need.
            trains: without it no training data are loaded, for evaluation alone.
        """
        self.config, self.seed, self.run_dir = config, seed, run_dir
        self.rank, self.world_size = rank, world_size
        self.loss = LOSSES[config.loss.name]
        self.policy_mp = getattr(torch, config.model.policy_mp) if config.model.policy_mp else None
        self.strategy = self.strategy_class(config)
        self.tokenizer = load_tokenizer(config)
        self._load_data(trains)
        if not (policy is None or isinstance(policy, nn.Module)):
            policy = policy()
        if policy is not None and config.model.block_name is not None:  # sharded blocks have classes of other names
            get_block_class_from_model(policy, config.model.block_name)
        self.policy = self.strategy.distribute(policy, is_policy=True)
        self.device = self.strategy.device(self.policy)
        self.state = TrainState()
        self.stop = StopSignal()
        self.run_log: RunLog | None = None

        # for checkpoints; asked for now, as the hub may be out of reach by then
        self.dropout_rates = configured_dropout_rates(config) if rank == 0 else {}
        check_tokenizer_fits(self.policy, self.tokenizer, config)
        self.layout = self.reference_layout = self._choose_layout(self.policy)
        self._set_up_reference(reference_model)
        if config.activation_checkpointing:
            self.policy.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self.optimizer = make_optimizer(self.policy, config, self.device, self.strategy.optimizer_args)
        self.scheduler = make_scheduler(self.optimizer, config, self.train_iterator.n_batches)
        self._set_up_computation()
        rank0_print(parameters_in_words(*n_parameters(self.policy)))
        self.throughput = Throughput(self.policy, self.reference and self.reference.model, world_size)

    # ---- setting up -------------------------------------------------------------------------------------------------

    def _load_data(self, trains: bool):
        """Open the training batches and load all evaluation batches, of each this worker's shard."""
        config, sft_mode = self.config, not self.loss.needs_pairs
        self.train_iterator, self.eval_iterator = open_batches(
            config,
            chosen_datasets(config),
            self.tokenizer,
            sft_mode,
            self.seed,
            self.strategy.batch_shard,
            silent=self.rank != 0,
            mismatched=self.loss.takes_kl_estimate,
            trains=trains,
        )
        self.eval_batches = [
            {**batch, "index": self.eval_iterator.indices(number)} for number, batch in enumerate(self.eval_iterator)
        ]
        self.n_eval_examples = len(set(self.eval_iterator.numbers()))  # different ones: some may come several times
        n_examples = self.eval_iterator.n_examples
        if config.sample_during_eval and config.n_eval_model_samples > n_examples:
            rank0_print(f"WARNING: n_eval_model_samples={config.n_eval_model_samples}, but there are only {n_examples}")

    def data_fingerprints(self) -> dict[str, str]:
        """A SHA-256 of each dataset's examples in each split; see `BatchIterator.fingerprints`."""
        return {**self.train_iterator.fingerprints(), **self.eval_iterator.fingerprints()}

    # ---- log-probabilities and loss -------------------------------------------------------------------------------

    def loss_inputs(self, batch: dict, loss_config: DictConfig) -> dict[str, torch.Tensor]:
        """What losses take (see `losses.Loss`) of each example: tensors of shape (batch_size,)."""
        if self.loss.needs_pairs:
            logps = (*self.concatenated_forward(self.policy, batch), *self.reference_logps(batch))
        else:
            logps = (self.response_logps(self.policy, batch),)
        inputs = dict(zip(LOGPS[: len(logps)], logps, strict=True))
        sides = ("chosen", "rejected") if self.loss.needs_pairs else ("chosen",)
        lengths = torch.stack([response_lengths(batch[f"{side}_labels"]) for side in sides])
        lengths = lengths.to(self.device, non_blocking=True)
        lengths = dict(zip(sides, lengths, strict=True))
        if loss_config.get("average_log_prob", False):
            inputs = {name: logps / lengths[name.split("_")[1]] for name, logps in inputs.items()}
        return inputs | {f"{side}_lengths": length for side, length in lengths.items()}

    def get_batch_metrics(
        self, batch: dict, loss_config: DictConfig, train: bool = True, kl_estimate: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean loss of a batch, and every metric for each of its examples: tensors of shape (batch_size,).

        `kl_estimate`: of the batch that this is a microbatch of, where the loss takes one; None: of this one.
        """
        split = "train" if train else "eval"
        inputs = self.loss_inputs(batch, loss_config)
        if self.loss.takes_kl_estimate:
            inputs["kl_estimate"] = self.estimate_kl(batch) if kl_estimate is None else kl_estimate
        losses, *rewards = self.loss(inputs, loss_config)
        metrics = {}
        if rewards:
            chosen_rewards, rejected_rewards = rewards
            metrics[f"rewards_{split}/chosen"] = chosen_rewards
            metrics[f"rewards_{split}/rejected"] = rejected_rewards
            metrics[f"rewards_{split}/accuracies"] = (chosen_rewards > rejected_rewards).float()
            metrics[f"rewards_{split}/margins"] = chosen_rewards - rejected_rewards
            metrics[f"rewards_{split}/ties"] = ((chosen_rewards - rejected_rewards).abs() < TIE).float()
        for side in ("rejected", "chosen"):
            if f"policy_{side}_logps" in inputs:
                metrics[f"logps_{split}/{side}"] = inputs[f"policy_{side}_logps"].detach()
        metrics[f"loss/{split}"] = losses.detach()
        compares, averaged = self.loss.needs_reference(loss_config), loss_config.get("average_log_prob", False)
        return losses.mean(), metrics | response_metrics(split, inputs, compares, averaged)

    # ---- training -------------------------------------------------------------------------------------------------

    def train(self):
        """Train to the end of the data, evaluating and saving on the way, and evaluate once more.

        Raises: Stopped if a signal asked for it; LATEST is then where training stands.
        """
        self.precompute_reference()
        seed_generators(self.seed + self.strategy.batch_shard[0])  # other samples for other prompts
        restore_rng_state(self.state.rng_states, self.rank, self.world_size)
        if self.rank == 0:
            n_examples, epoch_size, state = self.train_iterator.n_examples, self.train_iterator.epoch_size, self.state
            table = RunTable(n_examples, epoch_size, state.examples, state.metrics)
            logged = state.log_bytes, state.wandb_run_id, state.log_sha256
            self.run_log = RunLog(self.config, self.run_dir, table, *logged)
        n_batches, n_done = self.train_iterator.n_batches, self.state.batches
        if self.config.warmup_steps >= n_batches:
            rank0_print(f"warmup_steps={self.config.warmup_steps}: in {n_batches} steps lr isn't reached")
        bar = progress_bar(self._training_batches(skip=n_done), n_batches, n_done)
        with self.run_log or contextlib.nullcontext(), contextlib.closing(bar):
            try:
                for batch in bar:
                    self._evaluate_and_save_where_due()
                    if best.is_over(self.state, self.config):
                        best.say_why(self.state)
                        break
                    self.log("train", self.train_step(batch))
                    bar.set_postfix_str(self.run_log.recent if self.run_log else "", refresh=False)
                    self.stop.check()
                if self.state.evaluated_at != self.state.examples:
                    self.evaluate_and_log()
                    if best.is_here(self.state, self.config):
                        self._save_step()
            except Stopped:
                if self.state.saved_at != self.state.examples:
                    self.save()
                raise

    def _evaluate_and_save_where_due(self):
        """Evaluate every `eval_every` examples, save every `save_every`; what has been done here is not done again."""
        examples = self.state.examples
        evaluates = examples % self.config.eval_every == 0 and (examples > 0 or self.config.do_first_eval)
        saves = examples % (self.config.save_every or self.config.eval_every) == 0 and examples > 0
        if evaluates and self.state.evaluated_at != examples:
            self.evaluate_and_log()
        if (saves or best.is_here(self.state, self.config)) and self.state.saved_at != examples:
            self._save_step()
        self.stop.check()

    def train_step(self, batch: dict) -> dict[str, float]:
        """One optimizer step on a batch, in at least `gradient_accumulation_steps` microbatches; returns mean metrics.

        A GPU is waited for once: where its metrics are read, before the weights change.

        Raises: UserError, before the weights change, if loss or gradient are not finite.
        """
        self.policy.train()
        start_time = time.perf_counter()
        kl_estimate = self.estimate_kl(batch) if self.loss.takes_kl_estimate else None
        measured = []
        for microbatch in batch.get("microbatches") or self._prepared(batch)["microbatches"]:
            loss, metrics = self.get_batch_metrics(microbatch, self.config.loss, True, kl_estimate)
            # several workers' gradients are averaged
            (loss * len(microbatch["prompt"]) / len(batch["prompt"])).backward()
            n_tokens = computed_tokens(microbatch, self.layout.is_shared).double()
            measured.append(metrics | {"tokens": n_tokens.to(self.device, non_blocking=True)})

        grad_norm = self.strategy.clip_grad_norm(self.policy.parameters(), self.config.max_grad_norm)
        metrics = mean_metrics([*measured, {"grad_norm": grad_norm[None]}])
        n_tokens = round(metrics.pop("tokens") * self.config.batch_size)
        where = f"step {self.state.updates + 1} (after {self.state.examples} examples)"
        numbers = {"loss": metrics["loss/train"], "grad_norm": metrics["grad_norm"]}
        check_finite(where, batch["prompt"], self.config, metrics, **numbers)
        metrics["lr"] = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

        self.state.updates += 1
        if self._moves_reference and self.state.updates % self.config.reference_update_every == 0:
            move_reference(self.reference, self.policy, self.config.reference_update_alpha)
        self.state.batches += 1
        self.state.examples += self.config.batch_size
        seconds = time.perf_counter() - start_time
        return {**metrics, **self.throughput.metrics(self.config.batch_size, n_tokens, seconds)}

    def _training_batches(self, skip: int) -> Iterator[dict]:
        """Yield the training batches after the first `skip`, cut into microbatches whose rows are made: ahead of time,
        in a thread, where workers agree on the number of microbatches in a group of their own."""
        agree = functools.partial(collectives.all_reduce_max, group=collectives.thread_group())
        prepare = functools.partial(self._prepared, agree=agree)
        return prefetched(map(prepare, self.train_iterator.batches(skip)), n_ahead=2)

    # ---- evaluation and sampling ----------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Mean metrics over all evaluation batches.

        Raises: UserError if the loss of one isn't finite.
        """
        return self.mean_metrics(self.evaluate_examples()[0])

    def mean_metrics(self, all_metrics: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Means of what `evaluate_examples` returns, over all workers."""
        return mean_metrics(all_metrics, self.n_eval_examples)

    def evaluate_examples(self) -> tuple[list[dict[str, torch.Tensor]], list[int]]:
        """Metrics of each evaluation example of this worker, in microbatches, and the numbers of these examples.

        Raises: UserError if the loss of a batch isn't finite.
        """
        self.policy.eval()
        all_metrics, indices = [], []
        for batch in passing_bar(self.eval_batches, "Evaluating"):
            self.stop.check()
            batch_metrics = []
            kl_estimate = self.estimate_kl(batch) if self.loss.takes_kl_estimate else None
            for microbatch in self.microbatches(batch, n_least=1):
                with torch.no_grad():
                    metrics = self.get_batch_metrics(microbatch, self.config.loss, False, kl_estimate)[1]
                counted = self._counted(microbatch)
                batch_metrics.append({key: values[counted] for key, values in metrics.items()})
                indices += [index for index in microbatch["index"] if index is not None]
            where, means = f"evaluation after {self.state.examples} examples", mean_metrics(batch_metrics)
            check_finite(where, batch["prompt"], self.config, means, loss=means["loss/eval"])
            all_metrics += batch_metrics
        return all_metrics, indices

    def sample(self) -> tuple[list[dict], dict[str, float]]:
        """Samples for the first `n_eval_model_samples` evaluation prompts, see `RunLog.log` for their form; and what
        they tell of the policy's distance from the reference, if that is there."""
        self.policy.eval()
        samples, logratios, n_samples = [], [], self.config.n_eval_model_samples
        n_batches = -(-n_samples // self.config.eval_batch_size)
        for batch in passing_bar(self.eval_batches[:n_batches], "Sampling"):
            self.stop.check()
            asked = [i for i, index in enumerate(batch["index"]) if index is not None and index < n_samples]
            batch = take(batch, torch.tensor(asked or [0]))  # a worker with none of them keeps the others company
            *texts, scores = self._sample(slice_and_move_batch_for_device(batch, 0, 1, self.device))
            own = [
                [{"model": model, "prompt": batch["prompt"][i], "sample": text} for i, text in enumerate(of_model)]
                for model, of_model in zip(("policy", "reference"), texts, strict=True)
            ]
            own = [*own, scores] if asked else [[], [], []]
            parts = collectives.all_gather_object(own) if self.is_sharded else [own]
            *of_models, of_scores = zip(*parts, strict=True)
            samples += [sample for of_model in of_models for part in of_model for sample in part]
            logratios += [score for part in of_scores for score in part]
        return samples, kl_metrics(logratios)

    @property
    def _moves_reference(self) -> bool:
        return self.config.reference_update_every is not None

    @property
    def end_tokens(self) -> list[int]:
        """The ids that end a sample."""
        return end_tokens(self.policy, self.tokenizer)

    def get_batch_samples(self, batch: dict) -> tuple[list[str], list[str]]:
        """A sample from the policy, and one from the reference if there is one, for each prompt of the batch."""
        return self._sample(batch)[:2]

    def _sample(self, batch: dict) -> tuple[list[str], list[str], list[tuple[float, int]]]:
        """The samples, and of each of the policy's its log-ratio to the reference (nats) and its length (tokens)."""
        policy_texts, targets, is_whole = self._generate(self.policy, batch)
        if self.reference is None:
            return policy_texts, [], []
        with self.reference.active() as model:
            reference_texts = self._generate(model, batch)[0]
            with torch.no_grad():
                reference_logps = self.response_logps(model, targets)
        with torch.no_grad():
            logratios = self.response_logps(self.policy, targets) - reference_logps.to(self.device)
        lengths = response_lengths(targets["chosen_labels"])
        scores = zip(logratios[is_whole].tolist(), lengths[is_whole].tolist(), strict=True)
        return policy_texts, reference_texts, list(scores)

    def _generate(self, model: nn.Module, batch: dict) -> tuple[list[str], dict, torch.Tensor]:
        def stops() -> bool:
            return self.strategy.stops_sampling(self.stop.received is not None)

        with self.autocast(model):  # samples are drawn in the precision in which they are scored
            samples = generate_scorable(
                model, self.tokenizer, batch, self.config.max_length, stops, synced=self.is_sharded
            )
        self.stop.check()
        return samples

    def evaluate_and_log(self):
        """Evaluate and, with `sample_during_eval`, sample; log both and keep the metrics for the next checkpoint.

        Raises: Stopped if a signal asked for it, as if the evaluation had not begun.
        """
        rng_state = get_rng_state()
        try:
            metrics = self.evaluate()
            samples, kl = self.sample() if self.config.sample_during_eval else ([], {})
            metrics |= kl
        except Stopped:
            set_rng_state(rng_state)
            raise
        self.state.metrics, self.state.evaluated_at = metrics, self.state.examples
        best.judge(self.state, self.config)
        self.log("eval", metrics, samples)

    # ---- output ---------------------------------------------------------------------------------------------------

    def log(self, split: str, metrics: dict[str, float], samples: list[dict] | None = None):
        """Hand what happened to the run's log, with the counters as they now stand."""
        counters = {"counters/examples": self.state.examples, "counters/updates": self.state.updates}
        if self.run_log is not None:
            self.run_log.log(split, {**counters, **metrics}, samples or [])

    def save(self, output_dir: str | None = None, metrics: dict | None = None):
        """Write a checkpoint to `output_dir`, by default LATEST; with the metrics of the last evaluation."""
        if self.config.debug:
            rank0_print("skipping save in debug mode")
            return
        policy_state = dict(self.policy.state_dict(keep_vars=True))
        if hasattr(self.policy, "peft_config"):
            trained = {name for name, parameter in self.policy.named_parameters() if parameter.requires_grad}
            frozen = {name for name in policy_state if ".lora_" in name and f".{REFERENCE_ADAPTER}" not in name}
            policy_state = {name: policy_state[name] for name in sorted(trained | frozen)}
        state_dicts = {"policy": full_state_dict(policy_state)}
        if self.config.save_optimizer:
            state_dicts["optimizer"] = full_state_dict(self.optimizer.state_dict())
            state_dicts["scheduler"] = self.scheduler.state_dict()
        if self._moves_reference:
            state_dicts["reference"] = full_state_dict(dict(self.reference.model.state_dict(keep_vars=True)))
        state = self._current_state()
        if metrics is not None:
            state = dataclasses.replace(state, metrics=metrics)
        if self.rank == 0:
            write_checkpoint(
                output_dir or os.path.join(self.run_dir, "LATEST"),
                self.policy,
                self.tokenizer,
                state_dicts,
                state,
                self.config,
                self.dropout_rates,
                self.n_eval_examples,
            )
        collectives.barrier()

    def _current_state(self) -> TrainState:
        """The train state with what others know of it: generators of all workers, logs, whether all is done."""
        return dataclasses.replace(
            self.state,
            complete=self._is_over(self.state) and self.state.evaluated_at == self.state.examples,
            max_tokens=self.max_tokens,
            rng_states=collectives.all_gather_object(get_rng_state()),
            wandb_run_id=self.run_log.wandb_run_id if self.run_log else None,
            log_bytes=self.run_log.log_bytes() if self.run_log else {},
            log_sha256=self.run_log.log_sha256() if self.run_log else {},
        )

    def _is_over(self, state: TrainState) -> bool:
        return state.batches == self.train_iterator.n_batches or best.is_over(state, self.config)

    def _save_step(self):
        """Write step-N, make it the LATEST, delete those that `keep_checkpoints` lets go."""
        self.state.saved_at = self.state.examples
        name = f"step-{self.state.examples}"
        self.save(os.path.join(self.run_dir, name))
        if not self.config.debug and self.rank == 0:
            point_latest(self.run_dir, name)
            best_name = best.point_best(self.run_dir, self.state, self.config)
            delete_oldest(self.run_dir, self.config.keep_checkpoints, self.state.examples, best_name)

    def resume(self, checkpoint: str):
        """Stand where training stood when this checkpoint was written.

        Raises: UserError if it doesn't fit the model, lies beyond the end of training, or has no optimizer's state.
        """
        self.precompute_reference()  # now, as it is made of the weights that training started from
        state, n_batches = TrainState.load(checkpoint), self.train_iterator.n_batches
        if state.batches > n_batches:
            raise UserError(
                f"{checkpoint} has {state.batches} steps behind it, n_epochs={self.config.n_epochs} and "
                f"n_examples={self.config.n_examples} ask for {n_batches} in all"
            )
        rank0_print(f"Going on from {checkpoint}: {state.examples} examples, {state.updates} steps")
        self.load_weights(checkpoint)
        load_optimizer_state(checkpoint, self.optimizer, self.scheduler, self.config)
        if self.config.max_tokens_per_microbatch is None:
            self.max_tokens, warning = resumed_cap(state.max_tokens, self.max_tokens)
            if warning:
                rank0_print(warning)
        self.state.complete = self.state.complete and self._is_over(self.state)

    def load_weights(self, checkpoint: str):
        """Give the policy, and a reference that moves, the weights of a checkpoint of this run, and its counters."""
        load_policy_state(checkpoint, self.policy)
        if self._moves_reference:
            load_model_state(os.path.join(checkpoint, "reference.pt"), self.reference.model)
        self.state = dataclasses.replace(TrainState.load(checkpoint), inputs=self.state.inputs)


class FSDPTrainer(BasicTrainer):
    """Trains in several processes, each of which computes a shard of every batch and keeps a shard of every tensor."""

    strategy_class = STRATEGIES["FSDPTrainer"]


class TensorParallelTrainer(BasicTrainer):
    """Trains in several processes that compute the same batches together, each its shard of every layer."""

    strategy_class = STRATEGIES["TensorParallelTrainer"]


def make_trainer(config: DictConfig, trains: bool = True):
    """Load all that the config names: tokenizer, data, policy and reference; without `trains` no training data."""
    import trainers
    from data import hub
    from models import allow_own_code, load_policy, load_reference

    quiet_libraries()
    use_expandable_segments()
    use_deterministic_algorithms(config.deterministic)
    hub.use_cache_if_unreachable(hub_names(config))
    allow_own_code(config)
    trainer_class = getattr(trainers, config.trainer)
    device_map = trainer_class.strategy_class.device_map
    # on its way to several workers the policy is emptied, and there is nothing to copy
    copied: list[nn.Module] = []

    def policy() -> nn.Module | None:
        model = load_policy(config, device_map) if environment.is_local_rank0() else None
        copied.extend([model] if device_map == "balanced" and model is not None else [])
        return model

    def reference_model() -> nn.Module | None:  # where one is needed
        first = copied[0] if copied else None
        return load_reference(config, first, device_map) if environment.is_local_rank0() else None

    with explained_out_of_memory(config):
        return trainer_class(
            policy,
            config,
            config.seed,
            config.local_run_dir,
            reference_model,
            *collectives.rank_and_world_size(),
            trains,
        )
