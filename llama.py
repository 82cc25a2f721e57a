"""Llama 3.1: the transformer, from token ids to hidden states, and its official weights.

    python llama.py CHECKPOINT "prompt"    completes the prompt greedily

Section 3 of the paper takes Llama 3.1 8B Instruct as it is, and so does this file: its modules have
the official names, and its arithmetic is transformers'. Two departures: `forward` stops at the
hidden states, because Q-values are the logits of four action words out of 128,256 tokens; and it
takes IA3's vectors (ia3.py) as an argument.
Shapes: B batch, T tokens, S slots of the cache, L layers, D model, H heads, K key/value heads,
hd head size, I feed-forward.
"""

import json
import math
import os
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import errors, snapshot_download
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

LLAMA3_SCALING = "factor low_freq_factor high_freq_factor original_max_position_embeddings".split()
REFUSED = "attention_bias mlp_bias attention_dropout rope_interleaved quantization_config".split()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama, by the names and defaults of a Hugging Face config.json."""

    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int  # I
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    head_dim: int  # hd
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # of rope_type llama3, or plain RoPE
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    dtype: str | None = None  # of the weights; None: the embedding's

    @classmethod
    def from_dict(cls, config):
        """From the contents of a config.json; ValueError for what `Llama` does not implement."""
        config = {key: value for key, value in config.items() if value is not None}
        # as in transformers: rope_scaling before rope_parameters, which holds rope_theta too
        rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
        wanted = {"model_type": "llama", "hidden_act": "silu", "partial_rotary_factor": 1}
        for key, value in (wanted | dict.fromkeys(REFUSED, False)).items():
            found = config.get(key, rope.get(key, value))
            if found != value:
                raise ValueError(f"{key} {found!r} is not implemented")
        heads = config["num_attention_heads"]
        config = {"num_key_value_heads": heads, "head_dim": config["hidden_size"] // heads} | config
        sizes = {f.name: config.get(f.name, 1) for f in fields(cls) if f.type is int}
        whole = all(type(size) is int and size > 0 for size in sizes.values())
        if not whole or heads % sizes["num_key_value_heads"] or sizes["head_dim"] % 2:
            raise ValueError(f"no Llama has these sizes: {sizes}")
        config["rope_theta"] = float(rope.pop("rope_theta", config.get("rope_theta", 10_000)))
        kind = rope.pop("type", None) or rope.get("rope_type", "default")
        if rope.setdefault("rope_type", kind) != kind:
            raise ValueError(f"RoPE's type is {kind!r}, and its rope_type {rope['rope_type']!r}")
        config["dtype"] = config.get("dtype", config.get("torch_dtype"))
        if config["dtype"] not in (None, *DTYPES):
            raise ValueError(f"dtype {config['dtype']!r} is not implemented")
        if kind != "default" and (kind != "llama3" or set(LLAMA3_SCALING) - rope.keys()):
            raise ValueError(f"RoPE scaling {rope} is not implemented, or not whole")
        config["rope_scaling"] = None if kind == "default" else rope
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})

    def to_dict(self):
        """The contents of a config.json that transformers reads too."""
        kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
        return kind | asdict(self)


# ---- rotary position embedding
def rope_frequencies(config, device=None):
    """Radians a token by which each pair of a head's dimensions turns, (hd / 2,) (Su et al. 2021).

    Llama 3.1 keeps those that turn often within the original context, divides by `factor` those
    that hardly turn, and blends linearly in between.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponent
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, context = (config.rope_scaling[key] for key in LLAMA3_SCALING)
    turns = context * frequencies / (2 * math.pi)  # within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / factor


def rotate(x, cos, sin):
    """Turn the pairs (x_i, x_{i + hd/2}) of x (B, heads, T, hd) by angles (B, 1, T, hd / 2).

    Halves are paired as in Hugging Face checkpoints; Meta's own files pair neighbours instead.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# ---- KV cache
class KVCache:
    """Keys and values of all past tokens; row b holds lengths[b] of them.

    Rows advance at their own pace: who feeds a chunk (B, T), padded at the right, must then add
    each row's number of real tokens to `lengths`. Padding takes slots too, but no real token
    attends to it, and the row's next tokens overwrite it.
    """

    def __init__(self, llama, rows, slots):
        config, like = llama.config, llama.unembedding
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, slots, config.head_dim)
        self.keys = like.new_zeros(shape)  # (L, B, K, S, hd)
        self.values = torch.zeros_like(self.keys)
        self.lengths = like.new_zeros(rows, dtype=torch.long)  # (B,)

    def __getitem__(self, rows):
        """Some rows: a list gives a copy; a slice a view: what it is fed lands here too."""
        part = object.__new__(KVCache)
        part.keys, part.values = self.keys[:, rows], self.values[:, rows]
        part.lengths = self.lengths[rows]
        return part

    def append(self, layer, positions, keys, values, used):
        """Store (B, K, T, hd) at positions (B, T); returns the first `used` slots (B, K, S, hd)."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.keys[layer][rows, :, positions] = keys.transpose(1, 2)  # (B, T, K, hd)
        self.values[layer][rows, :, positions] = values.transpose(1, 2)
        return self.keys[layer, :, :, :used], self.values[layer, :, :, :used]


