"""The model card of a checkpoint, README.md: a description for the hub, and how to load the model."""

import importlib.metadata
import os
import textwrap

import huggingface_hub
from huggingface_hub.utils import HFValidationError, validate_repo_id
from omegaconf import DictConfig

from basics.printing import counted, markdown, markdown_code
from basics.saved_config import flatten
from checkpointing.atomic_directory import CARD
from checkpointing.fingerprints import is_of_model
from config_checks.datasets import chosen_datasets
from data.locations import has_data_suffix
from losses import needs_reference
from preference_datasets import DATASETS
from references import policy_source
from reporting.metric_names import ACCURACY, LOSS, MARGIN

_SETTINGS = (  # beginnings of keys
    "seed", "train_split", "test_split", "chat_template", "add_bos", "max_length", "max_prompt_length", "truncation",
    "model.policy_", "lora", "loss.", "n_epochs", "n_examples", "batch_size", "gradient_accumulation_steps",
    "optimizer", "lr", "warmup_steps", "max_grad_norm", "trainer",
)  # fmt: skip
_METRICS = {
    LOSS: "loss", ACCURACY: "accuracy: the preferred response has the larger reward",
    MARGIN: "margin of the rewards", "nll_eval/chosen": "nats per token of the preferred responses",
}  # fmt: skip
_CITATION = """\
@inproceedings{rafailov2023direct,
    title={Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
    author={Rafael Rafailov and Archit Sharma and Eric Mitchell and Christopher D. Manning and Stefano Ermon and Chelsea Finn},
    booktitle={Advances in Neural Information Processing Systems}, year={2023}, url={https://arxiv.org/abs/2305.18290}
}"""  # noqa: E501


def write_card(directory: str, config: DictConfig, state: dict, is_adapter: bool, n_eval_examples: int | None = None):
    """Write README.md; it replaces one that PEFT may have written.

    The front matter names only models and datasets on the hub; the text names local ones, too.

    Args:
        config: the run's config.
        state: the checkpoint's state.json.
        is_adapter: the directory holds an adapter, not a model.
        n_eval_examples: the number of examples in an evaluation; by default the config's.
    """
    on_hub = _base_revision(config, state) is not None
    data = huggingface_hub.ModelCardData(
        base_model=config.model.name_or_path if on_hub else None,
        base_model_relation=("adapter" if is_adapter else "finetune") if on_hub else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[config.loss.name, *(["lora"] if is_adapter else [])],
        datasets=[source for _, source in _datasets(config) if _is_dataset_on_hub(source)] or None,
    )
    text = "\n\n".join([
        _introduction(config, state, is_adapter), _use(config, is_adapter), _data(config, state),
        _settings(config, state, is_adapter), _evaluation(n_eval_examples or config.n_eval_examples, state),
        f"## Citation\n\n{textwrap.indent(_CITATION, '    ')}",
    ])  # fmt: skip
    huggingface_hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(os.path.join(directory, CARD))


def is_hub_id(name: str | None) -> bool:
    """True if a name can be that of a repository on the hub, and isn't that of a local file or folder."""
    if name is None or os.path.exists(os.path.expanduser(name)):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _is_dataset_on_hub(source: str | None) -> bool:
    return source is not None and "/" in source and is_hub_id(source) and not has_data_suffix(source)


def _base_revision(config: DictConfig, state: dict) -> str | None:
    """Return the commit of the base model on the hub; None if it isn't from there."""
    known = state.get("inputs", {}).get("model.name_or_path")  # a commit, or a local model's longer fingerprint
    on_hub = not config.model.from_scratch and is_hub_id(config.model.name_or_path)
    return known if on_hub and known is not None and len(known) == 40 else None


def _datasets(config: DictConfig) -> list[tuple[str, str | None]]:
    """Return each dataset's name and source: an id on the hub, a path, or None if it is made in code."""
    found = []
    for choice in chosen_datasets(config):
        named = DATASETS.get(choice.name)
        if named is None:
            found.append((choice.name, choice.name.partition(":")[0]))
        elif named.hub_id is None:
            found.append((choice.name, None))
        else:
            found.append((choice.name, config.dataset_paths.get(choice.name) or named.hub_id))
    return found


