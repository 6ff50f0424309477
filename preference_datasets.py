"""The named datasets of preferences, and batches of them and of other data.

Files and hub datasets in a known format need no code (docs/data.md). For others, add a function like `get_hh` here and
an entry to `DATASETS`.
"""

import inspect
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from multiprocessing import cpu_count
from typing import TYPE_CHECKING

import numpy as np
from bs4 import BeautifulSoup, NavigableString, Tag
from bs4.element import PreformattedString
from omegaconf import DictConfig
from tqdm import tqdm

from data import report
from data.batches import BatchIterator, Prompt, example_counts, split_name
from data.locations import is_location, locate
from data.prepared import PreparedPrompts, Settings, prepare
from data.reading import check_path, read_split, row_place
from data.tokenization import get_collate_fn, tokenize_batch_element  # noqa: F401 (re-exported)
from data.toy import get_toy
from utils import UserError, closest_match, get_local_dir, on_rank0, rank0_print

if TYPE_CHECKING:
    import datasets


class RowError(UserError):
    """A row of a split can't be used; `get_dataset` adds the file and line."""

    def __init__(self, message: str, split: str, row: int):
        super().__init__(message)
        self.split, self.row = split, row


def load_rows(
    name: str, path: str | None, split: str, fields: dict[str, type], cache_dir: str | None, silent: bool = False
) -> "datasets.Dataset":
    """Load one split of a dataset from the hub or from a local folder and check that its columns are there.

    Args:
        path: hub id or folder; None: the hub id of the dataset's entry in `DATASETS`.

    Raises: UserError if it can't be loaded, or lacks a field, naming dataset and split.
    """
    path = path or DATASETS[name].hub_id
    rows = read_split(name, path, split, cache_dir, silent)
    missing = [key for key in fields if key not in rows.column_names]
    if missing:
        raise RowError(
            f"datasets=[{name}], {split} split, row 0: no field {', '.join(map(repr, missing))} in {path!r}; "
            f"its fields are {rows.column_names}, expected are {list(fields)}",
            split,
            row=0,
        )
    return rows


def checked_rows(
    rows: "datasets.Dataset", name: str, split: str, fields: dict[str, type], silent: bool
) -> Iterator[tuple[int, dict]]:
    """Each row with its number (its field 'row' if it has one), once each field is known to hold a value of its type.

    Raises: RowError naming dataset, split and row.
    """
    for index, row in enumerate(tqdm(rows, desc=f"Processing {name} ({split})", disable=silent or None)):
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
    """The transcript up to and including its last 'Assistant:'."""
    search_term = "\n\nAssistant:"
    position = prompt_and_response.rfind(search_term)
    if position == -1:
        raise ValueError(f"the transcript has no {search_term!r}")
    return prompt_and_response[: position + len(search_term)]


