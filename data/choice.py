"""Settings of datasets: `Choice` has those of one dataset, `Settings` those that all share."""

from dataclasses import dataclass, field

KEPT_ENDS = ("keep_end", "keep_start")  # the end of a long prompt that is kept
TRUNCATIONS = (*KEPT_ENDS, "drop", "error")


@dataclass(frozen=True)
class Choice:
    """An entry of `datasets`: a name, and the settings of this dataset."""

    name: str
    weight: float = 1.0
    n_examples: int | None = None
    truncation: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    fields: dict[str, str] = field(default_factory=dict)  # from a format's field names to those in the data
    ignored_columns: tuple[str, ...] = ()  # not read, although they might belong to the prompt


@dataclass(frozen=True)
class Settings:
    """Settings for reading all datasets that aren't in `DATASETS`."""

    test_fraction: float = 0.05  # fraction of the prompts that is held out if there is no test split
    skips_bad: bool = False  # skip examples that can't be used, instead of stopping
    chat_template: str | None = None  # a file; None means the tokenizer's own template
    texts_as_messages: bool = False  # render plain prompts and responses with the chat template, too
    trained_turns: str = "all"  # the assistant's turns to train in a response: all, or last
    verbatim_responses: bool = False  # write a response as it is if the chat template would alter it
