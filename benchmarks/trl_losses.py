"""Compare our losses with TRL's on the same pairs: `pip install trl==1.16.0`, then `python benchmarks/trl_losses.py`.

Nothing is trained. Both sides compute the mean loss of one batch in float32, with a small random policy and reference.
Ours comes from this repository's log-probabilities; TRL's from its trainer's `compute_loss`, or from its function of
log-probabilities.
"""

import tempfile
from argparse import Namespace

import torch
import transformers
from common import collate, print_header, print_row, random_pairs
from omegaconf import OmegaConf
from throughput import trl_data
from torch import nn

from acceleration.prefix_sharing import padded_rows
from acceleration.response_head import response_logps
from log_probabilities import concatenated_inputs, on_policy_weights, response_lengths, shared_lengths
from losses import LOSSES, Memory, find_loss

N_PAIRS, VOCAB, BETA = 8, 512, 0.1
COMPARED = [  # our loss, our options, TRL's name, TRL's options, the reason if they differ
    ("dpo", {}, "sigmoid", {}, ""),
    ("hinge", {}, "hinge", {}, ""),
    ("robust_dpo", {"label_smoothing": 0.1}, "robust", {"label_smoothing": 0.1}, ""),
    ("exo", {"label_smoothing": 0.001}, "exo_pair", {"label_smoothing": 0.001}, ""),
    ("ipo", {}, "ipo", {}, "TRL takes means over tokens; the paper's equation and the original take sums"),
    ("ipo", {"average_log_prob": True}, "ipo", {}, "with `average_log_prob` we take means over tokens, too"),
    ("dpo", {"average_log_prob": True}, "sigmoid_norm", {}, ""),
    ("dpo_norm", {}, "sigmoid_norm", {}, ""),
    ("discopop", {"tau": 0.05}, "discopop", {"discopop_tau": 0.05}, ""),
    ("nca", {}, "nca_pair", {}, ""),
    ("sppo", {}, "sppo_hard", {}, ""),
    ("apo_zero", {}, "apo_zero", {}, ""),
    ("apo_down", {}, "apo_down", {}, ""),
    ("aot", {}, "aot", {}, ""),
    ("aot_unpaired", {}, "aot_unpaired", {}, ""),
    ("bco", {}, "bco_pair", {}, "TRL leaves out the reward shift (the paper's moving average), and here we do, too"),
    ("sft_tokens", {}, "sft", {}, ""),
    ("dpo", {"f_divergence": "forward_kl"}, "sigmoid", {"f_divergence_type": "forward_kl"}, ""),
    ("dpo", {"f_divergence": "js_divergence"}, "sigmoid", {"f_divergence_type": "js_divergence"}, ""),
    (
        "dpo", {"f_divergence": "alpha_divergence", "f_alpha": 0.3}, "sigmoid",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7}, "TRL's coefficient is 1 - α",
    ),
    ("dpo", {"ld_alpha": 0.4}, "sigmoid", {"ld_alpha": 0.4}, ""),
    ("dpo", {"wpo": True}, "sigmoid", {"use_weighting": True}, ""),
    (
        "mix", {"parts": {"dpo": 0.8, "bco": 0.2, "sft_tokens": 1.0}}, ("sigmoid", "bco_pair", "sft"),
        {"loss_weights": [0.8, 0.2, 1.0]}, "without the reward shift, as above",
    ),
    ("dpo_nll", {}, ("sigmoid", "sft"), {}, "TRL averages the NLL over a batch's tokens, the paper over a response's"),
    ("orpo", {}, "ORPO", {}, "only the odds-ratio term"),
    ("cpo", {}, "CPO", {}, "without the NLL term, which both add"),
    ("simpo", {"beta": 2.0, "gamma": 1.0}, "SimPO", {}, ""),
]  # fmt: skip


def small_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=VOCAB,
        max_position_embeddings=512,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)  # so that policy and reference differ by more than rounding
    return model


