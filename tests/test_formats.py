"""Every published data format is recognized, tokenized as written here by hand, and trained on."""

import gzip
import io
import json
import re
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
from conftest import REPOSITORY, mark_exhaustive_except, read_jsonl
from transformers import AutoTokenizer

from data.choice import Choice, Settings
from preference_datasets import get_batch_iterator
from utils import UserError

TEMPLATE = REPOSITORY / "assets" / "human_assistant.jinja"
END = "<|endoftext|>"
SHORT = [
    "model=tiny", "batch_size=2", "n_examples=4", "n_eval_examples=2", "eval_batch_size=2", "max_length=64",
    "max_prompt_length=32", "sample_during_eval=false", "debug=true", f"chat_template={TEMPLATE}",
]  # fmt: skip

# the tokens of the texts below, by hand
SKY, SEA = "The Ġsk y Ġis", "The Ġs ea Ġis"
BLUE, GREEN, GRAY = "Ġb l ue .", "Ġg re en .", "Ġgra y ."
ASKED_SKY = "W h at Ġcolor Ġis Ġthe Ġsk y ?"
ASKED_SEA = "W h at Ġcolor Ġis Ġthe Ġs ea ?"
HUMAN_SKY = "Ċ Ċ Human : ĠWhat Ġcolor Ġis Ġthe Ġsk y ? Ċ Ċ Assistant :"
HUMAN_SEA = "Ċ Ċ Human : ĠWhat Ġcolor Ġis Ġthe Ġs ea ? Ċ Ċ Assistant :"
IT_IS = "ĠIt Ġis"

