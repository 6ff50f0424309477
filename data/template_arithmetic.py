"""Keep chat templates from arithmetic that takes hours: a single operation on huge integers can't be interrupted.

Transformers compiles templates in the environment that is replaced here.
"""

from jinja2.filters import do_round
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

_LARGEST, _LARGEST_EXPONENT, _DIGITS = 2**63, 64, 300


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Refuses operations on large integers, except addition, which hardly enlarges them."""

    intercepted_binops = frozenset({"*", "**", "//", "%"})

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.filters["round"] = _round

    def call_binop(self, context, operator: str, left: object, right: object) -> object:
        """Compute `left operator right`. Raises: OverflowError."""
        for value, limit in ((left, _LARGEST), (right, _LARGEST_EXPONENT if operator == "**" else _LARGEST)):
            if isinstance(value, int) and abs(value) > limit:
                raise OverflowError(f"an integer beyond {limit} in {operator}")
        return super().call_binop(context, operator, left, right)


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    return do_round(value, max(-_DIGITS, min(_DIGITS, precision)), method)


chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment
