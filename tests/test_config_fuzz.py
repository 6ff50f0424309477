"""Random command lines: the run trains to its end, or is refused by a single message that names a key."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
from conftest import mark_exhaustive_except, read_jsonl
from fuzzing import fuzz
from hypothesis import example, given
from hypothesis import strategies as st

import train
from config_checks.schema import default_config, names_in

TINY = [
    "model=tiny", "datasets=[toy]", "n_examples=8", "n_eval_examples=4", "eval_batch_size=4", "max_length=64",
    "max_prompt_length=32", "sample_during_eval=false", "wandb.enabled=false", "warmup_steps=0", "local_dirs=[cache]",
]  # fmt: skip

# ---- command lines --------------------------------------------------------------------------------------------------

DEFAULTS = default_config()
KEYS = [
    *DEFAULTS, "loss", "model", "wandb", "reference_model", "dataset_paths",
    "lora.r", "lora.lora_alpha", "lora.bias", "lora.target_modules", "lora.init_lora_weights", "lora.rank_pattern",
    "lora.layers_to_transform", "lora.trainable_token_indices", "lora.use_dora", "lora.nope", "dataset_paths.mine",
    "optimizer_args.momentum", "optimizer_args.betas", "optimizer_args.foreach", "optimizer_args.nope",
    "nope", "loss.nope", "model.nope.deeper",
]  # fmt: skip
NASTY = [
    "null", "true", "false", "nan", "inf", "-inf", "-1", "0", "-0.0", "0.5", "1", "2", "3", "1e-320", "1e300", "1e400",
    "9007199254740993", "1" + "0" * 40, "''", "' '", "x", "a b", "'é'", "'\U0001f600'", "'a\\'b'", "1e", "0x10",
    "???", "[]", "[1]", "[null]", "[x,y]", "[[]]", "[[1,2],{a:b}]", "{}", "{a:1}", "{1:null}", "{a:{b:[]}}", "{'':1}",
    "${lr}", "${seed}", "${exp_name}", "${loss}", "${model.name_or_path}", "${wandb.enabled}", "${x.y}", "${", "$",
    "${oc.env:NO_SUCH}", "${oc.env:HOME,x}", "${get_local_run_dir:${lr},x}", "${hydra:nope}",
    "${no_resolver:1}", "${now:%}", "${sweep_job:}", "${.}", "${..lr}", "${oc.select:lr,1}", "${oc.create:{a:1}}",
    "x,y", "range(3)", "choice(1,2)", "int(x)", "str(1)", "float(nan)", "sort(b,a)", "glob(*)", "[", "}", "a=b", "a:b",
    "", "%s", "{{}}", "\\", "#", "'\n'", "1_000", "tiny", "dpo", "toy", "auto", "cpu", "bfloat16", "Adam",
]  # fmt: skip
PLAUSIBLE = {  # values that may get as far as training
    "loss": names_in("loss"), "model": names_in("model"), "batch_size": ["1", "2", "8", "3"], "debug": ["true"],
    "eval_batch_size": ["1", "2", "3"], "gradient_accumulation_steps": ["2", "4"], "lr": ["1e-3", "1", "1e-45", "1e38"],
    "datasets": ["toy", "[toy]", "[toy,toy]", "[hh]"], "max_grad_norm": ["inf", "1e-300", "1"], "n_epochs": ["null"],
    "max_length": ["16", "32", "2048", "100000"], "max_prompt_length": ["1", "8", "63"], "n_examples": ["4", "9"],
    "n_eval_examples": ["1", "5"], "eval_every": ["4", "5", "6"], "save_every": ["4", "6"], "add_bos": ["true"],
    "keep_checkpoints": ["1", "3"], "optimizer": ["Adam", "AdamW", "SGD", "Rprop", "Adafactor", "NAdam", "Muon"],
    "optimizer_args": ["{momentum:0.9}", "{weight_decay:0.1}", "{eps:0}", "{betas:[0.9,0.99]}", "{alpha:2}"],
    "padding_free": ["true", "false"], "max_tokens_per_microbatch": ["1", "300"],
    "activation_checkpointing": ["true"], "shared_prompt": ["true", "false"], "warmup_steps": ["0", "1000000000000"],
    "reference": ["model", "adapter_off", "adapter_copy"], "precompute_ref_log_probs": ["true"], "seed": ["5"],
    "reference_update_every": ["1", "2"], "reference_update_alpha": ["0.5", "1"], "save_optimizer": ["false"],
    "checkpoint_format": ["sharded"], "checkpoint_async": ["true"],
    "lora": [
        "{}", "{r:2}", "{r:1,use_dora:true}", "{bias:all}", "{init_lora_weights:pissa}", "{target_modules:[dense]}",
        "{modules_to_save:[embed_in]}", "{trainable_token_indices:[1]}", "{rank_pattern:{dense:2}}",
        "{layers_to_transform:[0],target_modules:[dense]}", "{lora_bias:true}", "{init_lora_weights:false}",
    ],
    "sample_during_eval": ["true"], "n_eval_model_samples": ["0", "1"], "do_first_eval": ["false"],
    "minimum_log_interval_secs": ["0", "1e9"], "exp_name": ["x", "1"], "resume": ["auto"], "resume_anyway": ["true"],
    "model.policy_dtype": ["bfloat16", "float64"], "model.policy_mp": ["bfloat16"], "model.from_scratch": ["false"],
    "model.reference_dtype": ["bfloat16", "float16", "float64"], "model.attn_implementation": ["eager", "sdpa"],
    "model.block_name": ["GPTNeoXLayer"], "model.load_in_4bit": ["true"], "model.trust_remote_code": ["true"],
    "loss.beta": ["1e-300", "1e38", "0.5"], "loss.average_log_prob": ["true"], "loss.reference_free": ["true"],
    "trainer": ["FSDPTrainer", "TensorParallelTrainer"], "world_size": ["1", "2"],
}  # fmt: skip


def quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), max_size=8)
numbers = st.one_of(st.integers(-(2**70), 2**70), st.floats()).map(str)
defaults = st.sampled_from(list(DEFAULTS.values())).map(lambda value: json.dumps(value).replace('"', ""))
scalars = st.one_of(st.sampled_from(NASTY), numbers, texts, texts.map(quoted), defaults)
lists = st.lists(scalars, max_size=3).map(lambda values: f"[{','.join(values)}]")
sections = st.dictionaries(st.sampled_from(["a", "r", "name", "enabled"]), scalars, max_size=2).map(
    lambda values: "{" + ",".join(f"{key}:{value}" for key, value in values.items()) + "}"
)
nasty = st.builds(
    lambda prefix, key, value: f"{prefix}{key}={value}",
    st.sampled_from(["", "", "", "", "+", "++", "~"]), st.sampled_from(KEYS), st.one_of(scalars, lists, sections),
)  # fmt: skip
removals = st.sampled_from(KEYS).map("~{}".format)
plausible = st.sampled_from(sorted(PLAUSIBLE)).flatmap(
    lambda key: st.sampled_from([f"{key}={value}" for value in PLAUSIBLE[key]])
)
losses = st.sampled_from([f"loss={name}" for name in names_in("loss")])


def command_lines(*overrides: st.SearchStrategy) -> st.SearchStrategy:
    """Return a strategy for a loss and some overrides, drawn from any of these."""
    several = st.lists(st.one_of(*overrides), min_size=1, max_size=5, unique_by=lambda word: word.split("=")[0])
    return st.builds(lambda loss, words: [loss, *words], losses, several)


# ---- outcomes -------------------------------------------------------------------------------------------------------


def assert_names_a_key(output: str, words: list[str]):
    """Check that the output ends with one error message, which names a key of the command line."""
    assert "Traceback" not in output, (words, output)
    assert len(re.findall("^error: ", output, re.MULTILINE)) == 1, (words, output)
    message = output[re.search("^error: ", output, re.MULTILINE).start() :]
    keys = {re.split("[=@]", word.lstrip("+~"))[0] for word in words}
    names = {name for key in keys for name in (key, key.split(".")[0], key.split(".")[-1])}
    assert any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message) for name in names), (words, message)


class ChecksPassed(BaseException):
    """Raised instead of loading anything, once all checks have passed; `except Exception` doesn't catch it."""


