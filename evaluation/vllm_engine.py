"""Draws responses by vLLM (https://docs.vllm.ai), in a process of its own that gives the GPU's memory back as it ends.

As a script it is that process: `python vllm_engine.py JOB OUTPUT`. JOB is JSON of `Job`'s fields, OUTPUT
gets a line of token ids for each prompt.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from omegaconf import DictConfig
from transformers import GenerationConfig

from checkpointing.resume import quoted
from config_checks.schema import REPOSITORY
from data.chat import end_token_ids
from utils import UserError, rank0_print


@dataclasses.dataclass
class Job:
    """What one model is to draw."""

    engine: dict  # arguments of vllm.LLM: model, dtype, max_model_len, ...
    prompts: list[list[int]]  # token ids
    sampling: list[dict]  # of each prompt the arguments of vllm.SamplingParams


def check_installed():
    """Raises: UserError if vLLM isn't there."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "engine=vllm: vLLM isn't installed here. Install it on a machine with a GPU (pip install vllm), or leave "
            "engine=transformers"
        )


def sampling_params(temperature: float, top_p: float, top_k: int, n_new: int, seed: int, ends: list[int]) -> dict:
    """How one sample is drawn; its seed makes it the same whatever is drawn beside it.

    Args:
        top_k: 0 for all tokens.
        n_new: the most tokens that it may have.
        ends: the ids that end it, of which the first that comes stays in it.
    """
    return {
        "temperature": temperature, "top_p": top_p, "top_k": top_k or -1, "max_tokens": n_new, "seed": seed,
        "stop_token_ids": ends, "detokenize": False,
    }  # fmt: skip


@contextlib.contextmanager
def folder(config: DictConfig, checkpoint: str | None, beside: str) -> Iterator[str]:
    """Where vLLM finds the model, a folder or a hub id: a checkpoint with an adapter is merged for as long.

    Args:
        checkpoint: a directory; None: what `model.name_or_path` names.
        beside: a directory that has room for a merged model.

    Raises: UserError if it can't be merged.
    """
    if checkpoint is None or not os.path.exists(os.path.join(checkpoint, "adapter_config.json")):
        yield config.model.name_or_path if checkpoint is None else os.path.realpath(checkpoint)
        return
    with tempfile.TemporaryDirectory(dir=beside, prefix=".merged-") as directory:
        merged = os.path.join(directory, "model")
        # in a process of its own, as it may need the GPU
        run_dir, name = os.path.split(os.path.abspath(checkpoint))
        words = [f"run={quoted(run_dir)}", f"checkpoint={name}", f"output={quoted(merged)}"]
        command = [sys.executable, str(REPOSITORY / "export.py"), *words]
        if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
            raise UserError(f"engine=vllm: the adapter of {checkpoint} can't be merged; what was printed says why")
        yield merged


def end_tokens(name: str, tokenizer) -> list[int]:
    """The ids that end a sample of the model in a folder, or of a hub id."""
    try:
        generation_config = GenerationConfig.from_pretrained(name)
    except OSError:  # it has none
        generation_config = GenerationConfig()
    return end_token_ids(generation_config, tokenizer)


def arguments(config: DictConfig, name: str, longest: int) -> dict:
    """What `vllm.LLM` is given; `longest`: prompt and response (tokens)."""
    revision = {"revision": config.model.revision} if name == config.model.name_or_path else {}
    return {
        "model": name, **revision, "dtype": config.model.policy_mp or config.model.policy_dtype,
        "max_model_len": longest, "trust_remote_code": config.model.trust_remote_code,
    }  # fmt: skip


def generate(job: Job) -> list[list[int]]:
    """The token ids of a response to each prompt; nothing of vLLM is left in memory.

    Raises: UserError if vLLM fails; what it printed says why.
    """
    with tempfile.TemporaryDirectory() as directory:
        paths = [os.path.join(directory, name) for name in ("job.json", "output.jsonl")]
        with open(paths[0], "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(job), file)
        rank0_print(f"Drawing {len(job.prompts)} samples by vLLM from {job.engine['model']}")
        search = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, os.path.abspath(__file__), *paths]  # as a script, so that no file here is imported
        code = subprocess.run(command, env={**os.environ, "PYTHONPATH": search}, stdin=subprocess.DEVNULL).returncode
        if code != 0:
            raise UserError(
                f"engine=vllm: vLLM ended with exit code {code}; what it printed says why. Where memory is short, give "
                "engine_args.gpu_memory_utilization=0.8 or engine_args.max_model_len; or leave engine=transformers"
            )
        with open(paths[1], encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def main(job_path: str, output_path: str):
    """Be the process: nothing but vLLM uses the GPU in it."""
    from vllm import LLM, SamplingParams

    with open(job_path, encoding="utf-8") as file:
        job = Job(**json.load(file))
    params = [SamplingParams(**arguments) for arguments in job.sampling]
    prompts = [{"prompt_token_ids": ids} for ids in job.prompts]
    outputs = LLM(**job.engine).generate(prompts, params)  # in the order of the prompts
    with open(output_path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(list(output.outputs[0].token_ids)) + "\n" for output in outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
