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
from omegaconf import DictConfig, ListConfig, OmegaConf

from basics.outputs import is_sharded, why_not_writable
from config_checks.datasets import check_datasets, check_fields, check_ignored_columns, chosen_datasets
from config_checks.lora import check_adapter_fits, check_lora
from config_checks.optimization import check_schedule
from config_checks.schema import default_config, expand_config, names_in
from config_checks.values import check_values
from data.choice import TRUNCATIONS
from distributed import environment
from distributed.strategies import STRATEGIES
from losses import find_loss, needs_reference
from optimization import DEFAULT_SCHEDULE
from preference_datasets import DATASETS
from references import REFERENCES, reference_source, resolved_reference, saved_settings, sources
from reporting.metric_names import evaluation_metrics
from utils import UserError, closest_match, closest_sibling, default_device, get_local_dir, rank0_print

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
    _check_data(config, reads_data)
    check_optimizer(config)
    if config.lr_scheduler != DEFAULT_SCHEDULE or config.lr_scheduler_args:
        check_schedule(config.lr_scheduler, OmegaConf.to_container(config.lr_scheduler_args))
    _check_model(config)
    _check_lengths_and_batches(config)
    check_workers(config)
    check_reference(config)
    _check_checkpoints(config)
    _check_files(config)


def _check_data(config: DictConfig, reads_data: bool):
    """Check the datasets' names and, if the command reads them, their settings, as far as possible before reading."""
    if isinstance(config.datasets, str):
        config.datasets = ListConfig([config.datasets])
    if not isinstance(config.datasets, ListConfig):
        raise UserError(f"datasets={config.datasets}: expected a list, e.g. datasets=[hh]")
    if not config.datasets:
        raise UserError("datasets=[]: name at least one dataset, e.g. datasets=[hh]")
    if not reads_data:
        return
    for key, values in (
        ("truncation", (*TRUNCATIONS, None)),
        ("on_bad_example", ("error", "skip")),
        ("trained_turns", ("all", "last")),
    ):
        if config[key] not in values:
            allowed = ", ".join("null" if value is None else value for value in values)
            raise UserError(f"{key}={config[key]}: must be one of {allowed}")
    if not 0 < config.test_fraction < 1:
        raise UserError(f"test_fraction={config.test_fraction}: must be above 0 and below 1")
    if config.fields:
        check_fields(config.fields, "config")
    if config.ignored_columns:
        check_ignored_columns(config.ignored_columns, "config")
    choices = chosen_datasets(config)
    of_files = ("train_split", "test_split", "fields", "ignored_columns", "apply_chat_template", "verbatim_responses")
    of_rows = [key for key in of_files if config[key]] + ["trained_turns"] * (config.trained_turns != "all")
    if of_rows and all(choice.name in DATASETS for choice in choices):
        raise UserError(
            f"{of_rows[0]}={config[of_rows[0]]}: that is for files and hub ids; named datasets have their own"
        )
    check_datasets(choices, config.dataset_paths)
    if config.chat_template is not None and not os.path.isfile(config.chat_template):
        raise UserError(f"chat_template={config.chat_template}: no such file, seen from {os.getcwd()}")


