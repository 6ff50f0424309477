import math
import re

import pytest
import torch
from conftest import REPOSITORY, figures
from omegaconf import OmegaConf

from commands.command_line import compose_config
from config_checks.checks import check_config
from config_checks.schema import CONFIG_DIR
from log_probabilities import _get_batch_logps
from losses import LOSSES, Loss, preference_loss
from objectives.modifiers import UNLISTED
from trainers import _get_batch_logps as reexported_logps
from trainers import concatenated_inputs as reexported_inputs
from trainers import preference_loss as reexported_loss
from utils import UserError

RECORDED = figures("losses")


@pytest.mark.parametrize("entry", RECORDED["preference_loss"], ids=lambda entry: str(entry["kwargs"]))
def test_preference_loss_equals_the_original(entry):
    logps = [torch.tensor(values, dtype=torch.float64) for values in entry["logps"]]
    results = preference_loss(*logps, **entry["kwargs"])
    for result, key in zip(results, ("losses", "chosen_rewards", "rejected_rewards"), strict=True):
        expected = torch.tensor(entry[key], dtype=torch.float64)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("average", [False, True])
def test_batch_logps_equal_the_original(average):
    entry = RECORDED["batch_logps"]
    logits = torch.tensor(entry["logits"], dtype=torch.float64)
    logps = _get_batch_logps(logits, torch.tensor(entry["labels"]), average_log_prob=average)
    expected = torch.tensor(entry["mean" if average else "sum"], dtype=torch.float64)
    torch.testing.assert_close(logps, expected, rtol=1e-12, atol=0)


def test_batch_logps_of_uniform_logits_count_the_labels():
    # four tokens are equally likely; three labels are predicted (all but the first, as nothing precedes it)
    logits, labels = torch.zeros(1, 4, 4), torch.tensor([[-100, 1, 2, 3]])
    assert _get_batch_logps(logits, labels).item() == pytest.approx(-3 * math.log(4))
    assert _get_batch_logps(logits, labels, average_log_prob=True).item() == pytest.approx(-math.log(4))


def test_losses_at_the_reference_have_their_known_values():
    logps = [torch.tensor([-3.0]), torch.tensor([-5.0])] * 2
    assert preference_loss(*logps, beta=0.1)[0].item() == pytest.approx(math.log(2))
    assert preference_loss(*logps, beta=0.1, label_smoothing=0.3)[0].item() == pytest.approx(math.log(2))
    assert preference_loss(*logps, beta=0.1, ipo=True)[0].item() == pytest.approx(25)  # (1 / (2 * 0.1))²


def test_rewards_carry_no_gradient():
    logps = [torch.tensor([-3.0], requires_grad=True) for _ in range(4)]
    losses, chosen_rewards, rejected_rewards = preference_loss(*logps, beta=0.1)
    assert losses.requires_grad
    assert not chosen_rewards.requires_grad
    assert not rejected_rewards.requires_grad


def test_loss_inputs_and_options_come_from_its_signature():
    assert LOSSES["sft"].inputs == ("policy_chosen_logps",)
    assert list(LOSSES["sft"].options) == ["average_log_prob"]
    assert list(LOSSES["dpo"].options) == ["beta", "label_smoothing", "reference_free", "average_log_prob", *UNLISTED]
    assert list(LOSSES["ipo"].options) == ["beta", "reference_free", "average_log_prob", *UNLISTED]
    assert [LOSSES[name].needs_pairs for name in ("sft", "dpo", "ipo")] == [False, True, True]
    assert [LOSSES[name].needs_reference({}) for name in ("sft", "dpo", "ipo")] == [False, True, True]
    assert not LOSSES["dpo"].needs_reference({"reference_free": True})


@pytest.mark.parametrize("name", LOSSES)
def test_loss_yaml_holds_the_options_and_defaults_of_the_signature(name):
    yaml = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "loss" / f"{name}.yaml"))
    defaults = {key: option.default for key, option in LOSSES[name].options.items() if key not in UNLISTED}
    assert yaml == {"name": name, **defaults}


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_is_documented_with_its_options(name):
    (row,) = re.findall(rf"^\| `loss={name}` \|.*", (REPOSITORY / "docs/objectives.md").read_text(), re.MULTILINE)
    for key, option in LOSSES[name].options.items():
        assert f"`{key}` {str(option.default).lower()}" in row or key == "average_log_prob" or key in UNLISTED
    assert re.search(rf"`(loss=)?{name}`", (REPOSITORY / "README.md").read_text())


def bad_input(policy_chosen_logp, policy_rejected_logps):
    return policy_rejected_logps


def other_input(policy_chosen_logps, critic_chosen_logps):
    return -policy_chosen_logps


def no_input(beta: float):
    return beta


def misspelled_input(policy_chosen_logps, policy_rejected_logps, chosen_length: float = 1.0):
    return policy_rejected_logps / chosen_length


def reference_of_one(policy_chosen_logps, reference_chosen_logps):
    return reference_chosen_logps - policy_chosen_logps


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (bad_input, r"bad_input: unknown inputs \['policy_chosen_logp'\].* Did you mean policy_chosen_logps\?"),
        (misspelled_input, "Did you mean chosen_lengths"),
        (other_input, "critic_chosen_logps"),
        (no_input, "no_input: it has no inputs. There are policy_chosen_logps"),
        (reference_of_one, "policy_rejected_logps"),
    ],
)
def test_loss_signature_with_unknown_inputs_is_an_error(function, message):
    with pytest.raises(TypeError, match=message):
        Loss(function)


WRONG_OUTPUTS = {  # by case: a loss that returns the wrong thing, and the error
    "a column": (lambda chosen, rejected: (rejected - chosen)[:, None], "returns the shape (3, 1) for 3 examples"),
    "all pairs": (lambda chosen, rejected: rejected - chosen[:, None], "returns the shape (3, 3) for 3 examples"),
    "a mean": (lambda chosen, rejected: (rejected - chosen).mean(), "returns the shape () for 3 examples"),
    "mean rewards": (lambda chosen, rejected: (rejected - chosen, chosen, rejected.mean()), "returns the shape ()"),
    "one reward": (lambda chosen, rejected: (rejected - chosen, chosen), "returns 2 tensors"),
    "nothing": (lambda chosen, rejected: None, "returns NoneType"),
    "a list": (lambda chosen, rejected: [rejected - chosen], "returns list"),
    "no gradient": (lambda chosen, rejected: (rejected - chosen).detach(), "returns losses without a gradient"),
}


@pytest.mark.parametrize("case", WRONG_OUTPUTS)
def test_loss_that_returns_something_else_is_refused_before_work_starts(case, monkeypatch):
    function, message = WRONG_OUTPUTS[case]

    def own(policy_chosen_logps, policy_rejected_logps):
        return function(policy_chosen_logps, policy_rejected_logps)

    monkeypatch.setitem(LOSSES, "sft_tokens", Loss(own))
    config = compose_config("model=tiny", "datasets=[toy]", "loss=sft_tokens")
    with pytest.raises(UserError) as error:
        check_config(config)
    assert str(error.value).startswith(f"loss=sft_tokens: own {message}")


def test_trainers_reexports_the_names_that_users_of_the_original_import():
    assert reexported_loss is preference_loss
    assert reexported_logps is _get_batch_logps
    assert callable(reexported_inputs)
