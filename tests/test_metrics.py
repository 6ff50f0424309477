"""Metrics that the original lacks equal their definitions."""

import math

import numpy as np
import pytest
import torch
from conftest import ORACLE, read_jsonl, trainers_in
from test_cli import SHORT, TOY

from evaluation import sampling
from log_probabilities import response_lengths
from reporting.metrics import kl_metrics, mean_metrics
from reporting.usage import peak_flops

DPO = [*SHORT, "loss=dpo", "sample_during_eval=false"]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """Return a trainer whose policy differs from its reference, so that no metric is 0."""
    trainer = trainers_in(tmp_path_factory.mktemp("trainer"))(*DPO, "batch_size=8")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return trainer


def test_lengths_nll_and_log_ratios_match_their_definitions(trainer):
    trainer.policy.eval()
    (batch, *_) = trainer.eval_batches
    with torch.no_grad():
        policy, reference = trainer.concatenated_forward(trainer.policy, batch), trainer.reference_logps(batch)
    for averaged in (True, False):
        trainer.config.loss.average_log_prob = averaged
        metrics = trainer.get_batch_metrics(batch, trainer.config.loss, train=False)[1]
        for side, logps, reference_logps in zip(("chosen", "rejected"), policy, reference, strict=True):
            n_tokens = response_lengths(batch[f"{side}_labels"])
            assert metrics[f"lengths_eval/{side}"].tolist() == n_tokens.tolist()
            torch.testing.assert_close(metrics[f"nll_eval/{side}"], -logps / n_tokens)
            torch.testing.assert_close(metrics[f"logratios_eval/{side}"], logps - reference_logps, rtol=1e-4, atol=1e-4)
        assert not metrics["rewards_eval/ties"].any()


def test_sft_has_no_rejected_nll_and_losses_without_reference_have_no_logratios_or_kl(make_trainer):
    for loss, nll_metrics in (
        ("sft", ["nll_eval/chosen", "nll_eval/chosen_se"]),
        ("simpo", ["nll_eval/chosen", "nll_eval/rejected", "nll_eval/chosen_se"]),
    ):
        metrics = make_trainer(*SHORT, f"loss={loss}").evaluate()
        assert [key for key in metrics if key.startswith("nll")] == nll_metrics
        assert not [key for key in metrics if key.startswith(("logratios", "kl"))]


def test_standard_errors_are_those_of_the_mean(trainer):
    metrics, every = trainer.evaluate(), []
    for batch in trainer.eval_batches:
        with torch.no_grad():
            every.append(trainer.get_batch_metrics(batch, trainer.config.loss, train=False)[1])
    for name in ("loss/eval", "rewards_eval/accuracies", "rewards_eval/margins", "nll_eval/chosen"):
        values = torch.cat([metrics[name] for metrics in every]).double().numpy()
        assert metrics[f"{name}_se"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), rel=1e-4)
    assert "rewards_eval/chosen_se" not in metrics
    # one example has no standard error
    assert mean_metrics([{"loss/eval": torch.tensor([2.0])}], n_examples=1) == {"loss/eval": 2.0}


