"""The models of a run: policy, reference, LoRA adapters, and the tokenizer."""

import contextlib
import copy
import functools
import os
import warnings
from collections.abc import Callable, Iterator

import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from torch import nn

from acceleration.out_of_memory import remedies
from checkpointing.archives import check_finite, describe, load_archive, load_pretrained, verify_weights
from config_checks.lora import check_lora_fits
from data import chat, hub
from distributed import environment
from references import (
    REFERENCE_ADAPTER,
    Source,
    policy_has_reference_weights,
    policy_source,
    reference_dtype,
    reference_source,
)
from reporting.terminal import still_working
from utils import UserError, default_device, disable_dropout, get_local_dir, rank0_print, unwrap_adapter


def load_model(config: DictConfig, dtype: str, device_map: str = "balanced", source: Source | None = None) -> nn.Module:
    """Load a model, without dropout and without an adapter; by default the one that the policy starts from.

    Args:
        device_map: 'balanced' spreads layers over the machine's GPUs. 'meta' loads no weights if each worker can read
            its part of them from the files (`checkpointing.unread`); otherwise it is the same as 'cpu'.

    Raises: UserError if the model isn't found or can't be loaded, or its weights don't fit its config.
    """
    source = source or policy_source(config)
    if device_map == "meta" and (source.archive or source.adapter):  # these change the base's weights
        device_map = "cpu"
    name, options = source.name_or_path, _hub_options(config, source)
    origin = f"{source.key('name_or_path')}={name}"
    origin += f" model.revision={options['revision']}" if "revision" in options else ""
    if config.model.attn_implementation:
        options["attn_implementation"] = config.model.attn_implementation
    try:
        verify_weights(name)
        if options["trust_remote_code"]:
            _announce_remote_code(name, options)
        if source.from_scratch:
            device = default_device() if device_map == "balanced" else "cpu"
            model = _random_model(name, config.seed, options).to(device, getattr(torch, dtype))
        else:
            load = load_pretrained
            if device_map == "meta":
                from checkpointing.unread import load_unread as load
            options |= {"dtype": getattr(torch, dtype), "device_map": device_map}
            model = load(name, origin, quantization_config=_quantization(config), **options)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files and the hub's HTTP library raise errors of any kind
        cause, remedy = hub.explain_failure(error, name, "model") or (
            describe(error, 2000).partition("\nModel type should be one of")[0],  # and a list of all
            "Give the id of a causal language model on the hub",
        )
        is_local, again = os.path.isdir(name), "Copy or download the folder again, or name another"
        remedy = again if is_local else f"{remedy}, or give a local folder"
        raise UserError(f"can't load {origin}: {cause}\n{remedy}{_remote_code_hint(error)}") from error
    _check_fits_on_gpus(model, origin, config, device_map)
    disable_dropout(model)
    if source.archive is not None:
        load_archive(source.archive, model, source.key("archive"), options["trust_remote_code"])
    elif not hasattr(model, "unread"):
        check_finite(model, origin)
    return model


def _random_model(name: str, seed: int, options: dict) -> nn.Module:
    """Return a model with random weights, drawn in float32, so that after rounding they are the same in every dtype."""
    torch.manual_seed(seed)
    attention = {key: options[key] for key in ("attn_implementation", "trust_remote_code") if key in options}
    config_options = {key: value for key, value in options.items() if key != "attn_implementation"}
    model_config = transformers.AutoConfig.from_pretrained(name, **config_options)
    return transformers.AutoModelForCausalLM.from_config(model_config, dtype=torch.float32, **attention)


def _check_fits_on_gpus(model: nn.Module, origin: str, config: DictConfig, device_map: str):
    """Refuse a model that accelerate left partly in CPU memory because the GPUs are full.

    Raises: UserError that states the memory needed and remedies.
    """
    left_out = [parameter for parameter in model.parameters() if parameter.device.type in ("cpu", "meta", "disk")]
    if device_map != "balanced" or not torch.cuda.is_available() or not left_out:
        return
    total, missing = (sum(p.nbytes for p in parameters) / 1e9 for parameters in (model.parameters(), left_out))
    raise UserError(
        f"{origin} has {total:.1f} GB of weights in {str(model.dtype)[6:]}; the GPUs lack memory for {missing:.1f} "
        f"GB of them.\n{remedies(config)}"
    )


