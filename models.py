"""The models of a run: policy, reference, LoRA adapters, and the tokenizer."""

import copy
import warnings

import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from torch import nn

from checkpointing.archives import load_archive
from configuration import resolved_reference
from data import hub
from references import REFERENCE_ADAPTER
from utils import UserError, disable_dropout, get_local_dir, rank0_print


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
    except Exception as error:  # among them those of the hub's HTTP library, which are no OSErrors
        cause, remedy = hub.why_not(error, name, "model") or (
            str(error).strip(),
            "Give the id of a causal language model on the hub (for a gated one, log in with `hf auth login`)",
        )
        raise UserError(f"can't load model.name_or_path={name}: {cause}\n{remedy}, or give a local folder") from error
    disable_dropout(model)
    if config.model.archive is not None:
        load_archive(config.model.archive, model)
    return model


def configured_dropout_rates(config: DictConfig) -> dict[str, float]:
    """The dropout rates that the model's own config.json has, for that of checkpoints; in training they are 0."""
    name, cache_dir = config.model.name_or_path, get_local_dir(config.local_dirs)
    model_config = transformers.AutoConfig.from_pretrained(name, cache_dir=cache_dir).to_dict()
    return {key: value for key, value in model_config.items() if "drop" in key and isinstance(value, float)}


def load_tokenizer(config: DictConfig) -> transformers.PreTrainedTokenizerBase:
    """The model's tokenizer, or `model.tokenizer_name_or_path`; without a padding token it pads with the end token."""
    name = config.model.tokenizer_name_or_path or config.model.name_or_path
    rank0_print(f"Loading tokenizer {name}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, cache_dir=get_local_dir(config.local_dirs))
    except Exception as error:  # the tokenizers library raises bare ones
        cause, remedy = hub.why_not(error, name, "model") or (error, "Name a model that has one")
        message = f"can't load the tokenizer {name!r} (model.tokenizer_name_or_path): {cause}\n{remedy}"
        raise UserError(message) from error
    if not tokenizer("Hello", add_special_tokens=False)["input_ids"]:
        raise UserError(f"the tokenizer {name!r} has no vocabulary; name one with model.tokenizer_name_or_path=...")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {name!r} has no end-of-sequence token, so a response could not end")
    if config.add_bos and tokenizer.bos_token_id is None:
        raise UserError(f"add_bos=true: the tokenizer {name!r} has no beginning-of-sequence token; leave it false")
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
        policy = load_adapter(policy, config, is_trainable=True)
        if resolved_reference(config) == "adapter_copy":
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
        reference_model = load_adapter(reference_model, config, is_trainable=False)
        disable_dropout(reference_model)
    return reference_model


def _add_lora(model: nn.Module, config: DictConfig) -> nn.Module:
    import peft

    fields = {"target_modules": "all-linear", **OmegaConf.to_container(config.lora)}
    try:
        torch.manual_seed(config.seed)
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever PEFT refuses them with, or lacks
        raise UserError(f"lora={config.lora}: {error}") from error


def load_adapter(model: nn.Module, config: DictConfig, is_trainable: bool) -> nn.Module:
    import peft

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            return peft.PeftModel.from_pretrained(model, config.model.adapter, is_trainable=is_trainable)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, UserWarning) as error:
        raise UserError(
            f"model.adapter={config.model.adapter}: can't load it as a PEFT adapter of this model: {str(error)[:500]}"
        ) from error
