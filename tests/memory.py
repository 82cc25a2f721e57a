"""`python tests/memory.py`: the memory that training an adapter takes, as a table in Markdown.

It downloads nothing. The last columns follow train.py's rule for one slice: activations are stored
if they fit beside the weights, else the layers' inputs and the activations of one layer at a time.
"""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from ia3 import IA3
from llama import KVCache, Llama, LlamaConfig
from icrl import QNetwork
from train import activation_bytes

DTYPE = torch.bfloat16
CHECKPOINTS = {  # LlamaConfig's sizes, whether the vocabulary is tied, tokens of a slice
    "SmolLM2-135M-Instruct": ((49_152, 576, 1536, 30, 9, 3, 64), True, 4096),
    "Llama-3.2-1B-Instruct": ((128_256, 2048, 8192, 16, 32, 8, 64), True, 4096),
    "Llama-3.2-3B-Instruct": ((128_256, 3072, 8192, 28, 24, 8, 128), True, 4096),
    "Llama-3.1-8B-Instruct": ((128_256, 4096, 14_336, 32, 32, 8, 128), False, 4096),
    "Llama-3.3-70B-Instruct": ((128_256, 8192, 28_672, 80, 64, 8, 128), False, 4096),
}
GPUS = (8, 16, 24, 80)  # GB
CUDA = 0.7e9  # bytes that CUDA itself takes


def row(name: str) -> list[str]:
    shape, tied, tokens = CHECKPOINTS[name]
    config = LlamaConfig(*shape, tie_word_embeddings=tied)
    with torch.device("meta"):
        llama, adapter = Llama(config).to(DTYPE), IA3(config)
        cache = KVCache(llama, 1, tokens)
    trained = sum(p.numel() for p in adapter.parameters())
    weights = sum(p.nbytes for p in llama.parameters())
    matrices = sum(p.numel() for p in llama.model.layers.parameters() if p.ndim == 2)
    # On average a token attends to half a slice: products with as many keys and values.
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens
    activations = activation_bytes(QNetwork(llama, range(4), adapter), tokens)
    inputs = tokens * config.num_hidden_layers * config.hidden_size * DTYPE.itemsize
    recomputed = inputs + activations // config.num_hidden_layers
    gib = (f"{count / 2**30:.2f} GiB" for count in (weights, activations))
    cells = [name, f"{trained:,}", *gib, f"{(cache.keys.nbytes + cache.values.nbytes) >> 20} MiB"]
    cells.append(f"{2 * (matrices + attention) / 1e9:.1f} G")
    for gpu in GPUS:
        free = gpu * 1e9 - CUDA - weights
        cells.append("stored" if activations < free else "recomputed" if recomputed < free else "-")
    return cells


if __name__ == "__main__":
    what = "checkpoint|trained|weights, bf16|activations of a slice|KV cache of a trial"
    head = [*what.split("|"), "forward FLOPs a token", *(f"{gpu} GB" for gpu in GPUS)]
    for cells in (head, ["---"] * len(head), *map(row, CHECKPOINTS)):
        print(f"| {' | '.join(cells)} |")
