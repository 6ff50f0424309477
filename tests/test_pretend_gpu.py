"""Forward passes and the memory plan on pretend GPUs (see pretend_gpu.py), in a process of their own."""

import itertools
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pretend_gpu
import pytest
import torch
import transformers
from conftest import mark_exhaustive_except

from acceleration import memory_plan
from acceleration.capacity import measure_activations
from acceleration.layout import Layout
from acceleration.measurement import full_length_batch
from acceleration.optimizer_memory import state_bytes
from acceleration.packed_attention import supports_packed_attention, use_packed_attention, with_tensors
from acceleration.prefix_sharing import packed_rows
from acceleration.response_head import response_logps
from acceleration.shadow_weights import ShadowedLinear, shadow_linear_weights
from commands.command_line import compose_config
from utils import UserError, disable_dropout

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(pretend_gpu.reason_unavailable() is not None, reason=pretend_gpu.reason_unavailable() or ""),
]

N_LAYERS, HIDDEN, VOCAB, MAX_LENGTH = 2, 64, 97, 100
TOKENS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
LLAMA_LIKE = {
    "hidden_size": HIDDEN, "intermediate_size": 160, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
GPT2_LIKE = {"n_embd": HIDDEN, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 256}
# the classes of the original's models (GPT-2, GPT-J, Pythia, LLaMA), then today's
CONFIGS = {
    "gpt2": transformers.GPT2Config(**TOKENS, **GPT2_LIKE),
    "gptj": transformers.GPTJConfig(**TOKENS, **GPT2_LIKE, rotary_dim=8),
    "gpt_neox": transformers.GPTNeoXConfig(
        **TOKENS, hidden_size=HIDDEN, intermediate_size=160, num_hidden_layers=N_LAYERS, num_attention_heads=4,
        max_position_embeddings=256,
    ),
    "llama": transformers.LlamaConfig(**TOKENS, **LLAMA_LIKE),
    "qwen3": transformers.Qwen3Config(**TOKENS, **LLAMA_LIKE, head_dim=16),
    "gemma3": transformers.Gemma3TextConfig(**TOKENS, **LLAMA_LIKE, head_dim=16, sliding_window=32),
    "mixtral": transformers.MixtralConfig(**TOKENS, **LLAMA_LIKE, num_local_experts=4),
}  # fmt: skip
LAYOUTS = {
    "padded": Layout(), "shared": Layout(shares_prompts=True), "packed": Layout(is_packed=True),
    "packed, shared": Layout(shares_prompts=True, is_packed=True),
}  # fmt: skip
WEIGHTS = {"mixed": (torch.float32, torch.bfloat16), "bfloat16": (torch.bfloat16, None)}
GPU, OTHER_GPU = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    """Return a function that runs a function of this file in a process that has pretend GPUs."""
    library = pretend_gpu.compile_guard(tmp_path_factory.mktemp("guard"))
    context = multiprocessing.get_context("fork")  # the child inherits all imports; only the child loads the guard
    with ProcessPoolExecutor(1, context, initializer=pretend_gpu.load_guard, initargs=(library,)) as process:
        yield lambda function, *args, **kwargs: process.submit(function, *args, **kwargs).result(timeout=300)


# ---- functions that run in that process -----------------------------------------------------------------------------


def pair_batch(*lengths: tuple[int, int, int]) -> dict:
    """Return pairs with these numbers of tokens in prompt, chosen and rejected."""
    batch = {"prompt": [""] * len(lengths)}
    for side, place in (("chosen", 1), ("rejected", 2)):
        n_tokens = [pair[0] + pair[place] for pair in lengths]
        ids = torch.full((len(lengths), max(n_tokens)), 7)
        mask = torch.arange(max(n_tokens)) < torch.tensor(n_tokens)[:, None]
        is_prompt = torch.arange(max(n_tokens)) < torch.tensor([pair[0] for pair in lengths])[:, None]
        batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"] = ids, mask.long()
        batch[f"{side}_labels"] = ids.masked_fill(is_prompt | ~mask, -100)
    return batch


def meta_model(family: str, dtype: torch.dtype, lora: bool) -> torch.nn.Module:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family], dtype=dtype)
        disable_dropout(model)
        if lora:
            import peft

            model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    return model