TEXTS = [{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
         {"prompt": "The sea is", "chosen": " gray.", "rejected": " blue."}]  # fmt: skip
PAIRS = [(SKY, BLUE, GREEN), (SEA, GRAY, BLUE)]
CHAT_PAIRS = [(HUMAN_SKY, f"{IT_IS} {BLUE}", f"{IT_IS} {GREEN}"), (HUMAN_SEA, f"{IT_IS} {GRAY}", f"{IT_IS} {BLUE}")]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


ASK = [user("What color is the sky?")], [user("What color is the sea?")]
SAY = {color: [assistant(f"It is {color}.")] for color in ("blue", "green", "gray")}
SIDES = [("blue", "green"), ("gray", "blue")]  # chosen and rejected of the sky, and of the sea


def ultrafeedback(prompt: str, scores: dict[str, float]) -> dict:
    """Return a row with the fields of openbmb/UltraFeedback."""
    completions = [
        {
            "annotations": {"helpfulness": {"Rating": "4", "Rationale": "Good."}},
            "custom_system_prompt": "Be helpful.",
            "model": "alpaca-7b",
            "principle": "helpfulness",
            "response": response,
            "critique": "Fine.",
            "fine-grained_score": 4.0,
            "overall_score": score,
        }
        for response, score in scores.items()
    ]
    row = {"source": "evol_instruct", "instruction": prompt, "models": ["alpaca-7b"], "completions": completions}
    return row | {"correct_answers": ["None"], "incorrect_answers": ["None"]}


FORMATS = {  # loss, rows, the format's name in the log, and each example: prompt, chosen, rejected; or prompt, target
    "preference": ("dpo", TEXTS, "preferences (prompt, chosen, rejected)", PAIRS),
    "preference, the prompt being the shared start": (
        "dpo", [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in TEXTS],
        "preferences as whole dialogues", PAIRS,
    ),
    "preference, conversational": (
        "dpo", [{"prompt": ask, "chosen": SAY[a], "rejected": SAY[b]} for ask, (a, b) in zip(ASK, SIDES, strict=True)],
        "preferences as messages (prompt, chosen, rejected)", CHAT_PAIRS,
    ),
    "preference, conversational, the prompt being the shared start": (
        "dpo", [{"chosen": ask + SAY[a], "rejected": ask + SAY[b]} for ask, (a, b) in zip(ASK, SIDES, strict=True)],
        "their shared start is the prompt", CHAT_PAIRS,
    ),
    "ultrafeedback_binarized": (
        "dpo",
        [{"prompt": ask[0]["content"], "prompt_id": "5", "chosen": ask + SAY[a], "rejected": ask + SAY[b],
          "messages": ask + SAY[a], "score_chosen": 8.0, "score_rejected": 6.5}
         for ask, (a, b) in zip(ASK, SIDES, strict=True)],
        "preferences as messages", CHAT_PAIRS,
    ),
    "trl-lib/ultrafeedback_binarized": (
        "dpo", [{"chosen": ask + SAY[a], "rejected": ask + SAY[b], "score_chosen": 8.0, "score_rejected": 6.5}
                for ask, (a, b) in zip(ASK, SIDES, strict=True)],
        "preferences as messages", CHAT_PAIRS,
    ),
    "HH transcripts": (
        "dpo",
        [{"chosen": f"\n\nHuman: {ask[0]['content']}\n\nAssistant: It is {a}.",
          "rejected": f"\n\nHuman: {ask[0]['content']}\n\nAssistant: It is {b}."}
         for ask, (a, b) in zip(ASK, SIDES, strict=True)],
        "preferences as whole dialogues", CHAT_PAIRS,
    ),
    "UltraFeedback": (
        "dpo", [ultrafeedback("The sky is", {" green.": 2.0, " blue.": 8.5}),
                ultrafeedback("The sea is", {" gray.": 7.0, " blue.": 3.0})],
        "several responses to a prompt (instruction, completions with their scores)", PAIRS,
    ),
    "scored responses": (
        "dpo",
        [{"prompt": "The sky is", "responses": [" green.", " gray.", " blue."], "scores": [1, 2, 3]}],
        "several responses to a prompt (prompt, responses, scores)",
        [(SKY, GRAY, GREEN), (SKY, BLUE, GREEN), (SKY, BLUE, GRAY)],
    ),
    "ranked responses, two of them equally good": (
        "dpo", [{"question": "The sky is", "answers": [" blue.", " green.", " gray."], "ranks": [1, 2, 2]}],
        "(question, answers, ranks)", [(SKY, BLUE, GREEN), (SKY, BLUE, GRAY)],
    ),
    "scored responses to messages": (
        "dpo", [{"prompt": ASK[0], "responses": ["It is green.", "It is blue."], "scores": [0.5, 1.5]}],
        "several responses", CHAT_PAIRS[:1],
    ),
    "stack-exchange-paired": (
        "dpo", [{"qid": 1, "question": "The sky is", "chosen": " blue.", "rejected": " green."},
                {"qid": 2, "question": "The sea is", "chosen": " gray.", "rejected": " blue."}],
        "preferences (question, chosen, rejected)", PAIRS,
    ),
    "language modeling": ("sft", [{"text": "The sky is"}, {"text": "The sea is"}], "texts without a prompt",
                          [("", SKY), ("", SEA)]),
    "language modeling, conversational": (
        "sft", [{"messages": ask + SAY[a]} for ask, (a, _) in zip(ASK, SIDES, strict=True)], "dialogues as messages",
        [pair[:2] for pair in CHAT_PAIRS],
    ),
    "prompt-completion": (
        "sft", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in TEXTS], "a response to each prompt",
        [pair[:2] for pair in PAIRS],
    ),
    "prompt-completion, conversational": (
        "sft", [{"prompt": ask, "completion": SAY[a]} for ask, (a, _) in zip(ASK, SIDES, strict=True)],
        "a response to each prompt", [pair[:2] for pair in CHAT_PAIRS],
    ),
    "instruction and output": (
        "sft", [{"instruction": row["prompt"], "output": row["chosen"]} for row in TEXTS], "a response to each prompt",
        [pair[:2] for pair in PAIRS],
    ),
    "SFT on preferences": ("sft", TEXTS, "preferences", [pair[:2] for pair in PAIRS]),
    "SFT on the best of several": (
        "sft", [ultrafeedback("The sky is", {" green.": 2.0, " blue.": 8.5})], "several responses", [(SKY, BLUE)],
    ),
    "SFT on the desirable of unpaired": (
        "sft", [{"prompt": "The sky is", "completion": " green.", "label": False},
                {"prompt": "The sky is", "completion": " blue.", "label": True}],
        "single responses with a label", [(SKY, BLUE)],
    ),
}  # fmt: skip


