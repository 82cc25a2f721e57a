"""Llama 3.1: the transformer, from token ids to hidden states.

What is here
    LlamaConfig     the shape, in the words of a Hugging Face config.json
    Llama           embedding, L decoder layers (RMSNorm, RoPE, grouped-query attention, SwiGLU), final RMSNorm
    KVCache         keys and values of past tokens, one length per row, so that rows of different lengths advance together
    load_config, load_llama, load_tokenizer
                    a checkpoint, in a local folder or on the Hugging Face Hub, becomes a Llama and its tokenizer

Part of the paper: section 3 takes Llama 3.1 8B Instruct as it is, and so does this file: module names are those of the
official checkpoint (`model.layers.3.self_attn.k_proj.weight`) and the arithmetic is that of transformers' LlamaForCausalLM.
Departures: `forward` stops at the hidden states, because Q-learning needs four of the 128,256 rows of the vocabulary
matrix (icrl.QNetwork takes them); told which positions are read, it spares the last layer the others; and it takes IA3 scaling
vectors (ia3.py) as an argument, so that the online and the delayed network can share one frozen base.

Shapes: B batch, T tokens, N of them read, S slots of the cache, L layers, D model, H heads, K key/value heads, hd head size,
I feed-forward.
"""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub import errors as hub
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# settings that only some checkpoints have, and the one value of each that is implemented
IMPLEMENTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "rope_interleaved": False,
    "pretraining_tp": 1,
}
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
    max_position_embeddings: int = 131_072  # tokens of context that it was trained for; nothing here is limited by it

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
        for key, implemented in IMPLEMENTED.items():
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
            max_position_embeddings=config.get("max_position_embeddings", 2048),  # transformers' default
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


