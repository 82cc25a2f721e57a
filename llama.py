"""Llama 3.1: the transformer, from token ids to hidden states.

What is here
    LlamaConfig     the shape, in the words of a Hugging Face config.json
    Llama           embedding, L decoder layers (RMSNorm, RoPE, grouped-query attention, SwiGLU), final RMSNorm
    KVCache         keys and values of past tokens, one length per row, so that rows of different lengths advance together
    load_llama      a checkpoint folder (config.json, model.safetensors) becomes a Llama

Part of the paper: section 3 takes Llama 3.1 8B Instruct as it is, and so does this file: module names are those of the
official checkpoint (`model.layers.3.self_attn.k_proj.weight`) and the arithmetic is that of transformers' LlamaForCausalLM.
Departures: `forward` stops at the hidden states, because Q-learning needs four of the 128,256 rows of the vocabulary
matrix (icrl.QNetwork takes them); and it takes IA3 scaling vectors (ia3.py) as an argument, so that the online and the
delayed network can share one frozen base.

Shapes: B batch, T tokens, S slots of the cache, L layers, D model, H heads, K key/value heads, hd head size, I feed-forward.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LLAMA3_SCALING = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


@dataclass(frozen=True)
class LlamaConfig:
    """Field names are the keys of a Hugging Face config.json; the defaults are Llama 3.1 8B's, but for its RoPE scaling."""

    vocab_size: int = 128_256
    hidden_size: int = 4096  # D
    intermediate_size: int = 14_336  # I
    num_hidden_layers: int = 32  # L
    num_attention_heads: int = 32  # H
    num_key_value_heads: int = 8  # K
    head_dim: int = 128  # hd
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: dict | None = None  # {"rope_type": "llama3", "factor": 8.0, ...}, or None for plain RoPE
    tie_word_embeddings: bool = False

    def __post_init__(self):
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            heads = f"num_attention_heads ({self.num_attention_heads})"
            raise ValueError(f"{heads} has to be a multiple of num_key_value_heads ({self.num_key_value_heads}).")
        if self.head_dim % 2 or self.head_dim < 2:
            raise ValueError(f"RoPE rotates pairs, so head_dim has to be even, but it is {self.head_dim}.")
        if self.rope_scaling is not None and self.rope_scaling.get("rope_type") != "llama3":
            raise ValueError(f"RoPE scaling {self.rope_scaling} is not implemented: use type llama3 or none.")
        if self.rope_scaling is not None and (missing := LLAMA3_SCALING - self.rope_scaling.keys()):
            raise ValueError(f"RoPE scaling of type llama3 needs {', '.join(sorted(missing))}, but the config has none.")

    @classmethod
    def from_dict(cls, config: dict) -> "LlamaConfig":
        """From the contents of a config.json, in either spelling of the RoPE settings.

        Raises ValueError, in one sentence, for anything that `Llama` does not implement.
        """
        if not isinstance(config, dict) or config.get("model_type") != "llama":
            kind = config.get("model_type") if isinstance(config, dict) else type(config).__name__
            raise ValueError(f"Only checkpoints of model_type llama are implemented, but this one is {kind!r}.")
        for key, implemented in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False), ("pretraining_tp", 1)):
            if config.get(key, implemented) != implemented:
                raise ValueError(f"A Llama with {key} = {config[key]!r} is not implemented, only {implemented!r} is.")
        if config.get("quantization_config"):
            raise ValueError("A quantised checkpoint is not implemented: use the original one in bf16, fp16 or fp32.")
        sizes = {key: config.get(key) for key in SIZES}
        for key, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"The config's {key} has to be a whole number of at least 1, but it is {size!r}.")
        # transformers 5 keeps theta and the scaling in `rope_parameters`, transformers 4 in `rope_theta` and `rope_scaling`
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0  # transformers' default
        rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
        return cls(
            **sizes,
            num_key_value_heads=config.get("num_key_value_heads") or sizes["num_attention_heads"],
            head_dim=config.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"],
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),  # transformers' default
            rope_theta=float(theta),
            rope_scaling=None if rope["rope_type"] == "default" else rope,
            tie_word_embeddings=bool(config.get("tie_word_embeddings")),
        )

    def to_dict(self) -> dict:
        """The contents of a config.json that transformers reads too."""
        return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"} | asdict(self)


