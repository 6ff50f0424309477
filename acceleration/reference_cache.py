"""The reference's log-probabilities, computed once before training and kept on disk."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator

import torch
from omegaconf import DictConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from data.batches import BatchIterator
from distributed import collectives
from distributed.dtensor import full_tensor
from references import REFERENCE_ADAPTER, Reference, has_the_weights
from utils import UserError, get_local_dir, hides_progress, on_rank0, rank0_print, take


class LogpsCache:
    """Log-probabilities of pairs, found by `pair_keys`; a directory of files, each whole and never changed.

    Runs that share a directory add files of their own, so they can't disturb each other. Rank 0 reads and writes; all
    ranks know the same.

    Raises: UserError if it can't be read or written there.
    """

    def __init__(self, directory: str):
        self.directory = directory
        self.logps: dict[bytes, tuple[float, float]] = {}
        if on_rank0():
            with self._errors_explained():
                os.makedirs(directory, exist_ok=True)
                for name in sorted(os.listdir(directory)):
                    if name.endswith(".safetensors"):
                        self._read(os.path.join(directory, name))
        self.logps = collectives.broadcast_object(self.logps)

    @contextlib.contextmanager
    def _errors_explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"can't keep the reference's log-probabilities in {self.directory}: {error}\n"
                "Make room, or choose another place by local_dirs=[DIR]; precompute_ref_log_probs=false keeps none"
            ) from error

    def _read(self, path: str):
        try:
            with safe_open(path, framework="pt") as file:
                keys, logps, checksum = (file.get_tensor(name) for name in ("keys", "logps", "checksum"))
            if not torch.equal(checksum, _checksum(keys, logps)):
                raise ValueError("its checksum is wrong")
        except (SafetensorError, ValueError, RuntimeError, OSError) as error:
            rank0_print(f"WARNING: {path} is damaged ({error}); its log-probabilities are computed again")
            with contextlib.suppress(OSError):
                os.remove(path)
            return
        for key, (chosen, rejected) in zip(keys, logps.tolist(), strict=True):
            self.logps[key.numpy().tobytes()] = chosen, rejected

    def add(self, logps: dict[bytes, tuple[float, float]]):
        """Keep these, on disk too: the file appears under its name once it is whole."""
        self.logps.update(logps)
        if not logps or not on_rank0():
            return
        keys = torch.frombuffer(bytearray(b"".join(logps)), dtype=torch.uint8).view(len(logps), -1)  # (N, 32)
        values = torch.tensor(list(logps.values()), dtype=torch.float64)  # (N, 2)
        path = os.path.join(self.directory, f"{uuid.uuid4().hex}.safetensors")
        with self._errors_explained():
            try:
                save_file({"keys": keys, "logps": values, "checksum": _checksum(keys, values)}, f"{path}.partial")
                os.replace(f"{path}.partial", path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.remove(f"{path}.partial")
                raise

    def lookup(self, batch: dict, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of a batch's chosen and rejected responses, each (batch_size,)."""
        values = torch.tensor([self.logps[key] for key in pair_keys(batch)], dtype=torch.float64).to(dtype)
        values = values.to(device, non_blocking=True)
        return values[:, 0], values[:, 1]

    def fill(
        self,
        iterators: dict[str, BatchIterator],
        compute: Callable[[dict], tuple[torch.Tensor, torch.Tensor]],
        split: Callable[[dict], list[dict]],
    ):
        """Add what is missing of all pairs that the iterators' batches hold.

        Args:
            iterators: with a name for each.
            compute: a microbatch's chosen and rejected log-probabilities, each (batch_size,).
            split: a batch cut into microbatches.
        """
        n_computed = 0
        for name, iterator in iterators.items():
            with tqdm(
                total=iterator.n_distinct, desc=f"Reference on {name} pairs", unit="pair", disable=hides_progress()
            ) as progress:
                for chunk, n_pairs in iterator.distinct_examples():
                    n_computed += self.fill_batch(chunk, compute, split)
                    progress.update(n_pairs)
        rank0_print(f"Reference log-probabilities: {n_computed} computed, the others were in {self.directory}")

    def fill_batch(self, batch: dict, compute: Callable, split: Callable) -> int:
        """Add what is missing of a batch's pairs; returns how many different ones that were.

        Workers that have shards of a batch compute equally many: one that misses fewer computes others again.
        """
        missing = [index for index, key in enumerate(pair_keys(batch)) if key not in self.logps]
        missing += [0] * (collectives.all_reduce_max(len(missing)) - len(missing))
        new, n_before = {}, len(self.logps)
        for microbatch in split(take(batch, torch.tensor(missing))) if missing else []:
            logps = torch.stack(compute(microbatch), dim=1).tolist()  # (batch_size, 2)
            new |= zip(pair_keys(microbatch), map(tuple, logps), strict=True)
        self.add({key: logps for of_worker in collectives.all_gather_object(new) for key, logps in of_worker.items()})
        return len(self.logps) - n_before


