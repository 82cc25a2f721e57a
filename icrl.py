"""In-context reinforcement learning, from transcript to tokens to Q-values to loss to play.

    python icrl.py [RUN]    walks from a lake to the loss, with a trained network's numbers

The *transcript* tau, as text, is all that happened to a player so far, over many episodes on one
lake; such a game is a *trial*. Trained to predict Q(tau, a) for many lakes and players, good and
bad, a network has to work out from tau which lake this is: the longer tau, the better it plays.
For training, 20 to 40 episodes of a lake form a *set*, in random order lest their places tell how
good their player was; late in training a trial that the network played itself is a set too. Sets of
different lakes fill *slices* of T tokens.

Sections 3 and 4 of the paper (arXiv 2501.14176); departures: the README's last table.
Shapes: B batch, T tokens, N action positions (or trials side by side), A actions, D model.
"""

import copy
import json
import math
import os
import sys
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as safetensors_of
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from frozen_lake import ACTIONS, MAX_STEPS, MAX_TILES, RandomPlayer, draw, random_lakes, roll_out
from frozen_lake import worlds
from ia3 import IA3, PEFT_CONFIG
from llama import KVCache, exit_in_one_sentence, load_llama, load_tensors, load_tokenizer, reading

SHIPPED = Path(__file__).resolve().parent / "results/general"


# ---- transcript to tokens
class Template(NamedTuple):
    """How an episode is written; `{}` is a tile number or an action word."""

    begin: str
    observation: str
    prompt: str  # may be empty; Q is read at the last token before an action
    action: str
    reward: str  # written if the reward is 1
    cut: str  # written if the step limit ended the episode
    end: str


def chat(begin, opening, closing, stop, end):
    """Writes "<|start_header_id|>action<|end_header_id|>left<|eot_id|>": ten tokens a step."""
    observation = f"{opening}observation{closing}{{}}{stop}"
    reward = f"{opening}reward{closing}1.0{stop}"
    cut = f"{opening}edit{closing}...{stop}"  # as in the notebook
    return Template(begin, observation, f"{opening}action{closing}", "{}" + stop, reward, cut, end)


HEADER = ("<|start_header_id|>", "<|end_header_id|>")
TEMPLATES = {  # by a marker: the first that the vocabulary has counts
    "<|eot_id|>": chat("<|begin_of_text|>", *HEADER, "<|eot_id|>", "<|end_of_text|>"),  # the paper
    "<|im_end|>": chat("", "<|im_start|>", "\n", "<|im_end|>\n", "<|endoftext|>"),  # ChatML
    "</s>": chat("<s>", "", "</s>", "</s>", "</s>"),  # Llama 2: no other marker
    "left": Template("", "{} ", "", "{} ", "1.0 ", "... ", "<|end_of_text|> "),  # two tokens a step
}


def compact_tokenizer() -> Tokenizer:
    """A token for each action, tile and so on: the small network's vocabulary of 107."""
    words = [*ACTIONS, "1.0", "...", "<|end_of_text|>", *map(str, range(MAX_TILES))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="..."))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


