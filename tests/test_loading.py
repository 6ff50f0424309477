"""Loading refuses weights that are missing, left over, damaged or of the wrong type, and adapters that don't fit.

The error names the weights or the file.
"""

import json
import re
import shutil

import pytest
import torch
import transformers
from conftest import ORACLE, REPOSITORY, mark_exhaustive_except, trainers_in
from safetensors.torch import load_file, save_file
from test_checkpoints import CONFIGS, LAYER_BUFFERS
from transformers import AutoModelForCausalLM

from checkpointing.archives import describe, load_pretrained
from utils import UserError

RUN = ["datasets=[toy]", "n_examples=8", "n_eval_examples=8", "max_length=64", "max_prompt_length=32",
       "sample_during_eval=false"]  # fmt: skip


@pytest.fixture
def model_dir(tmp_path):
    """Return a copy of the recorded runs' model folder, to be damaged."""
    return shutil.copytree(ORACLE / "model", tmp_path / "model")


@pytest.fixture
def make_damaged(make_trainer, model_dir):
    def make(*overrides: str):
        return make_trainer("model=blank_model", f"model.name_or_path={model_dir}", *RUN, *overrides)

    return make


def edit_weights(path, edit):
    state = load_file(path)
    save_file(edit(state), path, metadata={"format": "pt"})


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---- the base model -------------------------------------------------------------------------------------------------

