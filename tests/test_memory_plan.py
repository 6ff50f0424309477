"""Memory decisions for GPUs, as far as a CPU can test them.

test_pretend_gpu.py tests those that need an autograd graph of GPU tensors.
"""

import functools
import types

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import mark_exhaustive_except
from test_shared_prompt import BATCHES, CONFIGS, make_model
from torch import nn

from acceleration import memory_plan, speed_up
from acceleration.capacity import measure_activations
from acceleration.optimizer_memory import state_bytes, step_one_by_one, uses_foreach_by_default
from acceleration.out_of_memory import out_of_memory_explained
from acceleration.prefix_sharing import packed_rows, shared_rows
from acceleration.response_head import response_logps
from acceleration.shadow_weights import ShadowedLinear, shadow_linear_weights
from checkpointing.restoring import resume_training, resumed_cap
from commands.command_line import compose_config
from distributed import environment
from distributed.dtensor import distribute_model
from distributed.fsdp import make_meshes, shard_model
from distributed.strategies import FullySharded, SingleProcess
from models import _check_fits_on_gpus
from reporting.metrics import check_finite
from reporting.usage import n_parameters, peak_flops
from utils import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


# ---- activations ----------------------------------------------------------------------------------------------------


def test_activations_of_a_linear_layer_are_counted_by_hand():
    """For tanh(x W), the graph keeps the token ids of x, x itself and the tanh's output; W is a weight."""

    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.linear = nn.Embedding(61, 8), nn.Linear(8, 12, bias=False)

        def forward(self, ids, **_):
            return (torch.tanh(self.linear(self.embedding(ids))),)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_model, self.head = Base(), nn.Linear(12, 61)
            self.config = CONFIGS["llama"]
            self._no_split_modules = []

        def get_input_embeddings(self):
            return self.base_model.embedding

        def get_output_embeddings(self):
            return self.head

    rows = packed_rows(BATCHES["ordinary"], shared=True)
    model = Model()
    activations = measure_activations(model, lambda: response_logps(model, rows), rows.input_ids.numel())
    ids, inputs, outputs = 8, 4 * 8, 4 * 12  # bytes a token
    assert activations.kept == {CPU: ids + inputs + outputs}
    assert activations.casts == {}


def test_measuring_leaves_the_model_and_the_random_generators_as_they_were():
    model = make_model(CONFIGS["llama"], torch.float32).eval()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    def state_of(module: nn.Module) -> tuple:
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        return module.training, getattr(module, "gradient_checkpointing", None), hooks

    generator, states = torch.get_rng_state(), [state_of(module) for module in model.modules()]
    rows = shared_rows(BATCHES["ordinary"])
    measure_activations(model, lambda: response_logps(model, rows), rows.input_ids.numel())
    assert torch.equal(torch.get_rng_state(), generator)
    assert [state_of(module) for module in model.modules()] == states
    assert all(parameter.grad is None for parameter in model.parameters())


def activations_of_a_sharded_model() -> tuple[dict, dict]:
    """Measure a whole model, and the same model sharded by FSDP; return the bytes by device of both."""
    rows = shared_rows(BATCHES["ordinary"])
    whole = make_model(CONFIGS["llama"], torch.float32)
    given = make_model(CONFIGS["llama"], torch.float32) if dist.get_rank() == 0 else None
    sharded = distribute_model(given, lambda model: shard_model(model, make_meshes(1)[0], None, None, offload=False))
    measured = []
    for model, strategy in ((whole, SingleProcess), (sharded, FullySharded)):
        compute = functools.partial(strategy.run_as_forward, model, response_logps, model, rows, False, strategy)
        measured.append(measure_activations(model, compute, rows.input_ids.numel()).kept)
    return tuple(measured)


def test_weights_that_fsdp_gathers_do_not_count_as_activations(in_workers):
    for whole, sharded in in_workers(2, activations_of_a_sharded_model):
        assert sharded[CPU] == pytest.approx(whole[CPU], rel=0.02)


