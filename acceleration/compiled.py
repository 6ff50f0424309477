"""Compile a model's transformer blocks one by one: `torch.compile` fuses the operations between matrix products."""

from torch import nn

from utils import UserError, transformer_blocks


def compile_blocks(model: nn.Module, block_name: str | None):
    """Let each transformer block be compiled at its first call, once for all sequence lengths.

    Attention over packed rows is not compiled, because it is a single kernel already.

    Raises: UserError if neither `block_name` nor the model names its transformer blocks.
    """
    blocks = transformer_blocks(model, block_name)
    if not blocks:
        raise UserError(
            f"compile=true: {type(model).__name__} doesn't name its transformer blocks; give their class as "
            "model.block_name"
        )
    for block in blocks:
        block.compile(dynamic=True)
