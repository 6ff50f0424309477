"""Which of two models answers better: `python judge.py a=FILE b=FILE judge=model judge_model=NAME output=FILE`.

Without `b`, what a reward model gives to the responses of `a`.
"""

import collections
import hashlib
import json
import math
import os

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from checkpointing.fingerprints import folder_fingerprint
from config_checks.explanations import unknown_key
from config_checks.numbers import check_number
from config_checks.paths import expand_home
from config_checks.schema import own_keys
from evaluation.chat_completions import ChatCompletions, check_url
from evaluation.command import Command
from evaluation.origins import digest, kl_from_reference, origins
from evaluation.pairs import Pair, Task, alone, first_shown, match, read_responses
from evaluation.prompts import load_template
from evaluation.statistics import Z, length_controlled, mean_and_error, wilson_interval
from evaluation.verdicts import Judge, MisassignedVerdicts, VerdictFile
from printing import hides_progress
from storage.files import atomic_file, sha256
from storage.outputs import Output, check_outputs, document, json_lines
from utils import UserError, closest_match, get_local_dir

_REQUIRED = ("a", "judge", "output")
_KEYS = {  # of each judge alone: those that it needs, and others
    "model": (("judge_model",), ("judge_batch_size", "chat_template")),
    "openai": (
        ("judge_url", "judge_model"),
        ("judge_prompt", "judge_args", "judge_concurrency", "judge_requests_per_minute", "judge_timeout",
         "judge_retries", "judge_input_price", "judge_output_price", "both_orders"),
    ),
    "command": (("judge_command",), ("both_orders",)),
}  # fmt: skip
_NUMBERS = {  # type, lowest, highest, whether it may be null
    "seed": (int, 0, 2**63, False),
    "judge_batch_size": (int, 1, 10**6, False),
    "judge_concurrency": (int, 1, 1000, False),
    "judge_requests_per_minute": (float, 0.01, 10**6, True),
    "judge_timeout": (float, 0.001, 10**5, False),
    "judge_retries": (int, 0, 100, False),
    "judge_input_price": (float, 0, 10**9, True),
    "judge_output_price": (float, 0, 10**9, True),
}
_VERDICTS = json_lines("verdicts", b'{"settings": "', ("texts", "prompt_index", "first", "verdict"))
_SUMMARY = document("summaries", rb'\{\s*"a": ')
_TOKEN, _ANSWER = 4, 100  # characters of a token, and tokens of an answer, to tell beforehand about what calls cost


def run(config: DictConfig):
    """Check what is asked for, let the judge decide what it hasn't decided yet, and say what it amounts to."""
    options = expand_home(OmegaConf.to_container(config, resolve=True, throw_on_missing=False))
    check_options(options)
    a = read_responses("a", options["a"])
    b = read_responses("b", options["b"]) if options["b"] is not None else None
    pairs, n_unmatched = (alone(a), 0) if b is None else match(a, b, options["allow_unmatched"])
    asked = [pair for pair in pairs if pair.a != pair.b]
    settings = settings_of(options)
    verdicts = VerdictFile(options["output"], settings)
    try:
        tasks = make_tasks(asked, options)
        left = verdicts.left(tasks)
        n_there = len(tasks) - len(left)
        print(f"{len(pairs)} responses to be scored; {n_there} scores are there" if b is None else
              f"{len(pairs)} pairs, {len(pairs) - len(asked)} of the same text twice, which are ties; {n_unmatched} "
              f"responses without a partner; {n_there} verdicts are there", flush=True)  # fmt: skip
        if left:
            judge = make_judge(options)
            announce(judge, left, options)
            collect(judge, left, verdicts)
        lines = [verdicts.lines[task.key] for task in tasks]
    finally:
        verdicts.close()
    summary = {key: options[key] for key in ("a", "b", "judge", "judge_model")} | {"settings": settings}
    if b is None:
        summary |= summarize_scores(pairs, lines)
    else:
        summary |= {"b_digest": digest(b), "n_unmatched": n_unmatched, **summarize(pairs, lines, options)}
    summary |= {"drawn": origins(a), **kl_from_reference(a)}
    path = _summary_path(options)
    with atomic_file(path) as file:
        json.dump(summary, file, ensure_ascii=False, indent=1)
    print(f"{table(summary)}\nWritten to {options['output']} and {path}", flush=True)
    if lines and all(line["verdict"] is None for line in lines):
        what = "no response could be scored" if b is None else "no pair could be judged"
        raise UserError(f"{what}: {failures_in_words(summary)}")


