"""The body of `evaluate.py`: means with intervals, over all examples, by dataset, and by length."""

import dataclasses
import hashlib
import json
import os

import numpy as np
from omegaconf import DictConfig, OmegaConf

from basics.files import append_json_lines, atomic_file, json_line, read_json_lines, write_errors_named
from basics.locks import in_turn
from basics.outputs import Output, check_outputs, refuse_existing_file, refuse_unless_json_lines
from basics.printing import counted
from checkpointing import fingerprints
from checkpointing.integrity import content_digest
from data.batches import chosen_and_rejected
from distributed import collectives
from evaluation.statistics import mean_and_error, wilson_interval
from reporting.intervals import mean_interval
from reporting.metric_names import ACCURACY, LOSS, MARGIN, TIES
from reporting.metrics import mean_metrics
from utils import UserError, on_rank0, rank0_print

_IN_TABLE = (LOSS, ACCURACY, MARGIN, "nll_eval/chosen", "nll_eval/rejected")
_SHARES = (ACCURACY, TIES)  # metrics that are 0 or 1 for each example
_N_BUCKETS = 4
_EVALUATIONS = refuse_unless_json_lines("evaluations", b'{"key": "', ("key", "metrics"))


@dataclasses.dataclass
class Options:
    """The checked values of `evaluate.py`'s own keys."""

    checkpoints: list[str | None]  # directories; None means the policy as loaded
    rows: str | None
    output: str | None


def make_options(_config: DictConfig, own: dict, checkpoints: list[str | None]) -> Options:
    """Return the options of `evaluate.py`; raise UserError if a file can't be written."""
    run_dir = own["run"]
    if own["rows"] is not None and len(checkpoints) > 1:
        raise UserError(f"rows={own['rows']}: give one checkpoint at a time")
    output = own["output"] or (os.path.join(str(run_dir), "evaluations.jsonl") if run_dir is not None else None)
    outputs = [Output("rows", str(own["rows"]), refuse_existing_file)] if own["rows"] is not None else []
    if output is not None:
        outputs.append(Output("output", str(output), _EVALUATIONS))
    check_outputs(outputs)
    return Options(checkpoints, own["rows"] and str(own["rows"]), output and str(output))


# ---- evaluating -----------------------------------------------------------------------------------------------------


def evaluate_checkpoints(trainer, options: Options):
    """Evaluate each checkpoint whose figures aren't in the output file yet; print and write them."""
    from checkpointing.restoring import load_checkpoint  # takes seconds to import

    earlier = _read_evaluations(options.output) if on_rank0() else {}
    with trainer.stop:
        trainer.precompute_reference()
        for checkpoint in options.checkpoints:
            if checkpoint is not None:
                load_checkpoint(trainer, checkpoint)
            key = _settings_hash(trainer.config, checkpoint, trainer)
            result = collectives.broadcast_object(earlier.get(key))
            if result is None or options.rows is not None:
                _evaluate(trainer, key, checkpoint, options)
            else:
                name = _model_name(checkpoint)
                rank0_print(f"{name}: already evaluated; showing the figures in {options.output}{table(result)}")


def _settings_hash(config: DictConfig, checkpoint: str | None, trainer) -> str:
    """Hash everything that an evaluation's figures depend on."""
    settings = ("loss", "max_length", "max_prompt_length", "n_eval_examples", "eval_batch_size", "seed", "reference",
                "reference_model", "add_bos", "trainer", "truncation", "model", "shared_prompt")  # fmt: skip
    deciding = [
        checkpoint and content_digest(checkpoint),
        {name: OmegaConf.to_container(config)[name] for name in settings},
        trainer.eval_iterator.fingerprints(),
        fingerprints.file_fingerprints(config),
        fingerprints.hub_revisions(config),
    ]
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _read_evaluations(output: str | None) -> dict[str, dict]:
    """Return the evaluations in a file, by their keys."""
    found = {}
    if output is not None and os.path.exists(output):
        for result, _ in read_json_lines(output, skips_damaged=True):
            if "key" in result:
                found[result["key"]] = result
    return found


def _evaluate(trainer, key: str, checkpoint: str | None, options: Options):
    """Evaluate the current policy, print the figures, and write them."""
    all_metrics, indices = trainer.evaluate_examples()
    metrics = mean_metrics(all_metrics, trainer.n_eval_examples)
    rows = _gather_rows(trainer, all_metrics, indices)
    if not on_rank0():
        return
    examples = trainer.eval_iterator.examples()
    groups = {f"dataset {name}": [i for i in rows if examples[i][0].dataset == name] for name in
              dict.fromkeys(prompt.dataset for prompt, _ in examples)}  # fmt: skip
    groups |= _length_buckets(rows)
    result = {
        "key": key,
        "checkpoint": checkpoint,
        "examples": trainer.state.examples,
        "updates": trainer.state.updates,
        "n_eval_examples": len(rows),
        "metrics": {**metrics, **{f"{name}_ci95": _interval(name, [row[name] for row in rows.values()])
                                  for name in next(iter(rows.values()))}},
        "groups": {name: _figures([rows[i] for i in members]) for name, members in groups.items() if members},
    }  # fmt: skip
    rank0_print(table(result))  # first, so that a full disk doesn't lose it
    if options.output is not None:
        _record(options.output, result)
    if options.rows is not None:  # last, because once this file exists, the same command is refused
        _write_rows(options.rows, rows, examples, trainer.eval_iterator.sft_mode)


