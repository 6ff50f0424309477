"""The data report, pairs of identical responses, and the number of examples in use."""

import json
import re

import pytest
from conftest import REPOSITORY, mark_exhaustive_except
from test_formats import jsonl, parquet
from test_own_data import RUN, numbered, pairs, write
from transformers import AutoTokenizer

from data import reading
from data.choice import Choice, Settings
from preference_datasets import get_batch_iterator
from utils import UserError

TEMPLATE = str(REPOSITORY / "assets" / "human_assistant.jinja")


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "assets" / "tiny")
    tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


@pytest.fixture
def batches(tokenizer, tmp_path):
    """Return a function that writes rows as both splits of a folder, and opens the batches of one split."""

    def open_batches(rows: list[dict], split: str = "train", settings: dict | None = None, **kwargs):
        for name in ("train", "test"):
            write(tmp_path / "data" / f"{name}.jsonl", rows)
        choice = Choice(**({"name": str(tmp_path / "data")} | kwargs.pop("choice", {})))
        kwargs = {"n_epochs": 1, "drop_last": False, "cache_dir": str(tmp_path / "cache")} | kwargs
        given = Settings(**({"chat_template": TEMPLATE} | (settings or {})))
        return get_batch_iterator([choice], tokenizer, split, settings=given, **kwargs)

    return open_batches


@pytest.fixture
def report(make_trainer, tmp_path, capsys):
    """Return a function that writes rows as both splits of a folder, and returns a run's data report on them."""

    def report_on(rows: list[dict], *overrides: str) -> str:
        for split in ("train", "test"):
            write(tmp_path / "data" / f"{split}.jsonl", rows)
        make_trainer(*RUN, "batch_size=2", "eval_every=2", f"datasets=[{tmp_path}/data]", *overrides)
        return capsys.readouterr().out

    return report_on


# ---- pairs of identical responses -----------------------------------------------------------------------------------


def long_pairs(n: int) -> list[dict]:
    """Return pairs whose responses share their first 40 words."""
    return [
        {"prompt": f"Say {i}", "chosen": " same" * 40 + " good", "rejected": " same" * 40 + " bad"} for i in range(n)
    ]


def test_pairs_that_are_identical_once_cut_are_refused_or_dropped(batches, capsys):
    rows = long_pairs(3) + pairs("a")
    assert batches(rows, max_length=512).epoch_size == 4
    with pytest.raises(
        UserError, match=r"cut to max_length=24, chosen and rejected are identical in 3 of 4 pairs:\n  .*row 0\n"
    ):
        batches(rows, max_length=24, max_prompt_length=8)
    kept = batches(rows, max_length=24, max_prompt_length=8, settings={"skips_bad": True})
    assert [batch["prompt"] for batch in kept] == [["a?"]]
    assert "(train): dropped 3 pairs that are identical once cut to max_length" in capsys.readouterr().out
    with pytest.raises(UserError, match="identical in all 3 pairs"):
        batches(long_pairs(3), max_length=24, max_prompt_length=8)
    with pytest.raises(UserError, match="no pair is left; raise max_length=24"):
        batches(long_pairs(3), max_length=24, max_prompt_length=8, settings={"skips_bad": True})


@pytest.mark.parametrize("max_length", mark_exhaustive_except(range(20, 60, 7), 27, 48))
def test_exactly_the_pairs_with_equal_tokens_after_truncation_are_dropped(max_length, batches):
    rows = [
        {"prompt": "Say" * n, "chosen": " same" * m + " good", "rejected": " same" * m}
        for n in (1, 9)
        for m in (3, 9, 30)
    ]
    lengths = {"max_length": max_length, "max_prompt_length": 8}
    iterator = batches(rows, **lengths, settings={"skips_bad": True}, split="test")
    assert all(b["chosen_input_ids"].tolist() != b["rejected_input_ids"].tolist() for b in iterator)
    # a pair is dropped among the others exactly if it is dropped on its own
    n_identical = 0
    for row in rows:
        with_another = [row, {"prompt": "x", "chosen": " y", "rejected": " z"}]
        n_identical += batches(with_another, **lengths, settings={"skips_bad": True}).epoch_size == 1
    assert iterator.epoch_size == len(rows) - n_identical