# ---- the text -------------------------------------------------------------------------------------------------------


def _introduction(config: DictConfig, state: dict, is_adapter: bool) -> str:
    source = policy_source(config)
    base = markdown_code(source.name_or_path)
    if (revision := _base_revision(config, state)) is not None:
        base += f" (revision `{revision}`)"
    start = f"weights drawn at random, of the shape of {base}" if source.from_scratch else base
    if source.archive is not None:
        start = f"the weights of {markdown_code(source.archive)}, of the shape of {base}"
    if source.adapter is not None:
        start += f" with the adapter {markdown_code(source.adapter)}"
    name = os.path.basename(os.path.normpath(source.name_or_path))
    what = "A LoRA adapter, trained" if is_adapter else "A language model, trained"
    unfinished = "" if state.get("complete", True) else " Training had not finished."
    examples, steps = counted(state.get("examples", 0), "example"), counted(state.get("updates", 0), "optimizer step")
    return (
        f"# {markdown(name)}, trained with {config.loss.name.upper()}\n\n"
        f"{what} with `{config.loss.name}` from {start}: {examples}, {steps}.{unfinished}"
    )


def _use(config: DictConfig, is_adapter: bool) -> str:
    auto = "peft import AutoPeftModelForCausalLM as AutoModel" if is_adapter else (
        "transformers import AutoModelForCausalLM as AutoModel"
    )  # fmt: skip
    lines = [
        "## Use", "", "    from transformers import AutoTokenizer", f"    from {auto}",
        '    model, tokenizer = AutoModel.from_pretrained("DIR"), AutoTokenizer.from_pretrained("DIR")', "",
        "`DIR` is this folder, or its id on the hub.",
    ]  # fmt: skip
    source = policy_source(config)
    if is_adapter and (source.archive is not None or source.from_scratch):
        base = f"those of {markdown_code(source.archive)}" if source.archive is not None else "drawn at random"
        lines[-1] += (
            f" **The weights beneath the adapter are not those of {markdown_code(source.name_or_path)}, "
            f"which PEFT would load, but {base}**: make a model of both by `python export.py run=RUN output=DIR`."
        )
    return "\n".join(lines)


def _data(config: DictConfig, state: dict) -> str:
    lines = ["## Data", "", "| dataset | from |", "|---|---|"]
    lines += [f"| {markdown(name)} | {markdown_code(source) if source else 'made in code'} |"
              for name, source in _datasets(config)]  # fmt: skip
    inputs = state.get("inputs", {})
    digests = [f"| {markdown(name)} | `{digest}` |" for name, digest in inputs.items() if not is_of_model(name)]
    if digests:
        lines += ["", "| split | SHA-256 of its examples |", "|---|---|", *digests]
    return "\n".join(lines)


def _settings(config: DictConfig, state: dict, is_adapter: bool) -> str:
    """Return the keys that decide what was learned, and the versions of libraries."""
    prefixes = (*_SETTINGS, "reference") if needs_reference(config.loss) else _SETTINGS
    lines = []
    for key, value in flatten(config).items():
        if key.startswith(prefixes) and value is not None and value != {}:
            lines.append(f"- `{key}`: {markdown(str(value).lower() if isinstance(value, bool) else value)}")
    versions = {**state.get("versions", {}), **({"peft": importlib.metadata.version("peft")} if is_adapter else {})}
    lines.append(f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items())}")
    return "\n".join(["## Settings", "", *lines])


def _evaluation(n: int | None, state: dict) -> str:
    metrics, examples = state.get("metrics") or {}, state.get("evaluated_at")
    found = [name for name in _METRICS if name in metrics]
    if not found:
        return "## Evaluation\n\nThe model was not evaluated during training."
    on = "all evaluation examples" if n is None else counted(n, "evaluation example")
    after = f", after {counted(examples, 'training example')}" if examples is not None else ""
    lines = ["## Evaluation", "", f"On {on}{after}:", "", "| metric | mean | standard error |", "|---|---|---|"]
    for name in found:
        error = metrics.get(f"{name}_se")
        lines.append(f"| {_METRICS[name]} | {metrics[name]:.4f} | {'' if error is None else f'{error:.4f}'} |")
    return "\n".join(lines)
