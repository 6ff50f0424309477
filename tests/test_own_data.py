"""Training on files and folders: which rows are read, in which order, and how long ones are truncated."""

import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ORACLE, REPOSITORY, read_jsonl
from test_cli import assert_refused
from test_formats import jsonl
from transformers import AutoTokenizer

from data.choice import Choice, Settings
from preference_datasets import get_batch_iterator
from utils import UserError

RUN = [
    "model=blank_model", f"model.name_or_path={ORACLE}/model", "model.reference_dtype=float32", "loss=dpo",
    "batch_size=4", "n_eval_examples=4", "eval_batch_size=4", "max_length=64", "max_prompt_length=32", "lr=1e-3",
    "warmup_steps=0", "sample_during_eval=false", "eval_every=4",
]  # fmt: skip


def pairs(*names: str, n_words: int = 1) -> list[dict]:
    return [{"prompt": f"{name}?", "chosen": f" {name} yes" * n_words, "rejected": " no" * n_words} for name in names]


def numbered(n: int, start: int = 0) -> list[dict]:
    return pairs(*(f"Question {i}" for i in range(start, start + n)))


def write(path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jsonl(rows))
    return str(path)


@pytest.fixture
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(ORACLE / "model")
    tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


@pytest.fixture
def read(tokenizer, tmp_path):
    """Return a function that returns the prompts of a split's batches, in order."""

    def prompts(*datasets: str | Choice, split: str = "train", settings: dict | None = None, **kwargs) -> list[str]:
        kwargs = {"n_epochs": 1, "drop_last": False, "silent": True, "cache_dir": str(tmp_path / "cache")} | kwargs
        tokenizer_ = kwargs.pop("tokenizer", tokenizer)
        batches = get_batch_iterator(datasets, tokenizer_, split, settings=Settings(**(settings or {})), **kwargs)
        return [prompt for batch in batches for prompt in batch["prompt"]]

    return prompts


# ---- splits ---------------------------------------------------------------------------------------------------------


def test_held_out_prompts_are_never_trained_on_even_when_the_file_grows(read, tmp_path):
    rows = numbered(400) + [row | {"chosen": "another"} for row in numbered(400)]  # each prompt twice
    random.Random(0).shuffle(rows)
    path = write(tmp_path / "rows.jsonl", rows)
    train, test = read(path), read(path, split="test")
    assert set(train) | set(test) == {row["prompt"] for row in rows} and not set(train) & set(test)
    assert len(train) + len(test) == 800
    assert 20 <= len(test) <= 60  # 40 expected, with a standard deviation of 9
    assert len(read(path, split="test", settings={"test_fraction": 0.5})) > 300

    write(tmp_path / "rows.jsonl", numbered(400, start=400) + rows[::-1])
    grown_train, grown_test = read(path), read(path, split="test")
    assert set(train) <= set(grown_train) and set(test) <= set(grown_test)
    other = AutoTokenizer.from_pretrained(REPOSITORY / "assets" / "tiny")
    other.pad_token_id = other.eos_token_id
    assert set(read(path, split="test", tokenizer=other)) == set(grown_test)


def test_one_prompt_is_held_out_of_few(read, tmp_path):
    for n in (2, 3, 5):
        path = write(tmp_path / f"{n}.jsonl", numbered(n))
        train, test = read(path), read(path, split="test")
        assert len(test) == 1 and len(train) == n - 1
    path = write(tmp_path / "one.jsonl", numbered(1) * 3)
    with pytest.raises(UserError, match="all prompts are held out for evaluation; add other prompts, or give a folder"):
        read(path)


