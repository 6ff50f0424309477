"""Models and checkpoints on disk: loading policy and reference, writing and reading what training leaves.

A checkpoint is a directory that appears whole or not at all. It has the original's files, `policy.pt`, `optimizer.pt`
and `scheduler.pt`, each {'step_idx': training examples seen, 'state': a state dict, 'metrics': of the last evaluation};
model and tokenizer for `from_pretrained`; `state.json` and `rng.pt`, from which the run goes on (resume.py); and
`SHA256SUMS`, which tells a damaged one. Of a policy with an adapter it holds the adapter, in PEFT's format, in place of
the model.

`python -m checkpoints merge ADAPTER_DIR OUTPUT_DIR` writes the model with the adapter merged into it.
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Iterator

import safetensors.torch
import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from torch import nn

from losses import needs_reference
from placement import like
from references import REFERENCE_ADAPTER, choose_reference
from utils import UserError, closest_match, disable_dropout, get_local_dir, rank0_print

# Buffers that transformers wrote into state dicts in 2023; today's models compute them, so they are left out.
_LEGACY_BUFFERS = (
    *(f".{module}.{buffer}" for module in ("attn", "attention") for buffer in ("bias", "masked_bias")),
    ".rotary_emb.inv_freq",
)


CHECKSUMS = "SHA256SUMS"  # `sha256sum -c` reads it
_UNREADABLE = (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError,
               SafetensorError)  # fmt: skip


# ---- models ---------------------------------------------------------------------------------------------------------


def load_model(config: DictConfig, dtype: str, device_map: str = "balanced") -> nn.Module:
    """The configured model without dropout, with the weights of `model.archive` if there is one.

    Its own weights are pre-trained, or with `from_scratch` drawn from the seed. `device_map`: 'balanced' over the
    machine's GPUs, or 'cpu'.

    Raises: UserError if there is no such model, or none that can be loaded.
    """
    name, cache_dir = config.model.name_or_path, get_local_dir(config.local_dirs)
    try:
        if config.model.from_scratch:
            torch.manual_seed(config.seed)
            model_config = transformers.AutoConfig.from_pretrained(name, cache_dir=cache_dir)
            model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
            device = "cuda" if torch.cuda.is_available() and device_map != "cpu" else "cpu"
            model = model.to(device, getattr(torch, dtype))  # drawn in one dtype, so that all have the same weights
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                name,
                cache_dir=cache_dir,
                dtype=getattr(torch, dtype),
                device_map=device_map,
                quantization_config=_quantization(config),
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"can't load model.name_or_path={name}: {str(error).strip()}\n"
            "Give the id of a causal language model on the hub (for a gated one, log in with `hf auth login`), "
            "or a local folder"
        ) from error
    rates = {key: value for key, value in model.config.to_dict().items() if "drop" in key and isinstance(value, float)}
    model.dropout_rates = rates  # for the config.json of checkpoints
    disable_dropout(model)
    if config.model.archive is not None:
        load_archive(config.model.archive, model)
    return model


def load_tokenizer(config: DictConfig) -> transformers.PreTrainedTokenizerBase:
    """The model's tokenizer, or `model.tokenizer_name_or_path`; without a padding token it pads with the end token."""
    name = config.model.tokenizer_name_or_path or config.model.name_or_path
    rank0_print(f"Loading tokenizer {name}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, cache_dir=get_local_dir(config.local_dirs))
    except Exception as error:  # the tokenizers library raises bare ones
        raise UserError(f"can't load the tokenizer {name!r} (model.tokenizer_name_or_path): {error}") from error
    if not tokenizer("Hello", add_special_tokens=False)["input_ids"]:
        raise UserError(f"the tokenizer {name!r} has no vocabulary; name one with model.tokenizer_name_or_path=...")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {name!r} has no end-of-sequence token, so a response could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def _quantization(config: DictConfig):
    """4-bit weights that compute in bfloat16 (QLoRA, https://arxiv.org/abs/2305.14314), if asked for."""
    if not config.model.load_in_4bit:
        return None
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def load_policy(config: DictConfig, device_map: str = "balanced") -> nn.Module:
    """The model to train: all of it, a new LoRA adapter on it (`lora`), or a saved one (`model.adapter`)."""
    rank0_print("building policy")
    policy = load_model(config, config.model.policy_dtype, device_map)
    if config.lora is not None:
        policy = _add_lora(policy, config)
    if config.model.adapter is not None:
        policy = _load_adapter(policy, config, is_trainable=True)
        if needs_reference(config.loss) and choose_reference(config) == "adapter_copy":
            policy.load_adapter(config.model.adapter, REFERENCE_ADAPTER, is_trainable=False)
    disable_dropout(policy)  # an adapter's too
    return policy


def load_reference(config: DictConfig, policy: nn.Module | None, device_map: str = "balanced") -> nn.Module:
    """A second model with the weights that the policy starts from, in `model.reference_dtype`; a copy of `policy` where
    that is given and has them."""
    rank0_print("building reference model")
    one_device = len(set(getattr(policy, "hf_device_map", {}).values())) <= 1
    plain = config.lora is None and config.model.adapter is None
    if policy is not None and config.model.reference_dtype == config.model.policy_dtype and plain and one_device:
        return copy.deepcopy(policy)  # in memory, so that the checkpoint is read once
    reference_model = load_model(config, config.model.reference_dtype, device_map)
    if config.model.adapter is not None:
        reference_model = _load_adapter(reference_model, config, is_trainable=False)
        disable_dropout(reference_model)
    return reference_model


def _add_lora(model: nn.Module, config: DictConfig) -> nn.Module:
    import peft

    fields = {"target_modules": "all-linear", **OmegaConf.to_container(config.lora)}
    known = [field.name for field in dataclasses.fields(peft.LoraConfig)]
    for name in fields:
        if name not in known:
            raise UserError(f"lora.{name}: LoraConfig has no such field.{closest_match(name, known)}")
    if fields.get("lora_dropout"):
        raise UserError(f"lora.lora_dropout={fields['lora_dropout']}: all dropout is off here; leave it out")
    try:
        torch.manual_seed(config.seed)
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    except (TypeError, ValueError) as error:
        raise UserError(f"lora={config.lora}: {error}") from error


def _load_adapter(model: nn.Module, config: DictConfig, is_trainable: bool) -> nn.Module:
    import peft

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            return peft.PeftModel.from_pretrained(model, config.model.adapter, is_trainable=is_trainable)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, UserWarning) as error:
        raise UserError(
            f"model.adapter={config.model.adapter}: can't load it as a PEFT adapter of this model: {str(error)[:500]}"
        ) from error


