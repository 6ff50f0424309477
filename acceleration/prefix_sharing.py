"""Lay out a batch as rows that a model computes: padded, with shared prompts (prefix sharing), or packed.

- `padded_rows` makes the original's rows: 2B rows, [prompt, chosen] and [prompt, rejected], padded to the longest.
- `shared_rows` computes each prompt once (prefix sharing, https://arxiv.org/abs/2410.20305): B rows [prompt, chosen,
  rejected]. Each response attends to the prompt and to itself, and both have the positions that follow the prompt.
- `packed_rows` puts the same sequences into a single row, one after the other, without padding and without a mask (see
  `acceleration.packed_attention`). It can share prompts, too.

All layouts give the same log-probabilities.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch

from acceleration.packed_attention import Packing, with_tensors
from data.microbatches import part_lengths
from log_probabilities import concatenated_inputs


@dataclass
class Rows:
    """The input of one forward pass: B rows of T tokens, which hold S responses with N predicted tokens in total."""

    input_ids: torch.Tensor  # (B, T)
    predictors: torch.Tensor  # (N,) index among all B * T positions: its output predicts a response token
    targets: torch.Tensor  # (N,) the token that it predicts
    sequences: torch.Tensor  # (N,) index of the token's response, below S
    offsets: torch.Tensor  # (N,) the token's index among the predicted tokens of its response
    n_sequences: int  # S
    position_ids: torch.Tensor | None = None  # (B, T)
    roles: torch.Tensor | None = None  # (B, T) 0: prompt, 1: chosen, 2: rejected; None: plain causal attention
    packing: Packing | None = None  # the segments of a packed row (then B is 1)

    def __post_init__(self):
        lengths = torch.bincount(self.sequences, minlength=self.n_sequences)
        self.longest_response = int(lengths.max()) if len(self.sequences) else 0  # in predicted tokens

    def to(self, device: torch.device) -> "Rows":
        """Return the same rows on another device."""
        return with_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Rows":
        """Return the same rows in pinned memory, from which they are copied to a GPU without blocking."""
        return with_tensors(self, torch.Tensor.pin_memory)


def _predictions(input_ids: torch.Tensor, is_target: torch.Tensor, predictors: torch.Tensor, first_sequence: int):
    """Return predictors, targets, sequences and offsets (see `Rows`) of the tokens in `is_target`: (B, T) to (N,) each.

    Row i belongs to response `first_sequence` + i. A token without a predictor (-1), such as the first one after an
    empty prompt, is left out.
    """
    rows, columns = (is_target & (predictors >= 0)).nonzero(as_tuple=True)
    offsets = ((is_target & (predictors >= 0)).cumsum(1) - 1)[rows, columns]
    return (
        rows * input_ids.shape[1] + predictors[rows, columns],
        input_ids[rows, columns],
        rows + first_sequence,
        offsets,
    )


def padded_rows(batch: dict) -> Rows:
    """Lay out a batch with one sequence per row: chosen responses, then rejected ones; or only the SFT targets."""
    if "rejected_input_ids" in batch:
        inputs = concatenated_inputs(batch)
        input_ids, labels = inputs["concatenated_input_ids"], inputs["concatenated_labels"]
    else:
        input_ids, labels = batch["chosen_input_ids"], batch["chosen_labels"]
    longest = int((labels != -100).int().mul(torch.arange(1, labels.shape[1] + 1)).max())
    input_ids, labels = input_ids[:, :longest], labels[:, :longest]
    predictors = torch.arange(-1, longest - 1).expand_as(input_ids)
    # no mask: padding is at the end, and causal attention looks only backwards
    return Rows(input_ids, *_predictions(input_ids, labels != -100, predictors, 0), n_sequences=len(input_ids))


def shared_rows(batch: dict) -> Rows:
    """Lay out B pairs as B rows [prompt, chosen, rejected]. S is 2B: the chosen responses, then the rejected ones."""
    n_prompt, n_chosen, n_rejected = (lengths[:, None] for lengths in part_lengths(batch))
    end_of_chosen = n_prompt + n_chosen
    t = torch.arange(int((end_of_chosen + n_rejected).max())).expand(len(n_prompt), -1)  # (B, T)
    is_chosen = (n_prompt <= t) & (t < end_of_chosen)
    is_rejected = (end_of_chosen <= t) & (t < end_of_chosen + n_rejected)

    position_ids = torch.where(t < end_of_chosen, t, t - n_chosen)  # the rejected response also follows the prompt
    chosen_ids, rejected_ids = batch["chosen_input_ids"], batch["rejected_input_ids"]
    from_chosen = chosen_ids.gather(1, t.clamp(max=chosen_ids.shape[1] - 1))
    from_rejected = rejected_ids.gather(1, position_ids.clamp(max=rejected_ids.shape[1] - 1))
    input_ids = torch.where(is_rejected, from_rejected, torch.where(t < end_of_chosen, from_chosen, 0))

    # a response may hold tokens that aren't trained, such as a tool's output
    chosen_targets = is_chosen & _is_target(batch, "chosen", t)
    rejected_targets = is_rejected & _is_target(batch, "rejected", position_ids)
    # the prompt's last token predicts the first token of both responses
    predictors = torch.where(t == end_of_chosen, n_prompt, t) - 1
    chosen = _predictions(input_ids, chosen_targets, predictors, 0)
    rejected = _predictions(input_ids, rejected_targets, predictors, len(n_prompt))
    return Rows(
        input_ids,
        *(torch.cat(parts) for parts in zip(chosen, rejected, strict=True)),
        n_sequences=2 * len(n_prompt),
        position_ids=torch.where(is_rejected | (t < end_of_chosen), position_ids, 0),
        roles=is_chosen.to(torch.uint8) + 2 * is_rejected.to(torch.uint8),
    )


def _is_target(batch: dict, side: str, positions: torch.Tensor) -> torch.Tensor:
    """Return True for the positions of a side's sequences that are trained: (B, T) to (B, T)."""
    labels = batch[f"{side}_labels"]
    return labels.gather(1, positions.clamp(max=labels.shape[1] - 1)) != -100


