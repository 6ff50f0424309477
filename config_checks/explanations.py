"""Error messages for unknown keys, names and options, with the closest match."""

import re
import sys

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from config_checks.overrides import explain_commas, explain_override
from config_checks.schema import default_config, names_in, own_keys
from losses import LOSSES
from utils import closest_match

_OUR_KEYS = {  # by other libraries' names
    "learning_rate": "lr", "rank": "lora.r", "lora_rank": "lora.r", "lora_r": "lora.r",
    "per_device_eval_batch_size": "eval_batch_size", "num_train_epochs": "n_epochs", "epochs": "n_epochs",
    "output_dir": "local_run_dir", "gradient_clipping": "max_grad_norm", "grad_clip": "max_grad_norm",
    "model_name_or_path": "model.name_or_path", "model_name": "model.name_or_path", "dataset_name": "datasets",
    "torch_dtype": "model.policy_dtype", "load_in_4bit": "model.load_in_4bit", "num_warmup_steps": "warmup_steps",
    "enable_async_checkpointing": "checkpoint_async", "state_dict_type": "checkpoint_format",
    "eval_steps": "eval_every", "save_steps": "save_every", "save_total_limit": "keep_checkpoints",
    "resume_from_checkpoint": "resume", "optim": "optimizer", "optim_args": "optimizer_args",
    "gradient_checkpointing": "activation_checkpointing", "run_name": "exp_name", "loss_type": "loss",
    "tau": "loss.beta", "logging_steps": "minimum_log_interval_secs", "num_processes": "world_size",
    "tp_size": "tensor_parallel", "tp_degree": "tensor_parallel",
    "lr_scheduler_type": "lr_scheduler", "lr_scheduler_kwargs": "lr_scheduler_args",
    "f_divergence_type": "loss.f_divergence", "use_weighting": "loss.wpo", "ld_alpha": "loss.ld_alpha",
    "discopop_tau": "loss.tau", "simpo_gamma": "loss.gamma", "label_smoothing": "loss.label_smoothing",
}  # fmt: skip
KEY_HINTS = {theirs: f"{theirs} is called {ours} here" for theirs, ours in _OUR_KEYS.items()} | {
    "loss_weights": "the weights of a sum of losses are loss=mix loss.parts={dpo: 0.8, sft: 0.2}",
    "rpo_alpha": "it is loss.nll_weight of loss=dpo_nll",
    "f_alpha_divergence_coef": "f_alpha_divergence_coef is 1 - loss.f_alpha here",
    "per_device_train_batch_size": "batch_size counts the examples of all devices and microbatches together",
    "bf16": "bf16=true is model.policy_mp=bfloat16 here, or model.policy_dtype=bfloat16 for the weights, too",
    "fp16": "float16 would need loss scaling, which no trainer here does: use model.policy_mp=bfloat16",
    "max_steps": "set n_examples to the number of steps times batch_size, or set n_epochs",
    "warmup_ratio": "warmup_steps between 0 and 1 is a fraction of the steps, e.g. warmup_steps=0.1",
    "weight_decay": "an optimizer's arguments are in optimizer_args, e.g. optimizer_args.weight_decay=0.1",
    "max_completion_length": "a response may have as many tokens as max_length leaves after the prompt",
    "use_peft": "lora={} trains an adapter",
    "report_to": "set wandb.enabled and tensorboard.enabled to true or false",
    "deepspeed": "trainer=FSDPTrainer divides weights, gradients and optimizer among GPUs",
}
_WITHOUT_TRAINING = ("judge", "export")  # configs without the keys of training
_NOT_IMPLEMENTED = "it isn't implemented; a loss is a function in losses.py and a file in config/loss"
_OUR_LOSSES = {  # by other libraries' and papers' names
    "sigmoid": "dpo", "sigmoid_norm": "dpo_norm", "robust": "robust_dpo", "exo_pair": "exo", "nca_pair": "nca",
    "bco_pair": "bco", "sppo_hard": "sppo", "slic": "hinge", "rdpo": "length_dpo", "r_dpo": "length_dpo",
    "rpo": "dpo_nll", "apo_zero_unpaired": "apo_zero", "chipo": "chi_po", "lrml": "discopop", "nll": "sft",
}  # fmt: skip
_LOSS_HINTS = dict.fromkeys(("ppo", "grpo", "rloo", "online_dpo", "tdpo"), _NOT_IMPLEMENTED) | {
    "cdpo": "it is loss=dpo with loss.label_smoothing above 0",
    "ld_dpo": "it is loss=dpo with loss.ld_alpha below 1",
    "f_dpo": "it is loss=dpo with loss.f_divergence",
    "mpo": "it is loss=mix, e.g. loss.parts={dpo: 0.8, bco: 0.2, sft: 1.0}",
    "tr_dpo": "it is any loss with reference_update_every=N",
    **{theirs: f"{theirs} is {ours} here" for theirs, ours in _OUR_LOSSES.items()},
}


