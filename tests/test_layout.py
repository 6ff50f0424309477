"""The layout of the code: allowed imports between modules, and uses of trainers' names."""

import ast
import graphlib
import json
import sys
from collections.abc import Iterator

import pytest
from conftest import REPOSITORY
from launcher import train_after
from test_cli import TOY

from distributed.strategies import STRATEGIES

LEVELS = [  # modules and folders: each imports only from levels below it; modules of one folder import each other
    {"train", "evaluate", "sample", "judge", "export"},
    {"trainers"},
    {"evaluation"},
    {"models"},
    {"acceleration"},
    {"commands"},
    {"checkpointing"},
    {"config_checks"},
    {"preference_datasets"},
    {"references", "optimization"},
    {"data"},
    {"reporting"},
    {"distributed"},
    {"log_probabilities", "losses"},
    {"objectives"},
    {"utils"},
    {"basics"},
]
FOLDERS = [path.parent for path in REPOSITORY.glob("*/__init__.py")]
MODULES = {  # their syntax trees by their names
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
    for path in [*REPOSITORY.glob("*.py"), *(path for folder in FOLDERS for path in folder.glob("**/*.py"))]
}


def imported(node: ast.AST, in_functions: bool) -> Iterator[str]:
    """Return a module's imports, `from a import b` as `a.b`; with `in_functions`, also those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        elif in_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imported(child, in_functions)


def modules_imported(module: str, in_functions: bool = True) -> set[str]:
    """Return the repository's modules and folders that a module imports."""
    names = [name.split(".") for name in imported(MODULES[module], in_functions)]
    return {".".join(parts[:n]) for parts in names for n in range(1, len(parts) + 1)} & MODULES.keys() - {module}


def level(module: str) -> int:
    """Return a module's level, counted from the top."""
    (number,) = (n for n, names in enumerate(LEVELS) if module.split(".")[0] in names)
    return number


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_from_levels_below(module):
    folder = module.split(".")[0]
    for name in modules_imported(module):
        assert level(name) > level(module) or name.split(".")[0] == folder, name


def test_imports_are_not_circular():
    graphlib.TopologicalSorter({module: modules_imported(module) for module in MODULES}).prepare()


@pytest.mark.parametrize("module", ["losses", *(module for module in MODULES if module.startswith("objectives."))])
def test_losses_need_only_torch(module):
    packages = {name.split(".")[0] for name in imported(MODULES[module], in_functions=True)}
    assert packages - sys.stdlib_module_names <= {"torch", "objectives"}


SLOW_TO_IMPORT = ("transformers", "datasets", "accelerate", "torch.distributed.tensor", "torch.distributed.fsdp")


@pytest.mark.parametrize("command", sorted(LEVELS[0]))
def test_config_is_checked_before_slow_libraries_are_imported(command):
    reached, ahead = set(), [command]
    while ahead:
        reached.add(module := ahead.pop())
        ahead += modules_imported(module, in_functions=False) - reached
    assert "config_checks.schema" in reached
    for module in reached:
        names = list(imported(MODULES[module], in_functions=False))
        assert not [name for name in names if name.startswith(SLOW_TO_IMPORT)], module


@pytest.mark.parametrize("module", MODULES)
def test_libraries_that_few_runs_need_are_imported_inside_functions(module):
    parts = {part for name in imported(MODULES[module], in_functions=False) for part in name.split(".")}
    assert not parts & {"wandb", "peft", "matplotlib", "tensorboard"}


@pytest.mark.parametrize("module", [module for module in MODULES if module != "distributed.strategies"])
def test_only_strategies_compare_with_a_trainers_name(module):
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Compare | ast.pattern):
            constants = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
            assert not constants & STRATEGIES.keys(), f"line {node.lineno}"


# ---- the modules to read first --------------------------------------------------------------------------------------

READ_FIRST = {  # README: "Read these, in this order"
    "train", "preference_datasets", "models", "log_probabilities", "losses", "references", "trainers", "optimization",
    "utils",
}  # fmt: skip
COMMANDS = {"evaluate", "sample", "judge", "export"}

RECORD_FRAMES = """
import inspect, json, sys, threading
from pathlib import Path
import torch
import torch.nn.functional as F

entered = set()

def note(frame, event, _):
    if event == "call":
        entered.add(frame.f_code)

def place(code):
    path = Path(code.co_filename)
    if path.is_relative_to({repository!r}) and "tests" not in path.parts:
        return str(path.relative_to({repository!r}))

def is_function(code):  # no lambda, comprehension, class or module
    return code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<")

def recorded(function):
    def call(*args, **kwargs):
        frames, frame = [], sys._getframe(1)
        while frame is not None:
            if place(frame.f_code):
                frames.insert(0, f"{{place(frame.f_code)}} {{frame.f_code.co_name}}")
            frame = frame.f_back
        if "trainers.py train_step" in frames:
            sys.setprofile(None)
            functions = [code for code in entered if place(code) and is_function(code)]
            names = [f"{{place(code)}} {{code.co_qualname}}" for code in functions]
            Path({output!r}).write_text(json.dumps([frames, names]))
            sys.exit(0)
        return function(*args, **kwargs)
    return call

torch.Tensor.log_softmax, F.cross_entropy = recorded(torch.Tensor.log_softmax), recorded(F.cross_entropy)
threading.setprofile(note)
sys.setprofile(note)
"""
MOST_FUNCTIONS, MOST_FILES = 311, 55  # entered before the first step's log-softmax, evaluation and samples included


def test_root_holds_only_the_modules_to_read_first_and_the_commands():
    assert {path.stem for path in REPOSITORY.glob("*.py")} == READ_FIRST | COMMANDS


@pytest.mark.parametrize("name", sorted(COMMANDS - {"export"}))
def test_commands_are_thin(name):
    assert len((REPOSITORY / f"{name}.py").read_text().splitlines()) <= 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "most"), [(["shared_prompt=false", "padding_free=false"], 12), ([], 14)], ids=["plain", "fast"]
)
def test_few_functions_run_before_the_first_step_and_few_frames_lie_above_its_log_softmax(
    overrides, most, launcher, tmp_path
):
    output = tmp_path / "frames.json"
    script = train_after(RECORD_FRAMES.format(repository=str(REPOSITORY), output=str(output)), tmp_path)
    assert launcher.run(*TOY, "loss=dpo", *overrides, script=script) == 0, launcher.output
    frames, functions = json.loads(output.read_text())
    assert frames[0] == "train.py <module>" and len(frames) <= most, "\n".join(frames)
    files = {function.split()[0] for function in functions}
    assert len(functions) <= MOST_FUNCTIONS and len(files) <= MOST_FILES, "\n".join(sorted(functions))
