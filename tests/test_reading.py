"""Local folders of data: the files that are read, and the messages about files that can't be read."""

import gzip
import io
import json
import os

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ORACLE
from test_cli import TOY, assert_refused

from preference_datasets import get_dataset
from utils import UserError

ROW = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
LINE = json.dumps(ROW).encode() + b"\n"
GZ = gzip.compress(b"".join(LINE.replace(b" b", f" {i}".encode()) for i in range(2000)))
CSV = b'chosen,rejected\n"\n\nAssistant: b","\n\nAssistant: c"\n'  # a header, and a record of five lines
J = "train.jsonl"
COPY, OBJECT = "Write, copy or download the file again", "every line must hold one JSON object"


def lines(*rows: dict) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(*rows: dict) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), buffer, row_group_size=50, compression="none")
    return buffer.getvalue()


def damaged(content: bytes, start: int) -> bytes:
    return content[:start] + b"\xff" * 60 + content[start + 60 :]


def folder(directory, files: dict[str, bytes]) -> str:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return str(directory)


PARQUET = parquet(*[ROW | {"chosen": ROW["chosen"] + str(i) * 9} for i in range(100)])

BAD_FILES = {  # (file, content, message after the folder's name, remedy)
    "no JSON": (J, LINE * 3 + b'{"chosen": oops}\n' + LINE, "line 4: not JSON: Expecting value", OBJECT),
    "no JSON in a late line": (J, LINE * 150_000 + b"{oops\n", "line 150001: not JSON", OBJECT),
    "cut within its last line": (J, LINE * 3 + LINE[:40], "line 4: the line is incomplete", COPY),
    "cut within a line": (J, LINE * 3 + LINE[:40] + b"\n" + LINE, "line 4: not JSON", OBJECT),
    "NUL bytes in a line": (J, LINE + LINE.replace(b"a", b"\0"), "line 2: NUL bytes, starting at byte", COPY),
    "NUL bytes at the end": (J, LINE * 3 + b"\0" * 512, "line 4: NUL bytes, starting at byte 1", COPY),
    "lone high surrogate": (
        J, LINE + LINE.replace(b": a", b": \\ud83d"), "line 2: field 'chosen' holds half a char", "whole",
    ),
    "lone low surrogate": (
        J, LINE + LINE.replace(b": a", b": \\ude00"), "line 2: field 'chosen' holds half a char", "whole",
    ),
    "number for a row": (J, LINE + b"5\n" + LINE, "line 2: a number instead of an object: 5", OBJECT),
    "list for a row": (J, LINE + b"[1]\n" + LINE, "line 2: a list instead of an object: [1]", OBJECT),
    "field twice": (J, LINE + b'{"chosen":"x","chosen":"y"}\n', "line 2: field 'chosen' is given twice", OBJECT),
    "array cut": (
        "train.json", json.dumps([ROW] * 3, indent=1).encode()[:-40], "line 12: not JSON: Unterminated", COPY,
    ),
    "gzip cut": ("train.jsonl.gz", GZ[:-20], "line 1997: the compressed data ends too early", COPY),
    "gzip damaged": ("train.jsonl.gz", damaged(GZ, 60), "the compressed data is damaged", COPY),
    "gzip suffix on plain text": ("train.jsonl.gz", LINE * 3, "it isn't compressed", "take the suffix off"),
    "gzip with a bad line": ("train.jsonl.gz", gzip.compress(LINE * 3 + b"{oops\n"), "line 4: not JSON", OBJECT),
    "empty": (J, b"", "the file is empty", "Fill it, or remove it"),
    "only blank lines": (J, b"\n\n", "the file has no rows", "Fill it, or remove it"),
    "other encoding": (J, LINE + LINE.replace(b" a", b" \xe9"), "line 2: not UTF-8: byte 0xe9", "iconv"),
    "UTF-16": (J, (LINE * 3).decode().encode("utf-16"), "line 1: it is UTF-16, not UTF-8", "iconv"),
    "Python dicts": (J, b"{'prompt': 'a', 'chosen': 'b'}\n" * 3, "a Python dict: write rows by json", OBJECT),
    "Git LFS pointer": (J, b"version https://git-lfs.github.com/spec/v1\n", "line 1: it is a Git LFS", "pull"),
    "web page": (J, b"<!DOCTYPE html>\n<html>\n", "line 1: it is a web page", "Download the file itself"),
    "Parquet cut": ("train.parquet", PARQUET[:-30], "damaged: Parquet magic bytes not found", COPY),
    "Parquet damaged": ("train.parquet", damaged(PARQUET, len(PARQUET) // 2), "rows 50 to 99 (row group 1): d", COPY),
    "Parquet suffix on plain text": ("train.parquet", b"hello", "damaged: Parquet file size is 5 bytes", COPY),
    "CSV with too many fields": ("train.csv", CSV + b"a,b,c\n", "line 7: 3 fields, but the header has 2", "in quotes"),
    "CSV with an open quote": ("train.csv", CSV + b'"a,b\n', "line 7: not CSV: unexpected end", "close the quote"),
    "CSV in another encoding": ("train.csv", CSV + b"\xe9,x\n", "line 7: not UTF-8: byte 0xe9", "iconv"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_file_that_cannot_be_read_is_named_with_line_reason_and_remedy(case, tmp_path):
    name, content, reason, remedy = BAD_FILES[case]
    path = folder(tmp_path / "hh", {name: content})
    with pytest.raises(UserError) as raised:
        get_dataset("hh", "train", silent=True, cache_dir=str(tmp_path / "cache"), path=path)
    cause, last = str(raised.value).split("\n")
    assert cause.startswith(f"datasets=[hh], train split: {path}/{name}"), cause
    assert reason in cause
    assert remedy in last


BAD_ROWS = {  # (the split's files, the message about the first bad row, its place)
    "number": ({J: LINE * 3 + lines({**ROW, "chosen": 5}) + LINE}, "row 3: field 'chosen' is 5", "l, line 4"),
    "list": ({J: LINE + lines({**ROW, "chosen": ["x"]})}, "row 1: field 'chosen' is ['x']", "l, line 2"),
    "null for a row": ({J: LINE + b"null\n"}, "row 1: field 'chosen' is empty", "l, line 2"),
    "other columns in one row": ({J: LINE + lines({"good": "b"})}, "row 1: field 'chosen' is empty", "line 2"),
    "blank lines are no rows": ({J: LINE + b"\n\r\n" + lines({"chosen": "b"})}, "row 1: ", "l, line 4"),
    "second file": ({"train-1.jsonl": LINE * 3, "train-2.jsonl": LINE + lines({})}, "row 4: ", "2.jsonl, line 2"),
    "compressed": ({"train.jsonl.gz": gzip.compress(LINE + lines({**ROW, "chosen": 5}))}, "row 1: ", "gz, line 2"),
    "array": ({"train.json": json.dumps([ROW, {**ROW, "chosen": 5}], indent=1).encode()}, "row 1: ", "json, line 6"),
    "CSV": ({"train.csv": CSV + b"x,\n"}, "row 1: field 'rejected' is empty", "train.csv, line 7"),
    "Parquet": ({"train.parquet": parquet(ROW, {"chosen": None})}, "row 1: field 'chosen' is empty", "parquet, row 1"),
    "no turn": ({J: LINE + lines({**ROW, "chosen": "x"})}, "row 1: chosen: the transcript has no", "line 2"),
    "no such column": ({J: lines({"prompt": "x"})}, "row 0: no field 'chosen', 'rejected'", "l, line 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_row_that_cannot_be_used_is_named_with_its_file_and_line(case, tmp_path):
    files, reason, place = BAD_ROWS[case]
    path = folder(tmp_path / "hh", files)
    with pytest.raises(UserError) as raised:
        get_dataset("hh", "train", silent=True, cache_dir=str(tmp_path / "cache"), path=path)
    cause, remedy = str(raised.value).split("\n")
    assert cause.startswith("datasets=[hh], train split, row ")
    assert reason in cause and path in cause and f"{place})" in cause
    assert remedy == "Correct the data there"


SE = {"question": "q", "answers": [{"text": "a", "pm_score": 1}, {"text": "b", "pm_score": 2}]}


@pytest.mark.parametrize(("split", "bad"), [("train", 51), ("test", 152)])  # the seed puts row 152 into the test split
@pytest.mark.parametrize("answers", [None, [None], [{"text": None, "pm_score": 1}], [{"text": "a", "pm_score": None}]])
def test_nested_nulls_are_named_with_file_and_line(answers, split, bad, tmp_path):
    rows = [{**SE, "question": f"q{i}"} for i in range(200)]
    rows[bad]["answers"] = answers
    path = folder(tmp_path / "se", {"part-1.jsonl": lines(*rows[:50]), "part-2.jsonl": lines(*rows[50:])})
    with pytest.raises(UserError) as raised:
        get_dataset("se", split, silent=True, cache_dir=str(tmp_path / "cache"), path=path)
    assert f"row {bad}: " in str(raised.value)
    assert f"part-2.jsonl, line {bad - 49})" in str(raised.value)


def read(path, tmp_path, split: str = "train", name: str = "hh") -> int:
    data = get_dataset(name, split, cache_dir=str(tmp_path / "cache"), path=str(path))
    return sum(len(entry["pairs"]) for entry in data.values())


GOOD_FILES = {  # 3 rows each
    "byte order mark": {J: b"\xef\xbb\xbf" + LINE * 3},
    "byte order mark in a later file": {"train-1.jsonl": LINE, "train-2.jsonl": b"\xef\xbb\xbf" + LINE * 2},
    "byte order mark in CSV": {"train.csv": b"\xef\xbb\xbf" + CSV + CSV.split(b"\n", 1)[1] * 2},
    "CRLF": {J: (LINE * 3).replace(b"\n", b"\r\n")},
    "no line end at the end": {J: (LINE * 3)[:-1]},
    "very large line": {J: LINE + lines({**ROW, "rejected": ROW["rejected"] + "x" * (12 << 20)}) + LINE},
    "array": {"train.json": json.dumps([ROW] * 3, indent=1).encode()},
    "objects over several lines": {J: (json.dumps(ROW, indent=1) + "\n").encode() * 3},
    "sharded": {f"data/train-0000{i}-of-00003.jsonl": LINE for i in range(3)},
    "folder of a split": {"train/a.jsonl": LINE * 2, "train/b.jsonl": LINE, "test/a.jsonl": LINE},
    "file matched by two patterns": {"train/my-train/train.jsonl": LINE * 3},
    "no split in the name": {"data.jsonl": LINE * 3},
    "notes beside data": {"data.jsonl": LINE * 3, "NOTES.md": b"#\n", "X.md": b"#\n", "a.toml": b"\n", "a.txt": b"x"},
    "hidden files beside data": {"data.jsonl": LINE * 3, ".cache/data.jsonl": LINE, "__old__/data.jsonl": LINE},
    "script beside data": {J: LINE * 3, "make.py": b"raise SystemExit\n"},
    "other columns in the test split": {J: LINE * 3, "test.jsonl": lines({"x": 1})},
    "other format in the test split": {J: LINE * 3, "test.csv": CSV},
    "broken test split": {J: LINE * 3, "test.jsonl": b"{oops\n"},
    "card that names its files": {
        "README.md": b"---\nconfigs:\n- config_name: x\n  data_files:\n  - split: train\n    path: a/x.jsonl\n---\n",
        "a/x.jsonl": LINE * 3, "a/train.jsonl": LINE,
    },
    "run in the folder": {
        "data.jsonl": LINE * 3, "sft-train_1/config.yaml": b"", "sft-train_1/metrics.jsonl": b'{"loss": 1}\n' * 9,
        "sft-train_1/samples.jsonl": b'{"a": 1}\n',
    },
    "model from the hub in the folder": {
        "data.jsonl": LINE * 3, "models--a--b/refs/main": b"1", "models--a--b/snapshots/1/vocab.json": b'{"a": 1}',
        "models--a--b/snapshots/1/tokenizer.json": b"{}",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD_FILES)
def test_readable_files_give_all_their_rows(case, tmp_path):
    name = "hh" if case == "card that names its files" else "hh [1]*"  # the library can't read [1]*
    assert read(folder(tmp_path / name, GOOD_FILES[case]), tmp_path) == 3


def test_files_read_are_printed_in_one_line(tmp_path, capsys):
    path = folder(tmp_path / "hh", {f"train-{i}.jsonl": LINE for i in range(6)} | {"test.jsonl": LINE})
    assert read(path, tmp_path) == 6
    first = capsys.readouterr().out.splitlines()[0]
    assert (
        first == f"hh (train): reading train-0.jsonl, train-1.jsonl, train-2.jsonl, train-3.jsonl and 2 more of {path}"
    )


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (
            {"train.jsonl": LINE, "train.jsonl.gz": gzip.compress(LINE)},
            "train.jsonl.gz and {}/train.jsonl hold the same rows",
        ),
        (
            {"train-new.jsonl": LINE, "train-old.csv": CSV},
            "train-new.jsonl and {}/train-old.csv have different formats",
        ),
        ({"train-1.jsonl": b"", "train-2.jsonl": LINE}, "train-1.jsonl: the file is empty"),
    ],
)
def test_ambiguous_files_are_refused(files, reason, tmp_path):
    path = folder(tmp_path / "hh", files)
    with pytest.raises(UserError) as raised:
        read(path, tmp_path)
    assert f"{path}/{reason.format(path)}" in str(raised.value)


def test_cache_inside_a_data_folder_is_not_read(tmp_path):
    path = tmp_path / "hh"
    folder(path, {"train.jsonl": LINE * 3, "test.jsonl": LINE * 2})
    for _ in range(3):
        for split, n_rows in (("train", 3), ("test", 2)):
            data = get_dataset("hh", split, silent=True, cache_dir=str(path / "cache/user"), path=str(path))
            assert [len(entry["pairs"]) for entry in data.values()] == [n_rows]


def test_columns_missing_from_earlier_rows_are_named_with_their_file(tmp_path):
    path = folder(tmp_path / "hh", {"train-1.jsonl": LINE * 2, "train-2.jsonl": LINE + lines({**ROW, "note": "x"})})
    with pytest.raises(UserError, match=r"train-2.jsonl, line 2: a column 'note' that earlier rows don't have"):
        read(path, tmp_path)
    path = folder(tmp_path / "two", {"train-1.parquet": parquet(ROW), "train-2.parquet": parquet({**ROW, "note": "x"})})
    with pytest.raises(UserError, match=r"train-2.parquet: the columns are .*note"):
        read(path, tmp_path)
    path = folder(tmp_path / "types", {"train-1.jsonl": lines({**ROW, "chosen": 5}), "train-2.jsonl": LINE})
    with pytest.raises(UserError, match=r"train-2.jsonl, line 1: field 'chosen' is a string, in earlier rows a number"):
        read(path, tmp_path)


NO_FILES = {
    "empty folder": ({}, "is empty", "train.jsonl"),
    "script": ({"hh.py": b"import datasets\n"}, "has no data files, only a loading script (hh.py)", "/train.jsonl"),
    "other files": ({"train.txt": b"x"}, "has no data files, but train.txt", "JSON Lines"),
    "other split": ({"test.jsonl": LINE, "dev.jsonl": LINE}, "has files for test, validation and none for train", J),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_FILES)
def test_error_for_a_folder_without_files_of_the_split_lists_its_content(case, tmp_path):
    files, cause, remedy = NO_FILES[case]
    path = folder(tmp_path / "hh", files)
    with pytest.raises(UserError) as raised:
        read(path, tmp_path)
    assert f"[hh], train split: {path} {cause}" in str(raised.value)
    assert remedy in str(raised.value).split("\n")[1]


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root, or Windows, may read everything")
def test_unreadable_file_is_named(tmp_path):
    path = folder(tmp_path / "hh", {"train.jsonl": LINE})
    os.chmod(tmp_path / "hh/train.jsonl", 0)
    with pytest.raises(UserError, match=r"train.jsonl.*[Pp]ermission"):
        read(path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("", ["dataset_paths.hh='' is empty"]),
        ("hh/train.jsonl", ["dataset_paths.hh=hh/train.jsonl is a file", "Give the folder that holds it"]),
        ("./hj", ["dataset_paths.hh=./hj: there is no such folder. Did you mean ./hh?"]),
        ("hh", ["/hh/test.jsonl, line 2: the line is incomplete", "\nWrite, copy or download"]),
        ("only_train", ["/only_train has files for train and none for test", "e.g. test.jsonl"]),
    ],
)
def test_command_line_names_a_bad_path_or_file(value, parts, train, tmp_path):
    folder(tmp_path / "hh", {"train.jsonl": LINE * 8, "test.jsonl": LINE + LINE[:50]})
    folder(tmp_path / "only_train", {"train.jsonl": LINE * 8})
    assert_refused(train(*TOY, "datasets=[hh]", f"dataset_paths.hh={value}", "loss=dpo"), tmp_path, *parts)


@pytest.mark.slow
def test_local_dirs_within_the_data_folder_are_never_read_as_data(train_ok, tmp_path):
    path = tmp_path / "cache"  # the fixture's local_dirs
    for split in ("train", "test"):
        folder(path, {f"{split}.jsonl": (ORACLE / f"hh/{split}.jsonl").read_bytes()})
    overrides = [
        *TOY,
        "loss=dpo",
        "datasets=[hh]",
        f"dataset_paths.hh={path}",
        "n_examples=4",
        "sample_during_eval=false",
    ]
    for _ in range(2):
        output = train_ok(*overrides, "n_eval_examples=4", "exp_name=train")
        assert f"hh (train): reading train.jsonl of {path}\n" in output
        assert "Training data: 240 examples per epoch" in output
