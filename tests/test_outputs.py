"""No command overwrites a file that it did not write: every command, with every file and directory it can write."""

import ast
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY
from omegaconf import OmegaConf

import export
from basics.outputs import (
    Output,
    check_outputs,
    refuse_nonempty_directory,
    refuse_unless_new_run,
    refuse_unless_resumed_run,
)
from checkpointing.atomic_directory import atomic_directory
from checkpointing.checkpoints import delete_oldest
from config_checks.schema import expand_home, own_keys
from evaluation import evaluate, judge_options, sample_options
from reporting import curves, win_rates
from utils import UserError

SAMPLES = '{"settings": "0123456789ab", "prompt_index": 0, "sample": 0, "prompt": "p", "response": "r"}\n'
VERDICTS = '{"settings": "0123456789ab", "texts": "0", "prompt_index": 0, "sample": 0, "first": "a", "verdict": "a"}\n'
EVALUATIONS = '{"key": "0", "metrics": {}}\n'
SUMMARY = json.dumps({"a": "x", "b": None}, indent=1)
ALPACA_EVAL = json.dumps([{"instruction": "i", "output": "o", "generator": "g"}], indent=1)
OWN_PICTURE = b"\x89PNG\r\n\x1a\n....tEXtCreator\0direct-preference-optimization"
EVERYTHING = {
    "samples": SAMPLES, "verdicts": VERDICTS, "evaluations": EVALUATIONS, "a summary": SUMMARY,
    "AlpacaEval's outputs": ALPACA_EVAL, "a picture": OWN_PICTURE, "a text": "my notes\n",
    "a text without a line end": "my notes", "rows": '{"prompt": "p", "chosen": "c"}\n', "JSON": "[1, 2]",
    "bytes": b"\xff\xfe\0",
    "a photo": b"\x89PNG\r\n\x1a\n....IDAT", "a long line": "x" * 10**6, "YAML": "seed: 0\n",
}  # fmt: skip


# ---- files ----------------------------------------------------------------------------------------------------------


def evaluate_with(key: str, path: Path):
    evaluate.make_options(None, {"run": None, "rows": None, "output": None} | {key: str(path)}, [None])


def sample_with(key: str, path: Path):
    own = own_keys("sample") | {"output": str(path.parent / "other.jsonl"), "max_new_tokens": 4} | {key: str(path)}
    config = OmegaConf.create({"model": {}, "lora": None})
    sample_options.make_options(config, own, [None])


def judge_with(key: str, path: Path):
    given = {"a": str(path.parent / "a.jsonl"), "judge": "model", "judge_model": "nobody/nothing"}
    output = path if key == "output" else Path(str(path).removesuffix("_summary.json") + ".jsonl")
    judge_options.check_options(own_keys("judge") | given | {"output": str(output)})


def reporting_with(main: Callable, *words: str) -> Callable[[str, Path], None]:
    def run(_key: str, path: Path):
        message = main([*words, str(path)])
        if message != BEYOND:
            raise UserError(message)

    return run


BEYOND = "error: beyond the check"  # raised instead of the command's work once the output has been accepted
FILES = {  # (module, key) of each `Output` -> command, key, name of the file, and contents that may be overwritten
    ("evaluation/evaluate.py", "rows"): (evaluate_with, "rows", "x.jsonl", set()),
    ("evaluation/evaluate.py", "output"): (evaluate_with, "output", "x.jsonl", {"evaluations"}),
    ("evaluation/sample_options.py", "output"): (sample_with, "output", "x.jsonl", {"samples"}),
    ("evaluation/sample_options.py", "alpaca_eval"): (sample_with, "alpaca_eval", "x.json", {"AlpacaEval's outputs"}),
    ("evaluation/judge_options.py", "output"): (judge_with, "output", "x.jsonl", {"verdicts"}),
    ("evaluation/judge_options.py", "the summary of output"): (
        judge_with, "summary", "x_summary.json", {"a summary"}
    ),
    ("reporting/curves.py", "--output"): (
        reporting_with(curves.main, "RUN", "--output"), "--output", "x.png", {"a picture"}
    ),
    ("reporting/summaries.py", "--output"): (
        reporting_with(win_rates.main, "S", "--output"), "--output", "x.png", {"a picture"}
    ),
}  # fmt: skip
DIRECTORIES = {("export.py", "output"), ("train.py", "local_run_dir")}  # tested at the end
OUTPUTS = {f"{Path(module).stem} {key}": case for (module, key), case in FILES.items()}


