"""A run that is killed at any moment and resumed ends exactly as one that never stopped."""

import itertools
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from conftest import ORACLE, mark_exhaustive_except, read_jsonl

from checkpointing.stop_signal import EXIT_CODE
from checkpointing.train_state import get_rng_state, set_rng_state

SMALL = [
    "model=tiny", "max_length=40", "max_prompt_length=32", "n_eval_examples=8", "eval_batch_size=4",
    "n_eval_model_samples=1", "lr=1e-3", "warmup_steps=10", "eval_every=16", "save_every=8",
]  # fmt: skip
TOY = [*SMALL, "datasets=[toy]", "n_examples=80"]
SIGUSR1 = getattr(signal, "SIGUSR1", None)  # Windows has none


@pytest.fixture(scope="module")
def few_pairs(tmp_path_factory) -> str:
    """Return the override for a copy of hh so small that two epochs are short."""
    directory = tmp_path_factory.mktemp("hh")
    for split in ("train", "test"):
        lines = (ORACLE / "hh" / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (directory / f"{split}.jsonl").write_text("".join(lines[:80]))
    return f"dataset_paths.hh={directory}"


@pytest.fixture(scope="module")
def adapter(launcher):
    """Return the directory of an adapter trained by SFT."""
    run_dir = launcher.directory / "adapter"
    code = launcher.run(*TOY, "lora={r:4}", "n_examples=8", "sample_during_eval=false", f"local_run_dir={run_dir}")
    assert code == 0, launcher.output
    return run_dir / "LATEST"


def log_lines(run_dir) -> list[dict]:
    lines = read_jsonl(run_dir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.endswith("_per_second")} for line in lines]


def assert_same_run(run_dir, expected):
    """Check that two run directories are equal, bit for bit, except for times, paths and the number of stops."""
    assert log_lines(run_dir) == log_lines(expected)
    assert (run_dir / "samples.jsonl").read_bytes() == (expected / "samples.jsonl").read_bytes()
    assert sorted(os.listdir(run_dir)) == sorted(os.listdir(expected))
    for checkpoint in [path for path in expected.iterdir() if path.is_dir()]:
        names = sorted(os.listdir(checkpoint))
        assert sorted(os.listdir(run_dir / checkpoint.name)) == names
        for name in set(names) - {"state.json", "SHA256SUMS", "adapter_config.json", "README.md"}:
            same = (run_dir / checkpoint.name / name).read_bytes() == (checkpoint / name).read_bytes()
            assert same, f"{checkpoint.name}/{name}"
        states = [json.loads((d / checkpoint.name / "state.json").read_text()) for d in (run_dir, expected)]
        for state in states:
            del state["log_bytes"], state["log_sha256"]  # speeds differ
        assert states[0] == states[1]


def half_saved(run_dir) -> bool:
    checkpoints = [name for name in os.listdir(run_dir) if not name.startswith("config")] if run_dir.exists() else []
    return any(".partial-" in name or name.endswith(".replaced") for name in checkpoints)


def kill_at_random(launcher, run_dir, rng: random.Random, training_seconds: float, when: str) -> bool:
    """SIGKILL the run while it loads, trains or saves; return True if it died while it wrote a checkpoint."""
    if when == "loading":
        time.sleep(rng.uniform(0, 0.6))
    else:
        launcher.wait_for("Writing to|This run is complete")
        time.sleep(rng.uniform(0, training_seconds / 4))
    while when == "saving" and launcher.runs[-1].is_running:
        if half_saved(run_dir):
            time.sleep(rng.uniform(0, 0.03))
            launcher.kill(signal.SIGSTOP)
            if half_saved(run_dir):
                break
            launcher.kill(signal.SIGCONT)  # the save had finished: wait for the next checkpoint
        time.sleep(0.001)
    launcher.kill(signal.SIGKILL)
    # near the end, the run may finish first
    assert launcher.wait() in (-signal.SIGKILL, 0), launcher.output
    return when != "loading" and half_saved(run_dir)


