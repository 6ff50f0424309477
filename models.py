"""The models of a run: policy, reference, LoRA adapters, and the tokenizer."""

import copy
import os
import warnings

import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from torch import nn

from acceleration.out_of_memory import remedies
from checkpointing.archives import check_finite, describe, load_archive, load_pretrained
from checkpointing.integrity import verify_weights
from data import chat, hub
from references import REFERENCE_ADAPTER, Source, policy_source, reference_source
from reporting.terminal import still_working
from utils import UserError, closest_match, disable_dropout, get_local_dir, rank0_print


def load_model(config: DictConfig, dtype: str, device_map: str = "balanced", source: Source | None = None) -> nn.Module:
    """Load a model without dropout and without its adapter; by default the one that the policy starts from.

    Args:
        device_map: 'balanced' over the machine's GPUs, or 'cpu'.

    Raises: UserError if the model isn't found or can't be loaded, or its weights don't fit its config.
    """
    source = source or policy_source(config)
    name, options = source.name_or_path, _hub_options(config, source)
    origin = f"{source.key('name_or_path')}={name}"
    origin += f" model.revision={options['revision']}" if "revision" in options else ""
    attention = {"attn_implementation": config.model.attn_implementation} if config.model.attn_implementation else {}
    try:
        verify_weights(name)
        _announce_remote_code(name, options)
        if source.from_scratch:
            torch.manual_seed(config.seed)
            model_config = transformers.AutoConfig.from_pretrained(name, **options)
            trusted = {"trust_remote_code": options["trust_remote_code"]}
            model = transformers.AutoModelForCausalLM.from_config(
                model_config, dtype=torch.float32, **attention, **trusted
            )
            device = "cuda" if torch.cuda.is_available() and device_map != "cpu" else "cpu"
            model = model.to(device, getattr(torch, dtype))  # every dtype rounds the same random weights
        else:
            model = load_pretrained(
                name,
                origin,
                dtype=getattr(torch, dtype),
                device_map=device_map,
                quantization_config=_quantization(config),
                **options,
                **attention,
            )
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files and the hub's HTTP library raise errors of any kind
        cause, remedy = hub.explain_failure(error, name, "model") or (
            describe(error, 2000),
            f"Give the id of a causal language model on the hub{hub.access_hint(error)}{_code_hint(error)}",
        )
        raise UserError(f"can't load {origin}: {cause}\n{remedy}, or give a local folder") from error
    _check_on_gpus(model, origin, config, device_map)
    disable_dropout(model)
    if source.archive is not None:
        load_archive(source.archive, model, source.key("archive"), options["trust_remote_code"])
    else:
        check_finite(model, origin)
    return model


def _check_on_gpus(model: nn.Module, origin: str, config: DictConfig, device_map: str):
    """Refuse a model that doesn't fit on the GPUs, so that accelerate left a part of it in the CPU's memory.

    Raises: UserError with the memory that it takes, and remedies.
    """
    left_out = [parameter for parameter in model.parameters() if parameter.device.type in ("cpu", "meta", "disk")]
    if device_map == "cpu" or not torch.cuda.is_available() or not left_out:
        return
    total, missing = (sum(p.nbytes for p in parameters) / 1e9 for parameters in (model.parameters(), left_out))
    raise UserError(
        f"{origin} has {total:.1f} GB of weights in {str(model.dtype)[6:]}; the GPUs have no room for {missing:.1f} GB "
        f"of them.\n{remedies(config)}"
    )


def _hub_options(config: DictConfig, source: Source) -> dict[str, object]:
    """Return the arguments of `from_pretrained` for `source.name_or_path`; `model.revision` is the policy's alone."""
    options = {"cache_dir": get_local_dir(config.local_dirs), "trust_remote_code": config.model.trust_remote_code}
    if config.model.revision is not None and source.name_or_path == config.model.name_or_path:
        options["revision"] = config.model.revision
    return options


def allow_own_code(config: DictConfig):
    """With `model.trust_remote_code`, let this process unpickle a model class that another worker sends."""
    if config.model.trust_remote_code:
        transformers.dynamic_module_utils.init_hf_modules()


def _announce_remote_code(name: str, options: dict):
    """Name the classes of a model's own code before they run."""
    if not options["trust_remote_code"]:
        return
    revision = {key: value for key, value in options.items() if key != "trust_remote_code"}
    classes = transformers.PreTrainedConfig.get_config_dict(name, **revision)[0].get("auto_map") or {}
    if classes:
        rank0_print(f"model.trust_remote_code=true: running the code of {name}: {', '.join(sorted(classes.values()))}")


def _code_hint(error: Exception) -> str:
    if "trust_remote_code" not in str(error):
        return ""
    return "\nmodel.trust_remote_code=true runs the model's own code with your rights: read it first"


def configured_dropout_rates(config: DictConfig) -> dict[str, float]:
    """Return the dropout rates of the model's config.json; in training they are 0, in checkpoints they are restored."""
    source = policy_source(config)
    model_config = transformers.AutoConfig.from_pretrained(source.name_or_path, **_hub_options(config, source))
    return {key: value for key, value in model_config.to_dict().items() if "drop" in key and isinstance(value, float)}


