"""`engine=vllm`: errors without vLLM, and exchanging prompts and samples with it.

vllm_stand_in.py replaces vLLM: it has the same names and arguments, and draws with transformers. vLLM itself isn't run.
"""

import shutil

import pytest
from conftest import REPOSITORY, mark_exhaustive_except, read_jsonl
from launcher import train_after
from test_evaluate import trained  # noqa: F401 (a fixture)
from test_sample import prompts, texts  # noqa: F401 (a fixture)

SAMPLE = str(REPOSITORY / "sample.py")


@pytest.fixture
def draw(launcher, tmp_path):
    """Return a function that runs sample.py with the stand-in as the package vllm, and returns its output."""
    (tmp_path / "packages/vllm").mkdir(parents=True)
    shutil.copy(REPOSITORY / "tests/vllm_stand_in.py", tmp_path / "packages/vllm/__init__.py")

    def run(*overrides: str, fails: bool = False) -> str:
        packages = f"{tmp_path}/packages"
        script = train_after(f"import sys\nsys.path.insert(0, {packages!r})", tmp_path, "sample.py")
        words = [*overrides, "max_new_tokens=8"]
        code = launcher.run(*words, script=script, directory=tmp_path, env={"PYTHONPATH": packages})
        assert (code != 0) == fails, launcher.output
        return launcher.output

    return run


@pytest.mark.parametrize("kind", mark_exhaustive_except(["dpo", "lora"], "dpo"))
def test_vllm_greedy_samples_equal_those_of_transformers(
    kind, draw, launcher, trained, prompts, tmp_path  # noqa: F811
):  # fmt: skip
    run_dir = trained(kind)
    common = [f"run={run_dir}", prompts, "temperature=0"]
    output = draw(*common, "engine=vllm", "engine_args.gpu_memory_utilization=0.5", f"output={tmp_path}/vllm.jsonl")
    assert "gpu_memory_utilization=0.5 max_model_len=" in output
    assert launcher.run(*common, "max_new_tokens=8", f"output={tmp_path}/own.jsonl", script=SAMPLE) == 0
    for drawn, expected in zip(read_jsonl(tmp_path / "vllm.jsonl"), read_jsonl(tmp_path / "own.jsonl"), strict=True):
        assert drawn.keys() == expected.keys()
        for key in drawn.keys() - {"settings", "policy_logps", "reference_logps"}:
            assert drawn[key] == expected[key], key
        for key in ("policy_logps", "reference_logps"):
            assert drawn[key] == pytest.approx(expected[key], abs=1e-3), key
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".merged")]


@pytest.mark.exhaustive
def test_each_vllm_sample_has_its_own_seed_and_only_missing_ones_are_drawn(draw, trained, prompts, tmp_path):  # noqa: F811
    common = [f"run={trained('dpo')}", prompts, "engine=vllm"]
    draw(*common, "n=2", f"output={tmp_path}/two.jsonl")
    draw(*common, f"output={tmp_path}/one.jsonl")
    output = draw(*common, "n=2", f"output={tmp_path}/one.jsonl")
    assert "Drawing 9 samples by vLLM" in output and "9 samples drawn, 9 already in " in output
    assert texts(tmp_path / "one.jsonl") == texts(tmp_path / "two.jsonl")


@pytest.mark.exhaustive
def test_vllm_draws_each_temperature_into_its_own_file(draw, trained, prompts, tmp_path):  # noqa: F811
    common = [f"run={trained('dpo')}", prompts, "engine=vllm"]
    draw(*common, f"output={tmp_path}/one.jsonl")
    draw(*common, f"output={tmp_path}/w.jsonl", "temperature=[0.5,1]")
    assert texts(tmp_path / "w_t1.jsonl") == texts(tmp_path / "one.jsonl") != texts(tmp_path / "w_t0.5.jsonl")


@pytest.mark.exhaustive
def test_failing_vllm_is_reported(draw, trained, prompts, tmp_path):  # noqa: F811
    output = draw(f"run={trained('dpo')}", prompts, "engine=vllm", "engine_args.nonsense=1", fails=True)
    assert "engine=vllm: vLLM ended with exit code 1; what it printed says why" in output
    assert "building policy" not in output


BAD = {
    "it isn't installed": (
        ["engine=vllm"],
        "engine=vllm: vLLM isn't installed here. Install it on a machine with a GPU",
    ),
    "no such engine": (["engine=vlm"], "engine=vlm: must be one of transformers, vllm. Did you mean vllm?"),
    "arguments without vLLM": (["engine_args.x=1"], "not used with engine=transformers; leave them out"),
}


@pytest.mark.parametrize("name", BAD)
def test_unusable_engine_is_refused_before_models_are_loaded(name, launcher, trained):  # noqa: F811
    overrides, message = BAD[name]
    assert launcher.run(f"run={trained('dpo')}", *overrides, script=SAMPLE) == 1
    assert message in launcher.output
    assert "building policy" not in launcher.output and "Traceback" not in launcher.output


BAD_WITH_VLLM = {
    "several workers": (
        ["trainer=FSDPTrainer"],
        "engine=vllm with trainer=FSDPTrainer: only a single process can use it; give trainer=BasicTrainer",
    ),
    "weights that no folder has": (["model=tiny", "output=o"], "engine=vllm: vLLM reads a folder or a hub id"),
}


@pytest.mark.parametrize("name", BAD_WITH_VLLM)
def test_settings_that_vllm_does_not_support_are_refused(name, draw, trained):  # noqa: F811
    overrides, message = BAD_WITH_VLLM[name]
    run = [] if "model=tiny" in overrides else [f"run={trained('dpo')}"]
    assert message in draw(*run, "engine=vllm", *overrides, fails=True)
