"""Learning rate schedules: the original's by default, Transformers' by name, exact after a resume."""

import math
import shutil

import pytest
import torch
from conftest import mark_exhaustive_except, read_jsonl
from test_cli import TOY
from test_resume import assert_same_run
from transformers import get_scheduler

from commands.command_line import compose_config
from config_checks.checks import check_config
from config_checks.schedules import schedules
from optimization import count_warmup_steps, make_optimizer, rate_warning

RUN = [*TOY, "loss=dpo", "sample_during_eval=false", "do_first_eval=false", "warmup_steps=3", "lr=1e-3"]
N_STEPS = 12
ARGUMENTS = {
    "warmup_stable_decay": "{num_decay_steps:4}", "cosine_with_min_lr": "{min_lr_rate:0.1}",
    "cosine_warmup_with_min_lr": "{min_lr_rate:0.1}", "cosine_with_restarts": "{num_cycles:2}",
    "polynomial": "{power:2.0,lr_end:1e-5}", "inverse_sqrt": "{timescale:5}",
}  # fmt: skip


@pytest.fixture
def make_config():
    """Return a function that composes a config as the command line does, and checks it."""

    def compose(*overrides: str):
        config = compose_config(*overrides, "wandb.enabled=false")
        check_config(config)
        return config

    return compose


def rates(run_dir) -> list[float]:
    return [line["lr"] for line in read_jsonl(run_dir / "metrics.jsonl") if line["split"] == "train"]


def rates_of(trainer) -> list[float]:
    """Return the learning rates of all steps, as the scheduler gives them."""
    values = []
    for _ in range(N_STEPS):
        values.append(trainer.scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.scheduler.step()
    return values


def test_default_schedule_is_the_originals(make_trainer):
    trainer = make_trainer(*RUN, f"n_examples={4 * N_STEPS}")
    assert rates_of(trainer) == [1e-3 * min(1.0, (step + 1) / 4) for step in range(N_STEPS)]


@pytest.mark.parametrize(
    "name",
    mark_exhaustive_except(
        [name for name in schedules() if name != "constant_with_warmup"],
        "linear",
        "warmup_stable_decay",
        "cosine_warmup_with_min_lr",
    ),
)
def test_every_schedule_equals_transformers_shifted_by_one_step(name, make_trainer):
    """Warmup has as many steps as with the default schedule, and no step has a rate of 0."""
    overrides = [f"lr_scheduler={name}", f"lr_scheduler_args={ARGUMENTS.get(name, '{}')}"]
    trainer = make_trainer(*RUN, f"n_examples={4 * N_STEPS}", *overrides)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    given = {k: v for k, v in trainer.config.lr_scheduler_args.items()}
    # give Transformers two steps more than the run has: its first and last step have a rate of 0
    theirs = get_scheduler(name, optimizer, 4, N_STEPS + 1, scheduler_specific_kwargs=given)
    expected = []
    for _ in range(N_STEPS):
        optimizer.step()
        theirs.step()
        expected.append(theirs.get_last_lr()[0])
    ours = rates_of(trainer)
    assert ours == pytest.approx(expected, rel=1e-12)
    assert min(ours) > 0
    if name not in ("constant", "cosine_warmup_with_min_lr"):
        assert ours[:3] == pytest.approx([2.5e-4, 5e-4, 7.5e-4])


@pytest.mark.slow
@pytest.mark.parametrize("trainer", mark_exhaustive_except(["BasicTrainer", "FSDPTrainer"], "BasicTrainer"))
def test_resumed_run_follows_the_schedule_exactly(trainer, launcher, tmp_path):
    run = [*RUN, "lr_scheduler=cosine", f"n_examples={4 * N_STEPS}", "eval_every=8", f"trainer={trainer}"]
    run.append("n_eval_examples=4")
    n_workers = 1 if trainer == "BasicTrainer" else 2
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert launcher.run(*run, f"local_run_dir={whole}", n_workers=n_workers) == 0, launcher.output
    shutil.copytree(whole, cut, symlinks=True)
    for name in ("LATEST", *(f"step-{n}" for n in (24, 32, 40))):
        path = cut / name
        if path.is_symlink():
            path.unlink()
        else:
            path.rename(tmp_path / f"aside-{name}")
    assert launcher.run(*run, f"local_run_dir={cut}", "resume=auto", n_workers=n_workers) == 0, launcher.output
    assert "Resuming from" in launcher.output and "16 examples" in launcher.output
    assert rates(cut) == rates(whole)
    assert rates(whole)[2] == pytest.approx(7.5e-4)
    assert rates(whole)[-1] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 8 / 9)))
    assert_same_run(cut, whole)


