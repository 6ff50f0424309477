"""Measure time and memory of writing and reading checkpoints: `python benchmarks/checkpoints.py`, on Linux.

Workers of FSDPTrainer, connected by gloo, save and load the state of a model with random weights (float32, RMSprop)
after one step of SFT, in each of the formats. The columns, medians of several rounds through the formats:
  waits      seconds until training continues
  total      seconds until the checkpoint is on disk
  MB         size of the checkpoint
  peak       peak increase of memory (MB) while saving or loading: of rank 0, and the maximum over the other workers
  load       seconds until all workers have loaded weights and optimizer from it (files are in the page cache)
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import print_header, print_row, process_memory, reset_peak_memory, resized_tiny_model
from omegaconf import DictConfig, OmegaConf

import trainers
from checkpointing.optimizer_state import load_optimizer_state
from checkpointing.restoring import load_checkpoint
from checkpointing.saving import begin_save
from commands.command_line import compose_config
from config_checks.checks import check_config
from distributed import connection, launch
from distributed.collectives import all_gather_object, barrier

FORMATS = {"whole": ("whole", False), "sharded": ("sharded", False), "sharded, asynchronous": ("sharded", True)}
COLUMNS = ("waits", "total", "MB", "peak of rank 0", "peak of others", "load", "load: peak of rank 0", "of others")


def measured(function: Callable[[], float | None]) -> tuple[float, float, float]:
    """Call a function on all workers; return the seconds, rank 0's memory peak and the highest of the others (MB).

    The seconds are the function's result or, if that is None, its duration.
    """
    barrier()
    before, start_time = reset_peak_memory(), time.perf_counter()
    seconds = function()
    seconds = time.perf_counter() - start_time if seconds is None else seconds
    by_worker = all_gather_object((seconds, (process_memory("VmHWM") - before) / 1e6))
    return max(s for s, _ in by_worker), by_worker[0][1], max((m for _, m in by_worker[1:]), default=0.0)


def round_trip(trainer: trainers.BasicTrainer, name: str) -> list[float]:
    """Save and load a checkpoint in one format; return the figures of `COLUMNS`."""
    trainer.config.checkpoint_format, trainer.config.checkpoint_async = FORMATS[name]
    path, start_time, waited = os.path.join(trainer.run_dir, "step-1"), time.perf_counter(), 0.0

    def save() -> float:
        nonlocal waited
        begin_save(trainer, path)
        waited = time.perf_counter() - start_time
        trainer.background.wait()
        return time.perf_counter() - start_time

    def load():
        load_checkpoint(trainer, path)
        load_optimizer_state(path, trainer.optimizer, trainer.scheduler, trainer.config)

    os.sync()
    barrier()
    start_time = time.perf_counter()
    total, *peaks = measured(save)
    waits = max(all_gather_object(waited))
    size = sum(file.stat().st_size for file in Path(path).iterdir()) / 1e6
    figures = [waits, total, size, *peaks, *measured(load)]
    if trainer.rank == 0:
        shutil.rmtree(path)
    barrier()
    return figures


def measure(config: DictConfig, n_rounds: int, path: str):
    """Take a step, then save and load in each format; rank 0 writes the figures to `path`."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), connection.process_group():
        trainer = trainers.make_trainer(config)
        trainer.train_step(next(iter(trainer.train_iterator.batches(0))))
        os.makedirs(trainer.run_dir, exist_ok=True)
        rounds = [{name: round_trip(trainer, name) for name in FORMATS} for _ in range(n_rounds)]
        if trainer.rank == 0:
            Path(path).write_text(json.dumps(rounds))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocabulary", type=int, default=50304, help="tokens that the model embeds")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as directory:
        sizes = {"vocab_size": args.vocabulary, "num_attention_heads": args.hidden // 64}
        model = resized_tiny_model(f"{directory}/model", args.hidden, args.layers, **sizes)
        config = compose_config(
            "trainer=FSDPTrainer", f"world_size={args.workers}", "model=blank_model", f"model.name_or_path={model}",
            "model.from_scratch=true", "loss=sft", "datasets=[toy]", "max_length=32", "max_prompt_length=16",
            f"batch_size={args.workers}", f"eval_batch_size={args.workers}", f"n_examples={args.workers}",
            f"n_eval_examples={args.workers}", "sample_during_eval=false", "wandb.enabled=false", "shared_prompt=false",
            f"local_dirs=[{directory}/cache]", f"local_run_dir={directory}/run",
        )  # fmt: skip
        OmegaConf.resolve(config)
        check_config(config)
        launch.run_workers(measure, args.workers, None, config, args.rounds, f"{directory}/figures.json")
        rounds = json.loads(Path(directory, "figures.json").read_text())
    print_header(["checkpoint", *COLUMNS])
    for name in FORMATS:
        figures = [statistics.median(values) for values in zip(*(figures[name] for figures in rounds), strict=True)]
        print_row([name, *(f"{figure:,.1f}" if figure < 100 else f"{figure:,.0f}" for figure in figures)])


if __name__ == "__main__":
    main()
