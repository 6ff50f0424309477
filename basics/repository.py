"""Where this repository is, for commands that start in any directory."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def python_path() -> str:
    """Return the PYTHONPATH with which another process finds this repository's modules, wherever it starts."""
    return os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
