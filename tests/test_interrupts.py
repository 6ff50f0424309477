"""Ctrl-C and SIGTERM while a command imports its libraries end it without a traceback."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import REPOSITORY, mark_exhaustive_except

STARTED_BY_OTHERS = {"evaluation/vllm_engine.py"}
COMMANDS = [
    str(path.relative_to(REPOSITORY))
    for path in sorted({*REPOSITORY.glob("*.py"), *REPOSITORY.glob("*/*.py")})
    if '__name__ == "__main__"' in path.read_text() and path.parent.name not in ("benchmarks", "tests")
]
LIBRARIES = ("omegaconf", "hydra", "numpy", "torch")  # each command imports at least one of them


@pytest.mark.parametrize("number", mark_exhaustive_except([signal.SIGINT, signal.SIGTERM], signal.SIGINT))
@pytest.mark.parametrize("command", sorted({*COMMANDS} - STARTED_BY_OTHERS))
def test_signal_during_imports_ends_a_command_silently(command, number, tmp_path):
    for library in LIBRARIES:
        text = f"import os, time\nprint('importing', flush=True)\nos.kill(os.getpid(), {int(number)})\ntime.sleep(60)\n"
        (tmp_path / f"{library}.py").write_text(text)
    module = command.removesuffix(".py").replace("/", ".")
    words = ["-m", module] if "/" in command else [command]
    result = subprocess.run(
        [sys.executable, *words, "RUN"], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (-number, "importing\n", "")


def test_background_job_still_ignores_interrupts(tmp_path):
    code = "import signal; from basics.interrupts import *; let_interrupts_end_the_process()\n"
    code += "with interrupts_reported():\n"
    code += "    print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    result = subprocess.run(
        ["sh", "-c", "trap '' INT; exec \"$@\"", "-", sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.stdout == "True\n", result.stderr
