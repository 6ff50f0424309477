"""Export a checkpoint as a plain folder for `from_pretrained`: `python export.py run=RUN output=DIR`.

The folder has the model, the tokenizer and a model card. A whole checkpoint is copied, a sharded one is joined, and an
adapter is merged into its base.
"""

if __name__ == "__main__":  # before the imports that take seconds, so that Ctrl-C ends them
    from basics.interrupts import let_interrupts_end_the_process

    let_interrupts_end_the_process()

import os
import shutil
from collections.abc import Iterable

from omegaconf import DictConfig, OmegaConf

from basics.checksums import read_checksums
from basics.outputs import MODEL_INDEX, SHARDS, Output, check_outputs, is_sharded, refuse_nonempty_directory
from checkpointing.atomic_directory import CARD, atomic_directory
from checkpointing.fingerprints import file_fingerprints, hub_revisions
from checkpointing.model_card import write_card
from checkpointing.resume import find_checkpoints
from checkpointing.same_run import check_models_unchanged
from checkpointing.train_state import read_state_json
from commands import command_line
from commands.output import quiet_libraries
from commands.run_config import read_run_config
from config_checks.schema import expand_config, expand_home, own_keys
from references import policy_source
from utils import UserError, rank0_print

# files that only resuming needs
_TRAINING_FILES = {"policy.pt", "reference.pt", "optimizer.pt", "scheduler.pt", "rng.pt", "state.json", SHARDS}
_REMEDY = "make room, or choose another output"


def run(config: DictConfig):
    """Check the command line, then export.

    Raises: UserError if there is no such checkpoint, if it is damaged or its base has changed, or if `output` isn't
        empty. Nothing is written then.
    """
    options = expand_home(OmegaConf.to_container(config, throw_on_missing=False))
    for key in ("run", "output"):
        if options[key] in ("???", None, ""):
            raise UserError(f"{key} is required: python export.py run=RUN output=DIR")
    run_dir, output = str(options["run"]), os.path.normpath(str(options["output"]))
    if not isinstance(options["checkpoint"], str) or options["checkpoint"] == "all":
        raise UserError(f"checkpoint={options['checkpoint']}: give one: LATEST, BEST or step-N")
    check_outputs([Output("output", output, refuse_nonempty_directory)])
    run_config = read_run_config(run_dir)
    (checkpoint,) = find_checkpoints(run_dir, options["checkpoint"])
    trust_remote_code = options.get("trust_remote_code") is True
    if os.path.exists(os.path.join(checkpoint, "adapter_config.json")):
        merge_adapter(checkpoint, run_config, output, trust_remote_code)
        rank0_print(f"Merged the adapter of {checkpoint} into its base; wrote the model to {output}")
        return
    if is_sharded(checkpoint):
        join_shards(checkpoint, run_config, output, trust_remote_code)
    else:
        copy_model(checkpoint, output)
    rank0_print(f"Wrote the model of {checkpoint} to {output}")


def copy_model(checkpoint: str, output: str):
    """Copy the model, tokenizer and model card of a whole checkpoint."""
    names = set(read_checksums(checkpoint)) - _TRAINING_FILES
    if "config.json" not in names:
        raise UserError(f"{checkpoint} holds no model for from_pretrained: it has no config.json")
    if os.path.exists(os.path.join(checkpoint, CARD)):  # it has no checksum
        names.add(CARD)
    with atomic_directory(output, _REMEDY) as partial:
        copy_files(names, checkpoint, partial)


def copy_files(names: Iterable[str], directory: str, output: str):
    """Copy files, given by their paths relative to `directory`."""
    for name in names:
        path = os.path.join(output, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        shutil.copyfile(os.path.join(directory, name), path)


def join_shards(checkpoint: str, run_config: DictConfig, output: str, trust_remote_code: bool):
    """Write the model of a sharded checkpoint, one file after another; arguments: see `merge_adapter`."""
    from checkpointing.checkpoints import empty_model, fill_model  # takes seconds to import
    from checkpointing.model_files import model_files

    quiet_libraries()
    model = empty_model(checkpoint, trust_remote_code)
    files = model_files(checkpoint, model)
    with atomic_directory(output, _REMEDY) as partial:
        if files is None:
            fill_model(model, checkpoint)
            model.save_pretrained(partial)
        else:
            files.write_all(partial)
        names = set(read_checksums(checkpoint)) - _TRAINING_FILES - {MODEL_INDEX}
        copy_files({name for name in names if not name.endswith(".safetensors")}, checkpoint, partial)
        write_card(partial, run_config, read_state_json(checkpoint), is_adapter=False)


def merge_adapter(checkpoint: str, run_config: DictConfig, output: str, trust_remote_code: bool):
    """Load the base that the run's config names, merge the adapter into it, and write the model.

    Args:
        trust_remote_code: allow the base's own code to run; the run's config can't allow it.
    """
    from models import load_adapter, load_model, read_tokenizer, set_end_tokens  # takes seconds to import

    quiet_libraries()
    state = read_state_json(checkpoint)
    try:
        run_config = OmegaConf.merge(own_keys("config") | {"model": own_keys("model/blank_model")}, run_config)
        expand_config(run_config)
        config = run_config.copy()
        config.model.load_in_4bit, config.model.adapter = False, checkpoint
        config.model.trust_remote_code = trust_remote_code
        source = policy_source(config)
        files = file_fingerprints(run_config)
    except UserError:
        raise
    except Exception as error:  # OmegaConf raises errors of many kinds
        raise UserError(f"{run_config.get('local_run_dir')}: can't read its config.yaml: {error}") from error
    bases = {key: digest for key, digest in files.items() if key.startswith("model.") and key != "model.adapter"}
    check_models_unchanged(run_config, [checkpoint], bases)
    tokenizer = read_tokenizer(config.model.tokenizer_name_or_path or config.model.name_or_path, config)
    tokenizer.chat_template = read_tokenizer(checkpoint, config).chat_template or tokenizer.chat_template
    model = load_adapter(load_model(config, config.model.policy_dtype), source, is_trainable=False)
    set_end_tokens(model, tokenizer)
    check_models_unchanged(run_config, [checkpoint], hub_revisions(config))
    with atomic_directory(output, _REMEDY) as partial:
        model.merge_and_unload().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_card(partial, run_config, state, is_adapter=False)


if __name__ == "__main__":
    command_line.main(run, "export")
