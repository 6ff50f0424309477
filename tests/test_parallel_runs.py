"""Whole runs on several workers (`train.py` over gloo) equal runs on one worker."""

import shutil

import pytest
import torch
import transformers
from conftest import ORACLE, mark_exhaustive_except, read_jsonl, save_models
from safetensors.torch import load_file

SIZES = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip
GPT2_SIZES = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 8, "n_positions": 256}
CONFIGS = {  # small versions of the models in config/model
    "gpt2": transformers.GPT2Config(**GPT2_SIZES),
    "gptj": transformers.GPTJConfig(**GPT2_SIZES, rotary_dim=4, tie_word_embeddings=False),
    "pythia": transformers.GPTNeoXConfig(**SIZES),
    "llama": transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 8}),
    "llama3": transformers.LlamaConfig(**SIZES, rope_theta=500000.0),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
}
# gradient accumulation, clipping, checkpointing, shared prompts, a last evaluation batch smaller than the others
RUN = [
    "model=blank_model", f"dataset_paths.hh={ORACLE}/hh", "model.policy_dtype=float64", "model.reference_dtype=float64",
    "max_length=128", "max_prompt_length=64", "batch_size=8", "gradient_accumulation_steps=2", "n_examples=16",
    "n_eval_examples=6", "eval_batch_size=4", "eval_every=16", "lr=1e-3", "warmup_steps=2", "max_grad_norm=0.5",
    "activation_checkpointing=true", "sample_during_eval=false",
]  # fmt: skip


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, str]:
    """Save a model for each of `CONFIGS`; return their directories."""
    return save_models(CONFIGS, tmp_path_factory.mktemp("models"))


@pytest.fixture
def run(launcher, tmp_path):
    """Return a function that runs `train.py` on n workers and returns the run directory."""

    def run_on(n_workers: int, *overrides: str, name: str = "") -> str:
        run_dir = tmp_path / (name or f"run-{len(list(tmp_path.iterdir()))}")
        assert launcher.run(*overrides, f"local_run_dir={run_dir}", n_workers=n_workers) == 0, launcher.output
        return run_dir

    return run_on


def assert_same_numbers(run_dir, expected, tolerance: float):
    """Check that two run directories hold the same metrics, and checkpoints of the same form."""
    lines, expected_lines = (read_jsonl(path / "metrics.jsonl") for path in (run_dir, expected))
    assert len(lines) == len(expected_lines)
    for line, expected_line in zip(lines, expected_lines, strict=True):
        assert line.keys() == expected_line.keys() and line["split"] == expected_line["split"]
        rewards = [expected_line.get(f"rewards_{line['split']}/{side}", 0) for side in ("chosen", "rejected")]
        at_start = max(map(abs, rewards)) < 1e-6
        for key in line.keys() - {"split", "examples_per_second", "tokens_per_second"}:
            if not ("accuracies" in key and at_start):  # which of two equal rewards is larger is up to rounding
                assert line[key] == pytest.approx(expected_line[key], rel=tolerance, abs=tolerance), (line, key)
    assert shapes(run_dir) == shapes(expected)


def shapes(run_dir) -> dict:
    """Return the shapes of the last checkpoint's tensors."""
    (path,) = (run_dir / "LATEST").glob("*model.safetensors")
    return {name: tensor.shape for name, tensor in load_file(path).items()}


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "loss", "n_workers"),
    [
        ("gpt2", "dpo", 2),
        ("gptj", "dpo", 2),
        ("llama", "ipo", 2),
        ("llama3", "sft", 2),
        ("qwen3", "dpo", 4),
    ],
)
def test_every_architecture_trains_on_several_workers_as_on_one(name, loss, n_workers, run, models):
    overrides = [*RUN, f"model.name_or_path={models[name]}", f"loss={loss}"]
    alone = run(1, *overrides)
    for trainer in ("FSDPTrainer", "TensorParallelTrainer"):
        together = run(n_workers, *overrides, f"trainer={trainer}")
        assert_same_numbers(together, alone, tolerance=1e-6)


FEW_TRAINERS = [("BasicTrainer", 1), ("FSDPTrainer", 2), ("TensorParallelTrainer", 2), ("BasicTrainer", 1)]
ALL_TRAINERS = [*FEW_TRAINERS[:2], ("FSDPTrainer", 4), ("FSDPTrainer tensor_parallel=2", 4), *FEW_TRAINERS[2:]]


