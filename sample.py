"""Draw responses from a run's checkpoints, or from any model: `python sample.py run=RUN`, with the keys of train.py."""

import dataclasses
import hashlib
import json
import os

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

import evaluate
import train
from checkpointing.fingerprints import file_fingerprints
from data import chat, prepared
from data.diagnosis import Fault
from data.formats import BadExample, Example, prompt_of
from data.locations import locate
from data.tokenization import get_collate_fn
from distributed import collectives
from reporting.sampling import generate_scorable
from utils import UserError, get_local_dir, hides_progress, on_rank0, rank0_print, slice_and_move_batch_for_device


@dataclasses.dataclass
class Options:
    """What `sample.py` has beside the keys of training."""

    checkpoints: list[str | None]  # directories; None: the policy as it is loaded
    outputs: list[str]  # a file for each
    prompts: str | None
    n: int
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    alpaca_eval: str | None


def run(config: DictConfig):
    """Check what is asked for, then draw."""
    evaluate.run_with_options(config, "sample", make_options, sample_checkpoints)


def make_options(config: DictConfig, own: dict) -> Options:
    """Raises: UserError if a key has a value of no use, a checkpoint isn't there, or a file can't be written.

    The reference is to be in memory, as the texts are new to its cache.
    """
    config.precompute_ref_log_probs = False
    for key, kind, lowest, highest in (("n", int, 1, 10**6), ("top_k", int, 0, 10**9), ("temperature", float, 0, 1e6),
                                       ("top_p", float, 1e-9, 1)):  # fmt: skip
        evaluate.check_number(key, own[key], kind, lowest, highest)
    n_new = own["max_new_tokens"] if own["max_new_tokens"] is not None else config.max_length - config.max_prompt_length
    if isinstance(n_new, bool) or not isinstance(n_new, int) or n_new < 1:
        raise UserError(f"max_new_tokens={n_new}: must be a whole number above 0")
    for key in ("prompts", "output", "alpaca_eval"):
        if own[key] is not None and not isinstance(own[key], str):
            raise UserError(f"{key}={own[key]}: expected the name of a file")
    if own["prompts"] is not None and locate(own["prompts"], "prompts").files is None:
        raise UserError(f"prompts={own['prompts']}: expected a local file")
    checkpoints = evaluate.find_checkpoints(own["run"], own["checkpoint"])
    if own["output"] is None and own["run"] is None:
        raise UserError("output: name the file that gets the samples, as there is no run to keep them in")
    if own["output"] is not None and len(checkpoints) > 1:
        raise UserError(f"output={own['output']}: give one checkpoint at a time, or leave output out")
    if own["alpaca_eval"] is not None and len(checkpoints) > 1:
        raise UserError(f"alpaca_eval={own['alpaca_eval']}: give one checkpoint at a time")
    outputs = [own["output"] or os.path.join(own["run"], f"samples_{os.path.basename(c)}.jsonl") for c in checkpoints]
    for key, path in [("output", path) for path in outputs] + [("alpaca_eval", own["alpaca_eval"])]:
        evaluate.check_can_be_written(key, path)
    return Options(checkpoints, outputs, own["prompts"], own["n"], float(own["temperature"]), float(own["top_p"]),
                   own["top_k"], n_new, own["alpaca_eval"])  # fmt: skip


# ---- prompts --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Request:
    """A prompt: as it was given, as text, and as tokens."""

    index: int
    given: str | list[dict]
    text: str
    ids: list[int]


def read_requests(trainer, options: Options) -> list[Request]:
    """All prompts, those that are too long cut to their end of `max_prompt_length` tokens.

    Raises: UserError if a row has none, naming it.
    """
    config, tokenizer = trainer.config, trainer.tokenizer
    given: list[str | list[dict]] = []
    if options.prompts is None:
        given = list(dict.fromkeys(prompt.text for prompt, _ in trainer.eval_iterator.places()))
        rendered = given
    else:
        location = locate(options.prompts, "prompts")
        rows = prepared.open_rows(location, next(iter(location.files)), get_local_dir(config.local_dirs), True)
        renderer, rendered = chat.Renderer(tokenizer, config.chat_template), []
        for chunk in rows.chunks(1000):
            for number, _, row in chunk:
                try:
                    if isinstance(row, Fault):
                        raise BadExample("broken row", row.reason)
                    given.append(prompt_of(row))
                    rendered.append(renderer.render(Example(given[-1], [])).prompt)
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


def processors(options: Options, seeds: list[int]) -> LogitsProcessorList:
    """What turns logits into a choice, as transformers has it, and then into a draw."""
    if options.temperature == 0:
        return LogitsProcessorList()
    chosen = LogitsProcessorList()
    if options.temperature != 1:
        chosen.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        chosen.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        chosen.append(TopPLogitsWarper(options.top_p))
    return LogitsProcessorList([*chosen, SeededDraws(seeds)])


