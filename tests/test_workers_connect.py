"""If workers can't find each other, they end quickly and say why; a silent worker ends the run, a slow one doesn't."""

import os
import re
import signal
import socket
import time

import pytest
from launcher import Run
from process_pool import launcher_variables, reserve_port
from test_launch import children_of

from distributed import connection
from utils import UserError

pytestmark = pytest.mark.slow

RUN = [
    "model=tiny", "datasets=[toy]", "loss=dpo", "max_length=64", "max_prompt_length=32", "batch_size=8",
    "n_eval_examples=8", "eval_batch_size=4", "sample_during_eval=false", "minimum_log_interval_secs=0",
    "save_every=400", "n_examples=8000", "trainer=FSDPTrainer", "wandb.enabled=false",
]  # fmt: skip


@pytest.fixture
def start(launcher, tmp_path):
    """Return a function that runs one of the scripts below as one of several workers."""

    def start_script(script: str, *words: object, env: dict[str, str]) -> Run:
        path = tmp_path / f"script-{len(list(tmp_path.iterdir()))}.py"  # the previous one may not have been read yet
        path.write_text(script)
        return launcher.start(*words, env=env, script=path, as_typed=True, in_order=True)

    return start_script


# ---- finding each other ---------------------------------------------------------------------------------------------

CONNECT = """
import sys, time
from distributed import connection
from utils import UserError
connection._RENDEZVOUS_TIMEOUT = int(sys.argv[1])
start = time.monotonic()
try:
    with connection.process_group():
        print("connected")
except UserError as error:
    print("after", time.monotonic() - start, "s:", error)
"""


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc, set by the launcher: must be an integer"),
        ({"RANK": "x"}, "RANK=x, set by the launcher: must be an integer"),
        ({"RANK": "-1"}, "RANK=-1, set by the launcher: must be an integer"),
        ({"RANK": "2"}, "RANK=2, WORLD_SIZE=2, set by the launcher: ranks must be numbered from 0 to WORLD_SIZE - 1"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0, WORLD_SIZE=0, set by the launcher"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1, set by the launcher: must be an integer"),
        ({"LOCAL_RANK": "5"}, "LOCAL_RANK=5, RANK=0, set by the launcher"),
        ({"LOCAL_RANK": ""}, "RANK is set, but not LOCAL_RANK"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000, set by the launcher: must be a port"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http, set by the launcher: must be an integer"),
        ({"MASTER_ADDR": ""}, "RANK is set, but not MASTER_ADDR"),
    ],
    ids=str,
)
def test_impossible_launcher_variable_is_named(variables, message, refusal, monkeypatch, tmp_path):
    for name, value in {**launcher_variables(2)[0], **variables}.items():
        monkeypatch.setenv(name, value)
    assert refusal(*RUN, f"local_run_dir={tmp_path}/run").startswith(message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("port", "message"),
    [
        ("-1", "fsdp_port=-1: must be a port, 1 to 65535, or null"),
        ("70000", "fsdp_port=70000: must be a port"),
        ("0", "fsdp_port=0: must be a port"),
        ("x", "fsdp_port=x: expected an integer"),
        (None, "fsdp_port={}: the workers don't find each other (.*address already in use): give a port that is free"),
    ],
)
def test_impossible_port_is_named(port, message, launcher, tmp_path):
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = port or str(listener.getsockname()[1])
        start = time.monotonic()
        assert (
            launcher.run(*RUN, "world_size=2", f"fsdp_port={port}", f"local_run_dir={tmp_path}/run", forks_workers=True)
            == 1
        )
    assert time.monotonic() - start < 120
    pattern = "error: " + message.format(port).replace("(", r"\(").replace(")", r"\)")
    assert len(re.findall(pattern, launcher.output)) == 1, launcher.output
    assert "Traceback" not in launcher.output
    assert not (tmp_path / "run").exists()


