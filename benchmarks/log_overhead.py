"""The cost of logging per training step: `python benchmarks/log_overhead.py [--steps N]`, a few minutes on a CPU.

It takes DPO steps with the tiny model on the toy data, each batch once with and once without logging. Logging includes
the metrics that the original didn't have, metrics.jsonl, lines in the terminal every second, TensorBoard, and starting
the process that draws curves. The order alternates, and the median ratio of the two is reported, so that other load on
the machine affects both alike. Times are CPU time of this process; drawing a picture is measured separately.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import trainers
from commands.command_line import with_free_keys
from config_checks.checks import check_config
from config_checks.schema import CONFIG_DIR
from models import load_policy, load_reference
from reporting import curves
from reporting.run_log import RunLog
from reporting.runs import read_run


def make_trainer(directory: str, batch_size: int):
    """Return a trainer with its log, ready for the first step."""
    overrides = [
        "model=tiny", "datasets=[toy]", "loss=dpo", "max_length=64", "max_prompt_length=32", "n_eval_examples=16",
        f"batch_size={batch_size}", "wandb.enabled=false", "tensorboard.enabled=true", 
        f"local_dirs=[{directory}]", f"local_run_dir={directory}/run", "n_examples=20000",
    ]  # fmt: skip
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = compose("config", with_free_keys([*overrides, "exp_name=log_overhead"]))
    OmegaConf.resolve(config)
    check_config(config)
    policy = load_policy(config)
    trainer = trainers.BasicTrainer(
        policy, config, 0, config.local_run_dir, reference_model=lambda: load_reference(config, None)
    )
    trainer.run_log = RunLog(config, config.local_run_dir, 20_000, 20_000, trainer.state)
    return trainer


def main():
    """Print the median time of a step with and without logging, and the time to draw a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="pairs of steps (default: 60)")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    response_metrics = trainers.response_metrics
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(directory, args.batch_size)
        batches = trainer.train_iterator.batches()
        ratios, seconds = [], {True: [], False: []}
        for number, batch in zip(range(args.steps + 3), batches, strict=False):
            step_seconds = {}
            for is_logged in (True, False) if number % 2 else (False, True):
                trainers.response_metrics = response_metrics if is_logged else lambda *_: {}
                start = time.process_time()
                metrics = trainer.train_step(batch)
                if is_logged:
                    trainer.log("train", metrics)
                step_seconds[is_logged] = time.process_time() - start
            if number >= 3:  # the first steps warm up
                ratios.append(step_seconds[True] / step_seconds[False])
                for is_logged, value in step_seconds.items():
                    seconds[is_logged].append(value)
        trainer.run_log.trackers.close(0)
        start = time.process_time()
        curves.draw([read_run(f"{directory}/run")], f"{directory}/run/curves.png")
        drawing = time.process_time() - start
    for is_logged, name in ((False, "without logging"), (True, "with logging")):
        print(f"{name:>16}: {statistics.median(seconds[is_logged]) * 1e3:8.2f} ms per step")
    print(f"{'overhead':>16}: {statistics.median(ratios) - 1:8.2%} (median over {len(ratios)} pairs of steps)")
    print(f"{'a picture':>16}: {drawing:8.2f} s in another process; in a run, drawing takes at most 2 % of the time")


if __name__ == "__main__":
    main()
