"""Only the assistant's words are trained: turn by turn, with real models' templates, in every layout."""

import json
import re

import pytest
import tokenizers
import torch
import transformers
from chat_templates import CHATML, GEMMA_3, LLAMA_3, LLAMA_3_1, MISTRAL_V3, QWEN_3, SMOLLM_2
from conftest import REPOSITORY, mark_exhaustive_except
from test_shared_prompt import CONFIGS, make_model, original_logps

from acceleration.prefix_sharing import packed_rows, padded_rows, shared_rows
from acceleration.reference_cache import pair_keys
from acceleration.response_head import response_logps
from data.chat import Renderer, end_token_ids
from data.choice import Settings
from data.messages import BadExample
from data.microbatches import part_lengths
from data.rows import Example
from data.tokenization import decode_response, make_element
from log_probabilities import response_lengths
from preference_datasets import get_batch_iterator
from utils import UserError, select_examples

IM = ("<|im_start|>", "<|im_end|>")
SPECIAL = {  # template; special tokens other than the next two; BOS; EOS
    "llama 3": (LLAMA_3, ("<|start_header_id|>", "<|end_header_id|>"), "<|begin_of_text|>", "<|eot_id|>"),
    "llama 3.1": (LLAMA_3_1, ("<|start_header_id|>", "<|end_header_id|>"), "<|begin_of_text|>", "<|eot_id|>"),
    "qwen 3": (QWEN_3, IM, None, "<|im_end|>"),
    "gemma 3": (GEMMA_3, ("<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>"),
    "mistral": (MISTRAL_V3, ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]"), "<s>", "</s>"),
    "chatml": (CHATML, IM, None, "<|endoftext|>"),
    "smollm 2": (SMOLLM_2, IM, "<|im_start|>", "<|im_end|>"),
}


def make_tokenizer(template: str, special: tuple[str, ...], bos: str | None, eos: str):
    tokenizer = transformers.AutoTokenizer.from_pretrained(REPOSITORY / "assets" / "tiny")
    added = [tokenizers.AddedToken(token, special=True, normalized=False) for token in special]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.add_special_tokens({"eos_token": eos, **({"bos_token": bos} if bos else {})})
    if bos is None:
        tokenizer.bos_token = None
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, template
    return tokenizer


def message(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def marked(tokenizer, example: Example, **kwargs) -> list[str]:
    """Show each dialogue with its trained tokens in brackets, and '|' between prompt and response."""
    renderer = Renderer(tokenizer, None, **kwargs)
    tokens = renderer.tokenize([renderer.render(example)])[0]
    texts = []
    for ids, runs in zip(tokens.response_ids, tokens.trained, strict=True):
        text, end = tokenizer.decode(tokens.prompt_ids) + "|", 0
        for start, stop in zip(runs[::2], runs[1::2], strict=True):
            text += tokenizer.decode(ids[end:start]) + f"⟦{tokenizer.decode(ids[start:stop])}⟧"
            end = stop
        assert end == len(ids)
        texts.append(text)
    return texts


SYSTEM, HI, YES = message("system", "Be brief."), message("user", "Hi"), message("assistant", "Yes")
AND, FINE = message("user", "And you?"), message("assistant", "Fine.")
TOOL = {"type": "function", "function": {"name": "warmth", "parameters": {"type": "object", "properties": {}}}}
DESCRIBED = {"type": "function", "function": {**TOOL["function"], "description": "Ask how warm it is."}}
CALL = message(
    "assistant", "", tool_calls=[{"type": "function", "function": {"name": "warmth", "arguments": {"in": "Rome"}}}]
)
RESULT, WARM = message("tool", '30 "C"'), message("assistant", "Warm.")
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
USER, ASSISTANT, IPYTHON = (HEADER.format(role) for role in ("user", "assistant", "ipython"))
LLAMA_SYSTEM = f"<|begin_of_text|>{HEADER.format('system')}"
QWEN_TOOLS = (
    "<|im_start|>system\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are "
    "provided with function signatures within <tools></tools> XML tags:\n<tools>\n{tool}\n</tools>\n\nFor each "
    "function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call><|im_end|>\n'
)
THREE_TURNS = {  # prompt [system, user], response [assistant, user, assistant]
    "llama 3": f"{LLAMA_SYSTEM}Be brief.<|eot_id|>{USER}Hi<|eot_id|>{ASSISTANT}|⟦Yes<|eot_id|>⟧{USER}And you?<|eot_id|>"
    f"{ASSISTANT}⟦Fine.<|eot_id|>⟧",
    "qwen 3": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n|"
    "⟦Yes<|im_end|>⟧\n<|im_start|>user\nAnd you?<|im_end|>\n<|im_start|>assistant\n"
    "⟦<think>\n\n</think>\n\nFine.<|im_end|>⟧",
    "gemma 3": "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n|⟦Yes<end_of_turn>⟧\n"
    "<start_of_turn>user\nAnd you?<end_of_turn>\n<start_of_turn>model\n⟦Fine.<end_of_turn>⟧",
    "mistral": "<s>[INST] Hi[/INST]|⟦ Yes</s>⟧[INST] And you?[/INST]⟦ Fine.</s>⟧",  # without the system turn
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n|"
    "⟦Yes<|im_end|>⟧\n<|im_start|>user\nAnd you?<|im_end|>\n<|im_start|>assistant\n⟦Fine.<|im_end|>⟧",
}
THREE_TURNS["llama 3.1"], THREE_TURNS["smollm 2"] = THREE_TURNS["llama 3"], THREE_TURNS["chatml"]
WITH_TOOLS = {  # prompt [user], response [assistant's call, tool, assistant]
    "llama 3.1": f"{LLAMA_SYSTEM}<|eot_id|>{USER}{json.dumps(TOOL)}\n\nHi<|eot_id|>{ASSISTANT}|"
    f'⟦{{"name": "warmth", "parameters": {{"in": "Rome"}}}}<|eot_id|>⟧{IPYTHON}"30 \\"C\\""<|eot_id|>{ASSISTANT}'
    "⟦Warm.<|eot_id|>⟧",
    "qwen 3": QWEN_TOOLS.format(tool=json.dumps(TOOL)) + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n|"
    '⟦<tool_call>\n{"name": "warmth", "arguments": {"in": "Rome"}}\n</tool_call><|im_end|>⟧\n<|im_start|>user\n'
    '<tool_response>\n30 "C"\n</tool_response><|im_end|>\n<|im_start|>assistant\n'
    "⟦<think>\n\n</think>\n\nWarm.<|im_end|>⟧",
    "mistral": f"<s>[AVAILABLE_TOOLS] [{json.dumps(TOOL)}][/AVAILABLE_TOOLS][INST] Hi[/INST]|⟦[TOOL_CALLS] "
    '[{"name": "warmth", "arguments": {"in": "Rome"}}]</s>⟧[TOOL_RESULTS] {"content": 30 "C"}[/TOOL_RESULTS]'
    "⟦ Warm.</s>⟧",
}
THREE_TURN_NAMES = mark_exhaustive_except(THREE_TURNS, "llama 3.1", "qwen 3", "mistral")


@pytest.mark.parametrize("name", THREE_TURN_NAMES)
def test_users_turn_in_a_response_is_not_trained(name):
    tokenizer = make_tokenizer(*SPECIAL[name])
    prompt = [HI] if name == "mistral" else [SYSTEM, HI]
    response = [YES, AND, FINE]
    chosen, rejected = marked(tokenizer, Example(prompt, [response, [message("assistant", "No")]], [(0, 1)]))
    assert chosen == THREE_TURNS[name]
    end = re.search(r"Yes(.*?)⟧", chosen)[1]
    no = {"qwen 3": "<think>\n\n</think>\n\nNo", "mistral": " No"}.get(name, "No")
    assert rejected == f"{chosen.split('|⟦')[0]}|⟦{no}{end}⟧"
    assert marked(tokenizer, Example(prompt, [[*response, message("user", "Bye")]]))[0] == (
        THREE_TURNS[name].replace("<think>\n\n</think>\n\n", "")  # Qwen writes this only in the last turn
    )


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tools_output_in_a_response_is_not_trained(name):
    tokenizer = make_tokenizer(*SPECIAL[name])
    example = Example([HI], [[CALL, RESULT, WARM], [YES]], [(0, 1)], tools=[TOOL])
    assert marked(tokenizer, example)[0] == WITH_TOOLS[name]


_CALLED = '{{"name": "warmth", "{}": {{"in": "Rome"}}}}'
ALL_TURNS = {  # prompt [system, user], response [call, tool, assistant, user, assistant], with tools
    "llama 3.1": f"{LLAMA_SYSTEM}Be brief.<|eot_id|>{USER}{json.dumps(TOOL)}\n\nHi<|eot_id|>{ASSISTANT}|"
    f'⟦{_CALLED.format("parameters")}<|eot_id|>⟧{IPYTHON}"30 \\"C\\""<|eot_id|>{ASSISTANT}⟦Warm.<|eot_id|>⟧'
    f"{USER}And you?<|eot_id|>{ASSISTANT}⟦Fine.<|eot_id|>⟧",
    "qwen 3": QWEN_TOOLS.format(tool=json.dumps(TOOL)).replace("system\n#", "system\nBe brief.\n\n#")
    + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n|"
    f"⟦<tool_call>\n{_CALLED.format('arguments')}\n</tool_call><|im_end|>⟧\n<|im_start|>user\n<tool_response>\n"
    '30 "C"\n</tool_response><|im_end|>\n<|im_start|>assistant\n⟦Warm.<|im_end|>⟧\n<|im_start|>user\nAnd you?<|im_end|>'
    "\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nFine.<|im_end|>⟧",
    # without the system turn; its template moves the tools to the last question
    "mistral": f"<s>[INST] Hi[/INST]|⟦[TOOL_CALLS] [{_CALLED.format('arguments')}]</s>⟧[TOOL_RESULTS] "
    f'{{"content": 30 "C"}}[/TOOL_RESULTS]⟦ Warm.</s>⟧[AVAILABLE_TOOLS] [{json.dumps(TOOL)}][/AVAILABLE_TOOLS]'
    "[INST] And you?[/INST]⟦ Fine.</s>⟧",
}


@pytest.mark.parametrize("name", ALL_TURNS)
def test_system_tools_calls_and_three_answers_are_told_apart(name):
    prompt = [HI] if name == "mistral" else [SYSTEM, HI]
    example = Example(prompt, [[CALL, RESULT, WARM, AND, FINE]], tools=[TOOL])
    assert marked(make_tokenizer(*SPECIAL[name]), example) == [ALL_TURNS[name]]


@pytest.mark.parametrize("name", ["llama 3", "gemma 3", "chatml", "smollm 2"])
def test_template_without_tools_refuses_them(name):
    tokenizer = make_tokenizer(*SPECIAL[name])
    for example, missing in (
        (Example([HI], [[YES]], tools=[TOOL]), "'warmth' of the row's tools"),
        (Example([HI], [[CALL]]), "'warmth' of the assistant's message"),
    ):
        with pytest.raises(BadExample, match=f"the chat template doesn't write {missing}"):
            marked(tokenizer, example)


def test_dialogue_is_divided_at_turns_even_if_the_template_moves_the_system_text():
    """Like Mistral's, this template writes the system text into the last question that it is given."""
    tokenizer = make_tokenizer(*SPECIAL["mistral"])
    dialogue = "<s>[INST] Hi[/INST]|⟦ Yes</s>⟧[INST] Be brief.\n\nAnd you?[/INST]⟦ Fine.</s>⟧"
    tokenizer.chat_template = MISTRAL_V3.replace("loop.last and system", "message == questions[-1] and system")
    assert marked(tokenizer, Example([SYSTEM, HI], [[YES, AND, FINE]])) == [dialogue]
    last = dialogue.replace("|", "").replace("⟦ Yes</s>⟧", " Yes</s>").replace("⟦", "|⟦")
    assert marked(tokenizer, Example([SYSTEM, HI], [[YES, AND, FINE]]), last_turn_only=True) == [last]


@pytest.mark.parametrize("name", THREE_TURN_NAMES)
def test_only_the_last_turn_is_trained_on_request(name):
    tokenizer = make_tokenizer(*SPECIAL[name])
    prompt = [HI] if name == "mistral" else [SYSTEM, HI]
    text = marked(tokenizer, Example(prompt, [[YES, AND, FINE]]), last_turn_only=True)[0]
    expected = THREE_TURNS[name].replace("|⟦", "").replace("⟧", "", 1)
    assert text == expected.replace("⟦", "|⟦")


GENERATION = {
    "chatml": "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "chatml, headers": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\\n' + m.content }}{% endgeneration %}{{ '<|im_end|>\\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("name", GENERATION)
def test_turns_in_generation_blocks_are_trained_as_transformers_masks_them(name):
    tokenizer = make_tokenizer(GENERATION[name], IM, None, "<|im_end|>")
    renderer = Renderer(tokenizer, None)
    for prompt, response in (([SYSTEM, HI], [YES, AND, FINE]), ([HI, YES, AND], [FINE])):
        tokens = renderer.tokenize([renderer.render(Example(prompt, [response]))])[0]
        found = make_element(["", "", ""], tokens.prompt_ids, tokens.response_ids * 2, "keep_end", 999, 9,
                             trained=tokens.trained * 2)  # fmt: skip
        expected = tokenizer.apply_chat_template(prompt + response, return_assistant_tokens_mask=True, return_dict=True)
        n = len(found["chosen_input_ids"])
        assert found["chosen_input_ids"] == expected["input_ids"][:n] and sum(expected["assistant_masks"][n:]) == 0
        masks = expected["assistant_masks"][:n]
        if len(response) == 1:  # turns in the prompt are not trained
            masks = [0] * len(tokens.prompt_ids) + masks[len(tokens.prompt_ids) :]
        assert [label != -100 for label in found["chosen_labels"]] == list(map(bool, masks))


# ---- what a template leaves out -------------------------------------------------------------------------------------

REASONING = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)
THOUGHTS = message("assistant", "<think>\nLet me see.\n</think>\n\nIt is red.")


def reasoning_tokenizer():
    return make_tokenizer(REASONING, ("<|User|>", "<|Assistant|>"), None, "<|endoftext|>")


def test_stripped_reasoning_is_an_error_that_shows_it():
    missing = r"'<think>\\nLet me see.\\n</think>' of the assistant's message; verbatim_responses=true"
    with pytest.raises(BadExample, match=f"doesn't write {missing}"):
        marked(reasoning_tokenizer(), Example([HI], [[THOUGHTS]]))


def test_verbatim_response_keeps_its_reasoning_after_the_generation_prompt():
    """The generation prompt ends with `<think>`, which then belongs to the prompt and isn't written twice."""
    other = message("assistant", "<think>\nHm.\n</think>\n\nNo idea.")
    texts = marked(reasoning_tokenizer(), Example([HI], [[THOUGHTS], [other]], [(0, 1)]), verbatim_responses=True)
    assert texts == [
        "<|User|>Hi<|Assistant|><think>\n|⟦Let me see.\n</think>\n\nIt is red.<|endoftext|>⟧",
        "<|User|>Hi<|Assistant|><think>\n|⟦Hm.\n</think>\n\nNo idea.<|endoftext|>⟧",
    ]
    several = Example([HI], [[THOUGHTS, AND, THOUGHTS]])
    assert marked(reasoning_tokenizer(), several, verbatim_responses=True) == [
        "<|User|>Hi<|Assistant|><think>\n|⟦Let me see.\n</think>\n\nIt is red.<|endoftext|>⟧<|User|>And you?"
        "<|Assistant|><think>\n⟦Let me see.\n</think>\n\nIt is red.<|endoftext|>⟧"
    ]


def test_reasoning_of_earlier_answers_in_the_prompt_may_be_stripped():
    texts = marked(reasoning_tokenizer(), Example([HI, THOUGHTS, AND], [[FINE]]))
    assert texts == [
        "<|User|>Hi<|Assistant|>\n\nIt is red.<|endoftext|><|User|>And you?<|Assistant|>|⟦Fine.<|endoftext|>⟧"
    ]


ALTERED = {
    "a system text that is dropped": (
        "{% for m in messages if m.role != 'system' %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}",
        Example([SYSTEM, HI], [[YES]]), "'Be brief.' of the system's message"),
    "capitals": ("{% for m in messages %}{{ m.role + ':' + m.content | upper + eos_token }}{% endfor %}",
                 Example([message("user", "HI")], [[message("assistant", "Ann")]]), "'Ann' of the assistant's message"),
    "calls that are dropped": (CHATML, Example([HI], [[CALL, RESULT, WARM]]),
                               "'warmth' of the assistant's message; give a template"),
    "a field of reasoning": (CHATML, Example([HI], [[message("assistant", "Yes", reasoning_content="Hm, so.")]]),
                             "'Hm, so.' of the assistant's message"),
    "calls whose name is in the text": (
        CHATML, Example([HI], [[{**CALL, "content": "I ask warmth in Rome."}, RESULT, WARM]]),
        "the tool calls of message 1"),
    "calls with only numbers, in the prompt": (
        CHATML, Example([message("user", "warmth?"), message("assistant", "warmth", tool_calls=[
            {"type": "function", "function": {"name": "warmth", "arguments": {"n": 3}}}]), RESULT], [[WARM]]),
        "the tool calls of message 1"),
    "tools": (CHATML, Example([HI], [[YES]], tools=[TOOL]), "'warmth' of the row's tools"),
    "all of the tools but their names": (
        "{{ tools[0].function.name if tools }}" + CHATML, Example([HI], [[YES]], tools=[DESCRIBED]),
        "'Ask how warm it is.' of the row's tools"),
    "tools, whose name is in a message": (
        CHATML, Example([message("user", "warmth")], [[YES]], tools=[TOOL]), "the row's tools"),
}  # fmt: skip


@pytest.mark.parametrize("case", ALTERED)
def test_part_that_a_template_leaves_out_is_named(case):
    template, example, missing = ALTERED[case]
    with pytest.raises(BadExample, match=re.escape(f"the chat template doesn't write {missing}")):
        marked(make_tokenizer(template, IM, None, "<|endoftext|>"), example)


def test_prompt_that_ends_with_an_answer_is_refused_with_the_remedy():
    with pytest.raises(BadExample, match="the prompt ends with an answer: end it with a question"):
        marked(make_tokenizer(*SPECIAL["qwen 3"]), Example([HI, YES], [[FINE]]))


def test_error_names_the_row_and_the_report_says_what_dialogues_lack_of_the_generation_prompt(tmp_path, capfd):
    tokenizer, rows = reasoning_tokenizer(), [
        {"prompt": [HI], "chosen": [YES], "rejected": [FINE]},
        {"prompt": [AND], "chosen": [THOUGHTS], "rejected": [FINE]},
    ]  # fmt: skip
    from data.report import print_report

    def batches(rows, **settings):
        for split in ("train", "test"):
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return get_batch_iterator(
            [f"{tmp_path}/*.jsonl"], tokenizer, cache_dir=str(tmp_path / "cache"), silent=True, n_epochs=1,
            settings=Settings(**settings),
        )  # fmt: skip

    with pytest.raises(UserError, match=r"row 1 .*doesn't write '<think>"):
        batches(rows)
    print_report(batches(rows[:1]), batches(rows[:1]), tokenizer)
    assert r"generation prompt ends in '<think>\n', which is missing from rendered dialogues" in capfd.readouterr().out


@pytest.mark.parametrize(("content", "written"), [("Yes ", "Yes"), ("Yes", "Yes")])
def test_white_space_that_a_template_adds_without_an_end_token_is_not_trained(content, written):
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content | trim + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template, (), None, "<|endoftext|>")
    texts = marked(tokenizer, Example([HI], [[message("assistant", content)]]))
    assert texts == [f"user: Hi\nassistant: |⟦{written}<|endoftext|>⟧"]


# ---- ends of turns and samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECIAL)
def test_samples_end_at_the_end_token_of_turn_or_tokenizer(name):
    tokenizer = make_tokenizer(*SPECIAL[name])
    ends = {"llama 3": ["<|eot_id|>"], "llama 3.1": ["<|eot_id|>"], "gemma 3": ["<eos>", "<end_of_turn>"],
            "mistral": ["</s>"], "chatml": ["<|endoftext|>", "<|im_end|>"]}.get(name, ["<|im_end|>"])  # fmt: skip
    ids = tokenizer.convert_tokens_to_ids(ends)
    assert end_token_ids(transformers.GenerationConfig(), tokenizer) == sorted(ids)
    assert end_token_ids(transformers.GenerationConfig(eos_token_id=[5, 6]), tokenizer) == sorted([5, 6, *ids])


def test_decoded_response_shows_neither_prompt_nor_special_tokens():
    tokenizer = make_tokenizer(*SPECIAL["chatml"])
    prompt, response = (tokenizer(text)["input_ids"] for text in ("<|im_start|>user\nHi<|im_end|>\n", "Yes.<|im_end|>"))
    assert decode_response(prompt, response, tokenizer) == "Yes."


# ---- layouts --------------------------------------------------------------------------------------------------------


def masked_batch() -> dict:
    """Return pairs whose responses have untrained gaps; the last pair's two responses begin with untrained tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> list[int]:
        return torch.randint(1, 61, (n,), generator=generator).tolist()

    parts = [(4, 7, [0, 2, 5, 7], 5, [0, 5]), (3, 4, [0, 4], 9, [0, 1, 3, 4, 7, 9]), (0, 5, [0, 1, 4, 5], 3, [0, 3]),
             (5, 6, [2, 3, 5, 6], 7, [1, 4])]  # fmt: skip
    elements = [
        make_element(["", "", ""], draw(n), [draw(n_chosen), draw(n_rejected)], "keep_end", 99, 9, trained=runs)
        for n, n_chosen, chosen, n_rejected, rejected in parts
        for runs in [[chosen, rejected]]
    ]
    batch = {"prompt": [""] * len(elements)}
    for key in ("input_ids", "attention_mask", "labels"):
        for side in ("chosen", "rejected"):
            values = [torch.tensor(element[f"{side}_{key}"]) for element in elements]
            pad = -100 if key == "labels" else 0
            batch[f"{side}_{key}"] = torch.nn.utils.rnn.pad_sequence(values, True, pad)
    return batch


@pytest.mark.parametrize("make_rows", [padded_rows, shared_rows])
def test_layouts_score_labelled_tokens_as_the_original_does(make_rows):
    batch, model = masked_batch(), make_model(CONFIGS["gpt2"])
    expected = original_logps(model, batch)
    torch.testing.assert_close(response_logps(model, make_rows(batch)), expected, rtol=1e-9, atol=1e-9)
    n_trained = torch.cat([response_lengths(batch[f"{side}_labels"]) for side in ("chosen", "rejected")])
    assert n_trained.tolist() == [4, 4, 1, 2, 5, 4, 2, 3]  # nothing predicts the first token after an empty prompt


def test_packed_rows_predict_the_same_tokens_as_padded_ones():
    batch = masked_batch()
    expected = padded_rows(batch)
    for shared in (False, True):
        rows = packed_rows(batch, shared)
        order, wanted = ((r.sequences * 100 + r.offsets).argsort() for r in (rows, expected))
        for name in ("targets", "sequences", "offsets"):
            assert torch.equal(getattr(rows, name)[order], getattr(expected, name)[wanted])
        before = rows.input_ids.flatten()[rows.predictors[order]]
        assert torch.equal(before, expected.input_ids.flatten()[expected.predictors[wanted]])


def test_shared_prompt_ends_at_the_first_difference_even_of_untrained_tokens():
    n_prompt, n_chosen, n_rejected = part_lengths(masked_batch())
    assert n_prompt.tolist() == [4, 3, 0, 5]
    assert n_chosen.tolist() == [7, 4, 5, 6] and n_rejected.tolist() == [5, 9, 3, 7]


def test_key_of_a_cached_pair_depends_on_the_trained_tokens():
    batch = masked_batch()
    other = select_examples(batch, torch.arange(4)) | {"chosen_labels": batch["chosen_labels"].clone()}
    other["chosen_labels"][0, 5] = -100
    assert [a == b for a, b in zip(pair_keys(batch), pair_keys(other), strict=True)] == [False, True, True, True]
