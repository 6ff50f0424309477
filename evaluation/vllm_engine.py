"""Draw responses by vLLM (https://docs.vllm.ai) in a separate process, which frees the GPU's memory when it ends.

This module is also the program of that process: `python -m evaluation.vllm_engine JOB OUTPUT`. JOB is a JSON file with
`Job`'s fields; OUTPUT gets a line of token ids for each prompt.
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

from basics.outputs import holds_model, is_sharded
from basics.printing import counted
from basics.repository import REPOSITORY, python_path
from config_checks.overrides import quoted_path
from data.chat import end_token_ids
from utils import UserError, rank0_print


@dataclasses.dataclass
class Job:
    """One model's prompts and sampling settings."""

    engine: dict  # arguments of vllm.LLM: model, dtype, max_model_len, ...
    prompts: list[list[int]]  # token ids
    sampling: list[dict]  # for each prompt the arguments of vllm.SamplingParams


def check_installed():
    """Raise UserError if vLLM isn't installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "engine=vllm: vLLM isn't installed here. Install it on a machine with a GPU (pip install vllm), or leave "
            "engine=transformers"
        )


def sampling_params(temperature: float, top_p: float, top_k: int, n_new: int, seed: int, ends: list[int]) -> dict:
    """Return the sampling parameters of one sample, whose own seed makes it independent of the others.

    Args:
        top_k: 0 for all tokens.
        n_new: the maximum number of tokens.
        ends: token ids that end the sample; the one that does is part of the sample.
    """
    return {
        "temperature": temperature, "top_p": top_p, "top_k": top_k or -1, "max_tokens": n_new, "seed": seed,
        "stop_token_ids": ends, "detokenize": False,
    }  # fmt: skip


@contextlib.contextmanager
def folder(config: DictConfig, checkpoint: str | None, temporary_in: str) -> Iterator[str]:
    """Yield the folder or hub id for vLLM to load.

    vLLM can't read an adapter, or a sharded checkpoint that isn't a run's last one: `export.py` first turns these into
    a temporary folder.

    Args:
        checkpoint: a directory; None means the model of `model.name_or_path`.
        temporary_in: the directory that gets the temporary folder.

    Raises: UserError if the checkpoint can't be exported.
    """
    is_plain = checkpoint is None or not os.path.exists(os.path.join(checkpoint, "adapter_config.json"))
    if is_plain and (checkpoint is None or not is_sharded(checkpoint) or holds_model(checkpoint)):
        yield config.model.name_or_path if checkpoint is None else os.path.realpath(checkpoint)
        return
    with tempfile.TemporaryDirectory(dir=temporary_in, prefix=".merged-") as directory:
        exported = os.path.join(directory, "model")
        # in a separate process, which frees its GPU memory when it ends
        run_dir, name = os.path.split(os.path.abspath(checkpoint))
        words = [f"run={quoted_path(run_dir)}", f"checkpoint={name}", f"output={quoted_path(exported)}"]
        words.append(f"trust_remote_code={str(config.model.trust_remote_code).lower()}")
        command = [sys.executable, str(REPOSITORY / "export.py"), *words]
        if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
            raise UserError(f"engine=vllm: the model of {checkpoint} can't be exported; see the error above")
        yield exported


def end_tokens(name: str, tokenizer) -> list[int]:
    """Return the token ids that end a sample of a model, given its folder or hub id."""
    from transformers import GenerationConfig

    try:
        generation_config = GenerationConfig.from_pretrained(name)
    except OSError:  # the model has none
        generation_config = GenerationConfig()
    return end_token_ids(generation_config, tokenizer)


def arguments(config: DictConfig, name: str, longest: int) -> dict:
    """Return the arguments of `vllm.LLM`; `longest`: the most tokens that prompt and response have together."""
    revision = {"revision": config.model.revision} if name == config.model.name_or_path else {}
    return {
        "model": name, **revision, "dtype": config.model.policy_mp or config.model.policy_dtype,
        "max_model_len": longest, "trust_remote_code": config.model.trust_remote_code,
    }  # fmt: skip


def generate(job: Job) -> list[list[int]]:
    """Return the token ids of a response to each prompt, drawn in a separate process.

    Raises: UserError if vLLM fails.
    """
    with tempfile.TemporaryDirectory() as directory:
        paths = [os.path.join(directory, name) for name in ("job.json", "output.jsonl")]
        with open(paths[0], "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(job), file)
        rank0_print(f"Drawing {counted(len(job.prompts), 'sample')} by vLLM from {job.engine['model']}")
        # -P: modules in the current directory can't shadow vLLM's
        command = [sys.executable, "-P", "-m", "evaluation.vllm_engine", *paths]
        code = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": python_path()}, stdin=subprocess.DEVNULL
        ).returncode
        if code != 0:
            raise UserError(
                f"engine=vllm: vLLM ended with exit code {code}; what it printed says why. Where memory is short, give "
                "engine_args.gpu_memory_utilization=0.8 or engine_args.max_model_len; or use engine=transformers"
            )
        with open(paths[1], encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def main(job_path: str, output_path: str):
    """Draw a job's samples; only vLLM uses the GPU in this process."""
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
