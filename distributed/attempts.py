"""Give each attempt of a restarted run a name: torchrun's store still holds the keys of earlier attempts."""

import time
import uuid

import torch.distributed as dist

_INTERVAL = 0.05  # seconds between two looks into the store


def agree_on_attempt(store: dist.Store, rank: int, world_size: int, deadline: float) -> str:
    """Return a name for this attempt that all of its workers share and that no earlier attempt had.

    Every worker puts a new token into the store, rank 0 answers each token with the name, and the workers confirm it.
    Nobody reads the answers to tokens of earlier attempts. TORCHELASTIC_RESTART_COUNT can't be the name: each machine's
    agent counts only the failures of its own workers.

    Args:
        deadline: by `time.monotonic`.

    Raises: RuntimeError if a worker is missing at the deadline.
    """
    token = uuid.uuid4().hex
    if rank > 0:
        store.set(f"token/{rank}", token)
        name = store.get(f"name/{token}").decode()  # waits
        store.set(f"confirmed/{name}/{rank}", "")
        return name
    missing = set(range(1, world_size))
    while True:
        for other in sorted(missing):
            if store.check([f"token/{other}"]):
                store.set(f"name/{store.get(f'token/{other}').decode()}", token)
        missing = {other for other in missing if not store.check([f"confirmed/{token}/{other}"])}
        if not missing:
            return token
        if time.monotonic() > deadline:
            raise RuntimeError(f"worker {min(missing)} is missing")
        time.sleep(_INTERVAL)
