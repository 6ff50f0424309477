"""Losses beside TRL's on the same pairs under the same two models: `pip install trl==1.16.0`, then run this.

Neither trains: each computes the mean loss of one batch, in float32, of a small random policy and reference, ours from
this repository's log-probabilities, TRL's by its own trainer's `compute_loss`, or by its function of log-probabilities.
"""

import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from throughput import random_pairs, trl_data

from acceleration.prefix_sharing import padded_rows
from acceleration.response_head import response_logps
from log_probabilities import response_lengths
from losses import LOGPS, LOSSES

N_PAIRS, BETA = 8, 0.1
SIZES = Namespace(vocab=512, seed=0, max_length=512, max_prompt_length=256)
# our loss and its options, TRL's name and further settings, and why they differ where they do
COMPARED = [
    ("dpo", {}, "sigmoid", {}, ""),
    ("hinge", {}, "hinge", {}, ""),
    ("robust_dpo", {"label_smoothing": 0.1}, "robust", {"label_smoothing": 0.1}, ""),
    ("exo", {"label_smoothing": 0.001}, "exo_pair", {"label_smoothing": 0.001}, ""),
    ("ipo", {}, "ipo", {}, "TRL takes means over tokens, the paper's equation and the original sums"),
    ("ipo", {"average_log_prob": True}, "ipo", {}, "with `average_log_prob` so do we"),
    ("dpo", {"average_log_prob": True}, "sigmoid_norm", {}, ""),
    ("dpo_nll", {}, ("sigmoid", "sft"), {}, "TRL's NLL is a mean over a batch's tokens, the paper's over a response's"),
    ("orpo", {}, "ORPO", {}, "the odds' term alone, of means over tokens"),
    ("cpo", {}, "CPO", {}, "without the NLL, which both add"),
    ("simpo", {"beta": 2.0, "gamma": 1.0}, "SimPO", {}, ""),
]  # fmt: skip


def small_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=SIZES.vocab,
        max_position_embeddings=SIZES.max_length,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)  # so that the two differ by more than rounding
    return model


def our_inputs(policy: nn.Module, reference: nn.Module, pairs: list) -> dict[str, torch.Tensor]:
    """What losses take of each pair; (N_PAIRS,) each."""
    batch = {"prompt": [""] * len(pairs)}
    for side, index in (("chosen", 1), ("rejected", 2)):
        for key, rows, pad in (
            ("input_ids", [pair[0] + pair[index] for pair in pairs], 0),
            ("attention_mask", [[1] * len(pair[0] + pair[index]) for pair in pairs], 0),
            ("labels", [[-100] * len(pair[0]) + pair[index] for pair in pairs], -100),
        ):
            tensors = [torch.tensor(row) for row in rows]
            batch[f"{side}_{key}"] = nn.utils.rnn.pad_sequence(tensors, True, pad)
    with torch.no_grad():
        logps = [
            row for model in (policy, reference) for row in response_logps(model, padded_rows(batch), False).chunk(2)
        ]
    lengths = {f"{side}_lengths": response_lengths(batch[f"{side}_labels"]) for side in ("chosen", "rejected")}
    return dict(zip(LOGPS, logps, strict=True)) | lengths


def our_loss(name: str, options: dict, inputs: dict[str, torch.Tensor], of_term: str) -> float:
    """The mean loss; of ORPO and CPO the term that TRL has a function of."""
    options = {key: option.default for key, option in LOSSES[name].options.items()} | {"beta": BETA} | options
    if options.get("average_log_prob"):
        inputs = {key: v / inputs[f"{key.split('_')[1]}_lengths"] if "logps" in key else v for key, v in inputs.items()}
    losses = LOSSES[name](inputs, options)[0]
    if of_term == "ORPO":
        losses = losses + inputs["policy_chosen_logps"] / inputs["chosen_lengths"]
    if of_term == "CPO":
        losses = losses + options["nll_weight"] * inputs["policy_chosen_logps"]
    return losses.mean().item()


def trl_loss(
    kind: str | tuple, settings: dict, policy, reference, pairs: list, inputs: dict[str, torch.Tensor]
) -> float:
    """TRL's mean loss."""
    if kind in ("ORPO", "CPO", "SimPO"):
        return trl_function(kind, inputs)
    from trl import DPOConfig, DPOTrainer

    class OfTokenIds(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    with tempfile.TemporaryDirectory() as directory:
        config = DPOConfig(
            directory, per_device_train_batch_size=len(pairs), beta=BETA, max_length=SIZES.max_length, bf16=False,
            gradient_checkpointing=False, use_cpu=True, report_to="none", train_sampling_strategy="sequential",
            loss_type=[kind] if isinstance(kind, str) else list(kind), disable_tqdm=True, **settings,
        )  # fmt: skip
        trainer = OfTokenIds(policy, reference, config, **trl_data([{"pair": pairs}]))
        with torch.no_grad():
            return trainer.compute_loss(policy, next(iter(trainer.get_train_dataloader()))).item()


def trl_function(kind: str, inputs: dict[str, torch.Tensor]) -> float:
    """Of ORPO, CPO and SimPO, whose trainers take text, the function of log-probabilities."""
    chosen, rejected = inputs["policy_chosen_logps"], inputs["policy_rejected_logps"]
    accelerator = Namespace(device=torch.device("cpu"))
    if kind == "ORPO":
        from trl.experimental.orpo import ORPOTrainer

        trainer = object.__new__(ORPOTrainer)
        trainer.beta, trainer.accelerator = BETA, accelerator
        means = chosen / inputs["chosen_lengths"], rejected / inputs["rejected_lengths"]
        return -trainer.odds_ratio_loss(*means)[0].mean().item()
    from trl.experimental.cpo import CPOTrainer

    trainer = object.__new__(CPOTrainer)
    trainer.alpha, trainer.label_smoothing, trainer.accelerator = 0.0, 0.0, accelerator
    trainer.loss_type, trainer.beta, trainer.simpo_gamma = "sigmoid", BETA, 0.0
    if kind == "SimPO":
        trainer.loss_type, trainer.beta, trainer.simpo_gamma = "simpo", 2.0, 1.0
        chosen, rejected = chosen / inputs["chosen_lengths"], rejected / inputs["rejected_lengths"]
    return trainer.cpo_loss(chosen, rejected)[0].mean().item()


def main():
    transformers.logging.set_verbosity_error()
    pairs = random_pairs(N_PAIRS, SIZES)
    policy, reference = small_model(1), small_model(2)
    inputs = our_inputs(policy, reference, pairs)
    print("| loss | options | TRL's | here | TRL | difference | why |\n|---|---|---|---|---|---|---|")
    for name, options, kind, settings, why in COMPARED:
        ours = our_loss(name, options, inputs, str(kind))
        theirs = trl_loss(kind, settings, policy, reference, pairs, inputs)
        given = ", ".join(f"`{key}` {value}" for key, value in options.items())
        shown = kind if isinstance(kind, str) else " + ".join(kind)
        print(
            f"| {name} | {given} | {shown} | {ours:.6f} | {theirs:.6f} | {abs(ours - theirs):.0e} | {why} |", flush=True
        )


if __name__ == "__main__":
    main()
