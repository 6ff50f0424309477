"""`python train.py --config-path RUN` starts a run again from its config.yaml."""

import shutil

import pytest
from conftest import read_jsonl
from omegaconf import OmegaConf

from commands.command_line import compose_config
from commands.start_again import with_config_of_run
from utils import UserError

RUN = [
    "model=tiny", "datasets=[toy]", "loss=ipo", "loss.beta=0.3", "n_examples=8", "batch_size=4", "n_eval_examples=4",
    "eval_every=4", "max_length=64", "max_prompt_length=32", "lr=1e-3", "warmup_steps=0.5", "sample_during_eval=false",
    "optimizer=SGD", "optimizer_args.momentum=0.5",
]  # fmt: skip


def test_copied_config_repeats_the_run(launcher, tmp_path):
    assert launcher.run(*RUN, "local_run_dir=first", directory=tmp_path) == 0, launcher.output
    shutil.copytree(tmp_path / "first", tmp_path / "copies/of it")
    shutil.rmtree(tmp_path / "first")
    words = ["--config-path", "copies/of it", "local_run_dir=second"]
    assert launcher.run(*words, directory=tmp_path) == 0, launcher.output
    former, again = (OmegaConf.load(tmp_path / name / "config.yaml") for name in ("copies/of it", "second"))
    former.local_run_dir = "second"
    assert again == former
    for line, expected in zip(*(read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("second", "copies/of it")),
                              strict=True):  # fmt: skip
        assert {k: v for k, v in line.items() if "per_second" not in k} == {
            k: v for k, v in expected.items() if "per_second" not in k
        }
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["copies", "second"]


def saved(tmp_path, *overrides: str) -> str:
    """Write a run's config.yaml; return its directory."""
    config = compose_config("model=tiny", "loss=dpo", f"local_run_dir={tmp_path}", *overrides)
    OmegaConf.resolve(config)
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config))
    return str(tmp_path)


@pytest.mark.parametrize("option", [["--config-path", "{}"], ["--config-path={}", "--config-name=config"], ["-cp={}"]])
def test_settings_of_any_form_are_restored(option, tmp_path):
    odd = {"exp_name": "it's \\ a = {b}, [c]: 'd\\'", "lora.target_modules": ["a", "b c"],
           "max_grad_norm": float("inf"),
           "datasets": [{"name": "a b.jsonl", "weight": 2, "fields": {"prompt": "x"}}, "~/b.jsonl"]}  # fmt: skip
    run = saved(tmp_path)
    config = OmegaConf.load(tmp_path / "config.yaml")
    for key, value in odd.items():
        OmegaConf.update(config, key, value, force_add=True)
    config.resume, config.data_only, config.model.trust_remote_code = "auto", True, True
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config))
    again = compose_config(*with_config_of_run([word.format(run) for word in option] + ["lr=1"]))
    for key, value in odd.items():
        found = OmegaConf.select(again, key)
        assert (OmegaConf.to_container(found) if OmegaConf.is_config(found) else found) == value
    assert (again.lr, again.loss.name, again.model.name_or_path) == (1, "dpo", config.model.name_or_path)
    assert again.model.from_scratch and not again.model.trust_remote_code
    assert again.resume is None and not again.data_only


def test_another_model_or_loss_has_its_own_options(tmp_path):
    words = ["-m", "--config-path", saved(tmp_path, "loss.beta=0.7"), "loss=simpo", "model=gpt2-xl"]
    words = with_config_of_run(words)
    assert words[0] == "-m"  # Hydra's options stay together
    again = compose_config(*words[1:])
    assert (again.loss.name, again.loss.beta) == ("simpo", 2.0)
    assert (again.model.name_or_path, again.model.from_scratch) == ("gpt2-xl", False)


def test_hydras_other_options_stay_before_the_settings(tmp_path):
    words = with_config_of_run(["-cp", saved(tmp_path), "-c", "job", "lr=1"])
    assert words[:2] == ["-c", "job"] and words[-1] == "lr=1" and "loss=dpo" in words


def test_other_folders_of_configs_are_left_to_hydra(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/config.yaml").write_text("defaults:\n- _self_\nlr: 1\nmodel: {}\nloss: {}\ndatasets: []\n")
    for words in (["--config-path", str(tmp_path / "own")], ["-cp", "nowhere"], ["--config-dir", "conf", "lr=1"],
                  ["-cp", saved(tmp_path), "-cn", "other"]):  # fmt: skip
        assert with_config_of_run(words) == words


def test_unreadable_config_of_a_run_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("a: ${oc.env:HOME}\n")
    with pytest.raises(UserError, match=r"--config-path .*: can't read its config\.yaml: line 1 has an interpolation"):
        with_config_of_run(["--config-path", str(tmp_path)])
