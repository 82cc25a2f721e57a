"""Llama 3.1: the transformer, from token ids to hidden states, and its official weights.

    python llama.py CHECKPOINT "prompt"    completes the prompt greedily

Section 3 of the paper takes Llama 3.1 8B Instruct as it is, and so does this file: its modules have
the official names, and it computes what transformers does. There are two departures. `forward`
stops at the hidden states, because we need the logits of four action words only, not of 128,256
tokens. And it takes IA3's vectors (ia3.py) as an argument.

Shapes: B batch, T tokens, S slots of the cache, U used slots (on a GPU rounded up), L layers,
D model, H heads, K key/value heads, hd head size, I feed-forward.
"""

import json
import math
import os
import re
import sys
from argparse import ArgumentTypeError
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import errors, snapshot_download
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Kernels that take a mask; cuDNN's is left out, since it recompiles for each new shape.
MASKED_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# On a GPU the used part of a cache grows by this many slots, to limit the number of shapes.
SLOTS_MULTIPLE = 128
LLAMA3_SCALING = "factor low_freq_factor high_freq_factor original_max_position_embeddings".split()
REQUIRED = {  # the only values of these settings that are implemented, where they are set at all
    "model_type": "llama",
    "hidden_act": "silu",
    "partial_rotary_factor": 1,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "rope_interleaved": False,
    "quantization_config": None,
}


@dataclass(frozen=True)
class LlamaConfig:
    """The hyperparameters of a Llama, by the names and defaults of a Hugging Face config.json."""

    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int  # I
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    head_dim: int  # hd
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # Llama 3's; None is plain RoPE
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048  # in tokens
    dtype: str | None = None  # of the weights; None: that of the embedding

    @classmethod
    def from_dict(cls, config):
        """From the contents of a config.json; ValueError for what `Llama` does not implement."""
        config = {key: value for key, value in config.items() if value is not None}  # no nulls
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        settings = config | rope  # RoPE's base may be in either
        for key, required in REQUIRED.items():
            if key in settings and settings[key] != required:
                raise ValueError(f"{key} {settings[key]!r} is not implemented")

        heads = config["num_attention_heads"]
        config.setdefault("num_key_value_heads", heads)
        config.setdefault("head_dim", config["hidden_size"] // heads)
        config.setdefault("max_position_embeddings", 2048)
        sizes = {f.name: config[f.name] for f in fields(cls) if f.type is int}
        positive = all(type(size) is int and size > 0 for size in sizes.values())
        if not positive or heads % sizes["num_key_value_heads"] or sizes["head_dim"] % 2:
            raise ValueError(f"no Llama has these sizes: {sizes}")

        config["rope_theta"] = float(settings.get("rope_theta", 10_000))
        config["rope_scaling"] = llama3_scaling(rope)
        config.setdefault("dtype", config.get("torch_dtype"))
        if config["dtype"] not in (None, *DTYPES):
            raise ValueError(f"dtype {config['dtype']!r} is not implemented")
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})

    def to_dict(self):
        """The contents of a config.json that transformers reads too."""
        family = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        return family | {"hidden_act": "silu"} | asdict(self)


# ---- rotary position embedding
def llama3_scaling(rope):
    """Llama 3's scaling from a config's RoPE settings; None if there is none."""
    types = {rope.get("rope_type"), rope.get("type")} - {None, "default"}
    if not types:
        return None
    if types != {"llama3"} or not rope.keys() >= set(LLAMA3_SCALING):
        raise ValueError(f"RoPE scaling {rope} is not implemented, or is incomplete")
    return {"rope_type": "llama3"} | {key: rope[key] for key in LLAMA3_SCALING}


def rope_frequencies(config, device=None):
    """Angles, in radians per token, by which each pair of dimensions is rotated, (hd / 2,).

    Rotary position embedding is by Su et al. 2021. Llama 3.1 keeps the frequencies
    with many rotations within the original context, divides by `factor` those with hardly any, and
    blends linearly in between.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponent
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, context = (config.rope_scaling[key] for key in LLAMA3_SCALING)
    rotations = context * frequencies / (2 * math.pi)  # within the original context
    keep = ((rotations - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / factor


def rotate(x, cos, sin):
    """Rotate the pairs (x_i, x_{i + hd/2}) of x (B, heads, T, hd) by angles (B, 1, T, hd / 2).

    Halves are paired as in Hugging Face checkpoints; Meta's own files pair neighbours instead.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# ---- KV cache
