"""The command line: errors before training, and the files of a run."""

import json
import os
import shlex
import shutil

import pytest
import torch
from conftest import ORACLE, REPOSITORY, mark_exhaustive_except, read_jsonl
from launcher import train_after
from safetensors.torch import load_file

from commands.command_line import compose_config

TOY = [
    "model=tiny",
    "datasets=[toy]",
    "n_eval_examples=16",
    "n_eval_model_samples=2",
    "max_length=40",
    "max_prompt_length=32",
]
CHECKPOINT_FILES = [
    "README.md", "SHA256SUMS", "config.json", "generation_config.json", "model.safetensors", "optimizer.pt",
    "policy.pt", "rng.pt", "scheduler.pt", "state.json", "tokenizer.json", "tokenizer_config.json",
]  # fmt: skip
SHORT = [*TOY, "n_examples=8", "lr=1e-3"]


def assert_refused(result, tmp_path, *parts: str):
    """Check that the command failed with a message that has these parts, without a traceback or a run directory."""
    assert result.returncode == 1, result.stdout[-2000:] + result.stderr[-2000:]
    assert "Traceback" not in result.stderr + result.stdout
    message = result.stderr[result.stderr.index("error: ") :]
    for part in parts:
        assert part in message, message
    assert_no_run(tmp_path)


def assert_no_run(tmp_path):
    left = [str(path) for path in tmp_path.rglob("*") if path.name in ("config.yaml", "metrics.jsonl", "LATEST")]
    assert left == []


CONFIG_ERRORS = {
    "no model": ([], ["missing keys", "model.name_or_path", "model=NAME", "pythia28"]),
    "unknown model": (["model=pythia2.8"], ["no model=pythia2.8", "Did you mean pythia28?", "or give a folder"]),
    "unknown loss": (["model=tiny", "loss=dbo"], ["no loss=dbo", "Did you mean dpo?", "ipo", "sft"]),
    "unknown key": (["model=tiny", "batchsize=4"], ["no config key 'batchsize'", "Did you mean batch_size?"]),
    "key without its group": (
        ["model=tiny", "loss=dpo", "beta=1"],
        ["no config key 'beta'", "Did you mean loss.beta?"],
    ),
    "key added with a plus": (["model=tiny", "+modle.archive=x"], ["'modle.archive'", "Did you mean model.archive?"]),
    "option of another loss": (["model=tiny", "loss.beta=1"], ["loss.beta: the chosen loss has no such", "loss=dpo"]),
    "option added to another loss": (["model=tiny", "+loss.beta=1"], ["loss=sft has no such option"]),
    "number for a dataset": (["model=tiny", "datasets=[1]"], ["datasets=[1]: expected names"]),
    "optimizer for sparse gradients": (["model=tiny", "optimizer=SparseAdam"], ["optimizer=SparseAdam"]),
    "unreadable override": (["model=tiny", "datasets=[hh"], ["can't read 'datasets=[hh'"]),
    "unknown trainer": (["model=tiny", "trainer=BasicTrainr"], ["Did you mean BasicTrainer?"]),
    "unknown optimizer": (["model=tiny", "optimizer=RMSPropp"], ["Did you mean RMSprop?", "AdamW"]),
    "optimizer that needs a closure": (["model=tiny", "optimizer=LBFGS"], ["optimizer=LBFGS", "one gradient per step"]),
    "no dataset": (["model=tiny", "datasets=[]"], ["datasets=[]", "at least one"]),
    "batch that doesn't divide": (
        ["model=tiny", "batch_size=6", "gradient_accumulation_steps=4"],
        ["batch_size=6", "gradient_accumulation_steps=4", "equal size"],
    ),
    "no room for a response": (
        ["model=tiny", "max_prompt_length=512"],
        ["max_prompt_length=512", "below max_length=512"],
    ),
    "evaluation within a batch": (["model=tiny", "eval_every=3"], ["eval_every=3", "below batch_size=4"]),
    "checkpoint within a batch": (["model=tiny", "save_every=3"], ["save_every=3", "below batch_size=4"]),
    "keep no checkpoint": (["model=tiny", "keep_checkpoints=0"], ["keep_checkpoints=0: must be a number above 0"]),
    "resume without a directory": (["model=tiny", "resume=auto"], ["resume=auto", "also give local_run_dir"]),
    "resume from nowhere": (["model=tiny", "resume=nowhere"], ["resume=nowhere: no such directory"]),
    "no end of training": (["model=tiny", "n_epochs=null"], ["n_epochs and n_examples are both null"]),
    "string for a number": (["model=tiny", "lr=fast"], ["lr=fast: expected a number"]),
    "fraction for an integer": (["model=tiny", "batch_size=1.5"], ["batch_size=1.5: expected an integer"]),
    "negative": (["model=tiny", "n_examples=-1"], ["n_examples=-1: must be a number above 0"]),
    "label smoothing too large": (["model=tiny", "loss=dpo", "loss.label_smoothing=0.5"], ["must be below 0.5"]),
    "shared_prompt=maybe": (["model=tiny", "shared_prompt=maybe"], ["auto, true or false"]),
    "port without FSDP": (["model=tiny", "fsdp_port=1234"], ["fsdp_port=1234", "leave it null"]),
    "unknown dtype": (["model=tiny", "model.policy_dtype=fp32"], ["model.policy_dtype=fp32", "bfloat16"]),
    "mixed precision that needs loss scaling": (
        ["model=tiny", "model.fsdp_policy_mp=float16"],
        ["bfloat16", "scaling"],
    ),
    "no such archive": (
        ["model=tiny", "model.archive=LATEST/policy.pt"],
        ["model.archive=LATEST/policy.pt", "no such"],
    ),
}


