"""Commands in docs/evaluation.md that load a checkpoint elsewhere, or train a reward model, run as written."""

import json
import re
import shutil
import textwrap

import pytest
import torch
from conftest import ORACLE, REPOSITORY, read_jsonl
from huggingface_hub import ModelCard
from test_evaluate import trained  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM

from checkpointing.atomic_directory import CARD

NOT_RUN = ("vllm serve", "hf upload")  # they need a GPU, or an account


def blocks(heading: str) -> list[str]:
    """Return the indented blocks of a section of docs/evaluation.md."""
    text = (REPOSITORY / "docs/evaluation.md").read_text()
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [
        textwrap.dedent(block).strip("\n")
        for block in re.findall(r"^    .*\n(?:(?:    .*)?\n)*", section, re.MULTILINE)
    ]


def test_documented_lines_merge_load_and_shrink_an_adapter(trained, launcher, tmp_path):  # noqa: F811
    merge, use, elsewhere = blocks("Use a checkpoint elsewhere")
    _, script, *words = merge.replace("RUN", str(trained("lora"))).split()
    assert launcher.run(*words, script=REPOSITORY / script, directory=tmp_path, as_typed=True) == 0, launcher.output
    (tmp_path / "use.py").write_text(use)
    assert launcher.run(script=tmp_path / "use.py", directory=tmp_path, as_typed=True) == 0, launcher.output
    assert "Human: Hello!" in launcher.output
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert smaller.dtype == torch.bfloat16 and merged.dtype == torch.float32
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("smaller", "merged")]
    assert sizes[0] < 0.6 * sizes[1]
    assert ModelCard.load(tmp_path / "merged" / CARD).data.to_dict()["library_name"] == "transformers"
    assert all(line.startswith(NOT_RUN) for line in elsewhere.splitlines())


@pytest.mark.exhaustive
def test_documented_lines_train_a_reward_model_that_scores_responses(trained, launcher, tmp_path):  # noqa: F811
    (training,) = [
        block for block in blocks("An end-to-end example on real preferences") if block.startswith("import ")
    ]
    shutil.copytree(trained("sft") / "LATEST", tmp_path / "sft/LATEST")
    (tmp_path / "training.py").write_text(training.replace("PATH", f"{ORACLE}/hh"))
    assert launcher.run(script=tmp_path / "training.py", directory=tmp_path, as_typed=True) == 0, launcher.output
    lines = [{"prompt_index": i, "sample": 0, "prompt": "p", "response": text} for i, text in enumerate(("x", "y y"))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [f"a={tmp_path}/a.jsonl", f"output={tmp_path}/v.jsonl", "judge=model", f"judge_model={tmp_path}/reward"]
    assert launcher.run(*words, script=REPOSITORY / "judge.py", of_training=False) == 0, launcher.output
    scores = [line["scores"] for line in read_jsonl(tmp_path / "v.jsonl")]
    assert len(scores) == 2 and scores[0] != scores[1]
