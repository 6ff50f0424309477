"""The keys of `sample.py` besides those of training, checked before anything is loaded."""

import dataclasses
import os

from omegaconf import DictConfig

from basics.outputs import Output, check_outputs, refuse_unless_document, refuse_unless_json_lines
from config_checks.values import check_number, is_number
from data.locations import locate
from distributed import environment
from distributed.strategies import STRATEGIES
from evaluation import vllm_engine
from utils import UserError, closest_match

ENGINES = ("transformers", "vllm")
_SAMPLES = refuse_unless_json_lines("samples", b'{"settings": "', ("prompt_index", "sample", "response"))
_ALPACA_EVAL = refuse_unless_document("AlpacaEval's outputs", rb'\[(\]|\s*\{\s*"instruction": )')


@dataclasses.dataclass
class SampleFile:
    """A file that gets the samples of one checkpoint at one temperature."""

    path: str
    checkpoint: str | None  # a directory; None means the policy as loaded
    temperature: float


@dataclasses.dataclass
class Options:
    """The checked values of `sample.py`'s own keys."""

    run: str | None  # its directory
    files: list[SampleFile]
    prompts: str | None
    n: int
    top_p: float
    top_k: int
    max_new_tokens: int
    alpaca_eval: str | None
    engine: str
    engine_args: dict


def make_options(config: DictConfig, own: dict, checkpoints: list[str | None]) -> Options:
    """Return the options, and set `precompute_ref_log_probs` to false: new samples aren't among the precomputed pairs.

    Args:
        own: the values of `sample.py`'s own keys.
        checkpoints: the directories that `own` names; None means the policy as loaded.

    Raises: UserError if a value can't be used, or a file can't be written.
    """
    config.precompute_ref_log_probs = False
    for key, kind, lowest, highest in (("n", int, 1, 10**6), ("top_k", int, 0, 10**9), ("top_p", float, 1e-9, 1)):
        check_number(key, own[key], kind, lowest, highest)
    max_new_tokens = own["max_new_tokens"]
    if max_new_tokens is None:
        max_new_tokens = config.max_length - config.max_prompt_length
    if not is_number(max_new_tokens, int) or max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: must be an integer above 0")
    for key in ("prompts", "output", "alpaca_eval"):
        if own[key] is not None and not isinstance(own[key], str):
            raise UserError(f"{key}={own[key]}: expected the name of a file")
    if own["prompts"] is not None and locate(own["prompts"], "prompts").files is None:
        raise UserError(f"prompts={own['prompts']}: expected a local file")
    _check_engine(config, own)
    files = _sample_files(own, checkpoints, _temperatures(own["temperature"]))
    if own["alpaca_eval"] is not None and len(files) > 1:
        raise UserError(f"alpaca_eval={own['alpaca_eval']}: give one checkpoint and one temperature at a time")
    _check_outputs(own, files)
    return Options(own["run"], files, own["prompts"], own["n"], float(own["top_p"]), own["top_k"], max_new_tokens,
                   own["alpaca_eval"], own["engine"], own["engine_args"])  # fmt: skip


def _check_outputs(own: dict, files: list[SampleFile]):
    """Raise UserError if an output would replace a file that `sample.py` didn't write."""
    splits = locate(own["prompts"], "prompts").files if own["prompts"] is not None else {}
    prompts = [path for paths in splits.values() for path in paths]
    inputs = {f"prompts ({path})" if len(prompts) > 1 else "prompts": path for path in prompts}
    outputs = [Output("output", file.path, _SAMPLES) for file in files]
    if own["alpaca_eval"] is not None:
        outputs.append(Output("alpaca_eval", own["alpaca_eval"], _ALPACA_EVAL))
    check_outputs(outputs, inputs)


def _check_engine(config: DictConfig, own: dict):
    """Raise UserError if there is no such engine, or vLLM isn't installed or can't draw from this model."""
    engine, arguments = own["engine"], own["engine_args"]
    if engine not in ENGINES:
        raise UserError(f"engine={engine}: must be one of {', '.join(ENGINES)}.{closest_match(str(engine), ENGINES)}")
    if not isinstance(arguments, dict):
        raise UserError(f"engine_args={arguments}: expected arguments, e.g. engine_args.gpu_memory_utilization=0.8")
    if engine != "vllm":
        if arguments:
            raise UserError(f"engine_args={arguments}: not used with engine={engine}; leave them out")
        return
    vllm_engine.check_installed()
    if STRATEGIES[config.trainer].starts_workers or environment.is_launched():
        raise UserError(
            f"engine=vllm with trainer={config.trainer}: only a single process can use it; give trainer=BasicTrainer, "
            "start it without a launcher, and for several GPUs give engine_args.tensor_parallel_size=N"
        )
    model = config.model
    if own["run"] is None and (model.archive or model.adapter or model.from_scratch or config.lora is not None):
        raise UserError("engine=vllm: vLLM reads a folder or a hub id; give run=DIR, or model.name_or_path alone")


def _temperatures(given: object) -> list[tuple[float, str]]:
    """Return each temperature with its suffix for file names; the suffix is empty unless `given` is a list.

    Raises: UserError if one is out of range or given twice.
    """
    temperatures = given if isinstance(given, list) else [given]
    for temperature in temperatures:
        check_number("temperature", temperature, float, 0, 1e6)
        if 0 < temperature < 1e-6:
            raise UserError(f"temperature={temperature}: give 0 for the likeliest tokens, or 1e-6 or more")
    suffixes = [f"_t{temperature:g}" for temperature in temperatures] if isinstance(given, list) else [""]
    if not suffixes or len(set(suffixes)) < len(suffixes):
        raise UserError(f"temperature={given}: give one, or several that differ, e.g. temperature=[0.5,1.0]")
    return [(float(temperature), suffix) for temperature, suffix in zip(temperatures, suffixes, strict=True)]


def _sample_files(own: dict, checkpoints: list[str | None], temperatures: list[tuple[float, str]]) -> list[SampleFile]:
    """Return a file for each checkpoint at each temperature.

    Raises: UserError if a file has no name, or several files would have the same.
    """
    if own["output"] is None and own["run"] is None:
        raise UserError("output: name the file that gets the samples, as there is no run to keep them in")
    if own["output"] is not None and len(checkpoints) > 1:
        raise UserError(f"output={own['output']}: give one checkpoint at a time, or leave output out")
    files = []
    for checkpoint in checkpoints:
        name = own["output"] or os.path.join(own["run"], f"samples_{os.path.basename(checkpoint)}.jsonl")
        stem, extension = os.path.splitext(name)
        files += [SampleFile(f"{stem}{suffix}{extension}", checkpoint, temperature)
                  for temperature, suffix in temperatures]  # fmt: skip
    return files
