"""Read, check and tokenize the user's own data once, into files that every worker of every run maps into memory.

The files are in a directory whose name is a hash of the rows, the settings and the tokenizer. The first process that
needs them writes them; the others wait.
"""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain

import numpy as np
import pyarrow as pa
from filelock import FileLock

from basics.checksums import find_damage, write_checksums
from basics.files import HashCache, flush_to_disk
from data import chat
from data.batches import prefetched
from data.choice import Choice, Settings
from data.formats import Format, recognize
from data.locations import locate
from data.messages import BadExample
from data.plain_reader import Fault
from data.prepared import SCHEMA, TEXTS, PreparedPrompts
from data.row_sources import ROWS, BadRows, Rows, open_splits, rows_of_list
from data.rows import Example
from data.template_limits import TemplateLimit
from reporting.terminal import Progress
from utils import UserError, get_local_dir, rank0_print

VERSION = 5  # of the cache's format and of how rows are read; bump to rebuild
_CHUNK = 1024  # rows read and tokenized at a time
_INSPECTED = 100  # rows that decide the format
_FILES = ("info.json", "train.arrow", "test.arrow")


# ---- the files ------------------------------------------------------------------------------------------------------


class _Writer:
    """Writes the prompts of a split to an Arrow file; counts and hashes them."""

    def __init__(self, path: str):
        self.sink = pa.OSFile(path, "wb")
        self.writer = pa.ipc.new_file(self.sink, SCHEMA)
        self.digest, self.n_prompts, self.n_pairs = hashlib.sha256(), 0, 0

    def write(self, records: list[dict]):
        for record in records:
            texts = [record["prompt"], record["responses"], record["pairs"], record["target"], record["label"]]
            self.digest.update(json.dumps(texts).encode())
            self.n_pairs += len(record["pairs"]) // 2
        self.n_prompts += len(records)
        if records:
            columns = ([record[name] for record in records] for name in SCHEMA.names)
            arrays = [_array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)]
            self.writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))

    def close(self) -> dict:
        self.writer.close()
        self.sink.close()
        return {"fingerprint": self.digest.hexdigest(), "n_prompts": self.n_prompts, "n_pairs": self.n_pairs}


def _array(values: list, kind: pa.DataType) -> pa.Array:
    """Return the same as `pa.array`, but much faster for lists of numbers."""
    if not pa.types.is_list(kind) or kind == TEXTS:
        return np.fromiter(values, np.int32, len(values)) if kind == pa.int32() else pa.array(values, kind)
    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.ListArray.from_arrays(ends, _array(list(chain.from_iterable(values)), kind.value_type))


# ---- from rows to examples ------------------------------------------------------------------------------------------


def _prompt_hash(example: Example) -> float:
    """Hash a prompt, or the text of an example without one, into [0, 1), independently of the tokenizer."""
    identity = json.dumps(example.prompt or example.responses, sort_keys=True)
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") / 2**64


def _usable(
    chunk: list, data_format: Format, renderer: chat.Renderer, bad: BadRows
) -> list[tuple[int, str, Example, chat.Rendered]]:
    """Return (number, place, example, rendered texts) of each usable row of a chunk; add the others to `bad`."""
    usable = []
    for number, place, row in chunk:
        try:
            if isinstance(row, Fault):
                bad.add(number, place, "broken row", row.reason, row.remedy)
                continue
            example = data_format.read(row)
            usable.append((number, place, example, renderer.render(example)))
        except BadExample as error:
            bad.add(number, place, error.kind, str(error))
        except TemplateLimit as error:  # not skipped like a bad row, because every other row may take as long
            raise UserError(f"{bad.rows.where}, {bad.place(number, place)}: {error}") from error
    return usable


