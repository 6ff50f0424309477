"""The layout of a model's batches: making rows, and the forward pass over them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from acceleration.prefix_sharing import PACKED, SHARED, Rows, packed_rows, padded_rows
from acceleration.response_head import response_logps
from distributed.strategies import SingleProcess
from utils import unwrap_adapter


@dataclass(frozen=True)
class Layout:
    """A layout of batches. `model_check.choose_layout` chooses it, after comparing it with the plain forward."""

    make_rows: Callable[[dict], Rows] | None  # None: the plain way, as the original computes
    whole_logits: bool = False  # take logits from the whole model, which does more to them than apply the output head

    @property
    def is_plain(self) -> bool:
        """True if the trainer's own plain forward computes the model."""
        return self.make_rows is None

    @property
    def is_shared(self) -> bool:
        """True if a pair's prompt is computed once."""
        return self.make_rows in SHARED

    @property
    def is_packed(self) -> bool:
        """True if rows have no padding."""
        return self.make_rows in PACKED

    def response_logps(
        self, model: nn.Module, batch: dict, strategy: type[SingleProcess], until: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the log-probability of each of the batch's S responses, chosen before rejected: (S,), in nats.

        `until`: see `response_head.response_logps`.
        """
        model = unwrap_adapter(model)
        args = self.rows(batch), self.whole_logits, strategy, until
        return strategy.run_as_forward(model, response_logps, model, *args)

    def prepare(self, batch: dict, pin_memory: bool) -> dict:
        """Return the batch with its rows, made ahead of time; a GPU can copy pinned ones while it computes."""
        if self.is_plain:
            return batch
        rows = self.rows(batch).pin_memory() if pin_memory else self.rows(batch)
        return batch | {"rows": batch.get("rows", {}) | {self.make_rows: rows}}

    def rows(self, batch: dict) -> Rows:
        """Return the rows of a batch: those that `prepare` has made, if it was called."""
        if self.make_rows in batch.get("rows", {}):
            return batch["rows"][self.make_rows]
        if "rejected_labels" in batch:
            return self.make_rows(batch)
        return packed_rows(batch) if self.is_packed else padded_rows(batch)  # single sequences share nothing


PLAIN = Layout(None)
