"""Keep the text of built-in datasets once per machine: its workers map the same file into memory."""

import json
import os
import uuid
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from data.batches import BatchIterator, Prompt, example_counts
from distributed import collectives
from utils import UserError

_SCHEMA = pa.schema({"prompt": pa.large_binary()})
_BATCH = 1024  # prompts


class MappedPrompts(Sequence):
    """The prompts of a built-in dataset, in a memory-mapped file; each is read when it is indexed."""

    def __init__(self, path: str, first: Prompt, n_pairs: np.ndarray):
        self.dataset, self.split, self.truncation_mode = first.dataset, first.split, first.truncation_mode
        self.n_pairs = n_pairs  # (n_prompts,)
        self.column = pa.ipc.open_file(pa.memory_map(path)).read_all()["prompt"]

    def __len__(self) -> int:
        return len(self.n_pairs)

    def __getitem__(self, index: int) -> Prompt:
        text, responses, pairs, sft_target, rows = json.loads(self.column[index].as_py())
        pairs = [(preferred, other) for preferred, other in pairs]
        return Prompt(text, responses, pairs, sft_target, self.dataset, self.split, self.truncation_mode, rows=rows)


def share_text(iterators: list[BatchIterator | None], directory: str):
    """Replace the text in each worker's memory by a file that a machine's workers share; all workers must call this.

    Args:
        directory: a directory for the file, which is deleted once all workers have opened it.

    Raises: UserError on all workers of a machine that can't write the file.
    """
    for iterator in filter(None, iterators):
        parts = iterator.prompts.datasets
        parts[:] = [_shared(part, directory) if isinstance(part, list) else part for part in parts]


def _shared(part: list[Prompt], directory: str) -> MappedPrompts:
    first_rank, group = collectives.local_group()
    values = [None]
    if dist.get_rank() == first_rank:
        try:
            values = [_write(part, directory)]
        except OSError as error:
            reason = f"{part[0].dataset}: can't write its text to {directory}: {error.strerror or error}"
            values = [UserError(f"{reason}\nMake room, or choose another place with local_dirs=[DIR]")]
    dist.broadcast_object_list(values, first_rank, group)
    if isinstance(values[0], UserError):
        raise values[0]
    mapped = MappedPrompts(values[0], part[0], example_counts(part))
    dist.barrier(group)
    if dist.get_rank() == first_rank:
        os.remove(values[0])  # the workers keep it mapped
    return mapped


def _write(part: list[Prompt], directory: str) -> str:
    """Write prompts to a new file; return its path."""
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, f"text-{uuid.uuid4().hex}.arrow")
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        for start in range(0, len(part), _BATCH):
            fields = ([p.text, p.responses, p.pairs, p.sft_target, p.rows] for p in part[start : start + _BATCH])
            column = pa.array([json.dumps(values, default=int).encode() for values in fields], pa.large_binary())
            writer.write_batch(pa.record_batch([column], schema=_SCHEMA))
    return path
