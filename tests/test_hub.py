"""llama.py's downloads, from a Hub of our own on loopback: what arrives, what is refused, and what is left after trouble."""

import errno
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import unquote

import pytest
import torch
import transformers
from safetensors.torch import load_file

from icrl import compact_tokenizer
from llama import LlamaConfig

ROOT = Path(__file__).parent.parent
INDEX = "model.safetensors.index.json"

# --------------------------------------------------------------------------------------------------------------- the Hub


class Request(NamedTuple):
    method: str
    repository: str
    revision: str
    file: str
    start: int  # the first byte asked for
    sent: int  # bytes of the file in the answer


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def xet_hash(content: bytes) -> str:
    return digest(b"Xet" + content)


def damage(content: bytes) -> bytes:
    """The same length, another last byte."""
    return content[:-1] + bytes([content[-1] ^ 1])


class Hub:
    """Repositories of files, served as the Hugging Face Hub does: large files by a redirect to a second server."""

    def __init__(self):
        self.commits = {}  # repository: commit: file: content
        self.refs = {}  # repository: branch or tag: commit
        self.gates = {}  # repository: token: None to let it in, or status and headers of the refusal
        self.requests = []
        self.cuts = {}  # file: an iterator with the byte, or None, at which the connection of each GET breaks
        self.stored = {}  # file: a function of its content that gives what is sent for it
        self.xet = False  # whether large files are said to be in Xet
        self.after = lambda request: None  # is called with each request before it is answered, but after that is settled
        self.front, self.storage = (ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2))
        for server in (self.front, self.storage):
            server.hub = self
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def push(self, repository: str, files: dict[str, bytes], *refs: str) -> str:
        """Add a commit and let these refs, or the branch main, point at it."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits.setdefault(repository, {})[commit] = files
        self.refs.setdefault(repository, {}).update(dict.fromkeys(refs or ["main"], commit))
        return commit

    def gets(self, file: str) -> list[Request]:
        return [r for r in self.requests if r.method == "GET" and r.file == file]

    def files(self) -> set[str]:
        return {r.file for r in self.requests}

    def close(self):
        for server in (self.front, self.storage):
            server.shutdown()
            server.server_close()


def url(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        hub, front = self.server.hub, self.server is self.server.hub.front
        repository, revision, file = map(unquote, re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", self.path).groups())
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        start = int(re.search(r"bytes=(\d+)-|$", self.headers.get("Range", ""))[1] or 0)
        status, headers, content, stop = 200, {}, b"", None
        if front and (refused := hub.gates.get(repository, lambda token: None)(token)):
            status, headers = refused
        elif repository not in hub.commits:
            status, headers = 404 if token else 401, {"X-Error-Code": "RepoNotFound"}
        elif (commit := hub.refs[repository].get(revision, revision)) not in hub.commits[repository]:
            status, headers = 404, {"X-Error-Code": "RevisionNotFound"}
        elif file not in hub.commits[repository][commit]:
            status, headers = 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
        else:
            whole = hub.commits[repository][commit][file]
            headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            large = file.endswith(".safetensors") or file == "tokenizer.json"
            if large and front:
                status = 302
                headers |= {"X-Linked-ETag": f'"{digest(whole)}"', "X-Linked-Size": str(len(whole))}
                headers["Location"] = url(hub.storage) + self.path
                if hub.xet:
                    headers |= {"X-Xet-Hash": xet_hash(whole), "X-Xet-Refresh-Route": url(hub.front) + "/xet"}
            else:
                git = hashlib.sha1(b"blob %d\0" % len(whole) + whole)
                headers["ETag"] = f'"{git.hexdigest()}"'
                content = hub.stored.get(file, bytes)(whole)
                if start:
                    status, headers["Content-Range"] = 206, f"bytes {start}-{len(content) - 1}/{len(content)}"
                if self.command == "GET":
                    stop = next(hub.cuts.get(file, iter(())), None)
        body = content[start:stop] if self.command == "GET" else b""
        request = Request(self.command, repository, revision, file, start, len(body))
        hub.requests.append(request)
        hub.after(request)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = stop is not None

    do_HEAD = do_GET = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


# ------------------------------------------------------------------------------------------------------------ the client

# The Hub's library reads the environment when it is imported, so each call gets a fresh process: a fork of one that has
# imported torch, and what torch imports on the meta device, but not that library.
CLIENT = """
import errno, json, os, signal, sys, time
import safetensors.torch, tokenizers, torch

