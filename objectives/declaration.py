"""Loss: a loss function, with the inputs, options and moving averages that its signature declares."""

import difflib
import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import torch

from objectives import modifiers
from objectives.options import read_option

WholeBatch = Annotated[torch.Tensor, "all microbatches and workers"]
Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # losses, chosen and rejected rewards: (batch_size,) each

LOGPS = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps")
LENGTHS = ("chosen_lengths", "rejected_lengths")
KL_ESTIMATE, MEAN_LENGTH, MEMORY = "kl_estimate", "mean_chosen_length", "memory"
_INPUTS = (*LOGPS, *LENGTHS, KL_ESTIMATE, MEAN_LENGTH, MEMORY)


@dataclass
class Memory:
    """Moving averages that a loss keeps from batch to batch. Checkpoints hold them."""

    averages: dict[str, torch.Tensor] = field(default_factory=dict)
    is_frozen: bool = False  # evaluations read the averages without changing them

    def moving_average(self, name: str, value: torch.Tensor, momentum: float) -> torch.Tensor:
        """Move an average towards the value of a batch, shape (), and return it, without gradient.

        The first batch's value is the first average.
        """
        value = value.detach()
        average = self.averages.get(name, value).to(value)
        if not self.is_frozen:
            average = self.averages[name] = momentum * average + (1 - momentum) * value
        return average


class Result(NamedTuple):
    """The result of a loss for a batch: tensors of shape (batch_size,)."""

    losses: torch.Tensor
    rewards: tuple[torch.Tensor, ...] = ()  # chosen and rejected ones, if the loss has any
    parts: dict[str, torch.Tensor] = {}  # noqa: RUF012 (never changed); the losses that `mix` adds up