def merge(adapter_dir: str, output_dir: str):
    """Write the model with the adapter's changes added to its weights, with its tokenizer, for `from_pretrained`.

    The base is loaded as the run's config.yaml, beside the checkpoint directory, says.

    Raises: UserError if there is no such run or adapter, or if `output_dir` exists.
    """
    config_path = os.path.join(os.path.abspath(adapter_dir), os.pardir, "config.yaml")
    if not os.path.exists(config_path) or not os.path.exists(os.path.join(adapter_dir, "adapter_config.json")):
        raise UserError(f"{adapter_dir} is not a checkpoint with an adapter inside a run directory")
    if os.path.exists(output_dir):
        raise UserError(f"{output_dir} exists already")
    config = OmegaConf.load(config_path)
    config.model.adapter, config.model.load_in_4bit = adapter_dir, False
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        config.model.tokenizer_name_or_path or config.model.name_or_path, cache_dir=get_local_dir(config.local_dirs)
    )
    model = load_model(config, config.model.policy_dtype)
    _load_adapter(model, config, is_trainable=False).merge_and_unload().save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    print(f"wrote the merged model to {output_dir}")


# ---- archives: weights to start from --------------------------------------------------------------------------------


def load_archive(path: str, model: nn.Module):
    """Replace a model's weights by those of an archive.

    It is a `policy.pt` (one that the original wrote under transformers 4.29, too), a .safetensors file, a checkpoint
    directory, a directory that `save_pretrained` wrote, or a model on the hub.

    Raises: UserError if it can't be read or doesn't fit, with the weights that are missing, left over or of another
        shape.
    """
    if os.path.exists(os.path.join(path, "adapter_config.json")):
        raise UserError(f"model.archive={path} holds a LoRA adapter, not a model: give it as model.adapter={path}")
    if os.path.exists(os.path.join(path, "policy.pt")):
        path = os.path.join(path, "policy.pt")
    try:
        directory, name = os.path.split(path)
        if os.path.exists(os.path.join(directory, CHECKSUMS)):
            _check_sum(directory, name, read_checksums(directory).get(name))
        if path.endswith(".safetensors"):
            state, origin = safetensors.torch.load_file(path), ""
        elif os.path.isfile(path):
            archive = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            state = archive["state"]
            origin = f" at step {archive['step_idx']} with metrics {json.dumps(archive['metrics'], indent=2)}"
        else:
            state, origin = _pretrained_state(path, model), ""
        if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise ValueError("its state holds more than tensors")
    except (*_UNREADABLE, AttributeError) as error:
        raise UserError(
            f"model.archive={path}: can't read it as a checkpoint ({type(error).__name__}: {str(error)[:300]}). "
            "Expected is a policy.pt as training writes it, a .safetensors file, or what from_pretrained takes"
        ) from error
    rank0_print(f"loading pre-trained weights from {path}{origin}")
    model.load_state_dict(_fit_state(state, model, path))
    rank0_print("loaded pre-trained weights")


