"""Give each attempt of a restarted run a name of its own: torchrun's store still holds keys of earlier attempts."""

import time
import uuid

import torch.distributed as dist

_INTERVAL = 0.05  # seconds between two reads of the store


def agree_on_attempt(store: dist.Store, rank: int, world_size: int, deadline: float) -> str:
    """Return a new name for this attempt, the same on all workers.

    Every worker puts a new token into the store, rank 0 answers each token with the name, and the workers confirm it.
    No worker reads the answers to tokens of earlier attempts. TORCHELASTIC_RESTART_COUNT can't be the name, because
    each machine's agent only counts the failures of its own workers.

    `deadline`: a time of `time.monotonic`.

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
