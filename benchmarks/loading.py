"""Measure time and memory of loading a model in several workers: `python benchmarks/loading.py`, on Linux.

Workers connected by gloo load a model with random weights from safetensors files that are not in the page cache:
  broadcast  one worker reads everything, and broadcasts one parameter after another (needed by some models)
  read       every worker reads its part of the files
Columns:
  s        seconds until all workers hold their part
  read     MB read from the disk: by worker 0, and the maximum over the others
  memory   peak increase in MB, not counting memory-mapped files: of worker 0, and the maximum over the others
"""

import argparse
import contextlib
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import torch
import transformers
from common import print_header, print_row, process_memory
from omegaconf import DictConfig

import checkpointing.unread  # noqa: F401 (imported before anything is measured)
from commands.command_line import compose_config
from distributed import connection, launch
from distributed.collectives import all_gather_object, barrier
from distributed.strategies import STRATEGIES
from models import load_model

WAYS = {"broadcast": "cpu", "read": "meta"}  # the `device_map` of each
SPLITS = {
    "FSDPTrainer": ["trainer=FSDPTrainer"],
    "FSDPTrainer, tensor_parallel=2": ["trainer=FSDPTrainer", "tensor_parallel=2"],
    "TensorParallelTrainer": ["trainer=TensorParallelTrainer"],
}


def bytes_read() -> int:
    """Return the bytes that this process has read from the disk."""
    return int(Path("/proc/self/io").read_text().split("\nread_bytes:")[1].split()[0])


def forget(directory: Path):
    """Drop a model's files from the page cache."""
    for path in directory.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def peak_memory():
    """Yield a list whose last item is, after the block, the block's peak memory minus the memory before it."""
    values, is_over = [], threading.Event()

    def sample():
        while not is_over.wait(0.005):
            values.append(process_memory("RssAnon"))

    before, thread = process_memory("RssAnon"), threading.Thread(target=sample)
    thread.start()
    try:
        yield values
    finally:  # also after an error, which would otherwise leave the process waiting for its thread
        is_over.set()
        thread.join()
    values.append(max(values) - before)


def load(config: DictConfig, way: str, path: str):
    """Load the model in this worker; rank 0 writes the figures of all workers to `path`."""
    transformers.utils.logging.disable_progress_bar()
    with connection.process_group():
        strategy, rank = STRATEGIES[config.trainer](config), int(os.environ["RANK"])
        if rank == 0:
            forget(Path(config.model.name_or_path))
        barrier()
        with peak_memory() as memory:
            n_bytes, start = bytes_read(), time.perf_counter()
            model = load_model(config, config.model.policy_dtype, WAYS[way]) if rank == 0 else None
            model = strategy.distribute(model, is_policy=True)
            barrier()
            seconds, n_bytes = time.perf_counter() - start, bytes_read() - n_bytes
        figures = all_gather_object((seconds, n_bytes / 1e6, memory[-1] / 1e6))
        if rank == 0:
            Path(path).write_text(json.dumps(figures))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", default="float32", help="of the weights in the files; they are loaded as float32")
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as directory:
        sizes = {"hidden_size": args.hidden, "num_hidden_layers": args.layers, "intermediate_size": 4 * args.hidden}
        config = transformers.GPTNeoXConfig(**sizes, num_attention_heads=args.hidden // 64, vocab_size=50304)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
        model.save_pretrained(directory, max_shard_size="200MB")
        os.sync()
        n_files = len(list(Path(directory).glob("*.safetensors")))
        print(f"{model.num_parameters() / 1e6:.0f} million parameters, {args.dtype}, {n_files} files")
        print_header(["trainer", "way", "s", "read", "others", "memory", "others"])
        del model
        for split, words in SPLITS.items():
            for way in WAYS:
                run = compose_config("model=blank_model", f"model.name_or_path={directory}", "datasets=[toy]",
                                     "loss=sft", *words)  # fmt: skip
                launch.run_workers(load, args.workers, None, run, way, f"{directory}/figures.json")
                first, *others = json.loads(Path(directory, "figures.json").read_text())
                largest = [max(values) for values in zip(*others, strict=True)]
                figures = (first[1], largest[1], first[2], largest[2])
                print_row([split, way, f"{max(first[0], largest[0]):.1f}", *(f"{n:,.0f}" for n in figures)])


if __name__ == "__main__":
    main()