class KVCache:
    """Keys and values of all past tokens; row b holds lengths[b] of them.

    The token at position p of a row lies in its slot p.

    Rows advance at their own pace. A chunk (B, T) may be padded at the right; the caller
    then adds each row's number of real tokens to `lengths`. Padding takes slots, too, but no real
    token attends to it, and the row's next tokens overwrite it.

    `lengths` are on the CPU, so that reading them does not wait for a GPU.
    """

    def __init__(self, llama, rows, slots):
        config = llama.config
        slots = round_up(slots)
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, slots, config.head_dim)
        weights = llama.unembedding  # for their type and device
        self.keys = weights.new_zeros(shape)  # (L, B, K, S, hd)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(rows, dtype=torch.long, device="cpu")  # (B,)

    def __getitem__(self, rows):
        """Some rows. A list of rows gives a copy; a slice gives a view, which shares its memory."""
        part = object.__new__(KVCache)  # without __init__, which would make a new cache
        part.keys = self.keys[:, rows]
        part.values = self.values[:, rows]
        part.lengths = self.lengths[rows]
        return part

    def append(self, layer, slots, keys, values, used):
        """Store (B, K, T, hd) in `slots` (B, T); return the first `used` slots, (B, K, U, hd)."""
        # With the index tensors `row` and `slots`, PyTorch puts their dimensions (B, T) first:
        # keys[layer][row, :, slots] is (B, T, K, hd).
        row = torch.arange(len(slots), device=slots.device)[:, None]  # (B, 1)
        self.keys[layer][row, :, slots] = keys.transpose(1, 2)
        self.values[layer][row, :, slots] = values.transpose(1, 2)
        return self.keys[layer, :, :, :used], self.values[layer, :, :, :used]


def round_up(slots):
    return -(-slots // SLOTS_MULTIPLE) * SLOTS_MULTIPLE


# ---- the network
class Position(NamedTuple):
    """The positions of the tokens of a forward pass, and what follows from them for attention."""

    ids: Tensor  # (B, T) or (1, T), counted from the row's first token
    cos: Tensor  # (B, 1, T, hd / 2), of RoPE's angles
    sin: Tensor  # (B, 1, T, hd / 2)
    mask: Tensor | None  # (B, 1, T, U) bool: the slots of the cache that each token attends to


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019). F.rms_norm computes in float32."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x):
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


class Attention(nn.Module):
    """Causal self-attention; H / K query heads share each key/value head (Ainslie et al. 2023)."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        hd = config.head_dim
        self.head_dim = hd
        self.q_proj = nn.Linear(D, config.num_attention_heads * hd, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * hd, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * hd, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * hd, D, bias=False)

    def forward(self, x, layer, position, adapter, cache):
        q = self.q_proj(x)  # (B, T, H * hd)
        k = self.k_proj(x)  # (B, T, K * hd)
        v = self.v_proj(x)  # (B, T, K * hd)
        if adapter is not None:  # IA3 scales keys and values before RoPE, as PEFT does
            k = (k * adapter.key[layer]).to(k.dtype)
            v = (v * adapter.value[layer]).to(v.dtype)

        q = self.split_heads(q)  # (B, H, T, hd)
        k = self.split_heads(k)  # (B, K, T, hd)
        v = self.split_heads(v)  # (B, K, T, hd)
        q = rotate(q, position.cos, position.sin)
        k = rotate(k, position.cos, position.sin)

        if cache is None:  # training: each token attends to itself and the tokens before it
            grouped = q.shape[1] != k.shape[1]  # several query heads share a key/value head
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:  # playing: the new tokens attend to the cache, of which they are now the end
            used = position.mask.shape[-1]  # U
            k, v = cache.append(layer, position.ids, k, v, used)  # (B, K, U, hd)
            y = attend_to_cache(q, k, v, position.mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)

    def split_heads(self, x):
        """(B, T, heads * hd) -> (B, heads, T, hd)"""
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)


def attend_to_cache(q, k, v, mask):
    """Attention of queries (B, H, T, hd) to keys and values (B, K, U, hd) by mask (B, 1, T, U).

    Few GPU kernels take both a mask and grouped heads. So the queries of all R = H / K heads that
    share a key/value head become queries of one head.
    """
    B, H, T, hd = q.shape
    K = k.shape[1]
    R = H // K
    q = q.reshape(B, K, R * T, hd)  # the T tokens of one head, then those of the next
    mask = mask.repeat(1, 1, R, 1)  # (B, 1, R * T, U)
    y = F.scaled_dot_product_attention(q, k, v, mask)  # (B, K, R * T, hd)
    return y.reshape(B, H, T, hd)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.gate_proj = nn.Linear(D, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(D, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, D, bias=False)

    def forward(self, x, layer, adapter):
        x = F.silu(self.gate_proj(x)) * self.up_proj(x)  # (B, T, I)
        if adapter is not None:
            x = (x * adapter.feed_forward[layer]).to(x.dtype)
        return self.down_proj(x)  # (B, T, D)


class DecoderLayer(nn.Module):
    """Attention, then MLP; each adds to its input."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x, layer, position, adapter, cache):
        x = x + self.self_attn(self.input_layernorm(x), layer, position, adapter, cache)
        return x + self.mlp(self.post_attention_layernorm(x), layer, adapter)


