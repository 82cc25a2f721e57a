"""How fast is it? `python tests/benchmark.py [--before FOLDER]`, where nothing else runs.

Two sides, each a separate process, take turns. The ratio of their medians comes first. The other
side of training is transformers + PEFT as in the paper's notebook: two IA3 adapters on one frozen
base, logits of the whole vocabulary, gradient checkpointing, and AdamW. That of playing plays one
trial at a time, tokenizes the whole transcript before each step, and lets `generate` make one token
with a KV cache. Weights and batches are the same, and Q-values are compared first. With --before,
the other side is the same function on another checkout of this project.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from time import perf_counter

import gymnasium
import numpy as np
import peft
import torch
import transformers
from torch.optim import optimizer as hooks

sys.path.append(str(Path(__file__).parents[1]))  # the last one: --before's folder comes first

import icrl
import train
from eval import unseen_lakes
from frozen_lake import ACTIONS, FrozenLake, random_lakes
from llama import DEVICE, Llama, LlamaConfig, load_llama

PRETRAINED = Path(__file__).resolve().parents[1] / "results/general"  # the same for both sides
TOKENIZER = icrl.TranscriptTokenizer(icrl.compact_tokenizer(), 107)
SHAPES = {  # config, slices, tokens, type
    "embedded": (LlamaConfig(107, 64, 192, 4, 2, 2, 32), 4, 512, torch.float32),
    "words": (LlamaConfig(128_256, 512, 1536, 4, 8, 8, 64), 2, 1024, torch.float32),
    "8B": (LlamaConfig(128_256, 4096, 14_336, 32, 32, 8, 128), 1, 4096, torch.bfloat16),
    "tiny 8B": (LlamaConfig(500, 64, 160, 2, 4, 2, 16), 1, 512, torch.bfloat16),
}
COMPARISONS = {  # title: our side, the other side; None: only with --before
    "Environment, steps/s (goal: 100)": ("our_environment()", "their_environment()"),
    "Playing, steps/s (goal: 12)": ("our_playing()", "their_playing()"),
    "IA3, tokens/s (goal: 6, memory 40 %)": ("our_step('words')", "their_step('words')"),
    "IA3, tokens/s (goal: 1.3)": ("our_step('embedded')", "their_step('embedded')"),
    "IA3, --compile": ("our_step('embedded', compiled=True)", "their_step('embedded')"),
    "Data, tokens/s (goal: 4)": ("our_data()", "our_step()"),
    "All weights, tokens/s": ("our_step()", None),
    "All weights without the optimizer": ("our_step(bare=True)", None),
    "8B, tokens/s": ("our_step('8B')", "their_step('8B')"),
    "8B, playing, steps/s": ("our_playing('8B')", "our_playing('8B', trials=1)"),
}


def peak() -> float:
    """The most MiB that this process has had in memory, or torch on a GPU."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


IMPORTS, APART = peak(), []  # MiB; seconds of a turn that do not count


def rounds(q=None, seconds: float = 0.5):
    """Yields, for each round of a side's turns, a list to which the side appends what it does."""
    print(json.dumps([] if q is None else q.flatten().tolist()), flush=True)
    for _ in sys.stdin:
        APART.clear()
        done, begin, taken = [], perf_counter(), 0.0
        while taken < seconds:
            yield done
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            taken = perf_counter() - begin
        print(json.dumps([sum(done) / (taken - sum(APART)), peak() - IMPORTS]), flush=True)
    sys.exit()


def our_environment():
    rng = np.random.default_rng(0)
    env = FrozenLake(random_lakes(4000, rng, test=False), rng)
    for actions, done in zip(cycle(rng.integers(0, 4, (64, len(env)))), rounds()):
        _, _, terminated, truncated = env.step(actions)
        env.reset(terminated | truncated)
        done.append(len(env))


def their_environment():
    env = gymnasium.make("FrozenLake-v1", is_slippery=False)
    actions = cycle(np.random.default_rng(0).integers(0, 4, 10_000).tolist())
    for done in rounds():
        env.reset()
        ended = [False]
        while not any(ended):
            _, _, *ended, _ = env.step(next(actions))
            done.append(1)


