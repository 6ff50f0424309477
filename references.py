"""Where the reference's log-probabilities come from.

`reference=model` is a second, frozen model; `adapter_off` the policy with its adapter disabled; `adapter_copy` the
policy with a frozen copy of the starting adapter in place of the trained one. With `precompute_ref_log_probs` any of
them is asked once for every pair, before training, and the answers are kept on disk (`LogpsCache`).
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import workers
from placement import whole
from preference_datasets import BatchIterator
from utils import UserError, get_local_dir, on_rank0, quiet, rank0_print, take

REFERENCE_ADAPTER = "reference"  # the name of the frozen adapter beside the trained one, "default"


class Reference:
    """A frozen model to compare the policy with; `with reference.active() as model` lends it for forward passes."""

    def __init__(
        self, model: nn.Module, switch: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    ):
        self.model, self.switch = model, switch

    @contextlib.contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The reference, without gradients; the policy is as it was afterwards, whatever happens inside."""
        with torch.no_grad(), self.switch():
            yield self.model


def choose_reference(config: DictConfig) -> str:
    """The kind of reference that `reference=auto` means, or the one that was asked for.

    Raises: UserError if policy and reference can't go together, naming those that can.
    """
    kind, has_adapter = config.reference, config.model.adapter is not None
    settings = _adapter_settings(config)
    # trained biases and some initializations change the base itself, which is then no reference
    base_is_kept = settings.get("bias", "none") == "none" and settings.get("init_lora_weights", True) in (
        True,
        "gaussian",
    )
    possible = ["model"]
    if base_is_kept and (config.lora is not None or has_adapter):
        possible.insert(0, "adapter_off")
    if base_is_kept and has_adapter:
        possible.insert(0, "adapter_copy")
    if kind == "auto":
        return possible[0]
    if kind not in possible:
        policy = "a saved adapter" if has_adapter else "a new adapter" if config.lora is not None else "no adapter"
        raise UserError(f"reference={kind}: the policy has {policy}; possible are: {', '.join(possible)}")
    return kind


def _adapter_settings(config: DictConfig) -> dict:
    """Fields of LoraConfig of the new or the saved adapter; none without an adapter."""
    path = os.path.join(config.model.adapter or "", "adapter_config.json")
    if config.model.adapter is not None and os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    return OmegaConf.to_container(config.lora) if config.lora is not None else {}


def make_reference(kind: str, policy: nn.Module, load: Callable[[], nn.Module]) -> Reference:
    """The reference of this kind; `load` loads the second model where one is needed."""
    if kind == "model":
        model = load()
        return Reference(model if model is policy else model.eval().requires_grad_(False))
    if kind == "adapter_off":
        return Reference(policy, policy.disable_adapter)
    return Reference(policy, lambda: _adapter_switched(policy, REFERENCE_ADAPTER))


@contextlib.contextmanager
def _adapter_switched(model: nn.Module, name: str) -> Iterator[None]:
    trained = model.active_adapter
    model.set_adapter(name, inference_mode=True)  # or it would become trainable
    try:
        yield
    finally:
        model.set_adapter(trained)


# ---- log-probabilities kept on disk ---------------------------------------------------------------------------------


def _adapter_scaling(policy: nn.Module) -> dict[str, str]:
    """What of an adapter's settings decides, beside its weights, what it computes."""
    settings = policy.peft_config["default"]
    names = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
    return {name: str(getattr(settings, name, None)) for name in names}


def open_cache(policy: nn.Module, kind: str, config: DictConfig) -> "LogpsCache":
    """The cache of this reference's log-probabilities, in the local dir; `policy` is as training starts."""
    details: dict[str, object] = {"average_log_prob": config.loss.average_log_prob}
    if kind != "model":
        details["policy_mp"] = config.model.policy_mp
    with_adapter = config.model.adapter is not None and kind != "adapter_off"
    if with_adapter:
        details["adapter"] = _adapter_scaling(policy)
    dtype = getattr(torch, config.model.reference_dtype) if kind == "model" else None
    fingerprint = _reference_fingerprint(policy, with_adapter, dtype, details)
    return LogpsCache(os.path.join(get_local_dir(config.local_dirs), "reference_logps", fingerprint))