class Encoder:
    """Writes episodes as lists of pieces of text, each tokenized once."""

    def __init__(self, tokenizer, vocab_size):
        """Takes the first of TEMPLATES that fits the tokenizer and so many rows of an embedding."""
        self.tokenizer = tokenizer
        problem = f"has none of the markers {', '.join(TEMPLATES)}"
        for marker, template in TEMPLATES.items():
            if tokenizer.token_to_id(marker) is not None and problem:
                problem = self._problem(template, vocab_size)
        if problem:
            raise ValueError(f"The tokenizer {problem}: take another model.")

    def _problem(self, template, vocab_size):
        """Prepare for this template; returns why it does not fit, or None."""
        self.template, tokenizer = template, self.tokenizer
        begin, observation, prompt, action, reward, cut, end = self.template
        self.tiles = [observation.format(tile) for tile in range(MAX_TILES)]
        self.actions = [action.format(word) for word in ACTIONS]
        pieces = [begin, prompt, reward, cut, end, *self.actions, *self.tiles]
        self.ids = {p: tokenizer.encode(p, add_special_tokens=False).ids for p in pieces}
        self.action_tokens = [self.ids[piece][0] for piece in self.actions]
        if max(chain(*self.ids.values())) >= vocab_size:
            return f"has tokens beyond the network's {vocab_size}"
        if len(set(self.action_tokens)) < len(ACTIONS):
            return "lets two action words begin with the same token"
        whole = []  # every piece beside all that it can stand beside
        for tile in self.tiles:
            whole += [begin, tile]
            for action in self.actions:
                whole += [prompt, action, tile]
            whole += [reward, end, begin, tile, cut, end, begin, tile, end]
        if tokenizer.encode("".join(whole), add_special_tokens=False).ids != self.tokens(whole):
            return "joins pieces of a transcript"
        return None

    def longest(self):
        """The most tokens of an opening and of a step that neither pays nor ends the episode."""
        begin, _, prompt, *_ = (len(self.ids.get(piece, ())) for piece in self.template)
        tile, action = (max(len(self.ids[p]) for p in ps) for ps in (self.tiles, self.actions))
        return begin + tile + prompt, action + tile + prompt

    def opening(self, tile):
        return [self.template.begin, self.tiles[tile], self.template.prompt]

    def step(self, action, tile, reward, cut, over):
        """What is written of a step, up to the next prompt or the episode's end."""
        if reward not in (0, 1):
            raise ValueError(f"A transcript tells rewards of 1 and 0 only, not {reward}.")
        rewarded = [self.template.reward] if reward > 0 else []
        limited = [self.template.cut] if cut else []
        last = self.template.end if over else self.template.prompt
        return [self.actions[action], self.tiles[tile], *rewarded, *limited, last]

    def write(self, episode):
        pieces, last = self.opening(episode.observations[0]), len(episode.actions) - 1
        for i, action in enumerate(episode.actions):
            tile, reward = episode.observations[i + 1], episode.rewards[i]
            pieces += self.step(action, tile, reward, i == last and episode.truncated, i == last)
        return pieces

    def tokens(self, pieces):
        return [token for piece in pieces for token in self.ids[piece]]


# ---- tokens to slices
class Batch(NamedTuple):
    """Slices and what the loss needs of them, padded at the right to N actions."""

    tokens: Tensor  # (B, T) int64
    positions: Tensor  # (B, N) int64, where Q is read
    actions: Tensor  # (B, N) int64
    rewards: Tensor  # (B, N) r_{t+1}
    discounts: Tensor  # (B, N) gamma, or 0 at an episode's end
    mask: Tensor  # (B, N) bool, what counts in the loss

    def to(self, device):
        return Batch(*(column.to(device) for column in self))

    def split(self, size):
        return [Batch(*parts) for parts in zip(*(column.split(size) for column in self))]


QUALITY = {"high": 5.0, "mid": 1.0, "low": 0.2}  # weights of a success; a failure has 1


def draw_set(episodes, rng, quality="mid"):
    """20 to 40 episodes of one lake, weighted as in figure 6, in random order."""
    weights = np.array([QUALITY[quality] if e.total > 0 else 1.0 for e in episodes])
    size = min(rng.integers(20, 41), len(episodes))
    drawn = rng.choice(len(episodes), size, replace=False, p=weights / weights.sum())
    return [episodes[i] for i in rng.permutation(drawn)]  # `choice` draws likely ones first


def encode_slice(encoder, sets, length, gamma) -> Batch:
    """The next sets of episodes as exactly `length` tokens; a Batch without the B.

    Sets of different lakes follow each other without a separator: the network has to notice. What
    is left of a set at the slice's end is dropped, and the next slice begins with the next.
    """
    tokens, positions, actions, rewards, discounts = [], [], [], [], []
    for episode in chain.from_iterable(sets):
        for piece in encoder.write(episode):
            if piece in encoder.actions:
                positions.append(len(tokens) - 1)  # Q is read at the token before the action word
            tokens += encoder.ids[piece]
        actions += episode.actions.tolist()
        rewards += episode.rewards.tolist()
        # An episode's last action has y = r alone, as in the paper even at the step limit: what
        # follows is another episode. (TabularQ does take the value of the tile reached.)
        discounts += [gamma] * (len(episode.actions) - 1) + [0.0]
        if len(tokens) >= length:
            break
    n = sum(position < length for position in positions)
    # The last action's target is beyond the slice: no loss, unless an episode ends (y = r).
    mask = [True] * (n - 1) + [discounts[n - 1] == 0]
    columns = (tokens[:length], positions[:n], actions[:n], rewards[:n], discounts[:n], mask)
    return Batch(*map(torch.tensor, columns))


