"""A reference that follows the policy (TR-DPO) moves by the same amount with several workers and after a resume."""

import math
import shutil

import pytest
import torch
from conftest import REPOSITORY, mark_exhaustive_except, read_jsonl
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from checkpointing.restoring import resume_training
from commands.run_directory import create_run_dir
from utils import UserError

TOY = [
    "model=tiny", "datasets=[toy]", "loss=dpo", "n_examples=24", "n_eval_examples=4", "lr=1e-3", "warmup_steps=0",
    "sample_during_eval=false", "do_first_eval=false", "max_length=64", "max_prompt_length=32", "save_every=4",
]  # fmt: skip


def losses(run_dir) -> list[float]:
    return [line["loss/train"] for line in read_jsonl(run_dir / "metrics.jsonl") if line["split"] == "train"]


def states(run_dir, name: str) -> list[dict[str, torch.Tensor]]:
    """Return a file's state dict from each checkpoint, in order."""
    paths = sorted(run_dir.glob("step-*"), key=lambda path: int(path.name[5:]))
    return [torch.load(path / f"{name}.pt", weights_only=True)["state"] for path in [*paths, run_dir / "LATEST"]]


def run(trainer):
    """Train and save."""
    create_run_dir(trainer.config)
    trainer.train()
    trainer.save()
    return trainer


def train(make_trainer, *overrides: str):
    return run(make_trainer(*TOY, *overrides))


def test_reference_updated_every_step_keeps_the_loss_at_ln_2(make_trainer, tmp_path):
    train(make_trainer, "reference_update_every=1", f"local_run_dir={tmp_path}/run")
    assert losses(tmp_path / "run") == pytest.approx([math.log(2)] * 6, abs=1e-6)


def test_reference_moves_every_n_steps_to_the_mixture(make_trainer, tmp_path):
    overrides = ["reference_update_every=2", "reference_update_alpha=0.6", f"local_run_dir={tmp_path}/run"]
    trainer = make_trainer(*TOY, *overrides)
    reference = {key: tensor.clone() for key, tensor in trainer.policy.state_dict().items()}
    run(trainer)
    policies, references = states(tmp_path / "run", "policy"), states(tmp_path / "run", "reference")
    assert len(policies) == 6
    for step, (policy, saved) in enumerate(zip(policies, references, strict=True), start=1):
        if step % 2 == 0:
            reference = {key: 0.6 * policy[key] + 0.4 * reference[key] for key in reference}
        assert saved.keys() == reference.keys()
        for key, expected in reference.items():
            torch.testing.assert_close(saved[key], expected, rtol=1e-5, atol=1e-7)
    assert losses(tmp_path / "run")[1] != pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "trainer", mark_exhaustive_except(["BasicTrainer", "FSDPTrainer", "TensorParallelTrainer"], "BasicTrainer")
)
def test_resumed_run_restores_the_moved_reference(trainer, make_trainer, launcher, tmp_path):
    overrides = ["reference_update_every=2", "reference_update_alpha=0.5", "eval_every=16", "save_every=16"]
    overrides += ["model.policy_dtype=float64", "model.reference_dtype=float64"]  # rounding hides nothing
    train(make_trainer, *overrides, "n_examples=16", f"local_run_dir={tmp_path}/one")
    n_workers = 1 if trainer == "BasicTrainer" else 2
    for n_examples in (12, 16):
        cut = [f"n_examples={n_examples}", f"trainer={trainer}", f"local_run_dir={tmp_path}/cut", "resume=auto"]
        assert launcher.run(*TOY, *overrides, *cut, n_workers=n_workers) == 0, launcher.output
    tolerance = 0 if trainer == "BasicTrainer" else 1e-6
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "one"), rel=tolerance, abs=tolerance)
    for file in ("policy", "reference"):
        cut, expected = (states(tmp_path / name, file)[-1] for name in ("cut", "one"))
        torch.testing.assert_close(cut, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=sft"], "loss=sft has no reference to move"),
        (["loss.reference_free=true"], "has no reference to move"),
        (["precompute_ref_log_probs=true"], "precompute_ref_log_probs=true needs a reference that does"),
        (["lora={r:4}"], "an adapter's reference can't follow it"),
        (["reference_update_alpha=1.5"], "must be at most 1"),
        (["reference_update_alpha=0"], "must be a number above 0"),
        (["reference_update_every=0"], "must be a number above 0"),
    ],
    ids=str,
)
def test_moving_reference_with_incompatible_settings_is_refused(overrides, message, make_trainer):
    with pytest.raises(UserError, match=message):
        make_trainer(*TOY, "reference_update_every=2", *overrides)


def test_reference_that_cannot_follow_the_policy_is_refused_at_the_start(make_trainer, tmp_path):
    make_trainer(*TOY, "lora={r:2}").policy.save_pretrained(tmp_path / "lora")
    with pytest.raises(UserError, match=r"reference_model\.adapter=.* has weights that the policy lacks"):
        make_trainer(*TOY, "reference_update_every=2", f"reference_model.adapter={tmp_path}/lora")
    config = AutoConfig.from_pretrained(REPOSITORY / "assets/tiny")
    config.num_hidden_layers += 1
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "larger")
    with pytest.raises(
        UserError, match=r"the reference has another architecture .*\(gpt_neox.layers.*the policy's is absent"
    ):
        make_trainer(*TOY, "reference_update_every=2", f"reference_model.name_or_path={tmp_path}/larger")


def test_reference_with_tied_embeddings_follows_a_tied_policy_only(make_trainer, tmp_path):
    shutil.copytree(REPOSITORY / "assets/tiny", tmp_path / "tied")
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 128, "vocab_size": 2048}
    GPT2Config(**sizes, bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path / "tied")
    policy = ["model=tiny", f"model.name_or_path={tmp_path}/tied"]
    trainer = train(make_trainer, *policy, "n_examples=8", "reference_update_every=1", f"local_run_dir={tmp_path}/run")
    assert losses(tmp_path / "run") == pytest.approx([math.log(2)] * 2, abs=1e-6)
    resume_training(trainer, f"{tmp_path}/run/LATEST")
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "untied")
    with pytest.raises(UserError, match=r"\(lm_head.weight: \(2048, 32\), the policy's is absent\)"):
        make_trainer(*TOY, *policy, "reference_update_every=1", f"reference_model.name_or_path={tmp_path}/untied")


def test_checkpoint_without_the_moved_reference_is_refused(make_trainer, tmp_path):
    trainer = make_trainer(*TOY, f"local_run_dir={tmp_path}/run")
    create_run_dir(trainer.config)
    trainer.save()
    assert not (tmp_path / "run/LATEST/reference.pt").exists()
    trainer.moves_reference = True
    with pytest.raises(UserError, match=r"reference\.pt: can't read it"):
        resume_training(trainer, str(tmp_path / "run/LATEST"))
