"""In-context reinforcement learning: from transcript to tokens, Q-values, loss, and play.

    python icrl.py [RUN]    follows one example from a lake to the loss

The *transcript* tau is a text: all that an agent has seen and done so far, over many episodes on
one lake. Such a series of episodes is a *trial*. A network that learns to predict Q(tau, a), for
many lakes, from good and bad episodes there, has to work out from tau which lake this is. So
the longer tau grows, the better it plays.

For training, 20 to 40 episodes of a lake form a *set*. They are shuffled; otherwise an episode's
position in the set would predict its return on every lake. In the final phase of training a trial
that the network has played itself is a set, too. Sets of different lakes, one after the other, fill
*slices* of T tokens.

Sections 3 and 4 of the paper (arXiv 2501.14176); the README lists the differences from it.

Shapes: B batch, T tokens, N action positions (or trials played together), A actions, D model.
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
import safetensors.torch
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from frozen_lake import ACTIONS, MAX_SIDE, MAX_STEPS, MAX_TILES, Episode, RandomAgent, Transition
from frozen_lake import draw, make_env, random_lakes, rollout
from ia3 import IA3, PEFT_CONFIG
from llama import DTYPES, MASKED_KERNELS, KVCache, load_llama, load_tensors, load_tokenizer
from llama import memory_budget, naming_file, user_errors

PRETRAINED = Path(__file__).resolve().parent / "results/general"


# ---- from transcript to tokens
class Template(NamedTuple):
    """The text of an episode. `{}` stands for a tile id or for an action word."""

    begin: str
    observation: str
    prompt: str  # before each action; may be empty
    action: str
    reward: str  # where the reward is 1
    truncated: str  # where the step limit ended the episode
    end: str

    def start_text(self, tile):
        """What opens an episode that starts on a tile."""
        return self.begin + self.observation.format(tile) + self.prompt

    def transition_text(self, t):
        """What is added for a Transition of one lake, up to the next prompt or the end."""
        if t.reward not in (0, 1):
            raise ValueError(f"A transcript can only hold rewards of 0 and 1, not {t.reward}.")
        text = self.action.format(ACTIONS[t.action]) + self.observation.format(t.next_state)
        if t.reward:
            text += self.reward
        if t.truncated:
            text += self.truncated
        return text + (self.end if t.terminated or t.truncated else self.prompt)


def chat_template(*, begin, header_start, header_end, message_end, end):
    """Messages with roles, as "<|start_header_id|>action<|end_header_id|>left<|eot_id|>"."""
    return Template(
        begin=begin,
        observation=f"{header_start}observation{header_end}{{}}{message_end}",
        prompt=f"{header_start}action{header_end}",
        action=f"{{}}{message_end}",
        reward=f"{header_start}reward{header_end}1.0{message_end}",
        truncated=f"{header_start}edit{header_end}...{message_end}",  # the notebook's role "edit"
        end=end,
    )


LLAMA_3 = chat_template(  # the paper's
    begin="<|begin_of_text|>",
    header_start="<|start_header_id|>",
    header_end="<|end_header_id|>",
    message_end="<|eot_id|>",
    end="<|end_of_text|>",
)
CHAT_ML = chat_template(
    begin="",
    header_start="<|im_start|>",
    header_end="\n",
    message_end="<|im_end|>\n",
    end="<|endoftext|>",
)
LLAMA_2 = chat_template(  # "</s>" separates everything, for lack of other special tokens
    begin="<s>", header_start="", header_end="</s>", message_end="</s>", end="</s>"
)
COMPACT = Template(  # of the small network: "13 up 9 right 10 "
    begin="",
    observation="{} ",
    prompt="",
    action="{} ",
    reward="1.0 ",
    truncated="... ",
    end="<|end_of_text|> ",
)
# The keys are tokens that the vocabulary has to have. The first template that fits is used.
TEMPLATES = {"<|eot_id|>": LLAMA_3, "<|im_end|>": CHAT_ML, "</s>": LLAMA_2, "left": COMPACT}


def compact_tokenizer() -> Tokenizer:
    """The small network's vocabulary of 107 tokens: one for each action, tile id and marker."""
    words = [*ACTIONS, "1.0", "...", "<|end_of_text|>", *map(str, range(MAX_TILES))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="..."))  # unused, but required
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def sample_episodes():
    """Episodes with every tile, action and ending, to check a tokenizer and to measure lengths.

    The agent stays on its tile. It takes each of the four actions once, then one that ends it.
    """
    for tile in range(MAX_TILES):
        for reward, truncated in ((1, False), (0, False), (0, True)):  # won, lost, truncated
            actions = np.array([0, 1, 2, 3, 0])
            rewards = np.array([0, 0, 0, 0, reward])
            yield Episode(np.full(6, tile), actions, rewards, truncated)


