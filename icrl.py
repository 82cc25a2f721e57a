"""In-context reinforcement learning: the idea, from transcript to tokens to Q-values to loss to play.

What is here, in the order in which data flows
    Template, Encoder       an episode becomes text, and the text token ids (section 4.1)
    Batch, slices           episodes of many lakes, shuffled, become training sequences of T tokens (section 4.1, figure 6)
    QNetwork                a Llama read as Q(tau, a): the logits of the action words before the action (section 3)
    td_targets, td_loss     equations 4, 6 and 7: Double DQN at the action tokens
    polyak_update           equation 8: the delayed network follows the online one
    InContext, play         the network as a player: one growing context a trial, no weight changes (section 4.2)
    save_network, load_run  a run's folder

Departures from the paper: the argmax is over the action words, not the whole vocabulary; COMPACT_TEMPLATE leaves out the role
headers, for the small embedded model; the last action of a slice is left out of the loss, unless its episode ends with it; a
context that is full forgets its oldest episodes.

Shapes: B batch, T tokens, N action positions, A actions; N is also the number of trials that are played side by side.
"""

import copy
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm

from frozen_lake import ACTIONS, MAX_STEPS, Episode, FrozenLake, Lake, Step, roll_out
from ia3 import IA3, replacing
from llama import KVCache, Llama, free_memory, load_llama, load_tokenizer


# ------------------------------------------------------------------------------------------------- transcript to tokens
@dataclass(frozen=True)
class Template:
    """How an episode is written. `{}` stands for the tile number, the action word or the reward."""

    name: str
    begin: str  # before the first observation
    observation: str
    prompt: str  # before an action word; Q-values are read at the last token before the word
    action: str
    reward: str  # written only if the reward is not zero
    cut: str  # written if the step limit ended the episode
    end: str


LLAMA_TEMPLATE = Template(  # the paper's (its notebook), about ten tokens a step
    name="Llama 3's markers",
    begin="<|begin_of_text|>",
    observation="<|start_header_id|>observation<|end_header_id|>{}<|eot_id|>",
    prompt="<|start_header_id|>action<|end_header_id|>",
    action="{}<|eot_id|>",
    reward="<|start_header_id|>reward<|end_header_id|>{}<|eot_id|>",
    cut="<|start_header_id|>edit<|end_header_id|>...<|eot_id|>",
    end="<|end_of_text|>",
)
CHATML_TEMPLATE = Template(
    name="ChatML's markers",
    begin="",
    observation="<|im_start|>observation\n{}<|im_end|>\n",
    prompt="<|im_start|>action\n",
    action="{}<|im_end|>\n",
    reward="<|im_start|>reward\n{}<|im_end|>\n",
    cut="<|im_start|>edit\n...<|im_end|>\n",
    end="<|endoftext|>",
)
SENTENCE_TEMPLATE = Template(  # for tokenizers with no other markers than these two
    name="<s> and </s>",
    begin="<s>",
    observation="observation</s>{}</s>",
    prompt="action</s>",
    action="{}</s>",
    reward="reward</s>{}</s>",
    cut="edit</s>...</s>",
    end="</s>",
)
COMPACT_TEMPLATE = Template("two tokens a step", "", "{} ", "", "{} ", "{} ", "... ", "<|end_of_text|> ")
MAX_TILES = 100  # a lake has at most 10 x 10


def choose_template(tokenizer: Tokenizer) -> Template:
    """The first template whose markers the vocabulary has. Raises ValueError if it has none's."""
    for template in (LLAMA_TEMPLATE, CHATML_TEMPLATE, SENTENCE_TEMPLATE, COMPACT_TEMPLATE):
        markers = re.findall(r"<[^<> ]+>", "".join(astuple(template)[1:]))
        if all(tokenizer.token_to_id(marker) is not None for marker in markers):
            return template
    raise ValueError("This tokenizer has neither the markers of Llama 3 nor ChatML's, nor <s> and </s>: take another model.")


def compact_tokenizer() -> Tokenizer:
    """One token for each tile number, action, reward, cut and end: the embedded model's vocabulary of 107."""
    words = [*ACTIONS, "1.0", "...", "<|end_of_text|>", *map(str, range(MAX_TILES))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="..."))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