@pytest.fixture(autouse=True)
def accepted(monkeypatch):
    """End reporting commands where their work would begin."""

    def end(*_, **__):
        raise OSError("beyond the check")

    for name in ("reporting.curves.draw", "reporting.summaries.read_summaries"):
        monkeypatch.setattr(name, end)
    monkeypatch.setattr("reporting.curves.find_runs", lambda _: [None])


@pytest.mark.parametrize("output", OUTPUTS)
def test_existing_file_is_refused_unless_the_same_command_wrote_it(output, tmp_path):
    check, key, name, own = OUTPUTS[output]
    path = tmp_path / name
    check(key, path)
    for kind, content in EVERYTHING.items():
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        before = path.read_bytes()
        if kind in own:
            check(key, path)
        else:
            with pytest.raises(UserError, match=f"{path}"):
                check(key, path)
        assert path.read_bytes() == before, kind
    path.write_bytes(b"")
    if output != "evaluate rows":
        check(key, path)


@pytest.mark.parametrize("output", OUTPUTS)
def test_name_too_long_for_the_suffix_of_an_unfinished_file_is_refused(output, tmp_path):
    check, key, name, _ = OUTPUTS[output]
    suffix = name.removeprefix("x")
    longest = 238 - (len("_summary") if output == "judge_options output" else 0)
    check(key, tmp_path / f"{'x' * (longest - len(suffix))}{suffix}")
    with pytest.raises(UserError, match=r"the name has 2\d\d bytes; give one of at most 238"):
        check(key, tmp_path / f"{'x' * (239 - len(suffix))}{suffix}")


@pytest.mark.parametrize("output", OUTPUTS)
def test_path_that_is_a_directory_or_a_broken_link_or_in_no_folder_is_refused(output, tmp_path):
    check, key, name, _ = OUTPUTS[output]
    (tmp_path / "directory" / name).mkdir(parents=True)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / name).symlink_to("nowhere")
    for folder in ("directory", "link", "missing"):
        with pytest.raises(UserError, match=f"{tmp_path}/{folder}"):
            check(key, tmp_path / folder / name)


@pytest.mark.parametrize("output", OUTPUTS)
def test_file_in_a_checkpoint_is_refused(output, tmp_path):
    check, key, name, _ = OUTPUTS[output]
    with atomic_directory(str(tmp_path / "LATEST")) as partial:
        Path(partial, "state.json").write_text("{}")
    (tmp_path / "LATEST/inner").mkdir()
    for folder in ("LATEST", "LATEST/inner"):
        with pytest.raises(UserError, match="LATEST is a checkpoint's directory, which is replaced as a whole"):
            check(key, tmp_path / folder / name)


@pytest.mark.parametrize("output", [name for name, case in OUTPUTS.items() if case[2] == "x.jsonl"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "config.yaml", "curves.png", "step-4"])
def test_file_that_a_run_writes_itself_is_refused(output, name, tmp_path):
    check, key, *_ = OUTPUTS[output]
    (tmp_path / "config.yaml").write_text(f"local_run_dir: {tmp_path}\n")
    with pytest.raises(UserError, match=r"the run itself writes this file|it exists"):
        check(key, tmp_path / name)


def test_output_that_is_an_input_or_another_output_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(SAMPLES)
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    with pytest.raises(UserError, match=r"output=.*link\.jsonl is also the file of a"):
        judge_with("output", tmp_path / "link.jsonl")
    with pytest.raises(UserError, match="is also the file of a"):
        judge_with("output", tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="is also the file of rows"):
        evaluate.make_options(None, {"run": None, "rows": f"{tmp_path}/x", "output": f"{tmp_path}/x"}, [None])
    with pytest.raises(UserError, match="is also the file of output"):
        own = own_keys("sample") | {"max_new_tokens": 4, "output": f"{tmp_path}/x", "alpaca_eval": f"{tmp_path}/x"}
        sample_options.make_options(OmegaConf.create({"model": {}, "lora": None}), own, [None])


