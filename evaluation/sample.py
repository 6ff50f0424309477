"""The body of `sample.py`: draw responses from checkpoints, with log-probabilities under policy and reference."""

import contextlib
from collections.abc import Callable

from omegaconf import DictConfig

from basics.files import append_json_lines
from basics.locks import locked
from basics.printing import counted
from checkpointing.restoring import load_checkpoint
from config_checks.datasets import chosen_datasets
from distributed import collectives
from evaluation import sample_file
from evaluation.drawing import Item, Tokens, draw, draw_by_vllm
from evaluation.sample_options import Options, SampleFile
from evaluation.sample_prompts import Request, read_requests
from models import load_tokenizer
from preference_datasets import open_batches
from reporting.terminal import Progress
from utils import UserError, on_rank0, rank0_print


def sample_checkpoints(make_trainer: Callable[[], object], config: DictConfig, options: Options):
    """Fill each file with its samples; samples written before a signal stay.

    Args:
        make_trainer: loads the models; called after vLLM has finished, because vLLM needs the GPU for itself.
    """
    requests, drawn_by_vllm = _draw_by_vllm(config, options) if options.engine == "vllm" else (None, {})
    trainer = make_trainer()
    n_positions = getattr(trainer.policy.config, "max_position_embeddings", None)
    if n_positions is not None and config.max_prompt_length + options.max_new_tokens > n_positions:
        raise UserError(
            f"max_prompt_length={config.max_prompt_length} + max_new_tokens={options.max_new_tokens}: the model has "
            f"only {n_positions} positions; give smaller ones"
        )
    if requests is None:
        requests = read_requests(config, trainer.tokenizer, trainer.eval_iterator, options.prompts)
    with trainer.stop:
        loaded = None
        for file in options.files:
            if file.checkpoint != loaded:
                load_checkpoint(trainer, file.checkpoint)
                loaded = file.checkpoint
            _fill_file(trainer, requests, file, options, drawn_by_vllm.get(file.path))


def _fill_file(trainer, requests: list[Request], file: SampleFile, options: Options, tokens: Tokens | None):
    """Draw the samples that a file lacks, add a line for each as they come, and sort the lines at the end.

    Args:
        tokens: the responses, if another engine drew them already.
    """
    with contextlib.ExitStack() as stack:
        if on_rank0():
            stack.enter_context(locked(file.path, f"output={file.path}", "another process is drawing into it"))
        settings, items = _missing_items(trainer.config, requests, file, options)
        common = {"settings": settings, **sample_file.origin(trainer.state.examples, file, options)}
        size = trainer.config.eval_batch_size
        with Progress("Drawing samples", len(items), "samples") as progress:
            for start in range(0, len(items), size):
                trainer.stop.check()
                batch = items[start : start + size]
                lines = draw(trainer, batch, file.temperature, options, tokens)
                if on_rank0():
                    append_json_lines(file.path, [{**common, **line} for line in lines])
                progress.update(len(batch))
        if on_rank0():
            sample_file.sort_lines(file.path)
    n_before = len(requests) * options.n - len(items)
    rank0_print(f"{counted(len(items), 'sample')} drawn, {n_before:,} already in {file.path}")
    if options.alpaca_eval is not None and on_rank0():
        sample_file.write_alpaca_eval(options.alpaca_eval, file.path, file.checkpoint)


def _missing_items(
    config: DictConfig, requests: list[Request], file: SampleFile, options: Options
) -> tuple[str, list[Item]]:
    """Return the hash of a file's settings, and the samples that the file lacks.

    Short prompts come first, so that a batch has prompts of similar length.
    """
    settings = sample_file.settings_hash(config, requests, file, options)
    drawn = collectives.broadcast_object(sample_file.drawn_samples(file.path, settings) if on_rank0() else None)
    by_length = sorted(requests, key=lambda request: (len(request.ids), request.index))
    items = [(request, number) for request in by_length for number in range(options.n)]
    return settings, [(request, number) for request, number in items if (request.index, number) not in drawn]


def _draw_by_vllm(config: DictConfig, options: Options) -> tuple[list[Request], dict[str, Tokens]]:
    """Draw the files' missing samples by vLLM; return all prompts, and each file's new token ids by its path."""
    tokenizer, eval_iterator = load_tokenizer(config), None
    if options.prompts is None:
        _, eval_iterator = open_batches(config, chosen_datasets(config), tokenizer, config.seed, trains=False)
    requests = read_requests(config, tokenizer, eval_iterator, options.prompts)
    tokens = {}
    for checkpoint in dict.fromkeys(file.checkpoint for file in options.files):
        files = [file for file in options.files if file.checkpoint == checkpoint]
        items = {file.path: _missing_items(config, requests, file, options)[1] for file in files}
        tokens |= draw_by_vllm(config, tokenizer, checkpoint, items, options)
    return requests, tokens
