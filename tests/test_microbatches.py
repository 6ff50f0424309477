"""Microbatches hold every pair once, cost the least possible, and give the batch's gradient."""

import itertools

import pytest
import torch
from test_shared_prompt import CONFIGS, loss_and_gradients, make_batch, make_model, original_logps

from acceleration.prefix_sharing import shared_rows
from acceleration.response_head import response_logps
from data.microbatches import _cheapest_cuts, computed_tokens, microbatches


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("n_least", [1, 2, 4])
def test_microbatches_hold_every_pair_once_and_are_no_larger_than_requested(n_least, shared):
    batch = make_batch(*((n, n % 5, n % 3) for n in (1, 9, 2, 12, 3, 7, 11, 4)))
    batch["prompt"] = list(range(8))
    parts = microbatches(batch, n_least, shared)
    assert len(parts) >= n_least
    assert max(len(part["prompt"]) for part in parts) <= 8 // n_least
    assert sorted(i for part in parts for i in part["prompt"]) == list(range(8))
    for part in parts:
        torch.testing.assert_close(part["chosen_input_ids"], batch["chosen_input_ids"][part["prompt"]])


@pytest.mark.parametrize("n_others", [1, 3, 8])
def test_all_workers_make_as_many_microbatches_as_the_worker_with_the_most(n_others):
    batch = make_batch(*((n, n % 5, n % 3) for n in (1, 9, 2, 12, 3, 7, 11, 4)))
    batch["prompt"] = list(range(8))
    n_alone = len(microbatches(batch, 1, shared=True))
    parts = microbatches(batch, 1, shared=True, agree=lambda n: max(n, n_others))
    assert len(parts) == max(n_alone, n_others)
    assert sorted(i for part in parts for i in part["prompt"]) == list(range(8))


@pytest.mark.parametrize("max_tokens", [None, 24, 45, 1])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("overhead", [0.0, 3.0, 1e9])
def test_cuts_into_microbatches_have_the_least_cost(overhead, packed, max_tokens):
    lengths, max_size = [30, 29, 12, 11, 11, 3, 2], 4

    def tokens(sizes):
        starts = itertools.accumulate(sizes, initial=0)
        groups = [lengths[start : start + size] for size, start in zip(sizes, starts, strict=False)]
        return [sum(group) if packed else len(group) * group[0] for group in groups]

    def cost(sizes):
        return sum(tokens(sizes)) + overhead * len(sizes)

    def fits(sizes):
        return all(size == 1 or n <= (max_tokens or 1000) for size, n in zip(sizes, tokens(sizes), strict=True))

    possible = [s for n in range(1, 8) for s in itertools.product(range(1, max_size + 1), repeat=n) if sum(s) == 7]
    sizes = _cheapest_cuts(lengths, max_size, overhead, packed, max_tokens)
    assert sum(sizes) == 7
    assert fits(sizes)
    assert cost(sizes) == min(map(cost, filter(fits, possible)))


def test_computed_tokens_match_each_layout():
    batch = make_batch((9, 4, 7), (3, 6, 2))  # each response gets an end
    assert computed_tokens(batch, shared=True).tolist() == [9 + 5 + 8, 3 + 7 + 3]
    assert computed_tokens(batch, shared=False).tolist() == [2 * 9 + 5 + 8, 2 * 3 + 7 + 3]
    assert computed_tokens(batch, shared=False, padded=True).tolist() == [2 * (9 + 8), 2 * (3 + 7)]
    own_prompts = make_batch((9, 4, 4), (3, 6, 6))  # the two sequences of unpaired data have different prompts
    other = make_batch((2, 1, 1), (12, 0, 0))
    own_prompts |= {key: value for key, value in other.items() if "rejected" in key}
    assert computed_tokens(own_prompts, shared=False).tolist() == [9 + 5 + 2 + 2, 3 + 7 + 12 + 1]
    assert computed_tokens(own_prompts, shared=False, padded=True).tolist() == [2 * (9 + 5), 2 * (12 + 1)]
    targets = {key: value for key, value in batch.items() if "rejected" not in key}
    assert computed_tokens(targets, shared=False, padded=True).tolist() == [9 + 5, 3 + 7]


def test_microbatches_add_up_to_the_gradient_of_the_batch():
    model = make_model(CONFIGS["gpt_neox"])
    batch = make_batch(*((n, n % 5, n % 3) for n in (1, 9, 2, 12, 3, 7, 11, 4)))
    expected = loss_and_gradients(model, original_logps(model, batch), "sft")
    model.zero_grad()
    parts = microbatches(batch, 2, shared=True)
    for part in parts:
        (-response_logps(model, shared_rows(part)).mean() * len(part["prompt"]) / 8).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)
