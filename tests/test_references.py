"""Every source of the reference's log-probabilities gives the same training; the cache reuses no outdated ones."""

import functools
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
from conftest import ORACLE, mark_exhaustive_except, read_jsonl, trainers_in
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import export
from acceleration import reference_cache
from acceleration.reference_cache import LogpsCache
from commands.run_directory import create_run_dir
from references import REFERENCE_ADAPTER
from utils import UserError

TOY = [
    "model=tiny", "datasets=[toy]", "n_examples=24", "n_eval_examples=8", "eval_batch_size=8", "lr=1e-3",
    "warmup_steps=0", "sample_during_eval=false", "do_first_eval=false",
    "model.policy_dtype=float64", "model.reference_dtype=float64", "max_length=64", "max_prompt_length=32",
]  # fmt: skip
LORA = ["lora={r:4,lora_alpha:32}"]
LN_2 = 0.6931471805599453


def train_lines(trainer) -> list[dict]:
    """Train and save; return the training lines of the run's metrics."""
    create_run_dir(trainer.config)
    trainer.train()
    trainer.save()
    return [line for line in read_jsonl(trainer_dir(trainer) / "metrics.jsonl") if line["split"] == "train"]


def trainer_dir(trainer):
    return Path(trainer.run_dir)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Return the directory of an adapter trained by SFT."""
    trainer = trainers_in(tmp_path_factory.mktemp("adapter"))(*TOY, *LORA, "loss=sft", "lr=1e-2")
    train_lines(trainer)
    return trainer_dir(trainer) / "LATEST"


@pytest.fixture(scope="module")
def lines_without_cache(tmp_path_factory):
    """Return a function that trains a run with the given overrides, once, and returns its training lines."""
    make = trainers_in(tmp_path_factory.mktemp("computed"))
    return functools.cache(lambda *overrides: train_lines(make(*overrides)))


def assert_same_training(lines: list[dict], expected: list[dict]):
    assert len(lines) == len(expected) == 6
    for line, other in zip(lines, expected, strict=True):
        for key in ("loss/train", "grad_norm", "rewards_train/margins", "logps_train/chosen"):
            assert line[key] == pytest.approx(other[key], rel=1e-6, abs=1e-6), key
    assert expected[-1]["loss/train"] != pytest.approx(LN_2, abs=1e-3)  # something has been learned


def test_base_under_the_adapter_equals_a_second_model(make_trainer, lines_without_cache):
    trainer = make_trainer(*TOY, *LORA, "loss=dpo")
    assert trainer.reference.model is trainer.policy
    assert_same_training(train_lines(trainer), lines_without_cache(*TOY, *LORA, "reference=model", "loss=dpo"))


def test_copied_adapter_equals_a_second_model_and_stays_as_it_was(make_trainer, adapter, lines_without_cache):
    overrides = [*TOY, "loss=dpo", f"model.adapter={adapter}"]
    trainer = make_trainer(*overrides)
    before = {n: p.clone() for n, p in trainer.policy.named_parameters()}
    assert_same_training(train_lines(trainer), expected := lines_without_cache(*overrides, "reference=model"))
    for name, parameter in trainer.policy.named_parameters():
        is_trained = "lora_" in name and f".{REFERENCE_ADAPTER}." not in name
        assert parameter.requires_grad == is_trained
        assert torch.equal(parameter, before[name]) != is_trained, name
    assert expected[0]["loss/train"] == pytest.approx(LN_2, abs=1e-6)


PRECOMPUTABLE = {
    "model": [],
    "model, averages": ["loss.average_log_prob=true", "loss.beta=10"],
    "adapter_off": LORA,
    "lora, model": [*LORA, "reference=model"],
}


@pytest.mark.parametrize(
    ("reference", "loss"),
    mark_exhaustive_except(
        itertools.product(PRECOMPUTABLE, ("dpo", "ipo")),
        ("model, averages", "ipo"),
    ),
)
def test_precomputed_reference_trains_like_one_computed_in_steps(reference, loss, make_trainer, lines_without_cache):
    overrides = PRECOMPUTABLE[reference]
    # with an adapter, the run without a cache has a second model as its reference
    online = [*overrides, "reference=model"] if overrides == LORA else overrides
    expected = lines_without_cache(*TOY, *online, f"loss={loss}")
    trainer = make_trainer(*TOY, *overrides, f"loss={loss}", "precompute_ref_log_probs=true")
    assert (trainer.reference is None) == (overrides != LORA)  # a second model is not kept
    assert_same_training(train_lines(trainer), expected)


@pytest.mark.exhaustive
def test_precomputed_copied_adapter_trains_like_one_computed_at_each_step(make_trainer, adapter, lines_without_cache):
    overrides = [*TOY, "loss=dpo", f"model.adapter={adapter}"]
    expected = lines_without_cache(*overrides, "reference=model")
    assert_same_training(train_lines(make_trainer(*overrides, "precompute_ref_log_probs=true")), expected)


@pytest.mark.parametrize("kind", mark_exhaustive_except(["adapter_off", "adapter_copy"], "adapter_copy"))
def test_adapter_is_back_after_an_error_inside_the_reference(kind, make_trainer, adapter):
    trainer = make_trainer(*TOY, "loss=dpo", f"model.adapter={adapter}", f"reference={kind}")
    batch = trainer.eval_batches[0]
    loss = trainer.get_batch_metrics(batch, trainer.config.loss)[1]["loss/train"].mean().item()
    # against the bare base, the saved adapter already changes the loss
    assert (loss == pytest.approx(LN_2, abs=1e-4)) == (kind == "adapter_copy")
    trained = [parameter for parameter in trainer.policy.parameters() if parameter.requires_grad]
    with torch.no_grad():
        trained[-1].normal_()
        expected = trainer.response_logps(trainer.policy, batch)
    with pytest.raises(KeyError), trainer.reference.active() as model:
        assert not torch.equal(trainer.response_logps(model, batch), expected)
        assert not any(p.requires_grad for n, p in model.named_parameters() if f".{REFERENCE_ADAPTER}." in n)
        raise KeyError
    assert torch.equal(trainer.response_logps(trainer.policy, batch).detach(), expected)
    assert [p for p in trainer.policy.parameters() if p.requires_grad] == trained


def test_adapter_that_changes_the_base_has_a_second_model_as_reference(make_trainer):
    trainer = make_trainer(*TOY, "lora={r:4,bias:all}", "loss=dpo")
    assert trainer.reference.model is not trainer.policy
    _, metrics = trainer.get_batch_metrics(trainer.eval_batches[0], trainer.config.loss)
    assert metrics["loss/train"].tolist() == pytest.approx([LN_2] * 8, abs=1e-9)


@pytest.fixture
def edited_adapter(adapter, tmp_path):
    """Return a function that copies the adapter with other settings or other names of its weights."""

    def copy(settings: dict, rename: tuple[str, str] = ("", "")) -> str:
        target = tmp_path / f"adapter_{len(list(tmp_path.iterdir()))}"
        shutil.copytree(adapter, target, ignore=shutil.ignore_patterns("SHA256SUMS"))  # its files are edited below
        config = json.loads((target / "adapter_config.json").read_text())
        (target / "adapter_config.json").write_text(json.dumps(config | settings))
        weights = load_file(target / "adapter_model.safetensors")
        save_file({k.replace(*rename): v for k, v in weights.items()}, target / "adapter_model.safetensors")
        return str(target)

    return copy


def test_dropout_of_a_saved_adapter_is_off(make_trainer, edited_adapter):
    trainer = make_trainer(*TOY, "loss=dpo", f"model.adapter={edited_adapter({'lora_dropout': 0.5})}")
    trainer.policy.train()
    first, second = (trainer.reference_logps(trainer.eval_batches[0])[0] for _ in range(2))
    assert torch.equal(first, second)


def test_adapter_of_another_model_is_refused(make_trainer, edited_adapter, capsys):
    renamed = edited_adapter({}, rename=("gpt_neox", "transformer"))
    with pytest.raises(UserError, match=r"model.adapter=.*missing adapter keys"):
        make_trainer(*TOY, "loss=dpo", f"model.adapter={renamed}")


# ---- the cache ------------------------------------------------------------------------------------------------------


def n_computed(capsys) -> int:
    """Return the number of pairs that the last reference pass computed."""
    return int(re.search(r"Reference log-probabilities: (\d+) computed", capsys.readouterr().out)[1])


PRECOMPUTED = [*TOY, "loss=dpo", "precompute_ref_log_probs=true"]


def test_evaluation_reads_and_precomputes_evaluation_pairs_alone(make_trainer, capsys):
    trainer = make_trainer(*PRECOMPUTED, purpose="evaluate")
    assert (trainer.train_iterator, trainer.optimizer) == (None, None)
    assert n_computed(capsys) == trainer.n_eval_examples == len(trainer.reference_cache.logps)
    assert trainer.evaluate()["loss/eval"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.fixture(scope="module")
def filled_cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("filled")
    assert len(trainers_in(directory)(*PRECOMPUTED).reference_cache.logps) == 32
    return directory / "cache"


@pytest.fixture
def cached(filled_cache, tmp_path):
    """Fill the cache with everything that `PRECOMPUTED` needs."""
    shutil.copytree(filled_cache, tmp_path / "cache")


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "lr=1", "batch_size=8", "gradient_accumulation_steps=2", "eval_batch_size=3", "optimizer=SGD",
            "local_run_dir=${local_dirs.0}/elsewhere", "n_examples=16", "max_length=300", "loss.beta=0.5",
            "loss.label_smoothing=0.1", "loss.average_log_prob=true",
        ],
        pytest.param(["loss=ipo", "shared_prompt=false"], marks=pytest.mark.exhaustive),
    ],
    ids=["many at once", "another loss and layout"],
)  # fmt: skip
@pytest.mark.usefixtures("cached")
def test_irrelevant_settings_reuse_the_cache(overrides, make_trainer, capsys):
    trainer = make_trainer(*PRECOMPUTED, *overrides)
    assert n_computed(capsys) == 0
    assert trainer.reference is None


@pytest.mark.parametrize(
    ("overrides", "n_expected"),
    [
        (["max_length=30", "max_prompt_length=10"], 32),  # examples have 17 + 18 tokens, so they are truncated
        (["n_examples=44"], 20),
    ],
    ids=str,
)
@pytest.mark.usefixtures("cached")
def test_relevant_settings_recompute_the_cache(overrides, n_expected, make_trainer, capsys):
    make_trainer(*PRECOMPUTED, *overrides)
    assert n_computed(capsys) == n_expected


def test_adapter_with_another_scale_is_recomputed(make_trainer, edited_adapter, capsys):
    for settings in ({}, {"lora_alpha": 64}):
        make_trainer(*PRECOMPUTED, f"model.adapter={edited_adapter(settings)}")
        assert n_computed(capsys) == 32


def test_another_data_order_reuses_the_cache(make_trainer, capsys, tmp_path):
    (tmp_path / "hh").mkdir()
    for split, n_pairs in (("train", 24), ("test", 8)):
        lines = (ORACLE / "hh" / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "hh" / f"{split}.jsonl").write_text("".join(lines[:n_pairs]))
    model = ["model=blank_model", f"model.name_or_path={ORACLE}/model"]  # not random: the seed would change the weights
    all_pairs = [*PRECOMPUTED, *model, "datasets=[hh]", f"dataset_paths.hh={tmp_path}/hh", "n_examples=null"]
    make_trainer(*all_pairs)
    assert n_computed(capsys) == 24 + 8
    make_trainer(*all_pairs, "seed=3", "n_epochs=2")
    assert n_computed(capsys) == 0


def test_interrupted_reference_pass_resumes(make_trainer, capsys, monkeypatch):
    add, n_added = LogpsCache.add, []

    def add_and_stop(self, logps):
        if n_added:
            raise KeyboardInterrupt
        n_added.append(len(logps))
        add(self, logps)

    with monkeypatch.context() as patch:
        patch.setattr(reference_cache, "_PAIRS_PER_FILE", 4)
        patch.setattr(LogpsCache, "add", add_and_stop)
        with pytest.raises(KeyboardInterrupt):
            make_trainer(*PRECOMPUTED)
    make_trainer(*PRECOMPUTED)
    assert n_added == [4]
    assert n_computed(capsys) == 32 - 4


def cache_files(tmp_path):
    return list((tmp_path / "cache").glob("*/reference_logps/*/*"))


@pytest.mark.parametrize("damage", mark_exhaustive_except(["truncated", "bit flipped", "empty"], "bit flipped"))
@pytest.mark.usefixtures("cached")
def test_damaged_cache_file_is_recomputed(damage, make_trainer, capsys, tmp_path):
    (path, _) = sorted(cache_files(tmp_path), key=lambda path: -path.stat().st_size)  # of 24 and of 8 pairs
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes({"truncated": data[:-9], "bit flipped": data, "empty": b""}[damage])
    make_trainer(*PRECOMPUTED)
    output = capsys.readouterr().out
    assert f"{path} is damaged" in output
    assert "Reference log-probabilities: 24 computed" in output
    make_trainer(*PRECOMPUTED)
    assert n_computed(capsys) == 0


@pytest.mark.usefixtures("cached")
def test_half_written_cache_file_is_ignored(make_trainer, capsys, tmp_path):
    for path in cache_files(tmp_path):
        path.rename(f"{path}.partial")
    make_trainer(*PRECOMPUTED)
    assert n_computed(capsys) == 32


@pytest.mark.exhaustive
def test_two_runs_that_start_together_leave_a_whole_cache(launcher, make_trainer, capsys, tmp_path):
    overrides = [*PRECOMPUTED, "debug=true"]
    runs = [launcher.start(*overrides, f"local_run_dir={tmp_path}/{name}", directory=tmp_path) for name in "ab"]
    assert [run.wait() for run in runs] == [0, 0], [run.output for run in runs]
    assert (tmp_path / "a/metrics.jsonl").exists()
    make_trainer(*PRECOMPUTED)
    assert n_computed(capsys) == 0


# ---- adapters on disk -----------------------------------------------------------------------------------------------


def test_adapter_opens_in_peft_and_merges_to_a_model_with_the_same_logits(make_trainer, adapter, tmp_path):
    trainer = make_trainer(*TOY, "loss=sft", f"model.adapter={adapter}")
    ids = torch.arange(1, 9)[None]
    expected = trainer.policy(ids).logits
    base = make_trainer(*TOY, "loss=sft").policy
    assert not torch.allclose(base(ids).logits, expected, atol=1e-3)
    assert torch.equal(peft.PeftModel.from_pretrained(base, adapter)(ids).logits, expected)

    export.run(OmegaConf.create({"run": str(adapter.parent), "checkpoint": "LATEST", "output": f"{tmp_path}/merged"}))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 2048


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reference=adapter_off"], "the policy has no adapter; possible: model"),
        ([*LORA, "reference=adapter_copy"], "a new adapter; possible: adapter_off, model"),
        (["reference=modle"], "must be one of auto, model, adapter_off, adapter_copy. Did you mean model?"),
        (["loss=sft", "reference=model"], "loss=sft uses no reference"),
        (["loss.reference_free=true", "precompute_ref_log_probs=true"], "reference_free uses no reference"),
        (["lora=8"], "lora=8: must be fields of LoraConfig"),
        (["lora.alpha=8"], "lora.alpha: LoraConfig has no such field. Did you mean lora_alpha"),
        (["lora={target_modules:[nothing]}"], "lora=.*nothing"),
        (["model.adapter=/nowhere"], "no adapter_config.json there"),
        (["lora={lora_dropout:0.1}"], "lora_dropout=0.1: all dropout is off"),
        (["lora={bias:all}", "reference=adapter_off"], "possible: model"),
        (["lora={init_lora_weights:pissa}", "reference=adapter_off"], "possible: model"),
        ([*LORA, "model.load_in_4bit=true"], "needs a GPU and bitsandbytes"),
    ],
    ids=str,
)
def test_invalid_reference_and_lora_settings_are_refused_with_a_remedy(overrides, message, make_trainer):
    with pytest.raises(UserError, match=message):
        make_trainer(*TOY, "loss=dpo", *overrides)
