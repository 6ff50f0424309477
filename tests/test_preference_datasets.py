import hashlib
import json

import pytest
import torch
from conftest import ORACLE, figures
from transformers import AutoTokenizer

from log_probabilities import concatenated_inputs
from preference_datasets import (
    DATASETS,
    Dataset,
    get_batch_iterator,
    get_dataset,
    get_hh,
    get_se,
    strip_html_tags,
    tokenize_batch_element,
)
from utils import UserError

RECORDED = figures("batches")
RUNS = [name for name in RECORDED if name != "elements"]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(ORACLE / "model")
    tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


@pytest.fixture
def paths():
    return {"hh": str(ORACLE / "hh"), "shp": str(ORACLE / "shp")}


def write_rows(directory, rows: list[dict], split: str = "train") -> str:
    directory.mkdir(exist_ok=True)
    (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(directory)


def as_lists(batch: dict) -> dict:
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


@pytest.mark.parametrize("name", RUNS)
def test_every_batch_equals_the_original(name, tokenizer, paths, tmp_path):
    recorded = dict(RECORDED[name])
    digests, first = recorded.pop("digests"), recorded.pop("first")
    batches = list(
        get_batch_iterator(recorded.pop("datasets"), tokenizer, cache_dir=str(tmp_path), paths=paths, **recorded)
    )
    assert [as_lists(batch) for batch in batches[: len(first)]] == first
    ours = [hashlib.sha256(json.dumps(as_lists(batch), sort_keys=True).encode()).hexdigest() for batch in batches]
    assert ours == digests


@pytest.mark.parametrize("index", range(len(RECORDED["elements"])))
def test_tokenized_element_equals_the_original(index, tokenizer):
    entry = RECORDED["elements"][index]
    element = tokenize_batch_element(
        entry["prompt"], entry["chosen"], entry["rejected"], entry["truncation_mode"], tokenizer, 128, 64
    )
    assert element == entry["element"]


def test_truncated_response_has_no_eos_and_prompt_keeps_its_last_tokens(tokenizer):
    prompt, response = "a b c d e f g h", " x y z" * 10
    n_prompt = len(tokenizer(prompt)["input_ids"])
    element = tokenize_batch_element(prompt, response, response, "keep_end", tokenizer, 12, 4)
    assert n_prompt > 4
    assert element["prompt_input_ids"] == tokenizer(prompt)["input_ids"][-4:]
    assert len(element["chosen_input_ids"]) == 12
    assert tokenizer.eos_token_id not in element["chosen_input_ids"]
    assert element["chosen_labels"][:4] == [-100] * 4


def test_concatenated_inputs_has_chosen_rows_before_rejected_ones_padded_to_one_length():
    batch = {}
    for side, ids in (("chosen", [[5, 6]]), ("rejected", [[7, 8, 9]])):
        for kind in ("input_ids", "attention_mask", "labels"):
            batch[f"{side}_{kind}"] = torch.tensor([[1] * len(ids[0])] if kind == "attention_mask" else ids)
    stacked = as_lists(concatenated_inputs(batch))
    assert stacked == {
        "concatenated_input_ids": [[5, 6, 0], [7, 8, 9]],
        "concatenated_attention_mask": [[1, 1, 0], [1, 1, 1]],
        "concatenated_labels": [[5, 6, -100], [7, 8, 9]],
    }


def iterate(tokenizer, paths, **kwargs):
    return get_batch_iterator(
        ["hh"], tokenizer, paths=paths, silent=True, max_length=128, max_prompt_length=64, **kwargs
    )


@pytest.mark.parametrize(
    ("kwargs", "sizes"),
    [
        ({"n_epochs": 1, "batch_size": 100}, [100, 100]),  # 240 pairs: 40 fill no whole batch
        ({"n_examples": 250, "batch_size": 100}, [100, 100, 100]),  # rounded up, into a second epoch
        ({"n_epochs": 1, "n_examples": 150, "batch_size": 100}, [100, 100]),
        ({"n_examples": 150, "batch_size": 100, "drop_last": False}, [100, 50]),
        ({"n_examples": 240, "batch_size": 100, "drop_last": False}, [100, 100, 40]),
        ({"n_examples": 350, "batch_size": 100, "drop_last": False}, [100, 100, 40]),  # no pair is repeated
        ({"n_examples": 999, "batch_size": 500, "drop_last": False}, [240]),
    ],
)
def test_batches_have_the_expected_number_and_sizes(kwargs, sizes, tokenizer, paths):
    batches = iterate(tokenizer, paths, **kwargs)
    assert [len(batch["prompt"]) for batch in batches] == sizes
    assert (batches.n_batches, batches.n_examples) == (len(sizes), sum(sizes))


def test_skipped_batches_are_not_tokenized_and_those_after_them_are_the_same(tokenizer, paths, monkeypatch):
    batches = iterate(tokenizer, paths, n_epochs=2, batch_size=100)
    expected = [as_lists(batch) for batch in batches]
    tokenized, tokenize = [], batches._tokenize
    monkeypatch.setattr(batches, "_tokenize", lambda examples: tokenized.append(len(examples)) or tokenize(examples))
    for skip in range(5):
        tokenized.clear()
        assert [as_lists(batch) for batch in batches.batches(skip)] == expected[skip:]
        assert len(tokenized) == 4 - skip


@pytest.mark.parametrize(("count", "size_of_last"), [(2, 3), (4, 2)])
def test_shards_make_up_the_batch_and_each_worker_tokenizes_only_its_own(
    count, size_of_last, tokenizer, paths, monkeypatch
):
    kwargs = {"n_examples": 21, "batch_size": 8, "drop_last": False}
    full = list(iterate(tokenizer, paths, **kwargs))
    shards = [iterate(tokenizer, paths, **kwargs, shard=(index, count)) for index in range(count)]
    tokenized, tokenize = [], shards[0]._tokenize
    monkeypatch.setattr(shards[0], "_tokenize", lambda examples: tokenized.append(len(examples)) or tokenize(examples))
    batches = [list(shard) for shard in shards]
    assert tokenized == [8 // count, 8 // count, size_of_last]  # the last batch's 5 examples are rounded up per worker
    for number, batch in enumerate(full):
        indices = [index for shard in shards for index in shard.indices(number)]
        responses = [text for of_shard in batches for text in of_shard[number]["chosen_response_only"]]
        n = len(batch["prompt"])
        assert indices[:n] == list(range(8 * number, 8 * number + n)) and set(indices[n:]) <= {None}
        assert responses[:n] == batch["chosen_response_only"] and set(responses[n:]) <= {responses[n - 1]}


def test_epoch_in_one_pass_holds_every_example_once(tokenizer, paths):
    batches = list(iterate(tokenizer, paths, n_examples=240, batch_size=7, drop_last=False))
    seen = sorted((c, r) for batch in batches for c, r in zip(batch["chosen"], batch["rejected"], strict=True))
    rows = [json.loads(line) for line in (ORACLE / "hh/train.jsonl").read_text().splitlines()]
    assert seen == sorted((row["chosen"], row["rejected"]) for row in rows)


def test_less_than_one_batch_is_an_error(tokenizer, paths):
    with pytest.raises(UserError, match="240 examples, fewer than one batch of 300"):
        iterate(tokenizer, paths, n_epochs=1, batch_size=300)


def test_text_with_the_end_token_is_an_error_with_its_row(tokenizer, tmp_path):
    good = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    bad = {**good, "rejected": "\n\nHuman: a\n\nAssistant: c <|endoftext|> d"}
    path = write_rows(tmp_path / "hh", [good, good, bad])
    with pytest.raises(UserError, match=r"datasets=\[hh\], train split, row 2: .*<\|endoftext\|>"):
        iterate(tokenizer, {"hh": path}, n_epochs=1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"chosen": "x"}], r"datasets=\[hh\], train split, row 0: no field 'rejected'"),
        ([{"chosen": "\n\nAssistant: x", "rejected": "\n\nAssistant: y"}, {"chosen": None, "rejected": "y"}],
         r"train split, row 1: field 'chosen' is empty"),
        ([{"chosen": "no turn", "rejected": "y"}], r"train split, row 0: chosen: the transcript has no"),
    ],
)  # fmt: skip
def test_rows_without_the_expected_fields_are_named(rows, message, tmp_path):
    with pytest.raises(UserError, match=message):
        get_dataset("hh", "train", silent=True, path=write_rows(tmp_path / "hh", rows))