def test_error_without_a_message_is_named_by_its_class(monkeypatch):
    def fail(*_args, **_kwargs):
        raise ConnectionError

    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(connection, "_RENDEZVOUS_TIMEOUT", -1)
    monkeypatch.setattr(connection.socket, "create_connection", fail)
    with pytest.raises(UserError, match=r"the workers don't find each other \(ConnectionError\)"):
        connection._rendezvous()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "names",
    ["nobody listens, no such host, too few", "no answer"],
)
def test_workers_that_do_not_find_each_other_give_up_with_a_message(names, start):
    assert connection._RENDEZVOUS_TIMEOUT == 60
    seconds = 2  # the scripts use this timeout instead
    ports = [reserve_port() for _ in range(3)]
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        cases = {
            "nobody listens": {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0]},
            "no such host": {"RANK": "1", "MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": ports[1]},
            "too few": {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[2]},
            "no answer": {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(silent.getsockname()[1])},
        }
        processes = {}
        for name in names.split(", "):
            env = {**cases[name], "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
            processes[name] = start(CONNECT, seconds, env=env)
        for name, process in processes.items():
            assert process.wait() == 0
            log = process.output
            address, port = cases[name]["MASTER_ADDR"], cases[name]["MASTER_PORT"]
            message = re.search(r"after (\S+) s: (MASTER_ADDR=(\S+) MASTER_PORT=(\S+), set by the launcher: .*)", log)
            assert message, log
            assert seconds - 1 < float(message[1]) < seconds + 60
            assert (message[3], message[4]) == (address, port)
            assert f"all WORLD_SIZE=2 workers must start within {seconds} seconds" in message[2]
            assert "Traceback" not in log
            assert "frame #0" not in log  # nor PyTorch's own stack trace


def test_ranks_alternating_between_machines_are_refused(start):
    common = launcher_variables(1)[0]
    workers = [
        start(CONNECT, 60, env={**common, "WORLD_SIZE": "4", "RANK": str(rank), "LOCAL_RANK": str(rank // 2)})
        for rank in range(4)
    ]
    for worker in workers:
        worker.wait()
        assert "LOCAL_RANK=1 at RANK=3, after LOCAL_RANK=1, set by the launcher" in worker.output


# ---- falling silent -------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("silent", [0, 1])
def test_silent_worker_is_named_and_ends_the_run(silent, launcher, tmp_path):
    run = launcher.start(
        *RUN, "world_size=2", "worker_timeout=3", f"local_run_dir={tmp_path}/run", in_order=True, forks_workers=True
    )
    run.wait_for("First step: ")
    workers = children_of(*run.children)
    workers[silent].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    assert run.wait() == 1
    assert 1.5 < time.monotonic() - stopped < 120
    assert re.findall("error: .*", run.output) == [
        f"error: worker {silent} (process {workers[silent].pid} on {socket.gethostname()}) has given no sign of life "
        "for 3 seconds (worker_timeout): the run ends. Resume it with resume=auto"
    ]
    assert not any(worker.is_running() for worker in workers)
    assert ".lock" not in os.listdir(tmp_path / "run")


SLOW = """
import hashlib, os, sys, time
from distributed import collectives, connection
rank, asleep, at_work = sys.argv[1:]
with connection.process_group(worker_timeout=2):
    print("connected", flush=True)
    if os.environ["RANK"] == rank:
        time.sleep(float(asleep))
        end = time.monotonic() + float(at_work)
        while time.monotonic() < end:  # busy, not asleep
            hashlib.sha256(b"x" * 10_000_000)
    collectives.barrier()
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("slow", [0, 1])
def test_slow_worker_is_waited_for(slow, start):
    workers = [start(SLOW, slow, 3, 2.5, env=variables) for variables in launcher_variables(3)]
    assert [worker.wait() for worker in workers] == [0] * 3, workers[0].output


@pytest.mark.exhaustive
def test_workers_suspended_together_continue(start):
    workers = [start(SLOW, 0, 3, 1, env=variables) for variables in launcher_variables(3)]
    for worker in workers:
        worker.wait_for("connected")
    for worker in workers:
        worker.kill(signal.SIGSTOP)
    time.sleep(6)
    for worker in workers:
        worker.kill(signal.SIGCONT)
    assert [worker.wait() for worker in workers] == [0] * 3, workers[0].output


@pytest.mark.parametrize("value", ["0", "-5", "soon", "null", "true"])
def test_impossible_worker_timeout_is_named(value, refusal):
    message = refusal(*RUN, f"worker_timeout={value}")
    assert re.match("worker_timeout=.*: (must be|expected) (a number|an integer)", message), message