@pytest.mark.parametrize(
    ("overrides", "n_tokens"),
    mark_exhaustive_except(
        [
            (["loss=dpo"], 16 + 48 + 48),  # a prompt and two responses in one row
            (["loss=dpo", "shared_prompt=false", "padding_free=false"], 2 * 64),
            (["loss=dpo", "padding_free=true", "shared_prompt=false"], 2 * 64),
            (["loss=sft", "model.policy_mp=bfloat16"], 64),
            (["loss=dpo", "lora.r=4", "activation_checkpointing=true"], 16 + 48 + 48),
        ],
        lambda case: "shared_prompt=false" not in case[0],
    ),
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_trainer_measures_a_pair_of_full_length_in_the_layout_of_training(
    overrides, n_tokens, make_trainer, monkeypatch
):
    trainer = make_trainer("model=tiny", "datasets=[toy]", "n_examples=4", "n_eval_examples=4", "max_length=64",
                           "max_prompt_length=32", *overrides)  # fmt: skip
    planned = []
    monkeypatch.setattr(speed_up, "plan_memory", lambda *args, **kwargs: planned.append((args, kwargs)))
    speed_up._fitting_tokens(trainer)
    (((_, policy, reference, optimizer, activations, found), _),) = planned
    assert (policy, optimizer, found) == (trainer.policy, trainer.optimizer, n_tokens)
    assert (reference is None) == (overrides[0] == "loss=sft" or "lora.r=4" in overrides)
    hidden, n_layers = policy.config.hidden_size, policy.config.num_hidden_layers
    least = 2 * hidden * n_layers  # bytes: each layer's input, in 16 bits
    assert least < activations.kept[CPU] < 200 * least + 16 * policy.config.vocab_size
    assert memory_plan.memory_plans(policy, reference, {}, activations, torch.float32) == []  # on a CPU
    assert trainer.max_tokens is None


# ---- the optimizer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "numbers"),
    [
        ("RMSprop", {}, 1), ("RMSprop", {"momentum": 0.9, "centered": True}, 3), ("AdamW", {}, 2), ("SGD", {}, 0),
        ("SGD", {"momentum": 0.9}, 1), ("Adafactor", {}, 0), ("AdamW", {"amsgrad": True, "fused": True}, 3),
    ],
)  # fmt: skip
def test_optimizer_state_is_counted_for_each_weight(name, options, numbers):
    parameters = [nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(7, dtype=torch.bfloat16))]
    if name == "Adafactor":
        parameters = parameters[:1]
    optimizer = getattr(torch.optim, name)(parameters, lr=1e-3, **options)
    n_bytes = sum(parameter.nbytes for parameter in parameters)
    assert state_bytes(optimizer) == {CPU: numbers * n_bytes}


def test_one_by_one_setting_survives_loading_and_gives_the_same_weights():
    def trained(one_by_one: bool) -> torch.Tensor:
        weight = nn.Parameter(torch.linspace(-1, 1, 6))
        optimizer = torch.optim.RMSprop([weight], lr=0.1, foreach=True)
        if one_by_one:
            step_one_by_one(optimizer)
            optimizer.param_groups[0].update(optimizer.defaults)  # loading a checkpoint's state does this, too
            assert optimizer.param_groups[0]["foreach"] is False
        for _ in range(3):
            weight.square().sum().backward()
            optimizer.step()
        return weight.detach()

    assert torch.equal(trained(True), trained(False))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("RMSprop", {}, True), ("RMSprop", {"foreach": False}, False), ("RMSprop", {"foreach": True}, False),
        ("AdamW", {"fused": True}, False), ("AdamW", {}, True),
    ],
)  # fmt: skip
def test_foreach_that_is_pytorchs_default_is_told_from_a_users_choice(name, options, expected):
    optimizer = getattr(torch.optim, name)([nn.Parameter(torch.zeros(2))], lr=1e-3, **options)
    assert uses_foreach_by_default(optimizer, GPU) == expected
    assert not uses_foreach_by_default(optimizer, CPU)