def test_error_for_a_missing_dataset_says_how_to_give_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"dataset_paths\.hh=DIR"):
        get_dataset("hh", "train", path=str(tmp_path / "nowhere"))


def test_new_dataset_needs_only_a_function_and_an_entry(monkeypatch, tokenizer):
    def get_xyz(split, silent=False, cache_dir=None):
        return {"Q:": {"responses": [" a", " b", " c"], "pairs": [(0, 1), (2, 1)], "sft_target": " d"}}

    monkeypatch.setitem(DATASETS, "xyz", Dataset(get_xyz))
    (batch,) = get_batch_iterator(["xyz"], tokenizer, batch_size=2, n_epochs=1, silent=True)
    assert batch["chosen"] == ["Q: a", "Q: c"]
    (batch,) = get_batch_iterator(["xyz"], tokenizer, batch_size=1, n_epochs=1, sft_mode=True, silent=True)
    assert batch["chosen_response_only"] == [" d"]


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
def test_dataset_entry_sets_truncation_and_path(mode, monkeypatch, tokenizer, tmp_path):
    def get_xyz(split, silent=False, cache_dir=None, path=None):
        prompt = (tmp_path / path / "prompt.txt").read_text()
        return {prompt: {"responses": [" a", " b"], "pairs": [(0, 1)], "sft_target": " a"}}

    (tmp_path / "prompt.txt").write_text("first " * 30 + "last " * 30)
    entry = Dataset(get_xyz) if mode == "keep_end" else Dataset(get_xyz, truncation_mode=mode)  # keep_end by default
    monkeypatch.setitem(DATASETS, "xyz", entry)
    (batch,) = get_batch_iterator(
        ["xyz"], tokenizer, n_epochs=1, silent=True, paths={"xyz": str(tmp_path)}, max_length=20, max_prompt_length=10
    )
    kept = tokenizer.decode(batch["prompt_input_ids"][0])
    assert batch["prompt_input_ids"].shape == (1, 10)
    assert ("last" in kept, "first" in kept) == (mode == "keep_end", mode == "keep_start")


