"""Train a transformer to do reinforcement learning in its context.

    python train.py                         a small Llama from random weights, on a laptop
    python train.py --model meta-llama/Llama-3.1-8B-Instruct    the paper, on one GPU
    python train.py --model RUN             the paper's method in miniature: IA3 on a run of yours
    python train.py --resume RUN            continues from a run's last checkpoint
    torchrun --nproc-per-node 2 train.py    several GPUs share each batch

Sections 3 (optimisation) and 4.1 (data) of the paper.

A run is a folder: recipe.json, tokenizer.json, what was trained (config.json and
model.safetensors, or an adapter as PEFT saves it), state.pt (for --resume), log.csv, and the curves
of eval.py.
"""

import argparse
import io
import math
import os
import sys
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, fields, replace
from datetime import timedelta
from itertools import count, cycle, islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from eval import evaluate, sparkline, unseen_lakes
from frozen_lake import Episode, TabularQ, make_env, random_lakes, rollout
from ia3 import IA3
from icrl import InContext, QNetwork, Recipe, Run, TranscriptTokenizer, atomic_write, check_base
from icrl import check_context, collate, compact_tokenizer, encode_slice, greedy_probability
from icrl import load_run, play, polyak_update, read_recipe, sample_set, save_json, save_network
from icrl import td_loss, td_targets
from llama import DEVICE, DTYPES, Llama, LlamaConfig, device_argument, load_config, load_llama
from llama import load_tokenizer, memory_budget, user_errors

WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)  # torchrun's number of processes
RANK = int(os.environ.get("RANK") or 0) if WORLD_SIZE > 1 else 0  # this one's number

# For adapters, as in the paper: AdamW at a constant rate after the warm-up, and no easy lakes.
ADAPTER_DEFAULTS = {
    "learning_rate": 0.01,
    "muon_rate": 0.0,
    "warm_up": 10,
    "decay_from": 1.0,
    "grad_clip": 0.0,
    "easy_until": 0.0,
}
PAPER = Recipe(
    model="meta-llama/Llama-3.1-8B-Instruct",
    dtype="bfloat16",
    final_tokens=0,
    far_goals=0.0,
    on_policy=0.0,
    lakes=250,
    episodes=1500,  # 375,000 episodes in all, about as many as 955 batches of 10 slices hold
    collection_steps=955,  # one collection for the whole training, so no final phase
    steps=955,
    tokens=4096,
    batch=10,
    reward_scale=30.0,
    **ADAPTER_DEFAULTS,
)


# ---- the data
EASY = {"sides": (3, 3), "goal_distance": 2}
FAR_EXTRA_STEPS = 3  # a far goal is at least this many steps farther away than --goal-distance
RANDOM_FRACTION = 0.3  # in this fraction of its episodes, the first ones, Q-learning acts randomly
GREEDY_PROBABILITY = 0.8  # in the other episodes it acts greedily with this probability
ON_POLICY_LAKES = 64  # played by the network for each collection of the final phase
STEP_TOKEN_FRACTION = 0.8  # of a slice's tokens; starts and endings of episodes take the rest


def collect(run, number):
    """Yield the batches of one collection.

    They depend on the recipe, on the collection's number, on the process and, in the final phase,
    on the network, which plays when `train` asks for the first of them.
    """
    recipe = run.recipe
    rng = np.random.default_rng([recipe.seed, number, RANK])
    progress = number * recipe.collection_steps / recipe.steps
    final_phase = progress >= recipe.final_from

    # Q-learning plays each lake of this collection, at first randomly, then mostly greedily.
    def schedule(episode):
        is_random = episode < RANDOM_FRACTION * recipe.episodes
        return np.where(is_random, 0.0, GREEDY_PROBABILITY)

    env = new_lakes(recipe, recipe.lakes, progress, rng)
    episodes = rollout(env, TabularQ(env, rng, schedule), recipe.episodes)  # [lake][episode]

    # In the final phase the network plays, too, and learns from its own mistakes.
    on_policy = None
    if final_phase and recipe.on_policy:
        on_policy = cycle(on_policy_trials(run, number))

    def endless_sets():
        while True:
            for lake in rng.permutation(len(env)):
                # In the final phase an on-policy trial may take this lake's place.
                if on_policy and rng.random() < recipe.on_policy:
                    yield next(on_policy)
                else:
                    yield sample_set(episodes[lake], rng, recipe.quality)

    sets = endless_sets()
    length = recipe.tokens
    if final_phase:
        length = recipe.context  # slices are as long as the transcripts when playing
    for _ in range(recipe.collection_steps):
        slices = []
        for _ in range(slices_per_process(recipe, length)):
            slices.append(encode_slice(run.tokenizer, sets, length, recipe.gamma))
        yield collate(slices)