def get_hh(split: str, silent: bool = False, cache_dir: str | None = None, path: str | None = None) -> dict:
    """Load Anthropic's Helpful-Harmless dialogues as a dict from prompt to an entry:

        {'responses': list[str],
         'pairs': list[tuple[int, int]],   # indices into responses: (preferred, dispreferred)
         'sft_target': str,                # the response to imitate in SFT; here the chosen one
         'rows': list[int]}                # optional: the row that each pair comes from, for messages

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
        print(
            f"hh ({split}): in {n_other_prompt} of {len(rows)} rows the rejected transcript has another prompt than "
            "the chosen one; its response is cut at the chosen prompt's length, as in the original"
        )
    return data


def get_shp(split: str, silent: bool = False, cache_dir: str | None = None, path: str | None = None) -> dict:
    """Load the Stanford Human Preferences dataset; see `get_hh` for the format.

    Only pairs whose scores differ by a factor of at least 2 are kept; the SFT target is the response with the highest
    score.
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
    """Load StackExchange answers, HTML tags stripped except <code>; see `get_hh` for the format.

    Every pair of a question's answers with different scores is a preference. A hundredth of the questions, drawn
    with a fixed seed, is the test split.
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
    """`row` with its HTML stripped; what has not the expected form stays, for `checked_rows` to name it."""
    if not isinstance(row["answers"], list):
        return row
    answers = [answer if isinstance(answer, dict) else {"text": None} for answer in row["answers"]]
    for holder, key in [(row, "question"), *((answer, "text") for answer in answers)]:
        if isinstance(holder.get(key), str):
            holder[key] = strip_html_tags(holder[key])
    return row | {"answers": answers}


_CONTAINERS = {"[document]", "html", "body", "div", "blockquote", "section", "article", "dl", "table", "tbody"}


def strip_html_tags(html_string: str) -> str:
    """The text of some HTML, blocks divided by blank lines; <code> tags stay (StackExchange keeps code in them)."""
    return "\n\n".join(_text_blocks(BeautifulSoup(html_string, "html.parser")))


def _text_blocks(container: Tag) -> Iterator[str]:
    for child in container.children:
        if isinstance(child, NavigableString):
            if child.strip() and not isinstance(child, PreformattedString):  # those are comments and doctypes
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
    """A named dataset: how it is loaded, and how it is cut."""

    load: Callable  # (split, silent, cache_dir, path) to data as `get_hh` returns it; without `path`: made in code
    hub_id: str | None = None  # where it is loaded from unless `dataset_paths.NAME` says otherwise
    truncation_mode: str = "keep_end"  # which end of an over-long prompt is kept: keep_end (dialogues) or keep_start


DATASETS = {
    "hh": Dataset(get_hh, "Anthropic/hh-rlhf", "keep_end"),
    "shp": Dataset(get_shp, "stanfordnlp/SHP", "keep_start"),
    "se": Dataset(get_se, "HuggingFaceH4/stack-exchange-preferences", "keep_start"),
    "toy": Dataset(get_toy),
}


ROWS: dict[str, list[dict]] = {}  # rows given in Python, by a name that `datasets` then knows; see docs/data.md

TRUNCATIONS = ("keep_end", "keep_start", "drop", "error")


@dataclass(frozen=True)
class Choice:
    """An entry of `datasets`: a name, or a mapping with a name and what differs for this dataset from the config's."""

    name: str
    weight: float = 1.0
    n_examples: int | None = None
    truncation: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def is_named(self) -> bool:
        """Whether a function of `DATASETS` reads it."""
        return self.name in DATASETS

    @property
    def truncation_mode(self) -> str:
        """Which end of an over-long prompt is kept."""
        if self.truncation in ("keep_end", "keep_start"):
            return self.truncation
        return DATASETS[self.name].truncation_mode if self.is_named else "keep_end"


def chosen_datasets(config: DictConfig) -> list[Choice]:
    """The entries of `datasets`, each with the config's settings where it has none of its own.

    Raises: UserError if an entry isn't one.
    """
    common = {key: config[key] for key in ("truncation", "train_split", "test_split")} | {"fields": dict(config.fields)}
    choices = []
    for entry in config.datasets:
        given = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
        _check_entry(given, f"datasets=[{entry}]")
        is_named = given["name"] in DATASETS
        inherited = {"truncation": common["truncation"]} if is_named else common
        choices.append(
            Choice(**(inherited | given | {"fields": dict(given.get("fields", inherited.get("fields", {})))}))
        )
    names = [choice.name for choice in choices]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"datasets: {twice} stands there twice; give it a weight: {{name: {twice}, weight: 2}}")
    return choices


