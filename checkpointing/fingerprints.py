"""Fingerprints of the models that a run starts from: a resumed run notices changed weights, even in moved files.

They are in every checkpoint's state.json and, for a run that has no checkpoint yet, in the first line of its
config.yaml.
"""

import hashlib
import json
import os
from collections.abc import Callable

import huggingface_hub
from omegaconf import DictConfig, OmegaConf

from basics.files import HashCache, open_regular
from utils import UserError, get_local_dir

_KEYS = (
    "model.name_or_path", "model.tokenizer_name_or_path", "model.archive", "model.adapter",
    "reference_model.name_or_path", "reference_model.archive", "reference_model.adapter",
)  # fmt: skip
_WEIGHTS = (".safetensors", ".bin")  # endings of files that are read from a model's folder
_SETTINGS = (".json", ".model", ".txt")  # its config and tokenizer
_TEMPLATE = (".jinja",)  # the tokenizer's chat template
_BLOCK, _MAX_BLOCKS = 2**20, 64  # bytes in a block, and the most blocks that `_sampled_sha256` reads
_HEADER = "# SHA-256 of what the run started from, compared when it is resumed: "
_HEADERS = (_HEADER, "# SHA-256 of what the run started from, compared when it goes on: ")  # and an earlier version's


def file_fingerprints(config: DictConfig, sampled: bool = False, templates: bool = True) -> dict[str, str]:
    """Return a SHA-256 of each local file or folder that weights and tokenizer come from, by config key.

    It covers the content, and the names of files in a folder, but not the path.

    Args:
        sampled: read only 64 blocks of a file above 64 MiB, as earlier versions did.
        templates: cover chat templates in folders, which earlier versions left out.

    Raises: UserError if a file can't be read.
    """
    cache = HashCache(get_local_dir(config.local_dirs))
    hash_large = _sampled_sha256 if sampled else cache.sha256
    fingerprints = {}
    for key in _KEYS:
        path = OmegaConf.select(config, key)
        if path is None or not os.path.exists(path):
            continue
        if key.endswith(".archive") and os.path.exists(os.path.join(path, "policy.pt")):
            path = os.path.join(path, "policy.pt")
        reads_weights = "tokenizer" not in key and not (key == "model.name_or_path" and config.model.from_scratch)
        try:
            endings = _SETTINGS + (_WEIGHTS if reads_weights else ()) + (_TEMPLATE if templates else ())
            fingerprints[key] = _fingerprint(path, endings, hash_large)
        except OSError as error:
            raise UserError(f"{key}={path}: can't read it: {error}") from error
    return fingerprints


def folder_fingerprint(path: str, local_dirs: list[str]) -> str:
    """Return a SHA-256 of a model's folder: weights, config and tokenizer."""
    return _fingerprint(path, _SETTINGS + _WEIGHTS + _TEMPLATE, HashCache(get_local_dir(local_dirs)).sha256)


def _fingerprint(path: str, endings: tuple[str, ...], hash_large: Callable[[str], str]) -> str:
    """Return the SHA-256 of a file, or of a folder's files with these endings."""
    if os.path.isdir(path):
        names = [name for name in sorted(os.listdir(path)) if name.endswith(endings)]
        files = [(name, _fingerprint(os.path.join(path, name), endings, hash_large)) for name in names]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()
    is_large = os.path.getsize(path) > _BLOCK * _MAX_BLOCKS
    return hash_large(path) if is_large else _sampled_sha256(path)  # reads all of a small file


def _sampled_sha256(path: str) -> str:
    """Return a SHA-256 of a file's size and of up to 64 blocks of 1 MiB, evenly spaced from the first to the last."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    n_blocks = min(-(-size // _BLOCK), _MAX_BLOCKS)
    with open_regular(path) as file:
        for index in range(n_blocks):
            file.seek(index * max(size - _BLOCK, 0) // max(n_blocks - 1, 1))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def hub_revisions(config: DictConfig) -> dict[str, str]:
    """Return the commit of each model that was loaded from the hub, by config key; see `model.revision`."""
    revisions = {}
    for key in (key for key in _KEYS if not key.endswith(".adapter")):
        name = OmegaConf.select(config, key)
        if name is None or os.path.exists(name):
            continue
        is_archive, of_policy = key.endswith(".archive"), name == config.model.name_or_path
        cache_dir = None if is_archive else get_local_dir(config.local_dirs)
        file = "tokenizer_config.json" if "tokenizer" in key else "config.json"
        revision = OmegaConf.select(config, "model.revision") if of_policy and not is_archive else None
        path = huggingface_hub.try_to_load_from_cache(name, file, cache_dir, revision)
        if isinstance(path, str):
            revisions[key] = os.path.basename(os.path.dirname(path))
    return revisions


def changed_models(config: DictConfig, former: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return the keys whose fingerprint has changed since the run began.

    Args:
        former: fingerprints from when the run began; models without one aren't compared.
        now: today's fingerprints of files, or commits on the hub.
    """
    changed = [key for key, digest in now.items() if former.get(key, digest) != digest]
    if not any(is_of_model(key) for key in changed):
        return changed
    # an earlier version may have written `former`
    earlier = [file_fingerprints(config, sampled, templates=False) for sampled in (False, True)]
    return [key for key in changed if former[key] not in {digests.get(key) for digests in earlier}]


def is_of_model(name: str) -> bool:
    """True for the name of a model's or a tokenizer's fingerprint, False for a dataset's."""
    return name in _KEYS


def header(fingerprints: dict[str, str]) -> str:
    """Return the first line of a run's config.yaml: fingerprints by config key."""
    return f"{_HEADER}{json.dumps(fingerprints)}\n"


def read_header(path: str) -> dict[str, str]:
    """Return the fingerprints in a run's config.yaml; an empty dict if it was written without them.

    Raises: OSError; ValueError if the line is damaged.
    """
    with open(path, encoding="utf-8") as file:
        line = file.readline()
    found = {}
    for start in _HEADERS:
        if line.startswith(start):
            found = json.loads(line.removeprefix(start))
    if not isinstance(found, dict):
        raise ValueError(f"it holds no object: {line[:200]}")
    return found
