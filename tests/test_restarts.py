"""After a failure, the launcher restarts the run, and the run resumes."""

import itertools
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY
from launcher import wait_until
from process_pool import launcher_variables, reserve_port
from test_launch import RUN, children_of, updates

LIMIT = 60  # seconds from a failure until the run is training again


class Agents:
    """torchrun's agents of one run, as on one machine or on two, each with its own workers."""

    def __init__(self, start, directory: Path, rendezvous: str, n_machines: int, n_workers: int):
        self.start, self.directory, self.n_machines, self.n_workers = start, directory, n_machines, n_workers
        self.rendezvous, self.port, self.attempts = rendezvous, reserve_port(), itertools.count()
        self.machines = [self.start_machine(number) for number in range(n_machines)]

    def start_machine(self, number: int) -> subprocess.Popen:
        options = {
            "static": [f"--node-rank={number}", "--master-addr=127.0.0.1", f"--master-port={self.port}"],
            "c10d": ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self.port}",
                     f"--rdzv-conf=is_host={int(number == 0)}"],
            "torchrun.sh": [],
        }[self.rendezvous]  # fmt: skip
        command = [
            "-m", "torch.distributed.run", f"--nnodes={self.n_machines}", f"--nproc-per-node={self.n_workers}",
            "--max-restarts=2", *options, str(REPOSITORY / "train.py"), "trainer=FSDPTrainer", "resume=auto",
        ]  # fmt: skip
        if self.rendezvous == "torchrun.sh":
            command = [
                "-c",
                "import os, sys; os.execvp('bash', ['bash', *sys.argv[1:]])",
                str(REPOSITORY / "scripts/torchrun.sh"),
            ]
        env = {
            "NNODES": str(self.n_machines), "NODE_RANK": str(number), "NPROC_PER_NODE": str(self.n_workers),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port),
            "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        }  # fmt: skip
        return self.start(
            *command, *RUN, f"local_run_dir={self.directory}/run", f"local_dirs=[{self.directory}/cache]",
            "wandb.enabled=false", "curves=false", "do_first_eval=false", "worker_timeout=8", "n_examples=100000",
            "eval_every=100000", log=f"log-{number}-{next(self.attempts)}", env=env,
        )  # fmt: skip

    @property
    def output(self) -> str:
        return "".join(path.read_text() for path in sorted(self.directory.glob("log-*")))

    def wait_for(self, pattern: str, n: int = 1, seconds: float = 120):
        """Wait until the agents' output has matched `n` times."""
        wait_until(lambda: len(re.findall(pattern, self.output)) >= n, seconds, output=lambda: self.output)

    def stop(self):
        """End the run by a signal, as a user would."""
        for machine in self.machines:
            machine.send_signal(signal.SIGTERM)
        for machine in self.machines:
            machine.wait(LIMIT)


def kill(agents: Agents):
    children_of(agents.machines[-1].pid)[-1].send_signal(signal.SIGKILL)


def freeze(agents: Agents):
    children_of(agents.machines[-1].pid)[-1].send_signal(signal.SIGSTOP)


def crash_machine(agents: Agents):
    """Kill an agent and its workers, then give its command again."""
    agent = psutil.Process(agents.machines[-1].pid)
    for process in [agent, *agent.children(recursive=True)]:
        process.kill()
    agents.machines[-1].wait()
    agents.machines[-1] = agents.start_machine(agents.n_machines - 1)


# With static rendezvous, an agent notices a frozen worker only if it has other workers of its own. Only with the
# settings of torchrun.sh can a new agent find the others.
CASES = [
    (kill, "static", 1, 1), (kill, "c10d", 2, 1), (freeze, "static", 1, 2), (kill, "static", 2, 2),
    (freeze, "c10d", 2, 2), (crash_machine, "torchrun.sh", 2, 1),
]  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("fail", "rendezvous", "n_machines", "n_workers"),
    CASES,
)
def test_failure_is_followed_by_a_restart_that_resumes(fail, rendezvous, n_machines, n_workers, start, tmp_path):
    agents = Agents(start, tmp_path, rendezvous, n_machines, n_workers)
    agents.wait_for(r"wrote .*/step-32 ")
    n_before = len(re.findall("First step: ", agents.output))
    failed = time.monotonic()
    fail(agents)
    allowance = LIMIT + (8 if fail is freeze else 0)  # worker_timeout
    agents.wait_for("First step: ", n_before + 1, 3 * allowance)  # on a busy machine
    seconds = time.monotonic() - failed
    print(f"training again after {seconds:.1f} s")
    resumed = re.findall(r"Resuming from \S+: \d+ examples, (\d+) steps", agents.output)
    assert len(resumed) == 1, agents.output[-5000:]
    if fail is kill and n_machines == 2:  # the surviving worker's machine says why it ends
        log = (tmp_path / "log-0-0").read_text()
        assert "error: another worker is gone" in log
        assert re.search(r"The last checkpoint is .*/step-\d+; to resume from it: the launcher with .* resume=", log)
    agents.stop()
    steps = updates(tmp_path / "run")
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > int(resumed[0]) >= 4


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        ([], "which would begin again in a new directory: give resume=auto and local_run_dir=DIR"),
        (["local_run_dir={}/run"], "which would begin again with resume=null: give resume=auto"),
    ],
    ids=str,
)
def test_run_that_could_not_resume_after_a_restart_is_refused(overrides, remedy, launcher, tmp_path):
    env = {**launcher_variables(1)[0], "TORCHELASTIC_MAX_RESTARTS": "2", "TORCHELASTIC_RESTART_COUNT": "0"}
    words = [word.format(tmp_path) for word in overrides]
    assert launcher.run(*RUN, "trainer=FSDPTrainer", "n_examples=8", *words, env=env) == 1
    assert f"error: the launcher restarts a failed run (torchrun --max-restarts=2), {remedy}" in launcher.output
    assert "Traceback" not in launcher.output
    assert not (tmp_path / "run").exists()


# ---- slurm.sh -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "restart_after", "expected"),
    [
        ([137, 1, 0], 0, (0, 3, False)),
        ([1, 1, 1, 1, 1], 0, (1, 4, False)),
        ([1, 75], 0, (75, 2, True)),
        ([1, 0], 60, (1, 1, False)),
    ],
    ids=["killed twice", "always fails", "fails, then preempted", "mistake"],
)
def test_slurm_script_restarts_failures_and_requeues_after_signals(codes, restart_after, expected, tmp_path):
    stand_ins = {
        "srun": f'n=$(cat calls 2>/dev/null | wc -l); echo "${{@: -1}}" >> calls; codes=({" ".join(map(str, codes))})\n'
        "exit ${codes[$n]}",
        "scontrol": 'if [ "$1" = requeue ]; then touch requeued; else echo machine0; fi',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "m", "SLURM_JOB_ID": "7"}
    env["RESTART_AFTER"] = str(restart_after)
    ended = subprocess.run(
        ["bash", REPOSITORY / "scripts/slurm.sh", "local_run_dir=/shared/run"], cwd=tmp_path, env=env, check=False
    )
    calls = (tmp_path / "calls").read_text().count("local_run_dir=/shared/run\n")
    assert (ended.returncode, calls, (tmp_path / "requeued").exists()) == expected
