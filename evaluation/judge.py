"""The body of `judge.py`: judge which of two models answers better, or score one with a reward model."""

import contextlib
import json
import math

from omegaconf import DictConfig, OmegaConf

from basics.files import atomic_file
from basics.printing import counted, rank0_print
from config_checks.schema import expand_home
from evaluation.chat_completions import ChatCompletions
from evaluation.judge_options import (
    check_options,
    make_judge,
    reward_model_commit,
    settings_hash,
    summary_path,
)
from evaluation.judge_summary import cost, failures_in_words, summarize, summarize_scores, table
from evaluation.origins import digest, kl_from_reference, origins
from evaluation.pairs import Pair, Task, first_shown, match, read_responses, single_responses
from evaluation.verdicts import Judge, MisassignedVerdicts, VerdictFile
from reporting.terminal import Progress
from utils import UserError

_CHARACTERS_PER_TOKEN, _TOKENS_PER_ANSWER = 4, 100  # to estimate the cost of calls beforehand


def run(config: DictConfig):
    """Check the keys, get the missing verdicts, then write and print the summary."""
    options = expand_home(OmegaConf.to_container(config, resolve=True, throw_on_missing=False))
    check_options(options)
    a = read_responses("a", options["a"])
    b = read_responses("b", options["b"]) if options["b"] is not None else None
    pairs, n_unmatched = (single_responses(a), 0) if b is None else match(a, b, options["allow_unmatched"])
    commit = reward_model_commit(options)
    settings = settings_hash(options, commit)
    lines = _judged_lines(pairs, n_unmatched, options, settings, commit)
    summary = {key: options[key] for key in ("a", "b", "judge", "judge_model")} | {"settings": settings}
    if b is None:
        summary |= summarize_scores(pairs, lines)
    else:
        summary |= {"b_digest": digest(b), "n_unmatched": n_unmatched, **summarize(pairs, lines, options)}
    summary |= {"drawn": origins(a), **kl_from_reference(a)}
    path = summary_path(options)
    with atomic_file(path) as file:
        json.dump(summary, file, ensure_ascii=False, indent=1)
    rank0_print(f"{table(summary)}\nWritten to {options['output']} and {path}")
    if lines and all(line["verdict"] is None for line in lines):
        what = "no response could be scored" if b is None else "no pair could be judged"
        raise UserError(f"{what}: {failures_in_words(summary)}")


def _judged_lines(pairs: list[Pair], n_unmatched: int, options: dict, settings: str, commit: str | None) -> list[dict]:
    """Return a line of the output file for each task; ask the judge for the verdicts that the file lacks."""
    tasks = make_tasks([pair for pair in pairs if pair.a != pair.b], options)
    verdicts = VerdictFile(options["output"], settings)
    try:
        missing = verdicts.missing(tasks)
        _print_counts(pairs, n_unmatched, len(tasks) - len(missing), options)
        if missing:
            judge = make_judge(options, commit)
            _print_expected_cost(judge, missing, options)
            _collect(judge, missing, verdicts)
        return [verdicts.lines[task.key] for task in tasks]
    finally:
        verdicts.close()


def make_tasks(pairs: list[Pair], options: dict) -> list[Task]:
    """Return the judge's tasks: each pair in an order drawn at random, or in both orders."""
    if options["both_orders"]:
        return [Task(pair, first) for pair in pairs for first in "ab"]
    if options["b"] is None:
        return [Task(pair, "a") for pair in pairs]
    return [Task(pair, first_shown(pair, options["seed"])) for pair in pairs]


def _print_counts(pairs: list[Pair], n_unmatched: int, n_kept: int, options: dict):
    if options["b"] is None:
        rank0_print(f"{counted(len(pairs), 'response')} to score; {n_kept:,} scored already")
        return
    n_identical = sum(pair.a == pair.b for pair in pairs)
    rank0_print(
        f"{counted(len(pairs), 'pair')}, {n_identical:,} of them with equal texts (ties); "
        f"{counted(n_unmatched, 'response')} without a partner; {counted(n_kept, 'verdict')} in the file"
    )


def _print_expected_cost(judge: Judge, tasks: list[Task], options: dict):
    """Print the number of calls to the endpoint and, if prices are given, their approximate cost."""
    if not isinstance(judge, ChatCompletions):
        return
    n_input = math.ceil(judge.n_characters(tasks) / _CHARACTERS_PER_TOKEN)
    n_output = _TOKENS_PER_ANSWER * len(tasks)
    text = (
        f"{counted(len(tasks), 'call')} to {judge.model} at {judge.endpoint.url}, about {n_input:,} tokens at "
        f"{_CHARACTERS_PER_TOKEN} characters each"
    )
    if (price := cost(n_input, n_output, options)) is not None:
        text += f"; with {_TOKENS_PER_ANSWER} tokens an answer they cost about {price:.2f}"
    rank0_print(text)


def _collect(judge: Judge, tasks: list[Task], verdicts: VerdictFile):
    """Ask the judge, and write the verdicts as they come."""
    size, n_failed = verdicts.size, 0
    with Progress("Judging", len(tasks), "verdicts") as progress:
        try:
            with contextlib.closing(judge.judge(tasks)) as outcomes:  # also ends a command's processes
                for task, verdict in outcomes:
                    verdicts.add(task, verdict)
                    n_failed += verdict.winner is None
                    progress.update(note=f"{n_failed} failed" if n_failed else "")
        except MisassignedVerdicts:
            verdicts.truncate(size)
            raise