# ---- what is asked for ----------------------------------------------------------------------------------------------


def check_options(options: dict):
    """Raises: UserError if a key is missing, has a value of no use, or is another judge's."""
    for key in _REQUIRED:
        if options[key] in ("???", None):
            example = "python judge.py a=FILE b=FILE judge=model judge_model=NAME output=FILE"
            raise UserError(f"{key}: give it, e.g. {example}; config/judge.yaml lists all keys")
    if options["b"] is None and options["judge"] != "model":
        raise UserError("b: give the responses that those of a are compared with; judge=model alone does without")
    if options["b"] is None and options["allow_unmatched"]:
        raise UserError("allow_unmatched=true: without b no response needs a partner; leave it out")
    for key in (*_REQUIRED, "b", "judge_model", "judge_command", "judge_url", "judge_prompt", "chat_template"):
        if options[key] is not None and not isinstance(options[key], str):
            raise UserError(f"{key}={options[key]}: expected a text")
    for key in ("allow_unmatched", "both_orders"):
        if not isinstance(options[key], bool):
            raise UserError(f"{key}={options[key]}: expected true or false")
    for key, (kind, lowest, highest, may_be_null) in _NUMBERS.items():
        value = options[key]
        if value is None and may_be_null:
            continue
        check_number(key, value, kind, lowest, highest)
    if not isinstance(options["judge_args"], dict):
        raise UserError(f"judge_args={options['judge_args']}: expected fields, e.g. judge_args.max_tokens=300")
    _check_keys_of_judge(options)
    get_local_dir(options["local_dirs"])
    outputs = [Output("output", options["output"], _VERDICTS), Output("output", _summary_path(options), _SUMMARY)]
    check_outputs(outputs, {key: options[key] for key in ("a", "b")})


def _summary_path(options: dict) -> str:
    return f"{os.path.splitext(options['output'])[0]}_summary.json"


def _check_keys_of_judge(options: dict):
    name, defaults = options["judge"], own_keys("judge")
    if unknown := [key for key in options if key not in defaults]:
        raise UserError(unknown_key(unknown[0], "judge"))
    if name not in _KEYS:
        raise UserError(f"judge={name}: no such judge.{closest_match(name, _KEYS)} There are: {', '.join(_KEYS)}")
    needed, others = _KEYS[name]
    if missing := [key for key in needed if not options[key]]:
        raise UserError(f"judge={name} needs {missing[0]}; config/judge.yaml says what it is")
    for key in dict.fromkeys(key for keys in _KEYS.values() for part in keys for key in part):
        if key not in needed + others and options[key] != defaults[key]:
            raise UserError(f"{key}={options[key]}: judge={name} has no use for it; leave it out")
    if name == "openai":
        check_url(options["judge_url"])
        load_template(options["judge_prompt"])


def settings_of(options: dict) -> str:
    """A short hash of what decides a verdict on given texts in a given order."""
    keys = ("judge", "judge_model", "judge_command", "judge_url", "judge_args", "chat_template")
    decides = [options[key] for key in keys]
    decides.append(load_template(options["judge_prompt"]) if options["judge"] == "openai" else None)
    if options["judge"] == "model" and os.path.isdir(options["judge_model"]):
        decides.append(folder_fingerprint(options["judge_model"], options["local_dirs"]))
    if options["chat_template"] is not None:
        decides.append(sha256(options["chat_template"]))
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


def make_tasks(pairs: list[Pair], options: dict) -> list[Task]:
    """What a judge is to decide: each pair in the order that is drawn for it, or in both; a response alone as it is."""
    if options["both_orders"]:
        return [Task(pair, first) for pair in pairs for first in "ab"]
    if options["b"] is None:
        return [Task(pair, "a") for pair in pairs]
    return [Task(pair, first_shown(pair, options["seed"])) for pair in pairs]