class TranscriptTokenizer:
    """Turns a transcript into tokens, segment by segment: an episode's start, or a transition.

    Its template is the first of TEMPLATES that fits the tokenizer and a network with `vocab_size`
    embeddings. ValueError if none does.
    """

    def __init__(self, tokenizer, vocab_size):
        self.tokenizer = tokenizer
        self.choose_template(vocab_size)
        # Each sample consists of a start, a step by each action, and an ending.
        samples = [self.segments(episode) for episode in sample_episodes()]
        starts, left, down, right, up, endings = zip(*samples)  # each a tuple of token lists
        self.action_tokens = [steps[0][0] for steps in (left, down, right, up)]
        step_lengths = list(map(len, left + down + right + up))
        self.shortest_step = min(step_lengths)
        self.longest_step = max(step_lengths)
        self.longest_start = max(map(len, starts))
        self.longest_ending = max(map(len, endings))

    def choose_template(self, vocab_size):
        problem = f"has none of the tokens {', '.join(TEMPLATES)}"
        for token, template in TEMPLATES.items():
            if self.tokenizer.token_to_id(token) is not None:
                self.template = template
                self.cache = {}  # the tokens of a segment by its text
                problem = self.find_problem(vocab_size)
                if problem is None:
                    return
        raise ValueError(f"The tokenizer {problem}: take another model.")

    def find_problem(self, vocab_size):
        """Why the template does not fit, or None.

        Segments are tokenized one by one, so a tokenizer must not merge characters across borders.
        """
        text = "".join(map(self.text, sample_episodes()))
        tokens = list(chain(*map(self.encode, sample_episodes())))
        _, *steps, _ = self.segments(next(sample_episodes()))
        if max(tokens) >= vocab_size:
            return f"has tokens beyond the {vocab_size} that the network has an embedding of"
        if len({step[0] for step in steps}) < len(ACTIONS):
            return "makes two action words begin with the same token"
        if self.tokenizer.encode(text, add_special_tokens=False).ids != tokens:
            return "joins neighbouring segments of a transcript"
        return None

    def tokens(self, text):
        """The token ids of a segment."""
        if text not in self.cache:
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
            self.cache[text] = encoding.ids
        return self.cache[text]

    def start(self, tile):
        """The tokens that open an episode."""
        return self.tokens(self.template.start_text(tile))

    def transition(self, t):
        """The tokens of a Transition of one lake, of which the first one is the action's."""
        return self.tokens(self.template.transition_text(t))

    def text(self, episode):
        """An episode as text."""
        transitions = map(self.template.transition_text, episode.transitions())
        return self.template.start_text(episode.observations[0]) + "".join(transitions)

    def encode(self, episode):
        """An episode as tokens."""
        return list(chain(*self.segments(episode)))

    def segments(self, episode):
        """An episode as a list of tokens for its start and for each transition."""
        start = self.start(episode.observations[0])
        return [start, *map(self.transition, episode.transitions())]

    def max_actions(self, length):
        """The most action positions that a slice can have; the last step may be cut off."""
        return length // self.shortest_step + 1

    def longest_episode(self, steps):
        """An upper bound on the tokens of an episode: a start, some steps, and an ending."""
        return self.longest_start + steps * self.longest_step + self.longest_ending


