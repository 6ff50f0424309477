"""Checks of a config's keys and single values: known keys, types, ranges, and the options of the loss."""

import math
from collections.abc import Iterable

from omegaconf import DictConfig, OmegaConf, open_dict

from basics.saved_config import flatten
from config_checks.explanations import other_loss, unknown_key
from config_checks.schema import FREE_KEYS, default_config
from losses import LOSSES, MIX
from objectives.modifiers import UNLISTED
from utils import UserError, closest_match

_POSITIVE = (
    "batch_size", "eval_batch_size", "gradient_accumulation_steps", "lr", "max_grad_norm", "max_length",
    "max_prompt_length", "n_epochs", "n_examples", "n_eval_examples", "eval_every", "save_every", "keep_checkpoints",
    "world_size", "fsdp_replicate", "tensor_parallel", "worker_timeout", "reference_update_every",
    "reference_update_alpha", "stop_when_worse", "max_tokens_per_microbatch",
)  # fmt: skip
_NON_NEGATIVE = (
    "seed", "warmup_steps", "n_eval_model_samples", "minimum_log_interval_secs", "model.router_aux_loss_coef",
)  # fmt: skip
_HIGHEST = {
    "max_grad_norm": math.inf,  # no clipping
    "lr": 1e38,  # of float32
    "n_eval_examples": 10**7,  # all are kept in memory
}
_MAY_BE_NULL = ("n_epochs", "n_examples", "n_eval_examples")
# types of keys whose default is null; those that aren't listed are strings
_TYPES_OF_NULL = dict.fromkeys(
    (
        "n_examples", "fsdp_port", "world_size", "save_every", "keep_checkpoints", "reference_update_every",
        "stop_when_worse", "max_tokens_per_microbatch",
    ),
    int,
) | {"model.router_aux_loss_coef": float}  # fmt: skip


def check_values(config: DictConfig):
    """Check every key and its value; add the defaults of loss options that are left out.

    Raises: UserError naming the key, its value and the remedy.
    """
    _check_loss(config)
    _check_keys_and_types(config)
    _check_ranges(config)


def _check_loss(config: DictConfig):
    """Check the loss, or the parts of a sum of losses, and their options."""
    name = OmegaConf.select(config, "loss.name")
    if name != MIX:
        _check_loss_name("loss.name", name)
        _check_options("loss", name, config.loss)
        return
    parts, example = config.loss.get("parts"), "e.g. loss.parts={dpo: 0.8, sft: 0.2}"
    if not isinstance(parts, DictConfig) or not parts:
        raise UserError(f"loss.parts={parts}: loss=mix needs the weight of each of its losses, {example}")
    for part, weight in parts.items():
        _check_loss_name("loss.parts", part)
        _check_type(f"loss.parts.{part}", weight, float)
        if not 0 < weight < math.inf:
            raise UserError(f"loss.parts.{part}={weight}: must be a number above 0")
        with open_dict(config.loss):
            config.loss.setdefault(part, {})
        _check_options(f"loss.{part}", part, config.loss[part])
    if unknown := [key for key in config.loss if key not in ("name", "parts", *parts)]:
        raise UserError(
            f"loss.{unknown[0]}: loss=mix has no such option; those of a part are loss.PART.OPTION, and the parts are: "
            f"{', '.join(parts)}"
        )


def _check_loss_name(key: str, name: object):
    if name is None:
        raise UserError(
            f"{key}=None: give loss=NAME; NAME's YAML file needs its name in LOSSES, e.g. 'name: dpo'. There are: "
            f"{', '.join([*LOSSES, MIX])}"
        )
    if name not in LOSSES:
        other = other_loss(str(name)) or f".{closest_match(str(name), LOSSES)}"
        raise UserError(
            f"{key}={name}: no such loss{other} There are: {', '.join([*LOSSES, MIX])}; a new one needs an entry in "
            "LOSSES, which it has only in the script that adds it, if that is elsewhere (docs/objectives.md)"
        )


