"""What can be done with a checkpoint besides going on from it.

`python -m checkpoints merge ADAPTER_DIR OUTPUT_DIR` writes the model with the adapter merged into it.
"""

import argparse
import os
import sys

import transformers
from omegaconf import OmegaConf

from models import load_adapter, load_model
from utils import UserError, get_local_dir


def merge(adapter_dir: str, output_dir: str):
    """Write the model with the adapter's changes added to its weights, with its tokenizer, for `from_pretrained`.

    The base is loaded as the run's config.yaml, beside the checkpoint directory, says.

    Raises: UserError if there is no such run or adapter, or if `output_dir` exists.
    """
    config_path = os.path.join(os.path.abspath(adapter_dir), os.pardir, "config.yaml")
    if not os.path.exists(config_path) or not os.path.exists(os.path.join(adapter_dir, "adapter_config.json")):
        raise UserError(f"{adapter_dir} is not a checkpoint with an adapter inside a run directory")
    if os.path.exists(output_dir):
        raise UserError(f"{output_dir} exists already")
    config = OmegaConf.load(config_path)
    config.model.adapter, config.model.load_in_4bit = adapter_dir, False
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        config.model.tokenizer_name_or_path or config.model.name_or_path, cache_dir=get_local_dir(config.local_dirs)
    )
    model = load_model(config, config.model.policy_dtype)
    load_adapter(model, config, is_trainable=False).merge_and_unload().save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    print(f"wrote the merged model to {output_dir}")


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
