"""`toy_length`: preference data like `toy`, in which length can be exploited."""

import functools
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import toy

SHORT_TEMPLATE = " The plot was {} and the music {}."  # slots 1 and 2 of `toy`
CLAUSES = [" It began at eight.", " The hall was small.", " It was a Tuesday."]  # 8 tokens each with the tiny tokenizer
CLAUSE_PROBABILITIES = [0.4, 0.3, 0.2, 0.1]  # probability of a response with the first 0, 1, 2 or 3 clauses
LENGTH_BIAS = 0.8  # nats that each clause adds to the log-odds of being preferred


def response_text(words: np.ndarray, n_clauses: int) -> str:
    """Write the response of `toy_length` with these words, given as indices of shape (2,)."""
    return SHORT_TEMPLATE.format(*(toy.SLOTS[slot][word] for slot, word in zip((1, 2), words, strict=True))) + "".join(
        CLAUSES[:n_clauses]
    )


def all_responses() -> tuple[np.ndarray, np.ndarray]:
    """Return all 256 responses of `toy_length`: indices of words, (256, 2), and numbers of clauses, (256,)."""
    grid = np.stack(np.unravel_index(np.arange(toy.N_WORDS**2 * 4), (toy.N_WORDS, toy.N_WORDS, 4)), axis=1)
    return grid[:, :2], grid[:, 2]


@functools.cache
def get_toy_length(split: str, silent: bool = False, cache_dir: str | None = None) -> list[tuple[str, dict]]:
    """Return examples like `get_toy`, with responses that differ in length: two words and up to three idle clauses.

    The preference is biased towards length, P(a over b) = σ(r(a) - r(b) + LENGTH_BIAS · (clauses of a - clauses of b)).
    The true reward r, the sum of the words' weights, does not depend on length.
    """
    n_examples, seed = toy.SPLITS[split]
    rng = np.random.RandomState(seed)
    prompts = rng.randint(len(toy.PROMPTS), size=n_examples)
    words = [toy.sample_words(rng, prompts)[:, 1:3] for _ in range(3)]  # both responses, and the SFT target
    clauses = [rng.choice(4, size=n_examples, p=CLAUSE_PROBABILITIES) for _ in range(3)]
    margins = toy.true_reward(words[0]) - toy.true_reward(words[1]) + LENGTH_BIAS * (clauses[0] - clauses[1])
    first_preferred = rng.random_sample(n_examples) < 1 / (1 + np.exp(-margins))
    data = []
    for i, prompt in enumerate(prompts):
        first, second, sft_target = (response_text(w[i], n[i]) for w, n in zip(words, clauses, strict=True))
        pairs = [(0, 1) if first_preferred[i] else (1, 0)]
        entry = {"responses": [first, second], "pairs": pairs, "sft_target": sft_target, "rows": [i]}
        data.append((toy.PROMPTS[prompt], entry))
    return data
