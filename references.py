"""The reference: which model the policy is compared with, and where its weights come from.

`reference=model` is a second, frozen model; `adapter_off` is the policy with its adapter disabled; `adapter_copy` is
the policy with a frozen copy of the starting adapter in place of the trained one. With `precompute_ref_log_probs`, the
reference's log-probabilities of all pairs are computed once, before training (`acceleration.reference_cache`).
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from losses import needs_reference
from utils import UserError

REFERENCE_ADAPTER = "reference"  # the name of the frozen adapter beside the trained one, "default"
REFERENCES = ("model", "adapter_off", "adapter_copy")


@dataclass(frozen=True)
class Source:
    """The origin of a model's weights: `name_or_path` (or random weights, `from_scratch`), overwritten by `archive`,
    with `adapter` on top."""

    name_or_path: str
    archive: str | None = None
    adapter: str | None = None
    from_scratch: bool = False
    given: frozenset[str] = frozenset()  # the fields that the config's `reference_model` section sets

    def key(self, name: str) -> str:
        """Return the config key that sets a field."""
        return f"{'reference_model' if name in self.given else 'model'}.{name}"


def policy_source(config: DictConfig) -> Source:
    """Return the weights that the policy starts from."""
    return Source(config.model.name_or_path, config.model.archive, config.model.adapter, config.model.from_scratch)


def reference_source(config: DictConfig) -> Source:
    """Return the source of a second model that serves as the reference: by default, the policy's.

    Weights are loaded in the order name_or_path, archive, adapter. Before the first key that `reference_model` sets,
    the policy's values apply. After it, only those of `reference_model` do, because the policy's archive and adapter
    belong to another model.
    """
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
    """Return the sources of policy and reference; only one if they are equal."""
    return list(dict.fromkeys((policy_source(config), reference_source(config))))


def resolved_reference(config: DictConfig) -> str:
    """Return the config's `reference`, with auto replaced by a kind; 'auto' if the loss needs no reference.

    Raises: UserError that names the possible kinds, if the policy can't have the given one.
    """
    if not needs_reference(config.loss):
        return "auto"
    if own := sorted(reference_source(config).given):
        if config.reference not in ("auto", "model"):
            raise UserError(
                f"reference={config.reference}: reference_model.{own[0]} names a second model; leave reference=auto"
            )
        return "model"
    has_adapter, possible = config.model.adapter is not None, ["model"]
    if has_adapter or config.lora is not None:
        settings = _adapter_settings(config)
        # trained biases and some initializations change the base, so that it can't serve as the reference
        if settings.get("bias", "none") == "none" and settings.get("init_lora_weights", True) in (True, "gaussian"):
            possible = ["adapter_copy", "adapter_off", "model"] if has_adapter else ["adapter_off", "model"]
    if config.reference == "auto":
        return possible[0]
    if config.reference not in possible:
        policy = "a saved adapter" if has_adapter else "a new adapter" if config.lora is not None else "no adapter"
        raise UserError(f"reference={config.reference}: the policy has {policy}; possible: {', '.join(possible)}")
    return config.reference


def _adapter_settings(config: DictConfig) -> dict:
    """Return the LoraConfig fields of the policy's adapter, new or saved."""
    adapter = config.model.adapter
    if adapter is not None and os.path.exists(os.path.join(adapter, "adapter_config.json")):
        return saved_settings("model.adapter", adapter)
    return OmegaConf.to_container(config.lora) if config.lora is not None else {}


def saved_settings(key: str, adapter: str) -> dict:
    """Read the adapter_config.json of a saved adapter; `key` is the config key that names its directory."""
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


# ---- the reference model -------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """A frozen model to compare the policy with: `with reference.active() as model` gives it for forward passes."""

    model: nn.Module
    switch: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # turns policy into reference

    @contextlib.contextmanager
    def active(self) -> Iterator[nn.Module]:
        """Give the reference, without gradients; afterwards, also after an error, restore the policy."""
        with torch.no_grad(), self.switch():
            yield self.model


def move_reference(reference: Reference, policy: nn.Module, alpha: float):
    """Move the weights of a second model towards the policy's (TR-DPO, https://arxiv.org/abs/2404.09656).

    They become `alpha` times the policy's plus 1 - `alpha` times the reference's, in the reference's dtype.
    """
    with torch.no_grad():
        for moved, towards in zip(reference.model.parameters(), policy.parameters(), strict=True):
            moved.lerp_(towards.to(moved.device, moved.dtype), alpha)


def check_reference_can_move(reference_model: nn.Module, policy: nn.Module, config: DictConfig):
    """Refuse a reference that can't follow the policy, because its weights have other names or shapes.

    Raises: UserError naming the key and the first weight that differs.
    """
    shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in (reference_model, policy)]
    differing = sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
    if differing:
        name = differing[0]
        found, own = (of_model.get(name, "absent") for of_model in shapes)
        raise UserError(
            f"reference_update_every={config.reference_update_every}: the reference has another architecture than the "
            f"policy ({name}: {found}, the policy's is {own}), so it can't follow the policy; leave the key null"
        )


def make_reference(kind: str, policy: nn.Module, load: Callable[[], nn.Module]) -> Reference:
    """Make a reference of this kind; `load` loads the second model if one is needed."""
    if kind == "model":
        model = load()
        return Reference(model if model is policy else model.eval().requires_grad_(False))
    if kind == "adapter_off":
        return Reference(policy, policy.disable_adapter)
    return Reference(policy, lambda: _adapter_switched(policy, REFERENCE_ADAPTER))


def reference_has_policy_precision(config: DictConfig) -> bool:
    """True if the reference is computed in the policy's precision: `model.reference_dtype` isn't set."""
    return config.model.reference_dtype is None


def reference_dtype(config: DictConfig) -> str:
    """Return the dtype of a second model's weights."""
    return config.model.reference_dtype or config.model.policy_dtype


def make_starting_reference(
    kind: str, policy: nn.Module, config: DictConfig, load: Callable[[], nn.Module]
) -> Reference:
    """Make the reference before training starts: the policy itself if it gives the same numbers, bit for bit."""
    same_dtype = reference_dtype(config) == config.model.policy_dtype
    same_rounding = reference_has_policy_precision(config) or (same_dtype and config.model.policy_mp is None)
    if kind == "model" and same_rounding and policy_has_reference_weights(policy, config):
        return Reference(policy.eval())
    return make_reference(kind, policy, load)


def policy_has_reference_weights(policy: nn.Module, config: DictConfig) -> bool:
    """True if the untrained policy, cast to the reference's dtype, has the same weights as a second model would.

    False if it has an adapter, which has its own dtype and may change the base, or if its dtype is narrower than the
    reference's, because rounding twice gives other weights than rounding once.
    """
    dtypes = [getattr(torch, name) for name in (config.model.policy_dtype, reference_dtype(config))]
    differs = hasattr(policy, "peft_config") or bool(reference_source(config).given)
    return not differs and torch.promote_types(*dtypes) == dtypes[0]


@contextlib.contextmanager
def _adapter_switched(model: nn.Module, name: str) -> Iterator[None]:
    trained = model.active_adapter
    model.set_adapter(name, inference_mode=True)  # by default it would become trainable
    try:
        yield
    finally:
        model.set_adapter(trained)
