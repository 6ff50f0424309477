"""Our losses and TRL's on the same pairs and models: `pip install trl==1.16.0`, then `python benchmarks/trl_losses.py`.

Nothing is trained. Both sides compute the mean loss of one batch in float32, with a small random policy and reference.
Ours comes from this repository's log-probabilities; TRL's from its trainer's `compute_loss`, or from its function of
log-probabilities.
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
from losses import LOSSES
from objectives.declaration import LOGPS

N_PAIRS, BETA = 8, 0.1
SIZES = Namespace(vocab=512, seed=0, max_length=512, max_prompt_length=256)
COMPARED = [  # our loss, our options, TRL's name, TRL's options, the reason if they differ
    ("dpo", {}, "sigmoid", {}, ""),
    ("hinge", {}, "hinge", {}, ""),
    ("robust_dpo", {"label_smoothing": 0.1}, "robust", {"label_smoothing": 0.1}, ""),
    ("exo", {"label_smoothing": 0.001}, "exo_pair", {"label_smoothing": 0.001}, ""),
    ("ipo", {}, "ipo", {}, "TRL takes means over tokens, the paper's equation and the original sums"),
    ("ipo", {"average_log_prob": True}, "ipo", {}, "with `average_log_prob` we take means over tokens, too"),
    ("dpo", {"average_log_prob": True}, "sigmoid_norm", {}, ""),
    ("dpo_nll", {}, ("sigmoid", "sft"), {}, "TRL averages the NLL over a batch's tokens, the paper over a response's"),
    ("orpo", {}, "ORPO", {}, "only the odds-ratio term"),
    ("cpo", {}, "CPO", {}, "without the NLL term, which both add"),
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
        model.get_output_embeddings().weight.mul_(4)  # so that policy and reference differ by more than rounding
    return model


def our_inputs(policy: nn.Module, reference: nn.Module, pairs: list) -> dict[str, torch.Tensor]:
    """Compute the losses' inputs: log-probabilities and lengths of each pair, (N_PAIRS,) each."""
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


def our_loss(name: str, options: dict, inputs: dict[str, torch.Tensor], trl_kind: str) -> float:
    """Return our mean loss; for ORPO and CPO without the NLL, which TRL's functions don't include."""
    options = {key: option.default for key, option in LOSSES[name].options.items()} | {"beta": BETA} | options
    if options.get("average_log_prob"):
        inputs = {key: v / inputs[f"{key.split('_')[1]}_lengths"] if "logps" in key else v for key, v in inputs.items()}
    losses = LOSSES[name](inputs, options)[0]
    if trl_kind == "ORPO":
        losses = losses + inputs["policy_chosen_logps"] / inputs["chosen_lengths"]
    if trl_kind == "CPO":
        losses = losses + options["nll_weight"] * inputs["policy_chosen_logps"]
    return losses.mean().item()


def trl_loss(
    kind: str | tuple, settings: dict, policy, reference, pairs: list, inputs: dict[str, torch.Tensor]
) -> float:
    """Return TRL's mean loss."""
    if kind in ("ORPO", "CPO", "SimPO"):
        return trl_function(kind, inputs)
    from trl import DPOConfig, DPOTrainer

    class TokenIdDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset  # it is tokenized already

    with tempfile.TemporaryDirectory() as directory:
        config = DPOConfig(
            directory, per_device_train_batch_size=len(pairs), beta=BETA, max_length=SIZES.max_length, bf16=False,
            gradient_checkpointing=False, use_cpu=True, report_to="none", train_sampling_strategy="sequential",
            loss_type=[kind] if isinstance(kind, str) else list(kind), disable_tqdm=True, **settings,
        )  # fmt: skip
        trainer = TokenIdDPOTrainer(policy, reference, config, **trl_data([{"pair": pairs}]))
        with torch.no_grad():
            return trainer.compute_loss(policy, next(iter(trainer.get_train_dataloader()))).item()


def trl_function(kind: str, inputs: dict[str, torch.Tensor]) -> float:
    """Return TRL's mean ORPO, CPO or SimPO loss by its function of log-probabilities, as these trainers need text."""
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
    print("| loss | options | TRL's name | ours | TRL's | difference | reason |\n|---|---|---|---|---|---|---|")
    for name, options, kind, settings, reason in COMPARED:
        ours = our_loss(name, options, inputs, str(kind))
        theirs = trl_loss(kind, settings, policy, reference, pairs, inputs)
        our_options = ", ".join(f"`{key}` {value}" for key, value in options.items())
        trl_name = kind if isinstance(kind, str) else " + ".join(kind)
        difference = abs(ours - theirs)
        print(
            f"| {name} | {our_options} | {trl_name} | {ours:.6f} | {theirs:.6f} | {difference:.0e} | {reason} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
