"""Every kind of PEFT adapter trains, and its checkpoint restores what was trained."""

import pytest
from conftest import ORACLE, mark_exhaustive_except

from checkpointing.checkpoints import load_policy_state

MODEL = [
    "model=blank_model", f"model.name_or_path={ORACLE}/model", "datasets=[toy]", "n_examples=8", "n_eval_examples=4",
    "max_length=64", "max_prompt_length=32", "sample_during_eval=false", "lr=1e-2", "warmup_steps=0",
]  # fmt: skip
SETTINGS = [
    "use_dora:true",
    "bias:all",
    "modules_to_save:[embed_in]",
    "trainable_token_indices:[5,6]",
    "init_lora_weights:pissa",
    "init_lora_weights:mica",  # one of its two matrices is frozen
    "monteclora_config:{num_samples:2}",  # it has buffers
]


@pytest.mark.parametrize(
    "settings",
    mark_exhaustive_except(SETTINGS, "modules_to_save:[embed_in]"),
)
def test_adapter_checkpoint_restores_everything_trained(settings, make_trainer, tmp_path):
    trainer = make_trainer(*MODEL, "loss=dpo", f"lora={{{settings}}}")
    first = trainer.evaluate()
    for batch in trainer.train_iterator.batches(skip=0):
        trainer.train_step(batch)
    trained = trainer.evaluate()
    assert trained["logps_eval/chosen"] != first["logps_eval/chosen"]
    trainer.save(str(tmp_path / "checkpoint"))

    again = make_trainer(*MODEL, "loss=dpo", f"lora={{{settings}}}")
    load_policy_state(str(tmp_path / "checkpoint"), again.policy)
    assert again.evaluate() == trained
    loaded = make_trainer(*MODEL, "loss=dpo", f"model.adapter={tmp_path}/checkpoint", "reference=model")
    # equal up to rounding: an adapter that is random in training (MonteCLoRA) may be computed differently afterwards
    assert loaded.evaluate()["logps_eval/chosen"] == pytest.approx(trained["logps_eval/chosen"], rel=1e-6)
