"""Responses drawn from checkpoints, with log-probabilities under policy and reference: the body of `sample.py`."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from checkpointing.fingerprints import file_fingerprints, hub_revisions
from checkpointing.integrity import content_digest
from config_checks.numbers import check_number
from data import chat
from data.batches import BatchIterator
from data.diagnosis import Fault
from data.formats import prompt_example
from data.locations import locate
from data.messages import BadExample
from data.row_sources import open_rows
from data.tokenization import decode_response, get_collate_fn
from distributed import collectives, environment
from distributed.strategies import STRATEGIES
from evaluation import vllm_engine
from evaluation.sampling import end_tokens, generate_scorable, target_ids
from losses import LOSSES
from models import load_tokenizer
from preference_datasets import open_batches
from printing import hides_progress
from storage.files import atomic_file, read_json_lines
from storage.locks import locked
from storage.outputs import Output, check_outputs, document, json_lines
from utils import (
    UserError,
    closest_match,
    get_local_dir,
    on_rank0,
    rank0_print,
    slice_and_move_batch_for_device,
)

ENGINES = ("transformers", "vllm")
_SAMPLES = json_lines("samples", b'{"settings": "', ("prompt_index", "sample", "response"))
_ALPACA_EVAL = document("AlpacaEval's outputs", rb'\[(\]|\s*\{\s*"instruction": )')


@dataclasses.dataclass
class Drawing:
    """A file of samples that is to be drawn."""

    checkpoint: str | None  # a directory; None: the policy as it is loaded
    temperature: float
    output: str


@dataclasses.dataclass
class Options:
    """What `sample.py` has beside the keys of training."""

    run: str | None  # its directory
    drawings: list[Drawing]
    prompts: str | None
    n: int
    top_p: float
    top_k: int
    max_new_tokens: int
    alpaca_eval: str | None
    engine: str
    engine_args: dict


def make_options(config: DictConfig, own: dict, checkpoints: list[str | None]) -> Options:
    """Raises: UserError if a key has a value of no use, a checkpoint isn't there, or a file can't be written.

    The reference is to be in memory, as the texts are new to its cache.
    """
    config.precompute_ref_log_probs = False
    for key, kind, lowest, highest in (("n", int, 1, 10**6), ("top_k", int, 0, 10**9), ("top_p", float, 1e-9, 1)):
        check_number(key, own[key], kind, lowest, highest)
    n_new = own["max_new_tokens"] if own["max_new_tokens"] is not None else config.max_length - config.max_prompt_length
    if isinstance(n_new, bool) or not isinstance(n_new, int) or n_new < 1:
        raise UserError(f"max_new_tokens={n_new}: must be a whole number above 0")
    for key in ("prompts", "output", "alpaca_eval"):
        if own[key] is not None and not isinstance(own[key], str):
            raise UserError(f"{key}={own[key]}: expected the name of a file")
    if own["prompts"] is not None and locate(own["prompts"], "prompts").files is None:
        raise UserError(f"prompts={own['prompts']}: expected a local file")
    _check_engine(config, own)
    drawings = _drawings(own, checkpoints)
    if own["alpaca_eval"] is not None and len(drawings) > 1:
        raise UserError(f"alpaca_eval={own['alpaca_eval']}: give one checkpoint and one temperature at a time")
    read = locate(own["prompts"], "prompts").files if own["prompts"] is not None else {}
    inputs = {f"prompts ({name})": file for files in read.values() for name, file in enumerate(files)}
    outputs = [Output("output", drawing.output, _SAMPLES) for drawing in drawings]
    outputs += [Output("alpaca_eval", own["alpaca_eval"], _ALPACA_EVAL)] if own["alpaca_eval"] is not None else []
    check_outputs(outputs, inputs)
    return Options(own["run"], drawings, own["prompts"], own["n"], float(own["top_p"]), own["top_k"], n_new,
                   own["alpaca_eval"], own["engine"], own["engine_args"])  # fmt: skip


def _check_engine(config: DictConfig, own: dict):
    """Raises: UserError if there is no such engine, or vLLM isn't there or can't draw from this model."""
    engine, arguments = own["engine"], own["engine_args"]
    if engine not in ENGINES:
        raise UserError(f"engine={engine}: must be one of {', '.join(ENGINES)}.{closest_match(str(engine), ENGINES)}")
    if not isinstance(arguments, dict):
        raise UserError(f"engine_args={arguments}: expected arguments, e.g. engine_args.gpu_memory_utilization=0.8")
    if engine != "vllm":
        if arguments:
            raise UserError(f"engine_args={arguments}: engine={engine} has no use for them; leave them out")
        return
    vllm_engine.check_installed()
    if STRATEGIES[config.trainer].starts_workers or environment.is_launched():
        raise UserError(
            f"engine=vllm: trainer={config.trainer} starts several workers; give trainer=BasicTrainer, and for several "
            "GPUs engine_args.tensor_parallel_size=N"
        )
    model = config.model
    if own["run"] is None and (model.archive or model.adapter or model.from_scratch or config.lora is not None):
        raise UserError("engine=vllm: vLLM reads a folder or a hub id; give run=DIR, or model.name_or_path alone")


def _drawings(own: dict, checkpoints: list[str | None]) -> list[Drawing]:
    """A file for each checkpoint at each temperature; those of a list of temperatures have them in their names.

    Raises: UserError if a temperature isn't one, or it isn't clear what the files are to be called.
    """
    given = own["temperature"]
    temperatures = given if isinstance(given, list) else [given]
    for temperature in temperatures:
        check_number("temperature", temperature, float, 0, 1e6)
        if 0 < temperature < 1e-6:
            raise UserError(f"temperature={temperature}: give 0 for the likeliest tokens, or 1e-6 or more")
    endings = [f"_t{temperature:g}" for temperature in temperatures] if isinstance(given, list) else [""]
    if not endings or len(set(endings)) < len(endings):
        raise UserError(f"temperature={given}: give one, or several that differ, e.g. temperature=[0.5,1.0]")
    if own["output"] is None and own["run"] is None:
        raise UserError("output: name the file that gets the samples, as there is no run to keep them in")
    if own["output"] is not None and len(checkpoints) > 1:
        raise UserError(f"output={own['output']}: give one checkpoint at a time, or leave output out")
    drawings = []
    for checkpoint in checkpoints:
        name = own["output"] or os.path.join(own["run"], f"samples_{os.path.basename(checkpoint)}.jsonl")
        stem, extension = os.path.splitext(name)
        drawings += [Drawing(checkpoint, float(temperature), f"{stem}{ending}{extension}")
                     for temperature, ending in zip(temperatures, endings, strict=True)]  # fmt: skip
    return drawings


# ---- prompts --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Request:
    """A prompt: as it was given, as text, and as tokens."""

    index: int
    given: str | list[dict]
    text: str
    ids: list[int]


def read_requests(
    config: DictConfig, tokenizer, eval_iterator: BatchIterator | None, options: Options
) -> list[Request]:
    """All prompts, those that are too long cut to their end of `max_prompt_length` tokens.

    Args:
        eval_iterator: has the evaluation examples, for where no file is given.

    Raises: UserError if a row has none, naming it.
    """
    given: list[str | list[dict]] = []
    if options.prompts is None:
        given = list(dict.fromkeys(prompt.text for prompt, _ in eval_iterator.places()))
        rendered = given
    else:
        location = locate(options.prompts, "prompts")
        cache_dir = get_local_dir(config.local_dirs)
        splits = [open_rows(location, split, cache_dir, True) for split in location.files]
        renderer, rendered = chat.Renderer(tokenizer, config.chat_template), []
        for chunk in (chunk for rows in splits for chunk in rows.chunks(1000)):
            for number, _, row in chunk:
                try:
                    if isinstance(row, Fault):
                        raise BadExample("broken row", row.reason)
                    example = prompt_example(row, config.apply_chat_template)
                    given.append(example.prompt)
                    rendered.append(renderer.render(example).prompt)
                except BadExample as error:
                    raise UserError(f"prompts={options.prompts}, row {number}: {error}") from error
    ids = chat.token_ids(rendered, tokenizer)
    bos = [tokenizer.bos_token_id] if config.add_bos else []
    ids = [one if one[: len(bos)] == bos else bos + one for one in ids]
    n_cut = sum(len(one) > config.max_prompt_length for one in ids)
    if n_cut:
        rank0_print(f"{n_cut} prompts are cut to the last {config.max_prompt_length} tokens (max_prompt_length)")
    return [
        Request(number, *texts, one[-config.max_prompt_length :])
        for number, (*texts, one) in enumerate(zip(given, rendered, ids, strict=True))
    ]


# ---- drawing --------------------------------------------------------------------------------------------------------


class SeededDraws(LogitsProcessor):
    """Makes the likeliest token a draw from the softmax, by Gumbel noise that each row has of its own.

    argmax(logits + g), g being Gumbel noise, is a draw from softmax(logits)
    (https://arxiv.org/abs/1411.0030). So what a row draws depends on its seed alone, not on the rows beside it.
    """

    def __init__(self, seeds: list[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        exponential = [torch.empty(scores.shape[1], dtype=torch.float64) for _ in self.generators]
        for values, generator in zip(exponential, self.generators, strict=True):
            values.exponential_(generator=generator)
        noise = -torch.stack(exponential).log()  # (B, V)
        return scores.double() + noise.to(scores.device)


def processors(temperature: float, options: Options, seeds: list[int]) -> LogitsProcessorList:
    """What turns logits into a choice, as transformers has it, and then into a draw."""
    if temperature == 0:
        return LogitsProcessorList()
    chosen = LogitsProcessorList()
    if temperature != 1:
        chosen.append(TemperatureLogitsWarper(temperature))
    if options.top_k:
        chosen.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        chosen.append(TopPLogitsWarper(options.top_p))
    return LogitsProcessorList([*chosen, SeededDraws(seeds)])


def seed_of(seed: int, request: int, number: int) -> int:
    """The seed of a sample, which is the same under all models."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{request}/{number}".encode()).digest()[:8], "big") >> 1


