"""Speed up a trainer whose models and optimizer are loaded: cast weights once per step, compile, plan memory."""

from acceleration.capacity import measure_activations, microbatch_overhead
from acceleration.compiled import compile_blocks
from acceleration.measurement import full_length_batch
from acceleration.memory_plan import plan_memory
from acceleration.shadow_weights import round_if_equal, shadow_if_equal
from data.microbatches import CPU_OVERHEAD, computed_tokens
from references import reference_has_policy_precision
from utils import rank0_print


def speed_up(trainer) -> tuple[float, int | None]:
    """Apply all speed-ups to a trainer's models. Memory is planned only for a trainer with an optimizer, on a GPU.

    Returns: the cost of one more microbatch, in tokens that could be computed in the same time; and the largest number
        of tokens in a microbatch (None: no limit).
    """
    config, policy = trainer.config, trainer.policy
    if trainer.policy_mp is not None and trainer.eval_iterator is not None:
        _cast_once(trainer)
    fitting = _fitting_tokens(trainer) if trainer.optimizer and trainer.device.type == "cuda" else None
    if config.compile:
        compile_blocks(policy, config.model.block_name)
    overhead = CPU_OVERHEAD if trainer.device.type == "cpu" else microbatch_overhead(policy)
    return overhead, config.max_tokens_per_microbatch or fitting


def _cast_once(trainer):
    """Cast the policy's weights for autocast once per step, and a fixed reference's once, if results stay equal."""
    policy, batch = trainer.policy, trainer.eval_iterator.first_examples(2)
    if not trainer.strategy.splits_tensors and not shadow_if_equal(
        policy, trainer.optimizer, lambda: trainer.response_logps(policy, batch)
    ):
        rank0_print("Weights are cast in every microbatch: casting them once per step gives different results here")
    if _may_round_reference(trainer):
        reference, dtype = trainer.reference.model, trainer.config.model.policy_dtype
        if not round_if_equal(reference, trainer.policy_mp, lambda: trainer.response_logps(reference, batch)):
            rank0_print(f"The reference keeps its {dtype} weights: rounding them would change its results here")


def _may_round_reference(trainer) -> bool:
    """True if the reference is a second, frozen model under autocast; False under FSDP, which rounds it anyway."""
    config, reference = trainer.config, trainer.reference
    is_second = reference is not None and reference.model is not trainer.policy
    is_autocast = reference_has_policy_precision(config) and not trainer.strategy.shards_batches
    is_fixed = config.reference_update_every is None and not config.compile
    return is_second and is_autocast and is_fixed


def _fitting_tokens(trainer) -> int | None:
    """Measure the activations of a pair of full length, and plan the GPU's memory; see `plan_memory`."""
    pair = full_length_batch(trainer.eval_iterator.first_examples(2), trainer.config.max_length)
    n_tokens = int(computed_tokens(pair, trainer.layout.shares_prompts, padded=not trainer.layout.is_packed))
    activations = measure_activations(
        trainer.policy,
        lambda: trainer.response_logps(trainer.policy, pair),
        n_tokens,
        counts_logits=trainer.layout.is_plain or trainer.layout.whole_logits,
    )
    is_second = trainer.reference is not None and trainer.reference.model is not trainer.policy
    return plan_memory(
        trainer.config,
        trainer.policy,
        trainer.reference.model if is_second else None,
        trainer.optimizer,
        activations,
        n_tokens,
        gathers_blocks=trainer.strategy.shards_batches,
    )