with torch.device("meta"):
    torch.nn.Linear(1, 1), torch.nn.Embedding(1, 1)
assert "huggingface_hub" not in sys.modules
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os.environ.update(request["environment"])
        import llama
        from huggingface_hub import constants, file_download
        exec(request["before"])
        try:
            value = getattr(llama, request["function"])(request["source"], revision=request["revision"])
            if isinstance(value, llama.Llama):
                safetensors.torch.save_file(value.state_dict(), request["weights"])
                value = None
            elif isinstance(value, tokenizers.Tokenizer):
                value = value.to_str()
            else:
                value = value[0].to_dict(), value[1]
            answer = {"error": None, "value": value}
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            answer = {"error": kinds, "message": str(error), "errno": getattr(error, "errno", None)}
        print(json.dumps(answer), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(json.dumps({"error": ["NoAnswer"], "message": "The client died, or took more than a minute."}), flush=True)
"""


@pytest.fixture(scope="module")
def client():
    """Takes a request in JSON, gives the answer."""
    foreign = re.compile("HF_|HUGGING_?FACE_|TRANSFORMERS_|.*_proxy$", re.IGNORECASE)
    environment = {key: value for key, value in os.environ.items() if not foreign.match(key)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", CLIENT]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, cwd=ROOT, text=True, **pipes) as process:

        def ask(**request) -> SimpleNamespace:
            print(json.dumps(request), file=process.stdin, flush=True)
            return SimpleNamespace(**json.loads(process.stdout.readline()))

        yield ask
        process.stdin.close()


@pytest.fixture
def call(hub, client, tmp_path):
    """Call a function of llama.py in a fresh process that knows this hub, and a cache that starts empty."""

    def call(function: str, source: str, revision: str | None = None, before: str = "", **environment) -> SimpleNamespace:
        hub.requests.clear()
        environment = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": url(hub.front)} | environment
        request = {"function": function, "source": source, "revision": revision, "before": before}
        return client(**request, environment=environment, weights=str(tmp_path / "loaded.safetensors"))

    return call


@pytest.fixture
def blobs(tmp_path):
    """The names of the whole files in the cache."""

    def blobs() -> set[str]:
        files = (tmp_path / "home").glob("**/blobs/*")
        return {path.name for path in files if path.is_file() and not path.name.endswith(".incomplete")}

    return blobs


@pytest.fixture
def loads(call, tmp_path):
    """Assert that load_llama gives exactly these weights."""

    def loads(expected: dict[str, torch.Tensor], *arguments, **keywords):
        (tmp_path / "loaded.safetensors").unlink(missing_ok=True)
        answer = call("load_llama", *arguments, **keywords)
        assert answer.error is None, answer.message
        loaded = load_file(tmp_path / "loaded.safetensors")
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())

    return loads


def refusal(answer: SimpleNamespace, kind: str = "ValueError") -> str:
    """The message of a ValueError, which is one sentence."""
    assert answer.error is not None, "It was not refused."
    assert kind in answer.error, answer
    assert "ValueError" in answer.error
    assert answer.message.endswith(".")
    assert not re.search(r"\n|\.\.$|[.!?] +[A-Z]", answer.message), answer.message
    return answer.message


IMPATIENT = "time.sleep = lambda seconds: None\n"  # between the tries of the library


# ------------------------------------------------------------------------------------------------------ the repositories


class Checkpoint(NamedTuple):
    files: dict[str, bytes]
    weights: dict[str, torch.Tensor]

    def shards(self) -> list[str]:
        """The files of the weights, in the order of the index."""
        if INDEX not in self.files:
            return ["model.safetensors"]
        return list(dict.fromkeys(json.loads(self.files[INDEX])["weight_map"].values()))

    def change(self, **config) -> dict[str, bytes]:
        """The files with other settings."""
        settings = json.loads(self.files["config.json"]) | config
        return self.files | {"config.json": json.dumps(settings).encode()}


def checkpoint(folder: Path, seed: int, shard: str) -> Checkpoint:
    """A random Llama as transformers saves it, with a tokenizer, and with the pickles that older repositories have too."""
    torch.manual_seed(seed)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=107,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    llama.save_pretrained(folder, max_shard_size=shard)
    compact_tokenizer().save(str(folder / "tokenizer.json"))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= dict.fromkeys(["pytorch_model.bin", "pytorch_model.bin.index.json", "original/consolidated.00.pth"], b"pickle")
    return Checkpoint(files, llama.state_dict())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Checkpoint:
    made = checkpoint(tmp_path_factory.mktemp("sharded"), 0, "40KB")
    assert len(made.shards()) == 3
    assert made.files.keys() > set(made.shards())
    return made


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Checkpoint:
    made = checkpoint(tmp_path_factory.mktemp("single"), 1, "1GB")
    assert INDEX not in made.files
    assert "model.safetensors" in made.files
    return made


# ----------------------------------------------------------------------------------------------------------- what arrives


@pytest.mark.parametrize("kind", ["sharded", "single"])
def test_a_repository_loads_by_its_id(kind, hub, call, loads, request):
    """Config, tokenizer and weights are those on the Hub; nothing but them and the index is requested, each file once."""
    made = request.getfixturevalue(kind)
    commit = hub.push("tiny/llama", made.files)
    config, revision = call("load_config", "tiny/llama").value
    assert LlamaConfig.from_dict(config) == LlamaConfig.from_dict(json.loads(made.files["config.json"]))
    assert revision == commit
    requests = list(hub.requests)
    assert call("load_tokenizer", "tiny/llama").value == compact_tokenizer().to_str()
    requests += hub.requests
    loads(made.weights, "tiny/llama")
    requests += hub.requests
    wanted = {"config.json", "tokenizer.json", *made.shards()}
    assert {r.file for r in requests} == wanted | {INDEX}
    bodies = sorted(r.file for r in requests if r.sent)
    assert bodies == sorted(wanted | ({INDEX} & made.files.keys()))


@pytest.mark.parametrize("which", ["branch", "tag", "commit"])
def test_a_branch_a_tag_or_a_commit_can_be_pinned(which, hub, call, loads, sharded, single):
    """Each gives the weights and the commit that it names, not those of main."""
    hub.push("tiny/llama", single.files)
    commit = hub.push("tiny/llama", sharded.files, "refs/pr/1", "v1.0")
    revision = {"branch": "refs/pr/1", "tag": "v1.0", "commit": commit}[which]
    assert call("load_config", "tiny/llama", revision).value[1] == commit
    loads(sharded.weights, "tiny/llama", revision)


def test_all_files_come_from_the_commit_of_the_config(hub, loads, sharded, single):
    """A branch that moves once config.json is served changes nothing: all further requests name the commit it came from."""
    commit = hub.push("tiny/llama", sharded.files)

    def move(request: Request):
        if request.sent and request.file == "config.json":
            hub.push("tiny/llama", single.files)

    hub.after = move
    loads(sharded.weights, "tiny/llama")
    assert hub.refs["tiny/llama"]["main"] != commit
    assert {r.revision for r in hub.requests if r.file == "config.json" and r.sent} == {"main"}
    others = [r for r in hub.requests if r.file != "config.json"]
    assert {r.file for r in others} == {INDEX, *sharded.shards()}
    assert {r.revision for r in others} == {commit}


def test_a_broken_download_is_taken_up_where_it_stopped(hub, call, loads, sharded):
    """After two breaks in one shard only the rest is requested, by Range, be it in the same call or, if it asks for that,
    in the next; the weights are right."""
    hub.push("tiny/llama", sharded.files)
    broken = sharded.shards()[1]
    size = len(sharded.files[broken])
    hub.cuts[broken] = iter([size // 3, 2 * size // 3])
    chunk = 1000  # the library's own is 10 MB: what arrived of the last chunk before a break is requested again
    quick = f"{IMPATIENT}constants.DOWNLOAD_CHUNK_SIZE = {chunk}"
    gets = []
    for _ in range(3):  # some versions of the library go on by themselves, others keep what they have for the next call
        answer = call("load_llama", "tiny/llama", before=quick)
        gets += hub.gets(broken)
        if answer.error is None:
            break
        assert re.search("[Rr]un it again", refusal(answer))
    loads(sharded.weights, "tiny/llama", HF_HUB_OFFLINE="1")
    assert [r.start > 0 for r in gets if r.sent] == [False, True, True]
    assert size <= sum(r.sent for r in gets) <= size + 2 * chunk


@pytest.mark.parametrize("kind", ["sharded", "single"])
def test_without_a_network_the_cache_serves(kind, hub, call, loads, request):
    """What was loaded once loads again without the Hub, be the network switched off or dead; so does the tokenizer."""
    made = request.getfixturevalue(kind)
    hub.push("tiny/llama", made.files)
    loads(made.weights, "tiny/llama")
    assert call("load_tokenizer", "tiny/llama").error is None
    for without in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": nobody()}):
        loads(made.weights, "tiny/llama", before=IMPATIENT, **without)
        assert call("load_tokenizer", "tiny/llama", before=IMPATIENT, **without).value == compact_tokenizer().to_str()
        assert hub.requests == []


def nobody() -> str:
    """An address at which no server listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def xet(hub, tmp_path) -> str:
    """Makes the hub keep large files in Xet, and gives the client's side of it: a store of contents by their Xet hash."""
    hub.xet = True
    (tmp_path / "xet").mkdir()
    for content in (content for files in chain(*map(dict.values, hub.commits.values())) for content in files.values()):
        (tmp_path / "xet" / xet_hash(content)).write_bytes(content)
    return f"""
from pathlib import Path

def xet_get(*, incomplete_path, xet_file_data, **_):
    content = (Path({str(tmp_path / "xet")!r}) / xet_file_data.file_hash).read_bytes()
    incomplete_path.write_bytes(content)

file_download.xet_get = xet_get
file_download.is_xet_available = lambda: True
"""


@pytest.fixture
def on_the_hub(hub, sharded):
    """The sharded checkpoint is there before the fixtures that come after this one."""
    hub.push("tiny/llama", sharded.files)


def test_weights_that_come_through_xet_load(on_the_hub, xet, hub, loads, sharded):
    """Xet is the Hub's other transport; the cache may then name files by their Xet hash, which is no SHA-256."""
    loads(sharded.weights, "tiny/llama", before=xet, HF_HUB_DISABLE_XET="0")
    assert not any(r.sent for r in hub.requests if r.file.endswith(".safetensors"))
    loads(sharded.weights, "tiny/llama", HF_HUB_OFFLINE="1")


# -------------------------------------------------------------------------------------------------------- what is refused


def test_an_unknown_revision_is_named(hub, call, single):
    """A revision that the repository does not have is refused by its name."""
    hub.push("tiny/llama", single.files)
    message = refusal(call("load_llama", "tiny/llama", "v9.9"))
    assert re.search(r"tiny/llama has no revision 'v9\.9'", message)


def gate(token: str):
    """As of a gated repository to which only one token has access."""
    if token != "hf_granted":
        return 403 if token else 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted."}


@pytest.mark.parametrize("token", ["", "hf_stranger"])
def test_a_gated_repository_names_the_page_and_the_login(token, hub, call, single):
    """Without a token (401) or with one that was not granted access (403) one learns where to ask and how to log in."""
    hub.push("tiny/llama", single.files)
    hub.gates["tiny/llama"] = gate
    message = refusal(call("load_llama", "tiny/llama", HF_TOKEN=token))
    assert f" {url(hub.front)}/tiny/llama" in message
    assert "`hf auth login`" in message
    assert hub.files() == {"config.json"}


def test_a_gated_repository_loads_with_the_right_token(hub, loads, single):
    """A token with access is sent, and the repository loads."""
    hub.push("tiny/llama", single.files)
    hub.gates["tiny/llama"] = gate
    loads(single.weights, "tiny/llama", HF_TOKEN="hf_granted")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "Invalid credentials in Authorization header"),
        (403, "Please enable access to public gated repositories in your fine-grained token settings"),
    ],
    ids=["expired", "fine-grained"],
)
def test_a_token_that_the_hub_rejects_is_to_blame(status, words, hub, call, single):
    """An expired token, or one without the right to read, is refused in the Hub's words; the network is not blamed."""
    hub.push("tiny/llama", single.files)
    hub.gates["tiny/llama"] = lambda token: (status, {"X-Error-Message": words})
    message = refusal(call("load_llama", "tiny/llama", HF_TOKEN="hf_old"))
    assert words in message
    assert not re.search("cannot be reached|connect to the network|arrive whole", message)


