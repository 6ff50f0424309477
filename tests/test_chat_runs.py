"""Runs on conversations: samples show responses, and saved models end turns as in training."""

import json

import pytest
import torch
import transformers
from chat_templates import CHATML
from conftest import REPOSITORY, mark_exhaustive_except, read_jsonl
from test_trained_turns import IM, make_tokenizer, message


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """Write data, a template, and a model whose tokenizer has tokens for turns but no template; return the folder."""
    directory = tmp_path_factory.mktemp("chat")
    tokenizer = make_tokenizer(CHATML, IM, None, "<|endoftext|>")
    tokenizer.chat_template = None
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    (directory / "chatml.jinja").write_text(CHATML)
    rows = [
        {"prompt": [message("user", f"Colour {n}?")], "chosen": [message("assistant", f"Red {n}.")],
         "rejected": [message("assistant", "No."), message("user", "Why?"), message("assistant", f"{n} reasons.")]}
        for n in range(6)
    ]  # fmt: skip
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("lora", mark_exhaustive_except([False, True], True), ids=["all weights", "lora"])
def test_chat_run_saves_template_and_end_tokens_and_shows_responses(lora, chat_model, launcher, tmp_path):
    overrides = [
        "model=blank_model", f"model.name_or_path={chat_model}/model", f"chat_template={chat_model}/chatml.jinja",
        f"datasets=[{chat_model}/rows.jsonl]", "loss=dpo", "test_fraction=0.4", "batch_size=1", "eval_batch_size=2",
        "n_eval_examples=null", "n_eval_model_samples=2", "max_length=64", "max_prompt_length=32", "warmup_steps=0",
        "do_first_eval=false", f"local_run_dir={tmp_path}/run", *(["lora={r: 2}"] if lora else []),
    ]  # fmt: skip
    assert launcher.run(*overrides) == 0, launcher.output
    printed = launcher.output
    folder = tmp_path / "run" / "LATEST"
    if lora:
        export = [f"run={tmp_path}/run", f"output={tmp_path}/merged"]
        assert launcher.run(*export, script=REPOSITORY / "export.py", as_typed=True) == 0, launcher.output
        assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == CHATML
        folder = tmp_path / "merged"

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == CHATML
    ends = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    assert ends == sorted(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert {sample["model"] for sample in samples} == {"policy", "reference"}
    for sample in samples:
        assert sample["prompt"].endswith("<|im_start|>assistant\n") and sample["response"]
        assert sample["sample"] == sample["prompt"] + sample["response"]
        assert "Colour" not in sample["response"] and "<|im_" not in sample["response"]
    assert samples[0]["response"].split()[0] in printed.split("Samples:")[1]  # the table of samples

    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": [message("user", "Colour?")]}) + "\n")
    words = [
        f"run={tmp_path}/run",
        f"prompts={tmp_path}/prompts.jsonl",
        f"output={tmp_path}/o.jsonl",
        "max_new_tokens=5",
    ]
    assert launcher.run(*words, script=REPOSITORY / "sample.py") == 0, launcher.output
    (line,) = read_jsonl(tmp_path / "o.jsonl")
    assert line["prompt"] == [message("user", "Colour?")] and line["response"] and "<|im_" not in line["response"]
