"""Sample responses of policy and reference to evaluation prompts during training, and estimate their KL divergence."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList

from data.chat import end_token_ids
from data.tokenization import decode_response
from distributed.dtensor import n_gathered
from log_probabilities import response_lengths
from reporting.metrics import kl_metrics
from reporting.terminal import progressing
from reporting.usage import in_short
from utils import on_device, pad_to_length, rank0_print, select_examples, unwrap_adapter


def generate_scorable(
    model: nn.Module,
    tokenizer,
    batch: dict,
    max_length: int,
    stops: Callable[[], bool],
    synced: bool,
    processors: LogitsProcessorList | None = None,
) -> tuple[list[str], dict, torch.Tensor]:
    """Draw a response to each of the batch's prompts from the model's own distribution.

    Nothing predicts the first token after an empty prompt, so its response is empty, too.

    Returns: the responses as strings; their tokens, after the prompts', as a batch of SFT targets, on the CPU; and True
        for those that were drawn, (batch_size,): False after an empty prompt.

    Args:
        max_length: of prompt and response, in tokens.
        stops: called at every token; True ends all responses there.
        synced: workers gather the model together for each token, so those that are done continue until all are.
        processors: change the logits, of which the largest is then taken; None: draw tokens from the softmax.
    """
    prompt_ids, mask = batch["prompt_input_ids"], batch["prompt_attention_mask"]  # (batch_size, longest prompt)
    is_empty = mask.sum(1) == 0
    if is_empty.any():  # the model needs a token to compute, and all workers must call it
        prompt_ids = pad_to_length(prompt_ids, 1, tokenizer.pad_token_id)
        last = torch.arange(prompt_ids.shape[1], device=mask.device) == prompt_ids.shape[1] - 1
        mask = pad_to_length(mask, 1, 0) | (is_empty[:, None] & last)
    with torch.no_grad(), _unaltered_distribution(model, tokenizer):
        output = model.generate(
            prompt_ids,
            attention_mask=mask,
            max_new_tokens=max_length - prompt_ids.shape[1],
            stopping_criteria=[lambda ids, _: ids.new_full(ids.shape[:1], stops(), dtype=torch.bool)],
            synced_gpus=synced,
            do_sample=processors is None,
            logits_processor=processors,
        )
    output = pad_to_length(output, max_length, tokenizer.pad_token_id)
    targets = _as_targets(output.cpu(), mask.cpu(), end_tokens(model, tokenizer))
    responses = [
        "" if empty else decode_response(*target_ids(targets, row), tokenizer)
        for row, empty in enumerate(is_empty.tolist())
    ]
    return responses, targets, ~is_empty.cpu()


def end_tokens(model: nn.Module, tokenizer) -> list[int]:
    """Return the ids that end a response."""
    return end_token_ids(model.generation_config, tokenizer)


def target_ids(targets: dict[str, torch.Tensor], row: int) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt and of its response in a batch of SFT targets."""
    ids, labels = targets["chosen_input_ids"][row], targets["chosen_labels"][row]
    n_tokens, n_response = int(targets["chosen_attention_mask"][row].sum()), int((labels != -100).sum())
    return ids[: n_tokens - n_response].tolist(), ids[n_tokens - n_response : n_tokens].tolist()


def _as_targets(output: torch.Tensor, prompt_mask: torch.Tensor, ends: list[int]) -> dict[str, torch.Tensor]:
    """Return samples, whose prompts are padded on the left, as a batch of SFT targets: (batch_size, length) each.

    A response ends with the first token that ends it.
    """
    n_before = prompt_mask.shape[1]
    is_end = torch.isin(output[:, n_before:], torch.tensor(ends))
    is_response = is_end.cumsum(1) - is_end.int() == 0
    mask = torch.cat([prompt_mask.bool(), is_response], dim=1)
    labels = output.masked_fill(torch.cat([torch.ones_like(prompt_mask).bool(), ~is_response], dim=1), -100)
    order = (~mask).int().argsort(dim=1, stable=True)  # moves padding to the end
    return {
        "chosen_input_ids": output.gather(1, order),
        "chosen_attention_mask": mask.long().gather(1, order),
        "chosen_labels": labels.gather(1, order),
    }


@contextlib.contextmanager
def _unaltered_distribution(model: nn.Module, tokenizer) -> Iterator[None]:
    """Let `model.generate` draw from the model's softmax: only the token ids of its generation config are kept.

    The config itself must be replaced, as `generate` reads from it whatever it isn't given. Router logits are switched
    off: a mixture of experts' auxiliary loss fails on a mask that is longer than the step's tokens.
    """
    former, text_config = model.generation_config, model.config.get_text_config()
    returns_router_logits = getattr(text_config, "output_router_logits", None)
    unaltered = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        bos_token_id=former.bos_token_id,
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    holders = {id(holder): holder for holder in (model, unwrap_adapter(model))}.values()
    for holder in holders:
        holder.generation_config = unaltered
    if returns_router_logits:
        text_config.output_router_logits = False
    try:
        yield
    finally:
        if returns_router_logits:
            text_config.output_router_logits = True
        for holder in holders:
            holder.generation_config = former


# ---- samples of a trainer -------------------------------------------------------------------------------------------