def sample_checkpoints(make_trainer: Callable[[], object], config: DictConfig, options: Options):
    """Draw one file after the other; a signal ends it and leaves what is written.

    `make_trainer` loads the models, for the log-probabilities of what is drawn.
    """
    drawn = draw_by_vllm(config, options) if options.engine == "vllm" else {}
    trainer = make_trainer()
    n_positions = getattr(trainer.policy.config, "max_position_embeddings", None)
    if n_positions is not None and config.max_prompt_length + options.max_new_tokens > n_positions:
        raise UserError(
            f"max_new_tokens={options.max_new_tokens} after max_prompt_length={config.max_prompt_length}: the model "
            f"has only {n_positions} positions"
        )
    requests = read_requests(config, trainer.tokenizer, trainer.eval_iterator, options)
    with trainer.stop:
        loaded = None
        for drawing in options.drawings:
            if drawing.checkpoint != loaded:
                trainer.load_weights(drawing.checkpoint)
                loaded = drawing.checkpoint
            _sample_to(trainer, requests, drawing, options, drawn.get(drawing.output))


def _sample_to(trainer, requests: list[Request], drawing: Drawing, options: Options, tokens: dict | None):
    """`tokens`: of each sample of the file, where they have been drawn already."""
    output, examples = drawing.output, trainer.state.examples
    origin = {"settings": _settings(trainer.config, requests, drawing, options),
              **_origin(examples, drawing, options)}  # fmt: skip
    with contextlib.ExitStack() as stack:
        if on_rank0():
            stack.enter_context(locked(output, f"output={output}", "another process is drawing into it"))
        done = collectives.broadcast_object(_done(output, origin["settings"]) if on_rank0() else None)
        items = _missing(requests, options, done)
        _draw_all(trainer, items, drawing, options, tokens, origin)
    rank0_print(f"{len(items)} samples drawn, {len(done)} were there: {output}")
    if options.alpaca_eval is not None and on_rank0():
        _write_alpaca_eval(options.alpaca_eval, output, drawing.checkpoint)


