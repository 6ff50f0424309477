"""Checks of a config's keys and single values: known keys, types, ranges, and the options of the loss."""

import math
from collections.abc import Iterable

from omegaconf import DictConfig, OmegaConf, open_dict

from basics.saved_config import flatten
from config_checks.explanations import other_loss, unknown_key
from config_checks.schema import FREE_KEYS, default_config
from losses import LOSSES, MIX
from objectives.modifiers import UNLISTED
from objectives.options import Option, Range
from utils import UserError, closest_match

_COUNT = Option(int, range=Range(above=0, at_most=2**53))
_NON_NEGATIVE = Option(float, range=Range(at_least=0, at_most=1e300))
_NUMBERS = {
    **dict.fromkeys(
        (
            "batch_size", "eval_batch_size", "gradient_accumulation_steps", "max_tokens_per_microbatch", "max_length",
            "max_prompt_length", "n_epochs", "n_examples", "eval_every", "save_every", "keep_checkpoints",
            "stop_when_worse", "reference_update_every", "world_size", "fsdp_replicate", "tensor_parallel",
            "worker_timeout",
        ),
        _COUNT,
    ),
    "n_eval_examples": Option(int, range=Range(above=0, at_most=10**7)),  # all are kept in memory
    "n_eval_model_samples": Option(int, range=Range(at_least=0, at_most=2**53)),
    "warmup_steps": Option(int, range=Range(at_least=0, at_most=2**53)),  # or a fraction of the steps
    "seed": Option(int, range=Range(at_least=0, at_most=2**32 - 1)),
    "fsdp_port": Option(int),
    "lr": Option(float, range=Range(above=0, at_most=1e38)),  # float32's largest power of ten
    "max_grad_norm": Option(float, range=Range(above=0)),  # infinity: no clipping
    "minimum_log_interval_secs": _NON_NEGATIVE,
    "reference_update_alpha": Option(float, range=Range(above=0, at_most=1)),
    "model.router_aux_loss_coef": _NON_NEGATIVE,
}  # fmt: skip
_NULLABLE = ("n_epochs", "n_eval_examples")  # although their defaults aren't null
_EXPECTED = {  # keys whose values are of several types, or of one that needs an explanation
    "shared_prompt": "auto, true or false",
    "padding_free": "auto, true or false",
    "resume": "auto, a run directory or a checkpoint in one",
    "lora": "fields of LoraConfig, e.g. lora.r=16 or 'lora={r:16}' (quoted for the shell)",
}


def check_values(config: DictConfig):
    """Check every key and its value; add the defaults of loss options that are left out.

    Raises: UserError naming the key, its value and the remedy.
    """
    _check_loss(config)
    defaults = default_config()
    known = [key for key in defaults if not key.startswith("loss.")]
    given = {key: value for key, value in flatten(config).items() if not key.startswith("loss.")}
    for key, value in given.items():
        if key not in known and not key.startswith(tuple(f"{section}." for section in FREE_KEYS)):
            raise UserError(unknown_key(key))
        _check_value(key, value, defaults.get(key))
    for key in known:
        if key not in given and not any(name.startswith(f"{key}.") for name in given):
            hint = "; choose a model with model=NAME, and start its YAML with 'defaults: [blank_model]'"
            raise UserError(f"the config lacks the key {key!r}{hint if key.startswith('model.') else ''}")


def _check_value(key: str, value: object, default: object):
    """Refuse a value that is out of its range, or of another type than its default."""
    if value is None and (default is None or key in _NULLABLE):
        return
    if isinstance(value, str) and not value.strip():
        remedy = "null" if default is None else "something"
        raise UserError(f"{key}={value!r} is empty: give {remedy}, or leave it out")
    if key in _EXPECTED:
        accepted = {"resume": str, "lora": dict}.get(key, bool)
        if not isinstance(value, accepted) and not (accepted is bool and value == "auto"):
            raise UserError(f"{key}={value}: must be {_EXPECTED[key]}")
    elif number := _NUMBERS.get(key):
        is_fraction = key == "warmup_steps" and is_number(value) and 0 < value < 1
        if not is_fraction:
            _check_type(key, value, number.type)
        if violation := number.range and number.range.violation(value):
            raise UserError(f"{key}={value}: {violation}")
    elif key != "datasets" and not key.startswith(("lora.", "optimizer_args.", "lr_scheduler_args.")):
        _check_type(key, value, str if default is None else type(default))


def _check_type(key: str, value: object, expected: type):
    if not (is_number(value, expected) if expected in (int, float) else isinstance(value, expected)):
        names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
        raise UserError(f"{key}={value}: expected {names.get(expected, f'a {expected.__name__}')}")


def check_one_of(key: str, value: object, options: Iterable[str | None], note: str = ""):
    """Raise UserError, with the closest match, unless a value is one of the options."""
    if value not in (options := list(options)):
        names = ["null" if option is None else option for option in options]
        raise UserError(f"{key}={value}: must be one of {', '.join(names)}{note}.{closest_match(str(value), names)}")


def is_number(value: object, kind: type = float) -> bool:
    """True for an integer and, unless `kind` is int, for a float; False for booleans, which are integers in Python."""
    return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)


def check_number(key: str, value: object, kind: type, lowest: float, highest: float):
    """Raise UserError unless a value is a number of this kind, int or float, in the range."""
    if not is_number(value, kind):
        raise UserError(f"{key}={value}: expected {'an integer' if kind is int else 'a number'}")
    if not lowest <= value <= highest:
        raise UserError(f"{key}={value}: must be {lowest:g} to {highest:g}")


# ---- losses ---------------------------------------------------------------------------------------------------------


def _check_loss(config: DictConfig):
    """Check the loss, or the parts of a sum of losses, and the options of each."""
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
            f"loss.{unknown[0]}: loss=mix has no such option. A part's options are loss.PART.OPTION; the parts are: "
            f"{', '.join(parts)}"
        )


def _check_loss_name(key: str, name: object):
    if name is None:
        raise UserError(
            f"{key}=None: give loss=NAME; the file config/loss/NAME.yaml must name an entry of LOSSES, e.g. "
            f"'name: dpo'. There are: {', '.join([*LOSSES, MIX])}"
        )
    if name not in LOSSES:
        other = other_loss(str(name)) or f".{closest_match(str(name), LOSSES)}"
        raise UserError(
            f"{key}={name}: no such loss{other} There are: {', '.join([*LOSSES, MIX])}. A loss of your own must be "
            "added to LOSSES; if a script of yours adds it, run that script instead (docs/objectives.md)"
        )


def _check_options(section: str, name: str, given: DictConfig):
    """Check a loss's options by its signature, and add the defaults of those left out, except `UNLISTED` ones."""
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
