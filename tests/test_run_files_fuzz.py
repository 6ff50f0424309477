"""After any damage to a file of a run, resuming gives the same results or names the file."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzzing import fuzz
from hypothesis import assume, example, given
from hypothesis import strategies as st

pytestmark = pytest.mark.slow

RUN = [
    "model=tiny", "datasets=[toy]", "loss=dpo", "n_eval_examples=4", "eval_batch_size=4", "n_eval_model_samples=2",
    "lr=1e-3", "max_length=32", "max_prompt_length=24", "save_every=4", "eval_every=4", "warmup_steps=0",
]  # fmt: skip
KINDS = {"full": [], "lora": ["lora={}"]}


# ---- damage ---------------------------------------------------------------------------------------------------------


def files_in(run_dir: Path) -> list[str]:
    return sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file())


def truncate(path: Path, fraction: float):
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])


def flip(path: Path, fraction: float):
    content = bytearray(path.read_bytes())
    assume(content)
    content[int(fraction * len(content))] ^= 1 << int(fraction * 1e6) % 8
    path.write_bytes(content)


def edit_number(path: Path, fraction: float):
    """Replace one digit in a text file."""
    assume(path.suffix in (".json", ".yaml", ".jsonl"))
    text = path.read_text()
    digits = list(re.finditer(r"\d", text))
    assume(digits)
    digit = digits[int(fraction * len(digits))]
    path.write_text(f"{text[: digit.start()]}{(int(digit[0]) + 1) % 10}{text[digit.end() :]}")


def append(path: Path, _fraction: float):
    with open(path, "ab") as file:
        file.write(b"0\n")


def delete(path: Path, _fraction: float):
    path.unlink()


def make_directory(path: Path, fraction: float):
    content = path.read_bytes()
    path.unlink()
    path.mkdir()
    if fraction > 0.5:
        (path / path.name).write_bytes(content)


def make_dangling(path: Path, _fraction: float):
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES = [truncate, flip, edit_number, append, delete, make_directory, make_dangling]
fractions = st.floats(0, 1, exclude_max=True)


def of_file(name: str, damage: Callable, fraction: float) -> Callable[[Path], list[str]]:
    """Return a function that damages this file of a run directory and returns its name."""

    def apply(run_dir: Path) -> list[str]:
        damage(run_dir / name, fraction)
        return [name]

    return apply


@st.composite
def damages(draw):
    """Draw a function that damages one file of a run directory, or swaps two, and returns their names."""
    places, damage = draw(st.tuples(fractions, fractions)), draw(st.sampled_from([*DAMAGES, None]))
    fraction = draw(fractions)

    def apply(run_dir: Path) -> list[str]:
        files = files_in(run_dir)
        # choose the few files outside of checkpoints as often as the many inside
        files = [name for name in files if "/" not in name] * 4 + files
        names = [files[int(place * len(files))] for place in places]
        if damage is not None:
            damage(run_dir / names[0], fraction)
            return names[:1]
        assume(names[0] != names[1])
        first, second = ((run_dir / name).read_bytes() for name in names)
        (run_dir / names[0]).write_bytes(second)
        (run_dir / names[1]).write_bytes(first)
        return names

    apply.__name__ = f"{damage.__name__ if damage else 'swap'}({places}, {fraction})"
    return apply


# ---- results --------------------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(run_dir: Path) -> dict[str, str]:
    """Return a directory's entries: digests of files, and the kinds of links and directories."""
    kinds = {path: digest(path) if path.is_file() else str(path.is_dir()) for path in run_dir.rglob("*")}
    return {str(path.relative_to(run_dir)): kind for path, kind in kinds.items()}


def lines_of(path: Path) -> list[dict | bytes]:
    """Return the lines of a log without speeds; damaged lines as bytes."""
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            lines.append({key: value for key, value in row.items() if not key.endswith("_per_second")})
        except (ValueError, AttributeError):
            lines.append(line)
    return lines


def results(run_dir: Path) -> dict[str, object]:
    """Return metrics, samples, and digests of the last weights and the optimizer's state."""
    names = {"policy.pt", "adapter_model.safetensors", "optimizer.pt"} & set(os.listdir(run_dir / "LATEST"))
    return {
        **{name: lines_of(run_dir / f"{name}.jsonl") for name in ("metrics", "samples")},
        "state": {name: digest(run_dir / "LATEST" / name) for name in names},
    }


class Finished:
    """A finished run of each kind, and its results after resuming undamaged."""

    def __init__(self, launcher):
        self.launcher, self.runs = launcher, {}
        for kind, overrides in KINDS.items():
            run_dir = launcher.directory / kind
            assert launcher.run(*RUN, *overrides, "n_examples=8", f"local_run_dir={run_dir}") == 0, launcher.output
            shutil.copytree(run_dir, f"{run_dir}-resumed", symlinks=True)
            assert self.resume(kind, Path(f"{run_dir}-resumed")) == 0, launcher.output
            self.runs[kind] = run_dir, results(Path(f"{run_dir}-resumed"))

    def resume(self, kind: str, run_dir: Path, resume: str = "auto") -> int:
        resume = resume if resume == "auto" else run_dir / resume
        overrides = [*KINDS[kind], "n_examples=12", f"local_run_dir={run_dir}", f"resume={resume}"]
        return self.launcher.run(*RUN, *overrides)

    def check(self, kind: str, damage: Callable[[Path], list[str]], resume: str):
        """Damage a copy of the run, resume it, and check that the results are the same or the file is named."""
        whole, expected = self.runs[kind]
        run_dir = self.launcher.directory / "damaged"
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(whole, run_dir, symlinks=True)
        names = damage(run_dir)
        before = contents(run_dir)
        code, output = self.resume(kind, run_dir, resume), self.launcher.output
        assert "Traceback" not in output
        if code == 0:
            warned = [line for line in output.splitlines() if line.startswith("WARNING: ")]
            is_named = any(str(run_dir / name) in line for line in warned for name in names)
            ours = results(run_dir)
            assert ours["state"] == expected["state"]
            for name in ("metrics", "samples"):  # in a damaged log, the new lines are the same
                n_new = len(expected[name]) - len(lines_of(whole / f"{name}.jsonl"))
                assert ours[name][-n_new:] == expected[name][-n_new:]
                assert is_named or ours[name] == expected[name], names
            return
        assert code == 1
        message = output[output.index("error: ") :]
        assert any(str(run_dir / name.split("/")[0]) in message for name in names), message
        assert contents(run_dir) == before


@pytest.fixture(scope="module")
def finished(launcher):
    return Finished(launcher)


@pytest.mark.exhaustive
def test_run_with_a_damaged_file_resumes_identically_or_names_it(finished):
    @fuzz(25)
    @given(kind=st.sampled_from(list(KINDS)), damage=damages(), resume=st.sampled_from(["auto", "LATEST"]))
    @example(kind="full", damage=of_file("metrics.jsonl", truncate, 0.4), resume="auto")
    @example(kind="lora", damage=of_file("samples.jsonl", edit_number, 0.4), resume="auto")
    @example(kind="lora", damage=of_file("config.yaml", make_directory, 0.4), resume="LATEST")
    def check(kind, damage, resume):
        finished.check(kind, damage, resume)

    check()
