"""Workers agree on numbers by gloo, in the main thread and beside it, and make each group once."""

import threading
import time

import torch
import torch.distributed as dist

from distributed import collectives


def agreements_of_two_threads(n: int) -> tuple[list[int], list[int]]:
    """Reduce numbers in the main thread and in another at once; each worker is at another pace in each."""
    rank, group = dist.get_rank(), collectives.thread_group()
    beside: list[int] = []

    def agree_beside():
        for i in range(n):
            time.sleep(0.002 * (rank + i) % 3)
            beside.append(collectives.all_reduce_max(1000 + i + rank, group))

    thread = threading.Thread(target=agree_beside)
    thread.start()
    main = []
    for i in range(n):
        time.sleep(0.001 * (2 - rank))
        main.append(collectives.all_reduce_max(i + rank))
    thread.join()
    return main, beside


def test_a_threads_collectives_do_not_mix_with_the_main_threads(in_workers):
    for main, beside in in_workers(2, agreements_of_two_threads, 20):
        assert main == [i + 1 for i in range(20)]
        assert beside == [1000 + i + 1 for i in range(20)]


def devices_of_reduced_numbers() -> set[str]:
    """Reduce a number where the worker's device would be a GPU."""
    collectives.device = lambda: torch.device("meta")
    reduce, devices = dist.all_reduce, set()
    dist.all_reduce = lambda tensor, *args, **kwargs: (devices.add(tensor.device.type), reduce(tensor, *args, **kwargs))
    assert collectives.all_reduce_max(dist.get_rank()) == 1
    dist.all_reduce = reduce
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
        collectives.thread_group()
    dist.new_group = new_group
    assert collectives.local_group()[0] == 0
    return len(made)


def test_groups_are_made_once(in_workers):
    assert all(made <= 2 for made in in_workers(2, groups_made))
