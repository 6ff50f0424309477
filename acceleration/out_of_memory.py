"""Name the keys that would help if a GPU is out of memory."""

import contextlib
from collections.abc import Iterator

import torch
from omegaconf import DictConfig

from distributed.strategies import STRATEGIES
from losses import needs_reference
from references import resolved_reference
from utils import UserError, first_line


@contextlib.contextmanager
def out_of_memory_explained(config: DictConfig) -> Iterator[None]:
    """Turn PyTorch's out-of-memory error, raised inside the block, into a UserError with remedies."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"a GPU is out of memory: {first_line(error)}\n{remedies(config)}") from error


def remedies(config: DictConfig) -> str:
    """Return a sentence with the settings that would reduce a run's memory and that it doesn't use yet."""
    model, trains_all = config.model, config.lora is None and config.model.adapter is None
    second_model = needs_reference(config.loss) and resolved_reference(config) == "model"
    held_dtype = model.reference_dtype or model.policy_mp or model.policy_dtype
    strategy = STRATEGIES[config.trainer]
    candidates = [
        ("activation_checkpointing=true", not config.activation_checkpointing),
        ("precompute_ref_log_probs=true", second_model and not config.precompute_ref_log_probs),
        ("lora={}", trains_all),
        ("model.policy_dtype=bfloat16", model.policy_dtype in ("float32", "float64")),
        ("model.load_in_4bit=true with lora={}", not model.load_in_4bit),
        ("model.reference_dtype=bfloat16", second_model and held_dtype in ("float32", "float64")),
        ("optimizer=RMSprop, which has a smaller state", trains_all and config.optimizer not in ("RMSprop", "SGD")),
        ("trainer=FSDPTrainer on more GPUs", not strategy.starts_workers),
        ("fsdp_cpu_offload=true", "fsdp_cpu_offload" in strategy.config_keys and not config.fsdp_cpu_offload),
        ("max_tokens_per_microbatch=N", config.max_tokens_per_microbatch is None),
        (f"a smaller max_length (now {config.max_length})", True),
    ]
    return f"To use less memory: {'; '.join(remedy for remedy, applies in candidates if applies)}"
