"""What can be done with a checkpoint besides going on from it.

`python -m checkpoints merge ADAPTER_DIR OUTPUT_DIR` writes the model with the adapter merged into it.
"""

import argparse
import os
import sys

from omegaconf import DictConfig, OmegaConf

from checkpointing.integrity import atomic_directory
from checkpointing.model_card import write_card
from checkpointing.train_state import read_state_json
from config_checks.schema import own_keys
from models import end_at_turns, load_adapter, load_model, read_tokenizer
from references import policy_source
from utils import UserError


def merge(adapter_dir: str, output_dir: str):
    """Write the model with the adapter's changes added to its weights, with its tokenizer, for `from_pretrained`.

    The base is loaded as the run's config.yaml, beside the checkpoint directory, says.

    Raises: UserError if there is no such run or adapter, if `output_dir` exists or can't be written; then nothing
        remains of it.
    """
    config_path = os.path.join(os.path.abspath(adapter_dir), os.pardir, "config.yaml")
    if not os.path.exists(config_path) or not os.path.exists(os.path.join(adapter_dir, "adapter_config.json")):
        raise UserError(f"{adapter_dir} is not a checkpoint with an adapter inside a run directory")
    if not output_dir:
        raise UserError("give the directory that gets the merged model")
    output_dir = os.path.normpath(output_dir)
    if os.path.lexists(output_dir):
        raise UserError(f"{output_dir} exists already")
    try:
        # one that was only copied there has none, and says nothing of its training
        has_state = os.path.exists(os.path.join(adapter_dir, "state.json"))
        state = read_state_json(adapter_dir) if has_state else None
        trained = OmegaConf.merge(_defaults(), OmegaConf.load(config_path))
        config = trained.copy()
        config.model.load_in_4bit, config.model.adapter = False, adapter_dir
        source = policy_source(config)
    except UserError:
        raise
    except Exception as error:  # YAML's and OmegaConf's are of many kinds
        raise UserError(f"{config_path}: can't read it as a run's config: {error}") from error
    tokenizer = read_tokenizer(config.model.tokenizer_name_or_path or config.model.name_or_path, config)
    tokenizer.chat_template = read_tokenizer(adapter_dir, config).chat_template or tokenizer.chat_template
    model = load_adapter(load_model(config, config.model.policy_dtype), source, is_trainable=False)
    end_at_turns(model, tokenizer)
    with atomic_directory(output_dir, "make room, or choose another directory") as partial:
        model.merge_and_unload().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if state is not None:
            write_card(partial, trained, state, is_adapter=False)
    print(f"wrote the merged model to {output_dir}")


def _defaults() -> DictConfig:
    """Of every key, for runs that are older than some."""
    return OmegaConf.create(own_keys("config") | {"model": own_keys("model/blank_model")})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m checkpoints")
    parser.add_argument("command", choices=["merge"])
    parser.add_argument("adapter_dir")
    parser.add_argument("output_dir")
    arguments = parser.parse_args()
    try:
        merge(arguments.adapter_dir, arguments.output_dir)
    except UserError as error:
        sys.exit(f"error: {error}")
