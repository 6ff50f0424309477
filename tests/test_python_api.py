"""Training from Python on rows in memory, by the code in docs/data.md."""

import pytest
from conftest import mark_exhaustive_except, read_jsonl

import preference_datasets
from data.row_sources import rows_of_list
from train import compose_config, run
from utils import UserError

LINES = """\
from preference_datasets import ROWS
from train import compose_config, run

ROWS["mine"] = [
    {"prompt": "What color is the sky?", "chosen": " Blue.", "rejected": " Green."},
    {"prompt": "What color is grass?", "chosen": " Green.", "rejected": " Blue."},
    {"prompt": "What color is snow?", "chosen": " White.", "rejected": " Black."},
]
metrics, run_dir = run(compose_config("model=tiny", "datasets=[mine]", "loss=dpo", "batch_size=2", "eval_every=2"))
print(metrics["rewards_eval/accuracies"], run_dir)
"""


@pytest.mark.parametrize("trainer", mark_exhaustive_except(["BasicTrainer", "FSDPTrainer"], "BasicTrainer"))
def test_few_lines_train_on_rows_given_in_python(trainer, launcher, tmp_path):
    options = f'"wandb.enabled=false", "local_dirs=[{tmp_path}/cache]", "local_run_dir={tmp_path}/run", '
    options += f'"curves=false", "sample_during_eval=false", "trainer={trainer}", "world_size=2"'
    lines, call = LINES.split("metrics, run_dir = run(compose_config(")
    call = f"metrics, run_dir = run(compose_config({options}, {call}".replace("\n", "\n    ")
    code = f"{lines}if __name__ == '__main__':\n    {call}"
    code = code.replace(', "world_size=2"', "") if trainer == "BasicTrainer" else code
    (tmp_path / "mine.py").write_text(code)
    assert launcher.run(script=tmp_path / "mine.py", as_typed=True) == 0, launcher.output
    read = "mine (train): preferences (prompt, chosen, rejected); 3 rows read, 2 prompts with 2 pairs"
    assert read in launcher.output
    metrics = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [line["counters/examples"] for line in metrics if line["split"] == "train"] == [2]
    assert (tmp_path / "run" / "LATEST" / "model.safetensors").exists()
    last = [line for line in metrics if line["split"] == "eval"][-1]
    assert f"{last['rewards_eval/accuracies']} {tmp_path}/run\n" in launcher.output


RUN = ["model=tiny", "loss=dpo", "batch_size=1", "eval_every=1", "max_length=64", "max_prompt_length=32"]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("mine", [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 2, r"row 0: chosen and rejected are the same"),
        ("mine", [{"prompt": "a", "chosen": "b"}, ["c"]], r"datasets=\[mine\], row 1: \['c'\] isn't a dict of fields"),
        ("mine", [{"prompt": "a", "chosen": {1, 2}}], "expected rows of strings, numbers, lists and dicts"),
        ("mine", [], r"datasets=\[mine\].*there are no rows"),
        (
            "hh",
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
            "a built-in dataset has that name; give your rows anoth",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_refused(name, rows, message, make_trainer, monkeypatch):
    monkeypatch.setitem(preference_datasets.ROWS, name, rows)
    with pytest.raises(UserError, match=message):
        make_trainer(*RUN, f"datasets=[{name}]")


def test_fields_that_the_first_row_lacks_are_read():
    rows = [{"prompt": "a"}, {"prompt": "b", "tools": [{"x": None}]}]
    assert next(rows_of_list("mine", rows).chunks(9)) == [(0, "", rows[0]), (1, "", rows[1])]


MISTAKES = {  # overrides, and the message of the command line
    "unknown key": (["learning_rate=1"], r"no config key 'learning_rate'\. learning_rate is called lr here"),
    "unreadable value": (["exp_name=it's"], "can't read \"exp_name=it's\": a quote ' in the middle of a value"),
    "unknown model": (["model=tinny"], r"no model=tinny\. Did you mean tiny"),
    "wrong value": (["lr=-1"], "lr=-1: must be a number above 0"),
    "no such file": (["datasets=[~/nowhere.jsonl]"], r"datasets=\[/.*/nowhere.jsonl\]: there is no such file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_raise_the_messages_of_the_command_line(mistake, tmp_path):
    overrides, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message):
        run(compose_config("model=tiny", f"local_run_dir={tmp_path}/run", *overrides))
