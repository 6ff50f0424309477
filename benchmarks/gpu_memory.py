"""Predicted and measured memory of the original's models and of current ones: `python benchmarks/gpu_memory.py`.

Each model has its real width (Mixtral a quarter of it), but only a few layers with random weights; nothing is
downloaded. The prediction is what the memory plan at the start of a run counts for one microbatch:
`capacity.microbatch_bytes`, and the weights cast for computing. The measurement is the peak of a forward and backward
pass, minus what was allocated before it. A ratio of measured to predicted above 1 means that the plan is too low; it
keeps a tenth of free memory in reserve. On a CPU the program only predicts, at toy size, to try it out.
"""

import argparse
import contextlib
import gc
from functools import partial

import torch
import transformers
from common import collate, print_header, print_row, random_pairs
from torch import nn

from acceleration.capacity import measure_activations, microbatch_bytes
from acceleration.layout import Layout
from acceleration.measurement import full_length_batch
from acceleration.packed_attention import supports_packed_attention, use_packed_attention
from acceleration.response_head import response_logps
from acceleration.shadow_weights import free_trained_copies, shadow_linear_weights
from utils import disable_dropout

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
MAX_LENGTH = 512
LAYERS = 4  # few enough that every model fits, with its gradients
_LLAMA = {"num_hidden_layers": LAYERS, "max_position_embeddings": 2048}
_GPT2 = {"n_layer": LAYERS, "n_positions": 2048}
_NEOX = {"num_hidden_layers": LAYERS, "vocab_size": 50304, "max_position_embeddings": 2048}
MODELS = {  # the first six are the original's
    "gpt2-large": ("gpt2", {"n_embd": 1280, "n_head": 20, **_GPT2}),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_head": 25, **_GPT2}),
    "gptj": ("gptj", {"n_embd": 4096, "n_head": 16, "rotary_dim": 64, **_GPT2}),
    "llama7b": ("llama", {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
                          "vocab_size": 32000, **_LLAMA}),
    "pythia28": ("gpt_neox", {"hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 32, **_NEOX}),
    "pythia69": ("gpt_neox", {"hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32, **_NEOX}),
    "llama3-8b": ("llama", {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                            "num_key_value_heads": 8, "vocab_size": 128256, **_LLAMA}),
    "qwen3-4b": ("qwen3", {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "head_dim": 128,
                           "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": True, **_LLAMA}),
    "gemma3-4b": ("gemma3_text", {"hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8,
                                  "head_dim": 256, "num_key_value_heads": 4, "vocab_size": 262144, **_LLAMA}),
    "mixtral": ("mixtral", {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 16,
                            "num_key_value_heads": 8, "num_local_experts": 8, "vocab_size": 32000, **_LLAMA}),
}  # fmt: skip
TOY = {"hidden_size": 64, "n_embd": 64, "intermediate_size": 128, "num_attention_heads": 4, "n_head": 4,
       "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 16, "vocab_size": 512}  # fmt: skip
SETTINGS = {  # dtype of the weights, autocast's dtype, activation checkpointing
    "mixed": (torch.float32, torch.bfloat16, False),
    "mixed, checkpointing": (torch.float32, torch.bfloat16, True),
    "bfloat16": (torch.bfloat16, None, False),
}
COLUMNS = ("model", "setting", "tokens", "MB per token", "predicted GB", "measured GB", "measured / predicted")


def build(name: str, dtype: torch.dtype, autocast_dtype: torch.dtype | None, checkpointing: bool) -> nn.Module:
    architecture, options = MODELS[name]
    if not HAS_GPU:
        options = options | {key: value for key, value in TOY.items() if key in options}
    config = transformers.AutoConfig.for_model(architecture, **options, bos_token_id=0, eos_token_id=0)
    with DEVICE:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    disable_dropout(model)
    if supports_packed_attention(model) and architecture != "gptj":  # GPT-J has an attention of its own
        use_packed_attention(model)
    if autocast_dtype is not None:
        shadow_linear_weights(model)
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def measure(name: str, setting: str, n_pairs: int) -> list[float]:
    """Predict and, on a GPU, measure the memory of a microbatch of random pairs; return the figures of `COLUMNS`."""
    dtype, autocast_dtype, checkpointing = SETTINGS[setting]
    model = build(name, dtype, autocast_dtype, checkpointing)
    layout = Layout(shares_prompts=True, is_packed=MODELS[name][0] != "gptj")
    batch = collate(random_pairs(n_pairs, model.config.vocab_size, MAX_LENGTH, MAX_LENGTH // 2))
    rows, full = layout.rows(batch), layout.rows(full_length_batch(batch, MAX_LENGTH))
    autocast = partial(torch.autocast, DEVICE.type, autocast_dtype) if autocast_dtype else contextlib.nullcontext

    def logps(rows) -> torch.Tensor:
        with autocast():
            return response_logps(model, rows)

    activations = measure_activations(model, partial(logps, full), full.input_ids.numel())
    (device,) = activations.kept
    constant, per_token = microbatch_bytes(model, activations, device)
    n_tokens = rows.input_ids.numel()
    predicted = (constant + activations.casts.get(device, 0) + per_token * n_tokens) / 1e9
    figures = [n_tokens, per_token / 1e6, predicted]
    if HAS_GPU:
        for _ in range(2):  # the first allocates the gradients
            free_trained_copies(model)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            logps(rows).sum().backward()
        measured = (torch.cuda.max_memory_allocated() - before) / 1e9
        figures += [measured, measured / predicted]
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--pairs", type=int, default=24 if HAS_GPU else 3, help="pairs in the microbatch")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print_header(COLUMNS)
    for name in args.models:
        for setting in SETTINGS:
            try:
                figures = [f"{figure:.3g}" for figure in measure(name, setting, args.pairs)]
            except Exception as error:  # the other models may still work
                figures = [f"{type(error).__name__}: {error}"[:100]]
            print_row([name, setting, *figures])
            gc.collect()
            if HAS_GPU:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
