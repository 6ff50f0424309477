"""Check `datasets` and its settings, and list the names that are loaded from the hub."""

import os
from collections.abc import Mapping
from dataclasses import fields
from glob import has_magic

from omegaconf import DictConfig, ListConfig

from config_checks.values import check_one_of, is_number
from data.choice import TRUNCATIONS, Choice
from data.locations import is_location, locate
from data.row_sources import ROWS
from preference_datasets import DATASETS, check_names, raise_unknown_dataset
from utils import UserError, closest_match


def check_data(config: DictConfig, reads_data: bool):
    """Check that there are datasets and, if the command reads them, check their names and settings. Reads no data."""
    if isinstance(config.datasets, str):
        config.datasets = ListConfig([config.datasets])
    if not isinstance(config.datasets, ListConfig):
        raise UserError(f"datasets={config.datasets}: expected a list, e.g. datasets=[hh]")
    if not config.datasets:
        raise UserError("datasets=[]: name at least one dataset, e.g. datasets=[hh]")
    if not reads_data:
        return
    check_one_of("truncation", config.truncation, (*TRUNCATIONS, None))
    check_one_of("on_bad_example", config.on_bad_example, ("error", "skip"))
    check_one_of("trained_turns", config.trained_turns, ("all", "last"))
    if not 0 < config.test_fraction < 1:
        raise UserError(f"test_fraction={config.test_fraction}: must be above 0 and below 1")
    if config.fields or config.ignored_columns:
        _check_columns(config, "config")
    choices = chosen_datasets(config)
    row_keys = ("train_split", "test_split", "fields", "ignored_columns", "apply_chat_template", "verbatim_responses")
    given = [key for key in row_keys if config[key]] + ["trained_turns"] * (config.trained_turns != "all")
    if given and all(choice.name in DATASETS for choice in choices):
        raise UserError(f"{given[0]}={config[given[0]]}: it is for files and hub ids, not for built-in datasets")
    _check_choices(choices, config.dataset_paths)
    if config.chat_template is not None and not os.path.isfile(config.chat_template):
        raise UserError(f"chat_template={config.chat_template}: no such file, seen from {os.getcwd()}")


def chosen_datasets(config: DictConfig) -> list[Choice]:
    """Return the entries of `datasets`; an entry's own settings replace the config's.

    Raises: UserError if an entry has an unknown setting, or one with a wrong value.
    """
    common = {key: config[key] for key in ("truncation", "train_split", "test_split")} | {
        "fields": dict(config.fields), "ignored_columns": tuple(config.ignored_columns)
    }  # fmt: skip
    choices = []
    for entry in config.datasets:
        given = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
        if not (isinstance(entry, str) and entry.strip()):  # a mapping, or an invalid entry
            _check_entry(given, f"datasets=[{entry}]")
        is_built_in = given["name"] in DATASETS
        settings = ({"truncation": common["truncation"]} if is_built_in else common) | given
        settings["fields"] = dict(settings.get("fields", {}))
        settings["ignored_columns"] = tuple(settings.get("ignored_columns", ()))
        choices.append(Choice(**settings))
    names = [choice.name for choice in choices]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"datasets: {twice} is listed twice; give it a weight: {{name: {twice}, weight: 2}}")
    return choices


def _check_entry(given: dict, shown: str):
    known = [one.name for one in fields(Choice)]
    for key in given:
        if key not in known:
            hint = closest_match(str(key), known)
            raise UserError(f"{shown}: no setting {key!r}.{hint} There are: {', '.join(known)}")
    if not isinstance(given.get("name"), str) or not given["name"].strip():
        raise UserError(f"{shown}: expected names, files or ids on the hub, e.g. datasets=[hh]")
    weight, n_examples = given.get("weight", 1), given.get("n_examples")
    if not is_number(weight) or not 0 < weight <= 1000:
        raise UserError(f"{shown}: weight={weight}: must be a number above 0, at most 1000")
    if n_examples is not None and (not is_number(n_examples, int) or n_examples < 1):
        raise UserError(f"{shown}: n_examples={n_examples}: must be an integer above 0")
    check_one_of(f"{shown}: truncation", given.get("truncation"), (*TRUNCATIONS, None))
    for key in ("train_split", "test_split"):
        if not isinstance(given.get(key), str | None):
            raise UserError(f"{shown}: {key}={given[key]}: expected the name of a split")
    _check_columns(given, shown)


def _check_columns(settings: Mapping, shown: str):
    """Raise UserError unless `fields` maps strings to strings, and `ignored_columns` is a list of strings."""
    given, ignored = settings.get("fields", {}), settings.get("ignored_columns", [])
    if not isinstance(given, Mapping) or not all(isinstance(x, str) for item in given.items() for x in item):
        raise UserError(
            f"{shown}: fields={given}: expected a format's fields and the data's columns, e.g. {{prompt: question}}"
        )
    if not isinstance(ignored, list | ListConfig) or not all(isinstance(name, str) for name in ignored):
        raise UserError(f"{shown}: ignored_columns={ignored}: expected a list of columns, e.g. ignored_columns=[id]")


def _check_choices(choices: list[Choice], paths: dict[str, str]):
    """Raise UserError if a dataset doesn't exist, or has a setting that isn't used with it."""
    check_names([choice.name for choice in choices if choice.name in DATASETS], paths)
    for choice in choices:
        if choice.name in DATASETS and choice.name in ROWS:
            raise UserError(f"datasets=[{choice.name}]: a built-in dataset has that name; give your rows another name")
        if choice.name in DATASETS:
            for key in ("train_split", "test_split", "fields", "ignored_columns"):
                if getattr(choice, key):
                    raise UserError(
                        f"{key}={getattr(choice, key)}: not used with the built-in dataset {choice.name}; "
                        f"it is for files and hub ids: datasets=[{{name: FILE, {key}: ...}}]"
                    )
        elif choice.name not in ROWS:
            if not is_location(choice.name):
                raise_unknown_dataset(choice.name)
            locate(choice.name)


def hub_names(config: DictConfig, reads_data: bool = True) -> list[str]:
    """Return the hub ids of the models and datasets that a run loads, or the local paths given instead of them."""
    model, reference = config.model, config.reference_model
    names = [model.name_or_path, model.tokenizer_name_or_path, model.archive, reference.name_or_path, reference.archive]
    for choice in chosen_datasets(config) if reads_data else []:
        is_local = choice.name in ROWS or os.path.exists(os.path.expanduser(choice.name)) or has_magic(choice.name)
        if choice.name in DATASETS:
            names.append(config.dataset_paths.get(choice.name) or DATASETS[choice.name].hub_id)
        elif not is_local:
            names.append(choice.name.partition(":")[0])
    return [name for name in names if name is not None]
