"""`python train.py` with models and datasets by their ids, from a hub on loopback (see hub_server.py)."""

import functools
import gzip
import io
import re
import shutil

import pytest
import torch
import transformers
from conftest import ORACLE, mark_exhaustive_except, read_jsonl
from hub_server import TOKEN, Hub
from launcher import train_after
from test_cli import assert_refused
from test_formats import jsonl, parquet
from test_own_data import RUN, pairs

pytestmark = pytest.mark.slow

PYTHIA, HH, SHP, SE = (
    "EleutherAI/pythia-2.8b", "Anthropic/hh-rlhf", "stanfordnlp/SHP", "HuggingFaceH4/stack-exchange-preferences"
)  # fmt: skip
SHORT = [
    "max_length=128", "max_prompt_length=64", "n_examples=4", "n_eval_examples=4", "eval_batch_size=4",
    "sample_during_eval=false", "do_first_eval=false",
]  # fmt: skip
DPO = ["loss=dpo", "model=pythia28", *SHORT]
CARD = b"---\nlicense: mit\ntags:\n- human-feedback\n---\n# A dataset\n"


def model_files() -> dict[str, bytes]:
    """Return a small GPT-NeoX and its tokenizer as the files of a hub repository."""
    return {path.name: path.read_bytes() for path in (ORACLE / "model").iterdir()}


def hh_files() -> dict[str, bytes]:
    """Return files as in Anthropic/hh-rlhf: compressed JSON Lines, two splits in each of four folders.

    There are also red-team attempts in another format, which belong to no split.
    """
    files = {
        "README.md": CARD,
        ".gitattributes": b"",
        "red-team-attempts/red_team_attempts.jsonl.gz": gzip.compress(b"[]"),
    }
    for split in ("train", "test"):
        rows = read_jsonl(ORACLE / f"hh/{split}.jsonl")
        for i, folder in enumerate(("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")):
            files[f"{folder}/{split}.jsonl.gz"] = gzip.compress(jsonl(rows[i::4]))
    return files


def hh_viewer_info() -> dict:
    """Return the dataset viewer's information, from which the library takes columns and numbers of rows."""
    text = {"dtype": "string", "_type": "Value"}
    counts = {split: len(read_jsonl(ORACLE / f"hh/{split}.jsonl")) for split in ("train", "test")}
    splits = {split: {"name": split, "num_bytes": 1, "num_examples": n} for split, n in counts.items()}
    return {"default": {"features": {"chosen": text, "rejected": text}, "splits": splits, "builder_name": "json"}}


def shp_files() -> dict[str, bytes]:
    """Return files as in stanfordnlp/SHP: a folder for each subreddit, with three splits of JSON Lines."""
    files, rows = {"README.md": CARD}, read_jsonl(ORACLE / "shp/train.jsonl")
    for i, subreddit in enumerate(("askacademia", "askbaking")):
        of_subreddit = rows[i::2]
        parts = {"test": of_subreddit[:5], "validation": of_subreddit[5:10], "train": of_subreddit[10:]}
        files |= {f"{subreddit}/{split}.json": jsonl(part) for split, part in parts.items()}
    return files


def se_files() -> dict[str, bytes]:
    """Return files as in HuggingFaceH4/stack-exchange-preferences: Parquet in data/, answers as lists of structs."""
    files = {"README.md": CARD}
    for site in ("ai", "cooking"):
        rows = []
        for i in range(150):
            answer = {"author": "a", "author_id": 1, "author_profile": "", "selected": False}
            texts = [f"<p>{site} {i} <code>{j}</code></p>" for j in range(3)]
            answers = [{"answer_id": j, "pm_score": j, "text": text, **answer} for j, text in enumerate(texts)]
            row = {"qid": i, "question": f"<p>{site} {i}?</p>", "answers": answers}
            rows.append({**row, "date": "2013/1/1", "metadata": [""]})
        files[f"data/{site}.stackexchange.com.parquet"] = parquet(rows)
    return files


@pytest.fixture(scope="module")
def repository_files():
    return {"model": model_files(), "hh": hh_files(), "shp": shp_files(), "se": se_files()}


@pytest.fixture
def hub(repository_files, hub_address):
    """A hub that holds pythia-2.8b and hh."""
    with Hub(hub_address) as hub:
        hub.repository("models", PYTHIA).commit(repository_files["model"])
        hub.repository("datasets", HH, viewer_info=hh_viewer_info()).commit(repository_files["hh"])
        yield hub