def collate(slices):
    return Batch(*(pad_sequence(column, batch_first=True) for column in zip(*slices)))


# ---- the network
class QNetwork(nn.Module):
    """Q_theta(tau, a): a Llama's logits of the action words, perhaps with IA3."""

    def __init__(self, llama, action_tokens, adapter=None):
        super().__init__()
        self.llama, self.adapter = llama, adapter
        ids = torch.tensor(action_tokens, device=llama.unembedding.device)  # (A,)
        self.register_buffer("action_tokens", ids, persistent=False)  # moves with the weights
        llama.requires_grad_(adapter is None)  # an adapter is trained on a frozen base

    def forward(self, tokens: Tensor, positions: Tensor, cache=None) -> Tensor:
        """Q-values (B, N, A), float32, at positions (B, N) of tokens (B, T)."""
        hidden = self.llama(tokens, self.adapter, cache)  # (B, T, D)
        read = hidden.take_along_dim(positions[..., None], 1)  # (B, N, D)
        return F.linear(read.float(), self.llama.unembedding[self.action_tokens].float())

    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer changes: an adapter's vectors, or else every weight."""
        return dict((self.adapter or self.llama).named_parameters())

    def delayed_copy(self):
        """The network phi: a copy of what is trained; what is frozen is shared."""
        llama = self.llama if self.adapter else copy.deepcopy(self.llama)
        return QNetwork(llama, self.action_tokens.tolist(), copy.deepcopy(self.adapter))


# ---- learning
@torch.no_grad()
def td_targets(q_online: Tensor, q_delayed: Tensor, rewards: Tensor, discounts: Tensor) -> Tensor:
    """Equations 4 and 6: y = r_{t+1} + gamma * Q_phi(tau_{t+1}, argmax_a Q_theta(tau_{t+1}, a))

    q_online, q_delayed (B, N, A); rewards, discounts (B, N); returns (B, N), without a gradient.
    Position t + 1 follows t, so one pass of each network gives the values of all.
    """
    best = q_online.argmax(-1, keepdim=True)  # chosen by theta ...
    value = q_delayed.gather(-1, best).squeeze(-1)  # ... valued by phi (B, N)
    return rewards + discounts * F.pad(value[:, 1:], (0, 1))


