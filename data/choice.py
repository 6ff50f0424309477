"""A dataset as the config names it: which one, how much of it, how it is read and cut."""

from dataclasses import dataclass, field

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
    ignored_columns: tuple[str, ...] = ()

    def truncation_mode(self, default: str = "keep_end") -> str:
        """Return which end of an over-long prompt is kept: what the entry says, else the dataset's default."""
        return self.truncation if self.truncation in ("keep_end", "keep_start") else default


@dataclass(frozen=True)
class Settings:
    """How a dataset that isn't a named one is read."""

    fields: dict[str, str] = field(default_factory=dict)  # names that a format's fields have in the data
    train_split: str | None = None
    test_split: str | None = None
    ignored_columns: tuple[str, ...] = ()  # that are left out, though they may belong to the prompt
    test_fraction: float = 0.05  # of the prompts, held out where there is no test split
    skips_bad: bool = False
    chat_template: str | None = None  # a file; None: the tokenizer's own
    trained_turns: str = "all"  # of the assistant's turns in a response: all, or the last
    verbatim_responses: bool = False  # write responses that the chat template alters as they are
    texts_as_messages: bool = False  # render plain prompts and responses by the chat template, too
