"""Every loss equals its paper's formula, rewritten here in float64, and its gradient equals finite differences."""

import math

import numpy as np
import pytest
import torch

from losses import LOSSES, Memory

# log-probabilities (nats) and lengths (tokens) of six varied pairs; one has very unlikely responses, one has equal
# log-probabilities, and in some the chosen response is less likely under the policy than under the reference
POLICY_CHOSEN = np.array([-12.0, -3.5, -40.0, -7.0, -0.02, -25.0])
POLICY_REJECTED = np.array([-15.0, -2.0, -90.0, -7.0, -6.0, -21.0])
REFERENCE_CHOSEN = np.array([-13.0, -3.0, -38.5, -7.0, -1.0, -24.0])
REFERENCE_REJECTED = np.array([-14.0, -2.5, -60.0, -7.0, -5.0, -24.5])
CHOSEN_LENGTHS = np.array([6, 2, 20, 3, 1, 11])
REJECTED_LENGTHS = np.array([5, 2, 31, 3, 4, 9])
INPUTS = {
    "policy_chosen_logps": POLICY_CHOSEN,
    "policy_rejected_logps": POLICY_REJECTED,
    "reference_chosen_logps": REFERENCE_CHOSEN,
    "reference_rejected_logps": REFERENCE_REJECTED,
    "chosen_lengths": CHOSEN_LENGTHS,
    "rejected_lengths": REJECTED_LENGTHS,
    "kl_estimate": np.array(0.7),
    "mean_chosen_length": np.array(7.0),
}
RATIO_CHOSEN, RATIO_REJECTED = POLICY_CHOSEN - REFERENCE_CHOSEN, POLICY_REJECTED - REFERENCE_REJECTED
H = RATIO_CHOSEN - RATIO_REJECTED


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def nll(x):
    return -np.log(sigmoid(x))


def phi(log_ratio):
    return np.exp(np.minimum(log_ratio, 20)) + log_ratio


def odds(mean_logps):
    return np.exp(mean_logps) / (1 - np.exp(mean_logps))


def of_same_rank(values, others):
    """Return, for the i-th smallest of `values`, the i-th smallest of `others`, in the order of `values`."""
    partners = np.empty_like(others)
    partners[np.argsort(values)] = np.sort(others)
    return partners