def calls(is_wanted: Callable[[ast.Call], object]) -> list[tuple[str, object]]:
    """Return the module of each call in the repository for which `is_wanted` returns a true value, and that value."""
    found = []
    for path in sorted([*REPOSITORY.glob("*.py"), *REPOSITORY.glob("*/*.py")]):
        module = path.relative_to(REPOSITORY)
        if module.parts[0] not in ("tests", "benchmarks"):
            nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            found += [(str(module), wanted) for node in nodes if (wanted := is_wanted(node))]
    return found


def test_each_output_of_each_command_is_tested_here():
    """FILES and DIRECTORIES list every `Output` in the code."""
    found = calls(lambda call: getattr(call.func, "id", None) == "Output" and ast.literal_eval(call.args[0]))
    assert set(found) == FILES.keys() | DIRECTORIES


def test_files_are_opened_for_writing_only_in_the_listed_places():
    """Add a place to the list only if the file is an `Output`, or in a directory that only this program writes.

    Open it with `atomic_file` or `append_json_lines`, whose errors name the file and the remedy.
    """

    def opens(call: ast.Call) -> str | None:
        name = getattr(call.func, "id", None) or getattr(call.func, "attr", None)
        modes = [arg.value for arg in call.args[1:2] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        if name in ("atomic_file", "append_json_lines", "append_whole", "OSFile", "save_file"):
            return name
        return "open" if name == "open" and any(set("wax+") & set(mode) for mode in modes) else None

    found: dict[str, list] = {}
    for module, name in calls(opens):
        found.setdefault(module, []).append(name)
    assert {module: sorted(names) for module, names in found.items()} == {
        # outputs of commands
        "evaluation/evaluate.py": ["append_json_lines", "atomic_file"], "evaluation/judge.py": ["atomic_file"],
        "evaluation/sample.py": ["append_json_lines"], "evaluation/sample_file.py": ["atomic_file", "atomic_file"],
        "evaluation/verdicts.py": ["append_whole"],
        "reporting/curves.py": ["atomic_file"],
        # in a run's or a sweep's directory
        "commands/run_directory.py": ["atomic_file"], "commands/sweeps.py": ["append_json_lines"],
        "reporting/run_log.py": ["append_json_lines", "append_json_lines", "open"],
        "basics/links.py": ["open"], "basics/locks.py": ["open"],
        # in the unfinished directory of a checkpoint, an export or a job of vLLM
        "basics/checksums.py": ["open"], "checkpointing/archives.py": ["open"],
        "checkpointing/checkpoints.py": ["open"], "checkpointing/model_files.py": ["open", "save_file"],
        "checkpointing/sharded.py": ["open", "save_file"], "checkpointing/train_state.py": ["open"],
        "evaluation/vllm_engine.py": ["open", "open"],
        # in local_dirs
        "acceleration/reference_cache.py": ["atomic_file"], "data/preparation.py": ["OSFile", "open"],
        "data/shared_text.py": ["OSFile"],
        # the functions that the others call, and /dev/null
        "basics/files.py": ["append_json_lines", "append_whole", "open", "open", "open"],
        "commands/output.py": ["open"],
    }  # fmt: skip


# ---- directories ----------------------------------------------------------------------------------------------------


def fill(path: Path, kind: str):
    if kind == "directory":
        path.mkdir(parents=True)
        (path / "thesis.txt").write_text("mine")
    elif kind == "link":
        (path.parent / "elsewhere").mkdir(exist_ok=True)
        path.symlink_to("elsewhere")
    else:
        path.write_text("mine")


@pytest.mark.parametrize(
    "refusal", [refuse_unless_new_run, refuse_unless_resumed_run], ids=["resume=null", "resume=auto"]
)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("LATEST", "directory"), ("step-16", "directory"), ("BEST", "directory"), ("BEST", "link"), ("LATEST", "file"),
        ("LATEST.replaced", "directory"), ("step-16.replaced", "file"),
        ("metrics.jsonl", "file"), ("samples.jsonl", "file"), ("curves.png", "file"), ("config.yaml", "file"),
        ("config.yaml", "directory"), ("metrics.jsonl", "directory"),
    ],
)  # fmt: skip
def test_run_directory_with_foreign_files_is_refused(name, kind, refusal, tmp_path):
    fill(tmp_path / name, kind)
    with pytest.raises(UserError, match=f"local_run_dir={tmp_path}: {tmp_path}/{name} (is|was) not"):
        check_outputs([Output("local_run_dir", str(tmp_path), refusal)])


