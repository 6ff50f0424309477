"""Files of responses are read in every format, and matched by prompt and sample."""

import json

import pytest

from evaluation.pairs import Pair, Response, match, read_responses
from utils import UserError


def test_alpaca_and_rows_files_match_samples(tmp_path):
    prompts = ["p0", "p1"]
    samples = {(i, k): Response(prompts[i], f"{i}/{k}") for i in (0, 1) for k in (0, 1)}
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": p, "output": f"o {p}"} for p in prompts]))
    rows = [{"index": n, "prompt": p, "chosen": f"c{n} {p}", "rejected": "r"} for n, p in enumerate(["p0", "p0", "p1"])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, n_unmatched = match(samples, read_responses("b", str(tmp_path / "alpaca.json")), False)
    assert n_unmatched == 0
    assert [(p.index, p.sample, p.a, p.b) for p in pairs] == [
        (0, 0, "0/0", "o p0"), (0, 1, "0/1", "o p0"), (1, 0, "1/0", "o p1"), (1, 1, "1/1", "o p1"),
    ]  # fmt: skip
    pairs, _ = match(read_responses("a", str(tmp_path / "rows.jsonl")), samples, False)
    assert [(p.index, p.sample, p.a, p.b) for p in pairs] == [
        (0, 0, "c0 p0", "0/0"), (0, 1, "c0 p0", "0/1"), (1, 0, "c2 p1", "1/0"), (1, 1, "c2 p1", "1/1"),
    ]  # fmt: skip


def test_alpaca_instruction_matches_the_last_message():
    roles = {"hi": "user", "?": "assistant", "x": "user"}
    messages = [{"role": role, "content": content} for content, role in roles.items()]
    alpaca = {(0, None): Response([{"role": "user", "content": "x"}], "o")}
    assert match({(0, 0): Response(messages, "r")}, alpaca, False)[0] == [Pair(0, 0, messages, "r", "o")]
    with pytest.raises(UserError, match="different prompts at prompt_index=0"):
        match({(0, 0): Response(messages[:1], "r")}, alpaca, False)


def test_unmatched_responses_are_an_error_or_counted():
    one = {(i, 0): Response("p", "t") for i in (0, 1, 2)}
    other = {(i, 0): Response("p", "u") for i in (1, 3)}
    with pytest.raises(
        UserError, match=r"prompt_index=0, sample=0 is in a and not in b \(3 responses .*allow_unmatched"
    ):
        match(one, other, False)
    pairs, n_unmatched = match(one, other, True)
    assert [pair.index for pair in pairs] == [1]
    assert n_unmatched == 3
    with pytest.raises(UserError, match=r"sample=0 is in a and not in b \(3 .*; draw both from the same prompts"):
        match({(0, 0): Response("p", "t")}, other, True)


def row(index: int, prompt: object = "p") -> str:
    return json.dumps({"prompt_index": index, "sample": 0, "prompt": prompt, "response": "r"}) + "\n"


BAD = {
    "nothing": ("", "it has no responses; give JSON Lines written by sample.py"),
    "something else": (row(0) + '{"x": 1}\n', "line 2: not a response: its fields are x; give"),
    "a cut-off line": (row(0) + row(1)[:-5], "line 2: invalid JSON: "),
    "a response twice": (row(0) + row(1) + row(0), "line 3: prompt_index=0, sample=0 is listed twice"),
    "a negative number": (row(0) + row(-1), "line 2: prompt_index and sample must be integers, 0 or more"),
    "a number as a prompt": (row(0, 5), "line 1: the prompt is neither a string nor messages"),
    "entries that are no objects": ("[1]", "entry 1: not a JSON object; give"),
}


@pytest.mark.parametrize("name", BAD)
def test_file_that_holds_no_responses_is_refused(name, tmp_path):
    content, message = BAD[name]
    (tmp_path / "b.jsonl").write_text(content)
    with pytest.raises(UserError) as error:
        read_responses("b", f"{tmp_path}/b.jsonl")
    assert str(error.value).startswith(f"b={tmp_path}/b.jsonl") and message in str(error.value)
