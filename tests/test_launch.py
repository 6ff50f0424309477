"""Runs of several processes start on one machine and on two, and end together."""

import re
import signal
import subprocess
import time

import psutil
import pytest
from conftest import REPOSITORY, read_jsonl
from launcher import wait_until
from omegaconf import OmegaConf
from process_pool import launcher_variables

from checkpointing.stop_signal import EXIT_CODE
from commands.command_line import compose_config
from config_checks.checks import check_config
from utils import UserError

RUN = [
    "model=tiny", "datasets=[toy]", "loss=dpo", "max_length=64", "max_prompt_length=32", "batch_size=8",
    "n_eval_examples=8", "eval_batch_size=4", "sample_during_eval=false", "lr=1e-3", "warmup_steps=2", "eval_every=400",
    "save_every=16", "keep_checkpoints=2",
]  # fmt: skip
LIMIT = 120  # seconds for a run to end after a worker has died; without the heartbeat it would wait for hours


def children_of(pid: int) -> list[psutil.Process]:
    """Return a process's workers, in order of rank."""
    children = psutil.Process(pid).children()
    return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]


def updates(run_dir) -> list[int]:
    """Return the numbers of the optimizer steps in the run's log."""
    return [line["counters/updates"] for line in read_jsonl(run_dir / "metrics.jsonl") if line["split"] == "train"]


@pytest.fixture
def start_run(launcher, tmp_path):
    """Return a function that starts `train.py` with two workers of its own."""

    def start_train(*overrides: str):
        words = [*RUN, "trainer=FSDPTrainer", "world_size=2", f"local_run_dir={tmp_path}/run", *overrides]
        return launcher.start(*words, directory=tmp_path, forks_workers=True)

    return start_train