def run_of(which: str, **recipe) -> train.Run:
    if not which:
        made = train.Recipe(**recipe)
        return train.Run(Path(), made, train.new_network(made, TOKENIZER).to(DEVICE), TOKENIZER)
    config, batch, tokens, dtype = SHAPES[which]
    random = torch.Generator(DEVICE).manual_seed(0)
    with torch.device("meta"):
        llama = Llama(config).to(dtype).requires_grad_(False)
    for p in llama.to_empty(device=DEVICE).parameters():
        p.normal_(0, 0.02, generator=random) if p.ndim == 2 else p.fill_(1)
    network = icrl.QNetwork(llama, range(4), train.IA3(config).to(DEVICE))
    recipe = replace(train.PAPER, model="", batch=batch, tokens=tokens, lakes=9, episodes=100)
    return train.Run(Path(), recipe, network, TOKENIZER)


def batch_of(run: train.Run) -> icrl.Batch:
    """Slices; with IA3 one token in ten is an action, as in the paper's transcripts."""
    tokens, *others = next(train.collect(run, 0)).to(DEVICE)
    return icrl.Batch(tokens, *(x[:, ::5] if run.network.adapter else x for x in others))


def our_step(which: str = "", compiled: bool = False, bare: bool = False, **recipe):
    """The loop of train.py, but on one batch and without checkpoints."""
    run = run_of(which, **recipe)
    recipe = replace(run.recipe, steps=10**9, on_policy=0.5, collection_steps=10**9)
    batch = batch_of(run)
    q = run.network(batch.tokens, batch.positions).detach()[batch.mask] if which in SHAPES else None

    def collect(*_):
        for done in rounds(q):
            yield batch
            done.append(batch.tokens.numel())

    train.collect = collect
    if bare:
        hooks.register_optimizer_step_pre_hook(lambda *_: APART.append(-perf_counter()))
        hooks.register_optimizer_step_post_hook(lambda *_: APART.append(perf_counter()))
    args = argparse.Namespace(resume=None, compile=compiled, eval_every=10**9)
    train.train(run._replace(recipe=recipe), args)


def their_step(which: str):
    run = run_of(which)
    config = transformers.LlamaConfig(**run.network.llama.config.to_dict())
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(config)
    llama.load_state_dict(run.network.llama.state_dict(), assign=True)
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config).to(DEVICE)  # no weight
    model = peft.get_peft_model(llama, peft.IA3Config(**icrl.PEFT_CONFIG), "theta")
    model.add_adapter("phi", peft.IA3Config(**icrl.PEFT_CONFIG))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    named = dict(model.named_parameters())
    phi_of = {named[n]: named[n.replace("theta", "phi")] for n in named if "theta" in n}
    optimizer, batch = torch.optim.AdamW(phi_of, lr=1e-2, weight_decay=0.01), batch_of(run)

    def q_by(adapter: str) -> torch.Tensor:
        model.set_adapter(adapter)
        logits = model(batch.tokens, use_cache=False).logits  # (B, T, V)
        at = batch.positions[..., None].expand(-1, -1, logits.shape[-1])
        return logits.gather(1, at)[..., :4].float()

    for done in rounds(q_by("theta")[batch.mask]):
        optimizer.zero_grad()
        with torch.no_grad():
            q_phi = q_by("phi")
        q = q_by("theta")
        y = icrl.td_targets(q, q_phi, run.recipe.reward_scale * batch.rewards, batch.discounts)
        icrl.td_loss(q, batch.actions, y, batch.mask).backward()
        optimizer.step()
        for theta, phi in phi_of.items():
            phi.data.lerp_(theta.data, run.recipe.alpha)
        done.append(batch.tokens.numel())


def our_data():
    """The first and the last collection of the default recipe, weighted as in a whole training."""
    run = run_of("")
    last = run.recipe.steps // run.recipe.collection_steps - 1  # the last whole one
    for done in rounds():
        for number, share in {0: run.recipe.final_from, last: 1 - run.recipe.final_from}.items():
            begin = perf_counter()
            done += [share * batch.tokens.numel() for batch in train.collect(run, number)]
            APART.append((1 - share) * (perf_counter() - begin))


