"""Save tensors in parts: each worker writes its part to a file of its own, and reads the parts it needs from all files.

The files are plain safetensors. `shards.json` lists each tensor's dtype, shape and pieces: boxes that cover the tensor,
and the file that holds each of them. So a checkpoint can be read by another number of workers, or another trainer.
"""

import functools
import itertools
import json
import os
from collections.abc import Iterable
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from basics.files import flush_to_disk, open_regular, sha256
from basics.outputs import SHARDS
from distributed import collectives
from distributed.dtensor import distribute_like
from utils import UserError

_FORMAT = 1  # of the index


# ---- which part of a tensor this worker holds -----------------------------------------------------------------------


class Box(NamedTuple):
    """A box-shaped part of a tensor. Its values are in another tensor: a worker's local one, or one in a file."""

    offset: tuple[int, ...]  # of the box in the whole tensor
    shape: tuple[int, ...]
    start: tuple[int, ...]  # of the box in the tensor that holds its values

    @property
    def end(self) -> tuple[int, ...]:
        """The box's exclusive end in the whole tensor."""
        return tuple(first + size for first, size in zip(self.offset, self.shape, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index of the tensor that holds its values."""
        return tuple(slice(start, start + size) for start, size in zip(self.start, self.shape, strict=True))

    def overlap(self, other: "Box") -> "Box | None":
        """Return the part of this box that the other box has, too; None if there is none."""
        begin, end = tuple(map(max, self.offset, other.offset)), tuple(map(min, self.end, other.end))
        if any(first >= last for first, last in zip(begin, end, strict=True)):
            return None
        shape = tuple(last - first for first, last in zip(begin, end, strict=True))
        start = tuple(s + first - o for s, first, o in zip(self.start, begin, self.offset, strict=True))
        return Box(begin, shape, start)


def held_boxes(tensor: torch.Tensor) -> list[Box]:
    """Return the boxes of a tensor that this worker holds: one for most placements, three for fused q, k and v."""
    return _boxes(tensor, 0, 1)


def boxes_to_write(tensor: torch.Tensor) -> list[Box]:
    """Return the boxes that this worker writes; together, the workers write every value of the tensor.

    Workers that hold the same rows divide them among themselves; rank 0 writes tensors that aren't distributed.
    """
    rank = collectives.rank_and_world_size()[0]
    if not isinstance(tensor, DTensor) or tensor.ndim == 0:
        return held_boxes(tensor) if rank == 0 else []
    number, n_replicas = 0, 1
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    for dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            number, n_replicas = number * mesh.size(dim) + coordinate[dim], n_replicas * mesh.size(dim)
    return _boxes(tensor, number, n_replicas)


def _boxes(tensor: torch.Tensor, number: int, n_replicas: int) -> list[Box]:
    """Return this worker's boxes of a tensor, cut to the `number`-th of `n_replicas` equal parts of their rows."""
    if isinstance(tensor, DTensor):
        mesh, placements = tensor.device_mesh, tensor.placements
        ranges_by_dim = [_ranges_held(size, mesh, tuple(_placement_of_dim(placement, dim) for placement in placements))
                         for dim, size in enumerate(tensor.shape)]  # fmt: skip
    else:
        ranges_by_dim = [[(0, size, 0)] for size in tensor.shape]
    if ranges_by_dim:
        rows = ranges_by_dim[0]
        n_rows = sum(size for _, size, _ in rows)
        ranges_by_dim[0] = _cut(rows, number * n_rows // n_replicas, (number + 1) * n_rows // n_replicas)
    boxes = itertools.product(*ranges_by_dim)  # each has an offset, a length and a start for every dimension
    return [Box(*(tuple(ranges[i] for ranges in box) for i in range(3))) for box in boxes]


def _placement_of_dim(placement: Placement, dim: int) -> Placement:
    """Return how a 1-D tensor must be placed to be divided as dimension `dim` of this tensor is."""
    if isinstance(placement, _StridedShard) and placement.dim == dim:
        return _StridedShard(0, split_factor=placement.split_factor)
    return Shard(0) if isinstance(placement, Shard) and placement.dim == dim else Replicate()


@functools.lru_cache(maxsize=1024)
def _ranges_held(size: int, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> list[tuple[int, int, int]]:
    """Return the indices of a dimension that this worker holds, as ranges: first, length, start in its local tensor."""
    indices = distribute_tensor(torch.arange(size), mesh, placements, src_data_rank=None).to_local().tolist()
    starts = [i for i, index in enumerate(indices) if i == 0 or index != indices[i - 1] + 1]
    return [(indices[i], end - i, i) for i, end in itertools.pairwise([*starts, len(indices)])]


def _cut(ranges: list[tuple[int, int, int]], begin: int, end: int) -> list[tuple[int, int, int]]:
    """Return the parts of these ranges from `begin` to `end` in the local tensor."""
    cut = []
    for first, size, start in ranges:
        new_start, stop = max(start, begin), min(start + size, end)
        if new_start < stop:
            cut.append((first + new_start - start, stop - new_start, new_start))
    return cut


# ---- writing --------------------------------------------------------------------------------------------------------


class WorkerShard(NamedTuple):
    """This worker's pieces of all tensors, in CPU memory, and their description for the index."""

    pieces: dict[str, torch.Tensor]  # by their keys in the file
    tensors: dict[str, dict]  # by name: dtype, shape, and this worker's pieces as [offset, shape]


def shard_of(state_dicts: dict[str, dict], copies: bool) -> WorkerShard:
    """Return this worker's part of a checkpoint's state dicts; a tensor with several names is saved once.

    Args:
        copies: copy tensors in CPU memory, too, so that training can change them before they are written.
    """
    shard, seen = WorkerShard({}, {}), set()
    for name, tensor in _named_tensors(state_dicts).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        boxes, local = boxes_to_write(tensor), tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for box in boxes:
            piece = local.detach()[box.slices].to("cpu", copy=copies).contiguous()
            shard.pieces[_key(name, box.offset)] = piece
        pieces = [[box.offset, box.shape] for box in boxes]
        shard.tensors[name] = {"dtype": str(tensor.dtype)[6:], "shape": list(tensor.shape), "pieces": pieces}
    return shard


def _named_tensors(state_dicts: dict[str, dict]) -> dict[str, torch.Tensor]:
    """Return the tensors of models' and an optimizer's state dicts: policy.NAME, optimizer.NUMBER.NAME, ..."""
    tensors = {}
    for kind, state in state_dicts.items():
        if kind == "optimizer":
            values = {f"{number}.{key}": value for number, of_parameter in state["state"].items()
                      for key, value in of_parameter.items()}  # fmt: skip
        else:
            values = state
        tensors |= {f"{kind}.{name}": value for name, value in values.items() if isinstance(value, torch.Tensor)}
    return tensors


def without_tensors(optimizer_state: dict) -> dict:
    """Return an optimizer's state dict without its tensors."""
    state = {number: {key: value for key, value in values.items() if not isinstance(value, torch.Tensor)}
             for number, values in optimizer_state["state"].items()}  # fmt: skip
    return {**optimizer_state, "state": state}


def _key(name: str, offset: Iterable[int]) -> str:
    return f"{name}{list(offset)}"


def write_shard(directory: str, shard: WorkerShard, group: torch.distributed.ProcessGroup | None) -> dict[str, str]:
    """Write this worker's file and wait until all have written theirs; rank 0 then writes the index.

    Args:
        group: the process group of the thread that calls this; None for the main thread's.

    Returns: the SHA-256 of each worker's file.
    Raises: OSError, on all workers, if one of them can't write.
    """
    rank, world_size = collectives.rank_and_world_size()
    path, digest, problem = os.path.join(directory, _file_name(rank, world_size)), None, None
    try:
        save_file(shard.pieces, path)
        flush_to_disk(path)
        digest = sha256(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        problem = f"worker {rank}: {type(error).__name__}: {error}" if os.path.isdir(directory) else not_shared(rank)
    written = collectives.all_gather_object((problem, digest, shard.tensors), group)
    for problem, _, _ in written:
        if problem is not None:
            raise OSError(problem)
    files = [_file_name(number, world_size) for number in range(world_size)]
    if rank == 0:
        _write_index(directory, files, [tensors for _, _, tensors in written])
    return {name: digest for name, (_, digest, _) in zip(files, written, strict=True)}


def _file_name(rank: int, world_size: int) -> str:
    return f"shard-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def not_shared(rank: int) -> str:
    """Return the message for a directory that rank 0 has created, and another worker doesn't see."""
    return (
        f"worker {rank} doesn't see it. With checkpoint_format=sharded every worker writes to local_run_dir: give one "
        "on a file system that all machines share; checkpoint_format=whole writes on rank 0's machine alone"
    )


def _write_index(directory: str, files: list[str], by_worker: list[dict[str, dict]]):
    tensors = {}
    for name, described in by_worker[0].items():
        pieces = {tuple(offset): (number, offset, shape) for number, worker in enumerate(by_worker)
                  for offset, shape in worker[name]["pieces"]}  # fmt: skip
        # listed once: workers that FSDP places on different meshes may write the same piece
        tensors[name] = {**described, "pieces": list(pieces.values())}
    with open(os.path.join(directory, SHARDS), "w", encoding="utf-8") as file:
        json.dump({"format": _FORMAT, "files": files, "tensors": tensors}, file)


# ---- reading --------------------------------------------------------------------------------------------------------


class TensorFiles:
    """Safetensors files in a directory; each is opened when a part of it is first read."""

    def __init__(self, directory: str):
        self.directory, self._open_files = directory, {}

    def close_files(self):
        """Close the files; they are opened again as they are needed."""
        self._open_files.clear()

    def read(self, name: str, key: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """Read a part of a tensor. Raises: UserError if the file doesn't hold it."""
        path = os.path.join(self.directory, name)
        try:
            if name not in self._open_files:
                self._open_files[name] = safe_open(path, framework="pt")
            file = self._open_files[name]
            return file.get_slice(key)[slices] if slices else file.get_tensor(key)
        except (OSError, RuntimeError, ValueError, IndexError, SafetensorError) as error:
            raise UserError(f"{path}: can't read {key} ({type(error).__name__}: {str(error)[:300]})") from error


class ShardedCheckpoint(TensorFiles):
    """The tensors in the files of a sharded checkpoint.

    Raises: UserError if the index can't be read.
    """

    def __init__(self, directory: str):
        super().__init__(directory)
        path = os.path.join(directory, SHARDS)
        try:
            with open_regular(path) as file:
                index = json.load(file)
            if index["format"] != _FORMAT:
                raise ValueError(f"it has format {index['format']}; this version reads format {_FORMAT}")
            self.files = [os.path.basename(name) for name in index["files"]]
            self.tensors = {name: self._saved(name, **described) for name, described in index["tensors"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise UserError(f"{path}: can't read it ({type(error).__name__}: {str(error)[:300]})") from error

    def _saved(self, name: str, dtype: str, shape: list[int], pieces: list) -> "SavedTensor":
        places = [Place(self.files[number], _key(name, offset), Box(tuple(offset), tuple(size), (0,) * len(offset)))
                  for number, offset, size in pieces]  # fmt: skip
        if not isinstance(getattr(torch, dtype), torch.dtype):
            raise ValueError(f"{name} has the dtype {dtype!r}")
        return SavedTensor(self, name, getattr(torch, dtype), shape, places)

    def state_dict(self, kind: str) -> dict[str, "SavedTensor"]:
        """Return the tensors of one kind, policy, reference or optimizer, by their names."""
        prefix = f"{kind}."
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}


class Place(NamedTuple):
    """A tensor in a file that holds a box of a saved tensor."""

    file: str
    key: str  # the tensor's name in the file
    box: Box


class SavedTensor:
    """A tensor in safetensors files, in one piece or several; parts of it are read when needed, and cast to `dtype`."""

    def __init__(self, files: TensorFiles, name: str, dtype: torch.dtype, shape: Iterable[int], places: list[Place]):
        self.files, self.name, self.dtype, self.shape, self.places = files, name, dtype, torch.Size(shape), places

    def is_floating_point(self) -> bool:
        """True if it holds floating-point numbers."""
        return self.dtype.is_floating_point

    def full(self) -> torch.Tensor:
        """Read the whole tensor into CPU memory."""
        start = (0,) * len(self.shape)
        return self._read([Box(start, tuple(self.shape), start)], self.shape)

    def read_like(self, target: torch.Tensor) -> torch.Tensor:
        """Return the tensor distributed as `target` is (see `distribute_like`); read only this worker's part."""
        if not isinstance(target, DTensor) or self.shape != target.shape:
            return distribute_like(target, self.full())
        mesh, placements = target.device_mesh, target.placements
        local = self._read(held_boxes(target), target.to_local().shape).to(mesh.device_type)
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=self.shape, stride=target.stride())

    def _read(self, wanted: list[Box], local_shape: torch.Size) -> torch.Tensor:
        """Return a worker's local tensor, filled with the wanted boxes of this tensor."""
        local, n_read = torch.empty(local_shape, dtype=self.dtype), 0
        for box, place in itertools.product(wanted, self.places):
            if (part := box.overlap(place.box)) is not None:
                values = self.files.read(place.file, place.key, place.box.overlap(box).slices)
                local[part.slices] = values
                n_read += values.numel()
        if n_read != local.numel():
            path = os.path.join(self.files.directory, SHARDS)
            raise UserError(f"{path}: it lists {n_read} of {local.numel()} values that are needed of {self.name}")
        return local


def is_tensor(value: object) -> bool:
    """True for a tensor, in memory or in files."""
    return isinstance(value, torch.Tensor | SavedTensor)


def placed_like(target: torch.Tensor, tensor: torch.Tensor | SavedTensor) -> torch.Tensor:
    """Return a tensor distributed as `target` is; if it is in files, this worker reads only its part."""
    return tensor.read_like(target) if isinstance(tensor, SavedTensor) else distribute_like(target, tensor)
