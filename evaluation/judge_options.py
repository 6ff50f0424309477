"""The keys of `judge.py`: check them, hash the settings that decide a verdict, and make the judge."""

import hashlib
import json
import os

from basics.files import sha256
from basics.outputs import Output, check_outputs, refuse_unless_document, refuse_unless_json_lines
from checkpointing.fingerprints import folder_fingerprint
from config_checks.explanations import unknown_key
from config_checks.schema import own_keys
from config_checks.values import check_number
from data import hub
from evaluation.chat_completions import ChatCompletions, Endpoint
from evaluation.command import Command
from evaluation.prompts import load_template
from evaluation.verdicts import Judge
from utils import UserError, closest_match, get_local_dir

_REQUIRED = ("a", "judge", "output")
_KEYS = {  # for each judge: the keys that it requires, and optional keys that only some judges have
    "model": (("judge_model",), ("judge_batch_size", "chat_template")),
    "openai": (
        ("judge_url", "judge_model"),
        ("judge_prompt", "judge_args", "judge_concurrency", "judge_requests_per_minute", "judge_timeout",
         "judge_retries", "judge_input_price", "judge_output_price", "both_orders"),
    ),
    "command": (("judge_command",), ("both_orders",)),
}  # fmt: skip
_NUMBERS = {  # type, lowest, highest, True if null is allowed
    "seed": (int, 0, 2**63, False),
    "judge_batch_size": (int, 1, 10**6, False),
    "judge_concurrency": (int, 1, 1000, False),
    "judge_requests_per_minute": (float, 0.01, 10**6, True),
    "judge_timeout": (float, 0.001, 10**5, False),
    "judge_retries": (int, 0, 100, False),
    "judge_input_price": (float, 0, 10**9, True),
    "judge_output_price": (float, 0, 10**9, True),
}
_VERDICTS = refuse_unless_json_lines("verdicts", b'{"settings": "', ("texts", "prompt_index", "first", "verdict"))
_SUMMARY = refuse_unless_document("summaries", rb'\{\s*"a": ')


def check_options(options: dict):
    """Raise UserError if a key is missing, has a value that can't be used, or belongs to another judge."""
    for key in _REQUIRED:
        if options[key] in ("???", None):
            example = "python judge.py a=FILE b=FILE judge=model judge_model=NAME output=FILE"
            raise UserError(f"{key} is required, e.g. {example}; config/judge.yaml lists all keys")
    if options["b"] is None and options["judge"] != "model":
        raise UserError(
            "b is required: the file of responses to compare with those of a; only judge=model works without b"
        )
    if options["b"] is None and options["allow_unmatched"]:
        raise UserError("allow_unmatched=true has no effect without b; leave it out")
    for key in (*_REQUIRED, "b", "judge_model", "judge_command", "judge_url", "judge_prompt", "chat_template"):
        if options[key] is not None and not isinstance(options[key], str):
            raise UserError(f"{key}={options[key]}: expected a string")
    for key in ("allow_unmatched", "both_orders"):
        if not isinstance(options[key], bool):
            raise UserError(f"{key}={options[key]}: expected true or false")
    for key, (kind, lowest, highest, may_be_null) in _NUMBERS.items():
        if options[key] is not None or not may_be_null:
            check_number(key, options[key], kind, lowest, highest)
    if not isinstance(options["judge_args"], dict):
        raise UserError(f"judge_args={options['judge_args']}: expected fields, e.g. judge_args.max_tokens=300")
    _check_keys_of_judge(options)
    get_local_dir(options["local_dirs"])  # raises UserError if none can be used
    outputs = [
        Output("output", options["output"], _VERDICTS),
        Output("the summary of output", summary_path(options), _SUMMARY),
    ]
    check_outputs(outputs, {key: options[key] for key in ("a", "b")})


def summary_path(options: dict) -> str:
    """Return the path of the summary, beside the verdicts."""
    return f"{os.path.splitext(options['output'])[0]}_summary.json"


def _check_keys_of_judge(options: dict):
    name, defaults = options["judge"], own_keys("judge")
    if unknown := [key for key in options if key not in defaults]:
        raise UserError(unknown_key(unknown[0], "judge"))
    if name not in _KEYS:
        raise UserError(f"judge={name}: no such judge.{closest_match(name, _KEYS)} There are: {', '.join(_KEYS)}")
    required, optional = _KEYS[name]
    if missing := [key for key in required if not options[key]]:
        raise UserError(f"judge={name} needs {missing[0]}; config/judge.yaml says what it is")
    for keys in _KEYS.values():
        for key in (*keys[0], *keys[1]):
            if key not in required + optional and options[key] != defaults[key]:
                raise UserError(f"{key}={options[key]}: not used with judge={name}; leave it out")
    if name == "openai":  # both raise UserError if their value can't be used
        Endpoint(options["judge_url"])
        load_template(options["judge_prompt"])


def reward_model_commit(options: dict) -> str | None:
    """Return the reward model's commit; None if it isn't from the hub, or if the commit isn't known."""
    if options["judge"] != "model" or os.path.isdir(options["judge_model"]):
        return None
    return hub.current_commit(options["judge_model"], get_local_dir(options["local_dirs"]))


def settings_hash(options: dict, commit: str | None) -> str:
    """Return a short hash of the settings that, besides the texts and their order, decide a verdict.

    Args:
        commit: see `reward_model_commit`.
    """
    keys = ("judge", "judge_model", "judge_command", "judge_url", "judge_args", "chat_template")
    deciding = [options[key] for key in keys]
    deciding.append(load_template(options["judge_prompt"]) if options["judge"] == "openai" else None)
    if options["judge"] == "model" and os.path.isdir(options["judge_model"]):
        deciding.append(folder_fingerprint(options["judge_model"], options["local_dirs"]))
    if commit is not None:
        deciding.append(commit)
    if options["chat_template"] is not None:
        deciding.append(sha256(options["chat_template"]))
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:12]


def make_judge(options: dict, commit: str | None) -> Judge:
    """Make the judge that the checked options select; `commit`: see `reward_model_commit`."""
    if options["judge"] == "command":
        return Command(options["judge_command"])
    if options["judge"] == "openai":
        return ChatCompletions(
            Endpoint(options["judge_url"]), options["judge_model"], load_template(options["judge_prompt"]),
            {key: value for key, value in options["judge_args"].items() if value is not None},
            options["judge_retries"], options["judge_timeout"], options["judge_concurrency"],
            options["judge_requests_per_minute"],
        )  # fmt: skip
    from evaluation.reward_model import RewardModel  # transformers takes a while to import

    return RewardModel(
        options["judge_model"], options["judge_batch_size"], options["chat_template"],
        get_local_dir(options["local_dirs"]), commit,
    )  # fmt: skip