# make the library retry at once; by default it waits up to 8 seconds each time
IMPATIENT = """
import time, types
from huggingface_hub.utils import _http
_http.time = types.SimpleNamespace(**vars(time) | {"sleep": lambda seconds: time.sleep(seconds / 100)})
"""


@pytest.fixture
def impatient(train_from_hub, tmp_path_factory):
    """Return a function like `train_from_hub`, but the library retries without waiting."""
    return functools.partial(train_from_hub, script=train_after(IMPATIENT, tmp_path_factory.mktemp("impatient")))


@pytest.fixture
def online(impatient, train_in_new_python, hub, hub_address):
    """Return a function that runs `train.py` with the hub of the fixture `hub`."""

    def run(*overrides: str, env: dict[str, str] | None = None, **kwargs):
        if "HF_HUB_OFFLINE" in (env or {}):  # it is read at imports
            return train_in_new_python(*overrides, env={**hub_address.environment(), **env})
        return impatient(*overrides, env=env, **kwargs)

    return run


@pytest.fixture
def online_ok(online):
    def run(*overrides: str, **kwargs) -> str:
        result = online(*overrides, **kwargs)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    return run


def final_weights(tmp_path) -> dict[str, torch.Tensor]:
    return torch.load(tmp_path / "run/LATEST/policy.pt", weights_only=True)["state"]


@pytest.mark.parametrize(
    ("name", "repo_id", "n_pairs"),
    mark_exhaustive_except([("shp", SHP, None), ("se", SE, 297 * 3)], ("se", SE, 297 * 3)),
)
def test_named_datasets_are_read_from_the_hub(name, repo_id, n_pairs, online_ok, hub, repository_files):
    hub.repository("datasets", repo_id).commit(repository_files[name])
    output = online_ok(*DPO, f"datasets=[{name}]", "data_only=true")
    commit = hub.repository("datasets", repo_id).refs["main"][:7]
    assert f"of {repo_id} at commit {commit}\n" in output
    if n_pairs is not None:
        assert f"Training data: {n_pairs - n_pairs % 4} examples per epoch" in output
    downloads = hub.downloads()
    assert set(downloads.values()) == {1}
    assert data_files(repository_files[name]) <= set(downloads)


def data_files(files: dict[str, bytes]) -> set[str]:
    return {file for file in files if file.endswith((".gz", ".json", ".parquet")) and "red-team" not in file}


def first_chosen_logps(run_dir) -> float:
    return next(line["logps_train/chosen"] for line in read_jsonl(run_dir / "metrics.jsonl") if "lr" in line)


def sharded(files: dict[str, bytes], tmp_path) -> dict[str, bytes]:
    """Replace the model's weights by several files with an index."""
    model = transformers.AutoModelForCausalLM.from_pretrained(ORACLE / "model")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    shards = {path.name: path.read_bytes() for path in (tmp_path / "sharded").glob("model*")}
    return {name: content for name, content in files.items() if name != "model.safetensors"} | shards


def pickled(files: dict[str, bytes], tmp_path) -> dict[str, bytes]:
    """Replace the model's weights by a pytorch_model.bin, as in older repositories."""
    model, buffer = transformers.AutoModelForCausalLM.from_pretrained(ORACLE / "model"), io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return {name: content for name, content in files.items() if name != "model.safetensors"} | {
        "pytorch_model.bin": buffer.getvalue()
    }


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", [sharded, pickled])
def test_sharded_and_pickled_weights_train_the_same(form, online_ok, hub, repository_files, tmp_path):
    online_ok(*DPO, f"local_run_dir={tmp_path}/run")
    expected = final_weights(tmp_path)
    shutil.rmtree(tmp_path / "run")
    hub.repository("models", PYTHIA).commit(form(repository_files["model"], tmp_path))
    online_ok(*DPO, f"local_run_dir={tmp_path}/run")
    ours = final_weights(tmp_path)
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