def test_copies_of_trained_weights_are_freed_before_the_optimizer_steps():
    model = make_model(CONFIGS["llama"], torch.float32)
    model.lm_head.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    shadow_linear_weights(model, optimizer)
    copies_in_step = []
    optimizer.register_step_pre_hook(lambda *_: copies_in_step.extend(names_with_copies(model)))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert len(names_with_copies(model)) > 10
    optimizer.step()
    assert copies_in_step == ["lm_head"]


def names_with_copies(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules()
            if isinstance(module, ShadowedLinear) and module.__dict__.get("_copies")]  # fmt: skip


# ---- the cap of a microbatch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "fitting", "expected"),
    [(8600, 8550, 8600), (8600, 8700, 8600), (None, 8550, 8550), (8600, None, 8600), (None, None, None)],
)
def test_resumed_run_keeps_its_cap(saved, fitting, expected):
    assert resumed_cap(saved, fitting) == (expected, None)


def test_resumed_run_on_a_smaller_gpu_uses_a_smaller_cap_and_warns():
    cap, warning = resumed_cap(17_000, 8_000)
    assert cap == 8_000
    assert "8,000 tokens, the run began with 17,000" in warning


def test_cap_is_saved_in_the_train_state(make_trainer, tmp_path):
    run = ["model=tiny", "datasets=[toy]", "loss=sft", "n_examples=8", "n_eval_examples=4", "batch_size=4"]
    first = make_trainer(*run)
    first.max_tokens = 640
    first.save(str(tmp_path / "saved"))
    second = make_trainer(*run)
    second.max_tokens = 630  # as a little less memory was free
    resume_training(second, str(tmp_path / "saved"))
    assert second.max_tokens == 640
    given = make_trainer(*run, "max_tokens_per_microbatch=100")
    resume_training(given, str(tmp_path / "saved"))
    assert given.max_tokens == 100


# ---- models that don't fit ------------------------------------------------------------------------------------------


def llama_on_meta() -> nn.Module:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(
            hidden_size=1024, num_hidden_layers=2, num_attention_heads=8, intermediate_size=4096, vocab_size=32000,
        ))  # fmt: skip


def test_model_larger_than_the_gpu_is_refused(monkeypatch):
    model, config = llama_on_meta(), compose_config("model=tiny", "loss=dpo", "model.reference_dtype=float16")
    n_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    _check_fits_on_gpus(model, "model.name_or_path=x", config, "balanced")  # no GPU: the model stays in CPU memory
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _check_fits_on_gpus(model, "model.name_or_path=x", config, "cpu")  # loaded there to be divided between workers
    with pytest.raises(UserError, match=r"model.name_or_path=x has 0.4 GB of weights in float32") as error:
        _check_fits_on_gpus(model, "model.name_or_path=x", config, "balanced")
    assert n_bytes / 1e9 == pytest.approx(0.4, abs=0.05)
    assert "lora={}" in str(error.value) and "trainer=FSDPTrainer" in str(error.value)


def test_running_out_of_memory_names_remedies():
    config = compose_config("model=tiny", "loss=sft", "activation_checkpointing=true", "model.policy_dtype=bfloat16")
    with pytest.raises(UserError) as raised, out_of_memory_explained(config):
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB\nmore")
    message = str(raised.value)
    assert message.startswith("a GPU is out of memory: Tried to allocate 2 GiB\nTo use less memory: ")
    assert "max_tokens_per_microbatch" in message and "lora={}" in message
    for useless in ("activation_checkpointing", "precompute_ref_log_probs", "reference_dtype", "policy_dtype"):
        assert useless not in message


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A40", 150e12), ("NVIDIA RTX A4000", None), ("NVIDIA H100 NVL", 835e12), ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A10G", None), ("NVIDIA A10", 125e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA GH200 480GB", 989e12), ("Tesla V100-SXM2-32GB", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA RTX A6000", 155e12),
    ],
)  # fmt: skip
def test_gpus_are_known_by_the_words_of_their_names(name, flops):
    assert peak_flops(name) == flops


