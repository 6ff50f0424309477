"""Exact reward and KL of a policy on a task whose responses can all be listed, and the best that any policy can reach.

Nothing is sampled: the log-probability of every response is computed. Responses form a prefix tree, which is cut into
rows. A row is the prompt, the path from it to some node, and the subtree below that node; each token attends to the
prompt and its own ancestors, so that a row computes a shared prefix once. Reward and KL are exact up to float32
rounding. They can be compared with the optimum of the KL-constrained reward for the same reference, π*(y) ∝ π_ref(y)
exp(r(y) / β) (Eq. 4 of https://arxiv.org/abs/2305.18290).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class Task:
    """A task's prompts, all responses of its grammar (the same for every prompt) and their true rewards."""

    prompts: list[str]
    responses: list[str]  # N
    rewards: np.ndarray  # (N,)


# ---- log-probabilities of all responses -----------------------------------------------------------------------------


class ResponseTree:
    """A prefix tree of token sequences, packed into rows that a model computes."""

    def __init__(self, sequences: list[list[int]], max_row: int = 192):
        """Build the tree. Node 0 is the end of the prompt.

        `tokens`, `parents` and `children` are lists over the nodes; parents come before their children. `paths`,
        (N, longest), holds the nodes of each sequence, padded with node 0.

        Args:
            sequences: token ids, each with the end-of-sequence token.
            max_row: approximate limit on the tokens in a row.
        """
        self.tokens, self.parents, child_of_token = [-1], [-1], [{}]
        paths = []
        for sequence in sequences:
            path, node = [], 0
            for token in sequence:
                if token not in child_of_token[node]:
                    child_of_token[node][token] = len(self.tokens)
                    self.tokens.append(token)
                    self.parents.append(node)
                    child_of_token.append({})
                node = child_of_token[node][token]
                path.append(node)
            paths.append(path)
        self.children = [list(nodes.values()) for nodes in child_of_token]
        self.lengths = np.array([len(path) for path in paths])
        self.paths = np.zeros((len(paths), self.lengths.max()), dtype=np.int64)
        for row, path in zip(self.paths, paths, strict=True):
            row[: len(path)] = path
        self.rows = self._pack_rows(max_row)

    def _pack_rows(self, max_row: int) -> list[list[int]]:
        """Divide the inner nodes into rows: a path from the prompt, then the subtree at its end, parents first."""
        children = self.children
        sizes = [int(bool(nodes)) for nodes in children]  # inner nodes in each subtree; leaves predict nothing
        for node in range(len(children) - 1, 0, -1):
            sizes[self.parents[node]] += sizes[node]
        rows, stack = [], [(0, [])]
        while stack:
            node, path = stack.pop()
            inner = [child for child in children[node] if children[child]]
            if len(path) + sizes[node] <= max_row or not inner:
                subtree = [node]
                for member in subtree:  # the list grows during the loop
                    subtree += [child for child in children[member] if children[child]]
                rows.append([member for member in path + subtree if member != 0])
            else:
                stack += [(child, [*path, node]) for child in inner]
        return sorted(rows, key=len)

    def row_mask(self, row: list[int]) -> np.ndarray:
        """Return the attention mask of a row, (T, T): each token attends to its path and to itself."""
        place = {node: index for index, node in enumerate(row)}
        mask = np.eye(len(row), dtype=bool)
        for index, node in enumerate(row):
            if self.parents[node] != 0:
                mask[index] |= mask[place[self.parents[node]]]
        return mask


class _Batch(NamedTuple):
    """Rows of a tree, padded, and the M children of their nodes. A row's nodes follow the prompt's last token."""

    tokens: np.ndarray  # (B, T)
    depths: np.ndarray  # (B, T)
    masks: np.ndarray  # (B, T, T)
    children: np.ndarray  # (M,) nodes
    predictors: np.ndarray  # (M,) the place of each child's parent among the B * (1 + T) outputs, which predicts it


@torch.no_grad()
def response_logps(
    model: nn.Module, tree: ResponseTree, prompts: list[list[int]], tokens_per_batch: int = 3000
) -> np.ndarray:
    """Return log π(y|x) of the tree's N sequences after each of P prompts (token ids): (P, N), in nats, float64."""
    model.eval()
    logps = np.zeros((len(prompts), len(tree.paths)))
    batches, longest = [], 0
    for row in tree.rows:
        if not batches or (len(batches[-1]) + 1) * max(longest, len(row)) > tokens_per_batch:
            batches.append([])
        batches[-1].append(row)
        longest = max(len(row) for row in batches[-1])
    prepared = [_prepare(tree, rows) for rows in batches]
    for number, prompt in enumerate(prompts):
        node_logps = np.zeros(len(tree.tokens))  # paths are padded with node 0, whose value stays 0
        for batch in prepared:
            node_logps[batch.children] = _child_logps(model, tree, prompt, batch)
        logps[number] = node_logps[tree.paths].sum(1)
    return logps