def test_responses_that_the_template_makes_identical_are_bad_rows(batches, tmp_path):
    (tmp_path / "trims.jinja").write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content.strip() + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )

    def row(chosen: str, rejected: str) -> dict:
        sides = {"chosen": chosen, "rejected": rejected}
        responses = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
        return {"prompt": [{"role": "user", "content": "Hi"}], **responses}

    settings = {"chat_template": str(tmp_path / "trims.jinja")}
    rows = [row("yes", "no"), row("yes", " yes ")]
    with pytest.raises(UserError, match=r"line 2.*chosen and rejected are the same tokens once rendered"):
        batches(rows, settings=settings)
    assert batches(rows, settings=settings | {"skips_bad": True}).epoch_size == 1


def test_equal_responses_with_different_scores_are_not_a_pair(report):
    rows = [{"prompt": f"Q {i}", "responses": [" a", " a", " b"], "scores": [1, 2, 3]} for i in range(4)]
    output = report(rows)
    assert "4 prompts with 8 pairs; dropped 4 pairs of identical responses" in output


# ---- the report -----------------------------------------------------------------------------------------------------


def test_every_run_of_a_process_prints_each_split_once(report, monkeypatch):
    read, opened = reading.read_rows, []
    monkeypatch.setattr(reading, "read_rows", lambda *args: opened.append(args[1]) or read(*args))
    for _ in range(2):
        output = report(pairs("a", "b"))
        assert [output.count(f"({split}): reading {split}.jsonl of ") for split in ("train", "test")] == [1, 1]
    assert opened == ["train", "test"] * 2


def test_quantiles_of_two_prompts_are_the_lengths_of_the_shorter_and_the_longer(report):
    output = report([{"prompt": prompt, "chosen": " yes", "rejected": " no"} for prompt in ("one", "one two three")])
    (found,) = re.findall(r"Tokens \(train, 10%/50%/90%/longest\): prompt (\d+)/(\d+)/(\d+)/(\d+),", output)
    tenth, half, nine_tenths, longest = map(int, found)
    assert tenth == half < nine_tenths == longest


def test_same_fault_in_all_rows_is_reported_once(batches):
    with pytest.raises(UserError) as error:
        batches([{"prompt": f"Q {i}", "chosen": "", "rejected": "no"} for i in range(80)])
    lines = str(error.value).splitlines()
    assert len(lines) == 6
    assert lines[4] == "  ... all of the first 80 rows (80 empty response)"


def test_faults_of_several_kinds_are_counted(batches):
    rows = [{"prompt": "a", "chosen": c, "rejected": "no"} for c in ["yes", "", None] * 20]
    with pytest.raises(UserError, match=r"\.\.\. 40 of the first 60 rows \(20 empty response, 20 missing field\)"):
        batches(rows)


def test_reading_stops_after_enough_faults_for_an_error(batches):
    with pytest.raises(UserError, match=r"\.\.\. all of the first 1,024 rows \(1,024 missing field\)"):
        batches([{"prompt": f"Q {i}", "chosen": None, "rejected": "no"} for i in range(3000)])


@pytest.mark.parametrize(("encoding", "n_good"), [("latin1", 0), ("latin1", 2), ("utf-16", 0)])
def test_lines_in_another_encoding_are_counted_with_their_remedy(encoding, n_good, tokenizer, tmp_path):
    lines = [f'{{"prompt": "Größe {i}?", "chosen": " yes", "rejected": " no"}}\n' for i in range(4)]
    (tmp_path / "rows.jsonl").write_bytes(jsonl(numbered(n_good)) + "".join(lines).encode(encoding))
    with pytest.raises(UserError) as error:
        get_batch_iterator([str(tmp_path / "rows.jsonl")], tokenizer, n_epochs=1, cache_dir=str(tmp_path / "cache"))
    *_, share, remedy = str(error.value).splitlines()
    expected = "4 of the first 6 rows" if n_good else r"all of the first \d rows"
    assert re.search(rf"  \.\.\. {expected} \(\d broken row\)", share), share
    assert "iconv" in remedy


def test_file_of_broken_lines_is_refused_with_their_number(batches, tmp_path):
    (tmp_path / "broken.jsonl").write_text("{oops\n" * 5)
    with pytest.raises(UserError, match=r"line 3: not JSON.*\n  \.\.\. all of the first 5 rows \(5 broken row\)"):
        batches([], choice={"name": str(tmp_path / "broken.jsonl")})


