"""Casting weights once per step gives autocast's numbers, bit for bit."""

import copy
import itertools

import pytest
import torch
from conftest import mark_exhaustive_except
from test_shared_prompt import BATCHES, CONFIGS, make_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from acceleration.prefix_sharing import shared_rows
from acceleration.response_head import response_logps
from acceleration.shadow_weights import (
    ShadowedLinear,
    round_if_equal,
    shadow_if_equal,
    shadow_linear_weights,
    unshadow_linear_weights,
)
from losses import LOSSES

BATCH = BATCHES["ordinary"]


def small_model(architecture: str = "llama", **changes) -> nn.Module:
    config = copy.deepcopy(CONFIGS[architecture])
    for name, value in changes.items():
        setattr(config, name, value)
    return make_model(config, torch.float32)


def step_loss(model: nn.Module) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logps = response_logps(model, shared_rows(BATCH))
    reference = torch.linspace(-40, -10, len(logps)).chunk(2)
    return LOSSES["dpo"].function(*logps.chunk(2), *reference, beta=0.1)[0].mean()


def trained(
    model: nn.Module, n_steps: int, n_microbatches: int = 2, optimizer_class=torch.optim.RMSprop, **options
) -> list[torch.Tensor]:
    optimizer = optimizer_class(model.parameters(), lr=1e-3, **options)
    if any(isinstance(module, ShadowedLinear) for module in model.modules()):
        shadow_linear_weights(model, optimizer)
    for _ in range(n_steps):
        for _ in range(n_microbatches):
            (step_loss(model) / n_microbatches).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