@pytest.mark.parametrize("refusal", [refuse_nonempty_directory, refuse_unless_new_run, refuse_unless_resumed_run])
@pytest.mark.parametrize("name", ["step-8", "BEST", "LATEST/new", "step-4/new/run", "link/new"])
def test_directory_that_a_run_replaces_is_refused(name, refusal, tmp_path):
    (tmp_path / "config.yaml").write_text(f"local_run_dir: {tmp_path}\n")
    with atomic_directory(str(tmp_path / "step-4")) as partial:
        Path(partial, "state.json").write_text("{}")
    (tmp_path / "LATEST").symlink_to("step-4")
    (tmp_path / "link").symlink_to("step-4", target_is_directory=True)
    with pytest.raises(
        UserError, match=r"the run itself writes this file|is a checkpoint's directory, which is replaced"
    ):
        check_outputs([Output("output", str(tmp_path / name), refusal)])
    check_outputs([Output("output", str(tmp_path / "beside"), refusal)])


def test_file_may_be_written_into_a_directory_that_cannot_be_listed(tmp_path, monkeypatch):
    def listdir(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", listdir)
    evaluate_with("output", tmp_path / "step-1")


def test_empty_path_is_refused(tmp_path):
    with pytest.raises(UserError, match="output= is empty: give a path, or leave it out"):
        expand_home({"run": str(tmp_path), "output": ""})


def test_directory_with_other_names_may_become_a_run(tmp_path):
    for name in ("notes.txt", "LATEST.old", "step-by-step", "data.jsonl"):
        fill(tmp_path / name, "file")
    for refusal in (refuse_unless_new_run, refuse_unless_resumed_run):
        check_outputs([Output("local_run_dir", str(tmp_path), refusal)])


def test_run_that_has_a_foreign_checkpoint_is_not_resumed(tmp_path):
    (tmp_path / "config.yaml").write_text(f"local_run_dir: {tmp_path}\n")
    (tmp_path / "metrics.jsonl").write_text("damaged")
    with atomic_directory(str(tmp_path / "step-4")) as partial:
        Path(partial, "state.json").write_text("{}")
    (tmp_path / "LATEST").symlink_to("step-4")
    check_outputs([Output("local_run_dir", str(tmp_path), refuse_unless_resumed_run)])
    with pytest.raises(UserError, match=r"it holds another run; .*resume=auto"):
        check_outputs([Output("local_run_dir", str(tmp_path), refuse_unless_new_run)])
    fill(tmp_path / "step-16", "directory")
    with pytest.raises(UserError, match=f"{tmp_path}/step-16 was not written by a run"):
        check_outputs([Output("local_run_dir", str(tmp_path), refuse_unless_resumed_run)])


def test_deleting_old_checkpoints_spares_best_and_foreign_directories(tmp_path):
    for step in (4, 8, 12, 16):
        with atomic_directory(str(tmp_path / f"step-{step}")) as partial:
            Path(partial, "state.json").write_text("{}")
    fill(tmp_path / "step-6", "directory")
    (tmp_path / "step-10").symlink_to("step-12")
    (tmp_path / "BEST").symlink_to("step-4")
    delete_oldest(str(tmp_path), 1, 16)
    assert sorted(os.listdir(tmp_path)) == ["BEST", "step-10", "step-16", "step-4", "step-6"]
    assert (tmp_path / "step-6/thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["file", "directory", "run"])
def test_export_writes_only_into_a_new_or_empty_directory(name, tmp_path):
    (tmp_path / "file").write_text("mine")
    fill(tmp_path / "directory", "directory")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("local_run_dir: x")
    options = {"run": f"{tmp_path}/run", "checkpoint": "LATEST", "output": f"{tmp_path}/{name}"}
    with pytest.raises(UserError, match=f"output={tmp_path}/{name}: (it is not a directory|the directory exists)"):
        export.run(OmegaConf.create(options))