@pytest.mark.parametrize(
    ("overrides", "trainers"),
    mark_exhaustive_except(
        [
            (["loss=dpo", "optimizer=AdamW"], FEW_TRAINERS),
            (["loss=dpo", "lora.r=4", "model.name_or_path={qwen3}"], ALL_TRAINERS),
            (["loss=sft", "model.name_or_path={gpt2}"], ALL_TRAINERS),
        ],
        lambda case: case[1] is FEW_TRAINERS,
    ),
    ids=str,
)
def test_run_moved_between_trainers_and_world_sizes_ends_as_one_that_stayed(overrides, trainers, run, models):
    overrides = [*RUN, f"model.name_or_path={models['pythia']}", *(word.format(**models) for word in overrides)]
    overrides += ["eval_every=8"]
    stayed = run(1, *overrides, f"n_examples={8 * len(trainers)}", name="stayed")
    for turn, (trainer, n_workers) in enumerate(trainers):
        form = "whole" if turn in (0, len(trainers) - 1) else "sharded"
        words = [f"n_examples={8 * (turn + 1)}", f"checkpoint_format={form}", "resume=auto"]
        moved = run(n_workers, *overrides, *words, *f"trainer={trainer}".split(), name="moved")
    assert_same_numbers(moved, stayed, tolerance=1e-5)


REFERENCES = {
    "adapter_off": ["reference=adapter_off", "lora.r=4", "precompute_ref_log_probs=true"],
    "adapter_copy": ["reference=adapter_copy", "model.adapter={adapter}"],
    "model": ["reference=model", "model.adapter={adapter}", "model.reference_dtype=float32"],
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("trainer", ["FSDPTrainer", "TensorParallelTrainer"])
@pytest.mark.parametrize("reference", REFERENCES)
def test_adapters_train_on_several_workers_as_on_one(reference, trainer, run, models, adapter):
    overrides = REFERENCES[reference]
    overrides = [*RUN, "n_examples=8", *(word.format(adapter=adapter) for word in overrides)]
    overrides += [f"model.name_or_path={models['llama3']}"]
    alone = run(1, *overrides, "loss=dpo")
    together = run(2, *overrides, "loss=dpo", f"trainer={trainer}", f"local_dirs=[{alone}/cache]")
    assert_same_numbers(together, alone, tolerance=1e-5)


@pytest.fixture(scope="module")
def adapter(launcher, models) -> str:
    """Return the directory of a LoRA adapter trained by SFT."""
    run_dir = launcher.directory / "adapter"
    overrides = [*RUN, "loss=sft", "lora={r:4}", f"model.name_or_path={models['llama3']}", f"local_run_dir={run_dir}"]
    assert launcher.run(*overrides) == 0, launcher.output
    return f"{run_dir}/LATEST"


SAMPLING = [
    "sample_during_eval=true", "n_eval_model_samples=5", "do_first_eval=false", "loss=dpo", "max_length=40",
    "max_prompt_length=32",
]  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("trainer", "n_workers"),
    [("FSDPTrainer", 2), ("TensorParallelTrainer", 2), ("FSDPTrainer tensor_parallel=2", 4)],
)
def test_several_workers_and_a_resumed_run_sample_the_same_prompts_as_one_worker(trainer, n_workers, run, models):
    overrides = [*RUN, f"model.name_or_path={models['pythia']}", *SAMPLING, "save_every=8", "eval_every=8"]
    alone, together = run(1, *overrides), run(n_workers, *overrides, *f"trainer={trainer}".split(), name="together")
    samples, expected = (read_jsonl(path / "samples.jsonl") for path in (together, alone))
    assert [s["model"] for s in samples] == [s["model"] for s in expected]
    assert [s["prompt"] for s in samples] == [s["prompt"] for s in expected]
    assert all(s["sample"].startswith(s["prompt"][:20]) for s in samples)
    if trainer == "TensorParallelTrainer":  # one worker draws for all
        assert samples == expected

    shutil.rmtree(together / "LATEST")  # as if the run had been killed after its first step
    run(n_workers, *overrides, *f"trainer={trainer}".split(), "resume=auto", name="together")
    assert read_jsonl(together / "samples.jsonl") == samples


@pytest.mark.exhaustive
@pytest.mark.parametrize("trainer", ["FSDPTrainer", "TensorParallelTrainer"])
def test_mixed_precision_leaves_the_reference_and_the_saved_weights_in_float32(trainer, run, models):
    overrides = [*RUN, f"model.name_or_path={models['llama3']}", "loss=dpo", "n_examples=8", "eval_every=8"]
    overrides += ["model.policy_dtype=float32", "model.reference_dtype=float32"]
    exact, half = run(1, *overrides), run(2, *overrides, "model.policy_mp=bfloat16", f"trainer={trainer}")
    before, expected = (read_jsonl(path / "metrics.jsonl")[0] for path in (half, exact))
    assert before["counters/examples"] == 0
    assert 1e-6 < abs(before["rewards_eval/chosen"]) < 0.1  # the policy's rounding
    assert before["logps_eval/chosen"] == pytest.approx(expected["logps_eval/chosen"], rel=0.01)
    assert before["logps_eval/chosen"] != pytest.approx(expected["logps_eval/chosen"], rel=1e-6)
    assert load_file(half / "LATEST/model.safetensors")["lm_head.weight"].dtype == torch.float32
