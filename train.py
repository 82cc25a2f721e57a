"""Train a transformer to reinforcement-learn in its context, and show that it does.

    python train.py                                 a small Llama from random weights: no GPU, no account, no network
    python train.py --minutes 60                    the same for an hour
    python train.py --model meta-llama/Llama-3.1-8B-Instruct    the paper: IA3 vectors on the frozen 8B, on one GPU
    python train.py --model ... --plan              what that will need, without its weights
    python train.py --model RUN                     the paper's method in miniature: IA3 vectors on the frozen network of RUN
    python train.py --resume RUN                    go on exactly where RUN was stopped
    torchrun --nproc-per-node 4 train.py ...        the same on four GPUs: each takes a part of every batch

Part of the paper: section 3 (the optimisation) and 4.1 (the data). Departures: the small network learns from scratch, so every
weight is trained, by Muon and AdamW, at a rate that falls; its lakes are new for each collection instead of 250
(too few for it) and easier at first; late in the training half of the data are its own trials, as the paper's section 4.6
proposes, and not Q-learning's. Recipe has both settings side by side.

A run is a folder: config.json (the network's shape and the recipe), tokenizer.json, model.safetensors or PEFT's adapter files,
state.safetensors (all that --resume needs), log.csv, curve.csv, curve.png.
"""

import argparse
import copy
import ctypes
import itertools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch._subclasses import FakeTensorMode
from tqdm import tqdm

from eval import by_network, everyones, join_others, rank_of, returns_of, sparkline, test_lakes, unseen
from frozen_lake import MAX_STEPS, Episode, FrozenLake, TabularQ, Windows, random_lakes, roll_out
from ia3 import IA3, replacing
from icrl import (
    QUALITY,
    Batch,
    Encoder,
    QNetwork,
    Run,
    check_context,
    collate,
    compact_tokenizer,
    draw_set,
    encode_slice,
    explain,
    load_run,
    model_probability,
    play,
    polyak_update,
    read_recipe,
    save_network,
    td_loss,
    td_targets,
)
from llama import KVCache, Llama, LlamaConfig, free_memory, load_config, load_llama, load_tokenizer