@pytest.mark.parametrize("token", ["", "hf_any"])
def test_a_repository_that_does_not_exist(token, hub, call):
    """Neither folder nor repository: that is what it says, whether the Hub answers 401 (no token) or 404."""
    message = refusal(call("load_llama", "tiny/nothing", HF_TOKEN=token))
    assert re.search("no folder tiny/nothing.*no such repository", message)
    assert hub.files() == {"config.json"}


@pytest.mark.parametrize("name", ["a/b/c", "/nowhere/at/all", "two words"])
def test_a_name_that_no_repository_can_have(name, hub, call):
    """A mistyped path is refused as such, without a request."""
    message = refusal(call("load_llama", name))
    assert message.startswith(f"{name} is neither a folder")
    assert hub.requests == []


def test_a_missing_tokenizer_is_named(hub, call, single):
    """A repository without tokenizer.json raises MissingFile with that name, also when the cache knows it and is asked."""
    hub.push("tiny/llama", {file: content for file, content in single.files.items() if file != "tokenizer.json"})
    commit = call("load_config", "tiny/llama").value[1]
    for without in ({}, {}, {"HF_HUB_OFFLINE": "1"}):
        message = refusal(call("load_tokenizer", "tiny/llama", commit, **without), "MissingFile")
        assert "tiny/llama has no tokenizer.json" in message