def packed_rows(batch: dict, shared: bool = False) -> Rows:
    """Pack a batch's sequences into one row without padding. S counts the chosen responses, then the rejected ones.

    `shared`: compute the prompt of each pair once, with the chosen response.
    """
    sides = [side for side in ("chosen", "rejected") if f"{side}_labels" in batch]
    n_prompts, n_pairs, row = part_lengths(batch)[0].tolist(), len(batch["chosen_labels"]), _PackedRow()
    for pair in range(n_pairs):
        for number, side in enumerate(sides):
            n_tokens = int(batch[f"{side}_attention_mask"][pair].sum())
            ids = batch[f"{side}_input_ids"][pair, :n_tokens]
            is_target = batch[f"{side}_labels"][pair, :n_tokens] != -100
            row.add(ids, is_target, pair + number * n_pairs, n_shared=n_prompts[pair] if shared and number else 0)
    return row.rows(n_pairs * len(sides))


class _PackedRow:
    """Collects sequences, one after the other, into a single row."""

    def __init__(self):
        self.parts: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.query_starts, self.key_starts = [0], [0]
        self.prompt_start = 0  # where the last prompt starts in the row

    def add(self, ids: torch.Tensor, is_target: torch.Tensor, sequence: int, n_shared: int):
        """Add a sequence of prompt and response, (n,).

        Args:
            is_target: (n,), True for trained tokens.
            sequence: the index of the response, below S.
            n_shared: number of leading tokens shared with the sequence added before; they aren't computed again.
        """
        start, key_start = self.query_starts[-1], self.key_starts[-1]
        self.prompt_start = self.prompt_start if n_shared else start
        n_new, n_keys = len(ids) - n_shared, len(ids)
        shared_tokens = torch.arange(self.prompt_start, self.prompt_start + n_shared)
        key_tokens = torch.cat([shared_tokens, torch.arange(start, start + n_new)])  # indices in the row
        predicted = is_target[1:].nonzero().squeeze(1) + 1  # nothing predicts a sequence's first token
        new_parts = {
            "input_ids": ids[n_shared:],
            "position_ids": torch.arange(n_shared, len(ids)),
            "predictors": key_tokens[predicted - 1],
            "targets": ids[predicted],
            "sequences": torch.full_like(predicted, sequence),
            "offsets": torch.arange(len(predicted)),
            "key_tokens": key_tokens,
            "own_keys": torch.arange(key_start + n_shared, key_start + n_keys),
            "repeated_keys": torch.arange(key_start, key_start + n_shared),
        }
        for name, part in new_parts.items():
            self.parts[name].append(part)
        self.query_starts.append(start + n_new)
        self.key_starts.append(key_start + n_keys)

    def rows(self, n_sequences: int) -> Rows:
        """Return the sequences added so far as one row; `n_sequences` is the number of responses, S."""
        parts = {name: torch.cat(parts) for name, parts in self.parts.items()}
        query_starts, key_starts = (torch.tensor(starts, dtype=torch.int32) for starts in
                                    (self.query_starts, self.key_starts))  # fmt: skip
        key_indices = {name: parts.pop(name) for name in ("key_tokens", "own_keys", "repeated_keys")}
        longest = int(query_starts.diff().max()), int(key_starts.diff().max())
        shares_prompts = len(key_indices["repeated_keys"]) > 0
        packing = Packing(query_starts, key_starts, *longest, **(key_indices if shares_prompts else {}))
        inputs = {name: parts.pop(name)[None] for name in ("input_ids", "position_ids")}
        order = parts["sequences"].argsort(stable=True)  # all chosen responses first, as in the other layouts
        predictions = {name: part[order] for name, part in parts.items()}
        return Rows(**inputs, **predictions, n_sequences=n_sequences, packing=packing)
