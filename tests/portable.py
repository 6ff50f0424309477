"""Run commands as on a system that lacks what Windows lacks: `python portable.py '[["train.py", "key=value"], ...]'`.

Imports of Unix's modules fail in this repository's own code, and the Unix functions of `os` and `signal` are deleted.
Other packages may import Unix's modules (except pwd), because they choose their code by the system's name.
"""

import builtins
import json
import os
import runpy
import signal
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
MODULES = {"fcntl", "resource", "termios", "pwd", "grp", "pty", "tty", "syslog"}
OS_FUNCTIONS = (
    "fork", "forkpty", "register_at_fork", "killpg", "setpgrp", "setsid", "getpgid", "getuid", "geteuid", "pread",
    "pwrite", "statvfs", "mkfifo", "setpriority", "nice", "wait3", "wait4", "ST_RDONLY",
)  # fmt: skip
SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGPIPE")  # subprocess itself needs SIGKILL


def hide_unix():
    import_module = builtins.__import__

    def import_unless_hidden(name, globals=None, locals=None, fromlist=(), level=0):
        file = (globals or {}).get("__file__") or ""
        if name in MODULES and (name == "pwd" or Path(file).resolve().is_relative_to(REPOSITORY)):
            raise ImportError(f"No module named {name!r}")
        return import_module(name, globals, locals, fromlist, level)

    def symlink(*args, **kwargs):
        raise OSError("symbolic links need a privilege")

    builtins.__import__ = import_unless_hidden
    for name in OS_FUNCTIONS:
        delattr(os, name)
    os.symlink = symlink
    for name in SIGNALS:
        delattr(signal, name)


if __name__ == "__main__":
    import datasets  # noqa: F401 (libraries look for Unix's names when they are imported)
    import peft  # noqa: F401
    import torch.distributed.checkpoint  # noqa: F401

    hide_unix()
    for name, module in list(sys.modules.items()):  # imported before this process was forked
        if name != "__main__" and Path(getattr(module, "__file__", None) or "/").is_relative_to(REPOSITORY):
            del sys.modules[name]
    sys.path[0] = str(REPOSITORY)
    for name, *words in json.loads(sys.argv[1]):
        sys.argv[:] = [str(REPOSITORY / name), *words]
        runpy.run_path(sys.argv[0], run_name="__main__")
