"""The layout of batches: it makes the rows that a model computes, and their log-probabilities."""

from dataclasses import dataclass

import torch
from torch import nn

from acceleration.prefix_sharing import Rows, packed_rows, padded_rows, shared_rows
from acceleration.response_head import response_logps
from distributed.strategies import SingleProcess
from utils import unwrap_adapter


@dataclass(frozen=True)
class Layout:
    """A layout of batches. `model_check.choose_layout` chooses it, after comparing it with the plain forward."""

    shares_prompts: bool = False  # each pair's prompt is computed once
    is_packed: bool = False  # all sequences are in one row, without padding
    whole_logits: bool = False  # take logits from the whole model, because it modifies its output head's result
    is_plain: bool = False  # use the trainer's own plain forward

    def response_logps(
        self, model: nn.Module, batch: dict, strategy: type[SingleProcess], n_first: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the log-probability of each of the batch's S responses, chosen before rejected: (S,), in nats.

        `n_first`: see `response_head.response_logps`.
        """
        model = unwrap_adapter(model)
        args = self.rows(batch), self.whole_logits, strategy, n_first
        return strategy.run_as_forward(model, response_logps, model, *args)

    def prepare(self, batch: dict, pin_memory: bool) -> dict:
        """Return the batch with its rows, made ahead of time; a GPU can copy pinned rows while it computes."""
        if self.is_plain:
            return batch
        rows = self.rows(batch).pin_memory() if pin_memory else self.rows(batch)
        return batch | {"rows": batch.get("rows", {}) | {(self.shares_prompts, self.is_packed): rows}}

    def rows(self, batch: dict) -> Rows:
        """Return the rows of a batch; make them unless `prepare` has made them already."""
        if prepared := batch.get("rows", {}).get((self.shares_prompts, self.is_packed)):
            return prepared
        shares_prompts = self.shares_prompts and "rejected_labels" in batch  # single sequences share nothing
        if self.is_packed:
            return packed_rows(batch, shares_prompts)
        return shared_rows(batch) if shares_prompts else padded_rows(batch)


PLAIN = Layout(is_plain=True)
