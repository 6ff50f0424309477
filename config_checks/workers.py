"""Checks of the trainer, its workers, and what they can't do."""

def check_workers(config: DictConfig):
    if config.trainer not in STRATEGIES:
        raise UserError(
            f"trainer={config.trainer}: no such trainer.{closest_match(config.trainer, STRATEGIES)} "
            f"There are: {', '.join(STRATEGIES)}"
        )
    trainer, strategy = config.trainer, STRATEGIES[config.trainer]
    world_size = environment.get_world_size(strategy.starts_workers, config.world_size)
    for_tensors = ", ".join(name for name, other in STRATEGIES.items() if not other.splits_tensors)
    if not strategy.starts_workers and (n_workers := max(world_size, config.world_size or 1)) > 1:
        others = " or ".join(f"trainer={name}" for name, other in STRATEGIES.items() if other.starts_workers)
        raise UserError(f"trainer={trainer} trains in one process, not in {n_workers} (world_size); choose {others}")
    if strategy.starts_workers and sys.platform == "win32":
        raise UserError(
            f"trainer={trainer} runs several processes, which this program can't do on Windows: choose "
            f"{for_tensors.replace(', ', ' or ')}, or run it in WSL, which is Linux"
        )
    for key in ("world_size", "fsdp_port"):
        if config[key] is not None and (not strategy.starts_workers or environment.is_launched()):
            who = "the launcher decides that" if strategy.starts_workers else f"trainer={trainer} starts no workers"
            raise UserError(f"{key}={config[key]}: {who}; leave it null")
    if config.fsdp_port is not None and not 0 < config.fsdp_port < 2**16:
        raise UserError(f"fsdp_port={config.fsdp_port}: must be a port, 1 to 65535, or null for a free one")
    for name, other in STRATEGIES.items():
        for key, default in other.config_keys.items():
            if config[key] != default and key not in strategy.config_keys:
                raise UserError(f"{key}={config[key]}: only trainer={name} has that; leave it {default}")
    if strategy.starts_workers:
        _check_division(config, world_size)
    n_gpus = torch.cuda.device_count()
    if n_gpus and not environment.is_launched() and world_size > n_gpus:
        raise UserError(f"world_size={world_size}: this machine has {n_gpus} GPUs, one for each worker")
    if config.compile:
        _check_can_compile(config)
    if config.model.load_in_4bit and strategy.splits_tensors:
        raise UserError(f"model.load_in_4bit=true: trainer={trainer} can't split 4-bit weights; use {for_tensors}")
    if config.optimizer in NOT_FOR_DTENSORS and strategy.splits_tensors:
        raise UserError(
            f"optimizer={config.optimizer}: PyTorch's can't train tensors that are spread over workers, as "
            f"trainer={trainer} does; use {for_tensors} or another optimizer"
        )


def _check_division(config: DictConfig, world_size: int):
    """Raise UserError if workers can't be divided into equal groups, or batches into equal microbatches."""
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


def _check_can_compile(config: DictConfig):
    if STRATEGIES[config.trainer].splits_tensors:
        raise UserError(f"compile=true isn't for trainer={config.trainer}; leave it out")
    compilers = [os.environ.get(name) for name in ("CC", "CXX")] + ["gcc", "cc", "clang"]
    if not any(shutil.which(compiler) for compiler in compilers if compiler):
        raise UserError(
            "compile=true: torch.compile needs a C compiler, and there is none; install gcc, or leave it out"
        )