def setting(default, text: str, low: float | None = None, high: float = math.inf):
    """A field of Recipe, from `low` to `high` if it is a number; `text` is also the help of its flag."""
    return field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on. The defaults are the embedded model's; PAPER has the paper's."""

    # the network
    model: str = setting("", "base: a checkpoint folder, a run, or a repository of the Hub (default: random weights)")
    revision: str = setting("", "branch, tag or commit of the Hub's repository (default: the newest)")
    dtype: str = setting("float32", "type of the base's weights: float32, bfloat16 or float16")
    adapter: str = setting("none", "ia3, as with --model: train IA3 vectors on a frozen base; none: every weight")
    layers: int = setting(4, "decoder layers of a new network", 1)
    width: int = setting(64, "model dimension of a new network", 1)
    heads: int = setting(2, "attention heads of a new network", 1)
    feed_forward: int = setting(192, "feed-forward dimension of a new network", 1)
    # the data
    sides: tuple[int, int] = setting((3, 5), "fewest and most tiles a side of a lake, in training and test")
    min_hops: int = setting(4, "steps from a start to the nearest goal, at least, in training and test")
    easy_sides: tuple[int, int] = setting((3, 3), "tiles a side of the easy lakes that training begins with")
    easy_hops: int = setting(2, "steps from a start to the nearest goal on easy lakes, at least")
    easy_until: float = setting(0.4, "share of the training over which easy lakes give way to the others; 0: none", 0, 1)
    lakes: int = setting(256, "lakes in a collection: on each, tabular Q-learning leaves its episodes", 1)
    episodes: int = setting(100, "episodes of tabular Q-learning on each lake", 1)
    explore: float = setting(0.3, "share of them, the first ones, in which it acts at random", 0, 1)
    greedy: float = setting(0.8, "chance of its best action in the others", 0, 1)
    collection_steps: int = setting(128, "training steps before a new collection is made", 1)
    late_from: float = setting(0.6, "share of the training after which new collections have own trials and windows", 0, 1)
    own: float = setting(0.5, "share of sets that are trials of the network itself, on further lakes; 0: none", 0, 1)
    own_trials: int = setting(64, "trials that it plays for a collection", 1)
    windows: float = setting(0.0, "share of lakes that are numbered as windows of maps of up to 7 x 7", 0, 1)
    quality: str = setting("mid", f"which of Q-learning's episodes are likelier to be drawn: {', '.join(QUALITY)}")
    max_steps: int = setting(MAX_STEPS, "steps after which an episode is cut off", 1)
    # the optimisation
    steps: int = setting(5600, "optimizer steps", 1)
    tokens: int = setting(512, "tokens in a slice, T")
    batch: int = setting(4, "slices in a batch, B", 1)
    gamma: float = setting(0.9, "discount within an episode", 0, 1)
    gamma_episode: float = setting(0.0, "discount across episodes of a set; the paper has none (0)", 0, 1)
    reward_scale: float = setting(1.0, "rewards are multiplied by it in the loss", 0)
    normalised: bool = setting(False, "divide TD errors by the mean target of their slice, as the notebook does")
    alpha: float = setting(0.1, "share of the online network in each Polyak step (eq. 8)", 0, 1)
    learning_rate: float = setting(3e-3, "AdamW's learning rate", 0)
    muon_rate: float = setting(0.01, "Muon's learning rate for the layers' matrices; 0: AdamW for all, as in the paper", 0)
    warm_up: int = setting(50, "steps over which the learning rate rises", 1)
    decay_from: float = setting(0.2, "share of the training after which the learning rate falls", 0, 1)
    final_rate: float = setting(0.03, "learning rate at the end, as a share", 0, 1)
    weight_decay: float = setting(0.01, "of AdamW and Muon, as a share of their learning rates", 0)
    clip: float = setting(1.0, "largest gradient norm; 0: any", 0)
    seed: int = setting(0, "of weights and data", 0)
    at_once: int = setting(0, "slices that pass through the network together; 0: all, or with --model as many as fit", 0)
    compile: bool = setting(False, "fuse the passes by torch.compile: takes a minute, then is faster; needs a C++ compiler")
    checkpointing: bool = setting(False, "with --at-once: keep only the layers' inputs, which takes less memory and more time")

    def __post_init__(self):
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            if low is not None and not (low <= value <= high and value < math.inf):
                bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                raise ValueError(f"--{f.name.replace('_', '-')} has to be {bounds}, but it is {value}.")
        if self.quality not in QUALITY or self.adapter not in ("none", "ia3"):
            raise ValueError(f"--quality is high, mid or low and --adapter none or ia3, not {self.quality} and {self.adapter}.")
        if self.adapter == "ia3" and not self.model:
            raise ValueError("IA3 needs a base to adapt: name a trained run or a checkpoint with --model.")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype is float32, bfloat16 or float16, not {self.dtype}.")


EMBEDDED = Recipe()
PAPER = Recipe(  # for every base that is not a run of train.py
    model="meta-llama/Llama-3.1-8B-Instruct",
    dtype="bfloat16",
    adapter="ia3",
    easy_until=0.0,
    own=0.0,
    lakes=250,
    episodes=1500,  # altogether about as many as 9,556 slices hold
    collection_steps=955,  # all of them: one collection, one epoch of 9,556 slices
    steps=955,
    tokens=4096,
    batch=10,
    reward_scale=30.0,
    learning_rate=1e-2,
    muon_rate=0.0,
    warm_up=10,
    decay_from=1.0,
    clip=0.0,
)
OF_THE_MACHINE = ("at_once", "checkpointing", "compile")  # how, not what: --resume may change it; bases do not pass it on
OF_THE_METHOD = "learning_rate muon_rate warm_up decay_from clip".split()  # what IA3 on a run takes from PAPER


# ---------------------------------------------------------------------------------------------------------------- data
def collect(recipe: Recipe, number: int, encoder: Encoder, player: QNetwork) -> Iterator[Batch]:
    """The batches of one collection: new lakes, Q-learning's episodes on them, shuffled into sets and cut into slices.

    Late in the training some sets are trials of the network itself, played by `player`. None of the lakes is a test lake.
    All of it follows from the recipe, the collection's number and `player`, so a resumed run sees what an uninterrupted one
    would.
    """
    rng = np.random.default_rng([recipe.seed, number])
    progress = number * recipe.collection_steps / recipe.steps
    easy = round(recipe.lakes * max(0.0, 1 - progress / recipe.easy_until)) if recipe.easy_until else 0
    lakes = random_lakes(recipe.lakes - easy, rng, recipe.sides, recipe.min_hops, test=False)
    if easy:
        lakes += random_lakes(easy, rng, recipe.easy_sides, recipe.easy_hops, test=False)
    late = progress >= recipe.late_from
    env = Windows(FrozenLake(lakes, rng, max_steps=recipe.max_steps), rng, recipe.windows if late else 0.0)
    greedy = lambda episode: np.where(episode < recipe.explore * recipe.episodes, 0.0, recipe.greedy)  # noqa: E731
    played = roll_out(env, TabularQ(env, rng, greedy), recipe.episodes)
    orders = (rng.permutation(len(lakes)) for _ in itertools.count())
    sets = (draw_set(played[lake], rng, recipe.quality) for order in orders for lake in order)
    if late and recipe.own:
        trials = own_trials(recipe, np.random.default_rng([recipe.seed, number, 1]), encoder, player)
        trials, drawn = itertools.cycle(everyones(trials)[0]), sets  # GPUs may differ in the last bits, and so in the trials
        sets = (next(trials if rng.random() < recipe.own else drawn) for _ in itertools.count())
    for _ in range(recipe.collection_steps):
        slices = [encode_slice(encoder, sets, recipe.tokens, recipe.gamma, recipe.gamma_episode) for _ in range(recipe.batch)]
        yield collate(slices)


def own_trials(recipe: Recipe, rng: np.random.Generator, encoder: Encoder, player: QNetwork) -> list[list[Episode]]:
    """What the network does on lakes of its own, a slice long; with forced random actions in half of the trials, as in tests.

    Its mistakes are in no other player's data: only from these transcripts it learns what loops and detours are worth.
    """
    lakes = random_lakes(recipe.own_trials, rng, recipe.sides, recipe.min_hops, test=False)
    world = lambda lakes, rng, max_steps: Windows(FrozenLake(lakes, rng, max_steps=max_steps), rng, recipe.windows)  # noqa: E731
    probability = lambda episode: np.where(np.arange(len(episode)) % 2, model_probability(episode), 1.0)  # noqa: E731
    steps = recipe.tokens // encoder.step_lengths[0] + 1
    return play(player, encoder, lakes, steps, rng, 2 * recipe.tokens, recipe.max_steps, probability, world, limit=steps)


def batches(encoder: Encoder, training: "Training") -> Iterator[Batch]:
    """The batches from the training's present step on."""
    recipe = training.recipe
    number, skip = divmod(training.step, recipe.collection_steps)
    while True:
        if not skip:
            polyak_update(training.online, training.player, 1.0)
        yield from itertools.islice(collect(recipe, number, encoder, training.player), skip, None)
        number, skip = number + 1, 0


