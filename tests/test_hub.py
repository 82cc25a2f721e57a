"""llama.py's downloads from a local copy of the Hub: what arrives, and what is refused."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import transformers
from tokenizers import Tokenizer, models

import llama
from llama import LlamaConfig, load_config, load_llama, load_tokenizer

WORDS = {f"w{i}": i for i in range(64)}
WANTED = r"(config|tokenizer)\.json|.*\.safetensors(\.index\.json)?"


class Handler(BaseHTTPRequestHandler):  # the Hugging Face Hub, with tiny/llama only
    def do_GET(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        pattern = r"(?:/api/models)?/(\w+/\w+)/(revision|tree|resolve)/(refs/pr/1|[^/]+)/?(.*)"
        repository, kind, revision, file = re.fullmatch(pattern, path).groups()
        commit = hub.refs.get(revision, revision)
        files = hub.commits.get(commit, {})
        status, fault, content = 200, "", b""
        if repository != "tiny/llama":
            status, fault = 401, "RepoNotFound"
        elif not files:
            status, fault = 404, "RevisionNotFound"
        elif kind != "resolve":
            entry = {"type": "file", "oid": "", "size": 0}
            tree = [entry | {"path": name, "rfilename": name} for name in files]
            info = {"id": repository, "sha": commit, "siblings": tree}
            content = json.dumps(tree if kind == "tree" else info).encode()
        elif hub.token and self.headers["Authorization"] != f"Bearer {hub.token}":
            status, fault = 403, "GatedRepo"
        else:
            content = files[file]
        self.send_response(status)
        headers = {"X-Error-Code": fault, "X-Repo-Commit": commit, "ETag": hash(content)}
        for name, value in (headers | {"Content-Length": len(content)}).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            hub.gets += [(commit, file)] if file else []
            hub.meanwhile.get(file, int)()
            self.wfile.write(content[: hub.cuts.get(file)])

    do_HEAD, log_message = do_GET, print


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub, which llama.py asks with the settings `hub.client`, and an empty cache."""
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.commits, hub.refs = {}, {}  # {commit: {file: content}}, {branch or tag: commit}
    hub.cuts, hub.meanwhile = {}, {}  # by file: how many bytes come, what happens meanwhile
    hub.token, hub.gets = None, []  # the token needed; (commit, name) of each file sent
    hub.client = {"endpoint": f"http://127.0.0.1:{hub.server_port}", "cache_dir": tmp_path / "a"}
    get = huggingface_hub.snapshot_download
    monkeypatch.setattr(llama, "snapshot_download", lambda *a, **k: get(*a, **k, **hub.client))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", int)  # between the library's tries
    monkeypatch.setenv("NO_PROXY", "*")
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()


