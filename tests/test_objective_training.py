"""Three steps of every objective, in microbatches, equal an independent computation of its paper's formula.

The independent computation uses neither microbatches nor the losses: it computes each response alone, the whole
batch's mean loss by the formula, its gradient, and SGD by hand, all in float64.
"""

import copy
import math

import pytest
import torch
from conftest import ORACLE, mark_exhaustive_except, read_jsonl, trainers_in
from omegaconf import OmegaConf
from torch.nn.functional import logsigmoid

from checkpointing.restoring import resume_training
from config_checks.checks import check_config
from losses import LOSSES, Memory, find_loss
from utils import UserError

N_STEPS, BATCH_SIZE, LR = 3, 8, 3e-3
RUN = [
    "model=blank_model", f"model.name_or_path={ORACLE}/model", "datasets=[hh]", f"dataset_paths.hh={ORACLE}/hh",
    "max_length=96", "max_prompt_length=48", "model.policy_dtype=float64", "model.reference_dtype=float64",
    f"lr={LR}", "warmup_steps=0", "optimizer=SGD", "max_grad_norm=inf", "n_examples=24", f"batch_size={BATCH_SIZE}",
    "n_eval_examples=6", "eval_batch_size=4", "eval_every=8", "sample_during_eval=false",
    "gradient_accumulation_steps=2",
]  # fmt: skip


def nll(x):
    return -logsigmoid(x)


def phi(logratio):
    return logratio.exp() + logratio


def log_odds(mean_logps):
    return (mean_logps.exp() / (1 - mean_logps.exp())).log()


def shift(b, seen):
    """BCO's δ: the moving average of the mean reward of both sides."""
    value = 0.1 * ((b.c + b.r) / 2).mean().item()
    seen["δ"] = value if "δ" not in seen else 0.9 * seen["δ"] + 0.1 * value
    return seen["δ"]


def batch_beta(b, seen):
    margin = 0.1 * (b.c - b.r).mean().item()
    seen["M"] = margin if "M" not in seen else 0.9 * seen["M"] + 0.1 * margin
    return 0.1 * (1 + 0.6 * (margin - seen["M"]))


