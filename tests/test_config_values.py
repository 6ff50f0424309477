"""Any value of a key works, or is refused by a message that names the key; no traceback, and nothing is ignored."""

import copy
import math

import pytest
from conftest import REPOSITORY, mark_exhaustive_except
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from commands.command_line import compose_config, for_hydra
from config_checks.checks import check_config
from config_checks.explanations import _OUR_LOSSES
from config_checks.schema import CONFIG_DIR, default_config
from losses import LOSSES
from utils import UserError, get_local_dir

NUMBERS = [-1, 0, 0.5, 1, 3, 1000, 1e300, 1e-320, 2**80, math.nan, math.inf, -math.inf, -0.0]
TEXTS = ["", " ", "x", "a b", "é", "1", "null"]
VALUES = [None, True, False, *NUMBERS, *TEXTS, [], [1], ["x"], [None], {}, {"a": 1}]
SOME_VALUES = [None, True, -1, 0.5, math.nan, "x", [1]]

# The values that check_config accepts, by key. For other keys with a boolean default, it accepts booleans; for the
# rest, the test doesn't say which.
POSITIVE_INTEGERS = [1, 3, 1000]
ACCEPTED = {
    "seed": [0, 1, 3, 1000],
    "exp_name": [*NUMBERS, *TEXTS[2:]],
    "batch_size": POSITIVE_INTEGERS,
    "eval_batch_size": POSITIVE_INTEGERS,
    "world_size": [None],
    "fsdp_port": [None],
    "fsdp_replicate": [1],
    "tensor_parallel": [1],
    "fsdp_cpu_offload": [False],
    "checkpoint_format": [],
    "checkpoint_async": [False],
    "datasets": [],
    "apply_chat_template": [False],  # toy is a built-in dataset
    "verbatim_responses": [False],
    "wandb.entity": [None, *TEXTS[2:]],
    "wandb.project": TEXTS[2:],
    "local_dirs": [["x"]],
    "n_eval_model_samples": [0, 1, 3, 1000],
    "local_run_dir": TEXTS[2:],
    "lr": [1e-320, 0.5, 1, 3, 1000, 2**80],
    "gradient_accumulation_steps": [1],
    "max_grad_norm": [1e-320, 0.5, 1, 3, 1000, 1e300, 2**80, math.inf],
    "max_length": [1000],
    "max_prompt_length": [1, 3],
    "n_epochs": POSITIVE_INTEGERS,
    "n_examples": [None, *POSITIVE_INTEGERS],
    "n_eval_examples": [None, *POSITIVE_INTEGERS],
    "trainer": [],
    "optimizer": [],
    "optimizer_args": [{}],
    "warmup_steps": [0, 0.5, 1e-320, 1, 3, 1000],
    "shared_prompt": [True, False],
    "padding_free": [True, False],
    "max_tokens_per_microbatch": [None, *POSITIVE_INTEGERS],
    "reference": [],
    "precompute_ref_log_probs": [False],  # loss=sft has no reference
    "lora": [None, {}],
    "eval_every": [1000],
    "save_every": [None, 1000],
    "keep_checkpoints": [None, *POSITIVE_INTEGERS],
    "resume": [None, *TEXTS[2:]],  # checked earlier
    "minimum_log_interval_secs": [-0.0, 0, 0.5, 1, 3, 1000, 1e300, 1e-320, 2**80],
    "model.name_or_path": ["x", "1", "null"],  # it may be on the hub
    "model.tokenizer_name_or_path": [None, "x", "1", "null"],
    "model.archive": [None],
    "model.adapter": [None],
    "model.load_in_4bit": [False],
    "model.block_name": [None, *TEXTS[2:]],
    "model.policy_dtype": [],
    "model.policy_mp": [None],
    "model.fsdp_policy_mp": [None],
    "model.reference_dtype": [None],
    "loss.beta": [0.5, 1, 3, 1000, 1e300, 1e-320, 2**80],
    "loss.label_smoothing": [-0.0, 0, 1e-320],
}


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """Return a function that composes the config of model=tiny with a loss."""
    local = tmp_path_factory.mktemp("local")

    def compose_with(*overrides: str):
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            words = ["model=tiny", "datasets=[toy]", "wandb.enabled=false", f"local_dirs=[{local}]", "exp_name=x"]
            return compose("config", for_hydra([*words, *overrides]))

    configs = {loss: compose_with(f"loss={loss}") for loss in LOSSES}
    return lambda loss: copy.deepcopy(configs[loss])


def same(value: object, other: object) -> bool:
    return type(value) is type(other) and repr(value) == repr(other)


