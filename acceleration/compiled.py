"""A model's blocks compiled, each by itself: `torch.compile` fuses what stands between their matrix products."""

from torch import nn

from utils import UserError, transformer_blocks


def compile_blocks(model: nn.Module, block_name: str | None):
    """Let a model's transformer blocks be compiled as they are first called, once for all lengths.

    Attention over packed rows is left out of it, being one kernel already.

    Raises: UserError if neither `block_name` nor the model says what its blocks are.
    """
    blocks = transformer_blocks(model, block_name)
    if not blocks:
        raise UserError(
            f"compile=true: {type(model).__name__} doesn't say what its transformer blocks are; give their class as "
            "model.block_name"
        )
    for block in blocks:
        block.compile(dynamic=True)
