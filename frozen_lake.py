"""Frozen Lake: the world, in numpy (section 4.1 of the paper).

    python frozen_lake.py    a lake, and the returns of players that need no network

A player has `act(state, episode) -> action`, arrays (N,), and `learn(step)`; `roll_out` is the one
loop in which all of them play, the transformer too (icrl.InContext).
Shapes: N lakes side by side, S tile numbers, A = 4 actions. `rng` is always a numpy Generator.
"""

import math
import zlib
from collections import namedtuple
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from tqdm import tqdm

ACTIONS = ("left", "down", "right", "up")  # gymnasium's order, 0..3
DIRECTIONS = ((0, -1), (1, 0), (0, 1), (-1, 0))  # (row, column) of each action
MAX_STEPS = 100  # gymnasium's step limit
MAX_TILES = 100  # a lake has at most 10 x 10
NOTEBOOK_ROWS = ("HHFF", "FFFF", "SFFH", "HFFF", "HFFF", "HFGF")  # the notebook's lake (figure 5)


# ---- the map
@dataclass(frozen=True)
class Lake:
    """A map: `rows` of equal length over S (start), F (frozen), H (hole), G (goal)."""

    rows: tuple[str, ...]
    links: tuple = ()  # where each direction leads from each tile, (tiles, A), if no grid

    def __post_init__(self):
        letters = set("".join(self.rows))
        if not {"S", "G"} <= letters <= set("SFHG") or len(set(map(len, self.rows))) != 1:
            needed = "rows of equal length over S, F, H and G, with an S and a G"
            raise ValueError(f"{self.rows} is no lake: that takes {needed}.")

    @property
    def width(self):
        return len(self.rows[0])

    @cached_property
    def tiles(self):
        """Letters, (height * width,): tile = row * width + column."""
        return np.array(list("".join(self.rows)))

    @cached_property
    def moves(self):
        """Tiles that the four directions lead to, (tiles, A); ends lead to themselves."""
        end = np.isin(self.tiles, ["H", "G"])[:, None]
        moves = np.array(self.links or grid_moves(len(self.rows), self.width))
        return np.where(end, np.arange(end.size)[:, None], moves)

    @property
    def is_test(self):
        """Whether it is set aside for tests: figure 5's, and one in ten by a hash of its map."""
        return self.rows == NOTEBOOK_ROWS or zlib.crc32("\n".join(self.rows).encode()) % 10 == 0


NOTEBOOK_LAKE = Lake(NOTEBOOK_ROWS)


def grid_moves(height, width):
    """Where each direction leads on a walled grid: tiles (height * width, A)."""
    row, column = np.divmod(np.arange(height * width)[:, None], width)  # (tiles, 1)
    down, right = np.transpose(DIRECTIONS)  # (A,)
    row, column = np.clip(row + down, 0, height - 1), np.clip(column + right, 0, width - 1)
    return row * width + column


def hops(moves, distance):
    """Fewest steps from each tile to a goal, (N, S), or inf.

    moves (N, S, A): where each direction leads; distance (N, S): 0 at goals, else inf or a bound.
    """
    lake = np.arange(len(moves))[:, None, None]
    while True:
        nearer = np.minimum(distance, 1 + distance[lake, moves].min(-1))
        if np.array_equal(nearer, distance):
            return distance
        distance = nearer


def random_lakes(count, rng, sides=(3, 5), min_hops=4, *, test):
    """`count` lakes by the rules of the paper's notebook: all are test lakes, or none.

    Width and height are drawn from `sides`. A tile is a start with probability 0.1, else a goal
    with 0.1, else a hole with 0.2. A map is kept if it has a start and, from every start, the
    nearest goal is in reach and at least `min_hops` away. ValueError if there are (almost) none.
    """
    low, high = sides
    asked = f"lakes of every size from {low} to {high} tiles a side with goals {min_hops} hops away"
    possible = 2 <= low <= high <= 10 and 1 <= min_hops < low * low
    lakes = []
    for _ in range(1000 if possible else 0):
        if len(lakes) >= count:
            return lakes[:count]
        found = []
        for height, width in product(range(low, high + 1), repeat=2):
            each = 16384 // high**2  # tries for every size
            moves = np.tile(grid_moves(height, width), (each, 1, 1))
            tiles, kept = random_tiles(moves, min_hops, rng)
            maps = tiles[kept].reshape(-1, height, width)
            found += [Lake(tuple(map("".join, rows))) for rows in maps]
        lakes += [found[i] for i in rng.permutation(len(found)) if found[i].is_test == test]
    raise ValueError(f"There are too few {asked}: try 2 to 10 tiles, fewer hops or --hard 0.")


