"""Speed and memory of reading and tokenizing preference pairs, here and in the original: `python benchmarks/data.py`.

Both read the same JSON Lines file of generated dialogues that are as long as those of HH. The benchmark measures all
work before training can begin, plus the tokenization of the first epoch:
- The original reads all rows into a dict of prompts and calls the tokenizer three times per pair
  (https://github.com/eric-mitchell/direct-preference-optimization, preference_datasets.py).
- Here, the first start reads, checks, tokenizes and caches all pairs; a later start only maps the cache into memory;
  and an epoch reads its batches from it.

Each measurement runs in a fresh process. Memory is the peak of RssAnon in /proc, minus its value at the start.
"""

import argparse
import functools
import json
import multiprocessing
import os
import random
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

from common import REPOSITORY, print_header, print_row, process_memory

WORDS = 20_000  # in the vocabulary of the generated dialogues; word frequencies follow Zipf's law
MAX_LENGTH, MAX_PROMPT_LENGTH = 512, 256


def write_rows(path: Path, n_rows: int):
    """Write dialogues of one to three turns; prompt and both responses together have about 200 to 400 tokens."""
    choose = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(choose.choices(letters, k=choose.randint(1, 9))) for _ in range(WORDS)]
    weights = [1 / rank for rank in range(1, WORDS + 1)]
    pool = choose.choices(words, weights, k=1_000_000)

    def text(n_words: int) -> str:
        start = choose.randrange(len(pool) - n_words)
        return " ".join(pool[start : start + n_words]).capitalize() + "."

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(n_rows):
            n_turns = choose.randint(1, 3)
            turns = [f"\n\nHuman: {text(choose.randint(8, 30))}\n\nAssistant:" for _ in range(n_turns)]
            prompt = "".join(f"{turn} {text(20)}" for turn in turns[:-1]) + turns[-1]
            responses = [f" {text(choose.randint(15, 50))}" for _ in range(2)]
            row = dict(zip(("chosen", "rejected"), (prompt + response for response in responses), strict=True))
            file.write(json.dumps(row) + "\n")


def load_tokenizer():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "assets" / "tiny")
    tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


# ---- the original's loop --------------------------------------------------------------------------------------------


def reference_loop(path: Path, cache_dir: str) -> dict[str, float]:
    """Build the original's dict of prompts (`get_hh`), and tokenize each pair as its `tokenize_batch_element` did."""
    import datasets

    tokenizer, start = load_tokenizer(), time.perf_counter()
    data = defaultdict(lambda: defaultdict(list))
    for row in datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache_dir):
        prompt = row["chosen"][: row["chosen"].rfind("\n\nAssistant:") + len("\n\nAssistant:")]
        chosen, rejected = row["chosen"][len(prompt) :], row["rejected"][len(prompt) :]
        n_responses = len(data[prompt]["responses"])
        data[prompt]["pairs"].append((n_responses, n_responses + 1))
        data[prompt]["responses"].extend([chosen, rejected])
        data[prompt]["sft_target"] = chosen
    read = time.perf_counter()
    n_pairs = 0
    for prompt, entry in data.items():
        for i, j in entry["pairs"]:
            reference_element(prompt, entry["responses"][i], entry["responses"][j], tokenizer)
            n_pairs += 1
    return {"read": read - start, "tokenize": time.perf_counter() - read, "n_pairs": n_pairs}


def reference_element(prompt: str, chosen: str, rejected: str, tokenizer) -> dict:
    """Tokenize one pair like the original: three calls, the end token, truncation that keeps a prompt's end, labels."""
    parts = [dict(tokenizer(text, add_special_tokens=False)) for text in (chosen, rejected, prompt)]
    for tokens in parts:
        assert tokenizer.eos_token_id not in tokens["input_ids"]
    for tokens in parts[:2]:
        tokens["input_ids"].append(tokenizer.eos_token_id)
        tokens["attention_mask"].append(1)
    longest = max(len(tokens["input_ids"]) for tokens in parts[:2])
    if len(parts[2]["input_ids"]) + longest > MAX_LENGTH:
        parts[2] = {key: ids[-MAX_PROMPT_LENGTH:] for key, ids in parts[2].items()}
    batch = {}
    for side, tokens in zip(("chosen", "rejected"), parts, strict=False):
        whole = {key: parts[2][key] + tokens[key] for key in ("input_ids", "attention_mask")}
        whole["labels"] = [-100] * len(parts[2]["input_ids"]) + tokens["input_ids"]
        batch |= {f"{side}_{key}": value for key, value in whole.items()}
    return batch


# ---- this repository ------------------------------------------------------------------------------------------------


def start(path: Path, cache_dir: str, draws_epoch: bool = False) -> dict[str, float]:
    """Do everything that a run does with its data before it loads a model, and optionally draw an epoch's batches."""
    from preference_datasets import get_batch_iterator

    tokenizer, before = load_tokenizer(), time.perf_counter()
    batches = get_batch_iterator([str(path)], tokenizer, n_epochs=1, batch_size=64, max_length=MAX_LENGTH,
                                 max_prompt_length=MAX_PROMPT_LENGTH, cache_dir=cache_dir, silent=True)  # fmt: skip
    read = time.perf_counter()
    n_pairs = sum(len(batch["prompt"]) for batch in batches) if draws_epoch else batches.epoch_size
    return {"read": read - before, "tokenize": time.perf_counter() - read, "n_pairs": n_pairs}


def measure(function, path: Path, cache_dir: str, connection):
    """Call `function` in this process, and send its result together with the peak of anonymous memory, in MiB."""
    import datasets
    import transformers  # noqa: F401

    import preference_datasets  # noqa: F401

    datasets.disable_progress_bars()
    load_tokenizer()
    before, peak, is_done = process_memory("RssAnon"), [0.0], threading.Event()

    def sample():
        while not is_done.wait(0.02):
            peak[0] = max(peak[0], process_memory("RssAnon"))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    result = function(path, cache_dir)
    is_done.set()
    sampler.join()
    connection.send(result | {"memory": (max(peak[0], process_memory("RssAnon")) - before) / 2**20})


def measure_in_process(function, path: Path, cache_dir: str) -> dict[str, float]:
    """Call `measure` in a fresh process; return what it sends."""
    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(function, path, cache_dir, sender))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[160_000], help="numbers of pairs to measure with")
    parser.add_argument("--reference-rows", type=int, default=None, help="measure the original's loop on only this "
                        "many pairs")  # fmt: skip
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores\n")
    print_header(["rows", "measured", "seconds", "pairs/s", "memory, MiB"])
    for n_rows in args.rows:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "rows.jsonl"
            write_rows(path, n_rows)
            for name, function in {"original's loop": reference_loop, "first start": start, "later start": start,
                                   "epoch": functools.partial(start, draws_epoch=True)}.items():  # fmt: skip
                part = path
                if function is reference_loop and args.reference_rows is not None and args.reference_rows < n_rows:
                    part = Path(directory) / "part.jsonl"
                    write_rows(part, args.reference_rows)
                cache_dir = f"{directory}/{'reference' if function is reference_loop else 'cache'}"
                result = measure_in_process(function, part, cache_dir)
                seconds = result["read"] + result["tokenize"]
                figures = [f"{seconds:.1f}", f"{result['n_pairs'] / seconds:,.0f}", f"{result['memory']:.0f}"]
                print_row([f"{n_rows:,}", name, *figures])


if __name__ == "__main__":
    main()