def _records(chunk: list, data_format: Format, renderer: chat.Renderer, bad: BadRows) -> list[tuple[float, dict]]:
    """Return the prompt's hash and the record (see `SCHEMA`) of each usable row of a chunk."""
    usable = _usable(chunk, data_format, renderer, bad)
    tokenized = renderer.tokenize([rendered for *_, rendered in usable])
    records = []
    for (number, place, example, rendered), tokens in zip(usable, tokenized, strict=True):
        prompt_ids, response_ids = tokens.prompt_ids, tokens.response_ids
        pairs = [(i, j) for i, j in example.pairs if response_ids[i] != response_ids[j]]
        if len(pairs) < len(example.pairs) and not data_format.is_ranked:
            bad.add(number, place, "identical responses", "chosen and rejected are the same tokens once rendered")
            continue
        bad.n_identical_pairs += len(example.pairs) - len(pairs)
        has_bos = rendered.is_templated and prompt_ids[:1] == [renderer.tokenizer.bos_token_id]
        record = {
            "row": number,
            "prompt": rendered.prompt,
            "responses": rendered.responses,
            "pairs": [i for pair in pairs for i in pair],
            "target": example.target,
            "label": example.label,
            "n_kept": int(has_bos),
            "prompt_ids": prompt_ids,
            "response_ids": response_ids,
            "trained": tokens.trained,
        }
        records.append((_prompt_hash(example), record))
    return records


def _checked_chunks(
    rows: Rows, data_format: Format, renderer: chat.Renderer, bad: BadRows, skips_bad: bool
) -> Iterator[tuple[int, list[tuple[float, dict]]]]:
    """Yield the number of rows and the records of each chunk, until there are enough bad rows for an error."""
    for chunk in rows.chunks(_CHUNK):
        bad.n_read += len(chunk)
        yield len(chunk), _records(chunk, data_format, renderer, bad)
        if bad.has_enough and not skips_bad:
            return


# ---- preparing ------------------------------------------------------------------------------------------------------


def _write_files(
    directory: str, sources: dict[str, Rows], settings: Settings, renderer: chat.Renderer, data_format: Format
):
    """Write the files of both splits, and `info.json` about them, into a directory.

    Without a source for 'test', that split gets the training prompts with the smallest hashes.
    """
    info, smallest = _write_splits(directory, sources, settings, renderer, data_format, limit=settings.test_fraction)
    if "test" not in sources and info["test"]["n_prompts"] == 0 and smallest < 1:
        # with few prompts, it can happen that no hash is below the limit: hold out the prompt with the smallest
        info, _ = _write_splits(directory, sources, settings, renderer, data_format, limit=smallest)
    info |= {
        "format": data_format.description,
        "unread": data_format.unread,
        "skips_template": data_format.could_be_chat and bool(renderer.template),
        "missing_openings": sorted(renderer.missing_openings),
    }
    with open(os.path.join(directory, "info.json"), "w", encoding="utf-8") as file:
        json.dump(info, file)


def _write_splits(
    directory: str,
    sources: dict[str, Rows],
    settings: Settings,
    renderer: chat.Renderer,
    data_format: Format,
    limit: float,
) -> tuple[dict, float]:
    """Write both splits; return their counts, and the smallest hash of a training prompt.

    Args:
        limit: without a source for 'test', that split gets the training prompts with hashes up to this.
    """
    writers = {role: _Writer(os.path.join(directory, f"{role}.arrow")) for role in ("train", "test")}
    info, smallest = {}, 1.0
    for role, rows in sources.items():
        bad = BadRows(rows)
        with Progress(f"Tokenizing {rows.label}", rows.n_rows, "rows") as progress:
            # a thread tokenizes the next chunks on all cores while this one is written
            chunks = prefetched(_checked_chunks(rows, data_format, renderer, bad, settings.skips_bad), n_ahead=2)
            for n_rows, records in chunks:
                by_role = {"train": [], "test": []}
                for hashed, record in records:
                    by_role[role if "test" in sources or hashed > limit else "test"].append(record)
                for written_role, role_records in by_role.items():
                    writers[written_role].write(role_records)
                smallest = min([smallest, *(hashed for hashed, _ in records)])
                progress.update(n_rows)
        if not settings.skips_bad:
            bad.raise_if_any()
        info[f"{role}_rows"] = {"n_read": bad.n_read, "bad": dict(bad.kinds), "split": rows.split,
                                "n_identical_pairs": bad.n_identical_pairs}  # fmt: skip
    return info | {role: writer.close() for role, writer in writers.items()}, smallest