def rope_tables(config: LlamaConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `rotate` multiplies with at positions (B, T): (cos, cos) and (-sin, sin) of a pair's angles, (B, 1, T, hd)."""
    angles = positions[:, None, :, None] * rope_frequencies(config, positions.device)  # (B, 1, T, hd / 2) float32
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + hd/2}) of x (B, heads, T, hd) by angles given as `rope_tables` makes them.

    Half-split pairs, as in the Hugging Face checkpoints; Meta's own files pair neighbours and store q and k permuted.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)  # rolled by half, x has the partners in its place


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
        self.used = 0  # slots that attention looks at: at least all in use, the present chunk's padding included

    def positions(self, chunk: int) -> Tensor:
        """The positions (B, T) that the next chunk of T tokens will take; sets `used`. Raises ValueError if it does not fit."""
        positions = self.lengths[:, None] + torch.arange(chunk, device=self.lengths.device)
        self.used, slots = int(positions.max()) + 1, self.keys.shape[3]
        if self.used > slots:
            raise ValueError(f"The cache holds {slots} tokens a row, but position {self.used - 1} was fed to it.")
        if self.keys.is_cuda:  # few different shapes, for each of which a kernel may have to be planned
            self.used = min(slots, -(-self.used // 128) * 128)
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
        """Forget all rows but these; in place, since there may be no room for a second cache."""
        for layer in (*self.keys, *self.values):
            layer[: len(rows)] = layer[rows]
        self.keys, self.values, self.lengths = self.keys[:, : len(rows)], self.values[:, : len(rows)], self.lengths[rows]

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


class Queries(NamedTuple):
    """The tokens for which a layer computes hidden states: all T of its input, or in the last layer the N that are read."""

    read: Tensor | None  # (B, N) their places among the T; None: all of them
    rope: tuple[Tensor, Tensor]  # of their positions
    mask: Tensor | None  # (B, 1, groups * N, S'), 0 or -inf, in Attention's order; None: each sees itself and those before

    def of(self, x: Tensor) -> Tensor:
        """Their part (B, N, D) of x (B, T, D)."""
        return x if self.read is None else x.gather(1, self.read[:, :, None].expand(-1, -1, x.shape[2]))


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

    def forward(self, x: Tensor, layer: int, adapter, cache, positions: Tensor, rope, queries: Queries) -> Tensor:
        hd = self.config.head_dim
        q, k, v = self.q_proj(queries.of(x)), self.k_proj(x), self.v_proj(x)  # (B, N, H*hd), (B, T, K*hd) twice
        if adapter is not None:  # IA3, before RoPE as in PEFT
            k, v = (k * adapter.key[layer]).to(k.dtype), (v * adapter.value[layer]).to(v.dtype)
        q, k, v = (t.unflatten(2, (-1, hd)).transpose(1, 2) for t in (q, k, v))  # (B, H, N, hd), (B, K, T, hd) twice
        q, k = rotate(q, *queries.rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(layer, positions, k, v)  # (B, K, S', hd)
        groups = q.shape[1] // k.shape[1]  # query heads that share a key/value head
        if queries.mask is None:
            if groups > 1 and q.is_cuda and q.dtype == torch.float32:  # no fused kernel of CUDA does this
                k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])  # (B, H, N, hd)
        else:  # fused kernels take a mask or groups, not both: a group's heads become further queries of its one head
            q = q.unflatten(1, (-1, groups)).flatten(2, 3)  # (B, K, groups * N, hd)
            if q.is_cpu and q.dtype == torch.float32 and q.shape[2] < 8:  # where the fused kernel is slower
                y = (hd**-0.5 * q @ k.transpose(-2, -1) + queries.mask).softmax(-1) @ v
            else:
                y = F.scaled_dot_product_attention(q, k, v, queries.mask)
            y = y.unflatten(2, (groups, -1)).flatten(1, 2)  # (B, H, N, hd)
        return self.o_proj(y.transpose(1, 2).flatten(2))


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

    def forward(self, x: Tensor, layer: int, adapter, cache, positions: Tensor, rope, queries: Queries) -> Tensor:
        x = queries.of(x) + self.self_attn(self.input_layernorm(x), layer, adapter, cache, positions, rope, queries)
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
        self.checkpointing = False  # keep only each layer's input for the backward pass, and compute the rest once more there
        self.model = LlamaModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def vocabulary(self) -> Tensor:
        """The matrix (vocab_size, D) whose product with a hidden state gives the logits."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens: Tensor, adapter=None, cache: KVCache | None = None, read: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) of tokens (B, T) int64, or only those that are read, (B, N, D).

        adapter: an object with `key`, `value` (L, K*hd) and `feed_forward` (L, I), or None (see ia3.py).
        cache: past keys and values; the tokens then continue its rows, and the caller advances it (see KVCache).
        read: (B, N) int64, their places among the T; the last layer needs keys and values of all tokens, the rest only of these.
        """
        x, T = self.model.embed_tokens(tokens), tokens.shape[1]  # (B, T, D)
        if cache is None:
            positions, slots = torch.arange(T, device=x.device)[None], None  # (1, T); plain causal attention
        else:
            positions = cache.positions(T)  # (B, T); settles cache.used too
            slots = cache.used
        each = self.make_queries(positions, x.dtype, slots)
        last = each if read is None else self.make_queries(positions, x.dtype, slots or T, read)
        for i, layer in enumerate(self.model.layers):
            rest = (i, adapter, cache, positions, each.rope, last if i + 1 == len(self.model.layers) else each)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, *rest, use_reentrant=False, preserve_rng_state=False)  # there is no dropout
            else:
                x = layer(x, *rest)
        return self.model.norm(x)

    def make_queries(self, positions: Tensor, dtype: torch.dtype, slots: int | None, read: Tensor | None = None) -> Queries:
        """Queries at positions (1 or B, T), or only those of them that are read (B, N).

        slots: how many keys there will be, for the mask; None: no mask, plain causal attention.
        """
        if read is not None:
            positions = positions.expand(len(read), -1).gather(1, read)  # (B, N)
        mask = None
        if slots is not None:
            later = (torch.arange(slots, device=positions.device) > positions[:, :, None])[:, None, None]  # (B, 1, 1, N, S')
            groups = self.config.num_attention_heads // self.config.num_key_value_heads
            mask = torch.where(later, -math.inf, 0.0).to(dtype).expand(-1, -1, groups, -1, -1).flatten(2, 3)
        return Queries(read, rope_tables(self.config, positions, dtype), mask)