@pytest.mark.slow
def test_another_schedule_is_refused_on_resume(launcher, tmp_path):
    run = [*RUN, "n_examples=8", "eval_every=4", f"local_run_dir={tmp_path}/run"]
    assert launcher.run(*run) == 0, launcher.output
    assert launcher.run(*run, "resume=auto", "n_examples=16", "lr_scheduler=linear") == 1
    assert "lr_scheduler: constant_with_warmup → linear" in launcher.output


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["lr_scheduler=cosin"], ["lr_scheduler=cosin: must be one of linear, ", ". Did you mean cosine?"]),
        (["lr_scheduler=reduce_lr_on_plateau"], ["lr_scheduler=reduce_lr_on_plateau: must be one of"]),
        (["lr_scheduler=cosine", "lr_scheduler_args={cycles:1}"], ["lr_scheduler_args.cycles", "It takes: num_cycles"]),
        (["lr_scheduler_args={num_warmup_steps:1}"], ["lr_scheduler_args.num_warmup_steps", "the key warmup_steps"]),
        (["lr_scheduler=cosine_with_min_lr"], ["lr_scheduler=cosine_with_min_lr", "min_lr"]),
        (["lr_scheduler=polynomial", "lr_scheduler_args={lr_end:1}"], ["lr_scheduler=polynomial", "lr_end"]),
        (["lr_scheduler=polynomial", "lr_scheduler_args={power:x}"], ["lr_scheduler=polynomial", "power"]),
        (["lr_scheduler=warmup_stable_decay"], ["lr_scheduler=warmup_stable_decay", "num_decay_steps"]),
        (["lr_scheduler=cosine", "lr_scheduler_args={num_cycles:nan}"], ["lr_scheduler_args.num_cycles=nan", "finite"]),
        (["lr_scheduler=null"], ["lr_scheduler=None: expected a string"]),
        (["lr_scheduler_args=3"], ["lr_scheduler_args"]),
    ],
)
def test_unknown_or_invalid_schedule_is_refused(overrides, parts, refusal):
    message = refusal(*TOY, "loss=dpo", *overrides)
    assert all(part in message for part in parts), message


# ---- warmup and warnings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup", "n_steps"), [(0.1, 12), (0.5, 3), (3, 12), (0, 12)])
def test_warmup_between_0_and_1_is_a_fraction_of_the_steps(warmup, n_steps, make_trainer):
    trainer = make_trainer(*RUN, f"n_examples={4 * n_steps}", f"warmup_steps={warmup}")
    n_warmup = {0.1: 2, 0.5: 2, 3: 3, 0: 0}[warmup]  # rounded up, as transformers does
    assert count_warmup_steps(trainer.config, n_steps) == n_warmup
    assert rates_of(trainer)[:n_steps] == [1e-3 * min(1.0, (step + 1) / (n_warmup + 1)) for step in range(n_steps)]


WARNED = {  # overrides, steps, parts of the warning
    "warmup beyond the run": (
        ["warmup_steps=150", "lr=5e-7"], 8,
        ["largest learning rate of this run: 2.6e-08, 5% of lr=5e-07", "only 8 steps, and warmup_steps=150"],
    ),
    "an adapter": (["lora.r=4", "lr=5e-7", "warmup_steps=0"], 8, ["lr=5e-07 hardly moves an adapter: 1e-5 to 1e-4"]),
    "bfloat16 weights": (
        ["model.policy_dtype=bfloat16", "lr=5e-7", "warmup_steps=0"], 8, ["policy_dtype=bfloat16 rounds most updates"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WARNED)
def test_learning_rate_that_cannot_work_gives_a_warning(case, make_config):
    overrides, n_steps, parts = WARNED[case]
    warning = rate_warning(make_config(*TOY, "loss=dpo", *overrides), n_steps)
    assert warning.startswith("WARNING: ") and all(part in warning for part in parts)


@pytest.mark.parametrize(
    "overrides", [["lr=5e-7"], ["lora.r=4", "lr=2e-5"], ["model.policy_dtype=bfloat16", "lr=1e-5"]]
)
def test_usual_learning_rate_gives_no_warning(overrides, make_config):
    assert rate_warning(make_config(*TOY, "loss=dpo", "warmup_steps=0", *overrides), 100) is None


def test_data_report_ends_with_the_warning_about_the_learning_rate(train, tmp_path):
    result = train(*TOY, "loss=dpo", "data_only=true", "n_examples=32", "warmup_steps=150", "lr=1e-3")
    assert result.returncode == 0, result.stderr
    assert "WARNING: largest learning rate of this run: 5.3e-05, 5% of lr=0.001" in result.stdout


def test_biases_and_norms_can_be_left_out_of_weight_decay(make_config):
    """After one step with a zero gradient, decayed weights have shrunk by lr * weight_decay, others are unchanged."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).double()
    settings = ["optimizer=AdamW", "optimizer_args.weight_decay=0.5", "lr=0.1", "decay_biases_and_norms=false"]
    optimizer = make_optimizer(model, make_config(*TOY, *settings), torch.device("cpu"), {})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name == "0.weight" else 1
        torch.testing.assert_close(parameter.detach(), factor * before[name])