def test_dpo_trains_on_hh_from_the_hub_and_later_runs_need_no_hub(online_ok, hub, repository_files, tmp_path):
    output = online_ok(*DPO, f"local_run_dir={tmp_path}/first")
    assert f"of {HH} at commit {hub.repository('datasets', HH).refs['main'][:7]}\n" in output
    assert "Training data: 240 examples per epoch" in output
    assert re.search(r"^ *4/\d+ ", output, re.MULTILINE)
    downloads = hub.downloads()
    assert set(downloads.values()) == {1}
    assert data_files(repository_files["hh"]) | {"model.safetensors", "tokenizer.json", "config.json"} <= set(downloads)
    assert not any("red-team" in file for file in downloads)

    n_requests = []
    for save_every in (8, 4):  # saving asks the hub for nothing
        hub.requests.clear()
        online_ok(*DPO, "n_examples=8", f"save_every={save_every}")
        assert hub.downloads() == {}
        n_requests.append(len(hub.requests))
    assert n_requests[0] == n_requests[1]

    for name, content in repository_files["hh"].items():
        (tmp_path / "hh" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hh" / name).write_bytes(content)
    online_ok(*DPO, f"dataset_paths.hh={tmp_path}/hh", f"local_run_dir={tmp_path}/folder")
    assert first_chosen_logps(tmp_path / "folder") == first_chosen_logps(tmp_path / "first")

    hub.stop()
    offline = online_ok(*DPO, f"local_run_dir={tmp_path}/offline")
    assert f"hh (train): reading {HH} from the cache" in offline
    assert "can't be reached" in offline
    assert first_chosen_logps(tmp_path / "offline") == first_chosen_logps(tmp_path / "first")


@pytest.mark.exhaustive
def test_offline_mode_uses_the_cache_without_mentioning_the_hub(online_ok, hub):
    online_ok(*DPO, "data_only=true")
    hub.stop()
    offline = online_ok(*DPO, "data_only=true", env={"HF_HUB_OFFLINE": "1"})
    assert f"hh (train): reading {HH} from the cache" in offline
    assert "can't be reached" not in offline


@pytest.mark.parametrize("env", mark_exhaustive_except([{}, {"HF_HUB_OFFLINE": "1"}], {}))
def test_unreachable_hub_without_cache_names_what_is_missing(env, online, hub, tmp_path):
    hub.stop()
    assert_refused(
        online(*DPO, env=env), tmp_path, f"model.name_or_path={PYTHIA}: We couldn't connect", "HF_HUB_OFFLINE unset"
    )
    local = f"model.name_or_path={ORACLE}/model"
    refused = online(*DPO, local, env=env)
    assert_refused(
        refused, tmp_path, f"[hh], train split: can't load '{HH}'", "HF_HUB_OFFLINE unset", "dataset_paths.hh=DIR"
    )


LOGIN = ["hf auth login", "HF_TOKEN"]
UNKNOWN = ["there is no such folder, and the hub has no", *LOGIN]
NOT_LOGGED_IN = ["it is gated, and you are not logged in", "Ask for access on https://huggingface.co/", *LOGIN]
NO_ACCESS = ["it is gated, and your account has no access", "Ask for access on https://huggingface.co/", *LOGIN]
TOKENIZER = "model.tokenizer_name_or_path"
LLAMA = "meta-llama/Llama-3.1-8B"
REFUSALS = {  # overrides, the user's token, and the message
    "gated model, no token": (["model=llama3-8b"], "", [f"model.name_or_path={LLAMA}: ", *NOT_LOGGED_IN]),
    "gated model, another's token": (["model=llama3-8b"], "hf_other", [f"model.name_or_path={LLAMA}: ", *NO_ACCESS]),
    "no such model": (["model=gptj"], "", ["model.name_or_path=EleutherAI/gpt-j-6b: ", *UNKNOWN]),
    "no such model for this token": (["model=gptj"], "hf_other", ["spelling of EleutherAI/gpt-j-6b", *UNKNOWN]),
    "gated tokenizer": ([f"{TOKENIZER}={LLAMA}"], "", [f"tokenizer of {TOKENIZER}={LLAMA}", *NOT_LOGGED_IN]),
    "no such tokenizer": ([f"{TOKENIZER}=a/b"], "", [f"tokenizer of {TOKENIZER}=a/b", *UNKNOWN]),
    "gated archive": ([f"model.archive={LLAMA}"], "", [f"model.archive={LLAMA}: ", *NOT_LOGGED_IN]),
    "no such archive": (["model.archive=a/b"], "", ["model.archive=a/b: ", *UNKNOWN]),
    "gated dataset": (["dataset_paths.hh=a/gated"], "", ["can't load 'a/gated'", "hh=DIR", *NOT_LOGGED_IN]),
    "gated dataset, another's token": (["dataset_paths.hh=a/gated"], "hf_other", ["datasets/a/gated", *NO_ACCESS]),
    "no such dataset": (["dataset_paths.hh=a/none"], "", ["can't load 'a/none'", "dataset_paths.hh=DIR", *UNKNOWN]),
    "no such dataset for this token": (["dataset_paths.hh=a/none"], "hf_other", ["can't load 'a/none'", *UNKNOWN]),
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    mark_exhaustive_except(
        REFUSALS, "gated model, no token", "no such archive", "gated dataset, another's token",
        "no such dataset for this token",
    ),
)  # fmt: skip
def test_gated_or_missing_repository_is_named_with_a_remedy(case, online, hub, repository_files, tmp_path):
    overrides, token, parts = REFUSALS[case]
    hub.repository("models", LLAMA, gated=True).commit(repository_files["model"])
    hub.repository("datasets", "a/gated", gated=True).commit(repository_files["hh"])
    refused = online("loss=dpo", "model=pythia28", *SHORT, *overrides, env={"HF_TOKEN": token})
    assert_refused(refused, tmp_path, *parts)
    message = refused.stderr[refused.stderr.index("error: ") :]
    assert message.count("\n") == 2  # cause and remedy


def test_gated_model_trains_with_a_granted_token(online_ok, hub, repository_files):
    hub.repository("models", LLAMA, gated=True).commit(repository_files["model"])
    online_ok("loss=dpo", "model=llama3-8b", "model.block_name=null", *SHORT, env={"HF_TOKEN": TOKEN})


@pytest.mark.parametrize(
    ("word", "part"),
    mark_exhaustive_except(
        [
            ("model.safetensors", f"model.name_or_path={PYTHIA}: the hub is overloaded or down (500 for "),
            ("helpful-base/train.jsonl.gz", f"can't load '{HH}': the hub is overloaded or down (500 for "),
        ],
        lambda case: case[0] != "model.safetensors",
    ),
)
def test_server_error_is_not_reported_as_a_missing_file(word, part, online, hub, tmp_path):
    hub.status[word] = 500, ""
    refused = online(*DPO)
    assert_refused(refused, tmp_path, part, f"/{word})", "Start again later; downloaded files are kept")


@pytest.mark.exhaustive
def test_interrupted_download_resumes(online_ok, hub, tmp_path):
    config = transformers.AutoConfig.from_pretrained(ORACLE / "model", hidden_size=384, intermediate_size=2048)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "large")
    files = model_files() | {path.name: path.read_bytes() for path in (tmp_path / "large").iterdir()}
    assert len(files["model.safetensors"]) > 15 << 20
    hub.repository("models", PYTHIA).commit(files)
    hub.cut_off["model.safetensors"] = 14 << 20
    online_ok(*DPO)
    # the library writes chunks of 10 MB, so 10 of the 14 MB were kept
    assert ("GET", f"{PYTHIA}#model.safetensors", f"bytes={10 << 20}-") in hub.requests


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("model-00002-of-00003.safetensors", f"model.name_or_path={PYTHIA}: the hub ("),
        ("helpful-base/train.jsonl.gz", f"can't load '{HH}': the hub ("),
    ],
)
def test_restart_after_a_lost_hub_downloads_only_missing_files(
    file, part, impatient, repository_files, hub_address, tmp_path
):
    files = sharded(repository_files["model"], tmp_path)
    assert "model-00003-of-00003.safetensors" in files

    def open_hub() -> Hub:
        hub = Hub(hub_address)
        hub.repository("models", PYTHIA).commit(files)
        hub.repository("datasets", HH).commit(repository_files["hh"])
        return hub

    with open_hub() as first:
        first.cut_off[file] = 1000
        first.on_cut_off = first.stop
        refused = impatient(*DPO)
    assert_refused(refused, tmp_path, part, "can't be reached", "start again; downloaded files are kept")
    # files are downloaded several at a time, so that others may have been broken off, too
    snapshots = hub_address.home.glob("hub/*/snapshots/*")
    kept = {path.relative_to(snapshot).as_posix() for snapshot in snapshots for path in snapshot.rglob("*.*")}
    assert len(kept) >= 2 and file not in kept
    with open_hub() as second:
        result = impatient(*DPO)
    assert result.returncode == 0, result.stderr[-2000:]
    after = second.downloads()
    assert file in after and not after.keys() & kept and set(after.values()) == {1}