def other_loss(name: str) -> str:
    """Return ': ' and how to choose another library's loss here; an empty string if it is unknown."""
    known = _LOSS_HINTS.get(name.lower().replace("-", "_"))
    return f": {known}." if known else ""


def explain_hydra_error(error: Exception, config_name: str = "config", words: list[str] | None = None) -> str:
    """Explain why Hydra can't compose a config, with the closest match to a name that wasn't found.

    Args:
        config_name: the config's file.
        words: the overrides; by default the command line's.
    """
    words = sys.argv[1:] if words is None else words
    lines = f"{error}\n{error.__cause__ or ''}".strip().splitlines()
    text = "\n".join(line for line in lines if not line.strip().startswith(("object_type=", "reference_type=")))
    if (raised := "UserError raised while resolving interpolation: ") in text:
        return text.partition(raised)[2].partition("\n    full_key")[0]
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        return _explain_missing_file(error)
    if isinstance(error, OverrideParseException):
        return explain_override(str(error.override), words)
    if ambiguous := re.match(r"Ambiguous value for argument '(.*)'$", text, re.MULTILINE):
        return explain_commas(ambiguous[1])
    if (key := re.search(r"Could not override '([^']+)'", text)) and not key[1].startswith("hydra"):
        inner = re.search(r"full_key: (\S+)", text)  # the unknown key if a whole section was given
        return _explain_refused_key(inner[1] if inner and inner[1].startswith(key[1]) else key[1], config_name)
    # after + or ~, Hydra evaluates the default, which refers to Hydra's own config
    if key := re.search(r"HydraConfig was not set\n.*full_key: (\S+)", text):
        return f"set {key[1]} by {key[1]}=VALUE, without + or ~"
    # values that Hydra doesn't parse as a string
    not_a_name = r"[+~]*(loss|model)=(null|true|false|nan|inf|[-+.\d].*|[\[{$].*)?"
    groups = [word for word in words if re.fullmatch(not_a_name, word, re.IGNORECASE)]
    if groups and (isinstance(error, ValueError | TypeError) or "possible interpolation keys" in text):
        choices = "; ".join(f"{group}=NAME with {', '.join(names_in(group))}" for group in ("loss", "model"))
        return f"{' '.join(groups)}: expected the name of a file: {choices}"
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return f"Hydra can't do that: {type(error).__name__}: {error}"
    return text


def _explain_missing_file(error: MissingConfigException) -> str:
    """Explain a GROUP=NAME without a file, such as loss=NAME."""
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    options = ", ".join(error.options)
    if group == "loss" and name in LOSSES:
        file = f"loss/{name}.yaml"
        missing = f"LOSSES has this loss, but no config folder has {file}"
        return f"loss={name}: {missing}; write that file, with the loss's name and options"
    if group == "loss" and (other := other_loss(name)):
        return f"no loss={name}{other} There are: {options}"
    others = "; or give a folder, or an id on the hub, OWNER/NAME" if group == "model" else ""
    return f"no {group}={name}.{closest_match(name, error.options)} There are: {options}{others}"


def _explain_refused_key(key: str, config_name: str) -> str:
    """Explain why a key can't be set: it is unknown, or its section was removed or replaced by other overrides."""
    if config_name in _WITHOUT_TRAINING or key not in default_config():
        return unknown_key(key, config_name)
    section, _, name = key.partition(".")
    if not name:
        return f"{key} can't be set, because ~{key} removes it; leave ~{key} out"
    if section == "loss":
        return f"{key}: the chosen loss has no such option; losses are chosen by loss=NAME, e.g. loss=dpo"
    return f"{key} can't be set: {section} must be a section of keys, but was given a value"


def explain_flags(words: list[str]) -> str:
    """Return the message about command-line flags that Hydra refuses, with a hint at our keys."""
    names = [word.lstrip("-").partition("=")[0].replace("-", "_") for word in words if word.startswith("-")]
    hints = [f"{KEY_HINTS[name]}. " for name in names if name in KEY_HINTS]
    return (
        f"{''.join(hints)}Settings are given without dashes, as key=value, e.g. lr=1e-6; options such as -m or --cfg "
        "job go before or after all of them"
    )


def unknown_key(key: str, config_name: str = "config") -> str:
    """Return the message about a key that no config has, or that is a section of keys."""
    if config_name in _WITHOUT_TRAINING:
        hint = closest_match(key, own_keys(config_name))
        return f"no config key {key!r}.{hint} config/{config_name}.yaml lists all keys"
    if inside := [name for name in default_config() if name.startswith(f"{key}.")]:
        return f"{key} is a section of the config: set its keys, {', '.join(inside)}"
    if (whole := key.partition(".")[0]) in default_config():
        return f"no config key {key!r}: {whole} has a value, not keys of its own"
    hint = KEY_HINTS.get(key.rsplit(".", 1)[-1].removeprefix("--"))
    hint = f" {hint}." if hint else closest_match(key, default_config())
    return f"no config key {key!r}.{hint} config/config.yaml lists all keys"