def test_broken_lines_before_the_first_good_one_are_skipped_however_many_they_are(batches, tmp_path):
    for split in ("train", "test"):
        path = write(tmp_path / "rows" / f"{split}.jsonl", [{"prompt": "a", "chosen": "yes", "rejected": "no"}] * 2)
        with open(path, "r+b") as file:
            content = b"{oops\n" * 150 + file.read()
            file.seek(0)
            file.write(content)
    choice = {"name": str(tmp_path / "rows")}
    assert batches([], choice=choice, settings={"skips_bad": True}).epoch_size == 2
    with pytest.raises(UserError, match=r"150 of the first 152 rows \(150 broken row\)"):
        batches([], choice=choice)


def test_damaged_json_array_after_a_blank_line_is_not_read_line_by_line(batches, tmp_path):
    (tmp_path / "rows.json").write_text("\n" + json.dumps(numbered(3), indent=1)[:-20])
    with pytest.raises(UserError, match=r"rows\.json, line 16: not JSON: .*\nWrite, copy or download the file again"):
        batches([], choice={"name": str(tmp_path / "rows.json")})


def test_error_for_text_ending_in_the_end_token_says_to_leave_it_out(batches):
    rows = [{"prompt": f"Colour {i}?", "chosen": " It is red.<|endoftext|>", "rejected": " No."} for i in range(2)]
    with pytest.raises(UserError, match="at its end; the end token is added to every response, so leave it out"):
        batches(rows)
    rows = [{"prompt": f"Colour {i}?", "chosen": " It <|endoftext|> is red.", "rejected": " No."} for i in range(2)]
    with pytest.raises(UserError) as error:
        batches(rows)
    assert "leave it out:" not in str(error.value)


def test_data_report_counts_what_is_trained_on(make_trainer, tmp_path, capsys):
    rows = pairs("a") * 3 + pairs("b", "c", n_words=60) + [{"prompt": "d", "chosen": "same", "rejected": "same"}]
    for split in ("train", "test"):
        write(tmp_path / "data" / f"{split}.jsonl", rows)
    run = [*RUN, f"datasets=[{tmp_path}/data]", "on_bad_example=skip", "batch_size=1", "eval_every=1"]
    make_trainer(*run)
    output = capsys.readouterr().out
    assert "6 rows read, 5 prompts with 5 pairs; dropped: 1 identical responses" in output
    assert "2 of 5 (40.0%) are longer than max_length=64: 0 prompts are cut to max_prompt_length=32, 2 have " in output
    make_trainer(*run, "truncation=drop")
    output = capsys.readouterr().out
    assert "dropped 2 examples longer than max_length" in output
    assert "no example is longer than max_length=64" in output and "Training data: 3 examples per epoch" in output


def test_report_lists_what_is_not_used(report):
    rows = [row | {"id": i, "source": "a site"} for i, row in enumerate(numbered(6))]
    assert "(train): not used: id, source\n" in report(rows)
    assert "not used" not in report(numbered(6))


def test_report_says_that_sft_does_not_use_rejected_responses(report):
    note = "(of your own data, the chosen responses); rejected responses are not used (loss=dpo trains on both)"
    assert note in report(numbered(6), "loss=sft")
    assert note not in report(numbered(6))
    assert note not in report([{"prompt": f"Q {i}", "completion": " yes"} for i in range(6)], "loss=sft")


def test_report_says_that_the_template_is_not_applied_to_strings(report):
    note = "to which the chat template isn't applied; apply_chat_template=true applies it"
    template = f"chat_template={TEMPLATE}"
    assert note in report(numbered(6), template)
    assert note not in report(numbered(6))  # the model has no template
    applied = report(numbered(6), template, "apply_chat_template=true")
    assert note not in applied and re.search(r"\n\nHuman: Question \d\?\n\nAssistant:", applied)
    dialogues = [{side: f"\n\nHuman: {i}\n\nAssistant: {side}" for side in ("chosen", "rejected")} for i in range(6)]
    assert note not in report(dialogues, template)  # dialogues as text, which no template is applied to


def test_report_counts_the_labels_and_says_that_the_rarer_is_repeated(report):
    rows = [{"prompt": f"Q {i}", "completion": " yes", "label": i < 2} for i in range(8)]
    output = report(rows, "loss=kto")
    assert "2 desirable, 6 undesirable responses; each desirable one is used 3 times per epoch" in output
    rows = [{"prompt": f"Q {i}", "completion": " yes", "label": i % 2 == 0} for i in range(8)]
    assert "4 desirable, 4 undesirable responses\n" in report(rows, "loss=kto")