def _draw_all(trainer, items: list, drawing: Drawing, options: Options, tokens: dict | None, origin: dict):
    """Draw the samples that a file lacks, and add a line for each; `origin`: what all lines say."""
    size, output = trainer.config.eval_batch_size, drawing.output
    with tqdm(total=len(items), desc="Samples", unit="sample", disable=hides_progress()) as progress:
        for start in range(0, len(items), size):
            trainer.stop.check()
            batch = items[start : start + size]
            lines = _draw(trainer, batch, drawing.temperature, options, tokens)
            if on_rank0():
                with open(output, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps({**origin, **line}, ensure_ascii=False) + "\n" for line in lines)
            progress.update(len(batch))


def _missing(requests: list[Request], options: Options, done: set[tuple[int, int]]) -> list[tuple[Request, int]]:
    """The samples that a file lacks, those for short prompts first."""
    by_length = sorted(requests, key=lambda request: (len(request.ids), request.index))
    items = [(request, number) for request in by_length for number in range(options.n)]
    return [(request, number) for request, number in items if (request.index, number) not in done]


def _origin(examples: int, drawing: Drawing, options: Options) -> dict:
    """What every line says of where it comes from: run and checkpoint by their names, and how it was drawn."""
    return {
        "run": options.run and os.path.basename(os.path.abspath(options.run)),
        "checkpoint": drawing.checkpoint and os.path.basename(drawing.checkpoint),
        "examples": examples, "temperature": drawing.temperature, "top_p": options.top_p,
        "top_k": options.top_k,
    }  # fmt: skip


