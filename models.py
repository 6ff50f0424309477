"""The models of a run: policy, reference, LoRA adapters, and the tokenizer."""

import copy
import os
import warnings

import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from torch import nn

from checkpointing.archives import check_finite, describe, load_archive, load_pretrained
from data import chat, hub
from references import REFERENCE_ADAPTER, Source, policy_source, reference_source, resolved_reference
from utils import UserError, closest_match, disable_dropout, get_local_dir, rank0_print


def load_model(config: DictConfig, dtype: str, device_map: str = "balanced", source: Source | None = None) -> nn.Module:
    """A model without dropout, from `source` without its adapter; by default what the policy starts from.

    `device_map`: 'balanced' over the machine's GPUs, or 'cpu'.

    Raises: UserError if there is no such model, none that can be loaded, or one that lacks weights or has others.
    """
    source = source or policy_source(config)
    name, options = source.name_or_path, _hub_options(config, source)
    origin = f"{source.key('name_or_path')}={name}"
    origin += f" model.revision={options['revision']}" if "revision" in options else ""
    attention = {"attn_implementation": config.model.attn_implementation} if config.model.attn_implementation else {}
    try:
        _say_what_runs(name, options)
        if source.from_scratch:
            torch.manual_seed(config.seed)
            model_config = transformers.AutoConfig.from_pretrained(name, **options)
            trusted = {"trust_remote_code": options["trust_remote_code"]}
            model = transformers.AutoModelForCausalLM.from_config(
                model_config, dtype=torch.float32, **attention, **trusted
            )
            device = "cuda" if torch.cuda.is_available() and device_map != "cpu" else "cpu"
            model = model.to(device, getattr(torch, dtype))  # drawn in one dtype, so that all have the same weights
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
    except UserError:
        raise
    except Exception as error:  # what a damaged config.json, weights or the hub's HTTP library raise may be of any kind
        cause, remedy = hub.why_not(error, name, "model") or (
            describe(error, 2000),
            f"Give the id of a causal language model on the hub{hub.access_hint(error)}{_code_hint(error)}",
        )
        raise UserError(f"can't load {origin}: {cause}\n{remedy}, or give a local folder") from error
    disable_dropout(model)
    if source.archive is not None:
        load_archive(source.archive, model, source.key("archive"), options["trust_remote_code"])
    else:
        check_finite(model, origin)
    return model


def _hub_options(config: DictConfig, source: Source) -> dict[str, object]:
    """How `from_pretrained` is to read `source.name_or_path`; the revision is of `model.name_or_path`."""
    options = {"cache_dir": get_local_dir(config.local_dirs), "trust_remote_code": config.model.trust_remote_code}
    if config.model.revision is not None and source.name_or_path == config.model.name_or_path:
        options["revision"] = config.model.revision
    return options


def allow_own_code(config: DictConfig):
    """With `model.trust_remote_code`, let this process find the classes of a model that another one sends it."""
    if config.model.trust_remote_code:
        transformers.dynamic_module_utils.init_hf_modules()


def _say_what_runs(name: str, options: dict):
    """Print which code of its own a model brings, if it is allowed to run."""
    if not options["trust_remote_code"]:
        return
    revision = {key: value for key, value in options.items() if key != "trust_remote_code"}
    classes = transformers.PreTrainedConfig.get_config_dict(name, **revision)[0].get("auto_map") or {}
    if classes:
        rank0_print(f"model.trust_remote_code=true: running code of {name}: {', '.join(sorted(classes.values()))}")


def _code_hint(error: Exception) -> str:
    if "trust_remote_code" not in str(error):
        return ""
    return "\nmodel.trust_remote_code=true runs the code that it brings, with your rights: read it first"


def configured_dropout_rates(config: DictConfig) -> dict[str, float]:
    """The dropout rates that the model's own config.json has, for that of checkpoints; in training they are 0."""
    source = policy_source(config)
    model_config = transformers.AutoConfig.from_pretrained(source.name_or_path, **_hub_options(config, source))
    return {key: value for key, value in model_config.to_dict().items() if "drop" in key and isinstance(value, float)}