def test_packed_4_bit_weights_are_counted_one_by_one():
    packed = nn.Parameter(torch.zeros(48, 1, dtype=torch.uint8), requires_grad=False)  # of an 8 × 12 matrix
    packed.quant_state = types.SimpleNamespace(shape=torch.Size([8, 12]))
    model = nn.ParameterList([packed, nn.Parameter(torch.zeros(5))])
    assert n_parameters(model) == (5, 101)


@pytest.mark.parametrize("key", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_allocator_gets_expandable_segments_unless_the_user_configures_it(key, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    environment.use_expandable_segments()
    assert environment.os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv(key, "max_split_size_mb:64")
    environment.use_expandable_segments()
    found = {name: environment.os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")}
    assert sorted(filter(None, found.values())) == ["max_split_size_mb:64"]


def test_deterministic_algorithms_are_turned_on_and_off_again(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        environment.use_deterministic_algorithms(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert environment.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        environment.use_deterministic_algorithms(False)
    assert not torch.are_deterministic_algorithms_enabled()


# ---- references -----------------------------------------------------------------------------------------------------


def test_reference_that_overflows_in_float16_is_refused_at_the_start(make_trainer, tmp_path):
    source = compose_config("model=tiny").model.name_or_path
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(source))
    with torch.no_grad():  # values that fit bfloat16 and float32, but not float16
        for layer in model.model.layers if hasattr(model, "model") else model.gpt_neox.layers:
            for weight in layer.mlp.parameters():
                weight.mul_(2000)
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "model")
    run = ["model=tiny", f"model.name_or_path={tmp_path}/model", "model.from_scratch=false", "datasets=[toy]",
           "loss=dpo", "n_examples=4", "n_eval_examples=4"]  # fmt: skip
    make_trainer(*run, "model.reference_dtype=bfloat16")
    with pytest.raises(UserError, match=r"model.reference_dtype=float16: .*mlp.* returns values beyond 65504") as error:
        make_trainer(*run, "model.reference_dtype=float16")
    assert "use model.reference_dtype=bfloat16" in str(error.value)


def test_reference_that_overflows_later_is_blamed_instead_of_lr():
    config = compose_config("model=tiny", "loss=dpo", "model.reference_dtype=float16")
    infinite, finite = float("-inf"), -3.0
    overflown = {"logps_train/chosen": finite, "logratios_train/chosen": infinite}
    with pytest.raises(UserError, match=r"model.reference_dtype=float16\. Use model.reference_dtype=bfloat16") as error:
        check_finite("step 3", ["a"], config, overflown, loss=float("nan"))
    assert "smaller lr" not in str(error.value)
    diverged = {"logps_train/chosen": infinite, "logratios_train/chosen": infinite}
    with pytest.raises(UserError, match="smaller lr"):
        check_finite("step 3", ["a"], config, diverged, loss=float("nan"))


def test_reference_log_probabilities_are_moved_to_the_policys_device(make_trainer):
    trainer = make_trainer("model=tiny", "datasets=[toy]", "loss=dpo", "n_examples=4", "n_eval_examples=4")
    trainer.device = torch.device("meta")  # stands for another GPU than the reference's
    assert {logps.device.type for logps in trainer.reference_logps(trainer.eval_iterator.first_examples(2))} == {"meta"}


@pytest.mark.parametrize(("given", "expected"), [("null", torch.bfloat16), ("float32", torch.float32)])
def test_samples_are_drawn_in_the_precision_in_which_they_are_scored(given, expected, make_trainer):
    trainer = make_trainer("model=tiny", "datasets=[toy]", "loss=dpo", "n_examples=4", "n_eval_examples=4",
                           "model.policy_mp=bfloat16", f"model.reference_dtype={given}", "max_length=40",
                           "max_prompt_length=32")  # fmt: skip
    dtypes = {}
    for name, model in (("policy", trainer.policy), ("reference", trainer.reference.model)):
        model.get_output_embeddings().register_forward_hook(
            lambda _module, _inputs, output, name=name: dtypes.setdefault(name, set()).add(output.dtype)
        )
    trainer.get_batch_samples(trainer.eval_batches[0])
    assert dtypes == {"policy": {torch.bfloat16}, "reference": {expected}}