def slices_per_process(recipe, length):
    """How many slices of this length a process adds to a batch: about the same number of tokens."""
    return max(1, recipe.batch * recipe.tokens // length // WORLD_SIZE)


def batches(run, step):
    """All batches from an optimizer step on, collection after collection."""
    first, skip = divmod(step, run.recipe.collection_steps)
    yield from islice(collect(run, first), skip, None)
    for number in count(first + 1):
        yield from collect(run, number)


def new_lakes(recipe, total, progress, rng):
    """The environment of `total` lakes at a `progress` of 0 to 1; no lake is a test lake."""
    final_phase = progress >= recipe.final_from
    easy, far = 0, 0
    if progress < recipe.easy_until:
        easy = round(total * (1 - progress / recipe.easy_until))
    if final_phase:
        far = round((total - easy) * recipe.far_goals)
    lakes = random_lakes(easy, rng, **EASY, test=False)
    lakes += random_lakes(total - easy - far, rng, recipe.sides, recipe.goal_distance, test=False)
    if far:
        sides = (recipe.max_side, recipe.max_side)
        lakes += random_lakes(far, rng, sides, recipe.goal_distance + FAR_EXTRA_STEPS, test=False)
    assert not any(lake.is_test for lake in lakes)
    cropped = recipe.cropped * final_phase
    return make_env(lakes, rng, recipe.max_steps, recipe.shuffled, cropped, recipe.slippery)


def on_policy_trials(run, number):
    """Trials that the network plays on new lakes, each about as long as a slice, in random order.

    Only in such trials does it meet its own mistakes, like walking in a loop to the step limit, and
    learn that their value is low. On every second lake it plays with the exploration schedule, on
    the others greedily. The episodes of a trial stay in order: on test lakes, too, its returns rise
    from episode to episode. Those of Q-learning rise differently, so they are shuffled.
    """
    recipe = run.recipe
    rng = np.random.default_rng([recipe.seed, number, RANK, 1])
    env = new_lakes(recipe, ON_POLICY_LAKES, progress=1.0, rng=rng)  # lakes of the final phase

    def schedule(episode):
        return np.where(env.env_index % 2, greedy_probability(episode), 1.0)

    # As many steps as fill about one slice.
    steps = int(STEP_TOKEN_FRACTION * recipe.context / run.tokenizer.longest_step)
    agent = InContext(run, len(env), rng, schedule)
    trials = rollout(env, agent, episodes=math.inf, step_limit=steps)
    return [trials[i] for i in rng.permutation(len(env))]  # lakes with far goals came last


# ---- the network
def new_network(recipe, tokenizer):
    """A small Llama with random weights; standard deviation 0.02, less in residual projections."""
    D, heads = recipe.width, recipe.heads
    if D % (2 * heads):
        raise ValueError(f"--width has to be a multiple of {2 * heads}, twice --heads, not {D}.")
    config = LlamaConfig(
        vocab_size=tokenizer.tokenizer.get_vocab_size(),
        hidden_size=D,
        intermediate_size=3 * D,
        num_hidden_layers=recipe.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=D // heads,
        max_position_embeddings=max(2048, recipe.tokens, recipe.context),
    )
    llama = Llama(config)
    generator = torch.Generator().manual_seed(recipe.seed)
    for name, weight in llama.named_parameters():
        if weight.ndim == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * recipe.layers) if residual else 0.02
            nn.init.normal_(weight, std=std, generator=generator)
    return QNetwork(llama, tokenizer.action_tokens)