def test_a_missing_file_is_found_once_it_is_pushed(hub, call, single):
    """What a branch lacked is asked for again, since the branch may have moved."""
    hub.push("tiny/llama", {file: content for file, content in single.files.items() if file != "tokenizer.json"})
    refusal(call("load_tokenizer", "tiny/llama"), "MissingFile")
    hub.push("tiny/llama", single.files)
    answer = call("load_tokenizer", "tiny/llama")
    assert answer.error is None, answer.message
    assert answer.value == compact_tokenizer().to_str()


@pytest.mark.parametrize("kind", ["sharded", "single"])
def test_missing_weights_are_named(kind, hub, call, request):
    """A shard that only the index knows, or pickles alone, are refused by the name of the file that is missing."""
    made = request.getfixturevalue(kind)
    missing = made.shards()[-1]
    hub.push("tiny/llama", {file: content for file, content in made.files.items() if file != missing})
    assert f"has no {missing}" in refusal(call("load_llama", "tiny/llama"), "MissingFile")
    assert hub.files() == {"config.json", INDEX, *made.shards()}


@pytest.mark.parametrize("network", ["switched off", "dead"])
def test_without_a_network_nor_a_cache(network, hub, call, single):
    """It says that the file is neither here nor in the cache, and that the Hub cannot be reached."""
    hub.push("tiny/llama", single.files)
    without = {"HF_HUB_OFFLINE": "1"} if network == "switched off" else {"HF_ENDPOINT": nobody()}
    message = refusal(call("load_llama", "tiny/llama", before=IMPATIENT, **without))
    assert re.search("config.json of tiny/llama is neither.*cache.*the Hub cannot be reached", message)
    assert hub.requests == []


YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10_000.0}


@pytest.mark.parametrize(
    ("config", "before", "words"),
    [
        pytest.param({"model_type": "bert"}, "", "model_type.*'bert'", id="architecture"),
        pytest.param({"rope_parameters": YARN, "rope_scaling": YARN}, "", "RoPE.*yarn", id="rope"),
        pytest.param({"attention_bias": True}, "", "attention_bias = True", id="bias"),
        pytest.param({"quantization_config": {"bits": 4}}, "", "quantised", id="quantised"),
        pytest.param({}, "llama.free_memory = lambda device: 1", "only 0.0 GB free", id="too large"),
    ],
)
def test_a_refusal_comes_before_any_weight(config, before, words, hub, call, sharded):
    """What the config alone rules out is refused once config.json is there: nothing else is requested."""
    hub.push("tiny/llama", sharded.change(**config))
    assert re.search(words, refusal(call("load_llama", "tiny/llama", before=before)))
    assert hub.files() == {"config.json"}


# ------------------------------------------------------------------------------------------------- what trouble leaves behind


def test_a_damaged_shard_is_deleted(on_the_hub, hub, call, loads, blobs, sharded):
    """A shard that is not what its SHA-256 says is refused and deleted; the next call downloads that one and the rest."""
    first, second, third = sharded.shards()
    hub.stored[second] = damage
    message = refusal(call("load_llama", "tiny/llama"))
    assert re.search(f"{second} of tiny/llama arrived damaged", message)
    assert digest(sharded.files[first]) in blobs()
    assert digest(sharded.files[second]) not in blobs()
    hub.stored.clear()
    loads(sharded.weights, "tiny/llama")
    assert [len(hub.gets(shard)) for shard in (first, second, third)] == [0, 1, 1]


