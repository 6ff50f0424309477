"""wandb and TensorBoard. A tracker that fails gives one warning and is dropped; training continues."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from reporting.terminal import warning
from utils import get_local_dir, rank0_print

if TYPE_CHECKING:
    import wandb


class Trackers:
    """The trackers that are enabled and could be started."""

    def __init__(self, config: DictConfig, run_dir: str, wandb_run_id: str | None, n_examples: int):
        """
        Args:
            wandb_run_id: the wandb run to resume, if there is one.
            n_examples: number of examples trained on so far; TensorBoard's entries beyond them are replaced.
        """
        self.run_dir, self.wandb_run_id = run_dir, wandb_run_id
        self.active: dict[str, WandbTracker | TensorBoardTracker] = {}
        if config.wandb.enabled and not config.debug:
            run = start_wandb(config, run_dir, wandb_run_id)
            if run is not None:
                self.active["wandb"], self.wandb_run_id = WandbTracker(run), run.id
        if config.tensorboard.enabled and not config.debug:
            try:
                self.active["TensorBoard"] = TensorBoardTracker(run_dir, n_examples)
            except Exception as error:  # such as incompatible versions of its libraries
                print(warning(f"TensorBoard can't start: {error}"))

    def log(self, examples: int, metrics: dict[str, float], samples: list[dict]):
        """Pass metrics and samples to all trackers, at the step `examples`."""
        for name, tracker in list(self.active.items()):
            try:
                tracker.log(examples, metrics, samples)
            except Exception as error:  # a failing tracker must not end training
                tqdm.write(warning(f"{name} failed and is dropped; {self.run_dir} still gets everything: {error}"))
                del self.active[name]

    def close(self, exit_code: int):
        """End the trackers' runs, marked as failed unless `exit_code` is 0."""
        for name, tracker in self.active.items():
            try:
                tracker.close(exit_code)
            except Exception as error:
                print(warning(f"{name} failed at the end of the run: {error}"))


@dataclass
class WandbTracker:
    """A wandb run: metrics, and a table of samples for each model."""

    run: "wandb.Run"

    def log(self, examples: int, metrics: dict[str, float], samples: list[dict]):
        """See `Trackers.log`."""
        import wandb

        self.run.log(metrics, step=examples)
        for model in sorted({sample["model"] for sample in samples}):
            table = wandb.Table(columns=["step", "prompt", "sample"])
            for sample in samples:
                if sample["model"] == model:
                    table.add_data(examples, sample["prompt"], sample["sample"])
            self.run.log({f"{model}_samples": table}, step=examples)

    def close(self, exit_code: int):
        """End the run; if it was offline, print how to upload it."""
        self.run.finish(exit_code=exit_code)
        if self.run.offline:
            rank0_print(f"wandb was offline; to upload this run: wandb sync {os.path.dirname(self.run.dir)}")


class TensorBoardTracker:
    """Event files in `run_dir`/tensorboard: metrics as scalars, samples as text."""

    def __init__(self, run_dir: str, n_examples: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(os.path.join(run_dir, "tensorboard"), purge_step=n_examples + 1)

    def log(self, examples: int, metrics: dict[str, float], samples: list[dict]):
        """See `Trackers.log`."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, examples)
        for model in sorted({sample["model"] for sample in samples}):
            texts = [sample["sample"] for sample in samples if sample["model"] == model]
            as_code = ["    " + text.replace("\n", "\n    ") for text in texts]  # the text may hold Markdown
            self.writer.add_text(f"samples/{model}", "\n\n---\n\n".join(as_code), examples)
        self.writer.flush()

    def close(self, _exit_code: int):
        """Flush and close the event file."""
        self.writer.close()


def start_wandb(config: DictConfig, run_dir: str, run_id: str | None):
    """Start a wandb run in `run_dir`, or resume the one with this id; return None if it can't start.

    If nobody is logged in, the run is offline: wandb must never wait for an answer at the terminal.
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
                entity=config.wandb.entity, project=config.wandb.project, config=OmegaConf.to_container(config),
                dir=run_dir, name=config.exp_name, mode=attempt, id=run_id, resume="allow" if run_id else None,
                reinit="create_new",  # each job of a sweep is a run of its own
                settings=wandb.Settings(quiet=True),  # prints no history of every metric at the end
            )  # fmt: skip
        except Exception as error:
            print(warning(f"wandb can't start ({attempt or 'online'} mode): {error}"))
    return None


def _logged_in(wandb) -> bool:
    try:
        return wandb.login(prompt=False)
    except Exception as error:  # such as a malformed key
        print(warning(f"wandb: {error}"))
        return False
