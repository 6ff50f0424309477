"""Check that the keys of a config fit together, before any model or data is loaded.

`config_checks.values` checks keys and single values.
"""

import importlib.util
import inspect
import os
import re
import shutil
import sys

import torch
from omegaconf import DictConfig, OmegaConf

from basics.outputs import is_sharded, why_not_writable
from config_checks.datasets import check_data
from config_checks.lora import check_adapters
from config_checks.schedules import check_schedule
from config_checks.schema import default_config, expand_config, names_in
from config_checks.values import check_one_of, check_values, is_number
from distributed import environment
from distributed.strategies import STRATEGIES, trainers_with
from losses import find_loss, needs_reference
from optimization import DEFAULT_SCHEDULE
from references import REFERENCES, reference_source, resolved_reference, saved_settings, sources
from reporting.metric_names import evaluation_metrics
from utils import UserError, closest_match, closest_sibling, default_device, get_local_dir, rank0_print

DTYPES = ("float64", "float32", "bfloat16", "float16")
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")  # transformers' names
# implementations that need a GPU, and their packages; on a CPU, flex_attention crashes torch's compiler
_GPU_ATTENTION = {
    "flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface", "flex_attention": "triton",
}  # fmt: skip
# LBFGS needs several losses per step, SparseAdam sparse gradients
_UNSUPPORTED_OPTIMIZERS = (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)
NOT_FOR_DTENSORS = ("Adafactor", "Rprop")  # optimizers that use an operation which DTensors lack
_HUB_ID = r"\w[\w.-]*(/\w[\w.-]*)?"  # NAME or OWNER/NAME, as a regular expression


def check_config(config: DictConfig, reads_data: bool = True):
    """Refuse a config that can't work, and complete it in place.

    `~` is expanded in paths, `eval_every` and `save_every` are rounded down to whole batches, and `reference=auto` is
    resolved.

    Args:
        reads_data: False for commands that use no dataset: then the config's datasets need not exist.

    Raises: UserError naming the key, its value and the remedy.
    """
    expand_config(config)
    missing_keys = sorted(OmegaConf.missing_keys(config))
    if missing_keys:
        models = ", ".join(names_in("model"))
        hint = f" Choose a model with model=NAME; there are: {models}" if "model.name_or_path" in missing_keys else ""
        raise UserError(f"Got missing keys in config: {', '.join(missing_keys)}.{hint}")
    if is_number(config.exp_name):
        config.exp_name = str(config.exp_name)
    check_values(config)
    check_data(config, reads_data)
    _check_optimizer(config)
    if config.lr_scheduler != DEFAULT_SCHEDULE or config.lr_scheduler_args:
        check_schedule(config.lr_scheduler, OmegaConf.to_container(config.lr_scheduler_args))
    _check_model(config)
    _check_lengths_and_batches(config)
    _check_workers(config)
    _check_reference(config)
    _check_sources(config)
    if config.lora is not None or any(source.adapter is not None for source in sources(config)):
        check_adapters(config)
    _check_output(config)


def _check_optimizer(config: DictConfig):
    """Refuse an unknown optimizer, or an argument that it doesn't take."""
    optimizers = {
        name: value for name, value in vars(torch.optim).items() if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer) and value not in _UNSUPPORTED_OPTIMIZERS
    }  # fmt: skip
    note = " (the optimizers of torch.optim that train with one gradient per step)"
    check_one_of("optimizer", config.optimizer, optimizers, note)
    accepted = dict(inspect.signature(optimizers[config.optimizer]).parameters)
    del accepted["params"], accepted["lr"]
    for name, value in OmegaConf.to_container(config.optimizer_args).items():
        if name not in accepted:
            hint = " Its learning rate is the key lr." if name == "lr" else closest_match(name, accepted)
            raise UserError(f"optimizer_args.{name}: {config.optimizer} takes no such argument.{hint}")
        _check_optimizer_argument(f"optimizer_args.{name}", value, accepted[name])


