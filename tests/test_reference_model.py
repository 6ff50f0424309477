"""`reference_model` names a separate reference; the default of `model.reference_dtype`."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ORACLE, REPOSITORY, mark_exhaustive_except, read_jsonl, trainers_in
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from checkpointing.train_state import read_state_json
from commands.run_directory import create_run_dir
from log_probabilities import _get_batch_logps
from references import Source, reference_source
from utils import UserError

TOY = [
    "model=tiny", "datasets=[toy]", "n_examples=8", "n_eval_examples=4", "eval_batch_size=4", "lr=1e-3",
    "warmup_steps=0", "sample_during_eval=false", "do_first_eval=false", "max_length=64", "max_prompt_length=32",
    "loss=dpo", "model.policy_dtype=float64", "model.reference_dtype=float64",
]  # fmt: skip
LN_2 = 0.6931471805599453


def finished(trainer) -> str:
    """Train and save; return the run's LATEST."""
    create_run_dir(trainer.config)
    trainer.train()
    trainer.save()
    return f"{trainer.run_dir}/LATEST"


@pytest.fixture(scope="module")
def sft(tmp_path_factory) -> str:
    """Return the last checkpoint of a short SFT run."""
    return finished(trainers_in(tmp_path_factory.mktemp("sft"))(*TOY, "loss=sft", "lr=3e-3"))


@pytest.fixture(scope="module")
def dpo(tmp_path_factory, sft) -> str:
    """Return the last checkpoint of a short DPO run that started from `sft`."""
    return finished(trainers_in(tmp_path_factory.mktemp("dpo"))(*TOY, f"model.archive={sft}"))


def hand_logps(directory: str, batch: dict, side: str) -> torch.Tensor:
    """Compute log π(y|x) of a batch's responses with transformers, from a checkpoint directory."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = model(batch[f"{side}_input_ids"], attention_mask=batch[f"{side}_attention_mask"]).logits
    return _get_batch_logps(logits, batch[f"{side}_labels"])


def hand_losses(policy: str, reference: str, batch: dict, beta: float = 0.1) -> list[float]:
    """Compute the loss of each pair by Eq. 7 of the DPO paper."""
    ratios = [hand_logps(d, batch, "chosen") - hand_logps(d, batch, "rejected") for d in (policy, reference)]
    return (-F.logsigmoid(beta * (ratios[0] - ratios[1]))).tolist()


@pytest.mark.parametrize("precompute", mark_exhaustive_except([False, True], False))
def test_dpo_run_is_continued_against_its_sft_model(precompute, make_trainer, sft, dpo):
    overrides = [*TOY, f"model.archive={dpo}", f"precompute_ref_log_probs={precompute}"]
    trainer = make_trainer(*overrides, f"reference_model.archive={sft}")
    batch = trainer.eval_batches[0]
    losses = trainer.get_batch_metrics(batch, trainer.config.loss)[1]["loss/train"].tolist()
    assert losses == pytest.approx(hand_losses(dpo, sft, batch), rel=1e-9)
    assert all(abs(loss - LN_2) > 1e-6 for loss in losses)

    against_itself = make_trainer(*overrides)
    losses = against_itself.get_batch_metrics(batch, trainer.config.loss)[1]["loss/train"].tolist()
    assert losses == pytest.approx([LN_2] * 4, abs=1e-12)

    finished(trainer)
    state = read_state_json(f"{trainer.run_dir}/LATEST")
    assert state["config"]["reference_model.archive"] == sft
    assert state["config"]["reference"] == "model"


def test_new_adapter_trains_against_a_separate_reference_model(make_trainer, sft, dpo):
    trainer = make_trainer(*TOY, "lora={r:4}", f"model.archive={dpo}", f"reference_model.archive={sft}")
    assert trainer.reference.model is not trainer.policy
    assert not hasattr(trainer.reference.model, "peft_config")
    batch = trainer.eval_batches[0]
    losses = trainer.get_batch_metrics(batch, trainer.config.loss)[1]["loss/train"].tolist()
    assert losses == pytest.approx(hand_losses(dpo, sft, batch), rel=1e-9)


@pytest.mark.exhaustive
def test_saved_adapter_trains_against_an_earlier_adapter(make_trainer):
    first = finished(make_trainer(*TOY, "loss=sft", "lora={r:4}", "lr=1e-2"))
    second = finished(make_trainer(*TOY, f"model.adapter={first}", "lr=1e-2"))
    trainer = make_trainer(*TOY, f"model.adapter={second}", f"reference_model.adapter={first}")
    weights = dict(trainer.reference.model.named_parameters())
    start = dict(make_trainer(*TOY, "loss=sft", f"model.adapter={first}").policy.named_parameters())
    assert all(torch.equal(weights[name], parameter) for name, parameter in start.items())
    assert not any(parameter.requires_grad for parameter in weights.values())


def test_each_reference_has_its_own_cache_whatever_the_policy_is(make_trainer, sft, dpo, capsys):
    precomputed = [*TOY, "precompute_ref_log_probs=true"]

    def n_computed(*overrides: str) -> int:
        capsys.readouterr()
        make_trainer(*precomputed, *overrides)
        return int(capsys.readouterr().out.split("Reference log-probabilities: ")[1].split()[0])

    assert n_computed(f"model.archive={sft}") == 12
    assert n_computed(f"model.archive={dpo}") == 12
    assert n_computed(f"model.archive={dpo}", f"reference_model.archive={sft}") == 0
    assert n_computed("lora={r:4}", f"reference_model.archive={dpo}") == 0


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "more"),
    [
        ("FSDPTrainer", []),
        ("FSDPTrainer", ["precompute_ref_log_probs=true"]),
        ("TensorParallelTrainer", ["lora={r:4}"]),
    ],
    ids=str,
)
def test_several_workers_with_a_reference_model_train_like_one_worker(
    trainer, more, make_trainer, sft, dpo, launcher, tmp_path
):
    overrides = [*TOY, "n_examples=8", *more, f"model.archive={dpo}", f"reference_model.archive={sft}"]
    expected = make_trainer(*overrides)
    finished(expected)
    run_dir = tmp_path / "run"
    code = launcher.run(*overrides, f"trainer={trainer}", f"local_run_dir={run_dir}", n_workers=2)
    assert code == 0, launcher.output
    lines = [read_jsonl(Path(d) / "metrics.jsonl") for d in (run_dir, expected.run_dir)]
    for ours, theirs in zip(*lines, strict=True):
        for key in theirs:
            if key.startswith(("loss", "rewards", "logps")):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-8, abs=1e-12), key


# ---- another architecture -------------------------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path):
    """Return a function that saves a model of another architecture (with windows) and the tiny model's tokenizer."""

    def save(tokenizer: bool = True, **settings) -> str:
        directory = tmp_path / f"other_{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        config = transformers.GPTNeoConfig(
            **{"vocab_size": 2048, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "window_size": 8,
               "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, "bos_token_id": 0,
               "eos_token_id": 0, **settings}
        )  # fmt: skip
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        if tokenizer:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(REPOSITORY / "assets/tiny" / name, directory)
        return str(directory)

    return save


