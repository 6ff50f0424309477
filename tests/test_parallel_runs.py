"""Runs on several workers against the same runs on one: whole `train.py` processes, over gloo."""

import pytest
import torch
import transformers
from conftest import ORACLE, read_jsonl
from safetensors.torch import load_file

SIZES = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip
GPT2_SIZES = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 8, "n_positions": 256}
CONFIGS = {  # small ones of the models in config/model
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
    """A directory for each of `CONFIGS`, as `save_pretrained` writes it."""
    directory = tmp_path_factory.mktemp("models")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ORACLE / "model")
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return {name: str(directory / name) for name in CONFIGS}


@pytest.fixture
def run(launcher, tmp_path):
    """Run `train.py` on a number of workers; returns the run directory."""

    def run_on(n_workers: int, *overrides: str, name: str = "") -> str:
        run_dir = tmp_path / (name or f"run-{len(list(tmp_path.iterdir()))}")
        assert launcher.run(*overrides, f"local_run_dir={run_dir}", n_workers=n_workers) == 0, launcher.output
        return run_dir

    return run_on


def assert_same_numbers(run_dir, expected, tolerance: float):
    """Two run directories hold the same metrics, and checkpoints of the same form."""
    lines, expected_lines = (read_jsonl(path / "metrics.jsonl") for path in (run_dir, expected))
    assert len(lines) == len(expected_lines)
    for line, expected_line in zip(lines, expected_lines, strict=True):
        assert line.keys() == expected_line.keys() and line["split"] == expected_line["split"]
        at_start = not any(expected_line.get(f"rewards_{line['split']}/{side}") for side in ("chosen", "rejected"))
        for key in line.keys() - {"split", "examples_per_second"}:
            if not (key.endswith("accuracies") and at_start):  # which of two equal rewards is larger is up to rounding
                assert line[key] == pytest.approx(expected_line[key], rel=tolerance, abs=tolerance), (line, key)
    weights, expected_weights = (load_file(path / "LATEST/model.safetensors") for path in (run_dir, expected))
    assert {name: tensor.shape for name, tensor in weights.items()} == {
        name: tensor.shape for name, tensor in expected_weights.items()
    }
    assert (run_dir / "LATEST/config.json").read_text() == (expected / "LATEST/config.json").read_text()


@pytest.mark.parametrize("loss", ["sft", "dpo", "ipo"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_trains_on_several_workers_as_on_one(name, loss, run, models):
    overrides = [*RUN, f"model.name_or_path={models[name]}", f"loss={loss}"]
    alone = run(1, *overrides)
    for n_workers in (2, 4) if loss == "dpo" else (2,):
        for trainer in ("FSDPTrainer", "TensorParallelTrainer"):
            together = run(n_workers, *overrides, f"trainer={trainer}")
            assert_same_numbers(together, alone, tolerance=1e-6)
