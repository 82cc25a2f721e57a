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
TOKENS = 4096  # of a slice
CHECKPOINTS = {  # LlamaConfig's sizes, and whether the vocabulary is tied
    "SmolLM2-135M-Instruct": ((49_152, 576, 1536, 30, 9, 3, 64), True),
    "Llama-3.2-1B-Instruct": ((128_256, 2048, 8192, 16, 32, 8, 64), True),
    "Llama-3.2-3B-Instruct": ((128_256, 3072, 8192, 28, 24, 8, 128), True),
    "Llama-3.1-8B-Instruct": ((128_256, 4096, 14_336, 32, 32, 8, 128), False),
}
GPUS = (8, 24, 80)  # GB
CUDA = 0.7e9  # bytes that CUDA itself takes


def row(name: str) -> list[str]:
    shape, tied = CHECKPOINTS[name]
    config = LlamaConfig(*shape, tie_word_embeddings=tied)
    with torch.device("meta"):
        llama, adapter = Llama(config).to(DTYPE), IA3(config)
        cache = KVCache(llama, 1, TOKENS)
    trained = sum(p.numel() for p in adapter.parameters())
    weights = sum(p.nbytes for p in llama.parameters())
    activations = activation_bytes(QNetwork(llama, range(4), adapter), TOKENS)
    inputs = TOKENS * config.num_hidden_layers * config.hidden_size * DTYPE.itemsize
    recomputed = inputs + activations // config.num_hidden_layers
    gib = (f"{count / 2**30:.2f} GiB" for count in (weights, activations))
    cells = [name, f"{trained:,}", *gib, f"{(cache.keys.nbytes + cache.values.nbytes) >> 20} MiB"]
    for gpu in GPUS:
        free = gpu * 1e9 - CUDA - weights
        cells.append("stored" if activations < free else "recomputed" if recomputed < free else "-")
    return cells


if __name__ == "__main__":
    what = "checkpoint|trained|weights, bf16|activations of a slice|KV cache of a trial"
    head = [*what.split("|"), *(f"{gpu} GB" for gpu in GPUS)]
    for cells in (head, ["---"] * len(head), *map(row, CHECKPOINTS)):
        print(f"| {' | '.join(cells)} |")
