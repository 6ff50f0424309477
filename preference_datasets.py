"""Load the built-in preference datasets, and iterate over batches of these and of the user's own data.

Files and hub datasets in a known format need no code (docs/data.md). For other data, add a function like `get_hh` here
and an entry in `DATASETS`.
"""

import functools
import inspect
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import cpu_count
from typing import TYPE_CHECKING

import numpy as np
from bs4 import BeautifulSoup, NavigableString, Tag
from bs4.element import PreformattedString
from omegaconf import DictConfig

from basics.printing import counted
from data.batches import BatchIterator, Prompt, split_name
from data.choice import KEPT_ENDS, Choice, Settings
from data.locations import check_path, locate_built_in
from data.preparation import prepare
from data.prepared import PreparedPrompts
from data.reading import read_split, row_place
from data.report import print_report
from data.row_sources import ROWS  # noqa: F401 (re-exported)
from data.selection import draw_examples, drop_identical, drop_overlong, epoch_order
from data.tokenization import get_collate_fn, tokenize_batch_element  # noqa: F401 (re-exported)
from data.toy import get_toy
from losses import find_loss
from reporting.terminal import progressing
from utils import UserError, closest_match, get_local_dir, on_rank0, rank0_print

if TYPE_CHECKING:
    import datasets


class RowError(UserError):
    """Raised for a row that can't be used; `get_dataset` adds the row's file and line to the message."""

    def __init__(self, message: str, split: str, row: int):
        super().__init__(message)
        self.split, self.row = split, row


def load_rows(
    name: str, path: str | None, split: str, fields: dict[str, type], cache_dir: str | None, silent: bool = False
) -> "datasets.Dataset":
    """Load one split of a dataset from the hub or from a local folder, and check that it has all `fields`.

    Args:
        path: a hub id or folder; by default, the hub id in `DATASETS`.

    Raises: UserError naming dataset and split if the split can't be loaded or lacks a field.
    """
    path = path or DATASETS[name].hub_id
    rows = read_split(name, path, split, cache_dir, silent)
    missing = [key for key in fields if key not in rows.column_names]
    if missing:
        raise RowError(
            f"datasets=[{name}], {split} split, row 0: no field {', '.join(map(repr, missing))} in {path!r}; "
            f"its fields are {rows.column_names}, but {list(fields)} are expected",
            split,
            row=0,
        )
    return rows


def checked_rows(
    rows: "datasets.Dataset", name: str, split: str, fields: dict[str, type], silent: bool
) -> Iterator[tuple[int, dict]]:
    """Yield each row with its index, after checking the types of its fields.

    The index is the row's position in the split or, after a shuffle, its field 'row' (see `get_se`).

    Raises: RowError naming dataset, split and row.
    """
    shown = rows if silent else progressing(rows, f"Processing {name} ({split})", "rows")
    for index, row in enumerate(shown):
        index = row.get("row", index)
        for key, expected in fields.items():
            if not isinstance(row[key], expected):
                kind = "empty" if row[key] is None else f"{row[key]!r:.60}"
                raise RowError(
                    f"datasets=[{name}], {split} split, row {index}: field {key!r} is {kind}, "
                    f"expected a value of type {expected.__name__}",
                    str(rows.split),
                    index,
                )
        yield index, row


def _new_entry() -> dict:
    return {"responses": [], "pairs": [], "sft_target": None, "rows": []}


def extract_anthropic_prompt(prompt_and_response: str) -> str:
    """Return the transcript up to and including its last 'Assistant:'."""
    search_term = "\n\nAssistant:"
    position = prompt_and_response.rfind(search_term)
    if position == -1:
        raise ValueError(f"the transcript has no {search_term!r}")
    return prompt_and_response[: position + len(search_term)]