def load_tokenizer(config: DictConfig) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer; one without a padding token pads with its end-of-sequence token."""
    name = config.model.tokenizer_name_or_path or config.model.name_or_path
    rank0_print(f"Loading tokenizer {name}")
    tokenizer = read_tokenizer(name, config)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {name!r} has no end-of-sequence token, so a response could not end")
    if config.add_bos and tokenizer.bos_token_id is None:
        raise UserError(f"add_bos=true: the tokenizer {name!r} has no beginning-of-sequence token; leave it false")
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
    except Exception as error:  # the tokenizers library raises bare ones
        cause, remedy = hub.explain_failure(error, name, "model") or (
            describe(error, 2000),
            f"Name a model that has one{hub.access_hint(error)}{_code_hint(error)}",
        )
        key = "model.tokenizer_name_or_path" if config.model.tokenizer_name_or_path else "model.name_or_path"
        raise UserError(
            f"can't load the tokenizer of {key}={name}: {cause}\n{remedy}; or give a local folder that has one"
        ) from error
    if n_tokens == 0:
        raise UserError(f"the tokenizer {name!r} has no vocabulary; name one with model.tokenizer_name_or_path=...")
    return tokenizer


def end_at_turns(model: nn.Module, tokenizer):
    """Let the model's generation config, which is saved with it, end responses where they are trained to end."""
    ends, generation_config = chat.end_token_ids(model.generation_config, tokenizer), model.generation_config
    known = generation_config.eos_token_id
    if ends != (known if isinstance(known, list) else [known]):
        generation_config.eos_token_id = ends


def _quantization(config: DictConfig):
    """Return the settings of `model.load_in_4bit`: weights that compute in bfloat16 (QLoRA, arXiv 2305.14314)."""
    if not config.model.load_in_4bit:
        return None
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def load_policy(config: DictConfig, device_map: str = "balanced") -> nn.Module:
    """Load the model to train: all its weights, a new LoRA adapter (`lora`), or a saved one (`model.adapter`)."""
    rank0_print("building policy")
    with still_working("Loading the policy"):
        policy = load_model(config, config.model.policy_dtype, device_map)
    if config.lora is not None:
        policy = _add_lora(policy, config)
    if config.model.adapter is not None:
        policy = load_adapter(policy, policy_source(config), is_trainable=True)
        if config.reference == "adapter_copy":
            policy.load_adapter(config.model.adapter, REFERENCE_ADAPTER, is_trainable=False)
    disable_dropout(policy)  # an adapter's too
    return policy


def load_reference(config: DictConfig, policy: nn.Module | None, device_map: str = "balanced") -> nn.Module:
    """Load a second model in `model.reference_dtype`: the one that `reference_model` names, by default the policy's.

    Where `policy` is given and has the same weights, it is copied in memory.
    """
    rank0_print("building reference model")
    source = reference_source(config)
    one_device = len(set(getattr(policy, "hf_device_map", {}).values())) <= 1
    plain = config.lora is None and config.model.adapter is None and not source.given
    if policy is not None and config.model.reference_dtype == config.model.policy_dtype and plain and one_device:
        return copy.deepcopy(policy)  # in memory, so that the checkpoint is read once
    with still_working("Loading the reference"):
        reference_model = load_model(config, config.model.reference_dtype, device_map, source)
    if source.adapter is not None:
        reference_model = load_adapter(reference_model, source, is_trainable=False)
        disable_dropout(reference_model)
    return reference_model


def check_tokenizer_fits(policy: nn.Module, tokenizer, config: DictConfig):
    """Refuse a tokenizer with more tokens than the model, and a `max_length` beyond its positions."""
    n_embeddings = policy.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > n_embeddings:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeds {n_embeddings}: "
            "model.tokenizer_name_or_path belongs to another model"
        )
    n_positions = getattr(policy.config, "max_position_embeddings", None)
    if n_positions is not None and config.max_length > n_positions:
        raise UserError(f"max_length={config.max_length}: the model has only {n_positions} positions")


def check_reference_fits(
    reference_model: nn.Module, policy: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, config: DictConfig
):
    """Refuse a `reference_model` for which the policy's token ids mean something else.

    Raises: UserError if it embeds another number of tokens, has fewer positions than `max_length`, or has a tokenizer
        with other tokens.
    """
    source = reference_source(config)
    what = ", ".join(f"reference_model.{name}={getattr(source, name)}" for name in sorted(source.given))
    sizes = [model.get_input_embeddings().weight.shape[0] for model in (reference_model, policy)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{what}: it embeds {sizes[0]} tokens, the policy {sizes[1]}; a reference needs the same tokens"
        )
    n_positions = getattr(reference_model.config, "max_position_embeddings", None)
    if n_positions is not None and config.max_length > n_positions:
        raise UserError(f"max_length={config.max_length}: {what} has only {n_positions} positions")
    for place in (getattr(source, name) for name in sorted(source.given)):
        place = os.path.dirname(place) if os.path.isfile(place) else place
        try:
            vocabulary = read_tokenizer(place, config).get_vocab()
        except UserError:  # a file of weights, or a folder without a tokenizer
            continue
        differing = sorted(vocabulary.items() ^ tokenizer.get_vocab().items(), key=lambda item: item[1])
        if differing:
            shown = ", ".join(f"{token!r} ({number})" for token, number in differing[:5])
            raise UserError(f"{what}: its tokenizer and the policy's differ in {len(differing)} entries: {shown}")


