"""Errors for command-line words that Hydra can't read say what is wrong and what to type instead."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from checkpointing.archives import export_command
from commands.command_line import compose_config, for_hydra
from config_checks.overrides import explain_commas, explain_override, quoted_path, typed_string
from utils import UserError

CASES = {  # the words on the command line, separated by |, and parts of the message
    "lr=|1e-5": ["'1e-5': there is a space after '='; type lr=1e-5"],
    "lr|=|1e-5": ["'lr': there is a space before '='; type lr=1e-5"],
    "lr|=1e-5": ["'lr': there is a space before '='; type lr=1e-5"],
    "lr =1e-5": ["'lr =1e-5': there is a space before '='; type lr=1e-5"],
    "lr==1e-5": ["there are two '='; type lr=1e-5"],
    "lr:1e-5": ["settings are key=value; type lr=1e-5"],
    "lr": ["settings are given as key=value"],
    "datasets=[~user/x]": ["'~' must be quoted: put quotes '...' around the whole item"],
    "lora={r:16": ["'lora={r:16': '{' is never closed"],
    "lora={r:16}}": ["'}' closes nothing"],
    "lora={'r':16}": ["keys inside { } are written without quotes"],
    "fields={prompt=question}": ["inside { } write key:value, not key=value"],
    "datasets=[a.jsonl": ["'[' is never closed"],
    "datasets=[hh,,shp]": ["there is nothing before or after a comma"],
    "datasets=[data/{a,b}.jsonl]": ["'{' in the middle of a value must be quoted"],
    "datasets=[a]b": ["something follows the closing ']'"],
    "optimizer_args={betas:(0.9,0.95)}": ["lists are written with [ ], not with ( )"],
    "exp_name=it's": ["a quote ' in the middle of a value", typed_string("exp_name", "it's")],
    "exp_name='a": ["the quote ' is never closed"],
    "exp_name=a;b": ["';' must be quoted", "typed \"exp_name='a;b'\""],
    "exp_name=a,b": ["a list is typed 'exp_name=[a,b]', a string \"exp_name='a,b'\"", "need -m"],
    "local_run_dir=/data/run=3": ["a second '=' must be quoted", "typed \"local_run_dir='/data/run=3'\""],
}


@pytest.mark.parametrize("words", CASES)
def test_unreadable_words_are_explained(words):
    with pytest.raises(UserError) as caught:
        compose_config("model=tiny", *words.split("|"))
    for part in CASES[words]:
        assert part in str(caught.value)
    assert "hydra.cc" not in str(caught.value) and "Lexer" not in str(caught.value)


@pytest.mark.parametrize("text", ["a;b", "it's", 'a"b', "a$b!", "~x", "[a", "a=b, c", "é\\\\", "'", "50% {x}"])
def test_suggested_word_is_parsed_as_the_string(text):
    (word,) = shlex.split(typed_string("exp_name", text))
    assert OverridesParser.create().parse_override(word).value() == text


@pytest.mark.parametrize("path", ["/runs/a-1", "/it's a=b", "/home/josé/run", "/run\\step", "/it\\'s", "/run\\"])
def test_path_in_a_printed_command_is_parsed_as_the_path(path):
    assert OverridesParser.create().parse_override(f"resume={quoted_path(path)}").value() == path


def test_printed_export_command_can_be_typed_for_any_run_directory():
    python, script, *words = shlex.split(export_command("/it's a=b/step-8"))
    overrides = OverridesParser.create().parse_overrides(words)
    values = {override.key_or_group: override.value() for override in overrides}
    assert (python, script) == ("python", "export.py")
    assert values == {"run": "/it's a=b", "checkpoint": "step-8", "output": "DIR"}


@pytest.mark.parametrize(
    "word", ["datasets=[~/x]", "datasets=[a, ~/x,~/y]", "datasets=[{name: ~/x}]", "model.archive=~/x", "a='~/x'"]
)
def test_tilde_is_expanded_wherever_a_path_begins(word, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (expanded,) = for_hydra([word])
    assert "~" not in expanded and expanded == word.replace("~", "/home/me")
    assert OverridesParser.create().parse_override(expanded)


def test_words_are_explained_even_if_hydra_can_parse_them():
    assert "e.g. lr=1e-6" in explain_override("lr", ["lr"])
    assert explain_commas("a=1,2").startswith("a=1,2: a list is typed 'a=[1,2]'")
