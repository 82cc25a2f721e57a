"""llama.py against transformers' LlamaForCausalLM with the same random weights."""

import copy
import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import llama as llama_module
from llama import KVCache, Llama, LlamaConfig, load_llama, load_tokenizer, rope_frequencies

ROOT = Path(__file__).parent.parent
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-3,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 131_072,
    "initializer_range": 0.2,  # ten times transformers' default: the logits have to differ by far more than the tolerance
}
# The config.json of meta-llama/Llama-3.1-8B
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14_336,
    "max_position_embeddings": 131_072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128_256,
}


def hf_config(**changes) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**copy.deepcopy(SMALL | changes))  # it writes into the dict of the RoPE scaling


def twins(**changes) -> tuple[transformers.LlamaForCausalLM, Llama]:
    """A Hugging Face Llama of the shape SMALL | changes with random weights, and ours with the same."""
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(hf_config(**changes)).eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:  # the norms' weights start as ones, which would hide that they are forgotten
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    ours = Llama(LlamaConfig.from_dict(theirs.config.to_dict()))
    weights = theirs.state_dict()
    if ours.config.tie_word_embeddings:
        del weights["lm_head.weight"]  # the embedding under a second name
    ours.load_state_dict(weights)
    return theirs, ours


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


def logits(llama: Llama, tokens: Tensor, adapter=None) -> Tensor:
    return llama(tokens, adapter) @ llama.vocabulary.T


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4):
    """Equal to the tolerance, and spread so widely that this says something."""
    assert theirs.std() > 1000 * tolerance
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def refusal(call, *arguments) -> str:
    """The message of the ValueError that the call raises, which is one sentence."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011, whoever calls this looks at the words
        call(*arguments)
    message = str(caught.value)
    assert message.endswith(".")
    assert not re.search(r"\n|\.\.$|[.!?] +[A-Z]", message)
    return message


# ------------------------------------------------------------------------------------------------------ the same function


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"num_key_value_heads": 4}, id="multi-head"),
        pytest.param({"num_key_value_heads": 2}, id="grouped-query"),
        pytest.param({"num_key_value_heads": 1}, id="multi-query"),
        pytest.param({"head_dim": 12}, id="head_dim"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
        pytest.param({"rope_theta": 500_000.0}, id="theta"),
        pytest.param({"rope_theta": 500_000.0, "rope_scaling": LLAMA3}, id="llama3"),
    ],
)
@torch.no_grad()
def test_logits_equal_those_of_transformers(changes):
    """The logits are those of LlamaForCausalLM, whatever the heads, the embeddings and the RoPE."""
    theirs, ours = twins(**changes)
    tokens = random_tokens(3, 40)
    assert_same(logits(ours, tokens), theirs(tokens).logits)


@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_rope_frequencies_equal_those_of_transformers(head_dim):
    """Plain frequencies are the very same; scaled ones differ by float32 rounding, and at most by one part in ten million."""
    for scaling in (None, LLAMA3, LLAMA3 | {"factor": 32.0, "high_freq_factor": 2.0, "original_max_position_embeddings": 1024}):
        config = hf_config(head_dim=head_dim, rope_theta=500_000.0, rope_scaling=scaling)
        theirs = LlamaRotaryEmbedding(config).inv_freq
        ours = rope_frequencies(LlamaConfig.from_dict(config.to_dict()))
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0 if scaling is None else 1e-7)


@torch.no_grad()
def test_logits_equal_those_of_transformers_beyond_the_original_context():
    """Past 8,192 tokens llama3 scaling gives transformers' logits, and plain RoPE would give others."""
    shape = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "rope_theta": 500_000.0,
    }
    theirs, ours = twins(**shape, num_key_value_heads=1, rope_scaling=LLAMA3)
    tokens, last = random_tokens(1, 8300), 100
    expected = theirs(tokens, logits_to_keep=last).logits
    assert_same(ours(tokens)[:, -last:] @ ours.vocabulary.T, expected)
    _, plain = twins(**shape, num_key_value_heads=1)  # the same weights: they do not depend on the RoPE
    assert (plain(tokens)[:, -last:] @ plain.vocabulary.T - expected).abs().max() > 0.1