def test_small_split_is_evaluated_whole_and_once_whatever_the_batch_size(make_trainer):
    data = ["test_fraction=0.5", f"datasets=[{ORACLE}/hh/test.jsonl]", "max_length=128", "max_prompt_length=64"]
    means = []
    for sizes in (["n_eval_examples=null", "eval_batch_size=64"], ["n_eval_examples=1000", "eval_batch_size=7"]):
        trainer = make_trainer(*DPO, *data, *sizes)
        prompts = trainer.eval_iterator.prompts
        assert sum(len(batch["prompt"]) for batch in trainer.eval_batches) == sum(len(p.pairs) for p in prompts) < 32
        assert len(set(trainer.eval_iterator.example_numbers())) == trainer.eval_iterator.n_examples
        means.append(trainer.evaluate())
    for other in means[1:]:
        for name in ("nll_eval/chosen", "nll_eval/chosen_se", "logps_eval/rejected"):
            assert other[name] == pytest.approx(means[0][name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("overrides", [[], ["shared_prompt=false", "precompute_ref_log_probs=true", "lora={r:4}"]])
def test_kl_is_measured_on_the_policys_own_samples(overrides, make_trainer, monkeypatch):
    """Compare with whole forward passes over the sampled tokens."""
    trainer = make_trainer(*TOY, "loss=dpo", "n_eval_model_samples=6", "n_examples=8", *overrides)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    drawn = []
    generate = sampling.generate_as_targets
    monkeypatch.setattr(sampling, "generate_as_targets", lambda *a, **k: drawn.append(generate(*a, **k)) or drawn[-1])
    samples, kl = sampling.sample_evaluation(trainer)
    logratios, n_tokens = [], 0
    targets = drawn[0][1]
    assert [sample["response"] for sample in samples if sample["model"] == "policy"] == drawn[0][0]
    for ids, mask, labels in zip(*targets.values(), strict=True):
        ids, labels = ids[mask.bool()][None], labels[mask.bool()][1:]
        with torch.no_grad():
            policy_logits = trainer.policy(input_ids=ids).logits
            with trainer.reference.active() as model:
                difference = policy_logits.log_softmax(-1) - model(input_ids=ids).logits.log_softmax(-1)
        of_tokens = difference[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        logratios.append(of_tokens[labels != -100].sum().item())
        n_tokens += int((labels != -100).sum())
        response = trainer.tokenizer.decode(labels[labels != -100], skip_special_tokens=True)
        assert response and response in drawn[0][0][len(logratios) - 1]
    assert kl["kl_eval/per_response"] == pytest.approx(np.mean(logratios), rel=1e-3, abs=1e-4)
    assert kl["kl_eval/per_token"] == pytest.approx(sum(logratios) / n_tokens, rel=1e-3, abs=1e-5)
    assert kl["kl_eval/per_response_se"] == pytest.approx(np.std(logratios, ddof=1) / math.sqrt(6), rel=1e-2)
    assert kl_metrics([]) == {}
    # one sample has no standard error
    assert kl_metrics([(1.5, 3)]) == {"kl_eval/per_response": 1.5, "kl_eval/per_token": 0.5}


def test_flop_utilisation_counts_what_the_parameters_need(make_trainer):
    """Per parameter and token: 2 operations forward, 2 backward for the inputs, 2 for its gradient if trained."""
    trainer = make_trainer(*DPO)
    n = sum(parameter.numel() for parameter in trainer.policy.parameters())
    assert "model_flops_utilisation" not in trainer.throughput.metrics(8, 1000, 2.0)  # there is no GPU
    for overrides, per_token in (([], 6 * n + 2 * n), (["precompute_ref_log_probs=true"], 6 * n)):
        throughput = make_trainer(*DPO, *overrides).throughput
        throughput.peak = 1e12
        rates = throughput.metrics(8, 1000, 2.0)
        assert rates["model_flops_utilisation"] == pytest.approx(1000 * per_token / 2 / 1e12)
        assert (rates["examples_per_second"], rates["tokens_per_second"]) == (4, 500)
    lora = make_trainer(*DPO, "lora={r:4}").throughput
    assert lora.flops_per_token == 4 * lora.n_parameters + 2 * lora.n_trained + 2 * lora.n_parameters
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA H100 PCIe": 756e12, "T4": None}
    assert {name: peak_flops(name) for name in names} == names


def test_run_logs_the_added_metrics_and_tokens_per_second(train_ok, tmp_path):
    train_ok(*SHORT, "loss=dpo", f"local_run_dir={tmp_path}/run")
    lines = read_jsonl(tmp_path / "run/metrics.jsonl")
    for line in lines:
        split = line["split"]
        names = [f"{name}_{split}" for name in ("nll", "lengths", "logratios")]
        assert {f"{name}/{side}" for name in names for side in ("chosen", "rejected")} <= line.keys()
        assert ("tokens_per_second" in line) == (split == "train")
        assert ("kl_eval/per_token" in line) == ("loss/eval_se" in line) == (split == "eval")
    assert (lines[0]["rewards_eval/ties"], lines[0]["kl_eval/per_response"]) == (1.0, pytest.approx(0, abs=1e-3))
    train = lines[1]
    n_prompt_and_responses = train["tokens_per_second"] / train["examples_per_second"]
    assert n_prompt_and_responses > train["lengths_train/chosen"] + train["lengths_train/rejected"]