# ---- the optimizers
class Muon(torch.optim.Optimizer):
    """torch.optim.Muon (Jordan et al. 2024), but in float32: most CPUs are slow in bfloat16."""

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        by_shape = defaultdict(list)
        for p in group["params"]:
            by_shape[p.shape].append(p)
        for (rows, columns), matrices in by_shape.items():  # all of one shape at once
            gradient = torch.stack([p.grad for p in matrices])  # (matrices, rows, columns)
            state = self.state[matrices[0]]  # the first one keeps the momentum of all
            momentum = state.setdefault("momentum", torch.zeros_like(gradient))
            momentum.lerp_(gradient, 0.05)
            direction = newton_schulz(gradient.lerp(momentum, 0.95))  # Nesterov momentum
            rate = group["lr"] * math.sqrt(max(1, rows / columns))
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(matrices, direction.unbind(), alpha=rate)


def newton_schulz(x):
    """Orthogonalise x (..., rows, columns): set its singular values to about 1."""
    if x.shape[-2] > x.shape[-1]:
        return newton_schulz(x.mT).mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):  # the coefficients are Jordan's
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x


def make_optimizers(recipe, network):
    """AdamW, and Muon for the layers' matrices. `train` scales the learning rates in `defaults`."""
    matrices, rest = [], []
    for name, p in network.trainable_parameters().items():
        uses_muon = recipe.muon_rate and ".layers." in name and p.ndim == 2
        (matrices if uses_muon else rest).append(p)
    optimizers = [torch.optim.AdamW(rest, recipe.learning_rate, weight_decay=0.01)]
    if matrices:
        optimizers.append(Muon(matrices, {"lr": recipe.muon_rate, "weight_decay": 0.01}))
    return optimizers


def learning_rate_factor(recipe, step):
    """Linear warm-up to 1, then constant, then linear decay to 0.03."""
    decay = max(0.0, step / recipe.steps - recipe.decay_from) / max(1e-9, 1 - recipe.decay_from)
    return min(1.0, (step + 1) / recipe.warm_up) * (1 - 0.97 * decay)


# ---- the training
LOG_HEADER = "step,loss,mean_q,mean_target,learning_rate,gradient_norm"
EVAL_LAKES = 32  # played every --eval-every steps
CHECKPOINT_STEPS = 50  # steps between checkpoints, if there are no on-policy trials


def train(run, args):
    """Train from the last checkpoint, or from the start, to the last step."""
    recipe = run.recipe
    online = run.network
    target = online.target_copy()
    optimizers = make_optimizers(recipe, online)
    step = 0
    if args.resume:
        step = load_state(run, target, optimizers)
    elif RANK == 0:  # so that a run that is killed before its first checkpoint can be resumed
        save_state(run, target, optimizers, step)
    log = read_log(run, step)
    print_header(run)
    micro_batch_size, online.llama.recompute_layers = plan_memory(run)
    q_values = QNetwork.forward  # of the online or the target network
    if args.compile:
        q_values = compile_q_values(run, micro_batch_size)
    # On-policy trials are played once per collection, so such runs are resumed where one begins.
    checkpoint_every = recipe.collection_steps if recipe.on_policy else CHECKPOINT_STEPS
    bar = tqdm(total=recipe.steps, initial=step, disable=RANK > 0)

    # Batches are made one step ahead, see below.
    stream = islice(batches(run, step), recipe.steps - step)
    batch = next(stream, None)
    while batch is not None:
        # The loss and its gradient, summed over micro batches.
        batch = batch.to(online.action_tokens.device)
        online.zero_grad()
        means = torch.zeros(3, device=batch.tokens.device)  # loss, Q and target, for the log
        for micro in batch.split(micro_batch_size):
            q = q_values(online, micro.tokens, micro.positions)  # (B, N, A)
            with torch.no_grad():
                q_target = q_values(target, micro.tokens, micro.positions)  # (B, N, A)
            rewards = recipe.reward_scale * micro.rewards
            targets = td_targets(q, q_target, rewards, micro.discounts)  # (B, N)
            loss = td_loss(q, micro.actions, targets, micro.mask)
            weight = micro.mask.sum() / batch.mask.sum()
            (weight * loss).backward()
            means += weight * logged_means(micro, q, targets, loss)
        average_gradients(online)
        parameters = online.trainable_parameters().values()
        max_norm = recipe.grad_clip or math.inf  # inf: the norm is only measured
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)

        # The online network learns, and the target network follows.
        for optimizer in optimizers:
            learning_rate = optimizer.defaults["lr"] * learning_rate_factor(recipe, step)
            optimizer.param_groups[0]["lr"] = learning_rate
            optimizer.step()
        polyak_update(online, target, recipe.alpha)
        step += 1

        # The next batch. It is made before any number is read back from the GPU, so that the GPU is
        # busy with this step meanwhile. Where a collection begins, the network now plays on-policy
        # trials. The checkpoint below has the same weights, so a resumed run repeats these trials.
        batch = next(stream, None)
        norm = norm.item()
        if not math.isfinite(norm):
            bar.close()
            advice = "lower the learning rates"
            if recipe.dtype == "float16":  # its largest number is 65,504
                advice += ", or take --dtype bfloat16 instead of float16"
            raise ValueError(f"The gradient's norm is {norm} after {step - 1} steps: {advice}.")

        # The log, an evaluation on unseen lakes, a checkpoint.
        if RANK == 0:
            row = (step, *means.tolist(), optimizers[0].param_groups[0]["lr"], norm)
            log.append(",".join(f"{value:.6g}" for value in row))
            bar.set_postfix_str(
                "loss {:.4f}, Q {:.3f}, target {:.3f}".format(*row[1:4]), refresh=False
            )
            bar.update()
            if step % args.eval_every == 0 and step < recipe.steps:
                lakes = unseen_lakes(EVAL_LAKES, recipe.sides, recipe.goal_distance)
                trials = play(run, lakes, seed=0, schedule=greedy_probability)
                returns = sparkline(trials)
                text = f"step {step}: mean return on {EVAL_LAKES} unseen lakes {returns}"
                bar.write(text, file=sys.stderr)
            if step % checkpoint_every == 0 or step == recipe.steps:
                with atomic_write(run.folder / "log.csv") as path:
                    path.write_text("\n".join(log) + "\n")
                save_network(run)
                save_state(run, target, optimizers, step)  # last, as --resume relies on it
    bar.close()


