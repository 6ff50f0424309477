"""Printed text: control sequences and markup are escaped, secrets are masked."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from launcher import ENVIRONMENT

from basics.printing import markdown, markdown_code, printable
from checkpointing.model_card import write_card
from reporting.curves import escaped

SHOWN = {
    "a\x1b[2Jb": r"a\x1b[2Jb", "one\rtwo": r"one\rtwo", "bell\x07": r"bell\x07", "\x9b31m": r"\x9b31m",
    "gnp.\u202etxt": r"gnp.\u202etxt", "line\u2028break": r"line\u2028break", "\ud800": r"\ud800",
    "tab\tand\nline": "tab\tand\nline", "windows\r\nline": "windows\nline", "naïve 问 👩‍💻": "naïve 问 👩‍💻",
    "می‌خواهم": "می‌خواهم", "no\xa0break": "no\xa0break",
}  # fmt: skip


@pytest.mark.parametrize("text", SHOWN)
def test_control_characters_are_shown_and_other_text_stays(text):
    assert printable(text) == SHOWN[text]


@pytest.mark.parametrize("variable", ["OPENAI_API_KEY", "WANDB_API_KEY", "HF_TOKEN"])
def test_api_keys_are_masked(variable, monkeypatch):
    monkeypatch.setenv(variable, " sk-0123456789\n")
    assert printable("no such key: sk-0123456789!") == "no such key: ***!"
    monkeypatch.setenv(variable, "x")  # a key for a local server, not a secret
    assert printable("an example") == "an example"


def test_users_and_passwords_in_urls_are_masked():
    assert (
        printable("see http://me:p@ss@host:80/v1 and https://host/@me")
        == "see http://***@host:80/v1 and https://host/@me"
    )
    assert printable('{"a":"http://h","mail":"me@h"}') == '{"a":"http://h","mail":"me@h"}'


def test_markdown_escapes_markup_and_line_breaks():
    assert markdown("a|b\n<b>*c*</b> `d` [e](f) \x1b[1m") == (
        r"a\|b \<b\>\*c\*\</b\> \`d\` \[e\](f) \\x1b\[1m"
    )  # fmt: skip


def test_text_cannot_break_out_of_markdown_code():
    assert markdown_code("plain") == "`plain`"
    assert markdown_code("a`b``c\n|d") == r"```a`b``c \|d```"
    assert markdown_code("`x`") == "`` `x` ``"


def test_model_card_escapes_markup_in_names(make_trainer, tmp_path):
    trainer = make_trainer("model=tiny", "datasets=[toy]", "n_examples=8", "batch_size=4", "n_eval_examples=8")
    config, state = trainer.config.copy(), {"examples": 8, "updates": 2}
    config.model.archive, config.datasets = "evil`<script>`\x1b[2J.pt", ["a|b*c*.jsonl"]
    write_card(str(tmp_path), config, state, is_adapter=False)
    text = (tmp_path / "README.md").read_text()
    assert r"``evil`<script>`\x1b[2J.pt``" in text and "\x1b" not in text
    assert r"| a\|b\*c\*.jsonl | `a\|b*c*.jsonl` |" in text


def test_run_name_in_a_picture_is_not_read_as_a_formula(tmp_path):
    from matplotlib.figure import Figure

    figure = Figure()
    figure.text(0, 0, escaped("run$x^{2$ $\x1b"))
    figure.savefig(tmp_path / "x.png")  # an unbalanced formula would raise
    assert escaped("$a\x1b") == r"\$a\x1b"


def test_error_message_escapes_control_sequences(launcher, tmp_path):
    name = "no\x1b[2Jwhere"
    assert launcher.run(f"run='{name}'", script=REPOSITORY / "evaluate.py", in_order=True) == 1
    assert "\x1b" not in launcher.output and r"no\x1b[2Jwhere" in launcher.output
    assert not re.search("Traceback", launcher.output)


def test_too_many_open_files_are_named(tmp_path):
    script = (
        "import os, resource\n"
        "from commands.output import errors_reported\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "with errors_reported():\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (24, hard))\n"
        "    files = [os.dup(0) for _ in range(24)]\n"
    )
    env = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: too many open files: raise the limit")
    assert "Traceback" not in result.stderr and "memory" not in result.stderr


def prints_unescaped(call: ast.Call) -> bool:
    """True unless each argument of `print` is a constant, or the result of a function that escapes."""
    safe = ("printable", "warning", "format_example")  # the last two escape the text that they colour
    return not all(
        isinstance(value, ast.Constant) or (isinstance(value, ast.Call) and getattr(value.func, "id", "") in safe)
        for value in call.args
    )


def test_nothing_is_printed_unescaped():
    paths = [path for path in (*REPOSITORY.glob("*.py"), *REPOSITORY.glob("*/*.py"))
             if path.parent.name not in ("tests", "benchmarks")]  # fmt: skip
    found = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print" and prints_unescaped(node)
        if path.name != "printing.py"
    ]
    assert len(paths) > 100 and found == []