# ------------------------------------------------------------------------------------------------------------- network
def new_network(recipe: Recipe, encoder: Encoder) -> QNetwork:
    """The embedded model: a small Llama with random weights, normal with deviation 0.02, less into the residual stream."""
    head_dim = recipe.width // recipe.heads
    if head_dim * recipe.heads != recipe.width or head_dim % 2:
        raise ValueError(f"--width {recipe.width} has to be an even multiple of --heads {recipe.heads}.")
    config = LlamaConfig(
        vocab_size=encoder.tokenizer.get_vocab_size(),
        hidden_size=recipe.width,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=head_dim,
        rope_theta=10_000.0,
    )
    llama = Llama(config)
    generator = torch.Generator().manual_seed(recipe.seed)
    for name, parameter in llama.named_parameters():
        if parameter.ndim == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * recipe.layers) if residual else 0.02, generator=generator)
    return QNetwork(llama, encoder.action_tokens)


def based_network(recipe: Recipe, encoder: Encoder, device: str) -> QNetwork:
    """The network of the checkpoint `recipe.model`, to be trained further; with IA3 its weights are frozen."""
    llama = load_llama(recipe.model, getattr(torch, recipe.dtype), device, recipe.revision)
    if recipe.adapter == "ia3":
        return QNetwork(llama, encoder.action_tokens, IA3.for_llama(llama.config)).to(device)
    return QNetwork(copy.deepcopy(llama), encoder.action_tokens).to(device)  # a file's memory map is not written to


