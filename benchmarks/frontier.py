"""Reward against KL for every objective, and the most that any policy can reach: `python benchmarks/frontier.py`.

This is the paper's controlled-sentiment experiment (Figure 2, left, of https://arxiv.org/abs/2305.18290) on `toy`, with
known true reward and optimum. After one SFT run, it trains with each loss of pairs at five strengths on 10,000 pairs,
by `train.run`, as `python train.py` would. At the middle strength, it does so again with a fifth of the labels flipped,
with only 300 pairs, and on `toy_length`, whose labels also favour length. Rewards and KL are exact: see `exact.py`.

The model is a GPT-NeoX of 0.36 million parameters with the tiny model's tokenizer; `--model tiny` uses the tiny model
itself and takes three times as long. All 198 runs take about two and a half hours of CPU time in two processes;
`--quick` (DPO and IPO) takes a few minutes. Each run writes a JSON file under `--out`; runs that have one are skipped.
Finally, tables are printed and a picture is drawn.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import toy_length
import transformers
from common import REPOSITORY, resized_tiny_model
from exact import Frontier, ResponseTree, Task, response_logps
from omegaconf import OmegaConf

import train
from commands.command_line import compose_config
from data import toy
from losses import LOSSES
from objectives.declaration import KL_ESTIMATE, LOGPS, MEAN_LENGTH, MEMORY, Memory
from preference_datasets import DATASETS, Dataset

COMMON = [
    "model=tiny", "max_length=64", "max_prompt_length=32", "n_epochs=null", "n_eval_examples=64", "eval_batch_size=64",
    "do_first_eval=false", "sample_during_eval=false", "wandb.enabled=false", "exp_name=frontier", "resume=auto",
    "resume_anyway=true", "eval_every=1000000",
]  # fmt: skip

DATASETS |= {
    "toy_flipped": Dataset(functools.partial(toy.get_toy, flipped=0.2)),
    "toy_scarce": Dataset(functools.partial(toy.get_toy, n_train=300)),
    "toy_length": Dataset(toy_length.get_toy_length),
    "toy_preferred": Dataset(functools.partial(toy.get_toy, imitates_preferred=True)),
}

# ---- runs -----------------------------------------------------------------------------------------------------------

# A run is trained in legs, each resumed from the one before: (examples at the leg's end, factor of the learning rate)
LEGS = ((7040, 1.0), (10016, 0.15))
SFT_LEGS = ((24960, 4e-3), (54912, 3e-3), (79872, 8e-4), (89856, 1e-4))  # (examples at the end, AdamW's learning rate)

BETAS = (2.0, 1.5, 1.0, 0.7, 0.5)
STRENGTHS = {  # an option of the loss and five values, from closest to the reference to farthest
    "ipo": ("beta", (0.26, 0.2, 0.13, 0.09, 0.065)),  # IPO's 1/τ scales a probability of winning, not a reward
    "sppo": ("beta", (0.52, 0.4, 0.26, 0.18, 0.13)),  # its 1/β is the log-ratio of a pair with a sure winner
    "simpo": ("beta", (40.0, 20.0, 10.0, 5.0, 2.0)),  # SimPO's β scales a mean over about 18 tokens
    "orpo": ("beta", (0.1, 0.25, 0.5, 1.0, 2.0)),
    "cpo": ("beta", (0.1, 0.25, 0.5, 1.0, 2.0)),
}
VARIANTS = {  # objectives that are another loss with certain settings
    "cdpo": ("dpo", ("loss.label_smoothing=0.1",)),
    "tr_dpo": ("dpo", ("reference_update_every=32", "reference_update_alpha=0.6")),
}
CORE = ("dpo", "cdpo", "ipo", "robust_dpo")
STEP_SIZE = 0.02  # the same for every objective; for DPO it means a learning rate of 0.04 / β, see `learning_rate`


@dataclass(frozen=True)
class Run:
    """One training run from the SFT model, with its name and its command line."""

    objective: str
    strength: float | None
    data: str = "toy"
    step_size: float = STEP_SIZE
    optimizer: tuple[str, ...] = ("optimizer=SGD",)
    legs: tuple[tuple[int, float], ...] = LEGS
    every: int = 3520  # examples between evaluations; the end of each leg is evaluated, too
    extra: tuple[str, ...] = field(default=())

    @property
    def loss(self) -> str:
        return VARIANTS.get(self.objective, (self.objective,))[0]

    @property
    def name(self) -> str:
        parts = [self.data, self.objective, self.strength, f"step{self.step_size}"]
        parts += [word.split("=", 1)[1] for word in self.optimizer if word != "optimizer=SGD"] + list(self.extra)
        return "_".join("".join(c if c.isalnum() or c in ".-" else "-" for c in str(part)) for part in parts)

    def overrides(self) -> list[str]:
        """Return the run's settings for the command line, without its learning rate."""
        variant_settings = VARIANTS.get(self.objective, (self.objective, ()))[1]
        overrides = [f"loss={self.loss}", f"datasets=[{self.data}]", *variant_settings, *self.optimizer]
        if self.strength is not None:
            overrides.append(f"loss.{strength_option(self.objective)}={self.strength}")
        loss = LOSSES[self.loss]
        updates_reference = any(word.startswith("reference_update") for word in variant_settings)
        if loss.needs_reference({}) and not loss.takes_kl_estimate and not updates_reference:
            overrides.append("precompute_ref_log_probs=true")
        return [*overrides, "batch_size=32", "warmup_steps=10", f"save_every={self.every}", *self.extra]


