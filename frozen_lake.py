"""Frozen Lake: the world, in numpy alone.

What is here
    Lake, random_lakes      a map, and maps drawn by the rules of the paper's notebook
    FrozenLake              many lakes stepped at once with arrays; gymnasium's FrozenLake-v1, action for action
    ChangingLake            the same, but that each lake becomes another one after some episodes (figure 7)
    Windows                 the same, but that tiles have the numbers that they would have in a larger map
    Episode, roll_out       what a player leaves behind, and the one loop in which every player plays
    RandomPlayer, TabularQ, Explorer, ShortestPath
                            TabularQ makes training data (the paper's "traditional RL algorithm"); on a test lake
                            they are the measure of what a transformer learns in its context, from below and from above
    draw                    a lake and a path on it, as text

Part of the paper: section 4.1 (environment, data). Departures: the paper does not name its data-making algorithm, we take
tabular Q-learning; it does not say whether a rejected map is drawn again at the same size, we draw its size again too.

Shapes: N lakes, S tiles of the largest lake (tile = row * width + column), A = 4 actions.
"""

import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np

ACTIONS = ("left", "down", "right", "up")  # gymnasium's order, 0..3
DIRECTIONS = ((0, -1), (1, 0), (0, 1), (-1, 0))  # (row, column) of each action
MAX_STEPS = 100  # gymnasium's step limit for FrozenLake-v1