def make_judge(options: dict) -> Judge:
    if options["judge"] == "command":
        return Command(options["judge_command"])
    if options["judge"] == "openai":
        return ChatCompletions(
            check_url(options["judge_url"]), options["judge_model"], load_template(options["judge_prompt"]),
            {key: value for key, value in options["judge_args"].items() if value is not None},
            options["judge_retries"], options["judge_timeout"], options["judge_concurrency"],
            options["judge_requests_per_minute"],
        )  # fmt: skip
    from evaluation.reward_model import RewardModel  # transformers takes a while to import

    return RewardModel(
        options["judge_model"], options["judge_batch_size"], options["chat_template"],
        get_local_dir(options["local_dirs"]),
    )  # fmt: skip


# ---- judging --------------------------------------------------------------------------------------------------------


def announce(judge: Judge, tasks: list[Task], options: dict):
    """Say how many calls there will be and, where prices are given, about what they cost."""
    if not isinstance(judge, ChatCompletions):
        return
    n_input, n_output = math.ceil(judge.n_characters(tasks) / _TOKEN), _ANSWER * len(tasks)
    text = f"{len(tasks)} calls to {judge.model} at {judge.url}, about {n_input:,} tokens at {_TOKEN} characters each"
    if (price := cost(n_input, n_output, options)) is not None:
        text += f"; with {_ANSWER} tokens an answer they cost about {price:.2f}"
    print(text, flush=True)


def cost(n_input: int, n_output: int, options: dict) -> float | None:
    prices = (options["judge_input_price"], options["judge_output_price"])
    if prices == (None, None):
        return None
    return (n_input * (prices[0] or 0) + n_output * (prices[1] or 0)) / 10**6


def collect(judge: Judge, tasks: list[Task], verdicts: VerdictFile):
    """Write verdicts as they come."""
    size, n_failed = verdicts.size, 0
    with tqdm(total=len(tasks), desc="Verdicts", unit="verdict", disable=hides_progress()) as progress:
        try:
            for task, verdict in judge.judge(tasks):
                verdicts.add(task, verdict)
                n_failed += verdict.winner is None
                progress.set_postfix(failed=n_failed, refresh=False)
                progress.update()
        except MisassignedVerdicts:
            verdicts.cut(size)
            raise


# ---- what it amounts to ---------------------------------------------------------------------------------------------


def summarize(pairs: list[Pair], lines: list[dict], options: dict) -> dict:
    """Counts, win rates and what they rest on; a pair is judged if all that was asked about it has a verdict."""
    of_pair: dict[tuple[int, int], list[str | None]] = {}
    for line in lines:
        of_pair.setdefault((line["prompt_index"], line["sample"]), []).append(line["verdict"])
    decided = {(pair.index, pair.sample): "tie" for pair in pairs if pair.a == pair.b}
    for place, given in of_pair.items():
        if None not in given:
            decided[place] = given[0] if len(set(given)) == 1 else "tie"
    judged = [pair for pair in pairs if (pair.index, pair.sample) in decided]
    outcomes = [decided[pair.index, pair.sample] for pair in judged]
    scores = [{"a": 1.0, "b": 0.0, "tie": 0.5}[outcome] for outcome in outcomes]
    counts = collections.Counter(outcomes)
    kinds = collections.Counter(line["failure"] for line in lines if line["verdict"] is None)
    summary = {
        "n_pairs": len(pairs), "n_prompts": len({pair.index for pair in pairs}), "n_judged": len(judged),
        "n_failed": len(pairs) - len(judged), "failures": dict(kinds.most_common()),
        "n_identical": len(pairs) - len(of_pair), "wins": counts["a"], "ties": counts["tie"], "losses": counts["b"],
        "mean_length_a": _mean([len(pair.a) for pair in judged]),
        "mean_length_b": _mean([len(pair.b) for pair in judged]),
        "win_rate": _mean(scores), "win_rate_ci95": wilson_interval(_mean(scores), len(scores)) if scores else None,
        "length_controlled_win_rate": None, "length_controlled_win_rate_ci95": None,
    }  # fmt: skip
    if judged:
        rate, interval = length_controlled(scores, [len(pair.a) - len(pair.b) for pair in judged])
        summary |= {"length_controlled_win_rate": rate, "length_controlled_win_rate_ci95": interval}
    if options["judge"] != "model":
        summary |= _order_figures(lines, of_pair, options)
    if options["judge"] == "openai":
        n_input, n_output = (sum(line[name] for line in lines) for name in ("input_tokens", "output_tokens"))
        summary |= {"input_tokens": n_input, "output_tokens": n_output, "cost": cost(n_input, n_output, options)}
    return summary


