"""The README.md of checkpoints, read back with the hub's own library."""

import json
import os
import shutil

import pytest
from conftest import ORACLE, trainers_in
from huggingface_hub import ModelCard
from omegaconf import OmegaConf
from test_checkpoints import trained

import export
from checkpointing.integrity import find_corruption
from checkpointing.model_card import is_hub_id, write_card
from checkpointing.train_state import read_state_json

LORA = ["loss=dpo", "lora={r:2}", "model=blank_model", f"model.name_or_path={ORACLE}/model"]


def front_matter(path) -> dict:
    return ModelCard.load(path / "README.md").data.to_dict()


def test_card_of_a_whole_model_describes_run_and_metrics(make_trainer):
    _, run_dir = trained(make_trainer, "loss=dpo", "loss.beta=0.3", "eval_every=8")
    expected = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["dpo"]}
    assert front_matter(run_dir / "LATEST") == expected  # neither model nor data are from the hub
    text = ModelCard.load(run_dir / "LATEST/README.md").text
    state = read_state_json(run_dir / "LATEST")
    for words in (
        "trained with `dpo` from weights drawn at random", "8 examples, 2 optimizer steps.", "- `loss.beta`: 0.3",
        "- `optimizer`: RMSprop", "- `lr`: 0.001", "- `batch_size`: 4", "- `trainer`: BasicTrainer",
        "| toy | made in code |", "- `reference`: ", "On 8 evaluation examples, after 8 training examples",
        f"| loss | {state['metrics']['loss/eval']:.4f} |", f"transformers {state['versions']['transformers']}",
        "from transformers import AutoModelForCausalLM", "title={Direct Preference Optimization",
    ):  # fmt: skip
        assert words in text, words


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory):
    """Train an adapter, for tests that only read the run; return its trainer and its directory."""
    return trained(trainers_in(tmp_path_factory.mktemp("adapter")), *LORA)


def test_adapter_and_merged_model_have_our_card_instead_of_the_template_of_peft(adapter_run, tmp_path):
    _, run_dir = adapter_run
    matter = front_matter(run_dir / "LATEST")
    assert (matter["library_name"], matter["tags"]) == ("peft", ["dpo", "lora"])
    assert "base_model" not in matter  # a local folder
    text = (run_dir / "LATEST/README.md").read_text()
    assert "[More Information Needed]" not in text
    assert "- `lora.r`: 2" in text and "AutoPeftModelForCausalLM" in text and f"from `{ORACLE}/model`" in text
    export.run(OmegaConf.create({"run": str(run_dir), "checkpoint": "LATEST", "output": f"{tmp_path}/merged/"}))
    assert front_matter(tmp_path / "merged")["library_name"] == "transformers"
    merged = (tmp_path / "merged/README.md").read_text()
    assert "from transformers import AutoModelForCausalLM" in merged and "- `lora.r`: 2" in merged
    assert str(run_dir) not in text + merged


def test_card_mentions_a_moving_reference(adapter_run, tmp_path):
    trainer, run_dir = adapter_run
    config, state = trainer.config.copy(), json.loads((run_dir / "LATEST/state.json").read_text())
    config.reference_update_every, config.reference_update_alpha = 2, 0.5
    write_card(str(tmp_path), config, state, is_adapter=False)
    text = (tmp_path / "README.md").read_text()
    assert "- `reference_update_every`: 2\n- `reference_update_alpha`: 0.5" in text


def test_card_of_sft_mentions_no_reference(make_trainer):
    _, run_dir = trained(make_trainer)
    assert "- `reference" not in (run_dir / "LATEST/README.md").read_text()


def test_card_counts_all_evaluation_examples(make_trainer):
    trainer, run_dir = trained(make_trainer, "n_eval_examples=null", "eval_every=8", "do_first_eval=false")
    assert trainer.eval_iterator.n_examples > 8
    assert f"On {trainer.eval_iterator.n_examples} evaluation examples" in (run_dir / "LATEST/README.md").read_text()


def test_card_front_matter_names_hub_models_and_datasets(adapter_run, tmp_path):
    trainer, run_dir = adapter_run
    config, state = trainer.config.copy(), json.loads((run_dir / "LATEST/state.json").read_text())
    config.model.name_or_path = "EleutherAI/pythia-2.8b"
    config.datasets = ["hh", {"name": "org/prefs:default"}, "p.jsonl"]
    state["inputs"]["model.name_or_path"] = "a" * 40
    write_card(str(tmp_path), config, state, is_adapter=True)
    matter = front_matter(tmp_path)
    assert (matter["base_model"], matter["base_model_relation"]) == ("EleutherAI/pythia-2.8b", "adapter")
    assert matter["datasets"] == ["Anthropic/hh-rlhf", "org/prefs"]
    assert f"(revision `{'a' * 40}`)" in (tmp_path / "README.md").read_text()
    config.dataset_paths.hh, config.model.archive = "/data/hh", "/sft/policy.pt"
    write_card(str(tmp_path), config, state, is_adapter=True)
    assert front_matter(tmp_path)["datasets"] == ["org/prefs"]
    assert "which PEFT would load, but those of `/sft/policy.pt`" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", ["/abs/path", "a/b/c", "./x", "~/x", "", None])
def test_paths_are_not_taken_for_hub_ids(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id(name)
    assert is_hub_id("owner/name") and is_hub_id("gpt2-xl")
    os.makedirs("owner/name")
    assert not is_hub_id("owner/name")


def test_edited_card_is_not_corruption(adapter_run, tmp_path):
    run_dir = shutil.copytree(adapter_run[1], tmp_path / "run", symlinks=True)
    with open(run_dir / "LATEST/README.md", "a") as file:
        file.write("License: mine\n")
    assert find_corruption(str(run_dir / "LATEST")) is None
