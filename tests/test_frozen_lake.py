"""Frozen Lake against gymnasium, a breadth-first search, and examples worked by hand."""

import math
import re
import subprocess
import sys
from collections import Counter, defaultdict
from functools import partial
from itertools import pairwise, permutations, product
from unittest.mock import Mock

import gymnasium
import numpy as np
import pytest

import frozen_lake
from frozen_lake import Explorer, FrozenLake, Lake, RandomAgent, TabularQ, crop_ids, make_env
from frozen_lake import random_lakes, rollout

LEFT, DOWN, RIGHT, UP = range(4)  # gymnasium's; the module's own table is not used
rng = np.random.default_rng
AGENTS = [RandomAgent, partial(TabularQ, greedy_probability=lambda episode: episode / 9), Explorer]
AGENTS += [lambda env, dice: Mock(act=lambda state, episode: 0 * state)]  # goes left


def any_lake(seed: int, height: int, width: int) -> Lake:
    """A start, a goal, and random tiles. Perhaps no path leads from one to the other."""
    tiles = rng(seed).permutation(["S", "G", *rng(seed).choice(list("SFHG"), height * width - 2)])
    return Lake((*map("".join, tiles.reshape(height, width)),))


def fewest_steps(start: int, goals: set[int], successors) -> float:
    """Breadth-first search from one tile to the nearest goal; inf if there is no path."""
    front, seen, steps = {start}, set(), 0
    while front and not front & goals:
        seen |= front
        front = {onward for tile in front for onward in successors(tile)} - seen
        steps += 1
    return steps if front else math.inf


def keeps_the_rules(lake: Lake, goal_distance: int) -> bool:
    """From every start the nearest goal can be reached, and is at least `goal_distance` away."""
    tile = {y + 1j * x: letter for y, row in enumerate(lake.rows) for x, letter in enumerate(row)}
    starts, goals, holes = ({z for z in tile if tile[z] == letter} for letter in "SGH")
    around = {z: tile.keys() & {z - 1, z + 1, z - 1j, z + 1j} - holes for z in tile}
    distances = [fewest_steps(start, goals, around.get) for start in starts]
    return goal_distance <= min(distances) and max(distances) < math.inf


@pytest.mark.parametrize("slippery", [False, True, np.arange(49) % 3 == 0])
@pytest.mark.parametrize("ids_of", [None, crop_ids, lambda lake, r: r.permutation(lake.tiles.size)])
def test_every_transition_of_every_size_is_gymnasiums(ids_of, slippery):
    """With any tile ids and action maps, slippery or not, and with only some lakes slippery."""
    lakes = [any_lake(i, *size) for i, size in enumerate(product(range(2, 9), repeat=2))]
    tile_ids = ids_of and [ids_of(lake, rng(i)) for i, lake in enumerate(lakes)]
    action_map = [rng(i).permutation(4) if ids_of else np.arange(4) for i in range(len(lakes))]
    env = FrozenLake(lakes, rng(), 100, tile_ids, action_map if ids_of else range(4), slippery)
    env.rng, all_ids = Mock(), tile_ids or [np.arange(lake.tiles.size) for lake in lakes]
    ours = defaultdict(Counter)
    for env.rng.integers.return_value, tile, action in product((-1, 0, 1), range(64), range(4)):
        env.state = np.array([ids[tile % ids.size] for ids in all_ids])
        state, reward, terminated, _ = env.step(np.full(len(lakes), action))
        for i in (i for i, ids in enumerate(all_ids) if tile < ids.size):
            outcome = all_ids[i].tolist().index(state[i]), reward[i], terminated[i]
            ours[i, tile, action][outcome] += 1 / 3
    assert {call.args for call in env.rng.integers.mock_calls} <= {(-1, 2, len(lakes))}
    for i, (lake, slips) in enumerate(zip(lakes, np.broadcast_to(slippery, len(lakes)).tolist())):
        gym = gymnasium.make("FrozenLake-v1", desc=list(lake.rows), is_slippery=slips).unwrapped
        for tile, action in product(gym.P, range(4)):
            theirs = Counter()
            for probability, *outcome in gym.P[tile][action_map[i][action]]:
                theirs[tuple(outcome)] += probability
            assert ours.pop((i, tile, action)) == pytest.approx(theirs)
    assert not ours