def get_hh(split: str, silent: bool = False, cache_dir: str | None = None, path: str | None = None) -> dict:
    """Load Anthropic's Helpful-Harmless dialogues as a dict from prompt to an entry:

        {'responses': list[str],
         'pairs': list[tuple[int, int]],   # indices into responses: (preferred, dispreferred)
         'sft_target': str,                # the response to imitate in SFT; here, the chosen one
         'rows': list[int]}                # optional: the row of each pair, for error messages

    Prompts look like '\\n\\nHuman: ...\\n\\nAssistant:', with any number of turns; responses start with a space.
    """
    fields = {"chosen": str, "rejected": str}
    data: dict[str, dict] = defaultdict(_new_entry)
    n_other_prompt = 0
    rows = load_rows("hh", path, split, fields, cache_dir, silent)
    for index, row in checked_rows(rows, "hh", split, fields, silent):
        try:
            prompt = extract_anthropic_prompt(row["chosen"])
        except ValueError as error:
            raise RowError(f"datasets=[hh], {split} split, row {index}: chosen: {error}", split, index) from error
        n_other_prompt += not row["rejected"].startswith(prompt)
        entry = data[prompt]
        n_responses = len(entry["responses"])
        entry["pairs"].append((n_responses, n_responses + 1))
        entry["responses"].extend([row["chosen"][len(prompt) :], row["rejected"][len(prompt) :]])
        entry["sft_target"] = row["chosen"][len(prompt) :]
        entry["rows"].append(index)
    if n_other_prompt and not silent:
        rank0_print(
            f"hh ({split}): in {n_other_prompt} of {len(rows)} rows the prompts of the two transcripts differ; the "
            "rejected transcript is cut at the chosen prompt's length, as in the original"
        )
    return data


def get_shp(split: str, silent: bool = False, cache_dir: str | None = None, path: str | None = None) -> dict:
    """Load the Stanford Human Preferences dataset; see `get_hh` for the format.

    Only pairs whose scores differ by a factor of 2 or more are kept. The SFT target is the highest-scoring response.
    """
    fields = {"history": str, "human_ref_A": str, "human_ref_B": str, "score_A": int, "score_B": int, "labels": int}
    data: dict[str, dict] = defaultdict(_new_entry)
    scores: dict[str, list[int]] = defaultdict(list)
    rows = load_rows("shp", path, split, fields, cache_dir, silent)
    for index, row in checked_rows(rows, "shp", split, fields, silent):
        if max(row["score_A"], row["score_B"]) < 2 * min(row["score_A"], row["score_B"]):
            continue
        prompt = f"\n\nHuman: {row['history']}\n\nAssistant:"
        entry = data[prompt]
        first = len(entry["responses"])
        # labels is 1 where A is preferred (https://huggingface.co/datasets/stanfordnlp/SHP)
        entry["pairs"].append((first, first + 1) if row["labels"] == 1 else (first + 1, first))
        entry["responses"].extend([f" {row['human_ref_A']}", f" {row['human_ref_B']}"])
        entry["rows"].append(index)
        scores[prompt].extend([row["score_A"], row["score_B"]])
    for prompt, entry in data.items():
        entry["sft_target"] = entry["responses"][int(np.argmax(scores[prompt]))]
    return data


