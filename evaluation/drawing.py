"""Draw samples, each with its own seed, and score them under policy and reference."""

import hashlib
import os

import torch
from omegaconf import DictConfig
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from data.tokenization import decode_response, get_collate_fn
from evaluation import vllm_engine
from evaluation.sample_options import Options
from evaluation.sample_prompts import Request
from evaluation.sampling import end_tokens, generate_as_targets, target_ids
from utils import on_device, widest_dtype

Item = tuple[Request, int]  # a prompt, and the number of a sample for it
Tokens = dict[tuple[int, int], list[int]]  # token ids of responses, by prompt index and sample number


def sample_seed(seed: int, prompt_index: int, number: int) -> int:
    """Return the seed of a sample; it is the same for all models."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt_index}/{number}".encode()).digest()[:8], "big") >> 1


class SeededDraws(LogitsProcessor):
    """Samples one token per row from the softmax with the row's own generator, and masks all other tokens.

    So greedy decoding picks the sampled token, and a row's tokens don't depend on the other rows of the batch. The
    token is the first whose cumulative probability exceeds a uniform random number (inverse transform sampling).
    """

    def __init__(self, seeds: list[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = [torch.rand(1, dtype=torch.float64, generator=generator) for generator in self.generators]
        cumulative = scores.softmax(-1, dtype=widest_dtype(scores.device)).cumsum(-1)  # (B, V)
        threshold = torch.stack(uniform).to(cumulative) * cumulative[:, -1:]  # rounding: the sum isn't quite 1
        tokens = torch.searchsorted(cumulative, threshold, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)


def logits_processors(temperature: float, options: Options, seeds: list[int]) -> LogitsProcessorList:
    """Return transformers' warpers for temperature, top_k and top_p, then `SeededDraws`; nothing at temperature 0."""
    if temperature == 0:
        return LogitsProcessorList()
    warpers = LogitsProcessorList()
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(temperature))
    if options.top_k:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        warpers.append(TopPLogitsWarper(options.top_p))
    return LogitsProcessorList([*warpers, SeededDraws(seeds)])


def draw(trainer, items: list[Item], temperature: float, options: Options, tokens: Tokens | None) -> list[dict]:
    """Draw a sample for each item, divided between the workers; return them as lines of the output file.

    Args:
        tokens: the responses, if another engine has drawn them already.
    """
    shard, n_shards = trainer.strategy.batch_shard
    own = items[shard::n_shards]
    batch = own or items[:1]  # a worker without items generates too: the forward pass is collective
    trainer.policy.eval()
    if tokens is None:
        targets, has_prompt = _generate(trainer, batch, temperature, options)
    else:
        targets, has_prompt = _as_sft_targets(trainer, batch, tokens)
    parts = trainer.strategy.gather_shards(_scored_lines(trainer, own, targets, has_prompt))
    by_place = {(line["prompt_index"], line["sample"]): line for part in parts for line in part}
    return [by_place[request.index, number] for request, number in items]


def _scored_lines(trainer, items: list[Item], targets: dict, has_prompt: torch.Tensor) -> list[dict]:
    """Return a line per item, with log-probabilities under policy and reference.

    Without items there are no lines, but `targets` still has a row: see `draw`.
    """
    n_rows = len(has_prompt)
    with torch.no_grad():
        policy_logps = trainer.response_logps(trainer.policy, targets).tolist()
        reference_logps = [None] * n_rows
        if trainer.reference is not None:
            with trainer.reference.active() as model:
                reference_logps = trainer.response_logps(model, targets).tolist()
    lines, ends = [], end_tokens(trainer.policy, trainer.tokenizer)
    for row, (request, number) in enumerate(items):
        prompt_ids, ids = target_ids(targets, row) if has_prompt[row] else ([], [])
        if not has_prompt[row]:  # nothing was drawn
            policy_logps[row] = reference_logps[row] = None
        lines.append({
            "prompt_index": request.index, "sample": number, "prompt": request.given,
            "response": decode_response(prompt_ids, ids, trainer.tokenizer), "n_tokens": len(ids),
            "finished": bool(ids) and ids[-1] in ends,
            "policy_logps": policy_logps[row], "reference_logps": reference_logps[row],
        })  # fmt: skip
    return lines


def _generate(trainer, items: list[Item], temperature: float, options: Options) -> tuple[dict, torch.Tensor]:
    """Return samples as a batch of SFT targets, and which of them had a prompt; see `generate_as_targets`."""
    collate = get_collate_fn(trainer.tokenizer)
    batch = collate([{"prompt_input_ids": r.ids, "prompt_attention_mask": [1] * len(r.ids)} for r, _ in items])
    batch = on_device(batch, trainer.device)
    seeds = [sample_seed(trainer.config.seed, request.index, number) for request, number in items]
    with trainer.autocast(trainer.policy):
        _, targets, has_prompt = generate_as_targets(
            trainer.policy, trainer.tokenizer, batch, options.max_new_tokens + batch["prompt_input_ids"].shape[1],
            lambda: trainer.strategy.stops_sampling(trainer.stop.received is not None), synced=trainer.is_sharded,
            processors=logits_processors(temperature, options, seeds),
        )  # fmt: skip
    trainer.stop.check()
    return targets, has_prompt


def _as_sft_targets(trainer, items: list[Item], tokens: Tokens) -> tuple[dict, torch.Tensor]:
    """Return responses drawn earlier in the form that `_generate` returns; the end token replaces an empty prompt."""
    examples, end = [], trainer.tokenizer.eos_token_id
    for request, number in items:
        prompt, response = request.ids or [end], tokens.get((request.index, number), [])
        ids, labels = prompt + response, [-100] * len(prompt) + response
        examples.append({"chosen_input_ids": ids, "chosen_attention_mask": [1] * len(ids), "chosen_labels": labels})
    return get_collate_fn(trainer.tokenizer)(examples), torch.tensor([bool(r.ids) for r, _ in items])


def draw_by_vllm(
    config: DictConfig, tokenizer, checkpoint: str | None, items: dict[str, list[Item]], options: Options
) -> dict[str, Tokens]:
    """Draw samples of one checkpoint for several files at once; no model is loaded in this process.

    Args:
        items: the samples that each file lacks, by its path.

    Raises: UserError if vLLM fails.
    """
    places, job = [], vllm_engine.Job({}, [], [])
    temperatures = {file.path: file.temperature for file in options.files}
    with vllm_engine.folder(config, checkpoint, os.path.dirname(os.path.abspath(next(iter(items))))) as folder:
        ends = vllm_engine.end_tokens(folder, tokenizer)
        for path, of_file in items.items():
            for request, number in of_file:
                if not request.ids:
                    continue
                places.append((path, (request.index, number)))
                job.prompts.append(request.ids)
                job.sampling.append(vllm_engine.sampling_params(
                    temperatures[path], options.top_p, options.top_k, options.max_new_tokens,
                    sample_seed(config.seed, request.index, number), ends,
                ))  # fmt: skip
        tokens: dict[str, Tokens] = {path: {} for path in items}
        if places:
            longest = config.max_prompt_length + options.max_new_tokens
            job.engine = vllm_engine.arguments(config, folder, longest) | options.engine_args
            for (path, place), ids in zip(places, vllm_engine.generate(job), strict=True):
                tokens[path][place] = ids
    return tokens
