"""Tokenized prompts for `sample.py`: rows of a file, or prompts of the evaluation data."""

import dataclasses

from omegaconf import DictConfig

from basics.printing import counted
from data import chat
from data.batches import BatchIterator
from data.formats import prompt_example
from data.locations import locate
from data.messages import BadExample
from data.plain_reader import Fault
from data.row_sources import open_rows
from data.template_limits import TemplateLimit
from reporting.terminal import Progress
from utils import UserError, get_local_dir, rank0_print


@dataclasses.dataclass
class Request:
    """A prompt for samples: as given, as rendered text, and as token ids."""

    index: int
    given: str | list[dict]
    text: str
    ids: list[int]


def read_requests(
    config: DictConfig, tokenizer, eval_iterator: BatchIterator | None, prompts: str | None
) -> list[Request]:
    """Return all prompts, each cut to its last `max_prompt_length` tokens.

    Args:
        eval_iterator: supplies the evaluation prompts if `prompts` names no file.

    Raises: UserError naming the first row without a prompt.
    """
    if prompts is None:
        given = rendered = list(dict.fromkeys(prompt.text for prompt, _ in eval_iterator.examples()))
    else:
        given, rendered = _prompts_in_file(config, tokenizer, prompts)
    ids = chat.token_ids(rendered, tokenizer)
    bos = [tokenizer.bos_token_id] if config.add_bos else []
    ids = [one if one[: len(bos)] == bos else bos + one for one in ids]
    n_cut = sum(len(one) > config.max_prompt_length for one in ids)
    if n_cut:
        rank0_print(f"cut {counted(n_cut, 'prompt')} to the last {config.max_prompt_length} tokens (max_prompt_length)")
    return [
        Request(number, *texts, one[-config.max_prompt_length :])
        for number, (*texts, one) in enumerate(zip(given, rendered, ids, strict=True))
    ]


def _prompts_in_file(config: DictConfig, tokenizer, path: str) -> tuple[list[str | list[dict]], list[str]]:
    """Return the prompts in a file as given, and as the chat template renders them."""
    location, cache_dir = locate(path, "prompts"), get_local_dir(config.local_dirs)
    splits = [open_rows(location, split, cache_dir, True) for split in location.files]
    renderer, given, rendered = chat.Renderer(tokenizer, config.chat_template), [], []
    for rows in splits:
        with Progress(f"Reading {path}", rows.n_rows, "prompts") as progress:
            for chunk in rows.chunks(1000):
                for number, _, row in chunk:
                    try:
                        if isinstance(row, Fault):
                            raise BadExample("broken row", row.reason)
                        example = prompt_example(row, config.apply_chat_template)
                        rendered.append(renderer.render(example).prompt)
                        given.append(example.prompt)
                    except (BadExample, TemplateLimit) as error:
                        raise UserError(f"prompts={path}, row {number}: {error}") from error
                progress.update(len(chunk))
    return given, rendered