# ---- from tokens to slices
class Batch(NamedTuple):
    """Slices, and what the loss needs of them, padded at the right to N action positions.

    N depends on T only, so that shapes stay the same from batch to batch.
    """

    tokens: Tensor  # (B, T) int64
    positions: Tensor  # (B, N) int64, where Q is read
    actions: Tensor  # (B, N) int64
    rewards: Tensor  # (B, N) r_{t+1}
    discounts: Tensor  # (B, N) gamma, or 0 at the end of an episode
    mask: Tensor  # (B, N) bool, which positions count in the loss; False in the padding

    def to(self, device):
        return Batch(*(column.to(device) for column in self))

    def split(self, size):
        """Micro batches of `size` slices."""
        return [Batch(*parts) for parts in zip(*(column.split(size) for column in self))]


SET_SIZE = (20, 40)  # the paper's fewest and most episodes in a set
QUALITY = {"high": 5.0, "mid": 1.0, "low": 0.2}  # the weight of a success; that of a failure is 1


def sample_set(episodes, rng, quality="mid"):
    """A set: 20 to 40 episodes of one lake, weighted as in figure 6, in random order."""
    min_size, max_size = SET_SIZE
    size = min(rng.integers(min_size, max_size + 1), len(episodes))
    weights = np.array([QUALITY[quality] if e.episode_return > 0 else 1.0 for e in episodes])
    drawn = rng.choice(len(episodes), size, replace=False, p=weights / weights.sum())
    return [episodes[i] for i in rng.permutation(drawn)]  # `choice` draws likely ones first


def encode_slice(tokenizer, sets, length, gamma) -> Batch:
    """One training sequence of exactly `length` tokens: a Batch without the batch dimension.

    `sets` is an iterator that all slices share; this slice takes as many sets as it can hold.
    Nothing separates sets of different lakes: the network has to notice the change. What does not
    fit is cut off, and the next slice begins with the next set. For example, with length 4,

        transcript   13  up  9  right  10  <|end_of_text|>
        tokens       13  up  9  right
        positions     0      2              Q is read at the token before an action
        discounts   0.9    0.0              0 where the episode ends
        mask       True   True              True where the target can be computed

    With length 2, the slice is "13 up". The target at position 0 needs Q at position 2, which is
    not in that slice, so the mask is False.
    """
    tokens = []
    positions, actions, rewards, discounts = [], [], [], []
    while len(tokens) < length:
        for episode in next(sets):
            tokens += tokenizer.start(episode.observations[0])
            for transition in episode.transitions():
                positions.append(len(tokens) - 1)
                actions.append(transition.action)
                rewards.append(transition.reward)
                discounts.append(gamma)
                tokens += tokenizer.transition(transition)
            # After an episode's last action y = r, as in the paper, even if the step limit ended
            # it: no action follows in this episode, so there is no Q to bootstrap from.
            discounts[-1] = 0.0

    # Only the last position can lack a target: unless its episode ends, this target needs Q at the
    # next position, which is beyond the slice.
    n = sum(position < length for position in positions)
    mask = [True] * n
    mask[-1] = discounts[n - 1] == 0.0
    columns = (positions[:n], actions[:n], rewards[:n], discounts[:n], mask)
    padding = (0, tokenizer.max_actions(length) - n)
    padded = [F.pad(torch.tensor(column), padding) for column in columns]
    return Batch(torch.tensor(tokens[:length]), *padded)


def collate(slices):
    """A Batch of slices of the same length."""
    return Batch(*map(torch.stack, zip(*slices)))


# ---- the network
class QNetwork(nn.Module):
    """Q_theta(tau, a): the logits of the four action words, by a Llama, perhaps with IA3."""

    def __init__(self, llama, action_tokens, adapter=None):
        super().__init__()
        self.llama = llama
        self.adapter = adapter
        action_tokens = torch.tensor(action_tokens, device=llama.unembedding.device)  # (A,)
        self.register_buffer("action_tokens", action_tokens, persistent=False)
        llama.requires_grad_(adapter is None)  # an adapter is trained on a frozen base

    def forward(self, tokens: Tensor, positions: Tensor, cache=None) -> Tensor:
        """Q-values (B, N, A), float32, at positions (B, N) of tokens (B, T)."""
        hidden = self.llama(tokens, self.adapter, cache)  # (B, T, D)
        hidden = hidden.take_along_dim(positions[..., None], 1)  # (B, N, D)
        action_vectors = self.llama.unembedding[self.action_tokens]  # (A, D)
        return F.linear(hidden.float(), action_vectors.float())

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer changes, by name: the adapter's vectors, or else every weight."""
        return dict((self.adapter or self.llama).named_parameters())

    def target_copy(self):
        """The target network phi: a copy of what is trained, which shares what is frozen.

        The authors' notebook calls it "delayed".
        """
        llama = self.llama if self.adapter else copy.deepcopy(self.llama)
        return QNetwork(llama, self.action_tokens.tolist(), copy.deepcopy(self.adapter))


