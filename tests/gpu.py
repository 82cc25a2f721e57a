"""What only a GPU can show: `python tests/gpu.py BASE --out FOLDER`, in three parts.

paper   The paper's recipe on BASE, a folder or a Hub repository: as many of its 955 steps as fit
        into --minutes, with a schedule that ends there. Then 50 trials, greedily and scheduled.
8B      Random weights in the shape of Llama 3.1 8B: cached and uncached Q-values, the attention
        kernel that plays, and speed beside transformers + PEFT.
small   The default recipe: speed without and with --compile, and of its data.

Without a GPU the parts run, too, with a tiny shape in place of the 8B's.
"""

import argparse
import json
from pathlib import Path
from time import perf_counter

import benchmark
import torch
from torch.profiler import profile

import train
from llama import DEVICE, KVCache

SHAPE = "8B" if DEVICE == "cuda" else "tiny 8B"


def paper(args):
    """Train IA3 on BASE; with --name the run's files name that repository instead of a folder."""
    times = []

    def timed(*arguments, original=train.polyak_update):
        original(*arguments)
        times.append(perf_counter())

    flags = ["--model", args.base, "--trials", "50", *args.flags.split()]
    train.polyak_update = timed
    steps = ["--steps", "4", "--collection-steps", "4"]  # the last one is timed
    train.main([*flags, *steps, "--trials", "1", "--out", str(args.out / "timing")])
    seconds = times[-1] - times[-2]
    count = max(1, min(train.PAPER.steps, int(60 * args.minutes / seconds)))
    print(f"{seconds:.2f} s per step, so {count} of {train.PAPER.steps} steps")
    steps = ["--steps", str(count), "--collection-steps", str(count)]
    train.main([*flags, *steps, "--out", str(args.out / "run")])
    for file, key in (("recipe.json", "model"), ("adapter_config.json", "base_model_name_or_path")):
        path = args.out / "run" / file
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {key: args.name or content[key]}, indent=2) + "\n")


@torch.inference_mode()
def eight_billion():
    """Q-values by chunks through a cache are those of one pass, to bfloat16's rounding."""
    run = benchmark.run_of(SHAPE)
    batch = benchmark.batch_of(run)
    whole = run.network(batch.tokens[:1], batch.positions[:1])[batch.mask[:1]]
    cache = KVCache(run.network.llama, 1, batch.tokens.shape[1])
    hidden = []
    with profile() as profiler:
        for chunk in batch.tokens[:1].split(100, dim=1):
            hidden.append(run.network.llama(chunk, run.network.adapter, cache))
            cache.lengths += chunk.shape[1]
    hidden = torch.cat(hidden, 1).take_along_dim(batch.positions[:1, :, None], 1)
    actions = run.network.llama.unembedding[run.network.action_tokens].float()
    cached = (hidden.float() @ actions.T)[batch.mask[:1]]
    print(f"Cached and uncached Q-values are at most {(cached - whole).abs().max():.1e} apart")
    kernels = {event.key for event in profiler.key_averages() if "attention" in event.key}
    print("Attention by", ", ".join(sorted(kernels)))
    for ours in (f"our_step('{SHAPE}')", f"our_step('{SHAPE}', compiled=True)"):
        benchmark.compare(f"{SHAPE}, tokens/s", (ours, f"their_step('{SHAPE}')"))
    benchmark.compare(f"{SHAPE}, playing", (f"our_playing('{SHAPE}')",) * 2, turns=1)


def small():
    """2,048 tokens are a step."""
    benchmark.compare("Small, tokens/s", ("our_step(compiled=True)", "our_step()"))
    benchmark.compare("Its data, tokens/s", ("our_data()", "our_step()"))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="folder or Hub repository")
    parser.add_argument("--name", default="", help="repository that the adapter's files shall name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6.0, help="for the training of `paper`")
    parser.add_argument("--flags", default="--compile", help="more flags of train.py, in one word")
    parser.add_argument("--only", nargs="*", default=["paper", "8B", "small"])
    args = parser.parse_args(arguments)
    parts = {"paper": lambda: paper(args), "8B": eight_billion, "small": small}
    for part in args.only:
        parts[part]()


if __name__ == "__main__":
    main()
