"""`model.revision`, `model.attn_implementation`, `model.trust_remote_code`, and messages when the hub refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ORACLE, mark_exhaustive_except
from hub_server import Hub
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from utils import UserError, get_local_dir

TOY = [
    "model=blank_model", "datasets=[toy]", "n_examples=4", "n_eval_examples=4", "max_length=64", "max_prompt_length=32",
    "sample_during_eval=false", "warmup_steps=0", "lr=1e-3", "loss=dpo",
]  # fmt: skip
LAST = "gpt_neox.final_layer_norm.weight"


# ---- revision -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_model(tmp_path, monkeypatch) -> str:
    """Return the id of a cached hub model whose tag v1 has other weights than its main branch."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    root = Path(get_local_dir([f"{tmp_path}/cache"])) / "models--someone--small"
    for number, (revision, scale) in enumerate((("main", 1.0), ("v1", 2.0))):
        commit = str(number) * 40
        snapshot = shutil.copytree(ORACLE / "model", root / "snapshots" / commit)
        state = load_file(snapshot / "model.safetensors")
        save_file({**state, LAST: state[LAST] * scale}, snapshot / "model.safetensors", metadata={"format": "pt"})
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / revision).write_text(commit)
    # tells which revision the tokenizer is read from
    path = root / "snapshots" / ("1" * 40) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 77}))
    return "someone/small"


@pytest.mark.parametrize("dtype", mark_exhaustive_except(["float32", "bfloat16"], "bfloat16"))
def test_revision_applies_to_policy_reference_and_tokenizer(dtype, make_trainer, hub_model):
    overrides = [*TOY, f"model.name_or_path={hub_model}", f"model.reference_dtype={dtype}"]
    newest, tagged = make_trainer(*overrides), make_trainer(*overrides, "model.revision=v1")
    for model in ("policy", "reference"):
        weights = []
        for trainer in (newest, tagged):
            module = trainer.policy if model == "policy" else trainer.reference.model
            weights.append(module.get_parameter(LAST))
        assert torch.equal(weights[0] * 2, weights[1])
    assert [trainer.tokenizer.model_max_length == 77 for trainer in (newest, tagged)] == [False, True]
    assert tagged.config.model.revision == "v1"
    with pytest.raises(UserError, match=r"can't load model\.name_or_path=someone/small.*v2"):
        make_trainer(*overrides, "model.revision=v2")


def test_revision_applies_to_no_other_model(make_trainer, hub_model):
    with pytest.raises(UserError, match=r"model\.revision=v1: model\.name_or_path=.* is a local folder"):
        make_trainer(*TOY, f"model.name_or_path={ORACLE}/model", "model.revision=v1")
    overrides = [f"model.name_or_path={hub_model}", "model.revision=v1", f"reference_model.name_or_path={ORACLE}/model",
                 f"model.tokenizer_name_or_path={ORACLE}/model"]  # fmt: skip
    trainer = make_trainer(*TOY, *overrides)
    assert torch.equal(trainer.reference.model.get_parameter(LAST) * 2, trainer.policy.get_parameter(LAST))
    assert trainer.tokenizer.model_max_length != 77


# ---- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", mark_exhaustive_except(["float32", "bfloat16"], "float32"))
def test_attn_implementation_is_used_and_changes_no_numbers(reference, make_trainer):
    losses = {}
    for name in ("eager", "sdpa"):
        overrides = [f"model.name_or_path={ORACLE}/model", f"model.attn_implementation={name}"]
        trainer = make_trainer(*TOY, *overrides, f"model.reference_dtype={reference}")
        assert trainer.policy.config._attn_implementation == name
        assert trainer.reference.model.config._attn_implementation == name
        losses[name] = trainer.get_batch_metrics(trainer.eval_batches[0], trainer.config.loss)[1]["logps_train/chosen"]
    torch.testing.assert_close(losses["eager"], losses["sdpa"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["flash_attn_2"], r"model\.attn_implementation=flash_attn_2: .*Did you mean flash_attention_2\?"),
        (["spda"], r"must be one of eager, sdpa, .*; null lets transformers choose\. Did you mean sdpa\?"),
        (["1"], r"model\.attn_implementation=1: expected a string"),
        (["flash_attention_2"], r"flash_attention_2 needs a GPU and the package flash_attn; sdpa needs neither"),
        (["flex_attention"], r"flex_attention needs a GPU"),
        (["flash_attention_3"], r"flash_attention_3 needs a GPU and the package flash_attn_interface"),
    ],
    ids=str,
)
def test_unusable_attn_implementation_is_refused(overrides, message, make_trainer):
    if torch.cuda.is_available() and "needs a GPU" in message:
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=message):
        make_trainer(*TOY, f"model.name_or_path={ORACLE}/model", f"model.attn_implementation={overrides[0]}")