# --------------------------------------------------------------------------------------------- rotary position embedding
def rope_frequencies(config: LlamaConfig, device: torch.device | None = None) -> Tensor:
    """Radians a token by which each pair of a head's dimensions turns, (hd / 2,) float32 (Su et al. 2021, section 3.2.2).

    Llama 3.1's scaling keeps wavelengths well inside the original context, divides by `factor` those beyond it, and blends
    linearly in between.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponent
    if (scaling := config.rope_scaling) is None:
        return frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + hd/2}) of x (B, heads, T, hd) by angles given as cos and sin (B or 1, 1, T, hd / 2).

    Half-split pairs, as in the Hugging Face checkpoints; Meta's own files pair neighbours and store q and k permuted.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


# -------------------------------------------------------------------------------------------------------------- KV cache
class KVCache:
    """Keys and values of every past token, preallocated; row b holds lengths[b] tokens.

    Feed a chunk (B, T) whose row b begins with its counts[b] real tokens, the rest being padding, then call
    `advance(counts)`: padding lies beyond the length, is never attended to, and is overwritten by the next chunk. Padding
    takes slots too, so allow for one chunk more than a row will hold.
    """

    def __init__(self, config: LlamaConfig, rows: int, slots: int, dtype=torch.float32, device=None):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, slots, config.head_dim)  # (L, B, K, S, hd)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # (B,)
        self.used = 0  # slots that any row uses, the present chunk's padding included

    def positions(self, chunk: int) -> Tensor:
        """The positions (B, T) that the next chunk of T tokens will take. Raises ValueError if it does not fit."""
        positions = self.lengths[:, None] + torch.arange(chunk, device=self.lengths.device)
        self.used = int(positions.max()) + 1
        if self.used > self.keys.shape[3]:
            raise ValueError(f"The cache holds {self.keys.shape[3]} tokens a row, but position {self.used - 1} was fed to it.")
        return positions

    def append(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, K, T, hd) at positions (B, T); returns all of the layer's that are in use, (B, K, S', hd)."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.keys[layer][rows, :, positions] = keys.transpose(1, 2)
        self.values[layer][rows, :, positions] = values.transpose(1, 2)
        return self.keys[layer, :, :, : self.used], self.values[layer, :, :, : self.used]

    def advance(self, counts: Tensor) -> None:
        """Count the first counts[b] tokens of row b's last chunk as seen; counts (B,)."""
        self.lengths += counts

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.keys, self.values, self.lengths = self.keys[:, rows], self.values[:, rows], self.lengths[rows]

    def replace(self, rows: Tensor, other: "KVCache") -> None:
        """Overwrite these rows with those of another cache with as many slots."""
        self.keys[:, rows], self.values[:, rows], self.lengths[rows] = other.keys, other.values, other.lengths


# ----------------------------------------------------------------------------------------------------------- the network
class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention in which H / K query heads share each key/value head (Ainslie et al. 2023)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        D, hd = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(D, config.num_attention_heads * hd, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * hd, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * hd, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * hd, D, bias=False)

    def forward(self, x: Tensor, layer: int, rope: tuple[Tensor, Tensor], adapter, cache, positions, mask) -> Tensor:
        B, T, _ = x.shape
        hd = self.config.head_dim
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (B, T, H*hd), (B, T, K*hd) twice
        if adapter is not None:  # IA3, before RoPE as in PEFT
            k, v = (k * adapter.key[layer]).to(k.dtype), (v * adapter.value[layer]).to(v.dtype)
        q, k, v = (t.view(B, T, -1, hd).transpose(1, 2) for t in (q, k, v))  # (B, H or K, T, hd)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(layer, positions, k, v)  # (B, K, S', hd)
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)  # (B, H, T, hd)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, layer: int, adapter) -> Tensor:
        x = F.silu(self.gate_proj(x)) * self.up_proj(x)  # (B, T, I)
        if adapter is not None:
            x = (x * adapter.feed_forward[layer]).to(x.dtype)
        return self.down_proj(x)


class DecoderLayer(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, layer: int, rope, adapter, cache, positions, mask) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), layer, rope, adapter, cache, positions, mask)
        return x + self.mlp(self.post_attention_layernorm(x), layer, adapter)


class LlamaModel(nn.Module):
    """The checkpoint's `model.` prefix: everything but the vocabulary matrix."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """A Llama with random weights; `load_state_dict` takes an official checkpoint's tensors by their own names."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def vocabulary(self) -> Tensor:
        """The matrix (vocab_size, D) whose product with a hidden state gives the logits."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens: Tensor, adapter=None, cache: KVCache | None = None) -> Tensor:
        """Hidden states (B, T, D) of tokens (B, T) int64.

        adapter: an object with `key`, `value` (L, K*hd) and `feed_forward` (L, I), or None (see ia3.py).
        cache: past keys and values; the tokens then continue its rows, and the caller advances it (see KVCache).
        """
        x = self.model.embed_tokens(tokens)  # (B, T, D)
        if cache is None:
            positions, mask = torch.arange(tokens.shape[1], device=x.device)[None], None  # plain causal attention
        else:
            positions = cache.positions(tokens.shape[1])  # (B, T)
            slots = torch.arange(cache.used, device=x.device)
            mask = (slots <= positions[:, :, None])[:, None]  # (B, 1, T, S'): a token sees its row up to itself
        angles = positions[:, None, :, None] * rope_frequencies(self.config, x.device)  # (B or 1, 1, T, hd / 2) float32
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, i, rope, adapter, cache, positions, mask)
        return self.model.norm(x)


def load_llama(folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Llama:
    """The Llama of a checkpoint folder. Raises ValueError, in one sentence, if the folder holds no whole one.

    Built on the meta device, so that the weights exist once, as they come from the file, if `dtype` is the file's.
    """
    folder = Path(folder)
    path = folder / "model.safetensors"
    for file in (folder / "config.json", path):
        if not file.is_file():
            raise ValueError(f"{folder} is no checkpoint folder: it has no {file.name}.")
    try:
        content = json.loads((folder / "config.json").read_text())
    except ValueError as error:  # or not even text
        raise ValueError(f"{folder / 'config.json'} is not JSON: {error}.") from error
    config = LlamaConfig.from_dict(content)
    try:
        tensors = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy or download it again.") from error
    for name in [
        n for n in tensors if n.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and n == "lm_head.weight")
    ]:
        del tensors[name]  # computed here, or the same as embed_tokens
    with torch.device("meta"):
        llama = Llama(config)
    expected = llama.state_dict()
    for what, names in (("lacks", expected.keys() - tensors.keys()), ("should not have", tensors.keys() - expected.keys())):
        if names:
            raise ValueError(f"{path} {what} {min(names)}" + (f" and {len(names) - 1} more." if len(names) > 1 else "."))
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            shapes = f"{tuple(tensors[name].shape)}, where its config.json says {tuple(tensor.shape)}"
            raise ValueError(f"{name} in {path} has the shape {shapes}.")
    llama.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return llama
