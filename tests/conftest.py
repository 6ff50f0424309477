import functools
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from hub_server import HubAddress
from launcher import ENVIRONMENT, REPOSITORY, TIMEOUT, Launcher, running_server, shrink_toy
from process_pool import ProcessPool

if TYPE_CHECKING:  # importing these takes seconds, and tests of processes don't need them
    from transformers import PretrainedConfig

    from trainers import BasicTrainer

os.environ["OMP_NUM_THREADS"] = ENVIRONMENT["OMP_NUM_THREADS"]  # for processes that tests start

ORACLE = REPOSITORY / "tests" / "oracle"

if os.name != "posix":  # these need Unix's locks and terminals
    collect_ignore = ["test_run_lock.py", "test_terminal.py", "test_wandb_runs.py"]


SLOW_FIXTURES = {"launcher", "run_python", "start", "in_workers", "train_from_hub"}  # fixtures that start processes


def pytest_collection_modifyitems(config, items):
    for item in items:
        if SLOW_FIXTURES.intersection(item.fixturenames):
            item.add_marker("slow")
    if "exhaustive" not in config.option.markexpr:
        exhaustive = [item for item in items if item.get_closest_marker("exhaustive")]
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=exhaustive)


@pytest.fixture(scope="session", autouse=True)
def quick_process():
    """Use one thread and little data; keep garbage collection from visiting the libraries' objects each time."""
    import torch

    torch.set_num_threads(1)
    shrink_toy()
    gc.freeze()


def mark_exhaustive_except(values: Iterable, *kept: object) -> list:
    """Return `values` as parameters, all but the `kept` ones marked as exhaustive.

    `kept`: values, or functions that are true for the values to keep.
    """
    parameters, unseen = [], list(kept)
    for value in values:
        matching = [keep for keep in kept if (keep(value) if callable(keep) else keep == value)]
        unseen = [keep for keep in unseen if keep not in matching]
        marks = [] if matching else [pytest.mark.exhaustive]
        parameters.append(pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=marks))
    assert not unseen, f"{unseen} are not among the values"
    return parameters


def figures(name: str):
    """Return the recorded figures of `tests/oracle/figures/<name>.json`."""
    return json.loads((ORACLE / "figures" / f"{name}.json").read_text())


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- processes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def fork_server():
    with running_server() as server:
        yield server


@pytest.fixture(scope="module")
def launcher(fork_server, tmp_path_factory):
    launcher = Launcher(fork_server, tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.stop()


def train_with(launcher: Launcher, directory: Path) -> Callable[..., subprocess.CompletedProcess]:
    def run_command(*overrides: str, **kwargs) -> subprocess.CompletedProcess:
        run = launcher.start(*overrides, directory=directory, **kwargs)
        code = run.wait()
        return subprocess.CompletedProcess(overrides, code, run.stdout.read_text(), run.stderr.read_text())

    return run_command


@pytest.fixture
def train(launcher, tmp_path):
    """Return a function that runs `train.py` as a user would: in an empty directory, without network and terminal."""
    return train_with(launcher, tmp_path)


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """Return a function that runs overrides in this process and returns the message that refuses them.

    `train.py` prints that message after "error: "; test_config_values.py tests this for messages of each kind.
    """

    from train import compose_config, run
    from utils import UserError

    def message(*overrides: str) -> str:
        monkeypatch.chdir(tmp_path)
        words = [*overrides, "wandb.enabled=false", "curves=false", f"local_dirs=[{tmp_path}/cache]"]
        with pytest.raises(UserError) as refused:
            run(compose_config(*dict.fromkeys(words)))
        return str(refused.value)

    return message


@pytest.fixture
def train_ok(train):
    """Return a function that runs `train.py`, which must succeed, and returns its output."""

    def run_command(*overrides: str, **kwargs) -> str:
        result = train(*overrides, **kwargs)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout + result.stderr

    return run_command


@pytest.fixture
def run_python(tmp_path):
    """Return a function that runs a command in a new Python process, in an empty directory or `directory`."""

    def run_command(
        *words: str, directory: Path = tmp_path, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *words], cwd=directory, env={**os.environ, **ENVIRONMENT, **(env or {})},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT,
        )  # fmt: skip

    return run_command


