"""What a config may say: every check on it that needs no model and no data, made before anything is loaded."""

import importlib.util
import os
import re
from pathlib import Path

import torch
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf

import workers
from losses import LOSSES, needs_reference
from references import choose_reference
from utils import UserError, closest_match

REPOSITORY = Path(__file__).parent
CONFIG_DIR = REPOSITORY / "config"

TRAINERS = ("BasicTrainer", "FSDPTrainer", "TensorParallelTrainer")
DTYPES = ("float64", "float32", "bfloat16", "float16")

_POSITIVE = (
    "batch_size", "eval_batch_size", "gradient_accumulation_steps", "lr", "max_grad_norm", "max_length",
    "max_prompt_length", "n_epochs", "n_examples", "n_eval_examples", "eval_every", "save_every", "keep_checkpoints",
    "loss.beta", "world_size", "fsdp_replicate",
)  # fmt: skip
_NON_NEGATIVE = ("seed", "warmup_steps", "n_eval_model_samples", "minimum_log_interval_secs", "loss.label_smoothing")
_MAY_BE_NULL = ("n_epochs", "n_examples")
# of keys whose default is null; the others are strings
_TYPES_OF_NULL = dict.fromkeys(("n_examples", "fsdp_port", "world_size", "save_every", "keep_checkpoints"), int)


_WHOLE_TENSORS_ONLY = ("Adafactor", "Rprop")  # optimizers that use an operation which DTensors lack


def default_config() -> dict[str, object]:
    """Every key a config may have, with its default: {'lr': 5e-7, 'loss.beta': 0.1, ...}."""
    flat = flatten(OmegaConf.load(CONFIG_DIR / "config.yaml"))
    flat |= flatten(OmegaConf.load(CONFIG_DIR / "model/blank_model.yaml"), "model.")
    for path in sorted(CONFIG_DIR.glob("loss/*.yaml")):
        flat |= flatten(OmegaConf.load(path), "loss.")
    return {key: value for key, value in flat.items() if not key.startswith(("hydra", "defaults"))}


