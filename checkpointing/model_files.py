"""Write the model of a sharded checkpoint for `from_pretrained`, one file of bounded size after another."""

import json
import os
from dataclasses import dataclass

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from basics.files import flush_to_disk, sha256
from basics.outputs import MODEL_INDEX
from checkpointing.archives import fit_state
from checkpointing.sharded import SavedTensor, ShardedCheckpoint
from distributed import collectives
from utils import UserError, rank0_print

MAX_FILE_SIZE = 2 * 10**9  # bytes; the worker that writes a file holds its tensors in memory


@dataclass
class ModelFiles:
    """The files in which `save_pretrained` would write the policy of a sharded checkpoint."""

    checkpoint: ShardedCheckpoint
    model: nn.Module  # tells transformers how tensors are named and shaped in files
    state: dict[str, SavedTensor]  # by their names in the model
    names: dict[str, list[str]]  # the model's names of each file's tensors
    index: dict  # the content of `MODEL_INDEX`

    def write(self, directory: str, file: str):
        """Write one of the files."""
        tensors = revert_weight_conversion(self.model, {name: self.state[name].full() for name in self.names[file]})
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, os.path.join(directory, file), metadata={"format": "pt"})
        self.checkpoint.close_files()  # their pages count as this process's memory

    def write_all(self, directory: str):
        """Write all files, and the index if there are several."""
        for file in self.names:
            self.write(directory, file)
        if len(self.names) > 1:
            self.write_index(directory)

    def write_index(self, directory: str):
        """Write the file that says which tensor is in which file."""
        with open(os.path.join(directory, MODEL_INDEX), "w", encoding="utf-8") as file:
            json.dump(self.index, file, indent=2, sort_keys=True)


def model_files(directory: str, model: nn.Module) -> ModelFiles | None:
    """Plan the files of a sharded checkpoint's policy.

    Args:
        model: has the policy's architecture, without FSDP's class; its weights aren't read.

    Returns: None if transformers would join tensors of different files into one.
    Raises: UserError if the checkpoint can't be read or doesn't fit the model.
    """
    checkpoint = ShardedCheckpoint(directory)
    state = fit_state(checkpoint.state_dict("policy"), model, directory)
    shapes = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}
    for name in model._keys_to_ignore_on_save or ():
        shapes.pop(name, None)
    shapes = remove_tied_weights_from_state_dict(shapes, model)
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=MAX_FILE_SIZE)
    names = split.filename_to_tensors
    try:
        by_file = {
            file: revert_weight_conversion(model, {name: shapes[name] for name in names[file]}) for file in names
        }
    except Exception:  # transformers' converters raise errors of any kind
        return None
    together = revert_weight_conversion(model, shapes)
    found = {name: tensor.shape for tensors in by_file.values() for name, tensor in tensors.items()}
    if found != {name: tensor.shape for name, tensor in together.items()}:
        return None
    n_parameters = sum(tensor.numel() for tensor in shapes.values())
    files = {name: file for file, tensors in by_file.items() for name in tensors}
    index = {"metadata": {"total_parameters": n_parameters, **split.metadata}, "weight_map": files}
    return ModelFiles(checkpoint, model, state, names, index)


def add_model_files(
    directory: str, model: nn.Module, group: torch.distributed.ProcessGroup | None, remedy: str
) -> dict[str, str]:
    """Write the model's files beside the shards, each file by one worker; all workers must call this.

    If that fails, a warning gives the reason and the `remedy`, and these files are removed; the shards remain.

    Args:
        group: see `write_shard`.

    Returns: the SHA-256 of each file but the index.
    """
    rank, world_size = collectives.rank_and_world_size()
    collectives.all_gather_object(None, group)  # waits until rank 0 has written the shards' index
    files, digests, problem = None, {}, None
    try:
        if (files := model_files(directory, model)) is None:
            raise ValueError(f"transformers joins several tensors of {type(model).__name__} into one in its files")
        for file in list(files.names)[rank::world_size]:
            files.write(directory, file)
            path = os.path.join(directory, file)
            flush_to_disk(path)
            digests[file] = sha256(path)
        if rank == 0:  # even for a single file: engines such as vLLM would read the shards as weights, too
            files.write_index(directory)
    except (OSError, RuntimeError, ValueError, SafetensorError, UserError) as error:
        problem = f"worker {rank}: {str(error)[:300]}"
    problems, digests = zip(*collectives.all_gather_object((problem, digests), group), strict=True)
    if problem := next(filter(None, problems), None):
        rank0_print(f"WARNING: the checkpoint gets no model for from_pretrained ({problem}); {remedy}")
        if rank == 0:
            for file in (*(files.names if files else ()), MODEL_INDEX):
                if os.path.exists(path := os.path.join(directory, file)):
                    os.remove(path)
        return {}
    return {file: digest for of_worker in digests for file, digest in of_worker.items()}
