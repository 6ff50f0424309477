"""FSDPTrainer with tensor_parallel on four or eight workers (real processes) equals one process, in float64."""

import os

import pytest
import torch
import transformers
from conftest import ORACLE, mark_exhaustive_except, save_models
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from checkpointing.archives import read_state_dict
from checkpointing.restoring import resume_training
from checkpointing.train_state import restore_rng_state, seed_generators
from commands.command_line import compose_config
from config_checks.checks import check_config
from distributed import collectives
from distributed.dtensor import n_gathered
from evaluation import sampling
from trainers import BasicTrainer, make_trainer
from utils import UserError

SIZES = {
    "vocab_size": 510, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": transformers.GPT2Config(vocab_size=510, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=8),
}
RUN = [
    "model=blank_model", f"dataset_paths.hh={ORACLE}/hh", "model.policy_dtype=float64", "model.reference_dtype=float64",
    "max_length=96", "max_prompt_length=48", "batch_size=8", "gradient_accumulation_steps=2", "n_examples=24",
    "n_eval_examples=7", "eval_batch_size=4", "lr=1e-3", "warmup_steps=0", "max_grad_norm=0.5", "wandb.enabled=false",
    "sample_during_eval=false",
]  # fmt: skip
MESH = ["trainer=FSDPTrainer", "tensor_parallel=2"]
CASES = {  # each case's model and loss; the optimizers, AdamW and RMSprop, have state that checkpoints must hold
    "tied llama, samples": [
        "model.name_or_path={llama}", "loss=dpo", "sample_during_eval=true", "n_eval_model_samples=3",
    ],
    "fused gpt2, divergence of a whole batch": ["model.name_or_path={gpt2}", "loss=kto", "optimizer=AdamW"],
    "qwen3's q and k norms, gradient of a whole batch": [
        "model.name_or_path={qwen3}", "loss=aot", "precompute_ref_log_probs=true", "activation_checkpointing=true",
    ],
    "adapter of the fused gpt2": [
        "model.name_or_path={gpt2}", "loss=dpo", "lora.r=3", "activation_checkpointing=true",
    ],
}  # fmt: skip