def _record(output: str, result: dict):
    """Add an evaluation to the file, unless another process has added it in the meantime."""
    with write_errors_named(output), in_turn(output):
        if result["key"] not in _read_evaluations(output):
            append_json_lines(output, [result])
    rank0_print(f"Written to {output}")


def _gather_rows(trainer, all_metrics: list[dict], indices: list[int]) -> dict[int, dict[str, float]]:
    """Return the metrics of all workers' examples, by the example's number."""
    rows, start = {}, 0
    for metrics in all_metrics:
        columns = {name: values.cpu().double().tolist() for name, values in metrics.items()}
        count = len(next(iter(columns.values())))
        for offset in range(count):
            rows[indices[start + offset]] = {name: values[offset] for name, values in columns.items()}
        start += count
    gathered = (row for part in trainer.strategy.gather_shards(rows) for row in part.items())
    return dict(sorted(gathered))


def _length_buckets(rows: dict[int, dict[str, float]]) -> dict[str, list[int]]:
    """Group the examples by quartiles of the chosen responses' lengths; equal quartiles give fewer groups."""
    lengths = {i: int(row["lengths_eval/chosen"]) for i, row in rows.items()}
    quartiles = np.quantile(list(lengths.values()), np.linspace(0, 1, _N_BUCKETS + 1), method="higher")
    starts = sorted({int(n) for n in quartiles[:-1]})  # the shortest of each group
    ends = [start - 1 for start in starts[1:]] + [int(quartiles[-1])]
    groups = {}
    for start, end in zip(starts, ends, strict=True):
        name = f"chosen of {start} to {end} tokens" if start < end else f"chosen of {start} tokens"
        groups[name] = [i for i, n in lengths.items() if start <= n <= end]
    return groups


def _interval(name: str, values: list[float]) -> list[float] | None:
    """Return the 95 % interval of the mean: Wilson's for shares, else by the normal approximation."""
    mean, error = mean_and_error(values, range(len(values)))
    if name in _SHARES:
        return wilson_interval(mean, len(values))
    interval = mean_interval(mean, error)
    return list(interval) if interval is not None else None


def _figures(rows: list[dict[str, float]]) -> dict[str, object]:
    """Return the number of examples, and each metric's mean and standard error."""
    figures: dict[str, object] = {"n": len(rows)}
    for name in rows[0]:
        figures[name], figures[f"{name}_se"] = mean_and_error([row[name] for row in rows], range(len(rows)))
    return figures


# ---- output ---------------------------------------------------------------------------------------------------------


def _model_name(checkpoint: str | None) -> str:
    return checkpoint or "the model as it is loaded"


def table(result: dict) -> str:
    """Return the lines to print: means and 95 % intervals over all examples, and means of each group."""
    names = [name for name in _IN_TABLE if name in result["metrics"]]
    after, n = counted(result["examples"], "example"), counted(result["n_eval_examples"], "evaluation example")
    lines = [f"\n{_model_name(result['checkpoint'])}, after {after}; {n}"]
    for name in names:
        interval = result["metrics"][f"{name}_ci95"]
        shown = f"   95 % {interval[0]:.4f} to {interval[1]:.4f}" if interval is not None else ""
        lines.append(f"  {name:<26}{result['metrics'][name]:>10.4f}{shown}")
    width = max(map(len, result["groups"]))
    short = [name.replace("rewards_eval/", "").replace("_eval", "").replace("/eval", "") for name in names]
    lines.append(f"  {'':<{width}}{'n':>7}{''.join(f'{name:>14}' for name in short)}")
    for group, figures in result["groups"].items():
        cells = "".join(f"{figures[name]:>14.4f}" for name in names)
        lines.append(f"  {group:<{width}}{figures['n']:>7}{cells}")
    return "\n".join(lines)


def _write_rows(path: str, rows: dict[int, dict[str, float]], examples: list, sft_mode: bool):
    """Write a line per example: its place in the data, its texts, its metrics."""
    with atomic_file(path, binary=True) as file:
        for index, metrics in rows.items():
            prompt, pair = examples[index]
            chosen, rejected = chosen_and_rejected(prompt, pair, sft_mode)[0]
            texts = {"prompt": prompt.text, "chosen": chosen} | ({} if sft_mode else {"rejected": rejected})
            row = prompt.rows[pair] if pair < len(prompt.rows) else None
            line = {"index": index, "dataset": prompt.dataset, "row": row, **texts, **metrics}
            file.write(json_line(line))
    rank0_print(f"Written to {path}")