@torch.no_grad()
def test_a_token_sees_no_later_one():
    """Another token at position 6 leaves every hidden state before it bit for bit as it was, and changes those from it on."""
    _, ours = twins()
    tokens = random_tokens(2, 10)
    before = ours(tokens)
    tokens[:, 6] = (tokens[:, 6] + 1) % SMALL["vocab_size"]
    after = ours(tokens)
    assert torch.equal(before[:, :6], after[:, :6])
    assert ((before[:, 6:] - after[:, 6:]).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_have_the_names_of_the_checkpoint(tied, tmp_path):
    """Our state_dict has the names and shapes of the tensors in a checkpoint that transformers writes, no more and no fewer."""
    theirs, ours = twins(tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    checkpoint = {name: tensor.shape for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == checkpoint
    assert ("lm_head.weight" in checkpoint) != tied


# ---------------------------------------------------------------------------------------------------------- configuration


def test_the_official_config_is_read():
    """Llama 3.1 8B's config.json gives the defaults of the dataclass plus its RoPE scaling."""
    assert LlamaConfig.from_dict(LLAMA_3_1_8B) == LlamaConfig(rope_scaling=LLAMA3)


def test_every_spelling_of_the_rope_settings_is_read():
    """rope_theta with rope_scaling, rope_parameters, and "type" for "rope_type" all mean the same; the dict is left as it was."""
    rest = {key: value for key, value in LLAMA_3_1_8B.items() if not key.startswith("rope")}
    old = {("type" if key == "rope_type" else key): value for key, value in LLAMA3.items()}
    expected = LlamaConfig(rope_theta=500_000.0, rope_scaling=LLAMA3)
    for spelling in (
        {"rope_theta": 500_000.0, "rope_scaling": LLAMA3},
        {"rope_theta": 500_000.0, "rope_scaling": old},
        {"rope_theta": 500_000.0, "rope_scaling": old | LLAMA3},
        {"rope_parameters": LLAMA3 | {"rope_theta": 500_000.0}},
        {"rope_parameters": old | {"rope_theta": 500_000.0}},
        {"rope_parameters": LLAMA3, "rope_theta": 500_000.0},
    ):
        before = copy.deepcopy(spelling)
        assert LlamaConfig.from_dict(rest | spelling) == expected
        assert spelling == before
    for spelling in (
        {},  # theta is then 10,000, as in Llama 1 and 2
        {"rope_theta": 10_000.0, "rope_scaling": None},
        {"rope_theta": 10_000, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    ):
        assert LlamaConfig.from_dict(rest | spelling) == LlamaConfig(rope_theta=10_000.0, rope_scaling=None)


def test_what_old_configs_leave_out_is_derived():
    """Without head_dim it is D / H, and without num_key_value_heads every head has its own, as in transformers."""
    for absent in ({}, {"head_dim": None, "num_key_value_heads": None}):
        old = {key: value for key, value in LLAMA_3_1_8B.items() if key != "num_key_value_heads"}
        old |= {"hidden_size": 2048, "rope_scaling": None} | absent
        config, theirs = LlamaConfig.from_dict(old), transformers.LlamaConfig(**old)
        assert (config.head_dim, config.num_key_value_heads) == (64, 32) == (theirs.head_dim, theirs.num_key_value_heads)


@pytest.mark.parametrize("scaling", [None, LLAMA3])
@pytest.mark.parametrize("tied", [False, True])
def test_to_dict_round_trips(scaling, tied):
    """from_dict(to_dict()) is the same config, also by way of JSON and of transformers' LlamaConfig."""
    config = LlamaConfig(97, 32, 48, 2, 4, 2, 12, 1e-3, 20_000.0, scaling, tied)
    assert LlamaConfig.from_dict(config.to_dict()) == config
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    theirs = transformers.LlamaConfig(**config.to_dict())
    assert LlamaConfig.from_dict(theirs.to_dict()) == config
    for name in config.to_dict().keys() - {"architectures", "rope_theta", "rope_scaling"}:
        assert getattr(theirs, name) == config.to_dict()[name]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral"}, "model_type llama.*'mistral'"),
        ({"model_type": None}, "model_type llama.*None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE.*yarn.*not implemented"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "RoPE.*linear.*not implemented"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, "RoPE.*dynamic.*not implemented"),
        ({"attention_bias": True}, "attention_bias.*True.*not implemented"),
        ({"mlp_bias": True}, "mlp_bias.*True.*not implemented"),
        ({"hidden_act": "gelu"}, "hidden_act.*'gelu'.*not implemented"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised.*not implemented"),
        ({"head_dim": 127}, "head_dim.*even.*127"),
        ({"num_key_value_heads": 6}, r"num_attention_heads \(32\).*multiple of num_key_value_heads \(6\)"),
        ({"num_hidden_layers": 0}, "num_hidden_layers.*at least 1.*0"),
    ],
)
def test_what_is_not_implemented_is_refused(changes, words):
    """One sentence names the setting and its value instead of a wrong answer later."""
    assert re.search(words, refusal(LlamaConfig.from_dict, LLAMA_3_1_8B | changes))


# -------------------------------------------------------------------------------------------------------------- KV cache


@functools.cache
def cached_twin() -> Llama:
    return twins(rope_theta=500_000.0, rope_scaling=LLAMA3)[1]


def random_adapter() -> SimpleNamespace:
    """Vectors of IA3's shapes, far from ones."""
    sizes = {"key": 16, "value": 16, "feed_forward": SMALL["intermediate_size"]}  # K * hd = 2 * 8
    random = torch.Generator().manual_seed(2)
    return SimpleNamespace(**{name: 0.3 + 1.4 * torch.rand(2, size, generator=random) for name, size in sizes.items()})


def feed(llama: Llama, cache: KVCache, texts: Tensor, counts: list[int], padding: int = 0, adapter=None) -> list[Tensor]:
    """Feed the next counts[b] tokens of row b with garbage behind them; the hidden states (counts[b], D) of each row's own."""
    chunk = torch.randint(SMALL["vocab_size"], (len(counts), max(counts) + padding))
    for row, text, start, count in zip(chunk, texts, cache.lengths.tolist(), counts):
        row[:count] = text[start : start + count]
    hidden = llama(chunk, adapter, cache)
    cache.advance(torch.tensor(counts))
    return [states[:count] for states, count in zip(hidden, counts)]


def chunkings(max_rows: int = 3) -> st.SearchStrategy:
    """Lists of chunks; a chunk is the number of tokens of each row, not all of them zero."""
    counts = st.integers(1, max_rows).map(lambda rows: st.lists(st.integers(0, 5), min_size=rows, max_size=rows).filter(any))
    return counts.flatmap(lambda chunk: st.lists(chunk, min_size=1, max_size=5))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(chunks=chunkings(), padding=st.integers(0, 3), adapted=st.booleans())
@example(chunks=[[5, 1, 0], [0, 2, 4], [1, 1, 1], [3, 0, 5]], padding=2, adapted=True)
@example(chunks=[[1, 1], [1, 1], [1, 1]], padding=0, adapted=False)
@torch.no_grad()
def test_ragged_chunks_through_the_cache_equal_one_full_forward(chunks, padding, adapted):
    """Rows that advance at their own pace, garbage behind each, get the hidden states of a forward without a cache."""
    llama, adapter = cached_twin(), random_adapter() if adapted else None
    texts = random_tokens(len(chunks[0]), 25)
    cache = KVCache(llama.config, len(texts), slots=25 + 5 + 3)
    pieces = [feed(llama, cache, texts, counts, padding, adapter) for counts in chunks]
    assert cache.lengths.tolist() == [sum(column) for column in zip(*chunks)]
    for full, *parts in zip(llama(texts, adapter), *pieces):
        whole = torch.cat(parts)
        torch.testing.assert_close(whole, full[: len(whole)], atol=1e-4, rtol=0)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("places", [1, 5, 40])
def test_what_is_read_is_what_all_would_be(cached, places):
    """Hidden states of a few places, in any order, some twice; without a cache also the gradients of all that can be learned."""
    llama, adapter, tokens = copy.deepcopy(cached_twin()), random_adapter(), random_tokens(3, 60)
    learned = [*llama.model.parameters(), *(vector.requires_grad_(True) for vector in vars(adapter).values())]
    read = torch.randint(20, (3, places), generator=torch.Generator().manual_seed(3))

    def last_twenty(read: Tensor | None = None) -> Tensor:
        if not cached:
            return llama(tokens[:, 40:], adapter, None, read)
        cache = KVCache(llama.config, 3, 60)
        llama(tokens[:, :40], adapter, cache)
        cache.advance(torch.tensor([40, 7, 21]))
        return llama(tokens[:, 40:], adapter, cache, read)

    with torch.set_grad_enabled(not cached):
        ours, theirs = last_twenty(read), torch.stack([row[at] for row, at in zip(last_twenty(), read)])
    assert_same(ours.detach(), theirs.detach())
    if not cached:
        gradients = (torch.autograd.grad(hidden.square().sum(), learned) for hidden in (ours, theirs))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4 * other.abs().max().item(), rtol=0)


@torch.no_grad()
def test_the_adapter_reaches_the_cache():
    """The hidden states with and without the adapter differ by far more than the tolerance of the test above."""
    llama, texts = cached_twin(), random_tokens(2, 25)
    assert (llama(texts, random_adapter()) - llama(texts)).abs().max() > 0.1


@torch.no_grad()
def test_kept_rows_go_on_as_before():
    """After `keep` the cache holds those rows only, in the order asked for, and they continue as if nothing had happened."""
    llama, texts = cached_twin(), random_tokens(3, 12)
    full = llama(texts)
    cache = KVCache(llama.config, 3, slots=12)
    feed(llama, cache, texts, [4, 2, 6])
    cache.keep(torch.tensor([2, 0]))
    assert cache.lengths.tolist() == [6, 4]
    third, first = feed(llama, cache, texts[[2, 0]], [3, 5])
    torch.testing.assert_close(third, full[2, 6:9], atol=1e-4, rtol=0)
    torch.testing.assert_close(first, full[0, 4:9], atol=1e-4, rtol=0)


@torch.no_grad()
def test_replaced_rows_go_on_where_the_other_cache_was():
    """After `replace` those rows continue the other cache's texts and the rest their own; the two caches stay apart."""
    llama, texts, others = cached_twin(), random_tokens(3, 12), random_tokens(2, 14).flip(1)
    cache, other = KVCache(llama.config, 3, slots=14), KVCache(llama.config, 2, slots=14)
    feed(llama, cache, texts, [4, 7, 6])
    feed(llama, other, others, [5, 2])
    cache.replace(torch.tensor([2, 0]), other)
    assert cache.lengths.tolist() == [2, 7, 5]
    mixed = [others[1], texts[1], others[0]]
    for _ in range(2):
        starts = cache.lengths.tolist()
        pieces = feed(llama, cache, mixed, [3, 1, 2])
        for piece, text, start in zip(pieces, mixed, starts):
            torch.testing.assert_close(piece, llama(text[None])[0, start : start + len(piece)], atol=1e-4, rtol=0)
    assert other.lengths.tolist() == [5, 2]
    for piece, full in zip(feed(llama, other, others, [3, 3]), (llama(others)[0, 5:8], llama(others)[1, 2:5])):
        torch.testing.assert_close(piece, full, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_full_cache_refuses_more():
    """A cache takes exactly as many tokens a row as it has slots; one more is refused before anything is overwritten."""
    llama, texts = cached_twin(), random_tokens(2, 8)
    cache = KVCache(llama.config, 2, slots=6)
    feed(llama, cache, texts, [4, 2])
    feed(llama, cache, texts, [2, 2])
    keys = cache.keys.clone()
    assert re.search("holds 6 tokens a row.*position 6 ", refusal(feed, llama, cache, texts, [1, 1]))
    assert torch.equal(cache.keys, keys)
    assert cache.lengths.tolist() == [6, 4]


# ------------------------------------------------------------------------------------------------------------ load_llama


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "rope_theta": 500_000.0, "rope_scaling": LLAMA3}])
@torch.no_grad()
def test_a_checkpoint_of_transformers_loads(changes, tmp_path):
    """A folder that save_pretrained wrote gives the logits of the model that was saved; `dtype` is that of all weights."""
    theirs, _ = twins(**changes)
    theirs.save_pretrained(tmp_path)
    tokens = random_tokens(2, 20)
    ours = load_llama(tmp_path)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert_same(logits(ours, tokens), theirs(tokens).logits)
    half = load_llama(str(tmp_path), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.model.layers[1].mlp.up_proj.weight, theirs.model.layers[1].mlp.up_proj.weight.bfloat16())