@pytest.mark.parametrize("name", CONFIG_ERRORS)
def test_config_error_names_key_and_remedy(name, refusal, tmp_path):
    overrides, parts = CONFIG_ERRORS[name]
    message = refusal(*overrides)
    assert all(part in message for part in parts), message
    assert_no_run(tmp_path)


COMMAND = [REPOSITORY / "train.py", *SHORT, "sample_during_eval=false", "wandb.enabled=false", "curves=false"]


@pytest.mark.exhaustive
def test_train_py_reports_a_users_mistake(run_python, tmp_path):
    assert_refused(run_python(*COMMAND, "batchsize=4"), tmp_path, "Did you mean batch_size?")


def test_train_py_trains(run_python, tmp_path):
    result = run_python(*COMMAND, f"local_run_dir={tmp_path}/run")
    assert result.returncode == 0, result.stderr
    assert " 4/8 " in result.stdout
    assert sorted(path.name for path in (tmp_path / "run/LATEST").iterdir()) == CHECKPOINT_FILES
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.fixture
def broken_files(tmp_path):
    """Write files that a user might give by mistake."""
    (tmp_path / "garbage.pt").write_bytes(b"not a checkpoint")
    state = load_file(ORACLE / "figures" / "sft_weights.safetensors")
    torch.save({"step_idx": 0, "state": state, "metrics": {}}, tmp_path / "other_model.pt")
    torch.save(state, tmp_path / "bare_state.pt")
    torch.save({"step_idx": 0, "state": {"run": os.system}, "metrics": {}}, tmp_path / "code.pt")
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    for name, bad in (
        ("no_field", {"chosen": row["chosen"]}),
        ("no_value", {**row, "rejected": None}),
        ("eos", {**row, "rejected": row["rejected"] + "<|endoftext|>"}),
    ):
        (tmp_path / name).mkdir()
        rows = [bad] if name == "no_field" else [row, row, bad]
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "model_without_weights").mkdir()
    for name in ("model_without_tokenizer", "model_with_pointer"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            if name == "model_with_pointer" or not file.startswith("tokenizer"):
                shutil.copy(ORACLE / "model" / file, tmp_path / name)
    (tmp_path / "model_with_pointer/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


LOADING_ERRORS = {  # the model is tiny unless one is named
    "unknown dataset": (["datasets=[hhh]"], ["no such dataset", "Did you mean hh?", "toy"]),
    "dataset out of reach": (["datasets=[hh]"], ["Anthropic/hh-rlhf", "dataset_paths.hh=DIR"]),
    "row without a field": (["datasets=[hh]", "dataset_paths.hh=no_field"], ["[hh], train split, row 0", "'rejected'"]),
    "row with an empty field": (["datasets=[hh]", "dataset_paths.hh=no_value"], ["[hh], train split, row 2", "empty"]),
    "row with the end token": (["datasets=[hh]", "dataset_paths.hh=eos"], ["train split, row 2", "<|endoftext|>"]),
    "less than one batch": (["datasets=[toy]", "batch_size=30000", "eval_every=30000"], ["2000 ", "batch_size"]),
    "unreadable archive": (["datasets=[toy]", "model.archive=garbage.pt"], ["garbage.pt", "can't read it"]),
    "archive without a state": (["datasets=[toy]", "model.archive=bare_state.pt"], ["bare_state.pt", "can't read it"]),
    "archive with code": (["datasets=[toy]", "model.archive=code.pt"], ["code.pt", "can't read it"]),
    "archive of another model": (
        ["datasets=[toy]", "model.archive=other_model.pt"],
        ["other_model.pt doesn't fit the model", "shape (512, 64), the model's is (2048, 128)"],
    ),
    "model out of reach": (
        ["datasets=[toy]", "model=blank_model", "model.name_or_path=nobody/nothing"],
        ["model.name_or_path=nobody/nothing", "local folder"],
    ),
    "model folder without weights": (
        ["datasets=[toy]", "model=blank_model", "model.name_or_path=./model_without_weights"],
        ["model_without_weights"],
    ),
    "model folder without a tokenizer": (
        ["datasets=[toy]", "model=blank_model", "model.name_or_path=./model_without_tokenizer", "max_length=128",
         "max_prompt_length=64"],
        ["model_without_tokenizer", "has no vocabulary"],
    ),
    "model folder with a pointer for weights": (
        ["datasets=[toy]", "model=blank_model", "model.name_or_path=./model_with_pointer"],
        ["can't load model.name_or_path=./model_with_pointer"],
    ),
    "tokenizer of another model": (
        ["datasets=[toy]", "model=blank_model", f"model.name_or_path={ORACLE}/model", "max_length=128",
         "max_prompt_length=64", "model.tokenizer_name_or_path=${repository:}/assets/tiny"],
        ["2048 tokens", "embeds 512", "model.tokenizer_name_or_path"],
    ),
    "block of another model": (["datasets=[toy]", "model.block_name=GPTNeoXLayr"], ["Did you mean GPTNeoXLayer?"]),
    "longer than the model": (["datasets=[toy]", "max_length=2000"], ["max_length=2000", "1024 positions"]),
    "wrong optimizer argument": (["datasets=[toy]", "optimizer_args={momentumm:1}"], ["RMSprop", "momentumm"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADING_ERRORS)
def test_loading_error_names_key_and_remedy(name, refusal, tmp_path, broken_files):
    overrides, parts = LOADING_ERRORS[name]
    model = [] if any(override.startswith("model=") for override in overrides) else ["model=tiny"]
    message = refusal(*model, *overrides)
    assert all(part in message for part in parts), message
    assert_no_run(tmp_path)


def test_infinite_loss_stops_with_step_and_prompts_and_keeps_the_log(train, tmp_path):
    result = train(
        *SHORT, "lr=1e30", "optimizer=SGD", "max_grad_norm=1e30", "warmup_steps=0", "sample_during_eval=false",
        f"local_run_dir={tmp_path}/run",
    )  # fmt: skip
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    message = result.stderr[result.stderr.index("error: ") :]
    assert "step 2 (after 4 examples): loss" in message
    assert message.count("Please write a short review") == 4
    assert "smaller lr" in message
    assert [line["counters/updates"] for line in read_jsonl(tmp_path / "run/metrics.jsonl")] == [0, 1]


def test_weights_that_the_last_step_made_infinite_are_not_saved(train, tmp_path):
    overrides = ["lr=1e30", "optimizer=SGD", "max_grad_norm=1e30", "warmup_steps=0", "do_first_eval=false"]
    result = train(*SHORT, "n_examples=4", *overrides, "sample_during_eval=false", f"local_run_dir={tmp_path}/run")
    assert result.returncode == 1
    assert "evaluation after 4 examples: loss nan" in result.stderr
    assert not (tmp_path / "run/LATEST").exists()


def test_directory_of_another_run_is_refused(train, tmp_path):
    (tmp_path / "run").mkdir()
    config = f"local_run_dir: {tmp_path}/run\nseed: 0\n"
    (tmp_path / "run" / "config.yaml").write_text(config)
    result = train(*SHORT, f"local_run_dir={tmp_path}/run")
    assert result.returncode == 1
    assert "holds another run" in result.stderr
    assert "resume=auto" in result.stderr
    assert (tmp_path / "run" / "config.yaml").read_text() == config


@pytest.mark.parametrize("loss", mark_exhaustive_except(["sft", "dpo"], "dpo"))
def test_run_writes_its_files_and_nothing_else(loss, train_ok, tmp_path):
    output = train_ok(*SHORT, f"loss={loss}", "eval_every=5", "warmup_steps=1")
    assert "Setting eval_every to 4" in output
    (run_dir,) = (tmp_path / "cache").glob(f"*/{loss}_tiny_*")
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "LATEST", "config.yaml", "metrics.jsonl", "samples.jsonl", "step-4",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    for checkpoint in ("LATEST", "step-4"):
        files = sorted(path.name for path in (run_dir / checkpoint).iterdir())
        assert files == CHECKPOINT_FILES

    lines = read_jsonl(run_dir / "metrics.jsonl")
    order = [(line["split"], line["counters/examples"], line["counters/updates"]) for line in lines]
    assert order == [("eval", 0, 0), ("train", 4, 1), ("eval", 4, 1), ("train", 8, 2), ("eval", 8, 2)]
    assert [line["lr"] for line in lines if line["split"] == "train"] == pytest.approx([5e-4, 1e-3])

    latest = torch.load(run_dir / "LATEST" / "policy.pt", weights_only=True)
    assert (latest["step_idx"], latest["metrics"]) == (
        8,
        {k: v for k, v in lines[-1].items() if "/" in k and "counters" not in k},
    )
    assert torch.load(run_dir / "step-4/scheduler.pt", weights_only=True)["state"]["last_epoch"] == 1

    models = ["policy"] if loss == "sft" else ["policy", "reference"]
    samples = read_jsonl(run_dir / "samples.jsonl")
    assert len(samples) == 3 * 2 * len(models)
    assert {sample["model"] for sample in samples} == set(models)
    assert all(sample["sample"].startswith(sample["prompt"]) for sample in samples)


def test_reference_free_dpo_loads_no_reference(make_trainer, capsys):
    first = make_trainer(*SHORT, "loss=dpo", "loss.reference_free=true").evaluate()
    assert "building reference model" not in capsys.readouterr().out
    assert first["rewards_eval/chosen"] == pytest.approx(0.1 * first["logps_eval/chosen"], rel=1e-6)


def test_same_seed_repeats_a_run_exactly(train_ok, tmp_path):
    losses = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_ok(
            *SHORT,
            f"seed={seed}",
            "sample_during_eval=false",
            "do_first_eval=false",
            f"local_run_dir={tmp_path}/{name}",
        )
        losses[name] = [
            line["loss/train"] for line in read_jsonl(tmp_path / name / "metrics.jsonl") if line["split"] == "train"
        ]
    assert losses["a"] == losses["b"]
    assert losses["a"] != losses["c"]


@pytest.mark.exhaustive
def test_microbatches_and_activation_checkpointing_give_the_same_numbers(train_ok, tmp_path):
    lines = {}
    for name, overrides in {
        "plain": [],
        "microbatches": ["gradient_accumulation_steps=4"],
        "checkpointing": ["activation_checkpointing=true"],
    }.items():
        train_ok(*SHORT, "sample_during_eval=false", f"local_run_dir={tmp_path}/{name}", *overrides)
        lines[name] = read_jsonl(tmp_path / name / "metrics.jsonl")
    for name in ("microbatches", "checkpointing"):
        for ours, plain in zip(lines[name], lines["plain"], strict=True):
            for key in ("loss/train", "loss/eval", "grad_norm"):
                if key in plain:
                    assert ours[key] == pytest.approx(plain[key], rel=1e-5)


def test_mixed_precision_computes_in_bfloat16_under_either_name(train_ok, tmp_path):
    losses = {}
    for name, overrides in {
        "float32": [],
        "policy_mp": ["model.policy_mp=bfloat16"],
        "fsdp_policy_mp": ["model.fsdp_policy_mp=bfloat16"],
    }.items():
        train_ok(*SHORT, "sample_during_eval=false", f"local_run_dir={tmp_path}/{name}", *overrides)
        losses[name] = read_jsonl(tmp_path / name / "metrics.jsonl")[0]["loss/eval"]
    assert losses["policy_mp"] == losses["fsdp_policy_mp"] != losses["float32"]
    assert losses["policy_mp"] == pytest.approx(losses["float32"], rel=1e-2)
    state = torch.load(tmp_path / "policy_mp/LATEST/policy.pt", weights_only=True)["state"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_debug_saves_no_checkpoint(train_ok, tmp_path):
    output = train_ok(
        *SHORT, "debug=true", "wandb.enabled=true", "sample_during_eval=false", f"local_run_dir={tmp_path}/run"
    )
    assert "skipping save in debug mode" in output
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
    ]


def test_missing_wandb_matters_only_when_enabled(train, tmp_path):
    script = train_after("import sys\nsys.modules['wandb'] = sys.modules['peft'] = None\n", tmp_path)
    run = [*SHORT, "sample_during_eval=false"]
    result = train(*run, script=script)
    assert result.returncode == 0, result.stderr
    result = train(*run, "wandb.enabled=true", script=script)
    assert result.returncode == 1
    assert "wandb.enabled=false" in result.stderr


@pytest.mark.exhaustive
def test_model_that_cannot_share_prompts_trains_without_sharing_or_is_refused(train, tmp_path):
    config = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 2048}
    model_dir = tmp_path / "bloom"
    shutil.copytree(REPOSITORY / "assets" / "tiny", model_dir)
    (model_dir / "config.json").write_text(json.dumps(config))
    overrides = [*SHORT, "loss=dpo", f"model.name_or_path={model_dir}", "model.block_name=null"]
    overrides.append("sample_during_eval=false")
    refused = train(*overrides, "shared_prompt=true", f"local_run_dir={tmp_path}/refused")
    assert refused.returncode == 1
    assert "shared_prompt=true, but the model BloomForCausalLM can't" in refused.stderr
    assert not (tmp_path / "refused").exists()
    result = train(*overrides, f"local_run_dir={tmp_path}/run")
    assert result.returncode == 0
    assert "Prefix sharing: off; " in result.stdout


# ---- paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word",
    mark_exhaustive_except(
        ["local_run_dir=~/run", "'local_run_dir=\"~/run\"'", "local_dirs=[~/cache]", "resume=~/missing",
         "model.archive=~/p.pt", "chat_template=~/t.jinja", "datasets=[hh] dataset_paths.hh=~/hh",
         "-m loss.beta=0.1 hydra.sweep.dir=~/sweep"],
        "local_run_dir=~/run", "local_dirs=[~/cache]", "datasets=[hh] dataset_paths.hh=~/hh",
        "-m loss.beta=0.1 hydra.sweep.dir=~/sweep",
    ),
)  # fmt: skip
def test_tilde_is_the_home_directory_in_every_path(word, train, tmp_path):
    (tmp_path / "home").mkdir()
    result = train(
        *SHORT, "debug=true", "sample_during_eval=false", *shlex.split(word), env={"HOME": f"{tmp_path}/home"}
    )
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("~")]
    assert "~" not in result.stderr, result.stderr
    if result.returncode:  # no such file: the message has the full path
        assert f"{tmp_path}/home/" in result.stderr
    else:
        assert any((tmp_path / "home").iterdir())


@pytest.mark.parametrize(
    ("name", "model"),
    [("pythia28", "pythia28"), ("EleutherAI/pythia-70m", "pythia-70m"), (f"{ORACLE}/model/", "model"),
     ("blank_model", "model")],
)  # fmt: skip
def test_default_exp_name_is_loss_and_model_name(name, model):
    assert compose_config(f"model={name}", "loss=sft").exp_name == f"sft_{model}"


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/elsewhere", "a/../../../b"])
def test_exp_name_cannot_leave_the_local_directory(name, train, tmp_path):
    result = train(*SHORT, f"exp_name={name}")
    assert result.returncode == 1
    assert f"error: exp_name={name} leads out of" in result.stderr and "local_run_dir" in result.stderr
    assert "Traceback" not in result.stderr
