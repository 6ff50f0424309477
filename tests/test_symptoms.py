"""A run that goes wrong gives each warning once, with advice; a healthy run gives none."""

import json
import math
import re

import pytest
from conftest import REPOSITORY
from omegaconf import OmegaConf
from test_cli import TOY

from data.toy import get_toy
from losses import LOSSES
from reporting.symptoms import N_CLIPPED, N_EVALUATIONS, Symptoms, loss_at_reference


def config(**loss) -> OmegaConf:
    options = {name: option.default for name, option in LOSSES[loss.get("name", "dpo")].options.items()}
    return OmegaConf.create({"loss": {"name": "dpo", **options, **loss}, "max_grad_norm": 10.0, "warmup_steps": 5})


def evaluation(examples: int = 100, loss: float = 0.5, accuracy: float = 0.8, chosen: float = 1, rejected: float = -5):
    return {
        "counters/examples": examples, "loss/eval": loss, "rewards_eval/accuracies": accuracy,
        "rewards_eval/accuracies_se": 0.03, "logratios_eval/chosen": chosen, "logratios_eval/rejected": rejected,
        "lengths_eval/chosen": 20.0,
    }  # fmt: skip


def warnings_of(symptoms: Symptoms, *evaluations: dict) -> list[str]:
    return [text for metrics in evaluations for text in symptoms.notice("eval", metrics)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("dpo", math.log(2)), ("ipo", 25.0), ("robust_dpo", math.log(2)), ("hinge", 1.0), ("exo", None), ("sft", None),
     ("simpo", None), ("dpo_nll", None), ("orpo", None)],
)  # fmt: skip
def test_loss_at_the_reference_is_the_expected_number_or_none(name, expected):
    value = loss_at_reference(config(name=name).loss)
    if name == "exo":  # a constant without a short formula
        assert value is not None
    else:
        assert value == (None if expected is None else pytest.approx(expected, rel=1e-4))
    assert loss_at_reference(config(name="dpo", reference_free=True).loss) is None


def test_loss_at_the_reference_is_finite_or_none_for_every_loss():
    for name in LOSSES:
        options = LOSSES[name].options
        if not any(option.is_required for option in options.values()):
            value = loss_at_reference(config(name=name).loss)
            assert value is None or math.isfinite(value), name


EVALUATIONS_WITH = {
    "overfitting": [evaluation(loss=0.71)] * N_EVALUATIONS,
    "accuracy-at-chance": [evaluation(accuracy=0.52)] * N_EVALUATIONS,
    "falling-together": [evaluation(chosen=-50.0, rejected=-60.0)] * N_EVALUATIONS,
}


@pytest.mark.parametrize("name", EVALUATIONS_WITH)
def test_symptom_is_reported_once_after_several_evaluations_in_a_row(name):
    symptoms, shown = Symptoms(config()), EVALUATIONS_WITH[name]
    assert warnings_of(symptoms, *shown[:-1], evaluation(), *shown[:-1]) == []
    (text,) = warnings_of(symptoms, shown[0])
    assert "\n" not in text and "Try " in text and text.endswith(f"; see docs/metrics.md#{name}")
    assert warnings_of(symptoms, evaluation(), *shown, *shown) == []


def test_healthy_run_reports_no_symptoms():
    good = [evaluation(0, 0.6931, 0.0, 0.0, 0.0)] * 5
    good += [evaluation(chosen=-2.0, rejected=-40.0), evaluation(loss=0.4), evaluation(chosen=3.0, rejected=1.0)] * 4
    good += [evaluation(chosen=-1.0, rejected=-1.1)] * 5  # a twentieth of a nat per token
    assert warnings_of(Symptoms(config()), *good) == []
    assert warnings_of(Symptoms(config(name="simpo")), *[{"counters/examples": 8, "loss/eval": 9.0}] * 5) == []


def test_constant_clipping_is_reported():
    symptoms = Symptoms(config())
    steps = [{"grad_norm": 11.0, "counters/updates": i + 1} for i in range(5 + N_CLIPPED)]  # five of them of warmup
    texts = [symptoms.notice("train", step) for step in steps]
    assert [len(text) for text in texts] == [0] * (4 + N_CLIPPED) + [1]
    assert "max_grad_norm=10" in texts[-1][0] and texts[-1][0].endswith("see docs/metrics.md#always-clipped")
    symptoms = Symptoms(config())
    mixed = [{"grad_norm": 11.0 if i % 20 else 9.0, "counters/updates": 100 + i} for i in range(200)]
    assert not any(symptoms.notice("train", step) for step in mixed)


def test_symptom_links_exist_in_the_docs():
    headings = re.findall(r"^#+ (.*)$", (REPOSITORY / "docs/metrics.md").read_text(), re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    assert {*EVALUATIONS_WITH, "always-clipped"} <= anchors


@pytest.mark.exhaustive
@pytest.mark.slow
def test_overfitting_run_reports_overfitting(launcher, tmp_path):
    """The run trains for many epochs on a few pairs of the toy data."""
    for split, n in (("train", 16), ("test", 64)):
        pairs = [(prompt, entry["responses"], entry["pairs"][0]) for prompt, entry in get_toy(split)[:n]]
        rows = [{"chosen": p + texts[a], "rejected": p + texts[b]} for p, texts, (a, b) in pairs]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = [
        *TOY, "datasets=[hh]", f"dataset_paths.hh={tmp_path}", "loss=dpo", "loss.beta=1", "n_epochs=40",
        "batch_size=16", "lr=1e-3", "warmup_steps=0", "n_eval_examples=64", "eval_every=80", "sample_during_eval=false",
    ]  # fmt: skip
    assert launcher.run(*run, f"local_run_dir={tmp_path}/run") == 0, launcher.output
    assert launcher.output.count("docs/metrics.md#overfitting") == 1
    assert re.search(r"^WARNING: the evaluation loss .* has been above 0.6931", launcher.output, re.MULTILINE)