class CountCasts(TorchDispatchMode):
    """Counts casts to bfloat16 of tensors that have a weight's shape."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
            self.count += args[0].shape == self.shape
        return function(*args, **kwargs)


@pytest.mark.parametrize(
    ("architecture", "n_steps"),
    mark_exhaustive_except(
        [("llama", 10), ("llama", 100), ("gpt_neox", 100), ("qwen3", 100), ("gpt2", 100)], ("llama", 10)
    ),
)
def test_steps_with_shadow_weights_equal_autocast(architecture, n_steps):
    model = small_model(architecture)
    shadowed = copy.deepcopy(model)
    shadow_linear_weights(shadowed)
    for ours, expected in zip(trained(shadowed, n_steps), trained(model, n_steps), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("name", "options"),
    mark_exhaustive_except(
        itertools.product(["AdamW", "SGD"], [{"fused": True}, {"foreach": True}, {"foreach": False}]),
        ("AdamW", {"fused": True}),
        ("AdamW", {"foreach": True}),
        ("SGD", {"foreach": False}),
    ),
    ids=str,
)
def test_weights_changed_by_fused_and_foreach_optimizers_are_cast_again(name, options):
    """Fused optimizers change weights without increasing their versions."""
    model = small_model()
    shadowed = copy.deepcopy(model)
    shadow_linear_weights(shadowed)
    optimizer = {"optimizer_class": getattr(torch.optim, name), **options}
    for ours, expected in zip(trained(shadowed, 5, **optimizer), trained(model, 5, **optimizer), strict=True):
        assert torch.equal(ours, expected)


def test_weights_are_cast_once_per_step_instead_of_once_per_microbatch():
    model = small_model()
    shape = model.model.layers[0].mlp.up_proj.weight.shape  # four weights have it: gate and up, in two layers
    with CountCasts(shape) as casts:
        trained(model, n_steps=3, n_microbatches=4)
    assert casts.count == 4 * 3 * 4
    shadow_linear_weights(model)
    with CountCasts(shape) as casts:
        trained(model, n_steps=3, n_microbatches=4)
    assert casts.count == 4 * 3


def test_changed_weight_is_cast_again():
    model, other = small_model(), small_model("llama", initializer_range=0.5)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(0, 0.2)
    expected = step_loss(other)
    shadow_linear_weights(model)
    assert step_loss(model) != expected
    model.load_state_dict(other.state_dict())
    assert step_loss(model) == expected


def test_shadow_weights_are_in_neither_checkpoints_nor_copies():
    model = small_model()
    names = list(model.state_dict())
    shadow_linear_weights(model)
    loss = step_loss(model)
    assert list(model.state_dict()) == names
    copied = copy.deepcopy(model)
    assert "_copies" not in copied.lm_head.__dict__
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert step_loss(copied) == loss != step_loss(model)


def test_forward_without_autocast_uses_the_master_weights():
    model = small_model()
    expected = response_logps(model, shared_rows(BATCH))
    shadow_linear_weights(model)
    assert torch.equal(response_logps(model, shared_rows(BATCH)), expected)


def test_tied_weights_and_16_bit_models_are_not_shadowed():
    tied = small_model("llama", tie_word_embeddings=True)
    tied.tie_weights()
    shadow_linear_weights(tied)
    assert type(tied.lm_head) is nn.Linear
    assert type(tied.model.layers[0].mlp.up_proj) is ShadowedLinear
    in_16_bits = small_model().bfloat16()
    shadow_linear_weights(in_16_bits)
    assert not any(isinstance(module, ShadowedLinear) for module in in_16_bits.modules())


def test_frozen_base_of_an_adapter_is_cast_only_once():
    import peft

    model = peft.get_peft_model(small_model(), peft.LoraConfig(r=2, target_modules=["up_proj"]))
    expected = trained_adapter(copy.deepcopy(model))
    shadow_linear_weights(model)
    base = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    with CountCasts(base.weight.shape) as casts:
        ours = trained_adapter(model)
    assert casts.count == 4
    for parameter, other in zip(ours, expected, strict=True):
        assert torch.equal(parameter, other)


def trained_adapter(model: nn.Module) -> list[torch.Tensor]:
    optimizer = torch.optim.RMSprop([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        step_loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]


def test_copies_that_give_other_numbers_are_not_kept(monkeypatch):
    def logps() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return response_logps(model, shared_rows(BATCH))

    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = logps()
    make_copy = ShadowedLinear._in_dtype
    monkeypatch.setattr(ShadowedLinear, "_in_dtype", lambda *args: make_copy(*args) * 1.01)  # as a wrong kernel might
    assert not shadow_if_equal(model, optimizer, logps)
    assert not any(isinstance(module, ShadowedLinear) for module in model.modules())
    assert torch.equal(logps(), expected)
    monkeypatch.undo()
    assert shadow_if_equal(model, optimizer, logps)
    assert any(isinstance(module, ShadowedLinear) for module in model.modules())
    assert torch.equal(logps(), expected)


def test_unshadowed_layers_are_plain_again_also_for_accelerate():
    model = small_model()
    layer = model.model.layers[0].mlp.up_proj
    layer._old_forward = layer.forward  # accelerate's hooks between GPUs call this
    shadow_linear_weights(model)
    assert layer._old_forward.__func__ is ShadowedLinear.forward
    autocast_logps(model)
    unshadow_linear_weights(model)
    assert layer._old_forward.__func__ is nn.Linear.forward
    assert all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear))
    assert "_copies" not in layer.__dict__


def autocast_logps(model: nn.Module) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return response_logps(model, shared_rows(BATCH))


@pytest.mark.parametrize("architecture", mark_exhaustive_except(["llama", "gpt_neox", "qwen3", "gpt2"], "llama"))
def test_rounded_frozen_weights_equal_autocast_in_half_the_memory(architecture):
    model = small_model(architecture)
    with torch.no_grad():
        expected = autocast_logps(model)
        assert round_if_equal(model, torch.bfloat16, lambda: autocast_logps(model))
        assert torch.equal(autocast_logps(model), expected)
    linear = [layer for layer in model.modules() if type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16]
    assert linear or architecture == "gpt2"  # GPT-2's linear layers are of another class
    assert model.get_input_embeddings().weight.dtype == torch.float32


def test_model_whose_numbers_depend_on_the_dtype_of_weights_is_not_rounded():
    model = small_model()
    layer = model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, _inputs, output: output * (1 + (module.weight.dtype == torch.bfloat16)))
    before = dict(model.named_parameters())
    assert not round_if_equal(model, torch.bfloat16, lambda: autocast_logps(model))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