TWO_EPOCHS = ["datasets=[hh]", "n_epochs=2", "n_examples=null"]
KINDS = {
    "dpo": ["loss=dpo", "n_examples=48"],
    "sft, two epochs": ["loss=sft", *TWO_EPOCHS, "optimizer=AdamW"],
    "dpo, a saved adapter, precomputed, two epochs": [
        "loss=dpo", *TWO_EPOCHS, "model.adapter={adapter}", "precompute_ref_log_probs=true",
    ],
}  # fmt: skip
MOMENTS = {"dpo": ["saving", "training"]}


@pytest.mark.parametrize("kind", mark_exhaustive_except(KINDS, "dpo"))
def test_run_killed_at_random_moments_ends_as_one_that_never_stopped(kind, launcher, few_pairs, tmp_path, request):
    overrides = [*TOY, *KINDS[kind], few_pairs]
    if "model.adapter={adapter}" in overrides:
        overrides[overrides.index("model.adapter={adapter}")] = f"model.adapter={request.getfixturevalue('adapter')}"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    launcher.start(*overrides, f"local_run_dir={whole}")
    launcher.wait_for("Writing to")
    start = time.monotonic()
    assert launcher.wait() == 0, launcher.output
    training_seconds = time.monotonic() - start

    rng, n_in_saves = random.Random(kind), 0
    for when in MOMENTS.get(kind, ["training", "saving", "loading", "training", "saving", "training"]):
        launcher.start(*overrides, f"local_run_dir={cut}", "resume=auto")
        n_in_saves += kill_at_random(launcher, cut, rng, training_seconds, when)
    assert n_in_saves >= 1
    assert launcher.run(*overrides, f"local_run_dir={cut}", "resume=auto") == 0, launcher.output
    assert_same_run(cut, whole)

    before = {path: path.stat().st_mtime_ns for path in cut.rglob("*")}
    assert launcher.run(*overrides, f"local_run_dir={cut}", "resume=auto") == 0
    assert "This run is complete" in launcher.output
    assert {path: path.stat().st_mtime_ns for path in cut.rglob("*")} == before


SIGNALLED = {  # when it is sent: overrides, the log line after which it is sent, the line that must not follow
    "evaluation": (["n_eval_examples=100", "n_examples=8"], "Writing to", "eval 0 "),
    "sampling": (["n_eval_model_samples=16", "n_eval_examples=16", "n_examples=16"], "Writing to", "eval 0 "),
    "training": (["do_first_eval=false", "n_examples=200", "eval_every=480"], "First step: ", "eval 200 "),
}  # fmt: skip


@pytest.mark.parametrize(
    ("number", "where"),
    mark_exhaustive_except(
        [(signal.SIGTERM, "evaluation"), (signal.SIGINT, "sampling"), (SIGUSR1, "training")],
        (signal.SIGTERM, "evaluation"),
    ),
    ids=str,
)
def test_signal_saves_and_exits_with_75_and_nothing_is_lost(number, where, launcher, tmp_path):
    overrides, last_line_before, first_line_after = SIGNALLED[where]
    overrides = [*TOY, "loss=dpo", "save_every=480", *overrides]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    launcher.start(*overrides, f"local_run_dir={whole}")
    launcher.wait_for(last_line_before)
    start = time.monotonic()
    launcher.wait_for(first_line_after)
    seconds = time.monotonic() - start
    assert launcher.wait() == 0, launcher.output

    for part in (0.25, 0.1, 0):  # earlier each time, as a run faster than the first one gets its signal too late
        shutil.rmtree(cut, ignore_errors=True)
        launcher.start(*overrides, f"local_run_dir={cut}")
        launcher.wait_for(last_line_before)
        time.sleep(seconds * part)
        launcher.kill(number)
        sent = time.monotonic()
        code = launcher.wait()
        if first_line_after not in launcher.output:
            break
    assert code == EXIT_CODE == 75, launcher.output
    assert time.monotonic() - sent < 120
    last_line = launcher.output.splitlines()[-1]
    assert f"The last checkpoint is {cut}/LATEST" in last_line
    assert f"resume={cut}" in last_line
    assert f"stopped by {number.name}" in launcher.output
    state = json.loads((cut / "LATEST/state.json").read_text())
    assert (0 < state["examples"] < 200) if where == "training" else (state["examples"] == 0)
    assert state["evaluated_at"] is None
    assert first_line_after not in launcher.output

    assert launcher.run(*overrides, f"resume={cut}") == 0, launcher.output
    assert_same_run(cut, whole)