EXTRA_OVERRIDES_IN_WORKERS = {"fused gpt2, divergence of a whole batch": ["fsdp_cpu_offload=true"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Save a model for each of `CONFIGS`; return their directories."""
    return save_models(CONFIGS, tmp_path_factory.mktemp("models"))


def new_trainer(words: list[str], directory: str) -> BasicTrainer:
    config = compose_config(*RUN, *words, f"local_dirs=[{directory}/cache]", f"local_run_dir={directory}/run")
    OmegaConf.resolve(config)
    check_config(config)
    trainer = make_trainer(config)
    trainer.precompute_reference()
    return trainer


def trained(words: list[str], directory: str) -> dict[str, object]:
    """Train to the end, evaluate, sample and save; return the numbers, and the rows of this worker."""
    trainer = new_trainer(words, directory)
    seed_generators(trainer.seed + trainer.strategy.batch_shard[0])
    steps = [trainer.train_step(trainer.with_microbatches(batch)) for batch in trainer.train_iterator]
    numbers = {"steps": steps, "evaluation": trainer.evaluate(), "rows": trainer.eval_batches[0]["index"]}
    if trainer.config.sample_during_eval:
        numbers["samples"] = [(s["model"], s["prompt"]) for s in sampling.sample_evaluation(trainer)[0]]
    trainer.save(os.path.join(directory, "saved"))
    collectives.barrier()
    return numbers


def assert_same_numbers(numbers: dict, expected: dict):
    assert numbers.keys() == expected.keys()
    for name in numbers.keys() - {"examples_per_second", "tokens_per_second"}:
        assert numbers[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name


def states(directory) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors: of an adapter, or of a policy; and of the optimizer."""
    if (adapter := directory / "adapter_model.safetensors").exists():
        found = load_file(adapter)
    else:
        found = read_state_dict(str(directory / "policy.pt"))
    optimizer = read_state_dict(str(directory / "optimizer.pt"))["state"]
    return found | {f"{number} {key}": value for number, kept in optimizer.items() for key, value in kept.items()}


@pytest.mark.parametrize(
    ("case", "n_workers", "n_replicas"),
    mark_exhaustive_except(
        [
            ("fused gpt2, divergence of a whole batch", 4, 1),
            ("qwen3's q and k norms, gradient of a whole batch", 4, 1),
            ("adapter of the fused gpt2", 4, 2),
            ("tied llama, samples", 4, 2),
            ("tied llama, samples", 8, 2),
        ],
        ("fused gpt2, divergence of a whole batch", 4, 1),
    ),
)
def test_two_workers_per_batch_shard_train_as_one_process(case, n_workers, n_replicas, models, in_workers, tmp_path):
    words = [word.format(**models) for word in CASES[case]]
    alone = trained(words, str(tmp_path / "alone"))
    words += [*MESH, f"fsdp_replicate={n_replicas}", *EXTRA_OVERRIDES_IN_WORKERS.get(case, [])]
    together = in_workers(n_workers, trained, words, str(tmp_path / "together"))
    shards = [[0, 1], [2, 3]] if n_workers == 4 else [[0], [1], [2], [3]]
    assert [worker["rows"] for worker in together] == [rows for rows in shards for _ in range(2)]
    for worker in together:
        for step, expected in zip(worker["steps"], alone["steps"], strict=True):
            assert_same_numbers(step, expected)
        assert_same_numbers(worker["evaluation"], alone["evaluation"])
        assert worker.get("samples") == alone.get("samples")
    state, expected = states(tmp_path / "together/saved"), states(tmp_path / "alone/saved")
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


def resume_and_save(words: list[str], checkpoint: str, directory: str) -> int:
    """Resume from a checkpoint and save at once; return this worker's next random number."""
    trainer = new_trainer(words, directory)
    torch.manual_seed(trainer.rank)
    resume_training(trainer, checkpoint)
    restore_rng_state(trainer.state.rng_states, *trainer.strategy.batch_shard)
    trainer.save(os.path.join(directory, "saved"))
    return int(torch.randint(10**9, ()))


TRAINERS_IN_TURN = [  # number of workers, overrides
    (2, ["trainer=FSDPTrainer"]),
    (4, MESH),
    (2, ["trainer=TensorParallelTrainer"]),
    (4, MESH),
    (1, ["trainer=BasicTrainer"]),
]
FEW_IN_TURN = [*TRAINERS_IN_TURN[:2], TRAINERS_IN_TURN[-1]]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("case", "in_turn"),
    [("adapter of the fused gpt2", FEW_IN_TURN), *((case, TRAINERS_IN_TURN) for case in list(CASES)[1:])],
    ids=str,
)
def test_state_stays_the_same_bit_for_bit_through_all_trainers(case, in_turn, models, in_workers, tmp_path):
    words = [word.format(**models) for word in CASES[case]]
    trained(words, str(tmp_path / "start"))
    checkpoint, draws = tmp_path / "start/saved", []
    for turn, (n_workers, trainer) in enumerate(in_turn):
        directory = tmp_path / f"turn-{turn}"
        form = "sharded" if turn in (1, 2) and n_workers > 1 else "whole"
        args = resume_and_save, [*words, *trainer, f"checkpoint_format={form}"], str(checkpoint), str(directory)
        draws.append(in_workers(n_workers, *args) if n_workers > 1 else [args[0](*args[1:])])
        checkpoint = directory / "saved"
    state, expected = states(checkpoint), states(tmp_path / "start/saved")
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    first, second = draws[0]
    assert first != second
    # workers that compute together draw the same
    assert draws[1] == [first, first, second, second]
    assert draws[2] == [first] * in_turn[2][0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["tensor_parallel=3", "world_size=4"],
            "tensor_parallel=3 doesn't divide the 4 workers into equal groups; use",
        ),
        (
            ["tensor_parallel=2", "world_size=6", "fsdp_replicate=2"],
            "fsdp_replicate=2 doesn't divide the 3 groups of 2 workers into equal groups; use a divisor of 3",
        ),
        (
            ["tensor_parallel=2", "world_size=16"],
            "batch_size=8 doesn't divide by gradient_accumulation_steps=2 × 8 groups of 2 workers into microbatches",
        ),
        (
            ["tensor_parallel=2", "trainer=TensorParallelTrainer"],
            "tensor_parallel=2: only trainer=FSDPTrainer uses it",
        ),
        (["tensor_parallel=0"], "tensor_parallel=0: must be"),
    ],
)
def test_impossible_division_of_workers_is_refused(words, message, models, tmp_path):
    with pytest.raises(UserError, match=message):
        new_trainer([f"model.name_or_path={models['llama']}", "trainer=FSDPTrainer", *words], str(tmp_path))


def refused_heads(words: list[str], directory: str):
    with pytest.raises(UserError, match=r"num_key_value_heads=2: use .* divides 2, or use .* with tensor_parallel=1"):
        new_trainer([*words, "trainer=FSDPTrainer", "tensor_parallel=4"], directory)


def test_heads_that_do_not_divide_are_refused(models, in_workers, tmp_path):
    in_workers(4, refused_heads, [f"model.name_or_path={models['llama']}"], str(tmp_path))


def gathered_elements(words: list[str], directory: str) -> tuple[int, int]:
    """Return the number of parameter elements a worker holds once FSDP has gathered them: planned, and actual."""
    policy = new_trainer(words, directory).policy
    planned = sum(n_gathered(parameter) for parameter in policy.parameters())
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    return planned, sum(getattr(p, "_local_tensor", p).numel() for p in policy.parameters())


@pytest.mark.exhaustive
def test_planned_size_of_gathered_weights_is_the_actual_size(models, in_workers, tmp_path):
    words = [f"model.name_or_path={models['qwen3']}", "loss=sft"]
    whole = sum(parameter.numel() for parameter in new_trainer(words, str(tmp_path / "alone")).policy.parameters())
    assert whole == 48_192
    for planned, held in in_workers(4, gathered_elements, [*words, *MESH], str(tmp_path / "together")):
        assert planned == held < 0.51 * whole  # norms stay whole
