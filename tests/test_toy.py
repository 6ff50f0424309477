import json

import numpy as np
import pytest

from data import toy
from data.toy import (
    ALL_RESPONSES,
    PROMPTS,
    get_toy,
    report,
    response_text,
    response_words,
    sample_words,
    true_reward,
    word_distribution,
)


@pytest.fixture(autouse=True)
def all_examples(monkeypatch):
    """Let toy have all its examples, unlike in other tests."""
    monkeypatch.setitem(toy.SPLITS, "train", (20_000, 1))
    toy._make_toy.cache_clear()
    yield
    toy._make_toy.cache_clear()


def test_every_response_parses_back_and_nothing_else_does():
    texts = [response_text(words) for words in ALL_RESPONSES]
    assert len(set(texts)) == 8**4
    assert all((response_words(text) == words).all() for text, words in zip(texts, ALL_RESPONSES, strict=True))
    assert response_words(texts[0] + " ") is None
    assert response_words(texts[0].replace("dreadful", "hopeless")) is None


def test_true_reward_is_the_sum_of_the_words_weights():
    assert true_reward(np.array([0, 0, 0, 0])) == -8
    assert true_reward(np.array([7, 7, 7, 7])) == 8
    assert true_reward(np.array([7, 0, 4, 3])) == pytest.approx(0)  # 2 - 2 + 2/7 - 2/7


def test_optimum_is_the_reference_times_the_exponential_of_the_reward():
    # Eq. 4 of the paper, applied to whole responses, gives the product of the four words' probabilities
    beta = 0.5
    for reference, optimum in zip(word_distribution(), word_distribution(beta), strict=True):
        slots = np.arange(4)
        p = reference[slots, ALL_RESPONSES].prod(-1)
        expected = p * np.exp(true_reward(ALL_RESPONSES) / beta)
        expected /= expected.sum()
        assert p.sum() == pytest.approx(1)
        np.testing.assert_allclose(optimum[slots, ALL_RESPONSES].prod(-1), expected, rtol=1e-10)


def test_toy_samples_follow_the_distribution():
    words = sample_words(np.random.RandomState(3), np.full(40_000, 2))
    counts = np.stack([np.bincount(words[:, slot], minlength=8) for slot in range(4)]) / 40_000
    np.testing.assert_allclose(counts, word_distribution()[2], atol=0.012)  # 5 standard deviations


def test_preferences_follow_bradley_terry():
    margins, preferred = [], []
    for _, entry in get_toy("train"):
        first, second = (true_reward(response_words(text)) for text in entry["responses"])
        margins.append(first - second)
        preferred.append(entry["pairs"] == [(0, 1)])
    margins, preferred = np.array(margins), np.array(preferred)
    for low in (-3, -1, 0, 2):
        chosen = (margins >= low) & (margins < low + 1)
        expected = (1 / (1 + np.exp(-margins[chosen]))).mean()
        assert preferred[chosen].mean() == pytest.approx(expected, abs=5 * 0.5 / np.sqrt(chosen.sum()))


def test_toy_data_has_the_hh_format_and_is_deterministic():
    data = get_toy("test")
    assert data == get_toy("test")
    assert {prompt for prompt, _ in data} == set(PROMPTS)
    assert all(prompt.startswith("\n\nHuman: ") and prompt.endswith("\n\nAssistant:") for prompt in PROMPTS)
    assert all(response_words(entry["sft_target"]) is not None for _, entry in data)


def test_toy_variants_have_flipped_labels_or_fewer_pairs_or_preferred_targets():
    plain, flipped = get_toy("train"), get_toy("train", flipped=0.2)
    differ = np.mean([a["pairs"] != b["pairs"] for (_, a), (_, b) in zip(plain, flipped, strict=True)])
    assert differ == pytest.approx(0.2, abs=5 * 0.4 / np.sqrt(20_000))
    assert [{**a, "pairs": 0} for _, a in plain] == [{**b, "pairs": 0} for _, b in flipped]
    assert get_toy("train", n_train=300) == plain[:300]
    assert get_toy("test", n_train=300) == get_toy("test")
    for _, entry in get_toy("train", flipped=0.2, imitates_preferred=True):
        assert entry["sft_target"] == entry["responses"][entry["pairs"][0][0]]


def test_report_gives_mean_reward_and_share_outside_the_grammar_of_the_last_samples(tmp_path):
    best, worst = response_text([7, 7, 7, 7]), response_text([0, 0, 0, 0])
    rows = [("policy", 0, worst), ("policy", 8, best), ("policy", 8, " What?"), ("reference", 8, worst)]
    lines = [
        {"counters/examples": n, "model": model, "prompt": PROMPTS[0], "response": text, "sample": PROMPTS[0] + text}
        for model, n, text in rows
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.yaml").write_text("loss: {beta: 1.0e-9}")  # as β vanishes, π* uses only the best words
    before, after = report(tmp_path).split("after 8 pairs")
    assert "1 samples, mean true reward -8.00" in before
    assert "2 samples, mean true reward +8.00 (of at most 8), 50.0% outside the grammar" in after
    assert "(π*): mean true reward +8.00" in after


def test_report_on_a_run_without_a_reference_says_what_is_missing(tmp_path):
    (tmp_path / "samples.jsonl").write_text("")
    assert "no samples of both policy and reference" in report(tmp_path)