@pytest.mark.parametrize(("max_steps", "step_limit"), [(None, math.inf), (4, math.inf), (4, 15)])
@pytest.mark.parametrize("make", AGENTS)
def test_rollouts_are_gymnasiums_and_the_agent_is_told_all(make, max_steps, step_limit):
    """Eight episodes per lake, or as many as end in time. A goal at the limit is no truncation."""
    lakes = [any_lake(i, *size) for i, size in enumerate(product(range(2, 6), repeat=2))]
    tile_ids = [crop_ids(lake, rng(i)) for i, lake in enumerate(lakes)]
    env = FrozenLake(lakes, rng(2), *([max_steps] if max_steps else []), tile_ids=tile_ids)
    agent = Mock(wraps=make(env, rng(3)))
    played = rollout(env, agent, 8, step_limit, first_episode=6)
    calls = zip(agent.act.mock_calls, agent.observe.mock_calls)
    told = np.array([(*act.args, *observe.args[0]) for act, observe in calls])  # (steps, 9, N)
    for i, (lake, ids, trial) in enumerate(zip(lakes, tile_ids, played)):
        rules = {"is_slippery": False, "max_episode_steps": max_steps}
        gym, steps = gymnasium.make("FrozenLake-v1", desc=list(lake.rows), **rules), []
        for number, e in enumerate(trial, 6):
            gym.reset()
            gym.unwrapped.s = ids.tolist().index(e.observations[0])
            assert lake.tiles[gym.unwrapped.s] == "S"
            moves = zip(e.observations[:-1], e.actions, e.observations[1:], e.rewards, strict=True)
            for state, action, onward, paid in moves:
                tile, reward, end, cut, _ = gym.step(action)
                cut = not end and cut
                steps.append([state, number, state, action, onward, paid, end, cut, True])
                assert (onward, paid) == (ids[tile], reward)
            assert (end or cut, e.truncated, e.episode_return) == (True, cut, reward)
        assert told[: len(steps), :, i].tolist() == steps
        finished = len(trial) == 8  # else the unfinished episode is dropped
        assert finished or len(told) == step_limit
        assert (told[len(steps) :, 1::7, i] == [6 + len(trial), not finished]).all()


def test_starts_are_uniform_with_any_tile_ids():
    lakes = [Lake(("SFS", "GSF")), Lake(("SSS", "SGS"))]
    tile_ids = [np.arange(6), np.array([9, 2, 7, 0, 4, 1])]
    env = FrozenLake(lakes * 500, rng(), tile_ids=tile_ids * 500)
    drawn = np.stack([env.reset(np.ones(1000, bool)) for _ in range(30)])
    for i, starts in enumerate([[0, 2, 4], [9, 2, 7, 0, 1]]):
        count = Counter(drawn[:, i::2].ravel().tolist())
        assert count == pytest.approx(dict.fromkeys(starts, 15_000 / len(starts)), abs=230)  # 4 sd


@pytest.mark.parametrize("ask", [(3, 5, 4, 0), (3, 5, 4, 1), (2, 2, 1, 1), (6, 6, 5, 0)])
def test_random_lakes_keep_the_rules(ask):
    """All sizes occur. Fewer lakes are the first ones of more lakes."""
    low, high, goal_distance, test = ask
    draw = partial(random_lakes, sides=(low, high), goal_distance=goal_distance, test=test)
    lakes = draw(150, rng(1))
    sizes = Counter((len(lake.rows), lake.width) for lake in lakes)
    assert sizes.keys() == {*product(range(low, high + 1), repeat=2)}
    assert all(keeps_the_rules(lake, goal_distance) and lake.is_test == test for lake in lakes)
    assert [draw(n, rng(1)) for n in (0, 1, 120)] == [[], lakes[:1], lakes[:120]]
    assert draw(9, rng(2)) != lakes[:9]


