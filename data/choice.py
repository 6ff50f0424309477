"""Settings of the data: `Choice` for one entry of `datasets`, `Settings` for all datasets that the user supplies."""

from dataclasses import dataclass, field

KEPT_ENDS = ("keep_end", "keep_start")  # which end of a long prompt is kept
TRUNCATIONS = (*KEPT_ENDS, "drop", "error")


@dataclass(frozen=True)
class Choice:
    """An entry of `datasets`: a name, and settings of its own."""

    name: str
    weight: float = 1.0
    n_examples: int | None = None
    truncation: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    fields: dict[str, str] = field(default_factory=dict)  # maps a field of the format to the column that holds it
    ignored_columns: tuple[str, ...] = ()  # columns that are left out, although they may belong to the prompt


@dataclass(frozen=True)
class Settings:
    """Settings for reading the user's own datasets, i.e. all that aren't in `DATASETS`."""

    test_fraction: float = 0.05  # the fraction of the prompts to hold out if there is no test split
    skips_bad: bool = False  # skip examples that can't be used, rather than raise an error
    chat_template: str | None = None  # a file; by default the tokenizer's own template
    texts_as_messages: bool = False  # render plain prompts and responses with the chat template, too
    trained_turns: str = "all"  # which of the assistant's turns in a response are trained: all, or last
    verbatim_responses: bool = False  # write responses verbatim if the chat template would alter them
