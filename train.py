"""Train a transformer to reinforcement-learn in its context.

    python train.py                         a small Llama from random weights, on a laptop
    python train.py --model meta-llama/Llama-3.1-8B-Instruct    the paper, on one GPU
    python train.py --model RUN             the paper's method in miniature, on a run's network
    python train.py --resume RUN            go on from a run's last checkpoint
    torchrun --nproc-per-node 2 train.py    several GPUs share each batch

Sections 3 (optimisation) and 4.1 (data) of the paper.

A run is a folder: recipe.json, tokenizer.json, what was trained (config.json and
model.safetensors, or PEFT's files), state.safetensors (for --resume), log.csv and eval.py's curve.
"""

import argparse
import math
import os
from dataclasses import asdict, fields, replace
from contextlib import suppress
from datetime import timedelta
from itertools import count, cycle, islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from eval import on_lakes, sparkline, test_lakes
from frozen_lake import Episode, TabularQ, random_lakes, roll_out, worlds
from ia3 import IA3
from icrl import Encoder, InContext, QNetwork, Recipe, Run, check_base, check_context, collate
from icrl import compact_tokenizer, draw_set, encode_slice, load_run, model_probability, play
from icrl import polyak_update, read_recipe, replacing, save, save_network, td_loss, td_targets
from llama import DEVICE, Llama, LlamaConfig, device, exit_in_one_sentence, load_config, load_llama
from llama import load_tensors, load_tokenizer

WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)
RANK = int(os.environ.get("RANK") or 0) if WORLD_SIZE > 1 else 0
ADAMW = {"learning_rate": 0.01, "muon_rate": 0.0, "warm_up": 10, "decay_from": 1.0, "clip": 0.0}
PAPER = Recipe(
    model="meta-llama/Llama-3.1-8B-Instruct",
    dtype="bfloat16",
    easy_until=0.0,
    own=0.0,
    hard=0.0,
    lakes=250,
    episodes=1500,  # a lake; on 250 about what the notebook's 9,556 slices hold
    collection_steps=955,  # all of them, 10 slices each, from one collection: nothing is late
    steps=955,
    tokens=4096,
    late_tokens=0,
    batch=10,
    reward_scale=30.0,
    **ADAMW,
)