def _settings(config: DictConfig, requests: list[Request], drawing: Drawing, options: Options) -> str:
    """Return a short hash of what decides a sample and its log-probabilities."""
    decides = [
        drawing.checkpoint and content_digest(drawing.checkpoint), config.seed, config.max_prompt_length,
        drawing.temperature, options.top_p, options.top_k, options.max_new_tokens,
        [request.ids for request in requests], OmegaConf.to_container(config.model), config.reference,
        OmegaConf.to_container(config.reference_model), file_fingerprints(config),
    ]  # fmt: skip
    # vLLM loads the models itself, after this
    decides += [hub_revisions(config)] if options.engine == "transformers" else []
    decides += [options.engine] if options.engine != "transformers" else []
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]


def _done(output: str, settings: str) -> set[tuple[int, int]]:
    """Which samples a file has; a line that a crash has cut off is removed.

    Raises: UserError if they were drawn under other settings.
    """
    done, end = set(), 0
    if not os.path.exists(output):
        return done
    try:
        for sample, line_end in read_json_lines(output):
            if sample["settings"] != settings:
                raise UserError(
                    f"output={output} has samples drawn under other settings; give another file, or delete it"
                )
            done.add((sample["prompt_index"], sample["sample"]))
            end = line_end
    except UserError:
        raise
    except (ValueError, KeyError, TypeError):
        raise UserError(f"output={output}: a file that isn't one of samples; give another") from None
    os.truncate(output, end)
    return done


def _draw(
    trainer, items: list[tuple[Request, int]], temperature: float, options: Options, tokens: dict | None
) -> list[dict]:
    """A sample for each item, as lines of the output; of several workers each draws some.

    Args:
        tokens: of each sample, where they have been drawn already.
    """
    index, count = trainer.strategy.batch_shard
    own = items[index::count]
    drawn = own or items[:1]  # a worker with none of them keeps the others company
    trainer.policy.eval()
    if tokens is None:
        targets, is_whole = _generate(trainer, drawn, temperature, options)
    else:
        targets, is_whole = _targets(trainer, drawn, tokens)
    with torch.no_grad():
        policy_logps = trainer.response_logps(trainer.policy, targets).tolist()
        reference_logps = [None] * len(drawn)
        if trainer.reference is not None:
            with trainer.reference.active() as model:
                reference_logps = trainer.response_logps(model, targets).tolist()
    lines, ends = [], end_tokens(trainer.policy, trainer.tokenizer)
    for row, (request, number) in enumerate(own):
        prompt_ids, ids = target_ids(targets, row) if is_whole[row] else ([], [])
        if not is_whole[row]:  # nothing was drawn after an empty prompt
            policy_logps[row] = reference_logps[row] = None
        lines.append({
            "prompt_index": request.index, "sample": number, "prompt": request.given,
            "response": decode_response(prompt_ids, ids, trainer.tokenizer), "n_tokens": len(ids),
            "finished": bool(ids) and ids[-1] in ends,
            "policy_logps": policy_logps[row], "reference_logps": reference_logps[row],
        })  # fmt: skip
    if not trainer.is_sharded:
        return lines
    found = {
        (line["prompt_index"], line["sample"]): line for part in collectives.all_gather_object(lines) for line in part
    }
    return [found[request.index, number] for request, number in items]


