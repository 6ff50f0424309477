"""A loss that is added from outside the repository's files: one function, one entry, one YAML."""

import math

import pytest
import torch
from conftest import read_jsonl
from omegaconf import OmegaConf

SCRIPT = '''
import sys
import torch.nn.functional as F
import evaluate, losses, sample, train

def simpo_loss(
    policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths,
    beta: losses.Positive = 2.0, gamma: float = 1.0,
):
    """Eq. 6 of https://arxiv.org/abs/2405.14734."""
    chosen_rewards = beta * policy_chosen_logps / chosen_lengths
    rejected_rewards = beta * policy_rejected_logps / rejected_lengths
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards - gamma)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()

losses.LOSSES["own_simpo"] = losses.Loss(simpo_loss)

if __name__ == "__main__":
    {"train": train, "evaluate": evaluate, "sample": sample}[sys.argv.pop(1)].main()
'''
RUN = [
    "loss=own_simpo", "model=tiny", "datasets=[toy]", "n_examples=96", "batch_size=16", "n_eval_examples=64",
    "eval_every=48", "eval_batch_size=16", "max_length=64", "max_prompt_length=32", "sample_during_eval=false",
    "wandb.enabled=false", "lr=1e-3", "warmup_steps=2",
]  # fmt: skip


@pytest.fixture
def train_simpo(launcher, tmp_path):
    """Return a function that runs the script with a config folder that holds loss/own_simpo.yaml."""
    (tmp_path / "train_simpo.py").write_text(SCRIPT)
    (tmp_path / "conf/loss").mkdir(parents=True)
    (tmp_path / "conf/loss/own_simpo.yaml").write_text("name: own_simpo\nbeta: 2.0\ngamma: 1.0\n")

    def run_script(*overrides: str) -> int:
        words = ["train", "--config-dir", "conf", *RUN, "local_run_dir=run", *overrides]
        return launcher.run(*words, directory=tmp_path, script=tmp_path / "train_simpo.py")

    return run_script


@pytest.mark.parametrize(
    "parallel",
    [[], pytest.param(["trainer=FSDPTrainer", "world_size=2"], marks=pytest.mark.exhaustive)],
    ids=["alone", "two workers"],
)
def test_added_loss_trains_without_a_reference_by_its_own_formula(parallel, train_simpo, launcher, tmp_path):
    assert train_simpo("loss.gamma=0.5", *parallel) == 0, launcher.output
    assert "building reference model" not in launcher.output
    config = OmegaConf.load(tmp_path / "run/config.yaml")
    assert dict(config.loss) == {"name": "own_simpo", "beta": 2.0, "gamma": 0.5}

    lines = [line for line in read_jsonl(tmp_path / "run/metrics.jsonl") if line["split"] == "eval"]
    first, last = lines[0], lines[-1]
    assert last["rewards_eval/margins"] > first["rewards_eval/margins"] + 0.1
    # all toy responses have the same number of tokens: the mean reward is beta * mean log-probability / that number
    n_tokens = 2.0 * first["logps_eval/chosen"] / first["rewards_eval/chosen"]
    assert n_tokens == pytest.approx(18, abs=0.01)
    # the untrained model hardly tells the responses apart: -log σ(margin - γ) at a margin of about 0
    assert first["loss/eval"] == pytest.approx(math.log(1 + math.exp(0.5)), abs=0.01)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        (None, "error: loss=own_simpo: LOSSES has this loss, but no config folder has loss/own_simpo.yaml"),
        (
            "beta: 2.0\n",
            "error: loss.name=None: give loss=NAME; the file config/loss/NAME.yaml must name an entry of LOSSES",
        ),
        ("name: simpo_own\n", "error: loss.name=simpo_own: no such loss"),
    ],
    ids=["no file", "no name", "another name"],
)
def test_loss_without_a_valid_yaml_file_is_refused_with_what_is_missing(yaml, message, train_simpo, launcher, tmp_path):
    path = tmp_path / "conf/loss/own_simpo.yaml"
    path.unlink() if yaml is None else path.write_text(yaml)
    assert train_simpo() == 1
    assert message in launcher.output and "Traceback" not in launcher.output


def test_run_with_an_added_loss_is_evaluated_and_sampled_by_its_script(train_simpo, launcher, tmp_path):
    assert train_simpo("n_examples=32") == 0, launcher.output
    expected = [line for line in read_jsonl(tmp_path / "run/metrics.jsonl") if line["split"] == "eval"][-1]
    script = {"directory": tmp_path, "script": tmp_path / "train_simpo.py"}
    assert launcher.run("evaluate", "run=run", **script) == 0, launcher.output
    (evaluation,) = read_jsonl(tmp_path / "run/evaluations.jsonl")
    assert evaluation["metrics"]["loss/eval"] == pytest.approx(expected["loss/eval"], rel=1e-6)
    assert launcher.run("sample", "run=run", "n_eval_examples=2", "output=a.jsonl", **script) == 0, launcher.output
    assert len(read_jsonl(tmp_path / "a.jsonl")) == 2


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["loss.beta=0"], ["loss.beta=0: must be a number above 0"]),
        (["loss.gamma=high"], ["loss.gamma=high: expected a number"]),
        (["+loss.label_smoothing=0.1"], ["loss.label_smoothing: loss=own_simpo has no such option", "beta, gamma"]),
        (["+loss.average_log_prob=true"], ["loss.average_log_prob: loss=own_simpo has no such option"]),
        (["precompute_ref_log_probs=true"], ["loss=own_simpo uses no reference"]),
    ],
    ids=str,
)
def test_options_of_an_added_loss_are_checked(overrides, parts, train_simpo, launcher, tmp_path):
    assert train_simpo(*overrides) == 1
    assert "Traceback" not in launcher.output
    for part in parts:
        assert part in launcher.output
    assert not (tmp_path / "run").exists()


def test_added_simpo_equals_the_papers_formula():
    namespace = {"__name__": "simpo"}
    exec(SCRIPT.replace('losses.LOSSES["own_simpo"] = ', "SIMPO = "), namespace)
    loss = namespace["SIMPO"]
    inputs = {
        "policy_chosen_logps": torch.tensor([-6.0]),
        "policy_rejected_logps": torch.tensor([-8.0]),
        "chosen_lengths": torch.tensor([3]),
        "rejected_lengths": torch.tensor([2]),
    }
    values, (chosen_rewards, rejected_rewards), _ = loss.compute(inputs, {"beta": 2.0, "gamma": 1.0})
    # rewards 2 · -6/3 = -4 and 2 · -8/2 = -8; -log σ(-4 + 8 - 1) = log(1 + e⁻³)
    assert (chosen_rewards.item(), rejected_rewards.item()) == (-4, -8)
    assert values.item() == pytest.approx(math.log(1 + math.exp(-3)), rel=1e-6)
    assert loss.needs_pairs and not loss.needs_reference({})