def _check_options(section: str, name: str, given: DictConfig):
    """Check a loss's options by its signature; those that the config leaves out get their defaults."""
    if not isinstance(given, DictConfig):
        raise UserError(f"{section}={given}: expected the options of {name}, e.g. {section}.beta=0.1")
    options = LOSSES[name].options
    for key in given:
        if key not in options and not (key == "name" and section == "loss"):
            hint = closest_match(key, options) or f" It has: {', '.join(options)}"
            raise UserError(f"{section}.{key}: loss={name} has no such option.{hint}")
    for key, option in options.items():
        if key not in given:
            if key in UNLISTED:
                continue
            if option.is_required:
                raise UserError(
                    f"{section}.{key}: loss={name} has no default for it; give it in config/loss/{name}.yaml"
                )
            with open_dict(given):
                given[key] = option.default
        value = given[key]
        _check_type(f"{section}.{key}", value, option.type)
        violation = option.range.violation(value) if option.range else None
        if violation or (option.type in (int, float) and not math.isfinite(value)):
            raise UserError(f"{section}.{key}={value}: {violation or 'must be a finite number'}")
    if problem := LOSSES[name].why_output_is_wrong(given):
        raise UserError(f"loss={name}: {problem}")


def _check_keys_and_types(config: DictConfig):
    defaults = default_config()
    known = [key for key in defaults if not key.startswith("loss.")]
    given = flatten(config)
    for key, value in given.items():
        if key.startswith("loss."):
            continue
        if key not in known and not key.startswith(tuple(f"{holder}." for holder in FREE_KEYS)):
            raise UserError(unknown_key(key))
        _check_key_type(key, value, defaults.get(key))
    for key in known:
        if key not in given and not any(name.startswith(f"{key}.") for name in given):
            hint = "; choose a model with model=NAME, and start its YAML with 'defaults: [blank_model]'"
            raise UserError(f"the config lacks the key {key!r}{hint if key.startswith('model.') else ''}")


def _check_key_type(key: str, value: object, default: object):
    """Refuse a value of another type than its default's, with the exceptions listed here."""
    if value is None and (default is None or key in _MAY_BE_NULL):
        return
    if isinstance(value, str) and not value.strip():
        remedy = "null" if default is None else "something"
        raise UserError(f"{key}={value!r} is empty: give {remedy}, or leave it out")
    if key == "datasets" and isinstance(value, str):
        return
    if key == "warmup_steps" and isinstance(value, float) and 0 < value < 1:  # a fraction of the steps
        return
    if key in ("shared_prompt", "padding_free"):
        if not isinstance(value, bool) and value != "auto":
            raise UserError(f"{key}={value}: must be auto, true or false")
    elif key == "resume":
        if not isinstance(value, str):
            raise UserError(f"resume={value}: must be auto, a run directory or a checkpoint in one")
    elif key == "lora":
        if not isinstance(value, dict):
            raise UserError(
                f"lora={value}: expected fields of LoraConfig, e.g. lora.r=16 or 'lora={{r:16}}' (quoted for the shell)"
            )
    elif not key.startswith(("lora.", "optimizer_args.", "lr_scheduler_args.")):
        _check_type(key, value, _TYPES_OF_NULL.get(key, str) if default is None else type(default))


def _check_type(key: str, value: object, expected: type):
    accepted = (int, float) if expected is float else (expected,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
        names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
        raise UserError(f"{key}={value}: expected {names.get(expected, f'a {expected.__name__}')}")


def check_one_of(key: str, value: object, options: Iterable[str | None], note: str = ""):
    """Raise UserError, with the closest match, unless a value is one of the options."""
    if value not in (options := list(options)):
        names = ["null" if option is None else option for option in options]
        raise UserError(f"{key}={value}: must be one of {', '.join(names)}{note}.{closest_match(str(value), names)}")


def _check_ranges(config: DictConfig):
    for keys, lowest, wording in ((_POSITIVE, 1e-300, "above 0"), (_NON_NEGATIVE, 0, "0 or more")):
        for key in keys:
            value = OmegaConf.select(config, key)
            highest = _HIGHEST.get(key, 2**53 if isinstance(value, int) else 1e300)
            if value is not None and not lowest <= value <= highest:
                bound = f" and at most {highest:g}" if highest < value < math.inf else ""
                raise UserError(f"{key}={value}: must be a number {wording}{bound}")
    if config.seed >= 2**32:
        raise UserError(f"seed={config.seed}: must be below 2**32")
