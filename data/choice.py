"""An entry of the config's `datasets`: which dataset, how much of it, and how it is read and truncated."""

from dataclasses import dataclass, field

KEPT_ENDS = ("keep_end", "keep_start")  # which end of a long prompt is kept
TRUNCATIONS = (*KEPT_ENDS, "drop", "error")


@dataclass(frozen=True)
class Choice:
    """An entry of `datasets`: a name, and settings that override the config's for this dataset."""

    name: str
    weight: float = 1.0
    n_examples: int | None = None
    truncation: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    fields: dict[str, str] = field(default_factory=dict)
    ignored_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """Settings for reading a dataset that isn't one of `DATASETS`."""

    fields: dict[str, str] = field(default_factory=dict)  # from a format's field names to those in the data
    train_split: str | None = None
    test_split: str | None = None
    ignored_columns: tuple[str, ...] = ()  # not read, although they might belong to the prompt
    test_fraction: float = 0.05  # fraction of the prompts that is held out if there is no test split
    skips_bad: bool = False  # skip examples that can't be used, instead of stopping
    chat_template: str | None = None  # a file; None means the tokenizer's own template
    texts_as_messages: bool = False  # render plain prompts and responses with the chat template, too
    trained_turns: str = "all"  # which of the assistant's turns in a response: all, or last
    verbatim_responses: bool = False  # write responses as they are where the chat template would alter them