# ------------------------------------------------------------------------------------------------------------- training
class Training:
    """What changes while training: the online and the delayed network, the optimizers, and the number of steps done."""

    def __init__(self, recipe: Recipe, network: QNetwork):
        if recipe.batch < (world := rank_of()[1]):
            raise ValueError(f"{world} processes cannot share a batch of {recipe.batch} slices: start fewer of them.")
        network.llama.checkpointing = recipe.checkpointing
        self.recipe, self.online, self.delayed, self.step = recipe, network, network.delayed_copy(), 0
        self.player = network.delayed_copy()  # plays the present collection's own trials, as the network was when it began
        self.q_values = QNetwork.forward
        if recipe.compile:
            try:
                torch.compile(torch.sin)(network.llama.vocabulary[0])
            except RuntimeError as error:
                lacking = "it needs a C++ compiler, on a GPU Triton"
                raise ValueError(f"torch.compile does not work here ({lacking}): leave out --compile.") from error
            self.q_values = torch.compile(QNetwork.forward)
        trained = network.trained()
        matrices = [name for name in trained if recipe.muon_rate and ".layers." in name and trained[name].ndim == 2]
        adamw = torch.optim.AdamW([p for name, p in trained.items() if name not in matrices], weight_decay=recipe.weight_decay)
        self.optimizers = [(adamw, recipe.learning_rate)]
        if matrices:
            muon = torch.optim.Muon([trained[name] for name in matrices], weight_decay=recipe.weight_decay)
            self.optimizers.append((muon, recipe.muon_rate))

    def networks(self) -> tuple[tuple[str, QNetwork], ...]:
        return ("online", self.online), ("delayed", self.delayed), ("player", self.player)

    def schedule(self) -> float:
        """The learning rates' present share of their full size: linear warm-up, constant, linear fall."""
        r, progress = self.recipe, self.step / self.recipe.steps
        fall = max(0.0, progress - r.decay_from) / max(1e-9, 1 - r.decay_from)
        return min(1.0, (self.step + 1) / r.warm_up) * (1 - (1 - r.final_rate) * fall)

    def evaluate(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The loss (scalar), the Q-values of the actions taken and their targets (positions in the loss,)."""
        q = self.q_values(self.online, batch.tokens, batch.positions)  # (B, N, A)
        with torch.no_grad():
            q_delayed = self.q_values(self.delayed, batch.tokens, batch.positions)
        targets = td_targets(q, q_delayed, self.recipe.reward_scale * batch.rewards, batch.discounts)  # (B, N)
        loss = td_loss(q, batch.actions, targets, batch.mask, self.recipe.normalised)
        return loss, q.detach().gather(-1, batch.actions[..., None]).squeeze(-1)[batch.mask], targets[batch.mask]

    def check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            after = f"The {what} is {value} after {self.step} steps"
            raise FloatingPointError(f"{after}: lower the learning rates; the last checkpoint is kept.")

    def update(self, batch: Batch) -> dict[str, float]:
        """One optimizer step and one Polyak step; returns the row of log.csv.

        Each process takes a part of the batch; the sum of all gradients is everyone's. Raises FloatingPointError, before
        anything changes, if the loss or the gradient is not finite.
        """
        r, (rank, world) = self.recipe, rank_of()
        means = torch.zeros(3, device=batch.tokens.device)  # loss, Q, target
        self.online.zero_grad()
        for part in batch.every(world, rank).split(r.at_once or r.batch):
            loss, q, targets = self.evaluate(part)
            share = part.mask.sum() / batch.mask.sum()
            (share * loss).backward()
            means += share * torch.stack((loss.detach(), q.mean(), targets.mean()))
        if world > 1:
            for tensor in (means, *(p.grad for p in self.online.trained().values())):
                dist.all_reduce(tensor)
        row = {"step": self.step + 1} | dict(zip(("loss", "mean_q", "mean_target"), means.tolist()))
        self.check_finite("loss", row["loss"])
        row["learning_rate"] = r.learning_rate * self.schedule()
        row["gradient_norm"] = nn.utils.clip_grad_norm_(self.online.trained().values(), r.clip or math.inf).item()
        self.check_finite("gradient's norm", row["gradient_norm"])
        for optimizer, rate in self.optimizers:
            optimizer.param_groups[0]["lr"] = rate * self.schedule()
            optimizer.step()
        polyak_update(self.online, self.delayed, r.alpha)
        self.step += 1
        return row

    @torch.no_grad()
    def save(self, folder: Path, batch: Batch | None = None) -> None:
        """Write the state for --resume, as one file, and the network for use, if its loss on `batch` is finite."""
        for part in batch.split(self.recipe.at_once or self.recipe.batch) if batch else ():
            self.check_finite("loss", self.evaluate(part)[0].item())
        if rank_of()[0]:
            return
        tensors = {f"{prefix}.{name}": p.detach() for prefix, network in self.networks() for name, p in network.trained().items()}
        for number, (optimizer, _) in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{index}.{name}": value for name, value in state.items()}
        with replacing(folder / "state.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"step": str(self.step)})
        save_network(folder, self.online, self.recipe.model)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take up the state that `save` wrote. Raises ValueError if it is missing or damaged."""
        path, states = folder / "state.safetensors", [optimizer.state_dict() for optimizer, _ in self.optimizers]
        try:
            with safe_open(path, "pt") as file:
                for prefix, network in self.networks():
                    for name, parameter in network.trained().items():
                        parameter.copy_(file.get_tensor(f"{prefix}.{name}"))
                for key in file.keys():  # noqa: SIM118, it is no dict
                    if key.startswith("optimizer."):
                        _, number, index, name = key.split(".")
                        states[int(number)]["state"].setdefault(int(index), {})[name] = file.get_tensor(key)
                self.step = int(file.metadata()["step"])
        except FileNotFoundError as error:
            raise ValueError(f"{folder} has no checkpoint (state.safetensors) to resume from: start it anew.") from error
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged or of another network: {error}.") from error
        for (optimizer, _), state in zip(self.optimizers, states):
            optimizer.load_state_dict(state)


EXAMPLE = Episode(np.array([2, 6, 7]), np.array([1, 2]), np.array([0, 1]), truncated=False)
LOG = ("step", "loss", "mean_q", "mean_target", "learning_rate", "gradient_norm")


def open_log(path: Path, step: int) -> TextIO:
    """log.csv, ready for the row of the step after `step`; later rows, which a resumed run makes again, are dropped."""
    if rank_of()[0]:
        return open(os.devnull, "w")
    rows = path.read_text().splitlines()[1 : step + 1] if step else []
    with replacing(path) as temporary:
        temporary.write_text("\n".join([",".join(LOG), *rows]) + "\n")
    return open(path, "a", buffering=1)


def train(folder: Path, training: Training, encoder: Encoder, args: argparse.Namespace) -> bool:
    """Train to the recipe's last step, with a checkpoint, and a look at unseen lakes, now and then; False if interrupted."""
    recipe, stop = training.recipe, []
    lakes = test_lakes(32, recipe.sides, recipe.min_hops)

    def ask_to_stop(number, frame):
        if stop:
            raise KeyboardInterrupt
        stop.append(number)
        if not rank_of()[0]:
            print("\nStopping after this step, with a checkpoint. Once more: at once, without.", file=sys.stderr)

    handlers = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=recipe.steps, initial=training.step, unit="step", dynamic_ncols=True, disable=rank_of()[0] > 0)
    try:
        with bar, open_log(folder / "log.csv", training.step) as log:
            stream, batch = batches(encoder, training), None
            while training.step < recipe.steps and not sum(everyones(bool(stop))):
                batch = next(stream).to(args.device)
                row = training.update(batch)
                log.write(",".join(f"{row[name]:.6g}" for name in LOG) + "\n")
                speed = (bar.format_dict["rate"] or 0) * recipe.batch * recipe.tokens
                numbers = f"loss {row['loss']:.4f}, Q {row['mean_q']:.3f}, target {row['mean_target']:.3f}, {speed:,.0f} tokens/s"
                bar.set_postfix_str(numbers, refresh=False)
                bar.update()
                if training.step % args.look_every == 0 and training.step < recipe.steps:
                    look = by_network(Run(training.online, encoder, asdict(recipe), folder), lakes, seed=0)
                    curve = sparkline(returns_of(look))
                    bar.write(f"step {training.step}: mean return on {len(lakes)} unseen lakes, episodes 0 to 29: {curve}")
                if training.step % args.checkpoint_every == 0:
                    training.save(folder, batch)
            training.save(folder, batch)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return training.step == recipe.steps


