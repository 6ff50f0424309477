"""Files of samples, in JSON Lines. A file keeps the samples drawn earlier, so that none is drawn twice.

Each line begins with a hash of all settings that decide a sample, and names the sample's origin.
"""

import hashlib
import json
import os

from omegaconf import DictConfig, OmegaConf

from basics.files import atomic_file, json_line, read_json_lines
from checkpointing.fingerprints import file_fingerprints, hub_revisions
from checkpointing.integrity import content_digest
from evaluation.kept_lines import read_kept_lines
from evaluation.sample_options import Options, SampleFile
from evaluation.sample_prompts import Request
from utils import rank0_print


def settings_hash(config: DictConfig, requests: list[Request], file: SampleFile, options: Options) -> str:
    """Return a short hash of everything that decides samples and their log-probabilities."""
    deciding = [
        file.checkpoint and content_digest(file.checkpoint), config.seed, config.max_prompt_length,
        file.temperature, options.top_p, options.top_k, options.max_new_tokens,
        [request.ids for request in requests], OmegaConf.to_container(config.model), config.reference,
        OmegaConf.to_container(config.reference_model), file_fingerprints(config),
    ]  # fmt: skip
    if options.engine == "transformers":
        deciding.append(hub_revisions(config))
    else:  # vLLM will load the models later, so their commits on the hub aren't known yet
        deciding.append(options.engine)
    return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:12]


def origin(examples: int, file: SampleFile, options: Options) -> dict:
    """Return the fields of each line that name its origin: run, checkpoint and sampling settings."""
    return {
        "run": options.run and os.path.basename(os.path.abspath(options.run)),
        "checkpoint": file.checkpoint and os.path.basename(file.checkpoint),
        "examples": examples, "temperature": file.temperature, "top_p": options.top_p,
        "top_k": options.top_k,
    }  # fmt: skip


def drawn_samples(path: str, settings: str) -> set[tuple[int, int]]:
    """Return the prompt and sample numbers that a file has; remove a line that a crash has cut off.

    Raises: UserError if the file holds something else, or samples drawn under other settings.
    """
    if not os.path.exists(path):
        return set()
    lines, size = read_kept_lines(path, "samples", settings, _place)
    os.truncate(path, size)
    return set(lines)


def sort_lines(path: str):
    """Sort a file's lines by prompt and sample number; they were added in the order of the prompts' lengths."""
    lines = [line for line, _ in read_json_lines(path)]
    in_order = sorted(lines, key=_place)
    if in_order != lines and os.name == "posix":  # Windows can't replace an open file, and the lock keeps this one open
        with atomic_file(os.path.realpath(path), binary=True) as file:  # a link to the file stays a link
            file.writelines(map(json_line, in_order))


def _place(line: dict) -> tuple[int, int]:
    return line["prompt_index"], line["sample"]


def write_alpaca_eval(path: str, samples_path: str, checkpoint: str | None):
    """Write the first sample for each prompt, in AlpacaEval's JSON format."""
    samples = sorted((line for line, _ in read_json_lines(samples_path)), key=_place)
    rows = [
        {"instruction": line["prompt"] if isinstance(line["prompt"], str) else line["prompt"][-1]["content"],
         "output": line["response"], "generator": checkpoint or "policy"}
        for line in samples if line["sample"] == 0
    ]  # fmt: skip
    with atomic_file(path) as file:
        json.dump(rows, file, ensure_ascii=False, indent=1)
    rank0_print(f"Written to {path}")
