"""Checks of adapters and of the key `lora`: PEFT silently accepts settings that do nothing."""

import dataclasses
import importlib.util
import math
import typing

from omegaconf import DictConfig, OmegaConf
from torch import nn

from config_checks.explanations import KEY_HINTS
from config_checks.values import check_one_of, is_number
from distributed.strategies import STRATEGIES, trainers_with
from references import saved_settings, sources
from utils import UserError, closest_match

# fields of LoraConfig, and initializations, that PEFT would silently ignore, each with the reason
_WITHOUT_EFFECT = {
    **dict.fromkeys(
        ("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"), "PEFT fills it in itself"
    ),
    **dict.fromkeys(("megatron_config", "megatron_core"), "it is for Megatron's layers"),
    **dict.fromkeys(("use_qalora", "qalora_group_size"), "it is for GPTQ's weights"),
    **dict.fromkeys(
        ("eva", "corda", "lora_ga", "eva_config", "corda_config", "lora_ga_config"),
        "this initialization needs a pass over data before training, which isn't made here",
    ),
    "alora_invocation_tokens": "the adapter would be active only in generation, never in training",
}


def check_adapters(config: DictConfig):
    """Check the adapter to be trained and, if there are any, the saved ones.

    `check_lora_fits` makes the checks that need the model.

    Raises: UserError naming the key, its value and the remedy.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError("lora and adapters need PEFT: pip install peft")
    if config.lora is not None and config.model.adapter is not None:
        raise UserError(
            "lora is for a new adapter, model.adapter for a saved one, which has its own settings: give one"
        )
    settings = [saved_settings(one.key("adapter"), one.adapter) for one in sources(config) if one.adapter is not None]
    if config.lora is not None:
        _check_lora(config)
        settings.append(config.lora)
    strategy = STRATEGIES[config.trainer]
    if strategy.splits_tensors and any(one.get("trainable_token_indices") is not None for one in settings):
        raise UserError(
            f"trainer={config.trainer}: PEFT can't train trainable_token_indices of weights that are spread over "
            f"workers; choose {trainers_with('splits_tensors', False)}"
        )


def _check_lora(config: DictConfig):
    """Check names and types of LoraConfig's fields, and refuse what PEFT would silently ignore."""
    import peft

    fields = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
    kinds = typing.get_type_hints(peft.LoraConfig)
    for name, value in OmegaConf.to_container(config.lora).items():
        if name not in fields:
            hint = f" {KEY_HINTS[name]}" if name in KEY_HINTS else closest_match(name, fields)
            raise UserError(f"lora.{name}: LoraConfig has no such field.{hint}")
        if name == "lora_dropout" and value:
            raise UserError(f"lora.lora_dropout={value}: all dropout is off here; leave it out")
        key = value if name == "init_lora_weights" and isinstance(value, str) else name
        if key in _WITHOUT_EFFECT and value not in (None, fields[name].default):
            raise UserError(f"lora.{name}={value}: {_WITHOUT_EFFECT[key]}; leave it out")
        _check_lora_field(name, value, kinds[name])


def _check_lora_field(name: str, value: object, kind: object):
    """Refuse a value of another type than its field's; `check_lora_fits` checks lists of names."""
    if name == "r" and not (is_number(value, int) and value > 0):
        raise UserError(f"lora.r={value}: the rank must be an integer above 0")
    if kind in (int, float) and not (is_number(value) and math.isfinite(value)):
        raise UserError(f"lora.{name}={value}: expected a number")
    if name == "lora_alpha" and value == 0:
        raise UserError("lora.lora_alpha=0: it scales the adapter, which would have no effect")
    if kind is bool and not isinstance(value, bool):
        raise UserError(f"lora.{name}={value}: expected true or false")
    if name == "init_lora_weights" and not isinstance(value, bool | str):
        raise UserError(f"lora.{name}={value}: expected true, false or a name")
    kinds = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        check_one_of(f"lora.{name}", value, kinds)
    mappings = [other for other in kinds if other is dict or dataclasses.is_dataclass(other)]
    if mappings and set(kinds) <= {*mappings, type(None)} and not isinstance(value, dict | None):
        raise UserError(f"lora.{name}={value}: expected names with their values, e.g. 'lora={{{name}:{{name:1}}}}'")
    for section in filter(dataclasses.is_dataclass, mappings if isinstance(value, dict) else ()):
        known = [field.name for field in dataclasses.fields(section)]
        for other in value:
            if other not in known:
                hint = closest_match(str(other), known) or f" It has: {', '.join(known)}"
                raise UserError(f"lora.{name}.{other}: {section.__name__} has no such field.{hint}")


def check_lora_fits(fields: dict, model: nn.Module):
    """Raise UserError if LoraConfig names modules, parameters, layers or tokens that the model doesn't have."""
    _check_names_in_model(fields, model)
    _check_indices_in_model(fields, model)


def _check_names_in_model(fields: dict, model: nn.Module):
    """Refuse names of modules and parameters that the model doesn't have: PEFT ignores them silently."""
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    for field in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        value = fields.get(field)
        is_pattern = isinstance(value, str) and field in ("target_modules", "exclude_modules")
        if value is None or is_pattern:
            continue
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise UserError(f"lora.{field}={value}: expected a list of names, e.g. lora.{field}=[name]")
        existing = parameters if field == "target_parameters" else modules
        for name in value:
            ending = name if field == "modules_to_save" else f".{name}"  # PEFT compares names in this way
            if not any(f".{other}".endswith(ending) for other in existing):
                n_parts = 2 if field == "target_parameters" else 1
                options = dict.fromkeys(".".join(other.split(".")[-n_parts:]) for other in existing)
                options = [option for option in options if option and not option.isdecimal()]
                hint = f"{closest_match(name, options)} It has: {', '.join(options)}"
                raise UserError(f"lora={{{field}: {value}}}: the model has no {name!r}.{hint}")


def _check_indices_in_model(fields: dict, model: nn.Module):
    """Refuse indices of layers and tokens that the model doesn't have: PEFT ignores them, or fails in training."""
    tokens, n_tokens = fields.get("trainable_token_indices"), model.get_input_embeddings().num_embeddings
    lists = tokens.values() if isinstance(tokens, dict) else [tokens]
    given = [("trainable_token_indices", numbers, n_tokens) for numbers in lists]
    given.append(("layers_to_transform", fields.get("layers_to_transform"), model.config.num_hidden_layers))
    for field, value, n_existing in given:
        numbers = [value] if field == "layers_to_transform" and isinstance(value, int) else value
        are_numbers = isinstance(numbers, list) and numbers and all(type(number) is int for number in numbers)
        if value is not None and not (are_numbers and min(numbers) >= 0 and max(numbers) < n_existing):
            raise UserError(f"lora={{{field}: {fields[field]}}}: the model has the indices 0 to {n_existing - 1}")