def _check_entry(given: dict, shown: str):
    known = [one.name for one in fields(Choice)]
    for key in given:
        if key not in known:
            hint = closest_match(str(key), known)
            raise UserError(f"{shown}: no setting {key!r}.{hint} There are: {', '.join(known)}")
    if not isinstance(given.get("name"), str) or not given["name"].strip():
        raise UserError(f"{shown}: expected names, files or ids on the hub, e.g. datasets=[hh]")
    number = given.get("weight", 1)
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= 1000:
        raise UserError(f"{shown}: weight={number}: must be a number above 0, at most 1000")
    number = given.get("n_examples")
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
        raise UserError(f"{shown}: n_examples={number}: must be a whole number above 0")
    if given.get("truncation") not in (None, *TRUNCATIONS):
        raise UserError(f"{shown}: truncation={given['truncation']}: must be one of {', '.join(TRUNCATIONS)}")
    for key in ("train_split", "test_split"):
        if not isinstance(given.get(key), str | None):
            raise UserError(f"{shown}: {key}={given[key]}: expected the name of a split")
    check_fields(given.get("fields", {}), shown)


def check_fields(given: object, shown: str):
    """Raises UserError unless it maps texts to texts."""
    if not isinstance(given, Mapping) or not all(isinstance(x, str) for item in given.items() for x in item):
        raise UserError(f"{shown}: fields={given}: expected a format's names and the data's, e.g. {{prompt: question}}")


def check_datasets(choices: list[Choice], paths: dict[str, str]):
    """Raises UserError if a dataset isn't there, or a setting isn't for it, as far as it can be told without reading;
    see `check_names`."""
    check_names([choice.name for choice in choices if choice.is_named], paths)
    for choice in choices:
        if choice.is_named and choice.name in ROWS:
            raise UserError(f"datasets=[{choice.name}]: a named dataset is called so; give your rows another name")
        if choice.is_named:
            for key in ("train_split", "test_split", "fields"):
                if getattr(choice, key):
                    raise UserError(
                        f"{key}={getattr(choice, key)}: datasets=[{choice.name}] has its own function that reads it; "
                        f"that is for files and hub ids: datasets=[{{name: FILE, {key}: ...}}]"
                    )
        elif choice.name not in ROWS:
            if not is_location(choice.name):
                _unknown_name(choice.name)
            locate(choice.name)


def _unknown_name(name: str):
    raise UserError(
        f"datasets=[{name}]: no such dataset.{closest_match(name, DATASETS)} There are: {', '.join(DATASETS)}; or give "
        "a file, a folder, or an id on the hub, OWNER/NAME"
    )


def check_names(names: Iterable[str], paths: dict[str, str]):
    """Raises UserError if a dataset, or one that `dataset_paths` names, isn't in `DATASETS` or takes no path, or if the
    path of one that is used is no folder and no hub id."""
    there_are = ", ".join(DATASETS)
    for name in names:
        if name not in DATASETS:
            _unknown_name(name)
        path = paths.get(name)
        if path == "":
            raise UserError(f"dataset_paths.{name} is empty: give a folder, or leave the key out")
        if path is not None and DATASETS[name].hub_id is not None:
            check_path(name, path)
    for name in paths:
        if name not in DATASETS:
            hint = closest_match(name, DATASETS)
            raise UserError(f"dataset_paths.{name}: no such dataset.{hint} There are: {there_are}")
        if "path" not in inspect.signature(DATASETS[name].load).parameters:
            raise UserError(f"dataset_paths.{name}: this dataset is made in code, not loaded from anywhere")


def get_dataset(
    name: str, split: str, silent: bool = False, cache_dir: str | None = None, path: str | None = None
) -> dict[str, dict] | list[tuple[str, dict]]:
    """Load a dataset by its name in `DATASETS`; `path` (a folder or hub id) replaces where it is loaded from.

    Returns: a dict from prompt to entry (see `get_hh`), or a list of (prompt, entry), where a prompt may recur.
    Raises: UserError for an unknown name, an empty split or an entry of another form.
    """
    check_names([name], {} if path is None else {name: path})
    kwargs = {} if path is None else {"path": path}
    try:
        data = DATASETS[name].load(split, silent=silent, cache_dir=cache_dir, **kwargs)
    except RowError as error:
        place = row_place(path or DATASETS[name].hub_id, error.split, error.row, cache_dir)
        raise UserError(f"{error}{place}\nCorrect the data there") from error
    if not data:
        raise UserError(f"datasets=[{name}]: the {split} split is empty")
    for prompt, entry in data.items() if isinstance(data, dict) else data:
        if set(entry) - {"rows"} != {"responses", "pairs", "sft_target"}:
            raise UserError(f"datasets=[{name}], {split} split, prompt {prompt!r:.80}: unexpected keys {sorted(entry)}")
    return data