def test_second_signal_ends_at_once(launcher, tmp_path):
    launcher.start(*TOY, "n_eval_model_samples=8", "n_examples=4000", f"local_run_dir={tmp_path}/run")
    launcher.wait_for("Writing to")
    time.sleep(0.2)
    launcher.kill(signal.SIGTERM)
    launcher.wait_for("SIGTERM: stopping")
    output_so_far = launcher.output
    launcher.kill(signal.SIGINT)  # it may have finished stopping by then
    assert launcher.wait() in (-signal.SIGINT, EXIT_CODE), output_so_far


def test_crash_names_the_last_checkpoint(launcher, tmp_path):
    overrides = [*TOY, "sample_during_eval=false", "optimizer=SGD", "warmup_steps=0", "max_grad_norm=1e30"]
    assert launcher.run(*overrides, "n_examples=8", "lr=1e-5", f"local_run_dir={tmp_path}/run") == 0, launcher.output
    code = launcher.run(*overrides, "n_examples=16", "lr=1e30", f"resume={tmp_path}/run", "resume_anyway=true")
    assert code == 1
    assert "training can't continue" in launcher.output
    last_line = launcher.output.splitlines()[-1]
    assert f"The last checkpoint is {tmp_path}/run/step-8; to resume from it: python " in last_line
    assert last_line.endswith(f"resume={tmp_path}/run")


def test_random_generators_are_restored():
    set_rng_state(states := get_rng_state())
    drawn = torch.rand(3), random.random()
    torch.rand(100), random.random()
    set_rng_state(states)
    assert torch.equal(torch.rand(3), drawn[0])
    assert random.random() == drawn[1]


# ---- which checkpoint, under which config ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(launcher):
    """Return the directory of a run of 16 examples with the checkpoints step-4, step-8, step-12 and LATEST."""
    run_dir = launcher.directory / "finished"
    assert launcher.run(*FINISHED, f"local_run_dir={run_dir}") == 0, launcher.output
    return run_dir


FINISHED = [*TOY, "loss=dpo", "n_examples=16", "save_every=4", "sample_during_eval=false"]


@pytest.fixture
def run_dir(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["seed=1"], ["seed: 0 → 1", "resume_anyway=true"]),
        (["loss=ipo"], ["loss.name: dpo → ipo"]),
        (["loss.beta=0.5", "model.reference_dtype=float16"], ["beta: 0.1 → 0.5", "reference_dtype: None → float16"]),
        (["datasets=[hh]"], ["datasets: ['toy'] → ['hh']"]),
        (["model=pythia28"], ["model.name_or_path: ", "→ EleutherAI/pythia-2.8b"]),
        (["lora={r:4}"], ["lora.r: absent → 4"]),
        (["max_length=60", "lr=1"], ["max_length: 40 → 60", "lr: 0.001 → 1"]),
        (["n_examples=8"], ["is after step 4, but n_epochs=", "n_examples=8 end the run at step 2"]),
        (
            ["lora={r:4}", "resume_anyway=true"],
            ["lora={'r': 4}: ", "holds all weights, not an adapter"],
        ),
        (
            ["reference_update_every=2", "resume_anyway=true"],
            ["reference_update_every=2: ", "has no reference.pt, because the reference of its run never moved"],
        ),
        (["local_run_dir=elsewhere"], ["local_run_dir=elsewhere, but resume=", "leave local_run_dir out"]),
    ],
    ids=str,
)
def test_config_of_another_run_is_refused_and_nothing_is_touched(overrides, parts, refusal, run_dir):
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    message = refusal(*FINISHED, *overrides, f"resume={run_dir}")
    assert all(part in message for part in parts), message
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_longer_training_and_other_logging_are_reported_and_allowed_on_resume(launcher, run_dir):
    overrides = [*FINISHED, "n_examples=24", "eval_every=4", "gradient_accumulation_steps=2"]
    assert launcher.run(*overrides, f"resume={run_dir}") == 0, launcher.output
    assert "eval_every: 16 → 4\n  gradient_accumulation_steps: 1 → 2\n  n_examples: 16 → 24" in launcher.output
    steps = [(line["split"], line["counters/examples"]) for line in log_lines(run_dir)]
    assert steps[-5:] == [("eval", 16), ("train", 20), ("eval", 20), ("train", 24), ("eval", 24)]