MEAN_CHOSEN, MEAN_REJECTED = POLICY_CHOSEN / CHOSEN_LENGTHS, POLICY_REJECTED / REJECTED_LENGTHS
MARGINS = POLICY_CHOSEN - POLICY_REJECTED
# moving averages after this batch; before it, both were 0.3
BCO_SHIFT = 0.9 * 0.3 + 0.1 * 0.2 * (RATIO_CHOSEN.mean() + RATIO_REJECTED.mean()) / 2
BATCH_BETA = 0.2 * (1 + 0.5 * (0.2 * H.mean() - (0.9 * 0.3 + 0.1 * 0.2 * H.mean())))
EXPECTED = {  # loss, options: the losses by the paper's formula
    ("sft", ()): -POLICY_CHOSEN,
    ("sft_tokens", ()): -POLICY_CHOSEN / 7,
    ("dpo", (("beta", 0.2),)): nll(0.2 * H),
    ("dpo", (("beta", 0.2), ("label_smoothing", 0.3))): 0.7 * nll(0.2 * H) + 0.3 * nll(-0.2 * H),
    ("ipo", (("beta", 0.2),)): (H - 2.5) ** 2,
    ("robust_dpo", (("beta", 0.2), ("label_smoothing", 0.3))): (0.7 * nll(0.2 * H) - 0.3 * nll(-0.2 * H)) / 0.4,
    ("robust_dpo", (("beta", 0.2), ("label_smoothing", 0.0))): nll(0.2 * H),
    ("hinge", (("beta", 0.2), ("delta", 0.5))): np.maximum(0, 0.5 - 0.2 * H),
    ("dpop", (("beta", 0.2), ("penalty", 3.0))): nll(0.2 * (H - 3 * np.maximum(0, -RATIO_CHOSEN))),
    ("dpo_nll", (("beta", 0.2), ("nll_weight", 0.5))): nll(0.2 * H) - 0.5 * MEAN_CHOSEN,
    ("length_dpo", (("beta", 0.2), ("length_penalty", 0.03))): nll(
        0.2 * H + 0.03 * (CHOSEN_LENGTHS - REJECTED_LENGTHS)
    ),
    ("exo", (("beta", 0.2), ("label_smoothing", 0.05))): sigmoid(0.2 * H) * np.log(sigmoid(0.2 * H) / 0.95)
    + sigmoid(-0.2 * H) * np.log(sigmoid(-0.2 * H) / 0.05),
    ("chi_po", (("beta", 0.2), ("max_reward", 2.0))): nll(
        np.clip(0.2 * (phi(RATIO_CHOSEN) - phi(RATIO_REJECTED)), -4, 4)
    ),
    ("kto", (("beta", 0.2), ("desirable_weight", 1.5), ("undesirable_weight", 0.5))): 0.75
    * (1 - sigmoid(0.2 * (RATIO_CHOSEN - 0.7)))
    + 0.25 * (1 - sigmoid(0.2 * (0.7 - RATIO_REJECTED))),
    ("dpo_norm", (("beta", 3.0),)): nll(3 * (RATIO_CHOSEN / CHOSEN_LENGTHS - RATIO_REJECTED / REJECTED_LENGTHS)),
    ("apo_zero", (("beta", 0.2),)): 1 - sigmoid(0.2 * RATIO_CHOSEN) + sigmoid(0.2 * RATIO_REJECTED),
    ("apo_down", (("beta", 0.2),)): sigmoid(0.2 * RATIO_CHOSEN) + 1 - sigmoid(0.2 * H),
    ("nca", (("beta", 0.2),)): nll(0.2 * RATIO_CHOSEN) + nll(-0.2 * RATIO_CHOSEN) / 2 + nll(-0.2 * RATIO_REJECTED) / 2,
    ("sppo", (("beta", 0.2),)): (RATIO_CHOSEN - 2.5) ** 2 + (RATIO_REJECTED + 2.5) ** 2,
    ("discopop", (("beta", 0.2), ("tau", 0.3))): (1 - sigmoid(0.2 * H / 0.3)) * nll(0.2 * H)
    + sigmoid(0.2 * H / 0.3) * np.exp(-0.2 * H),
    ("bco", (("beta", 0.2), ("momentum", 0.9))): nll(0.2 * RATIO_CHOSEN - BCO_SHIFT)
    + nll(BCO_SHIFT - 0.2 * RATIO_REJECTED),
    ("beta_dpo", (("beta", 0.2), ("sensitivity", 0.5), ("momentum", 0.9))): nll(BATCH_BETA * H),
    ("aot", (("beta", 0.2),)): nll(0.2 * (MARGINS - of_same_rank(MARGINS, REFERENCE_CHOSEN - REFERENCE_REJECTED))),
    ("aot_unpaired", (("beta", 0.2),)): nll(0.2 * (RATIO_CHOSEN - of_same_rank(RATIO_CHOSEN, RATIO_REJECTED))),
    ("simpo", (("beta", 2.0), ("gamma", 0.7))): nll(2 * MEAN_CHOSEN - 2 * MEAN_REJECTED - 0.7),
    ("orpo", (("beta", 0.2),)): -MEAN_CHOSEN + 0.2 * nll(np.log(odds(MEAN_CHOSEN)) - np.log(odds(MEAN_REJECTED))),
    ("cpo", (("beta", 0.2), ("nll_weight", 0.5))): nll(0.2 * (POLICY_CHOSEN - POLICY_REJECTED)) - 0.5 * POLICY_CHOSEN,
}
REWARDS = {  # rewards of the chosen responses that aren't beta times the log-ratio
    "dpo_norm": lambda beta: beta * RATIO_CHOSEN / CHOSEN_LENGTHS,
    "beta_dpo": lambda beta: BATCH_BETA * RATIO_CHOSEN,
    "chi_po": lambda beta: beta * phi(RATIO_CHOSEN),
    "simpo": lambda beta: beta * MEAN_CHOSEN,
    "orpo": lambda beta: beta * np.log(odds(MEAN_CHOSEN)),
    "cpo": lambda beta: beta * POLICY_CHOSEN,
}


