"""`sample.py`: a sample doesn't depend on the rest of its batch, and none is drawn twice or lost."""

import json
import math
import os
import signal

import pytest
import torch
from conftest import REPOSITORY, read_jsonl
from launcher import wait_until
from test_evaluate import RUN, trained  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM, AutoTokenizer

from basics.files import append_json_lines
from evaluation.drawing import SeededDraws
from evaluation.sample_file import sort_lines

SAMPLE = REPOSITORY / "sample.py"
PROMPTS = [f"\n\nHuman: say {'very ' * (n % 4)}much {n}\n\nAssistant:" for n in range(9)]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return f"prompts={path}"


def draw(launcher, *overrides, n_workers: int = 1) -> str:
    code = launcher.run("max_new_tokens=8", *overrides, script=SAMPLE, n_workers=n_workers)
    assert code == 0, launcher.output
    return launcher.output


def texts(path) -> list[tuple]:
    return [(line["prompt_index"], line["sample"], line["response"]) for line in read_jsonl(path)]


def test_drawn_tokens_follow_the_softmax_and_depend_only_on_their_seed():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0])
    n = 20_000
    drawn = SeededDraws(list(range(n)))(None, logits.expand(n, 4)).argmax(1)
    frequencies = drawn.bincount(minlength=4) / n
    assert torch.allclose(frequencies, logits.softmax(0), atol=0.015)  # four standard errors
    assert SeededDraws([7])(None, logits[None]).argmax(1) == drawn[7]


def test_excluded_tokens_are_never_drawn():
    logits = torch.full((5000, 6), -torch.inf)  # as top_k and top_p leave it
    logits[:, [1, 4]] = torch.tensor([0.0, -3.0])
    drawn = SeededDraws(list(range(5000)))(None, logits).argmax(1)
    assert set(drawn.tolist()) == {1, 4}
    assert (drawn == 4).float().mean() == pytest.approx(1 / (1 + math.exp(3)), abs=0.012)  # four standard errors


def test_complete_file_is_sorted_by_prompt_and_sample_once(tmp_path):
    path = tmp_path / "o.jsonl"
    lines = [{"prompt_index": i, "sample": k, "response": "é\ud83d"} for i, k in ((2, 0), (10, 1), (10, 0), (2, 1))]
    append_json_lines(str(path), lines)
    sort_lines(str(path))
    assert [place[:2] for place in texts(path)] == [(2, 0), (2, 1), (10, 0), (10, 1)]
    assert {place[2] for place in texts(path)} == {"é\ud83d"}
    sorted_file = path.stat()
    sort_lines(str(path))
    assert os.path.samestat(path.stat(), sorted_file)


@pytest.mark.skipif(os.name != "posix", reason="on Windows the open file can't be replaced, and stays unsorted")
def test_link_to_a_file_that_is_sorted_stays_a_link(tmp_path):
    path, link = tmp_path / "elsewhere.jsonl", tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps({"prompt_index": n, "sample": 0}) + "\n" for n in (1, 0)))
    link.symlink_to(path)
    sort_lines(str(link))
    assert link.is_symlink() and [line["prompt_index"] for line in read_jsonl(path)] == [0, 1]


SETUPS = {  # overrides and number of workers
    "one": (["eval_batch_size=1"], 1),
    "four": (["eval_batch_size=4"], 1),
    "FSDP": (["trainer=FSDPTrainer"], 2),
    "TP": (["trainer=TensorParallelTrainer"], 2),
    "both": (["trainer=FSDPTrainer", "tensor_parallel=2"], 4),
}


@pytest.fixture(scope="module")
def drawn(launcher, trained, prompts, tmp_path_factory):  # noqa: F811
    """Return a function that draws samples with one of the `SETUPS`, once, and returns their file."""
    directory = tmp_path_factory.mktemp("drawn")

    def draw_with(setup: str):
        if not (directory / setup).exists():
            overrides, n_workers = SETUPS[setup]
            words = [f"run={trained('dpo')}", prompts, "n=2", f"output={directory}/{setup}", *overrides]
            draw(launcher, *words, n_workers=n_workers)
        return directory / setup

    return draw_with


@pytest.mark.exhaustive
@pytest.mark.parametrize("setup", [setup for setup in SETUPS if setup != "one"])
def test_batch_size_and_workers_do_not_change_a_sample(setup, drawn):
    ours, alone = read_jsonl(drawn(setup)), read_jsonl(drawn("one"))
    assert {(line["prompt_index"], line["sample"]) for line in alone} == {(i, k) for i in range(9) for k in (0, 1)}
    assert len({line["response"] for line in alone}) > 9
    assert texts(drawn(setup)) == texts(drawn("one"))
    for line, expected in zip(ours, alone, strict=True):
        for key in ("policy_logps", "reference_logps"):
            assert line[key] == pytest.approx(expected[key], abs=1e-3), key