SPLITS = {  # files; settings of the dataset; prompts to train on, and to evaluate on (None: some are held out)
    "folder": (["train.jsonl", "test.jsonl"], {}, "train", "test"),
    "subfolders": (["data/train/0.jsonl", "data/train/1.jsonl", "data/validation/0.jsonl"], {}, "train", "valid"),
    "test before validation": (["train.jsonl", "validation.jsonl", "test.jsonl"], {}, "train", "test.jsonl"),
    "chosen": (["train.jsonl", "validation.jsonl", "test.jsonl"], {"test_split": "validation"}, "train", "valid"),
    "shards": (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "dev.jsonl"], {}, "train", "dev"),
    "no split in any name": (["a.jsonl", "b.jsonl"], {}, "", None),
    "another name for train": (["train.jsonl", "test.jsonl"], {"train_split": "test", "test_split": "train"}, "test",
                               "train"),
    "part of a split": (["train.jsonl", "test.jsonl"], {"train_split": "train[:50%]"}, "half", "test"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_folder_splits_are_found_by_file_names(name, read, tmp_path):
    files, settings, train, test = SPLITS[name]
    for file in files:
        write(tmp_path / "data" / file, pairs(*(f"{file} {i}" for i in range(20))))
    choice = Choice(str(tmp_path / "data"), **settings)
    found = {split: read(choice, split=split) for split in ("train", "test")}
    if train == "half":
        assert sorted(found["train"]) == sorted(f"train.jsonl {i}?" for i in range(10))
    else:
        assert {file for file in files if any(p.startswith(file) for p in found["train"])} == {
            file for file in files if train in file
        }
    if test is not None:
        assert len(found["test"]) == 20 and all(test in prompt for prompt in found["test"])
    else:
        assert sorted(found["train"] + found["test"]) == sorted(f"{file} {i}?" for file in files for i in range(20))


def test_training_on_part_of_the_test_split_excludes_it_from_evaluation(read, tmp_path):
    write(tmp_path / "data" / "test.jsonl", numbered(40))
    choice = Choice(str(tmp_path / "data"), train_split="test[:50%]")
    train, test = (read(choice, split=split) for split in ("train", "test"))
    assert sorted(train + test) == sorted(row["prompt"] for row in numbered(20))


@pytest.mark.parametrize(("part", "place"), [("[:75%]", r" \(.*train\.jsonl, line 3\)"), ("[25%:]", "")])
def test_bad_row_in_part_of_a_split_is_built_in_by_its_line_only_if_the_part_begins_at_the_first_line(
    part, place, read, tmp_path
):
    rows = numbered(8)
    rows[2]["chosen"] = ""
    write(tmp_path / "data" / "train.jsonl", rows)
    number = 2 if place else 0
    with pytest.raises(UserError, match=rf"row {number}{place}: field 'chosen' is an empty string"):
        read(Choice(str(tmp_path / "data"), train_split=f"train{part}"))


def test_glob_pattern_reads_the_matching_files(read, tmp_path):
    for name in ("a/train.jsonl", "a/more.jsonl", "a/test.jsonl", "b/train.jsonl", "contest.jsonl"):
        write(tmp_path / name, pairs(f"{name} 0", f"{name} 1"))
    found = {split: read(f"{tmp_path}/**/*.jsonl", split=split) for split in ("train", "test")}
    assert {prompt.split()[0] for prompt in found["train"]} == {
        "a/train.jsonl", "a/more.jsonl", "b/train.jsonl", "contest.jsonl"
    }  # fmt: skip
    assert {prompt.split()[0] for prompt in found["test"]} == {"a/test.jsonl"}
    (tmp_path / "b/run").mkdir()
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl"):  # files of a run
        (tmp_path / "b/run" / name).write_text("{}\n")
    (tmp_path / "b/loop").symlink_to("..")  # a link that leads to all of them again
    assert read(f"{tmp_path}/**/*.jsonl") == found["train"]
    write(tmp_path / "[x]*.jsonl", numbered(2))  # the name of a file isn't read as a pattern
    assert len(read(f"{tmp_path}/[x]*.jsonl")) == 1


def test_caches_and_runs_in_a_data_folder_are_not_read_as_data(launcher, tmp_path):
    """The folder also holds a cache and, after each run, a run directory."""
    folder = tmp_path / "data"
    write(folder / "train.jsonl", numbered(8))
    write(folder / "test.jsonl", numbered(4, start=100))
    run = [*RUN, f"datasets=[{folder}]", f"local_dirs=[{folder}/cache]", "n_epochs=1"]
    for number in range(2):
        assert launcher.run(*run, f"local_run_dir={folder}/run-{number}", directory=folder) == 0, launcher.output
        for split, n_rows in (("train", 8), ("test", 4)):
            assert f"({split}): preferences (prompt, chosen, rejected); {n_rows} rows read" in launcher.output
    metrics = [read_jsonl(folder / f"run-{number}" / "metrics.jsonl") for number in range(2)]
    assert len(metrics[0]) == len(metrics[1])
    assert list(folder.rglob("prepared/*/train.arrow"))  # must not be read


# ---- which examples, in which order ---------------------------------------------------------------------------------


def test_weight_and_n_examples_set_how_often_each_dataset_is_seen(read, tmp_path):
    one, other = (write(tmp_path / name / "train.jsonl", pairs(*(f"{name}{i}" for i in range(20)))) for name in "ab")
    for path in (one, other):
        write(tmp_path / path.removesuffix("train.jsonl") / "test.jsonl", pairs("test"))
    one, other = (path.removesuffix("/train.jsonl") for path in (one, other))

    def counts(*datasets: Choice | str, **kwargs) -> dict[str, int]:
        found = read(*datasets, **kwargs)
        return {name: sum(prompt.startswith(name) for prompt in found) for name in "ab"}

    assert counts(one, other) == {"a": 20, "b": 20}
    assert counts(Choice(one, weight=2.0), Choice(other, weight=0.5)) == {"a": 40, "b": 10}
    assert counts(one, Choice(other, n_examples=7)) == {"a": 20, "b": 7}
    assert counts(one, Choice(other, weight=1.5, n_examples=8)) == {"a": 20, "b": 12}
    chosen = read(Choice(other, n_examples=7), n_epochs=3)
    assert len(set(chosen)) == 7 and len(chosen) == 21  # the same every time
    assert set(read(Choice(other, n_examples=7), seed=1)) != set(chosen)
    assert len(read(Choice(other, weight=0.5), split="test")) == 1  # weights don't affect evaluation


def test_file_listed_twice_is_read_by_the_settings_of_each_entry(read, tmp_path):
    path = write(tmp_path / "rows.jsonl", [row | {"other": f"other {row['prompt']}"} for row in numbered(40)])
    other = Choice(path, n_examples=7, fields={"prompt": "other"}, ignored_columns=("prompt",))
    found = read(Choice(path, n_examples=5, ignored_columns=("other",)), other)
    assert sum(prompt.startswith("other ") for prompt in found) == 7 and len(found) == 12


def test_order_follows_the_seed_and_shards_split_it(read, tmp_path):
    path = write(tmp_path / "rows.jsonl", numbered(40))
    whole = read(path, batch_size=8)
    assert whole == read(path, batch_size=8) != read(path, batch_size=8, seed=1)
    prompts = [row["prompt"] for row in numbered(40) if row["prompt"] in whole]
    # the order in which the original shuffles prompts
    expected = prompts[:]
    random.Random(int(np.random.RandomState(0).randint(0, 2**32))).shuffle(expected)
    assert whole == expected
    shards = [read(path, batch_size=8, shard=(k, 2), drop_last=True) for k in range(2)]
    mixed = [p for start in range(0, len(shards[0]), 4) for shard in shards for p in shard[start : start + 4]]
    assert mixed == whole[: len(mixed)] and len(mixed) == len(whole) // 8 * 8


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_workers_train_on_own_data_like_one_worker(launcher, tmp_path):
    own = write(tmp_path / "rows.jsonl", numbered(24))
    scored = write(tmp_path / "scored.jsonl", [
        {"prompt": f"Scored {i}", "responses": [" a", f" b{i}", " c c"], "scores": [i % 3, 1, 2]} for i in range(8)
    ])  # fmt: skip
    datasets = f"datasets=[{{name: {own}, weight: 1.5}},{scored}]"
    lines = []
    for name, n_workers, overrides in (("one", 1, []), ("two", 2, ["trainer=FSDPTrainer"])):
        code = launcher.run(
            *RUN, *overrides, datasets, "n_examples=24", f"local_run_dir={tmp_path}/{name}", n_workers=n_workers
        )
        assert code == 0, launcher.output
        lines.append(read_jsonl(tmp_path / name / "metrics.jsonl"))
    assert len(lines[0]) == len(lines[1]) > 6
    for one, two in zip(*lines, strict=True):
        for key in one.keys() - {"examples_per_second", "tokens_per_second"}:
            expected = one[key] if isinstance(one[key], str) else pytest.approx(one[key], rel=1e-3, abs=1e-5)
            assert two[key] == expected, key


@pytest.mark.slow
def test_run_on_own_data_is_resumed_exactly_and_refused_on_other_data(launcher, tmp_path):
    path = write(tmp_path / "rows.jsonl", numbered(40))
    run = [*RUN, f"datasets=[{path}]"]
    assert launcher.run(*run, "n_examples=12", f"local_run_dir={tmp_path}/whole") == 0, launcher.output
    for n_examples in (8, 12):
        parts = [f"n_examples={n_examples}", f"local_run_dir={tmp_path}/parts", "resume=auto"]
        assert launcher.run(*run, *parts) == 0, launcher.output
    states = [
        torch.load(tmp_path / name / "LATEST/policy.pt", weights_only=True)["state"] for name in ("whole", "parts")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    write(tmp_path / "rows.jsonl", [*numbered(39), *pairs("Another question")])
    more = [*run, "n_examples=16", f"local_run_dir={tmp_path}/parts", "resume=auto"]
    assert launcher.run(*more) == 1
    assert "inputs have changed since the run began:\n" in launcher.output
    assert f"  datasets=[{path}], train split\n" in launcher.output
    assert "Traceback" not in launcher.output
    write(tmp_path / "rows.jsonl", numbered(40))  # the first content, written later
    assert launcher.run(*more) == 0, launcher.output


# ---- truncation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_built_in", [False, True], ids=["file", "hh"])
def test_truncation_cuts_drops_or_refuses_long_examples(is_built_in, tokenizer, tmp_path, capsys):
    long = "start " * 20 + "end"
    texts = ["short", long]
    if is_built_in:
        rows = [{side: f"\n\nHuman: {t}\n\nAssistant: {side}" for side in ("chosen", "rejected")} for t in texts]
        name, paths = "hh", {"hh": str(tmp_path / "data")}
    else:
        rows = [{"prompt": t, "chosen": " chosen", "rejected": " rejected"} for t in texts]
        name, paths = str(tmp_path / "data"), None
    for split in ("train", "test"):
        write(tmp_path / "data" / f"{split}.jsonl", rows)

    def read(truncation: str | None) -> dict[str, str]:
        batches = get_batch_iterator(
            [Choice(name, truncation=truncation)], tokenizer, n_epochs=1, drop_last=False, paths=paths,
            max_length=24, max_prompt_length=8, cache_dir=str(tmp_path / "cache"),
        )  # fmt: skip
        found = {}
        for batch in batches:
            assert batch["chosen_input_ids"].shape[1] <= 24
            found["short" if "short" in batch["prompt"][0] else "long"] = tokenizer.decode(batch["prompt_input_ids"][0])
        return found

    whole_short = "\n\nHuman: short\n\nAssistant:" if is_built_in else "short"
    start, end = read("keep_start")["long"], read("keep_end")["long"]
    assert start.startswith("\n\nHuman: start" if is_built_in else "start") and "end" not in start
    assert end.endswith("\n\nAssistant:" if is_built_in else "end")
    assert read(None) == {"short": whole_short, "long": end}
    capsys.readouterr()
    assert read("drop") == {"short": whole_short}
    assert f"{name} (train): dropped 1 examples longer than max_length" in capsys.readouterr().out
    with pytest.raises(UserError) as error:
        read("error")
    assert "truncation=error: 1 examples are longer than max_length=24 tokens:\n" in str(error.value)
    assert f"  datasets=[{name}], train split, row 1\n" in str(error.value)


@pytest.mark.parametrize("datasets", ["[toy]", "[toy,{}]"])
def test_dataset_emptied_by_truncation_is_an_error(datasets, make_trainer, tmp_path):
    path = write(tmp_path / "rows.jsonl", pairs(*"abcdefgh"))
    overrides = [*RUN, f"datasets={datasets.format(path)}", "truncation=drop", "max_length=9", "max_prompt_length=1"]
    with pytest.raises(UserError, match=r"datasets=\[toy\], train split: truncation=drop leaves nothing"):
        make_trainer(*overrides)


# ---- data_only ------------------------------------------------------------------------------------------------------


def test_data_only_needs_no_weights_and_leaves_no_run(train_ok, tmp_path):
    shutil.copytree(ORACLE / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    path = write(tmp_path / "rows.jsonl", numbered(40))
    output = train_ok(*RUN, f"model.name_or_path={tmp_path}/model", f"datasets=[{path}]", "data_only=true",
                      f"local_run_dir={tmp_path}/run")  # fmt: skip
    assert f"{path} (train): preferences (prompt, chosen, rejected); 40 rows read" in output
    assert "prompts held out from the training data" in output
    assert re.search(r"chosen: ⟦ Question \d+ yes<\|endoftext\|>⟧", output)
    assert "data_only=true: nothing is trained" in output
    assert not (tmp_path / "run").exists()


def test_unusable_rows_are_reported_at_the_command_line(train, tmp_path):
    path = write(tmp_path / "rows.jsonl", [*numbered(3), {"prompt": "x", "chosen": "y", "rejected": 3}])
    result = train(*RUN, f"datasets=[{path}]")
    assert_refused(result, tmp_path, f"datasets=[{path}], train split: rows that can't be used:\n", f"{path}, line 4",
                   "field 'rejected' is 3, expected a string", "on_bad_example=skip")  # fmt: skip
    result = train(*RUN, f"datasets=[{path}]", "on_bad_example=skip", "n_examples=null", "batch_size=1", "eval_every=1")
    assert result.returncode == 0, result.stderr
    assert "4 rows read, 2 prompts with 2 pairs; dropped: 1 wrong type" in result.stdout


# ---- settings -------------------------------------------------------------------------------------------------------

REFUSED = {
    "no file": (["datasets=[rowz.jsonl]"], "no such file or folder .* Did you mean rows.jsonl?"),
    "no file for a pattern": (["datasets=['*.csv']"], "no file matches this pattern"),
    "not a file of rows": (["datasets=[notes.txt]"], "notes.txt has no suffix of a data file"),
    "unknown name": (["datasets=[hhh]"], "no such dataset. Did you mean hh?"),
    "unknown setting": (["datasets=[{name: rows.jsonl, wieght: 2}]"], "no setting 'wieght'. Did you mean weight?"),
    "weight": (["datasets=[{name: rows.jsonl, weight: 0}]"], "weight=0: must be a number above 0"),
    "n_examples": (["datasets=[{name: rows.jsonl, n_examples: 1.5}]"], "n_examples=1.5: must be an integer"),
    "twice": (["datasets=[rows.jsonl,rows.jsonl]"], "is listed twice; give it a weight"),
    "truncation": (["datasets=[rows.jsonl]", "truncation=keep"], "truncation=keep: must be one of"),
    "fraction": (["datasets=[rows.jsonl]", "test_fraction=1"], "test_fraction=1: must be above 0 and below 1"),
    "on_bad_example": (["datasets=[rows.jsonl]", "on_bad_example=drop"], "on_bad_example=drop: must be one of"),
    "template": (["datasets=[rows.jsonl]", "chat_template=none.jinja"], "chat_template=none.jinja: no such file"),
    "a split of a built-in dataset": (
        ["datasets=[toy]", "train_split=x"],
        "train_split=x: it is for files and hub ids",
    ),
    "a missing split": (["datasets=[rows.jsonl]", "test_split=x"], "test_split=x: it has no such split"),
    "fields": (["datasets=[rows.jsonl]", "fields={chosen: good}"], "fields.chosen=good: there is no column 'good'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_data_setting_is_refused(name, make_trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", numbered(8))
    (tmp_path / "notes.txt").write_text("x")
    overrides, message = REFUSED[name]
    with pytest.raises(UserError) as error:
        make_trainer(*RUN, *overrides)
    assert re.search(message, str(error.value), re.DOTALL), error.value


def test_tokenizers_own_truncation_is_ignored(tokenizer, read, tmp_path):
    tokenizer.backend_tokenizer.enable_truncation(2)
    path = write(tmp_path / "rows.jsonl", pairs("a long question", "another long question"))
    batches = get_batch_iterator([path], tokenizer, n_epochs=1, drop_last=False, cache_dir=str(tmp_path / "cache"))
    assert tokenizer.decode(next(iter(batches))["prompt_input_ids"][0]).endswith("long question?")
    assert json.loads(tokenizer.backend_tokenizer.to_str())["truncation"] is None