def push(hub, files: dict[str, bytes], ref: str = "main") -> str:
    hub.refs[ref] = commit = f"{len(hub.commits):040x}"
    hub.commits[commit] = files
    return commit


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoints as transformers saves them, with a tokenizer and pickles: (files, weights)."""
    made, config = {}, transformers.LlamaConfig(**LlamaConfig(64, 16, 32, 2, 2, 1, 8).to_dict())
    for kind, size in {"single": "1GB", "sharded": "12KB"}.items():
        folder, network = tmp_path_factory.mktemp(kind), transformers.LlamaForCausalLM(config)
        network.save_pretrained(folder, max_shard_size=size)
        Tokenizer(models.WordLevel(WORDS, unk_token="w0")).save(str(folder / "tokenizer.json"))
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        files |= dict.fromkeys(["pytorch_model.bin", "original/consolidated.00.pth"], b"pickle")
        made[kind] = files, network.state_dict()
    return made


def assert_loads(weights: dict, revision: str = ""):
    loaded = load_llama("tiny/llama", revision=revision).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(loaded[name].equal(weight) for name, weight in weights.items())


def refused(words: str, source="tiny/llama", revision="") -> str:
    """Assert that load_llama raises a ValueError with these words: one sentence, with a cause."""
    with pytest.raises(ValueError, match=words) as caught:
        load_llama(source, revision=revision)
    assert not re.search(r"\n|[.!?] +[A-Z]", str(caught.value))
    assert caught.value.__cause__ is not None
    return str(caught.value)


@pytest.mark.parametrize(("kind", "other"), [("single", "sharded"), ("sharded", "single")])
def test_a_repository_loads_by_its_id(kind, other, hub, made):
    """What is needed arrives once, from one commit, even if the branch moves meanwhile."""
    commit = push(hub, made[kind][0])
    hub.meanwhile["config.json"] = lambda: push(hub, made[other][0])
    assert_loads(made[kind][1])
    config, folder = load_config("tiny/llama", commit)
    assert (config.hidden_size, folder.name) == (16, commit)
    assert load_tokenizer(folder).get_vocab() == WORDS
    wanted = [f for f in made[kind][0] if re.fullmatch(WANTED, f)]
    assert sorted(hub.gets) == [(commit, file) for file in sorted(wanted)]


@pytest.mark.parametrize("ref", ["refs/pr/1", "v1.0", None])
def test_a_branch_a_tag_or_a_commit_can_be_pinned(ref, hub, made):
    push(hub, made["single"][0])
    commit = push(hub, made["sharded"][0], ref or "another")
    assert load_config("tiny/llama", ref or commit)[1].name == commit
    assert_loads(made["sharded"][1], ref or commit)


@pytest.mark.parametrize("option", [{"local_files_only": True}, {"endpoint": "http://127.0.0.1:9"}])
def test_without_a_network_the_cache_serves(option, hub, made):
    """Switched off or broken: what was loaded loads again, and what is missing is refused."""
    push(hub, made["sharded"][0])
    assert_loads(made["sharded"][1])
    push(hub, made["single"][0], "v1.0")
    load_config("tiny/llama", "v1.0")
    hub.client |= option
    hub.gets.clear()
    assert_loads(made["sharded"][1])
    for revision in ("v1.0", "v2.0"):  # without its weights, and without any file
        refused("not in the Hub's cache: go online", revision=revision)
    assert hub.gets == []


@pytest.mark.parametrize("token", [False, "stranger"])
def test_what_cannot_be_downloaded_is_named(token, hub, made):
    """A gated repository without its token, and what does not exist or cannot exist."""
    push(hub, made["single"][0])
    hub.token, hub.client["token"] = "granted", token
    refused("tiny/llama is gated: .*`hf auth login`")
    hub.client["token"] = "granted"
    assert_loads(made["single"][1])
    refused("tiny/llama .*Revision ?Not ?Found", revision="v9.9")
    refused("tiny/nothing .*Repository ?Not ?Found", "tiny/nothing")
    refused("no-.-thing .*HFValidationError", "no-/-thing")


def test_a_shard_that_was_cut_short_is_not_used(hub, made):
    """It is refused, and the cache does not hold it. Once it arrives whole, all loads."""
    push(hub, made["sharded"][0])
    hub.cuts["model-00002-of-00003.safetensors"] = 5000
    refused("tiny/llama cannot be downloaded")
    hub.client["local_files_only"] = True
    refused("not in the Hub's cache")
    hub.client["local_files_only"] = False
    hub.cuts.clear()
    assert_loads(made["sharded"][1])


def test_a_damaged_file_of_the_cache_is_named(hub, made):
    """Once the named file is deleted, it is downloaded again, and all loads."""
    push(hub, made["single"][0])
    assert_loads(made["single"][1])
    os.truncate(load_config("tiny/llama")[1] / "model.safetensors", 5000)
    os.unlink(refused("/.*Safetensor").split()[0])
    assert_loads(made["single"][1])


@pytest.mark.parametrize("single", [True, False])
def test_the_weights_are_one_file_or_else_those_of_the_index(single, hub, made):
    """They may be in a subfolder. Each is fetched once, and no other weights are."""
    files, weights = made["sharded"]
    moved = {f.replace("model-", "parts/part-"): content for f, content in files.items()}
    index = "model.safetensors.index.json"
    moved[index] = files[index].replace(b"model-", b"parts/part-")
    others = dict.fromkeys(["model_old.safetensors", "model-00009.safetensors"], b"no weights")
    one = {"model.safetensors": made["single"][0]["model.safetensors"]} if single else {}
    push(hub, moved | others | one)
    assert_loads(made["single"][1] if single else weights)
    fetched = sorted(name for _, name in hub.gets if "safetensors" in name and name != index)
    assert fetched == sorted(one or (name for name in moved if "part-" in name))


def test_pickles_are_never_fetched_nor_weights_that_the_config_rules_out(hub, made):
    files, _ = made["single"]
    push(hub, {name: content for name, content in files.items() if "safetensors" not in name})
    with pytest.raises(ValueError, match="is incomplete"):
        load_llama("tiny/llama")
    push(hub, files | {"config.json": b'{"model_type": "bert"}'}, "v1.0")
    refused("bert", revision="v1.0")
    assert {name for _, name in hub.gets} == {"config.json", "tokenizer.json"}


def test_the_program_downloads_and_then_needs_no_network(hub, made, tmp_path, monkeypatch):
    push(hub, made["sharded"][0])
    monkeypatch.setenv("HF_ENDPOINT", hub.client["endpoint"])
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for offline in "01":
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        command = [sys.executable, llama.__file__, "tiny/llama", "w3"]
        assert re.fullmatch(r"w3( w\d+){40}\n", subprocess.check_output(command, text=True))
    assert len(hub.gets) == 6