def test_path_for_an_added_dataset_is_taken_from_the_command_line(make_trainer, monkeypatch, tmp_path):
    path = write_rows(tmp_path / "own", [{"chosen": "\n\nAssistant: x", "rejected": "\n\nAssistant: y"}] * 8)
    monkeypatch.setitem(DATASETS, "own", Dataset(get_hh))
    (tmp_path / "own/test.jsonl").write_text((tmp_path / "own/train.jsonl").read_text())
    overrides = [
        "model=tiny",
        "datasets=[own]",
        "max_length=64",
        "max_prompt_length=32",
        "batch_size=1",
        "eval_every=1",
    ]
    assert make_trainer(*overrides, f"dataset_paths.own={path}").train_iterator.epoch_size == 1
    with pytest.raises(UserError, match=r"dataset_paths.onw: no such dataset. Did you mean own\?"):
        make_trainer(*overrides, f"dataset_paths.onw={path}")
    with pytest.raises(UserError, match=r"dataset_paths.toy: this dataset is made in code"):
        make_trainer(*overrides, f"dataset_paths.toy={path}")


def shp_row(**changes) -> dict:
    row = {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "score_A": 4, "score_B": 2, "labels": 1}
    return {**row, **changes}


def test_shp_keeps_clear_preferences_and_the_best_response_is_the_sft_target(tmp_path):
    rows = [shp_row(), shp_row(score_A=3), shp_row(human_ref_A="c", human_ref_B="d", score_A=1, score_B=9, labels=0)]
    data = get_dataset("shp", "train", silent=True, path=write_rows(tmp_path / "shp", rows))
    assert data["\n\nHuman: q\n\nAssistant:"] == {
        "responses": [" a", " b", " c", " d"],
        "pairs": [(0, 1), (3, 2)],
        "sft_target": " d",
        "rows": [0, 2],
    }


def se_rows(n: int) -> list[dict]:
    answers = [{"text": "<p>low</p>", "pm_score": 1}, {"text": "<p>high</p>", "pm_score": 3}]
    answers.append({"text": "<p>low too</p>", "pm_score": 1})
    return [{"question": f"<p>q{i}</p>", "answers": answers} for i in range(n)]


def test_se_pairs_answers_with_different_scores_and_splits_off_a_hundredth(tmp_path):
    path = write_rows(tmp_path / "se", se_rows(200))
    train, test = (get_se(split, silent=True, cache_dir=str(tmp_path), path=path) for split in ("train", "test"))
    assert (len(train), len(test)) == (198, 2)
    assert not train.keys() & test.keys()
    entry = next(iter(test.values()))
    assert entry["responses"] == [" low", " high", " low too"]
    assert entry["pairs"] == [(1, 0), (1, 2)]  # the two answers with score 1 are no preference
    assert entry["sft_target"] == " high"


@pytest.mark.parametrize("answers", [[{"pm_score": 1}], ["a", "b"], [{"text": None, "pm_score": 1}], [{"text": "a"}]])
def test_malformed_se_answer_is_an_error_with_its_row(answers, tmp_path):
    rows = se_rows(20)
    path = write_rows(tmp_path / "se", [{**row, "answers": answers} for row in rows[:1]])
    with pytest.raises(UserError, match=r"datasets=\[se\], row 0: an answer has no 'text' or no number as 'pm_score'"):
        get_se("train", silent=True, cache_dir=str(tmp_path), path=path)
    bad = [{"text": "<p>x</p>", "pm_score": 1}, {"text": None, "pm_score": 2}]
    path = write_rows(tmp_path / "se_17", [{**row, "answers": bad} if i == 17 else row for i, row in enumerate(rows)])
    with pytest.raises(UserError, match=r"datasets=\[se\], row 17: "):
        get_se("train", silent=True, cache_dir=str(tmp_path), path=path)


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>one</p>\n<p>two</p>", "one\n\ntwo"),
        ("<p>an <em>inline</em> tag and <code>code</code></p>", "an inline tag and <code>code</code>"),
        ("<pre><code>x = 1\n</code></pre>", "<code>x = 1\n</code>"),
        ("<p>list:</p><ul><li>a</li><li><b>b</b></li></ul>", "list:\n\na\nb"),
        ("<blockquote><p>quoted</p></blockquote><p>said</p>", "quoted\n\nsaid"),
        ("<h1>Title</h1><!-- no --><p>a<br>b</p>bare", "Title\n\na\nb\n\nbare"),
    ],
)
def test_strip_html_tags_keeps_all_text_and_code_tags(html, text):
    assert strip_html_tags(html) == text