# The mean loss of a batch b at the default options. pc, pr, fc, fr: log-probabilities of chosen and rejected responses
# under policy and reference (f); c, r: log-ratios; nc, nr: lengths; z: KTO's estimate.
FORMULAS = {
    "dpo": lambda b, seen: nll(0.1 * (b.c - b.r)),
    "ipo": lambda b, seen: (b.c - b.r - 5) ** 2,
    "robust_dpo": lambda b, seen: (0.9 * nll(0.1 * (b.c - b.r)) - 0.1 * nll(-0.1 * (b.c - b.r))) / 0.8,
    "hinge": lambda b, seen: (1 - 0.1 * (b.c - b.r)).clamp(min=0),
    "dpop": lambda b, seen: nll(0.3 * (b.c - b.r - 50 * (-b.c).clamp(min=0))),
    "dpo_nll": lambda b, seen: nll(0.1 * (b.c - b.r)) - b.pc / b.nc,
    "dpo_norm": lambda b, seen: nll(5 * (b.c / b.nc - b.r / b.nr)),
    "length_dpo": lambda b, seen: nll(0.1 * (b.c - b.r) + 0.01 * (b.nc - b.nr)),
    "exo": lambda b, seen: sum(
        (sign * 0.1 * (b.c - b.r)).sigmoid() * (logsigmoid(sign * 0.1 * (b.c - b.r)) - math.log(label))
        for sign, label in ((1, 0.999), (-1, 0.001))
    ),
    "discopop": lambda b, seen: (
        (1 - (b.c - b.r).sigmoid()) * nll(0.05 * (b.c - b.r)) + (b.c - b.r).sigmoid() * (-0.05 * (b.c - b.r)).exp()
    ),
    "chi_po": lambda b, seen: nll((0.1 * (phi(b.c) - phi(b.r))).clamp(-20, 20)),
    "apo_zero": lambda b, seen: 1 - (0.1 * b.c).sigmoid() + (0.1 * b.r).sigmoid(),
    "apo_down": lambda b, seen: (0.1 * b.c).sigmoid() + 1 - (0.1 * (b.c - b.r)).sigmoid(),
    "nca": lambda b, seen: nll(0.1 * b.c) + 0.5 * nll(-0.1 * b.c) + 0.5 * nll(-0.1 * b.r),
    "sppo": lambda b, seen: (b.c - 5) ** 2 + (b.r + 5) ** 2,
    "kto": lambda b, seen: (2 - (0.1 * (b.c - b.z)).sigmoid() - (0.1 * (b.z - b.r)).sigmoid()) / 2,
    "bco": lambda b, seen: nll(0.1 * b.c - (d := shift(b, seen))) + nll(d - 0.1 * b.r),
    "beta_dpo": lambda b, seen: nll(batch_beta(b, seen) * (b.c - b.r)),
    "aot": lambda b, seen: nll(0.1 * ((b.pc - b.pr).sort().values - (b.fc - b.fr).sort().values)),
    "aot_unpaired": lambda b, seen: nll(0.1 * (b.c.sort().values - b.r.sort().values)),
    "simpo": lambda b, seen: nll(2 * (b.pc / b.nc - b.pr / b.nr) - 1),
    "orpo": lambda b, seen: -b.pc / b.nc + 0.1 * nll(log_odds(b.pc / b.nc) - log_odds(b.pr / b.nr)),
    "cpo": lambda b, seen: nll(0.1 * (b.pc - b.pr)) - b.pc,
    "sft": lambda b, seen: -b.pc,
    "sft_tokens": lambda b, seen: -b.pc.sum() / b.nc.sum(),
}
MODIFIED = {  # options: the formula
    "dpo loss.f_divergence=forward_kl": lambda b, seen: nll(0.1 * ((-b.r).exp() - (-b.c).exp())),
    "dpo loss.f_divergence=js_divergence": lambda b, seen: nll(
        0.1 * ((2 * b.c.exp() / (1 + b.c.exp())).log() - (2 * b.r.exp() / (1 + b.r.exp())).log())
    ),
    "hinge loss.f_divergence=alpha_divergence loss.f_alpha=0.3": lambda b, seen: (
        1 - 0.1 * ((1 - (-0.3 * b.c).exp()) / 0.3 - (1 - (-0.3 * b.r).exp()) / 0.3)
    ).clamp(min=0),
    "dpo loss.ld_alpha=0.4": lambda b, seen: nll(0.1 * (b.ld(0.4, b.c, b.first_c) - b.ld(0.4, b.r, b.first_r))),
    "ipo loss.ld_alpha=0.4 loss.average_log_prob=true": lambda b, seen: (
        b.ld(0.4, b.c, b.first_c) / b.nc - b.ld(0.4, b.r, b.first_r) / b.nr - 5
    )
    ** 2,
    "dpo loss.wpo=true": lambda b, seen: b.weights * nll(0.1 * (b.c - b.r)),
    "mix loss.parts.dpo=0.8 loss.parts.bco=0.2 loss.parts.sft_tokens=1.5 loss.dpo.beta=0.3": lambda b, seen: (
        0.8 * nll(0.3 * (b.c - b.r))
        + 0.2 * FORMULAS["bco"](b, seen)
        - 1.5 * b.pc * len(b.pc) / b.nc.sum()
    ),
    "mix loss.parts.hinge=1 loss.parts.aot=2 loss.hinge.reference_free=true": lambda b, seen: (
        (1 - 0.1 * (b.pc - b.pr)).clamp(min=0) + 2 * FORMULAS["aot"](b, seen)[(b.pc - b.pr).argsort().argsort()]
    ),
}  # fmt: skip