FIRST, LAST = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight", "gpt_neox.final_layer_norm.weight"
MISFITS = {  # an edit of the weights, changes to config.json, and the message
    "tensors removed": (lambda s: {k: v for k, v in s.items() if k not in (FIRST, LAST)}, {},
                        f"missing: {LAST}\n  missing: {FIRST}"),
    "a key renamed": (lambda s: {k.replace(LAST, "gpt_neox.final_norm.weight"): v for k, v in s.items()}, {},
                      f"missing: {LAST}"),
    "all keys renamed": (lambda s: {f"policy.{k}": v for k, v in s.items()}, {}, "missing: .*\n(.*\n)*  and .* more"),
    "too many layers in config": (None, {"num_hidden_layers": 3}, r"missing: gpt_neox\.layers\.2\..*\n  and 2 more"),
    "too few layers in config": (None, {"num_hidden_layers": 1}, "left over: gpt_neox.layers.1.*\n  and 2 more"),
    "another shape": (lambda s: {**s, LAST: torch.ones(3)}, {}, re.escape(f"{LAST}: shape (3,), the model's is (64,)")),
    "another width in config.json": (None, {"hidden_size": 128}, r"embed_in.weight: shape \(512, 64\), .*512, 128"),
    "another architecture": (None, {"model_type": "gpt2"}, "missing: transformer"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_base_model_whose_weights_do_not_fit_is_refused(name, make_damaged, model_dir):
    edit, settings, message = MISFITS[name]
    if edit is not None:
        edit_weights(model_dir / "model.safetensors", edit)
    edit_json(model_dir / "config.json", **settings)
    pattern = rf"(?s)model\.name_or_path={model_dir} doesn't fit the model.*{message}"
    with pytest.raises(UserError, match=pattern) as caught:
        make_damaged()
    assert str(caught.value).count("\n") <= 11


def test_model_folder_given_as_archive_must_fit_too(make_damaged, model_dir, tmp_path):
    archive = shutil.copytree(model_dir, tmp_path / "archive")
    edit_json(archive / "config.json", num_hidden_layers=1)
    with pytest.raises(UserError, match=rf"model\.archive={archive} doesn't fit the model.*\n  left over: gpt_neox"):
        make_damaged(f"model.archive={archive}")


@pytest.mark.parametrize("name", CONFIGS)
def test_hub_model_of_2023_with_its_old_buffers_loads(name, tmp_path, capsys):
    config = CONFIGS[name]
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)

    def as_in_2023(state):
        if config.model_type == "gpt_neox":
            state["embed_out.weight"] = state.pop("embed_out.weight", state.pop("lm_head.weight", None))
        for layer in range(config.num_hidden_layers):
            for buffer in LAYER_BUFFERS[config.model_type]:
                state[buffer.format(layer)] = torch.ones(1, 1, 4, 4)
        # GPT-2's files on the hub are those of the base model
        return {k.removeprefix("transformer.") if config.model_type == "gpt2" else k: v for k, v in state.items()}

    edit_weights(tmp_path / "model.safetensors", as_in_2023)
    loaded = load_pretrained(str(tmp_path), "x", dtype=torch.float32)
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert "left out" not in capsys.readouterr().out


def test_extra_head_is_ignored_with_a_message(model_dir, capsys):
    edit_weights(model_dir / "model.safetensors", lambda s: {**s, "v_head.summary.weight": torch.ones(1, 64)})
    load_pretrained(str(model_dir), "model.name_or_path=x", dtype=torch.float32)
    assert "model.name_or_path=x: ignored weights of parts that GPTNeoXForCausalLM lacks: v_head.summary.weight" in (
        capsys.readouterr().out
    )


def test_tied_weights_are_saved_once_and_required(tmp_path):
    model = AutoModelForCausalLM.from_config(CONFIGS["gpt2-large"])
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load_pretrained(str(tmp_path), "x", dtype=torch.float32)
    edit_weights(tmp_path / "model.safetensors", lambda s: {k: v for k, v in s.items() if "wte" not in k})
    with pytest.raises(UserError, match=r"missing: lm_head\.weight\n  missing: transformer\.wte\.weight"):
        load_pretrained(str(tmp_path), "x", dtype=torch.float32)


BROKEN_MODELS = {  # a file of the model's folder, and its new content
    "config.json: no JSON": ("config.json", "{"),
    "config.json: empty": ("config.json", ""),
    "config.json: a list": ("config.json", "[1]"),
    "config.json: null": ("config.json", "null"),
    "config.json: a string for a number": ("config.json", '{"model_type": "gpt_neox", "hidden_size": "wide"}'),
    "config.json: a negative number": ("config.json", '{"model_type": "gpt_neox", "hidden_size": -64}'),
    "config.json: unknown architecture": ("config.json", '{"model_type": "gpt_nex"}'),
    "config.json: no architecture": ("config.json", "{}"),
    "config.json: an image model": ("config.json", '{"model_type": "vit"}'),
    "model.safetensors: empty": ("model.safetensors", ""),
    "model.safetensors: text": ("model.safetensors", "hello" * 99),
    "tokenizer.json: no JSON": ("tokenizer.json", "{"),
    "tokenizer.json: empty": ("tokenizer.json", ""),
    "tokenizer.json: a list": ("tokenizer.json", "[]"),
    "tokenizer.json: another object": ("tokenizer.json", '{"model": 1}'),
    "tokenizer_config.json: no JSON": ("tokenizer_config.json", "{"),
    "tokenizer_config.json: a list": ("tokenizer_config.json", "[]"),
    "tokenizer_config.json: a number for a token": ("tokenizer_config.json", '{"eos_token": 7}'),
}


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_malformed_model_folder_is_named(name, make_damaged, model_dir):
    file, text = BROKEN_MODELS[name]
    (model_dir / file).write_text(text)
    key = "the tokenizer" if file.startswith("tokenizer") else "model.name_or_path="
    with pytest.raises(UserError, match=rf"{key}.*{model_dir}"):
        make_damaged()


@pytest.mark.parametrize("key", ["model.name_or_path", "model.tokenizer_name_or_path"])
def test_file_given_as_a_model_folder_is_refused_with_the_folder(key, make_damaged, model_dir):
    with pytest.raises(UserError, match=rf"{key}={model_dir}/config.json is a file: .*, {model_dir}$"):
        make_damaged(f"{key}={model_dir}/config.json")


@pytest.mark.parametrize("key", ["model.name_or_path", "model.archive", "model.adapter", "reference_model.archive"])
def test_run_directory_given_instead_of_its_checkpoint_is_refused(key, make_damaged, model_dir, tmp_path):
    (tmp_path / "run" / "LATEST").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(UserError, match=rf"{key}={tmp_path}/run is a run directory: .*, {key}={tmp_path}/run/LATEST"):
        make_damaged("loss=dpo", f"{key}={tmp_path}/run")


def test_run_directory_may_be_the_current_directory(make_damaged, model_dir, tmp_path, monkeypatch):
    (tmp_path / "run" / "LATEST").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("")
    monkeypatch.chdir(tmp_path / "run")
    assert make_damaged("loss=dpo").config.model.archive is None


def test_remedy_for_a_damaged_model_folder_is_another_copy(make_damaged, model_dir):
    (model_dir / "model.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match="\nCopy or download the folder again, or name another"):
        make_damaged()


@pytest.mark.parametrize("key", ["model.name_or_path", "model.archive"])
def test_git_lfs_pointer_in_place_of_weights_is_named(key, make_damaged, model_dir, tmp_path):
    pointing = shutil.copytree(model_dir, tmp_path / "pointing")
    (pointing / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    with pytest.raises(UserError, match=r"model\.safetensors is a Git LFS pointer.*: get them with git lfs pull"):
        make_damaged(f"{key}={pointing}")


def test_pickle_that_is_no_model_is_refused_without_advice_to_run_it(make_damaged, model_dir):
    (model_dir / "model.safetensors").unlink()
    for value in (print, [1], {"x": print}, {"gpt_neox.embed_in.weight": 3}):
        torch.save(value, model_dir / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"model\.name_or_path=") as caught:
            make_damaged()
        assert "weights_only" not in str(caught.value)
    (model_dir / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.name_or_path="):
        make_damaged()


def test_non_finite_base_weights_are_named(make_damaged, model_dir):
    edit_weights(model_dir / "model.safetensors", lambda s: {**s, LAST: s[LAST] / 0 * 0})
    with pytest.raises(UserError, match=f"model.name_or_path={model_dir}: weights that are NaN .* in float32: {LAST}"):
        make_damaged()


def test_weights_that_the_references_dtype_cannot_hold_are_named(make_damaged, model_dir):
    edit_weights(model_dir / "model.safetensors", lambda s: {**s, LAST: torch.full_like(s[LAST], 1e5)})
    make_damaged("loss=dpo")
    with pytest.raises(UserError, match=f"weights that are NaN or infinite in float16: {LAST}"):
        make_damaged("loss=dpo", "model.reference_dtype=float16")


# ---- archives -------------------------------------------------------------------------------------------------------


def with_one(tensor):
    """Return an edit of a state dict that changes one tensor."""
    return lambda state: {**state, LAST: tensor(state[LAST])}


BAD_STATES = {
    "NaN": (with_one(lambda t: t * float("nan")), f"NaN or infinite in float32: {LAST}"),
    "infinity": (with_one(lambda t: torch.full_like(t, float("inf"))), f"NaN or infinite in float32: {LAST}"),
    "integers": (with_one(lambda t: t.long()), f"{LAST}: int64, the model's is float32"),
    "booleans": (with_one(lambda t: t > 0), f"{LAST}: bool, the model's is float32"),
    "complex": (with_one(lambda t: t.cfloat()), f"{LAST}: complex64, the model's is float32"),
    "meta": (with_one(lambda t: t.to("meta")), f"{LAST} is a tensor without values .*; save it as a dense tensor"),
    "sparse": (with_one(lambda t: t.to_sparse()), f"{LAST} is a tensor of the layout torch.sparse_coo; save it as"),
    "no tensor": (with_one(lambda t: t.tolist()), f"more than named tensors: '{LAST}' is a list; save the weights"),
    "integer keys": (lambda s: dict(enumerate(s.values())), "more than named tensors: 0 is a Tensor; save the weights"),
    "a list": (lambda s: list(s.values()), "can't read it as a checkpoint"),
    "a tensor": (lambda s: s[LAST], "can't read it as a checkpoint"),
    "nothing": (lambda s: {}, "missing: .*\n(.*\n)*  and .* more"),
}


@pytest.fixture
def state(model_dir):
    state = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    return {key: tensor.clone() for key, tensor in state.items()}


@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_archive_state_is_refused_with_its_reason(name, make_damaged, state, tmp_path):
    edit, message = BAD_STATES[name]
    torch.save({"step_idx": 1, "state": edit(state), "metrics": {}}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=rf"(?s)model\.archive={tmp_path}/bad\.pt.*{message}"):
        make_damaged(f"model.archive={tmp_path}/bad.pt")


@pytest.mark.parametrize(
    "content",
    [
        print,
        {"step_idx": 1, "state": {"x": print}, "metrics": {}},
        3,
        [],
        {},
        {"state": {}},
        {1: 2},
        None,
        b"",
        b"junk",
    ],
    ids=str,
)
def test_file_that_is_no_archive_is_refused_without_advice_to_run_it(content, make_damaged, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / "bad.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=rf"model\.archive={tmp_path}/bad\.pt: can't read it as a checkpoint") as caught:
        make_damaged(f"model.archive={tmp_path}/bad.pt")
    assert "weights_only" not in str(caught.value)
    assert "trust" not in str(caught.value)


def test_archive_in_another_floating_dtype_loads(make_damaged, state, tmp_path):
    half = {key: tensor.half() for key, tensor in state.items()}
    torch.save({"step_idx": 1, "state": half, "metrics": {}}, tmp_path / "half.pt")
    policy = make_damaged(f"model.archive={tmp_path}/half.pt").policy
    assert torch.equal(policy.state_dict()[FIRST], half[FIRST].float())


def test_untied_archive_of_a_tied_model_is_refused(make_trainer, tmp_path):
    shutil.copytree(REPOSITORY / "assets" / "tiny", tmp_path / "gpt2")
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=64, vocab_size=2048, bos_token_id=0,
                                     eos_token_id=0)  # fmt: skip
    config.save_pretrained(tmp_path / "gpt2")
    state = {key: tensor.clone() for key, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    state["lm_head.weight"] += 1
    torch.save({"step_idx": 1, "state": state, "metrics": {}}, tmp_path / "bad.pt")
    overrides = ["model=tiny", f"model.name_or_path={tmp_path}/gpt2", f"model.archive={tmp_path}/bad.pt", *RUN]
    with pytest.raises(UserError, match=r"is not equal to .*, which the model ties it to"):
        make_trainer(*overrides)


# ---- adapters -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def new_adapter(tmp_path_factory):
    """Return the directory of a new adapter."""
    directory = tmp_path_factory.mktemp("adapter")
    overrides = ["model=blank_model", f"model.name_or_path={ORACLE}/model", *RUN, "lora={r:2}", "loss=sft"]
    trainers_in(directory)(*overrides).policy.save_pretrained(directory / "adapter")
    return directory / "adapter"


@pytest.fixture
def adapter(new_adapter, tmp_path):
    """Return a copy of `new_adapter`, to be damaged."""
    return shutil.copytree(new_adapter, tmp_path / "adapter")


BROKEN_ADAPTERS = {
    "config: no JSON": ("adapter_config.json", "{"),
    "config: empty": ("adapter_config.json", ""),
    "config: a list": ("adapter_config.json", "[]"),
    "config: another method": ("adapter_config.json", '{"peft_type": "IA3"}'),
    "config: no method": ("adapter_config.json", "{}"),
    "config: rank 0": ("adapter_config.json", '{"peft_type": "LORA", "r": 0, "target_modules": ["dense"]}'),
    "config: a string as rank": ("adapter_config.json", '{"peft_type": "LORA", "r": "x", "target_modules": ["dense"]}'),
    "config: no targets": ("adapter_config.json", '{"peft_type": "LORA", "target_modules": 5}'),
    "weights: empty": ("adapter_model.safetensors", ""),
    "weights: text": ("adapter_model.safetensors", "hello" * 99),
}


@pytest.mark.parametrize("name", BROKEN_ADAPTERS)
@pytest.mark.parametrize("loss", mark_exhaustive_except(["sft", "dpo"], "dpo"))
def test_malformed_adapter_is_named(name, loss, make_damaged, adapter):
    file, text = BROKEN_ADAPTERS[name]
    (adapter / file).write_text(text)
    with pytest.raises(UserError, match=rf"model\.adapter={adapter}: "):
        make_damaged(f"model.adapter={adapter}", f"loss={loss}")


def test_adapter_given_as_the_model_is_refused_with_the_keys_to_set(make_damaged, adapter):
    message = rf"model.name_or_path={adapter} holds a LoRA adapter, not a model: give its base as model.name_or_path="
    with pytest.raises(UserError, match=f"{message}{ORACLE}/model, and model.adapter={adapter}"):
        make_damaged(f"model.name_or_path={adapter}")


def test_pickle_that_is_no_adapter_is_refused_without_advice_to_run_it(make_damaged, adapter):
    (adapter / "adapter_model.safetensors").unlink()
    for value in (print, {"x": print}, [1], {"x": 1}, {1: torch.ones(1)}):
        torch.save(value, adapter / "adapter_model.bin")
        with pytest.raises(UserError, match=rf"model\.adapter={adapter}: can't load it") as caught:
            make_damaged(f"model.adapter={adapter}")
        assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: {k.replace("layers.1", "layers.2"): v for k, v in s.items()}, "missing adapter keys"),
        (
            lambda s: {**s, **{k.replace("layers.1", "layers.2"): v + 1 for k, v in s.items()}},
            "no place for .*layers.2",
        ),
        (lambda s: {k: v * float("nan") for k, v in s.items()}, "weights that are NaN"),
        (lambda s: {k: v[:1] for k, v in s.items()}, "size mismatch"),
    ],
    ids=["missing", "left over", "NaN", "shapes"],
)
def test_adapter_that_does_not_fit_is_refused(edit, message, make_damaged, adapter):
    edit_weights(adapter / "adapter_model.safetensors", edit)
    with pytest.raises(UserError, match=rf"(?s)model\.adapter={adapter}: .*{message}"):
        make_damaged(f"model.adapter={adapter}")


BAD_LORA = {
    "lora={r:0}": r"lora\.r=0: the rank must be an integer above 0",
    "lora={r:-1}": r"lora\.r=-1",
    "lora={r:abc}": r"lora\.r=abc",
    "lora={r:1.5}": r"lora\.r=1\.5",
    "lora={lora_alpha:abc}": r"lora\.lora_alpha=abc: expected a number",
    "lora={lora_alpha:[1]}": r"lora\.lora_alpha=\[1\]: expected a number",
    "lora={lora_alpha:nan}": r"lora\.lora_alpha=nan: expected a number",
    "lora={lora_dropout:abc}": r"lora\.lora_dropout=abc: all dropout is off here",
    "lora={use_rslora:abc}": r"lora\.use_rslora=abc: expected true or false",
    "lora={target_modules:5}": r"lora\.target_modules=5: expected a list of names",
    "lora={target_modules:[5]}": r"lora\.target_modules=\[5\]: expected a list of names",
    "lora={target_modules:{a:1}}": r"lora\.target_modules=.*: expected a list of names",
    "lora={target_modules:'('}": r"lora=",
    "lora={target_modules:[dens]}": r"the model has no 'dens'\. Did you mean dense\? It has: .*query_key_value",
    "lora={target_modules:[dense,foo]}": r"the model has no 'foo'\. It has: .*query_key_value",
    "lora={exclude_modules:[foo]}": r"the model has no 'foo'\. It has: .*query_key_value",
    "lora={exclude_modules:foo.*}": r"no modules were excluded",
    "lora={modules_to_save:[foo]}": r"modules_to_save.*the model has no 'foo'\. It has: .*query_key_value",
    "lora={modules_to_save:embed_in}": r"lora\.modules_to_save=embed_in: expected a list of names",
    "lora={target_parameters:[foo]}": r"target_parameters.*no 'foo'\. It has: .*dense\.weight",
    "lora={rank_pattern:{foo:4}}": r"lora=.*rank_pattern",
    "lora={layers_to_transform:[0,99]}": r"lora=.*the model has the indices 0 to 1",
    "lora={trainable_token_indices:[]}": r"lora=.*the model has the indices 0 to \d+",
    "lora={trainable_token_indices:{embed_in:[-1]}}": r"lora=.*the model has the indices 0 to \d+",
    "lora={fan_in_fan_out:true}": r"lora=.*fan_in_fan_out is set to True but",
    "lora={loftq_config:{loftq_bits:4}}": r"lora=.*will be ignored",
    "lora={ensure_weight_tying:true}": r"lora=.*no tied modules",
    "lora={init_lora_weights:eva}": r"lora\.init_lora_weights=eva: this initialization needs a pass over data",
    "lora={lora_alpha:0}": r"lora\.lora_alpha=0: it scales the adapter",
    "lora={use_qalora:true}": r"lora\.use_qalora=True: it is for GPTQ's weights",
    "lora={peft_type:IA3}": r"lora\.peft_type=IA3: PEFT fills it in itself",
    "lora={velora_config:{x:1}}": r"lora\.velora_config\.x: VeloraConfig has no such field\. It has: num_groups",
    "lora={rank_pattern:[1]}": r"lora\.rank_pattern=\[1\]: expected names with their values",
    "lora={init_lora_weights:abc}": r"lora=",
    "lora={bias:abc}": r"lora\.bias=abc: must be one of none, all, lora_only",
    "lora={task_type:abc}": r"lora=",
}


@pytest.mark.parametrize("override", BAD_LORA)
def test_impossible_lora_value_is_named(override, make_damaged):
    with pytest.raises(UserError, match=rf"(?s)lora.*{BAD_LORA[override]}|^{BAD_LORA[override]}"):
        make_damaged(override)


def test_lora_accepts_module_names_that_exist(make_damaged):
    overrides = ["lora={r:2,target_modules:[dense],modules_to_save:[embed_in],exclude_modules:[layers.1.mlp.dense]}"]
    with pytest.raises(UserError, match=r"no 'layers\.1\.mlp\.dense'"):
        make_damaged(*overrides)
    trained = dict(make_damaged(overrides[0].replace("mlp.dense", "attention.dense")).policy.named_parameters())
    names = [name for name, parameter in trained.items() if parameter.requires_grad]
    assert any("embed_in" in name for name in names)
    assert {name.split(".layers.")[1][0] for name in names if "lora_A" in name} == {"0"}


@pytest.fixture
def tied_dir(tmp_path):
    """Return the folder of a tiny Llama with tied embeddings and the recorded runs' tokenizer."""
    directory = shutil.copytree(ORACLE / "model", tmp_path / "tied")
    (directory / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapter_on_a_tied_head_is_refused(target, tied_dir, make_trainer):
    with pytest.raises(UserError, match=r"output head is its input embedding .*lora.modules_to_save"):
        make_tied(make_trainer, tied_dir, f"r:2,target_modules:[q_proj,{target}]")


@pytest.mark.parametrize("lora", ["r:2", "r:2,target_modules:[q_proj],modules_to_save:[lm_head]"])
def test_merged_adapter_of_a_tied_model_gives_the_same_logits(lora, tied_dir, make_trainer, tmp_path):
    policy = make_tied(make_trainer, tied_dir, lora).policy
    ids = torch.arange(20)[None]
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = policy(ids).logits
        policy.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


def make_tied(make_trainer, directory, lora: str):
    return make_trainer("model=blank_model", f"model.name_or_path={directory}", *RUN, "loss=dpo", f"lora={{{lora}}}")


# ---- optimizer and dtype --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer_args={foreach:abc}"], r"optimizer_args\.foreach=abc: expected true or false"),
        (["optimizer_args={foreach:1}"], r"optimizer_args\.foreach=1: expected true or false"),
        (["optimizer_args={centered:abc}"], r"optimizer_args\.centered=abc: expected true or false"),
        (["optimizer_args={momentum:abc}"], r"optimizer_args\.momentum=abc: expected a number"),
        (["optimizer_args={momentum:true}"], r"optimizer_args\.momentum=True: expected a number"),
        (["optimizer_args={eps:null}"], r"optimizer_args\.eps=None: expected a number"),
        (["optimizer=Adam", "optimizer_args={betas:0.9}"], r"optimizer_args\.betas=0.9: expected 2 numbers"),
        (["optimizer=Adam", "optimizer_args={betas:[0.9]}"], r"optimizer_args\.betas=\[0.9\]: expected 2 numbers"),
        (["optimizer=Adam", "optimizer_args={betas:[0.9,a]}"], r"betas=\[0.9, 'a'\]: expected 2 numbers"),
        (["optimizer=Adam", "optimizer_args={fused:true,foreach:true}"], r"optimizer=Adam lr=.* optimizer_args="),
        (["model.policy_dtype=float16"], r"model\.policy_dtype=float16: .*loss scaling.*bfloat16"),
    ],
    ids=str,
)  # fmt: skip
def test_impossible_optimizer_arguments_and_dtypes_are_refused(overrides, message, make_trainer):
    with pytest.raises(UserError, match=message):
        make_trainer("model=tiny", *RUN, *overrides)


def test_valid_optimizer_arguments_are_accepted(make_trainer):
    for overrides in (
        ["optimizer_args={foreach:false,momentum:1,centered:true}"],
        ["optimizer=Adam", "optimizer_args={betas:[0.9,0.95],foreach:null}"],
        ["optimizer=Adafactor", "optimizer_args={eps:[null,0.01]}"],
    ):
        make_trainer("model=tiny", *RUN, *overrides)


def test_torch_pickle_errors_are_shortened_to_their_reason(tmp_path):
    torch.save(print, tmp_path / "x.pt")
    with pytest.raises(Exception) as caught:
        torch.load(tmp_path / "x.pt", weights_only=True)
    assert "weights_only" in str(caught.value)
    assert re.fullmatch(r"UnpicklingError: Unsupported global: GLOBAL .*print.* default", describe(caught.value))