def test_a_shard_damaged_in_xet_is_deleted(on_the_hub, xet, hub, call, loads, tmp_path, sharded):
    """As above, where the cache keeps one copy for all repositories: that copy goes."""
    content = sharded.files[sharded.shards()[1]]
    stored = tmp_path / "xet" / xet_hash(content)
    stored.write_bytes(damage(content))
    message = refusal(call("load_llama", "tiny/llama", before=xet, HF_HUB_DISABLE_XET="0"))
    assert re.search(f"{sharded.shards()[1]} of tiny/llama arrived damaged", message)
    stored.write_bytes(content)
    loads(sharded.weights, "tiny/llama", before=xet, HF_HUB_DISABLE_XET="0")


def test_a_later_version_of_a_file_is_checked_too(hub, call, blobs, single):
    """A large file that a branch has changed is compared with its SHA-256 although an earlier version is in the cache."""
    hub.push("tiny/llama", single.files)
    assert call("load_tokenizer", "tiny/llama").error is None
    later = single.files["tokenizer.json"] + b"\n"
    hub.push("tiny/llama", single.files | {"tokenizer.json": later})
    hub.stored["tokenizer.json"] = damage
    assert "arrived damaged" in refusal(call("load_tokenizer", "tiny/llama"))
    assert digest(later) not in blobs()


@pytest.mark.parametrize("how", ["connection", "storage"])
def test_a_shard_cut_short_is_not_taken_for_whole(how, on_the_hub, hub, call, loads, blobs, sharded):
    """Its end never comes: a ValueError, no such file in the cache, not when offline either; once it comes all loads."""
    short = sharded.shards()[1]
    half = len(sharded.files[short]) // 2
    if how == "connection":  # breaks at that byte, however often one asks for the rest
        hub.cuts[short] = repeat(half)
    else:  # holds so much of it, and says so, where the Hub has announced the whole
        hub.stored[short] = lambda content: content[:half]
    message = refusal(call("load_llama", "tiny/llama", before=f"{IMPATIENT}constants.DOWNLOAD_CHUNK_SIZE = 1000"))
    assert re.search(f"^{short} of tiny/llama (could not be downloaded|did not arrive whole) .*[Rr]un it again", message)
    assert sum(r.sent for r in hub.gets(short)) >= half
    assert digest(sharded.files[short]) not in blobs()
    assert f"{short} of tiny/llama is neither" in refusal(call("load_llama", "tiny/llama", HF_HUB_OFFLINE="1"))
    hub.cuts.clear()
    hub.stored.clear()
    loads(sharded.weights, "tiny/llama")


FULL_DISK = """
class FullDisk:
    def tell(self):
        return 0

    def write(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

def http_get(url, file, **keywords):
    whole(url, FullDisk() if url.endswith(".safetensors") else file, **keywords)

whole, file_download.http_get = file_download.http_get, http_get
"""


def test_a_full_disk_is_called_that(on_the_hub, hub, call, loads, blobs, sharded):
    """The OSError that there is no space left reaches the caller; nothing of the file stays, and with space it loads."""
    answer = call("load_llama", "tiny/llama", before=FULL_DISK)
    assert "OSError" in answer.error
    assert answer.errno == errno.ENOSPC
    assert not blobs() & {digest(sharded.files[shard]) for shard in sharded.shards()}
    loads(sharded.weights, "tiny/llama")