def print_header(run):
    """Say what is trained, and show an episode: down and right to a goal."""
    if RANK == 0:
        parameters = sum(p.numel() for p in run.network.trainable_parameters().values())
        episode = Episode(np.array([2, 6, 7]), np.array([1, 2]), np.array([0, 1]))
        lines = [
            f"{run.folder}: {parameters:,} parameters are trained.",
            f"Stop with Ctrl-C, continue with --resume {run.folder}.",
            f"An episode as the network reads it: {run.tokenizer.text(episode)!r}",
        ]
        print(*lines, sep="\n", file=sys.stderr)


def activation_bytes(network, tokens):
    """Bytes stored for the backward pass of `tokens`; tests/test_benchmark.py counts them."""
    config = network.llama.config
    weights = network.llama.unembedding
    D = config.hidden_size
    KV = config.num_key_value_heads * config.head_dim
    ffn = config.intermediate_size
    # Numbers per token and layer: what the backward pass of each operation needs.
    per_layer = 9 * D + 2 * KV + 4 * ffn  # all weights are trained
    if network.adapter is not None:
        per_layer = 4 * D + 4 * KV + 4 * ffn  # frozen weights need less, IA3's vectors more
        if weights.dtype == torch.bfloat16 and weights.device.type == "cpu":
            per_layer += 2 * D  # on a CPU the norms keep a float32 copy
    return tokens * config.num_hidden_layers * per_layer * weights.dtype.itemsize


def plan_memory(run):
    """The slices of a micro batch; whether to recompute layers because not even one slice fits."""
    recipe = run.recipe
    longest = max(recipe.tokens, recipe.context)  # shorter slices need less
    ffn = run.network.llama.config.intermediate_size
    # While a layer is computed, about three float32 copies of its feed-forward activation.
    temporaries = 3 * longest * ffn * torch.float32.itemsize
    needed = activation_bytes(run.network, longest) + temporaries
    fits = memory_budget(run.network.action_tokens.device) // needed
    # As few passes as possible, over micro batches of equal size. This assumes the first phase's
    # number of slices and the final phase's length, which is more than either phase needs.
    slices = slices_per_process(recipe, recipe.tokens)
    passes = math.ceil(slices / max(1, fits))
    return math.ceil(slices / passes), fits == 0


