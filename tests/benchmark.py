"""How fast is it? Run `python tests/benchmark.py`, on a machine that does nothing else.

A ratio travels from machine to machine better than a speed does, so both sides of each comparison are timed in turn in the
same run, and the ratio of their medians comes first. Peak memory is that of a process of its own for each side.

The peer of training is transformers + PEFT doing what the paper's notebook does: two IA3 adapters on one frozen base, logits of
the whole vocabulary from both, gradient checkpointing, AdamW. The peer of playing is the notebook's way too: one trial at a
time, the whole transcript tokenised anew at each step, and `generate` of one token with a KV cache. Both sides get the same
weights, and before the clock of the training steps starts their Q-values are compared.
"""

import argparse
import itertools
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import peft
import torch
import transformers
from matplotlib.figure import Figure
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from eval import SHIPPED, save_picture, test_lakes
from frozen_lake import ACTIONS, FrozenLake, Lake, random_lakes
from ia3 import IA3
from icrl import (
    LLAMA_TEMPLATE,
    MAX_TILES,
    Batch,
    Encoder,
    QNetwork,
    compact_tokenizer,
    load_run,
    model_probability,
    play,
    td_loss,
    td_targets,
)
from llama import KVCache, Llama, LlamaConfig

SECONDS = 0.3  # of one repeat of the environment
STEP = 10  # tokens of an environment step in the paper's transcripts
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PEFT = {"task_type": "CAUSAL_LM", "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


def machine() -> str:
    """The processor and the versions that the figures belong to."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor without a name
        pass
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{cpu}, {torch.get_num_threads()} threads"
    modules = (torch, transformers, peft, gymnasium, np)
    return f"{device}; Python {platform.python_version()}, " + ", ".join(f"{m.__name__} {m.__version__}" for m in modules)


def alternate(repeats: int, *sides: Callable[[], float]) -> list[list[float]]:
    """Time the sides in turn, so that whatever else the machine does meets all of them; one list of results a side."""
    for side in sides:
        side()  # warm up
    return [list(results) for results in zip(*([side() for side in sides] for _ in range(repeats)))]


def finish() -> float:
    """The time when all that was begun is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def show(title: str, unit: str, rates: dict[str, list[float]]) -> None:
    """The ratio of the first side's median to the second's, and then all of them with their spread."""
    first, second = (statistics.median(r) for r in itertools.islice(rates.values(), 2))
    print(f"{title}: {first / second:.1f} times")
    for name, r in rates.items():
        print(f"    {name:<44} {statistics.median(r):>14,.1f} {unit}  ({min(r):,.1f} to {max(r):,.1f})")


# ------------------------------------------------------------------------------------------------------------- environment
def our_speed(lakes: list[Lake]) -> Callable[[], float]:
    """A function that plays random actions on all lakes at once and returns environment steps a second."""
    rng = np.random.default_rng(0)
    env = FrozenLake(lakes, rng)
    actions = rng.integers(0, 4, (64, len(lakes)))  # drawn beforehand on both sides: what is timed is the environment

    def run() -> float:
        env.reset()
        begin, steps = time.perf_counter(), 0
        for action in itertools.cycle(actions):
            _, _, terminated, truncated = env.step(action)
            env.reset(terminated | truncated)
            steps += len(lakes)
            if (seconds := time.perf_counter() - begin) > SECONDS:
                return steps / seconds

    return run


def gymnasium_speed(lakes: list[Lake]) -> Callable[[], float]:
    """The same with one gymnasium environment a lake, which take turns: an episode each."""
    envs = [gymnasium.make("FrozenLake-v1", desc=list(lake.rows), is_slippery=False) for lake in lakes]
    actions = itertools.cycle(np.random.default_rng(0).integers(0, 4, 10_000).tolist())
    turns = itertools.cycle(envs)

    def run() -> float:
        begin, steps = time.perf_counter(), 0
        for env in turns:
            env.reset()
            for action in actions:
                _, _, terminated, truncated, _ = env.step(action)
                steps += 1
                if terminated or truncated:
                    break
            if (seconds := time.perf_counter() - begin) > SECONDS:
                return steps / seconds

    return run


def environment(repeats: int) -> None:
    """Environment steps a second, resets included."""
    maps = random_lakes(4000, np.random.default_rng(0))
    ours, theirs = alternate(repeats, our_speed(maps), gymnasium_speed(maps[:100]))
    rates = {"FrozenLake, 4,000 lakes at once": ours, "gymnasium.make('FrozenLake-v1')": theirs}
    show("Environment", "steps/s", rates)


# ---------------------------------------------------------------------------------------------------------------- training
def slices_of(config: LlamaConfig, count: int, tokens: int) -> Batch:
    """Random tokens with an action at every tenth, as dense as the paper's transcripts are."""
    random = torch.Generator().manual_seed(0)
    positions = torch.arange(5, tokens, STEP).expand(count, -1)
    shape = positions.shape
    rewards = (torch.rand(shape, generator=random) < 0.05).float()
    return Batch(
        tokens=torch.randint(config.vocab_size, (count, tokens), generator=random),
        positions=positions,
        actions=torch.randint(4, shape, generator=random),
        rewards=rewards,
        discounts=0.9 * (1 - rewards),
        mask=torch.arange(shape[1]).expand(shape) < shape[1] - 1,
    ).to(DEVICE)


def random_weights(config: LlamaConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A Llama's tensors, made where they are used; all sides share them, since IA3 leaves them as they are."""
    random = torch.Generator(DEVICE).manual_seed(0)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama(config).state_dict().items()}
    tensors = {name: torch.ones(shape, dtype=dtype, device=DEVICE) for name, shape in shapes.items()}
    return {name: t.normal_(0, 0.02, generator=random) if t.ndim == 2 else t for name, t in tensors.items()}


def our_training(config: LlamaConfig, batch: Batch, weights: dict, at_once: int, compiled: bool = False) -> tuple:
    """Our optimizer step with IA3, and our Q-values."""
    with torch.device("meta"):
        llama = Llama(config)
    llama.load_state_dict(weights, assign=True)
    network = QNetwork(llama, range(4), IA3.for_llama(config)).to(DEVICE)
    recipe = replace(train.PAPER, batch=len(batch.tokens), reward_scale=1.0, at_once=at_once, compile=compiled)
    training = train.Training(recipe, network)
    return lambda: training.update(batch), lambda: network(batch.tokens, batch.positions)


def their_training(config: LlamaConfig, batch: Batch, weights: dict, at_once: int) -> tuple:
    """The notebook's step by transformers and PEFT, and its Q-values."""
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_dict()))
    llama.load_state_dict(weights, assign=True)
    llama.model.rotary_emb = type(llama.model.rotary_emb)(llama.config)  # its buffers are not among the weights
    llama.to(DEVICE)
    model = peft.get_peft_model(llama, peft.IA3Config(**PEFT), adapter_name="theta")
    model.add_adapter("phi", peft.IA3Config(**PEFT))
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.set_adapter("theta")
    vectors = {name: p for name, p in model.named_parameters() if "theta" in name}
    slow = [dict(model.named_parameters())[name.replace("theta", "phi")] for name in vectors]
    optimizer = torch.optim.AdamW(vectors.values(), lr=1e-2, weight_decay=0.01)

    def q_of(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits = model(tokens, use_cache=False).logits  # (B, T, V)
        return logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))[..., :4].float()

    def step() -> None:
        optimizer.zero_grad()
        for part in batch.split(at_once):
            model.set_adapter("phi")
            with torch.no_grad():
                q_delayed = q_of(part.tokens, part.positions)
            model.set_adapter("theta")
            q = q_of(part.tokens, part.positions)
            targets = td_targets(q, q_delayed, part.rewards, part.discounts)
            (td_loss(q, part.actions, targets, part.mask) * len(part.tokens) / len(batch.tokens)).backward()
        optimizer.step()
        with torch.no_grad():
            for phi, theta in zip(slow, vectors.values()):
                phi.lerp_(theta, 0.1)

    return step, lambda: q_of(batch.tokens, batch.positions)