def _load_prompts(choice: Choice, split: str, silent: bool, cache_dir: str | None, path: str | None) -> list[Prompt]:
    """The prompts of a named dataset."""
    data = get_dataset(choice.name, split, silent=silent, cache_dir=cache_dir, path=path)
    return [
        Prompt(text, dataset=choice.name, split=split, truncation_mode=choice.truncation_mode, **entry)
        for text, entry in (data.items() if isinstance(data, dict) else data)
    ]


def _check_no_eos(prompts: list[Prompt], eos_token: str):
    """The end-of-sequence token marks where a response ends, so it can't stand inside a text."""
    for prompt in prompts:
        for text in (prompt.text, prompt.sft_target, *prompt.responses):
            if eos_token in text:
                pair = next((k for k, ij in enumerate(prompt.pairs) for i in ij if prompt.responses[i] is text), 0)
                raise UserError(
                    f"{prompt.place(pair)}: the text contains the tokenizer's end-of-sequence token {eos_token!r}: "
                    f"...{text[max(0, text.index(eos_token) - 60) :]!r:.160}\nRemove it from the data."
                )


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
    add_bos: bool = False,
    settings: Settings = Settings(),  # noqa: B008 (it can't be changed)
) -> BatchIterator:
    """Batches of a split, for `n_epochs` or `n_examples`, whichever ends first. Prompts are shuffled; pairs of one
    prompt stay together.

    Args:
        names: datasets: of `DATASETS`, files, folders, patterns of files or hub ids; or `Choice`s.
        max_length: tokens in prompt and response together; max_prompt_length: tokens in an over-long prompt.
        sft_mode: one example for each prompt, its 'chosen' being the SFT target, without 'rejected'.
        seed: decides the order of the examples.
        paths: where a named dataset is loaded from instead of the hub.
        drop_last: leave out the examples of an epoch that don't fill a batch, and round n_examples up to whole
            batches. Otherwise the last batch may be smaller, and what n_examples asks for beyond one epoch comes from
            further epochs of whole batches, as in the original.
        shard: (index, count): only this one of `count` shards of each batch.
        mismatched: also each prompt with another prompt's responses, under keys 'mismatched_...'; such losses take
            unpaired data, too.
        add_bos: begin every prompt with the tokenizer's beginning-of-sequence token.
        settings: how data that isn't a named dataset is read.

    Raises: UserError if a dataset can't be used or holds less than one batch.
    """
    if n_epochs is None and n_examples is None:
        raise UserError("n_epochs and n_examples are both null: one of them must say when to stop")
    if silent:
        import datasets

        datasets.logging.set_verbosity_error()
        datasets.disable_progress_bars()
    choices = [name if isinstance(name, Choice) else Choice(name) for name in names]
    loss_takes = ("targets",) if sft_mode else ("pairs", "unpaired") if mismatched else ("pairs",)
    lengths = {"max_length": max_length, "max_prompt_length": max_prompt_length, "add_bos": add_bos}
    parts: list[Sequence[Prompt]] = []
    for choice in choices:
        if choice.is_named:
            part = _load_prompts(choice, split, silent, cache_dir, (paths or {}).get(choice.name))
            _check_no_eos(part, tokenizer.eos_token)
        else:
            part = _prepared(choice, split, settings, tokenizer, loss_takes, cache_dir, silent)
        parts.append(_without_overlong(part, choice, sft_mode, tokenizer, split, **lengths))
    order = _order(parts, choices, seed, sft_mode) if split == "train" else None
    batches = BatchIterator(parts, tokenizer, batch_size, shuffle, sft_mode, seed, n_epochs, n_examples, drop_last,
                            shard, mismatched, order, **lengths)  # fmt: skip
    if batches.epoch_size == 0:
        shown = [choice.name for choice in choices]
        raise UserError(
            f"datasets={shown}, {split} split: {batches.n_left_out} examples are less than one batch of {batch_size}; "
            "make batch_size smaller or add data"
        )
    return batches