def strength_option(objective: str) -> str:
    return STRENGTHS.get(objective, ("beta", BETAS))[0]


def strengths(objective: str) -> tuple[float, ...]:
    return STRENGTHS.get(objective, ("beta", BETAS))[1]


def objectives() -> list[str]:
    """Return all losses of pairs, conservative DPO, and DPO with a reference that is updated."""
    names = [name for name, loss in LOSSES.items() if loss.needs_pairs]
    return [*names[:1], *VARIANTS, *names[1:]]


def learning_rate(run: Run, n_tokens: int) -> float:
    """Return step_size / |∂ loss / ∂ log π| at the reference, for two responses of equal likelihood.

    The derivative is the larger of those with respect to the two responses' log-probabilities. This makes SGD's steps
    independent of an objective's scale and strength; for DPO the result is 2 · step_size / β. Other optimizers don't
    need it. DPOP's loss has a kink at the reference; the slope is that of the steeper side, where the preferred
    response is less likely than under the reference.
    """
    if "optimizer=SGD" not in run.optimizer:
        return run.step_size
    loss = LOSSES[run.loss]
    given = OmegaConf.from_dotlist([word for word in run.overrides() if word.startswith("loss.")]).get("loss", {})
    options = {name: option.default for name, option in loss.options.items()} | dict(given)
    trained = {
        name: torch.tensor([logp], requires_grad=True) for name, logp in zip(LOGPS[:2], (-8.0001, -8.0), strict=True)
    }
    inputs = {name: torch.tensor([-8.0]) for name in LOGPS} | trained
    inputs |= {f"{side}_lengths": torch.tensor([n_tokens]) for side in ("chosen", "rejected")}
    inputs |= {KL_ESTIMATE: torch.tensor(0.0), MEAN_LENGTH: torch.tensor(float(n_tokens)), MEMORY: Memory()}
    loss.compute(inputs, options).losses.mean().backward()
    return run.step_size / max(abs(logps.grad.item()) for logps in trained.values() if logps.grad is not None)


# ---- execution ------------------------------------------------------------------------------------------------------


def tasks() -> dict[str, Task]:
    """Return the two tasks, by the name of their SFT dataset."""
    words, clauses = toy_length.all_responses()
    long_texts = [toy_length.response_text(w, n) for w, n in zip(words, clauses, strict=True)]
    texts = [toy.response_text(words) for words in toy.ALL_RESPONSES]
    return {
        "toy": Task(toy.PROMPTS, texts, toy.true_reward(toy.ALL_RESPONSES)),
        "toy_length": Task(toy.PROMPTS, long_texts, toy.true_reward(words)),
    }


class Start:
    """A task's SFT model, from which all runs on the task start, and its exact log-probabilities."""

    def __init__(self, name: str, task: Task, bench: "Bench"):
        self.name, self.task, self.bench = name, task, bench
        self.directory = bench.out / f"sft_{name}"

    @functools.cached_property
    def tree(self) -> ResponseTree:
        tokenizer = self.bench.tokenizer
        tokens = tokenizer(self.task.responses, add_special_tokens=False)["input_ids"]
        return ResponseTree([[*ids, tokenizer.eos_token_id] for ids in tokens])

    def logps(self, checkpoint: Path) -> np.ndarray:
        """Compute log π of all responses to all prompts under a checkpoint's policy, (P, N)."""
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
        prompts = self.bench.tokenizer(self.task.prompts, add_special_tokens=False)["input_ids"]
        return response_logps(model, self.tree, prompts)

    @functools.cached_property
    def reference_logps(self) -> np.ndarray:
        return np.load(self.directory / "reference.npy")

    @functools.cached_property
    def frontier(self) -> Frontier:
        """The frontier with the SFT model as its reference."""
        return Frontier(self.reference_logps, self.task.rewards, self.tree.lengths)

    def prepare(self):
        """Train the SFT model with AdamW on 90,000 examples (4.5 epochs), with a falling learning rate; save its logps.

        What an earlier call has done is kept.
        """
        state = self.directory / "LATEST/state.json"
        for n_examples, lr in SFT_LEGS:
            if state.exists() and json.loads(state.read_text())["examples"] >= n_examples:
                continue
            settings = ["loss=sft", f"datasets=[{self.name}]", "optimizer=AdamW", "batch_size=64", "warmup_steps=20"]
            self.bench.train(self.directory, *settings, f"lr={lr}", f"n_examples={n_examples}")
        if not (self.directory / "reference.npy").exists():
            np.save(self.directory / "reference.npy", self.logps(self.directory / "LATEST"))


