"""Fingerprints of what a run starts from: a run that goes on starts from the same, wherever that lies by then.

They stand in every checkpoint's state.json and, for a run that has none yet, in the first line of its config.yaml.
"""

import hashlib
import json
import os

import huggingface_hub
from omegaconf import DictConfig, OmegaConf

from utils import UserError, get_local_dir

_KEYS = (
    "model.name_or_path", "model.tokenizer_name_or_path", "model.archive", "model.adapter",
    "reference_model.name_or_path", "reference_model.archive", "reference_model.adapter",
)  # fmt: skip
_WEIGHTS = (".safetensors", ".bin")  # endings of files that are read from a model's folder
_SETTINGS = (".json", ".model", ".txt")  # its config and tokenizer
_BLOCK, _MAX_BLOCKS = 2**20, 64  # bytes, and how many blocks of them are read of one file
_HEADER = "# SHA-256 of what the run started from, compared when it goes on: "


def file_fingerprints(config: DictConfig) -> dict[str, str]:
    """A SHA-256, in hexadecimal, of each local file or folder that weights and tokenizer come from, by its config key.

    Of a file it covers the size and all of the content up to 64 MiB, of a larger one 64 blocks of 1 MiB: the first, the
    last and others evenly between them. So it notices other training, another format or another dtype, which change
    weights everywhere, and truncation; it can miss a change to a few tensors alone, and bit errors. Of a folder it
    covers the names of its weight, config and tokenizer files, too; not the place or the name of what the key gives.

    Raises: UserError if a file can't be read.
    """
    fingerprints = {}
    for key in _KEYS:
        path = OmegaConf.select(config, key)
        if path is None or not os.path.exists(path):
            continue
        if key.endswith(".archive") and os.path.exists(os.path.join(path, "policy.pt")):
            path = os.path.join(path, "policy.pt")
        reads_weights = "tokenizer" not in key and not (key == "model.name_or_path" and config.model.from_scratch)
        try:
            fingerprints[key] = _fingerprint(path, _SETTINGS + (_WEIGHTS if reads_weights else ()))
        except OSError as error:
            raise UserError(f"{key}={path}: can't read it: {error}") from error
    return fingerprints


def _fingerprint(path: str, endings: tuple[str, ...]) -> str:
    """Of a file, or of those files of a folder that have such endings."""
    if not os.path.isdir(path):
        return _file_sha256(path)
    names = [name for name in sorted(os.listdir(path)) if name.endswith(endings)]
    files = [(name, _file_sha256(os.path.join(path, name))) for name in names]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _file_sha256(path: str) -> str:
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    n_blocks = min(-(-size // _BLOCK), _MAX_BLOCKS)
    with open(path, "rb") as file:
        for index in range(n_blocks):
            file.seek(index * max(size - _BLOCK, 0) // max(n_blocks - 1, 1))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def hub_revisions(config: DictConfig) -> dict[str, str]:
    """The commit of each model that has been loaded from the hub, by its config key; see `model.revision`."""
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


def is_of_model(name: str) -> bool:
    """Whether what a fingerprint is of is a model or a tokenizer, and not a dataset."""
    return name in _KEYS


def header(fingerprints: dict[str, str]) -> str:
    """The first line of a run's config.yaml: fingerprints, by what they are of."""
    return f"{_HEADER}{json.dumps(fingerprints)}\n"


def read_header(path: str) -> dict[str, str]:
    """The fingerprints in a run's config.yaml; none where it was written without.

    Raises: OSError; ValueError if that line isn't what `header` makes.
    """
    with open(path, encoding="utf-8") as file:
        line = file.readline()
    found = json.loads(line.removeprefix(_HEADER)) if line.startswith(_HEADER) else {}
    if not isinstance(found, dict):
        raise ValueError(f"it holds no object: {line[:200]}")
    return found
