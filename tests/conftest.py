import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from process_pool import ProcessPool, launcher_variables
from safetensors.torch import load_file

from configuration import CONFIG_DIR, check_config
from models import load_policy, load_reference
from train import with_free_keys
from trainers import BasicTrainer

# One thread a process: the models are small, and two processes run at a time.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

REPOSITORY = Path(__file__).parent.parent
ORACLE = Path(__file__).parent / "oracle"
TIMEOUT = 600  # seconds


def figures(name: str):
    """The recorded figures of `tests/oracle/figures/<name>.json`."""
    return json.loads((ORACLE / "figures" / f"{name}.json").read_text())


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def hydra_list(value: object) -> str:
    """A value as it is typed in an override."""
    return json.dumps(value).replace('"', "").replace(" ", "")


@pytest.fixture
def train(tmp_path):
    """Run `python train.py` as a user would, in an empty directory, without network, wandb or a terminal."""

    def run_command(*overrides: str, env: dict[str, str] | None = None, **kwargs) -> subprocess.CompletedProcess:
        command = [sys.executable, str(REPOSITORY / "train.py"), *overrides, f"local_dirs=[{tmp_path}/cache]"]
        if not any(override.startswith("wandb.") for override in overrides):
            command.append("wandb.enabled=false")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=TIMEOUT, **kwargs,
        )  # fmt: skip

    return run_command


@pytest.fixture
def train_ok(train):
    """The same, for commands that must succeed; returns what they printed."""

    def run_command(*overrides: str, **kwargs) -> str:
        result = train(*overrides, **kwargs)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout + result.stderr

    return run_command


_LAUNCHER = """
import json, os, runpy, sys, traceback
import datasets, numpy, peft, torch, trainers, transformers.models.gpt_neox.modeling_gpt_neox

def run(job, env):
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor, to in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
        os.dup2(descriptor, to)
    os.environ.update(env)
    sys.argv = [job["path"], *job["overrides"]]
    try:
        runpy.run_path(job["path"], run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    job, children = json.loads(line), []
    for env in job["envs"]:
        children.append(os.fork())
        if children[-1] == 0:
            code = run(job, env)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


class Launcher:
    """Runs `train.py` in processes of their own that need not import anything: a process that has is forked.

    `start` starts one, `kill` signals it, `wait` returns its exit code (minus the signal that killed it); `output` is
    what it has printed. One at a time, or `n_workers` that make up one run, as a launcher starts them; `wait` then
    returns the first of their exit codes that isn't 0.
    """

    def __init__(self, directory: Path):
        self.directory, self.log = directory, directory / "log"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
        self.server = subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER], cwd=directory, env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self, *overrides: object, env: dict[str, str] | None = None, n_workers: int = 1):
        words = [str(override) for override in overrides]
        if not any(word.startswith("wandb.") for word in words):
            words.append("wandb.enabled=false")
        words.append(f"local_dirs=[{self.directory}/cache]")
        envs = [env or {}] if n_workers == 1 else launcher_variables(n_workers)
        job = {"path": str(REPOSITORY / "train.py"), "overrides": words, "log": str(self.log), "envs": envs}
        self.log.write_text("")
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        self.children = json.loads(self.server.stdout.readline())

    def kill(self, number: int):
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):  # `wait` tells
                os.kill(child, number)

    def wait(self) -> int:
        return next((code for code in json.loads(self.server.stdout.readline()) if code != 0), 0)

    def run(self, *overrides: object, **kwargs) -> int:
        self.start(*overrides, **kwargs)
        return self.wait()

    @property
    def output(self) -> str:
        return self.log.read_text()


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.server.stdin.close()
    launcher.server.wait()


@pytest.fixture(scope="module")
def in_workers(request):
    """Run a function of the test's module in `n` processes: see `ProcessPool.run`.

    They live as long as the module's tests; its `prepare_worker`, if it has one, is called at the start of each.
    """
    pool = ProcessPool(getattr(request.module, "prepare_worker", None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the process that they are forked from
        yield pool.run
    pool.stop()


@pytest.fixture(scope="session")
def sft_archive(tmp_path_factory) -> Path:
    """The end of the recorded SFT run as the policy.pt that preference runs start from."""
    path = tmp_path_factory.mktemp("archive") / "policy.pt"
    state = load_file(ORACLE / "figures" / "sft_weights.safetensors")
    torch.save({"step_idx": 96, "state": state, "metrics": {}}, path)
    return path


@pytest.fixture
def oracle_model() -> list[str]:
    """Overrides that choose the recorded runs' model and data."""
    return [
        "model=blank_model",
        f"model.name_or_path={ORACLE}/model",
        "model.reference_dtype=float32",
        f"dataset_paths.hh={ORACLE}/hh",
        f"dataset_paths.shp={ORACLE}/shp",
    ]


@pytest.fixture
def make_trainer(tmp_path):
    """A trainer in this process, from overrides as on the command line; all that its
    reference is to precompute is computed; data and caches are under tmp_path."""

    def make(*overrides: str) -> BasicTrainer:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            names = [f"exp_name={next(counter)}", "wandb.enabled=false", f"local_dirs=[{tmp_path}/cache]"]
            config = compose("config", [*with_free_keys([*names, *overrides])])
        OmegaConf.resolve(config)
        check_config(config)
        policy = load_policy(config)
        load = functools.partial(load_reference, config, policy)
        trainer = BasicTrainer(policy, config, config.seed, config.local_run_dir, reference_model=load)
        trainer.precompute_reference()
        return trainer

    counter = itertools.count()
    return make