class Loss:
    """A loss function, and the inputs and options that its signature declares.

    A parameter's name decides what it is:

    - inputs, tensors of shape (batch_size,): `policy_chosen_logps`, `policy_rejected_logps`, `reference_chosen_logps`,
      `reference_rejected_logps` (log-probabilities of whole responses, in nats) and `chosen_lengths`,
      `rejected_lengths` (predicted tokens in the responses). If a name contains `rejected`, the loss trains on pairs;
      otherwise on SFT targets. If a name contains `reference`, the loss needs a reference. Inputs annotated as
      `WholeBatch` hold the whole batch, of all microbatches and workers, for losses that sort or average it;
    - inputs of shape (), for the whole batch: `kl_estimate`, the policy's KL divergence from the reference (nats, at
      least 0), and `mean_chosen_length`, the mean of `chosen_lengths`;
    - `memory`, a `Memory` of moving averages; only for losses with an input annotated as `WholeBatch`;
    - all others are options: `loss.NAME` in the config, with the type and range (`Range`, `OneOf`) of the annotation
      and the parameter's default. If an option `reference_free` is true, no reference is loaded, and the inputs hold
      zeros for its log-probabilities.

    Every loss also has the options of those modifiers (`objectives.modifiers`) that fit it.

    The function returns the losses, or a tuple of losses, chosen rewards and rejected rewards, each of shape
    (batch_size,). No gradient passes through the rewards.

    Raises: TypeError if the signature declares something else.
    """

    def __init__(self, function: Callable, unpaired: bool = False, margin_only: bool = False):
        """Read the signature.

        Args:
            unpaired: the loss accepts unpaired data, because it doesn't matter which responses form a pair.
            margin_only: the loss depends only on the difference of the two log-ratios.
        """
        self.function, self.accepts_unpaired = function, unpaired
        self._name = getattr(getattr(function, "func", function), "__name__", str(function))
        # arguments that functools.partial sets aren't options
        given = function.keywords if isinstance(function, functools.partial) else {}
        hints = typing.get_type_hints(getattr(function, "func", function), include_extras=True)
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in given]
        self.inputs = tuple(p.name for p in parameters if p.name.endswith("_logps") or p.name in _INPUTS)
        misspelled = {p.name: difflib.get_close_matches(p.name, _INPUTS, 1, cutoff=0.85) for p in parameters}
        unknown = [name for name, alike in misspelled.items() if name not in _INPUTS and (alike or name in self.inputs)]
        if unknown or not self.inputs:
            alike = [f" Did you mean {names[0]}?" for names in map(misspelled.get, unknown) if names][:1]
            problem = f"unknown inputs {sorted(unknown)}" if unknown else "it has no inputs"
            raise TypeError(f"{self._name}: {problem}.{''.join(alike)} There are {', '.join(_INPUTS)}")
        self.options = {p.name: read_option(p, hints.get(p.name)) for p in parameters if p.name not in self.inputs}
        self._own_options = tuple(self.options)
        self.takes_kl_estimate = KL_ESTIMATE in self.inputs
        self.takes_mean_length = MEAN_LENGTH in self.inputs
        self.takes_whole_batch = any(hints.get(name) == WholeBatch for name in self.inputs)
        # the loss of a microbatch depends on the rest of the batch
        self.needs_batch = self.takes_kl_estimate or self.takes_mean_length or self.takes_whole_batch
        takes_lengths = self.takes_mean_length or any(name in LENGTHS for name in self.inputs)
        self.needs_pairs = any("rejected" in name for name in self.inputs)
        self._takes_reference = any(name.startswith("reference_") for name in self.inputs)
        if self._takes_reference and not self.needs_pairs:
            raise TypeError(f"{self._name}: a loss with a reference needs pairs: take policy_rejected_logps, too")
        if MEMORY in self.inputs and not self.takes_whole_batch:
            raise TypeError(f"{self._name}: memory holds averages over whole batches; annotate inputs with WholeBatch")
        if not takes_lengths and not self.takes_kl_estimate:
            self.options |= modifiers.options(self.needs_pairs, self.takes_whole_batch, margin_only)

    def needs_reference(self, loss_config) -> bool:
        """True if the loss compares the policy with a reference under these options."""
        return self._takes_reference and not loss_config.get("reference_free", False)

    def needs_shared_logps(self, loss_config) -> bool:
        """True if a modifier needs the log-probabilities of each response up to the length of the shorter one."""
        return loss_config.get("ld_alpha", 1.0) != 1.0

    def needs_weights(self, loss_config) -> bool:
        """True if a modifier needs the weights of the responses (WPO)."""
        return loss_config.get("wpo", False)

    def compute(self, inputs: dict, loss_config) -> Result:
        """Return the losses of a batch, and rewards if there are any; `inputs` may hold more than the loss declares."""
        inputs = modifiers.modified(inputs, loss_config)
        arguments = {name: inputs[name] for name in self.inputs}
        output = self.function(**arguments, **self._given_options(loss_config))
        losses, *rewards = output if isinstance(output, tuple) else (output,)
        if self.needs_weights(loss_config):  # weigh a pair by how likely both responses are on-policy (WPO, Eq. 2)
            losses = losses * inputs["chosen_weights"] * inputs["rejected_weights"]
        return Result(losses, tuple(reward.detach() for reward in rewards))

    def _given_options(self, loss_config) -> dict:
        """Return the values of the function's own options; an integer for a float option is converted."""
        given = {name: loss_config[name] for name in self._own_options if name in loss_config}
        return {name: float(value) if self.options[name].type is float else value for name, value in given.items()}

    def why_output_is_wrong(self, loss_config) -> str | None:
        """Try the function on three made-up examples; return what is wrong with its result, or None."""
        n_examples = 3
        inputs = {name: -torch.arange(1, n_examples + 1, dtype=torch.float64) for name in LOGPS}
        inputs |= {name: torch.arange(1, n_examples + 1) for name in LENGTHS}
        inputs |= {KL_ESTIMATE: torch.tensor(0.0), MEAN_LENGTH: torch.tensor(2.0), MEMORY: Memory()}
        inputs |= {name: inputs[name].requires_grad_() for name in LOGPS if name.startswith("policy_")}
        output = self.function(**{name: inputs[name] for name in self.inputs}, **self._given_options(loss_config))
        values = output if isinstance(output, tuple) else (output,)
        problem = None
        if not all(isinstance(value, torch.Tensor) for value in values):
            problem = f"returns {type(output).__name__}{[type(value).__name__ for value in values]}"
        elif len(values) not in (1, 3):
            problem = f"returns {len(values)} tensors"
        elif wrong := [tuple(value.shape) for value in values if value.shape != (n_examples,)]:
            problem = f"returns the shape {wrong[0]} for {n_examples} examples, which should be ({n_examples},)"
        elif not values[0].requires_grad:
            problem = "returns losses without a gradient"
        return problem and (
            f"{self._name} {problem}; return the losses, or losses, chosen rewards and rejected rewards: tensors with "
            "one value for each example"
        )
