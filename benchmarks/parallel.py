"""What a worker of each trainer sends and holds, counted, beside what theory says: `python benchmarks/parallel.py`.

Every row is a DPO run of the real trainer in real processes, which talk through gloo: toy data, random weights, all
float32; the last step is counted. In MiB, and in brackets as multiples of theory:
  sent, collectives  what a worker's collectives send in a ring, as NCCL's: (n-1)/n of the whole tensor for an
                     all-gather or a reduce-scatter, twice that for an all-reduce; the mean of the workers
  sent, kernel       what went over the loopback interface, in a network of the benchmark's own, divided by the workers:
                     gloo's algorithms, TCP headers and all
  held               the memory behind the tensors just after the optimizer's step; the largest of the workers
Theory knows of the model only its parameters, blocks and hidden size, and of the batch its tokens and microbatches.
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
import transformers
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
import trainers
from config_checks.checks import check_config
from config_checks.schema import REPOSITORY
from distributed import connection, launch
from distributed.collectives import all_gather_object, barrier

RUNS = [  # trainer, workers, fsdp_replicate
    ("BasicTrainer", 1, 1), ("FSDPTrainer", 2, 1), ("FSDPTrainer", 4, 1), ("FSDPTrainer", 4, 2),
    ("TensorParallelTrainer", 2, 1), ("TensorParallelTrainer", 4, 1),
]  # fmt: skip
MIB, FLOAT32 = 2**20, 4
# How often a ring sends (n-1)/n of the tensor, by the names that c10d and DTensors call the collectives by
_ROUNDS = {"_allgather_base_": 1, "_reduce_scatter_base_": 1, "allreduce_": 2, "all_reduce": 2}
_SENDS_NOTHING = {"_wrap_tensor_autograd", "wait_tensor"}


def _in_ring(n: int) -> float:
    """The part of a tensor that each of n workers sends in one round."""
    return (n - 1) / n


def bytes_to_send(trainer: str, n: int, n_replicas: int, counts: dict[str, int]) -> float:
    """Bytes that a worker sends in a step."""
    if trainer == "FSDPTrainer":
        n_shards, weights = n // n_replicas, FLOAT32 * counts["parameters"]
        # The policy is gathered forward and backward, the reference forward; gradients are scattered. Each replica's
        # shards are then added to the others'.
        return counts["microbatches"] * weights * (4 * _in_ring(n_shards) + 2 * _in_ring(n_replicas) / n_shards)
    # Hidden states are added behind the embedding and twice a block, forward in both models and backward in the policy
    # (there the head's instead of the embedding's). Of each predicted token three numbers are sent in each model.
    per_token = counts["hidden_size"] * (3 * 2 * counts["blocks"] + 2)
    per_predicted_token = counts["hidden_size"] + 2 * 3
    n_numbers = counts["tokens"] * per_token + counts["predicted_tokens"] * per_predicted_token
    return 2 * _in_ring(n) * FLOAT32 * n_numbers


class Collectives(TorchDispatchMode):
    """Adds up, while it is entered, what a ring sends for the collectives that this process takes part in."""

    def __init__(self):
        super().__init__()
        self.n_bytes = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with plain tensors
        library, _, name = function._schema.name.partition("::")
        if library in ("c10d", "_c10d_functional") and name not in _SENDS_NOTHING:
            boxed = next((arg for arg in args if isinstance(arg, torch.ScriptObject)), None)
            group = dist.ProcessGroup.unbox(boxed) if boxed is not None else _resolve_process_group(args[-1])
            tensors = [tensor for arg in args for tensor in (arg if isinstance(arg, list) else [arg])]
            whole = max(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
            self.n_bytes += _ROUNDS[name] * _in_ring(group.size()) * whole
        return function(*args, **(kwargs or {}))


def sent_over_loopback() -> int:
    """Bytes that the processes of this network namespace have sent one another."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split()[9])


def memory(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes behind this worker's parts of some tensors; what several share counts once."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in map(torch.Tensor.untyped_storage, local)}.values())


def counted_step(trainer: trainers.BasicTrainer, step: Callable, path: str, batch: dict) -> dict:
    """`train_step`, which then leaves at `path` what all workers have counted."""
    parameters, labels = list(trainer.policy.parameters()), [batch["chosen_labels"], batch["rejected_labels"]]
    counts = {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "blocks": trainer.policy.config.num_hidden_layers,
        "hidden_size": trainer.policy.config.hidden_size,
        "predicted_tokens": int(sum((side != -100).sum() for side in labels)),
    }
    n_tokens, held = [], {}  # of each microbatch; bytes

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
    of_all = all_gather_object({"counts": counts, "held": held, "collectives": collectives.n_bytes, "kernel": kernel})
    if trainer.rank == 0:
        Path(path).write_text(json.dumps(of_all))
    return metrics


def work(config: DictConfig, path: str):
    """Train as train.py does, but count every step."""
    trainers.BasicTrainer.train_step = functools.partialmethod(counted_step, trainers.BasicTrainer.train_step, path)
    joined = connection.process_group() if config.trainer != "BasicTrainer" else contextlib.nullcontext()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), joined:
        train.train_from(config, None, {})