def _prepared(
    choice: Choice,
    split: str,
    settings: Settings,
    tokenizer,
    loss_takes: Sequence[str],
    cache_dir: str | None,
    silent: bool,
) -> PreparedPrompts:
    """The prompts of a dataset that isn't a named one."""
    source = ROWS[choice.name] if choice.name in ROWS else locate(choice.name)
    own = {key: getattr(choice, key) for key in ("train_split", "test_split", "fields") if getattr(choice, key)}
    both = prepare(choice.name, source, replace(settings, **own), tokenizer, choice.truncation_mode, loss_takes,
                   cache_dir or get_local_dir([".cache"]), silent)  # fmt: skip
    prompts = both[0 if split == "train" else 1]
    if len(prompts) == 0:
        raise UserError(f"{split_name(choice.name, split)}: no row is left for it; add data, or set test_fraction")
    return prompts


def _without_overlong(
    part: Sequence[Prompt], choice: Choice, sft_mode: bool, tokenizer, split: str, **lengths: int
) -> Sequence[Prompt]:
    """With `truncation=drop`, the prompts without examples longer than `max_length`; with `error` there may be none."""
    if choice.truncation not in ("drop", "error"):
        return part
    prompts, responses, numbers = report.lengths(part, sft_mode, tokenizer)
    too_long = prompts + responses + int(lengths["add_bos"]) > lengths["max_length"]
    if too_long.any() and choice.truncation == "error":
        places = "\n".join(f"  {part[int(n)].place(0)}" for n in numbers[too_long][:10])
        raise UserError(
            f"truncation=error: {too_long.sum()} examples are longer than max_length={lengths['max_length']} tokens:\n"
            f"{places}\nShorten them, raise max_length, or choose truncation=drop, keep_end or keep_start"
        )
    rank0_print(f"{choice.name} ({split}): {too_long.sum()} examples longer than max_length are dropped")
    if isinstance(part, PreparedPrompts):
        part.leave_out(too_long, sft_mode)
        return part
    dropped = set(_counted(numbers, too_long))
    kept = []
    for number, prompt in enumerate(part):
        indices = [index for index in range(len(prompt.pairs)) if sft_mode or (number, index) not in dropped]
        if (number, 0) not in dropped if sft_mode else indices:
            rows = [prompt.rows[index] for index in indices] if prompt.rows else []
            kept.append(replace(prompt, pairs=[prompt.pairs[index] for index in indices], rows=rows))
    if not kept:
        raise UserError(
            f"{split_name(choice.name, split)}: truncation=drop leaves nothing; raise "
            f"max_length={lengths['max_length']}"
        )
    return kept


