"""Sample responses of policy and reference to evaluation prompts during training, and estimate their KL divergence."""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList

from data.chat import end_token_ids
from data.tokenization import decode_response
from log_probabilities import response_lengths
from reporting.metrics import kl_metrics
from reporting.terminal import progressing
from utils import on_device, pad_to_length, rank0_print, select_examples, unwrap_adapter

NOTABLE_SECONDS = 60.0  # shorter sampling gives no warning
_WARNED: set[str] = set()  # run directories


def generate_as_targets(
    model: nn.Module,
    tokenizer,
    batch: dict,
    max_length: int,
    stops: Callable[[], bool],
    synced: bool,
    processors: LogitsProcessorList | None = None,
) -> tuple[list[str], dict, torch.Tensor]:
    """Draw a response to each of the batch's prompts from the model's own distribution.

    An empty prompt has an empty response, as nothing predicts its first token.

    Returns: the responses as strings; prompts and responses as a batch of SFT targets, on the CPU; and a mask,
        (batch_size,), which is False for empty prompts.

    Args:
        max_length: of prompt and response, in tokens.
        stops: called at every token; if it returns True, all responses end there.
        synced: True if all workers gather the model for each token; then a worker whose responses have ended continues
            until the responses of all workers have ended.
        processors: change the logits, then the likeliest token is taken; None means to draw tokens from the softmax.
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

    A response ends with its first end token.
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
    """Let `model.generate` draw from the model's softmax: keep only the token ids of its generation config.

    The config is replaced, because `generate` reads all arguments from it that aren't given. Router logits are switched
    off: with a cache, a mixture of experts' auxiliary loss fails, as the mask is longer than the step's tokens.
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
        evaluation_seconds: the duration of the evaluation. If sharded workers sample for longer, and for more than
            `NOTABLE_SECONDS`, the run warns once.

    Returns: samples, see `RunLog.log`; and the policy's KL divergence from the reference on them, if the reference is
        in memory.
    """
    trainer.policy.eval()
    start, samples, logratios, n_samples = time.perf_counter(), [], [], trainer.config.n_eval_model_samples
    n_batches = -(-n_samples // trainer.config.eval_batch_size)
    for batch in progressing(trainer.eval_batches[:n_batches], "Sampling", "batches"):
        trainer.stop.check()
        wanted = [i for i, index in enumerate(batch["index"]) if index is not None and index < n_samples]
        # a worker without wanted samples generates too: the forward pass is collective
        batch = select_examples(batch, torch.tensor(wanted or [0]))
        policy, reference, scores = sample_batch(trainer, on_device(batch, trainer.device))
        drawn = [
            [{"model": model, "prompt": prompt, "response": response, "sample": prompt + response}
             for prompt, response in zip(batch["prompt"], responses, strict=bool(responses))]
            for model, responses in (("policy", policy), ("reference", reference))
        ]  # fmt: skip
        shards = trainer.strategy.gather_shards([*drawn, scores] if wanted else [[], [], []])
        samples += [sample for model in (0, 1) for shard in shards for sample in shard[model]]
        logratios += [score for shard in shards for score in shard[2]]
    seconds = time.perf_counter() - start
    if trainer.is_sharded and seconds > max(evaluation_seconds, NOTABLE_SECONDS):
        _warn_of_slow_sampling(trainer, seconds, evaluation_seconds)
    return samples, kl_metrics(logratios)


def _warn_of_slow_sampling(trainer, seconds: float, evaluation_seconds: float):
    if trainer.run_dir not in _WARNED:
        _WARNED.add(trainer.run_dir)
        rank0_print(
            f"WARNING: drawing samples took {seconds:,.0f} s, the evaluation {evaluation_seconds:,.0f} s: with "
            f"trainer={trainer.config.trainer} all workers gather the model again for each token. Give "
            "sample_during_eval=false (or a smaller n_eval_model_samples), and draw samples from checkpoints by "
            "sample.py with engine=vllm"
        )


def sample_batch(trainer, batch: dict) -> tuple[list[str], list[str], list[tuple[float, int]]]:
    """Draw a response to each prompt of the batch from the policy, and from the reference if it is in memory.

    Returns: the policy's responses; the reference's; and, for each response of the policy to a prompt that isn't empty,
        the log-ratio of policy to reference (nats) and the length (tokens).
    """
    policy_responses, targets, is_drawn = _generate(trainer, trainer.policy, batch)
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


def _generate(trainer, model: nn.Module, batch: dict) -> tuple[list[str], dict, torch.Tensor]:
    with trainer.autocast(model):  # the precision in which samples are scored
        samples = generate_as_targets(
            model, trainer.tokenizer, batch, trainer.config.max_length,
            lambda: trainer.strategy.stops_sampling(trainer.stop.received is not None), synced=trainer.is_sharded,
        )  # fmt: skip
    trainer.stop.check()
    return samples
