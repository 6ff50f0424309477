"""Single responses with a label, and ranked responses: how they are combined into examples and trained on."""

import pytest
import torch
from conftest import ORACLE
from test_own_data import RUN, write
from transformers import AutoTokenizer

from data.batches import mismatched_batch
from data.choice import Choice
from data.report import count_empty_prompts
from preference_datasets import get_batch_iterator
from utils import UserError

UNPAIRED = [
    {"prompt": f"Question {i}", "completion": f" answer {i % 4}", "label": i % 3 > 0} for i in range(12)
]  # fmt: skip


@pytest.fixture
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(ORACLE / "model")
    tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def test_kto_on_unpaired_data_equals_its_equation(make_trainer, tmp_path):
    """Eq. 8 of https://arxiv.org/abs/2402.01306 with log-probabilities of each single response, computed one by one."""
    for split in ("train", "test"):
        write(tmp_path / "data" / f"{split}.jsonl", UNPAIRED)
    trainer = make_trainer(*RUN, "loss=kto", f"datasets=[{tmp_path}/data]", "loss.beta=0.3",
                           "loss.undesirable_weight=2", "model.policy_dtype=float64",
                           "model.reference_dtype=float64")  # fmt: skip
    before = {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}

    def logp(weights: dict, prompt: str, response: str) -> torch.Tensor:
        trainer.policy.load_state_dict(weights)
        tokenizer = trainer.tokenizer
        prompt_ids, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, response))
        whole = torch.tensor([[*prompt_ids, *ids, tokenizer.eos_token_id]])
        logps = trainer.policy(whole).logits[0, :-1].log_softmax(-1)
        return logps.gather(1, whole[0, 1:, None])[len(prompt_ids) - 1 :].sum()

    with torch.no_grad():
        after = {name: tensor * (1.05 if tensor.is_floating_point() else 1) for name, tensor in before.items()}

        def ratio(prompt: str, response: str) -> torch.Tensor:
            return logp(after, prompt, response) - logp(before, prompt, response)

        batch = next(iter(trainer.train_iterator))
        labels = {(row["prompt"], row["completion"]): row["label"] for row in UNPAIRED}
        singles, others = [], []
        for source, found in ((batch, singles), (mismatched_batch(batch), others)):
            for side in ("chosen", "rejected"):
                for ids, mask, y in zip(source[f"{side}_input_ids"], source[f"{side}_attention_mask"],
                                        source[f"{side}_labels"], strict=True):  # fmt: skip
                    start = int((y != -100).int().argmax())
                    texts = [trainer.tokenizer.decode(part) for part in (ids[:start], ids[start : int(mask.sum())])]
                    found.append((texts[0], texts[1].removesuffix("<|endoftext|>"), side))
        assert all(labels[prompt, response] == (side == "chosen") for prompt, response, side in singles)
        assert not any((prompt, response) in [single[:2] for single in singles] for prompt, response, _ in others)
        kl = max(0.0, float(sum(ratio(p, r) for p, r, _ in others)) / len(others))
        losses = []
        for prompt, response, side in singles:
            r = float(ratio(prompt, response))
            sigmoid = torch.tensor(0.3 * (r - kl) if side == "chosen" else 0.3 * (kl - r)).sigmoid().item()
            losses.append((1 if side == "chosen" else 2) * (1 - sigmoid))
        trainer.policy.load_state_dict(after)
    loss, _ = trainer.get_batch_metrics(batch, trainer.config.loss)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_pair_of_unpaired_responses_is_as_long_as_the_longer_of_its_two_sequences(tokenizer, tmp_path):
    rows = [{"prompt": "10 11 12 13 14 15", "completion": "20", "label": True},
            {"prompt": "10", "completion": "20 21 22 23 24", "label": False}]  # fmt: skip
    n_tokens = [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in rows]
    for split in ("train", "test"):
        write(tmp_path / "data" / f"{split}.jsonl", rows)

    def batches(max_length: int):
        return get_batch_iterator(
            [Choice(str(tmp_path / "data"), truncation="error")], tokenizer, n_epochs=1, unpaired=True, silent=True,
            max_length=max_length, cache_dir=str(tmp_path / "cache"),
        )  # fmt: skip

    (batch,) = batches(max(n_tokens))
    assert [int(batch[f"{side}_attention_mask"].sum()) for side in ("chosen", "rejected")] == n_tokens
    with pytest.raises(UserError, match=r"truncation=error: 1 examples are longer .*\n.*train split, rows 0 and 1\n"):
        batches(max(n_tokens) - 1)


def test_empty_prompts_of_both_labels_are_counted_once(tokenizer, tmp_path):
    rows = [{"prompt": prompt, "completion": " yes", "label": label} for prompt, label in
            (("", True), ("Q", True), ("R", True), ("", False))]  # fmt: skip
    for split in ("train", "test"):
        write(tmp_path / "data" / f"{split}.jsonl", rows)
    batches = get_batch_iterator([str(tmp_path / "data")], tokenizer, n_epochs=1, unpaired=True, silent=True,
                                 cache_dir=str(tmp_path / "cache"))  # fmt: skip
    assert batches.epoch_size == 3  # the undesirable response is repeated
    assert count_empty_prompts(batches) == 2


def test_unpaired_training_uses_every_response_and_repeats_the_rarer_label(make_trainer, tmp_path):
    for split in ("train", "test"):
        write(tmp_path / "data" / f"{split}.jsonl", UNPAIRED)
    trainer = make_trainer(*RUN, "loss=kto", f"datasets=[{tmp_path}/data]")
    prompts = trainer.train_iterator.prompts
    desirable = [row["prompt"] for row in UNPAIRED if row["label"]]
    undesirable = [row["prompt"] for row in UNPAIRED if not row["label"]]
    assert sorted(p.text for p in prompts) == sorted(desirable)
    others = [p.other.text for p in prompts]
    assert {p: others.count(p) for p in undesirable} == dict.fromkeys(undesirable, 2)


@pytest.mark.parametrize("kind", ["ranked", "unpaired"])
def test_reference_is_precomputed_for_ranked_data_and_refused_for_unpaired(kind, make_trainer, tmp_path):
    rows = UNPAIRED
    if kind == "ranked":
        rows = [{"prompt": f"Q {i}", "responses": [" a", f" b{i}", " c c"], "ranks": [2, 1, 2]} for i in range(8)]
    for split in ("train", "test"):
        write(tmp_path / "data" / f"{split}.jsonl", rows)
    run = [*RUN, f"datasets=[{tmp_path}/data]"]
    if kind == "unpaired":
        with pytest.raises(UserError, match="loss=kto forms new pairs of prompts and responses in every batch"):
            make_trainer(*run, "loss=kto", "precompute_ref_log_probs=true")
        return
    online, precomputed = (make_trainer(*run, f"precompute_ref_log_probs={value}") for value in ("false", "true"))
    assert precomputed.reference is None
    for batch in online.train_iterator:
        expected = torch.stack(online.reference_logps(batch))
        assert torch.allclose(torch.stack(precomputed.reference_logps(batch)), expected, rtol=1e-5)
