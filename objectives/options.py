"""Options of a loss, whose types, ranges and defaults are read from its signature."""

import inspect
import typing
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """The range of an option, given in its annotation: `gamma: Annotated[float, Range(above=0)]`."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def violation(self, value: float) -> str | None:
        """Return the rule that a number breaks; None if it is in the range."""
        if self.above is not None and not value > self.above:
            return f"must be a number above {self.above}"
        if self.at_least is not None and not value >= self.at_least:
            return f"must be a number, {self.at_least} or more"
        if self.below is not None and not value < self.below:
            return f"must be below {self.below}"
        if self.at_most is not None and not value <= self.at_most:
            return f"must be at most {self.at_most}"
        return None


@dataclass(frozen=True)
class OneOf:
    """The values of an option that is a name, given in its annotation: `Annotated[str, OneOf("a", "b")]`."""

    names: tuple[str, ...]

    def __init__(self, *names: str):
        object.__setattr__(self, "names", names)

    def violation(self, value: str) -> str | None:
        """Return the rule that a name breaks; None if it is one of these."""
        return None if value in self.names else f"must be one of {', '.join(self.names)}"


Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(at_least=0)]
FlipProbability = Annotated[float, Range(at_least=0, below=0.5)]  # that a preference label is wrong
Momentum = Annotated[float, Range(at_least=0, below=1)]  # the share of a moving average that each batch keeps


@dataclass(frozen=True)
class Option:
    """A setting of a loss that the config's `loss` section may hold."""

    type: type
    default: object = inspect.Parameter.empty  # empty: the config must give a value
    range: Range | OneOf | None = None

    @property
    def is_required(self) -> bool:
        return self.default is inspect.Parameter.empty


def read_option(parameter: inspect.Parameter, hint: object) -> Option:
    """Read an option's type, range and default from a parameter."""
    value_range = None
    if typing.get_origin(hint) is Annotated:
        hint, *notes = typing.get_args(hint)
        value_range = next((note for note in notes if isinstance(note, Range | OneOf)), None)
    if hint not in (float, int, bool, str):
        raise TypeError(f"option {parameter.name} of a loss: annotate it with float, int, bool or str, not {hint}")
    return Option(hint, parameter.default, value_range)