TRAININGS = {  # config, slices, tokens, type, slices at once
    "embedded": (LlamaConfig(107, 64, 192, 4, 2, 2, 32, rope_theta=10_000.0), 4, 512, torch.float32, 4),
    "128,256 words": (LlamaConfig(128_256, 512, 1536, 4, 8, 8, 64), 2, 1024, torch.float32, 2),
    "8B": (LlamaConfig(), 2, 4096, torch.bfloat16, 1),
    "tiny 8B": (LlamaConfig(500, 64, 160, 2, 4, 2, 16), 2, 128, torch.bfloat16, 1),  # to try its way without a GPU
}


def ingredients(which: str) -> tuple[LlamaConfig, Batch, dict, int]:
    """What both sides of a training are made of."""
    config, count, tokens, dtype, at_once = TRAININGS[which]
    return config, slices_of(config, count, tokens), random_weights(config, dtype), at_once


def training(which: str, repeats: int) -> None:
    """Tokens a second and peak memory of an optimizer step with IA3, ours and the peer's; the Q-values are compared first."""
    config, count, tokens, dtype, _ = TRAININGS[which]
    given = ingredients(which)
    sides = {"ours": our_training(*given), "transformers + PEFT": their_training(*given)}
    with torch.no_grad():
        ours, theirs = (q() for _, q in sides.values())
    apart = (ours - theirs).abs().max().item()
    assert apart < (1e-4 if dtype == torch.float32 else 0.1), f"the Q-values are {apart} apart"
    try:
        sides["ours with --compile"] = our_training(*given, compiled=True)
    except ValueError as error:
        print(error)

    def timed(step: Callable) -> Callable[[], float]:
        def run() -> float:
            begin = finish()
            step()
            return count * tokens / (finish() - begin)

        return run

    rates = dict(zip(sides, alternate(repeats, *(timed(step) for step, _ in sides.values()))))
    show(f"Training step, {which} ({count} slices of {tokens:,} tokens, IA3)", "tokens/s", rates)
    memory = [peak("training", which, side) for side in ("ours", "theirs")]
    print(f"    peak memory: {memory[0] / 2**20:,.0f} MiB against {memory[1] / 2**20:,.0f} MiB, or {memory[0] / memory[1]:.0%}")
    print(f"    Q-values at most {apart:.1e} apart")
    plan = train.Plan.of(replace(train.PAPER, tokens=tokens), config, STEP)
    best, _ = limits(dtype)
    for name in filter(lambda name: name.startswith("ours"), rates):
        rate = 3 * plan.forward_flops * statistics.median(rates[name])  # online, delayed, backward; no recomputation
        print(f"    {name} does {rate / 1e9:,.0f} GFLOP/s in matrix products, {rate / best:.0%} of the machine's best")


