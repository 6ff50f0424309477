"""Judge responses by their scores from a reward model, or from another sequence classifier."""

import math
from collections.abc import Iterator

import torch
import transformers

from checkpointing.archives import check_finite, describe, load_pretrained
from data import chat, hub
from data.messages import BadExample
from evaluation.pairs import Pair, Task
from evaluation.verdicts import Verdict
from utils import UserError, default_device, rank0_print


class RewardModel:
    """Prefers the response with the higher score: the model's only output, or the log-odds of class 1 of two."""

    def __init__(self, name: str, batch_size: int, chat_template: str | None, cache_dir: str, revision: str | None):
        """
        Args:
            name: an id on the hub, or a local folder.
            batch_size: the number of responses to score at a time.
            chat_template: a file; None means the tokenizer's own.
            revision: the commit on the hub; None means the newest one, or that the model is a local folder.

        Raises: UserError if there is no such model, or if it gives no score.
        """
        self.name, self.batch_size, self.chat_template = name, batch_size, chat_template
        self.device = default_device()
        origin = f"judge_model={name}"
        hub.use_cache_if_unreachable([name])
        rank0_print(f"Loading judge {name}")
        options = {"cache_dir": cache_dir} | ({"revision": revision} if revision is not None else {})
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
            auto_class = transformers.AutoModelForSequenceClassification
            self.model = load_pretrained(name, origin, auto_class, dtype="auto", **options)
        except UserError:
            raise
        except Exception as error:  # a damaged config.json, weights and the hub's HTTP library raise errors of any kind
            cause, remedy = hub.explain_failure(error, name, "model") or (
                describe(error, 2000),
                "Give the id of a reward model (a sequence classifier) on the hub",
            )
            raise UserError(f"can't load {origin}: {cause}\n{remedy}, or give a local folder") from error
        if self.model.config.num_labels not in (1, 2):
            n_classes = self.model.config.num_labels
            raise UserError(f"{origin} has {n_classes} classes; give a model with one output (a score) or two classes")
        check_finite(self.model, origin)
        self.model.to(self.device).eval()
        self._choose_padding()

    def _choose_padding(self):
        """Give model and tokenizer the same padding token: the model scores the last token that isn't padding."""
        config = self.model.config.get_text_config()
        if config.pad_token_id is None:
            config.pad_token_id = self.tokenizer.pad_token_id
        self.model.config.pad_token_id = config.pad_token_id
        if config.pad_token_id is None:
            rank0_print(f"judge_model={self.name} has no padding token: responses are scored one at a time")
            self.batch_size = 1

    def judge(self, tasks: list[Task]) -> Iterator[tuple[Task, Verdict]]:
        """Yield verdicts with their scores: [a's, b's], or [a's] for a single response.

        Raises: UserError if messages can't be rendered.
        """
        texts = {task.key: [text for text in (task.pair.a, task.pair.b) if text is not None] for task in tasks}
        encoded = iter(self._encode([(task.pair, text) for task in tasks for text in texts[task.key]]))
        ids = {key: [next(encoded) for _ in of_task] for key, of_task in texts.items()}
        by_length = sorted(tasks, key=lambda task: max(map(len, ids[task.key])))
        n_tasks = max(1, self.batch_size // 2)
        for start in range(0, len(tasks), n_tasks):
            batch = by_length[start : start + n_tasks]
            rows = [row for task in batch for row in ids[task.key]]
            scores = iter([score for i in range(0, len(rows), self.batch_size)
                           for score in self._scores(rows[i : i + self.batch_size])])  # fmt: skip
            for task in batch:
                yield task, self._verdict(task, [next(scores) for _ in ids[task.key]])

    @staticmethod
    def _verdict(task: Task, scores: list[float]) -> Verdict:
        a, b = scores if len(scores) == 2 else (scores[0], 0.0)
        if math.isnan(a - b) or (len(scores) == 1 and math.isinf(a)):  # two infinite scores differ by NaN
            return Verdict(failure="a score that is no number")
        if len(scores) == 1:
            return Verdict("scored", details={"scores": scores})
        is_tie = math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6)  # rounding depends on the other rows of a batch
        winner = "tie" if is_tie else "first" if (a > b) == (task.first == "a") else "second"
        return Verdict(winner, details={"scores": scores})

    def _encode(self, responses: list[tuple[Pair, str]]) -> list[list[int]]:
        """Return token ids of prompt and response: strings are concatenated, messages rendered by the chat template."""
        renderer = chat.Renderer(self.tokenizer, self.chat_template)
        n_positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = min(self.tokenizer.model_max_length, n_positions or 10**9)
        self.tokenizer.truncation_side = "left"
        encoded, n_cut = [], 0
        for pair, text in responses:
            is_text = isinstance(pair.prompt, str)
            whole = pair.prompt + text if is_text else self._rendered(pair, text, renderer)
            ids = self.tokenizer(whole, add_special_tokens=is_text)["input_ids"]
            if len(ids) > longest:  # let the tokenizer truncate: it may add a token at the start of each text
                n_cut += 1
                cut = {"truncation": True, "max_length": longest}
                ids = self.tokenizer(whole, add_special_tokens=is_text, **cut)["input_ids"]
            encoded.append(ids)
        if n_cut:
            rank0_print(f"truncated {n_cut} of {len(encoded)} texts (prompt + response) to their last {longest} tokens")
        return encoded

    def _rendered(self, pair: Pair, text: str, renderer: chat.Renderer) -> str:
        try:
            return renderer.render_dialogue([*pair.prompt, {"role": "assistant", "content": text}])
        except (BadExample, UserError) as error:
            where = f"a response with prompt_index={pair.index}"
            raise UserError(f"judge_model={self.name}: {where} can't be scored: {error}") from error

    @torch.no_grad()
    def _scores(self, rows: list[list[int]]) -> list[float]:
        length = max(1, *map(len, rows))
        pad = self.model.config.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=self.device)  # (B, T)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=self.device)
        logits = self.model(input_ids=ids, attention_mask=mask).logits.float()  # (B, 1 or 2)
        return (logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0)).tolist()