@pytest.mark.parametrize("values", mark_exhaustive_except([SOME_VALUES, VALUES], SOME_VALUES), ids=["some", "all"])
@pytest.mark.parametrize("key", default_config())
def test_every_value_of_every_key_is_accepted_or_refused_by_name(key, values, composed):
    default = default_config()[key]
    option = key.partition(".")[2] if key.startswith("loss.") else None
    loss = next(name for name in LOSSES if option in LOSSES[name].options) if option else "sft"
    accepted = ACCEPTED.get(key, [True, False] if isinstance(default, bool) else None)
    if key.startswith("dataset_paths."):
        accepted = TEXTS[2:]  # paths of unused datasets aren't checked
    for value in values:
        config = composed(loss)
        passes = any(same(value, other) for other in accepted or [])
        try:
            with open_dict(config):  # a loss's YAML needn't list its modifiers
                OmegaConf.update(config, key, value, merge=False)
            OmegaConf.resolve(config)
            check_config(config)
        except (UserError, OmegaConfBaseException) as error:
            assert not passes, f"{key}={value!r} is refused: {error}"
            names = (key, key.split(".")[0], "trains in one process")  # the last is in the message about world_size
            assert any(name in str(error) for name in names), f"{key}={value!r}: {error}"
        else:
            assert passes or accepted is None, f"{key}={value!r} is accepted as {OmegaConf.select(config, key)!r}"


def test_other_names_of_losses_lead_to_existing_losses():
    assert set(_OUR_LOSSES.values()) <= LOSSES.keys()
    assert not _OUR_LOSSES.keys() & LOSSES.keys()


# ---- the command line -----------------------------------------------------------------------------------------------

REFUSED = {  # override: parts of the message
    "loss=null": ["loss=null", "expected the name of a file", "dpo"],
    "model=null": ["model=null", "expected the name of a file", "pythia28"],
    "loss=1": ["loss=1", "expected the name of a file"],
    "loss=[null]": ["loss=[null]", "expected the name of a file"],
    "~loss": ["loss.name=None", "dpo, ipo"],
    "~model": ["model.name_or_path", "model=NAME"],
    "~lr": ["the config lacks the key 'lr'"],
    "datasets={a:1}": ["datasets={a:1}", "Cannot merge DictConfig with ListConfig"],
    "wandb=null": ["wandb.enabled can't be set", "wandb must be a section of keys"],
    "wandb={foo:1}": ["no config key 'wandb.foo'"],
    "exp_name=é": ["can't read 'exp_name=é': 'é' must be quoted", "exp_name='é'"],
    "model.archive=/x/a=b": ["can't read 'model.archive=/x/a=b': a second '='", "model.archive='/x/a=b'"],
    "lr=1e300": ["lr=1e+300: must be at most 1e+38"],
    "n_eval_examples=1000000000000": ["n_eval_examples=1000000000000", "must be at most 10000000"],
    "exp_name=null": ["exp_name=None: expected a string"],
    "optimizer_args={maximize:x}": ["optimizer_args.maximize=x: expected true or false"],
    "optimizer_args={lr:1}": ["optimizer_args.lr: RMSprop takes no such argument", "key lr"],
    "dataset_paths.hh=./nowhere datasets=[hh]": ["dataset_paths.hh=./nowhere: there is no such folder"],
    "model.name_or_path=/no/where": ["model.name_or_path=/no/where: no such folder, and no id on the hub"],
    "model.tokenizer_name_or_path=a/b/c": ["model.tokenizer_name_or_path=a/b/c: no such folder"],
    "model.policy_mp=bfloat16 model.policy_dtype=float16": ["model.policy_dtype=float16"],
    # other libraries' names
    "learning_rate=1": ["'learning_rate'", "learning_rate is called lr here"],
    "lora.rank=8": ["lora.rank: LoraConfig has no such field", "rank is called lora.r here"],
    "lora={bias:nope}": ["lora.bias=nope: must be one of none, all, lora_only"],
    "lora={rank_pattern:x}": ["lora.rank_pattern=x: expected names with their values"],
    "optimizer=adamw": ["Did you mean AdamW?"],
    "optimizer=rmsprop": ["Did you mean RMSprop?"],
    "loss=DPO": ["no loss=DPO", "Did you mean dpo?"],
    "loss=ppo": ["no loss=ppo: it isn't implemented", "There are: aot, aot_unpaired, apo_down"],
    "loss=cdpo": ["loss=dpo with loss.label_smoothing above 0"],
    "loss=sigmoid": ["no loss=sigmoid: sigmoid is dpo here"],
    "loss=sppo_hard": ["no loss=sppo_hard: sppo_hard is sppo here"],
    "loss=ld_dpo": ["it is loss=dpo with loss.ld_alpha below 1"],
    "f_divergence_type=forward_kl": ["f_divergence_type is called loss.f_divergence here"],
    "loss_weights=[1]": ["loss=mix loss.parts={dpo: 0.8, sft: 0.2}"],
    "per_device_train_batch_size=4": ["batch_size counts the examples of all devices"],
    "num_train_epochs=1": ["num_train_epochs is called n_epochs here"],
    "output_dir=x": ["output_dir is called local_run_dir here"],
    "beta=1 loss=dpo": ["Did you mean loss.beta?"],
    "gradient_clipping=1": ["gradient_clipping is called max_grad_norm here"],
    "bf16=true": ["model.policy_mp=bfloat16"],
    "fp16=true": ["loss scaling", "model.policy_mp=bfloat16"],
    "model_name_or_path=x": ["model_name_or_path is called model.name_or_path here"],
    "dataset_name=x": ["dataset_name is called datasets here"],
    "warmup_ratio=0.1": ["warmup_steps between 0 and 1 is a fraction of the steps"],
    "Seed=1": ["Did you mean seed?"],
}
HYDRA_ERRORS = {
    "lr=${x}": ["Interpolation key 'x' not found", "lr"],
    "hydra.run.dir=/proc/nope": ["/proc/nope"],
    "hydra.mode=NOPE": ["hydra.mode=NOPE", "RUN, MULTIRUN"],
    "hydra.job.env_copy=[NOPE_]": ["NOPE_"],
    "hydra.verbose=[1]": ["A logger name must be a string"],
    "hydra.job.env_set={A:1}": ["hydra.job.env_set", "+hydra.job.env_set={A:1}"],
    "hydra=null": ["Hydra can't do that"],
}
LATE = {  # refused only once the model is loaded
    "optimizer=Adam optimizer_args={capturable:true}": ["optimizer=Adam", "capturable"],
    "optimizer=AdamW lr=1e38": ["lr=1e+38", "overflow"],
    "lora={inference_mode:true}": ["the model has no trainable parameters"],
}