def _hub_options(config: DictConfig, source: Source) -> dict[str, object]:
    """Return the arguments of `from_pretrained` for a source; `model.revision` applies only to `model.name_or_path`."""
    options = {"cache_dir": get_local_dir(config.local_dirs), "trust_remote_code": config.model.trust_remote_code}
    if config.model.revision is not None and source.name_or_path == config.model.name_or_path:
        options["revision"] = config.model.revision
    return options


def make_remote_code_importable():
    """Let this process unpickle models from another worker if their class comes from the hub (`trust_remote_code`)."""
    transformers.dynamic_module_utils.init_hf_modules()


def _announce_remote_code(name: str, options: dict):
    """Print which classes of a model's own code are about to run."""
    revision = {key: value for key, value in options.items() if key != "trust_remote_code"}
    classes = transformers.PreTrainedConfig.get_config_dict(name, **revision)[0].get("auto_map") or {}
    if classes:
        rank0_print(f"model.trust_remote_code=true: running the code of {name}: {', '.join(sorted(classes.values()))}")


def _remote_code_hint(error: Exception) -> str:
    if "trust_remote_code" not in str(error):
        return ""
    return "\nmodel.trust_remote_code=true runs the model's own code with your permissions: read it first"


def configured_dropout_rates(config: DictConfig) -> dict[str, float]:
    """Return the dropout rates in the model's config.json: training sets them to 0, checkpoints restore them."""
    source = policy_source(config)
    model_config = transformers.AutoConfig.from_pretrained(source.name_or_path, **_hub_options(config, source))
    return {key: value for key, value in model_config.to_dict().items() if "drop" in key and isinstance(value, float)}


def load_tokenizer(config: DictConfig) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer; if it has no padding token, it pads with its end-of-sequence token."""
    name = config.model.tokenizer_name_or_path or config.model.name_or_path
    rank0_print(f"Loading tokenizer {name}")
    tokenizer = read_tokenizer(name, config)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {name!r} has no end-of-sequence token, so a response could not end; set eos_token in its "
            "tokenizer_config.json, or name another one with model.tokenizer_name_or_path"
        )
    if config.add_bos and tokenizer.bos_token_id is None:
        raise UserError(f"add_bos=true: the tokenizer {name!r} has no beginning-of-sequence token; use add_bos=false")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    if config.chat_template is not None:
        tokenizer.chat_template = chat.read_template(tokenizer, config.chat_template)  # saved with checkpoints
    return tokenizer


def read_tokenizer(name: str, config: DictConfig) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer of a model or folder, unchanged.

    Raises: UserError if there is none, or it can't be read.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **_hub_options(config, Source(name)))
        n_tokens = len(tokenizer("Hello", add_special_tokens=False)["input_ids"])
    except Exception as error:  # the tokenizers library raises plain Exceptions
        cause, remedy = hub.explain_failure(error, name, "model") or (
            describe(error, 2000),
            "Name a model that has a tokenizer",
        )
        key = "model.tokenizer_name_or_path" if config.model.tokenizer_name_or_path else "model.name_or_path"
        raise UserError(
            f"can't load the tokenizer of {key}={name}: {cause}\n{remedy}, or give a local folder that has one"
            f"{_remote_code_hint(error)}"
        ) from error
    if n_tokens == 0:
        raise UserError(f"the tokenizer {name!r} has no vocabulary; name one with model.tokenizer_name_or_path=...")
    return tokenizer


def set_end_tokens(model: nn.Module, tokenizer):
    """Set the generation config's end tokens, which are saved with the model, to those that end trained turns."""
    ends, generation_config = chat.end_token_ids(model.generation_config, tokenizer), model.generation_config
    known = generation_config.eos_token_id
    if ends != (known if isinstance(known, list) else [known]):
        generation_config.eos_token_id = ends


def _quantization(config: DictConfig):
    """Return the settings of `model.load_in_4bit`: 4-bit weights, computed in bfloat16 (QLoRA, arXiv 2305.14314)."""
    if not config.model.load_in_4bit:
        return None
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def model_loaders(
    config: DictConfig, device_map: str
) -> tuple[Callable[[], nn.Module | None], Callable[[], nn.Module | None]]:
    """Return functions that load policy and reference; they return None on all but the first worker of each machine."""
    if not environment.is_local_rank0():
        return lambda: None, lambda: None
    policy = functools.partial(load_policy, config, device_map)
    if device_map == "balanced":
        policy = functools.cache(policy)  # the reference may be copied from it
    return policy, lambda: load_reference(config, policy() if device_map == "balanced" else None, device_map)