def _check_optimizer_argument(key: str, value: object, parameter: inspect.Parameter):
    """Refuse a value of another type than the optimizer's signature has, e.g. a string instead of a number."""
    default, annotation = parameter.default, str(parameter.annotation)
    if value is None and default is None:
        return
    if isinstance(default, tuple):
        has_length = isinstance(value, list) and len(value) == len(default)
        if not (has_length and all(number is None or is_number(number) for number in value)):
            raise UserError(f"{key}={value}: expected {len(default)} numbers, e.g. {list(default)}")
    elif isinstance(default, bool) or (default is None and "bool" in annotation):
        if not isinstance(value, bool):
            raise UserError(f"{key}={value}: expected true or false")
    elif (isinstance(default, int | float) or "float" in annotation) and not is_number(value):
        raise UserError(f"{key}={value}: expected a number")


def _check_model(config: DictConfig):
    """Check the policy's and the reference's dtypes, and how the model is loaded and computed."""
    model = config.model
    check_one_of("model.policy_dtype", model.policy_dtype, DTYPES)
    check_one_of("model.reference_dtype", model.reference_dtype, (*DTYPES, None))
    for key in ("policy_dtype", "reference_dtype"):
        if model[key] == "float64" and default_device() == "mps":
            raise UserError(f"model.{key}=float64: Apple's GPUs have no float64; use float32")
    if None not in (model.policy_mp, model.fsdp_policy_mp) and model.policy_mp != model.fsdp_policy_mp:
        raise UserError("model.policy_mp and model.fsdp_policy_mp are two names of the same setting: give one of them")
    model.policy_mp = model.policy_mp or model.fsdp_policy_mp
    for key in ("policy_dtype", "policy_mp"):
        if model[key] == "float16":
            raise UserError(
                f"model.{key}=float16: float16 gradients need loss scaling, which no trainer here does; use bfloat16, "
                "or model.policy_mp=bfloat16 with float32 weights"
            )
    check_one_of("model.policy_mp", model.policy_mp, ("bfloat16", None))
    if model.revision is not None and os.path.isdir(model.name_or_path):
        raise UserError(
            f"model.revision={model.revision}: model.name_or_path={model.name_or_path} is a local folder, which has no "
            "revisions; leave it null"
        )
    if model.attn_implementation is not None:
        _check_attention(model)
    if model.load_in_4bit:
        _check_4bit(config)
    if model.router_aux_loss_coef is not None:
        _use_plain_forward(config)
    compilers = [os.environ.get(name) for name in ("CC", "CXX")] + ["gcc", "cc", "clang"]
    if config.compile and not any(shutil.which(compiler) for compiler in compilers if compiler):
        raise UserError(
            "compile=true: torch.compile needs a C compiler, and there is none; install gcc, or leave compile out"
        )


def _use_plain_forward(config: DictConfig):
    """Turn off faster layouts, or refuse them and `compile` where the user asks for them.

    The router's loss depends on all tokens of the forward pass.
    """
    coefficient = f"model.router_aux_loss_coef={config.model.router_aux_loss_coef}"
    for key in ("shared_prompt", "padding_free", "compile"):
        if config[key] is True:
            raise UserError(f"{coefficient} needs the plain forward pass: leave {key} out")
    if (config.shared_prompt, config.padding_free) != (False, False):
        rank0_print(f"Prefix sharing and packed rows: off, as {coefficient} needs the plain forward pass")
    config.shared_prompt = config.padding_free = False


def _check_attention(model: DictConfig):
    name = model.attn_implementation
    check_one_of("model.attn_implementation", name, ATTENTION, note="; null lets transformers choose")
    if (package := _GPU_ATTENTION.get(name)) is None:
        return
    if not torch.cuda.is_available() or importlib.util.find_spec(package) is None:
        raise UserError(f"model.attn_implementation={name} needs a GPU and the package {package}; sdpa needs neither")
    for key in ("reference_dtype", "policy_dtype" if model.policy_mp is None else "policy_mp"):
        if name.startswith("flash") and model[key] not in ("float16", "bfloat16") and model[key] is not None:
            raise UserError(
                f"model.attn_implementation={name} computes in bfloat16 or float16, not model.{key}={model[key]}"
            )


