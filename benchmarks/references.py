"""Peak memory of training with each kind of reference, and the savings in a sweep: `python benchmarks/references.py`.

Every row is a run of `train.py` in its own process, on the toy data and a model with random weights. Peak memory is the
largest resident set of that process. The runs with precomputed log-probabilities differ only in β and share a cache, as
in a sweep. The column 'pairs by the reference' counts the pairs for which the reference was run.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

REPOSITORY = Path(__file__).resolve().parents[1]
RUNS = {
    "all weights, reference=model": ["reference=model"],
    "all weights, precomputed, first of a sweep": ["precompute_ref_log_probs=true", "loss.beta=0.1"],
    "all weights, precomputed, second of a sweep": ["precompute_ref_log_probs=true", "loss.beta=0.5"],
    "LoRA, reference=model": ["lora={}", "reference=model"],
    "LoRA, reference=adapter_off": ["lora={}", "reference=adapter_off"],
}


def make_model(directory: Path, hidden_size: int, n_layers: int) -> int:
    """Write the config of a GPT-NeoX with the tiny model's tokenizer; return the bytes of its float32 weights."""
    shutil.copytree(REPOSITORY / "assets" / "tiny", directory)
    config = transformers.AutoConfig.from_pretrained(
        directory, hidden_size=hidden_size, num_hidden_layers=n_layers, intermediate_size=4 * hidden_size
    )
    config.save_pretrained(directory)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return 4 * sum(parameter.numel() for parameter in model.parameters())


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
        n_bytes = make_model(Path(directory) / "model", args.hidden, args.layers)
        print(f"weights of the reference: {n_bytes / 2**20:.0f} MiB (float32)\n")
        print("| run | peak memory, MiB | pairs by the reference | seconds |\n| --- | --- | --- | --- |")
        for name, overrides in RUNS.items():
            places = [f"model.name_or_path={directory}/model", f"local_dirs=[{directory}/cache]"]
            peak, seconds, n_computed = train([*places, *overrides], args.examples)
            print(f"| {name} | {peak / 2**20:.0f} | {n_computed} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