def token_logps(model, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log π of one response's tokens, and log Σ_v π(v)² at each, (n,) each."""
    n = int((labels != -100).nonzero().max()) + 1
    logits = model(ids[None, :n]).logits[0, :-1].log_softmax(-1)  # (n - 1, V)
    predicted = labels[1:n] != -100
    return logits.gather(1, ids[1:n, None])[predicted, 0], (2 * logits).logsumexp(-1)[predicted]


class Batch:
    """A whole batch's log-probabilities and lengths, each response computed alone."""

    def __init__(self, policy, reference, batch: dict):
        sides, prefixes = [side for side in ("chosen", "rejected") if f"{side}_labels" in batch], ("", "mismatched_")

        def rows(side, prefix=""):
            return list(zip(batch[f"{prefix}{side}_input_ids"], batch[f"{prefix}{side}_labels"], strict=True))

        of_policy = {side: [token_logps(policy, *row) for row in rows(side)] for side in sides}
        with torch.no_grad():
            of_reference = {side: [token_logps(reference, *row)[0] for row in rows(side)] for side in sides}
            if "mismatched_chosen_labels" in batch:
                others = [row for side in sides for row in rows(side, prefixes[1])]
                z = [token_logps(policy, *row)[0].sum() - token_logps(reference, *row)[0].sum() for row in others]
                self.z = max(torch.stack(z).mean().item(), 0)
        self.pc, self.nc = self._sums(of_policy["chosen"]), self._lengths(of_policy["chosen"])
        if "rejected" not in sides:
            return
        self.pr, self.nr = self._sums(of_policy["rejected"]), self._lengths(of_policy["rejected"])
        self.fc, self.fr = (torch.stack([logps.sum() for logps in of_reference[side]]) for side in sides)
        self.c, self.r = self.pc - self.fc, self.pr - self.fr
        shared = torch.minimum(self.nc, self.nr).int().tolist()
        self.first_c, self.first_r = (
            torch.stack(
                [p[0][:n].sum() - f[:n].sum() for p, f, n in zip(of_policy[s], of_reference[s], shared, strict=True)]
            )
            for s in sides
        )
        self.weights = math.prod(
            torch.stack([(logps - collisions).mean().detach().exp() for logps, collisions in of_policy[side]])
            for side in sides
        )

    @staticmethod
    def _sums(values):
        return torch.stack([logps.sum() for logps, _ in values])

    @staticmethod
    def _lengths(values):
        return torch.tensor([float(len(logps)) for logps, _ in values], dtype=torch.float64)

    @staticmethod
    def ld(alpha, whole, first):
        return first + alpha * (whole - first)


@pytest.fixture(scope="module")
def shared_trainers(tmp_path_factory):
    """Return a trainer on pairs (with mismatched responses) and one on SFT targets; `set_loss` changes their loss."""
    make = trainers_in(tmp_path_factory.mktemp("objectives"))
    return {False: make(*RUN, "loss=kto"), True: make(*RUN, "loss=sft")}


def set_loss(trainer, words: list[str]):
    """Give a trainer another loss, checked as on the command line, and weights that differ from the reference's."""
    name, *options = words
    section = OmegaConf.from_dotlist(options).get("loss", OmegaConf.create())
    config = OmegaConf.merge(trainer.config, {"reference": "auto"})
    config.loss = OmegaConf.merge({"name": name}, section)
    check_config(config)
    trainer.config, trainer.loss, trainer.loss_memory = config, find_loss(config.loss), Memory()
    if not hasattr(trainer, "start"):
        trainer.start = {name: 1.03 * value for name, value in trainer.policy.state_dict().items()}
    trainer.policy.load_state_dict(trainer.start)
    trainer.scheduler.last_epoch = 0
    return trainer


def train_by_hand(trainer, formula) -> tuple[torch.nn.Module, list[float]]:
    """Train a copy of the policy by the formula; return the copy and the losses of the steps."""
    policy, seen, losses = copy.deepcopy(trainer.policy), {}, []
    reference = trainer.reference.model if trainer.reference else policy
    for batch, _ in zip(trainer.train_iterator, range(N_STEPS), strict=False):
        loss = formula(Batch(policy, reference, batch), seen).mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(policy.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(policy.parameters(), gradients, strict=True):
                parameter -= LR * gradient
    return policy, losses


ALL = {**FORMULAS, **MODIFIED}


def test_every_loss_has_a_formula():
    assert FORMULAS.keys() == LOSSES.keys()


@pytest.mark.parametrize(
    "words",
    mark_exhaustive_except(
        ALL,
        "aot",
        "sft_tokens",
        "dpo loss.wpo=true",
        lambda words: words.startswith(("hinge loss.f", "ipo loss.ld", "mix loss.parts.dpo")),
    ),
)
def test_three_steps_in_microbatches_equal_the_formula_of_the_whole_batch(words, shared_trainers):
    trainer = set_loss(shared_trainers[words.startswith("sft")], words.split())
    start = copy.deepcopy(trainer.policy.state_dict())
    expected, losses = train_by_hand(trainer, ALL[words])
    for batch, loss in zip(trainer.train_iterator, losses, strict=False):
        assert len(trainer.with_microbatches(batch)["microbatches"]) >= 2
        assert trainer.train_step(batch)["loss/train"] == pytest.approx(loss, rel=1e-9)
    for (name, value), other in zip(trainer.policy.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-8, atol=1e-10, msg=name)
        assert "weight" not in name or not torch.equal(value, start[name])


# ---- losses of whole batches ----------------------------------------------------------------------------------------

WHOLE_BATCH = [
    *RUN, "loss=mix", "loss.parts={bco:1,beta_dpo:0.5,aot:0.3,aot_unpaired:0.2,sft_tokens:0.1,dpo:1,kto:0.5}",
    "loss.dpo.ld_alpha=0.4", "loss.dpo.wpo=true", "loss.bco.momentum=0.5", "optimizer=RMSprop", "lr=1e-3",
    "n_examples=16", "eval_every=16",
]  # fmt: skip
SETUPS = {
    "FSDP": ["trainer=FSDPTrainer"],
    "TP": ["trainer=TensorParallelTrainer"],
    "packed rows": ["padding_free=true"],
    "plain": ["shared_prompt=false", "padding_free=false", "gradient_accumulation_steps=4"],
}


@pytest.mark.slow
@pytest.mark.parametrize("setup", mark_exhaustive_except(SETUPS, "FSDP"))
def test_losses_of_whole_batches_depend_on_neither_microbatches_nor_workers(setup, launcher, tmp_path):
    lines = []
    for name, overrides in (("one", ["gradient_accumulation_steps=1"]), (setup, SETUPS[setup])):
        n_workers = 2 if "trainer" in "".join(overrides) else 1
        code = launcher.run(*WHOLE_BATCH, *overrides, f"local_run_dir={tmp_path}/{name}", n_workers=n_workers)
        assert code == 0, launcher.output
        lines.append(read_jsonl(tmp_path / name / "metrics.jsonl"))
    assert {"loss_train/bco", "loss_eval/aot", "loss_eval/sft_tokens"} <= {key for line in lines[0] for key in line}
    for expected, line in zip(*lines, strict=True):
        for key in line.keys() - {"split", "examples_per_second", "tokens_per_second"}:
            if "accuracies" not in key:
                assert line[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-6), key


def test_moving_averages_of_a_loss_resume_with_the_run(make_trainer, tmp_path):
    words = [*RUN, "loss=mix", "loss.parts={bco:1,beta_dpo:1}", f"local_run_dir={tmp_path}/run"]
    trainer = make_trainer(*words)
    batches = list(trainer.train_iterator)
    for batch in batches[:2]:
        trainer.train_step(batch)
    trainer.save()
    expected = trainer.train_step(batches[2])

    resumed = make_trainer(*words)
    resume_training(resumed, str(tmp_path / "run/LATEST"))
    assert resumed.loss_memory.averages.keys() == {"bco_shift", "beta_dpo_margin"}
    metrics = resumed.train_step(batches[2])
    for key in ("loss/train", "loss_train/bco", "loss_train/beta_dpo", "grad_norm"):
        assert metrics[key] == expected[key], key

    forgetful = make_trainer(*words)
    resume_training(forgetful, str(tmp_path / "run/LATEST"))
    forgetful.loss_memory = Memory()
    assert forgetful.train_step(batches[2])["loss_train/bco"] != expected["loss_train/bco"]


def test_evaluations_do_not_change_moving_averages(make_trainer):
    trainer = make_trainer(*RUN, "loss=bco")
    trainer.train_step(next(iter(trainer.train_iterator)))
    before = dict(trainer.loss_memory.averages)
    assert trainer.evaluate()["loss/eval"] > 0
    assert trainer.loss_memory.averages == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss=dpo", "loss.ld_alpha=0.5", "precompute_ref_log_probs=true"], "loss.ld_alpha also needs those up to"),
        (["loss=dpo", "loss.ld_alpha=1.5"], "loss.ld_alpha=1.5: must be at most 1"),
        (["loss=dpo", "loss.f_divergence=kl"], "loss.f_divergence=kl: must be one of reverse_kl, forward_kl"),
        (["loss=kto", "loss.ld_alpha=0.5"], "loss.ld_alpha: loss=kto has no such option"),
        (["loss=aot", "loss.wpo=true"], "loss.wpo: loss=aot has no such option"),
        (["loss=bco", "loss.momentum=1"], "loss.momentum=1: must be below 1"),
        (["loss=mix"], "loss=mix needs the weight of each of its losses"),
        (["loss=mix", "loss.parts={sigmoid:1}"], "loss.parts=sigmoid: no such loss: sigmoid is dpo here"),
        (["loss=mix", "loss.parts={dpo:-1}"], "loss.parts.dpo=-1: must be a number above 0"),
        (["loss=mix", "loss.parts={dpo:1}", "loss.dpo.bta=1"], "loss.dpo.bta: loss=dpo has no such option"),
        (["loss=mix", "loss.parts={dpo:1}", "loss.ipo.beta=1"], "loss.ipo: loss=mix has no such option"),
        (["loss=mix", "loss.parts={simpo:1}", "precompute_ref_log_probs=true"], "loss=mix uses no reference"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_do_not_fit_the_loss_are_refused(words, message, make_trainer):
    with pytest.raises(UserError, match=message):
        make_trainer(*RUN, *words)