@pytest.mark.exhaustive
def test_only_one_of_several_workers_downloads_each_file(online_ok, hub):
    online_ok(*DPO, "trainer=FSDPTrainer", "world_size=2", forks_workers=True)
    assert set(hub.downloads().values()) == {1}
    assert {"model.safetensors", "tokenizer.json", "helpful-base/train.jsonl.gz"} <= set(hub.downloads())


def test_damaged_hub_file_is_named_with_its_cached_copy(online, hub, repository_files, tmp_path):
    files = repository_files["hh"] | {
        "helpful-base/train.jsonl.gz": repository_files["hh"]["helpful-base/train.jsonl.gz"][:-20]
    }
    commit = hub.repository("datasets", HH).commit(files)
    name = f"hf://datasets/{HH}@{commit}/helpful-base/train.jsonl.gz"
    refused = online(*DPO)
    assert_refused(
        refused,
        tmp_path,
        f"{name}, line ",
        "the compressed data ends too early",
        "delete that to download it again",
    )
    assert f"snapshots/{commit}/helpful-base/train.jsonl.gz" in refused.stderr


@pytest.mark.exhaustive
def test_damaged_arrow_files_of_a_hub_dataset_are_read_again(online, online_ok, hub, tmp_path):
    only_data = [*DPO, "datasets=[hh]", "data_only=true"]
    online_ok(*only_data)
    for n_warnings in (1, 0):
        if n_warnings:
            (path,) = tmp_path.rglob("hh-rlhf-train.arrow")
            path.write_bytes(path.read_bytes().replace(b"Human", b"Hum\0n"))
        assert online_ok(*only_data).count(f"WARNING: {path.parent} is damaged (hh-rlhf-train.arrow") == n_warnings
    path.write_bytes(path.read_bytes().replace(b"Human", b"Hum\0n"))
    hub.stop()
    assert_refused(online(*only_data), tmp_path, f"{path.parent} is damaged", "Start once where the hub can be reached")


