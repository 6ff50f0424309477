"""Compute the log-probability of each response of a batch plainly, as the original does.

`acceleration/` has faster layouts, which are compared with this computation.
"""

import torch

from utils import pad_to_length


def _get_batch_logps(logits: torch.Tensor, labels: torch.Tensor, average_log_prob: bool = False) -> torch.Tensor:
    """Return the log-probability of each sequence's labels: Σ_t log π(label_t | the tokens before it).

    Args:
        logits: unnormalized, shape (batch_size, sequence_length, vocab_size).
        labels: token ids, shape (batch_size, sequence_length); positions labelled -100 are left out.
        average_log_prob: divide by the number of labelled tokens; in training, `objectives.modifiers` divides instead.

    Returns: shape (batch_size,), in nats.
    """
    assert logits.shape[:-1] == labels.shape
    labels = labels[:, 1:]
    loss_mask = labels != -100
    per_token_logps = torch.gather(
        logits[:, :-1].log_softmax(-1), dim=2, index=labels.masked_fill(~loss_mask, 0).unsqueeze(2)
    ).squeeze(2)  # (B, T-1)
    logps = (per_token_logps * loss_mask).sum(-1)
    return logps / loss_mask.sum(-1) if average_log_prob else logps


def response_lengths(labels: torch.Tensor) -> torch.Tensor:
    """Return the number of predicted tokens of each response: (batch_size, sequence_length) labels to (batch_size,).

    Nothing predicts a sequence's first token, so it never counts.
    """
    return (labels[:, 1:] != -100).sum(-1)


def shared_lengths(batch: dict) -> torch.Tensor:
    """Return, for each response, the length of the shorter one of its pair.

    Shape: (2 * batch_size,), first for all chosen responses, then for all rejected ones.
    """
    lengths = [response_lengths(batch[f"{side}_labels"]) for side in ("chosen", "rejected")]
    return torch.minimum(*lengths).repeat(2)


def with_first_labels(batch: dict, n_first: torch.Tensor) -> dict:
    """Return the batch with only the first `n_first` tokens of each response labelled; `n_first`: (2 * batch_size,)."""
    cut = dict(batch)
    for side, n_tokens in zip(("chosen", "rejected"), n_first.chunk(2), strict=True):
        labels = batch[f"{side}_labels"].clone()
        predicted = labels[:, 1:]
        predicted[(predicted != -100).cumsum(1) > n_tokens[:, None]] = -100
        cut[f"{side}_labels"] = labels
    return cut


def on_policy_weights(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the weight of each response in WPO, shape (batch_size,): large if the model is likely to sample it.

    It is exp(mean_t [log π(y_t) - log Σ_v π(v)²]) over the response's tokens y_t (https://arxiv.org/abs/2406.11827,
    Eq. 2).
    """
    log_collisions = (2 * logits[:, :-1].log_softmax(-1)).logsumexp(-1)  # (B, T-1)
    is_predicted = labels[:, 1:] != -100
    log_collisions = (log_collisions * is_predicted).sum(-1) / is_predicted.sum(-1)
    return (_get_batch_logps(logits, labels, average_log_prob=True) - log_collisions).exp()


def concatenated_inputs(batch: dict[str, list | torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stack the chosen above the rejected sequences: (2 * batch_size, longest), under 'concatenated_...' keys."""
    length = max(batch["chosen_input_ids"].shape[1], batch["rejected_input_ids"].shape[1])
    concatenated_batch = {}
    for kind in ("input_ids", "attention_mask", "labels"):
        pad_value = -100 if kind == "labels" else 0
        concatenated_batch[f"concatenated_{kind}"] = torch.cat(
            [pad_to_length(batch[f"{side}_{kind}"], length, pad_value) for side in ("chosen", "rejected")]
        )
    return concatenated_batch