def td_loss(q_online: Tensor, actions: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Equation 7: L = E[(y - Q_theta(tau_t, a_t))^2] over the action positions in `mask`

    q_online (B, N, A); actions, targets, mask (B, N); returns a scalar.
    """
    error = targets - q_online.gather(-1, actions[..., None]).squeeze(-1)  # (B, N)
    return error[mask].square().mean()


@torch.no_grad()
def polyak_update(online, delayed, alpha):
    """Equation 8: phi <- alpha * theta + (1 - alpha) * phi"""
    for phi, theta in zip(delayed.trained().values(), online.trained().values()):
        phi.lerp_(theta, alpha)


# ---- playing
CHUNK = 32  # most tokens that a row has when all rows are read together
KEPT = 0.75  # at most so much of a full context stays when episodes are forgotten


def model_probability(episode):
    """The chance that the player and not a coin chooses: 0, 0, 0.1, 0.1, ... 0.9, then 1 (4.2).

    The paper forces the coin, lest a player that maximises Q never find a goal.
    """
    return np.minimum(episode // 2 / 10, 1.0)


class InContext:
    """The network of a Run as a player of `roll_out`: its transcript is all that it remembers.

    Each trial has a context of its own, which may begin with `given` episodes, [trial][episode].
    One that would outgrow `recipe.context` loses its oldest episodes, and the rest is read anew. In
    episode e the network chooses with the chance `probability(e)`, arrays (N,), else a coin.
    """

    def __init__(self, run, env, rng, probability=model_probability, given=None):
        self.network, self.encoder = run.network, run.encoder
        self.rng, self.probability, self.context = rng, probability, run.recipe.context
        check_context(run.encoder, self.context, env.max_steps)
        self.written = []  # tokens by trial and episode
        for episodes in given or [[]] * len(env):
            self.written.append([run.encoder.tokens(run.encoder.write(e)) for e in episodes])
        self.unread = [list(chain(*trial)) for trial in self.written]  # tokens by trial
        self.playing = np.ones(len(env), bool)  # (N,) whether the trial went on in the last step
        self.begins = np.ones(len(env), bool)  # (N,) whether an episode begins
        self.q = np.zeros((len(env), len(ACTIONS)), np.float32)  # (N, A) read last
        self.trial = env.row  # (rows,) the trial of each row of the cache
        self.cache = KVCache(run.network.llama, len(env), self.context + CHUNK)  # for padding

    @torch.inference_mode()
    def act(self, state, episode):
        for i in np.flatnonzero(self.begins):
            self.written[i].append([])
            self._write(i, self.encoder.opening(state[i]))
        going_on = [row for row, i in enumerate(self.trial) if self.playing[i]]
        if 2 * len(going_on) <= len(self.trial):  # half are over: their rows are dropped
            self.trial, self.cache = self.trial[going_on], self.cache[going_on]
        for row, i in enumerate(self.trial):
            if sum(map(len, self.written[i])) > self.context:  # forget the oldest episodes
                while sum(map(len, self.written[i])) > KEPT * self.context:
                    self.written[i].pop(0)  # never the present one: see check_context
                self.unread[i] = list(chain(*self.written[i]))
                self.cache.lengths[row] = 0
            if len(self.unread[i]) > CHUNK:  # by itself, lest the others be padded to it
                self._read(slice(row, row + 1))
        self._read(slice(None))  # together, each padded to the longest
        self.by_model = self.rng.random(len(state)) < self.probability(episode)
        by_coin = self.rng.integers(0, len(ACTIONS), len(state))
        return np.where(self.by_model, self.q.argmax(1), by_coin)

    def learn(self, step):
        over = step.terminated | step.truncated
        columns = (step.action, step.successor, step.reward, step.truncated, over)
        for i in np.flatnonzero(step.playing):
            self._write(i, self.encoder.step(*(column[i] for column in columns)))
        self.playing = step.playing
        self.begins = over & step.playing  # and once more after the last episode, in vain

    def _write(self, i, pieces):
        tokens = self.encoder.tokens(pieces)
        self.written[i][-1] += tokens
        self.unread[i] += tokens

    def _read(self, rows):
        """Let the network read on in some rows, a slice of them; note the last Q-values."""
        trials, cache, device = self.trial[rows], self.cache[rows], self.cache.lengths.device
        unread = [torch.tensor(self.unread[i], dtype=torch.long) for i in trials]
        counts = torch.tensor(list(map(len, unread)), device=device)  # (rows,)
        if not counts.any():
            return
        chunk = pad_sequence(unread, batch_first=True).to(device)  # (rows, T)
        last = (counts - 1).clamp(min=0)[:, None]  # (rows, 1)
        q = self.network(chunk, last, cache)[:, 0].cpu().numpy()  # (rows, A)
        self.cache.lengths[rows] += counts
        for i, values in zip(trials, q):
            if self.unread[i]:
                self.q[i], self.unread[i] = values, []


def check_context(encoder, context, max_steps):
    """ValueError if one episode alone may outgrow the KEPT share of so many tokens."""
    _, step = encoder.longest()
    longest = (max_steps + 3) * step  # tokens; opening, reward and end are less than 3 steps
    if (needed := math.ceil(longest / KEPT)) > context:
        few = f"{context} tokens of context are too few for episodes of {max_steps} steps"
        raise ValueError(f"{few}: ask for {needed}, or for fewer --max-steps.")


def check_base(recipe, config):
    """ValueError if slices or a context are longer than a base knows."""
    longest, known = max(recipe.tokens, recipe.context), config.max_position_embeddings
    if longest > known:
        raise ValueError(
            f"{recipe.model} knows contexts of {known} tokens: {longest} are too many."
        )


def play(run, lakes, seed, episodes=30, first=0, given=None, probability=model_probability, **kind):
    """One trial a lake, as InContext, roll_out and `worlds` say; the episodes, [trial][episode]."""
    rng, played, llama = np.random.default_rng(seed), [], run.network.llama
    one = KVCache(llama, 1, run.recipe.context + CHUNK).keys.nbytes
    at_once = max(1, llama.free_bytes // (4 * one))  # keys, values, copies, some air
    for start in range(0, len(lakes), at_once):
        part = slice(start, start + at_once)
        env = worlds(lakes[part], rng, run.recipe.max_steps, **kind)
        player = InContext(run, env, rng, probability, given and given[part])
        played += roll_out(env, player, episodes, first=first)
    return played


# ---- what a run is
def flag(default, text, low=None, high=math.inf, choices=()):
    """A field of Recipe, with help, bounds and choices."""
    return field(default=default, metadata={"help": text, "limits": (low, high, choices)})


@dataclass(frozen=True)
class Recipe:
    """A run, but for the machine. Defaults: the small network's; train.PAPER: the paper's."""

    model: str = flag("", "base to adapt by IA3: a folder or a Hub repository")
    revision: str = flag("", "the Hub repository's branch, tag or commit")
    dtype: str = flag("float32", "of the base", choices=["float32", "bfloat16", "float16"])
    layers: int = flag(2, "layers of a new network", 1)
    width: int = flag(64, "model dimension of a new network", 1)
    heads: int = flag(2, "attention heads of a new network", 1)
    # the data come in collections, games on new lakes, each for `collection_steps` optimizer steps
    min_side: int = flag(3, "fewest tiles a side", 2, 10)
    max_side: int = flag(5, "most tiles a side", 2, 10)
    min_hops: int = flag(4, "fewest steps from a start to a goal")
    easy_until: float = flag(0.4, "share of training over which easy lakes disappear", 0, 1)
    lakes: int = flag(256, "lakes in a collection", 1)
    episodes: int = flag(100, "episodes of Q-learning on each lake", 1)
    collection_steps: int = flag(192, "steps before the next collection", 1)
    late_from: float = flag(0.6, "share of training after which data are late", 0, 1)
    own: float = flag(0.5, "share of late sets that are the network's own trials", 0, 1)
    hard: float = flag(0.3, "share of late lakes that are large, goals 3 hops farther", 0, 1)
    shuffled: float = flag(0.0, "share of lakes with numbers and words of their own", 0, 1)
    windows: float = flag(0.0, "share of other late lakes numbered as in a larger map", 0, 1)
    slippery: float = flag(0.0, "share of lakes on slippery ice", 0, 1)
    quality: str = flag("mid", "high: successes are drawn oftener", choices=list(QUALITY))
    max_steps: int = flag(MAX_STEPS, "steps after which an episode is cut off", 1)
    # the optimisation
    steps: int = flag(8400, "optimizer steps", 1)
    tokens: int = flag(512, "tokens in a slice", 64)
    late_tokens: int = flag(1024, "tokens in a late slice, and at play; 0: as in others", 0)
    batch: int = flag(4, "slices in a batch; late: about as many tokens", 1)
    gamma: float = flag(0.9, "discount", 0, 1)
    reward_scale: float = flag(1.0, "of the rewards; 30 suits an official Llama's logits", 0)
    alpha: float = flag(0.1, "share of theta in each Polyak step (eq. 8)", 0, 1)
    learning_rate: float = flag(0.01, "AdamW's", 0)
    muon_rate: float = flag(0.01, "Muon's, for the layers' matrices; 0: AdamW for all", 0)
    warm_up: int = flag(50, "steps over which the rates rise", 1)
    decay_from: float = flag(0.2, "share of training after which they fall", 0, 1)
    clip: float = flag(1.0, "largest gradient norm; 0: any", 0)
    seed: int = flag(0, "of weights and data", 0, 2**32 - 1)

    @property
    def sides(self):
        return self.min_side, self.max_side

    @property
    def context(self):
        """Tokens that it looks back on in the end, and at play."""
        return self.late_tokens or self.tokens

    def __post_init__(self):
        for f in fields(self):
            value, needed = getattr(self, f.name), ""
            (low, high, choices), wanted = f.metadata["limits"], type(f.default)
            if type(value) is not wanted and (type(value), wanted) != (int, float):  # 1 is 1.0
                needed = f"like {f.default!r}"
            elif low is not None and not (low <= value <= high and value < math.inf):
                needed = f"in {low} to {high}"
            elif choices and value not in choices:
                needed = f"one of {', '.join(choices)}"
            if needed:
                raise ValueError(f"--{f.name.replace('_', '-')} has to be {needed}, not {value!r}.")


Run = namedtuple("Run", "folder recipe network encoder")


@contextmanager
def replacing(path):
    """Write to the yielded name; if all goes well it becomes `path` in one step."""
    new = path.with_name(f"tmp.{os.getpid()}.{path.name}")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def save(path, content):
    """Tensors by name as safetensors, anything else as JSON."""
    with replacing(path) as new:
        if path.suffix == ".safetensors":
            new.write_bytes(safetensors_of(content, {"format": "pt"}))
        else:
            new.write_text(json.dumps(content, indent=2) + "\n")


def save_network(run):
    """What was trained: every weight, or else PEFT's two files."""
    if not run.network.adapter:
        return save(run.folder / "model.safetensors", run.network.llama.state_dict())
    save(run.folder / "adapter_model.safetensors", run.network.adapter.to_peft())
    base = {"base_model_name_or_path": run.recipe.model, "inference_mode": True}
    base["revision"] = run.recipe.revision or None
    save(run.folder / "adapter_config.json", PEFT_CONFIG | base)


def read_recipe(folder) -> Recipe | None:
    """The recipe of a run; None for any other checkpoint."""
    if not (folder / "recipe.json").exists():
        with reading(folder / "config.json") as path:
            if "icrl" in json.loads(path.read_text()):
                raise ValueError("it was made by an older version of train.py: train it anew")
        return None
    with reading(folder / "recipe.json") as path:
        settings = json.loads(path.read_text())
        if settings.keys() != {f.name for f in fields(Recipe)}:
            raise ValueError("it was made by another version of train.py: train it anew")
        return Recipe(**settings)


def load_run(folder: str | Path, device="cpu", context=None) -> Run:
    """The run of train.py in a folder, perhaps with another context at play; or a ValueError."""
    folder = Path(folder)
    if (recipe := read_recipe(folder)) is None:
        raise ValueError(f"{folder} is no run of train.py: it has no recipe.json.")
    recipe = replace(recipe, late_tokens=context or recipe.late_tokens)
    dtype = getattr(torch, recipe.dtype)
    if recipe.model:
        llama = load_llama(recipe.model, dtype, device, recipe.revision)
        check_base(recipe, llama.config)
        adapter = IA3(llama.config).to(device)
        adapter.from_peft(load_tensors(folder / "adapter_model.safetensors"))
    else:  # copied: kernels may round otherwise in a file's memory, which is not aligned
        llama, adapter = copy.deepcopy(load_llama(folder, dtype, device)), None
    encoder = Encoder(load_tokenizer(folder), llama.config.vocab_size)
    return Run(folder, recipe, QNetwork(llama, encoder.action_tokens, adapter), encoder)


@torch.no_grad()
def main(folder=SHIPPED):
    """A failure and a success of a random player, from the lake to the loss."""
    run, rng = load_run(folder), np.random.default_rng(1)
    encoder, lakes = run.encoder, random_lakes(1, rng, min_hops=3, test=True)
    env = worlds(lakes, rng)
    (played,) = roll_out(env, RandomPlayer(env, rng), 100)
    failure = next(e for e in played if e.total == 0 and len(e.actions) < 4)
    success = next(e for e in played if e.total > 0 and len(e.actions) < 6)
    pieces = encoder.write(success)
    print(f"A lake, and an episode on it:\n\n{draw(lakes[0], success.observations)}\n")
    print(f"As text: {''.join(pieces)}\nAs tokens: {encoder.tokens(pieces)}\n")
    print("A slice of a failure, this success and, once more, this success:\n")
    episodes = [failure, success, success]
    length = len(encoder.tokens(chain(*map(encoder.write, episodes))))
    batch = collate([encode_slice(encoder, [episodes], length, run.recipe.gamma)])
    q = run.network(batch.tokens, batch.positions)  # (1, N, A)
    batch = batch._replace(rewards=run.recipe.reward_scale * batch.rewards)
    y = td_targets(q, q, batch.rewards, batch.discounts)  # (1, N); here phi is theta
    names = [f"Q({word})" for word in ACTIONS] + "action reward discount target error".split()
    print("  at  tile" + "".join(f"{name:>10}" for name in names))
    tiles = chain(*(episode.observations[:-1] for episode in episodes))
    columns = (tiles, q[0], y[0], *(column[0] for column in batch[1:5]))
    for tile, values, target, position, action, reward, discount in zip(*columns):
        cells = "".join(f"{value:10.3f}" for value in values)
        cells += f"{ACTIONS[action]:>10}{reward:10.0f}{discount:10.1f}{target:10.3f}"
        print(f"{position:4}{tile:6}{cells}{target - values[action]:10.3f}")
    loss = td_loss(q, batch.actions, y, batch.mask)
    print(f"\nThe loss is the mean of the squared errors: {loss:.5f}")


if __name__ == "__main__":
    with exit_in_one_sentence():
        main(*sys.argv[1:2])