def flatten(config: DictConfig, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in OmegaConf.to_container(config, resolve=False).items():
        if isinstance(value, dict) and value:
            flat |= flatten(OmegaConf.create(value), f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def explain_hydra_error(error: Exception) -> str:
    """Hydra's message for a config that can't be composed, with the closest match to what was not found."""
    text = f"{error}\n{error.__cause__ or ''}"
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"no {group}={name}.{closest_match(name, error.options)} There are: {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        return f"can't read {error.override!r}: {error}"
    if key := re.search(r"Could not override '([^']+)'", text):
        if key[1] in default_config():  # it is an option of another loss
            return f"{key[1]}: the chosen loss has no such option; losses are chosen by loss=NAME, e.g. loss=dpo"
        return f"no config key {key[1]!r}.{closest_match(key[1], default_config())} config/config.yaml lists all keys"
    return str(error).strip()


def check_config(config: DictConfig):
    """Refuse what can't work, and round `eval_every` down to whole batches.

    Raises: UserError naming the key, its value and the remedy.
    """
    missing_keys = sorted(OmegaConf.missing_keys(config))
    if missing_keys:
        models = ", ".join(sorted(path.stem for path in CONFIG_DIR.glob("model/*.yaml")))
        hint = f" Choose a model with model=NAME; there are: {models}" if "model.name_or_path" in missing_keys else ""
        raise UserError(f"Got missing keys in config: {', '.join(missing_keys)}.{hint}")
    config.exp_name = str(config.exp_name)  # it may look like a number
    _check_keys_and_types(config)
    _check_ranges(config)
    _check_names(config)
    _check_lengths_and_batches(config)
    _check_workers(config)
    _check_reference(config)
    _check_files(config)


def _check_keys_and_types(config: DictConfig):
    if config.loss.get("name") not in LOSSES:
        name = str(config.loss.get("name"))
        raise UserError(f"loss.name={name}: no such loss.{closest_match(name, LOSSES)} There are: {', '.join(LOSSES)}")
    defaults = default_config()
    options = {f"loss.{name}" for name in ("name", "average_log_prob", *LOSSES[config.loss.name].options)}
    known = [key for key in defaults if not key.startswith("loss.") or key in options] + sorted(options - set(defaults))
    given = flatten(config)
    for key, value in given.items():
        if key.startswith(("optimizer_args.", "lora.")):
            continue
        if key not in known and key in defaults:
            raise UserError(f"{key}={value}: loss={config.loss.name} has no such option; choose another loss=...")
        if key not in known:
            raise UserError(f"no config key {key!r}.{closest_match(key, known)} config/config.yaml lists all keys")
        _check_type(key, value, defaults.get(key))
    for key in known:
        if key not in given and not any(name.startswith(f"{key}.") for name in given):
            raise UserError(f"the config lacks the key {key!r}; start a model's YAML with 'defaults: [blank_model]'")


def _check_type(key: str, value: object, default: object):
    if value is None and (default is None or key in _MAY_BE_NULL):
        return
    expected = _TYPES_OF_NULL.get(key, str) if default is None else type(default)
    if (key == "datasets" and isinstance(value, str)) or (key == "shared_prompt" and value in (True, False, "auto")):
        return
    if key == "lora" and isinstance(value, dict):
        return
    if key == "lora":
        raise UserError(
            f"lora={value}: expected fields of LoraConfig, e.g. lora.r=16 or 'lora={{r:16}}' (quoted for the shell)"
        )
    if key == "shared_prompt":
        raise UserError(f"shared_prompt={value}: must be auto, true or false")
    accepted = (int, float) if expected is float else (expected,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise UserError(f"{key}={value}: expected {names.get(expected, f'a {expected.__name__}')}")


def _check_ranges(config: DictConfig):
    for keys, lowest, wording in ((_POSITIVE, 1e-300, "above 0"), (_NON_NEGATIVE, 0, "0 or more")):
        for key in keys:
            value = OmegaConf.select(config, key)
            highest = float("inf") if key == "max_grad_norm" else 1e300  # inf: no clipping
            if value is not None and not lowest <= value <= highest:
                raise UserError(f"{key}={value}: must be a number {wording}")
    if config.seed >= 2**32:
        raise UserError(f"seed={config.seed}: must be below 2**32")
    if config.loss.get("label_smoothing", 0) >= 0.5:
        raise UserError(f"loss.label_smoothing={config.loss.label_smoothing}: must be below 0.5")


def _check_names(config: DictConfig):
    if isinstance(config.datasets, str):
        config.datasets = ListConfig([config.datasets])
    if not all(isinstance(name, str) for name in config.datasets):
        raise UserError(f"datasets={list(config.datasets)}: expected names, e.g. datasets=[hh]")
    if not config.datasets:
        raise UserError("datasets=[]: name at least one dataset, e.g. datasets=[hh]")
    if config.trainer not in TRAINERS:
        raise UserError(
            f"trainer={config.trainer}: no such trainer.{closest_match(config.trainer, TRAINERS)} "
            f"There are: {', '.join(TRAINERS)}"
        )
    base = torch.optim.Optimizer
    classes = {name: value for name, value in vars(torch.optim).items() if isinstance(value, type)}
    optimizers = [name for name, value in classes.items() if issubclass(value, base) and value is not base]
    for name in ("LBFGS", "SparseAdam"):  # the one needs the loss several times a step, the other sparse gradients
        optimizers.remove(name)
    if config.optimizer not in optimizers:
        raise UserError(
            f"optimizer={config.optimizer}: not an optimizer of torch.optim that trains with one gradient a step."
            f"{closest_match(config.optimizer, optimizers)} There are: {', '.join(optimizers)}"
        )
    for key in ("policy_dtype", "reference_dtype"):
        if config.model[key] not in DTYPES:
            raise UserError(f"model.{key}={config.model[key]}: must be one of {', '.join(DTYPES)}")
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
            print(f"WARNING: {key} must be divisible by batch_size")
            print(f"Setting {key} to", rounded)
            config[key] = rounded


def _check_workers(config: DictConfig):
    trainer, n = config.trainer, workers.n_workers(config)
    if trainer == "BasicTrainer" and (n > 1 or (config.world_size or 1) > 1):
        raise UserError(
            f"trainer=BasicTrainer trains in one process, not in {max(n, config.world_size or 1)}; choose "
            "trainer=FSDPTrainer or trainer=TensorParallelTrainer"
        )
    for key in ("world_size", "fsdp_port"):
        if config[key] is not None and (trainer == "BasicTrainer" or workers.is_launched()):
            who = "trainer=BasicTrainer starts no workers" if trainer == "BasicTrainer" else "the launcher decides that"
            raise UserError(f"{key}={config[key]}: {who}; leave it null")
    for key, default in (("fsdp_replicate", 1), ("fsdp_cpu_offload", False)):
        if config[key] != default and trainer != "FSDPTrainer":
            raise UserError(f"{key}={config[key]}: only trainer=FSDPTrainer has that; leave it {default}")
    if n % config.fsdp_replicate != 0:
        raise UserError(f"fsdp_replicate={config.fsdp_replicate} doesn't divide the {n} workers into equal groups")
    if torch.cuda.is_available() and not workers.is_launched() and n > torch.cuda.device_count():
        raise UserError(f"world_size={n}: this machine has {torch.cuda.device_count()} GPUs, one for each worker")
    if config.model.load_in_4bit and trainer != "BasicTrainer":
        raise UserError(f"model.load_in_4bit=true: trainer={trainer} can't split 4-bit weights; use BasicTrainer")
    if config.optimizer in _WHOLE_TENSORS_ONLY and trainer != "BasicTrainer":
        raise UserError(
            f"optimizer={config.optimizer}: PyTorch's can't train tensors that are spread over workers, as "
            f"trainer={trainer} does; use BasicTrainer or another optimizer"
        )
    n_parts = n * config.gradient_accumulation_steps
    if trainer == "FSDPTrainer" and config.batch_size % n_parts != 0:
        raise UserError(
            f"batch_size={config.batch_size} doesn't divide by gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps} × {n} workers into microbatches of equal size"
        )


def _check_reference(config: DictConfig):
    if config.reference not in ("auto", "model", "adapter_off", "adapter_copy"):
        raise UserError(f"reference={config.reference}: must be auto, model, adapter_off or adapter_copy")
    if config.lora is not None and config.model.adapter is not None:
        raise UserError(
            "lora is for a new adapter, model.adapter for a saved one, which has its own settings: give one"
        )
    if needs_reference(config.loss):
        choose_reference(config)
    elif config.reference != "auto" or config.precompute_ref_log_probs:
        why = "reference_free" if LOSSES[config.loss.name].needs_pairs else f"loss={config.loss.name}"
        raise UserError(f"{why} uses no reference: leave reference and precompute_ref_log_probs at their defaults")
    if config.model.load_in_4bit:
        if not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("model.load_in_4bit=true needs a GPU and bitsandbytes (pip install bitsandbytes)")
        if config.lora is None and config.model.adapter is None:
            raise UserError("model.load_in_4bit=true: 4-bit weights can't be trained; add lora={} or model.adapter")
        if config.model.archive is not None or config.model.from_scratch:
            raise UserError(
                "model.load_in_4bit=true reads its weights from model.name_or_path: no archive, not from_scratch"
            )


def _check_files(config: DictConfig):
    if config.wandb.enabled and not config.debug and importlib.util.find_spec("wandb") is None:
        raise UserError("wandb is not installed: pip install wandb, or pass wandb.enabled=false")
    archive = config.model.archive
    if archive is not None and not os.path.exists(archive) and not _may_be_hub_id(archive):
        parent = os.path.dirname(archive) or "."
        siblings = [os.path.join(parent, name) for name in os.listdir(parent)] if os.path.isdir(parent) else []
        raise UserError(f"model.archive={archive}: no such file.{closest_match(archive, siblings)}")
    adapter = config.model.adapter
    if adapter is not None and not os.path.exists(os.path.join(adapter, "adapter_config.json")):
        raise UserError(f"model.adapter={adapter}: no adapter_config.json there; give the directory of a saved adapter")
    if (adapter is not None or config.lora is not None) and importlib.util.find_spec("peft") is None:
        raise UserError("lora and model.adapter need PEFT: pip install peft")
    if config.resume is None and os.path.exists(os.path.join(config.local_run_dir, "config.yaml")):
        raise UserError(
            f"local_run_dir={config.local_run_dir} holds another run; choose another directory, or go on with that run "
            "by resume=auto"
        )


def _may_be_hub_id(name: str) -> bool:
    """Whether it has the form of owner/model and not that of a file in a directory that is here."""
    owner, _, model = name.partition("/")
    is_file = os.path.exists(owner) or model.endswith((".pt", ".safetensors", ".bin"))
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not is_file