def logged_means(batch, q, targets, loss):
    """The loss, and the means of Q(tau, a) and of the targets, (3,)."""
    taken = q.detach().gather(-1, batch.actions[..., None]).squeeze(-1)
    count = batch.mask.sum()
    mean_q = (batch.mask * taken).sum() / count
    mean_target = (batch.mask * targets).sum() / count
    return torch.stack((loss.detach(), mean_q, mean_target))


def compile_q_values(run, micro_batch_size):
    """QNetwork.forward, compiled for each shape, once with a gradient and once without."""
    one_pass = micro_batch_size >= slices_per_process(run.recipe, run.recipe.tokens)
    on_gpu = run.network.action_tokens.is_cuda
    # CUDA graphs ("reduce-overhead") save the time of launching kernels. That pays off where
    # kernels are small, that is, where a batch fits into one pass.
    mode = "reduce-overhead" if on_gpu and one_pass else None
    return torch.compile(QNetwork.forward, dynamic=False, mode=mode)


# ---- checkpoints
def save_state(run, target, optimizers, step):
    """Write all that --resume needs to one file, atomically."""
    state = {
        "online": run.network.trainable_parameters(),
        "target": target.trainable_parameters(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "processes": WORLD_SIZE,
    }
    content = io.BytesIO()
    torch.save(state, content)
    with atomic_write(run.folder / "state.pt") as path:
        path.write_bytes(content.getbuffer())


@torch.no_grad()
def load_state(run, target, optimizers):
    """Restore what `save_state` wrote; returns the step. ValueError if that is not possible."""
    path = run.folder / "state.pt"
    if not path.exists():
        raise ValueError(f"{run.folder} cannot be continued: it has no state.pt.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, network in (("online", run.network), ("target", target)):
            for key, parameter in network.trainable_parameters().items():
                parameter.copy_(state[name][key])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    except Exception as error:  # damaged, or saved with other settings
        message = f"{path} does not fit the run: is the file whole, and recipe.json as it was?"
        raise ValueError(message) from error
    if state["processes"] != WORLD_SIZE and RANK == 0:
        message = f"Saved by {state['processes']} processes, continued by {WORLD_SIZE}: other data."
        print(message, file=sys.stderr)
    return state["step"]


def read_log(run, step):
    """The lines of log.csv up to a step."""
    if step == 0:
        return [LOG_HEADER]
    return (run.folder / "log.csv").read_text().splitlines()[: step + 1]


# ---- several GPUs, under torchrun
# Each process draws its part of a batch from its own seed. All of them average their gradients, so
# their networks stay the same. The first process writes the files.


def init_distributed(device):
    """Join the group of processes, if there are several; returns this one's device."""
    if WORLD_SIZE == 1:
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)  # else each process would take memory of the first GPU
    backend = "nccl" if device.startswith("cuda") else "gloo"
    torch.distributed.init_process_group(backend, timeout=timedelta(hours=2))
    return device


def average_gradients(network):
    """Give every process the mean of all processes' gradients."""
    if WORLD_SIZE > 1:
        for p in network.trainable_parameters().values():
            torch.distributed.all_reduce(p.grad)
            p.grad /= WORLD_SIZE


# ---- the command line
def recipe_from_args(args, flags):
    """The recipe of a new run: a default one with the changes that the user asks for, `flags`."""
    if not args.model:
        refuse(flags.keys() & {"revision", "dtype"}, "is for a base model")
        return Recipe(**flags)

    refuse(flags.keys() & {"layers", "width", "heads", "muon_rate"}, "is for a new network")
    folder = Path(args.model)
    if folder.is_dir():
        refuse(flags.keys() & {"revision"}, f"is for the Hub, but {folder} is a folder")
        flags["model"] = str(folder.resolve())
    base = read_recipe(folder)
    if base is None:  # a repository of the Hub, or a checkpoint from elsewhere
        return replace(PAPER, **flags)
    if base.model:
        raise ValueError(f"{folder} is itself an adapter: name its base.")
    return replace(base, **(ADAPTER_DEFAULTS | flags))  # the same lakes as the base


def refuse(names, reason):
    """ValueError if there are any such flags."""
    if names:
        raise ValueError(f"--{min(names).replace('_', '-')} {reason}: leave it out.")


def create_run(recipe, out, device, trials):
    """A new run, to be evaluated on `trials` lakes. Its folder is made after all checks."""
    if out and RANK == 0 and any(out.glob("*")):
        raise ValueError(f"{out} is not empty: choose another --out, or --resume {out}.")
    if recipe.model:
        config, source = load_config(recipe.model, recipe.revision)
        check_base(recipe, config)
        commit = "" if Path(recipe.model).is_dir() else source.name
        recipe = replace(recipe, revision=commit)
        tokenizer = TranscriptTokenizer(load_tokenizer(source), config.vocab_size)
    else:
        compact = compact_tokenizer()
        tokenizer = TranscriptTokenizer(compact, compact.get_vocab_size())
    check_recipe(recipe, tokenizer, trials)

    if recipe.model:
        llama = load_llama(recipe.model, DTYPES[recipe.dtype], device, recipe.revision)
        network = QNetwork(llama, tokenizer.action_tokens, IA3(llama.config).to(device))
    else:
        network = new_network(recipe, tokenizer).to(device)

    run = Run(make_run_folder(out), recipe, network, tokenizer)
    if RANK == 0:
        with atomic_write(run.folder / "tokenizer.json") as path:
            tokenizer.tokenizer.save(str(path))
        save_network(run)
        save_json(run.folder / "recipe.json", asdict(recipe))
    return run


def check_recipe(recipe, tokenizer, trials):
    """ValueError for settings that do not go together."""
    for length in (recipe.tokens, recipe.context):
        slices = max(1, recipe.batch * recipe.tokens // length)
        if slices % WORLD_SIZE:
            raise ValueError(f"{WORLD_SIZE} processes cannot share a batch of {slices} slices.")
    # Two steps, so that at least the first has a target. Otherwise the loss may be 0 / 0.
    fewest = tokenizer.longest_episode(2)
    if recipe.tokens < fewest:
        raise ValueError(f"--tokens has to be at least {fewest}, not {recipe.tokens}.")
    check_context(tokenizer, recipe.context, recipe.max_steps)
    # These raise an error if there are too few such lakes, for evaluations or for the training.
    unseen_lakes(max(EVAL_LAKES, trials), recipe.sides, recipe.goal_distance)
    new_lakes(recipe, max(ON_POLICY_LAKES, recipe.lakes), 1.0, np.random.default_rng(0))


def make_run_folder(out):
    """Make the folder, or the first of runs/1, runs/2, ... that no other run has made."""
    if RANK > 0:
        return out or Path("runs")  # unused: the first process writes all files
    if out:
        out.mkdir(parents=True, exist_ok=True)
        return out
    for number in count(1):
        with suppress(FileExistsError):
            folder = Path(f"runs/{number}")
            folder.mkdir(parents=True)
            return folder


def check_compiler(device):
    """ValueError if torch.compile does not work here."""
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--compile does not work on this machine: {reason}") from error


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, help="folder of the new run (default: runs/NUMBER)")
    add("--resume", type=Path, metavar="RUN", help="continue this run")
    add("--device", type=device_argument, help="cpu, cuda, cuda:1, ...")
    add("--compile", action="store_true", help="compile the network: a minute first, then faster")
    add("--eval-every", type=int, default=1200, help="steps between evaluations")
    add("--trials", type=int, default=200, help="lakes to play at the end")
    group = parser.add_argument_group("recipe (with --model other defaults: see PAPER)")
    for f in fields(Recipe):
        text = f"{f.metadata['help']} (default: {f.default})"
        group.add_argument("--" + f.name.replace("_", "-"), type=type(f.default), help=text)
    args = parser.parse_args(arguments)
    if min(args.eval_every, args.trials) < 1:
        raise ValueError("--eval-every and --trials have to be at least 1.")

    flags = {f.name: getattr(args, f.name) for f in fields(Recipe)}
    flags = {name: value for name, value in flags.items() if value is not None}
    device = init_distributed(args.device or DEVICE)
    if args.compile:
        check_compiler(device)
    if args.resume:
        refuse(flags.keys() | ({"out"} if args.out else set()), "is for new runs")
        run = load_run(args.resume, device)
    else:
        run = create_run(recipe_from_args(args, flags), args.out, device, args.trials)
    if RANK == 0:
        for leftover in run.folder.glob("tmp.*"):  # of a process that was killed
            leftover.unlink()
    train(run, args)
    if RANK == 0:
        evaluate("unseen", [run], run.folder / "unseen", args.trials)


if __name__ == "__main__":
    with user_errors():
        main()