def run(trainer: str, n: int, n_replicas: int, directory: str, batch_size: int) -> list[dict]:
    """Train three steps; returns what each worker has counted in the last."""
    overrides = [
        f"trainer={trainer}", f"world_size={n if n > 1 else 'null'}", f"fsdp_replicate={n_replicas}",
        "model=blank_model", f"model.name_or_path={directory}/model", "model.from_scratch=true",
        "model.reference_dtype=float32", "loss=dpo", "datasets=[toy]", "max_length=64", "max_prompt_length=32",
        f"batch_size={batch_size}", f"n_examples={3 * batch_size}", "n_eval_examples=4", "do_first_eval=false",
        "sample_during_eval=false", "debug=true", "exp_name=parallel", f"local_dirs=[{directory}/cache]",
        f"local_run_dir={directory}/{trainer}-{n}-{n_replicas}",
    ]  # fmt: skip
    with initialize_config_dir(str(REPOSITORY / "config"), version_base="1.3"):
        config = compose("config", overrides)
    OmegaConf.resolve(config)
    with contextlib.redirect_stdout(sys.stderr):
        check_config(config)
    path = f"{directory}/counted.json"
    if trainer == "BasicTrainer":
        work(config, path)
    else:
        launch.run_workers(work, n, None, config, path)
    return json.loads(Path(path).read_text())


def row(trainer: str, n: int, n_replicas: int, counted: list[dict]) -> str:
    """A line of the table: in MiB, and in brackets as a multiple of theory."""
    counts, replicas = counted[0]["counts"], f", fsdp_replicate={n_replicas}" if n_replicas > 1 else ""
    sent, held = bytes_to_send(trainer, n, n_replicas, counts), FLOAT32 * counts["parameters"] * n_replicas / n

    def beside(theory: float, n_bytes: float) -> str:
        return f"{n_bytes / MIB:.1f} ({n_bytes / theory:.3f})" if theory else f"{n_bytes / MIB:.1f}"

    columns = [f"{trainer} on {n}{replicas}", f"{sent / MIB:.1f}"]
    columns += [beside(sent, sum(worker[kind] for worker in counted) / n) for kind in ("collectives", "kernel")]
    kinds = ("weights", "gradients", "optimizer", "reference")
    columns += [f"{held / MIB:.1f}", *(beside(held, max(worker["held"][kind] for worker in counted)) for kind in kinds)]
    return f"| {' | '.join(columns)} |"


def in_own_network():
    """Start over in a network namespace, where nobody else's traffic is counted; where that can't be, say so."""
    if "OWN_NETWORK" in os.environ:
        return
    alone = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$0" "$@"']
    if shutil.which("unshare") and subprocess.run([*alone, "true"], capture_output=True).returncode == 0:
        os.environ |= {"OWN_NETWORK": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        os.execvp(alone[0], [*alone, sys.executable, *sys.argv])
    print("no network namespace (unshare): the kernel's bytes are those of all programs on this machine\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=512, help="hidden size")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16, help="pairs, of all workers together")
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is counted is the same on a GPU
    in_own_network()
    with tempfile.TemporaryDirectory() as directory:
        model = f"{directory}/model"
        shutil.copytree(REPOSITORY / "assets" / "tiny", model)
        sizes = {"hidden_size": args.hidden, "num_hidden_layers": args.layers, "intermediate_size": 4 * args.hidden}
        transformers.AutoConfig.from_pretrained(model, **sizes).save_pretrained(model)
        kinds = ["collectives", "kernel", "held of each, theory", "weights", "gradients", "RMSprop", "reference"]
        print(f"| trainer, workers | {' | '.join(['sent, theory', *kinds])} |\n|{'---|' * 9}", flush=True)
        for setting in RUNS:
            counted = run(*setting, directory, args.batch_size)
            print(row(*setting, counted), flush=True)
    print(f"\nper worker, the last row's: {counted[0]['counts']}")


if __name__ == "__main__":
    main()
