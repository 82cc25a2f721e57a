"""llama.py against transformers' LlamaForCausalLM with the same random weights."""

import copy
import json
import os
import re
import runpy
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ia3 import IA3
from llama import KVCache, Llama, LlamaConfig, attend_to_cache, load_llama
from llama import load_tokenizer, memory_budget, rope_frequencies

ROOT = Path(__file__).parent.parent
NAMES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
NAMES += ["num_key_value_heads", "rms_norm_eps", "rope_theta"]
SMALL = dict(zip(NAMES, (97, 32, 48, 2, 4, 2, 1e-3, 500_000.0)))
SMALL |= {"initializer_range": 0.2, "eos_token_id": None}  # with 0.02 hardly anything would differ
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
OLD = {"type" if key == "rope_type" else key: value for key, value in LLAMA3.items()}
EARLY = LLAMA3 | {"original_max_position_embeddings": 32}  # most of TOKENS are beyond it
OTHER = LLAMA3 | {"original_max_position_embeddings": 1024, "factor": 32.0, "high_freq_factor": 2.0}
OFFICIAL = dict(zip(NAMES, (128_256, 4096, 14_336, 32, 32, 8, 1e-5, 500_000.0)))
OFFICIAL |= {"model_type": "llama", "max_position_embeddings": 131_072, "rope_scaling": LLAMA3}
SPELLINGS = [{}, {"rope_scaling": OLD}, {"rope_scaling": OLD | LLAMA3}]
SPELLINGS += [{"rope_scaling": None, "rope_parameters": OLD}]  # transformers 5
SPELLINGS += [SPELLINGS[-1] | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_theta": None}]
SHAPES = {  # what distinguishes checkpoints
    "Llama 1": {"num_key_value_heads": 4, "rope_theta": 10_000.0},
    "Llama 3.1": {"rope_scaling": EARLY},
    "Llama 3.2": {"rope_scaling": EARLY, "tie_word_embeddings": True, "head_dim": 12},
    "TinyLlama": {"num_key_value_heads": 1},
}
TOKENS = torch.randint(97, (3, 60), generator=torch.Generator().manual_seed(1))
SHARD = "model-00001-of-00003.safetensors"
CUTS = [(n, k) for n in ("config.json", "tokenizer.json", SHARD) for k in (None, 0, 50, -2)]
TINY, TEXT = LlamaConfig(32, 16, 24, 1, 2, 2, 8), torch.arange(20)[None]
WEIGHTS = Llama(TINY).state_dict()
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
CHUNK = st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any)
torch.manual_seed(0)
LLAMA = Llama(LlamaConfig(97, 32, 48, 2, 4, 2, 8, 1e-3, 5e5, EARLY)).requires_grad_(False)
assert_same = partial(torch.testing.assert_close, atol=1e-4, rtol=0)
MEASURE = """
import re, sys, torch, llama
with torch.device("meta"):
    torch.nn.Linear(1, 1), torch.nn.Embedding(1, 1)  # imports much
peak = lambda: 1024 * int(re.search("VmHWM:(.*) kB", open("/proc/self/status").read())[1])
before = peak()
network = llama.load_llama(sys.argv[1])
print(peak() - before, sum(p.sum().item() for p in network.parameters()), peak() - before)"""
WAYS = [(["model"], True), (["x-1", "parts/2"], True), (["model-1", "model_2"], False)]
RAM, LIMIT = 1024 * int(re.search(r"MemTotal: *(\d+)", Path("/proc/meminfo").read_text())[1]), 2**31
V1, V2 = "memory/memory.limit_in_bytes", "memory.max"  # of the two versions of cgroups
CGROUPS = [(V2, f"{LIMIT}\n", LIMIT), (V2, "max\n", RAM), (V1, f"{LIMIT}\n", LIMIT)]
CGROUPS += [(V1, "9223372036854771712\n", RAM), (None, "", RAM)]
BOTH = LLAMA3 | {"type": "linear"}
REFUSED = [("model_type", "mistral", "mistral"), ("hidden_act", "gelu", "gelu")]
REFUSED += [(key, True, key) for key in ("attention_bias", "mlp_bias", "rope_interleaved")]
REFUSED += [("quantization_config", {"bits": 4}, "quantization_config")]
REFUSED += [("rope_parameters", {"type": "yarn", "factor": 4.0}, "RoPE.*yarn")]
REFUSED += [("rope_parameters", {"rope_type": "llama3", "factor": 4.0}, "RoPE.*llama3")]
REFUSED += [(f"rope_{key}", BOTH, "RoPE.*linear") for key in ("parameters", "scaling")]
REFUSED += [("partial_rotary_factor", 0.5, "partial_rotary_factor"), ("head_dim", 7, "head_dim")]
REFUSED += [("rope_parameters", {"partial_rotary_factor": 0.5}, "partial_rotary_factor")]
REFUSED += [("num_key_value_heads", 3, "heads"), ("num_key_value_heads", -2, r"config\.json")]
REFUSED += [("num_hidden_layers", 0, r"config\.json"), ("vocab_size", None, r"config\.json")]
MISFITS = [
    (NORM, None, r"Missing key\S* .*: model\.norm\.weight\.$"),
    ("model.layers.1.self_attn.q_proj.bias", (32,), r"Unexpected key\S* .*q_proj\.bias\.$"),
    ("model.layers.0.mlp.up_proj.weight", (48, 31), r"up_proj.*48, 31.*48, 32"),
]