def load_policy(config: DictConfig, device_map: str = "balanced") -> nn.Module:
    """Load the model to train; it gets a new adapter with `lora`, a saved one with `model.adapter`."""
    rank0_print("building policy")
    if device_map == "meta" and config.lora is not None:  # PEFT needs the weights that it adapts
        device_map = "cpu"
    with still_working("Loading the policy"):
        policy = load_model(config, config.model.policy_dtype, device_map)
    if config.lora is not None:
        policy = _add_lora(policy, config)
    if config.model.adapter is not None:
        policy = load_adapter(policy, policy_source(config), is_trainable=True)
        if config.reference == "adapter_copy":
            policy.load_adapter(config.model.adapter, REFERENCE_ADAPTER, is_trainable=False)
    disable_dropout(policy)  # also that of the adapter
    return policy


def load_reference(config: DictConfig, policy: nn.Module | None, device_map: str = "balanced") -> nn.Module:
    """Load the model that `reference_model` names: by default, the one that the policy starts from.

    If `policy` has the same weights in the same dtype, it is copied rather than read again.
    """
    rank0_print("building reference model")
    source, dtype = reference_source(config), reference_dtype(config)
    is_on_one_device = len(set(getattr(policy, "hf_device_map", {}).values())) <= 1
    same_dtype = dtype == config.model.policy_dtype
    if policy is not None and is_on_one_device and same_dtype and policy_has_reference_weights(policy, config):
        return copy.deepcopy(policy)
    with still_working("Loading the reference"):
        reference_model = load_model(config, dtype, device_map, source)
    if source.adapter is not None:
        reference_model = load_adapter(reference_model, source, is_trainable=False)
        disable_dropout(reference_model)
    return reference_model


def check_tokenizer_fits(policy: nn.Module, tokenizer, config: DictConfig):
    """Refuse a tokenizer with more tokens than the model embeds, and a `max_length` beyond the model's positions."""
    n_embeddings = policy.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > n_embeddings:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeds only {n_embeddings}: name the model's own "
            "with model.tokenizer_name_or_path, or resize the model's embeddings and save it again"
        )
    n_positions = getattr(policy.config, "max_position_embeddings", None)
    if n_positions is not None and config.max_length > n_positions:
        raise UserError(f"max_length={config.max_length}: the model has only {n_positions} positions")


def check_reference_fits(
    reference_model: nn.Module, policy: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, config: DictConfig
):
    """Refuse a `reference_model` that doesn't share the policy's token ids.

    Raises: UserError if it embeds another number of tokens, has fewer positions than `max_length`, or has a tokenizer
        with other tokens.
    """
    source = reference_source(config)
    origin = ", ".join(f"reference_model.{name}={getattr(source, name)}" for name in sorted(source.given))
    sizes = [model.get_input_embeddings().weight.shape[0] for model in (reference_model, policy)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{origin}: it embeds {sizes[0]} tokens, the policy {sizes[1]}; a reference needs the same tokens"
        )
    n_positions = getattr(reference_model.config, "max_position_embeddings", None)
    if n_positions is not None and config.max_length > n_positions:
        raise UserError(f"max_length={config.max_length}: {origin} has only {n_positions} positions")
    for place in (getattr(source, name) for name in sorted(source.given)):
        place = os.path.dirname(os.path.abspath(place)) if os.path.isfile(place) else place
        try:
            vocabulary = read_tokenizer(place, config).get_vocab()
        except UserError:  # a file of weights, or a folder without a tokenizer
            continue
        differing = sorted(vocabulary.items() ^ tokenizer.get_vocab().items(), key=lambda item: item[1])
        if differing:
            shown = ", ".join(f"{token!r} ({number})" for token, number in differing[:5])
            raise UserError(f"{origin}: its tokenizer and the policy's differ in {len(differing)} entries: {shown}")


# ---- mixtures of experts --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def router_losses(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the router's auxiliary loss, as transformers computes it, in each forward pass: shape ()."""
    losses: list[torch.Tensor] = []

    def request(_model, args: tuple, kwargs: dict) -> tuple:
        return args, kwargs | {"output_router_logits": True}

    hooks = [
        model.register_forward_pre_hook(request, with_kwargs=True),
        model.register_forward_hook(lambda _model, _args, output: losses.append(getattr(output, "aux_loss", None))),
    ]
    try:
        yield losses
    finally:
        for hook in hooks:
            hook.remove()