def pair_keys(batch: dict) -> list[bytes]:
    """A key for each pair of a batch that depends on its token ids, as truncated, and on which of them are trained."""
    keys = []
    for index in range(len(batch["prompt"])):
        digest = hashlib.sha256()
        for side in ("chosen", "rejected"):
            n_tokens = int(batch[f"{side}_attention_mask"][index].sum())
            ids, is_trained = batch[f"{side}_input_ids"][index], batch[f"{side}_labels"][index] != -100
            digest.update(f"{n_tokens};".encode())
            digest.update(ids[:n_tokens].numpy().tobytes() + is_trained[:n_tokens].numpy().tobytes())
        keys.append(digest.digest())
    return keys


def _checksum(keys: torch.Tensor, logps: torch.Tensor) -> torch.Tensor:
    """SHA-256 of a cache file's contents, (32,)."""
    digest = hashlib.sha256(keys.numpy().tobytes() + logps.numpy().tobytes()).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)


def _fingerprint(model: nn.Module, with_adapter: bool, cast_to: torch.dtype | None, details: dict[str, object]) -> str:
    """What a reference's numbers depend on besides the pair: its config, its weights, and `details`.

    Args:
        with_adapter: the adapter is part of it.
        cast_to: the dtype that the reference has these weights in, if it is another.
    """
    config = model.config.to_dict()
    for key in ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"):
        config.pop(key, None)  # these say where the weights come from, not what is computed
    digest = hashlib.sha256(json.dumps([config, details], sort_keys=True, default=str).encode())
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "lora_" not in name or (with_adapter and f".{REFERENCE_ADAPTER}." not in name):
            tensors[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = tensor.detach()
    for name in tqdm(sorted(tensors), "Hashing the reference's weights", leave=False, disable=hides_progress()):
        tensor = full_tensor(tensors[name])
        tensor = tensor.to("cpu", cast_to if tensor.is_floating_point() else None).contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def open_cache(policy: nn.Module, kind: str, config: DictConfig, reference: Callable[[], Reference]) -> "LogpsCache":
    """The cache of this reference's log-probabilities, in the local dir; `policy` is as training starts.

    `reference` is asked for only where the policy doesn't tell its weights: one whose numbers are all known need not be
    loaded.
    """
    details: dict[str, object] = {}
    if kind != "model":  # then it is computed as the policy is, which under mixed precision is the trainer's way
        details["policy_mp"] = config.model.policy_mp and [config.model.policy_mp, config.trainer]
    with_adapter = kind == "model" or (config.model.adapter is not None and kind != "adapter_off")
    if kind == "model" and not has_the_weights(policy, config):
        model, cast_to = reference().model, None
    else:
        model, cast_to = policy, getattr(torch, config.model.reference_dtype) if kind == "model" else None
    if with_adapter and hasattr(model, "peft_config"):
        details["adapter"] = _adapter_scaling(model)
    fingerprint = _fingerprint(model, with_adapter, cast_to, details)
    return LogpsCache(os.path.join(get_local_dir(config.local_dirs), "reference_logps", fingerprint))


def _adapter_scaling(model: nn.Module) -> dict[str, str]:
    """What of an adapter's settings decides, beside its weights, what it computes."""
    settings = model.peft_config["default"]
    names = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
    return {name: str(getattr(settings, name, None)) for name in names}