@pytest.mark.parametrize("tokenizer", mark_exhaustive_except([True, False], True))
def test_reference_of_another_architecture_uses_its_own_layout(tokenizer, make_trainer, other):
    directory = other(tokenizer)
    trainer = make_trainer(*TOY, f"reference_model.name_or_path={directory}")
    # the policy shares prompts; the reference can't
    assert trainer.layout.shares_prompts and not trainer.reference_layout.shares_prompts
    batch = trainer.eval_batches[0]
    for ours, side in zip(trainer.reference_logps(batch), ("chosen", "rejected"), strict=True):
        torch.testing.assert_close(ours, hand_logps(directory, batch, side), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_fsdp_finds_the_blocks_of_a_reference_of_another_architecture(other, launcher, tmp_path):
    overrides = [*TOY, "model.block_name=GPTNeoXLayer", f"reference_model.name_or_path={other()}"]
    run = ["trainer=FSDPTrainer", f"local_run_dir={tmp_path}/run"]
    assert launcher.run(*overrides, *run, n_workers=2) == 0, launcher.output


def test_reference_with_other_tokens_is_refused(make_trainer, other, tmp_path):
    with pytest.raises(UserError, match=r"reference_model\.name_or_path=.*: it embeds 2000 tokens, the policy 2048"):
        make_trainer(*TOY, f"reference_model.name_or_path={other(vocab_size=2000)}")
    with pytest.raises(UserError, match=r"max_length=64: reference_model\.name_or_path=.* has only 48 positions"):
        make_trainer(*TOY, f"reference_model.name_or_path={other(max_position_embeddings=48)}")
    directory = other()
    swap_two_tokens(Path(directory))
    with pytest.raises(UserError, match=r"reference_model\.name_or_path=.*: its tokenizer .* differ in 4 entries"):
        make_trainer(*TOY, f"reference_model.name_or_path={directory}")


def swap_two_tokens(directory: Path):
    """Swap the ids of two tokens in a folder's tokenizer."""
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    (first, a), (second, b) = list(vocabulary.items())[50:52]
    vocabulary[first], vocabulary[second] = b, a
    path.write_text(json.dumps(tokenizer))


def test_tokenizer_beside_a_reference_archive_given_as_a_bare_name_is_compared(
    make_trainer, sft, tmp_path, monkeypatch
):
    shutil.copytree(sft, tmp_path / "sft")
    swap_two_tokens(tmp_path / "sft")
    monkeypatch.chdir(tmp_path / "sft")
    with pytest.raises(UserError, match=r"reference_model\.archive=policy\.pt: its tokenizer .* differ in 4 entries"):
        make_trainer(*TOY, "reference_model.archive=policy.pt")


# ---- which settings combine -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=sft", "reference_model.archive=x.pt"], "loss=sft uses no reference: leave reference, reference_model"),
        (["loss.reference_free=true", "reference_model.name_or_path=x"], "reference_free uses no reference"),
        (["reference_model.archive=x.pt"], r"reference_model\.archive=x\.pt: no such file"),
        (["reference_model.adapter=x"], r"reference_model\.adapter=x: no adapter_config\.json there"),
        (["reference_model.name_or_path=./x/y"], r"reference_model\.name_or_path=\./x/y: no such folder"),
        (
            ["lora={}", "reference=adapter_off", "reference_model.archive=x.pt"],
            r"reference_model\.archive names a second",
        ),
        (["reference=adapter_copy", "reference_model.name_or_path=x"], r"reference_model\.name_or_path names a second"),
        (["reference_model.archiv=x"], "Did you mean reference_model.archive"),
        (["reference_model=x"], "reference_model"),
        (["reference_model.archive=1"], r"reference_model\.archive=1: expected a string"),
    ],
    ids=str,
)
def test_impossible_reference_model_is_refused(overrides, message, refusal, tmp_path):
    refused = refusal(*TOY, *overrides)
    assert re.search(message, refused), refused
    assert not list(tmp_path.rglob("config.yaml"))