class Llama(nn.Module):
    """A Llama with random weights; `load_llama` gives it those of a checkpoint."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.recompute_layers = False  # gradient checkpointing: less memory, more time
        self.model = nn.Module()  # official names begin with `model.`
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = RMSNorm(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def unembedding(self):
        """The matrix (vocab_size, D) whose product with a hidden state gives the logits."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def forward(self, tokens: Tensor, adapter=None, cache=None) -> Tensor:
        """Hidden states (B, T, D) of tokens (B, T) int64, which continue what the cache holds.

        An adapter has `key`, `value` (L, K*hd) and `feed_forward` (L, I), as ia3.IA3 does.
        """
        x = self.model.embed_tokens(tokens)  # (B, T, D)

        # The positions of the tokens: after those that the cache already holds.
        position_ids = torch.arange(tokens.shape[1], device=x.device)[None]  # (1, T)
        if cache is not None:
            position_ids = cache.lengths.to(x.device)[:, None] + position_ids  # (B, T)

        # A token attends to the slots up to its own. That hides the padding of shorter rows too:
        # it lies in later slots, which the row's next tokens overwrite.
        mask = None  # without a cache, attention is simply causal
        if cache is not None:
            used = int(cache.lengths.max()) + tokens.shape[1]
            if x.is_cuda:
                used = round_up(used)
            slots = torch.arange(used, device=x.device)  # (U,)
            mask = (slots <= position_ids[:, :, None])[:, None]  # (B, 1, T, U)

        # RoPE rotates queries and keys by an angle that grows with the position.
        angles = position_ids[:, None, :, None] * rope_frequencies(self.config, x.device)
        position = Position(position_ids, angles.cos().to(x.dtype), angles.sin().to(x.dtype), mask)

        for i, layer in enumerate(self.model.layers):
            if self.recompute_layers and torch.is_grad_enabled():
                x = checkpoint(layer, x, i, position, adapter, cache, use_reentrant=False)
            else:
                x = layer(x, i, position, adapter, cache)
        return self.model.norm(x)  # (B, T, D)