def test_sample_log_probabilities_equal_the_models(launcher, trained, prompts, tmp_path):  # noqa: F811
    run_dir = trained("dpo")
    draw(launcher, f"run={run_dir}", prompts, f"output={tmp_path}/o", "temperature=0.7", "top_k=50", "top_p=0.9")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "LATEST").eval()
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "LATEST")
    for line in read_jsonl(tmp_path / "o"):
        prompt = tokenizer(line["prompt"], add_special_tokens=False)["input_ids"]
        response = tokenizer(line["response"], add_special_tokens=False)["input_ids"]
        if len(response) != line["n_tokens"] or tokenizer.decode(response) != line["response"]:
            continue  # this text is tokenized differently
        with torch.no_grad():
            logps = model(torch.tensor([prompt + response])).logits[0, :-1].log_softmax(-1)
        logps = logps[len(prompt) - 1 :].gather(1, torch.tensor(response)[:, None]).sum()
        assert line["policy_logps"] == pytest.approx(logps.item(), abs=1e-3)


def test_temperature_0_draws_the_likeliest_token(launcher, trained, prompts, tmp_path):  # noqa: F811
    run_dir = trained("dpo")
    draw(launcher, f"run={run_dir}", prompts, f"output={tmp_path}/o", "temperature=0")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "LATEST").eval()
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "LATEST")
    line = next(line for line in read_jsonl(tmp_path / "o") if line["prompt_index"] == 4)
    ids = tokenizer(PROMPTS[4], add_special_tokens=False, return_tensors="pt")["input_ids"]
    for _ in range(8):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    n_prompt = len(tokenizer(PROMPTS[4], add_special_tokens=False)["input_ids"])
    assert line["response"] == tokenizer.decode(ids[0, n_prompt:], skip_special_tokens=True)


@pytest.mark.exhaustive
def test_interrupted_sampling_ends_with_the_same_file_in_the_order_of_the_data(launcher, trained, prompts, tmp_path):  # noqa: F811
    run = [f"run={trained('dpo')}", prompts, "n=2", "max_new_tokens=16", "eval_batch_size=2"]
    draw(launcher, *run, f"output={tmp_path}/whole")
    assert [place[:2] for place in texts(tmp_path / "whole")] == [(i, k) for i in range(9) for k in range(2)]
    launcher.start(*run, f"output={tmp_path}/cut", script=SAMPLE)
    wait_until(lambda: (tmp_path / "cut").exists() and (tmp_path / "cut").stat().st_size >= 600)
    launcher.kill(signal.SIGKILL)
    launcher.wait()
    with open(tmp_path / "cut", "a") as file:
        file.write('{"settings": "cut o')
    n_before = len((tmp_path / "cut").read_text().splitlines()) - 1
    assert 0 < n_before < 18
    assert f"{18 - n_before} samples drawn, {n_before} already in " in draw(launcher, *run, f"output={tmp_path}/cut")
    assert texts(tmp_path / "cut") == texts(tmp_path / "whole")
    code = launcher.run(*run, "temperature=0.5", f"output={tmp_path}/cut", script=SAMPLE)
    assert code == 1
    assert "samples that were written under other settings" in launcher.output