# ---- remote code ----------------------------------------------------------------------------------------------------

CONFIGURATION = """
from transformers import GPTNeoXConfig

class OwnConfig(GPTNeoXConfig):
    model_type = "own_model"
"""
MODELING = """
from transformers import GPTNeoXForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(GPTNeoXForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path) -> str:
    """Write a model folder that contains code; return its path."""
    directory = shutil.copytree(ORACLE / "model", tmp_path / "own_model")
    (directory / "configuration_own.py").write_text(CONFIGURATION)
    (directory / "modeling_own.py").write_text(MODELING)
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = json.loads((directory / "config.json").read_text())
    # transformers renames the head at loading, but only for model types that it knows
    state = load_file(directory / "model.safetensors")
    state["lm_head.weight"] = state.pop("embed_out.weight")
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config |= {"model_type": "own_model", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", mark_exhaustive_except(["BasicTrainer", "FSDPTrainer"], "BasicTrainer"))
def test_remote_code_runs_only_with_trust_remote_code(trainer, own_code, train_from_hub, hub_address, tmp_path):
    overrides = [*TOY, f"model.name_or_path={own_code}", f"trainer={trainer}", f"local_run_dir={tmp_path}/run"]
    n_workers = 2 if trainer == "FSDPTrainer" else 1
    result = train_from_hub(*overrides, n_workers=n_workers)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "model.trust_remote_code=true runs the model's own code with your permissions" in result.stderr
    assert not list(hub_address.home.rglob("modules/**/modeling_own.py"))

    result = train_from_hub(*overrides, "model.trust_remote_code=true", n_workers=n_workers)
    assert result.returncode == 0, result.stdout + result.stderr
    line = f"model.trust_remote_code=true: running the code of {own_code}: configuration_own.OwnConfig, modeling_own"
    # BasicTrainer copies the policy as the reference; FSDPTrainer loads the reference again
    assert result.stdout.count(line) == (1 if trainer == "BasicTrainer" else 2)
    assert "trust_remote_code: true" in (tmp_path / "run/config.yaml").read_text()
    latest = tmp_path / "run/LATEST"
    assert (latest / "modeling_own.py").exists()
    model = AutoModelForCausalLM.from_pretrained(latest, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"

    again = [*TOY, f"model.name_or_path={own_code}", f"model.archive={latest}", f"local_run_dir={tmp_path}/next"]
    result = train_from_hub(*again)
    assert result.returncode == 1
    result = train_from_hub(*again, "model.trust_remote_code=true")
    assert result.returncode == 0, result.stdout + result.stderr


# ---- refused by the hub ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "status", "code"),
    mark_exhaustive_except(
        (
            (key, *refusal)
            for key in ("model.name_or_path", "model.archive", "model.tokenizer_name_or_path")
            for refusal in ((401, "GatedRepo"), (403, "GatedRepo"), (401, "RepoNotFound"), (403, ""))
        ),
        ("model.name_or_path", 403, ""),
        ("model.archive", 401, "GatedRepo"),
        ("model.tokenizer_name_or_path", 401, "RepoNotFound"),
    ),
)
def test_error_for_a_model_refused_by_the_hub_names_the_token(key, status, code, train_from_hub, hub_address):
    model = [] if key == "model.name_or_path" else [f"model.name_or_path={ORACLE}/model"]
    with Hub(hub_address) as hub:
        hub.status[""] = status, code
        result = train_from_hub(*TOY, *model, f"{key}=meta/private-model")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    message = result.stderr[result.stderr.index("error: ") :]
    assert key in message
    assert "meta/private-model" in message
    assert "`hf auth login`" in message
    assert "HF_TOKEN" in message