def peak(*what: str) -> int:
    """Bytes that a process of its own needs more at its height than before it began; on a GPU the bytes that torch allocates."""
    if DEVICE == "cuda":
        torch.cuda.empty_cache()  # room for the other process
    done = subprocess.run([sys.executable, __file__, "--peak", *what], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def print_peak(kind: str, which: str, side: str) -> None:
    """The other end of `peak`: does the thing once and prints what it took."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the height that the imports reached
    before = resident("VmRSS")
    if kind == "training":
        step, _ = {"ours": our_training, "theirs": their_training}[side](*ingredients(which))
        step(), step()
    else:
        {"ours": our_playing, "theirs": their_playing}[side]()()
    print(torch.cuda.max_memory_allocated() if DEVICE == "cuda" else resident("VmHWM") - before)


def resident(what: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at the most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


# ----------------------------------------------------------------------------------------------------------------- playing
def our_playing(trials: int = 50, episodes: int = 30) -> Callable[[], float]:
    """50 trials of 30 episodes side by side; environment steps a second."""
    network, encoder, recipe, _ = load_run(SHIPPED, DEVICE)
    lakes = test_lakes(trials, recipe["sides"], recipe["min_hops"])

    def run() -> float:
        begin = finish()
        played = play(network, encoder, lakes, episodes, np.random.default_rng(0), recipe["tokens"], recipe["max_steps"])
        return sum(len(episode.actions) for trial in played for episode in trial) / (finish() - begin)

    return run


def their_playing(trials: int = 50, episodes: int = 30) -> Callable[[], float]:
    """The notebook's way, one trial at a time; environment steps a second. Each call plays the next ten of the same trials."""
    recipe = load_run(SHIPPED).recipe
    model = transformers.LlamaForCausalLM.from_pretrained(SHIPPED).to(DEVICE).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=compact_tokenizer())
    lakes = itertools.cycle(test_lakes(trials, recipe["sides"], recipe["min_hops"]))

    @torch.inference_mode()
    def run() -> float:
        begin, steps, rng = finish(), 0, np.random.default_rng(0)
        for lake in itertools.islice(lakes, 10):
            env = gymnasium.make("FrozenLake-v1", desc=list(lake.rows), is_slippery=False)
            text, cache = "", transformers.DynamicCache()
            for episode in range(episodes):
                state, over = env.reset(seed=int(rng.integers(2**31)))[0], False
                text += f"{state} "
                while not over:
                    tokens = tokenizer(text, return_tensors="pt").to(DEVICE)
                    out = model.generate(
                        tokens.input_ids, attention_mask=tokens.attention_mask, past_key_values=cache, max_new_tokens=1,
                        do_sample=False, pad_token_id=0, return_dict_in_generate=True,
                    )  # fmt: skip
                    word = tokenizer.decode(out.sequences[0, -1:])
                    if word not in ACTIONS or rng.random() >= model_probability(episode):
                        word = ACTIONS[rng.integers(4)]
                    state, reward, terminated, truncated, _ = env.step(ACTIONS.index(word))
                    over, steps = terminated or truncated, steps + 1
                    text += f"{word} {state} " + ("1.0 " if reward else "") + ("... " if truncated else "")
                text += "<|end_of_text|> "
        return steps / (finish() - begin)

    return run