def _generate(
    trainer, items: list[tuple[Request, int]], temperature: float, options: Options
) -> tuple[dict, torch.Tensor]:
    """Samples as a batch of SFT targets, and which of them are whole; see `generate_scorable`."""
    collate = get_collate_fn(trainer.tokenizer)
    batch = collate([{"prompt_input_ids": r.ids, "prompt_attention_mask": [1] * len(r.ids)} for r, _ in items])
    batch = slice_and_move_batch_for_device(batch, 0, 1, trainer.device)
    seeds = [seed_of(trainer.config.seed, request.index, number) for request, number in items]
    with trainer.autocast(trainer.policy):
        _, targets, is_whole = generate_scorable(
            trainer.policy, trainer.tokenizer, batch, options.max_new_tokens + batch["prompt_input_ids"].shape[1],
            lambda: trainer.strategy.stops_sampling(trainer.stop.received is not None), synced=trainer.is_sharded,
            processors=processors(temperature, options, seeds),
        )  # fmt: skip
    trainer.stop.check()
    return targets, is_whole


def _targets(trainer, items: list[tuple[Request, int]], tokens: dict) -> tuple[dict, torch.Tensor]:
    """The same of samples that are there; an empty prompt, which has none, counts as the end token."""
    examples, end = [], trainer.tokenizer.eos_token_id
    for request, number in items:
        prompt, response = request.ids or [end], tokens.get((request.index, number), [])
        ids, labels = prompt + response, [-100] * len(prompt) + response
        examples.append({"chosen_input_ids": ids, "chosen_attention_mask": [1] * len(ids), "chosen_labels": labels})
    return get_collate_fn(trainer.tokenizer)(examples), torch.tensor([bool(r.ids) for r, _ in items])


# ---- drawing by vLLM ------------------------------------------------------------------------------------------------


def draw_by_vllm(config: DictConfig, options: Options) -> dict[str, dict[tuple[int, int], list[int]]]:
    """Of each file the token ids of the samples that it lacks, by prompt and number; no model is loaded here.

    Raises: UserError if vLLM fails.
    """
    tokenizer, iterator = load_tokenizer(config), None
    if options.prompts is None:
        sft_mode = not LOSSES[config.loss.name].needs_pairs
        iterator = open_batches(config, tokenizer, sft_mode, config.seed, (0, 1), silent=True, trains=False)[1]
    requests = read_requests(config, tokenizer, iterator, options)
    drawn: dict[str, dict] = {drawing.output: {} for drawing in options.drawings}
    for checkpoint in dict.fromkeys(drawing.checkpoint for drawing in options.drawings):
        drawings = [drawing for drawing in options.drawings if drawing.checkpoint == checkpoint]
        places, job = [], vllm_engine.Job({}, [], [])
        with vllm_engine.folder(config, checkpoint, os.path.dirname(os.path.abspath(drawings[0].output))) as folder:
            ends = vllm_engine.end_tokens(folder, tokenizer)
            for drawing in drawings:
                settings = _settings(config, requests, drawing, options)
                for request, number in _missing(requests, options, _done(drawing.output, settings)):
                    if request.ids:
                        places.append((drawing.output, (request.index, number)))
                        job.prompts.append(request.ids)
                        job.sampling.append(vllm_engine.sampling_params(
                            drawing.temperature, options.top_p, options.top_k, options.max_new_tokens,
                            seed_of(config.seed, request.index, number), ends,
                        ))  # fmt: skip
            if places:
                longest = config.max_prompt_length + options.max_new_tokens
                job.engine = vllm_engine.arguments(config, folder, longest) | options.engine_args
                for (output, place), ids in zip(places, vllm_engine.generate(job), strict=True):
                    drawn[output][place] = ids
    return drawn


def _write_alpaca_eval(path: str, output: str, checkpoint: str | None):
    samples = sorted((line for line, _ in read_json_lines(output)), key=lambda line: line["prompt_index"])
    rows = [
        {"instruction": line["prompt"] if isinstance(line["prompt"], str) else line["prompt"][-1]["content"],
         "output": line["response"], "generator": checkpoint or "policy"}
        for line in samples if line["sample"] == 0
    ]  # fmt: skip
    with atomic_file(path) as file:
        json.dump(rows, file, ensure_ascii=False, indent=1)
    rank0_print(f"Written to {path}")
