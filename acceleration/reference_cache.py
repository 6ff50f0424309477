"""Cache the reference's log-probabilities on disk; they are computed once, before training."""

import contextlib
import functools
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator

import torch
from omegaconf import DictConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from basics.files import atomic_file
from distributed import collectives
from distributed.dtensor import full_tensor
from references import (
    REFERENCE_ADAPTER,
    Reference,
    make_starting_reference,
    policy_has_reference_weights,
    reference_dtype,
    reference_has_policy_precision,
)
from reporting.terminal import Progress, progressing
from utils import UserError, get_local_dir, on_rank0, rank0_print, select_examples

_PAIRS_PER_FILE = 1024


class LogpsCache:
    """Log-probabilities of pairs by their keys (see `pair_keys`), in a directory of files that never change.

    Runs can share a directory: each adds files of its own, and removes only damaged ones. Rank 0 reads and writes them,
    and all ranks hold the same values.

    Raises: UserError if the directory can't be read or written.
    """

    def __init__(self, directory: str):
        self.directory = directory
        self.logps: dict[bytes, tuple[float, float]] = {}
        self.unwritten: dict[bytes, tuple[float, float]] = {}
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
                f"can't cache the reference's log-probabilities in {self.directory}: "
                f"{getattr(error, 'strerror', None) or error}\n"
                "Free some space or choose another directory with local_dirs=[DIR], or use "
                "precompute_ref_log_probs=false, which needs no cache"
            ) from error

    def _read(self, path: str):
        try:
            with safe_open(path, framework="pt") as file:
                keys, logps, checksum = (file.get_tensor(name) for name in ("keys", "logps", "checksum"))
            if not torch.equal(checksum, _checksum(keys, logps)):
                raise ValueError("its checksum is wrong")
        except (SafetensorError, ValueError, RuntimeError, OSError) as error:
            rank0_print(f"WARNING: {path} is damaged ({error}); its log-probabilities will be computed again")
            with contextlib.suppress(OSError):
                os.remove(path)
            return
        for key, (chosen, rejected) in zip(keys, logps.tolist(), strict=True):
            self.logps[key.numpy().tobytes()] = chosen, rejected

    def add(self, logps: dict[bytes, tuple[float, float]]):
        """Add log-probabilities, and write them to disk once there are enough for a file."""
        self.logps.update(logps)
        self.unwritten.update(logps)
        if len(self.unwritten) >= _PAIRS_PER_FILE:
            self.write()

    def write(self):
        """Write the unwritten log-probabilities to a new file, which gets its final name once it is complete."""
        logps, self.unwritten = self.unwritten, {}
        if not logps or not on_rank0():
            return
        keys = torch.frombuffer(bytearray(b"".join(logps)), dtype=torch.uint8).view(len(logps), -1)  # (N, 32)
        values = torch.tensor(list(logps.values()), dtype=torch.float64)  # (N, 2)
        path = os.path.join(self.directory, f"{uuid.uuid4().hex}.safetensors")
        with self._errors_explained():
            content = save({"keys": keys, "logps": values, "checksum": _checksum(keys, values)})
            with atomic_file(path, binary=True) as file:
                file.write(content)

    def lookup(self, batch: dict, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probabilities of a batch's chosen and rejected responses, each (batch_size,)."""
        values = torch.tensor([self.logps[key] for key in pair_keys(batch)], dtype=torch.float64).to(dtype)
        values = values.to(device, non_blocking=True)
        return values[:, 0], values[:, 1]


def pair_keys(batch: dict) -> list[bytes]:
    """Return a hash of each pair: of its token ids after truncation, and of which tokens are trained."""
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
    """Return the SHA-256 of a cache file's contents, (32,)."""
    digest = hashlib.sha256(keys.numpy().tobytes() + logps.numpy().tobytes()).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)