def jsonl(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def separated(rows: list[dict], mark: str) -> bytes:
    lines = [mark.join(rows[0]), *(mark.join(f'"{value}"' for value in row.values()) for row in rows)]
    return "\n".join(lines).encode() + b"\n"


def zipped(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


FILES = {  # the same rows in every kind of file
    "rows.jsonl": jsonl(TEXTS),
    "rows.ndjson": jsonl(TEXTS).replace(b"\n", b"\n\n").replace(b"\n", b"\r\n"),
    "rows.json": json.dumps(TEXTS, indent=1).encode(),
    "rows.jsonl.gz": gzip.compress(jsonl(TEXTS)),
    "rows.jsonl.zst": pyarrow.compress(jsonl(TEXTS), "zstd", asbytes=True),
    "rows.zip": zipped("train.jsonl", jsonl(TEXTS)),
    "rows.parquet": parquet(TEXTS),
    "rows.csv": separated(TEXTS, ","),
    "rows.csv.gz": gzip.compress(separated(TEXTS, ",")),
    "ROWS.CSV.GZ": gzip.compress(separated(TEXTS, ";")),
    "rows.tsv": separated(TEXTS, "\t"),
}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "assets" / "tiny")
    tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


@pytest.fixture
def examples(tokenizer, tmp_path):
    """Return a function that reads all examples of both splits, sorted: (prompt, chosen + end, rejected + end).

    All are token ids. It also checks the labels.
    """

    def read(dataset: str | Choice, loss: str = "dpo", **settings) -> list[tuple[list[int], ...]]:
        settings = Settings(**({"chat_template": str(TEMPLATE)} | settings))
        found = []
        for split in ("train", "test"):
            for batch in get_batch_iterator(
                [dataset], tokenizer, split, n_epochs=1, drop_last=False, sft_mode=loss == "sft", silent=True,
                mismatched=loss == "kto", unpaired=loss == "kto", cache_dir=str(tmp_path / "cache"), settings=settings,
            ):  # fmt: skip
                found.append(_parts(batch))
        return sorted(found)

    return read


def _parts(batch: dict) -> tuple[list[int], ...]:
    parts = [batch["prompt_input_ids"][0].tolist()]
    for side in ("chosen", "rejected"):
        if f"{side}_labels" in batch:
            ids, labels = batch[f"{side}_input_ids"][0].tolist(), batch[f"{side}_labels"][0].tolist()
            start = len(parts[0])
            assert ids[:start] == parts[0]
            assert labels == [-100] * start + ids[start:]  # only the response and its end are trained
            parts.append(ids[start:])
    return tuple(parts)


def expected_ids(tokenizer, examples: list[tuple[str, ...]]) -> list[tuple[list[int], ...]]:
    return sorted(
        tuple(
            tokenizer.convert_tokens_to_ids(tokens.split()) for tokens in (prompt, *(f"{r} {END}" for r in responses))
        )
        for prompt, *responses in examples
    )


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_the_tokens_written_by_hand(name, examples, tokenizer, tmp_path):
    loss, rows, _, expected = FORMATS[name]
    # of a single row, nothing could be held out, so give the rows as the test split, too
    (tmp_path / "train.jsonl").write_bytes(jsonl(rows))
    (tmp_path / "test.jsonl").write_bytes(jsonl(rows))
    assert examples(f"{tmp_path}/*.jsonl", loss) == sorted(2 * expected_ids(tokenizer, expected))


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_examples(name, examples, tokenizer, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    assert examples(f"{tmp_path}/{name}") == expected_ids(tokenizer, PAIRS)


@pytest.mark.parametrize("loss", mark_exhaustive_except(["dpo", "sft"], "dpo"))
def test_all_formats_at_once_train_from_the_command_line(loss, train_ok, tmp_path):
    descriptions, n_examples = {}, 0
    for number, (of_loss, rows, description, expected) in enumerate(FORMATS.values()):
        if of_loss == loss:
            (tmp_path / f"{number}-train.jsonl").write_bytes(jsonl(rows))
            (tmp_path / f"{number}-test.jsonl").write_bytes(jsonl(rows))
            descriptions[f"{tmp_path}/{number}-*.jsonl"] = description
            n_examples += len(expected)
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
        descriptions[f"{tmp_path}/{name}"] = "preferences (prompt, chosen, rejected)"
        n_examples += 1  # the other row is held out
    chosen = ",".join(f"'{name}'" for name in descriptions)
    output = train_ok(
        *SHORT, f"loss={loss}", f"datasets=[{chosen}]", f"local_run_dir={tmp_path}/run", "n_examples=null", "n_epochs=1"
    )
    for name, description in descriptions.items():
        assert re.search(rf"^{re.escape(name)} \(train\): .*{re.escape(description)}.* rows? read", output, re.M), name
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["counters/examples"] == n_examples // 2 * 2


REFUSED = {  # loss, rows, parts of the message
    "only prompts": ("dpo", [{"prompt": "The sky is"}], "there are prompts but no responses to train on"),
    "stepwise supervision": (
        "dpo", [{"prompt": "Which?", "completions": ["One.", "Two."], "labels": [True, False]}], "stepwise supervision",
    ),
    "no format": ("dpo", [{"a": "x", "b": 1}], "unknown format.*its fields are a \\(string\\), b \\(number"),
    "responses for dpo": ("dpo", [{"prompt": "a", "completion": "b"}], "use loss=sft"),
    "unpaired for dpo": ("dpo", [{"prompt": "a", "completion": "b", "label": True}], "use loss=kto"),
    "responses for kto": ("kto", [{"prompt": "a", "completion": "b"}], "use loss=sft"),
    "all of one label": ("kto", [{"prompt": "a", "completion": "b", "label": True}] * 2, "have the same label"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_format_that_a_loss_cannot_use_is_refused_with_a_remedy(name, examples, tmp_path):
    loss, rows, message = REFUSED[name]
    (tmp_path / "train.jsonl").write_bytes(jsonl(rows))
    (tmp_path / "test.jsonl").write_bytes(jsonl(rows))
    with pytest.raises(UserError) as error:
        examples(f"{tmp_path}/*.jsonl", loss)
    assert re.search(message, str(error.value), re.DOTALL), error.value
    assert "datasets=[" in str(error.value)


# ---- fields and texts -----------------------------------------------------------------------------------------------


def test_fields_maps_column_names(examples, tokenizer, tmp_path):
    rows = [{"q": row["prompt"], "good": row["chosen"], "bad": row["rejected"], "prompt": 5} for row in TEXTS]
    (tmp_path / "rows.jsonl").write_bytes(jsonl(rows))
    fields = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert examples(Choice(f"{tmp_path}/rows.jsonl", fields=fields)) == expected_ids(tokenizer, PAIRS)
    with pytest.raises(UserError, match=r"fields.chosen=goood: there is no column 'goood'\. Did you mean good?"):
        examples(Choice(f"{tmp_path}/rows.jsonl", fields=fields | {"chosen": "goood"}))


def test_bad_first_row_does_not_decide_the_format(examples, tokenizer, tmp_path):
    _, rows, _, expected = FORMATS["preference, conversational"]
    bad = [rows[0] | {"chosen": "It is blue."}, rows[0] | {"chosen": []}, rows[0] | {"chosen": None}]
    (tmp_path / "rows.jsonl").write_bytes(jsonl([*bad, *rows, *rows]))
    found = examples(f"{tmp_path}/rows.jsonl", skips_bad=True)
    assert found == sorted(2 * expected_ids(tokenizer, expected))


def test_number_among_the_lists_of_responses_is_a_bad_row(examples, tmp_path):
    rows = [{"prompt": "Which?", "completions": ["One.", "Two."], "scores": [1, 2]} for _ in range(3)]
    (tmp_path / "rows.jsonl").write_bytes(jsonl([*rows, rows[0] | {"completions": 3}]))
    with pytest.raises(UserError, match=r"row 3 .*'completions' is 3"):
        examples(f"{tmp_path}/rows.jsonl")


def test_prompt_of_text_dialogues_ends_between_words(examples, tokenizer, tmp_path):
    rows = [{"chosen": "The sky is blue.", "rejected": "The sky is black."},
            {"chosen": "The sky is blue.\nSo it is.", "rejected": "The sky is blue.\nSorry."}]  # fmt: skip
    (tmp_path / "rows.jsonl").write_bytes(jsonl(rows))
    decoded = [tuple(tokenizer.decode(ids) for ids in example) for example in examples(f"{tmp_path}/rows.jsonl")]
    assert sorted(decoded) == [
        ("The sky is", f" blue.{END}", f" black.{END}"),
        ("The sky is blue.\n", f"So it is.{END}", f"Sorry.{END}"),
    ]


def test_csv_words_such_as_none_and_na_are_read_as_text(examples, tokenizer, tmp_path):
    (tmp_path / "rows.csv").write_text('prompt,chosen,rejected\nq,None,NA\nr,null,"n/a"\n')
    decoded = [tuple(tokenizer.decode(ids) for ids in example) for example in examples(f"{tmp_path}/rows.csv")]
    assert sorted(decoded) == [("q", f"None{END}", f"NA{END}"), ("r", f"null{END}", f"n/a{END}")]


def test_csv_numbers_are_read_as_text(examples, tokenizer, tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\n1+1,2,3.50\n007,4,1e5\n")
    decoded = [tuple(tokenizer.decode(ids) for ids in example) for example in examples(f"{tmp_path}/rows.csv")]
    assert sorted(decoded) == [("007", f"4{END}", f"1e5{END}"), ("1+1", f"2{END}", f"3.50{END}")]
