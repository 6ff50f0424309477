"""Checks of the trainer: its workers, how they divide the batch, and what it can't do."""

import os
import shutil
import sys

import torch
from omegaconf import DictConfig

from config_checks.rules import check_one_of
from distributed import environment
from distributed.strategies import STRATEGIES
from utils import UserError

NOT_FOR_DTENSORS = ("Adafactor", "Rprop")  # optimizers that use an operation which DTensors lack


def check_workers(config: DictConfig):
    """Refuse workers that can't be started or can't share the work, and keys that the trainer has no use for."""
    check_one_of("trainer", config.trainer, STRATEGIES)
    strategy = STRATEGIES[config.trainer]
    world_size = environment.get_world_size(strategy.starts_workers, config.world_size)
    _check_start(config, world_size)
    for name, other in STRATEGIES.items():
        for key, default in other.config_keys.items():
            if config[key] != default and key not in strategy.config_keys:
                raise UserError(f"{key}={config[key]}: only trainer={name} has that; leave it {default}")
    if strategy.starts_workers:
        _check_division(config, world_size)
    n_gpus = torch.cuda.device_count()
    if n_gpus and not environment.is_launched() and world_size > n_gpus:
        raise UserError(f"world_size={world_size}: this machine has {n_gpus} GPUs, one for each worker")
    if strategy.splits_tensors:
        _check_split_tensors(config)
    compilers = [os.environ.get(name) for name in ("CC", "CXX")] + ["gcc", "cc", "clang"]
    if config.compile and not any(shutil.which(compiler) for compiler in compilers if compiler):
        raise UserError(
            "compile=true: torch.compile needs a C compiler, and there is none; install gcc, or leave it out"
        )


def _check_start(config: DictConfig, world_size: int):
    """Refuse workers that the trainer doesn't start, or that can't be started here."""
    trainer, starts_workers = config.trainer, STRATEGIES[config.trainer].starts_workers
    if not starts_workers and (n_workers := max(world_size, config.world_size or 1)) > 1:
        others = trainers_with("starts_workers", True)
        raise UserError(f"trainer={trainer} trains in one process, not in {n_workers} (world_size); choose {others}")
    if starts_workers and sys.platform == "win32":
        raise UserError(
            f"trainer={trainer} runs several processes, which this program can't do on Windows: choose "
            f"{trainers_with('starts_workers', False)}, or run it in WSL, which is Linux"
        )
    for key in ("world_size", "fsdp_port"):
        if config[key] is not None and (not starts_workers or environment.is_launched()):
            who = "the launcher decides that" if starts_workers else f"trainer={trainer} starts no workers"
            raise UserError(f"{key}={config[key]}: {who}; leave it null")
    if config.fsdp_port is not None and not 0 < config.fsdp_port < 2**16:
        raise UserError(f"fsdp_port={config.fsdp_port}: must be a port, 1 to 65535, or null for a free one")


def _check_division(config: DictConfig, world_size: int):
    """Refuse workers that can't be divided into equal groups, and batches that can't be divided among these."""
    n_together = config.tensor_parallel
    if world_size % n_together != 0:
        raise UserError(
            f"tensor_parallel={n_together} doesn't divide the {world_size} workers into equal groups; use a divisor of "
            f"{world_size}"
        )
    n_shards = STRATEGIES[config.trainer].n_batch_shards(config, world_size)
    groups = f"{n_shards} workers" if n_together == 1 else f"{n_shards} groups of {n_together} workers"
    if n_shards % config.fsdp_replicate != 0:
        raise UserError(
            f"fsdp_replicate={config.fsdp_replicate} doesn't divide the {groups} into equal groups; use a divisor of "
            f"{n_shards}"
        )
    if config.batch_size % (n_shards * config.gradient_accumulation_steps) != 0:
        raise UserError(
            f"batch_size={config.batch_size} doesn't divide by gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps} × {groups} into microbatches of equal size"
        )


def _check_split_tensors(config: DictConfig):
    """Refuse what works only on whole tensors, for a trainer that splits them."""
    trainer, others = config.trainer, trainers_with("splits_tensors", False)
    if config.compile:
        raise UserError(f"compile=true isn't for trainer={trainer}; leave it out")
    if config.model.load_in_4bit:
        raise UserError(f"model.load_in_4bit=true: trainer={trainer} can't split 4-bit weights; use {others}")
    if config.optimizer in NOT_FOR_DTENSORS:
        raise UserError(
            f"optimizer={config.optimizer}: PyTorch's can't train tensors that are spread over workers, as "
            f"trainer={trainer} does; use {others} or another optimizer"
        )


def trainers_with(attribute: str, value: bool) -> str:
    """Return 'trainer=A or trainer=B': the trainers whose strategies have this value of an attribute."""
    return " or ".join(f"trainer={name}" for name, other in STRATEGIES.items() if getattr(other, attribute) is value)