def _prepare(tree: ResponseTree, rows: list[list[int]]) -> _Batch:
    length = max(map(len, rows))
    tokens, depths = (np.zeros((len(rows), length), dtype=np.int64) for _ in range(2))
    masks = np.zeros((len(rows), length, length), dtype=bool)
    masks[:, np.arange(length), np.arange(length)] = True  # padding attends to itself, so that softmax is finite
    children, predictors = [], []
    for index, row in enumerate(rows):
        mask = tree.row_mask(row)
        tokens[index, : len(row)] = [tree.tokens[node] for node in row]
        masks[index, : len(row), : len(row)] = mask
        depths[index, : len(row)] = mask.sum(1) - 1
        for place, node in enumerate([0, *row]):
            predictors += [index * (1 + length) + place] * len(tree.children[node])
            children += tree.children[node]
    return _Batch(tokens, depths, masks, np.array(children), np.array(predictors))


def _child_logps(model: nn.Module, tree: ResponseTree, prompt: list[int], batch: _Batch) -> np.ndarray:
    """Return log π(child | prompt and path to its parent) of each of the batch's children: (M,), in float64."""
    device = model.get_input_embeddings().weight.device
    n_rows, length = batch.tokens.shape
    n_prompt = len(prompt)
    ids = torch.cat([torch.tensor(prompt).expand(n_rows, -1), torch.from_numpy(batch.tokens)], dim=1)
    depths = n_prompt + torch.from_numpy(batch.depths)
    positions = torch.cat([torch.arange(n_prompt).expand(n_rows, -1), depths], dim=1)
    mask = torch.zeros(n_rows, n_prompt + length, n_prompt + length, dtype=torch.bool)
    mask[:, :n_prompt, :n_prompt] = torch.ones(n_prompt, n_prompt, dtype=torch.bool).tril()
    mask[:, n_prompt:, :n_prompt] = True
    mask[:, n_prompt:, n_prompt:] = torch.from_numpy(batch.masks)
    mask = mask[:, None].to(device)
    if model.config._attn_implementation == "eager":  # eager attention adds the mask; SDPA takes booleans
        mask = torch.zeros(mask.shape, dtype=model.dtype, device=device).masked_fill(
            ~mask, torch.finfo(model.dtype).min
        )
    ids, positions = ids.to(device), positions.to(device)
    output = model.base_model(ids, attention_mask=mask, position_ids=positions, use_cache=False)[0]
    hidden = output[:, n_prompt - 1 :].flatten(0, 1)  # (B * (1 + T), H)
    places, inverse = np.unique(batch.predictors, return_inverse=True)
    logits = model.get_output_embeddings()(hidden[torch.from_numpy(places).to(device)])  # (places, V)
    normalizers = logits.logsumexp(-1).double()
    targets = torch.tensor([tree.tokens[node] for node in batch.children], device=device)
    inverse = torch.from_numpy(inverse).to(device)
    return (logits[inverse, targets].double() - normalizers[inverse]).cpu().numpy()


# ---- a policy's figures, and the frontier ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """Exact figures of a policy, averaged over prompts; all but `outside` are for grammatical responses only."""

    reward: float  # E[r]
    kl: float  # KL(policy || reference), in nats
    outside: float  # the probability of all responses outside the grammar
    length: float  # the mean number of tokens of a response, including its end token


def conditioned(logps: np.ndarray) -> np.ndarray:
    """Return log-probabilities given that a response belongs to the grammar: (P, N) to (P, N)."""
    top = logps.max(1, keepdims=True)
    return logps - top - np.log(np.exp(logps - top).sum(1, keepdims=True))


class Frontier:
    """Reward against KL of the optimal policies π*(y) ∝ π_ref(y) exp(r(y) / β), with one β for all prompts."""

    def __init__(self, reference_logps: np.ndarray, rewards: np.ndarray, lengths: np.ndarray):
        """Make the frontier of a reference's log-probabilities (P, N), and the responses' rewards and lengths (N,)."""
        self.reference, self.rewards, self.lengths = conditioned(reference_logps), rewards, lengths
        self.reference_reward = self.at(0.0)[0]

    def optimum(self, inverse_beta: float) -> np.ndarray:
        """Return log π* at 1 / β: (P, N)."""
        return conditioned(self.reference + inverse_beta * self.rewards)

    def at(self, inverse_beta: float) -> tuple[float, float]:
        """Return E[r] and KL of π* at 1 / β."""
        optimum = self.optimum(inverse_beta)
        p = np.exp(optimum)
        return float((p @ self.rewards).mean()), float((p * (optimum - self.reference)).sum(1).mean())

    def reward_at(self, kl: float) -> float:
        """Return the largest E[r] that a policy with at most this KL can have."""
        low, high = 0.0, 1.0
        while self.at(high)[1] < kl and high < 1e4:
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.at(middle)[1] < kl else (low, middle)
        return self.at(high)[0]

    def figures(self, policy_logps: np.ndarray) -> Figures:
        """Return the figures of a policy with these log-probabilities, (P, N)."""
        policy = conditioned(policy_logps)
        p = np.exp(policy)
        return Figures(
            reward=float((p @ self.rewards).mean()),
            kl=float((p * (policy - self.reference)).sum(1).mean()),
            outside=float(1 - np.exp(policy_logps).sum(1).mean()),
            length=float((p @ self.lengths).mean()),
        )

    def fraction(self, figures: Figures) -> float:
        """Return the policy's gain in reward over the reference, as a fraction of the largest gain at its KL."""
        largest = self.reward_at(figures.kl) - self.reference_reward
        return (figures.reward - self.reference_reward) / largest if largest > 1e-9 else 0.0
