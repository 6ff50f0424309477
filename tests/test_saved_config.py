"""A run's config.yaml may come from a stranger: it is read as plain data, and can't turn on remote code."""

import pytest
from omegaconf import OmegaConf

from basics.saved_config import read_saved_config
from commands.command_line import compose_config
from commands.run_config import _config_of_run
from reporting.runs import read_run

REFUSED = {  # the file's text, and a part of the error
    "interpolation of a variable": ("exp_name: ${oc.env:HOME}\n", "line 1 has an interpolation"),
    "interpolation of a key": ("seed: 0\nlr: '${seed}'\n", "line 2 has an interpolation"),
    "interpolation in a key": ("'${oc.env:HOME}': 1\n", "line 1 has an interpolation"),
    "aliases of aliases": ("a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n", "line 2 has a YAML alias"),
    "a million characters": ("a: " + "x" * 1_000_000, "longer than 1,000,000 characters"),
    "a list": ("- 1\n", "holds no keys"),
}
BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 20))


@pytest.mark.parametrize("case", REFUSED)
def test_run_config_with_more_than_plain_values_is_refused(case, tmp_path):
    text, message = REFUSED[case]
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_saved_config(str(tmp_path / "config.yaml"))


@pytest.mark.parametrize("text", [REFUSED["interpolation of a variable"][0], BOMB, "- 1\n", "\0"])
def test_reports_on_runs_ignore_a_refused_config(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "metrics.jsonl").write_text('{"split": "eval", "loss/eval": 1.0}\n')
    run = read_run(str(tmp_path))
    assert run.config == {} and len(run.eval) == 1


@pytest.mark.parametrize(("overrides", "allowed"), [([], False), (["model.trust_remote_code=true"], True)])
def test_only_the_command_line_can_allow_remote_code(overrides, allowed, tmp_path):
    of_run = compose_config("model=tiny", "model.trust_remote_code=true", f"local_run_dir={tmp_path}", "lr=0.5")
    OmegaConf.resolve(of_run)
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(of_run))
    config = _config_of_run(compose_config(*overrides, "model=tiny"), str(tmp_path), {})
    assert (config.model.trust_remote_code, config.lr) == (allowed, 0.5)


def test_run_that_is_older_than_a_key_gets_the_keys_default(tmp_path):
    of_run = compose_config("model=tiny", f"local_run_dir={tmp_path}", "lora.r=2")
    OmegaConf.resolve(of_run)
    saved = OmegaConf.to_container(of_run)
    del saved["model"]["router_aux_loss_coef"], saved["worker_timeout"]
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(saved)))
    config = _config_of_run(compose_config("model=tiny", "lora.lora_alpha=3"), str(tmp_path), {})
    assert config.model.router_aux_loss_coef is None and config.worker_timeout == 600
    assert config.model.name_or_path.endswith("assets/tiny")