def random_tiles(moves, min_hops, rng):
    """Letters (N, tiles) for moves (N, tiles, A), and which maps the rules keep, bool (N,)."""
    start, goal, hole = (rng.random(moves.shape[:2]) < chance for chance in (0.1, 0.1, 0.2))
    tiles = np.select([start, goal, hole], ["S", "G", "H"], "F")
    moves = np.where((tiles == "H")[..., None], np.arange(tiles.shape[1])[:, None], moves)
    distance = hops(moves, np.where(tiles == "G", 0.0, np.inf))
    far = (distance >= min_hops) & (distance < np.inf)
    return tiles, start.any(1) & (far | ~start).all(1)


def random_graphs(count, rng):
    """Worlds without a grid: any action on 9 to 25 tiles leads anywhere, goals are 3+ hops off."""
    graphs = []
    while len(graphs) < count:
        size = rng.integers(9, 26)
        links = rng.integers(size, size=(100, size, len(ACTIONS)))
        tiles, kept = random_tiles(links, 3, rng)
        for i in np.flatnonzero(kept)[:1]:  # one: large ones pass oftener
            graphs.append(Lake(("".join(tiles[i]),), tuple(map(tuple, links[i].tolist()))))
    return graphs


def window(lake, rng, side=7):
    """Tile numbers (tiles,) as if the lake were a part of a map of up to `side` tiles a side."""
    columns = rng.integers(lake.width, max(side, lake.width) + 1)
    top = rng.integers(max(side - len(lake.rows), 0) + 1)
    left = rng.integers(columns - lake.width + 1)
    row, column = np.divmod(np.arange(lake.tiles.size), lake.width)
    return (top + row) * columns + left + column


# ---- the environment
class FrozenLake:
    """N lakes stepped at once, as gymnasium's FrozenLake-v1; row i of every array is lake i.

    States are tile numbers. An action off the edge stays in place; entering a goal pays 1; holes
    and goals end the episode; after `max_steps` it is truncated. Each lake may have its own
    `numbers` (tiles,) for its tiles and `words` (A,), the direction of each action word; all or
    some may be `slippery`: a move then goes as asked or to either side, with probability 1/3 each.
    """

    def __init__(self, lakes, rng, max_steps=MAX_STEPS, numbers=(), words=range(4), slippery=False):
        N = len(lakes)
        self.rng, self.max_steps, self.row = rng, max_steps, np.arange(N)
        self.numbers = numbers or [np.arange(lake.tiles.size) for lake in lakes]
        size = 1 + max(number.max() for number in self.numbers)  # S
        self.words = np.broadcast_to(words, (N, len(ACTIONS)))
        self.slippery = np.broadcast_to(slippery, N)
        self.tiles = np.full((N, size), "")  # (N, S), "" where no tile has the number
        self.moves = np.zeros((N, size, len(ACTIONS)), int)  # (N, S, A)
        for i, (lake, number) in enumerate(zip(lakes, self.numbers)):
            self.tiles[i, number] = lake.tiles
            self.moves[i, number] = number[lake.moves]
        self.start, self.goal = self.tiles == "S", self.tiles == "G"  # (N, S)
        self.end = self.goal | (self.tiles == "H")
        self.state, self.steps = np.zeros((2, N), int)
        self.reset(np.ones(N, bool))

    def __len__(self):
        return len(self.row)

    def reset(self, rows):
        """Begin an episode at a uniformly drawn start in some rows, bool (N,); all states (N,)."""
        starts = self.start[rows]  # (rows, S)
        pick = (self.rng.random(len(starts)) * starts.sum(1)).astype(int)
        self.state = self.state.copy()  # the caller may hold the old one
        self.state[rows] = (starts.cumsum(1) == 1 + pick[:, None]).argmax(1)  # the pick-th start
        self.steps[rows] = 0
        return self.state

    def step(self, actions):
        """Take actions (N,); states, rewards float32, terminated bool, truncated bool, all (N,)."""
        before, direction = self.state, self.words[self.row, actions]
        if self.slippery.any():
            sideways = self.rng.integers(-1, 2, len(self))
            direction = (direction + sideways * self.slippery) % len(ACTIONS)
        self.state = self.moves[self.row, before, direction]
        self.steps += 1
        rewards = self.goal[self.row, self.state] & (self.state != before)  # paid on entering
        terminated = self.end[self.row, self.state]
        truncated = (self.steps >= self.max_steps) & ~terminated
        return self.state, rewards.astype(np.float32), terminated, truncated