def sample_evaluation(trainer, evaluation_seconds: float = 0.0) -> tuple[list[dict], dict[str, float]]:
    """Draw responses to the first `n_eval_model_samples` evaluation prompts; all workers must call it.

    Args:
        evaluation_seconds: how long the evaluation took, of which sampling is a part.

    Returns: samples, see `RunLog.log`; and the policy's KL divergence from the reference on them, if the reference is
        in memory.
    """
    trainer.policy.eval()
    samples, logratios, n_samples = [], [], trainer.config.n_eval_model_samples
    n_batches = -(-n_samples // trainer.config.eval_batch_size)
    forecast = Forecast(trainer, n_batches, evaluation_seconds)
    for batch in progressing(trainer.eval_batches[:n_batches], "Sampling", "batches"):
        trainer.stop.check()
        wanted = [i for i, index in enumerate(batch["index"]) if index is not None and index < n_samples]
        # a worker without any generates too: forwards are collective
        batch = select_examples(batch, torch.tensor(wanted or [0]))
        *drawn, scores = sample_batch(trainer, on_device(batch, trainer.device), forecast.note_token)
        own = [
            [
                {"model": model, "prompt": prompt, "response": response, "sample": prompt + response}
                for prompt, response in zip(batch["prompt"], responses, strict=bool(responses))
            ]
            for model, responses in zip(("policy", "reference"), drawn, strict=True)
        ]
        own = [*own, scores] if wanted else [[], [], []]
        *parts_by_model, score_parts = zip(*trainer.strategy.gather_shards(own), strict=True)
        samples += [sample for parts in parts_by_model for part in parts for sample in part]
        logratios += [score for part in score_parts for score in part]
    return samples, kl_metrics(logratios)


class Forecast:
    """Warns once a run, after a few tokens, if drawing samples will take longer than the evaluation itself.

    Where workers share every batch (FSDP), each token gathers the model: all of it, or with tensor_parallel=N the
    part, about 1/N, that this worker computes with.
    """

    N_UNTIMED, N_TIMED = 2, 8  # tokens; the first ones also compute the prompt
    NOTABLE = 60.0  # seconds; less is not worth a warning
    warned_runs: ClassVar[set[str]] = set()

    def __init__(self, trainer, n_batches: int, evaluation_seconds: float):
        self.trainer, self.n_batches, self.evaluation_seconds = trainer, n_batches, evaluation_seconds
        self.times: list[float] = []

    def note_token(self):
        """Note that a token was drawn; print the warning if it is due."""
        if not self.trainer.is_sharded or len(self.times) == self.N_UNTIMED + self.N_TIMED:
            return
        self.times.append(time.perf_counter())
        if len(self.times) == self.N_UNTIMED + self.N_TIMED:
            self._warn((self.times[-1] - self.times[self.N_UNTIMED - 1]) / self.N_TIMED)

    def _warn(self, seconds_per_token: float):
        trainer, config = self.trainer, self.trainer.config
        n_models = 1 if trainer.reference is None else 2
        n_tokens = max(config.max_length - batch["prompt_input_ids"].shape[1] for batch in trainer.eval_batches)
        seconds = self.n_batches * n_tokens * n_models * seconds_per_token
        is_notable = seconds > max(self.evaluation_seconds, self.NOTABLE)
        if not is_notable or trainer.run_dir in self.warned_runs:
            return
        self.warned_runs.add(trainer.run_dir)
        rank0_print(
            f"WARNING: drawing samples may take {seconds:,.0f} s, the evaluation took {self.evaluation_seconds:,.0f} s "
            f"(trainer={config.trainer}): each token takes {seconds_per_token:.3f} s and needs {self.gathered()}: up "
            f"to {self.n_batches} batches × {n_tokens} tokens × {n_models} models. Give sample_during_eval=false (or a "
            "smaller n_eval_model_samples), and draw samples from checkpoints by sample.py with engine=vllm"
        )

    def gathered(self) -> str:
        """Return how much of the model a worker computes with, and from how many workers FSDP gathers that."""
        parameters, n_workers = [*self.trainer.policy.parameters()], self.trainer.strategy.mesh["shard"].size()
        whole, gathered = (in_short(sum(map(count, parameters))) for count in (torch.numel, n_gathered))
        part = f"{gathered} of the model's {whole} parameters"
        return f"{part}, gathered from {n_workers} workers" if n_workers > 1 else f"{part}, which each worker holds"


def sample_batch(
    trainer, batch: dict, note_token: Callable[[], None] = lambda: None
) -> tuple[list[str], list[str], list[tuple[float, int]]]:
    """Draw a response to each prompt of the batch from the policy, and from the reference if it is in memory.

    Args:
        note_token: called at every token that the policy draws.

    Returns: the policy's responses; the reference's; and, for each of the policy's, log-ratio to the reference (nats)
        and length (tokens).
    """
    policy_responses, targets, is_drawn = _generate(trainer, trainer.policy, batch, note_token)
    if trainer.reference is None:
        return policy_responses, [], []
    with trainer.reference.active() as model:
        reference_responses = _generate(trainer, model, batch)[0]
        with torch.no_grad():
            reference_logps = trainer.response_logps(model, targets)
    with torch.no_grad():
        logratios = trainer.response_logps(trainer.policy, targets) - reference_logps.to(trainer.device)
    lengths = response_lengths(targets["chosen_labels"])
    scores = zip(logratios[is_drawn].tolist(), lengths[is_drawn].tolist(), strict=True)
    return policy_responses, reference_responses, list(scores)


def _generate(
    trainer, model: nn.Module, batch: dict, note_token: Callable[[], None] = lambda: None
) -> tuple[list[str], dict, torch.Tensor]:
    def stops() -> bool:
        note_token()
        return trainer.strategy.stops_sampling(trainer.stop.received is not None)

    with trainer.autocast(model):  # samples are drawn in the precision in which they are scored
        samples = generate_scorable(
            model, trainer.tokenizer, batch, trainer.config.max_length, stops, synced=trainer.is_sharded
        )
    trainer.stop.check()
    return samples