# ---- the data
def collect(run, number):
    """A collection's batches: Q-learning on new lakes and, once late, the network's own trials.
    Recipe, number, process and network determine them.
    """
    recipe, rng = run.recipe, np.random.default_rng([run.recipe.seed, number, RANK])
    progress = number * recipe.collection_steps / recipe.steps
    late = progress >= recipe.late_from

    # Q-learning: the first episodes random, the others mostly greedy
    env, at_random = new_worlds(recipe, recipe.lakes, progress, rng), 0.3 * recipe.episodes
    player = TabularQ(env, rng, lambda episode: np.where(episode < at_random, 0.0, 0.8))
    played = roll_out(env, player, recipe.episodes)
    own = cycle(own_trials(run, number)) if late and recipe.own else None

    def sets():  # endless: each slice begins with the next one
        while True:
            for lake in rng.permutation(len(env)):
                by_network = own and rng.random() < recipe.own
                yield next(own) if by_network else draw_set(played[lake], rng, recipe.quality)

    stream, length = sets(), (recipe.context if late else recipe.tokens)
    mine = range(max(1, recipe.batch * recipe.tokens // length // WORLD_SIZE))
    for _ in range(recipe.collection_steps):
        yield collate([encode_slice(run.encoder, stream, length, recipe.gamma) for _ in mine])


def new_worlds(recipe, count, progress, rng):
    """The environment at this share of the training: ever fewer easy lakes, late hard ones."""
    late, easy = progress >= recipe.late_from, 0
    if progress < recipe.easy_until:
        easy = round(count * (1 - progress / recipe.easy_until))
    hard = round((count - easy) * recipe.hard * late)
    lakes = random_lakes(easy, rng, (3, 3), 2, test=False)
    lakes += random_lakes(count - easy - hard, rng, recipe.sides, recipe.min_hops, test=False)
    if hard:  # else there need not be any
        lakes += random_lakes(hard, rng, (recipe.max_side,) * 2, recipe.min_hops + 3, test=False)
    assert not any(lake.is_test for lake in lakes)
    shares = recipe.shuffled, recipe.windows * late, recipe.slippery
    return worlds(lakes, rng, recipe.max_steps, *shares)


def own_trials(run, number):
    """What the network does on 64 lakes, each for about as long as a slice; on every second one
    random actions are forced. Only its own mistakes teach it what loops and detours are worth.
    """
    recipe, rng = run.recipe, np.random.default_rng([run.recipe.seed, number, RANK, 1])
    env = new_worlds(recipe, 64, progress=1.0, rng=rng)

    def probability(episode):
        return np.where(env.row % 2, model_probability(episode), 1.0)

    a_step = len(run.encoder.tokens(run.encoder.step(0, 0, 0.0, False, False)))
    steps = int(0.8 * recipe.context / a_step)  # the rest is for episodes' ends
    played = roll_out(env, InContext(run, env, rng, probability), math.inf, limit=steps)
    return [played[i] for i in rng.permutation(len(env))]  # hard lakes are the last


# ---- the network
def new_network(recipe, encoder):
    """A small Llama with random weights: deviation 0.02, less where a layer adds to its input."""
    vocab_size, D, heads = encoder.tokenizer.get_vocab_size(), recipe.width, recipe.heads
    if D % (2 * heads):
        raise ValueError(f"--width has to be a multiple of {2 * heads}, twice --heads.")
    sizes = (vocab_size, D, 3 * D, recipe.layers, heads, heads, D // heads)
    longest = max(2048, recipe.tokens, recipe.context)
    llama = Llama(LlamaConfig(*sizes, max_position_embeddings=longest))
    generator = torch.Generator().manual_seed(recipe.seed)
    for name, p in llama.named_parameters():
        if p.ndim == 2:
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * recipe.layers) if adds else 0.02
            nn.init.normal_(p, std=std, generator=generator)
    return QNetwork(llama, encoder.action_tokens)


def kept_bytes(config, tokens, dtype):
    """About what autograd keeps of a forward pass: tests/test_benchmark.py counts it."""
    a_token = 9 * config.hidden_size + 4 * config.intermediate_size
    a_token += 2 * config.num_key_value_heads * config.head_dim
    return tokens * config.num_hidden_layers * a_token * dtype.itemsize


# ---- the training
class Muon(torch.optim.Optimizer):
    """torch.optim.Muon (Jordan et al. 2024), but in float32: most CPUs are slow at its bfloat16."""

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for p in group["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            direction = orthogonal(p.grad.lerp(momentum, 0.95))
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(group["lr"] * math.sqrt(max(1, p.shape[0] / p.shape[1])) * direction)


def orthogonal(x):
    """About the matrix with the singular vectors of x and singular values of 1: Newton-Schulz."""
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.T).T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        gram = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, gram, x, beta=3.4445)
    return x


def make_optimizers(recipe, network):
    """AdamW, or AdamW and Muon for the layers' matrices; their defaults hold the full rates."""
    matrices, rest = [], []
    for name, p in network.trained().items():
        by_muon = recipe.muon_rate and ".layers." in name and p.ndim == 2
        (matrices if by_muon else rest).append(p)
    optimizers = [torch.optim.AdamW(rest, recipe.learning_rate, weight_decay=0.01)]
    if matrices:
        optimizers.append(Muon(matrices, {"lr": recipe.muon_rate, "weight_decay": 0.01}))
    return optimizers


def schedule(recipe, step):
    """The share of the full learning rates: linear warm-up, constant, linear fall to 0.03."""
    fall = max(0.0, step / recipe.steps - recipe.decay_from) / max(1e-9, 1 - recipe.decay_from)
    return min(1.0, (step + 1) / recipe.warm_up) * (1 - 0.97 * fall)


def train(run, args):
    """Train from the last checkpoint, or the start, to the last step."""
    recipe, online, llama = run.recipe, run.network, run.network.llama
    for slices in recipe.batch, max(1, recipe.batch * recipe.tokens // recipe.context):
        if slices % WORLD_SIZE:
            raise ValueError(f"{WORLD_SIZE} processes cannot share a batch of {slices} slices.")
    delayed, optimizers = online.delayed_copy(), make_optimizers(recipe, online)
    parameters, device = online.trained().values(), online.action_tokens.device
    at_once = 1 if recipe.model else recipe.batch  # slices in a pass
    tokens = max(at_once * recipe.tokens, recipe.context)
    kept = kept_bytes(llama.config, tokens, llama.unembedding.dtype)
    llama.checkpointing = kept > llama.free_bytes
    q_values = torch.compile(QNetwork.forward) if args.compile else QNetwork.forward
    # own trials are played by the weights at a collection's start: resumed runs must begin there
    save_every = recipe.collection_steps if recipe.own else 50
    step = load_state(run, delayed, optimizers)
    first, skip = divmod(step, recipe.collection_steps)
    stream = (batch for number in count(first) for batch in collect(run, number))
    stream = islice(stream, skip, None)
    bar = tqdm(total=recipe.steps, initial=step, disable=RANK > 0)
    log = ["step,loss,mean_q,mean_target,learning_rate,gradient_norm"]
    if step:
        log = (run.folder / "log.csv").read_text().splitlines()[: step + 1]

    while step < recipe.steps:
        batch = next(stream).to(device)

        # the loss and its gradient
        online.zero_grad()
        means = torch.zeros(3, device=device)
        for part in batch.split(at_once):
            q = q_values(online, part.tokens, part.positions)  # (B, N, A)
            with torch.no_grad():
                q_delayed = q_values(delayed, part.tokens, part.positions)  # (B, N, A)
            rewards = recipe.reward_scale * part.rewards
            targets = td_targets(q, q_delayed, rewards, part.discounts)  # (B, N)
            loss = td_loss(q, part.actions, targets, part.mask)
            share = part.mask.sum() / batch.mask.sum()
            (share * loss).backward()
            taken = q.detach().gather(-1, part.actions[..., None]).squeeze(-1)
            seen = (loss.detach(), taken[part.mask].mean(), targets[part.mask].mean())
            means += share * torch.stack(seen)
        average_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, recipe.clip or math.inf).item()
        if not math.isfinite(norm):
            bar.close()
            hint = (
                "float16 may be too small for it"
                if recipe.dtype == "float16"
                else "lower the rates"
            )
            raise ValueError(f"The gradient's norm is {norm} after {step} steps: {hint}.")

        # theta learns, phi follows
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * schedule(recipe, step)
            optimizer.step()
        polyak_update(online, delayed, recipe.alpha)
        step += 1

        # the log, a look at unseen lakes, a checkpoint
        if RANK == 0:
            row = (step, *means.tolist(), optimizers[0].param_groups[0]["lr"], norm)
            log.append(",".join(f"{value:.6g}" for value in row))
            bar.set_postfix_str("loss {:.4f}, Q {:.3f}, target {:.3f}".format(*row[1:4]), False)
            bar.update()
            if step % args.look_every == 0 and step < recipe.steps:
                look = sparkline(play(run, test_lakes(32, recipe.sides, recipe.min_hops), seed=0))
                bar.write(f"step {step}: mean return on 32 unseen lakes, episodes 0-29: {look}")
            if step % save_every == 0 or step == recipe.steps:
                with replacing(run.folder / "log.csv") as path:
                    path.write_text("\n".join(log) + "\n")
                save_state(run, delayed, optimizers, step)  # --resume takes theta from this
                save_network(run)
    bar.close()


def learning(online, delayed):
    """The parameters of theta and phi, by their names in state.safetensors."""
    theta = {f"online.{name}": p.detach() for name, p in online.trained().items()}
    return theta | {f"delayed.{name}": p.detach() for name, p in delayed.trained().items()}


def save_state(run, delayed, optimizers, step):
    """What --resume needs, in one file."""
    tensors = {"step": torch.tensor(step), "processes": torch.tensor(WORLD_SIZE)}
    tensors |= learning(run.network, delayed)
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{number}.{index}.{name}": value for name, value in state.items()}
    save(run.folder / "state.safetensors", tensors)


def load_state(run, delayed, optimizers):
    """Take up what `save_state` wrote, if anything; returns the step."""
    if not (path := run.folder / "state.safetensors").exists():
        return 0
    tensors = load_tensors(path)
    try:
        step, processes = tensors.pop("step").item(), tensors.pop("processes").item()
        for name, p in learning(run.network, delayed).items():
            p.copy_(tensors.pop(name))
        states = [optimizer.state_dict() for optimizer in optimizers]
        for key, value in tensors.items():
            number, index, name = key.split(".")
            states[int(number)]["state"].setdefault(int(index), {})[name] = value
        for optimizer, state in zip(optimizers, states):
            if state["state"] and state["state"].keys() != {*state["param_groups"][0]["params"]}:
                raise ValueError("another optimizer's")
            optimizer.load_state_dict(state)
            for p, of_p in optimizer.state.items():
                if any(value.ndim and value.shape != p.shape for value in of_p.values()):
                    raise ValueError("another shape's")
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is of another recipe: was recipe.json edited?") from error
    if processes != WORLD_SIZE and RANK == 0:
        print(f"{processes} processes began, {WORLD_SIZE} go on: the data will be other ones.")
    return step


# ---- several GPUs, under torchrun
# Each process draws its share of a batch from its own seed; all average their gradients, so their
# networks stay the same. The first one writes.


def join_group(device):
    """Meet the other processes, if any; returns this one's device."""
    if WORLD_SIZE == 1:
        return device
    if device == "cuda":
        torch.cuda.set_device(
            int(os.environ["LOCAL_RANK"])
        )  # else each opens a context on the first
    backend = "nccl" if device.startswith("cuda") else "gloo"
    torch.distributed.init_process_group(backend, timeout=timedelta(hours=2))
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device


def average_gradients(parameters):
    if WORLD_SIZE > 1:
        for p in parameters:
            torch.distributed.all_reduce(p.grad)
            p.grad /= WORLD_SIZE


def recipe_of(args):
    """The recipe that the flags ask for: they change the default, PAPER or a run's (--model)."""
    given = {f.name: getattr(args, f.name) for f in fields(Recipe)}
    given = {name: value for name, value in given.items() if value is not None}
    if args.resume:
        wrong, kind = given.keys() | ({"out"} if args.out else set()), "new runs"
    elif args.model:
        wrong, kind = given.keys() & {"layers", "width", "heads", "muon_rate"}, "a new network"
    else:
        wrong, kind = given.keys() & {"revision", "dtype"}, "a base"
    if wrong:
        raise ValueError(f"--{min(wrong).replace('_', '-')} is for {kind}: leave it out.")
    if not args.model:  # --resume ignores it
        return Recipe(**given)
    folder, base = Path(args.model), None
    if folder.is_dir():
        if "revision" in given:
            raise ValueError(f"--revision is for the Hub, but {folder} is a folder: leave it out.")
        given["model"], base = str(folder.resolve()), read_recipe(folder)
    if base is None:  # no run of ours
        return replace(PAPER, **given)
    if base.model:
        raise ValueError(f"{args.model} is itself an adapter: name its base.")
    return replace(base, **{"easy_until": 0.0} | ADAMW | given)  # the rest is the run's


def begin(recipe, folder, device):
    """A new run: its network, and its folder, by default runs/NUMBER, once all is right."""
    if RANK == 0 and folder and any(folder.glob("*")):
        raise ValueError(f"{folder} is not empty: choose another --out, or --resume {folder}.")
    tokenizer = compact_tokenizer()
    if recipe.model:
        config, source = load_config(recipe.model, recipe.revision)
        check_base(recipe, config)
        tokenizer = load_tokenizer(source)
        recipe = replace(recipe, revision="" if Path(recipe.model).is_dir() else source.name)
    vocab_size = config.vocab_size if recipe.model else tokenizer.get_vocab_size()
    encoder = Encoder(tokenizer, vocab_size)
    opening, step = encoder.longest()
    if recipe.tokens < opening + 2 * step:
        raise ValueError(
            f"--tokens has to be at least {opening + 2 * step}, so that an action counts."
        )
    check_context(encoder, recipe.context, recipe.max_steps)
    test_lakes(200, recipe.sides, recipe.min_hops)  # raise if too few
    new_worlds(recipe, max(64, recipe.lakes), 1.0, np.random.default_rng(0))
    if recipe.model:
        llama = load_llama(recipe.model, getattr(torch, recipe.dtype), device, recipe.revision)
        network = QNetwork(llama, encoder.action_tokens, IA3(llama.config).to(device))
    else:
        network = new_network(recipe, encoder).to(device)
    folder = claim(folder) if RANK == 0 else Path("runs")  # which only the first one uses
    run = Run(folder, recipe, network, encoder)
    if RANK == 0:
        with replacing(folder / "tokenizer.json") as path:
            tokenizer.save(str(path))
        save_network(run)  # a run stopped at once can be resumed too
        if not recipe.model:
            save(folder / "config.json", network.llama.config.to_dict())
        save(folder / "recipe.json", asdict(recipe))
    return run


def claim(folder):
    """Make the folder, or the first of runs/1, runs/2 ... that nobody else has made."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    for number in count(1):
        with suppress(FileExistsError):
            (folder := Path(f"runs/{number}")).mkdir(parents=True)
            return folder


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, help="folder (default: runs/NUMBER)")
    add("--resume", type=Path, metavar="RUN", help="go on with this run")
    add("--device", type=device, default=DEVICE)
    add("--compile", action="store_true", help="compile for a minute, run faster")
    add("--look-every", type=int, default=1200, help="steps (default: %(default)s)")
    add("--trials", type=int, default=200, help="lakes played at the end")
    group = parser.add_argument_group("recipe (defaults: a new network's)")
    for f in fields(Recipe):
        text = f"{f.metadata['help']} (default: {f.default})"
        group.add_argument("--" + f.name.replace("_", "-"), type=type(f.default), help=text)
    args = parser.parse_args(arguments)
    if min(args.look_every, args.trials) < 1:
        raise ValueError("--look-every and --trials have to be at least 1.")
    recipe, here = recipe_of(args), join_group(args.device)
    if args.compile:
        try:
            torch.compile(torch.neg)(torch.ones(8, device=here))
        except RuntimeError as error:
            raise ValueError(
                f"--compile does not work here: {str(error).splitlines()[0]}"
            ) from error
    if args.resume:
        run = load_run(args.resume, here)
        for leftover in args.resume.glob("tmp.*"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
    else:
        run = begin(recipe, args.out, here)
    folder, size = run.folder, sum(p.numel() for p in run.network.trained().values())
    if RANK == 0:
        print(f"{folder}: {size:,} parameters learn. Ctrl-C stops, --resume {folder} goes on.")
        pieces = run.encoder.write(Episode([2, 6, 7], [1, 2], [0, 1]))
        print(f"An episode as it reads it: {''.join(pieces)!r}")
    train(run, args)
    if RANK == 0:
        save_network(run)  # a kill may have left an old one
        on_lakes("unseen", [run], folder, args.trials, seed=0)


if __name__ == "__main__":
    with exit_in_one_sentence():
        main()
