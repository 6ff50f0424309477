"""Any content of a file is read, or refused with a message; rows that aren't trained on are counted."""

import csv
import gzip
import io
import json
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
from conftest import REPOSITORY
from fuzzing import fuzz
from hypothesis import event, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data.choice import Choice, Settings
from data.preparation import prepare
from data.row_sources import ROWS
from utils import UserError

TOKENIZER = AutoTokenizer.from_pretrained(REPOSITORY / "assets" / "tiny")
TOKENIZER.pad_token_id = TOKENIZER.eos_token_id
TEMPLATE = str(REPOSITORY / "assets" / "human_assistant.jinja")

words = st.sampled_from(
    ["", " ", "a", " b", "no ", "\n\nAssistant:", "é", "語", "\u2028", "\0", "<|endoftext|>", '"', "\\"]
)
texts = st.lists(words, max_size=5).map("".join)
numbers = st.one_of(st.integers(-2, 5), st.floats(allow_nan=False, width=16), st.just(2**70))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("xy"), inner, max_size=2)),
    max_leaves=4,
)
roles = st.sampled_from(["user", "assistant", "system", "tool", "robot"])
message = st.fixed_dictionaries({"role": roles, "content": texts})
messages = st.lists(message, min_size=1, max_size=4)
scored = st.fixed_dictionaries({"response": texts, "overall_score": st.one_of(numbers, st.none())})
FORMATS = [
    {"prompt": texts, "chosen": texts, "rejected": texts},
    {"chosen": texts, "rejected": texts},
    {"prompt": messages, "chosen": messages, "rejected": messages},
    {"chosen": messages, "rejected": messages},
    {"prompt": texts, "completion": texts, "label": st.one_of(st.booleans(), st.integers(0, 2))},
    {"prompt": texts, "completions": st.lists(texts, max_size=3), "scores": st.lists(numbers, max_size=3)},
    {"instruction": texts, "completions": st.lists(scored, max_size=3)},
    {"messages": messages, "tools": st.one_of(st.none(), texts, st.lists(anything, max_size=2))},
    {"text": texts},
]


def mutated(fields: dict[str, st.SearchStrategy]) -> st.SearchStrategy:
    """Draw rows of a format, some with a missing field, a field of the wrong type, or extra fields."""
    good = st.fixed_dictionaries(fields)
    bad = st.fixed_dictionaries(
        {}, optional={name: st.one_of(of_field, anything) for name, of_field in fields.items()} | {"more": anything}
    )
    return st.lists(st.one_of(good, good, bad), min_size=1, max_size=6)


rows_of_any_format = st.sampled_from(FORMATS).flatmap(mutated)
broken_lines = st.one_of(
    st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")),
    st.sampled_from([b"[1]", b"5", b"null", b'{"a": ', b"\xff\xfe", b'{"a": 1, "a": 2}', b'{"prompt": "\\ud83d"}',
                     b"\xef\xbb\xbf", b"\0\0\0", b"", b" ", b"{}", b"NaN", b'{"text": "a"', b'"']),
)  # fmt: skip


