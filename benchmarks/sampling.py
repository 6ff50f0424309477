"""Compare the speed of `sample.py` with plain Transformers' `generate`, in one process, in turn.

`python benchmarks/sampling.py --model HuggingFaceTB/SmolLM2-135M-Instruct --prompts PROMPTS.jsonl`. Both draw one
answer of up to `--max-new-tokens` to each of the first `--n` prompts at temperature 1, in the same batches of prompts
of similar length. The rows of the table, medians over the rounds:
  generate          plain Transformers: `model.generate(do_sample=True)`, with its growing cache
  generate, static  the same with `cache_implementation="static"`
  draw              this program: the same, but each sample has a seed of its own
  draw and score    like sample.py: also computes each answer's log-probabilities under policy and reference
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from common import print_header, print_row
from transformers import GenerationConfig

from commands.command_line import compose_config
from config_checks.checks import check_config
from evaluation import drawing
from evaluation.drawing import Item, draw
from evaluation.sample_options import Options
from evaluation.sample_prompts import read_requests
from evaluation.sampling import end_tokens
from trainers import BasicTrainer, make_trainer


def load(args: argparse.Namespace, directory: str) -> BasicTrainer:
    """Return a trainer with policy and reference, and neither data nor optimizer."""
    config = compose_config(
        f"model.name_or_path={args.model}", "datasets=[toy]", "loss=dpo", f"max_length={args.max_length}",
        f"max_prompt_length={args.max_length - args.max_new_tokens}", f"local_dirs=[{directory}]",
        f"local_run_dir={directory}/run", "wandb.enabled=false",
    )  # fmt: skip
    check_config(config)
    return make_trainer(config, purpose="sample")


def generate(trainer: BasicTrainer, items: list[Item], n_new: int, **settings):
    """Draw by Transformers only; prompts are padded on the left."""
    tokenizer, prompts = trainer.tokenizer, {"input_ids": [request.ids for request, _ in items]}
    batch = tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(trainer.device)
    chosen = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=tokenizer.pad_token_id, max_new_tokens=n_new,
        eos_token_id=end_tokens(trainer.policy, tokenizer), **settings,
    )  # fmt: skip
    with torch.no_grad():
        trainer.policy.generate(**batch, generation_config=chosen)


def ways(trainer: BasicTrainer, n_new: int) -> dict[str, Callable[[list[Item]], object]]:
    """Return the functions to compare, by the names of their rows; each draws answers to a batch of prompts."""
    options = Options(
        run=None, files=[], prompts=None, n=1, top_p=1.0, top_k=0, max_new_tokens=n_new, alpaca_eval=None,
        engine="transformers", engine_args={},
    )  # fmt: skip
    return {
        "generate": lambda items: generate(trainer, items, n_new),
        "generate, static": lambda items: generate(trainer, items, n_new, cache_implementation="static"),
        "draw": lambda items: drawing._generate(trainer, items, 1.0, options),
        "draw and score": lambda items: draw(trainer, items, 1.0, options, None),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a hub id or a folder")
    parser.add_argument("--prompts", required=True, help="JSON Lines with a prompt each")
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print_header(["batch size", "", f"{args.n} answers (s)", "times generate"])
    with tempfile.TemporaryDirectory() as directory:
        trainer = load(args, directory)
        trainer.policy.eval()
        requests = read_requests(trainer.config, trainer.tokenizer, None, args.prompts)[: args.n]
        items = [(request, 0) for request in sorted(requests, key=lambda request: len(request.ids))]
        for size in args.batch_sizes:
            seconds: dict[str, list[float]] = {name: [] for name in ways(trainer, args.max_new_tokens)}
            for number in range(args.rounds):
                torch.manual_seed(number)
                for name, way in ways(trainer, args.max_new_tokens).items():
                    start = time.perf_counter()
                    for first in range(0, len(items), size):
                        way(items[first : first + size])
                    seconds[name].append(time.perf_counter() - start)
                    print(f"round {number + 1}, {size}, {name}: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
            plain = statistics.median(seconds["generate"])
            for name, times in seconds.items():
                median = statistics.median(times)
                print_row([size, name, f"{median:.0f}", f"{median / plain:.2f}"])


if __name__ == "__main__":
    main()