# A transcript is a sequence of messages; each kind has a number. Action a is ACTION + a, tile s is OBSERVATION + s.
NOTHING, BEGIN, PROMPT, REWARD, CUT, END, ACTION = range(7)
OBSERVATION = ACTION + len(ACTIONS)


def step_messages(action: np.ndarray, successor: np.ndarray, reward: np.ndarray, cut: np.ndarray, over: np.ndarray) -> np.ndarray:
    """What a transcript says of each of n steps, but for the prompt before it: (n, 5) messages from five arrays (n,)."""
    marks = ((reward > 0, REWARD), (cut, CUT), (over, END))
    return np.column_stack((ACTION + action, OBSERVATION + successor, *(np.where(true, m, NOTHING) for true, m in marks)))


class Encoder:
    """Turns messages into tokens by table: each message was tokenized once, a transcript is their concatenation.

    Raises ValueError if an action word is not a single token, or if the tokenizer, given a whole transcript, would not cut
    it where its messages end.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template | None = None):
        self.tokenizer, self.template = tokenizer, template or choose_template(tokenizer)
        t = self.template
        self.texts = ["", t.begin, t.prompt, t.reward.format(1.0), t.cut, t.end]
        self.texts += [t.action.format(a) for a in ACTIONS] + [t.observation.format(s) for s in range(MAX_TILES)]
        pieces = [tokenizer.encode(text, add_special_tokens=False).ids for text in self.texts]
        self.lengths = np.array([len(piece) for piece in pieces])  # (M,)
        self.table = np.zeros((len(pieces), self.lengths.max()), np.int64)  # (M, longest)
        for i, piece in enumerate(pieces):
            self.table[i, : len(piece)] = piece
        self.action_tokens = self.table[ACTION : ACTION + len(ACTIONS), 0]  # (A,)
        for word, token in zip(ACTIONS, self.action_tokens):
            if tokenizer.encode(word, add_special_tokens=False).ids != [token]:
                raise ValueError(f"The action word {word!r} is not a single token of this tokenizer: take another model.")
        parts = (self.lengths[PROMPT : PROMPT + 1], self.lengths[ACTION:OBSERVATION], self.lengths[OBSERVATION:])
        self.step_lengths = sum(p.min() for p in parts), sum(p.max() for p in parts)  # fewest and most tokens of a step
        self._check_joints()

    def _check_joints(self) -> None:
        """Tokenize every message beside every other that it can stand beside, and compare with the table."""
        messages = []
        for tile in range(OBSERVATION, len(self.texts)):
            steps = [m for action in range(ACTION, OBSERVATION) for m in (PROMPT, action, tile)]
            messages += [BEGIN, tile, *steps, REWARD, END, BEGIN, tile, CUT, END, BEGIN, tile, END]
        text = "".join(self.texts[m] for m in messages)
        if self.tokenizer.encode(text, add_special_tokens=False).ids != self.join(np.array([messages]))[0][0].tolist():
            raise ValueError("This tokenizer does not cut a transcript where its messages end: take another model.")

    def messages(self, episode: Episode) -> np.ndarray:
        """The message numbers of an episode, in order, some of them NOTHING."""
        tiles, over = episode.observations, np.arange(len(episode.actions)) == len(episode.actions) - 1
        steps = step_messages(episode.actions, tiles[1:], episode.rewards, over & episode.truncated, over)
        prompts = np.full(len(steps), PROMPT)
        return np.concatenate(([BEGIN, OBSERVATION + tiles[0]], np.column_stack((prompts, steps)).ravel()))

    def join(self, messages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Concatenate each row's messages (R, M): tokens (R, longest row), padded at the right, and their counts (R,)."""
        valid = np.arange(self.table.shape[1]) < self.lengths[messages][..., None]  # (R, M, longest message)
        valid, tokens = valid.reshape(len(messages), -1), self.table[messages].reshape(len(messages), -1)
        counts = valid.sum(1)
        order = np.argsort(~valid, axis=1, kind="stable")[:, : counts.max()]
        return np.take_along_axis(tokens, order, axis=1), counts

    def text(self, episode: Episode) -> str:
        """The episode as the model's text."""
        return "".join(self.texts[m] for m in self.messages(episode))