def our_playing(which: str = "", trials: int = 50):
    network = icrl.QNetwork(load_llama(PRETRAINED, device=DEVICE), TOKENIZER.action_tokens)
    recipe = train.Recipe(final_tokens=2048)  # that of PRETRAINED, as far as it matters here
    run = run_of(which) if which else train.Run(PRETRAINED, recipe, network, TOKENIZER)
    lakes = unseen_lakes(trials, (3, 5), 4)
    for done in rounds():
        done += [len(episode.actions) for trial in icrl.play(run, lakes, 0) for episode in trial]


def their_playing():
    rng, lakes = np.random.default_rng(0), unseen_lakes(50, (3, 5), 4)
    model = transformers.LlamaForCausalLM.from_pretrained(PRETRAINED).to(DEVICE)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.tokenizer)
    how = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    for lake, done in zip(cycle(lakes), rounds(seconds=5)):
        env = gymnasium.make("FrozenLake-v1", desc=list(lake.rows), is_slippery=False)
        text, how["past_key_values"] = "", transformers.DynamicCache()
        for episode in range(30):
            state, over = env.reset(seed=int(rng.integers(2**31)))[0], False
            text += f"{state} "
            while not over:
                tokens = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
                ids = model.generate(**tokens.to(DEVICE), **how)
                word = tokenizer.decode(ids[0, -1:])
                if word not in ACTIONS or rng.random() >= icrl.greedy_probability(episode):
                    word = ACTIONS[rng.integers(4)]
                state, reward, terminated, truncated, _ = env.step(ACTIONS.index(word))
                over = terminated or truncated
                text += f"{word} {state} " + "1.0 " * int(reward) + "... " * truncated
                done.append(1)
            text += "<|end_of_text|> "


def compare(title: str, sides: tuple[str, str], before: str | None = None, turns: int = 3):
    """Let two sides take turns, and print what they answer; the second one by `before`'s files."""
    pipes, answers, here = [], [], Path(__file__).resolve().parent
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL  # no progress bars, no warnings
    how = {"stdin": pipe, "stdout": pipe, "stderr": nothing, "text": True}
    with tempfile.TemporaryDirectory() as how["cwd"]:
        for side, checkout in zip(sides, (here.parent, before or here.parent)):
            how["env"] = os.environ | {"PYTHONPATH": f"{Path(checkout).resolve()}:{here}"}
            code = f"import benchmark; benchmark.{side}"
            pipes.append(subprocess.Popen([sys.executable, "-c", code], **how))
        apart = np.ptp([json.loads(pipe.stdout.readline()) for pipe in pipes], axis=0)
        for pipe in pipes * (1 + turns):
            print(file=pipe.stdin, flush=True)
            answers.append(json.loads(pipe.stdout.readline()))
        for pipe in pipes:
            pipe.communicate()
    rates, peaks = np.moveaxis(np.reshape(answers[2:], (turns, 2, 2)), 2, 0)
    ours, peers = middle = np.median(rates, axis=0)
    print(f"{title}: {ours / peers:.2f} times", flush=True)
    for row in zip(sides, middle, rates.min(0), rates.max(0), peaks.max(0)):
        print("    {:36} {:12,.0f} ({:,.0f} to {:,.0f}), peak {:,.0f} MiB".format(*row))
    if apart.size:
        print(f"    Q-values at most {apart.max():.1e} apart")
        assert apart.max() < (0.2 if "8B" in title else 1e-4)  # of 1.3: bfloat16, 32 layers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", metavar="FOLDER", help="an earlier checkout to compare with")
    before = parser.parse_args().before
    modules = torch, transformers, peft, gymnasium, np
    print(torch.get_num_threads(), "threads,", *(f"{m.__name__} {m.__version__}" for m in modules))
    for title, (ours, theirs) in COMPARISONS.items():
        if (before or theirs) and ("8B" in title) <= (DEVICE == "cuda"):
            compare(title, (ours, ours if before else theirs), before)