def summarize_scores(pairs: list[Pair], lines: list[dict]) -> dict:
    """The mean of the responses' scores, and its standard error, by prompts."""
    scores = {(line["prompt_index"], line["sample"]): line["scores"][0] for line in lines if line["verdict"]}
    scored = [pair for pair in pairs if (pair.index, pair.sample) in scores]
    mean, error = mean_and_error(list(scores.values()), [index for index, _ in scores]) if scores else (None, None)
    kinds = collections.Counter(line["failure"] for line in lines if line["verdict"] is None)
    return {
        "n_responses": len(pairs), "n_prompts": len({pair.index for pair in pairs}), "n_scored": len(scored),
        "n_failed": len(pairs) - len(scored), "failures": dict(kinds.most_common()),
        "mean_length_a": _mean([len(pair.a) for pair in scored]), "score": mean, "score_se": error,
    }  # fmt: skip


def _order_figures(lines: list[dict], of_pair: dict, options: dict) -> dict:
    """How much depends on which response comes first."""
    firsts = [float(line["verdict"] == line["first"]) for line in lines if line["verdict"] in ("a", "b")]
    both = [given for given in of_pair.values() if len(given) == 2 and None not in given]
    return {
        "n_decided": len(firsts), "first_wins": _mean(firsts),
        "first_wins_ci95": wilson_interval(_mean(firsts), len(firsts)) if firsts else None,
        "agreement": _mean([float(one == other) for one, other in both]) if options["both_orders"] else None,
    }  # fmt: skip


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def failures_in_words(summary: dict) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in summary["failures"].items())


def table(summary: dict) -> str:
    """The summary as it is printed."""
    lines = _table_of_scores(summary) if summary["b"] is None else _table_of_verdicts(summary)
    if summary["kl"] is not None:
        lines.append(_mean_in_words("KL from reference", summary, "kl", "nats a response"))
    if summary["n_failed"]:
        lines.append(f"  {summary['n_failed']} {'responses' if summary['b'] is None else 'pairs'} FAILED and are not "
                     f"counted: {failures_in_words(summary)}; the same command asks about them again")  # fmt: skip
    if summary.get("input_tokens"):
        price = f", cost {summary['cost']:.2f}" if summary["cost"] is not None else ""
        lines.append(f"  {summary['input_tokens']:,} tokens sent, {summary['output_tokens']:,} received{price}")
    return "\n".join(lines)


def _table_of_scores(summary: dict) -> list[str]:
    lines = [f"\na: {summary['a']}"]
    lines.append(f"  {summary['n_scored']} responses scored, to {summary['n_prompts']} prompts")
    if summary["n_scored"]:
        lines.append(_mean_in_words("score", summary, "score", summary["judge_model"]))
        lines.append(f"  {'mean length':<20}{summary['mean_length_a']:>8.1f}   (characters)")
    return lines


def _mean_in_words(label: str, summary: dict, name: str, unit: str) -> str:
    mean, error = summary[name], summary[f"{name}_se"]
    interval = f"95 % {mean - Z * error:.4g} to {mean + Z * error:.4g} " if error is not None else ""
    return f"  {label:<20}{mean:>8.4g}   {interval}({unit})"


def _table_of_verdicts(summary: dict) -> list[str]:
    lines = [f"\na: {summary['a']}\nb: {summary['b']}"]
    lines.append(f"  {summary['n_judged']} pairs judged, of {summary['n_prompts']} prompts: a wins {summary['wins']}, "
                 f"ties {summary['ties']}, b wins {summary['losses']}")  # fmt: skip
    rows = [("win rate of a", "win_rate"), ("at equal lengths", "length_controlled_win_rate")]
    for label, name in [*rows, ("first response wins", "first_wins")]:
        if summary.get(name) is not None:
            low, high = summary[f"{name}_ci95"]
            lines.append(f"  {label:<20}{summary[name]:>8.1%}   95 % {low:.1%} to {high:.1%}")
    if summary.get("agreement") is not None:
        lines.append(f"  {'both orders agree':<20}{summary['agreement']:>8.1%}")
    if summary["n_judged"]:
        lines.append(f"  {'mean length':<20}{summary['mean_length_a']:>8.1f}   b {summary['mean_length_b']:.1f} "
                     "(characters)")  # fmt: skip
    return lines