def _pretrained_state(name: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that `from_pretrained` finds under `name`, under the names of its own architecture."""
    other, info = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=model.dtype, output_loading_info=True)
    missing = set(info["missing_keys"])  # these were drawn at random
    return {key: tensor for key, tensor in other.state_dict().items() if key not in missing}


def _fit_state(state: dict, model: nn.Module, path: str) -> dict:
    """`state` under the names of `model`'s parameters, spread as they are; see `load_archive` for what is raised."""
    expected = model.state_dict(keep_vars=True)
    fitted = {}
    for name, tensor in state.items():
        new_name = "lm_head.weight" if name == "embed_out.weight" and name not in expected else name
        if new_name in expected or not new_name.endswith(_LEGACY_BUFFERS):
            fitted[new_name] = tensor
    by_parameter = {id(expected[name]): name for name in fitted.keys() & expected.keys()}
    for name, parameter in expected.items():  # .safetensors hold tied weights once
        if name not in fitted and id(parameter) in by_parameter:
            fitted[name] = fitted[by_parameter[id(parameter)]]

    problems = [f"missing: {name}" for name in expected.keys() - fitted.keys()]
    problems += [f"left over: {name}" for name in fitted.keys() - expected.keys()]
    problems += [
        f"{name}: shape {tuple(fitted[name].shape)}, the model's is {tuple(expected[name].shape)}"
        for name in expected.keys() & fitted.keys()
        if fitted[name].shape != expected[name].shape
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(f"{path} doesn't fit the model; is it of another model=...?\n  {shown}{more}")
    return {name: like(expected[name], tensor) for name, tensor in fitted.items()}


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def write_state_dict(step: int, state: dict, metrics: dict | None, filename: str, dir_name: str):
    """Write one file of a checkpoint, in the original's format."""
    write_tensors({"step_idx": step, "state": state, "metrics": metrics or {}}, os.path.join(dir_name, filename))


def write_tensors(value: dict, path: str):
    """`torch.save` through a Python file, which reports a full disk as an OSError."""
    with open(path, "wb") as file:
        torch.save(value, file)


def write_checkpoint(
    path: str,
    policy: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    states: dict[str, dict],
    rng_states: list[dict],
    position: dict,
):
    """Write a checkpoint directory, in place of one that may be there.

    Args:
        states: the state dicts, of whole tensors, of policy, and, unless they are left out, of optimizer and scheduler;
            of a policy with an adapter at least what is trained.
        rng_states: of each worker.
        position: what state.json is to hold; of it 'examples' and 'metrics' go into the .pt files, too.

    Raises: UserError if it can't be written; what was there before is then as it was.
    """
    start_time = time.perf_counter()
    rank0_print(f"writing checkpoint to {path}...")
    with new_directory(path) as partial:
        has_adapter = hasattr(policy, "peft_config")
        for name, state in states.items():
            if name != "policy" or not has_adapter:
                write_state_dict(position["examples"], state, position["metrics"], f"{name}.pt", partial)
        if has_adapter:
            policy.save_pretrained(
                partial, selected_adapters=["default"], save_embedding_layers=False, state_dict=states["policy"]
            )
        else:
            _export_model(policy, states["policy"], partial)
        tokenizer.save_pretrained(partial)
        write_tensors({"workers": rng_states}, os.path.join(partial, "rng.pt"))
        with open(os.path.join(partial, "state.json"), "w", encoding="utf-8") as file:
            json.dump(position, file, indent=2)
    size = sum(os.path.getsize(os.path.join(path, name)) for name in os.listdir(path))
    rank0_print(f"wrote {size / 1e6:.1f} MB to {path} in {time.perf_counter() - start_time:.2f} s")


def _export_model(policy: nn.Module, state: dict, directory: str):
    """Write the policy for `from_pretrained`, with the dropout rates it had before `disable_dropout`."""
    policy.save_pretrained(directory, state_dict=dict(state))
    path = os.path.join(directory, "config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    config |= getattr(policy, "dropout_rates", {})
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)


@contextlib.contextmanager
def new_directory(path: str) -> Iterator[str]:
    """Lend an empty directory to be filled; then it appears as `path`, whole and on the disk, instead of an older one.

    Raises: UserError if that can't be; nothing of it remains then, and an older one is as it was.
    """
    partial = f"{path}.partial-{uuid.uuid4().hex[:8]}"
    try:
        os.makedirs(partial)
        yield partial
        _write_checksums(partial)
        files = [os.path.join(partial, name) for name in os.listdir(partial)]
        for path_of_file in files:  # safetensors makes its files readable for their owner alone
            os.chmod(path_of_file, os.stat(partial).st_mode & 0o666)
        _flush(*files, partial)
        _put_in_place(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch.save hides it
        raise UserError(
            f"can't write the checkpoint {path} ({type(cause).__name__}: {str(cause)[:300]}); earlier checkpoints are "
            "as they were. Make room or choose another local_run_dir; keep_checkpoints=N keeps only the last N, "
            "save_optimizer=false leaves the optimizer out"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _flush(*paths: str):
    """Have files or directories on the disk before anything that is written after them."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(new: str, path: str):
    """Rename `new` to `path`. An older directory or link there steps aside first; `tidy` puts it back if a crash comes
    between the two."""
    older = f"{path}.replaced"
    if os.path.lexists(path):
        os.rename(path, older)
    try:
        os.rename(new, path)
    except OSError:
        if os.path.lexists(older):
            os.rename(older, path)
        raise
    _flush(os.path.dirname(path))
    _remove(older)


def _remove(path: str):
    if os.path.islink(path):
        os.remove(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def tidy(run_dir: str):
    """Put right what a crash within a save left: remove what is not whole, put back what had stepped aside."""
    for name in os.listdir(run_dir):
        path = os.path.join(run_dir, name)
        if ".partial-" in name:
            _remove(path)
        elif name.endswith(".replaced"):
            kept = path.removesuffix(".replaced")
            if os.path.lexists(kept):
                _remove(path)
            else:
                os.rename(path, kept)


def point_latest(run_dir: str, name: str):
    """Make LATEST a link to the checkpoint `name`."""
    link = os.path.join(run_dir, f"LATEST.partial-{uuid.uuid4().hex[:8]}")
    try:
        os.symlink(name, link)
        _put_in_place(link, os.path.join(run_dir, "LATEST"))
    except OSError as error:
        raise UserError(f"can't make {run_dir}/LATEST a link to {name}, which is whole: {error}") from error


def delete_oldest(run_dir: str, n_kept: int | None, examples: int):
    """Of the step-N checkpoints with N up to `examples`, delete all but the last `n_kept`; null keeps all."""
    steps = [int(name[5:]) for name in os.listdir(run_dir) if name.startswith("step-") and name[5:].isdecimal()]
    for step in sorted(step for step in steps if step <= examples)[: -n_kept if n_kept else 0]:
        doomed = os.path.join(run_dir, f"step-{step}")
        os.rename(doomed, f"{doomed}.partial-deleted")  # it goes all at once, too
        shutil.rmtree(f"{doomed}.partial-deleted", ignore_errors=True)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_checksums(directory: str):
    lines = [f"{_sha256(os.path.join(directory, name))}  {name}\n" for name in sorted(os.listdir(directory))]
    with open(os.path.join(directory, CHECKSUMS), "w", encoding="utf-8") as file:
        file.writelines(lines)


def read_checksums(directory: str) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint, in hexadecimal, as they were when it was written."""
    with open(os.path.join(directory, CHECKSUMS), encoding="utf-8") as file:
        return {name: digest for digest, name in (line.rstrip("\n").split("  ", 1) for line in file)}


def _check_sum(directory: str, name: str, digest: str | None):
    """Raises ValueError if a file of a checkpoint is not as it was written."""
    if _sha256(os.path.join(directory, name)) != digest:
        raise ValueError(f"{name} is not what {CHECKSUMS} beside it says: the file is damaged")


def damage(directory: str) -> str | None:
    """What is wrong with a checkpoint directory, or None if every file is as it was written."""
    try:
        checksums = read_checksums(directory)
        if "state.json" not in checksums:
            return f"{CHECKSUMS} doesn't list state.json"
        for name, digest in checksums.items():
            _check_sum(directory, name, digest)
    except FileNotFoundError as error:
        return f"{os.path.basename(error.filename)} is missing"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def read_tensors(path: str, mmap: bool = False) -> dict:
    """What `write_tensors` wrote; with `mmap` the tensors stay in the file until they are used.

    Raises: UserError if it can't be read, or holds anything but tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except _UNREADABLE as error:
        raise UserError(f"{path}: can't read it ({type(error).__name__}: {str(error)[:300]})") from error


def load_policy_state(directory: str, policy: nn.Module):
    """Give a policy the weights of a checkpoint, bit for bit."""
    if not hasattr(policy, "peft_config"):
        path = os.path.join(directory, "policy.pt")
        policy.load_state_dict(_fit_state(read_tensors(path, mmap=True)["state"], policy, path))
        return
    import peft

    targets = peft.get_peft_model_state_dict(policy, adapter_name="default", save_embedding_layers=False)
    try:
        weights = peft.utils.load_peft_weights(directory, device="cpu")
        if differing := sorted(weights.keys() ^ targets.keys()):
            raise ValueError(f"only one of them has {', '.join(differing[:10])}")
        for name, target in targets.items():
            target.copy_(like(target, weights[name]))
    except _UNREADABLE as error:
        raise UserError(f"{directory}: its adapter doesn't fit the policy: {str(error)[:500]}") from error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m checkpoints")
    parser.add_argument("command", choices=["merge"])
    parser.add_argument("adapter_dir")
    parser.add_argument("output_dir")
    arguments = parser.parse_args()
    try:
        merge(arguments.adapter_dir, arguments.output_dir)
    except UserError as error:
        sys.exit(f"error: {error}")
