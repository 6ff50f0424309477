"""What the signature of a loss may ask for, and the object that reads it."""

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch


@dataclass(frozen=True)
class Range:
    """The range of an option, given in its annotation: `gamma: Annotated[float, Range(above=0)]`."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None

    def violation(self, value: float) -> str | None:
        """Return the rule that a number breaks; None if it is in the range."""
        if self.above is not None and not value > self.above:
            return f"must be a number above {self.above}"
        if self.at_least is not None and not value >= self.at_least:
            return f"must be a number {self.at_least} or more"
        if self.below is not None and not value < self.below:
            return f"must be below {self.below}"
        return None


Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(at_least=0)]
FlipProbability = Annotated[float, Range(at_least=0, below=0.5)]  # that a preference label is wrong
Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # losses, chosen and rejected rewards: (batch_size,) each

LOGPS = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps")
LENGTHS = ("chosen_lengths", "rejected_lengths")
KL_ESTIMATE = "kl_estimate"


@dataclass(frozen=True)
class Option:
    """A setting of a loss that the config's `loss` section may hold."""

    type: type
    default: object = inspect.Parameter.empty  # this: the config must say it
    range: Range | None = None

    @property
    def is_required(self) -> bool:
        return self.default is inspect.Parameter.empty


class Loss:
    """A loss function, and the inputs and options that its signature declares.

    Its parameters are, by their names,

    - inputs, tensors of shape (batch_size,): `policy_chosen_logps`, `policy_rejected_logps`, `reference_chosen_logps`,
      `reference_rejected_logps` (log-probabilities of whole responses, in nats) and `chosen_lengths`,
      `rejected_lengths` (predicted tokens in the responses); and `kl_estimate`, of shape (): the policy's KL divergence
      from the reference (nats, at least 0), estimated from the whole batch. A name with `rejected` makes it a loss of
      pairs; otherwise it trains on SFT targets. A name with `reference` makes it need a reference;
    - options, all others: `loss.NAME` in the config, with the type, range (`Range`) and default of the annotation. With
      an option `reference_free` set to true, no reference is loaded and its log-probabilities are zeros.

    A loss that takes no lengths gets one more option, `average_log_prob`: log-probabilities are then means per token.

    It returns the losses, or a tuple of losses, chosen rewards and rejected rewards; each of shape (batch_size,).

    Raises: TypeError if the signature declares something else.
    """

    def __init__(self, function: Callable):
        self.function = function
        # arguments that functools.partial has set are no options
        given = function.keywords if isinstance(function, functools.partial) else {}
        hints = typing.get_type_hints(getattr(function, "func", function), include_extras=True)
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in given]
        known = (*LOGPS, *LENGTHS, KL_ESTIMATE)
        self.inputs = tuple(p.name for p in parameters if p.name.endswith("_logps") or p.name in known)
        unknown = set(self.inputs) - set(known)
        if unknown or not self.inputs:
            raise TypeError(f"{function}: unknown inputs {sorted(unknown)}, or none; there are {', '.join(known)}")
        self.options = {p.name: _option(p, hints.get(p.name)) for p in parameters if p.name not in self.inputs}
        self.takes_kl_estimate = KL_ESTIMATE in self.inputs
        self.takes_lengths = any(name in LENGTHS for name in self.inputs)
        if not self.takes_lengths and not self.takes_kl_estimate:
            self.options["average_log_prob"] = Option(bool, False)
        self.needs_pairs = any("rejected" in name for name in self.inputs)
        self._compares = any(name.startswith("reference_") for name in self.inputs)
        if self._compares and not self.needs_pairs:
            raise TypeError(f"{function}: references are of pairs; take policy_rejected_logps, too")

    def needs_reference(self, loss_config) -> bool:
        """True if the loss compares the policy with a reference under these options."""
        return self._compares and not loss_config.get("reference_free", False)

    def __call__(self, inputs: dict[str, torch.Tensor], loss_config) -> tuple[torch.Tensor, ...]:
        """Return the losses of a batch, and rewards if there are any; `inputs` hold at least those that it declares."""
        arguments = {name: inputs[name] for name in self.inputs}
        options = {
            name: loss_config[name] for name in self.options if name in loss_config and name != "average_log_prob"
        }
        output = self.function(**arguments, **options)
        return output if isinstance(output, tuple) else (output,)


def _option(parameter: inspect.Parameter, hint: object) -> Option:
    """Read an option's type, range and default from a parameter."""
    value_range = None
    if typing.get_origin(hint) is Annotated:
        hint, *notes = typing.get_args(hint)
        value_range = next((note for note in notes if isinstance(note, Range)), None)
    if hint not in (float, int, bool, str):
        raise TypeError(f"option {parameter.name} of a loss: annotate it with float, int, bool or str, not {hint}")
    return Option(hint, parameter.default, value_range)