def check_has_router(model: nn.Module, coefficient: float):
    """Raise UserError if the model returns no auxiliary loss of a router in a forward pass of two tokens."""
    token_ids, reason = torch.zeros(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device), ""
    losses: list[torch.Tensor | None] = []
    _register_outputs(model)
    try:
        with torch.no_grad(), router_losses(model) as losses:
            model(token_ids, attention_mask=torch.ones_like(token_ids), use_cache=False)
    except (AttributeError, IndexError, TypeError, ValueError) as error:  # it has no router
        reason = f" ({describe(error, 200)})"
    if not losses or not isinstance(losses[0], torch.Tensor):
        raise UserError(
            f"model.router_aux_loss_coef={coefficient}: {type(unwrap_adapter(model)).__name__} gives no auxiliary loss "
            f"of a router{reason}, unlike mixtures of experts such as Mixtral or Qwen3-MoE; leave the key null"
        )


def _register_outputs(model: nn.Module):
    """Let transformers record outputs of a model that a worker has unpickled, as its constructor would have done."""
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            _CAN_RECORD_REGISTRY[module] = module._can_record_outputs


# ---- adapters -------------------------------------------------------------------------------------------------------


# parts of PEFT's warnings about settings that it ignores; here these are errors
_IGNORED = (
    "were set but no", "no modules were excluded", "rank_pattern", "alpha_pattern", "will be ignored",
    "fan_in_fan_out is set to True", "no tied modules",
)  # fmt: skip


@contextlib.contextmanager
def _peft_warnings(as_errors: list[str]) -> Iterator[None]:
    """Turn PEFT's warnings that contain one of these strings into errors; silence those that users can't act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a property that transformers deprecates
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match")  # PEFT itself sets such patterns
        for text in as_errors:
            warnings.filterwarnings("error", message=f".*{text}")
        yield


def _add_lora(model: nn.Module, config: DictConfig) -> nn.Module:
    import peft

    fields = {"target_modules": "all-linear", **OmegaConf.to_container(config.lora)}
    check_lora_fits(fields, model)
    try:
        torch.manual_seed(config.seed)
        with _peft_warnings([text for text in _IGNORED if not text.endswith("_pattern") or text in fields]):
            model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    except Exception as error:  # values that PEFT doesn't check raise errors of any kind
        raise UserError(f"lora={config.lora}: {describe(error)}") from error
    _check_tied_weights(model, f"lora={config.lora}")
    return model


def _check_tied_weights(model: nn.Module, origin: str):
    """Refuse an adapter on one of two layers that share a weight: merging it would change the other layer as well."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    layers = [layer for layer in (base.get_input_embeddings(), base.get_output_embeddings()) if layer is not None]
    weights = {id(getattr(layer, "base_layer", layer).weight) for layer in layers}
    if len(layers) == 2 and len(weights) == 1 and any(isinstance(layer, BaseTunerLayer) for layer in layers):
        raise UserError(
            f"{origin}: this model's output head is its input embedding (tied weights); an adapter on either can't be "
            "merged: leave both out of target_modules, or train the whole weight by lora.modules_to_save"
        )


def load_adapter(model: nn.Module, source: Source, is_trainable: bool) -> nn.Module:
    """Add the saved adapter of `source` to the model.

    Raises: UserError if it can't be read, belongs to another model, or holds weights that are not finite.
    """
    import peft

    origin = f"{source.key('adapter')}={source.adapter}"
    try:
        verify_weights(source.adapter)
        weights = peft.utils.load_peft_weights(source.adapter, device="cpu")
        with _peft_warnings(["missing adapter keys"]):
            model = peft.PeftModel.from_pretrained(model, source.adapter, is_trainable=is_trainable)
        if left_over := sorted(peft.set_peft_model_state_dict(model, weights).unexpected_keys):
            raise ValueError(f"the model has no place for {', '.join(left_over[:10])}")
    except Exception as error:  # a folder that holds something else raises errors of any kind
        raise UserError(f"{origin}: can't load it as a PEFT adapter of this model: {describe(error, 500)}") from error
    _check_tied_weights(model, origin)
    check_finite(model, origin)
    return model