# ---- learning
@torch.no_grad()
def td_targets(q_online: Tensor, q_target: Tensor, rewards: Tensor, discounts: Tensor) -> Tensor:
    """Equations 4 and 6: y = r_{t+1} + gamma * Q_phi(tau_{t+1}, argmax_a Q_theta(tau_{t+1}, a))

    This is Double DQN: theta chooses the next action, and phi values it.

    q_online, q_target (B, N, A); rewards, discounts (B, N); returns (B, N), without a gradient.
    Column t + 1 is the next action position, so one pass of each network gives all values. Where a
    target needs a value beyond the last position it is wrong, and masked in the loss.
    """
    best = q_online.argmax(-1, keepdim=True)  # chosen by theta ...
    value = q_target.gather(-1, best).squeeze(-1)  # ... valued by phi (B, N)
    return rewards + discounts * F.pad(value[:, 1:], (0, 1))


def td_loss(q_online: Tensor, actions: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Equation 7: L = E[(y - Q_theta(tau_t, a_t))^2] over the action positions in `mask`

    q_online (B, N, A); actions, targets, mask (B, N); returns a scalar.
    """
    error = targets - q_online.gather(-1, actions[..., None]).squeeze(-1)  # (B, N)
    return (mask * error.square()).sum() / mask.sum()


@torch.no_grad()
def polyak_update(online, target, alpha):
    """Equation 8: phi <- alpha * theta + (1 - alpha) * phi"""
    phi = target.trainable_parameters()
    for name, theta in online.trainable_parameters().items():
        phi[name].lerp_(theta, alpha)


# ---- playing in context
MAX_PADDING = 32  # tokens; rows that have more to read are read alone, without padding
KEEP_FRACTION = 0.75  # a full context drops its oldest episodes until this much of it is left


def greedy_probability(episode):
    """The exploration schedule (4.2): 0 in episodes 0 and 1, 0.1 in 2 and 3, ... 1 from 20 on.

    The probability that the agent acts greedily instead of randomly. The paper calls it epsilon,
    which elsewhere is 1 minus this. Without random actions, an agent that only maximises Q might
    never find a goal. On-policy trials (train.py), the Q-learning baseline and `watch` (eval.py)
    follow the same schedule.
    """
    return np.minimum(episode // 2 / 10, 1.0)


def always_greedy(episode):
    """Greedy in every episode, instead of by the exploration schedule."""
    return np.ones(len(episode))


class InContext:
    """An agent that learns without changing a weight: the transcript is all that it remembers.

    Each of the N trials has a transcript, which may begin with `given` episodes ([trial][episode]).
    In episode e the action is greedy with probability `schedule(e)`, else random. If a
    transcript outgrows `run.recipe.context` tokens, its oldest episodes are dropped.

    In every step, `act` appends the starts of new episodes to the transcripts, lets the network
    read what is pending, and chooses actions; `observe` appends what they led to.

    Trials share one KV cache (see llama.KVCache for rows of different lengths). Row r of it holds
    the transcript of trial `self.trial_of[r]`: [0, 1, 2, 3] at first, and [1, 3] after trials 0 and
    2 have finished and their rows were dropped. All other attributes have an entry per trial.
    """

    def __init__(self, run, N, rng, schedule=greedy_probability, given=None):
        check_context(run.tokenizer, run.recipe.context, run.recipe.max_steps)
        self.network = run.network
        self.tokenizer = run.tokenizer
        self.context = run.recipe.context
        self.rng = rng
        self.schedule = schedule
        self.transcripts = [[] for _ in range(N)]  # tokens, [trial][episode]
        self.pending = [[] for _ in range(N)]  # tokens that the network has not read, [trial]
        self.active = np.ones(N, bool)  # (N,) trials that were active in the last transition
        self.starting = np.ones(N, bool)  # (N,) trials that begin an episode
        self.q = np.zeros((N, len(ACTIONS)), np.float32)  # (N, A) in the current states
        self.trial_of = np.arange(N)  # (rows,)
        # More slots than tokens, because padding takes slots, too.
        self.cache = KVCache(run.network.llama, N, self.context + MAX_PADDING)
        for trial, episodes in enumerate(given or []):
            for episode in episodes:
                self._start_episode(trial, self.tokenizer.encode(episode))

    def act(self, state, episode):
        """Actions (N,) in states (N,), in the trials' current episodes (N,)."""
        q = self.read_transcripts(state)
        # An attribute, so that eval.py can mark random actions.
        self.greedy = self.rng.random(len(state)) < self.schedule(episode)
        random_action = self.rng.integers(0, len(ACTIONS), len(state))
        return np.where(self.greedy, q.argmax(1), random_action)

    @torch.inference_mode()
    def read_transcripts(self, state):
        """Let the network read the pending tokens, up to states (N,); Q-values there, (N, A)."""
        for trial in np.flatnonzero(self.starting):
            self._start_episode(trial, self.tokenizer.start(state[trial]))
        self._drop_finished_trials()
        # Rows are read together, padded to the one with the most pending tokens. Rows with many of
        # them are read alone first, so that all others are not padded to their length.
        for row in range(len(self.trial_of)):
            self._drop_oldest_episodes(row)
            if len(self.pending[self.trial_of[row]]) > MAX_PADDING:
                self._read(slice(row, row + 1))
        self._read(slice(None))
        return self.q

    def observe(self, transition):
        """Append a Transition, of fields (N,), to the transcripts."""
        fields = [field.tolist() for field in transition]
        for trial, step in enumerate(map(Transition, *fields)):
            if step.active:
                self._append(trial, self.tokenizer.transition(step))
        self.active = transition.active
        # `act` will start the next episode, unless this was the trial's last one.
        self.starting = (transition.terminated | transition.truncated) & transition.active

    def _start_episode(self, trial, tokens):
        self.transcripts[trial].append([])
        self._append(trial, tokens)

    def _append(self, trial, tokens):
        self.transcripts[trial][-1] += tokens
        self.pending[trial] += tokens

    def _drop_finished_trials(self):
        """Keep only the rows of active trials, once half are finished, as this copies the cache."""
        rows = [row for row, trial in enumerate(self.trial_of) if self.active[trial]]
        if 2 * len(rows) <= len(self.trial_of):
            self.trial_of = self.trial_of[rows]
            self.cache = self.cache[rows]

    def _drop_oldest_episodes(self, row):
        """Shorten a transcript that is too long; the network has to read the rest again."""
        trial = self.trial_of[row]
        transcript = self.transcripts[trial]
        if sum(map(len, transcript)) <= self.context:
            return
        while sum(map(len, transcript)) > KEEP_FRACTION * self.context:
            transcript.pop(0)  # never the current episode: check_context made sure that it fits
        self.pending[trial] = list(chain(*transcript))
        self.cache.lengths[row] = 0

    def _read(self, rows):
        """Let the network read the pending tokens of some rows (a slice); store its Q-values."""
        trials = self.trial_of[rows]
        cache = self.cache[rows]  # a view: what is added to it is added to the whole cache
        device = cache.keys.device
        pending = [torch.tensor(self.pending[trial], dtype=torch.long) for trial in trials]
        counts = torch.tensor([len(tokens) for tokens in pending])  # (rows,)
        if not counts.any():
            return
        chunk = pad_sequence(pending, batch_first=True).to(device)  # (rows, T)
        # Rows with nothing to read are padding only. It is overwritten later, and `lengths` do not
        # count it, so it does no harm.
        last = (counts - 1).clamp(min=0)[:, None].to(device)  # (rows, 1)
        with sdpa_kernel(MASKED_KERNELS):
            q = self.network(chunk, last, cache)[:, 0].cpu().numpy()  # (rows, A)
        cache.lengths += counts  # in place, so in the whole cache, too
        for trial, values in zip(trials, q):
            if self.pending[trial]:
                self.q[trial] = values
                self.pending[trial] = []


def check_context(tokenizer, context, max_steps):
    """ValueError if an episode may be longer than KEEP_FRACTION of the context.

    Without this check the current episode itself might have to be dropped.
    """
    needed = math.ceil(tokenizer.longest_episode(max_steps) / KEEP_FRACTION)
    if needed > context:
        few = f"{context} tokens of context are too few for episodes of {max_steps} steps"
        raise ValueError(f"{few}: take {needed}, or train with fewer --max-steps.")


def play(
    run,
    lakes,
    seed,
    episodes=30,
    first_episode=0,
    given=None,
    schedule=greedy_probability,
    **env_options,
):
    """One trial per lake, with options as in make_env; the episodes, [trial][episode].

    Plays as many trials together as fit in memory.
    """
    rng = np.random.default_rng(seed)
    one_row = KVCache(run.network.llama, 1, run.recipe.context + MAX_PADDING)
    row_bytes = 4 * one_row.keys.nbytes  # keys, values, and as much again for copies
    max_rows = max(1, memory_budget(one_row.keys.device) // row_bytes)
    trials = []
    for start in range(0, len(lakes), max_rows):
        part = slice(start, start + max_rows)
        env = make_env(lakes[part], rng, run.recipe.max_steps, **env_options)
        agent = InContext(run, len(env), rng, schedule, given and given[part])
        trials += rollout(env, agent, episodes, first_episode=first_episode)
    return trials


# ---- a run: its recipe and its files
def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """All settings of a run, except for the device. Defaults: the small network's; cf. train.PAPER.

    The curriculum, by the fraction of the training that is over:

        0.0 to 0.4  easy lakes (3 x 3 tiles, goals 2 steps away) give way to the paper's lakes
        0.4 to 0.6  the paper's lakes only
        0.6 to 1.0  the final phase: slices are longer, some lakes have far goals, and
                    half of the sets are on-policy trials, which the network has played itself
    """

    model: str = flag("", "base model that IA3 adapts: a folder or a Hub repository")
    revision: str = flag("", "branch, tag or commit of the Hub repository")
    dtype: str = flag("float32", "dtype of the base model's weights: " + ", ".join(DTYPES))
    layers: int = flag(2, "layers of a new network")
    width: int = flag(64, "model dimension of a new network")
    heads: int = flag(2, "attention heads of a new network")
    # The data are made in rounds, called collections: each time Q-learning plays on new lakes.
    lakes: int = flag(256, "lakes in a collection")
    episodes: int = flag(100, "episodes of Q-learning on each lake")
    collection_steps: int = flag(192, "optimizer steps on each collection")
    min_side: int = flag(3, "fewest tiles along a side of a lake")
    max_side: int = flag(5, "most tiles along a side of a lake")
    goal_distance: int = flag(4, "fewest steps from a start to the nearest goal")
    max_steps: int = flag(MAX_STEPS, "steps after which an episode is truncated")
    quality: str = flag("mid", "weight of successful episodes in a set: " + ", ".join(QUALITY))
    shuffled: float = flag(0.0, "fraction of lakes with random tile ids and a random action map")
    cropped: float = flag(
        0.0, "fraction of the unshuffled lakes with the ids of a larger map (final phase)"
    )
    slippery: float = flag(0.0, "fraction of lakes with slippery ice")
    # The curriculum.
    easy_until: float = flag(0.4, "fraction of the training after which no lake is easy")
    final_from: float = flag(0.6, "fraction of the training after which the final phase begins")
    final_tokens: int = flag(
        1024,
        "tokens in a slice of the final phase and in the context at test time; 0: same as --tokens",
    )
    far_goals: float = flag(
        0.3, "fraction of lakes with far goals, all of maximal size (final phase)"
    )
    on_policy: float = flag(0.5, "fraction of sets that are on-policy trials (final phase)")
    # The optimisation.
    steps: int = flag(8400, "optimizer steps")
    tokens: int = flag(512, "tokens in a slice")
    batch: int = flag(
        4, "slices in a batch; in the final phase fewer, for the same number of tokens"
    )
    gamma: float = flag(0.9, "discount factor")
    reward_scale: float = flag(1.0, "factor of the rewards; 30 suits an official Llama's logits")
    alpha: float = flag(0.1, "weight of the online network in each Polyak update (eq. 8)")
    learning_rate: float = flag(0.01, "learning rate of AdamW")
    muon_rate: float = flag(
        0.01, "learning rate of Muon, for the matrices of the layers; 0: no Muon"
    )
    warm_up: int = flag(50, "steps over which the learning rates rise")
    decay_from: float = flag(0.2, "fraction of the training after which the learning rates fall")
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: no limit")
    seed: int = flag(0, "seed of weights and data")

    @property
    def sides(self):
        return self.min_side, self.max_side

    @property
    def context(self):
        """The most tokens of a transcript that are read at test time: as many as in a slice."""
        return self.final_tokens or self.tokens

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            kinds = (int, float) if type(f.default) is float else (type(f.default),)
            low, high = BOUNDS.get(f.name, (0, MAX_INT))
            choices = CHOICES.get(f.name, [value])
            if type(value) not in kinds:
                needed = f"like {f.default!r}"
            elif type(value) is not str and not low <= value <= high:
                needed = f"in {low} to {high}"
            elif value not in choices:
                needed = f"one of {', '.join(choices)}"
            else:
                continue
            raise ValueError(f"--{f.name.replace('_', '-')} has to be {needed}, not {value!r}.")


# The lowest and highest values of a recipe's settings; all other numbers may be 0 to MAX_INT.
FRACTIONS = "easy_until final_from on_policy far_goals shuffled cropped slippery".split()
FRACTIONS += "alpha gamma decay_from".split()
COUNTS = "layers width heads lakes episodes collection_steps max_steps".split()
COUNTS += "goal_distance steps tokens batch warm_up".split()
MAX_INT = 2**32 - 1
BOUNDS = dict.fromkeys(FRACTIONS, (0, 1)) | dict.fromkeys(COUNTS, (1, MAX_INT))
BOUNDS |= dict.fromkeys(["min_side", "max_side"], (2, MAX_SIDE))
CHOICES = {"dtype": DTYPES, "quality": QUALITY}

Run = namedtuple("Run", "folder recipe network tokenizer")


@contextmanager
def atomic_write(path):
    """Yield a name to write to. If nothing fails, that file then replaces `path` atomically."""
    temporary = path.with_name(f"tmp.{os.getpid()}.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path, content):
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def save_tensors(path, tensors):
    with atomic_write(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))


def save_network(run):
    """What was trained: every weight with its config.json, or else an adapter as PEFT saves it."""
    llama = run.network.llama
    if not run.network.adapter:
        save_tensors(run.folder / "model.safetensors", llama.state_dict())
        return save_json(run.folder / "config.json", llama.config.to_dict())
    save_tensors(run.folder / "adapter_model.safetensors", run.network.adapter.to_peft())
    base = {"base_model_name_or_path": run.recipe.model, "revision": run.recipe.revision or None}
    save_json(run.folder / "adapter_config.json", PEFT_CONFIG | base | {"inference_mode": True})


def read_recipe(folder) -> Recipe | None:
    """The recipe of a run of train.py; None for any other checkpoint."""
    path = folder / "recipe.json"
    if path.exists():
        with naming_file(path):
            settings = json.loads(path.read_text())
            if settings.keys() != {f.name for f in fields(Recipe)}:
                raise ValueError("it is the recipe of another version: train it again")
            return Recipe(**settings)

    path = folder / "config.json"  # where versions before 0.2.0 had the recipe
    if path.exists():
        with naming_file(path):
            if "icrl" in json.loads(path.read_text()):
                raise ValueError("it is a run of an older version, before 0.2.0: train it again")
    return None


def load_run(folder: str | Path, device="cpu", context=0) -> Run:
    """The run in a folder. If `context` is not 0, that many tokens are read when playing.

    ValueError if there is no run, or one that cannot be used.
    """
    folder = Path(folder)
    recipe = read_recipe(folder)
    if recipe is None:
        raise ValueError(f"{folder} is not a run of train.py: it has no recipe.json.")
    # `Recipe.context`, the number of tokens that are read when playing, follows final_tokens.
    recipe = replace(recipe, final_tokens=context or recipe.final_tokens)
    dtype = DTYPES[recipe.dtype]
    if recipe.model:
        llama = load_llama(recipe.model, dtype, device, recipe.revision)
        check_base(recipe, llama.config)
        adapter = IA3(llama.config).to(device)
        adapter.from_peft(load_tensors(folder / "adapter_model.safetensors"))
    else:
        # The loaded weights are memory-mapped, perhaps at addresses at which matrix products are
        # rounded differently. With a copy, a resumed run repeats an uninterrupted one.
        llama = copy.deepcopy(load_llama(folder, dtype, device))
        adapter = None
    tokenizer = TranscriptTokenizer(load_tokenizer(folder), llama.config.vocab_size)
    check_context(tokenizer, recipe.context, recipe.max_steps)
    network = QNetwork(llama, tokenizer.action_tokens, adapter)
    return Run(folder, recipe, network, tokenizer)


def check_base(recipe, config):
    """ValueError if slices are longer than the base model's context."""
    longest = max(recipe.tokens, recipe.context)
    limit = config.max_position_embeddings
    if longest > limit:
        raise ValueError(f"{recipe.model} has contexts of {limit} tokens: {longest} are too many.")


# ---- the worked example
@torch.no_grad()
def main(folder=PRETRAINED):
    """A failure and a success of a random agent, from the lake to the loss."""
    run = load_run(folder)
    rng = np.random.default_rng(1)
    lakes = random_lakes(1, rng, goal_distance=3, test=True)
    env = make_env(lakes, rng)
    (episodes,) = rollout(env, RandomAgent(env, rng), 100)
    failure = next(e for e in episodes if e.episode_return == 0 and len(e.actions) < 4)
    success = next(e for e in episodes if e.episode_return > 0 and len(e.actions) < 6)
    print(f"A lake, and an episode on it:\n\n{draw(lakes[0], success.observations)}\n")
    print(f"As text: {run.tokenizer.text(success)}")
    print(f"As tokens: {run.tokenizer.encode(success)}\n")

    episodes = [failure, success, success]
    length = sum(len(run.tokenizer.encode(episode)) for episode in episodes)
    batch = collate([encode_slice(run.tokenizer, iter([episodes]), length, run.recipe.gamma)])
    batch = batch._replace(rewards=run.recipe.reward_scale * batch.rewards)  # as in train.py
    q = run.network(batch.tokens, batch.positions)  # (1, N, A)
    y = td_targets(q, q, batch.rewards, batch.discounts)  # (1, N); here phi is theta
    loss = td_loss(q, batch.actions, y, batch.mask)

    print("A slice of a failure, this success and, once more, this success:")
    names = [f"Q({word})" for word in ACTIONS] + "action reward discount target error".split()
    print("\n  at  tile" + "".join(f"{name:>10}" for name in names))
    columns = (batch.positions, batch.actions, batch.rewards, batch.discounts, q, y)
    rows = zip(*(column[0] for column in columns))
    for episode in episodes:
        for tile in episode.observations[:-1]:
            position, action, reward, discount, values, target = next(rows)
            cells = "".join(f"{value:10.3f}" for value in values)
            cells += f"{ACTIONS[action]:>10}{reward:10.0f}{discount:10.1f}{target:10.3f}"
            print(f"{position:4}{tile:6}{cells}{target - values[action]:10.3f}")
        print()
    print(f"The loss is the mean of the squared errors: {loss:.5f}")


if __name__ == "__main__":
    with user_errors():
        main(*sys.argv[1:2])
