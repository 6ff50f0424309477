"""Run a command on a terminal of a given size, and return the lines that the terminal shows."""

import fcntl
import os
import pty
import select
import struct
import termios
from dataclasses import dataclass

import pyte
from launcher import TIMEOUT, Launcher


@dataclass
class Screen:
    """All lines, including those that have scrolled away; the raw output; the exit code."""

    lines: list[str]
    sent: bytes
    code: int

    def rows(self, *beginnings: str) -> list[list[str]]:
        """Return the words of lines that begin with one of these."""
        return [line.split() for line in self.lines if line.lstrip().startswith(beginnings)]


def run_on_terminal(launcher: Launcher, *overrides: str, columns: int, env: dict[str, str] | None = None) -> Screen:
    """Run `train.py` with all three streams on a pseudo-terminal, without input."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {"TERM": "xterm-256color", "COLUMNS": "", **(env or {})}
    run = launcher.start(*overrides, terminal=os.ttyname(terminal), env=env)
    os.close(terminal)
    screen, sent = pyte.HistoryScreen(columns, 40, history=10_000), b""
    stream = pyte.ByteStream(screen)
    while True:
        assert select.select([controller], [], [], TIMEOUT)[0], "\n".join(screen.display)
        try:
            data = os.read(controller, 2**16)
        except OSError:  # the other end is closed
            break
        sent += data
        stream.feed(data)
    code = run.wait()
    os.close(controller)
    above = ["".join(line[column].data for column in range(columns)) for line in screen.history.top]
    return Screen([line.rstrip() for line in [*above, *screen.display]], sent, code)
