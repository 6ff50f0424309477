"""Exact rewards and KLs equal plain sums and agree with samples. The frontier is the best reward at each KL."""

import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import REPOSITORY

from data import toy
from evaluation.sampling import generate_as_targets
from losses import LOSSES
from utils import disable_dropout, select_examples

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import frontier
import toy_length
from exact import Frontier, ResponseTree, conditioned, response_logps
from frontier import STEP_SIZE, Bench, Run, learning_rate, objectives
from frontier_report import draw, last_checkpoints, length_table, load, sweep_table

TINY = REPOSITORY / "assets/tiny"
REWARDS = toy.true_reward(toy.ALL_RESPONSES)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(TINY)


def token_ids(tokenizer, texts: list[str], end: bool) -> list[list[int]]:
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [tokens + [tokenizer.eos_token_id] * end for tokens in ids]


@pytest.fixture(scope="module")
def all_responses(tokenizer) -> list[list[int]]:
    return token_ids(tokenizer, [toy.response_text(words) for words in toy.ALL_RESPONSES], end=True)


def make_model(dtype: torch.dtype, **settings) -> torch.nn.Module:
    """Make a small GPT-NeoX with the tiny model's vocabulary, and weights so large that context matters."""
    config = transformers.AutoConfig.from_pretrained(
        TINY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **settings
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    disable_dropout(model)
    return model.to(dtype)


@torch.no_grad()
def plain_logps(model, prompt: list[int], responses: list[list[int]]) -> np.ndarray:
    """Return each response's log-probability from its own forward pass: (N,)."""
    logps = []
    for response in responses:
        ids = torch.tensor([prompt + response])
        predicted = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logps.append(predicted.gather(1, torch.tensor(response)[:, None]).sum().item())
    return np.array(logps)


@pytest.mark.exhaustive
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logps_of_the_whole_grammar_equal_plain_forwards(attention, tokenizer, all_responses):
    model = make_model(torch.float64, attn_implementation=attention)
    prompts = token_ids(tokenizer, [toy.PROMPTS[0], toy.PROMPTS[7]], end=False)
    logps = response_logps(model, ResponseTree(all_responses), prompts)
    assert logps.shape == (2, 4096)
    some = np.random.RandomState(0).choice(4096, 60, replace=False)
    for row, prompt in zip(logps, prompts, strict=True):
        # GPT-NeoX computes its rotations in float32, whatever its dtype
        np.testing.assert_allclose(row[some], plain_logps(model, prompt, [all_responses[i] for i in some]), rtol=1e-6)
    single = response_logps(make_model(torch.float32), ResponseTree(all_responses), prompts)
    np.testing.assert_allclose(single, logps, atol=2e-3)


@pytest.mark.parametrize("max_row", [1, 5, 1000])
def test_response_tree_handles_any_lengths_and_row_sizes(max_row):
    # some share prefixes, one shares nothing, one is only the end token
    responses = [[5, 6, 0], [5, 0], [5, 6, 7, 8, 9, 0], [11, 12, 0], [0], [5, 6, 7, 8, 10, 0], [5, 6, 7, 0]]
    model = make_model(torch.float64)
    tree = ResponseTree(responses, max_row)
    assert tree.lengths.tolist() == [3, 2, 6, 3, 1, 6, 4]
    for tokens_per_batch in (1, 10_000):
        (logps,) = response_logps(model, tree, [[3, 1, 4]], tokens_per_batch)
        np.testing.assert_allclose(logps, plain_logps(model, [3, 1, 4], responses), rtol=1e-6)


def test_figures_equal_sums_over_all_responses(tokenizer, all_responses):
    rng = np.random.RandomState(1)
    reference, policy = (np.log(rng.dirichlet(np.full(40, 0.5), 3)) + shift for shift in (-0.1, -0.3))
    rewards, lengths = rng.normal(size=40), rng.randint(1, 9, 40)
    figures = Frontier(reference, rewards, lengths).figures(policy)
    p, q = (np.exp(logps) / np.exp(logps).sum(1, keepdims=True) for logps in (policy, reference))
    assert figures.outside == pytest.approx(1 - np.exp(-0.3))
    assert figures.kl == pytest.approx(np.mean([(a * np.log(a / b)).sum() for a, b in zip(p, q, strict=True)]))
    assert figures.reward == pytest.approx((p * rewards).sum() / 3)
    assert figures.length == pytest.approx((p * lengths).sum() / 3)


def toy_frontier() -> Frontier:
    """Return the frontier with the toy task's own distribution as the reference."""
    slots = np.arange(4)
    logps = np.log(toy.word_distribution())[:, slots, toy.ALL_RESPONSES].sum(-1)
    return Frontier(logps, REWARDS, np.full(4096, 18))


@pytest.mark.parametrize("beta", [4.0, 1.0, 0.5, 0.2])
def test_optimum_has_the_whole_gain_and_equals_the_tasks_formula(beta):
    curve = toy_frontier()
    optimum = curve.optimum(1 / beta)
    slots = np.arange(4)
    known = np.log(toy.word_distribution(beta))[:, slots, toy.ALL_RESPONSES].sum(-1)
    np.testing.assert_allclose(optimum, known, atol=1e-9)
    figures = curve.figures(optimum)
    assert curve.fraction(figures) == pytest.approx(1, abs=1e-9)
    assert figures.outside == pytest.approx(0, abs=1e-12)
    assert curve.at(1 / beta) == pytest.approx((figures.reward, figures.kl))


def test_reference_has_no_gain_and_no_policy_has_more_than_the_whole():
    curve = toy_frontier()
    figures = curve.figures(curve.reference)
    assert figures.kl == pytest.approx(0, abs=1e-12)
    assert curve.fraction(figures) == 0
    rng = np.random.RandomState(2)
    for scale in (0.3, 1, 3):
        for gain in (-1, 0, 1):
            logits = curve.reference + gain * REWARDS + rng.normal(0, scale, curve.reference.shape)
            fraction = curve.fraction(curve.figures(conditioned(logits)))
            assert (0.2 < fraction < 1) if gain == 1 else fraction < 0.5


def test_reward_beyond_the_largest_kl_is_the_largest_reward():
    curve = Frontier(np.log([[0.5, 0.5]]), np.array([0.0, 1.0]), np.ones(2))
    assert curve.reward_at(5.0) == pytest.approx(1)
    assert curve.reward_at(0.0) == pytest.approx(0.5, abs=1e-3)
    # the KL of always giving the better one of two equally likely responses
    assert curve.at(1e3)[1] == pytest.approx(np.log(2))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_figures_of_a_trained_policy_agree_with_its_samples(make_trainer, tokenizer, all_responses):
    trainer = make_trainer(
        "model=tiny", "datasets=[toy]", "loss=sft", "max_length=64", "max_prompt_length=32", "batch_size=32",
        "n_examples=3200", "n_eval_examples=32", "optimizer=AdamW", "lr=3e-3", "warmup_steps=10",
        "sample_during_eval=false", "debug=true",
    )  # fmt: skip
    trainer.train()
    prompts = token_ids(tokenizer, toy.PROMPTS, end=False)
    logps = response_logps(trainer.policy, ResponseTree(all_responses), prompts)
    figures = Frontier(logps, REWARDS, np.full(4096, 18)).figures(logps)
    assert 0.02 < figures.outside < 0.9  # otherwise there would be nothing to compare

    ids = torch.tensor(prompts)  # all of one length
    batch = {"prompt_input_ids": ids, "prompt_attention_mask": torch.ones_like(ids)}
    torch.manual_seed(0)
    batch = select_examples(batch, torch.arange(10).repeat(120))
    texts, *_ = generate_as_targets(trainer.policy, trainer.tokenizer, batch, 64, lambda: False, synced=False)
    words = [toy.response_words(text) for text in texts]
    inside = np.array([w is not None for w in words])
    assert 1 - inside.mean() == pytest.approx(figures.outside, abs=4 * np.sqrt(figures.outside / len(texts)))
    # the figures weigh each prompt equally, whatever the probability of its grammatical responses
    of_prompt = [[toy.true_reward(w) for w in words[p::10] if w is not None] for p in range(10)]
    error = np.sqrt(sum(np.var(r) / len(r) for r in of_prompt)) / 10
    assert np.mean([np.mean(r) for r in of_prompt]) == pytest.approx(figures.reward, abs=4 * error)


# ---- the benchmark itself -------------------------------------------------------------------------------------------


def test_learning_rate_gives_every_loss_the_same_first_step():
    assert learning_rate(Run("dpo", 0.5), 18) == pytest.approx(2 * STEP_SIZE / 0.5, rel=1e-3)  # |∂/∂ log π| is β / 2
    assert learning_rate(Run("ipo", 0.1), 18) == pytest.approx(STEP_SIZE * 0.1, rel=1e-3)  # 2 · 1 / (2 τ)
    assert learning_rate(Run("cdpo", 1.0), 18) == pytest.approx(STEP_SIZE / (0.9 / 2 - 0.1 / 2), rel=2e-3)
    assert learning_rate(Run("dpop", 1.0), 18) == pytest.approx(2 * STEP_SIZE / 51, rel=0.03)  # 1 + the default penalty
    assert learning_rate(Run("dpo", 0.5, step_size=1e-4, optimizer=("optimizer=AdamW",)), 18) == 1e-4
    of_means = Run("dpo", 18.0, extra=("loss.average_log_prob=true",))
    assert learning_rate(of_means, 18) == pytest.approx(learning_rate(Run("dpo", 1.0), 18), rel=1e-2)


def test_every_pairwise_loss_has_runs_with_valid_options():
    for name in objectives():
        loss = LOSSES[Run(name, 1.0).loss]
        assert frontier.strength_option(name) in loss.options
        assert len(frontier.strengths(name)) == 5
    assert {*objectives(), "sft", "sft_tokens"} == {*LOSSES, "cdpo", "tr_dpo"}


def test_last_checkpoints_are_sorted_by_their_distance_from_the_reference():
    def result(objective: str, strength: float | None, kl: float, **changes) -> dict:
        run = {"objective": objective, "data": "toy", "optimizer": ["optimizer=SGD"], "extra": [], "strength": strength}
        checkpoints = [{"fraction": 0.1, "kl": 0.1, "outside": 0.5}, {"fraction": 0.9, "kl": kl, "outside": 0.01}]
        return {"run": run | changes, "checkpoints": checkpoints, "error": None}

    results = [
        result("dpo", 1.0, 1.5), result("dpo", 2.0, 0.25), result("dpo", 0.5, 0.3, optimizer=["optimizer=AdamW"]),
        result("ipo", 1.0, 2.0) | {"error": "the loss isn't finite"}, result("sft", None, 0.2, data="toy_preferred"),
    ]  # fmt: skip
    objectives = {"dpo": ("beta", 1.0), "ipo": ("beta", 0.1)}
    found = last_checkpoints(results, objectives)
    assert [(name, [end["kl"] for end in row]) for name, row in found.items()] == [
        ("dpo", [0.25, 1.5]), ("sft on the preferred", [0.2])
    ]  # fmt: skip
    assert sweep_table(found, objectives).splitlines()[2:] == [
        "| dpo | `beta` 2, 1 | 90.0 % at 0.25, 90.0 % at 1.50 | 1.0 % |",
        "| sft on the preferred |  | 90.0 % at 0.20 | 1.0 % |",
    ]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_frontier_benchmark_trains_evaluates_and_reports_once(tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "SFT_LEGS", ((64, 1e-3), (128, 1e-4)))
    bench = Bench(tmp_path, "small")
    start = bench.starts["toy_length"]
    start.prepare()
    run = Run("dpo", 1.0, "toy_length", legs=((128, 1.0), (192, 0.1)), every=64)
    bench.execute(run)
    result = bench.result(run)
    assert [checkpoint["examples"] for checkpoint in result["checkpoints"]] == [64, 128, 192]
    assert result["error"] is None
    assert start.frontier.figures(start.reference_logps).kl == pytest.approx(0, abs=1e-9)
    assert 0 < result["checkpoints"][-1]["kl"] < 1  # six steps away from its reference
    assert not list((tmp_path / "runs").glob("*/step-*"))

    log = next((tmp_path / "runs").glob("*.log"))
    before = log.stat().st_mtime_ns
    bench.execute(run)
    assert log.stat().st_mtime_ns == before
    assert "| dpo | `strength 1` |" in length_table(bench, load(bench.results))
    draw(last_checkpoints(load(bench.results), {"dpo": ("beta", 1.0)}), tmp_path / "frontier.png")
    header = (tmp_path / "frontier.png").read_bytes()[16:20]
    assert int.from_bytes(header, "big") == 1200  # its width


def test_labels_of_the_length_task_depend_on_reward_and_length(monkeypatch):
    monkeypatch.setitem(toy.SPLITS, "train", (20_000, 1))  # other tests have fewer
    words, clauses = toy_length.all_responses()
    of_text = {toy_length.response_text(w, n): (toy.true_reward(w), n) for w, n in zip(words, clauses, strict=True)}
    assert len(of_text) == 256
    margins, longer, preferred, counts = [], [], [], np.zeros(4)
    for _, entry in toy_length.get_toy_length("train"):
        (r_first, n_first), (r_second, n_second) = (of_text[text] for text in entry["responses"])
        margins.append(r_first - r_second)
        longer.append(n_first - n_second)
        preferred.append(entry["pairs"] == [(0, 1)])
        counts[of_text[entry["sft_target"]][1]] += 1
    np.testing.assert_allclose(counts / 20_000, toy_length.CLAUSE_PROBABILITIES, atol=0.017)
    margins, longer, preferred = np.array(margins), np.array(longer), np.array(preferred)
    for n in (-2, 0, 1):
        chosen = longer == n
        expected = (1 / (1 + np.exp(-margins[chosen] - 0.8 * n))).mean()
        assert preferred[chosen].mean() == pytest.approx(expected, abs=5 * 0.5 / np.sqrt(chosen.sum()))