OFFICIAL = {  # what distinguishes official checkpoints
    "Llama 3.1": {"rope_theta": 500_000.0, "rope_scaling": LLAMA3},
    "Llama 3.2": {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True, "head_dim": 16},
    "TinyLlama": {"num_key_value_heads": 1},
    "SmolLM2": {"tie_word_embeddings": True, "num_key_value_heads": 4, "rope_theta": 130_000.0},
}


@pytest.mark.parametrize("changes", OFFICIAL.values(), ids=OFFICIAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_sharded_checkpoints_in_every_type_load(changes, dtype, tmp_path):
    """In three shards with an index: the weights are the saved ones, bit for bit, and so are the logits in fp32.

    In half precision they differ from transformers' fp32 logits by no more than transformers' own in that precision.
    """
    saved, _ = twins(**changes)
    saved = saved.to(dtype)
    saved.save_pretrained(tmp_path, max_shard_size=sum(p.nbytes for p in saved.parameters()) // 2)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) == 3
    assert not (tmp_path / "model.safetensors").exists()
    theirs, exact = (transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=d) for d in (dtype, torch.float32))
    ours, tokens = load_llama(tmp_path, dtype), random_tokens(2, 60)
    assert all(torch.equal(weight, saved.state_dict()[name]) for name, weight in ours.state_dict().items())
    expected = exact(tokens).logits
    assert_same(logits(load_llama(tmp_path), tokens), expected)
    if dtype != torch.float32:
        error, their_error = (value.float() - expected for value in (logits(ours, tokens), theirs(tokens).logits))
        assert 0 < error.square().mean() < 1.2 * their_error.square().mean()
        assert 0 < error.abs().max() < 1.5 * their_error.abs().max()


def test_loading_takes_no_more_memory_than_the_checkpoint(tmp_path):
    """A checkpoint of 512 MiB in two shards, in a process of its own: its peak grows by less than that and a half GiB."""
    config = LlamaConfig(1024, 2048, 8192, 4, 16, 8, 128)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Llama(config).state_dict().items()}
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert total > 400 * 2**20
    names = {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({name: tensor for name, tensor in tensors.items() if names[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    program = f"""
import resource, torch, llama
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
network = llama.load_llama({str(tmp_path)!r}, torch.bfloat16)
print(peak() - before, sum(p.sum().item() for p in network.parameters()), peak() - before)"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded, total_of_weights, read = map(float, done.stdout.split())
    assert total_of_weights == 0
    assert loaded < 100 * 2**20  # memory-mapped: nothing is read before it is used
    assert read < total + 2**29


@pytest.fixture
def checkpoint(tmp_path):
    """A whole checkpoint folder, for a test to damage."""
    _, ours = twins()
    (tmp_path / "config.json").write_text(json.dumps(ours.config.to_dict()))
    save_file(ours.state_dict(), tmp_path / "model.safetensors")
    load_llama(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(name, checkpoint):
    """A folder without the config or without the weights is refused with the name of what is missing."""
    (checkpoint / name).unlink()
    assert f"has no {name}" in refusal(load_llama, checkpoint)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_truncated_weights_are_refused(kept, checkpoint):
    """A weights file cut short anywhere (nothing left, inside the header, inside the tensors, by one byte) is called damaged."""
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert re.search("model.safetensors is damaged.*again", refusal(load_llama, checkpoint))


def test_a_truncated_config_is_refused(checkpoint):
    """Half a config.json is called what it is."""
    path = checkpoint / "config.json"
    path.write_text(path.read_text()[:50])
    assert "config.json is not JSON" in refusal(load_llama, checkpoint)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("model.norm.weight", None, "lacks.*model.norm.weight"),
        ("model.layers.1.self_attn.q_proj.bias", torch.zeros(32), "should not have.*q_proj.bias"),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(48, 31), r"up_proj.weight.*\(48, 31\).*\(48, 32\)"),
        ("model.layers.0.self_attn.v_proj.weight", torch.zeros(32, 32), r"v_proj.weight.*\(32, 32\).*\(16, 32\)"),
    ],
    ids=["missing", "extra", "wrong width", "wrong heads"],
)
def test_weights_that_do_not_fit_the_config_are_refused(name, tensor, words, checkpoint):
    """A missing, an extra or a misshapen tensor is refused by name, the shape with both sizes."""
    path = checkpoint / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items() if key != name}
    save_file(tensors if tensor is None else tensors | {name: tensor}, path)
    assert re.search(words, refusal(load_llama, checkpoint))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"model.norm.weight": "model-2.safetensors"}}, "lacks lm_head.weight and 19 more"),
        ({}, "index.json .* has no weight_map"),
        ([], "index.json .* has no weight_map"),
    ],
)
def test_a_faulty_index_is_refused(index, words, checkpoint):
    """An index that names too few tensors, or none at all, is refused before any shard is looked for."""
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert re.search(words, refusal(load_llama, checkpoint))


def test_a_missing_shard_is_named(checkpoint):
    """An index whose shard is not there."""
    names = dict.fromkeys(load_file(checkpoint / "model.safetensors"), "model-2.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "has no model-2.safetensors" in refusal(load_llama, checkpoint)


def test_weights_too_large_for_the_memory_are_refused_unread(checkpoint, monkeypatch):
    """By the config alone: the weights are not even there."""
    (checkpoint / "model.safetensors").unlink()
    monkeypatch.setattr(llama_module, "free_memory", lambda device: 50_000)
    assert re.search("take 0.0 GB as torch.float32, but cpu has only 0.0 GB free", refusal(load_llama, checkpoint))


def test_processes_share_the_memory_of_a_cpu(monkeypatch):
    """Four processes of torchrun on one machine may each plan with a quarter of what one would have."""
    alone = llama_module.free_memory("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert llama_module.free_memory("cpu") == pytest.approx(alone / 4, rel=0.2)


def test_a_tokenizer_is_missing_or_damaged(tmp_path):
    """A checkpoint without tokenizer.json, and one with half of it."""
    assert "has no tokenizer.json" in refusal(load_tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(tmp_path)


def test_an_unsupported_checkpoint_is_refused(checkpoint):
    """load_llama passes on what the config refuses."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "qwen2"}))
    assert "qwen2" in refusal(load_llama, checkpoint)
