"""Where a run's numbers and samples go: `metrics.jsonl`, `samples.jsonl`, the terminal and wandb."""

import contextlib
import hashlib
import json
import os
import time

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from utils import UserError, formatted_dict, get_local_dir, rank0_print

LOG_FILES = ("metrics.jsonl", "samples.jsonl")


class RunLog:
    """Writes every line to the run directory; the terminal and wandb get training lines at most once in
    `minimum_log_interval_secs`. Trouble with wandb is said once and never stops training.

    Leaving `with` ends the wandb run, as a failed one after an exception.
    """

    def __init__(
        self,
        config: DictConfig,
        run_dir: str,
        log_bytes: dict[str, int] | None = None,
        wandb_run_id: str | None = None,
        log_sha256: dict[str, str] | None = None,
    ):
        """A run that goes on gives what these were when the checkpoint was written."""
        os.makedirs(run_dir, exist_ok=True)
        self.run_dir = run_dir
        self._truncate(log_bytes or {}, log_sha256 or {})
        self.interval = config.minimum_log_interval_secs  # seconds
        self.last_train_log = -float("inf")
        self.wandb_run = None
        if config.wandb.enabled and not config.debug:
            self.wandb_run = start_wandb(config, run_dir, wandb_run_id)
        self.wandb_run_id = self.wandb_run.id if self.wandb_run is not None else wandb_run_id

    def _truncate(self, log_bytes: dict[str, int], log_sha256: dict[str, str]):
        """Drop what was logged after the checkpoint: it is logged again. Say what is no longer there, or another."""
        for name in LOG_FILES:
            path, size = os.path.join(self.run_dir, name), log_bytes.get(name, 0)
            present = os.path.getsize(path) if os.path.exists(path) else 0
            if present > size:
                os.truncate(path, size)
            if present < size:
                rank0_print(
                    f"WARNING: {path} has {present} bytes, {size} when the checkpoint was written: lines are lost"
                )
                _cut_to_whole_lines(path)
            elif size and log_sha256.get(name) not in (None, _sha256(path)):
                rank0_print(f"WARNING: {path} is not what it was when the checkpoint was written: lines are damaged")

    def log_bytes(self) -> dict[str, int]:
        """The size of each log file (bytes), all of it being on the disk."""
        sizes = {}
        for name in LOG_FILES:
            with contextlib.suppress(FileNotFoundError), open(os.path.join(self.run_dir, name), "rb") as file:
                os.fsync(file.fileno())
                sizes[name] = os.fstat(file.fileno()).st_size
        return sizes

    def log_sha256(self) -> dict[str, str]:
        """The SHA-256 of each log file, in hexadecimal."""
        paths = {name: os.path.join(self.run_dir, name) for name in LOG_FILES}
        return {name: _sha256(path) for name, path in paths.items() if os.path.exists(path)}

    def log(self, split: str, metrics: dict[str, float], samples: list[dict]):
        """Record one optimizer step or evaluation: `metrics` are batch means and counters.

        `samples` are dicts with the keys 'model' (policy or reference), 'prompt' and 'sample'.
        """
        examples = metrics["counters/examples"]
        self._append("metrics.jsonl", [{"split": split, **metrics}])
        self._append("samples.jsonl", [{"counters/examples": examples, **sample} for sample in samples])

        if split == "train":
            if time.monotonic() - self.last_train_log < self.interval:
                return
            self.last_train_log = time.monotonic()
        what = "train stats after" if split == "train" else "eval after"
        tqdm.write(f"{what} {examples} examples: {formatted_dict(metrics)}")
        for model in ("policy", "reference"):
            texts = [sample["sample"] for sample in samples if sample["model"] == model]
            if texts:
                tqdm.write(f"samples from the {model}: {json.dumps(texts[:10], indent=2, ensure_ascii=False)}")
        self._log_to_wandb(examples, metrics, samples)

    def _append(self, filename: str, rows: list[dict]):
        path = os.path.join(self.run_dir, filename)
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise UserError(f"can't write to {path}: {error}") from error

    def _log_to_wandb(self, examples: int, metrics: dict[str, float], samples: list[dict]):
        if self.wandb_run is None:
            return
        try:
            import wandb

            self.wandb_run.log(metrics, step=examples)
            for model in sorted({sample["model"] for sample in samples}):
                table = wandb.Table(columns=["step", "prompt", "sample"])
                for sample in samples:
                    if sample["model"] == model:
                        table.add_data(examples, sample["prompt"], sample["sample"])
                self.wandb_run.log({f"{model}_samples": table}, step=examples)
        except Exception as error:  # whatever fails there, training is worth more
            tqdm.write(f"WARNING: wandb failed and gets no more of this run, {self.run_dir} does: {error}")
            self.wandb_run = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, error_class: type[BaseException] | None, *_):
        self.close(exit_code=0 if error_class is None else 1)

    def close(self, exit_code: int = 0):
        """End the wandb run and say how to upload it, if it was offline; it failed if `exit_code` isn't 0."""
        if self.wandb_run is None:
            return
        try:
            self.wandb_run.finish(exit_code=exit_code)
            if self.wandb_run.offline:
                print(f"wandb was offline; to upload this run: wandb sync {os.path.dirname(self.wandb_run.dir)}")
        except Exception as error:
            print(f"WARNING: wandb failed at the end of the run: {error}")


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cut_to_whole_lines(path: str):
    """Drop what follows a file's last line break: the next line would join it."""
    if os.path.exists(path):
        with open(path, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def check_log_files(run_dir: str):
    """Raises UserError if something else than a file is where a run's config or logs belong."""
    for name in ("config.yaml", *LOG_FILES):
        path = os.path.join(run_dir, name)
        if os.path.lexists(path) and not os.path.isfile(path):
            raise UserError(f"{path} is no file that can be written; move it away")


def start_wandb(config: DictConfig, run_dir: str, run_id: str | None):
    """A wandb run of its own in `run_dir`, offline where nobody is logged in: training never waits for an answer.

    None if it can't start.

    With the id of an earlier run it goes on with that.
    """
    for variable in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        os.environ.setdefault(variable, os.path.join(get_local_dir(config.local_dirs), "wandb"))
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if mode in (None, "online") and not _logged_in(wandb):
        print(
            "wandb: nobody is logged in on this machine; logging offline, to be uploaded with `wandb sync` later. "
            "To log in: `wandb login`, or set WANDB_API_KEY"
        )
        mode = "offline"
    for attempt in dict.fromkeys([mode, "offline"]):
        try:
            return wandb.init(
                entity=config.wandb.entity,
                project=config.wandb.project,
                config=OmegaConf.to_container(config),
                dir=run_dir,
                name=config.exp_name,
                mode=attempt,
                id=run_id,
                resume="allow" if run_id else None,
                reinit="create_new",  # the next job of a sweep is another run
            )
        except Exception as error:
            print(f"WARNING: wandb can't start ({attempt or 'online'} mode): {error}")
    return None


def _logged_in(wandb) -> bool:
    try:
        return wandb.login(prompt=False)
    except Exception as error:  # a key of a wrong form, say
        print(f"WARNING: wandb: {error}")
        return False