def _check_4bit(config: DictConfig):
    """Check that 4-bit weights can be loaded, and that something else is trained."""
    if not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("model.load_in_4bit=true needs a GPU and bitsandbytes (pip install bitsandbytes)")
    if config.lora is None and config.model.adapter is None:
        raise UserError("model.load_in_4bit=true: 4-bit weights can't be trained; add lora={} or model.adapter")
    if any(source.archive is not None or source.from_scratch for source in sources(config)):
        raise UserError(
            "model.load_in_4bit=true reads its weights from model.name_or_path: leave out model.archive and "
            "model.from_scratch"
        )


def _check_lengths_and_batches(config: DictConfig):
    if config.max_prompt_length >= config.max_length:
        raise UserError(
            f"max_prompt_length={config.max_prompt_length} must be below max_length={config.max_length}, "
            "or no room is left for a response"
        )
    if config.n_epochs is None and config.n_examples is None:
        raise UserError("n_epochs and n_examples are both null: set one of them to say when to stop")
    if config.batch_size % config.gradient_accumulation_steps != 0:
        raise UserError(
            f"batch_size={config.batch_size} doesn't divide by gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps} into microbatches of equal size"
        )
    for key, noun in (("eval_every", "evaluation"), ("save_every", "checkpoint")):
        if config[key] is None:
            continue
        if config[key] < config.batch_size:
            raise UserError(
                f"{key}={config[key]} examples is below batch_size={config.batch_size}: "
                f"there can't be more than one {noun} per batch"
            )
        if config[key] % config.batch_size != 0:
            rounded = config[key] - config[key] % config.batch_size
            if config[key] != default_config()[key]:  # a default needn't be divisible by batch_size
                rank0_print(f"WARNING: {key} must be divisible by batch_size")
            rank0_print(f"Setting {key} to", rounded)
            config[key] = rounded


def _check_workers(config: DictConfig):
    """Refuse workers that can't be started or can't share the work, and keys that the trainer doesn't use."""
    check_one_of("trainer", config.trainer, STRATEGIES)
    trainer, strategy = config.trainer, STRATEGIES[config.trainer]
    world_size = environment.get_world_size(strategy.starts_workers, config.world_size)
    if strategy.starts_workers:
        _check_start(config)
    elif (n_workers := max(world_size, config.world_size or 1)) > 1:
        others = trainers_with("starts_workers", True)
        raise UserError(f"trainer={trainer} trains in one process, not in {n_workers} (world_size); choose {others}")
    for key in ("world_size", "fsdp_port"):
        if config[key] is not None and (not strategy.starts_workers or environment.is_launched()):
            why = "the launcher sets it" if strategy.starts_workers else f"trainer={trainer} starts no workers"
            raise UserError(f"{key}={config[key]}: {why}; leave it null")
    for name, other in STRATEGIES.items():
        for key, default in other.config_keys.items():
            if config[key] != default and key not in strategy.config_keys:
                raise UserError(f"{key}={config[key]}: only trainer={name} uses it; leave it {default}")
    n_tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if n_tasks != "1" and not environment.is_launched():
        rank0_print(
            f"WARNING: srun has started this command {n_tasks} times, each as a run of its own; scripts/slurm.sh "
            "starts one run on all tasks"
        )
    if strategy.starts_workers:
        _check_division(config, world_size)
    n_gpus = torch.cuda.device_count()
    if n_gpus and not environment.is_launched() and world_size > n_gpus:
        raise UserError(f"world_size={world_size}: each worker needs a GPU of its own, and this machine has {n_gpus}")
    if strategy.splits_tensors:
        _check_split_tensors(config)