# ------------------------------------------------------------------------------------------------------------- the map
@dataclass(frozen=True)
class Lake:
    """An immutable map: `rows` of equal length over S (start), F (frozen), H (hole), G (goal).

    Raises ValueError, in one sentence, for an unknown tile, ragged rows, or a map without a start or a goal.
    """

    rows: tuple[str, ...]

    def __post_init__(self):
        if isinstance(self.rows, str):
            raise ValueError(f"A lake is made of its rows, one string each, not of the single string {self.rows!r}.")
        object.__setattr__(self, "rows", tuple(self.rows))
        name = "/".join(self.rows)
        if not name.replace("/", ""):
            raise ValueError("A lake needs at least one tile, but this one has none.")
        if len({len(row) for row in self.rows}) != 1:
            raise ValueError(f"The rows of lake {name} differ in length: make them equally long.")
        if unknown := sorted(set("".join(self.rows)) - set("SFHG")):
            raise ValueError(f"Lake {name} has the unknown tile {unknown[0]!r}: use only S, F, H and G.")
        for tile, what in (("S", "start"), ("G", "goal")):
            if tile not in name:
                raise ValueError(f"Lake {name} has no {what}: put at least one {tile} into it.")

    @property
    def height(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        return len(self.rows[0])

    @cached_property
    def is_test(self) -> bool:
        """Whether this lake is set aside for tests: one in ten is, by a hash of its map, whoever draws it and when."""
        return zlib.crc32(str(self).encode()) % 10 == 0

    @cached_property
    def tiles(self) -> np.ndarray:
        """The tiles as characters, (height * width,)."""
        return np.array(list("".join(self.rows)))

    def __str__(self) -> str:
        return "\n".join(self.rows)


@cache
def grid_moves(height: int, width: int) -> np.ndarray:
    """Where each action leads on a grid with walls around it: (height * width, A) tile numbers."""
    row, column = np.divmod(np.arange(height * width), width)
    return np.stack(
        [np.clip(row + dr, 0, height - 1) * width + np.clip(column + dc, 0, width - 1) for dr, dc in DIRECTIONS], axis=1
    )


def hops(moves: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Fewest steps from every tile to the nearest target, by relaxation.

    moves: (N, S, A) successor tiles, -1 where a move is unknown or impossible. targets: (N, S) bool.
    Returns (N, S) float, inf where no target can be reached.
    """
    distance = np.where(targets, 0.0, np.inf)  # (N, S)
    lake = np.arange(len(moves))[:, None, None]
    while True:
        onward = np.where(moves >= 0, distance[lake, moves], np.inf)  # (N, S, A)
        nearer = np.minimum(distance, 1 + onward.min(-1))
        if np.array_equal(nearer, distance):
            return distance
        distance = nearer


def random_lakes(
    count: int, rng: np.random.Generator, sides: tuple[int, int] = (3, 5), min_hops: int = 4, test: bool | None = None
) -> list[Lake]:
    """`count` lakes by the notebook's rules; only test lakes, only others, or (None) both.

    Width and height are each uniform in sides[0]..sides[1]. A tile is a start with probability 0.1, each remaining one a
    goal with 0.1, each remaining one a hole with 0.2. A map is kept if it has a start and a goal and, from every start, the
    nearest goal can be reached and is at least `min_hops` steps away; otherwise all of it is drawn again, its size too.
    A lake can come more than once. The same generator state gives the same lakes, and fewer of them give the first ones.
    Raises ValueError if the numbers are out of range or (almost) no such map exists.
    """
    low, high = sides
    if count < 0:
        raise ValueError(f"The number of lakes has to be at least 0, but it is {count}.")
    if not 2 <= low <= high <= 10:
        raise ValueError(f"A lake has 2 to 10 tiles a side, with the smaller number first, but {low}-{high} was asked for.")
    if not 1 <= min_hops <= low * low - 1:
        raise ValueError(f"A goal {min_hops} hops away does not fit every lake of {low} x {low}: use 1 to {low * low - 1}.")
    lakes: list[Lake] = []
    for _ in range(1000):
        found: list[Lake] = []
        for height, width in itertools.product(range(low, high + 1), repeat=2):  # equally many candidates of every size
            tiles = _random_tiles(max(64, 16384 // high**2), height * width, rng)  # (candidates, S)
            moves = np.where(np.isin(tiles, ("H", "G"))[..., None], -1, grid_moves(height, width))
            distance, start = hops(moves, tiles == "G"), tiles == "S"
            kept = start.any(1) & np.all(~start | (np.isfinite(distance) & (distance >= min_hops)), axis=1)
            found += (Lake(tuple("".join(row) for row in t.reshape(height, width))) for t in tiles[kept])
        lakes += (found[i] for i in rng.permutation(len(found)) if test in (None, found[i].is_test))
        if len(lakes) >= count:
            return lakes[:count]
    raise ValueError(
        f"Only {len(lakes)} of {count} lakes were found with {low}-{high} tiles a side and every goal at least {min_hops} "
        "hops away: ask for fewer hops or larger lakes."
    )


def _random_tiles(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """(count, size) tile characters, each drawn by the notebook's three successive chances."""
    start, goal, hole = (rng.random((count, size)) < p for p in (0.1, 0.1, 0.2))
    return np.where(start, "S", np.where(goal, "G", np.where(hole, "H", "F")))


# ----------------------------------------------------------------------------------------------------- the environment
class FrozenLake:
    """N lakes stepped at once. Row i of every array is lake i.

    Equal to gymnasium's FrozenLake-v1: an action off the edge stays in place; entering a goal pays 1.0; holes and goals end
    the episode and hold whoever is there; on slippery ice the move goes, with probability 1/3 each, as asked or to either
    side of it; after `max_steps` steps the episode is cut off (truncated).
    """

    def __init__(self, lakes: Sequence[Lake], rng: np.random.Generator, slippery: bool = False, max_steps: int = MAX_STEPS):
        if not lakes:
            raise ValueError("An environment needs at least one lake, but none was given.")
        if max_steps < 1:
            raise ValueError(f"An episode needs at least one step, but max_steps is {max_steps}.")
        self.lakes, self.rng, self.slippery, self.max_steps = list(lakes), rng, slippery, max_steps
        size = max(lake.height * lake.width for lake in lakes)
        self.tiles = np.full((len(lakes), size), "H")  # (N, S), padded with holes that cannot be reached
        self.moves = np.tile(np.arange(size)[:, None], (len(lakes), 1, 4))  # (N, S, A), padding leads nowhere
        for i, lake in enumerate(lakes):
            self.tiles[i, : lake.tiles.size] = lake.tiles
            self.moves[i, : lake.tiles.size] = grid_moves(lake.height, lake.width)
        self.goal, self.terminal = self.tiles == "G", np.isin(self.tiles, ("G", "H"))
        self.moves = np.where(self.terminal[..., None], np.arange(size)[:, None], self.moves)
        starts = [np.flatnonzero(lake.tiles == "S") for lake in lakes]
        self._start_count = np.array([len(s) for s in starts])
        most = self._start_count.max()
        self._starts = np.stack([np.resize(s, most) for s in starts])
        self._base = np.arange(len(lakes)) * size  # row i of a flattened (N, S) array begins here
        self._rewards = self.goal.astype(np.float32)
        self.state, self.steps = np.zeros(len(lakes), np.int64), np.zeros(len(lakes), np.int64)
        self.reset()

    def __len__(self) -> int:
        return len(self.lakes)

    def reset(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Begin an episode at a uniformly drawn start, in the given rows (bool (N,)) or all; returns all states (N,)."""
        rows = np.ones(len(self), bool) if rows is None else rows
        pick = (self.rng.random(int(rows.sum())) * self._start_count[rows]).astype(np.int64)
        self.state = self.state.copy()  # the caller may hold the one that `step` returned
        self.state[rows] = self._starts[rows, pick]
        self.steps[rows] = 0
        return self.state

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Take actions (N,); returns states, rewards float32, terminated bool, truncated bool, each (N,).

        That the actions lie in 0..3 is the caller's duty: to check them here would cost as much as the step.
        """
        if self.slippery:
            actions = (actions + self.rng.integers(-1, 2, len(self))) % 4
        state = self.moves.take((self._base + self.state) * 4 + actions)
        here = self._base + state
        rewards = self._rewards.take(here) * (state != self.state)  # a goal pays on entering, not for staying
        self.state = state
        self.steps += 1
        terminated = self.terminal.take(here)
        return state, rewards, terminated, (self.steps >= self.max_steps) & ~terminated


class ChangingLake:
    """N lakes that change without notice: row i is lakes[i][0] for `episodes` episodes, and from then on lakes[i][1].

    Both are stepped all the time, and each row shows one of them. For players it is a FrozenLake.
    """

    def __init__(self, lakes: Sequence[tuple[Lake, Lake]], rng: np.random.Generator, episodes=30, max_steps: int = MAX_STEPS):
        self.both = [FrozenLake(side, rng, max_steps=max_steps) for side in zip(*lakes)]
        larger = max(self.both, key=lambda env: env.goal.shape[1])
        self.moves, self.goal, self.max_steps, self.change = larger.moves, larger.goal, max_steps, episodes
        self.begun = np.zeros(len(lakes), np.int64)  # (N,) episodes

    def __len__(self) -> int:
        return len(self.begun)

    def _shown(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.where(self.begun > self.change, second, first)

    def reset(self, rows: np.ndarray | None = None) -> np.ndarray:
        self.begun += 1 if rows is None else rows
        return self._shown(*(env.reset(rows) for env in self.both))

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return tuple(self._shown(*outcomes) for outcomes in zip(*(env.step(actions) for env in self.both)))


class Windows:
    """Some of the lakes of `env`, a `share` of them, numbered as if each were a window of a larger map, somewhere in it.

    The larger map has up to `side` tiles a side. Nothing else changes, and no tile outside of the window can be reached: so
    whoever reads tile numbers meets those of larger lakes, and their distance from row to row, on smaller ones. For players
    it is a FrozenLake.
    """

    def __init__(self, env: FrozenLake, rng: np.random.Generator, share: float, side: int = 7):
        self.env, self.max_steps, self.lake = env, env.max_steps, np.arange(len(env))
        self.numbers = np.tile(np.arange(env.goal.shape[1]), (len(env), 1))  # (N, S) of each tile of a lake
        for row in np.flatnonzero(rng.random(len(env)) < share):
            lake = env.lakes[row]
            columns = rng.integers(lake.width, max(side, lake.width) + 1)
            top, left = rng.integers(0, max(side - lake.height, 0) + 1), rng.integers(0, columns - lake.width + 1)
            y, x = np.divmod(np.arange(lake.tiles.size), lake.width)
            self.numbers[row, : lake.tiles.size] = (top + y) * columns + left + x
        self.moves = np.zeros((len(env), self.numbers.max() + 1, 4), int)
        self.goal = np.zeros(self.moves.shape[:2], bool)
        for row, lake in enumerate(env.lakes):
            numbers = self.numbers[row, : lake.tiles.size]
            self.moves[row, numbers] = self.numbers[row, env.moves[row, : lake.tiles.size]]
            self.goal[row, numbers] = env.goal[row, : lake.tiles.size]

    def __len__(self) -> int:
        return len(self.lake)

    def reset(self, rows: np.ndarray | None = None) -> np.ndarray:
        return self.numbers[self.lake, self.env.reset(rows)]

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        state, *outcome = self.env.step(actions)
        return self.numbers[self.lake, state], *outcome


# ----------------------------------------------------------------------------------------------- episodes and players
@dataclass(frozen=True, eq=False)
class Episode:
    """n steps on one lake: observations (n + 1,), actions (n,), rewards (n,); truncated if the step limit cut it off."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    truncated: bool

    @property
    def total(self) -> float:
        """The undiscounted return."""
        return float(self.rewards.sum())


class Step(NamedTuple):
    """One step on N lakes; every field is (N,), as `FrozenLake` takes and gives it."""

    state: np.ndarray
    action: np.ndarray
    successor: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


def roll_out(env: FrozenLake, player, episodes: int, bar=None, limit: float = math.inf) -> list[list[Episode]]:
    """Let `player` play so many episodes on every lake of `env`, all lakes side by side; [lake][episode].

    After `limit` steps on each lake everything is cut off, however many episodes that makes.

    A player has `act(state, episode, playing) -> action` and `learn(step, playing)`, arrays of one row a lake. No lake waits
    for another: `episode` is the number of each one's present episode, and `playing` is False where all have been played.
    A progress `bar` is told of every episode that ends.
    """
    if episodes < 1:
        raise ValueError(f"At least one episode has to be played, but {episodes} were asked for.")
    state, episode, steps = env.reset(), np.zeros(len(env), np.int64), []
    while (playing := episode < episodes).any() and len(steps) < limit:
        action = player.act(state, episode, playing)
        step = Step(state, action, *env.step(action))
        if len(steps) + 1 == limit:
            step = step._replace(truncated=~step.terminated)
        player.learn(step, playing)
        steps.append(step)
        over = step.terminated | step.truncated
        state = env.reset(over)
        episode += over & playing
        if bar is not None:
            bar.update(int((over & playing).sum()))
    s, a, successor, r, terminated, truncated = (np.stack(column, 1) for column in zip(*steps))  # (N, steps)
    played = []
    for i, over in enumerate(terminated | truncated):
        ends = np.flatnonzero(over)[:episodes] + 1
        played.append([
            Episode(np.append(s[i, b:e], successor[i, e - 1]), a[i, b:e], r[i, b:e], bool(truncated[i, e - 1]))
            for b, e in zip([0, *ends], ends)
        ])  # fmt: skip
    return played


class RandomPlayer:
    """Acts uniformly at random."""

    def __init__(self, env: FrozenLake, rng: np.random.Generator):
        self.n, self.rng = len(env), rng

    def act(self, state: np.ndarray, episode: np.ndarray, playing: np.ndarray) -> np.ndarray:
        return self.rng.integers(0, 4, self.n)

    def learn(self, step: Step, playing: np.ndarray) -> None:
        pass


class TabularQ:
    """Tabular Q-learning (Watkins 1989) on every lake at once, starting from zeros.

    In episode e it acts greedily, ties broken at random, with probability `greedy(e)`, otherwise uniformly at random;
    `greedy` takes and gives arrays (N,).
    Update: Q(s, a) += rate * (r + gamma * max Q(s', .) - Q(s, a)), without the bootstrap at a hole or a goal.
    """

    def __init__(self, env: FrozenLake, rng: np.random.Generator, greedy: Callable, gamma=0.9, rate=0.5):
        self.q = np.zeros(env.moves.shape)  # (N, S, A)
        self.rng, self.greedy, self.gamma, self.rate = rng, greedy, gamma, rate
        self.lake = np.arange(len(env))

    def act(self, state: np.ndarray, episode: np.ndarray, playing: np.ndarray) -> np.ndarray:
        n = len(self.lake)
        best = np.argmax(self.q[self.lake, state] + 1e-9 * self.rng.random((n, 4)), axis=1)
        return np.where(self.rng.random(n) < self.greedy(episode), best, self.rng.integers(0, 4, n))

    def learn(self, step: Step, playing: np.ndarray) -> None:
        target = step.reward + self.gamma * np.where(step.terminated, 0.0, self.q[self.lake, step.successor].max(1))
        error = target - self.q[self.lake, step.state, step.action]
        self.q[self.lake, step.state, step.action] += np.where(playing, self.rate * error, 0.0)


class Explorer:
    """Remembers every transition, walks the shortest known way to an untried action, and exploits once a goal is known.

    Nearly the best that any learner can do on a lake that does not slip. Where no goal and nothing untried is within reach,
    the lake is not what it was, and all is forgotten.
    """

    def __init__(self, env: FrozenLake, rng: np.random.Generator):
        self.known = np.full(env.moves.shape, -1)  # (N, S, A) successor, -1: untried
        self.ended = np.zeros(env.goal.shape, bool)  # (N, S) seen to end the episode
        self.goal = np.zeros(env.goal.shape, bool)  # (N, S) seen to pay
        self.to_goal, self.to_untried = np.full(env.goal.shape, np.inf), np.zeros(env.goal.shape)  # (N, S) hops
        self.stale = np.zeros(len(env), bool)  # (N,) learned something since the hops were counted
        self.rng, self.lake = rng, np.arange(len(env))

    def act(self, state: np.ndarray, episode: np.ndarray, playing: np.ndarray) -> np.ndarray:
        if self.stale.any():
            known, untried = self.known[self.stale], (self.known < 0).any(-1) & ~self.ended
            self.to_goal[self.stale] = hops(known, self.goal[self.stale])
            self.to_untried[self.stale] = hops(known, untried[self.stale])
            self.stale[:] = False
        lost = np.isinf(np.minimum(self.to_goal, self.to_untried)[self.lake, state])
        self.known[lost], self.ended[lost], self.goal[lost], self.to_untried[lost] = -1, False, False, 0.0
        exploit = np.isfinite(self.to_goal[self.lake, state])[:, None]  # (N, 1)
        distance = np.where(exploit, self.to_goal, self.to_untried)  # (N, S)
        successor = self.known[self.lake, state]  # (N, A)
        cost = np.where(successor >= 0, distance[self.lake[:, None], successor] + 1, np.where(exploit, np.inf, 0.0))
        return np.argmin(cost + 1e-9 * self.rng.random(cost.shape), axis=1)

    def learn(self, step: Step, playing: np.ndarray) -> None:
        here, there, ended = (self.lake, step.state, step.action), (self.lake, step.successor), step.terminated
        news = (self.known[here] != step.successor) | (self.ended[there] != ended) | (self.goal[there] != (step.reward > 0))
        row = self.lake[playing & (news | self.ended[self.lake, step.state])]  # new, or no longer as it was
        self.stale[row] = True
        self.ended[row, step.state[row]] = self.goal[row, step.state[row]] = False  # nobody acts where an episode ends
        self.known[row, step.state[row], step.action[row]] = step.successor[row]
        self.ended[row, step.successor[row]], self.goal[row, step.successor[row]] = ended[row], step.reward[row] > 0
        row = row[ended[row]]
        self.known[row, step.successor[row]] = -1  # nothing leads on from where an episode ends


class ShortestPath:
    """Knows the map: always walks a shortest way to a goal. The upper bound."""

    def __init__(self, env: FrozenLake):
        self.env, self.lake = env, np.arange(len(env))
        self.distance = hops(env.moves, env.goal)

    def act(self, state: np.ndarray, episode: np.ndarray, playing: np.ndarray) -> np.ndarray:
        successor = self.env.moves[self.lake, state]  # (N, A)
        return self.distance[self.lake[:, None], successor].argmin(1)

    def learn(self, step: Step, playing: np.ndarray) -> None:
        pass


# ------------------------------------------------------------------------------------------------------------- drawing
def draw(lake: Lake, path: Sequence[int] = ()) -> str:
    """The lake as text, one row a line, the visited tiles in brackets and the last one of them in <>."""
    visited = set(path)
    cells = [f"[{t}]" if i in visited else f" {t} " for i, t in enumerate(lake.tiles)]
    if len(path):
        cells[path[-1]] = f"<{lake.tiles[path[-1]]}>"
    return "\n".join("".join(cells[i : i + lake.width]) for i in range(0, len(cells), lake.width))
