"""The training loop, and its trainers, which differ only in where tensors live."""

import contextlib
import inspect
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm

import workers
from checkpoints import delete_oldest, load_policy_state, load_tokenizer, point_latest, read_tensors, write_checkpoint
from losses import LOSSES, _get_batch_logps, needs_reference, preference_loss  # noqa: F401 (re-exported)
from placement import FullySharded, Placement, TensorParallel, whole_state
from preference_datasets import open_batches
from references import (
    LogpsCache,
    Reference,
    choose_reference,
    make_reference,
    open_cache,
)
from resume import (
    Stopped,
    StopSignal,
    config_hash,
    load_optimizer_state,
    read_position,
    rng_states,
    set_rng_states,
    versions,
)
from run_logging import RunLog
from sampling import generate
from shared_prompt import choose_rows, microbatches, response_logps, shared_rows
from utils import (
    UserError,
    concatenated_inputs,  # noqa: F401 (re-exported)
    get_block_class_from_model,
    quiet,
    rank0_print,
    slice_and_move_batch_for_device,
    take,
)

torch.backends.cuda.matmul.allow_tf32 = True


class BasicTrainer:
    """Trains a language model with SFT or a preference loss in one process.

    Where there are several GPUs, the model's layers have been spread over them as it was loaded: their memory adds up,
    they compute in turn.
    """

    placement_class = Placement

    def __init__(
        self,
        policy: nn.Module | None,
        config: DictConfig,
        seed: int,
        run_dir: str,
        reference_model: nn.Module | Callable[[], nn.Module | None] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        """Of a machine's workers the first gives `policy` and `reference_model`, the others None and a function that
        returns None."""
        self.config, self.seed, self.run_dir = config, seed, run_dir
        self.rank, self.world_size = rank, world_size
        self.loss = LOSSES[config.loss.name]
        self.policy_mp = getattr(torch, config.model.policy_mp) if config.model.policy_mp else None
        self.placement = self.placement_class(config)
        self.policy = self.placement.place(policy, is_policy=True)
        self.device = self.placement.device(self.policy)

        self.tokenizer = load_tokenizer(config)
        self._check_fits_model()
        self._load_data()
        self.make_rows, self.whole_logits, why = choose_rows(
            self.policy, self.eval_iterator.first(2), config.shared_prompt, config.max_length
        )
        rank0_print(f"Shared prompts: {why}")
        self.reference: Reference | None = None
        self.reference_cache: LogpsCache | None = None
        if needs_reference(config.loss):
            self._set_up_reference(reference_model)
        if config.activation_checkpointing:
            self.policy.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self._make_optimizer()
        self.example_counter = self.batch_counter = 0  # training examples, optimizer steps
        self.eval_metrics: dict[str, float] = {}  # of the last evaluation
        self.evaluated_at = self.saved_at = None  # example_counter at the last evaluation and the last step-N
        self.stop = StopSignal()
        self.checkpoint: dict | None = None  # what the run goes on from: the contents of its state.json
        self.is_complete = False
        self.run_log: RunLog | None = None

    # ---- setting up -------------------------------------------------------------------------------------------------

    def _check_fits_model(self):
        if self.config.model.block_name is not None:
            get_block_class_from_model(self.policy, self.config.model.block_name)
        n_embeddings = self.policy.get_input_embeddings().num_embeddings
        if len(self.tokenizer) > n_embeddings:
            raise UserError(
                f"the tokenizer has {len(self.tokenizer)} tokens, the model embeds {n_embeddings}: "
                "model.tokenizer_name_or_path is not this model's"
            )
        n_positions = getattr(self.policy.config, "max_position_embeddings", None)
        if n_positions is not None and self.config.max_length > n_positions:
            raise UserError(f"max_length={self.config.max_length}: the model has only {n_positions} positions")

    def _load_data(self):
        """Open the training batches and load all evaluation batches, of each this worker's part."""
        config, sft_mode = self.config, not self.loss.needs_pairs
        self.train_iterator, self.eval_iterator = open_batches(
            config, self.tokenizer, sft_mode, self.seed, self.placement.data_shard, silent=self.rank != 0
        )
        self.eval_batches = [
            {**batch, "number": self.eval_iterator.numbers(index)} for index, batch in enumerate(self.eval_iterator)
        ]
        n_examples = self.eval_iterator.n_examples
        if config.sample_during_eval and config.n_eval_model_samples > n_examples:
            rank0_print(f"WARNING: n_eval_model_samples={config.n_eval_model_samples}, but there are only {n_examples}")

    def _set_up_reference(self, reference_model: nn.Module | Callable[[], nn.Module | None]):
        """Get the reference ready: a model, the policy under another adapter, or log-probabilities known beforehand."""
        if reference_model is None:
            raise ValueError(f"loss={self.config.loss.name} needs a reference_model")
        kind = choose_reference(self.config)

        def load() -> nn.Module:
            model = reference_model if isinstance(reference_model, nn.Module) else reference_model()
            return self.placement.place(model, is_policy=False)

        rank0_print(f"Reference: {kind}{', precomputed' if self.config.precompute_ref_log_probs else ''}")
        if not self.config.precompute_ref_log_probs:
            self.reference = make_reference(kind, self.policy, load)
            return
        self._precompute_reference(kind, load)
        if kind != "model":  # it costs no memory: keep it for sampling
            self.reference = make_reference(kind, self.policy, load)
        elif self.config.sample_during_eval:
            rank0_print("The reference leaves memory: samples are drawn from the policy alone")

    def _precompute_reference(self, kind: str, load: Callable[[], nn.Module]):
        """Fill the cache with the reference's log-probabilities of all pairs; it is loaded only if some are missing."""
        config = self.config
        self.reference_cache = open_cache(self.policy, kind, config)

        # as training has not begun, the policy gives the reference's numbers where it is computed in the same way
        dtypes = {config.model.policy_mp or config.model.policy_dtype, config.model.reference_dtype}
        same = kind == "model" and len(dtypes) == 1 and not hasattr(self.policy, "peft_config")

        def compute(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
            if self.reference is None:
                self.reference = make_reference(kind, self.policy, (lambda: self.policy) if same else load)
            with self.reference.active() as model:
                return self.concatenated_forward(model, batch)

        def split(batch: dict) -> list[dict]:
            return self.microbatches(batch, n_least=-(-len(batch["prompt"]) // config.eval_batch_size))

        iterators = {"training": self.train_iterator, "evaluation": self.eval_iterator}
        self.reference_cache.fill(iterators, compute, split)
        self.reference = None  # and out of memory

    def _make_optimizer(self):
        """Any optimizer of torch.optim; the learning rate rises linearly over `warmup_steps` and stays."""
        config = self.config
        rank0_print(f"Using {config.optimizer} optimizer")
        parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        optimizer_class = getattr(torch.optim, config.optimizer)
        accepted = inspect.signature(optimizer_class).parameters
        args = {name: value for name, value in self.placement.optimizer_args.items() if name in accepted}
        try:
            self.optimizer = optimizer_class(parameters, lr=config.lr, **{**args, **config.optimizer_args})
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer={config.optimizer} optimizer_args={config.optimizer_args}: {error}") from error
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lr_lambda=lambda step: min(1.0, (step + 1) / (config.warmup_steps + 1))
        )

    # ---- log-probabilities and loss -------------------------------------------------------------------------------

    def response_logps(self, model: nn.Module, batch: dict) -> torch.Tensor:
        """Log-probability of each of the batch's responses under `model`, chosen before rejected, in nats."""
        mixed_precision = model is self.policy and self.policy_mp is not None
        with torch.autocast(self.device.type, self.policy_mp, enabled=mixed_precision):
            return response_logps(model, self.make_rows(batch), self.config.loss.average_log_prob, self.whole_logits)

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
            return self.concatenated_forward(model, batch)

    def get_batch_metrics(
        self, batch: dict, loss_config: DictConfig, train: bool = True
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean loss of a batch, and every metric for each of its examples: tensors of shape (batch_size,)."""
        split = "train" if train else "eval"
        options = {name: loss_config[name] for name in self.loss.options}
        metrics = {}
        if self.loss.needs_pairs:
            chosen_logps, rejected_logps = self.concatenated_forward(self.policy, batch)
            reference_logps = self.reference_logps(batch)
            losses, chosen_rewards, rejected_rewards = self.loss.function(
                chosen_logps, rejected_logps, *reference_logps, **options
            )
            metrics[f"rewards_{split}/chosen"] = chosen_rewards
            metrics[f"rewards_{split}/rejected"] = rejected_rewards
            metrics[f"rewards_{split}/accuracies"] = (chosen_rewards > rejected_rewards).float()
            metrics[f"rewards_{split}/margins"] = chosen_rewards - rejected_rewards
            metrics[f"logps_{split}/rejected"] = rejected_logps.detach()
        else:
            chosen_logps = self.response_logps(self.policy, batch)
            losses = self.loss.function(chosen_logps, **options)
        metrics[f"logps_{split}/chosen"] = chosen_logps.detach()
        metrics[f"loss/{split}"] = losses.detach()
        return losses.mean(), metrics

    # ---- training -------------------------------------------------------------------------------------------------

    def train(self):
        """Train to the end of the data, evaluating and saving on the way, and evaluate once more.

        Raises: Stopped if a signal asked for it; LATEST is then where training stands.
        """
        position = self.checkpoint or {}
        for set_seed in (torch.manual_seed, np.random.seed, random.seed):
            set_seed((self.seed + self.placement.data_shard[0]) % 2**32)  # other samples for other prompts
        self._set_rng_states(position.get("rng_states", []))
        if self.rank == 0:
            self.run_log = RunLog(self.config, self.run_dir, position.get("log_bytes"), position.get("wandb_run_id"))
        n_batches, n_done = self.train_iterator.n_batches, self.batch_counter
        batches = self.train_iterator.batches(skip=n_done)
        with contextlib.closing(self.run_log) if self.run_log else contextlib.nullcontext():
            try:
                for batch in tqdm(batches, "Training", n_batches, initial=n_done, unit="step", disable=quiet()):
                    self._evaluate_and_save_where_due()
                    self.log("train", self.train_step(batch))
                    self.stop.check()
                if self.evaluated_at != self.example_counter:
                    self.evaluate_and_log()
            except Stopped:
                if self.saved_at != self.example_counter:
                    self.save()
                raise

    def _set_rng_states(self, states: list[dict]):
        """Put the random generators where they were when a checkpoint was written, if there was this worker then."""
        if states and len(states) != self.world_size:
            rank0_print(f"WARNING: {len(states)} workers then, {self.world_size} now: samples will differ")
        if self.rank < len(states):
            set_rng_states(states[self.rank])

    def _evaluate_and_save_where_due(self):
        """Evaluate every `eval_every` examples, save every `save_every`; what has been done here is not done again."""
        examples = self.example_counter
        evaluates = examples % self.config.eval_every == 0 and (examples > 0 or self.config.do_first_eval)
        saves = examples % (self.config.save_every or self.config.eval_every) == 0 and examples > 0
        if evaluates and self.evaluated_at != examples:
            self.evaluate_and_log()
        if saves and self.saved_at != examples:
            self._save_step()
        self.stop.check()

    def train_step(self, batch: dict) -> dict[str, float]:
        """One optimizer step on a batch, in at least `gradient_accumulation_steps` microbatches; returns mean metrics.

        Raises: UserError, before the weights change, if loss or gradient are not finite.
        """
        self.policy.train()
        start_time = time.perf_counter()
        microbatch_metrics = []
        for microbatch in self.microbatches(batch, self.config.gradient_accumulation_steps):
            loss, metrics = self.get_batch_metrics(microbatch, self.config.loss, train=True)
            # several workers' gradients are averaged
            (loss * len(microbatch["prompt"]) / len(batch["prompt"])).backward()
            microbatch_metrics.append(metrics)

        grad_norm = self.placement.clip_gradient(self.policy.parameters(), self.config.max_grad_norm)
        metrics = mean_metrics(microbatch_metrics)
        where = f"step {self.batch_counter + 1} (after {self.example_counter} examples)"
        self._check_finite(where, batch["prompt"], loss=metrics["loss/train"], grad_norm=grad_norm)
        metrics["lr"] = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

        self.batch_counter += 1
        self.example_counter += self.config.batch_size
        metrics["examples_per_second"] = self.config.batch_size / (time.perf_counter() - start_time)
        metrics["grad_norm"] = grad_norm
        return metrics

    def microbatches(self, batch: dict, n_least: int) -> list[dict]:
        """The batch in parts of similar length; see `shared_prompt.microbatches`."""
        shared = self.make_rows is shared_rows
        return microbatches(batch, n_least, self.device.type, shared, agree=workers.largest)

    def _check_finite(self, where: str, prompts: list[str], **numbers: float):
        """Raises UserError with step or evaluation, the batch's prompts and what to try, if a number isn't finite."""
        if all(math.isfinite(number) for number in numbers.values()):
            return
        values = ", ".join(f"{name} {number}" for name, number in numbers.items())
        all_prompts = [prompt for part in workers.gathered(prompts) for prompt in part]
        shown = "\n".join(f"  {prompt[-200:]!r}" for prompt in dict.fromkeys(all_prompts))
        raise UserError(
            f"{where}: {values}; training can't go on. "
            f"The prompts of the batch end with:\n{shown}\n"
            f"Try a smaller lr (now {self.config.lr}) or max_grad_norm (now {self.config.max_grad_norm}), more "
            f"warmup_steps (now {self.config.warmup_steps}), or model.policy_dtype=float32 (now "
            f"{self.config.model.policy_dtype}); checkpoints written so far are in {self.run_dir}"
        )

    # ---- evaluation and sampling ----------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Mean metrics over all evaluation batches.

        Raises: UserError if the loss of one isn't finite.
        """
        self.policy.eval()
        all_metrics = []
        for batch in tqdm(self.eval_batches, "Computing eval metrics", leave=False, disable=quiet()):
            self.stop.check()
            batch_metrics = []
            for microbatch in self.microbatches(batch, n_least=1):
                with torch.no_grad():
                    metrics = self.get_batch_metrics(microbatch, self.config.loss, train=False)[1]
                counts = torch.tensor([number is not None for number in microbatch["number"]], device=self.device)
                batch_metrics.append({key: values[counts] for key, values in metrics.items()})
            where, means = f"evaluation after {self.example_counter} examples", mean_metrics(batch_metrics)
            self._check_finite(where, batch["prompt"], loss=means["loss/eval"])
            all_metrics += batch_metrics
        return mean_metrics(all_metrics)

    def sample(self) -> list[dict]:
        """Samples for the first `n_eval_model_samples` evaluation prompts; see `RunLog.log` for their form."""
        self.policy.eval()
        samples, n_samples = [], self.config.n_eval_model_samples
        n_batches = -(-n_samples // self.config.eval_batch_size)
        for batch in tqdm(self.eval_batches[:n_batches], "Generating samples", leave=False, disable=quiet()):
            self.stop.check()
            asked = [i for i, number in enumerate(batch["number"]) if number is not None and number < n_samples]
            batch = take(batch, torch.tensor(asked or [0]))  # a worker with none of them keeps the others company
            texts = self.get_batch_samples(slice_and_move_batch_for_device(batch, 0, 1, self.device))
            own = [
                [{"model": model, "prompt": batch["prompt"][i], "sample": text} for i, text in enumerate(of_model)]
                for model, of_model in zip(("policy", "reference"), texts, strict=True)
            ]
            parts = workers.gathered(own if asked else [[], []]) if self.placement.data_shard[1] > 1 else [own]
            samples += [sample for of_model in zip(*parts, strict=True) for part in of_model for sample in part]
        return samples

    def get_batch_samples(self, batch: dict) -> tuple[list[str], list[str]]:
        """A sample from the policy, and one from the reference if there is one, for each prompt of the batch."""
        policy_samples = self._generate(self.policy, batch)
        if self.reference is None:
            return policy_samples, []
        with self.reference.active() as model:
            return policy_samples, self._generate(model, batch)

    def _generate(self, model: nn.Module, batch: dict) -> list[str]:
        def stops() -> bool:
            return self.placement.stops_sampling(self.stop.received is not None)

        in_step = self.placement.data_shard[1] > 1
        texts = generate(model, self.tokenizer, batch, self.config.max_length, stops, in_step)
        self.stop.check()
        return texts

    def evaluate_and_log(self):
        """Evaluate and, with `sample_during_eval`, sample; log both and keep the metrics for the next checkpoint.

        Raises: Stopped if a signal asked for it, as if the evaluation had not begun.
        """
        states = rng_states()
        try:
            metrics = self.evaluate()
            samples = self.sample() if self.config.sample_during_eval else []
        except Stopped:
            set_rng_states(states)
            raise
        self.eval_metrics, self.evaluated_at = metrics, self.example_counter
        self.log("eval", metrics, samples)

    # ---- output ---------------------------------------------------------------------------------------------------

    def log(self, split: str, metrics: dict[str, float], samples: list[dict] | None = None):
        """Hand what happened to the run's log, with the counters as they now stand."""
        counters = {"counters/examples": self.example_counter, "counters/updates": self.batch_counter}
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
            policy_state = {name: policy_state[name] for name in sorted(trained)}
        states = {"policy": whole_state(policy_state)}
        if self.config.save_optimizer:
            states |= {"optimizer": whole_state(self.optimizer.state_dict()), "scheduler": self.scheduler.state_dict()}
        all_rng_states = workers.gathered(rng_states())
        if self.rank == 0:
            write_checkpoint(
                output_dir or os.path.join(self.run_dir, "LATEST"),
                self.policy,
                self.tokenizer,
                states,
                all_rng_states,
                self._position(self.eval_metrics if metrics is None else metrics),
            )
        workers.wait()

    def _save_step(self):
        """Write step-N, make it the LATEST, delete those that `keep_checkpoints` lets go."""
        self.saved_at = self.example_counter
        name = f"step-{self.example_counter}"
        self.save(os.path.join(self.run_dir, name))
        if not self.config.debug and self.rank == 0:
            point_latest(self.run_dir, name)
            delete_oldest(self.run_dir, self.config.keep_checkpoints, self.example_counter)

    def _position(self, metrics: dict[str, float]) -> dict:
        """Where training stands, for state.json; `resume` reads it."""
        return {
            "examples": self.example_counter,
            "updates": self.batch_counter,
            "batches": self.batch_counter,  # of the training data; one update each
            "evaluated_at": self.evaluated_at,
            "saved_at": self.saved_at,
            "complete": self.batch_counter == self.train_iterator.n_batches
            and self.evaluated_at == self.example_counter,
            "metrics": metrics,
            "trainer": type(self).__name__,
            "optimizer": self.config.optimizer,
            "config_sha256": config_hash(self.config),
            "versions": versions(),
            "wandb_run_id": self.run_log.wandb_run_id if self.run_log else None,
            "log_bytes": self.run_log.log_bytes() if self.run_log else {},
        }

    def resume(self, checkpoint: str):
        """Stand where training stood when this checkpoint was written.

        Raises: UserError if it doesn't fit the model, lies beyond the end of training, or has no optimizer's state.
        """
        position = read_position(checkpoint)
        self.example_counter, self.batch_counter = position["examples"], position["batches"]
        self.eval_metrics = position["metrics"]
        self.evaluated_at, self.saved_at = position["evaluated_at"], position["saved_at"]
        n_batches = self.train_iterator.n_batches
        if self.batch_counter > n_batches:
            raise UserError(
                f"{checkpoint} has {self.batch_counter} steps behind it, n_epochs={self.config.n_epochs} and "
                f"n_examples={self.config.n_examples} ask for {n_batches} in all"
            )
        self.is_complete = position["complete"] and self.batch_counter == n_batches
        rank0_print(f"Going on from {checkpoint}: {self.example_counter} examples, {self.batch_counter} steps")
        load_policy_state(checkpoint, self.policy)
        load_optimizer_state(checkpoint, self.optimizer, self.scheduler, self.config)
        self.checkpoint = {**position, "rng_states": read_tensors(os.path.join(checkpoint, "rng.pt"))["workers"]}


def mean_metrics(batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Mean over the examples of several batches, all workers', for each metric; the one place where metrics leave the
    device."""
    collected = defaultdict(list)
    for metrics in batches:
        for key, values in metrics.items():
            collected[key].append(values)
    values = [torch.cat(values).double() for values in collected.values()]
    sums_and_counts = torch.stack([torch.stack([v.sum(), v.new_tensor(len(v))]) for v in values])  # (metrics, 2)
    sums, counts = workers.total(sums_and_counts).unbind(1)
    return dict(zip(collected, (sums / counts).tolist(), strict=True))


class FSDPTrainer(BasicTrainer):
    """Trains in several processes, each of which computes a part of every batch and keeps a part of every tensor."""

    placement_class = FullySharded


class TensorParallelTrainer(BasicTrainer):
    """Trains in several processes that compute the same batches together, each its part of every layer."""

    placement_class = TensorParallel