def save_random(folder: Path, dtype=torch.float32, **changes):
    """A checkpoint of three shards, or for bfloat16 of one file, as transformers writes it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**copy.deepcopy(SMALL | changes))  # it writes into dicts
    theirs = transformers.LlamaForCausalLM(config).to(dtype)
    for parameter in theirs.parameters():
        if parameter.ndim == 1:  # norms; ones would hide an error
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    size = sum(parameter.nbytes for parameter in theirs.parameters())
    theirs.save_pretrained(folder, max_shard_size="1GB" if dtype == torch.bfloat16 else size // 2)


def save_files(folder: Path, files: dict, index: dict | None = None, **settings) -> Path:
    """A folder of these files, {name: tensors}, perhaps with an index of them, {tensor: name}."""
    for name, tensors in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / f"{name}.safetensors")
    if index:
        names = {tensor: f"{name}.safetensors" for tensor, name in index.items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / "config.json").write_text(json.dumps(TINY.to_dict() | settings))
    return folder


def refused(words: str, call, *arguments):
    """Assert that the call raises a ValueError with these words in one sentence."""
    with pytest.raises(ValueError, match=words) as caught:
        call(*arguments)
    assert not re.search(r"\n|[.!?] +[A-Z]", str(caught.value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_checkpoints_of_transformers_load_and_compute_the_same(changes, dtype, tmp_path):
    """The weights are those of the files. Logits and gradients are those of transformers."""
    save_random(tmp_path, dtype, **changes)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if dtype == torch.bfloat16 else 3)
    read = transformers.LlamaForCausalLM.from_pretrained
    ours, theirs = load_llama(tmp_path), read(tmp_path, dtype=dtype)
    for name, weight in ours.state_dict().items():
        assert weight.dtype == dtype
        assert torch.equal(weight, theirs.state_dict()[name])
    found, expected = ours(TOKENS) @ ours.unembedding.T, theirs(TOKENS).logits
    assert expected.std() > 0.5
    assert_same(found, expected, atol=max(1e-4, 4 * torch.finfo(dtype).eps))
    ours, theirs = load_llama(str(tmp_path), torch.float32), read(tmp_path, dtype=torch.float32)
    ours.recompute_layers = dtype == torch.float16
    for values in (ours(TOKENS) @ ours.unembedding.T, theirs(TOKENS).logits):
        values.tanh().square().sum().backward()
    for name, parameter in ours.named_parameters():
        gradient = theirs.get_parameter(name).grad
        assert_same(parameter.grad, gradient, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("scaling", [None, LLAMA3, OTHER])
def test_rope_frequencies_equal_those_of_transformers(head_dim, scaling):
    """Exactly, without scaling. Scaled ones differ by one part in ten million at most."""
    config = transformers.LlamaConfig(**SMALL, head_dim=head_dim, rope_scaling=copy.copy(scaling))
    ours = rope_frequencies(LlamaConfig.from_dict(config.to_dict()))
    assert_same(ours, LlamaRotaryEmbedding(config).inv_freq, atol=0, rtol=1e-7 if scaling else 0)


@pytest.mark.parametrize("rope", SPELLINGS)
def test_the_official_config_is_read_in_every_spelling(rope):
    """Llama 3.1 8B has 8,030,261,248 parameters. JSON and transformers read what we write."""
    contents = copy.deepcopy(OFFICIAL | rope)
    config = LlamaConfig.from_dict(contents)
    assert contents == OFFICIAL | rope
    sizes = (128_256, 4096, 14_336, 32, 32, 8, 128, 1e-5, 500_000.0)
    assert config == LlamaConfig(*sizes, LLAMA3, max_position_embeddings=131_072)
    assert config == LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert config == LlamaConfig.from_dict(transformers.LlamaConfig(**config.to_dict()).to_dict())
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(config).parameters()) == 8_030_261_248


@pytest.mark.parametrize("nothing", [{}, {"head_dim": None, "rope_scaling": None}])
def test_what_old_configs_leave_out_is_as_in_transformers(nothing):
    """Key/value heads, head size, the norms' epsilon and plain RoPE."""
    old = {name: OFFICIAL[name] for name in NAMES[:5]} | {"hidden_size": 2048}
    config = LlamaConfig.from_dict(old | {"model_type": "llama"} | nothing)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (32, 64, 10_000.0)
    assert config == LlamaConfig.from_dict(transformers.LlamaConfig(**old).to_dict())