def test_sizes_and_letters_are_as_frequent_as_the_rules_make_them():
    """Lakes of 2 x 2 and 2 x 3 tiles are as frequent as an enumeration of all maps says."""
    weight, chance = Counter(), {"S": 0.1, "G": 0.9 * 0.1, "H": 0.81 * 0.2, "F": 0.81 * 0.8}
    for height, width in [(2, 2), (2, 3), (3, 2)]:
        for tiles in product("SFHG", repeat=height * width):
            if {"S", "G"} <= {*tiles}:
                lake = Lake((*map("".join, np.reshape(tiles, (height, width))),))
                accepted = keeps_the_rules(lake, 1) and not lake.is_test
                for kind in ("lakes", (height, width), *tiles):
                    weight[kind] += accepted * math.prod(map(chance.get, tiles))
    lakes = random_lakes(30_000, rng(3), (2, 3), 1, test=False)
    small = [lake for lake in lakes if lake.tiles.size < 9]
    drawn = Counter((len(lake.rows), lake.width) for lake in small)
    drawn += Counter("".join(row for lake in small for row in lake.rows))
    for kind in ((2, 2), (2, 3), (3, 2), *"SGH"):
        assert drawn[kind] / len(small) == pytest.approx(weight[kind] / weight["lakes"], abs=0.018)


def test_a_tenth_of_all_lakes_is_set_aside():
    """The map alone decides, in every process alike. Whoever draws lakes has to say which ones."""
    aside = [i for i in range(4000) if any_lake(i, 4, 4).is_test]
    assert (len(aside), aside[:5]) == (pytest.approx(400, abs=76), [5, 8, 40, 66, 70])  # 4 sd
    notebook = ("HHFF", "FFFF", "SFFH", "HFFF", "HFFF", "HFGF")
    assert Lake(notebook) == frozen_lake.NOTEBOOK_LAKE
    assert [Lake((*notebook[:5], last)).is_test for last in ("HFGF", "FFGF")] == [True, False]
    with pytest.raises(TypeError, match="test"):
        random_lakes(1, rng())


def test_an_impossible_map_size_or_distance_is_refused_in_a_sentence():
    for rows in [("SX", "FG"), ("Sg",), ("FG",), ("SH",), ("SFF", "FG"), ("SG", ""), (), ("",)]:
        said = re.escape(f"{rows} is not a lake: it needs rows of equal length over S, F, H and G")
        with pytest.raises(ValueError, match=rf"^{said}, [^.]+\.$"):
            Lake(rows)
    for links in (((0,) * 4,), ((0,) * 5, (0,) * 5), ((0, 1, 2, 0),) * 2, ((0, 1, -1, 0),) * 2):
        with pytest.raises(ValueError, match=r"^The links [^.]+ 2 rows of 4 [^.]+ below 2\.$"):
            Lake(("SG",), links)
    with pytest.raises(ValueError, match=r"^[^.]* 100 tiles, not 101\.$"):
        Lake(("S" * 100 + "G",))
    for *sides, distance in [(1, 3, 1), (3, 11, 4), (5, 3, 4), (3, 5, 0), (3, 5, 9), (2, 2, 3)]:
        wanted = f"lakes of {sides[0]} to {sides[1]} tiles a side, goals {distance} steps away"
        said = rf"^There are [^.]*{wanted}: [^.]+ nearer goals[^.]*\.$"
        with pytest.raises(ValueError, match=said):
            random_lakes(1, rng(), sides, distance, test=False)


