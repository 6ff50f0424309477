"""The workers of a machine share the text of built-in datasets: each maps the same file into memory."""

from pathlib import Path

import pytest
import transformers
from conftest import ORACLE

from data.batches import BatchIterator
from data.shared_text import MappedPrompts, share_text
from preference_datasets import get_batch_iterator
from utils import UserError


def hh_batches(split: str) -> BatchIterator:
    tokenizer = transformers.AutoTokenizer.from_pretrained(ORACLE / "model")
    tokenizer.pad_token_id = tokenizer.eos_token_id
    return get_batch_iterator(["hh"], tokenizer, split, batch_size=4, n_epochs=1, silent=True,
                              paths={"hh": str(ORACLE / "hh")})  # fmt: skip


def check_shared_text(directory: str):
    iterators = [hh_batches("train"), None, hh_batches("test")]
    (prompts,), fingerprints = iterators[0].prompts.datasets, iterators[0].fingerprints()
    prompts[0].text += " \ud800é"  # a lone surrogate, as JSON may hold one
    share_text(iterators, directory)
    for iterator in (iterators[0], iterators[2]):
        assert [type(part) for part in iterator.prompts.datasets] == [MappedPrompts]
    (mapped,) = iterators[0].prompts.datasets
    assert list(mapped) == prompts
    assert list(mapped.n_pairs) == [len(prompt.pairs) for prompt in prompts]
    iterators[0].prompts.datasets[0] = mapped = list(mapped)
    mapped[0].text = mapped[0].text.removesuffix(" \ud800é")
    assert iterators[0].fingerprints() == fingerprints


def refused(directory: str) -> str:
    with pytest.raises(UserError) as caught:
        share_text([hh_batches("test")], directory)
    return str(caught.value)


def test_workers_share_the_prompts_that_each_has_read(in_workers, tmp_path):
    in_workers(2, check_shared_text, str(tmp_path))
    assert list(tmp_path.iterdir()) == []  # the file is deleted, but stays mapped


def test_every_worker_names_a_directory_that_cannot_hold_the_text(in_workers, tmp_path):
    Path(tmp_path / "file").touch()
    for message in in_workers(2, refused, str(tmp_path / "file" / "cache")):
        assert message.startswith(f"hh: can't write its text to {tmp_path}/file/cache: Not a directory\nMake room")