# ---- adapters -------------------------------------------------------------------------------------------------------


# PEFT warns of these settings and then ignores them; here they are errors
_IGNORED = (
    "were set but no", "no modules were excluded", "rank_pattern", "alpha_pattern", "will be ignored",
    "fan_in_fan_out is set to True", "no tied modules",
)  # fmt: skip


def _add_lora(model: nn.Module, config: DictConfig) -> nn.Module:
    import peft

    fields = {"target_modules": "all-linear", **OmegaConf.to_container(config.lora)}
    _check_names_in_model(fields, model)
    _check_numbers_in_model(fields, model)
    try:
        torch.manual_seed(config.seed)
        with warnings.catch_warnings():
            for message in _IGNORED:
                warnings.filterwarnings("error", message=f".*{message}")
            model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    except Exception as error:  # values that PEFT doesn't check raise errors of any kind
        raise UserError(f"lora={config.lora}: {describe(error)}") from error
    _check_tied_weights(model, f"lora={config.lora}")
    return model


def _check_tied_weights(model: nn.Module, origin: str):
    """Refuse an adapter on one of two layers that share a weight: merging it would change the other layer, too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    layers = [layer for layer in (base.get_input_embeddings(), base.get_output_embeddings()) if layer is not None]
    weights = {id(getattr(layer, "base_layer", layer).weight) for layer in layers}
    if len(layers) == 2 and len(weights) == 1 and any(isinstance(layer, BaseTunerLayer) for layer in layers):
        raise UserError(
            f"{origin}: this model's output head is its input embedding (tied weights); an adapter on either can't be "
            "merged: leave it out of target_modules, or train all of it by lora.modules_to_save"
        )


def _check_names_in_model(fields: dict, model: nn.Module):
    """Refuse names of modules and parameters that the model doesn't have: PEFT ignores them silently."""
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    for field in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        value = fields.get(field)
        is_pattern = isinstance(value, str) and field in ("target_modules", "exclude_modules")
        if value is None or is_pattern:
            continue
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise UserError(f"lora.{field}={value}: expected a list of names, e.g. lora.{field}=[name]")
        existing = parameters if field == "target_parameters" else modules
        for name in value:
            ending = name if field == "modules_to_save" else f".{name}"  # as PEFT compares them
            if not any(f".{other}".endswith(ending) for other in existing):
                n_parts = 2 if field == "target_parameters" else 1
                options = dict.fromkeys(".".join(other.split(".")[-n_parts:]) for other in existing)
                options = [option for option in options if option and not option.isdecimal()]
                hint = f"{closest_match(name, options)} It has: {', '.join(options)}"
                raise UserError(f"lora={{{field}: {value}}}: the model has no {name!r}.{hint}")


def _check_numbers_in_model(fields: dict, model: nn.Module):
    """Refuse numbers of layers and tokens that the model doesn't have: PEFT ignores them, or fails in training."""
    tokens, n_tokens = fields.get("trainable_token_indices"), model.get_input_embeddings().num_embeddings
    lists = tokens.values() if isinstance(tokens, dict) else [tokens]
    given = [("trainable_token_indices", numbers, n_tokens) for numbers in lists]
    given.append(("layers_to_transform", fields.get("layers_to_transform"), model.config.num_hidden_layers))
    for field, value, n_there in given:
        numbers = [value] if field == "layers_to_transform" and isinstance(value, int) else value
        are_numbers = isinstance(numbers, list) and numbers and all(type(number) is int for number in numbers)
        if value is not None and not (are_numbers and min(numbers) >= 0 and max(numbers) < n_there):
            raise UserError(f"lora={{{field}: {fields[field]}}}: the model only has the numbers 0 to {n_there - 1}")


def load_adapter(model: nn.Module, source: Source, is_trainable: bool) -> nn.Module:
    """Put the saved adapter of `source` on the model.

    Raises: UserError if it can't be read, belongs to another model, or holds weights that are not finite.
    """
    import peft

    origin = f"{source.key('adapter')}={source.adapter}"
    try:
        verify_weights(source.adapter)
        weights = peft.utils.load_peft_weights(source.adapter, device="cpu")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            model = peft.PeftModel.from_pretrained(model, source.adapter, is_trainable=is_trainable)
        if left_over := sorted(peft.set_peft_model_state_dict(model, weights).unexpected_keys):
            raise ValueError(f"the model has no place for {', '.join(left_over[:10])}")
    except Exception as error:  # a folder that holds something else raises errors of any kind
        raise UserError(f"{origin}: can't load it as a PEFT adapter of this model: {describe(error, 500)}") from error
    _check_tied_weights(model, origin)
    check_finite(model, origin)
    return model
