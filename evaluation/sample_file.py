"""Files of samples, JSON Lines: one process at a time adds to a file, and nothing in it is drawn twice.

Each line begins with a hash of all settings that decide a sample, and says where it comes from.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from checkpointing.fingerprints import file_fingerprints
from evaluation.sample_options import Options, SampleFile
from evaluation.sample_prompts import Request
from storage.files import atomic_file
from utils import UserError, is_cut_off, rank0_print


def settings_hash(
    config: DictConfig, examples: int, requests: list[Request], file: SampleFile, options: Options
) -> str:
    """Return a short hash of what decides a sample; `examples`: how many the checkpoint was trained on."""
    deciding = [
        file.checkpoint and os.path.basename(file.checkpoint), examples, config.seed, config.max_prompt_length,
        file.temperature, options.top_p, options.top_k, options.max_new_tokens,
        [request.ids for request in requests], OmegaConf.to_container(config.model), file_fingerprints(config),
    ]  # fmt: skip
    deciding += [options.engine] if options.engine != "transformers" else []
    return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:12]


def origin(examples: int, file: SampleFile, options: Options) -> dict:
    """Return what each line says of where it comes from: run and checkpoint by name, and the sampling settings."""
    return {
        "run": options.run and os.path.basename(os.path.abspath(options.run)),
        "checkpoint": file.checkpoint and os.path.basename(file.checkpoint),
        "examples": examples, "temperature": file.temperature, "top_p": options.top_p,
        "top_k": options.top_k,
    }  # fmt: skip


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Keep other processes out of the file; it is removed at the end if it is empty.

    Raises: UserError if another process draws into it.
    """
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"output={path}: another process is drawing into it; wait for its end") from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            if os.fstat(file.fileno()).st_size == 0 and os.path.exists(path):
                os.remove(path)


def drawn_samples(path: str, settings: str) -> set[tuple[int, int]]:
    """Return the prompt and sample numbers that a file has; a line that a crash has cut off is removed.

    Raises: UserError if the file holds something else, or samples drawn under other settings.
    """
    drawn, end = set(), 0
    if not os.path.exists(path):
        return drawn
    with open(path, "rb") as file:
        for line in file:
            try:
                if is_cut_off(line):
                    break
                sample = json.loads(line)
                former = sample["settings"]
                drawn.add((sample["prompt_index"], sample["sample"]))
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(f"output={path}: a file that isn't one of samples; give another") from None
            if former != settings:
                raise UserError(
                    f"output={path} has samples drawn under other settings; give another file, or delete it"
                )
            end += len(line)
    os.truncate(path, end)
    return drawn


def append_lines(path: str, lines: list[dict]):
    """Add lines to a file, all or none of them: a full disk leaves the file as it was."""
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        data = memoryview("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        try:
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            os.truncate(path, size)
            raise UserError(
                f"can't write to {path}: {error.strerror}; make room, and the same command continues it"
            ) from error


def write_alpaca_eval(path: str, samples_path: str, checkpoint: str | None):
    """Write the first sample for each prompt as AlpacaEval reads it (JSON)."""
    with open(samples_path, encoding="utf-8") as file:
        samples = sorted(map(json.loads, file), key=lambda line: line["prompt_index"])
    rows = [
        {"instruction": line["prompt"] if isinstance(line["prompt"], str) else line["prompt"][-1]["content"],
         "output": line["response"], "generator": checkpoint or "policy"}
        for line in samples if line["sample"] == 0
    ]  # fmt: skip
    with atomic_file(path) as file:
        json.dump(rows, file, ensure_ascii=False, indent=1)
    rank0_print(f"Written to {path}")