def test_current_commit_comes_from_the_hub_or_else_from_the_cache(train_from_hub, hub, tmp_path):
    script = tmp_path / "commit.py"
    script.write_text("from data.hub import current_commit; print(current_commit('someone/judge', 'cache'))")

    def commit() -> str:
        return train_from_hub(script=script, as_typed=True).stdout.splitlines()[-1]

    repository = hub.repository("models", "someone/judge")
    first = repository.commit(model_files())
    assert commit() == first
    second = repository.commit({**model_files(), "other": b""})
    assert commit() == second
    for revision in (first, second):
        folder = tmp_path / "cache/models--someone--judge/snapshots" / revision
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs/main").write_text(first)
    hub.stop()
    assert commit() == first


def test_hub_dataset_is_chosen_by_id_config_and_splits(train_from_hub, hub_address, tmp_path):
    card = """---
configs:
- config_name: helpful
  data_files:
  - split: train_prefs
    path: helpful/train.parquet
  - split: test_prefs
    path: helpful/test.parquet
- config_name: honest
  data_files: honest/rows.parquet
---
"""
    files = {
        "README.md": card.encode(),
        "helpful/train.parquet": parquet(pairs(*(f"helpful {i}" for i in range(12)))),
        "helpful/test.parquet": parquet(pairs(*(f"test {i}" for i in range(5)))),
        "honest/rows.parquet": parquet(pairs(*(f"honest {i}" for i in range(10)))),
    }
    with Hub(hub_address) as hub:
        hub.repository("datasets", "lab/prefs").commit(files)

        def run(dataset: str, *overrides: str):
            return train_from_hub(*RUN, f"datasets=['{dataset}']", *overrides)

        splits = ["train_split=train_prefs", "test_split=test_prefs"]
        result = run("lab/prefs:helpful", *splits, "data_only=true")
        assert result.returncode == 0, result.stdout + result.stderr
        for text in ("12 rows read, 12 prompts", "5 rows read, 5 prompts", "Training data: 12 examples"):
            assert text in result.stdout
        result = run("lab/prefs:honest", "data_only=true")
        assert result.returncode == 0, result.stdout + result.stderr
        assert "10 rows read" in result.stdout and "held out from the training data" in result.stdout
        assert_refused(
            run("lab/prefs:helpful"), tmp_path / "none", "no split 'train'; its splits are train_prefs, test"
        )
        assert_refused(
            run("lab/prefs:helpful", "train_split=x"), tmp_path / "none", "train_split=x: it has no such split"
        )
        assert_refused(run("lab/prefs"), tmp_path / "none", "lab/prefs", "helpful", "honest")
