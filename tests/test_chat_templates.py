"""Conversations are tokenized as the model's own chat template renders them; responses and end tokens are trained."""

import json
import re

import pytest
import tokenizers
import transformers
from chat_templates import CHATML, LLAMA_2, MODELS
from conftest import REPOSITORY
from hydra import compose, initialize_config_dir

from config_checks.checks import check_config
from config_checks.schema import CONFIG_DIR
from data.choice import Choice, Settings
from data.report import split_report
from preference_datasets import get_batch_iterator
from utils import UserError

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TURNS = [("user", "Hi"), ("assistant", "Yes"), ("user", "How are\nyou? "), ("assistant", " Fine.\n\nAnd you?\n")]
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}},
    {"type": "function", "function": {"name": "time", "description": "The time.", "parameters": {
        "type": "object", "properties": {"zone": {"type": "string"}}}}},
]  # fmt: skip
CALLS = [
    {"role": "user", "content": "Is it warm in Rome?"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}},
        {"type": "function", "function": {"name": "time", "arguments": {"zone": "CET", "precise": True}}}]},
    {"role": "tool", "name": "weather", "content": "30 degrees"},
    {"role": "tool", "name": "time", "content": "12:00"},
]  # fmt: skip


def messages(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


def make_tokenizer(name: str, directory=REPOSITORY / "assets" / "tiny"):
    """Return the tiny byte-level tokenizer with a model's special tokens and template."""
    model = MODELS[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    # most models list these only among the added tokens, not among the tokenizer's named special tokens
    added = [tokenizers.AddedToken(token, special=True, normalized=False) for token in model.special]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.add_special_tokens({"eos_token": model.eos, **({"bos_token": model.bos} if model.bos else {})})
    if model.bos is None:
        tokenizer.bos_token = None
    if "Llama-3" in name or "Qwen" in name:  # their tokenizers keep line ends together, even before a word
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
        bytes_only = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = model.template
    return tokenizer


@pytest.fixture
def read(tmp_path):
    """Return a function that reads a row's token ids: prompt, chosen and rejected, each response with its end."""

    def example(tokenizer, row: dict, sft: bool = False, **kwargs) -> list[list[int]]:
        for split in ("train", "test"):
            (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
        kwargs = {"max_length": 4096, "max_prompt_length": 2048, "silent": True, "n_epochs": 1} | kwargs
        batches = get_batch_iterator(
            [f"{tmp_path}/*.jsonl"], tokenizer, sft_mode=sft, cache_dir=str(tmp_path / "cache"), **kwargs
        )
        batch = next(iter(batches))
        parts = [batch["prompt_input_ids"][0].tolist()]
        for side in ("chosen",) if sft else ("chosen", "rejected"):
            ids, labels = batch[f"{side}_input_ids"][0].tolist(), batch[f"{side}_labels"][0].tolist()
            assert ids[: len(parts[0])] == parts[0] and set(labels[: len(parts[0])]) <= {-100}
            parts.append(ids[len(parts[0]) :])
        return parts

    return example


def row_of(prompt: list[dict], chosen: str = "Yes", rejected: str = "No", **fields) -> dict:
    answers = {side: messages(("assistant", text)) for side, text in (("chosen", chosen), ("rejected", rejected))}
    return {"prompt": prompt, **answers, **fields}


@pytest.mark.parametrize("name", MODELS)
def test_single_turn_is_rendered_as_the_model_was_trained(name, read):
    tokenizer, model = make_tokenizer(name), MODELS[name]
    prompt, chosen, rejected = read(tokenizer, row_of(messages(("user", "Hi"))))
    assert tokenizer.decode(prompt) == model.prompt
    assert tokenizer.decode(chosen) == model.response
    assert tokenizer.decode(rejected) == model.response.replace("Yes", "No")
    if model.system is None:
        with pytest.raises(UserError, match=r"the chat template refuses it: .*(System|roles)"):
            read(tokenizer, row_of(messages(("system", "Be brief."), ("user", "Hi"))))
    else:
        prompt, chosen, _ = read(tokenizer, row_of(messages(("system", "Be brief."), ("user", "Hi"))))
        assert tokenizer.decode(prompt) == model.system and tokenizer.decode(chosen) == model.response


@pytest.mark.parametrize("kind", ["prompt given", "shared start", "SFT"])
@pytest.mark.parametrize("name", MODELS)
def test_several_turns_equal_the_templates_rendering_of_the_whole_dialogue(name, kind, read):
    tokenizer, model, turns = make_tokenizer(name), MODELS[name], messages(*TURNS)
    other = messages(("assistant", "Not so well."))
    row = {
        "prompt given": {"prompt": turns[:3], "chosen": turns[3:], "rejected": other},
        "shared start": {"chosen": turns, "rejected": turns[:3] + other},
        "SFT": {"messages": turns},
    }[kind]
    prompt, *responses = read(tokenizer, row, sft=kind == "SFT")
    for response, turn in zip(responses, (turns[3:], other), strict=False):
        whole = tokenizer.apply_chat_template(turns[:3] + turn, tokenize=True, return_dict=False)
        read_ids = prompt + response
        assert read_ids == whole[: len(read_ids)]
        assert tokenizer.decode(whole[len(read_ids) :]).strip() == ""  # the rest follows the end of the turn
        assert response[-1] == tokenizer.eos_token_id or tokenizer.decode(response[-1:]) == "<end_of_turn>"
    n_before = 1 if kind == "SFT" else 3  # SFT imitates all turns of the assistant
    opened = tokenizer.apply_chat_template(
        turns[:n_before], tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert prompt == opened
    n_bos = (prompt + responses[0]).count(tokenizer.bos_token_id) if model.bos else 0
    assert n_bos == (2 if "Llama-2" in name else 1) * (model.bos is not None and model.bos in model.prompt)


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].has_tools])
def test_tools_and_tool_calls_reach_the_template(name, read):
    tokenizer = make_tokenizer(name)
    for tools in (TOOLS, json.dumps(TOOLS)):
        prompt, chosen, _ = read(tokenizer, row_of(CALLS, "It is.", tools=tools))
        whole = tokenizer.apply_chat_template(
            CALLS + messages(("assistant", "It is.")), tools=TOOLS, tokenize=True, return_dict=False
        )
        assert [*prompt, *chosen] == whole[:-1] and tokenizer.decode(whole[-1:]) == "\n"
        text = tokenizer.decode(whole)
        assert '{"name": "weather", "arguments": {"city": "Rome"}}' in text  # and no nulls for the other call's fields
        assert '"properties": {"zone": {"type": "string"}}}' in text
    answer = read(tokenizer, {"messages": CALLS[:2], "tools": TOOLS}, sft=True)[1]
    assert '<tool_call>\n{"name": "time", "arguments": {"zone": "CET", "precise": true}}' in tokenizer.decode(answer)


@pytest.mark.parametrize("name", ["meta-llama/Meta-Llama-3-8B-Instruct", "google/gemma-7b-it"])
def test_truncated_prompt_keeps_bos_and_response_keeps_its_end(name, read):
    tokenizer = make_tokenizer(name)
    row = row_of(messages(("user", "word " * 100)))
    whole = read(tokenizer, row)
    for add_bos in (False, True):  # the template has added BOS already
        prompt, chosen, _ = read(tokenizer, row, max_length=48, max_prompt_length=16, add_bos=add_bos)
        assert prompt == [tokenizer.bos_token_id, *whole[0][-15:]]
        assert chosen == whole[1]


def test_bos_token_of_the_template_is_counted_once_with_add_bos(read, tmp_path):
    tokenizer = make_tokenizer("google/gemma-7b-it")
    prompt, *responses = read(tokenizer, row_of(messages(("user", "Hi"))))
    n_prompt, n_response = len(prompt), max(map(len, responses))
    for add_bos in (False, True):
        batches = get_batch_iterator(
            [Choice(f"{tmp_path}/*.jsonl", truncation="error")], tokenizer, max_length=n_prompt + n_response,
            cache_dir=str(tmp_path / "cache"), silent=True, n_epochs=1, add_bos=add_bos,
        )  # fmt: skip
        assert f"prompt {n_prompt}/" in split_report(batches, tokenizer, "train")[-1]
        assert next(iter(batches))["prompt_input_ids"].tolist() == [prompt]


def test_no_token_spans_prompt_and_response(read):
    """If the prompt ends in a space, a tokenizer would merge it with the next word."""
    tokenizer = make_tokenizer("teknium/OpenHermes-2.5-Mistral-7B (ChatML)")
    tokenizer.chat_template = CHATML.replace("assistant\\n' }}", "assistant: ' }}").replace(
        "message['role'] + '\\n' + message", "message['role'] + ': ' + message"
    )
    prompt, chosen, rejected = read(tokenizer, row_of(messages(("user", "Hi")), "Yes", "No"))
    assert prompt == tokenizer("<|im_start|>user: Hi<|im_end|>\n<|im_start|>assistant: ")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(prompt[-1]) == "Ġ"
    assert [tokenizer.decode(ids) for ids in (chosen, rejected)] == ["Yes<|im_end|>", "No<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(rejected) == ["No", "<|im_end|>"]


def test_tokenizer_that_prepends_a_space_prepends_it_once(read):
    """SentencePiece prepends a space for Llama 2."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    trained.train_from_iterator(["[INST] Hi how are you [/INST] Yes I am No not today"] * 20, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>",
        chat_template=LLAMA_2,
    )  # fmt: skip
    turns = messages(("user", "Hi"), ("assistant", "Yes I am"), ("user", "how are you"), ("assistant", "No"))
    prompt, chosen, rejected = read(tokenizer, row_of(turns[:3], "No", "not today"))
    for response, text in ((chosen, "No"), (rejected, "not today")):
        whole = turns[:3] + messages(("assistant", text))
        assert prompt + response == tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)
        assert response.count(tokenizer.eos_token_id) == 1 and response[-1] == tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(chosen)[0] in ("▁No", "▁N", "▁")


def test_think_tag_of_a_generation_prompt_is_left_out_of_training(read):
    """Templates of reasoning models open a think tag in the generation prompt, but not in a rendered dialogue."""
    tokenizer = make_tokenizer("teknium/OpenHermes-2.5-Mistral-7B (ChatML)")
    tokenizer.chat_template = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
    row = row_of(messages(("user", "Hi")), "<b>Yes</b>", "<i>No</i>")
    prompt, chosen, rejected = read(tokenizer, row)
    assert tokenizer.decode(prompt) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(chosen) == "<b>Yes</b><|im_end|>"
    whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=True, return_dict=False)
    assert prompt + chosen == whole[:-1] and tokenizer.decode(rejected) == "<i>No</i><|im_end|>"


@pytest.mark.parametrize("name", MODELS)
def test_special_tokens_in_a_text_are_refused(name, read):
    tokenizer, model = make_tokenizer(name), MODELS[name]
    for token in (model.eos, *model.special, *([model.bos] if model.bos else [])):
        with pytest.raises(UserError, match=re.escape(f"the text contains {token!r}")):
            read(tokenizer, row_of(messages(("user", f"Hi {token} you"))))


def test_response_gets_the_end_token_if_the_template_adds_none(read):
    tokenizer = make_tokenizer("HuggingFaceH4/zephyr-7b-beta")
    settings = Settings(chat_template=str(REPOSITORY / "assets" / "human_assistant.jinja"))
    prompt, chosen, _ = read(tokenizer, row_of(messages(*TURNS[:3])), settings=settings)
    assert tokenizer.decode(prompt) == "\n\nHuman: Hi\n\nAssistant: Yes\n\nHuman: How are\nyou? \n\nAssistant:"
    assert tokenizer.decode(chosen) == " Yes</s>"


def test_missing_or_unusable_chat_template_is_an_error(read, tmp_path):
    tokenizer = make_tokenizer("HuggingFaceH4/zephyr-7b-beta")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="messages need a chat template, and the tokenizer has none") as refused:
        read(tokenizer, row_of(messages(("user", "Hi"))))
    assert f"chat_template={REPOSITORY}/assets/human_assistant.jinja" in str(refused.value)  # from any directory
    (tmp_path / "bad.jinja").write_text("{% for message in messages %}{{ message.content }}")
    with pytest.raises(UserError, match=r"chat_template=.*bad\.jinja: .*give a file with a Jinja chat template"):
        read(tokenizer, row_of(messages(("user", "Hi"))), settings=Settings(chat_template=str(tmp_path / "bad.jinja")))
    tokenizer.chat_template = MODELS["mistralai/Mistral-7B-Instruct-v0.2"].template
    with pytest.raises(UserError, match=r"row 0.*roles must alternate"):
        read(tokenizer, row_of(messages(("user", "Hi"), ("user", "Hi"))))


@pytest.mark.parametrize("name", ["llama3-8b-instruct", "qwen3-4b-instruct"])
def test_configs_of_instruct_models_pass_every_check(name):
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = compose("config", [f"model={name}", "local_run_dir=x", "local_dirs=[x]", "exp_name=x", "loss=dpo"])
    check_config(config)
    assert "Instruct" in config.model.name_or_path and config.model.block_name.endswith("DecoderLayer")