def worlds(lakes, rng, max_steps=MAX_STEPS, shuffled=0.0, windows=0.0, slippery=0.0):
    """The lakes' environment. A share `shuffled` has random tile numbers (0 to 48 or more) and
    permuted words; a share `windows` of the others a `window`; `slippery` of all slip.
    """
    numbers = [np.arange(lake.tiles.size) for lake in lakes]
    words = [np.arange(len(ACTIONS)) for _ in lakes]
    for i, lake in enumerate(lakes):
        if shuffled and rng.random() < shuffled:
            numbers[i] = rng.permutation(max(49, lake.tiles.size))[: lake.tiles.size]
            words[i] = rng.permutation(words[i])
        elif windows and rng.random() < windows:
            numbers[i] = window(lake, rng)
    slips = slippery and rng.random(len(lakes)) < slippery
    return FrozenLake(lakes, rng, max_steps, numbers, words, slips)


# One step on N lakes, each field (N,); `playing`: lakes with episodes left to play.
Step = namedtuple("Step", "state action successor reward terminated truncated playing")


@dataclass(frozen=True, eq=False)
class Episode:
    """n steps on one lake."""

    observations: np.ndarray  # (n + 1,)
    actions: np.ndarray  # (n,)
    rewards: np.ndarray  # (n,)
    truncated: bool = False  # whether the step limit cut it off

    @cached_property
    def total(self):
        """The undiscounted return."""
        return float(self.rewards.sum())


def roll_out(env, player, episodes, limit=math.inf, first=0):
    """Let `player` play so many episodes on every lake of `env`, side by side; [lake][episode].

    No lake waits for another: `player.act` is told each one's present episode, counted from
    `first`. Lakes that are done are played on in vain until the last one is. After `limit` steps
    all end, and unfinished episodes are dropped.
    """
    episode, steps = np.full(len(env), first), []
    state = env.reset(np.ones(len(env), bool))
    bar = tqdm(total=len(env) * episodes, desc="Playing", unit="episode", delay=5, leave=False)
    while (playing := episode < first + episodes).any() and len(steps) < limit:
        action = player.act(state, episode)
        step = Step(state, action, *env.step(action), playing)
        steps.append(step)
        player.learn(step)
        over = step.terminated | step.truncated
        state = env.reset(over)
        episode = episode + (over & playing)
        bar.update((over & playing).sum())
    bar.close()
    fields = [np.stack(field, axis=1) for field in zip(*steps)]  # each (N, steps)
    return [split(Step(*(field[lake] for field in fields))) for lake in env.row]


def split(steps):
    """The episodes on one lake, from a Step with fields of (steps,)."""
    ends = 1 + np.flatnonzero((steps.terminated | steps.truncated) & steps.playing)
    episodes = []
    for begin, end in zip([0, *ends], ends):
        observations = np.append(steps.state[begin:end], steps.successor[end - 1])
        actions, rewards = steps.action[begin:end], steps.reward[begin:end]
        episodes.append(Episode(observations, actions, rewards, steps.truncated[end - 1]))
    return episodes


# ---- the players
class RandomPlayer:
    def __init__(self, env, rng):
        self.rng = rng

    def act(self, state, episode):
        return self.rng.integers(0, len(ACTIONS), len(state))

    def learn(self, step):
        pass


