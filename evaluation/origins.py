"""Describe responses: how they were drawn, and their model's KL divergence from its reference."""

import dataclasses
import hashlib
import json

from evaluation.pairs import Place, Response
from evaluation.statistics import mean_and_error


def digest(responses: dict[Place, Response]) -> str:
    """Return a short hash of all prompts and texts."""
    texts = sorted([*map(str, place), json.dumps(r.prompt), r.text] for place, r in responses.items())
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]


def origins(responses: dict[Place, Response]) -> list[dict]:
    """Return the distinct origins of the responses; an empty list if the origin of any is unknown."""
    found = dict.fromkeys(response.origin for response in responses.values())
    return [] if None in found else [dataclasses.asdict(origin) for origin in found]


def kl_from_reference(responses: dict[Place, Response]) -> dict[str, object]:
    """Estimate KL(policy ‖ reference) in nats per response, with its standard error over prompts.

    The estimate is the mean log-ratio, which requires responses drawn from the policy's own softmax. For others `kl` is
    None, and `kl_unknown` says why.
    """
    unknown = {"kl": None, "kl_se": None, "n_kl": 0}
    if any(response.origin is None for response in responses.values()):
        return {**unknown, "kl_unknown": "nothing says how its responses were drawn"}
    for origin in (response.origin for response in responses.values()):
        if (origin.temperature, origin.top_p, origin.top_k) != (1, 1, 0):
            how = f"temperature={origin.temperature:g} top_p={origin.top_p:g} top_k={origin.top_k}"
            return {**unknown, "kl_unknown": f"its responses were drawn with {how}, not from the policy's own softmax"}
    # an empty prompt has an empty response without a log-ratio
    scored = {place: r.logratio for place, r in responses.items() if r.text or r.logratio is not None}
    if not scored or None in scored.values():
        return {**unknown, "kl_unknown": "it has responses without the reference's log-probabilities"}
    kl, error = mean_and_error(list(scored.values()), [index for index, _ in scored])
    return {"kl": kl, "kl_se": error, "n_kl": len(scored)}
