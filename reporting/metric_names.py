"""Names of evaluation metrics, and which should rise. It needs no torch, so that reports start at once.

Training metrics are named alike, with `train` in place of `eval`. They are computed in `metrics.py` (rewards, lengths),
`trainers.get_batch_metrics` (loss, log-probabilities) and `trainers.train_step` (gradient norm).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from losses import Loss, Mix

LOSS, ACCURACY, MARGIN, TIES = "loss/eval", *(f"rewards_eval/{name}" for name in ("accuracies", "margins", "ties"))
KL = "kl_eval/per_token"

# evaluation metrics with a standard error, which is logged as NAME_se
WITH_ERRORS = (LOSS, ACCURACY, MARGIN, "nll_eval/chosen", "logratios_eval/chosen")


def evaluation_metrics(loss: "Loss | Mix", config: "DictConfig") -> list[str]:
    """Return the names of all evaluation metrics under this config, except standard errors."""
    sides = ("chosen", "rejected") if loss.needs_pairs else ("chosen",)
    of_sides = ["logps_eval", "nll_eval", "lengths_eval"]
    names = [LOSS] + ["aux_loss/eval"] * (config.model.router_aux_loss_coef is not None)
    if loss.needs_pairs:
        of_sides.insert(0, "rewards_eval")
        names += [ACCURACY, MARGIN, TIES]
    names += [f"loss_eval/{part}" for part in config.loss.get("parts", [])]
    if loss.needs_reference(config.loss):
        of_sides.append("logratios_eval")
        if config.sample_during_eval and config.n_eval_model_samples > 0:
            names += ["kl_eval/per_response", KL]
    return names + [f"{name}/{side}" for name in of_sides for side in sides]


def larger_is_better(metric: str) -> bool:
    """True for metrics that should rise: accuracies, margins, rewards and log-probabilities of chosen responses."""
    smaller = ("loss", "aux_loss/", "nll_", "kl_", "lengths_")
    return not metric.startswith(smaller) and not metric.endswith(("/rejected", "/ties"))