def get_se(split: str, silent: bool = False, cache_dir: str | None = None, path: str | None = None) -> dict:
    """Load StackExchange answers, with all HTML tags stripped except <code>; see `get_hh` for the format.

    Two answers to the same question are a preference pair if their scores differ. The test split is one percent of the
    questions, drawn with a fixed seed.
    """
    fields = {"question": str, "answers": list}
    rows = load_rows("se", path, "train", fields, cache_dir, silent)
    rows = rows.add_column("row", range(len(rows))).shuffle(seed=42)
    n_test = int(len(rows) * 0.01)
    rows = rows.select(range(n_test) if split == "test" else range(n_test, len(rows)))
    n_workers = min(cpu_count() or 1, 1 + len(rows) // 10_000)
    rows = rows.map(_strip_html_of_row, num_proc=n_workers if n_workers > 1 else None, desc="Stripping HTML")

    data: dict[str, dict] = defaultdict(_new_entry)
    best_scores: dict[str, float] = {}
    for index, row in checked_rows(rows, "se", split, fields, silent):
        for answer in row["answers"]:
            if not isinstance(answer.get("text"), str) or not isinstance(answer.get("pm_score"), int | float):
                reason = "an answer has no 'text' or no number as 'pm_score'"
                raise RowError(f"datasets=[se], row {index}: {reason}", "train", index)
        prompt = f"\n\nHuman: {row['question']}\n\nAssistant:"
        entry = data[prompt]
        first = len(entry["responses"])
        for answer in row["answers"]:
            response = f" {answer['text']}"
            entry["responses"].append(response)
            if prompt not in best_scores or answer["pm_score"] > best_scores[prompt]:
                best_scores[prompt], entry["sft_target"] = answer["pm_score"], response
        for (i, a), (j, b) in itertools.combinations(enumerate(row["answers"], first), 2):
            if a["pm_score"] != b["pm_score"]:
                entry["pairs"].append((i, j) if a["pm_score"] > b["pm_score"] else (j, i))
                entry["rows"].append(index)
    return {prompt: entry for prompt, entry in data.items() if entry["responses"]}


def _strip_html_of_row(row: dict) -> dict:
    """Strip the HTML of a row. Malformed fields stay as they are; `checked_rows` reports them."""
    if not isinstance(row["answers"], list):
        return row
    answers = [answer if isinstance(answer, dict) else {"text": None} for answer in row["answers"]]
    for holder, key in [(row, "question"), *((answer, "text") for answer in answers)]:
        if isinstance(holder.get(key), str):
            holder[key] = strip_html_tags(holder[key])
    return row | {"answers": answers}


_CONTAINERS = {"[document]", "html", "body", "div", "blockquote", "section", "article", "dl", "table", "tbody"}


def strip_html_tags(html_string: str) -> str:
    """Return the text of some HTML, with blank lines between blocks; <code> tags stay to mark code."""
    return "\n\n".join(_text_blocks(BeautifulSoup(html_string, "html.parser")))


def _text_blocks(container: Tag) -> Iterator[str]:
    for child in container.children:
        if isinstance(child, NavigableString):
            if child.strip() and not isinstance(child, PreformattedString):  # PreformattedString: a comment or doctype
                yield child.strip()
        elif child.name == "pre":
            yield from (_inline_text(code) for code in child.find_all("code")) if child.code else [child.get_text()]
        elif child.name in ("ul", "ol"):
            yield "\n".join(_inline_text(item).strip() for item in child.find_all("li"))
        elif child.name in _CONTAINERS:
            yield from _text_blocks(child)
        elif text := _inline_text(child):
            yield text


def _inline_text(element: Tag | NavigableString) -> str:
    if isinstance(element, NavigableString):
        return "" if isinstance(element, PreformattedString) else str(element)
    if element.name == "code":
        return f"<code>{element.get_text()}</code>"
    return "\n" if element.name == "br" else "".join(_inline_text(child) for child in element.children)


@dataclass(frozen=True)
class Dataset:
    """A built-in dataset: its function, its hub id, and how its long prompts are truncated."""

    load: Callable  # a function like `get_hh`; it needs no `path` if it makes its data
    hub_id: str | None = None  # the source, unless the config's `dataset_paths.NAME` gives another
    truncation_mode: str = "keep_end"  # which end of a long prompt is kept: keep_end (for dialogues) or keep_start


DATASETS = {
    "hh": Dataset(get_hh, "Anthropic/hh-rlhf", "keep_end"),
    "shp": Dataset(get_shp, "stanfordnlp/SHP", "keep_start"),
    "se": Dataset(get_se, "HuggingFaceH4/stack-exchange-preferences", "keep_start"),
    "toy": Dataset(get_toy),
}


def raise_unknown_dataset(name: str):
    """Raise the UserError for a name that isn't in `DATASETS`."""
    raise UserError(
        f"datasets=[{name}]: no such dataset.{closest_match(name, DATASETS)} There are: {', '.join(DATASETS)}; or give "
        "a file, a folder, or an id on the hub, OWNER/NAME"
    )


def check_names(names: Sequence[str], paths: dict[str, str]):
    """Check the names of built-in datasets, and the config's `dataset_paths`.

    Raises: UserError if a name isn't in `DATASETS`, if a dataset with a path is made in code, or if the path of one in
        `names` is neither a folder nor a hub id.
    """
    for name in names:
        if name not in DATASETS:
            raise_unknown_dataset(name)
    for name, path in paths.items():
        if name not in DATASETS:
            hint = closest_match(name, DATASETS)
            raise UserError(f"dataset_paths.{name}: no such dataset.{hint} There are: {', '.join(DATASETS)}")
        if "path" not in inspect.signature(DATASETS[name].load).parameters:
            raise UserError(f"dataset_paths.{name}: this dataset is made in code; leave its path out")
        if name in names and path is not None:
            check_path(name, path)


def get_dataset(
    name: str, split: str, silent: bool = False, cache_dir: str | None = None, path: str | None = None
) -> dict[str, dict] | list[tuple[str, dict]]:
    """Load a dataset by its name in `DATASETS`.

    Args:
        path: a folder or hub id to load it from; by default, its hub id in `DATASETS`.

    Returns: a dict from prompt to entry (see `get_hh`), or a list of (prompt, entry), which may repeat a prompt.
    Raises: UserError for an unknown name, rows that can't be used, an empty split or an entry with other keys.
    """
    check_names([name], {} if path is None else {name: path})
    kwargs = {} if path is None else {"path": path}
    try:
        data = DATASETS[name].load(split, silent=silent, cache_dir=cache_dir, **kwargs)
    except RowError as error:
        location = locate_built_in(name, path or DATASETS[name].hub_id, error.split)
        place = row_place(location, error.split, error.row, cache_dir)
        raise UserError(f"{error}{place}\nCorrect the data there") from error
    if not data:
        raise UserError(f"datasets=[{name}]: the {split} split is empty")
    for prompt, entry in data.items() if isinstance(data, dict) else data:
        if set(entry) - {"rows"} != {"responses", "pairs", "sft_target"}:
            raise UserError(f"datasets=[{name}], {split} split, prompt {prompt!r:.80}: unexpected keys {sorted(entry)}")
    return data


def _built_in_prompts(
    name: str, split: str, mode: str, eos_token: str, silent: bool, cache_dir: str | None, path: str | None
) -> list[Prompt]:
    """Load the prompts of a built-in dataset.

    Raises: UserError if a text contains the end-of-sequence token, which marks where a response ends.
    """
    data = get_dataset(name, split, silent=silent, cache_dir=cache_dir, path=path)
    prompts = [
        Prompt(text, dataset=name, split=split, truncation_mode=mode, **entry)
        for text, entry in (data.items() if isinstance(data, dict) else data)
    ]
    for prompt in prompts:
        for text in (prompt.text, prompt.sft_target, *prompt.responses):
            if eos_token in text:
                pair = next((k for k, ij in enumerate(prompt.pairs) for i in ij if prompt.responses[i] is text), 0)
                raise UserError(
                    f"{prompt.place(pair)}: the text contains the tokenizer's end-of-sequence token {eos_token!r}: "
                    f"...{text[max(0, text.index(eos_token) - 60) :]!r:.160}\nRemove it from the data; it is added to "
                    "the end of every response."
                )
    return prompts


def _load_prompts(
    choice: Choice,
    split: str,
    path: str | None,
    settings: Settings,
    tokenizer,
    accepted_kinds: Sequence[str],
    cache_dir: str | None,
    silent: bool,
    prepared: dict[str, PreparedPrompts],
) -> Sequence[Prompt]:
    """Load the prompts of one split; see `get_batch_iterator`, `prepare` and, for `path`, `get_dataset`."""
    built_in = DATASETS.get(choice.name)
    mode = choice.truncation if choice.truncation in KEPT_ENDS else built_in.truncation_mode if built_in else "keep_end"
    if built_in:
        return _built_in_prompts(choice.name, split, mode, tokenizer.eos_token, silent, cache_dir, path)
    if not prepared:
        prepared |= prepare(choice, settings, tokenizer, mode, accepted_kinds, cache_dir, silent)
    if len(prompts := prepared[split]) == 0:
        reason = "no usable rows; add some"
        if "test_rows" not in prompts.info:
            smaller = "make test_fraction smaller, " if settings.test_fraction > 0.5 else ""  # one is always held out
            reason = (
                f"all prompts are held out for evaluation; add other prompts, {smaller}or give a folder with "
                "train.jsonl and test.jsonl"
            )
        raise UserError(f"{split_name(choice.name, split)}: {reason}")
    return prompts


def get_batch_iterator(
    names: Sequence[str | Choice],
    tokenizer,
    split: str = "train",
    batch_size: int = 1,
    shuffle: bool = True,
    max_length: int = 512,
    max_prompt_length: int = 128,
    sft_mode: bool = False,
    n_epochs: int | None = None,
    n_examples: int | None = None,
    seed: int = 0,
    silent: bool = False,
    cache_dir: str | None = None,
    paths: dict[str, str] | None = None,
    drop_last: bool = True,
    shard: tuple[int, int] = (0, 1),
    mismatched: bool = False,
    unpaired: bool = False,
    add_bos: bool = False,
    settings: Settings = Settings(),  # noqa: B008 (it is immutable)
    prepared: dict[int, dict[str, PreparedPrompts]] | None = None,
) -> BatchIterator:
    """Iterate over batches of a split, for `n_epochs` or `n_examples`, whichever ends first.

    Prompts are shuffled; the pairs of one prompt stay together.

    Args:
        names: datasets: names in `DATASETS`, files, folders, patterns of files, hub ids, or any of them as a `Choice`.
        max_length: the maximum number of tokens in prompt and response together.
        max_prompt_length: the number of tokens to which the prompt is cut if prompt and response exceed `max_length`.
        sft_mode: yield one example per prompt, with the SFT target as 'chosen' and without 'rejected'.
        seed: the random seed for the order of the examples.
        paths: for built-in datasets, folders or hub ids to load instead of the default ones.
        drop_last: if True, as in training, every batch is full: the remainder of an epoch is dropped, and n_examples is
            rounded up to full batches. If False, the last batch may be smaller; without n_epochs, no example is
            repeated, even if n_examples is larger than the split.
        shard: (index, count): divide each batch into `count` shards, and yield only this one.
        mismatched: add, under keys 'mismatched_...', each prompt with another prompt's responses, for KTO's estimate of
            the KL divergence.
        unpaired: also accept unpaired data: single responses, each marked good or bad.
        add_bos: begin every prompt with the tokenizer's beginning-of-sequence token.
        settings: how to read the user's own data.
        prepared: prompts of the user's own datasets, by position in `names` and by split. Both splits of a dataset are
            prepared together and added here, so that the iterator over the other split finds them.

    Raises: UserError if a dataset can't be used or has less than one batch.
    """
    if n_epochs is None and n_examples is None:
        raise UserError("n_epochs and n_examples are both null: set one of them, so that the run ends")
    choices = [name if isinstance(name, Choice) else Choice(name) for name in names]
    accepted_kinds = ("targets",) if sft_mode else ("pairs", "unpaired") if unpaired else ("pairs",)
    lengths = {"max_length": max_length, "max_prompt_length": max_prompt_length, "add_bos": add_bos}
    prepared = {} if prepared is None else prepared
    parts: list[Sequence[Prompt]] = []
    for position, choice in enumerate(choices):
        path, splits = (paths or {}).get(choice.name), prepared.setdefault(position, {})
        part = _load_prompts(choice, split, path, settings, tokenizer, accepted_kinds, cache_dir, silent, splits)
        if choice.truncation in ("drop", "error"):
            part = drop_overlong(part, choice, split, sft_mode, tokenizer, max_length, add_bos)
        if choice.name not in DATASETS and not sft_mode:  # the original keeps identical responses in its datasets
            drop_identical(part, choice, split, settings.skips_bad, **lengths)
        if split == "train" and choice.n_examples is not None:
            part = draw_examples(part, choice, sft_mode, seed)
        parts.append(part)
    is_mixed = split == "train" and any(choice.weight != 1 or choice.n_examples is not None for choice in choices)
    order = epoch_order(parts, choices, sft_mode, seed) if is_mixed else None
    batches = BatchIterator(parts, tokenizer, batch_size, shuffle, sft_mode, seed, n_epochs, n_examples, drop_last,
                            shard, mismatched, order, **lengths)  # fmt: skip
    if batches.epoch_size == 0:
        where = split_name(", ".join(choice.name for choice in choices), split)
        raise UserError(
            f"{where}: {counted(batches.n_dropped, 'example')}, fewer than one batch of {batch_size}; make batch_size "
            "smaller or add data"
        )
    return batches


def open_batches(
    config: DictConfig,
    choices: list[Choice],
    tokenizer,
    seed: int,
    shard: tuple[int, int] = (0, 1),
    trains: bool = True,
) -> tuple[BatchIterator | None, BatchIterator]:
    """Open a config's training and evaluation batches (see `get_batch_iterator`), and print a data report.

    Args:
        trains: if False, open no training batches, and return None in their place.
    """
    loss = find_loss(config.loss)
    open_split = functools.partial(
        get_batch_iterator,
        names=choices,
        tokenizer=tokenizer,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        add_bos=config.add_bos,
        sft_mode=not loss.needs_pairs,
        mismatched=loss.takes_kl_estimate,
        unpaired=loss.accepts_unpaired,
        seed=seed,
        silent=not on_rank0(),
        cache_dir=get_local_dir(config.local_dirs),
        paths=config.dataset_paths,
        shard=shard,
        prepared={},
        settings=Settings(
            test_fraction=config.test_fraction,
            skips_bad=config.on_bad_example == "skip",
            chat_template=config.chat_template,
            texts_as_messages=config.apply_chat_template,
            trained_turns=config.trained_turns,
            verbatim_responses=config.verbatim_responses,
        ),
    )
    train = None
    if trains:
        counts = {"n_epochs": config.n_epochs, "n_examples": config.n_examples}
        train = open_split(split="train", batch_size=config.batch_size, **counts)
    counts = {"n_examples": config.n_eval_examples} if config.n_eval_examples is not None else {"n_epochs": 1}
    test = open_split(split="test", batch_size=config.eval_batch_size, drop_last=False, **counts)
    if on_rank0():
        print_report(train, test, tokenizer)
    return train, test
