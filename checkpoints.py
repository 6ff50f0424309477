"""Models and checkpoints on disk: loading policy and reference, writing and reading what training leaves.

A checkpoint has the original's format: `policy.pt`, `optimizer.pt` and `scheduler.pt`, each {'step_idx': training
examples seen, 'state': a state dict, 'metrics': of the last evaluation}. Of a policy with an adapter it holds the
adapter, in PEFT's format, in place of `policy.pt`.

`python -m checkpoints merge ADAPTER_DIR OUTPUT_DIR` writes the model with the adapter merged into it.
"""

import argparse
import copy
import dataclasses
import json
import os
import pickle
import sys
import tempfile
import warnings

import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from torch import nn

from losses import needs_reference
from references import REFERENCE_ADAPTER, choose_reference
from utils import UserError, closest_match, disable_dropout, get_local_dir, rank0_print

# Buffers that transformers wrote into state dicts in 2023; today's models compute them, so they are left out.
_LEGACY_BUFFERS = (
    *(f".{module}.{buffer}" for module in ("attn", "attention") for buffer in ("bias", "masked_bias")),
    ".rotary_emb.inv_freq",
)


def write_state_dict(step: int, state: dict, metrics: dict | None, filename: str, dir_name: str):
    """Write one file of a checkpoint; it appears under its name only when it is whole."""
    os.makedirs(dir_name, exist_ok=True)
    path = os.path.join(dir_name, filename)
    rank0_print(f"writing checkpoint to {path}...")
    torch.save({"step_idx": step, "state": state, "metrics": metrics or {}}, f"{path}.partial")
    os.replace(f"{path}.partial", path)


def load_model(config: DictConfig, dtype: str) -> nn.Module:
    """The configured model without dropout, with the weights of `model.archive` if there is one.

    Its own weights are pre-trained, or with `from_scratch` drawn from the seed.

    Raises: UserError if there is no such model, or none that can be loaded.
    """
    name, cache_dir = config.model.name_or_path, get_local_dir(config.local_dirs)
    try:
        if config.model.from_scratch:
            torch.manual_seed(config.seed)
            model_config = transformers.AutoConfig.from_pretrained(name, cache_dir=cache_dir)
            model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = model.to(device, getattr(torch, dtype))  # drawn in one dtype, so that all have the same weights
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                name,
                cache_dir=cache_dir,
                dtype=getattr(torch, dtype),
                device_map="balanced",
                quantization_config=_quantization(config),
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"can't load model.name_or_path={name}: {str(error).strip()}\n"
            "Give the id of a causal language model on the hub (for a gated one, log in with `hf auth login`), "
            "or a local folder"
        ) from error
    disable_dropout(model)
    if config.model.archive is not None:
        load_archive(config.model.archive, model)
    return model


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


def load_policy(config: DictConfig) -> nn.Module:
    """The model to train: all of it, a new LoRA adapter on it (`lora`), or a saved one (`model.adapter`)."""
    rank0_print("building policy")
    policy = load_model(config, config.model.policy_dtype)
    if config.lora is not None:
        policy = _add_lora(policy, config)
    if config.model.adapter is not None:
        policy = _load_adapter(policy, config, is_trainable=True)
        if needs_reference(config.loss) and choose_reference(config) == "adapter_copy":
            policy.load_adapter(config.model.adapter, REFERENCE_ADAPTER, is_trainable=False)
    disable_dropout(policy)  # an adapter's too
    return policy


def load_reference(config: DictConfig, policy: nn.Module) -> nn.Module:
    """A second model with the weights that the policy starts from, in `model.reference_dtype`."""
    rank0_print("building reference model")
    one_device = len(set(getattr(policy, "hf_device_map", {}).values())) <= 1
    plain = config.lora is None and config.model.adapter is None
    if config.model.reference_dtype == config.model.policy_dtype and plain and one_device:
        return copy.deepcopy(policy)  # in memory, so that the checkpoint is read once
    reference_model = load_model(config, config.model.reference_dtype)
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


def write_adapter(model: nn.Module, dir_name: str):
    """Write the trained adapter in PEFT's own format (adapter_config.json, adapter_model.safetensors)."""
    os.makedirs(dir_name, exist_ok=True)
    rank0_print(f"writing adapter to {dir_name}...")
    with tempfile.TemporaryDirectory(dir=dir_name, prefix="partial-") as partial:
        model.save_pretrained(partial, selected_adapters=["default"], save_embedding_layers=False)
        for name in os.listdir(partial):
            os.replace(os.path.join(partial, name), os.path.join(dir_name, name))


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


def load_archive(path: str, model: nn.Module):
    """Replace a model's weights by those of an archive: a `policy.pt`, or a checkpoint directory that holds one.

    Archives that the original wrote under transformers 4.29 load too.

    Raises: UserError if the file can't be read or doesn't fit, with the weights that are missing, left over or of
        another shape.
    """
    if os.path.isdir(path):
        path = os.path.join(path, "policy.pt")
    try:
        archive = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        step, metrics, state = archive["step_idx"], archive["metrics"], archive["state"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"model.archive={path}: can't read it as a checkpoint ({type(error).__name__}: {str(error)[:200]}). "
            "Expected is a policy.pt as training writes it"
        ) from error
    rank0_print(f"loading pre-trained weights at step {step} from {path} with metrics {json.dumps(metrics, indent=2)}")
    model.load_state_dict(_fit_state(state, model, path))
    rank0_print("loaded pre-trained weights")


def _fit_state(state: dict, model: nn.Module, path: str) -> dict:
    """`state` under the names of `model`'s parameters; see `load_archive` for what is raised."""
    expected = model.state_dict()
    fitted = {}
    for name, tensor in state.items():
        new_name = "lm_head.weight" if name == "embed_out.weight" and name not in expected else name
        if new_name in expected or not new_name.endswith(_LEGACY_BUFFERS):
            fitted[new_name] = tensor

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
        raise UserError(f"model.archive={path} doesn't fit the model; is it of another model=...?\n  {shown}{more}")
    return fitted


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
