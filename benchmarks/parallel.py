"""Bytes that a worker of each trainer sends and holds, measured and in theory: `python benchmarks/parallel.py`.

Every row is a DPO run of the real trainer in real processes connected by gloo, with toy data and random weights, all in
float32. The last step is measured. Figures are in MiB, with their ratio to theory in brackets:
  sent, collectives  bytes that a worker's collectives would send in NCCL's ring algorithm: (n-1)/n of the whole tensor
                     for an all-gather or a reduce-scatter, twice as much for an all-reduce; mean over the workers
  sent, kernel       bytes over the loopback interface of a separate network namespace, per worker: with gloo's
                     algorithms and TCP headers
  held               memory of the tensors just after the optimizer's step; maximum over the workers
Theory depends only on the model's parameters, blocks and hidden size, and on the batch's tokens and microbatches.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from common import print_header, print_row, resized_tiny_model
from omegaconf import DictConfig, OmegaConf
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import train
import trainers
from commands.command_line import compose_config
from config_checks.checks import check_config
from distributed import connection, launch
from distributed.collectives import all_gather_object, barrier

RUNS = [  # trainer, workers, keys
    ("BasicTrainer", 1, {}), ("FSDPTrainer", 2, {}), ("FSDPTrainer", 4, {}), ("FSDPTrainer", 4, {"fsdp_replicate": 2}),
    ("FSDPTrainer", 4, {"tensor_parallel": 2}), ("TensorParallelTrainer", 2, {}), ("TensorParallelTrainer", 4, {}),
]  # fmt: skip
MIB, FLOAT32 = 2**20, 4
# How often a ring sends (n-1)/n of the tensor for each collective, by its name in c10d or in DTensor
_ROUNDS = {"_allgather_base_": 1, "_reduce_scatter_base_": 1, "allreduce_": 2, "all_reduce": 2}
_SENDS_NOTHING = {"_wrap_tensor_autograd", "wait_tensor"}


def _in_ring(n: int) -> float:
    """Return the fraction of a tensor that each of n workers sends in one round."""
    return (n - 1) / n


def bytes_to_send(trainer: str, n: int, keys: dict[str, int], counts: dict[str, float]) -> float:
    """Return the bytes that, in theory, a worker sends in a step."""
    n_replicas = keys.get("fsdp_replicate", 1)
    n_together = keys.get("tensor_parallel", n if trainer == "TensorParallelTrainer" else 1)
    n_shards, weights = n // n_replicas // n_together, FLOAT32 * counts["parameters"] / n_together
    # The policy is gathered forward and backward, the reference only forward; gradients are reduce-scattered. Once a
    # step, gradient shards are all-reduced over the replicas.
    of_weights = weights * (counts["microbatches"] * 4 * _in_ring(n_shards) + 2 * _in_ring(n_replicas) / n_shards)
    # Workers that compute a layer together all-reduce hidden states twice per block, in three passes: both models'
    # forward and the policy's backward. Each forward pass has one more all-reduce, after the embedding; the backward
    # pass has one more, at the head, for predicted tokens only. Each model sends three numbers per predicted token.
    per_token = counts["hidden_size"] * (3 * 2 * counts["blocks"] + 2)
    per_predicted_token = counts["hidden_size"] + 2 * 3
    n_numbers = counts["tokens"] * per_token + counts["predicted_tokens"] * per_predicted_token
    return of_weights + 2 * _in_ring(n_together) * FLOAT32 * n_numbers


class Collectives(TorchDispatchMode):
    """Inside the block, adds up the bytes that a ring would send for this process's collectives."""

    def __init__(self):
        super().__init__()
        self.n_bytes = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor then dispatches again with plain tensors
        library, _, name = function._schema.name.partition("::")
        if library in ("c10d", "_c10d_functional") and name not in _SENDS_NOTHING:
            boxed = next((arg for arg in args if isinstance(arg, torch.ScriptObject)), None)
            group = dist.ProcessGroup.unbox(boxed) if boxed is not None else _resolve_process_group(args[-1])
            tensors = [tensor for arg in args for tensor in (arg if isinstance(arg, list) else [arg])]
            whole = max(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
            self.n_bytes += _ROUNDS[name] * _in_ring(group.size()) * whole
        return function(*args, **(kwargs or {}))


def sent_over_loopback() -> int:
    """Return the bytes that the processes of this network namespace have sent to one another."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split()[9])


def memory(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of this worker's shards of some tensors; shared storage counts once."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in map(torch.Tensor.untyped_storage, local)}.values())


def counted_step(trainer: trainers.BasicTrainer, step: Callable, path: str, batch: dict) -> dict:
    """Take a training step, and write the counts of all workers to `path`."""
    parameters, labels = list(trainer.policy.parameters()), [batch["chosen_labels"], batch["rejected_labels"]]
    counts = {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "blocks": trainer.policy.config.num_hidden_layers,
        "hidden_size": trainer.policy.config.hidden_size,
        "predicted_tokens": int(sum((side != -100).sum() for side in labels)),
    }
    n_tokens, held = [], {}  # tokens of each microbatch, bytes of each kind

    def note_tokens(_, inputs: tuple[torch.Tensor]):
        n_tokens.append(inputs[0].numel())

    def note_memory(*_):
        held["weights"] = memory(parameters)
        held["gradients"] = memory(parameter.grad for parameter in parameters)
        held["optimizer"] = memory(value for state in trainer.optimizer.state.values() for value in state.values())
        held["reference"] = memory(trainer.reference.model.parameters())

    tokens_hook = trainer.policy.get_input_embeddings().register_forward_pre_hook(note_tokens)
    memory_hook = trainer.optimizer.register_step_post_hook(note_memory)
    barrier()
    before = sent_over_loopback()
    barrier()
    with tokens_hook, memory_hook, Collectives() as collectives:
        metrics = step(trainer, batch)
    barrier()
    kernel = (sent_over_loopback() - before) / trainer.world_size
    counts |= {"tokens": sum(n_tokens), "microbatches": len(n_tokens)}
    worker_counts = {"counts": counts, "held": held, "collectives": collectives.n_bytes, "kernel": kernel}
    all_counts = all_gather_object(worker_counts)
    if trainer.rank == 0:
        Path(path).write_text(json.dumps(all_counts))
    return metrics


def train_counted(config: DictConfig, path: str):
    """Train like train.py, but count every step."""
    trainers.BasicTrainer.train_step = functools.partialmethod(counted_step, trainers.BasicTrainer.train_step, path)
    connected = connection.process_group() if config.trainer != "BasicTrainer" else contextlib.nullcontext()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), connected:
        train.train_from(config, None, {})


def run(trainer: str, n: int, keys: dict[str, int], directory: str, batch_size: int) -> list[dict]:
    """Train three steps; return the counts of each worker in the last one."""
    config = compose_config(
        f"trainer={trainer}", f"world_size={n if n > 1 else 'null'}", *(f"{key}={keys[key]}" for key in keys),
        "model=blank_model", f"model.name_or_path={directory}/model", "model.from_scratch=true",
        "model.reference_dtype=float32", "loss=dpo", "datasets=[toy]", "max_length=64", "max_prompt_length=32",
        f"batch_size={batch_size}", f"n_examples={3 * batch_size}", "n_eval_examples=4", "do_first_eval=false",
        "sample_during_eval=false", "debug=true", f"local_dirs=[{directory}/cache]",
        f"local_run_dir={directory}/{'-'.join(map(str, [trainer, n, *keys]))}",
    )  # fmt: skip
    OmegaConf.resolve(config)
    with contextlib.redirect_stdout(sys.stderr):
        check_config(config)
    path = f"{directory}/counted.json"
    if trainer == "BasicTrainer":
        train_counted(config, path)
    else:
        launch.run_workers(train_counted, n, None, config, path)
    return json.loads(Path(path).read_text())


def row(trainer: str, n: int, keys: dict[str, int], counted: list[dict]) -> list[str]:
    """Return a row of the table: figures in MiB, and in brackets their ratio to theory."""
    counts = {name: sum(worker["counts"][name] for worker in counted) / n for name in counted[0]["counts"]}
    held = FLOAT32 * counts["parameters"] * keys.get("fsdp_replicate", 1) / n
    sent = bytes_to_send(trainer, n, keys, counts)

    def with_ratio(theory: float, n_bytes: float) -> str:
        return f"{n_bytes / MIB:.1f} ({n_bytes / theory:.3f})" if theory else f"{n_bytes / MIB:.1f}"

    columns = [", ".join([f"{trainer} on {n}", *(f"{key}={keys[key]}" for key in keys)]), f"{sent / MIB:.1f}"]
    columns += [with_ratio(sent, sum(worker[kind] for worker in counted) / n) for kind in ("collectives", "kernel")]
    columns.append(f"{held / MIB:.1f}")
    for kind in ("weights", "gradients", "optimizer", "reference"):
        columns.append(with_ratio(held, max(worker["held"][kind] for worker in counted)))
    return columns


def restart_in_network_namespace():
    """Restart this program in a network namespace, so that only its own traffic is counted; print if that fails."""
    if "OWN_NETWORK" in os.environ:
        return
    unshare = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$0" "$@"']
    if shutil.which("unshare") and subprocess.run([*unshare, "true"], capture_output=True).returncode == 0:
        os.environ |= {"OWN_NETWORK": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        os.execvp(unshare[0], [*unshare, sys.executable, *sys.argv])
    print("no network namespace (unshare failed): 'sent, kernel' includes the traffic of other programs\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=512, help="hidden size")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16, help="pairs in a batch of all workers together")
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the counts would be the same on GPUs
    restart_in_network_namespace()
    with tempfile.TemporaryDirectory() as directory:
        resized_tiny_model(f"{directory}/model", args.hidden, args.layers)
        print_header(["trainer, workers", "sent, theory", "collectives", "kernel", "held per kind, theory", "weights",
                      "gradients", "RMSprop", "reference"])  # fmt: skip
        for setting in RUNS:
            counted = run(*setting, directory, args.batch_size)
            print_row(row(*setting, counted))
    print(f"\ncounts per worker in the last row: {counted[0]['counts']}")


if __name__ == "__main__":
    main()
