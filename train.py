"""Train a language model with SFT, DPO or IPO: `python train.py model=tiny datasets=[toy] loss=sft`."""

import os
import socket
import sys

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configuration import REPOSITORY, check_config, explain_hydra_error
from utils import UserError, disable_dropout, get_local_dir, get_local_run_dir

OmegaConf.register_new_resolver("get_local_run_dir", get_local_run_dir, replace=True)
OmegaConf.register_new_resolver("repository", lambda: str(REPOSITORY), replace=True)


def load_model(config: DictConfig, dtype: str):
    """The configured model, without dropout: pre-trained, or with `from_scratch` drawn from the seed.

    Raises: UserError if there is no such model, or none that can be loaded.
    """
    import torch
    import transformers

    name, cache_dir = config.model.name_or_path, get_local_dir(config.local_dirs)
    try:
        if config.model.from_scratch:
            torch.manual_seed(config.seed)
            model_config = transformers.AutoConfig.from_pretrained(name, cache_dir=cache_dir)
            model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=getattr(torch, dtype))
            model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                name, cache_dir=cache_dir, dtype=getattr(torch, dtype), device_map="balanced"
            )
    except (OSError, ValueError) as error:
        raise UserError(
            f"can't load model.name_or_path={name}: {str(error).strip()}\n"
            "Give the id of a causal language model on the hub (for a gated one, log in with `hf auth login`), "
            "or a local folder"
        ) from error
    disable_dropout(model)
    return model


def load_models(config: DictConfig):
    """The policy, and the reference model if the loss needs one (else None); both get `model.archive`."""
    from checkpoints import load_archive
    from losses import needs_reference

    print("building policy")
    policy, reference_model = load_model(config, config.model.policy_dtype), None
    if needs_reference(config.loss):
        print("building reference model")
        reference_model = load_model(config, config.model.reference_dtype)
    if config.model.archive is not None:
        load_archive(config.model.archive, [model for model in (policy, reference_model) if model is not None])
    return policy, reference_model


def create_run_dir(config: DictConfig):
    """Create the run directory with the config in it; nothing before this writes anything but caches."""
    try:
        os.makedirs(config.local_run_dir, exist_ok=True)
        OmegaConf.save(config, os.path.join(config.local_run_dir, "config.yaml"))
    except OSError as error:
        raise UserError(f"local_run_dir={config.local_run_dir}: can't write there: {error}") from error
    print("=" * 80)
    print(f"Writing to {socket.gethostname()}:{config.local_run_dir}")
    print("=" * 80, flush=True)


def run(config: DictConfig):
    """Check the config, load the models, train and save."""
    OmegaConf.resolve(config)
    check_config(config)
    print(OmegaConf.to_yaml(config))

    import trainers

    policy, reference_model = load_models(config)
    trainer_class = getattr(trainers, config.trainer)
    trainer = trainer_class(policy, config, config.seed, config.local_run_dir, reference_model=reference_model)
    create_run_dir(config)
    trainer.train()
    trainer.save()


def main():
    """Run under Hydra. A user's mistake ends with its message alone; HYDRA_FULL_ERROR=1 shows where it was noticed."""
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra hands every error on as it is
    # the keys of optimizer_args are the optimizer's own, so Hydra has to take them without knowing them
    sys.argv[1:] = [f"++{word}" if word.startswith("optimizer_args") else word for word in sys.argv[1:]]
    try:
        hydra.main(version_base="1.3", config_path="config", config_name="config")(run)()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if full_error:
            raise
        sys.exit(f"error: {error if isinstance(error, UserError) else explain_hydra_error(error)}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