# ---- checkpoints: if one cannot be used, a ValueError says why in one sentence
def fetch(source: str | Path, *patterns, revision="") -> Path:
    """A checkpoint's folder: `source` itself, or its copy in the Hub's cache, downloaded if needed.

    Only files that match `patterns` are downloaded.
    """
    source = str(source)
    if Path(source).is_dir():
        return Path(source)
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise ValueError(f"{source} is not a folder.")
    try:
        return Path(snapshot_download(source, revision=revision or None, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        reason = "is gated: request access on its Hub page, then `hf auth login`."
        raise ValueError(f"{source} {reason}") from error
    except errors.LocalEntryNotFoundError as error:
        reason = "is not in the Hub's cache: go online, or name a folder."
        raise ValueError(f"{source} {reason}") from error
    except Exception as error:  # the Hub's library and its HTTP library raise many types
        words = re.split(r"\. |\n", str(error).strip())[0]
        reason = f"cannot be downloaded from the Hub: {type(error).__name__}, {words}"
        raise ValueError(f"{source} {reason}") from error


@contextmanager
def naming_file(path):
    """Turn any error in reading a file into a ValueError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist.") from error
    except Exception as error:  # each library that reads a file raises other types
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} cannot be used: {reason}") from error


def load_tensors(path, device="cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name."""
    path = path.resolve()  # errors name the file itself, not a link in the Hub's cache
    with naming_file(path):
        return load_file(path, device=str(device))


def load_tokenizer(folder) -> Tokenizer:
    """The tokenizer.json of a checkpoint or a run, without truncation or padding."""
    path = folder / "tokenizer.json"
    with naming_file(path):
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_config(source: str | Path, revision="") -> tuple[LlamaConfig, Path]:
    """The config of a checkpoint, and the folder of its config.json and tokenizer.json."""
    folder = fetch(source, "config.json", "tokenizer.json", revision=revision)
    path = folder / "config.json"
    with naming_file(path):
        return LlamaConfig.from_dict(json.loads(path.read_text())), folder


def weight_files(source: str | Path, revision="") -> list[Path]:
    """The safetensors files of a checkpoint: the single one, else those of its index, else all."""
    single, index = "model.safetensors", "model.safetensors.index.json"
    folder = fetch(source, single, index, revision=revision)
    if (folder / single).exists():
        return [folder / single]
    if (folder / index).exists():
        with naming_file(folder / index):
            weight_map = json.loads((folder / index).read_text())["weight_map"]
            names = sorted(set(weight_map.values()))
        folder = fetch(source, *names, revision=revision)
        return [folder / name for name in names]
    folder = fetch(source, "model*.safetensors", revision=revision)
    return sorted(folder.glob("model*.safetensors"))


def load_llama(source: str | Path, dtype=None, device="cpu", revision="") -> Llama:
    """The Llama of a checkpoint. dtype None: what its config says, else what its embedding has."""
    config, folder = load_config(source, revision)
    # The Hub's cache names a folder by its commit: the weights have to be of the same one, even if
    # the branch has moved. For a local folder the revision does not matter.
    paths = weight_files(source, revision=folder.name)
    tensors = {}
    for path in tqdm(paths, desc="Loading weights", delay=2, leave=False):
        for name, tensor in load_tensors(path, device).items():
            if name in tensors:
                raise ValueError(f"{path} cannot be used: {name} is in another file too.")
            if tensor.dtype not in DTYPES.values():
                raise ValueError(f"{path} cannot be used: {name} is of type {tensor.dtype}.")
            if not name.endswith("inv_freq"):  # old checkpoints hold RoPE's frequencies
                tensors[name] = tensor

    # Tied embeddings may be in a checkpoint once, under either name, or twice.
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")
        embedding = tensors.setdefault("model.embed_tokens.weight", head)
        if not embedding.equal(head):
            raise ValueError(f"{folder} has two different embeddings, but its config ties them.")
    if "model.embed_tokens.weight" not in tensors:
        raise ValueError(f"{folder} is incomplete: it has no model.embed_tokens.weight.")
    if dtype is None:
        dtype = DTYPES.get(config.dtype) or tensors["model.embed_tokens.weight"].dtype
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}

    with torch.device("meta"):  # without memory: the files' tensors become its parameters
        llama = Llama(config)
    try:
        llama.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        line = str(error).splitlines()[1]  # say, 'Missing key(s) in state_dict: "a", "b". '
        problem = line.split('", "')[0].replace('"', "").strip(" \t.")  # only the first key
        words = "is incomplete, or not what its config.json says"
        raise ValueError(f"{folder} {words}: {problem}.") from error
    return llama


# ---- the machine and the command line, for all files
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def device_argument(name):
    """A type for argparse: the name of a device that this machine has."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentTypeError(f"this machine has no device {name!r}") from error
    return name


def memory_budget(device):
    """How many bytes this process may take.

    On a GPU, 85 % of all its memory, minus what this process uses already. It does not depend on
    what other processes use, so the same run has the same micro batches every time. If even less
    is free, it is what is free, with a warning. Without a GPU, half of the memory of the machine
    or, if it is less, of its container.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        planned = int(0.85 * total) - torch.cuda.memory_allocated(device)
        if free < planned:
            message = f"Only {free / 2**30:.1f} GiB of the GPU are free, less than planned."
            print(message, file=sys.stderr)
        return min(free, planned)
    limits = []
    if hasattr(os, "sysconf"):  # Windows has none
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # there is no such file, or it says "max"
            limits.append(int(Path(path).read_text()))
    return min(limits, default=8 * 2**30) // 2


@contextmanager
def user_errors():
    """On an error that the user can fix, exit with a message of one line and status 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # not every terminal has all characters
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # as in `python eval.py | head -1`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        first_line = str(error).partition("\n")[0]
        print(f"{Path(sys.argv[0]).name}: {first_line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@torch.inference_mode()
def generate(source, prompt, count=40):
    """The prompt and `count` tokens after it, each of them the most likely one."""
    tokenizer = load_tokenizer(load_config(source)[1])
    llama = load_llama(source, device=DEVICE)
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise ValueError("The prompt is empty: give at least one word.")
    if max(ids) >= llama.config.vocab_size:
        raise ValueError(f"The network has no embedding of the prompt's token {max(ids)}.")
    cache = KVCache(llama, 1, len(ids) + count)
    chunk = torch.tensor([ids], device=DEVICE)  # (1, T), then (1, 1)
    for _ in range(count):
        hidden = llama(chunk, cache=cache)[:, -1]  # (1, D)
        cache.lengths += chunk.shape[1]
        chunk = (hidden @ llama.unembedding.T).argmax(-1, keepdim=True)  # (1, 1)
        ids.append(chunk.item())
    return tokenizer.decode(ids)


if __name__ == "__main__":
    with user_errors():
        if len(sys.argv) != 3:
            raise ValueError('usage: python llama.py CHECKPOINT "prompt"')
        print(generate(*sys.argv[1:]))