def tensors(dtype=torch.float64) -> dict:
    tensors = {name: torch.tensor(v, dtype=torch.long if "lengths" in name else dtype) for name, v in INPUTS.items()}
    averages = dict.fromkeys(("bco_shift", "beta_dpo_margin"), torch.tensor(0.3, dtype=torch.float64))
    return tensors | {"memory": Memory(averages)}


def test_every_loss_has_an_expected_formula():
    assert {name for name, _ in EXPECTED} == set(LOSSES)


@pytest.mark.parametrize(("name", "options"), EXPECTED, ids=str)
def test_losses_and_rewards_equal_the_papers_formula(name, options):
    losses, rewards, _ = LOSSES[name].compute(tensors(), dict(options))
    np.testing.assert_allclose(losses.numpy(), EXPECTED[name, options], rtol=1e-9, atol=1e-12)
    if rewards:
        beta = dict(options)["beta"]
        expected = REWARDS.get(name, lambda beta: beta * RATIO_CHOSEN)(beta)
        np.testing.assert_allclose(rewards[0].numpy(), expected, rtol=1e-9, atol=1e-12)
        assert not any(reward.requires_grad for reward in rewards)


@pytest.mark.parametrize(("name", "options"), EXPECTED, ids=str)
def test_loss_gradients_equal_finite_differences(name, options):
    if name == "beta_dpo":
        pytest.skip("the loss treats β as a constant, although it depends on the batch")
    inputs = tensors()
    inputs["memory"].is_frozen = True
    trained = [key for key in LOSSES[name].inputs if key.startswith("policy")]

    def mean_loss(*logps):
        return LOSSES[name].compute({**inputs, **dict(zip(trained, logps, strict=True))}, dict(options)).losses.mean()

    # shift the inputs off kinks and ties
    assert torch.autograd.gradcheck(
        mean_loss, [(inputs[key] - 0.01 * torch.arange(1, 7)).requires_grad_() for key in trained]
    )


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_log_probabilities_give_finite_losses_and_gradients(name):
    extreme = torch.tensor([0.0, -1e-9, -1e4, -1e4, -1.0])
    inputs = {key: extreme.roll(shift) for shift, key in enumerate(INPUTS) if "logps" in key}
    inputs |= {key: torch.tensor([1, 2, 500, 500, 1]) for key in INPUTS if "lengths" in key}
    inputs |= {"kl_estimate": torch.tensor(1e3), "mean_chosen_length": torch.tensor(1.0), "memory": Memory()}
    for key in inputs:
        if key.startswith("policy"):
            inputs[key].requires_grad_()
    defaults = {key: option.default for key, option in LOSSES[name].options.items()}
    losses, rewards, _ = LOSSES[name].compute(inputs, defaults)
    losses.mean().backward()
    for values in (losses, *rewards, *(inputs[key].grad for key in LOSSES[name].inputs if key.startswith("policy"))):
        assert values.isfinite().all()


def test_robust_dpo_is_unbiased_under_flipped_labels():
    clean = LOSSES["dpo"].compute(tensors(), {"beta": 0.2}).losses
    swapped = {key: tensors()[_other(key)] for key in INPUTS if "mean" not in key}
    options = {"beta": 0.2, "label_smoothing": 0.2}
    kept, flipped = (LOSSES["robust_dpo"].compute(inputs, options).losses for inputs in (tensors(), swapped))
    torch.testing.assert_close(0.8 * kept + 0.2 * flipped, clean)


def _other(key: str) -> str:
    return key.replace("chosen", "rejected") if "chosen" in key else key.replace("rejected", "chosen")


def test_dpo_and_its_variants_start_at_ln_2():
    inputs = tensors()
    inputs |= {f"policy_{side}_logps": inputs[f"reference_{side}_logps"] for side in ("chosen", "rejected")}
    for name, options in (("dpo", {}), ("robust_dpo", {"label_smoothing": 0.1}), ("dpop", {}), ("chi_po", {})):
        losses = LOSSES[name].compute(inputs, options).losses
        torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), msg=name)