def test_ignored_columns_can_be_set_in_the_config_or_per_dataset(report, tmp_path):
    rows = [row | {"persona": f"pirate {i}"} for i, row in enumerate(numbered(6))]
    with pytest.raises(UserError, match=r"column 'persona' may belong to the prompt"):
        report(rows)
    assert "not used: persona" in report(rows, "ignored_columns=[persona]")
    entry = f"datasets=[{{name: {tmp_path}/data, ignored_columns: [persona]}}]"
    assert "not used: persona" in report(rows, entry)
    for wrong in ("ignored_columns=persona", "ignored_columns=[1]"):
        with pytest.raises(UserError, match=r"ignored_columns=.*: expected a list"):
            report(rows, wrong)


# ---- number of examples ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_examples", [1, 4, 5, 7, 12])
def test_n_examples_of_a_dataset_is_exact_even_if_prompts_have_several_pairs(n_examples, batches):
    rows = [{"prompt": f"Q {i}", "responses": [" a", f" b{i}", " c"], "scores": [1, 2, 3]} for i in range(4)]
    iterator = batches(rows, choice={"n_examples": n_examples})
    assert iterator.epoch_size == n_examples == sum(len(batch["prompt"]) for batch in iterator)
    again = batches(rows, choice={"n_examples": n_examples})
    assert [batch["prompt"] for batch in again] == [batch["prompt"] for batch in iterator]


# ---- files ----------------------------------------------------------------------------------------------------------


def test_csv_whose_header_has_no_comma_is_separated_by_semicolons(tokenizer, tmp_path):
    (tmp_path / "rows.csv").write_text('prompt;chosen;rejected\n"a; b";yes, yes;no\nc;d;"e\nf"\n')
    settings = Settings(test_fraction=0.5)
    found = set()
    for split in ("train", "test"):
        for batch in get_batch_iterator([str(tmp_path / "rows.csv")], tokenizer, split, n_epochs=1, drop_last=False,
                                        cache_dir=str(tmp_path / "cache"), settings=settings):  # fmt: skip
            found.add((batch["prompt"][0], batch["chosen_response_only"][0], batch["rejected_response_only"][0]))
    assert found == {("a; b", "yes, yes", "no"), ("c", "d", "e\nf")}
    (tmp_path / "rows.csv").write_text("prompt;chosen;rejected\na;b;c\nd;;f\n")
    with pytest.raises(UserError, match=r"rows\.csv, line 3.*field 'chosen'"):
        get_batch_iterator([str(tmp_path / "rows.csv")], tokenizer, n_epochs=1, cache_dir=str(tmp_path / "cache"))


def test_null_arguments_that_parquet_adds_to_tool_calls_are_dropped(tokenizer, tmp_path):
    """Parquet gives every call the arguments of all calls, as nulls; JSON Lines keep explicit nulls."""
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{{ m.role + ':' + m.content }}{% if m.tool_calls %}"
        "{{ m.tool_calls[0].function.name + m.tool_calls[0].function.arguments | tojson }}{% endif %}{% endfor %}"
    )

    def call(**arguments) -> dict:
        function = {"name": "f", "arguments": arguments}
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}

    def row(**arguments) -> dict:
        no = [{"role": "assistant", "content": "no"}]
        return {"prompt": [{"role": "user", "content": str(arguments)}], "chosen": [call(**arguments)], "rejected": no}

    for name, content, expected in (
        ("rows.parquet", parquet([row(city="Rome"), row(town="Bonn")]), ['{"city": "Rome"}', '{"town": "Bonn"}']),
        ("rows.jsonl", jsonl([row(city="Rome", unit=None), row(town="Bonn")]),
         ['{"city": "Rome", "unit": null}', '{"town": "Bonn"}']),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        found = set()
        for split in ("train", "test"):
            for batch in get_batch_iterator([str(tmp_path / name)], tokenizer, split, n_epochs=1, drop_last=False,
                                            cache_dir=str(tmp_path / "cache"),
                                            settings=Settings(chat_template=str(tmp_path / "t.jinja"))):  # fmt: skip
                found |= set(batch["chosen_response_only"])
        assert sorted(found) == sorted(f"assistant:f{arguments}" for arguments in expected), name
