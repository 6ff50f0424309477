"""Training from Python: on rows in memory, by the code in docs/data.md, and with a trainer made by hand."""

import math

import pytest
import torch
from conftest import REPOSITORY, mark_exhaustive_except, read_jsonl
from datasets import Dataset
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import preference_datasets
from data.row_sources import rows_of_list
from train import compose_config, run
from trainers import BasicTrainer
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
            "mine",
            Dataset.from_list([{"prompt": "a"}]),
            r"ROWS\['mine'\] is a Dataset, expected a list of dicts: list\(",
        ),
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


# ---- a trainer made by hand, as with the original's code ------------------------------------------------------------

TOY = ["model=tiny", "datasets=[toy]", "loss=dpo", "batch_size=2", "n_examples=4", "n_eval_examples=2",
       "eval_every=2", "max_length=64", "max_prompt_length=32", "sample_during_eval=false",
       "wandb.enabled=false", "curves=false"]  # fmt: skip


def new_model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(REPOSITORY / "assets" / "tiny"))


@pytest.fixture
def train_by_hand(tmp_path):
    """Return a function that trains a policy with a config that wasn't checked, and returns the trainer."""

    def train(policy, *overrides: str, as_dict: bool = False, **kwargs) -> BasicTrainer:
        config = compose_config(*TOY, f"local_dirs=[{tmp_path}/cache]", *overrides)
        config = OmegaConf.to_container(config, resolve=True) if as_dict else config
        trainer = BasicTrainer(policy, config, 0, str(tmp_path / "run"), **kwargs)
        trainer.train()
        trainer.save()
        return trainer

    return train


@pytest.mark.parametrize("as_dict", [False, True])
def test_trainer_made_by_hand_compares_with_the_reference_it_is_given(as_dict, train_by_hand, tmp_path):
    reference = new_model()
    trainer = train_by_hand(new_model(), as_dict=as_dict, reference_model=reference)
    assert trainer.reference.model is reference
    first, *_, last = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert first["loss/eval"] == pytest.approx(math.log(2))
    assert last["counters/examples"] == 4 and (tmp_path / "run" / "LATEST" / "policy.pt").exists()


def test_policy_with_its_adapter_off_is_the_reference_of_a_trainer_made_by_hand(train_by_hand, tmp_path):
    policy = get_peft_model(new_model(), LoraConfig(r=2, target_modules="all-linear"))
    trainer = train_by_hand(policy, "lora={r:2}", "lr=1e-3", "warmup_steps=0")
    assert trainer.reference.model is policy
    first, *_, last = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if line["split"] == "eval"]
    assert first["loss/eval"] == pytest.approx(math.log(2)) and last["loss/eval"] != first["loss/eval"]


def test_trainer_made_by_hand_refuses_what_it_cannot_do(train_by_hand, tmp_path):
    with pytest.raises(UserError, match=r"loss=dpo needs a reference_model: BasicTrainer\(\.\.\., reference_model="):
        train_by_hand(new_model())
    with pytest.raises(UserError, match=r"reference_model is the policy itself.*: copy\.deepcopy\(policy\)"):
        train_by_hand(policy := new_model(), reference_model=policy)
    train_by_hand(new_model(), "loss=sft")
    logged = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"run/metrics\.jsonl is an earlier run's: choose another run directory"):
        train_by_hand(new_model(), "loss=sft")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == logged


def test_tokenizer_without_a_padding_token_is_refused_with_the_line_that_sets_one():
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "assets" / "tiny")
    with pytest.raises(UserError, match=r"set tokenizer\.pad_token_id = tokenizer\.eos_token_id"):
        next(iter(preference_datasets.get_batch_iterator(["toy"], tokenizer, n_epochs=1)))


def test_run_refuses_a_config_that_is_a_dict():
    with pytest.raises(UserError, match=r"run\(\) got a dict: give it compose_config"):
        run({"model": "tiny"})