# -------------------------------------------------------------------------------------------------------------- memory
@dataclass(frozen=True)
class Plan:
    """What training and playing need, in bytes unless it says otherwise, without reading or computing anything."""

    frozen: int  # parameters
    trained: int  # parameters
    weights: int  # frozen ones
    learning: int  # theta, phi, what plays, gradient and AdamW's two moments of what is trained
    activations: int  # kept of one slice for the backward pass
    checkpointed: int  # with checkpointing: layers' inputs, RoPE's tables, masks, what is outside of layers, one layer's own
    passing: int  # of one slice within a layer: four float32 arrays as wide as its feed-forward network
    cache: int  # keys and values of one trial that fills its context
    forward_flops: int  # a token, on average over a slice

    @classmethod
    def of(cls, recipe: Recipe, config: LlamaConfig, every: int = 2) -> "Plan":
        """Builds the network and passes one slice through it, all with fake tensors, and counts what autograd keeps.

        One token in `every` is read: in two as in the compact template, others read fewer.
        """
        dtype, kept = getattr(torch, recipe.dtype), []
        tokens, positions = torch.zeros(1, recipe.tokens, dtype=torch.long), torch.arange(0, recipe.tokens, every)[None]
        with FakeTensorMode(allow_non_fake_inputs=True):
            llama = Llama(config)
            llama.load_state_dict({name: p.to(dtype) for name, p in llama.state_dict().items()}, assign=True)
            network = QNetwork(llama, range(4), IA3.for_llama(config) if recipe.adapter == "ia3" else None)
            weights = {p.untyped_storage()._cdata for p in network.parameters()}
            for checkpointing in (False, True):
                llama.checkpointing, storages = checkpointing, {}
                keep = lambda t, storages=storages: storages.setdefault(t.untyped_storage()._cdata, t)  # noqa: E731
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                    network(tokens, positions)
                kept.append(sum(t.untyped_storage().nbytes() for key, t in storages.items() if key not in weights))
            row = torch.arange(recipe.tokens)[None]
            both = llama.make_queries(row, dtype, None), llama.make_queries(row, dtype, recipe.tokens, positions)
            shared = sum(t.nbytes for queries in both for t in (*queries.rope, queries.mask) if t is not None)
            trained = sum(p.numel() for p in network.trained().values())
            frozen = sum(p.numel() for p in network.parameters()) - trained
            cache = KVCache(config, 1, recipe.tokens, dtype)
        matrices = sum(p.numel() for p in llama.model.layers.parameters())
        partial = config.hidden_size * (2 * config.num_attention_heads * config.head_dim + 3 * config.intermediate_size)
        attention = 2 * recipe.tokens * config.num_hidden_layers * config.num_attention_heads * config.head_dim
        return cls(
            frozen=frozen,
            trained=trained,
            weights=frozen * dtype.itemsize,
            learning=6 * trained * (4 if recipe.adapter == "ia3" else dtype.itemsize),
            activations=kept[0],
            checkpointed=kept[1] + kept[0] // config.num_hidden_layers + shared,
            passing=4 * 4 * recipe.tokens * config.intermediate_size,
            cache=cache.keys.nbytes + cache.values.nbytes,
            forward_flops=int(2 * (matrices - (1 - 1 / every) * partial) + attention),  # q, o and MLP of the last layer in part
        )

    def peak(self, slices: int, checkpointing: bool) -> int:
        """Bytes at the height of an optimizer step."""
        kept = self.checkpointed if checkpointing else self.activations
        return self.weights + self.learning + slices * (kept + self.passing)

    def fit(self, free: int, batch: int) -> tuple[int, bool] | None:
        """The fastest (slices at once, checkpointing) for a device with so many free bytes, or None."""
        for checkpointing in (False, True):
            for slices in range(batch, 0, -1):
                if self.peak(slices, checkpointing) <= 0.95 * free:
                    return slices, checkpointing
        return None

    def text(self, recipe: Recipe) -> str:
        """What --plan prints."""
        passes = 3 if recipe.adapter == "ia3" else 4  # online, delayed, backward to activations, and to weights if trained
        mib = lambda count: f"{count / 2**20:10,.0f} MiB"  # noqa: E731
        lines = [
            f"parameters              {self.trained:,} trained, {self.frozen:,} frozen",
            f"frozen weights          {mib(self.weights)}  ({recipe.dtype})",
            f"what is trained         {mib(self.learning)}  (online, delayed, playing, gradient, two moments)",
            f"activations of a slice  {mib(self.activations)}  ({recipe.tokens:,} tokens)",
            f"  with checkpointing    {mib(self.checkpointed)}",
            f"KV cache of a trial     {mib(self.cache)}  ({recipe.tokens:,} tokens)",
            f"FLOPs a token           {self.forward_flops / 1e6:10,.0f} M  (a pass; training {passes}, checkpointing another)",
        ]
        for gigabytes in (8, 16, 24, 80):
            free = int(gigabytes * 1e9 - 0.7e9)  # CUDA itself takes the rest
            trials = int(0.8 * max(0, free - self.weights) / self.cache)
            if fit := self.fit(free, recipe.batch):
                how = f"{fit[0]} of {recipe.batch} slices at once{', checkpointing' if fit[1] else ''}"
                lines.append(f"a GPU of {gigabytes:2} GB:  {how}; {trials} trials side by side")
            else:
                lines.append(f"a GPU of {gigabytes:2} GB:  too small")
        return "\n".join(lines)


