"""How often a training step makes the host wait for a GPU, seen on the meta device, whose tensors hold no data.

Whatever reads data of the device (a number, which entries are true, a copy to the host) fails there, as it would wait
on a GPU. So a whole step runs on it, forward, backward, clipping and update, save for the one place where its metrics
are read; and whatever is copied to the device is copied without waiting.
"""

import pytest
import torch
from conftest import ORACLE, exhaustive_except
from torch.utils._python_dispatch import TorchDispatchMode

import trainers

RUN = [
    "model=tiny", f"dataset_paths.hh={ORACLE}/hh", "max_length=128", "max_prompt_length=64", "batch_size=8",
    "n_examples=24", "n_eval_examples=6", "eval_batch_size=4", "eval_every=16", "sample_during_eval=false",
    "max_tokens_per_microbatch=600",
]  # fmt: skip
META = torch.device("meta")


class WaitingCopies(TorchDispatchMode):
    """Collects the shapes of what is copied from one device to another so that the host waits."""

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
    """Let metrics be read from the meta device, as ones; collects the names that were read together."""
    collected = []

    def read(parts, n_examples=None):
        assert all(values.device == META for part in parts for values in part.values())
        collected.append({name for part in parts for name in part})
        return dict.fromkeys(collected[-1], 1.0)

    monkeypatch.setattr(trainers, "mean_metrics", read)
    return collected


def on_meta(trainer: trainers.BasicTrainer) -> dict:
    """Move the models to the meta device; returns a prepared batch."""
    trainer.precompute_reference()
    batch = next(iter(trainer.train_iterator))
    trainer.policy.to(META)
    trainer.device = META
    if trainer.reference is not None:
        trainer.reference.model.to(META)
    return trainer.prepare(batch)


CACHED = "loss=dpo precompute_ref_log_probs=true optimizer=AdamW"


# in rows with padding but without a mask, transformers looks for packed sequences, once a forward
@pytest.mark.parametrize(
    "variant",
    exhaustive_except(
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