@pytest.mark.exhaustive
def test_killed_worker_ends_the_run_and_resume_completes_it(start_run, tmp_path):
    run = start_run("n_examples=4000")
    run.wait_for(r"wrote .*/step-32 ")
    workers = children_of(*run.children)
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    start_time = time.monotonic()
    assert run.wait() == 1
    assert time.monotonic() - start_time < LIMIT
    assert not any(worker.is_running() for worker in workers)
    assert f"error: worker 1 of 2 (process {workers[1].pid}) was killed by SIGKILL" in run.output
    assert re.search(r"The last checkpoint is .*/step-\d+; to resume from it: python .*train.py .* resume=", run.output)
    assert "Traceback" not in run.output

    n_examples = int(updates(tmp_path / "run")[-1]) * 8 + 8
    run = start_run(f"n_examples={n_examples}", "resume=auto")
    assert run.wait() == 0, run.output
    assert updates(tmp_path / "run") == list(range(1, n_examples // 8 + 1))


def test_signal_to_the_parent_saves_and_exits_with_75(start_run, tmp_path):
    run = start_run("n_examples=4000", "save_every=4000", "eval_every=4000")
    run.wait_for("First step: ")
    run.kill(signal.SIGTERM)
    assert run.wait() == EXIT_CODE
    assert "stopped by SIGTERM" in run.output
    assert run.output.count("to resume from it: python ") == 1
    position = (tmp_path / "run/LATEST/state.json").read_text()
    assert f'"updates": {updates(tmp_path / "run")[-1]},' in position


def test_users_mistake_in_a_worker_is_reported_once(start_run, tmp_path):
    run = start_run("max_length=100000", "n_examples=16")
    assert run.wait() == 1
    assert run.output.count("error: max_length=100000: the model has only") == 1
    assert "Traceback" not in run.output
    assert not (tmp_path / "run").exists()


# ---- processes that a launcher starts -------------------------------------------------------------------------------


def agents(start, tmp_path, port: str, *overrides: str) -> list[subprocess.Popen]:
    """Start a run by two torchrun agents, as on two machines, with one worker each."""
    return [
        start(
            "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1",
            "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf=is_host={int(node == 0)}",
            str(REPOSITORY / "train.py"), *RUN, "trainer=FSDPTrainer", f"local_run_dir={tmp_path}/run",
            f"local_dirs=[{tmp_path}/cache]", "resume=auto", "wandb.enabled=false", *overrides, log=f"log-{node}",
        )
        for node in (0, 1)
    ]  # fmt: skip


@pytest.mark.exhaustive
def test_two_machines_train_fail_and_resume_together(start, tmp_path):
    port = launcher_variables(2)[0]["MASTER_PORT"]
    machines = agents(start, tmp_path, port, "n_examples=4000")
    wait_until(lambda: re.search(r"wrote .*/step-32 ", (tmp_path / "log-0").read_text()))
    (worker,) = children_of(machines[1].pid)
    worker.send_signal(signal.SIGKILL)
    start_time = time.monotonic()
    assert [machine.wait(LIMIT) != 0 for machine in machines] == [True, True]
    assert time.monotonic() - start_time < LIMIT
    logs = [(tmp_path / f"log-{node}").read_text() for node in (0, 1)]
    assert f"Signal 9 (SIGKILL) received by PID {worker.pid}" in logs[1]
    assert "error: another worker is gone" in logs[0]
    assert re.search(r"The last checkpoint is .*/step-\d+; to resume from it: the launcher with .* resume=", logs[0])

    n_examples = updates(tmp_path / "run")[-1] * 8 + 32
    machines = agents(start, tmp_path, port, f"n_examples={n_examples}")
    assert [machine.wait(300) for machine in machines] == [0, 0], (tmp_path / "log-0").read_text()[-3000:]
    assert updates(tmp_path / "run") == list(range(1, n_examples // 8 + 1))
    assert [len(re.findall("pairs/s", (tmp_path / f"log-{node}").read_text())) > 0 for node in (0, 1)] == [
        True,
        False,
    ]


BUSY = """
import os, signal, sys, time
from distributed import connection, heartbeat
heartbeat._HEARTBEAT_INTERVAL, heartbeat._LOST_CONNECTION_DELAY = 0.5, 0.5
with connection.process_group():
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)  # like a main thread that waits for a collective with the dead worker
"""


def test_busy_worker_notices_that_another_is_gone(launcher, tmp_path):
    (tmp_path / "busy.py").write_text(BUSY)
    workers = [
        launcher.start(env=variables, script=tmp_path / "busy.py", as_typed=True) for variables in launcher_variables(2)
    ]
    assert workers[1].wait() == -signal.SIGKILL
    killed = time.monotonic()
    assert workers[0].wait() == 1
    assert time.monotonic() - killed < LIMIT
    assert "error: another worker is gone" in workers[0].output


@pytest.mark.parametrize(
    ("overrides", "n_workers", "message"),
    [
        (["trainer=BasicTrainer", "world_size=2"], 1, "trainer=BasicTrainer trains in one process, not in 2"),
        (["trainer=BasicTrainer"], 2, "trainer=BasicTrainer trains in one process, not in 2"),
        (["trainer=FSDPTrainer", "world_size=3"], 1, "batch_size=8 doesn't divide by .*=1 × 3 workers"),
        (
            ["trainer=FSDPTrainer", "gradient_accumulation_steps=8"],
            2,
            "batch_size=8 doesn't divide by .*=8 × 2 workers",
        ),
        (["trainer=FSDPTrainer", "world_size=2"], 2, "world_size=2: the launcher sets it"),
        (["trainer=FSDPTrainer", "fsdp_replicate=2"], 1, "fsdp_replicate=2 doesn't divide the 1 workers"),
        (
            ["trainer=TensorParallelTrainer", "fsdp_replicate=2"],
            2,
            "fsdp_replicate=2: only trainer=FSDPTrainer uses it",
        ),
        (["fsdp_cpu_offload=true"], 1, "fsdp_cpu_offload=True: only trainer=FSDPTrainer uses it"),
        (["fsdp_port=29500"], 1, "fsdp_port=29500: trainer=BasicTrainer starts no workers"),
        (
            ["trainer=FSDPTrainer", "optimizer=Rprop"],
            2,
            "optimizer=Rprop: PyTorch's Rprop can't train tensors that are spread",
        ),
    ],
    ids=str,
)
def test_config_that_does_not_fit_the_workers_is_refused(overrides, n_workers, message, tmp_path, monkeypatch):
    for name, value in launcher_variables(n_workers)[0].items() if n_workers > 1 else ():
        monkeypatch.setenv(name, value)
    config = compose_config(*RUN, "n_examples=8", "wandb.enabled=false", f"local_run_dir={tmp_path}/run", *overrides)
    OmegaConf.resolve(config)
    with pytest.raises(UserError, match=message):
        check_config(config)


@pytest.mark.exhaustive
def test_workers_that_refuse_the_model_end_without_a_traceback_or_a_run_directory(launcher, tmp_path):
    run = [*RUN, "trainer=TensorParallelTrainer", f"local_run_dir={tmp_path}/run"]
    assert launcher.run(*run, n_workers=3) == 1
    assert re.search("error: .*num_attention_heads=4", launcher.output), launcher.output
    assert "Traceback" not in launcher.output
    assert not (tmp_path / "run").exists()


def test_missing_launcher_variables_are_named(launcher):
    assert launcher.run(*RUN, "trainer=FSDPTrainer", env={"RANK": "0", "WORLD_SIZE": "2"}) == 1
    assert "error: RANK is set, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in launcher.output
