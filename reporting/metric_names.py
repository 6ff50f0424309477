"""The names of an evaluation's metrics."""

from omegaconf import DictConfig

from losses import Loss


def evaluation_metrics(loss: Loss, config: DictConfig) -> list[str]:
    """Return the metrics of evaluations under this config, without standard errors."""
    sides = ("chosen", "rejected") if loss.needs_pairs else ("chosen",)
    of_sides = ["logps_eval", "nll_eval", "lengths_eval"]
    names = ["loss/eval"]
    if loss.needs_pairs:
        of_sides.insert(0, "rewards_eval")
        names += [f"rewards_eval/{name}" for name in ("accuracies", "margins", "ties")]
    if loss.needs_reference(config.loss):
        of_sides.append("logratios_eval")
        if config.sample_during_eval and config.n_eval_model_samples > 0:
            names += ["kl_eval/per_response", "kl_eval/per_token"]
    return names + [f"{name}/{side}" for name in of_sides for side in sides]