def test_sampling_writes_messages_checkpoints_and_alpaca_eval(launcher, trained, tmp_path):  # noqa: F811
    rows = [{"messages": [{"role": "user", "content": f"say {n}"}]} for n in range(2)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir = trained("lora")
    template = f"chat_template={REPOSITORY}/assets/human_assistant.jinja"
    draw(launcher, f"run={run_dir}", f"prompts={tmp_path}/m.jsonl", template, "checkpoint=all")
    drawn = {name: read_jsonl(run_dir / f"samples_{name}.jsonl") for name in ("step-8", "LATEST")}
    for name, examples in (("step-8", 8), ("LATEST", 16)):
        assert {(line["checkpoint"], line["examples"]) for line in drawn[name]} == {(name, examples)}
    assert [line["prompt"] for line in drawn["LATEST"]] == [row["messages"] for row in rows]
    assert drawn["step-8"] != drawn["LATEST"]
    draw(launcher, f"run={run_dir}", f"prompts={tmp_path}/m.jsonl", template, f"alpaca_eval={tmp_path}/a.json")
    entries = json.loads((tmp_path / "a.json").read_text())
    assert [set(entry) for entry in entries] == [{"instruction", "output", "generator"}] * 2
    assert [entry["output"] for entry in entries] == [line["response"] for line in drawn["LATEST"]]


def test_each_temperature_has_its_own_file(launcher, trained, prompts, tmp_path):  # noqa: F811
    run_dir = trained("dpo")
    draw(launcher, f"run={run_dir}", prompts, f"output={tmp_path}/o.jsonl", "temperature=[0,0.7]", "top_k=50")
    draw(launcher, f"run={run_dir}", prompts, f"output={tmp_path}/alone.jsonl", "temperature=0.7", "top_k=50")
    cold, warm = (read_jsonl(tmp_path / f"o_t{name}.jsonl") for name in ("0", "0.7"))
    assert warm == read_jsonl(tmp_path / "alone.jsonl") != cold
    origin = {"run": "dpo", "checkpoint": "LATEST", "examples": 16, "temperature": 0.7, "top_p": 1.0, "top_k": 50}
    assert all(line.items() >= origin.items() for line in warm)
    assert {line["temperature"] for line in cold} == {0.0}


BAD = {
    "no prompts": (["run={run}", "prompts=nowhere.jsonl"], "prompts=nowhere.jsonl: there is no such file"),
    "a negative temperature": (["run={run}", "temperature=-1"], "temperature=-1: must be 0 to 1e+06"),
    "a top_p of 0": (["run={run}", "top_p=0"], "top_p=0: must be"),
    "half a sample": (["run={run}", "n=0.5"], "n=0.5: expected an integer"),
    "no output file": (RUN, "output: name the file"),
    "no temperature": (["run={run}", "temperature=[]"], "temperature=[]: give one, or several that differ"),
    "a temperature twice": (["run={run}", "temperature=[1,1.0]"], "give one, or several that differ"),
    "one of several negative": (["run={run}", "temperature=[1,-1]"], "temperature=-1: must be 0 to 1e+06"),
    "AlpacaEval's file for two": (["run={run}", "temperature=[0,1]", "alpaca_eval=a"], "one temperature at a time"),
    "one file for several": (["run={run}", "checkpoint=all", "output=o"], "give one checkpoint at a time"),
}


@pytest.mark.parametrize("name", BAD)
def test_impossible_sampling_is_refused_before_a_model_is_loaded(name, launcher, trained):  # noqa: F811
    overrides, message = BAD[name]
    run_dir = trained("dpo")
    code = launcher.run(*(word.replace("{run}", str(run_dir)) for word in overrides), script=SAMPLE)
    assert code == 1, launcher.output
    assert message in launcher.output
    assert "Traceback" not in launcher.output
    assert "building policy" not in launcher.output


def test_rows_without_a_prompt_are_named(launcher, trained, tmp_path):  # noqa: F811
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    code = launcher.run(f"run={trained('dpo')}", f"prompts={tmp_path}/p.jsonl", f"output={tmp_path}/o", script=SAMPLE)
    assert code == 1
    assert "row 1: field 'prompt' is an empty string" in launcher.output


def test_output_of_another_model_or_other_prompts_is_refused(launcher, trained, tmp_path):  # noqa: F811
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    run_dir, options = trained("dpo"), [f"prompts={tmp_path}/p.jsonl", f"output={tmp_path}/o"]
    output = draw(launcher, *RUN, *options, f"model.archive={run_dir}/step-8")
    assert "1 sample drawn, 0 already in" in output
    assert launcher.run(*RUN, *options, f"model.archive={run_dir}/LATEST", "max_new_tokens=8", script=SAMPLE) == 1
    assert "samples that were written under other settings" in launcher.output
    (tmp_path / "p.jsonl").write_text('{"prompt": "b"}\n')
    assert launcher.run(*RUN, *options, f"model.archive={run_dir}/step-8", "max_new_tokens=8", script=SAMPLE) == 1
    assert "samples that were written under other settings" in launcher.output


def test_malformed_line_of_prompts_is_named(launcher, trained, tmp_path):  # noqa: F811
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": oops}\n')
    code = launcher.run(f"run={trained('dpo')}", f"prompts={tmp_path}/p.jsonl", f"output={tmp_path}/o", script=SAMPLE)
    assert code == 1
    assert "row 1: not JSON" in launcher.output
    assert "Traceback" not in launcher.output


def test_sampling_computes_the_reference_that_training_had_precomputed(launcher, trained, prompts, tmp_path):  # noqa: F811
    draw(launcher, f"run={trained('precomputed')}", prompts, f"output={tmp_path}/o")
    lines = read_jsonl(tmp_path / "o")
    assert all(isinstance(line["reference_logps"], float) for line in lines)
    assert any(line["reference_logps"] != line["policy_logps"] for line in lines)


OWN = {  # (content of the file, overrides, message)
    "one line without a line end": ('{"my": "data"}', "output={path}", "doesn't hold samples"),
    "the prompts": ('{"prompt": "The story"}\n', "prompts={path} output={path}", "is also the file of prompts"),
    "the prompts, for AlpacaEval": (
        '{"prompt": "The story"}', "prompts={path} output={path}.x alpaca_eval={path}", "is also the file of prompts"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_file_that_holds_no_samples_is_left_untouched(name, launcher, trained, tmp_path):  # noqa: F811
    text, words, message = OWN[name]
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    options = [word.format(path=path) for word in words.split()]
    assert launcher.run(f"run={trained('dpo')}", *options, "max_new_tokens=2", script=SAMPLE) == 1
    assert message in launcher.output
    assert path.read_text() == text


def test_folder_of_prompts_gives_all_its_prompts(launcher, trained, tmp_path):  # noqa: F811
    for name in ("train", "test"):
        (tmp_path / "prompts").mkdir(exist_ok=True)
        (tmp_path / f"prompts/{name}.jsonl").write_text(json.dumps({"prompt": f"The {name}"}) + "\n")
    options = [f"prompts={tmp_path}/prompts", f"output={tmp_path}/out.jsonl", "max_new_tokens=2"]
    assert launcher.run(f"run={trained('dpo')}", *options, script=SAMPLE) == 0, launcher.output
    assert {line["prompt"] for line in read_jsonl(tmp_path / "out.jsonl")} == {"The train", "The test"}


def test_output_of_another_running_process_is_refused(launcher, trained, tmp_path):  # noqa: F811
    path = tmp_path / "out.jsonl"
    with open(path, "ab") as file:
        fcntl = pytest.importorskip("fcntl")
        fcntl.flock(file, fcntl.LOCK_EX)
        assert launcher.run(f"run={trained('dpo')}", f"output={path}", "max_new_tokens=2", script=SAMPLE) == 1
    assert "another process is drawing into it" in launcher.output


def test_prompts_in_a_file_need_neither_data_nor_an_optimizer(launcher, trained, prompts, tmp_path):  # noqa: F811
    run_dir = trained("dpo")
    output = draw(launcher, f"run={run_dir}", prompts, f"output={tmp_path}/o", "datasets=[/nowhere/at-all.jsonl]")
    assert "optimizer" not in output and "nowhere" not in output
    assert len(read_jsonl(tmp_path / "o")) == 9
    # the same texts and log-probabilities as with the data
    draw(launcher, f"run={run_dir}", f"output={tmp_path}/data", "n_eval_examples=2", "temperature=0")
    texts_of_data = read_jsonl(tmp_path / "data")
    given = [{"prompt": line["prompt"]} for line in texts_of_data]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    draw(launcher, f"run={run_dir}", f"prompts={tmp_path}/p.jsonl", f"output={tmp_path}/file", "temperature=0")
    for line, expected in zip(read_jsonl(tmp_path / "file"), texts_of_data, strict=True):
        assert line["response"] == expected["response"]
        assert line["policy_logps"] == pytest.approx(expected["policy_logps"], abs=1e-3)


@pytest.mark.parametrize(("number", "moment"), [(signal.SIGINT, "loading"), (signal.SIGTERM, "drawing")])
def test_signal_ends_sampling_with_whole_lines(number, moment, launcher, trained, prompts, tmp_path):  # noqa: F811
    run_dir, path = trained("dpo"), tmp_path / "o.jsonl"
    words = [f"run={run_dir}", prompts, "n=200", "eval_batch_size=1", f"output={path}"]
    launcher.start(*words, script=SAMPLE, in_order=True)
    if moment == "loading":
        wait_until(lambda: "building policy" in launcher.output)
    else:
        wait_until(lambda: path.exists() and path.stat().st_size)
    launcher.kill(number)
    assert launcher.wait() == {signal.SIGTERM: 75, signal.SIGINT: 130}[number], launcher.output
    assert "Traceback" not in launcher.output and f"stopped by {number.name}" in launcher.output
    assert path.exists() == (moment == "drawing")
    if moment == "drawing":
        assert 0 < len(read_jsonl(path)) < 1800
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]