def spread_over_two(model: torch.nn.Module):
    """Put half the layers on the second GPU, with accelerate's hooks, as `device_map=balanced` does."""
    import accelerate.big_modeling
    import accelerate.hooks

    # skip the parts that would copy weights and look for real GPUs
    accelerate.big_modeling.check_device_map = lambda *args, **kwargs: None
    accelerate.hooks.set_module_tensor_to_device = lambda *args, **kwargs: None
    base = model.base_model
    layers = next(module for module in base.modules() if isinstance(module, torch.nn.ModuleList))
    names = {id(module): name for name, module in model.named_modules()}
    places = {names[id(child)]: 0 for child in base.children() if child is not layers and id(child) in names}
    places |= {names[id(layer)]: int(number >= N_LAYERS // 2) for number, layer in enumerate(layers)}
    norms = [name for name in places if name.endswith(("norm", "ln_f"))]
    places |= dict.fromkeys([*norms, names[id(model.get_output_embeddings())]], 1)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if tied:
        places[names[id(model.get_output_embeddings())]] = 0

    def device_of(name: str) -> str:
        found = [place for known, place in places.items() if name == known or name.startswith(f"{known}.")]
        return f"cuda:{found[0] if found else 0}"

    pretend_gpu.move(model, device_of)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    accelerate.dispatch_model(
        model, {name: torch.device("cuda", place) for name, place in places.items()}, main_device=GPU, force_hooks=True
    )


def put_on_gpus(model: torch.nn.Module, autocast_dtype: torch.dtype | None, checkpointing=False, n_gpus=1):
    """Put a model on pretend GPUs and prepare it for all layouts, as a trainer does."""
    if n_gpus == 1:
        pretend_gpu.move(model, lambda _name: "cuda:0")
    else:
        spread_over_two(model)
    if supports_packed_attention(model):
        use_packed_attention(model)
    if autocast_dtype is not None:
        shadow_linear_weights(model)
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()


def logps_of(model: torch.nn.Module, rows, autocast) -> torch.Tensor:
    with autocast():
        return response_logps(model, rows)


def bytes_of_graph(model: torch.nn.Module, rows, autocast) -> dict[torch.device, int]:
    """Count the bytes that a forward pass saves, by another rule: a tensor is a weight if it has the shape of one."""
    shapes = set()
    for parameter in model.parameters():
        for shape in (parameter.shape, parameter.shape[1:]):  # one expert's, too
            shapes.add(tuple(sorted(shape)))
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        of_head = tensor.shape[-1:] == (VOCAB,) or tensor.shape == (len(rows.targets), HIDDEN)
        if tuple(sorted(tensor.shape)) not in shapes and not of_head:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logps = logps_of(model, rows, autocast)
    assert logps.dtype == torch.float32 and logps.device == GPU
    by_device: dict[torch.device, int] = {}
    for tensor in saved.values():
        by_device[tensor.device] = by_device.get(tensor.device, 0) + tensor.untyped_storage().nbytes()
    return by_device


def predicted_and_saved(family: str, layout_name: str, weights: str, lora: bool = False, **options) -> dict:
    """Compare the plan's bytes for a batch of several pairs with those that its graph saves, on each GPU."""
    warnings.filterwarnings("ignore")
    layout = LAYOUTS[layout_name]
    full = layout.rows(full_length_batch(pair_batch((25, 75, 56)), MAX_LENGTH))
    pairs = [(25, 75, 56), (30, 70, 51), (20, 80, 61)]  # prompt and responses vary
    if layout.is_packed:
        pairs += [(3, 9, 33), (11, 5, 2)]
    rows = layout.rows(pair_batch(*pairs))
    dtype, autocast_dtype = WEIGHTS[weights]
    model, autocast = meta_model(family, dtype, lora), partial(pretend_gpu.autocast, autocast_dtype)
    with pretend_gpu.pretend_gpus():
        put_on_gpus(model, autocast_dtype, **options)
        full, rows = (with_tensors(given, pretend_gpu.like_on_gpu) for given in (full, rows))
        activations = measure_activations(model, partial(logps_of, model, full, autocast), full.input_ids.numel())
        if options.get("checkpointing"):  # the backward pass recomputes and keeps one block at a time
            layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
            assert all(layer.gradient_checkpointing for layer in layers)
            layers[-1].gradient_checkpointing = False
        saved = bytes_of_graph(model, rows, autocast)
        n_copies = sum(bool(module.__dict__.get("_copies")) for module in model.modules())
        n_shadowed = sum(isinstance(module, ShadowedLinear) for module in model.modules())
    predicted = {device: per_token * rows.input_ids.numel() for device, per_token in activations.kept.items()}
    return {"predicted": predicted, "saved": saved, "casts": activations.casts, "copies": (n_copies, n_shadowed)}


def check_prediction(result: dict, n_gpus: int = 1, within: float = 0.1):
    assert set(result["saved"]) == {GPU, OTHER_GPU} if n_gpus == 2 else {GPU}
    for device, saved in result["saved"].items():
        assert result["predicted"][device] == pytest.approx(saved, rel=within), (device, result)
    assert result["copies"][0] >= result["copies"][1] / 2  # PEFT uses some adapter weights without calling their layers


def plan(family: str, n_gpus: int, free: int, weights: str = "mixed", lora: bool = False) -> tuple[list, list[str]]:
    """Plan the memory of GPUs that have `free` bytes left beside a policy and its reference, with RMSprop."""
    dtype, autocast_dtype = WEIGHTS[weights]
    models = [meta_model(family, dtype, lora), meta_model(family, torch.bfloat16, False)]
    memory_plan.free_and_total_bytes = lambda device: (free, 10**9)
    rows = packed_rows(full_length_batch(pair_batch((25, 75, 56)), MAX_LENGTH), shared=True)
    with pretend_gpu.pretend_gpus():
        for model in models:
            put_on_gpus(model, autocast_dtype, n_gpus=n_gpus)
        policy, reference = models
        optimizer = torch.optim.RMSprop([p for p in policy.parameters() if p.requires_grad])
        autocast = partial(pretend_gpu.autocast, autocast_dtype)
        rows = with_tensors(rows, pretend_gpu.like_on_gpu)
        activations = measure_activations(policy, partial(logps_of, policy, rows, autocast), rows.input_ids.numel())
        plans = memory_plan.memory_plans(policy, reference, state_bytes(optimizer), activations, torch.bfloat16)
    return plans, [str(plan) for plan in plans]


# ---- forward passes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", mark_exhaustive_except(CONFIGS, "gpt2", "mixtral"))
def test_plan_predicts_the_bytes_that_the_graph_saves(family, on_gpu):
    for name, layout in LAYOUTS.items():
        if family == "gptj" and layout.is_packed:  # GPT-J has its own attention
            continue
        check_prediction(on_gpu(predicted_and_saved, family, name, "mixed"))


VARIANTS = {
    "bfloat16 weights": {"weights": "bfloat16"},
    "LoRA": {"weights": "mixed", "lora": True},
    "checkpointing": {"weights": "mixed", "checkpointing": True},
    "two GPUs": {"weights": "mixed", "n_gpus": 2},
    "two GPUs, checkpointing": {"weights": "mixed", "n_gpus": 2, "checkpointing": True},
    "LoRA, checkpointing, bfloat16": {"weights": "bfloat16", "lora": True, "checkpointing": True},
}
DEFAULT_CASES = [("llama", "packed"), ("mixtral", "shared")]
OTHER_CASES = [
    case
    for case in itertools.product(CONFIGS, LAYOUTS)
    if case not in DEFAULT_CASES and not (case[0] == "gptj" and LAYOUTS[case[1]].is_packed)
]


@pytest.mark.parametrize(
    ("family", "layout_name"),
    [*DEFAULT_CASES, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in OTHER_CASES)],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_plan_predicts_the_saved_bytes_for_every_training_mode(variant, family, layout_name, on_gpu):
    options = VARIANTS[variant]
    check_prediction(on_gpu(predicted_and_saved, family, layout_name, **options), options.get("n_gpus", 1))


# ---- the memory plan ------------------------------------------------------------------------------------------------


def test_held_memory_is_counted_to_the_byte(on_gpu):
    n_weights = {family: sum(p.numel() for p in meta_model(family, torch.float32, False).parameters()) for family in
                 ("gpt2", "llama")}  # fmt: skip
    for family, n in n_weights.items():
        ((found,), (line,)) = on_gpu(plan, family, n_gpus=1, free=3 * 10**9)
        held = found.held
        assert {key: held[key] for key in ("weights", "gradients", "optimizer", "reference")} == {
            "weights": 4 * n, "gradients": 4 * n, "optimizer": 4 * n, "reference": 2 * n
        }  # fmt: skip
        # all weights are cast except untied embeddings and norms (2 numbers per unit in GPT-2, 1 in Llama)
        norms = {"gpt2": 2 * 5 * HIDDEN, "llama": 5 * HIDDEN}[family]
        embeddings = {"gpt2": 256 * HIDDEN, "llama": VOCAB * HIDDEN}[family]
        assert held["bfloat16 copies"] == 2 * (n - norms - embeddings)
        assert "Memory of cuda:0 (GB): weights " in line and "tokens per microbatch" in line


def test_cap_is_the_number_of_tokens_that_fit_into_the_remaining_memory(on_gpu):
    free = 4 * 10**9
    ((found,), _) = on_gpu(plan, "llama", n_gpus=1, free=free)
    to_come = sum(found.held[name] for name in ("gradients", "optimizer", "bfloat16 copies"))
    logits, largest_weight = 2**30 + 3 * 2**28, 4 * 160 * HIDDEN
    expected = 0.9 * (free - to_come - logits - 2 * largest_weight) / found.bytes_per_token
    assert found.max_tokens == int(expected)
    assert found.foreach_fits


def test_each_gpu_has_its_own_plan(on_gpu):
    plans, _ = on_gpu(plan, "llama", n_gpus=2, free=4 * 10**9)
    assert [plan.device for plan in plans] == [GPU, OTHER_GPU]
    n = sum(p.numel() for p in meta_model("llama", torch.float32, False).parameters())
    assert sum(plan.held["weights"] for plan in plans) == 4 * n
    assert memory_plan.max_tokens_that_fit(plans) == min(plan.max_tokens for plan in plans) > 0


def test_plan_of_an_adapter_holds_no_gradients_of_its_base(on_gpu):
    ((found,), _) = on_gpu(plan, "llama", n_gpus=1, free=4 * 10**9, lora=True)
    trained = sum(p.numel() for p in meta_model("llama", torch.float32, True).parameters() if p.requires_grad)
    assert found.held["gradients"] == found.held["optimizer"] == 4 * trained < found.held["weights"] / 5


def test_run_that_cannot_fit_is_refused_with_remedies(on_gpu):
    ((found,), _) = on_gpu(plan, "llama", n_gpus=1, free=9 * 10**5)
    assert found.max_tokens == 0
    config = compose_config("model=tiny", "loss=dpo", "model.policy_mp=bfloat16", "model.reference_dtype=float16")
    with pytest.raises(
        UserError, match=r"this run doesn't fit. cuda:0 has 1\.0 GB and would hold .* GB: weights "
    ) as error:
        memory_plan.check_fits([found], config, 156)
    for remedy in ("activation_checkpointing=true", "precompute_ref_log_probs=true", "lora={}", "trainer=FSDPTrainer"):
        assert remedy in str(error.value)
    assert "model.reference_dtype" not in str(error.value)


def test_optimizer_updates_all_weights_at_once_only_if_a_copy_of_the_gradients_fits(on_gpu):
    ((roomy,), _) = on_gpu(plan, "llama", n_gpus=1, free=4 * 10**9)
    to_come = roomy.held["gradients"] + roomy.held["optimizer"]
    for left, fits in ((roomy.held["gradients"] - 1, False), (roomy.held["gradients"], True)):
        ((found,), _) = on_gpu(plan, "llama", n_gpus=1, free=to_come + left)
        assert found.foreach_fits == fits
