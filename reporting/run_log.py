"""Log a run's numbers and samples to `metrics.jsonl`, `samples.jsonl`, the terminal, curves and trackers."""

import contextlib
import os
import time

from omegaconf import DictConfig
from tqdm import tqdm

from basics.files import append_json_lines, sha256, write_errors_named
from basics.printing import counted
from reporting.drawing import CurvesDrawer
from reporting.symptoms import Symptoms
from reporting.terminal import RunTable, duration, number, sample_lines, warning, wrapped
from reporting.trackers import Trackers
from reporting.usage import peak_memory
from utils import UserError, rank0_print

LOG_FILES = ("metrics.jsonl", "samples.jsonl")


class RunLog:
    """Writes every step and evaluation to the run directory.

    At most every `minimum_log_interval_secs`, it prints a line with means over the steps since the line before, and
    passes the last step's numbers to the trackers. At the end of its `with` block the trackers' runs end; after an
    exception they are marked as failed.
    """

    def __init__(self, config: DictConfig, run_dir: str, n_examples: int, epoch_size: int, state):
        """Open the logs; drop what a resumed run has logged since its checkpoint.

        Args:
            n_examples: number of training examples at the end of the run.
            epoch_size: number of training examples in an epoch.
            state: the `TrainState` at the checkpoint, or a new one.
        """
        os.makedirs(run_dir, exist_ok=True)
        self.table = RunTable(n_examples, epoch_size, state.examples, state.metrics)
        self.run_dir, self.batch_size = run_dir, config.batch_size
        log_path = os.path.join(run_dir, LOG_FILES[0])
        if config.resume is None and not state.log_bytes and os.path.exists(log_path):  # train.py checks this earlier
            raise UserError(f"{log_path} is an earlier run's: choose another run directory")
        self._truncate(state.log_bytes, state.log_sha256)
        self.interval = config.minimum_log_interval_secs  # seconds
        self.last_train_log = -float("inf")
        self.unprinted: list[dict[str, float]] = []  # steps since the last line
        self.recent = ""  # time left, loss and accuracy of the last line, for the progress bar
        self.n_steps, self.n_tokens, self.seconds = 0, 0.0, 0.0  # of training in this process
        self.symptoms = Symptoms(config)
        self.trackers = Trackers(config, run_dir, state.wandb_run_id, state.examples)
        self.curves = CurvesDrawer(run_dir) if config.curves else None

    def _truncate(self, log_bytes: dict[str, int], log_sha256: dict[str, str]):
        """Drop what was logged after the checkpoint, since it will be logged again; warn of lost or damaged lines."""
        for name in LOG_FILES:
            path, size = os.path.join(self.run_dir, name), log_bytes.get(name, 0)
            present = os.path.getsize(path) if os.path.exists(path) else 0
            if present > size:
                os.truncate(path, size)
            if present < size:
                rank0_print(f"WARNING: {path} has {present} bytes, but had {size} at the checkpoint: lines are lost")
                _cut_to_whole_lines(path)
            elif size and log_sha256.get(name) not in (None, sha256(path)):
                rank0_print(f"WARNING: {path} has changed since the checkpoint was written: lines are damaged")

    def train_state_fields(self) -> dict:
        """Flush the log files to the disk, and return the fields of `TrainState` that describe them."""
        sizes, digests = {}, {}
        for name in LOG_FILES:
            path = os.path.join(self.run_dir, name)
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                with write_errors_named(path):
                    os.fsync(file.fileno())
                sizes[name], digests[name] = os.fstat(file.fileno()).st_size, sha256(path)
        return {"wandb_run_id": self.trackers.wandb_run_id, "log_bytes": sizes, "log_sha256": digests}

    def log(self, split: str, metrics: dict[str, float], samples: list[dict]):
        """Record one optimizer step or evaluation.

        Args:
            metrics: means, and counters.
            samples: dicts with the keys 'model' (policy or reference), 'prompt', 'response' and 'sample' (prompt and
                response).
        """
        examples = metrics["counters/examples"]
        append_json_lines(os.path.join(self.run_dir, "metrics.jsonl"), [{"split": split, **metrics}])
        samples_path = os.path.join(self.run_dir, "samples.jsonl")
        append_json_lines(samples_path, [{"counters/examples": examples, **sample} for sample in samples])
        if split == "train":
            lines = self._training_lines(metrics)
        else:
            lines = self._interval_lines() if self.unprinted else []
            lines += self._evaluation_lines(metrics, samples)
        lines += [warning(text) for text in self.symptoms.notice(split, metrics)]
        if lines:
            tqdm.write("\n".join(lines))
        if split == "eval" or not self.unprinted:
            self.trackers.log(examples, metrics, samples)
        if self.curves is not None:
            self.curves.notice(is_evaluation=split == "eval")

    def _training_lines(self, metrics: dict[str, float]) -> list[str]:
        """Return the lines to print after a step; there are none within the interval, except after the first step."""
        seconds = self.batch_size / metrics["examples_per_second"]
        n_tokens = metrics["tokens_per_second"] * seconds
        self.n_steps, self.n_tokens, self.seconds = self.n_steps + 1, self.n_tokens + n_tokens, self.seconds + seconds
        lines = []
        if self.n_steps == 1:
            lines.append(f"First step: {round(n_tokens):,} tokens; peak memory: {peak_memory()}")
        self.unprinted.append(metrics)
        if time.monotonic() - self.last_train_log < self.interval:
            return lines
        self.last_train_log = time.monotonic()
        return lines + self._interval_lines()

    def _interval_lines(self) -> list[str]:
        """Return the line for the steps since the line before."""
        means = interval_means(self.unprinted)
        self.unprinted = []
        time_left = self.table.time_left(means["counters/examples"])
        self.recent = f"{time_left} left, loss {number(means['loss/train'])}"
        if "rewards_train/accuracies" in means:
            self.recent += f", acc. {means['rewards_train/accuracies']:.1%}"
        return self.table.train(means)

    def _evaluation_lines(self, metrics: dict[str, float], samples: list[dict]) -> list[str]:
        lines = [*self.table.evaluation(metrics), *sample_lines(samples)]
        if "kl_eval/per_response" in metrics:
            error = metrics.get("kl_eval/per_response_se")  # a single sample has none
            text = (
                f"KL of the policy from the reference, on the samples: {number(metrics['kl_eval/per_response'])}"
                f"{'' if error is None else f' ± {number(error)}'} nats per response, "
                f"{number(metrics['kl_eval/per_token'])} per token"
            )
            lines.append(wrapped(text))
        return lines

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, error_class: type[BaseException] | None, *_):
        """End the trackers' runs, print the run's speed, draw the last curves."""
        failed, n_examples = error_class is not None, self.n_steps * self.batch_size
        self.trackers.close(exit_code=int(failed))
        if self.n_steps and not failed:
            text = (
                f"Trained on {counted(n_examples, 'example')} in {duration(self.seconds)} of steps: "
                f"{number(n_examples / self.seconds)} per second, {self.n_tokens / self.n_steps:,.0f} tokens per step; "
                f"peak memory: {peak_memory()}"
            )
            rank0_print(wrapped(text))
        if self.curves is not None:
            self.curves.finish(failed)


def _cut_to_whole_lines(path: str):
    """Drop an unfinished last line, so that the next line isn't appended to it."""
    if os.path.exists(path):
        with open(path, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def interval_means(steps: list[dict[str, float]]) -> dict[str, float]:
    """Return means over steps of equal size; counters and lr keep their last value, rates are the interval's."""
    means = {}
    for name, last in steps[-1].items():
        values = [step[name] for step in steps]
        if name.startswith("counters/") or name == "lr":
            means[name] = last
        elif name.endswith("_per_second"):
            means[name] = len(values) / sum(1 / value for value in values)
        else:
            means[name] = sum(values) / len(values)
    return means
