"""Tests that need a GPU: the kernels' numbers against a CPU's, and the choices made for a GPU."""

import copy

import pytest
import torch
from conftest import ORACLE, read_jsonl
from test_shared_prompt import BATCHES, CONFIGS, MAX_LENGTH, loss_and_gradients, make_model

from acceleration.layout import Layout
from acceleration.packed_attention import use_packed_attention
from acceleration.prefix_sharing import packed_rows
from acceleration.response_head import response_logps
from benchmarks.architectures import check_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
BATCH = BATCHES["ordinary"]


def on_gpu(architecture: str, dtype: torch.dtype) -> torch.nn.Module:
    return make_model(copy.deepcopy(CONFIGS[architecture]), torch.float32).to("cuda", dtype)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama", "qwen3"])
def test_kernel_and_attention_by_segment_on_the_cpu_give_equal_gradients(architecture, shared):
    gpu, cpu = on_gpu(architecture, torch.bfloat16), make_model(copy.deepcopy(CONFIGS[architecture]), torch.float32)
    for model in (gpu, cpu):
        use_packed_attention(model)
    ours = loss_and_gradients(gpu, response_logps(gpu, packed_rows(BATCH, shared)), "sft")
    expected = loss_and_gradients(cpu, response_logps(cpu, packed_rows(BATCH, shared)), "sft")
    scale = max(value.norm() for name, value in expected.items() if name not in ("loss", "logps"))
    for name, value in expected.items():
        assert (ours[name].cpu().float() - value).norm() < 0.05 * max(scale, 1), name


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "qwen3"])
def test_rows_are_packed_if_the_kernel_supports_the_dtype(architecture):
    for dtype, is_packed in ((torch.bfloat16, True), (torch.float32, False)):
        layout, message = check_model(on_gpu(architecture, dtype), BATCH, MAX_LENGTH, padding_free="auto")
        assert layout == Layout(shares_prompts=True, is_packed=is_packed), message


@pytest.mark.parametrize("trainer", ["BasicTrainer", "FSDPTrainer"])
def test_run_on_a_gpu_starts_at_ln_2_and_learns(trainer, launcher, tmp_path):
    overrides = [
        "model=tiny", "loss=dpo", f"dataset_paths.hh={ORACLE}/hh", "max_length=128", "max_prompt_length=64",
        "batch_size=8", "n_examples=24", "n_eval_examples=6", "eval_batch_size=4", "eval_every=16", "lr=1e-3",
        "warmup_steps=0", "sample_during_eval=false", "model.policy_mp=bfloat16", f"trainer={trainer}",
        f"local_run_dir={tmp_path}/run",
    ]  # fmt: skip
    assert launcher.run(*overrides) == 0, launcher.output
    assert "rows have no padding" in launcher.output.lower()
    losses = [line["loss/train"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if line["split"] == "train"]
    assert losses[0] == pytest.approx(0.6931, abs=0.01)
    assert losses[-1] < losses[0]
