"""Try shared prompts with every causal language model of transformers: `python benchmarks/architectures.py`.

Each is built at a tiny size with random weights, checked as at the start of training (`model_check.find_layout`), and
computed in the layout that the check chooses. Log-probabilities and gradients are compared with those of the model's
own forward of each sequence alone. Attention windows have their default length. The program writes
docs/architectures.md; if types are named, it only prints their rows.
"""

import argparse
import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from omegaconf import OmegaConf
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
from acceleration.layout import Layout  # noqa: E402
from acceleration.measurement import synthetic_batch  # noqa: E402
from acceleration.model_check import find_layout  # noqa: E402
from distributed.strategies import SingleProcess  # noqa: E402
from trainers import BasicTrainer  # noqa: E402
from utils import UserError, disable_dropout  # noqa: E402

OUTPUT = REPOSITORY / "docs" / "architectures.md"
MAX_LENGTH = 192  # tokens
MAX_PARAMETERS = 10_000_000
VOCAB = 97
N_LAYERS = 4
_KEYS = ("input_ids", "attention_mask", "labels")
LENGTHS = ((40, 120, 152), (3, 60, 189), (100, 92, 1))  # tokens in prompt, chosen and rejected response

# Names of config fields, and their values; a field is set if the config has it.
_FIELDS = {
    VOCAB: "vocab_size vocab_size_per_layer_input padded_vocab_size",
    32: "hidden_size n_embd d_model dim embedding_size emb_dim word_embed_proj_dim lru_width embed_dim width "
    "vision_hidden_size audio_hidden_size output_dim projection_dim image_size",
    48: "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff d_ff d_inner "
    "block_ff_dim feed_forward_size shared_intermediate_size dense_intermediate_size",
    24: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
    "expert_ffn_hidden_size",
    N_LAYERS: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_blocks depth num_attention_heads n_head n_heads num_heads encoder_attention_heads "
    "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads num_experts num_local_experts "
    "n_routed_experts moe_num_experts num_routed_experts linear_num_value_heads rotary_dim",
    2: "num_key_value_heads num_experts_per_tok moe_topk moe_k top_k_experts moe_top_k linear_num_key_heads",
    8: "head_dim d_kv attention_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim mamba_d_head mamba_head_dim "
    "global_head_dim index_head_dim linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input "
    "mamba_n_heads mamba_num_heads mamba_d_state ssm_state_size state_size patch_size",
    16: "q_lora_rank kv_lora_rank dt_rank time_step_rank index_topk",
    1: "n_group topk_group n_shared_experts mamba_n_groups n_groups eos_token_id",
    2 * MAX_LENGTH + 64: "max_position_embeddings n_positions max_seq_len max_target_positions max_source_positions "
    "max_sequence_length",
    0: "pad_token_id bos_token_id num_kv_shared_layers",
}
_SIZES = {name: value for value, names in _FIELDS.items() for name in names.split()}
_SIZES_OF_TYPE = {
    "gpt_neo": {"attention_types": [[["global", "local"], N_LAYERS // 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (N_LAYERS // 2)},
    "mamba2": {"num_heads": 8},
    "falcon_h1": {"mamba_d_ssm": 64},
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
}


# ---- tiny models ----------------------------------------------------------------------------------------------------


def tiny_sizes(config_class: type) -> dict:
    """Return arguments that make a config of this class, and its sub-configs, tiny."""
    default, sizes = config_class(), {}
    for name, value in _SIZES.items():
        if name in vars(default) or name in config_class.attribute_map:
            sizes[name] = value
    for name in config_class.sub_configs:
        if getattr(default, name, None) is not None:
            sizes[name] = tiny_sizes(type(getattr(default, name)))
    if "kv_lora_rank" in sizes:  # multi-head latent attention has equally many heads
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return sizes | _SIZES_OF_TYPE.get(config_class.model_type, {})


def tiny_model(model_type: str, **overrides) -> nn.Module:
    """Return a tiny causal language model of this type in float32, with weights so large that attention matters.

    Raises: RuntimeError if the config has no fields that make it small.
    """
    config_class = transformers.CONFIG_MAPPING[model_type]
    config = config_class(**{**tiny_sizes(config_class), **overrides})
    with torch.device("meta"):
        n_parameters = transformers.AutoModelForCausalLM.from_config(config).num_parameters()
    if n_parameters > MAX_PARAMETERS:
        raise RuntimeError(f"the config has no fields that make it small ({n_parameters:,} parameters)")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
            else:  # norms, biases and decays stay around their initial values
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    disable_dropout(model)
    return model.eval()


def batch_of(lengths: tuple[tuple[int, int, int], ...] = LENGTHS) -> dict:
    """Return a batch of pairs with these numbers of tokens in prompt, chosen and rejected response."""
    ids = torch.randint(2, VOCAB, (1, 512), generator=torch.Generator().manual_seed(1))
    batch = {"prompt": ["the only one"], "chosen_input_ids": ids, "chosen_attention_mask": torch.ones_like(ids)}
    batch |= {"chosen_labels": ids, "rejected_labels": ids}
    chosen, rejected = (
        synthetic_batch(batch, [(parts[0], parts[0] + parts[side]) for parts in lengths]) for side in (1, 2)
    )
    return chosen | {key: value for key, value in rejected.items() if key.startswith("rejected")}


# ---- one model ------------------------------------------------------------------------------------------------------


def plain_logps(model: nn.Module, batch: dict) -> torch.Tensor:
    """Return the log-probability of each response by the trainer's plain forward: (S,)."""
    trainer = BasicTrainer.__new__(BasicTrainer)
    trainer.device = model.get_input_embeddings().weight.device
    return trainer.plain_logps(model, batch)


def check_model(model: nn.Module, batch: dict, max_length: int = MAX_LENGTH, autocast=nullcontext, **settings):
    """Return the layout that the check at the start of training chooses for a model, and the line it prints."""
    config = OmegaConf.create({"shared_prompt": "auto", "padding_free": False, "max_length": max_length, **settings})
    return find_layout(model, plain_logps, batch, config, autocast=autocast)


def own_logps(model: nn.Module, batch: dict) -> torch.Tensor:
    """Return each response's log-probability by the model's forward of its sequence alone, unpadded: (S,)."""
    logps = []
    for side in ("chosen", "rejected"):
        for row, mask, labels in zip(*(batch[f"{side}_{key}"] for key in _KEYS), strict=True):
            n_tokens = int(mask.sum())
            ids, is_target = row[None, :n_tokens], labels[1:n_tokens] != -100
            logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1]
            log_softmax = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            logps.append(log_softmax.gather(1, ids[0, 1:, None])[is_target].sum())
    return torch.stack(logps)


def logps_and_gradient(model: nn.Module, compute: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities of a batch's responses, (S,), and the gradient of a combination of them."""
    model.zero_grad()
    logps = compute(model, batch_of())
    logps.mul(torch.linspace(0.5, 1.5, len(logps))).sum().backward()
    gradients = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return logps.detach().double(), torch.cat(gradients)


def compare(model: nn.Module, layout: Layout) -> dict:
    """Return how far a layout's numbers are from forward passes of each sequence alone, in training mode."""
    compute = plain_logps if layout.is_plain else partial(layout.response_logps, strategy=SingleProcess)
    model.train()
    expected, expected_gradient = logps_and_gradient(model, own_logps)
    logps, gradient = logps_and_gradient(model, compute)
    model.eval()
    return {
        "nats": float((logps - expected).abs().max()),
        "gradient": float((gradient - expected_gradient).norm() / expected_gradient.norm()),
    }


@dataclass
class Outcome:
    """The check's decision on a model in one dtype, and the distances of the chosen layout's numbers."""

    why: str  # the check's message or error
    layout: Layout | None = None  # None: refused
    nats: float = 0.0
    gradient: float = 0.0
    without_padding: str = "no"  # a cell of the table

    def __str__(self) -> str:
        if self.layout is None:
            return "refused"
        kind = "plain" if self.layout.is_plain else "shared" if self.layout.shares_prompts else "padded"
        return f"{kind}, whole logits" if self.layout.whole_logits else kind

    @property
    def speed(self) -> int:
        """The rank of the chosen layout among all, slowest first."""
        return 0 if self.layout is None else 1 if self.layout.is_plain else 2 + self.layout.shares_prompts


@dataclass
class Results:
    """Everything that was found out about a model type."""

    class_name: str = ""
    outcomes: dict[str, Outcome] = field(default_factory=dict)  # by dtype: float64 or float32, then bfloat16
    failure: str = ""  # why not everything was tried

    @property
    def exact(self) -> Outcome | None:
        """The outcome in float64, or in float32 for a model that can't be computed in float64."""
        return next(iter(self.outcomes.values()), None)


def try_model(model: nn.Module) -> Outcome:
    """Run the check at the start of training on a model; return its decision and the distances measured."""
    short = batch_of(((9, 4, 7), (3, 6, 2)))
    try:
        layout, why = check_model(model, short)
        outcome = Outcome(why, layout, **compare(model, layout))
    except UserError as error:
        outcome = Outcome(str(error))
    attention = model.config._attn_implementation
    try:
        layout, _ = check_model(model, short, padding_free=True)
    except UserError:
        return outcome
    kind = "shared" if layout.shares_prompts else "padded"
    outcome.without_padding = f"{kind}: {_in_table(**compare(model, layout))}"
    model.config._attn_implementation = attention
    return outcome


def try_type(model_type: str, queue: multiprocessing.SimpleQueue):
    """Try a model type in bfloat16, and in float64, or in float32 if float64 fails.

    Puts the `Results` found so far into the queue, again and again.
    """
    torch.set_num_threads(1)
    results = Results()
    try:
        model = tiny_model(model_type)
        own_logps(model, batch_of())
    except Exception as error:
        results.failure = f"{type(error).__name__}: {str(error).strip()}"
        queue.put(results)
        return
    results.class_name = type(model).__name__
    queue.put(results)
    try:
        logps_and_gradient(model.to(torch.float64), own_logps)
        exact_dtype = torch.float64
    except Exception:  # some layers have no float64
        exact_dtype = torch.float32
    for dtype in (exact_dtype, torch.bfloat16):
        results.outcomes[str(dtype).removeprefix("torch.")] = try_model(model.to(dtype))
        queue.put(results)


def try_in_process(model_type: str, time_limit: float) -> Results:
    """Run `try_type` in a separate process, and return the last results that it puts into the queue."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=try_type, args=(model_type, queue))
    process.start()
    process.join(time_limit)
    is_late = process.is_alive()
    if is_late:
        process.kill()
        process.join()
    results = Results()
    while not queue.empty():
        results = queue.get()
    if is_late and "bfloat16" not in results.outcomes:
        results.failure = f"not done in {time_limit:.0f} seconds"
    elif process.exitcode and not is_late:
        results.failure = f"its process ended with {process.exitcode}"
    return results


# ---- the table ------------------------------------------------------------------------------------------------------


def _in_table(nats: float, gradient: float) -> str:
    return f"{nats:.0e} nats, {gradient:.0e}"


def is_wrong(results: Results) -> bool:
    """True if the chosen layout's numbers are wrong, or if bfloat16 gets a faster layout than the exact dtype."""
    exact = results.exact
    if exact is None:
        return False
    return exact.nats > 0.01 or exact.gradient > 0.001 or results.outcomes.get("bfloat16", exact).speed > exact.speed


def row_of(model_type: str, results: Results) -> str:
    """Return a model type's row of the table."""
    outcomes = list(results.outcomes.values())
    cells = [str(o) if o.layout is None else f"{o}: {_in_table(o.nats, o.gradient)}" for o in outcomes]
    if "float32" in results.outcomes:
        cells[0] += " in float32"
    notes = [note(outcome.why) for outcome in outcomes]
    if results.failure:
        notes = [" ".join(results.failure.split())[:160]]
    if len(outcomes) == 2 and str(outcomes[0]) == str(outcomes[1]):
        notes = notes[:1]
    cells += [""] * (2 - len(cells))
    cells.append(outcomes[0].without_padding if outcomes else "")
    why = "; bfloat16: ".join(notes).removeprefix("; ")  # the first may be empty
    return f"| {model_type} | {results.class_name} | {' | '.join(cells)} | {why} |"


def note(why: str) -> str:
    """Return, for a table's cell, why a model isn't computed in the fastest layout."""
    if why == "Prefix sharing: on":
        return ""
    return " ".join(why.removeprefix("Prefix sharing: off; ").split()).replace("|", "\\|")[:300]


HEADER = """# Which models share prompts

Every type of causal language model, built at a tiny size with random weights and checked on a CPU as at the start of
training; attention windows have each type's default length. Made by `python benchmarks/architectures.py` with
transformers {transformers} and torch {torch}, max_length={max_length}.

- *shared*: prefix sharing, one row per pair; *padded*: two rows per pair, the output head at response tokens alone;
  *plain*: `concatenated_forward`; *refused*: training doesn't start.
- *whole logits*: the model computes logits at every position; otherwise the output head runs only where a response
  token is predicted.
- Two numbers compare with the model's own forward pass of each sequence alone, without padding: the largest difference
  in a response's log-probability (nats), and the relative difference of the gradient in all parameters.
- *without padding*: whether rows can be packed too (`padding_free=true`), in the precision of the float64 column, and
  whether they then share prompts (*shared*) or not (*padded*).
- *why*: for *padded* and *plain*, why prompts aren't shared. "Log-probabilities change" and "the forward pass fails"
  are about the computation with shared prompts.
- In bfloat16, and in a mixture of experts even in float32, rounding alone may make large differences: the weights are
  much larger than trained ones.

{summary}

| type | class | float64 | bfloat16 | without padding | why |
| --- | --- | --- | --- | --- | --- |
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("types", nargs="*", help="model types, e.g. gemma2; all if none is given")
    parser.add_argument("--time-limit", type=float, default=300, help="seconds for one model")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows, counts, wrong, n_packed = [], Counter(), [], 0
    for model_type in args.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        results = try_in_process(model_type, args.time_limit)
        wrong += [model_type] if is_wrong(results) else []
        counts[str(results.exact or "not built")] += 1
        n_packed += results.exact is not None and results.exact.without_padding != "no"
        rows.append(row_of(model_type, results))
        print(rows[-1], flush=True)
    if not args.types:
        summary = f"{len(rows)} types: " + "; ".join(f"{count} {name}" for name, count in counts.most_common())
        summary += f". {n_packed} can be computed without padding."
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        text = HEADER.format(**versions, max_length=MAX_LENGTH, summary=summary) + "\n".join(rows) + "\n"
        OUTPUT.parent.mkdir(exist_ok=True)
        OUTPUT.write_text(text)
    sys.exit(f"the chosen layout gives wrong numbers: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