# ---- the network
class RMSNorm(nn.Module):
    """x / rms(x) * weight; the norm in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention; H / K query heads share each key/value head (Ainslie et al. 2023)."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = hd = config.head_dim
        D, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(D, H * hd, bias=False)
        self.k_proj = nn.Linear(D, K * hd, bias=False)
        self.v_proj = nn.Linear(D, K * hd, bias=False)
        self.o_proj = nn.Linear(H * hd, D, bias=False)

    def forward(self, x, layer, places, adapter, cache):
        positions, cos, sin, mask = places
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (B, T, heads * hd)
        if adapter is not None:  # before RoPE, as in PEFT
            k = (k * adapter.key[layer]).to(k.dtype)
            v = (v * adapter.value[layer]).to(v.dtype)
        q, k, v = (t.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, heads, T, hd)
        if cache is not None:
            k, v = cache.append(layer, positions, k, v, used=mask.shape[-1])  # (B, K, S, hd)
        kind = {"is_causal": cache is None, "enable_gqa": q.shape[1] != k.shape[1]}
        y = F.scaled_dot_product_attention(q, k, v, mask, **kind)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, inner, bias=False)
        self.up_proj = nn.Linear(D, inner, bias=False)
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x, layer, adapter):
        x = F.silu(self.gate_proj(x)) * self.up_proj(x)  # (B, T, I)
        if adapter is not None:
            x = (x * adapter.feed_forward[layer]).to(x.dtype)
        return self.down_proj(x)


class DecoderLayer(nn.Module):
    """Attention and MLP; each adds to its input."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x, layer, places, adapter, cache):
        x = x + self.self_attn(self.input_layernorm(x), layer, places, adapter, cache)
        return x + self.mlp(self.post_attention_layernorm(x), layer, adapter)


class Llama(nn.Module):
    """A Llama with random weights; `load_llama` gives it those of a checkpoint."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: keep only the layers' inputs for the backward pass
        self.model = nn.ModuleDict()  # the checkpoint's `model.` prefix
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(map(DecoderLayer, [config] * config.num_hidden_layers))
        self.model.norm = RMSNorm(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def unembedding(self):
        """The matrix (vocab_size, D) whose product with a hidden state gives the logits."""
        tied = self.config.tie_word_embeddings
        return (self.model.embed_tokens if tied else self.lm_head).weight

    @property
    def free_bytes(self):
        """What its GPU has free, or else half of the RAM."""
        if self.unembedding.is_cuda:
            torch.cuda.empty_cache()
            return torch.cuda.mem_get_info(self.unembedding.device)[0]
        return ram() // 2

    def forward(self, tokens: Tensor, adapter=None, cache=None) -> Tensor:
        """Hidden states (B, T, D) of tokens (B, T) int64, which continue what the cache holds.

        An adapter has `key`, `value` (L, K*hd) and `feed_forward` (L, I), as ia3.IA3 does.
        """
        x = self.model.embed_tokens(tokens)  # (B, T, D)
        positions = torch.arange(tokens.shape[1], device=x.device)[None]  # (1, T)
        mask = None  # plain causal attention
        if cache is not None:
            positions = cache.lengths[:, None] + positions  # (B, T)
            slots = torch.arange(int(positions.max()) + 1, device=x.device)
            mask = (slots <= positions[:, :, None])[:, None]  # (B, 1, T, S): what each attends to
        angles = positions[:, None, :, None] * rope_frequencies(self.config, x.device)
        places = (positions, angles.cos().to(x.dtype), angles.sin().to(x.dtype), mask)
        for i, layer in enumerate(self.model.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, i, places, adapter, cache, use_reentrant=False)
            else:
                x = layer(x, i, places, adapter, cache)
        return self.model.norm(x)


def ram():
    """Bytes of memory that this machine has, or its container where that is less."""
    limits = (
        [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else []
    )
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # there is no such file, or it says "max"
            limits.append(int(Path(path).read_text()))
    return min(limits, default=8 * 2**30)


# ---- checkpoints; whatever is wrong with them is a ValueError of one sentence
def fetch(source: str | Path, *files, revision="") -> Path:
    """A checkpoint's folder: `source`, or its copy in the Hub's cache, downloaded if missing."""
    if Path(source).is_dir():
        return Path(source)
    if str(source).startswith(("/", ".", "~")) or str(source).count("/") > 1:
        raise ValueError(f"{source} is no folder.")
    try:
        return Path(snapshot_download(str(source), revision=revision or None, allow_patterns=files))
    except Exception as error:  # the Hub's library and its HTTP library each have many
        words = str(error).strip().partition("\n")[0].partition(". ")[0]
        reason = f"cannot be downloaded from the Hub: {type(error).__name__}, {words}"
        if isinstance(error, errors.GatedRepoError):
            reason = "is gated: ask for access on its Hub page, then `hf auth login`."
        if isinstance(error, errors.LocalEntryNotFoundError):
            reason = "is not in the Hub's cache: connect to the network, or name a folder."
        raise ValueError(f"{source} {reason}") from error


@contextmanager
def reading(path):
    """Names the file in whatever goes wrong with it."""
    try:
        yield path
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist.") from error
    except Exception as error:  # of whatever library reads it
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} cannot be used: {reason}") from error


def load_tensors(path, device="cpu") -> dict[str, Tensor]:
    with reading(path.resolve()) as file:  # errors name the file itself, no link to it
        return load_file(file, device=str(device))


def load_tokenizer(folder) -> Tokenizer:
    with reading(folder / "tokenizer.json") as path:
        tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_config(source: str | Path, revision="") -> tuple[LlamaConfig, Path]:
    """The shape of a checkpoint, and the folder of its config.json and tokenizer.json."""
    folder = fetch(source, "config.json", "tokenizer.json", revision=revision)
    with reading(folder / "config.json") as path:
        return LlamaConfig.from_dict(json.loads(path.read_text())), folder


def fetch_weights(source, revision="") -> list[Path]:
    """The files of a checkpoint's weights: one, or those that an index names, or all shards."""
    single, index = "model.safetensors", "model.safetensors.index.json"
    folder = fetch(source, single, index, revision=revision)
    if (folder / single).exists():
        return [folder / single]
    if (folder / index).exists():
        with reading(folder / index) as path:
            names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        return [fetch(source, *names, revision=revision) / name for name in names]
    return sorted(fetch(source, "model*.safetensors", revision=revision).glob("model*.safetensors"))


