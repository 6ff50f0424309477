"""Make `toy`, synthetic preference data whose true reward and optimal policy are known exactly.

A prompt asks for a short review. A response fills four slots with one of eight words each, independently, and ends. The
words of a slot are listed from worst to best, with weights evenly spaced from -2 to 2; the true reward r of a response
is the sum of its words' weights. Both responses of a pair are drawn from p, and Bradley-Terry decides which one is
preferred: P(a over b) = σ(r(a) - r(b)). So the policy that DPO approaches from the reference p is known for each slot,
π*(y) ∝ p(y) exp(r(y) / β) (Eq. 4 of the paper), and sums over all 4,096 responses to a prompt can be computed.

`python -m data.toy RUN_DIR` reports on the samples of a preference run on this data.
"""

if __name__ == "__main__":  # before the imports that take seconds, so that Ctrl-C ends them
    from basics.interrupts import let_interrupts_end_the_process

    let_interrupts_end_the_process()

import functools
import json
import re
import sys
from pathlib import Path

import numpy as np

from basics.interrupts import interrupts_reported
from basics.printing import printable
from basics.saved_config import read_saved_config

SUBJECTS = ["film", "play", "opera", "musical", "series", "cartoon", "drama", "comedy", "ballet", "show"]
PROMPTS = [f"\n\nHuman: Please write a short review of the {subject}.\n\nAssistant:" for subject in SUBJECTS]
TEMPLATE = " The acting was {}, the plot {}, the music {} and the ending {}."
SLOTS = [
    ["dreadful", "wooden", "clumsy", "uneven", "decent", "skilful", "gripping", "masterful"],
    ["senseless", "tedious", "muddled", "thin", "solid", "clever", "thrilling", "brilliant"],
    ["grating", "bland", "dull", "plain", "pleasant", "lively", "beautiful", "glorious"],
    ["hopeless", "feeble", "abrupt", "flat", "fitting", "warm", "moving", "perfect"],
]
N_SLOTS, N_WORDS = 4, 8
WORD_REWARDS = np.linspace(-2, 2, N_WORDS)  # weights of a slot's words, from worst to best
ALL_RESPONSES = np.stack(np.unravel_index(np.arange(N_WORDS**N_SLOTS), (N_WORDS,) * N_SLOTS), axis=1)  # (4096, 4)

_GRAMMAR = re.compile(TEMPLATE.replace(".", r"\.").format(*("(" + "|".join(words) + ")" for words in SLOTS)))
SPLITS = {"train": (20_000, 1), "test": (512, 2)}  # number of examples, random seed


def response_text(words: np.ndarray) -> str:
    """Write the response with these words, given as indices of shape (4,)."""
    return TEMPLATE.format(*(SLOTS[slot][word] for slot, word in enumerate(words)))


def response_words(text: str) -> np.ndarray | None:
    """Return the indices of a response's words, shape (4,); None if it doesn't follow the grammar."""
    match = _GRAMMAR.fullmatch(text)
    return None if match is None else np.array([SLOTS[slot].index(word) for slot, word in enumerate(match.groups())])


def true_reward(words: np.ndarray) -> np.ndarray:
    """Return r(y), the sum of the words' weights, from -8 to 8: indices of words (..., 4) to rewards (...)."""
    return WORD_REWARDS[words].sum(-1)


def word_distribution(beta: float | None = None) -> np.ndarray:
    """Return the probability of each word, shape (10 prompts, 4 slots, 8 words).

    Without `beta`, the distribution is p ∝ exp(N(0, 0.6) + N(0, 0.4)), drawn with a fixed seed; the second term differs
    by prompt. With `beta`, it is the optimum of the KL-constrained reward, π* ∝ p · exp(r / β).
    """
    rng = np.random.RandomState(0)
    logits = rng.normal(0, 0.6, (1, N_SLOTS, N_WORDS)) + rng.normal(0, 0.4, (len(PROMPTS), N_SLOTS, N_WORDS))
    if beta is not None:
        logits = logits + WORD_REWARDS / beta
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def sample_words(rng: np.random.RandomState, prompts: np.ndarray) -> np.ndarray:
    """Draw a response to each prompt from p: indices of prompts, shape (n,), to indices of words, (n, 4)."""
    cumulative = word_distribution()[prompts].cumsum(-1)  # (n, 4, 8)
    return (rng.random_sample((len(prompts), N_SLOTS, 1)) > cumulative[..., :-1]).sum(-1)


