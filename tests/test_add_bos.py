"""`add_bos`: every prompt begins with the beginning-of-sequence token, which counts towards the maximum lengths."""

from pathlib import Path

import pytest
import torch
from conftest import ORACLE, mark_exhaustive_except, read_jsonl
from test_cli import SHORT, assert_refused
from transformers import AutoModelForCausalLM, AutoTokenizer

from acceleration.prefix_sharing import padded_rows, shared_rows
from acceleration.reference_cache import pair_keys
from acceleration.response_head import response_logps
from data.tokenization import get_collate_fn, tokenize_batch, tokenize_batch_element
from evaluation import sampling
from log_probabilities import _get_batch_logps, concatenated_inputs
from preference_datasets import DATASETS, Dataset

BOS, EOS = 7, 2
SAMPLED = ["n_eval_examples=8", "n_eval_model_samples=8"]


class Words:
    """A tokenizer whose texts are lists of token ids."""

    bos_token_id, eos_token_id, pad_token_id = BOS, EOS, 0

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def tokenize(prompt: str, chosen: str, rejected: str, mode: str, max_length: int, max_prompt_length: int):
    element = tokenize_batch_element(
        prompt, chosen, rejected, mode, Words(), max_length, max_prompt_length, add_bos=True
    )
    for side in ("chosen", "rejected"):
        n_prompt = len(element["prompt_input_ids"])
        assert element[f"{side}_input_ids"][:n_prompt] == element["prompt_input_ids"]
        assert element[f"{side}_labels"] == [-100] * n_prompt + element[f"{side}_input_ids"][n_prompt:]
        assert len(element[f"{side}_input_ids"]) <= max_length
        assert element[f"{side}_attention_mask"] == [1] * len(element[f"{side}_input_ids"])
    assert element["prompt_attention_mask"] == [1] * n_prompt
    return element["prompt_input_ids"], element["chosen_input_ids"][n_prompt:]


@pytest.mark.parametrize(
    ("prompt", "chosen", "mode", "lengths", "expected_prompt", "expected_response"),
    [
        ("10 11", "20", "keep_end", (5, 3), [BOS, 10, 11], [20, EOS]),  # just fits
        ("10 11 12", "20", "keep_end", (5, 3), [BOS, 11, 12], [20, EOS]),  # with the BOS, one token too long
        ("10 11 12", "20", "keep_start", (5, 3), [BOS, 10, 11], [20, EOS]),
        ("10 11 12", "20 21 22", "keep_end", (5, 3), [BOS, 11, 12], [20, 21]),  # both are cut
        ("10 11 12", "20", "keep_end", (4, 1), [BOS], [20, EOS]),  # the prompt is cut away
        ("10 11 12", "20", "keep_start", (4, 1), [BOS], [20, EOS]),
        ("10", "20 21 22 23", "keep_end", (5, 3), [BOS, 10], [20, 21]),  # a short prompt stays whole
        ("", "20", "keep_end", (5, 3), [BOS], [20, EOS]),
    ],
)
def test_max_lengths_include_the_bos_token(prompt, chosen, mode, lengths, expected_prompt, expected_response):
    assert tokenize(prompt, chosen, "30", mode, *lengths) == (expected_prompt, expected_response)


def test_prompts_get_no_bos_token_without_add_bos():
    (element,) = tokenize_batch([("10", "20", "30", "keep_end")], Words(), 5, 3)
    assert element["prompt_input_ids"] == [10]


@pytest.mark.parametrize("add_bos", [False, True])
def test_padded_and_shared_rows_give_the_plain_log_probabilities_with_and_without_bos(add_bos):
    texts = [("", "20 21", "30"), ("10 11", "20", "30 31 32"), ("10", "20 21 22", "33")]
    elements = tokenize_batch([(*text, "keep_end") for text in texts], Words(), 12, 6, add_bos)
    batch = get_collate_fn(Words())(elements)
    model = AutoModelForCausalLM.from_pretrained(ORACLE / "model").double().eval()
    inputs = concatenated_inputs(batch)
    with torch.no_grad():
        logits = model(inputs["concatenated_input_ids"], attention_mask=inputs["concatenated_attention_mask"]).logits
        expected = _get_batch_logps(logits, inputs["concatenated_labels"])
        for make_rows in (padded_rows, shared_rows):
            rows = make_rows(batch)
            torch.testing.assert_close(response_logps(model, rows, False), expected)
            counts = torch.bincount(rows.sequences).tolist()
            assert counts == [3 - (not add_bos), 2, 4, 2 - (not add_bos), 4, 2]


def test_cache_keys_differ_with_and_without_bos():
    keys = {}
    for add_bos in (False, True):
        elements = tokenize_batch([("10", "20", "30", "keep_end")], Words(), 12, 6, add_bos)
        keys[add_bos] = pair_keys(get_collate_fn(Words())(elements))
    assert keys[False] != keys[True]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_every_prompt_and_sample_begins_with_bos(loss, make_trainer):
    trainer = make_trainer(*SHORT, f"loss={loss}", "add_bos=true")
    bos = trainer.tokenizer.bos_token_id
    for batch in (next(iter(trainer.train_iterator)), trainer.eval_batches[0]):
        assert (batch["chosen_input_ids"][:, 0] == bos).all()
        assert (batch["chosen_labels"][:, 0] == -100).all()
        firsts = batch["prompt_attention_mask"].argmax(1, keepdim=True)
        assert (batch["prompt_input_ids"].gather(1, firsts) == bos).all()
    metrics = trainer.train_step(next(iter(trainer.train_iterator)))
    assert metrics["loss/train"] > 0
    (sample, *_), _ = sampling.sample_evaluation(trainer)
    assert sample["sample"].startswith(sample["prompt"])


@pytest.mark.slow
def test_tokenizer_without_bos_is_refused(train, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ORACLE / "model")
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    overrides = [f"model.tokenizer_name_or_path={tmp_path}/tokenizer", "add_bos=true"]
    assert_refused(train(*SHORT, *overrides), tmp_path, "add_bos=true", "has no beginning-of-sequence token")


@pytest.mark.slow
@pytest.mark.parametrize("loss", mark_exhaustive_except(["sft", "dpo"], "sft"))
def test_empty_prompts_without_bos_are_warned_about(loss, make_trainer, monkeypatch, capsys):
    entries = [(prompt, {"responses": [" a b", " c"], "pairs": [(0, 1)], "sft_target": " a"}) for prompt in ("", "Q")]
    monkeypatch.setitem(DATASETS, "own", Dataset(lambda split, silent=False, cache_dir=None: entries * 4))
    texts = {}
    for add_bos in (False, True):
        trainer = make_trainer(
            *SHORT, f"loss={loss}", "datasets=[own]", f"add_bos={add_bos}", "eval_batch_size=2", *SAMPLED
        )
        trainer.train()
        assert ("8 prompts are empty" in capsys.readouterr().out) != add_bos
        samples = read_jsonl(Path(trainer.run_dir) / "samples.jsonl")
        assert {sample["prompt"] for sample in samples} == {"", "Q"}
        texts[add_bos] = [sample["sample"] for sample in samples if sample["prompt"] == ""]
    assert set(texts[False]) == {""}
    assert "" not in texts[True]
