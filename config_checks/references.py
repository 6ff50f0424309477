"""Checks of the reference model."""

from omegaconf import DictConfig

from config_checks.rules import check_one_of
from losses import find_loss, needs_reference
from references import REFERENCES, reference_source, resolved_reference
from utils import UserError


def check_reference(config: DictConfig):
    """Refuse a reference that the loss or the policy can't be compared with; resolve `reference=auto`."""
    check_one_of("reference", config.reference, ("auto", *REFERENCES))
    sets_reference = config.reference != "auto" or config.precompute_ref_log_probs or reference_source(config).given
    if not needs_reference(config.loss) and sets_reference:
        why = "reference_free" if config.loss.get("reference_free") else f"loss={config.loss.name}"
        raise UserError(
            f"{why} uses no reference: leave reference, reference_model and precompute_ref_log_probs at their defaults"
        )
    config.reference = resolved_reference(config)
    if (alpha := config.reference_update_alpha) > 1:
        raise UserError(f"reference_update_alpha={alpha}: must be at most 1, the policy's own weights")
    if config.reference_update_every is not None:
        _check_moving_reference(config)
    if find_loss(config.loss).takes_kl_estimate:
        _check_kl_estimate(config)
    if find_loss(config.loss).needs_shared_logps(config.loss) and config.precompute_ref_log_probs:
        raise UserError(
            "precompute_ref_log_probs=true keeps the log-probabilities of whole responses alone; loss.ld_alpha needs "
            "those up to the shared length, too: use precompute_ref_log_probs=false"
        )


def _check_kl_estimate(config: DictConfig):
    """Check that the divergence can be estimated: from prompts with other prompts' responses, in every batch."""
    loss = f"loss={config.loss.name}"
    if config.precompute_ref_log_probs:
        raise UserError(f"precompute_ref_log_probs=true: {loss} pairs prompts anew in every batch")
    for key in ("batch_size", "eval_batch_size"):
        if config[key] < 2:
            raise UserError(f"{key}={config[key]}: {loss} needs two or more prompts a batch")
    if config.n_eval_examples is not None and config.n_eval_examples % config.eval_batch_size == 1:
        raise UserError(
            f"n_eval_examples={config.n_eval_examples} leaves a last batch of one at eval_batch_size="
            f"{config.eval_batch_size}; {loss} needs two or more prompts a batch"
        )


def _check_moving_reference(config: DictConfig):
    every = config.reference_update_every
    if not needs_reference(config.loss):
        raise UserError(f"reference_update_every={every}: loss={config.loss.name} has no reference to move")
    if config.precompute_ref_log_probs:
        raise UserError(
            f"reference_update_every={every}: precompute_ref_log_probs would keep numbers of a reference that has moved"
        )
    if config.reference != "model" or config.lora is not None or config.model.adapter is not None:
        raise UserError(f"reference_update_every={every}: an adapter's reference can't follow it; train all weights")
    if (adapter := reference_source(config).adapter) is not None:
        raise UserError(
            f"reference_update_every={every}: reference_model.adapter={adapter} has weights that the policy lacks; "
            "merge it first: python export.py run=RUN output=DIR, then reference_model.name_or_path=DIR"
        )