def _counted(numbers: np.ndarray, mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """The number of the prompt and the index within it of each masked example."""
    seen: dict[int, int] = defaultdict(int)
    for number, is_wanted in zip(numbers.tolist(), mask.tolist(), strict=True):
        if is_wanted:
            yield number, seen[number]
        seen[number] += 1


def _order(parts: list[Sequence[Prompt]], choices: list[Choice], seed: int, sft_mode: bool) -> np.ndarray | None:
    """Which prompts an epoch takes, counted through all datasets, as weights and numbers of examples say."""
    if all(choice.weight == 1 and choice.n_examples is None for choice in choices):
        return None
    order, start = [], 0
    for part, choice in zip(parts, choices, strict=True):
        numbers, counts = np.arange(len(part)), np.ones(len(part), dtype=int) if sft_mode else example_counts(part)
        drawn = np.random.RandomState(seed).permutation(len(part))
        if choice.n_examples is not None:
            if choice.n_examples > counts.sum():
                rank0_print(f"{choice.name}: n_examples={choice.n_examples}, but there are only {counts.sum()}")
            needed = int(np.searchsorted(counts[drawn].cumsum(), choice.n_examples)) + 1
            numbers = np.sort(drawn[:needed])
        whole, rest = divmod(choice.weight, 1)
        part_of_it = np.sort(np.random.RandomState(seed + 1).permutation(numbers)[: round(rest * len(numbers))])
        order += [start + numbers] * int(whole) + [start + part_of_it]
        start += len(part)
    return np.concatenate(order)


def open_batches(
    config: DictConfig,
    tokenizer,
    sft_mode: bool,
    seed: int,
    shard: tuple[int, int],
    silent: bool,
    mismatched: bool = False,
    trains: bool = True,
) -> tuple[BatchIterator, BatchIterator]:
    """The training and the evaluation batches that a config asks for; see `get_batch_iterator`. What they hold is
    reported. Without `trains` the evaluation batches stand for both."""
    choices = chosen_datasets(config)
    kwargs = {
        "names": choices,
        "tokenizer": tokenizer,
        "max_length": config.max_length,
        "max_prompt_length": config.max_prompt_length,
        "add_bos": config.add_bos,
        "sft_mode": sft_mode,
        "seed": seed,
        "silent": silent,
        "cache_dir": get_local_dir(config.local_dirs),
        "paths": config.dataset_paths,
        "shard": shard,
        "mismatched": mismatched,
        "settings": Settings(
            test_fraction=config.test_fraction,
            skips_bad=config.on_bad_example == "skip",
            chat_template=config.chat_template,
        ),
    }
    if trains:
        counts = {"n_epochs": config.n_epochs, "n_examples": config.n_examples}
        train = get_batch_iterator(**kwargs, split="train", batch_size=config.batch_size, **counts)
    test = get_batch_iterator(
        **kwargs, split="test", batch_size=config.eval_batch_size, drop_last=False, **_how_many(config.n_eval_examples)
    )
    train = train if trains else test
    if on_rank0():
        _report(train if trains else None, test, tokenizer)
    return train, test


def _report(train: BatchIterator | None, test: BatchIterator, tokenizer):
    """Say what there is to train on, if it is trained, and to evaluate on."""
    opened = {"train": train, "test": test} if train is not None else {"test": test}
    for split, batches in opened.items():
        print("\n".join(report.lines(batches, tokenizer, split)))
    print(report.example(test if train is None else train, tokenizer))
    if train is not None:
        print(
            f"Training data: {train.epoch_size} examples an epoch in batches of {train.batch_size}; "
            f"the {train.n_left_out} that fill no whole batch are left out of it; {train.n_batches} steps in all"
        )
    repeats = f", drawn from {test.epoch_size} again and again" if test.n_examples > test.epoch_size else ""
    print(f"Evaluation data: {test.n_examples} examples in {test.n_batches} batches{repeats}", flush=True)
    if not test.lengths["add_bos"] and (n_empty := sum(map(report.count_empty_prompts, opened.values()))):
        rank0_print(
            f"WARNING: {n_empty} prompts are empty: nothing predicts the first token of their responses, which is left "
            "out, and no samples are drawn for them; add_bos=true begins every prompt with a token"
        )


def _how_many(n_eval_examples: int | None) -> dict[str, int]:
    """All of a split once, or so many of its examples."""
    return {"n_epochs": 1} if n_eval_examples is None else {"n_examples": n_eval_examples}