def check(name: str, content: bytes, n_rows: int | None):
    """Prepare a file for each kind of loss, with bad rows skipped and with bad rows refused, and check the outcomes.

    `n_rows`: the number of rows in the file, if it is known.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        path.write_bytes(content)
        for kinds in (("pairs",), ("pairs", "unpaired"), ("targets",)):
            outcomes = {}
            for skips_bad in (True, False):
                given_ = Settings(skips_bad=skips_bad, chat_template=TEMPLATE)
                try:
                    both = prepare(
                        Choice(str(path)), given_, TOKENIZER, "keep_end", kinds, f"{directory}/cache", silent=True
                    )
                except UserError as error:
                    assert str(path) in str(error) and "Traceback" not in str(error)
                    outcomes[skips_bad] = str(error)
                    continue
                info = both["train"].info
                read, bad = info["train_rows"]["n_read"], sum(info["train_rows"]["bad"].values())
                assert read == info["train"]["n_prompts"] + info["test"]["n_prompts"] + bad
                assert n_rows is None or read == n_rows
                assert skips_bad or bad == 0
                for part in both.values():
                    check_part(part)
                outcomes[skips_bad] = bad
            event(str({key: "error" if isinstance(value, str) else "read" for key, value in outcomes.items()}))
            if outcomes[True] == 0:
                assert outcomes[False] == 0
            elif isinstance(outcomes[True], int):
                assert "rows that can't be used" in outcomes[False]


def check_part(part):
    """Check that every response has one end token, and that pairs and target are among the prompt's responses."""
    for prompt in part:
        for ids in prompt.response_ids:
            assert len(ids) > 1 and ids[-1] == TOKENIZER.eos_token_id and ids.count(TOKENIZER.eos_token_id) == 1
        for chosen, rejected in prompt.pairs:
            assert prompt.responses[chosen] != prompt.responses[rejected] or prompt.other is not None
        assert prompt.sft_target == prompt.responses[prompt.target]


def lines_of(rows: list[dict]) -> list[bytes]:
    return [json.dumps(row).encode() for row in rows]


@fuzz(4)
@given(rows_of_any_format, st.lists(st.tuples(st.integers(0, 6), broken_lines), max_size=2), st.booleans())
def test_random_json_lines_are_read_or_refused(rows, broken, is_compressed):
    lines = lines_of(rows)
    for place, line in broken:
        lines.insert(place, line)
    content = b"".join(line + b"\n" for line in lines)
    n_rows = len(lines) if not broken else None
    name = "rows.jsonl.gz" if is_compressed else "rows.jsonl"
    check(name, gzip.compress(content) if is_compressed else content, n_rows)


@fuzz(4)
@given(rows_of_any_format, st.integers(0, 400), st.binary(max_size=3), st.sampled_from(["json", "jsonl", "jsonl.gz"]))
def test_damaged_files_are_read_or_refused(rows, position, damage, suffix):
    content = b"\n".join(lines_of(rows)) + b"\n" if suffix != "json" else json.dumps(rows, indent=1).encode()
    content = gzip.compress(content) if suffix.endswith("gz") else content
    position %= len(content)
    check(f"rows.{suffix}", content[:position] + damage, None)
    check(f"rows.{suffix}", content[:position] + damage + content[position + len(damage) :], None)


@fuzz(4)
@given(st.lists(st.lists(texts, min_size=1, max_size=4), min_size=1, max_size=5), st.sampled_from(["csv", "tsv"]))
def test_random_csv_is_read_or_refused(records, suffix):
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t" if suffix == "tsv" else ",")
    writer.writerows([["prompt", "chosen", "rejected"], *records])
    check(f"rows.{suffix}", buffer.getvalue().encode(), None)


@fuzz(4)
@given(rows_of_any_format)
def test_random_parquet_is_read_or_refused(rows):
    try:
        table = pyarrow.Table.from_pylist(rows)
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(table, buffer)
    except (pyarrow.ArrowException, OverflowError):  # Arrow can't hold these rows
        return
    check("rows.parquet", buffer.getvalue(), len(rows))


@fuzz(4)
@given(st.lists(anything, max_size=4), rows_of_any_format)
def test_random_python_rows_are_kept_or_counted_as_bad(others, rows):
    given_ = [*rows, *others]
    with tempfile.TemporaryDirectory() as directory:
        try:
            ROWS["mine"] = given_
            both = prepare(Choice("mine"), Settings(skips_bad=True, chat_template=TEMPLATE), TOKENIZER, "keep_end",
                           ("targets",), directory, silent=True)  # fmt: skip
        except UserError:
            return
        info = both["train"].info
        kept = info["train"]["n_prompts"] + info["test"]["n_prompts"]
        assert info["train_rows"]["n_read"] == len(given_) == kept + sum(info["train_rows"]["bad"].values())
