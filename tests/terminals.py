"""A terminal of a given size for tests: what a command leaves on it, line by line."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path

import pyte
from launcher import ENVIRONMENT, REPOSITORY, TIMEOUT


@dataclass
class Screen:
    """Its lines from the first one on, whatever has scrolled away; all that was sent to it; the exit code."""

    lines: list[str]
    sent: bytes
    code: int

    def rows(self, *beginnings: str) -> list[list[str]]:
        """The words of lines that begin with one of these."""
        return [line.split() for line in self.lines if line.lstrip().startswith(beginnings)]


def run_on_terminal(overrides: list[str], directory: Path, columns: int, env: dict[str, str] | None = None) -> Screen:
    """Run `train.py` with all three streams on a pseudo-terminal."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    command = [sys.executable, str(REPOSITORY / "train.py"), *overrides, f"local_dirs=[{directory}/cache]"]
    environment = {**os.environ, **ENVIRONMENT, "TERM": "xterm-256color", **(env or {})}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        command, cwd=directory, env=environment, stdin=terminal, stdout=terminal, stderr=terminal,
        start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    screen, sent = pyte.HistoryScreen(columns, 40, history=10_000), b""
    stream = pyte.ByteStream(screen)
    while True:
        try:
            data = os.read(controller, 2**16)
        except OSError:  # the other end is closed
            break
        sent += data
        stream.feed(data)
    code = process.wait(timeout=TIMEOUT)
    os.close(controller)
    above = ["".join(line[column].data for column in range(columns)) for line in screen.history.top]
    return Screen([line.rstrip() for line in [*above, *screen.display]], sent, code)