def playing(repeats: int) -> None:
    """Environment steps a second of the shipped model, ours against the notebook's way, and peak memory."""
    ours, theirs = alternate(repeats, our_playing(), their_playing())
    rates = {"ours, 50 trials side by side": ours, "transformers, one trial at a time": theirs}
    show("Playing 30 episodes, the shipped model", "steps/s", rates)
    memory = [peak("playing", "shipped", side) for side in ("ours", "theirs")]
    print(f"    peak memory: {memory[0] / 2**20:,.0f} MiB against {memory[1] / 2**20:,.0f} MiB")


def stand_in_tokenizer() -> Tokenizer:
    """Cuts the paper's transcripts where Llama 3's tokenizer does, but for the reward; that one asks for an account."""
    t = LLAMA_TEMPLATE
    texts = [t.begin, t.prompt, t.reward.format(1.0), t.cut, t.end, *map(t.action.format, ACTIONS)]
    piece = "<[^<>]+>|[^<>]+"
    words = dict.fromkeys(re.findall(piece, "".join([*texts, *map(t.observation.format, range(MAX_TILES))])))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="..."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(piece), "isolated")
    return tokenizer


def playing_large(which: str, trials: int = 50, episodes: int = 30) -> None:
    """Seconds that 50 trials of 30 episodes take an untrained network of the 8B's shape, in the paper's transcripts.

    It is asked at each step, but a coin chooses: by itself it would walk in circles, as no trained one does.
    """
    config, _, _, dtype, _ = TRAININGS[which]
    encoder, recipe = Encoder(stand_in_tokenizer()), train.PAPER
    with torch.device("meta"):
        llama = Llama(config)
    llama.load_state_dict(random_weights(config, dtype), assign=True)
    network = QNetwork(llama, encoder.action_tokens, IA3.for_llama(config)).to(DEVICE)
    lakes, coin = test_lakes(trials, recipe.sides, recipe.min_hops), lambda episode: np.zeros(len(episode))
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = finish()
    played = play(network, encoder, lakes, episodes, np.random.default_rng(0), recipe.tokens, recipe.max_steps, coin)
    seconds = finish() - begin
    steps = [sum(len(episode.actions) for episode in trial) for trial in played]
    weights = sum(p.nbytes for p in llama.model.layers.parameters())
    rate = max(steps) * weights / seconds  # every step of the longest trial reads them all
    print(f"Playing {episodes} episodes, {which}: {trials} trials in {seconds:.1f} s")
    print(f"    {sum(steps) / seconds:,.1f} steps/s; {1000 * seconds / max(steps):.1f} ms for a step of all trials")
    _, bandwidth = limits(dtype)
    print(f"    {rate / 1e9:,.1f} GB/s of weights, {rate / bandwidth:.0%} of the best")
    if DEVICE == "cuda":
        print(f"    peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def context_costs(out: Path) -> None:
    """Milliseconds a step of 50 trials, as their contexts grow: linear, since each step reads the cache once."""
    network = load_run(SHIPPED, DEVICE).network
    cache = KVCache(network.llama.config, 50, 4200, device=DEVICE)
    tokens = torch.zeros(50, 2, dtype=torch.long, device=DEVICE)
    _, bandwidth = limits()
    print("Playing, milliseconds a step of 50 trials by the tokens in their contexts")
    lengths, medians = (256, 512, 1024, 1536, 2048, 3072, 4096), []
    with torch.inference_mode():
        for length in lengths:
            times = []
            for _ in range(7):
                cache.lengths[:] = length
                begin = finish()
                network(tokens, tokens[:, :1], cache)
                times.append(1000 * (finish() - begin))
            medians.append(statistics.median(times))
            rate = (cache.keys.nbytes + cache.values.nbytes) * length / 4200 / medians[-1] * 1000
            read = f"{rate / 1e9:5.1f} GB/s of keys and values, {rate / bandwidth:.0%} of the best"
            print(f"    {length:>6,} {medians[-1]:8.2f} ms, {read}")
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(lengths, medians, "o-", color="#0072B2")
    axes.set(xlabel="tokens in each context", ylabel="milliseconds a step of 50 trials", xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.25)
    save_picture(out / "context.png", figure)


# --------------------------------------------------------------------------------------------------- data, and the limits
def data_path(repeats: int) -> None:
    """Slices a second that the data path makes, Q-learning and own trials included, against those that training eats."""
    recipe = train.EMBEDDED
    encoder = Encoder(compact_tokenizer())
    training_ = train.Training(recipe, train.new_network(recipe, encoder).to(DEVICE))
    batch = next(train.batches(encoder, training_)).to(DEVICE)
    late = recipe.steps // recipe.collection_steps - 1  # the last whole collection

    def made() -> float:
        """Over a whole training: some collections are like the first one, the late ones have own trials."""
        seconds = 0.0
        for number, share in ((0, recipe.late_from), (late, 1 - recipe.late_from)):
            begin = finish()
            slices = sum(len(b.tokens) for b in train.collect(recipe, number, encoder, training_.player))
            seconds += share * (finish() - begin)
        return slices / seconds

    def eaten() -> float:
        begin = finish()
        training_.update(batch)
        return recipe.batch / (finish() - begin)

    rates = alternate(repeats, made, eaten)
    show("Data path, the embedded model's recipe", "slices/s", dict(zip(("made", "eaten by training"), rates)))
    flops = 4 * train.Plan.of(recipe, training_.online.llama.config).forward_flops * recipe.tokens * statistics.median(rates[1])
    matmul, _ = limits()
    print(f"    training does {flops / 1e9:,.0f} GFLOP/s in matrix products, {flops / matmul:.0%} of the machine's best")
    where_it_goes(training_, batch)


PARTS = {  # of a training step, by what the names of PyTorch's operators contain; the first that fits
    "attention": ("scaled_dot_product", "flash", "efficient_attention"),
    "matrix products": ("mm", "linear", "matmul"),
    "optimizers": ("Optimizer", "_foreach", "adam", "lerp", "addcdiv", "addcmul_"),
}


def where_it_goes(training_: train.Training, batch: Batch) -> None:
    """The parts of a training step by the operators' own time."""
    with torch.profiler.profile() as profile:
        for _ in range(5):
            training_.update(batch)
    seconds = dict.fromkeys([*PARTS, "the rest: norms, RoPE, activations, copies"], 0.0)
    for event in profile.key_averages():
        part = next((part for part, names in PARTS.items() if any(name in event.key for name in names)), list(seconds)[-1])
        seconds[part] += event.self_device_time_total if DEVICE == "cuda" else event.self_cpu_time_total
    for part, time_ in seconds.items():
        print(f"    {time_ / sum(seconds.values()):6.0%}  {part}")


def limits(dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """The machine's matrix-product rate (FLOP/s) and memory bandwidth (bytes/s), measured on the spot."""
    side = 2048 if DEVICE == "cpu" else 8192
    a, big = torch.randn(side, side, device=DEVICE).to(dtype), torch.randn(2**26, device=DEVICE)
    there = torch.zeros_like(big)
    flops, moved = [], []
    for _ in range(7):
        begin = finish()
        a @ a
        middle = finish()
        there.copy_(big)
        flops.append(2 * side**3 / (middle - begin))
        moved.append(2 * big.nbytes / (finish() - middle))
    limit = statistics.median(flops), statistics.median(moved)
    kind = str(dtype).removeprefix("torch.")
    print(f"Limits: {limit[0] / 1e9:,.0f} GFLOP/s in {kind} matrix products, {limit[1] / 1e9:.1f} GB/s of memory")
    return limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="timings of each side, of which the median counts (default 7)")
    parser.add_argument("--out", type=Path, default=Path("results/benchmark"), help="folder for pictures (default: %(default)s)")
    parser.add_argument("--peak", nargs=3, metavar=("KIND", "WHICH", "SIDE"), help="for this script's own use: print peak memory")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # the peers' own
    train.keep_freed_memory()  # as train.py does; both sides have it
    if args.peak:
        return print_peak(*args.peak)
    print(machine())
    environment(args.repeats)
    for which in ("embedded", "128,256 words"):
        training(which, args.repeats)
    playing(args.repeats)
    if DEVICE == "cuda":
        playing_large("8B")
        training("8B", args.repeats)
    args.out.mkdir(parents=True, exist_ok=True)
    context_costs(args.out)
    data_path(args.repeats)


if __name__ == "__main__":
    main()