def feed(cache: KVCache, texts: torch.Tensor, counts: list[int], adapter=None, padding=0):
    """Feed each row's next tokens, padded with random ones; their hidden states (count, D)."""
    chunk = torch.randint(97, (len(counts), max(counts) + padding))
    for row, text, start, count in zip(chunk, texts, cache.lengths.tolist(), counts):
        row[:count] = text[start : start + count]
    hidden = LLAMA(chunk, adapter, cache)
    cache.lengths += torch.tensor(counts)
    return [states[:count] for states, count in zip(hidden, counts)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_computed_in_float32(dtype):
    """Bit for bit the same as with casts before and after it."""
    norm = copy.deepcopy(LLAMA.model.norm).to(dtype)
    torch.nn.init.uniform_(norm.weight)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norm.eps)
    expected = norm.weight * normed.to(dtype)
    assert_same(norm(x), expected, atol=1e-6 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_attention_to_a_cache_is_that_of_repeated_heads(key_heads):
    """Queries that share a key/value head get what they get from a copy of it each, to 1e-6."""
    random = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 3, 8, generator=random)
    k, v = torch.randn(2, 2, key_heads, 128, 8, generator=random)
    mask = torch.rand(2, 1, 3, 128, generator=random) < 0.5
    copies = [x.repeat_interleave(4 // key_heads, 1) for x in (k, v)]
    scores = (q @ copies[0].mT / 8**0.5).masked_fill(~mask, -torch.inf)
    assert_same(attend_to_cache(q, k, v, mask), scores.softmax(-1) @ copies[1], atol=1e-6)


def test_a_cache_grows_in_steps_and_its_lengths_are_on_the_cpu():
    with torch.device("meta"):
        cache = KVCache(Llama(LLAMA.config), 1, slots=130)
    assert (cache.keys.shape[3], cache.lengths.device.type) == (256, "cpu")


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(CHUNK, min_size=1, max_size=5), st.integers(0, 3), st.booleans())
@example([[5, 1, 0], [0, 2, 4], [1, 1, 1], [3, 0, 5]], 2, True)
def test_ragged_chunks_through_the_cache_equal_one_full_forward(chunks, padding, adapted):
    """Each row gets the hidden states of a forward pass without a cache."""
    adapter, cache = IA3(LLAMA.config) if adapted else None, KVCache(LLAMA, 3, slots=33)
    for vectors in adapter.parameters() if adapted else ():
        torch.nn.init.uniform_(vectors.requires_grad_(False), 0.3, 1.7)
    pieces = [feed(cache, TOKENS, counts, adapter, padding) for counts in chunks]
    assert cache.lengths.tolist() == [sum(column) for column in zip(*chunks)]
    full = LLAMA(TOKENS, adapter)
    assert adapted == ((full - LLAMA(TOKENS)).abs().max() > 0.1)
    for states, *parts in zip(full, *pieces):
        assert_same(torch.cat(parts), states[: sum(map(len, parts))])


def test_rows_of_a_cache_are_views_or_copies_and_can_start_again():
    """A list gives a copy, a slice a view. A row whose length is set to 0 begins another text."""
    full, cache = LLAMA(TOKENS), KVCache(LLAMA, 3, slots=12)
    feed(cache, TOKENS, [4, 2, 6])
    copied = cache[[2, 0]]
    feed(cache[1:2], TOKENS[1:2], [5])
    cache.lengths[2] = 0
    found = feed(cache, TOKENS[[0, 1, 0]], [1, 3, 5]) + feed(copied, TOKENS[[2, 0]], [3, 5])
    expected = full[0, 4:5], full[1, 7:10], full[0, :5], full[2, 6:9], full[0, 4:9]
    assert_same(torch.cat(found), torch.cat(expected))


def test_loading_takes_no_more_memory_than_the_checkpoint(tmp_path):
    """A checkpoint of 134 MB in two shards. Loading it takes almost nothing, reading it 134 MB."""
    config = LlamaConfig(1024, 2048, 8192, 1, 16, 8, 128)
    tensors = list(Llama(config).bfloat16().state_dict().items())
    total = sum(tensor.nbytes for _, tensor in tensors)
    for i in range(2):
        save_file(dict(tensors[i::2]), tmp_path / f"model-{i}.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    command = [sys.executable, "-c", MEASURE, tmp_path]
    printed = subprocess.check_output(command, text=True, cwd=ROOT)
    loaded, _, read = map(float, printed.split())
    assert loaded < 0.1 * total  # memory-mapped: weights are read when they are used
    assert 0.9 * total < read < 1.1 * total


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint with a tokenizer, for a test to use or to damage."""
    save_random(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(2)  # as a training may have left it
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize(("names", "has_index"), WAYS)
def test_weights_are_one_file_or_what_the_index_names_or_else_all(names, has_index, tmp_path):
    """No other file is read. A tensor in two files and a missing file are refused by name."""
    index = {tensor: names[i % len(names)] for i, tensor in enumerate(WEIGHTS)}
    files = {name: {t: WEIGHTS[t] for t in index if index[t] == name} for name in names}
    other = {"model_old": {t: 0 * weight for t, weight in WEIGHTS.items()}} if has_index else {}
    index = dict.fromkeys(WEIGHTS, "model_old") if names == ["model"] else index
    folder = save_files(tmp_path, files | other, index if has_index else None)
    loaded = load_llama(folder).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in WEIGHTS.items())
    save_file({NORM: WEIGHTS[NORM]}, folder / f"{names[0]}.safetensors")
    if not has_index:
        refused = re.escape(NORM)
        save_file(WEIGHTS, folder / f"{names[1]}.safetensors")
    elif names[1:]:
        (folder / f"{(refused := names[1])}.safetensors").unlink()
    else:
        refused = "is incomplete"
    with pytest.raises(ValueError, match=refused):
        load_llama(folder)


@pytest.mark.parametrize(("left_out", "factor"), [(EMBEDDING, 1), (HEAD, 1), ("", 1), ("", 2)])
def test_a_tied_checkpoint_has_either_matrix_or_the_same_twice(left_out, factor, tmp_path):
    """As in transformers. Two different matrices are refused: programs disagree about them."""
    tensors = WEIGHTS | {EMBEDDING: factor * WEIGHTS[HEAD]}
    tensors.pop(left_out, None)
    folder = save_files(tmp_path, {"model": tensors}, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="embeddings") if factor > 1 else nullcontext():
        ours, theirs = load_llama(folder), transformers.LlamaForCausalLM.from_pretrained(folder)
        for found in (ours.unembedding, ours(TEXT), theirs.get_output_embeddings().weight):
            expected = theirs.model(TEXT).last_hidden_state if found.ndim > 2 else WEIGHTS[HEAD]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("theta", [{}, {"rope_theta": 5e5}])
def test_of_two_rope_dictionaries_that_of_transformers_counts(theta):
    both = {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"} | theta}
    ours = LlamaConfig.from_dict(copy.deepcopy(TINY.to_dict() | both))
    theirs = transformers.LlamaConfig(**copy.deepcopy(TINY.to_dict() | both))
    assert ours.rope_scaling["rope_type"] == theirs.rope_parameters["rope_type"] == "llama3"
    torch.testing.assert_close(rope_frequencies(ours), LlamaRotaryEmbedding(theirs).inv_freq)


@pytest.mark.parametrize("key", ["", "dtype", "torch_dtype"])
def test_a_network_has_one_type(key, tmp_path):
    """The type asked for, else that of its config.json, else that of its embedding."""
    tensors = {n: w.bfloat16() if w.ndim == 2 else w + 1e-3 for n, w in WEIGHTS.items()}
    folder = save_files(tmp_path, {"model": tensors}, **({key: "float16"} if key else {}))
    for asked, dtype in ((None, torch.float16 if key else torch.bfloat16), (torch.float32,) * 2):
        for name, weight in load_llama(folder, asked).state_dict().items():
            assert weight.dtype == dtype
            assert torch.equal(weight, tensors[name].to(dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn, torch.float64])
@pytest.mark.parametrize("asked", [None, torch.float32])
def test_integers_fp8_and_float64_are_no_weights(dtype, asked, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    files = {"model": WEIGHTS | {name: WEIGHTS[name].to(dtype)}}
    with pytest.raises(ValueError, match=re.escape(name)):
        load_llama(save_files(tmp_path, files), asked)


@pytest.mark.parametrize(("file", "content", "total"), CGROUPS)
def test_half_of_the_memory_is_half_of_the_container(file, content, total, tmp_path, monkeypatch):
    """If that is less than the machine's. The test hides all other files of cgroups."""
    (tmp_path / "limit").write_text(content)

    def opened(path, *arguments, original=open, **how):
        if str(path).startswith("/sys/fs/cgroup"):
            path = tmp_path / ("limit" if str(path) == f"/sys/fs/cgroup/{file}" else "nothing")
        return original(path, *arguments, **how)

    cpu = torch.device("cpu")
    monkeypatch.setattr("builtins.open", opened)
    monkeypatch.setattr("io.open", opened)
    assert memory_budget(cpu) == pytest.approx(total / 2, rel=0.01)
    monkeypatch.delattr(os, "sysconf")  # as on Windows
    assert memory_budget(cpu) > 0


@pytest.mark.parametrize(("key", "value", "words"), REFUSED)
def test_a_config_of_what_is_not_implemented_is_refused(key, value, words, checkpoint):
    """A setting that `Llama` would ignore, and a size that is no positive whole number."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refused(words, load_llama, checkpoint)


@pytest.mark.parametrize(("name", "end"), CUTS)
def test_missing_and_truncated_files_are_named(name, end, checkpoint):
    """A file that is missing, empty, or cut off near its beginning or its end."""
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).unlink()
    if end is not None:
        (checkpoint / name).write_bytes(content[:end])
    refused(name, load_tokenizer if name == "tokenizer.json" else load_llama, checkpoint)


@pytest.mark.parametrize(("name", "shape", "words"), MISFITS)
def test_weights_that_do_not_fit_the_config_are_refused(name, shape, words, checkpoint):
    """A missing or an extra tensor is named. One of another shape is named with both shapes."""
    for path in checkpoint.glob("*.safetensors"):
        tensors = {key: value for key, value in load_file(path).items() if key != name}
        added = {name: torch.zeros(shape)} if shape and path.name == SHARD else {}
        save_file(tensors | added, path)
    refused(words, load_llama, checkpoint)


def test_the_program_generates_what_transformers_does(checkpoint, monkeypatch, capsys):
    hf = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    how = {"max_new_tokens": 40, "do_sample": False}
    (tokens,) = hf.generate(torch.tensor([[5, 80, 13]]), **how).tolist()
    assert (len(tokens), len(set(tokens)) > 10) == (43, True)
    old = {"model.rope.inv_freq": torch.ones(4)}
    save_file(load_file(checkpoint / SHARD) | old, checkpoint / SHARD)
    monkeypatch.setattr(sys, "argv", ["llama.py", str(checkpoint), "w5 w80 w13"])
    runpy.run_path(str(ROOT / "llama.py"), run_name="__main__")
    assert capsys.readouterr().out == " ".join(f"w{token}" for token in tokens) + "\n"