def test_error_for_reference_weights_that_do_not_fit_names_the_key(make_trainer, other, tmp_path):
    directory = other()
    with pytest.raises(UserError, match=rf"(?s)reference_model\.archive={directory} doesn't fit the model.*left over"):
        make_trainer(*TOY, f"reference_model.archive={directory}")
    torch.save({"step_idx": 0, "state": [], "metrics": {}}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=rf"reference_model\.archive={tmp_path}/bad\.pt: can't read it"):
        make_trainer(*TOY, f"reference_model.archive={tmp_path}/bad.pt")


def test_reference_takes_earlier_sources_from_the_policy_and_drops_later_ones():
    def source(scratch=False, **given) -> Source:
        model = {"name_or_path": "base", "archive": "weights", "adapter": "lora", "from_scratch": scratch}
        own = {"name_or_path": None, "archive": None, "adapter": None, **given}
        return reference_source(OmegaConf.create({"model": model, "reference_model": own}))

    def fields(source: Source) -> tuple:
        return source.name_or_path, source.archive, source.adapter, source.from_scratch

    assert fields(source()) == ("base", "weights", "lora", False)
    assert fields(source(adapter="x")) == ("base", "weights", "x", False)
    assert fields(source(archive="x")) == ("base", "x", None, False)
    assert fields(source(name_or_path="x", scratch=True)) == ("x", None, None, False)
    assert fields(source(archive="x", scratch=True)) == ("base", "x", None, True)
    assert fields(source(name_or_path="x", adapter="y")) == ("x", None, "y", False)
    assert source(archive="x").key("archive") == "reference_model.archive"
    assert source(archive="x").key("name_or_path") == "model.name_or_path"


# ---- the reference's dtype ------------------------------------------------------------------------------------------

NO_DTYPE = [word for word in TOY if "_dtype" not in word]
ORACLE_RUN = ["model=blank_model", f"model.name_or_path={ORACLE}/model", *NO_DTYPE[1:]]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "float32"),
        (["model.policy_dtype=bfloat16"], "bfloat16"),
        (["model.reference_dtype=float16"], "float16"),
    ],
    ids=str,
)
def test_reference_has_the_policys_dtype_unless_given(overrides, expected, make_trainer):
    trainer = make_trainer(*ORACLE_RUN, *overrides)
    assert str(trainer.reference.model.dtype) == f"torch.{expected}"


def reported_changes(output: str) -> str:
    """Return the changes that a resumed run reports."""
    return output[output.index("Changed since the run began:") :].partition("Config keys that differ")[0]


@pytest.mark.slow
def test_resumed_run_keeps_its_reference_dtype(launcher, tmp_path):
    run_dir = tmp_path / "run"
    assert launcher.run(*ORACLE_RUN, "model.reference_dtype=float16", f"local_run_dir={run_dir}") == 0, launcher.output
    # float16 was the default of an earlier version
    resumed = [*ORACLE_RUN, f"resume={run_dir}", "n_examples=24"]
    assert launcher.run(*resumed) == 0, launcher.output
    assert "reference_dtype: float16" in (run_dir / "config.yaml").read_text()
    assert "model.reference_dtype:" not in reported_changes(launcher.output)
    assert launcher.run(*resumed, "n_examples=32", "model.reference_dtype=float32") == 1
    assert "model.reference_dtype: float16 → float32" in launcher.output