@pytest.mark.parametrize("typed", REFUSED)
def test_mistyped_override_is_refused_with_an_explanation(typed, refusal, tmp_path):
    message = refusal("model=tiny", "datasets=[toy]", f"local_run_dir={tmp_path}/run", *typed.split())
    assert all(part in message for part in REFUSED[typed]), message
    assert list(tmp_path.iterdir()) == []


# one of each kind
TYPED = ["loss=null", "~lr", "exp_name=é", "learning_rate=1", "optimizer=adamw"]


@pytest.mark.slow
@pytest.mark.parametrize("typed", [*TYPED, *HYDRA_ERRORS, *LATE])
def test_command_line_refuses_with_a_single_message(typed, launcher, tmp_path):
    assert launcher.run("model=tiny", "datasets=[toy]", f"local_run_dir={tmp_path}/run", *typed.split()) == 1
    output = launcher.output
    assert "Traceback" not in output
    assert "Error executing job" not in output
    message = output[output.index("error: ") :]
    for part in {**REFUSED, **HYDRA_ERRORS, **LATE}[typed]:
        assert part in message
    assert ("building policy" in output) == (typed in LATE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_option_with_dashes_is_explained(launcher):
    assert launcher.run("model=tiny", "--learning_rate=1") == 2
    assert "unrecognized arguments: --learning_rate=1" in launcher.output
    assert "learning_rate is called lr here. Settings are given without dashes, as key=value" in launcher.output


@pytest.mark.parametrize("directories", [[], [None], [""], "cache", None])
def test_local_dirs_must_be_a_list_of_directories(directories):
    with pytest.raises(UserError, match=r"local_dirs=.*: expected a list of directories"):
        get_local_dir(directories)


# ---- recipes and models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in (REPOSITORY / "config/experiment").glob("*.yaml")))
def test_every_recipe_passes_the_check_and_shows_its_command(name):
    text = (REPOSITORY / "config/experiment" / f"{name}.yaml").read_text()
    assert f"python train.py +experiment={name}" in text
    config = compose_config(f"+experiment={name}", "model=tiny", "datasets=[toy]", "wandb.enabled=false")
    if not config.model.load_in_4bit:  # 4 bits need a GPU
        check_config(config)
    assert config.loss.name == {"hh_pythia28_sft": "sft", "kto_unpaired": "kto"}.get(name, "dpo")


@pytest.mark.parametrize("place", ["OWNER/NAME", "folder"])
def test_model_may_be_a_path_or_a_hub_id(place, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    config = compose_config(f"model={place}", "model.revision=main")
    assert (config.model.name_or_path, config.model.revision) == (place, "main")
    assert compose_config("model=pythia28").model.name_or_path == "EleutherAI/pythia-2.8b"


def test_several_tasks_of_srun_without_ranks_are_warned_of(monkeypatch, capsys, tmp_path):
    warning = "WARNING: srun has started this command 4 times, each as a run of its own"
    for n_tasks, is_expected in (("4", True), ("1", False)):
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", n_tasks)
        check_config(compose_config("model=tiny", "datasets=[toy]", f"local_run_dir={tmp_path}/run"))
        assert (warning in capsys.readouterr().out) == is_expected