# ---------------------------------------------------------------------------------------------------- tokens to slices
class Batch(NamedTuple):
    """Slices and what the loss needs of them; action positions are padded at the right to the longest row.

    tokens (B, T) int64. positions (B, N) int64: where the Q-values of an action are read. actions (B, N) int64. rewards
    (B, N): r_{t+1}. discounts (B, N): what the value of the next action position counts, 0 at an episode's end. mask (B, N)
    bool: False for padding, and for a slice's last position, whose target would need the next one, unless its episode ends.
    """

    tokens: Tensor
    positions: Tensor
    actions: Tensor
    rewards: Tensor
    discounts: Tensor
    mask: Tensor

    def to(self, device) -> "Batch":
        return Batch(*(field.to(device) for field in self))

    def every(self, step: int, first: int) -> "Batch":
        """The slices `first`, `first` + `step`, ..."""
        return Batch(*(field[first::step] for field in self))

    def split(self, size: int) -> list["Batch"]:
        """Parts of at most `size` slices."""
        return [Batch(*parts) for parts in zip(*(field.split(size) for field in self))]


def encode_slice(encoder: Encoder, sets: Iterator[list[Episode]], length: int, gamma: float, gamma_episode: float = 0.0) -> Batch:
    """Concatenate sets of episodes to one slice of exactly `length` tokens, cut off at its end; a Batch with B = 1.

    An episode's last action has y = r alone, as in the paper. (With gamma_episode > 0 it also counts, so discounted, the
    value of the next episode of its set, which lets exploration pay; section 4.6 of the paper proposes it.)
    """
    messages, rewards, discounts, total = [], [], [], 0
    while total < length:
        episodes = next(sets)
        for i, episode in enumerate(episodes):
            new = encoder.messages(episode)
            messages.append(new)
            total += int(encoder.lengths[new].sum())
            rewards.append(episode.rewards)
            discount = np.full(len(episode.actions), gamma, np.float32)
            discount[-1] = gamma_episode if i + 1 < len(episodes) else 0.0
            discounts.append(discount)
            if total >= length:
                break
    messages, rewards, discounts = map(np.concatenate, (messages, rewards, discounts))
    ends = np.cumsum(encoder.lengths[messages])
    is_action = (messages >= ACTION) & (messages < OBSERVATION)
    positions = ends[is_action] - encoder.lengths[messages[is_action]] - 1  # the token before the action word
    kept = int((positions < length).sum())
    mask = np.ones(kept, bool)
    mask[-1] = discounts[kept - 1] == 0  # the last position only gives the one before it its next value, unless none follows
    tokens = encoder.join(messages[None])[0][:, :length]
    actions = messages[is_action] - ACTION
    arrays = (tokens, *(x[None, :kept] for x in (positions, actions, rewards, discounts, mask)))
    return Batch(*map(torch.from_numpy, arrays))


def collate(slices: Sequence[Batch]) -> Batch:
    """Stack slices, padding their action positions at the right."""
    longest = max(s.positions.shape[1] for s in slices)
    tokens, *rest = zip(*slices)
    return Batch(torch.cat(tokens), *(torch.cat([F.pad(x, (0, longest - x.shape[1])) for x in column]) for column in rest))


QUALITY = {"high": (5.0, 1.0), "mid": (1.0, 1.0), "low": (1.0, 5.0)}  # weights of successful, unsuccessful episodes


def draw_set(episodes: Sequence[Episode], rng: np.random.Generator, quality: str = "mid") -> list[Episode]:
    """20 to 40 episodes of one lake, drawn without replacement by the weights of figure 6, in random order."""
    success, failure = QUALITY[quality]
    weights = np.array([success if e.total > 0 else failure for e in episodes])
    size = min(int(rng.integers(20, 41)), len(episodes))
    drawn = rng.choice(len(episodes), size, replace=False, p=weights / weights.sum(), shuffle=True)
    return [episodes[i] for i in drawn]


