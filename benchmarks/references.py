"""Peak memory of training with each kind of reference, and the savings in a sweep: `python benchmarks/references.py`.

Every row is a run of `train.py` in its own process, on the toy data and a model with random weights. Peak memory is the
process's largest resident set. The runs with precomputed log-probabilities differ only in β and share a cache, as
in a sweep. The column 'pairs by the reference' counts the pairs that the reference computed.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time

import torch
import transformers
from common import REPOSITORY, print_header, print_row, resized_tiny_model

RUNS = {
    "all weights, reference=model": ["reference=model"],
    "all weights, precomputed, first of a sweep": ["precompute_ref_log_probs=true", "loss.beta=0.1"],
    "all weights, precomputed, second of a sweep": ["precompute_ref_log_probs=true", "loss.beta=0.5"],
    "LoRA, reference=model": ["lora={}", "reference=model"],
    "LoRA, reference=adapter_off": ["lora={}", "reference=adapter_off"],
}


def train(overrides: list[str], n_examples: int) -> tuple[int, float, int]:
    """Run `train.py`; return its peak memory in bytes, its seconds, and the number of pairs its reference computed."""
    command = [
        sys.executable, str(REPOSITORY / "train.py"), "model=blank_model", "model.from_scratch=true",
        "model.reference_dtype=float32", "datasets=[toy]", "loss=dpo", f"n_examples={n_examples}", "n_eval_examples=4",
        "do_first_eval=false", "sample_during_eval=false", "debug=true", "max_length=64", "max_prompt_length=32",
        *overrides,
    ]  # fmt: skip
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        text = output.read()
    if status != 0:
        sys.exit(f"{' '.join(command)} failed:\n{text[-3000:]}")
    computed = re.search(r"Reference log-probabilities: (\d+) computed", text)
    return 1024 * usage.ru_maxrss, time.perf_counter() - start, int(computed[1]) if computed else n_examples + 4


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--examples", type=int, default=16, help="pairs to train on")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = resized_tiny_model(f"{directory}/model", args.hidden, args.layers)
        with torch.device("meta"):
            reference = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(model))
        print(f"weights of the reference: {4 * reference.num_parameters() / 2**20:.0f} MiB (float32)\n")
        print_header(["run", "peak memory, MiB", "pairs by the reference", "seconds"])
        for name, overrides in RUNS.items():
            places = [f"model.name_or_path={model}", f"local_dirs=[{directory}/cache]"]
            peak, seconds, n_computed = train([*places, *overrides], args.examples)
            print_row([name, f"{peak / 2**20:.0f}", n_computed, f"{seconds:.0f}"])


if __name__ == "__main__":
    main()