def test_resume_anyway_uses_the_new_settings(launcher, run_dir):
    overrides = [*FINISHED, "n_examples=20", "lr=2e-3", "warmup_steps=0", "resume_anyway=true"]
    assert launcher.run(*overrides, f"resume={run_dir}") == 0, launcher.output
    assert log_lines(run_dir)[-2]["lr"] == 2e-3


def test_earlier_checkpoint_is_refused_while_later_ones_exist(launcher, run_dir, finished):
    assert launcher.run(*FINISHED, f"resume={run_dir}/step-8") == 1
    assert f"the run has got further: {run_dir}/LATEST, {run_dir}/step-12" in launcher.output
    for name in ("LATEST", "step-12"):
        shutil.rmtree(run_dir / name)
    assert launcher.run(*FINISHED, f"resume={run_dir}/step-8") == 0, launcher.output
    assert_same_run(run_dir, finished)


@pytest.mark.parametrize(
    ("name", "damaged"),
    mark_exhaustive_except(
        itertools.product(["policy.pt", "state.json", "SHA256SUMS"], ["truncated", "bit flipped", "missing"]),
        ("policy.pt", "bit flipped"),
        ("state.json", "missing"),
    ),
)
def test_damaged_checkpoint_is_named_and_the_previous_one_resumes(damaged, name, launcher, run_dir, finished):
    path = run_dir / "LATEST" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damaged == "bit flipped" else content[: len(content) // 2])
    if damaged == "missing":
        path.unlink()
    assert launcher.run(*FINISHED, f"resume={run_dir}/LATEST") == 1
    assert f"resume={run_dir}/LATEST is damaged: " in launcher.output
    assert launcher.run(*FINISHED, "resume=auto", f"local_run_dir={run_dir}") == 0, launcher.output
    assert f"WARNING: {run_dir}/LATEST can't be used: " in launcher.output
    assert f"Resuming from {run_dir}/step-12" in launcher.output
    assert_same_run(run_dir, finished)


def test_resume_without_a_whole_checkpoint_is_an_error(launcher, run_dir, tmp_path):
    for name in ("LATEST", "step-4", "step-8", "step-12"):
        (run_dir / name / "policy.pt").write_bytes(b"")
    assert launcher.run(*FINISHED, f"resume={run_dir}") == 1
    assert "all of its checkpoints are damaged" in launcher.output
    assert launcher.run(*FINISHED, "resume=auto") == 1
    assert "resume=auto resumes the run in local_run_dir: also give local_run_dir" in launcher.output
    assert launcher.run(*FINISHED, "resume=nowhere") == 1
    assert "resume=nowhere: no such directory" in launcher.output
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text("")
    assert launcher.run(*FINISHED, f"resume={tmp_path}/empty") == 1
    assert "there is no checkpoint in it yet" in launcher.output


def test_second_process_on_the_same_run_is_refused(launcher, run_dir):
    first = launcher.start(*FINISHED, "n_examples=4000", f"resume={run_dir}")
    first.wait_for("Resuming from")
    second = launcher.start(*FINISHED, f"resume={run_dir}")
    assert second.wait() == 1
    first.kill(signal.SIGKILL)
    first.wait()
    assert "another process is running this run" in second.output


def test_wandb_run_resumes_under_its_id(launcher, tmp_path):
    env = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "NETRC": str(tmp_path / "netrc")}
    overrides = [*FINISHED, "n_examples=4", "wandb.enabled=true"]
    assert launcher.run(*overrides, f"local_run_dir={tmp_path}/run", env=env) == 0, launcher.output
    assert launcher.run(*overrides, "n_examples=8", f"resume={tmp_path}/run", env=env) == 0, launcher.output
    run_id = json.loads((tmp_path / "run/LATEST/state.json").read_text())["wandb_run_id"]
    runs = list((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert all(path.name.endswith(f"-{run_id}") for path in runs)
