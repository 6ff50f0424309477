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
from safetensors.torch import load_file

from checkpoints import load_policy, load_reference
from configuration import CONFIG_DIR, check_config
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
    """A trainer in this process, from overrides as on the command line; its data and caches are under tmp_path."""

    def make(*overrides: str) -> BasicTrainer:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            names = [f"exp_name={next(counter)}", "wandb.enabled=false", f"local_dirs=[{tmp_path}/cache]"]
            config = compose("config", [*with_free_keys([*names, *overrides])])
        OmegaConf.resolve(config)
        check_config(config)
        policy = load_policy(config)
        load = functools.partial(load_reference, config, policy)
        return BasicTrainer(policy, config, config.seed, config.local_run_dir, reference_model=load)

    counter = itertools.count()
    return make
