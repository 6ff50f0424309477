"""Warn once of each symptom of trouble in a run's metrics, and say what to try."""

import functools
import math

import torch
from omegaconf import DictConfig

from losses import find_loss
from objectives.declaration import KL_ESTIMATE, LENGTHS, LOGPS, MEAN_LENGTH, MEMORY, Memory
from reporting.terminal import number

N_EVALUATIONS = 3  # number of evaluations in a row with a symptom before it is reported
N_CLIPPED = 50  # number of steps in a row with a clipped gradient before it is reported
_DOCS = "see docs/metrics.md#{}"


def loss_at_reference(loss_config: DictConfig) -> float | None:
    """Return the loss of every pair while policy and reference are equal: ln 2 for DPO.

    None if it depends on the pair, or if the loss needs no reference.
    """
    loss = find_loss(loss_config)
    if not loss.needs_reference(loss_config):
        return None
    values = []
    for chosen, rejected, n_chosen, n_rejected in ((-10.0, -100.0, 5.0, 40.0), (-90.0, -20.0, 30.0, 7.0)):
        of_sides = {"chosen": (chosen, n_chosen), "rejected": (rejected, n_rejected)}
        inputs = {name: torch.tensor([of_sides[name.split("_")[1]][0]]) for name in LOGPS}
        inputs |= {name: torch.tensor([of_sides[name.split("_")[0]][1]]) for name in LENGTHS}
        inputs |= {KL_ESTIMATE: torch.tensor(0.0), MEAN_LENGTH: torch.tensor(1.0), MEMORY: Memory()}
        inputs |= {name.replace("_logps", "_shared_logps"): inputs[name] for name in LOGPS}
        inputs |= {f"{side}_weights": torch.tensor(1.0) for side in of_sides}
        values.append(loss.compute(inputs, loss_config).losses.item())
    return values[0] if math.isclose(*values, rel_tol=1e-4) else None


class Symptoms:
    """Watches the steps and evaluations of this process for symptoms."""

    def __init__(self, config: DictConfig):
        self.max_grad_norm, self.warmup_steps = config.max_grad_norm, config.warmup_steps
        self.loss_config = config.loss
        self.counts: dict[str, int] = {}  # how often in a row each symptom was seen
        self.reported: set[str] = set()

    @functools.cached_property
    def loss_at_reference(self) -> float | None:
        """The loss of every pair while policy and reference are equal, computed once."""
        return loss_at_reference(self.loss_config)

    def notice(self, split: str, metrics: dict[str, float]) -> list[str]:
        """Return the warnings after this step or evaluation, each symptom once."""
        if split == "train":
            symptoms, n_needed = self._of_step(metrics), N_CLIPPED
        else:
            symptoms, n_needed = self._of_evaluation(metrics), N_EVALUATIONS
        texts = []
        for name, text in symptoms.items():
            self.counts[name] = self.counts.get(name, 0) + 1 if text else 0
            if self.counts[name] >= n_needed and name not in self.reported:
                self.reported.add(name)
                texts.append(f"{text}; {_DOCS.format(name)}")
        return texts

    def _of_step(self, metrics: dict[str, float]) -> dict[str, str]:
        norm, n_updates = metrics["grad_norm"], metrics["counters/updates"]
        is_clipped = norm > self.max_grad_norm and n_updates > self.warmup_steps
        text = (
            f"the gradient's norm ({number(norm)} now) has been above max_grad_norm={self.max_grad_norm:g} for "
            f"{N_CLIPPED} steps: the clipping sets the size of the steps. Try a smaller lr, or a larger max_grad_norm"
        )
        return {"always-clipped": text if is_clipped else ""}

    def _of_evaluation(self, metrics: dict[str, float]) -> dict[str, str]:
        if metrics["counters/examples"] == 0:  # policy and reference are still equal
            return {}
        return {
            "overfitting": self._overfitting(metrics),
            "accuracy-at-chance": self._at_chance(metrics),
            "falling-together": self._falling_together(metrics),
        }

    def _overfitting(self, metrics: dict[str, float]) -> str:
        loss, start = metrics["loss/eval"], self.loss_at_reference
        if start is None or loss <= start:
            return ""
        return (
            f"the evaluation loss ({number(loss)} now) has been above {number(start)}, the loss of the reference "
            f"itself, for {N_EVALUATIONS} evaluations: what is learned doesn't generalize. Try a "
            "smaller lr, fewer epochs or a larger loss.beta; keep_best=loss/eval keeps the best checkpoint"
        )

    @staticmethod
    def _at_chance(metrics: dict[str, float]) -> str:
        accuracy, error = metrics.get("rewards_eval/accuracies"), metrics.get("rewards_eval/accuracies_se")
        if accuracy is None or error is None or abs(accuracy - 0.5) > 2 * error:
            return ""
        return (
            f"the evaluation accuracy ({accuracy:.1%} ± {error:.1%} now) has been that of guessing for "
            f"{N_EVALUATIONS} evaluations. Try a larger lr, check that the data tell chosen from rejected, and start "
            "from a model that has seen such responses (SFT)"
        )

    @staticmethod
    def _falling_together(metrics: dict[str, float]) -> str:
        if "logratios_eval/chosen" not in metrics:
            return ""
        chosen, rejected = metrics["logratios_eval/chosen"], metrics["logratios_eval/rejected"]
        fall, gain = -chosen, chosen - rejected
        if fall <= 2 * max(gain, 0) or fall / metrics["lengths_eval/chosen"] < 0.1:
            return ""
        return (
            f"chosen responses have lost {number(fall)} nats, while their lead over rejected ones has grown by only "
            f"{number(gain)}: both become less likely, and responses outside the data likelier. Try a smaller lr, a "
            "larger loss.beta, SFT on the chosen responses first, or loss=dpo_nll or loss=dpop"
        )
