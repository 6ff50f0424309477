"""Under FSDP, which gathers the model for every token, a run warns if sampling took longer than the evaluation."""

import contextlib
import io

import pytest
from conftest import ORACLE
from omegaconf import OmegaConf

from commands.command_line import compose_config
from config_checks.checks import check_config
from evaluation import sampling
from trainers import make_trainer


def printed(directory: str, trainer_name: str, *evaluation_seconds: float) -> list[str]:
    """Return the output of two rounds of sampling from 2 prompts, for each duration of an evaluation in seconds."""
    config = compose_config(
        "model=tiny", f"dataset_paths.hh={ORACLE}/hh", "loss=dpo", "max_length=20", "max_prompt_length=16",
        "n_eval_examples=2", "eval_batch_size=1", "n_eval_model_samples=2", f"local_dirs=[{directory}/cache]",
        f"local_run_dir={directory}/run", f"trainer={trainer_name}", "wandb.enabled=false",
    )  # fmt: skip
    OmegaConf.resolve(config)
    check_config(config)
    trainer = make_trainer(config, purpose="evaluate")
    sampling.NOTABLE_SECONDS = 0.0
    outputs = []
    for seconds in evaluation_seconds:
        trainer.run_dir = f"{directory}/{seconds}"
        with contextlib.redirect_stdout(io.StringIO()) as output:
            for _ in range(2):
                samples, _ = sampling.sample_evaluation(trainer, seconds)
                assert len(samples) == 4
        outputs.append(output.getvalue())
    return outputs


@pytest.mark.exhaustive
def test_sampling_that_took_longer_than_the_evaluation_warns_once(in_workers, tmp_path):
    (first, quick), of_second_worker = in_workers(2, printed, str(tmp_path), "FSDPTrainer", 0.0, 1e6)
    assert first.count("WARNING: drawing samples took") == 1
    assert "trainer=FSDPTrainer" in first and "sample.py with engine=vllm" in first
    assert "WARNING" not in quick + "".join(of_second_worker)


@pytest.mark.exhaustive
def test_sampling_in_one_process_gives_no_warning(tmp_path):
    assert "WARNING" not in printed(str(tmp_path), "BasicTrainer", 0.0)[0]