def load_tokenizer(config: DictConfig) -> transformers.PreTrainedTokenizerBase:
    """The model's tokenizer, or `model.tokenizer_name_or_path`; without a padding token it pads with the end token."""
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
    """The tokenizer of a model or folder, as it is in its files.

    Raises: UserError if there is none, or none that can be read.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **_hub_options(config, Source(name)))
        n_tokens = len(tokenizer("Hello", add_special_tokens=False)["input_ids"])
    except Exception as error:  # the tokenizers library raises bare ones
        cause, remedy = hub.why_not(error, name, "model") or (
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
        policy = load_adapter(policy, policy_source(config), is_trainable=True)
        if resolved_reference(config) == "adapter_copy":
            policy.load_adapter(config.model.adapter, REFERENCE_ADAPTER, is_trainable=False)
    disable_dropout(policy)  # an adapter's too
    return policy


def load_reference(config: DictConfig, policy: nn.Module | None, device_map: str = "balanced") -> nn.Module:
    """A second model in `model.reference_dtype`: the one that `reference_model` names, or else one with the weights
    that the policy starts from; then a copy of `policy` where that is given and has them."""
    rank0_print("building reference model")
    source = reference_source(config)
    one_device = len(set(getattr(policy, "hf_device_map", {}).values())) <= 1
    plain = config.lora is None and config.model.adapter is None and not source.given
    if policy is not None and config.model.reference_dtype == config.model.policy_dtype and plain and one_device:
        return copy.deepcopy(policy)  # in memory, so that the checkpoint is read once
    reference_model = load_model(config, config.model.reference_dtype, device_map, source)
    if source.adapter is not None:
        reference_model = load_adapter(reference_model, source, is_trainable=False)
        disable_dropout(reference_model)
    return reference_model


def check_tokenizer_fits(policy: nn.Module, tokenizer, config: DictConfig):
    """Raises UserError if the tokenizer has more tokens than the model, or `max_length` is more than its positions."""
    n_embeddings = policy.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > n_embeddings:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeds {n_embeddings}: "
            "model.tokenizer_name_or_path is not this model's"
        )
    n_positions = getattr(policy.config, "max_position_embeddings", None)
    if n_positions is not None and config.max_length > n_positions:
        raise UserError(f"max_length={config.max_length}: the model has only {n_positions} positions")


def check_reference_fits(
    reference_model: nn.Module, policy: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, config: DictConfig
):
    """Refuse a model of `reference_model` under which the policy's token ids, or as many of them, mean something else.

    Raises: UserError if it embeds another number of tokens, has fewer positions than `max_length`, or if its tokenizer,
        where it has one, knows other tokens.
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


# what PEFT warns of and then does without: names that match nothing, settings that don't go together
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
            return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    except Exception as error:  # values that PEFT doesn't check raise errors of any kind
        raise UserError(f"lora={config.lora}: {describe(error)}") from error


def _check_names_in_model(fields: dict, model: nn.Module):
    """Refuse names of modules and parameters that the model doesn't have: PEFT passes over them."""
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
    """Refuse numbers of layers and tokens that the model doesn't have: PEFT passes over them, or fails in training."""
    tokens, n_tokens = fields.get("trainable_token_indices"), model.get_input_embeddings().num_embeddings
    lists = tokens.values() if isinstance(tokens, dict) else [tokens]
    given = [("trainable_token_indices", numbers, n_tokens) for numbers in lists]
    given.append(("layers_to_transform", fields.get("layers_to_transform"), model.config.num_hidden_layers))
    for field, value, n_there in given:
        numbers = [value] if field == "layers_to_transform" and isinstance(value, int) else value
        are_numbers = isinstance(numbers, list) and numbers and all(type(number) is int for number in numbers)
        if value is not None and not (are_numbers and min(numbers) >= 0 and max(numbers) < n_there):
            raise UserError(f"lora={{{field}: {fields[field]}}}: the model has the numbers 0 to {n_there - 1} alone")


def load_adapter(model: nn.Module, source: Source, is_trainable: bool) -> nn.Module:
    """The model with the saved adapter of `source` on it.

    Raises: UserError if it can't be read, is another model's, or holds weights that are not finite.
    """
    import peft

    origin = f"{source.key('adapter')}={source.adapter}"
    try:
        weights = peft.utils.load_peft_weights(source.adapter, device="cpu")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            model = peft.PeftModel.from_pretrained(model, source.adapter, is_trainable=is_trainable)
        if left_over := sorted(peft.set_peft_model_state_dict(model, weights).unexpected_keys):
            raise ValueError(f"the model has no place for {', '.join(left_over[:10])}")
    except Exception as error:  # a folder that holds something else raises errors of any kind
        raise UserError(f"{origin}: can't load it as a PEFT adapter of this model: {describe(error, 500)}") from error
    check_finite(model, origin)
    return model