class TabularQ:
    """Q-learning (Watkins 1989) on every lake at once, starting from zeros.

    In episode e it acts greedily with probability `greedy(e)`, (N,), otherwise at random.
    Update: Q(s, a) += rate * (r + gamma * max Q(s', .) - Q(s, a)); no max at a hole or a goal.
    """

    def __init__(self, env, rng, greedy, gamma=0.9, rate=0.5):
        self.q = np.zeros(env.moves.shape)  # (N, S, A)
        self.row, self.rng = env.row, rng
        self.greedy, self.gamma, self.rate = greedy, gamma, rate

    def act(self, state, episode):
        ties = 1e-9 * self.rng.random((len(state), len(ACTIONS)))
        best = (self.q[self.row, state] + ties).argmax(1)
        greedily = self.rng.random(len(state)) < self.greedy(episode)
        return np.where(greedily, best, self.rng.integers(0, len(ACTIONS), len(state)))

    def learn(self, step):
        value = np.where(step.terminated, 0.0, self.q[self.row, step.successor].max(1))
        taken = (self.row, step.state, step.action)
        error = step.reward + self.gamma * value - self.q[taken]
        self.q[taken] += step.playing * self.rate * error


class Planner(RandomPlayer):  # for its `learn`
    """The best possible player: it knows the lake, and iterates values over the steps left."""

    def __init__(self, env, rng):
        self.env, best = env, []  # (N, S) directions, of the last step first
        value, slip = np.zeros(env.tiles.shape), env.slippery[:, None, None] / 3
        for _ in range(env.max_steps):
            worth = np.where(env.goal, 1.0, np.where(env.end, 0.0, value))
            worth = worth[env.row[:, None, None], env.moves]  # (N, S, A)
            sideways = np.roll(worth, 1, -1) + np.roll(worth, -1, -1)
            worth = (1 - 2 * slip) * worth + slip * sideways
            best.append(worth.argmax(-1))
            value = worth.max(-1)
        self.best = np.array(best[::-1])  # (max_steps, N, S), by the steps taken

    def act(self, state, episode):
        direction = self.best[self.env.steps, self.env.row, state]
        return (self.env.words == direction[:, None]).argmax(1)


class Explorer:
    """Remembers every step, and walks the shortest known way to a goal or, knowing none, to an
    untried action. Where neither is in reach, or on an end that ended nothing, it forgets all: the
    lake has changed (figure 7).
    """

    def __init__(self, env, rng):
        N, S, A = env.moves.shape
        self.row, self.rng = env.row, rng
        self.known = np.full((N, S + 1, A), -1)  # where actions lead; untried: to -1, the last tile
        self.goal = np.zeros((N, S + 1), bool)  # known goals

    def act(self, state, episode):
        distance = np.where(self.goal, 0.0, np.inf)  # (N, S + 1)
        distance[:, -1] = 1000.0  # beyond an untried action: farther than any known goal
        distance = hops(self.known, distance)
        here = distance[self.row, state]
        lost = np.isinf(here) | (here == 0)  # inf: nothing in reach, or a known hole; 0: a goal
        self.known[lost], self.goal[lost] = -1, False  # all untried again
        onward = distance[self.row[:, None], self.known[self.row, state]]  # (N, A)
        return np.argmin(onward + 1e-9 * self.rng.random(onward.shape), axis=1)

    def learn(self, step):
        row = self.row[step.playing]
        self.known[row, step.state[row], step.action[row]] = step.successor[row]
        row = row[step.terminated[row]]
        self.known[row, step.successor[row]] = step.successor[row][:, None]  # an end is final
        self.goal[row, step.successor[row]] = step.reward[row] > 0


def draw(lake, path=()):
    """The lake as text, visited tiles in brackets and the last of them in <>."""
    cells = [f"[{t}]" if i in path else f" {t} " for i, t in enumerate(lake.tiles)]
    if len(path):
        cells[path[-1]] = f"<{lake.tiles[path[-1]]}>"
    return "\n".join(map("".join, np.reshape(cells, (-1, lake.width))))


def main():
    rng = np.random.default_rng()
    lakes = random_lakes(1, rng, test=False)
    env = worlds(lakes, rng)
    players = {
        "random": RandomPlayer(env, rng),
        "tabular Q-learning": TabularQ(env, rng, greedy=lambda episode: episode / 30),
        "systematic explorer": Explorer(env, rng),
    }
    print("Returns of 30 episodes\n")
    for name, player in players.items():
        (played,) = roll_out(env, player, 30)
        print(f"{name:20}" + "".join(f" {episode.total:.0f}" for episode in played))
    print(f"\nThe last episode of the explorer\n\n{draw(lakes[0], played[-1].observations)}")


if __name__ == "__main__":
    from llama import exit_in_one_sentence

    with exit_in_one_sentence():
        main()