# --------------------------------------------------------------------------------------------------------- the network
class QNetwork(nn.Module):
    """Q_theta(tau, a): a Llama, optionally with an adapter, of which only the logits of the action words are used."""

    def __init__(self, llama: Llama, action_tokens: Sequence[int], adapter: IA3 | None = None):
        super().__init__()
        self.llama, self.adapter = llama, adapter
        self.register_buffer("action_tokens", torch.as_tensor(action_tokens), persistent=False)
        llama.requires_grad_(adapter is None)  # an adapter is trained on a frozen base
        if adapter is not None:
            adapter.check_fits(llama.config)
            self.register_buffer("action_rows", llama.vocabulary[self.action_tokens].float(), persistent=False)  # (A, D)

    def forward(self, tokens: Tensor, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        """Q-values (B, N, A), float32, at the given positions (B, N) of tokens (B, T)."""
        hidden = self.llama(tokens, self.adapter, cache, positions)  # (B, N, D)
        rows = self.llama.vocabulary[self.action_tokens].float() if self.adapter is None else self.action_rows
        return F.linear(hidden.float(), rows)

    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer changes: the adapter's vectors, or without an adapter every weight."""
        return dict((self.llama if self.adapter is None else self.adapter).named_parameters())

    def delayed_copy(self) -> "QNetwork":
        """The network phi: copies what is trained and shares what is frozen."""
        llama = copy.deepcopy(self.llama) if self.adapter is None else self.llama
        delayed = QNetwork(llama, self.action_tokens, copy.deepcopy(self.adapter))
        for parameter in delayed.trained().values():
            parameter.requires_grad_(False)
        return delayed


# ------------------------------------------------------------------------------------------------------------ learning
def td_targets(q_online: Tensor, q_delayed: Tensor, rewards: Tensor, discounts: Tensor) -> Tensor:
    """y = r_{t+1} + gamma * Q_phi(tau_{t+1}, argmax_a Q_theta(tau_{t+1}, a))                           (equations 4 and 6)

    q_online, q_delayed (B, N, A); rewards, discounts (B, N); returns (B, N), without a gradient. The next action position
    of t is t + 1, so the values of all positions come from the same two passes.
    """
    with torch.no_grad():
        best = q_online.argmax(-1, keepdim=True)  # chosen by theta ...
        value = q_delayed.gather(-1, best).squeeze(-1)  # ... valued by phi (B, N)
        return rewards + discounts * F.pad(value[:, 1:], (0, 1))


def td_loss(q_online: Tensor, actions: Tensor, targets: Tensor, mask: Tensor, normalised: bool = False) -> Tensor:
    """L = E[(y - Q_theta(tau_t, a_t))^2] over the action positions in `mask`                                  (equation 7)

    q_online (B, N, A); actions, targets, mask (B, N); returns a scalar. Normalised, as in the notebook: the error is divided
    by the mean target of its row before it is squared.
    """
    error = targets - q_online.gather(-1, actions[..., None]).squeeze(-1)  # (B, N)
    if normalised:
        error = error / ((targets * mask).sum(1) / mask.sum(1))[:, None]
    return error[mask].square().mean()


@torch.no_grad()
def polyak_update(online: QNetwork, delayed: QNetwork, alpha: float) -> None:
    """phi <- alpha * theta + (1 - alpha) * phi                                                                (equation 8)"""
    for slow, fast in zip(delayed.trained().values(), online.trained().values()):
        slow.lerp_(fast, alpha)


# ------------------------------------------------------------------------------------------------------------- playing
def model_probability(episode: np.ndarray) -> np.ndarray:
    """The chance that the model and not a coin chooses an action: 0, 0, 0.1, 0.1, ... 0.9, 0.9, then 1 (section 4.2)."""
    return np.minimum(episode // 2 / 10, 1.0)


def check_context(encoder: Encoder, context: int, max_steps: int) -> None:
    """Raises ValueError if a context of so many tokens is too small for an episode of so many steps and room to forget."""
    opening = encoder.lengths[BEGIN] + encoder.lengths[OBSERVATION:].max() + encoder.lengths[PROMPT]
    episode = max_steps * encoder.step_lengths[1] + opening + encoder.lengths[[REWARD, CUT, END]].sum()
    needed = max(-(-4 * episode // 3), episode + opening)  # room to keep the last episode whole when old ones are forgotten
    if context < needed:
        raise ValueError(
            f"{context} tokens of context are too few: an episode of {max_steps} steps takes up to {episode}, and {needed} "
            "are needed, so that forgetting old episodes makes room. Ask for more tokens or fewer steps."
        )


class InContext:
    """The network as a player of frozen_lake.roll_out: it remembers by its transcript alone, and no weight changes.

    Each trial has a growing context of its own. A context that would outgrow `context` tokens loses its oldest
    whole episodes, at least a quarter of its tokens, and what is left is encoded anew. In episode e the network's choice
    counts with the chance `probability(e)`, which takes and gives arrays; otherwise the action is uniformly random.
    Raises ValueError if `context` is too small for one episode.
    """

    def __init__(
        self, network: QNetwork, encoder: Encoder, env: FrozenLake, rng: np.random.Generator, context: int, probability=None
    ):
        check_context(encoder, context, env.max_steps)
        self.network, self.encoder, self.rng, self.context = network, encoder, rng, context
        self.probability = probability or model_probability
        self.transcript: list[np.ndarray] = []  # of messages (N, M), all that the network has read
        self.happened = np.full((len(env), 5), NOTHING)  # the messages of the last step, not yet fed to the network
        self.begins = np.ones(len(env), bool)  # (N,) whether an episode begins
        self.live = np.arange(len(env))  # the trial that each row of the cache belongs to
        self.lengths = np.zeros(len(env), np.int64)  # (N,) tokens in the cache
        self.cache = self._new_cache(len(env))
        self.q = np.zeros((len(env), len(ACTIONS)), np.float32)  # (N, A) read last
        self.by_model = np.zeros(len(env), bool)  # (N,) whether the network chose the last action

    @torch.inference_mode()
    def act(self, state: np.ndarray, episode: np.ndarray, playing: np.ndarray) -> np.ndarray:
        going_on = playing[self.live]
        if 2 * going_on.sum() <= len(going_on):  # halve the batch now and then: a copy for every trial that ends costs more
            self.live = self.live[going_on]
            self.cache.keep(self._tensor(np.flatnonzero(going_on)))
        begin, observation = np.where(self.begins, BEGIN, NOTHING), np.where(self.begins, OBSERVATION + state, NOTHING)
        chunk = np.column_stack((self.happened, begin, observation, np.full(len(state), PROMPT)))  # (N, 8)
        chunk[~playing] = NOTHING
        for row in np.flatnonzero((self.lengths + self.encoder.lengths[chunk].sum(1) > self.context)[self.live]):
            self._forget(row, chunk[self.live[row]])
        self.q[self.live] = self._feed(chunk).cpu().numpy()
        self.by_model = self.rng.random(len(state)) < self.probability(episode)
        return np.where(self.by_model, self.q.argmax(1), self.rng.integers(0, len(ACTIONS), len(state)))

    @torch.inference_mode()
    def remember(self, given: Sequence[list[Episode]]) -> None:
        """Begin each trial's context with these episodes, which somebody else has played."""
        messages = [np.concatenate([self.encoder.messages(episode) for episode in episodes]) for episodes in given]
        self._feed(np.array(list(itertools.zip_longest(*messages, fillvalue=NOTHING))).T)

    def _feed(self, chunk: np.ndarray) -> Tensor:
        """Let the network read on by a chunk (N, M) of messages; Q-values (live trials, A) after each trial's last token."""
        tokens, counts = self.encoder.join(chunk[self.live])
        counts_there = self._tensor(counts)
        last = (counts_there[:, None] - 1).clamp(min=0)  # a trial that is over has no tokens, and its row is not used
        q = self.network(self._tensor(tokens), last, self.cache)[:, 0]
        self.cache.advance(counts_there)
        self.lengths[self.live] += counts
        self.transcript.append(chunk)
        return q

    def learn(self, step: Step, playing: np.ndarray) -> None:
        self.begins = step.terminated | step.truncated
        self.happened = step_messages(step.action, step.successor, step.reward, step.truncated, self.begins)

    def _forget(self, row: int, chunk: np.ndarray) -> None:
        """Encode anew the newest whole episodes of a row's trial that leave room for `chunk` (8,) and more."""
        trial = self.live[row]
        messages = np.concatenate([past[trial] for past in self.transcript])  # (M,)
        onward = self.encoder.lengths[messages][::-1].cumsum()[::-1]  # tokens from each message to the end
        limit = min(3 * self.context // 4, self.context - self.encoder.lengths[chunk].sum())
        tokens, counts = self.encoder.join(messages[None, ((messages == BEGIN) & (onward <= limit)).argmax() :])
        fresh = self._new_cache(1)
        self.network(self._tensor(tokens), self._tensor(counts[:, None] - 1), fresh)
        fresh.advance(self._tensor(counts))
        self.cache.replace(self._tensor(np.array([row])), fresh)
        self.lengths[trial] = counts[0]

    @staticmethod
    def slots(encoder: Encoder, context: int) -> int:
        """Slots of the cache for one trial: the context, and the padding of a chunk."""
        return context + 8 * encoder.table.shape[1]

    def _new_cache(self, rows: int) -> KVCache:
        llama, slots = self.network.llama, self.slots(self.encoder, self.context)
        return KVCache(llama.config, rows, slots, llama.vocabulary.dtype, self.network.action_tokens.device)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.network.action_tokens.device)


def play(
    network: QNetwork,
    encoder: Encoder,
    lakes: Sequence[Lake],
    episodes: int,
    rng: np.random.Generator,
    context: int,
    max_steps: int = MAX_STEPS,
    probability: Callable[[np.ndarray], np.ndarray] | None = None,
    world: Callable = FrozenLake,
    given: Sequence[list[Episode]] | None = None,
    limit: float = math.inf,
) -> list[list[Episode]]:
    """One trial a lake, as many side by side as memory has room for; [trial][episode].

    `world(lakes, rng, max_steps=...)` makes the environment of some of the lakes; `given` are the episodes with which each
    trial's context begins; `limit` is roll_out's.
    """
    vocabulary, played = network.llama.vocabulary, []
    one = KVCache(network.llama.config, 1, InContext.slots(encoder, context), vocabulary.dtype, "meta")
    size = max(1, int(0.8 * free_memory(vocabulary.device) / (one.keys.nbytes + one.values.nbytes)))
    for first in range(0, len(lakes), size):
        env = world(lakes[first : first + size], rng, max_steps=max_steps)
        player = InContext(network, encoder, env, rng, context, probability)
        if given:
            player.remember(given[first : first + size])
        quiet = limit < math.inf  # nobody knows how many episodes that makes
        with tqdm(total=len(env) * episodes, unit="episode", desc="Playing", delay=5, leave=False, disable=quiet) as bar:
            played += roll_out(env, player, episodes, bar, limit)
    return played


# ------------------------------------------------------------------------------------------------------------ run folder
def explain(error: Exception) -> str:
    """The sentence that a program ends with when a user's input or disk stopped it."""
    if isinstance(error, torch.OutOfMemoryError):
        return "The device is out of memory: use --resume with a smaller --at-once and --checkpointing, or fewer --trials."
    if isinstance(error, (OSError, SafetensorError)):
        what = getattr(error, "filename", None) or "A file"
        reason = getattr(error, "strerror", None) or error
        return f"{what} cannot be read or written ({reason}): choose another place, or free this one."
    return str(error)


def save_network(folder: Path, network: QNetwork, base: str = "") -> None:
    """Write what was trained: model.safetensors, or with an adapter PEFT's two files, which name its base."""
    if network.adapter is not None:
        return network.adapter.save(folder, base)
    with replacing(folder / "model.safetensors") as temporary:
        save_file(network.llama.state_dict(), temporary, metadata={"format": "pt"})


def read_recipe(folder: str | Path) -> dict | None:
    """The recipe of a run of train.py, or None if the folder holds no run."""
    try:
        return json.loads((Path(folder) / "config.json").read_text())["icrl"]
    except (OSError, KeyError, TypeError, ValueError):
        return None


class Run(NamedTuple):
    """What a run's folder holds."""

    network: QNetwork
    encoder: Encoder
    recipe: dict
    folder: Path


def load_run(folder: str | Path, device: str = "cpu") -> Run:
    """Raises ValueError, in one sentence, if the folder holds no run."""
    if (recipe := read_recipe(folder)) is None:
        raise ValueError(f"{folder} is no run of train.py: its config.json with the recipe is missing or foreign.")
    if missing := {"adapter", "model", "revision", "dtype", "sides", "min_hops", "tokens", "max_steps"} - recipe.keys():
        raise ValueError(f"{folder} was made by another version of train.py (it has no {min(missing)}): train it anew.")
    encoder, dtype = Encoder(load_tokenizer(folder)), getattr(torch, recipe["dtype"])
    if recipe["adapter"] == "ia3":
        llama = load_llama(recipe["model"], dtype, device, recipe["revision"])
        network = QNetwork(llama, encoder.action_tokens, IA3.load(folder))
    else:  # a copy in memory of its own, since the file's memory map is aligned differently, which can change the last bits
        network = QNetwork(copy.deepcopy(load_llama(folder, dtype)), encoder.action_tokens)
    return Run(network.to(device), encoder, recipe, Path(folder))
