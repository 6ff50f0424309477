"""Where a config's policy and reference come from."""

import json
import os
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from losses import needs_reference
from utils import UserError

REFERENCES = ("model", "adapter_off", "adapter_copy")


@dataclass(frozen=True)
class Source:
    """What a model's weights come from: those of `name_or_path` (or random ones, `from_scratch`), replaced by those of
    `archive`, with `adapter` on them."""

    name_or_path: str
    archive: str | None = None
    adapter: str | None = None
    from_scratch: bool = False
    given: frozenset[str] = frozenset()  # which of these the section `reference_model` of the config gives

    def key(self, name: str) -> str:
        """The config's key for one of these."""
        return f"{'reference_model' if name in self.given else 'model'}.{name}"


def policy_source(config: DictConfig) -> Source:
    """What the policy starts from."""
    return Source(config.model.name_or_path, config.model.archive, config.model.adapter, config.model.from_scratch)


def reference_source(config: DictConfig) -> Source:
    """What a second model as reference is loaded from: what `reference_model` gives, upon what the policy has below it;
    what the policy has above it is left out, as it belongs to another model. Without any of it, the policy's."""
    policy, names = policy_source(config), ("name_or_path", "archive", "adapter")
    values = {name: OmegaConf.select(config, f"reference_model.{name}") for name in names}
    given = frozenset(name for name in names if values[name] is not None)
    if not given:
        return policy
    for name in names:
        if name in given:
            break
        values[name] = getattr(policy, name)
    return Source(**values, from_scratch=policy.from_scratch and "name_or_path" not in given, given=given)


def sources(config: DictConfig) -> list[Source]:
    return list(dict.fromkeys((policy_source(config), reference_source(config))))


def resolved_reference(config: DictConfig) -> str:
    """The kind of reference that `reference=auto` means, or the one that was asked for; auto if the loss needs none.

    Raises: UserError if policy and reference can't go together, naming those that can.
    """
    if not needs_reference(config.loss):
        return "auto"
    if own := sorted(reference_source(config).given):
        if config.reference not in ("auto", "model"):
            raise UserError(
                f"reference={config.reference}: reference_model.{own[0]} makes it a model of its own; leave it auto"
            )
        return "model"
    has_adapter, settings = config.model.adapter is not None, _adapter_settings(config)
    # trained biases and some initializations change the base itself, which is then no reference
    base_is_kept = settings.get("bias", "none") == "none" and settings.get("init_lora_weights", True) in (
        True,
        "gaussian",
    )
    possible = ["model"]
    if base_is_kept and (config.lora is not None or has_adapter):
        possible.insert(0, "adapter_off")
    if base_is_kept and has_adapter:
        possible.insert(0, "adapter_copy")
    if config.reference == "auto":
        return possible[0]
    if config.reference not in possible:
        policy = "a saved adapter" if has_adapter else "a new adapter" if config.lora is not None else "no adapter"
        raise UserError(f"reference={config.reference}: the policy has {policy}; possible are: {', '.join(possible)}")
    return config.reference


def _adapter_settings(config: DictConfig) -> dict:
    """Fields of LoraConfig of the new or the saved adapter; none without an adapter."""
    adapter = config.model.adapter
    if adapter is not None and os.path.exists(os.path.join(adapter, "adapter_config.json")):
        return saved_settings("model.adapter", adapter)
    return OmegaConf.to_container(config.lora) if config.lora is not None else {}


def saved_settings(key: str, adapter: str) -> dict:
    """What adapter_config.json says of a saved adapter."""
    path = os.path.join(adapter, "adapter_config.json")
    if not os.path.exists(path):
        raise UserError(f"{key}={adapter}: no adapter_config.json there; give the directory of a saved adapter")
    try:
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}={adapter}: can't read its adapter_config.json: {error}") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise UserError(f"{key}={adapter}: its adapter_config.json is not a LoRA adapter's (peft_type: LORA)")
    return settings