def _check_start(config: DictConfig):
    """Refuse Windows, and a port that doesn't exist."""
    if sys.platform == "win32":
        raise UserError(
            f"trainer={config.trainer} runs several processes, which this program can't do on Windows: choose "
            f"{trainers_with('starts_workers', False)}, or run it in WSL, which is Linux"
        )
    if config.fsdp_port is not None and not 0 < config.fsdp_port < 2**16:
        raise UserError(f"fsdp_port={config.fsdp_port}: must be a port, 1 to 65535, or null for a free one")


def _check_division(config: DictConfig, world_size: int):
    """Refuse workers that can't be divided into equal groups, and batches that can't be divided among the groups."""
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
    """Refuse settings that need whole tensors, for a trainer that splits them."""
    trainer, others = config.trainer, trainers_with("splits_tensors", False)
    if config.compile:
        raise UserError(f"compile=true isn't for trainer={trainer}; leave it out")
    if config.model.load_in_4bit:
        raise UserError(f"model.load_in_4bit=true: trainer={trainer} can't split 4-bit weights; use {others}")
    if config.optimizer in NOT_FOR_DTENSORS:
        raise UserError(
            f"optimizer={config.optimizer}: PyTorch's {config.optimizer} can't train tensors that are spread over "
            f"workers, as trainer={trainer} does; use {others} or another optimizer"
        )


def _check_reference(config: DictConfig):
    """Refuse a reference that the loss doesn't use or that doesn't fit the policy; resolve `reference=auto`."""
    check_one_of("reference", config.reference, ("auto", *REFERENCES))
    sets_reference = config.reference != "auto" or config.precompute_ref_log_probs or reference_source(config).given
    if not needs_reference(config.loss) and sets_reference:
        why = "reference_free" if config.loss.get("reference_free") else f"loss={config.loss.name}"
        raise UserError(
            f"{why} uses no reference: leave reference, reference_model and precompute_ref_log_probs at their defaults"
        )
    config.reference = resolved_reference(config)
    if config.reference_update_every is not None:
        _check_moving_reference(config)
    if find_loss(config.loss).takes_kl_estimate:
        _check_kl_estimate(config)
    if find_loss(config.loss).needs_shared_logps(config.loss) and config.precompute_ref_log_probs:
        raise UserError(
            "precompute_ref_log_probs=true keeps only the log-probabilities of whole responses; loss.ld_alpha also "
            "needs those up to the length of the shorter response: use precompute_ref_log_probs=false"
        )


def _check_kl_estimate(config: DictConfig):
    """Check that every batch has two or more prompts: the KL estimate pairs each prompt with another one's response."""
    loss = f"loss={config.loss.name}"
    if config.precompute_ref_log_probs:
        raise UserError(
            f"precompute_ref_log_probs=true: {loss} forms new pairs of prompts and responses in every batch, so their "
            "log-probabilities can't be computed in advance; use precompute_ref_log_probs=false"
        )
    for key in ("batch_size", "eval_batch_size"):
        if config[key] < 2:
            raise UserError(f"{key}={config[key]}: {loss} needs two or more prompts per batch")
    if config.n_eval_examples is not None and config.n_eval_examples % config.eval_batch_size == 1:
        raise UserError(
            f"n_eval_examples={config.n_eval_examples} leaves a last batch of one at eval_batch_size="
            f"{config.eval_batch_size}; {loss} needs two or more prompts per batch"
        )


def _check_moving_reference(config: DictConfig):
    every = config.reference_update_every
    if not needs_reference(config.loss):
        raise UserError(f"reference_update_every={every}: loss={config.loss.name} has no reference to move")
    if config.precompute_ref_log_probs:
        raise UserError(
            f"reference_update_every={every}: precompute_ref_log_probs=true needs a reference that doesn't move"
        )
    if config.reference != "model" or config.lora is not None or config.model.adapter is not None:
        raise UserError(f"reference_update_every={every}: an adapter's reference can't follow it; train all weights")
    if (adapter := reference_source(config).adapter) is not None:
        raise UserError(
            f"reference_update_every={every}: reference_model.adapter={adapter} has weights that the policy lacks; "
            "merge it first: python export.py run=RUN output=DIR, then reference_model.name_or_path=DIR"
        )