@pytest.fixture
def train_in_new_python(run_python, tmp_path):
    """Return a function like `train` for tests of environment variables that libraries read when they are imported."""

    def run_command(*overrides: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        words = [*overrides, f"local_dirs=[{tmp_path}/cache]"]
        for key, word in (("wandb.", "wandb.enabled=false"), ("curves=", "curves=false")):
            if not any(given.startswith(key) for given in overrides):
                words.append(word)
        return run_python(str(REPOSITORY / "train.py"), *words, env=env)

    return run_command


@pytest.fixture(scope="session")
def hub_address(tmp_path_factory) -> HubAddress:
    """Reserve an address at which a test's hubs are started one after the other."""
    return HubAddress(tmp_path_factory.mktemp("hub") / "home")


@pytest.fixture(scope="session")
def hub_fork_server(hub_address):
    with running_server(hub_address.environment()) as server:
        yield server


@pytest.fixture
def train_from_hub(hub_fork_server, hub_address, tmp_path, tmp_path_factory):
    """Return a function like `train`'s for processes that use the hub at `hub_address`, with nothing downloaded."""
    shutil.rmtree(hub_address.home, ignore_errors=True)
    launcher = Launcher(hub_fork_server, tmp_path_factory.mktemp("launcher"))
    yield train_with(launcher, tmp_path)
    launcher.stop()


@pytest.fixture(scope="module")
def in_workers(request):
    """Return a function that runs a function of the test's module in n processes: see `ProcessPool.run`.

    The module's tests share the processes. If the module has a function `prepare_worker`, each process calls it first.
    """
    pool = ProcessPool(getattr(request.module, "prepare_worker", None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the server process that forks them
        yield pool.run
    pool.stop()


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sft_archive(tmp_path_factory) -> Path:
    """Write the final weights of the recorded SFT run as the policy.pt that preference runs start from."""
    path = tmp_path_factory.mktemp("archive") / "policy.pt"
    import torch
    from safetensors.torch import load_file

    state = load_file(ORACLE / "figures" / "sft_weights.safetensors")
    torch.save({"step_idx": 96, "state": state, "metrics": {}}, path)
    return path


def save_models(configs: "dict[str, PretrainedConfig]", directory: Path) -> dict[str, str]:
    """Save a model with random weights for each config, and the recorded runs' tokenizer; return their directories."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(ORACLE / "model")
    torch.manual_seed(0)
    for name, config in configs.items():
        config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return {name: str(directory / name) for name in configs}


@pytest.fixture
def oracle_model() -> list[str]:
    """Return overrides that choose the recorded runs' model and data."""
    return [
        "model=blank_model",
        f"model.name_or_path={ORACLE}/model",
        "model.reference_dtype=float32",
        f"dataset_paths.hh={ORACLE}/hh",
        f"dataset_paths.shp={ORACLE}/shp",
    ]


def trainers_in(directory: Path) -> "Callable[..., BasicTrainer]":
    """Return a function that makes a trainer in this process, from overrides as on the command line.

    The function also precomputes the reference if the config says so. Caches and runs are in `directory`.
    """

    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    import trainers
    from commands.command_line import for_hydra
    from config_checks.checks import check_config
    from config_checks.schema import CONFIG_DIR
    from models import load_policy, load_reference

    def make(*overrides: str, purpose: str = "train") -> "BasicTrainer":
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            names = [
                f"exp_name={next(counter)}",
                "wandb.enabled=false",
                "curves=false",
                f"local_dirs=[{directory}/cache]",
            ]
            config = compose("config", [*for_hydra([*names, *overrides])])
        OmegaConf.resolve(config)
        check_config(config)
        policy = load_policy(config)
        load = functools.partial(load_reference, config, policy)
        trainer = trainers.BasicTrainer(policy, config, config.seed, config.local_run_dir, load, purpose=purpose)
        trainer.precompute_reference()
        return trainer

    counter = itertools.count()
    return make


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a command in the test's directory; kill what still runs when the test ends."""
    processes = []

    def start_command(*command: str, log: str, env: dict[str, str] | None = None) -> subprocess.Popen:
        environment = {**os.environ, **ENVIRONMENT, **(env or {})}
        with open(tmp_path / log, "w") as file:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                    stderr=file,
                )
            )  # fmt: skip
        return processes[-1]

    yield start_command
    for process in processes:
        if process.poll() is None:
            for running in [*psutil.Process(process.pid).children(recursive=True), process]:
                running.kill()
        process.wait()


@pytest.fixture
def make_trainer(tmp_path):
    return trainers_in(tmp_path)