def load_llama(source: str | Path, dtype=None, device="cpu", revision="") -> Llama:
    """The Llama of a checkpoint; `dtype` None: its config's type, or else its embedding's."""
    config, folder = load_config(source, revision)
    with torch.device("meta"):  # no memory of its own: it takes over the files' tensors
        llama = Llama(config)
    tensors = {}
    paths = fetch_weights(source, folder.name)  # of the same commit, whose name the folder has
    for path in tqdm(paths, desc="Loading weights", delay=2, leave=False):
        for name, tensor in load_tensors(path, device).items():
            if name in tensors:
                raise ValueError(f"{path} cannot be used: {name} is in another file too.")
            if tensor.dtype not in (*DTYPES.values(), torch.float64):
                raise ValueError(f"{path} cannot be used: {name} is of type {tensor.dtype}.")
            if not name.endswith("inv_freq"):  # old checkpoints hold RoPE's frequencies
                tensors[name] = tensor
    if config.tie_word_embeddings and "lm_head.weight" in tensors:  # either stands for both
        head = tensors.pop("lm_head.weight")
        if not tensors.setdefault("model.embed_tokens.weight", head).equal(head):
            raise ValueError(f"{folder} has two different embeddings, but its config ties them.")
    if dtype is None and "model.embed_tokens.weight" in tensors:
        dtype = DTYPES.get(config.dtype) or tensors["model.embed_tokens.weight"].dtype
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    try:
        llama.load_state_dict(tensors, assign=True)
    except RuntimeError as error:  # its second line names the first tensors that do not fit
        first = str(error).splitlines()[1].strip(" \t.").replace('"', "")
        first = first if first.startswith("size") else first.partition(",")[0]
        raise ValueError(
            f"{folder} is not whole, or not as its config.json says: {first}."
        ) from error
    return llama


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@torch.inference_mode()
def complete(source, prompt, count=40):
    """The prompt and `count` tokens after it, each the likeliest."""
    tokenizer, llama = load_tokenizer(load_config(source)[1]), load_llama(source, device=DEVICE)
    ids = tokenizer.encode(prompt).ids
    if not ids or max(ids) >= llama.config.vocab_size:
        raise ValueError(f"{prompt!r} has no tokens, or one that the network has no embedding of.")
    cache = KVCache(llama, 1, len(ids) + count)
    chunk = torch.tensor([ids], device=DEVICE)  # (1, T), then (1, 1)
    for _ in range(count):
        hidden = llama(chunk, cache=cache)[:, -1]  # (1, D)
        cache.lengths += chunk.shape[1]
        chunk = (hidden @ llama.unembedding.T).argmax(-1, keepdim=True)  # (1, 1)
        ids.append(chunk.item())
    return tokenizer.decode(ids)


def device(name):
    """A type for argparse: a device that this machine has."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError from error
    return name


@contextmanager
def exit_in_one_sentence():
    """What the user can mend ends in one sentence and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal need not know all characters
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        print(f"{Path(sys.argv[0]).name}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    with exit_in_one_sentence():
        if len(sys.argv) != 3 or not sys.argv[2]:
            raise ValueError('usage: python llama.py CHECKPOINT "prompt"')
        print(complete(*sys.argv[1:]))