def get_toy(
    split: str,
    silent: bool = False,
    cache_dir: str | None = None,
    flipped: float = 0.0,
    n_train: int | None = None,
    imitates_preferred: bool = False,
) -> list[tuple[str, dict]]:
    """Return examples (train 20,000, test 512): each is a prompt with one preference pair and an SFT target.

    The two responses and the SFT target are drawn independently from p. `silent` and `cache_dir` are not used. The
    other arguments make variants, e.g. `Dataset(functools.partial(get_toy, flipped=0.2))`.

    Args:
        flipped: the probability that a preference label is flipped.
        n_train: return only this many training examples, from the first.
        imitates_preferred: take the pair's preferred response as the SFT target.
    """
    return _make_toy(split, flipped, imitates_preferred)[: n_train if split == "train" else None]


@functools.cache
def _make_toy(split: str, flipped: float, imitates_preferred: bool) -> list[tuple[str, dict]]:
    n_examples, seed = SPLITS[split]
    rng = np.random.RandomState(seed)
    prompts = rng.randint(len(PROMPTS), size=n_examples)
    first, second, sft_target = (sample_words(rng, prompts) for _ in range(3))
    first_preferred = rng.random_sample(n_examples) < 1 / (1 + np.exp(true_reward(second) - true_reward(first)))
    first_preferred ^= rng.random_sample(n_examples) < flipped
    if imitates_preferred:
        sft_target = np.where(first_preferred[:, None], first, second)
    texts = [response_text(words) for words in ALL_RESPONSES]
    numbers = [np.ravel_multi_index(words.T, (N_WORDS,) * N_SLOTS).tolist() for words in (first, second, sft_target)]
    data = []
    for i, (prompt, first_number, second_number, target) in enumerate(zip(prompts.tolist(), *numbers, strict=True)):
        entry = {
            "responses": [texts[first_number], texts[second_number]],
            "pairs": [(0, 1) if first_preferred[i] else (1, 0)],
            "sft_target": texts[target],
            "rows": [i],
        }
        data.append((PROMPTS[prompt], entry))
    return data


def report(run_dir: Path, n_shown: int = 4) -> str:
    """Report the true rewards of a run's last samples: from the reference (before) and from the policy (after)."""
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    if {sample["model"] for sample in samples} != {"policy", "reference"}:
        return f"{run_dir} has no samples of both policy and reference; train with loss=dpo sample_during_eval=true"
    if "response" not in samples[-1]:
        return f"{run_dir}: an earlier version of this program wrote its samples; train again"
    last = max(sample["counters/examples"] for sample in samples)
    lines = []
    for model, title in (("reference", "before (the reference)"), ("policy", f"after {last:,} pairs (the policy)")):
        chosen = [s for s in samples if s["model"] == model and s["counters/examples"] == last]
        texts = [sample["response"] for sample in chosen]
        words = [response_words(text) for text in texts]
        rewards = [float(true_reward(w)) for w in words if w is not None]
        mean = f"{np.mean(rewards):+.2f}" if rewards else "none"
        outside = 1 - len(rewards) / len(texts)
        lines.append(
            f"{title}: {len(texts)} samples, mean true reward {mean} (of at most 8), {outside:.1%} outside the grammar"
        )
        for text, w in list(zip(texts, words, strict=True))[:n_shown]:
            lines.append(f"  {'  --' if w is None else f'{true_reward(w):+.1f}'}  {text.strip()}")
    beta = read_saved_config(str(run_dir / "config.yaml")).loss.beta
    optimum = (word_distribution(beta) * WORD_REWARDS).sum((1, 2)).mean()
    lines.append(f"the exact optimum of DPO at beta {beta} (π*): mean true reward {optimum:+.2f}, 0.0% outside")
    return "\n".join(lines)


if __name__ == "__main__":
    with interrupts_reported():
        print(printable(report(Path(sys.argv[1]))))
