"""A training step makes the host wait for a GPU once, as tested on the meta device, whose tensors hold no data.

Operations that make the host wait for a GPU (reading a number, finding true entries, copying to the host) fail on the
meta device. So a whole step runs there: forward, backward, clipping and update. Only the one place where metrics are
read is replaced. Copies to the device must not wait, either.
"""

import pytest
import torch
from conftest import ORACLE, mark_exhaustive_except
from torch.utils._python_dispatch import TorchDispatchMode

import trainers

RUN = [
    "model=tiny", f"dataset_paths.hh={ORACLE}/hh", "max_length=128", "max_prompt_length=64", "batch_size=8",
    "n_examples=24", "n_eval_examples=6", "eval_batch_size=4", "eval_every=16", "sample_during_eval=false",
    "max_tokens_per_microbatch=600",
]  # fmt: skip
META = torch.device("meta")


class WaitingCopies(TorchDispatchMode):
    """Collects the shapes of tensors whose copy to another device makes the host wait."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default:
            target = kwargs.get("device") or args[0].device
            if torch.device(target) != args[0].device and not kwargs.get("non_blocking"):
                self.shapes.append(args[0].shape)
        if function is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            self.shapes.append(args[1].shape)
        return function(*args, **kwargs)


@pytest.fixture
def reads(monkeypatch):
    """Return a list that collects the names of metrics read together; all values are read as 1."""
    collected = []

    def read(parts, n_examples=None):
        assert all(values.device == META for part in parts for values in part.values())
        collected.append({name for part in parts for name in part})
        return dict.fromkeys(collected[-1], 1.0)

    monkeypatch.setattr(trainers, "mean_metrics", read)
    return collected


def on_meta(trainer: trainers.BasicTrainer) -> dict:
    """Move the models to the meta device; return a prepared batch."""
    trainer.precompute_reference()
    batch = next(iter(trainer.train_iterator))
    trainer.policy.to(META)
    trainer.device = META
    if trainer.reference is not None:
        trainer.reference.model.to(META)
    return trainer.with_microbatches(batch)


CACHED = "loss=dpo precompute_ref_log_probs=true optimizer=AdamW"


# not SFT without packed rows: in padded rows without a mask, Transformers reads the device to look for packed sequences
@pytest.mark.parametrize(
    "variant",
    mark_exhaustive_except(
        [f"{loss} padding_free={value}" for value in ("true", "false") for loss in ("loss=dpo", "loss=kto", CACHED)]
        + ["loss=sft padding_free=true"],
        "loss=dpo padding_free=true",
        f"{CACHED} padding_free=false",
        "loss=sft padding_free=true",
    ),
)
def test_training_step_reads_the_device_once(variant, make_trainer, reads):
    trainer = make_trainer(*RUN, *variant.split())
    batch = on_meta(trainer)
    assert len(batch["microbatches"]) > 1
    reads.clear()
    with WaitingCopies() as copies:
        trainer.train_step(batch)
    (names,) = reads
    assert names >= {"loss/train", "grad_norm", "tokens"}
    assert copies.shapes == []


def test_additional_device_read_would_be_noticed(make_trainer, reads):
    trainer = make_trainer(*RUN, "loss=sft")
    batch, losses = on_meta(trainer), trainer.get_batch_metrics

    def reading(*args):
        loss, metrics = losses(*args)
        loss.item()
        return loss, metrics

    trainer.get_batch_metrics = reading
    with pytest.raises(RuntimeError, match="meta"):
        trainer.train_step(batch)