def settle(recipe: Recipe, config: LlamaConfig, device: str) -> Recipe:
    """The recipe with its memory settings chosen by what is free. Raises ValueError if nothing fits."""
    if recipe.at_once or not recipe.model:
        return recipe
    plan, free = Plan.of(recipe, config), free_memory(device)
    if (fit := plan.fit(free, recipe.batch)) is None:
        needed = f"at least {plan.peak(1, True) / 1e9:.1f} GB, but {device} has {free / 1e9:.1f} GB free"
        raise ValueError(f"Training on {recipe.model} takes {needed}: take a smaller model or fewer --tokens.")
    how = f"{fit[0]} of {recipe.batch} slices at once, {'with' if fit[1] else 'without'} activation checkpointing"
    print(f"Memory: {free / 1e9:.1f} GB free on {device}, so {how} (--at-once, --checkpointing)")
    return replace(recipe, at_once=fit[0], checkpointing=fit[1])


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, which wants as much; fetching it anew is a tenth of a CPU's time."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # other C libraries have none
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: bytes that may lie unused
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: larger pieces are given back all the same


# ---------------------------------------------------------------------------------------------------------------- main
def parse(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description="Train a transformer to reinforcement-learn in its context.")
    parser.add_argument("--out", type=Path, help="folder of the run (default: the next free runs/NUMBER)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on where this run was stopped")
    parser.add_argument("--minutes", type=float, help="train for about so long: sets --steps by timing a few of them")
    parser.add_argument("--plan", action="store_true", help="only print what the run will need, without reading weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--look-every", type=int, default=1200, help="steps between looks at unseen lakes (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=200, help="unseen lakes played at the end (default: %(default)s)")
    defaults = "defaults of the embedded model; an IA3 run takes its base's, and the paper's optimiser"
    settings = parser.add_argument_group("recipe", defaults)
    for f in fields(Recipe):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"] + (f" (default: {f.default})" if f.default != "" else "")
        if isinstance(f.default, bool):
            settings.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif isinstance(f.default, tuple):
            settings.add_argument(flag, type=int, nargs=2, metavar=("FEWEST", "MOST"), help=text)
        else:
            settings.add_argument(flag, type=type(f.default), help=text)
    return parser, parser.parse_args(arguments)


def check_flags(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that mean nothing, alone or together."""
    if min(args.look_every, args.checkpoint_every, args.trials) < 1:
        raise ValueError("--look-every, --checkpoint-every and --trials have to be at least 1.")
    if args.minutes is not None and (not 0 < args.minutes < math.inf or args.steps):
        raise ValueError(f"--minutes {args.minutes} has to be more than 0, and without --steps, which it sets.")
    if (args.at_once is None) != (args.checkpointing is None):
        raise ValueError("Give --at-once and --checkpointing (or --no-checkpointing) together, or neither.")
    if args.plan and args.resume:
        raise ValueError("--plan is for a new run: leave out --resume.")


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that the flags ask for."""
    given = as_settings({f.name: getattr(args, f.name) for f in fields(Recipe) if getattr(args, f.name) is not None})
    if not args.model:
        if changed := [name for name in ("revision", "dtype") if name in given]:
            raise ValueError(f"--{changed[0]} is about a base: name it with --model.")
        return replace(EMBEDDED, **given)
    if changed := [name for name in "layers width heads feed_forward".split() if name in given]:
        raise ValueError(f"A run on --model has its network's shape: leave out --{changed[0].replace('_', '-')}.")
    model = Path(args.model)
    given |= {"model": str(model.resolve()) if model.is_dir() else args.model, "adapter": args.adapter or "ia3"}
    if (base := read_recipe(model)) is None:
        if given["adapter"] == "none" and args.learning_rate is None:
            raise ValueError("To train all weights of a pretrained model, choose a --learning-rate: IA3's would ruin them.")
        return replace(PAPER, **given)
    if base["adapter"] == "ia3":
        raise ValueError(f"{args.model} is itself an adapter: name the run with its base.")
    given = {name: getattr(EMBEDDED, name) for name in OF_THE_MACHINE} | given
    if given["adapter"] == "ia3":
        given = {name: getattr(PAPER, name) for name in OF_THE_METHOD} | given
    return replace(recipe_from(model, base), **given)


def recipe_from(folder: Path, settings: dict) -> Recipe:
    """The recipe of a run's folder. Raises ValueError if its settings are not exactly those of today."""
    if other := settings.keys() ^ {f.name for f in fields(Recipe)}:
        raise ValueError(f"{folder} was made by another version of train.py (see its setting {min(other)}): train it anew.")
    return Recipe(**as_settings(settings))


def as_settings(values: dict) -> dict:
    """Flags and JSON have lists where Recipe has tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def steps_in(minutes: float, recipe: Recipe, network: QNetwork, encoder: Encoder, device: str) -> int:
    """How many steps fit so many minutes, by a rehearsal that changes nothing."""
    network = network.delayed_copy()
    for parameter in network.trained().values():
        parameter.requires_grad_(True)
    rehearsal, collected = Training(recipe, network), 0.0
    for late_from, share in ((1.0, recipe.late_from), (0.0, 1 - recipe.late_from)):
        started = time.perf_counter()
        batch = next(collect(replace(recipe, late_from=late_from), 0, encoder, rehearsal.player)).to(device)
        collected += share * (time.perf_counter() - started)
        rehearsal.update(batch)
    started, repeats = time.perf_counter(), 5
    for _ in range(repeats):
        rehearsal.update(batch)
    seconds = (time.perf_counter() - started) / repeats + collected / recipe.collection_steps
    return max(1, int(60 * minutes / seconds))


def plan(args: argparse.Namespace) -> None:
    """Print what the run that the flags ask for will need, by its config alone."""
    recipe = recipe_of(args)
    if recipe.model:
        config, _ = load_config(recipe.model, recipe.revision)
    else:
        config = new_network(recipe, Encoder(compact_tokenizer())).llama.config
    print(f"{recipe.model or 'The embedded model'}, {recipe.batch} slices of {recipe.tokens:,} tokens a step\n")
    print(Plan.of(recipe, config).text(recipe))


def begin(args: argparse.Namespace) -> tuple[Path, Training, Encoder]:
    """A new run: its folder with config.json and tokenizer.json, and its networks."""
    recipe = recipe_of(args)
    if recipe.model:
        config, revision = load_config(recipe.model, recipe.revision)
        if recipe.tokens > config.max_position_embeddings:
            most = f"--tokens {config.max_position_embeddings}"
            raise ValueError(f"{recipe.model} was not trained on contexts of {recipe.tokens} tokens: give at most {most}.")
        encoder = Encoder(load_tokenizer(recipe.model, revision))
    else:
        encoder = Encoder(compact_tokenizer())
    check_context(encoder, recipe.tokens, recipe.max_steps)
    for sides, hops in ((recipe.sides, recipe.min_hops), (recipe.easy_sides, recipe.easy_hops)):
        random_lakes(1, np.random.default_rng(0), sides, hops)  # raises if there are none
    folder = args.out or next(p for p in (Path("runs") / str(n) for n in itertools.count(1)) if not p.exists())
    folder, *_ = everyones(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another --out, or go on with it by --resume {folder}.")
    if recipe.model:
        recipe = settle(replace(recipe, revision=revision), config, args.device)
        network = based_network(recipe, encoder, args.device)
    else:
        network = new_network(recipe, encoder).to(args.device)
    if args.minutes is not None:
        recipe = replace(recipe, steps=everyones(steps_in(args.minutes, recipe, network, encoder, args.device))[0])
    training = Training(recipe, network)
    everyones(None)  # all have seen that the folder is free
    if rank_of()[0]:
        return folder, training, encoder
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "tokenizer.json") as temporary:
        temporary.write_text(encoder.tokenizer.to_str(pretty=True))
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(network.llama.config.to_dict() | {"icrl": asdict(recipe)}, indent=2) + "\n")
    training.save(folder)
    return folder, training, encoder


def resume(args: argparse.Namespace) -> tuple[Path, Training, Encoder]:
    """A run taken up at its last checkpoint."""
    anew = {name: getattr(args, name) for name in OF_THE_MACHINE if getattr(args, name) is not None}
    if changed := [f for f in ["out", "minutes", *asdict(EMBEDDED)] if getattr(args, f) is not None and f not in anew]:
        raise ValueError(f"--resume goes on with the run's own recipe: leave out --{changed[0].replace('_', '-')}.")
    network, encoder, settings, _ = load_run(args.resume, args.device)
    training = Training(replace(recipe_from(args.resume, settings), **anew), network)
    training.load(args.resume)
    return args.resume, training, encoder


def main(arguments: list[str] | None = None) -> None:
    parser, args = parse(arguments)
    try:
        check_flags(args)
        args.device = join_others(args.device)
        if args.plan:
            return plan(args)
        keep_freed_memory()
        folder, training, encoder = resume(args) if args.resume else begin(args)
        recipe = training.recipe
        count = sum(p.numel() for p in training.online.trained().values())
        total = sum(p.numel() for p in training.online.parameters())
        size = f"{recipe.steps:,} steps of {recipe.batch} x {recipe.tokens} tokens"
        print(f"Run {folder}: {count:,} trained of {total:,} parameters, {size}")
        tokens = encoder.join(np.array([encoder.messages(EXAMPLE)]))[0][0].tolist()
        print(f"An episode, as the model sees it ({encoder.template.name}): {encoder.text(EXAMPLE)!r}\n    tokens {tokens}")
        if not train(folder, training, encoder, args):
            print(f"Stopped at step {training.step}. To go on: python train.py --resume {folder}")
            sys.exit(130)
        print(f"Playing {args.trials} lakes that training never saw ...")
        unseen(Run(training.online, encoder, asdict(recipe), folder), folder, args.trials)
    except (ValueError, OSError, FloatingPointError, SafetensorError, torch.OutOfMemoryError) as error:
        parser.exit(2, f"train.py: {explain(error)}\n")
    except KeyboardInterrupt:  # before or after the training itself, which saves first
        sys.exit(130)


if __name__ == "__main__":
    main()