def seed_of(seed: int, request: int, number: int) -> int:
    """The seed of a sample, which is the same under all models."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{request}/{number}".encode()).digest()[:8], "big") >> 1


def sample_checkpoints(config: DictConfig, options: Options):
    """Draw from one checkpoint after the other; what is written stays if a signal ends it."""
    trainer = train.make_trainer(config, trains=False)
    n_positions = getattr(trainer.policy.config, "max_position_embeddings", None)
    if n_positions is not None and config.max_prompt_length + options.max_new_tokens > n_positions:
        raise UserError(
            f"max_new_tokens={options.max_new_tokens} after max_prompt_length={config.max_prompt_length}: the model "
            f"has only {n_positions} positions"
        )
    requests = read_requests(trainer, options)
    with trainer.stop:
        for checkpoint, output in zip(options.checkpoints, options.outputs, strict=True):
            if checkpoint is not None:
                trainer.load_weights(checkpoint)
            _sample_to(trainer, requests, checkpoint, output, options)


def _sample_to(trainer, requests: list[Request], checkpoint: str | None, output: str, options: Options):
    settings = _settings(trainer, requests, checkpoint, options)
    done = collectives.broadcast_object(_done(output, settings) if on_rank0() else None)
    items = [(request, number) for request in sorted(requests, key=lambda r: (len(r.ids), r.index))
             for number in range(options.n)]  # fmt: skip
    items = [item for item in items if (item[0].index, item[1]) not in done]
    size = trainer.config.eval_batch_size
    with tqdm(total=len(items), desc="Samples", unit="sample", disable=hides_progress()) as progress:
        for start in range(0, len(items), size):
            trainer.stop.check()
            batch = items[start : start + size]
            lines = _draw(trainer, batch, options)
            if on_rank0():
                with open(output, "a", encoding="utf-8") as file:
                    file.writelines(
                        json.dumps({"settings": settings, **line}, ensure_ascii=False) + "\n" for line in lines
                    )
            progress.update(len(batch))
    rank0_print(f"{len(items)} samples drawn, {len(done)} were there: {output}")
    if options.alpaca_eval is not None and on_rank0():
        _write_alpaca_eval(options.alpaca_eval, output, checkpoint)


def _settings(trainer, requests: list[Request], checkpoint: str | None, options: Options) -> str:
    """A short hash of what decides a sample."""
    config = trainer.config
    decides = [
        checkpoint and os.path.basename(checkpoint), trainer.state.examples, config.seed, config.max_prompt_length,
        options.temperature, options.top_p, options.top_k, options.max_new_tokens,
        [request.ids for request in requests], OmegaConf.to_container(config.model), file_fingerprints(config),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]


def _done(output: str, settings: str) -> set[tuple[int, int]]:
    """Which samples a file has; a line that a crash has cut off is removed.

    Raises: UserError if they were drawn under other settings.
    """
    done, end = set(), 0
    if not os.path.exists(output):
        return done
    with open(output, "rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("cut off")
                sample = json.loads(line)
                former = sample["settings"]
                done.add((sample["prompt_index"], sample["sample"]))
            except (ValueError, KeyError, TypeError):
                if line.endswith(b"\n"):
                    raise UserError(f"output={output}: a file that isn't one of samples; give another") from None
                break
            if former != settings:
                raise UserError(
                    f"output={output} has samples drawn under other settings; give another file, or delete it"
                )
            end += len(line)
    os.truncate(output, end)
    return done


def _draw(trainer, items: list[tuple[Request, int]], options: Options) -> list[dict]:
    """A sample for each item, as lines of the output; of several workers each draws some."""
    index, count = trainer.strategy.batch_shard
    own = items[index::count]
    drawn = own or items[:1]  # a worker with none of them keeps the others company
    collate = get_collate_fn(trainer.tokenizer)
    batch = collate([{"prompt_input_ids": r.ids, "prompt_attention_mask": [1] * len(r.ids)} for r, _ in drawn])
    batch = slice_and_move_batch_for_device(batch, 0, 1, trainer.device)
    trainer.policy.eval()
    seeds = [seed_of(trainer.config.seed, request.index, number) for request, number in drawn]
    _, targets, is_whole = generate_scorable(
        trainer.policy, trainer.tokenizer, batch, options.max_new_tokens + batch["prompt_input_ids"].shape[1],
        lambda: trainer.strategy.stops_sampling(trainer.stop.received is not None), synced=trainer.is_sharded,
        processors=processors(options, seeds),
    )  # fmt: skip
    trainer.stop.check()
    with torch.no_grad():
        policy_logps = trainer.response_logps(trainer.policy, targets).tolist()
        reference_logps = [None] * len(drawn)
        if trainer.reference is not None:
            with trainer.reference.active() as model:
                reference_logps = trainer.response_logps(model, targets).tolist()
    lines = []
    for row, (request, number) in enumerate(own):
        ids = targets["chosen_labels"][row]
        ids = ids[ids != -100].tolist() if is_whole[row] else []
        lines.append({
            "prompt_index": request.index, "sample": number, "prompt": request.given,
            "response": trainer.tokenizer.decode(ids, skip_special_tokens=True), "n_tokens": len(ids),
            "finished": bool(ids) and ids[-1] in trainer.end_tokens,
            "policy_logps": policy_logps[row], "reference_logps": reference_logps[row],
        })  # fmt: skip
    if not trainer.is_sharded:
        return lines
    found = {
        (line["prompt_index"], line["sample"]): line for part in collectives.all_gather_object(lines) for line in part
    }
    return [found[request.index, number] for request, number in items]


def _write_alpaca_eval(path: str, output: str, checkpoint: str | None):
    with open(output, encoding="utf-8") as file:
        samples = sorted(map(json.loads, file), key=lambda line: line["prompt_index"])
    rows = [
        {"instruction": line["prompt"] if isinstance(line["prompt"], str) else line["prompt"][-1]["content"],
         "output": line["response"], "generator": checkpoint or "policy"}
        for line in samples if line["sample"] == 0
    ]  # fmt: skip
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        json.dump(rows, file, ensure_ascii=False, indent=1)
    os.replace(f"{path}.partial", path)
    rank0_print(f"Written to {path}")


if __name__ == "__main__":
    train.main(run, "sample")