@pytest.mark.parametrize(("height", "width"), [(3, 5), (5, 3), (9, 3), (4, 8), (10, 10)])
def test_a_crop_is_any_part_of_a_map_of_up_to_7_tiles_a_side(height, width):
    """Every place of the lake in every such map occurs, and no other. No id is above 99."""
    lake, expected, generator = any_lake(0, height, width), set(), rng(5)
    for columns in range(width, max(7, width) + 1):
        board = np.arange(100)[: 100 // columns * columns].reshape(-1, columns)
        for top, left in product(range(max(7 - height, 0) + 1), range(columns - width + 1)):
            expected.add((*board[top : top + height, left : left + width].flat,))
    assert {(*crop_ids(lake, generator),) for _ in range(1500)} == expected


def test_as_many_lakes_are_changed_as_asked():
    """Shuffled tile ids, 0 to 48, and action maps; cropped tile ids; slippery lakes."""
    lakes = random_lakes(2000, rng(20), test=False)
    plain, env = make_env(lakes, rng(21)), make_env(lakes, rng(21), 9, 0.4, 0.5, 0.25)
    assert not plain.slippery.any()
    assert all((ids == np.arange(ids.size)).all() for ids in plain.tile_ids)
    assert (plain.action_map == np.arange(4)).all()
    usual = (env.action_map == np.arange(4)).all(1)
    same = np.array([(ids == np.arange(ids.size)).all() for ids in env.tile_ids])
    shares = [(~usual).mean(), same.mean(), env.slippery.mean(), env.slippery[usual].mean()]
    assert shares == pytest.approx([0.4 * 23 / 24, 0.6 * (0.5 + 0.5 * 0.1), 0.25, 0.25], abs=0.05)
    drawn = [ids for ids, unchanged in zip(env.tile_ids, usual) if not unchanged]
    assert all(len(set(ids.tolist())) == ids.size for ids in drawn)
    count = np.bincount(np.concatenate(drawn))
    assert count == pytest.approx([count.mean()] * 49, rel=0.3)  # more than 4 sd
    assert {*map(tuple, env.action_map.tolist())} == {*permutations(range(4))}


def test_graphs_have_far_goals_and_lead_where_their_links_say():
    """9 to 25 tiles. Every start is 3 or more steps from a goal by a breadth-first search."""
    graphs = frozen_lake.random_graphs(300, rng(22))
    env, sizes = FrozenLake(graphs, rng(23)), Counter(lake.tiles.size for lake in graphs)
    assert sizes.keys() == {*range(9, 26)}
    assert max(sizes.values()) < 3 * 300 / 17
    for i, lake in enumerate(graphs):
        goals, holes = ({*np.flatnonzero(lake.tiles == letter).tolist()} for letter in "GH")
        onward = [set(links) - holes for links in lake.links]
        for start in np.flatnonzero(lake.tiles == "S").tolist():
            assert 3 <= fewest_steps(start, goals, onward.__getitem__) < math.inf
        for tile in {*range(lake.tiles.size)} - goals - holes:
            assert tuple(env.moves[i, tile]) == lake.links[tile]
    assert len({link for lake in graphs for links in lake.links for link in links}) == 25


def expected(outcomes, value) -> float:
    return sum(p * (reward + (not end) * value[tile]) for p, tile, reward, end in outcomes)


@pytest.mark.parametrize("slippery", [False, True])
def test_value_iteration_earns_what_dynamic_programming_on_gymnasiums_table_says(slippery):
    """The best expected return of 12 steps on three lakes, with any tile ids and action maps."""
    rows = [("SFFF", "FHFH", "FFFH", "HFFG"), ("HSH", "FFF", "FHG"), ("SFFG",)]
    lakes = [lake for lake in map(Lake, rows) for _ in range(3000)]
    env = make_env(lakes, rng(24), 12, shuffled=1.0, slippery=float(slippery))
    played = rollout(env, frozen_lake.ValueIteration(env, None), 1)
    returns = np.reshape([trial[0].episode_return for trial in played], (3, -1)).mean(1)
    for row, mean in zip(rows, returns):
        gym = gymnasium.make("FrozenLake-v1", desc=list(row), is_slippery=slippery).unwrapped
        value = np.zeros(len(gym.P))
        for _ in range(12):
            value = [max(expected(o, value) for o in gym.P[tile].values()) for tile in gym.P]
        assert mean == pytest.approx(value["".join(row).index("S")], abs=0.03)


def test_what_agents_earn():
    """A random agent earns 0.155 on the paper's lakes. Tabular Q-learning solves small ones."""
    env = FrozenLake(random_lakes(2000, rng(6), test=False), rng(7))
    played = rollout(env, RandomAgent(env, rng(8)), 10)
    returns = [[e.episode_return for e in trial] for trial in played]
    assert np.mean(returns) == pytest.approx(0.155, abs=0.015)  # 3 sd
    env = FrozenLake(random_lakes(50, rng(15), (3, 3), 2, test=False), rng(16))
    agent = TabularQ(env, rng(17), greedy_probability=lambda episode: episode / 40)
    returns = np.array([[e.episode_return for e in trial] for trial in rollout(env, agent, 60)])
    assert returns[:, :5].mean() < 0.6
    assert returns[:, -5:].mean() > 0.9


def test_the_explorer_wastes_no_episode_and_forgets_a_lake_that_was_replaced():
    """It takes the shortest known path to a goal. If it knows none, it tries something new."""
    lakes = random_lakes(120, rng(11), test=False)
    env, other = FrozenLake(lakes[:60], rng(12)), FrozenLake(lakes[60:], rng(12))
    played = rollout(env, agent := Explorer(env, rng(13)), 30)
    for lake, trial in zip(lakes, played):
        goals, tried, onward = {*np.flatnonzero(lake.tiles == "G")}, set(), defaultdict(set)
        for e in trial:
            path, steps = e.observations.tolist(), {*zip(e.observations.tolist(), e.actions)}
            distance = fewest_steps(path[0], goals, onward.__getitem__)
            shortest = (e.episode_return, len(path)) == (1, distance + 1)
            assert (steps - tried) if math.isinf(distance) else shortest
            tried |= steps
            for tile, successor in pairwise(path):
                onward[tile].add(successor)
    played += rollout(other, agent, 50, first_episode=30)
    assert {episode.episode_return for trial in played for episode in trial[-5:]} == {1}


def test_tabular_q_update_by_hand():
    """It bootstraps at the step limit, not at holes and goals. Finished lakes change nothing."""
    env = FrozenLake([Lake(("SFG",))], rng())
    agent = TabularQ(env, rng(), greedy_probability=np.ones_like, gamma=0.9, learning_rate=0.5)
    agent.q[0, 2] = 7.0  # the goal's values, which no update may read
    for step in (  # from the end, so that the values travel back
        (1, RIGHT, 2, 1.0, True, False, True),  # Q(1, right) = 0 + 0.5 (1 - 0) = 0.5
        (0, RIGHT, 1, 0.0, False, False, True),  # 0 + 0.5 (0 + 0.9 * 0.5 - 0) = 0.225
        (1, RIGHT, 2, 1.0, True, False, True),  # 0.5 + 0.5 (1 - 0.5) = 0.75
        (0, RIGHT, 1, 0.0, False, True, True),  # 0.225 + 0.5 (0 + 0.9 * 0.75 - 0.225) = 0.45
        (1, LEFT, 0, 0.0, False, False, True),  # 0 + 0.5 (0 + 0.9 * 0.45 - 0) = 0.2025
        (1, RIGHT, 2, 1.0, True, False, False),
    ):
        agent.observe(frozen_lake.Transition(*map(np.atleast_1d, step)))
    assert agent.q[0] == pytest.approx(np.array([[0, 0, 0.45, 0], [0.2025, 0, 0.75, 0], [7] * 4]))


def test_tabular_q_acts_by_its_schedule():
    """Greedy with its probability, else random. Equally good actions are equally likely."""
    env = FrozenLake([Lake(("SG",))] * 20_000, rng())
    agent = TabularQ(env, rng(14), greedy_probability=np.array([0.0, 0.6, 1.0]).take)
    agent.q[:, 0, [UP, RIGHT]] = 0.5
    for episode, best in enumerate((0.25, 0.6 / 2 + 0.4 / 4, 0.5)):
        share = np.bincount(agent.act(env.state, np.full(20_000, episode)), minlength=4) / 20_000
        assert share == pytest.approx([0.5 - best, 0.5 - best, best, best], abs=0.015)


def test_drawing_by_hand():
    """Visited tiles stand in brackets. The last one stands in <>, even if it was visited before."""
    lake = Lake(("SFF", "HFG"))
    assert frozen_lake.draw(lake) == " S  F  F \n H  F  G "
    assert frozen_lake.draw(lake, [0, 1, 4, 5]) == "[S][F] F \n H [F]<G>"
    assert frozen_lake.draw(lake, np.array([0, 1, 1, 0])) == "<S>[F] F \n H  F  G "


def test_the_file_runs():
    """`python frozen_lake.py` prints returns of three agents, and a lake that is no test lake."""
    printed = subprocess.check_output([sys.executable, frozen_lake.__file__], text=True)
    rows = re.findall(r"^([a-zA-Z -]+?) +(?: [01]){30}$", printed, re.M)
    assert rows == ["random", "tabular Q-learning", "systematic explorer"]
    lake = Lake((*re.sub(r"[^SFHG\n]", "", printed.rpartition("\n\n")[2]).split(),))
    assert (keeps_the_rules(lake, 4), lake.is_test) == (True, False)
