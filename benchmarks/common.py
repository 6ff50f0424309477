"""Helpers of the benchmarks: random pairs, models of other sizes, a process's memory, tables."""

import ctypes
import gc
import math
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from data.tokenization import get_collate_fn, make_element  # noqa: E402

EOS = 0  # token id of the end token, also used for padding

# Quantiles of the number of characters in HH's prompts, chosen and rejected responses; minimum and maximum are guesses
QUANTILES = [0.0, 0.1, 0.5, 0.9, 0.99, 1.0]
HH_CHARACTERS = [[20, 63, 363, 1101, 2194, 2852], [8, 31, 111, 384, 827, 1075], [8, 34, 145, 462, 1041, 1353]]
CHARACTERS_PER_TOKEN = 4.45


def random_pairs(n: int, vocab: int, max_length: int = 512, max_prompt_length: int = 256, seed: int = 0) -> list[dict]:
    """Return tokenized pairs of random tokens, as long as HH's prompts and responses, and truncated as in training."""
    generator = np.random.default_rng(seed)

    def part(quantiles: list[int]) -> list[int]:
        characters = np.exp(np.interp(generator.random(), QUANTILES, np.log(quantiles)))
        return generator.integers(EOS + 1, vocab, max(1, round(characters / CHARACTERS_PER_TOKEN))).tolist()

    def pair() -> dict:
        prompt, chosen, rejected = map(part, HH_CHARACTERS)
        responses = [[*chosen, EOS], [*rejected, EOS]]
        return make_element(["", "", ""], prompt, responses, "keep_end", max_length, max_prompt_length)

    return [pair() for _ in range(n)]


def collate(pairs: list[dict]) -> dict:
    """Return a batch as in training, and under "pairs" the pairs themselves."""
    return get_collate_fn(SimpleNamespace(pad_token_id=EOS))(pairs) | {"pairs": pairs}


def resized_tiny_model(directory: str, hidden: int, layers: int, **sizes: int) -> str:
    """Write the tiny model's tokenizer and its config with other sizes, but no weights; return the directory."""
    import transformers

    shutil.copytree(REPOSITORY / "assets" / "tiny", directory, dirs_exist_ok=True)
    sizes |= {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 4 * hidden}
    transformers.AutoConfig.from_pretrained(directory, **sizes).save_pretrained(directory)
    return directory


def process_memory(key: str) -> float:
    """Return a figure of /proc/self/status in bytes, such as VmRSS; NaN if there is no such file."""
    status = Path("/proc/self/status")
    return 1024 * int(status.read_text().split(f"{key}:")[1].split()[0]) if status.exists() else math.nan


def reset_peak_memory() -> float:
    """Reset the peak of this process's memory (VmHWM); return the memory in use, in bytes."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that is used again would not raise the peak
        Path("/proc/self/clear_refs").write_text("5")
    return process_memory("VmRSS")


def print_row(cells: Iterable[object]):
    """Print a row of a Markdown table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_header(cells: Iterable[str]):
    """Print the first two rows of a Markdown table."""
    cells = list(cells)
    print_row(cells)
    print_row(["---"] * len(cells))