def _reference_fingerprint(
    policy: nn.Module, with_adapter: bool, dtype: torch.dtype | None, details: dict[str, object]
) -> str:
    """What the reference's numbers depend on besides the pair: its config, its weights as `dtype`, and `details`.

    It is taken from the policy before training, when both have the same weights (cast to `dtype` if one is given),
    so a reference whose numbers are all known need not be loaded. `with_adapter`: the adapter is part of it.
    """
    config = policy.config.to_dict()
    for key in ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"):
        config.pop(key, None)  # these say where the weights come from, not what is computed
    digest = hashlib.sha256(json.dumps([config, str(dtype), details], sort_keys=True, default=str).encode())
    tensors = {}
    for name, tensor in policy.state_dict().items():
        if "lora_" not in name or (with_adapter and f".{REFERENCE_ADAPTER}." not in name):
            tensors[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = tensor.detach()
    for name in tqdm(sorted(tensors), "Hashing the reference's weights", leave=False, disable=quiet()):
        tensor = whole(tensors[name])
        tensor = tensor.to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        digest.update(name.encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pair_keys(batch: dict) -> list[bytes]:
    """A key for each pair of a batch that depends on its token ids alone: prompt, chosen and rejected, as truncated."""
    keys = []
    for index in range(len(batch["prompt"])):
        digest = hashlib.sha256()
        for side in ("chosen", "rejected"):
            ids, labels = batch[f"{side}_input_ids"][index], batch[f"{side}_labels"][index]
            n_tokens = int(batch[f"{side}_attention_mask"][index].sum())
            n_response = int((labels != -100).sum())
            digest.update(f"{n_tokens},{n_response};".encode())
            digest.update(ids[:n_tokens].numpy().tobytes())
        keys.append(digest.digest())
    return keys


class LogpsCache:
    """Log-probabilities of pairs, found by `pair_keys`; a directory of files, each whole and never changed.

    Runs that share a directory add files of their own, so they can't disturb each other. Of a run's workers the first
    reads and writes; all know the same.
    """

    def __init__(self, directory: str):
        self.directory = directory
        self.logps: dict[bytes, tuple[float, float]] = {}
        if on_rank0():
            os.makedirs(directory, exist_ok=True)
            for name in sorted(os.listdir(directory)):
                if name.endswith(".safetensors"):
                    self._read(os.path.join(directory, name))
        self.logps = workers.from_first(self.logps)

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
        save_file({"keys": keys, "logps": values, "checksum": _checksum(keys, values)}, f"{path}.partial")
        os.replace(f"{path}.partial", path)

    def lookup(self, batch: dict, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of a batch's chosen and rejected responses, each (batch_size,)."""
        values = torch.tensor([self.logps[key] for key in pair_keys(batch)], dtype=torch.float64).to(device, dtype)
        return values[:, 0], values[:, 1]

    def fill(
        self,
        iterators: dict[str, BatchIterator],
        compute: Callable[[dict], tuple[torch.Tensor, torch.Tensor]],
        split: Callable[[dict], list[dict]],
    ):
        """Add what is missing of all pairs that the iterators' batches draw on.

        Args:
            iterators: with a name for each.
            compute: a part's chosen and rejected log-probabilities, each (batch_size,).
            split: a batch in the parts to compute.
        """
        n_computed = 0
        for name, iterator in iterators.items():
            with tqdm(
                total=iterator.n_distinct, desc=f"Reference on {name} pairs", unit="pair", disable=quiet()
            ) as progress:
                for window, n_pairs in iterator.windows():
                    n_computed += self.fill_batch(window, compute, split)
                    progress.update(n_pairs)
        rank0_print(f"Reference log-probabilities: {n_computed} computed, the others were in {self.directory}")

    def fill_batch(self, batch: dict, compute: Callable, split: Callable) -> int:
        """Add what is missing of a batch's pairs; returns how many different ones that were.

        Workers that have parts of a batch compute equally many: one that misses fewer computes others again.
        """
        missing = [index for index, key in enumerate(pair_keys(batch)) if key not in self.logps]
        missing += [0] * (workers.largest(len(missing)) - len(missing))
        new, n_before = {}, len(self.logps)
        for part in split(take(batch, torch.tensor(missing))) if missing else []:
            chosen_logps, rejected_logps = compute(part)
            new |= zip(pair_keys(part), zip(chosen_logps.tolist(), rejected_logps.tolist(), strict=True), strict=True)
        self.add({key: logps for of_worker in workers.gathered(new) for key, logps in of_worker.items()})
        return len(self.logps) - n_before


def _checksum(keys: torch.Tensor, logps: torch.Tensor) -> torch.Tensor:
    """SHA-256 of a cache file's contents, (32,)."""
    digest = hashlib.sha256(keys.numpy().tobytes() + logps.numpy().tobytes()).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)