def refusal(words: list[str], directory: Path) -> str | None:
    """Return the message that refuses a command line before anything is loaded; None if it is accepted."""

    def stop(*_):
        raise ChecksPassed

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr(sys, "argv", ["train.py", *words])
        patch.setattr(train, "train_from", stop)
        patch.setattr("commands.workers.launch.run_workers", stop)
        try:
            train.main()
        except ChecksPassed:
            return None
        except SystemExit as error:
            assert isinstance(error.code, str), (words, error.code)
            return error.code
    raise AssertionError(f"{words}: neither accepted nor refused")


@pytest.mark.parametrize("n_examples", mark_exhaustive_except([5, 100], 5))
def test_random_command_line_is_accepted_or_refused_before_anything_is_loaded(n_examples, tmp_path_factory):
    @fuzz(n_examples)
    @given(words=command_lines(nasty, removals, plausible))
    @example(words=["world_size=2"])
    @example(words=["+exp_name=x"])
    @example(words=["+model=0.5"])
    @example(words=["loss=${..lr}"])
    @example(words=["trainer=FSDPTrainer", "lora={trainable_token_indices:[1]}"])
    def check(words):
        directory = tmp_path_factory.mktemp("typed")
        message = refusal([*TINY, *words], directory)
        if message is not None:
            assert_names_a_key(message, words)
        assert list(directory.iterdir()) == []

    check()


@pytest.mark.exhaustive
def test_accepted_command_line_trains_to_finite_numbers_or_is_refused_with_the_keys_name(launcher, tmp_path_factory):
    @fuzz(25)
    @given(words=command_lines(plausible))
    @example(words=["optimizer_args={eps:0}"])
    @example(words=["loss=dpo", "lora={trainable_token_indices:[1]}", "sample_during_eval=true"])
    def check(words):
        directory = tmp_path_factory.mktemp("trains")
        code = launcher.run(*TINY, "local_run_dir=run", *words, directory=directory)
        if code != 0:
            assert code == 1
            assert_names_a_key(launcher.output, words)
            return
        assert "Traceback" not in launcher.output
        lines = read_jsonl(directory / "run/metrics.jsonl")
        assert lines[-1]["split"] == "eval"
        assert all(math.isfinite(value) for line in lines for value in line.values() if isinstance(value, float)), words

    check()
