"""The lines of docs/evaluation.md on using a checkpoint elsewhere, as they stand there."""

import re
import textwrap

import torch
from conftest import REPOSITORY
from huggingface_hub import ModelCard
from test_evaluate import trained  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM

NOT_RUN = ("vllm serve", "hf upload")  # they need a GPU, or an account


def blocks(heading: str) -> list[str]:
    """The indented blocks of a section of docs/evaluation.md."""
    text = (REPOSITORY / "docs/evaluation.md").read_text()
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n)+", section, re.MULTILINE)]


def test_an_adapter_is_merged_loaded_and_written_smaller(trained, run_python, tmp_path):  # noqa: F811
    merge, use, elsewhere = blocks("Use a checkpoint elsewhere")
    words = merge.replace("RUN", str(trained("lora"))).split()
    result = run_python(*words[1:], env={"PYTHONPATH": str(REPOSITORY)})
    assert result.returncode == 0, result.stderr
    result = run_python("-c", use)
    assert result.returncode == 0, result.stderr
    assert "Human: Hello!" in result.stdout
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert smaller.dtype == torch.bfloat16 and merged.dtype == torch.float32
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("smaller", "merged")]
    assert sizes[0] < 0.6 * sizes[1]
    assert ModelCard.load(tmp_path / "merged/README.md").data.library_name == "transformers"
    assert all(line.startswith(NOT_RUN) for line in elsewhere.splitlines())