def _tokenizer_fingerprint(tokenizer) -> str:
    """Hash a tokenizer's vocabulary, rules and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    tokens = json.dumps([type(tokenizer).__name__, tokenizer.special_tokens_map], sort_keys=True, default=str)
    return hashlib.sha256(f"{model}{tokens}".encode()).hexdigest()


def prepare(
    choice: Choice,
    settings: Settings,
    tokenizer,
    truncation_mode: str,
    accepted_kinds: Sequence[str],
    cache_dir: str | None,
    silent: bool,
) -> dict[str, PreparedPrompts]:
    """Return the prompts of both splits, 'train' and 'test', from the cache or prepared now.

    Args:
        choice: a file, folder, pattern of files or hub id, or the name of rows in `ROWS`.
        accepted_kinds: the kinds of data that the loss accepts: 'pairs', 'targets', 'unpaired'.

    Raises: UserError with place and remedy if rows can't be used, or the loss doesn't accept them.
    """
    cache_dir = cache_dir or get_local_dir([".cache"])
    renderer = chat.Renderer(
        tokenizer, settings.chat_template, settings.verbatim_responses, settings.trained_turns == "last"
    )
    if choice.name in ROWS:
        sources = {"train": rows_of_list(choice.name, ROWS[choice.name])}
    else:
        sources = open_splits(locate(choice.name), choice, cache_dir, silent)
    data_format = _recognize(sources, choice, settings.texts_as_messages, accepted_kinds)
    own_settings = {key: getattr(choice, key) for key in ("train_split", "test_split", "fields", "ignored_columns")}
    key = json.dumps(
        [VERSION, {role: [rows.fingerprint, rows.split, rows.n_rows] for role, rows in sources.items()},
         asdict(settings) | own_settings, renderer.template, _tokenizer_fingerprint(tokenizer),
         data_format.description],
        sort_keys=True,
    )  # fmt: skip
    directory = os.path.join(cache_dir, "prepared", hashlib.sha256(key.encode()).hexdigest()[:32])
    write = functools.partial(
        _write_files, sources=sources, settings=settings, renderer=renderer, data_format=data_format
    )
    try:
        _write_once(directory, HashCache(cache_dir), write)
    except OSError as error:
        raise UserError(
            f"datasets=[{choice.name}]: can't write the tokenized data to {directory}: {error}\nMake room, or choose "
            "another place with local_dirs=[DIR]"
        ) from error
    return {
        split: PreparedPrompts(directory, split, choice.name, truncation_mode, accepted_kinds)
        for split in ("train", "test")
    }


def _write_once(directory: str, hashes: HashCache, write: Callable[[str], None]):
    """Let `write` fill a directory, unless it exists and is undamaged.

    Raises: OSError.
    """
    os.makedirs(os.path.dirname(directory), exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if os.path.exists(directory):
            if (damage := find_damage(directory, _FILES, hashes.sha256)) is None:
                return
            rank0_print(f"WARNING: {directory} is damaged ({damage}): preparing it again")
            shutil.rmtree(directory)
        partial = f"{directory}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        os.makedirs(partial)
        try:
            write(partial)
            write_checksums(partial)
            flush_to_disk(*(os.path.join(partial, name) for name in os.listdir(partial)), partial)
            os.rename(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _recognize(
    sources: dict[str, Rows], choice: Choice, texts_as_messages: bool, accepted_kinds: Sequence[str]
) -> Format:
    """Return the format of the training rows.

    Raises: UserError if the loss can't train on it, or a split has unread columns that may belong to the prompt.
    """
    rows, ignored = sources["train"], choice.ignored_columns
    data_format = recognize(_first_rows(rows), choice.fields, rows.where, ignored, texts_as_messages)
    if "test" in sources and (test_rows := _first_rows(sources["test"])):
        data_format.check_columns(test_rows, ignored, sources["test"].where)
    found = f"{rows.where}: it has {data_format.description}"
    if data_format.is_unpaired and not {"unpaired", "targets"} & set(accepted_kinds):
        raise UserError(f"{found}: use loss=kto or bco, or loss=sft for the desirable ones")
    if not data_format.has_pairs and not data_format.is_unpaired and "targets" not in accepted_kinds:
        raise UserError(f"{found}, and no pairs of responses: use loss=sft")
    return data_format


def _first_rows(rows: Rows) -> list[dict]:
    """Return the rows that decide the format, from the first chunk with any that can be read.

    Raises: UserError if there are none.
    """
    bad = BadRows(rows)
    for chunk in rows.chunks(_INSPECTED):
        if good := [row for *_, row in chunk if isinstance(row, dict)]:
            return good
        bad.n_read += len(chunk)
        for number, place, fault in chunk:
            bad.add(number, place, "broken row", fault.reason, fault.remedy)
    bad.raise_if_any()
    raise UserError(f"{rows.where}: there are no rows")