def _check_sources(config: DictConfig):
    """Refuse paths to files and folders of models that don't exist; hub ids aren't looked up."""
    folders_or_ids = {"model.tokenizer_name_or_path": config.model.tokenizer_name_or_path}
    folders_or_ids |= {source.key("name_or_path"): source.name_or_path for source in sources(config)}
    for key, name in folders_or_ids.items():
        if name is not None and not os.path.exists(name) and not re.fullmatch(_HUB_ID, name, re.ASCII):
            raise UserError(f"{key}={name}: no such folder, and no id on the hub.{closest_sibling(name)}")
        if name is not None and os.path.isfile(name):
            raise UserError(f"{key}={name} is a file: give the folder that holds it, {os.path.dirname(name) or '.'}")
    for source in sources(config):
        for field in ("name_or_path", "archive", "adapter"):
            key, path = source.key(field), getattr(source, field)
            if path is not None and all(os.path.exists(os.path.join(path, name)) for name in ("config.yaml", "LATEST")):
                raise UserError(f"{key}={path} is a run directory: give a checkpoint in it, {key}={path}/LATEST")
        key, name, archive = source.key("name_or_path"), source.name_or_path, source.archive
        if os.path.exists(os.path.join(name, "adapter_config.json")):  # transformers would load base and adapter
            base = saved_settings(key, name).get("base_model_name_or_path")
            raise UserError(
                f"{key}={name} holds a LoRA adapter, not a model: give its base as {key}={base}, and "
                f"{key.replace('name_or_path', 'adapter')}={name}"
            )
        if archive is not None and not os.path.exists(archive) and not _may_be_hub_id(archive):
            directory = os.path.dirname(archive) or "."
            remedy = f" The checkpoint is sharded: give {directory}" if is_sharded(directory) else ""
            raise UserError(f"{source.key('archive')}={archive}: no such file.{remedy or closest_sibling(archive)}")


def _may_be_hub_id(name: str) -> bool:
    """True for OWNER/MODEL, unless it is in an existing directory or ends like a file's name."""
    owner, _, model = name.partition("/")
    is_file = os.path.exists(owner) or model.endswith((".pt", ".safetensors", ".bin"))
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not is_file


def _check_output(config: DictConfig):
    """Check what the run writes: checkpoints, trackers, and directories that must be writable."""
    if config.keep_best is not None:
        known = evaluation_metrics(find_loss(config.loss), config)
        check_one_of("keep_best", config.keep_best, known, " (the metrics that this run's evaluations have)")
    check_one_of("checkpoint_format", config.checkpoint_format, ("whole", "sharded"))
    if config.checkpoint_async and config.checkpoint_format != "sharded":
        raise UserError(
            "checkpoint_async=true lets each worker write its own tensors, but checkpoint_format=whole gathers them "
            "first, while training waits: add checkpoint_format=sharded"
        )
    for tracker in ("tensorboard", "wandb"):
        if config[tracker].enabled and not config.debug and importlib.util.find_spec(tracker) is None:
            raise UserError(f"{tracker} is not installed: pip install {tracker}, or pass {tracker}.enabled=false")
    outputs = {f"local_run_dir={config.local_run_dir}": config.local_run_dir}
    if config.precompute_ref_log_probs:
        directory = os.path.join(get_local_dir(config.local_dirs), "reference_logps")
        outputs[f"precompute_ref_log_probs=true needs a cache in {directory} (local_dirs)"] = directory
    for name, directory in outputs.items():
        if reason := why_not_writable(directory):
            raise UserError(f"{name}: {reason}")