# ---------------------------------------------------------------------------------------------------------- checkpoints
class MissingFile(ValueError):
    """A checkpoint has no such file."""


def fetch(source: str | Path, file: str, revision: str | None = None) -> Path:
    """Where a file of a checkpoint is: in the local folder `source`, or in the cache of the Hub's repository `source`.

    What the cache lacks is downloaded first; a download that breaks off is taken up again, at once or by the next call, as the
    Hub's library does it, and weights and tokenizers are checked against the Hub's SHA-256. Raises ValueError, in one
    sentence, for whatever goes wrong, and OSError if the disk is full.
    """
    folder, revision = Path(source), revision or None
    if folder.is_dir():
        if not (folder / file).is_file():
            raise MissingFile(f"{folder} is no whole checkpoint: it has no {file}.")
        return folder / file
    missing = f"The Hub's {source} has no {file}: choose a repository that has one."
    try:
        cached = try_to_load_from_cache(str(source), file, revision=revision)  # a path, _CACHED_NO_EXIST or None
        path = Path(hf_hub_download(str(source), file, revision=revision))
    except hub.GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{source}"
        raise ValueError(f"{source} is gated: ask for access at {page}, then log in by `hf auth login`.") from error
    except hub.RepositoryNotFoundError as error:
        raise ValueError(
            f"There is no folder {source} here and no such repository on the Hub that you may see: check the name, or log in by "
            "`hf auth login` if it is private."
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ValueError(f"{source} has no revision {revision!r} on the Hub: name a branch, a tag or a commit.") from error
    except hub.LocalEntryNotFoundError as error:
        if cached is _CACHED_NO_EXIST:
            raise MissingFile(missing) from error
        if isinstance(error.__cause__, hub.HfHubHTTPError):
            raise ValueError(_answer(source, file, error.__cause__)) from error
        raise ValueError(
            f"{file} of {source} is neither in a folder of that name nor in the Hub's cache, and the Hub cannot be reached: "
            "connect to the network, or name a local checkpoint folder."
        ) from error
    except hub.EntryNotFoundError as error:
        raise MissingFile(missing) from error
    except hub.HFValidationError as error:
        raise ValueError(f"{source} is neither a folder here nor a name that a repository of the Hub can have.") from error
    except hub.HfHubHTTPError as error:
        raise ValueError(_answer(source, file, error)) from error
    except OSError as error:
        if error.errno is not None:  # the disk's own trouble
            raise
        raise ValueError(f"{file} of {source} did not arrive whole ({_one_line(error)}): run it again.") from error
    except Exception as error:  # of the Hub's HTTP library, which is another one from version to version
        raise ValueError(f"{file} of {source} could not be downloaded ({_one_line(error)}): run it again.") from error
    blob = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    if str(path) != cached and len(blob) == 64:  # just downloaded; the cache names large files by their SHA-256
        with open(path, "rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != blob:
                path.resolve().unlink()  # the content itself, wherever the cache keeps it
                raise ValueError(f"{file} of {source} arrived damaged and was deleted: run it again to download it anew.")
    return path


def _one_line(error: object) -> str:
    """The first line of a message, without its full stop."""
    return f"{error}".partition("\n")[0].rstrip(". ")


def _answer(source: str | Path, file: str, error: hub.HfHubHTTPError) -> str:
    """What the Hub said when it refused a file, as one sentence."""
    words = _one_line(error.server_message or "it gives no reason")
    advice = "log in anew by `hf auth login`" if error.response.status_code in (401, 403) else "run it again later"
    return f"The Hub answers {error.response.status_code} for {file} of {source} ({words}): {advice}."


def _read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # or not even text
        raise ValueError(f"{path} is not JSON: {error}.") from error


def load_config(source: str | Path, revision: str | None = None) -> tuple[LlamaConfig, str]:
    """The shape of a checkpoint, and the commit that all of its files are taken from ("" for a local folder).

    Raises as `fetch` and `LlamaConfig.from_dict` do.
    """
    path = fetch(source, "config.json", revision)
    return LlamaConfig.from_dict(_read_json(path)), "" if Path(source).is_dir() else path.parent.name


def load_tokenizer(source: str | Path, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint, from its tokenizer.json. Raises ValueError, in one sentence, if that is damaged."""
    path = fetch(source, "tokenizer.json", revision)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # what the tokenizers library raises has no class of its own
        raise ValueError(f"{path} is damaged: {error}.") from error


def free_memory(device: str | torch.device) -> int:
    """Bytes that can still be had on a device; of the memory of a CPU, this process's part under torchrun."""
    if torch.device(device).type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: half of all that there is
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def load_llama(
    source: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", revision: str | None = None
) -> Llama:
    """The Llama of a checkpoint: a local folder, or a repository of the Hub, in one safetensors file or in shards.

    Built on the meta device; the files are memory-mapped and their tensors assigned, so that the weights exist once, as they
    come from the files, if `dtype` is the files'. Raises ValueError or OSError, in one sentence, if the checkpoint is not
    whole, not a Llama that is implemented, or too large; wherever the files permit it, before any weight is read.
    """
    config, revision = load_config(source, revision)
    with torch.device("meta"):
        llama = Llama(config)
    expected = llama.state_dict()
    needed = sum(tensor.numel() for tensor in expected.values()) * dtype.itemsize
    if needed > (free := free_memory(device)):
        gigabytes = f"{needed / 1e9:.1f} GB as {dtype}, but {device} has only {free / 1e9:.1f} GB free"
        raise ValueError(f"The weights of {source} take {gigabytes}: take a smaller model or type, or another device.")
    try:
        index = _read_json(fetch(source, "model.safetensors.index.json", revision))
        shards = dict.fromkeys(index["weight_map"].values())  # each once, in order
        _check_names(source, expected, index["weight_map"], config)
    except MissingFile:
        shards = ["model.safetensors"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"model.safetensors.index.json of {source} has no weight_map of names and files.") from error
    paths = [fetch(source, shard, revision) for shard in shards]
    shapes = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, it is no dict
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and copy or download it again.") from error
    _check_names(source, expected, shapes, config)
    for name, tensor in expected.items():
        if tuple(shapes[name]) != tensor.shape:
            raise ValueError(
                f"{name} of {source} has the shape {tuple(shapes[name])}, where its config.json says {tuple(tensor.shape)}."
            )
    with tqdm(total=needed, unit="B", unit_scale=True, desc="Loading weights", delay=1, leave=False) as bar:
        for path in paths:
            with safe_open(path, "pt", device=str(device)) as file:
                for name in filter(expected.__contains__, file.keys()):
                    tensor = file.get_tensor(name).to(dtype)
                    llama.load_state_dict({name: tensor}, assign=True, strict=False)
                    bar.update(tensor.nbytes)
    return llama


def _check_names(source: str | Path, expected: dict, names: dict, config: LlamaConfig) -> None:
    """Raises ValueError if a checkpoint's tensors are not those expected, but for what is computed or tied here."""
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    extra = {name for name in names.keys() - expected.keys() - tied if not name.endswith("rotary_emb.inv_freq")}
    for what, which in (("lacks", expected.keys() - names.keys()), ("should not have", extra)):
        if which:
            raise ValueError(f"{source} {what} {min(which)}" + (f" and {len(which) - 1} more." if len(which) > 1 else "."))