def _check_model(config: DictConfig):
    """Check where the model comes from and its dtypes."""
    model = config.model
    for key in ("policy_dtype", "reference_dtype"):
        if model[key] not in DTYPES and (key, model[key]) != ("reference_dtype", None):
            raise UserError(f"model.{key}={model[key]}: must be one of {', '.join(DTYPES)}")
        if model[key] == "float64" and default_device() == "mps":
            raise UserError(f"model.{key}=float64: Apple's GPUs have no float64; use float32")
    if model.policy_dtype == "float16":
        raise UserError(
            "model.policy_dtype=float16: float16 gradients need loss scaling, which no trainer here does; use "
            "bfloat16, or model.policy_mp=bfloat16 with float32 weights"
        )
    if None not in (config.model.policy_mp, config.model.fsdp_policy_mp) and (
        config.model.policy_mp != config.model.fsdp_policy_mp
    ):
        raise UserError("model.policy_mp and model.fsdp_policy_mp are two names for one thing: give one of them")
    config.model.policy_mp = config.model.policy_mp or config.model.fsdp_policy_mp
    if config.model.policy_mp not in (None, "bfloat16"):
        raise UserError(
            f"model.policy_mp={config.model.policy_mp}: must be bfloat16 or null; float16 gradients would need "
            "loss scaling, which no trainer here does"
        )
    if model.revision is not None and os.path.isdir(model.name_or_path):
        raise UserError(
            f"model.revision={model.revision}: model.name_or_path={model.name_or_path} is a local folder, which has no "
            "revisions; leave it null"
        )
    if model.attn_implementation is not None:
        _check_attention(model)
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
    if name not in ATTENTION:
        raise UserError(
            f"model.attn_implementation={name}: no such implementation.{closest_match(name, ATTENTION)} There are: "
            f"{', '.join(ATTENTION)}; null lets transformers choose"
        )
    if (package := _GPU_ATTENTION.get(name)) is None:
        return
    if not torch.cuda.is_available() or importlib.util.find_spec(package) is None:
        raise UserError(f"model.attn_implementation={name} needs a GPU and the package {package}; sdpa needs neither")
    for key in ("reference_dtype", "policy_dtype" if model.policy_mp is None else "policy_mp"):
        if name.startswith("flash") and model[key] not in ("float16", "bfloat16") and model[key] is not None:
            raise UserError(
                f"model.attn_implementation={name} computes in bfloat16 or float16, not model.{key}={model[key]}"
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
    if (metric := config.keep_best) is not None:
        known = evaluation_metrics(find_loss(config.loss), config)
        if metric not in known:
            raise UserError(
                f"keep_best={metric}: no metric of these evaluations.{closest_match(metric, known)} "
                f"There are: {', '.join(known)}"
            )
    formats = ("whole", "sharded")
    if config.checkpoint_format not in formats:
        raise UserError(
            f"checkpoint_format={config.checkpoint_format}: must be one of {', '.join(formats)}."
            f"{closest_match(config.checkpoint_format, formats)}"
        )
    if config.checkpoint_async and config.checkpoint_format != "sharded":
        raise UserError(
            "checkpoint_async=true writes what each worker holds, but checkpoint_format=whole gathers it first, while "
            "training waits: add checkpoint_format=sharded"
        )


def _check_files(config: DictConfig):
    if config.tensorboard.enabled and not config.debug and importlib.util.find_spec("tensorboard") is None:
        raise UserError("tensorboard is not installed: pip install tensorboard, or pass tensorboard.enabled=false")
    if config.wandb.enabled and not config.debug and importlib.util.find_spec("wandb") is None:
        raise UserError("wandb is not installed: pip install wandb, or pass wandb.enabled=false")
    folders_or_ids = {"model.tokenizer_name_or_path": config.model.tokenizer_name_or_path}
    folders_or_ids |= {source.key("name_or_path"): source.name_or_path for source in sources(config)}
    for choice in chosen_datasets(config):
        if choice.name in DATASETS:
            folders_or_ids[f"dataset_paths.{choice.name}"] = config.dataset_paths.get(choice.name)
    for key, name in folders_or_ids.items():  # the hub itself is not asked
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
    has_adapter = config.lora is not None or any(source.adapter is not None for source in sources(config))
    if has_adapter and importlib.util.find_spec("peft") is None:
        raise UserError("lora and adapters need PEFT: pip install peft")
    if config.lora is not None:
        check_lora(config)
        check_adapter_fits(config, config.lora)
    if reason := why_not_writable(config.local_run_dir):
        raise UserError(f"local_run_dir={config.local_run_dir}: {reason}")
    if config.precompute_ref_log_probs:
        directory = os.path.join(get_local_dir(config.local_dirs), "reference_logps")
        if reason := why_not_writable(directory):
            raise UserError(f"precompute_ref_log_probs=true keeps them in {directory} (local_dirs): {reason}")


def _may_be_hub_id(name: str) -> bool:
    """True for OWNER/MODEL that isn't a file in an existing directory."""
    owner, _, model = name.partition("/")
    is_file = os.path.exists(owner) or model.endswith((".pt", ".safetensors", ".bin"))
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not is_file
