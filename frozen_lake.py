"""Frozen Lake: the environment, and agents that need no network (section 4.1 of the paper).

    python frozen_lake.py    shows a lake, and what these agents earn on it

An agent has two methods: `act(state, episode) -> action`, all arrays (N,), and
`observe(transition)`. `rollout` is the one loop in which every agent plays, also the transformer
(icrl.InContext).

Shapes: N lakes side by side, S states (tile ids), A = 4 actions. `rng` is a numpy Generator.
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
MAX_SIDE = 10  # tiles, of the widest and tallest lake
MAX_TILES = MAX_SIDE**2
# Shuffled tiles have ids from 0 to 48, as on a lake of 7 x 7 tiles. So a network that trains on
# small lakes learns the ids of larger ones, too.
SHUFFLED_IDS = 49
BLOCK_TILES = 16384  # random maps are drawn in blocks of about this many tiles, which is fast
NOTEBOOK_ROWS = ("HHFF", "FFFF", "SFFH", "HFFF", "HFFF", "HFGF")  # figure 5


# ---- the map
@dataclass(frozen=True)
class Lake:
    """A map: rows of equal length over S (start), F (frozen), H (hole), G (goal).

    With `links` it is any other deterministic world of at most 100 tiles: links[tile][action] is
    the tile that an action leads to. How the letters are split into rows does not matter then.
    ValueError for other rows or links.
    """

    rows: tuple[str, ...]
    links: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        tiles = "".join(self.rows)
        if not {"S", "G"} <= set(tiles) <= set("SFHG") or len(set(map(len, self.rows))) != 1:
            needed = "rows of equal length over S, F, H and G, with an S and a G"
            raise ValueError(f"{self.rows} is not a lake: it needs {needed}.")
        size = len(tiles)
        if size > MAX_TILES:
            raise ValueError(f"A lake can have at most {MAX_TILES} tiles, not {size}.")
        if self.links:
            known = np.isin(self.links, range(size))  # (tiles, A)
            if known.shape != (size, len(ACTIONS)) or not known.all():
                needed = f"{size} rows of {len(ACTIONS)} tile numbers, each below {size}"
                raise ValueError(f"The links of this lake have to be {needed}.")

    @property
    def width(self):
        return len(self.rows[0])

    @cached_property
    def tiles(self):
        """Letters (height * width,); the number of a tile is row * width + column."""
        return np.array(list("".join(self.rows)))

    @cached_property
    def moves(self):
        """The tile that each action leads to, (tiles, A); holes and goals lead to themselves."""
        terminal = np.isin(self.tiles, ["H", "G"])[:, None]
        moves = np.array(self.links or grid_moves(len(self.rows), self.width))
        return np.where(terminal, np.arange(terminal.size)[:, None], moves)

    @property
    def is_test(self):
        """Whether it is held out for tests: figure 5's, and one in ten by a hash of the map.

        The split is deterministic. A world with `links` is never held out.
        """
        chosen = zlib.crc32("\n".join(self.rows).encode()) % 10 == 0
        return not self.links and (chosen or self.rows == NOTEBOOK_ROWS)


def grid_moves(height, width):
    """The tile that each action leads to on a grid with walls around it, (height * width, A)."""
    row, column = np.divmod(np.arange(height * width)[:, None], width)  # (tiles, 1)
    row_change, column_change = np.transpose(DIRECTIONS)  # (A,)
    row = np.clip(row + row_change, 0, height - 1)
    column = np.clip(column + column_change, 0, width - 1)
    return row * width + column


NOTEBOOK_LAKE = Lake(NOTEBOOK_ROWS)


def distance_to_goal(moves, distance):
    """Fewest steps from each tile to a goal, (N, S); inf where no goal can be reached.

    moves (N, S, A): the tile that each action leads to. distance (N, S): what is known at first,
    say 0 at goals and inf elsewhere.
    """
    env_index = np.arange(len(moves))[:, None, None]
    while True:
        shorter = np.minimum(distance, 1 + distance[env_index, moves].min(-1))
        if np.array_equal(shorter, distance):
            return distance
        distance = shorter


def random_lakes(count, rng, sides=(3, 5), goal_distance=4, *, test):
    """`count` lakes by the rules of the paper's notebook. All are test lakes, or none is.

    Width and height are drawn from `sides`. A tile is a start with probability 0.1, else a goal
    with 0.1, else a hole with 0.2. A map is accepted if it has a start and if, from every start,
    the nearest goal can be reached and is at least `goal_distance` steps away. ValueError if such
    maps do not exist, or almost none.
    """
    min_side, max_side = sides
    wanted = f"lakes of {min_side} to {max_side} tiles a side, goals {goal_distance} steps away"
    if not (2 <= min_side <= max_side <= MAX_SIDE and 1 <= goal_distance < min_side**2):
        raise ValueError(f"There are no {wanted}: take 2 to {MAX_SIDE} tiles, or nearer goals.")
    lakes = []
    for _ in range(1000):  # far more rounds than needed, unless such maps are very rare
        if len(lakes) >= count:
            return lakes[:count]
        accepted = []
        for height, width in product(range(min_side, max_side + 1), repeat=2):
            # Each size is tried equally often, as in the notebook.
            maps = BLOCK_TILES // max_side**2
            moves = np.tile(grid_moves(height, width), (maps, 1, 1))
            tiles, valid = random_tiles(moves, goal_distance, rng)
            for grid in tiles[valid].reshape(-1, height, width):
                accepted.append(Lake(tuple(map("".join, grid))))
        shuffled = [accepted[i] for i in rng.permutation(len(accepted))]
        lakes += [lake for lake in shuffled if lake.is_test == test]
    raise ValueError(
        f"There are too few {wanted}: take fewer lakes, nearer goals, or --far-goals 0."
    )


def random_tiles(moves, goal_distance, rng):
    """Random letters (N, tiles) for moves (N, tiles, A), and which maps are accepted, bool (N,)."""
    start, goal, hole = (rng.random(moves.shape[:2]) < chance for chance in (0.1, 0.1, 0.2))
    tiles = np.select([start, goal, hole], ["S", "G", "H"], "F")
    stay = np.arange(tiles.shape[1])[:, None]
    moves = np.where((tiles == "H")[..., None], stay, moves)
    distance = distance_to_goal(moves, np.where(tiles == "G", 0.0, np.inf))
    bad_start = start & ((distance < goal_distance) | np.isinf(distance))
    return tiles, start.any(1) & ~bad_start.any(1)


def random_graphs(count, rng):
    """Lakes of 9 to 25 tiles without a grid: an action may lead to any tile.

    Goals are 3 or more steps away. They are for tests only: no training sees any.
    """
    graphs = []
    while len(graphs) < count:
        size = rng.integers(9, 26)
        links = rng.integers(size, size=(100, size, len(ACTIONS)))
        tiles, valid = random_tiles(links, 3, rng)
        # Of 100 graphs of a size at most one is taken. Large ones are accepted more often than
        # small ones, so if all were taken, most graphs would be large.
        if valid.any():
            i = valid.argmax()
            graphs.append(Lake(("".join(tiles[i]),), tuple(map(tuple, links[i].tolist()))))
    return graphs


CROP_SIDE = 7  # tiles


def crop_ids(lake, rng):
    """Tile ids (tiles,) as if the lake were cut out of a map of up to 7 x 7 tiles.

    For example, a lake of 2 x 2 from the corner of a map with 5 columns has the ids 0, 1, 5 and 6.
    A network knows only the ids that it has seen; so it gets to know those of larger lakes.
    """
    map_width = rng.integers(lake.width, max(CROP_SIDE, lake.width) + 1)
    top = rng.integers(max(CROP_SIDE - len(lake.rows), 0) + 1)
    left = rng.integers(map_width - lake.width + 1)
    row, column = np.divmod(np.arange(lake.tiles.size), lake.width)
    return (top + row) * map_width + left + column


# ---- the environment
# A step on N lakes, as arrays (N,), or on one lake, as numbers.
# `active` tells which of the N lakes have episodes left to play.
Transition = namedtuple(
    "Transition", "state action next_state reward terminated truncated active", defaults=[True]
)


class FrozenLake:
    """N lakes stepped together, each like gymnasium's FrozenLake-v1.

    A state is the id of a tile. An action off the edge changes nothing. Entering a goal gives a
    reward of 1. Holes and goals end the episode; after `max_steps` it is truncated. Optional, per
    lake: `tile_ids` (tiles,) replace the tiles' numbers, `action_map` (A,) gives the direction of
    each action, and on `slippery` lakes a step goes as intended or to either side, each with
    probability 1/3.
    """

    def __init__(
        self, lakes, rng, max_steps=MAX_STEPS, tile_ids=None, action_map=range(4), slippery=False
    ):
        N = len(lakes)
        self.rng = rng
        self.max_steps = max_steps
        self.env_index = np.arange(N)
        self.tile_ids = tile_ids or [np.arange(lake.tiles.size) for lake in lakes]
        self.action_map = np.broadcast_to(action_map, (N, len(ACTIONS)))
        self.slippery = np.broadcast_to(slippery, N)

        size = 1 + max(ids.max() for ids in self.tile_ids)  # S
        self.tiles = np.full((N, size), "")  # (N, S), "" where no tile has this id
        self.moves = np.zeros((N, size, len(ACTIONS)), int)  # (N, S, A) by direction
        for i, (lake, ids) in enumerate(zip(lakes, self.tile_ids)):
            self.tiles[i, ids] = lake.tiles
            self.moves[i, ids] = ids[lake.moves]
        self.start = self.tiles == "S"  # (N, S)
        self.goal = self.tiles == "G"
        self.terminal = self.goal | (self.tiles == "H")

        self.state = np.zeros(N, int)
        self.steps = np.zeros(N, int)
        self.reset(np.ones(N, bool))

    def __len__(self):
        return len(self.env_index)

    def reset(self, mask):
        """Begin an episode at a random start where `mask` (N,) is True; returns all states (N,)."""
        # A random start on all lakes at once: draw a number from 1 to the count of starts, and find
        # the state at which the running count of starts reaches it.
        starts = self.start[mask]  # (n, S)
        number = 1 + (self.rng.random(len(starts)) * starts.sum(1)).astype(int)
        self.state = self.state.copy()  # the caller may still hold the old one
        self.state[mask] = (starts.cumsum(1) == number[:, None]).argmax(1)
        self.steps[mask] = 0
        return self.state

    def step(self, actions):
        """Take actions (N,); returns states, rewards float32, terminated, truncated, all (N,)."""
        previous = self.state
        direction = self.action_map[self.env_index, actions]
        if self.slippery.any():
            sideways = self.rng.integers(-1, 2, len(self))  # neighbours in ACTIONS are to the side
            direction = (direction + sideways * self.slippery) % len(ACTIONS)
        self.state = self.moves[self.env_index, previous, direction]
        self.steps += 1
        entered = self.state != previous  # so that there is no second reward without a reset
        rewards = self.goal[self.env_index, self.state] & entered
        terminated = self.terminal[self.env_index, self.state]
        truncated = (self.steps >= self.max_steps) & ~terminated
        return self.state, rewards.astype(np.float32), terminated, truncated


def make_env(lakes, rng, max_steps=MAX_STEPS, shuffled=0.0, cropped=0.0, slippery=0.0):
    """The lakes' environment, with fractions of them changed.

    Lakes that are `shuffled` have random tile ids and a random action map. Of the others, those
    that are `cropped` have the tile ids of a larger map (`crop_ids`). Any lake may be `slippery`.
    """
    tile_ids = [np.arange(lake.tiles.size) for lake in lakes]
    action_map = [np.arange(len(ACTIONS)) for _ in lakes]
    for i, lake in enumerate(lakes):
        if shuffled and rng.random() < shuffled:
            tile_ids[i] = rng.permutation(max(SHUFFLED_IDS, lake.tiles.size))[: lake.tiles.size]
            action_map[i] = rng.permutation(action_map[i])
        elif cropped and rng.random() < cropped:
            tile_ids[i] = crop_ids(lake, rng)
    slips = slippery and rng.random(len(lakes)) < slippery
    return FrozenLake(lakes, rng, max_steps, tile_ids, action_map, slips)


# ---- episodes
@dataclass(frozen=True, eq=False)
class Episode:
    """n steps on one lake."""

    observations: np.ndarray  # (n + 1,) tile ids
    actions: np.ndarray  # (n,)
    rewards: np.ndarray  # (n,)
    truncated: bool = False  # whether the step limit ended it

    @cached_property
    def episode_return(self):
        """The sum of its rewards, without a discount."""
        return float(self.rewards.sum())

    def transitions(self):
        """Its steps, one by one, as a list of Transitions."""
        n = len(self.actions)
        states = self.observations.tolist()
        truncated = [False] * (n - 1) + [bool(self.truncated)]
        terminated = [False] * (n - 1) + [not self.truncated]
        actions, rewards = self.actions.tolist(), self.rewards.tolist()
        columns = (states, actions, states[1:], rewards, terminated, truncated)
        return list(map(Transition, *columns))


def rollout(env, agent, episodes, step_limit=math.inf, first_episode=0):
    """Let an agent play `episodes` episodes on every lake of `env`; returns [lake][episode].

    The lakes are stepped together, but none waits for another to end an episode: `agent.act` is
    told the number of each lake's current episode, counted from `first_episode`. Lakes that have
    finished keep stepping, marked inactive, until all have. After `step_limit` steps everything
    ends. Steps of inactive lakes and unfinished episodes are dropped.
    """
    episode = np.full(len(env), first_episode)
    history = []
    state = env.reset(np.ones(len(env), bool))
    bar = tqdm(total=len(env) * episodes, desc="Playing", unit="episode", delay=5, leave=False)
    while (active := episode < first_episode + episodes).any() and len(history) < step_limit:
        action = agent.act(state, episode)
        next_state, reward, terminated, truncated = env.step(action)
        transition = Transition(state, action, next_state, reward, terminated, truncated, active)
        agent.observe(transition)
        history.append(transition)
        done = terminated | truncated
        state = env.reset(done)
        episode = episode + (done & active)
        bar.update((done & active).sum())
    bar.close()
    fields = [np.stack(values, axis=1) for values in zip(*history)]  # each (N, steps)
    return [split_episodes(*lake_fields) for lake_fields in zip(*fields)]  # each (steps,)


def split_episodes(state, action, next_state, reward, terminated, truncated, active):
    """The finished episodes among the steps on one lake; all arguments are arrays (steps,)."""
    ends = 1 + np.flatnonzero((terminated | truncated) & active)
    episodes = []
    for begin, end in zip([0, *ends], ends):
        observations = np.append(state[begin:end], next_state[end - 1])
        episodes.append(
            Episode(observations, action[begin:end], reward[begin:end], truncated[end - 1])
        )
    return episodes


# ---- agents
class RandomAgent:
    """Takes each action with the same probability."""

    def __init__(self, env, rng):
        self.rng = rng

    def act(self, state, episode):
        return self.rng.integers(0, len(ACTIONS), len(state))

    def observe(self, transition):
        pass


class TabularQ:
    """Q-learning (Watkins 1989) on every lake, starting from zeros.

    In episode e it acts greedily with probability `greedy_probability(e)`, (N,), else at random.
    Update: Q(s, a) += learning_rate * (r + gamma * max Q(s', .) - Q(s, a)), without the max at a
    hole or a goal. Unlike the network's loss (icrl.encode_slice), it bootstraps at the step limit.
    """

    def __init__(self, env, rng, greedy_probability, gamma=0.9, learning_rate=0.5):
        self.q = np.zeros(env.moves.shape)  # (N, S, A)
        self.env_index = env.env_index
        self.rng = rng
        self.greedy_probability = greedy_probability
        self.gamma = gamma
        self.learning_rate = learning_rate

    def act(self, state, episode):
        tie_break = 1e-9 * self.rng.random((len(state), len(ACTIONS)))
        best = (self.q[self.env_index, state] + tie_break).argmax(1)
        greedy = self.rng.random(len(state)) < self.greedy_probability(episode)
        return np.where(greedy, best, self.rng.integers(0, len(ACTIONS), len(state)))

    def observe(self, transition):
        next_value = self.q[self.env_index, transition.next_state].max(1)
        next_value = np.where(transition.terminated, 0.0, next_value)
        taken = (self.env_index, transition.state, transition.action)
        error = transition.reward + self.gamma * next_value - self.q[taken]
        self.q[taken] += transition.active * self.learning_rate * error


class ValueIteration:
    """The optimal agent: it knows the lake, and computes values backwards from the step limit.

    With n steps left, Q_n(s, a) is the mean of max Q_{n-1}(s', .) over the tiles s' that the action
    may lead to; it is 1 where s' is a goal, and 0 where it is a hole.
    """

    def __init__(self, env, rng):
        self.env = env
        slip = env.slippery[:, None, None] / 3  # the probability of each side
        value = np.zeros(env.tiles.shape)  # (N, S), with no steps left
        best = []
        for _ in range(env.max_steps):
            value = np.where(env.goal, 1.0, np.where(env.terminal, 0.0, value))
            intended = value[env.env_index[:, None, None], env.moves]  # (N, S, A)
            sideways = np.roll(intended, 1, -1) + np.roll(intended, -1, -1)
            q = (1 - 2 * slip) * intended + slip * sideways
            best.append(q.argmax(-1))
            value = q.max(-1)
        # (max_steps, N, S): best[t] are the directions to take after t steps
        self.best = np.array(best[::-1])

    def act(self, state, episode):
        direction = self.best[self.env.steps, self.env.env_index, state]
        return (self.env.action_map == direction[:, None]).argmax(1)

    def observe(self, transition):
        pass


class Explorer:
    """Remembers every transition, and takes the shortest known path to a goal or an untried action.

    A known goal comes first. If what it remembers cannot be true any more, it forgets everything:
    the lake was replaced (figure 7). That is so if neither a goal nor an untried action is in
    reach, or if it stands on what was a hole or a goal.
    """

    UNTRIED_COST = 1000.0  # in steps: any known goal is nearer than an untried action

    def __init__(self, env, rng):
        N, S, A = env.moves.shape
        self.env_index = env.env_index
        self.rng = rng
        self.unknown = S  # one more state, to which untried actions are assumed to lead
        self.leads_to = np.full((N, S + 1, A), self.unknown)
        self.goal = np.zeros((N, S + 1), bool)  # known goals

    def act(self, state, episode):
        distance = np.where(self.goal, 0.0, np.inf)  # (N, S + 1)
        distance[:, self.unknown] = self.UNTRIED_COST
        distance = distance_to_goal(self.leads_to, distance)
        here = distance[self.env_index, state]
        # A lake was replaced if the agent stands on what was a goal, at distance 0, or if nothing
        # is in reach, as on what was a hole.
        replaced = (here == 0) | np.isinf(here)
        self.leads_to[replaced] = self.unknown
        self.goal[replaced] = False
        # Choose the action whose next state is nearest. After forgetting, all are equally good.
        next_states = self.leads_to[self.env_index, state]  # (N, A)
        onward = distance[self.env_index[:, None], next_states]
        onward[replaced] = 0.0
        tie_break = 1e-9 * self.rng.random(onward.shape)
        return np.argmin(onward + tie_break, axis=1)

    def observe(self, transition):
        active = Transition(*(field[transition.active] for field in transition))
        index = self.env_index[transition.active]
        self.leads_to[index, active.state, active.action] = active.next_state
        # Holes and goals lead nowhere else.
        ended = index[active.terminated]
        end = active.next_state[active.terminated]
        self.leads_to[ended, end] = end[:, None]
        self.goal[ended, end] = active.reward[active.terminated] > 0


def draw(lake, path=()):
    """The lake as text, with visited tiles in brackets and the last one in <>."""
    cells = [f"[{t}]" if i in path else f" {t} " for i, t in enumerate(lake.tiles)]
    if len(path):
        cells[path[-1]] = f"<{lake.tiles[path[-1]]}>"
    return "\n".join(map("".join, np.reshape(cells, (-1, lake.width))))


def main():
    rng = np.random.default_rng()
    lakes = random_lakes(1, rng, test=False)
    env = make_env(lakes, rng)
    agents = {
        "random": RandomAgent(env, rng),
        "tabular Q-learning": TabularQ(env, rng, greedy_probability=lambda episode: episode / 30),
        "systematic explorer": Explorer(env, rng),
    }
    print("Returns of 30 episodes\n")
    for name, agent in agents.items():
        (episodes,) = rollout(env, agent, 30)
        print(f"{name:20}" + "".join(f" {episode.episode_return:.0f}" for episode in episodes))
    print(f"\nThe last episode of the explorer\n\n{draw(lakes[0], episodes[-1].observations)}")


if __name__ == "__main__":
    from llama import user_errors

    with user_errors():
        main()
