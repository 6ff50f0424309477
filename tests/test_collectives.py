"""Workers reduce numbers by gloo, in the main thread and in another thread, and create each group once."""

import threading
import time

import torch
import torch.distributed as dist
from conftest import ORACLE
from omegaconf import OmegaConf

import trainers
from commands.command_line import compose_config
from config_checks.checks import check_config
from distributed import collectives


def reduce_in_two_threads(n: int) -> tuple[list[int], list[int]]:
    """Reduce numbers in the main thread and in another thread at once, at a different pace in each worker."""
    rank, group = dist.get_rank(), collectives.thread_group("test")
    other: list[int] = []

    def reduce_in_thread():
        for i in range(n):
            time.sleep(0.002 * (rank + i) % 3)
            other.append(collectives.all_reduce_max(1000 + i + rank, group))

    thread = threading.Thread(target=reduce_in_thread)
    thread.start()
    main = []
    for i in range(n):
        time.sleep(0.001 * (2 - rank))
        main.append(collectives.all_reduce_max(i + rank))
    thread.join()
    return main, other


def test_collectives_of_two_threads_do_not_mix(in_workers):
    for main, other in in_workers(2, reduce_in_two_threads, 20):
        assert main == [i + 1 for i in range(20)]
        assert other == [1000 + i + 1 for i in range(20)]


def devices_of_reduced_numbers() -> set[str]:
    """Reduce a number as if the worker's device were a GPU."""
    device, reduce, devices = collectives.device, dist.all_reduce, set()
    collectives.device = lambda: torch.device("meta")
    dist.all_reduce = lambda tensor, *args, **kwargs: (devices.add(tensor.device.type), reduce(tensor, *args, **kwargs))
    assert collectives.all_reduce_max(dist.get_rank()) == 1
    collectives.device, dist.all_reduce = device, reduce  # restore them for other tests in this worker
    return devices


def test_numbers_are_reduced_on_the_cpu(in_workers):
    assert in_workers(2, devices_of_reduced_numbers) == [{"cpu"}, {"cpu"}]


def groups_made() -> int:
    made, new_group = [], dist.new_group

    def count(*args, **kwargs):
        made.append(args)
        return new_group(*args, **kwargs)

    dist.new_group = count
    for _ in range(3):
        collectives.local_group()
        collectives.thread_group("test")
    dist.new_group = new_group
    assert collectives.local_group()[0] == 0
    return len(made)


def test_process_groups_are_made_once(in_workers):
    assert all(made <= 2 for made in in_workers(2, groups_made))


def prepared_batches(directory: str) -> tuple[set[bool], list[list[int]]]:
    """Prepare all training batches of a worker; return {True if in the main thread}, and the microbatches' sizes."""
    config = compose_config(
        "model=tiny", f"dataset_paths.hh={ORACLE}/hh", "loss=dpo", "n_examples=64", "n_eval_examples=4",
        "batch_size=16", "trainer=FSDPTrainer", "max_tokens_per_microbatch=400", f"local_dirs=[{directory}]",
        "wandb.enabled=false", f"local_run_dir={directory}/run",
    )  # fmt: skip
    OmegaConf.resolve(config)
    check_config(config)
    trainer = trainers.make_trainer(config)
    prepare, in_main_thread = trainer.with_microbatches, set()

    def watched(*args, **kwargs) -> dict:
        in_main_thread.add(threading.current_thread() is threading.main_thread())
        return prepare(*args, **kwargs)

    trainer.with_microbatches = watched
    sizes = []
    for batch in trainer._training_batches(0):
        sizes.append([len(part["prompt"]) for part in batch["microbatches"]])
        trainer.stop.check()  # a collective in the main thread, between those of the other thread
    return in_main_thread, sizes


def test_batches_are_prepared_in_another_thread_under_fsdp(in_workers, tmp_path):
    (first, sizes), (second, other_sizes) = in_workers(2, prepared_batches, str(tmp_path))
    assert first == second == {False}
    assert len(sizes) == 4 and all(sum(parts) == 8 for parts in [*sizes, *other_sizes])
    assert [len(parts) for parts in sizes] == [len(parts) for parts in other_sizes]
    assert max(len(parts) for parts in sizes) > 1