class Bench:
    """A directory with the model, the SFT runs that all others start from, and the results."""

    def __init__(self, out: Path, model: str):
        self.out, self.results = out, out / "results"
        self.results.mkdir(parents=True, exist_ok=True)
        self.model = REPOSITORY / "assets/tiny"
        if model == "small":
            self.model = out / "model"
            if not (self.model / "config.json").exists():
                resized_tiny_model(str(self.model), hidden=64, layers=2)
        self.starts = {name: Start(name, task, self) for name, task in tasks().items()}

    @functools.cached_property
    def tokenizer(self):
        return transformers.AutoTokenizer.from_pretrained(self.model)

    def start(self, data: str) -> Start:
        """Return the SFT model that a run on this dataset starts from."""
        return self.starts["toy_length" if data == "toy_length" else "toy"]

    def train(self, directory: Path, *overrides: str):
        """Run the work of `python train.py ...` in this process; append its output to `DIRECTORY.log`."""
        places = [f"model.name_or_path={self.model}", f"local_dirs=[{self.out}]", f"local_run_dir={directory}"]
        config = compose_config(*COMMON, *places, *overrides)
        with open(f"{directory}.log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            train.run(config)

    def execute(self, run: Run) -> str:
        """Train a run, evaluate its checkpoints, write its figures and delete the checkpoints."""
        if self.result(run) is not None:
            return run.name
        path = self.results / f"{run.name}.json"
        directory, start_time, checkpoints = self.out / "runs" / run.name, time.perf_counter(), []
        shutil.rmtree(directory, ignore_errors=True)
        directory.parent.mkdir(exist_ok=True)
        start = self.start(run.data)
        lr = learning_rate(run, int(start.tree.lengths.mean()))
        archive, error = f"model.archive={start.directory}/LATEST/policy.pt", None
        try:
            for n_examples, factor in run.legs:
                self.train(directory, *run.overrides(), archive, f"lr={lr * factor}", f"n_examples={n_examples}")
                evaluated = [checkpoint["examples"] for checkpoint in checkpoints]
                checkpoints += self.evaluate(start, directory, n_examples, evaluated)
        except train.UserError as user_error:  # the loss is no longer finite
            error = str(user_error).split("\n")[0]
        result = {"run": asdict(run), "lr": lr, "checkpoints": checkpoints, "error": error}
        result["seconds"] = round(time.perf_counter() - start_time, 1)
        path.with_suffix(".partial").write_text(json.dumps(result, indent=1))
        os.replace(path.with_suffix(".partial"), path)
        shutil.rmtree(directory, ignore_errors=True)
        return run.name

    def evaluate(self, start: Start, directory: Path, n_examples: int, evaluated: list[int]) -> list[dict]:
        """Return the figures of a leg's checkpoints, LATEST included, that aren't evaluated yet."""
        steps = {int(path.name[5:]): path for path in directory.glob("step-*")} | {n_examples: directory / "LATEST"}
        checkpoints = []
        for examples in sorted(steps.keys() - set(evaluated)):
            figures = start.frontier.figures(start.logps(steps[examples]))
            fraction = start.frontier.fraction(figures)
            checkpoints.append({"examples": examples, "fraction": fraction, **asdict(figures)})
        return checkpoints

    def result(self, run: Run) -> dict | None:
        """Return a run's figures, or None if it hasn't been trained with these settings."""
        path = self.results / f"{run.name}.json"
        result = json.loads(path.read_text()) if path.exists() else {"run": None}
        return result if result["run"] == json.loads(json.dumps(asdict(run))) else None


# ---- groups of runs -------------------------------------------------------------------------------------------------


def sweep(objective: str, data: str = "toy", which: tuple[int, ...] = (0, 1, 2, 3, 4)) -> list[Run]:
    """Return the runs of an objective at its strengths with the indices `which`."""
    every = 1760 if data == "toy_scarce" else 3520
    return [Run(objective, strengths(objective)[index], data, every=every) for index in which]


def preferred_sft() -> Run:
    """Return a run of SFT on the preferred responses, a baseline whose KL can't exceed ln 2 nats."""
    return Run("sft", None, "toy_preferred", step_size=0.05)


def optimizer_runs(larger_rate: bool) -> list[Run]:
    """Return runs of DPO at β = 0.5 with other optimizers; two have a larger eps and one an NLL term, as remedies.

    Args:
        larger_rate: take the larger of two constant learning rates.
    """
    runs = []
    for objective, optimizer, settings, rates in (
        ("dpo", "RMSprop", (), (1e-4, 3e-4)),
        ("dpo", "AdamW", (), (1e-4, 3e-4)),
        ("dpo", "RMSprop", ("optimizer_args={eps:1e-3}",), (3e-4, 1e-3)),
        ("dpo", "AdamW", ("optimizer_args={eps:1e-3}",), (3e-4, 1e-3)),
        ("dpo_nll", "RMSprop", (), (1e-4, 3e-4)),
    ):
        overrides = (f"optimizer={optimizer}", *settings)
        runs.append(Run(objective, 0.5, step_size=rates[larger_rate], optimizer=overrides, legs=((10016, 1.0),)))
    return runs


def length_runs(names: list[str]) -> list[Run]:
    """Return runs at the objectives' middle strength on `toy_length`; for DPO, also with remedies against length."""
    runs = [run for name in names for run in sweep(name, "toy_length", (2,))]
    if "dpo" in names:
        penalties = [0.01, toy_length.LENGTH_BIAS / 8]  # the default, and the labels' bias per token
        runs += [Run("length_dpo", 1.0, "toy_length", extra=(f"loss.length_penalty={p:g}",)) for p in penalties]
        runs.append(Run("dpo_norm", 18.0, "toy_length"))
    return runs


def all_runs(quick: bool) -> list[Run]:
    """Return all runs, the most informative ones first."""
    # length_dpo and dpo_norm are DPO if all responses are equally long, as here
    names = [name for name in objectives() if name not in ("length_dpo", "dpo_norm")]
    if quick:
        return [*sweep("dpo", which=(0, 2, 4)), *sweep("ipo", which=(2,))]
    return [
        *sweep("dpo"),
        preferred_sft(),
        *(run for name in names for run in sweep(name, which=(2,))),
        *(run for name in CORE for run in sweep(name, which=(0, 4))),
        *optimizer_runs(larger_rate=False),
        *(run for name in CORE for data in ("toy_flipped", "toy_scarce") for run in sweep(name, data, (2,))),
        *length_runs(["dpo", "ipo", "simpo"]),
        *(run for name in names for data in ("toy_flipped", "toy_scarce") for run in sweep(name, data, (2,))),
        *length_runs(names),
        *optimizer_runs(larger_rate=True),
        *(run for name in names for run in sweep(name, which=(0, 4))),
        *(run for name in names for run in sweep(name, which=(1, 3))),
    ]


_BENCH: Bench | None = None


def _start_worker(out: Path, model: str):
    global _BENCH
    torch.set_num_threads(1)  # there is one process per core
    transformers.utils.logging.disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"
    _BENCH = Bench(out, model)


def _execute(run: Run) -> str:
    return _BENCH.execute(run)


def _prepare(name: str):
    _BENCH.starts[name].prepare()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / ".cache/frontier", help="folder for the results")
    parser.add_argument("--model", choices=["small", "tiny"], default="small")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="only DPO and IPO")
    parser.add_argument("--report", action="store_true", help="report existing results without running anything")
    args = parser.parse_args()
    out = args.out.resolve() / args.model
    bench = Bench(out, args.model)
    if not args.report:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.processes, context, _start_worker, (out, args.model)) as pool:
            list(pool.map(_prepare, ["toy"] if args.quick else bench.starts))
            todo = {run.name: run for run in all_runs(args.quick) if bench.result(run) is None}
            for future in as_completed([pool.submit(_execute, run) for run in todo.values()]):
                print(summary(bench, todo[future.result()]), flush=True)
    from frontier_report import write_report

    print(write_report(bench, {name: (strength_option(name), strengths(name)[2]) for name in objectives()}))


def summary(bench: Bench, run: Run) -> str:
    result = bench.result(run)
    if not result["checkpoints"]:
        return f"{run.name}: {result['error']}"
    end = result["checkpoints"][-1]
    return (
        f"{run.name}: {end['fraction']:.1%} of the optimum's gain at {end['kl']:.2f} nats, "
        f"{end['outside']:.2%} outside the grammar, {result['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