def our_inputs(policy: nn.Module, reference: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    """Compute the losses' inputs: log-probabilities and lengths of each pair, (N_PAIRS,) each."""
    sides, inputs, stacked = ("chosen", "rejected"), {}, concatenated_inputs(batch)
    with torch.no_grad():
        for name, model in (("policy", policy), ("reference", reference)):
            logps, shared = response_logps(model, padded_rows(batch), n_first=shared_lengths(batch))
            inputs |= {f"{name}_{side}_logps": of_side for side, of_side in zip(sides, logps.chunk(2), strict=True)}
            inputs |= {f"{name}_{side}_shared_logps": part for side, part in zip(sides, shared.chunk(2), strict=True)}
        logits = policy(stacked["concatenated_input_ids"], stacked["concatenated_attention_mask"]).logits
    weights = on_policy_weights(logits, stacked["concatenated_labels"]).chunk(2)
    inputs |= {f"{side}_weights": weight for side, weight in zip(sides, weights, strict=True)}
    inputs |= {f"{side}_lengths": response_lengths(batch[f"{side}_labels"]) for side in sides}
    memory = Memory({"bco_shift": torch.tensor(0.0)})
    memory.is_frozen = True
    return inputs | {"mean_chosen_length": inputs["chosen_lengths"].float().mean(), "memory": memory}


def our_loss(name: str, options: dict, inputs: dict[str, torch.Tensor], trl_kind: str) -> float:
    """Return our mean loss; for ORPO and CPO without the NLL, which TRL's functions don't include."""
    config = {"name": name, **_options(name)} | options
    config |= {part: _options(part) for part in config.get("parts", ())}
    losses = find_loss(config := OmegaConf.create(config)).compute(inputs, config).losses
    if trl_kind == "ORPO":
        losses = losses + inputs["policy_chosen_logps"] / inputs["chosen_lengths"]
    if trl_kind == "CPO":
        losses = losses + config["nll_weight"] * inputs["policy_chosen_logps"]
    return losses.mean().item()


def _options(name: str) -> dict:
    """Return a loss's default options, at the β of the comparison; none for `mix`."""
    options = {key: option.default for key, option in LOSSES[name].options.items()} if name in LOSSES else {}
    return options | ({"beta": BETA} if "beta" in options else {})


def trl_loss(
    kind: str | tuple, settings: dict, policy, reference, batch: dict, inputs: dict[str, torch.Tensor]
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
            directory, per_device_train_batch_size=N_PAIRS, beta=BETA, max_length=512, bf16=False,
            gradient_checkpointing=False, use_cpu=True, report_to="none", train_sampling_strategy="sequential",
            loss_type=[kind] if isinstance(kind, str) else list(kind), disable_tqdm=True, **settings,
        )  # fmt: skip
        trainer = TokenIdDPOTrainer(policy, reference, config, **trl_data([batch]))
        with torch.no_grad():
            return trainer.compute_loss(policy, next(iter(trainer.get_train_dataloader()))).item()


def trl_function(kind: str, inputs: dict[str, torch.Tensor]) -> float:
    """Return TRL's mean ORPO, CPO or SimPO loss, from its loss function, because these trainers only take text."""
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
    batch = collate(random_pairs(N_PAIRS, VOCAB))
    policy, reference = small_model(1), small_model(2)
    inputs = our_inputs(policy, reference, batch)
    print_header(["loss", "options", "TRL's name", "ours", "TRL's", "difference", "reason"])
    for name, options, kind, settings, reason in COMPARED:
        ours = our_loss(name, options, inputs, str(kind))
        theirs = trl_loss(kind, settings, policy, reference, batch, inputs)
        our_options = ", ".join(f"`{key}` {value}".lower() for key, value in options.items())
        trl_name = kind if isinstance(kind, str) else " + ".join(kind)
        difference = f"{abs(ours - theirs):.0e}"
        print_row([name, our_options, trl_name, f"{ours:.6f}", f"{theirs:.6f}", difference, reason])


if __name__ == "__main__":
    main()