def _fingerprint(model: nn.Module, with_adapter: bool, cast_to: torch.dtype | None, details: dict[str, object]) -> str:
    """Hash everything that determines the log-probabilities of a pair: the model's config, its weights, and `details`.

    Args:
        with_adapter: include the adapter's weights.
        cast_to: the reference's dtype, if it differs from that of `model`.
    """
    config = model.config.to_dict()
    for key in ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"):
        config.pop(key, None)  # they don't change the numbers
    digest = hashlib.sha256(json.dumps([config, details], sort_keys=True, default=str).encode())
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "lora_" not in name or (with_adapter and f".{REFERENCE_ADAPTER}." not in name):
            tensors[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = tensor.detach()
    for name in progressing(sorted(tensors), "Hashing the reference's weights", "tensors"):
        tensor = full_tensor(tensors[name])
        tensor = tensor.to("cpu", cast_to if tensor.is_floating_point() else None).contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fill_cache(trainer) -> LogpsCache:
    """Return the reference's log-probabilities of all of a trainer's pairs, before its first step.

    The reference has the weights that training starts from. It is loaded only if some pairs are missing or if the cache
    can't be found without its weights, and is then freed, unless it is the policy under another adapter.

    Raises: Stopped after a signal. Of the pairs computed so far, only those not yet written are then lost: fewer than
        1,024, and those of the current batch.
    """
    config, kind = trainer.config, trainer.config.reference
    make = functools.partial(make_starting_reference, kind, trainer.policy, config, trainer.load_reference)
    get_reference = functools.cache(make)
    cache = open_cache(trainer.policy, kind, config, get_reference)
    n_read = len(cache.logps)
    for name, iterator, min_microbatches in (
        ("training", trainer.train_iterator, config.gradient_accumulation_steps),
        ("evaluation", trainer.eval_iterator, 1),
    ):
        if iterator is None:
            continue
        with Progress(f"Precomputing the reference, {name} data", iterator.n_distinct, "pairs") as progress:
            for batch, n_pairs in iterator.distinct_examples():
                cache.add(_missing_logps(trainer, cache, get_reference, batch, min_microbatches))
                progress.update(n_pairs)
        cache.write()
    n_computed = len(cache.logps) - n_read
    rank0_print(f"Reference log-probabilities: {n_computed} computed, all others found in {cache.directory}")
    return cache


def _missing_logps(
    trainer, cache: LogpsCache, get_reference: Callable[[], Reference], batch: dict, min_microbatches: int
) -> dict[bytes, tuple[float, float]]:
    """Compute the log-probabilities that the cache lacks for all workers' shards of a batch, by key.

    They are computed in the microbatches in which the policy will first compute them, so that both round alike. The
    forward pass is collective: a worker that lacks fewer pairs than another computes its batch's first pair again.
    """
    missing = [index for index, key in enumerate(pair_keys(batch)) if key not in cache.logps]
    missing += [0] * (collectives.all_reduce_max(len(missing)) - len(missing))
    if not missing:
        return {}
    examples, logps = select_examples(batch, torch.tensor(missing)), {}
    for microbatch in trainer.microbatches(examples, min(min_microbatches, len(missing))):
        trainer.stop.check()
        with get_reference().active() as model:
            pairs = trainer.response_logps(model, microbatch).view(2, -1).T  # (batch_size, 2)
        logps |= zip(pair_keys(microbatch), map(tuple, pairs.tolist()), strict=True)
    return {key: pair for of_worker in collectives.all_gather_object(logps) for key, pair in of_worker.items()}


def open_cache(policy: nn.Module, kind: str, config: DictConfig, get_reference: Callable[[], Reference]) -> LogpsCache:
    """Open the cache of this reference's log-probabilities, in the local directory.

    Args:
        policy: the policy before its first update.
        kind: the kind of reference, see `references`.
        get_reference: loads the reference. It is only called if the policy doesn't have the reference's weights: with
            a complete cache, most runs needn't load a second model.
    """
    details: dict[str, object] = {}
    computed_in = config.model.policy_mp or config.model.policy_dtype
    if (kind != "model" or reference_has_policy_precision(config)) and computed_in not in ("float32", "float64"):
        trainer = [config.trainer, *([config.tensor_parallel] if config.tensor_parallel > 1 else [])]
        details["computed"] = [computed_in, config.model.policy_dtype, *trainer]  # trainers differ in where they round
    model, cast_to, with_adapter = policy, None, kind != "adapter_off"
    if kind == "model" and policy_has_reference_weights(policy, config):
        cast_to = getattr(torch, reference_dtype(config))
    elif kind == "model":
        model = get_reference().model
    if with_adapter and hasattr(model, "peft_config"):
        details["adapter"] = _adapter_scaling(model)
    fingerprint = _fingerprint(model, with_adapter, cast_to, details)
    return LogpsCache(os.path.join(get_local_dir(config.local_dirs), "reference_logps", fingerprint))


def _adapter_scaling(model: nn.Module) -> dict[str, str]:
    """Return the adapter's settings that change its output, besides its weights."""
    settings = model.peft_config["default"]
    names = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
    return {name: str(getattr(settings, name, None)) for name in names}
