"""Check that the keys of a config fit together, before any model or data is loaded.

`config_checks.values` checks keys and single values.
"""

import importlib.util
import os
import re

import torch
from omegaconf import DictConfig, OmegaConf

from basics.outputs import is_sharded, why_not_writable
from config_checks.datasets import check_data
from config_checks.lora import check_adapter_fits, check_lora
from config_checks.optimization import check_optimizer, check_schedule
from config_checks.references import check_reference
from config_checks.rules import check_one_of
from config_checks.schema import default_config, expand_config, names_in
from config_checks.values import check_values
from config_checks.workers import check_workers
from losses import find_loss
from optimization import DEFAULT_SCHEDULE
from references import saved_settings, sources
from reporting.metric_names import evaluation_metrics
from utils import UserError, closest_sibling, default_device, get_local_dir, rank0_print

DTYPES = ("float64", "float32", "bfloat16", "float16")
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")  # transformers' names
# packages that they need on a GPU; on a CPU, flex_attention crashes torch's compiler
_GPU_ATTENTION = {
    "flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface", "flex_attention": "triton",
}  # fmt: skip
_HUB_ID = r"\w[\w.-]*(/\w[\w.-]*)?"  # NAME or OWNER/NAME, as a regular expression


def check_config(config: DictConfig, reads_data: bool = True):
    """Refuse a config that can't work; fill in what it leaves open.

    `~` is expanded in paths, `eval_every` and `save_every` are rounded down to whole batches, `reference=auto` and the
    reference's dtype are resolved.

    Args:
        reads_data: False for commands that use no dataset: then those of the config need not exist.

    Raises: UserError naming the key, its value and the remedy.
    """
    expand_config(config)
    missing_keys = sorted(OmegaConf.missing_keys(config))
    if missing_keys:
        models = ", ".join(names_in("model"))
        hint = f" Choose a model with model=NAME; there are: {models}" if "model.name_or_path" in missing_keys else ""
        raise UserError(f"Got missing keys in config: {', '.join(missing_keys)}.{hint}")
    if isinstance(config.exp_name, int | float) and not isinstance(config.exp_name, bool):
        config.exp_name = str(config.exp_name)
    check_values(config)
    check_data(config, reads_data)
    check_optimizer(config)
    if config.lr_scheduler != DEFAULT_SCHEDULE or config.lr_scheduler_args:
        check_schedule(config.lr_scheduler, OmegaConf.to_container(config.lr_scheduler_args))
    _check_model(config)
    _check_lengths_and_batches(config)
    check_workers(config)
    check_reference(config)
    _check_checkpoints(config)
    _check_packages(config)
    _check_files(config)


def _check_model(config: DictConfig):
    """Check where the model comes from, its dtypes and its attention."""
    model = config.model
    check_one_of("model.policy_dtype", model.policy_dtype, DTYPES)
    check_one_of("model.reference_dtype", model.reference_dtype, (*DTYPES, None))
    for key in ("policy_dtype", "reference_dtype"):
        if model[key] == "float64" and default_device() == "mps":
            raise UserError(f"model.{key}=float64: Apple's GPUs have no float64; use float32")
    if None not in (model.policy_mp, model.fsdp_policy_mp) and model.policy_mp != model.fsdp_policy_mp:
        raise UserError("model.policy_mp and model.fsdp_policy_mp are two names for one thing: give one of them")
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
    if config.lora is not None and model.adapter is not None:
        raise UserError(
            "lora is for a new adapter, model.adapter for a saved one, which has its own settings: give one"
        )
    if model.router_aux_loss_coef is not None:
        _turn_off_faster_layouts(config)


def _turn_off_faster_layouts(config: DictConfig):
    """Turn faster layouts off: they change which tokens a forward pass computes, which the router's loss depends on."""
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
            "model.load_in_4bit=true reads its weights from model.name_or_path: no archive, not from_scratch"
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
    for key, what in (("eval_every", "evaluation"), ("save_every", "checkpoint")):
        if config[key] is None:
            continue
        if config[key] < config.batch_size:
            raise UserError(
                f"{key}={config[key]} examples is below batch_size={config.batch_size}: "
                f"there can't be more than one {what} a batch"
            )
        if config[key] % config.batch_size != 0:
            rounded = config[key] - config[key] % config.batch_size
            if config[key] != default_config()[key]:  # a default needn't be divisible by batch_size
                rank0_print(f"WARNING: {key} must be divisible by batch_size")
            rank0_print(f"Setting {key} to", rounded)
            config[key] = rounded


def _check_checkpoints(config: DictConfig):
    if config.keep_best is not None:
        check_one_of("keep_best", config.keep_best, evaluation_metrics(find_loss(config.loss), config))
    check_one_of("checkpoint_format", config.checkpoint_format, ("whole", "sharded"))
    if config.checkpoint_async and config.checkpoint_format != "sharded":
        raise UserError(
            "checkpoint_async=true writes what each worker holds, but checkpoint_format=whole gathers it first, while "
            "training waits: add checkpoint_format=sharded"
        )


def _check_packages(config: DictConfig):
    """Check that the optional packages that the config needs are installed."""
    for tracker in ("tensorboard", "wandb"):
        if config[tracker].enabled and not config.debug and importlib.util.find_spec(tracker) is None:
            raise UserError(f"{tracker} is not installed: pip install {tracker}, or pass {tracker}.enabled=false")
    has_adapter = config.lora is not None or any(source.adapter is not None for source in sources(config))
    if has_adapter and importlib.util.find_spec("peft") is None:
        raise UserError("lora and adapters need PEFT: pip install peft")


def _check_files(config: DictConfig):
    """Check that local files exist and that outputs can be written; the hub itself isn't asked."""
    folders_or_ids = {"model.tokenizer_name_or_path": config.model.tokenizer_name_or_path}
    folders_or_ids |= {source.key("name_or_path"): source.name_or_path for source in sources(config)}
    for key, name in folders_or_ids.items():
        if name is not None and not os.path.exists(name) and not re.fullmatch(_HUB_ID, name, re.ASCII):
            raise UserError(f"{key}={name}: no such folder, and no id on the hub.{closest_sibling(name)}")
    for source in sources(config):
        archive = source.archive
        if archive is not None and not os.path.exists(archive) and not _may_be_hub_id(archive):
            directory = os.path.dirname(archive)
            remedy = f" The checkpoint is sharded: give {directory}" if is_sharded(directory) else ""
            raise UserError(f"{source.key('archive')}={archive}: no such file.{remedy or closest_sibling(archive)}")
        if source.adapter is not None:
            check_adapter_fits(config, saved_settings(source.key("adapter"), source.adapter))
    if config.lora is not None:
        check_lora(config)
        check_adapter_fits(config, config.lora)
    outputs = {f"local_run_dir={config.local_run_dir}": config.local_run_dir}
    if config.precompute_ref_log_probs:
        directory = os.path.join(get_local_dir(config.local_dirs), "reference_logps")
        outputs[f"precompute_ref_log_probs=true keeps them in {directory} (local_dirs)"] = directory
    for name, directory in outputs.items():
        if reason := why_not_writable(directory):
            raise UserError(f"{name}: {reason}")


def _may_be_hub_id(name: str) -> bool:
    """True for OWNER/MODEL that isn't a file in an existing directory."""
    owner, _, model = name.partition("/")
    is_file = os.path.exists(owner) or model.endswith((".pt", ".safetensors", ".bin"))
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not is_file
