"""Run `judge.py` on two small files of responses."""

import json
from pathlib import Path

from conftest import REPOSITORY
from launcher import Launcher

JUDGE = REPOSITORY / "judge.py"
ENV = {"NO_PROXY": "127.0.0.1", "OPENAI_API_KEY": ""}
FILES = ("a=a.jsonl", "b=b.jsonl", "output=v.jsonl")
A = ["yes", "quite long an answer", "no", "it is so", "same", "b is longer here", "x", "the longest of all of them"]
B = ["no, no", "short", "yes, yes", "it isn't", "same", "much, much longer is b", "yy", "not"]


def write_samples(path: Path, responses: list[str]):
    lines = [{"settings": "s", "prompt_index": i, "sample": 0, "prompt": f"\n\nHuman: say {i}\n\nAssistant:",
              "response": text} for i, text in enumerate(responses)]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Judging:
    """Runs `judge.py` in a directory with the files of A and B."""

    def __init__(self, launcher: Launcher, directory: Path):
        self.launcher, self.directory = launcher, directory
        write_samples(directory / "a.jsonl", A)
        write_samples(directory / "b.jsonl", B)

    def start(self, *overrides: str):
        """Start the command in the background; wait for it with `launcher.wait`."""
        self.launcher.start(
            *FILES, *overrides, script=JUDGE, directory=self.directory, of_training=False, env=ENV, in_order=True
        )

    def _exit_code(self, words: tuple[str, ...], env: dict[str, str] | None) -> int:
        env = ENV | (env or {})
        return self.launcher.run(
            *words, script=JUDGE, directory=self.directory, of_training=False, env=env, in_order=True
        )

    def run(self, *overrides: str, files: tuple[str, ...] = FILES, env: dict[str, str] | None = None) -> dict:
        """Run the command, and return its summary."""
        assert self._exit_code((*files, *overrides), env) == 0, self.launcher.output
        return json.loads((self.directory / "v_summary.json").read_text())

    def refusal(self, *overrides: str, files: tuple[str, ...] = FILES, env: dict[str, str] | None = None) -> str:
        """Run the command with a mistake, and return its output."""
        assert self._exit_code((*files, *overrides), env) == 1, self.launcher.output
        assert "Traceback" not in self.launcher.output
        return self.launcher.output
