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

import frozen_lake as world
from frozen_lake import FrozenLake, Lake, RandomPlayer, TabularQ, random_lakes, roll_out, window

LEFT, DOWN, RIGHT, UP = range(4)  # gymnasium's, written out: the module's table is not trusted
rng = np.random.default_rng


def any_lake(seed: int, height: int, width: int) -> Lake:
    """A start, a goal, and otherwise anything; there may be no way from one to the other."""
    tiles = rng(seed).permutation(["S", "G", *rng(seed).choice(list("SFHG"), height * width - 2)])
    return Lake((*map("".join, tiles.reshape(height, width)),))


def fewest_steps(start: int, goals: set[int], successors) -> float:
    """Breadth-first search from one tile to the nearest goal; inf if there is no way."""
    front, seen, steps = {start}, set(), 0
    while front and not front & goals:
        seen |= front
        front = {onward for tile in front for onward in successors(tile)} - seen
        steps += 1
    return steps if front else math.inf


def keeps_the_rules(lake: Lake, min_hops: int) -> bool:
    """Every start has its nearest goal in reach, and at least `min_hops` away."""
    tile = {y + 1j * x: letter for y, row in enumerate(lake.rows) for x, letter in enumerate(row)}
    starts, goals, holes = ({z for z in tile if tile[z] == letter} for letter in "SGH")
    around = {z: tile.keys() & {z - 1, z + 1, z - 1j, z + 1j} - holes for z in tile}
    hops = [fewest_steps(start, goals, around.get) for start in starts]
    return min_hops <= min(hops) and max(hops) < math.inf


@pytest.mark.parametrize("slippery", [False, True, np.arange(49) % 3 == 0])
@pytest.mark.parametrize("name", [None, window, lambda lake, r: r.permutation(lake.tiles.size)])
def test_every_transition_of_every_size_is_gymnasiums(name, slippery):
    """Side by side, by any numbers of the tiles and any words, slippery or not or on some lakes."""
    lakes = [any_lake(i, *size) for i, size in enumerate(product(range(2, 9), repeat=2))]
    numbers = name and [name(lake, rng(i)) for i, lake in enumerate(lakes)]
    words = [rng(i).permutation(4) if name else np.arange(4) for i in range(len(lakes))]
    env = FrozenLake(lakes, rng(), 100, numbers, words if name else range(4), slippery)
    env.rng, names = Mock(), numbers or [np.arange(lake.tiles.size) for lake in lakes]
    ours = defaultdict(Counter)
    for env.rng.integers.return_value, tile, action in product((-1, 0, 1), range(64), range(4)):
        env.state = np.array([own[tile % own.size] for own in names])
        state, reward, terminated, _ = env.step(np.full(len(lakes), action))
        for i in (i for i, own in enumerate(names) if tile < own.size):
            outcome = names[i].tolist().index(state[i]), reward[i], terminated[i]
            ours[i, tile, action][outcome] += 1 / 3
    assert {call.args for call in env.rng.integers.mock_calls} <= {(-1, 2, len(lakes))}
    for i, (lake, slips) in enumerate(zip(lakes, np.broadcast_to(slippery, len(lakes)).tolist())):
        gym = gymnasium.make("FrozenLake-v1", desc=list(lake.rows), is_slippery=slips).unwrapped
        for tile, action in product(gym.P, range(4)):
            theirs = Counter()
            for probability, *outcome in gym.P[tile][words[i][action]]:
                theirs[tuple(outcome)] += probability
            assert ours.pop((i, tile, action)) == pytest.approx(theirs)
    assert not ours


PLAYERS = [RandomPlayer, partial(TabularQ, greedy=lambda episode: episode / 9), world.Explorer]
PLAYERS += [lambda env, dice: Mock(act=lambda state, episode: 0 * state)]  # goes left


@pytest.mark.parametrize(("max_steps", "limit"), [(None, math.inf), (4, math.inf), (4, 15)])
@pytest.mark.parametrize("make", PLAYERS)
def test_roll_outs_are_gymnasiums_and_the_player_is_told_all(make, max_steps, limit):
    """Eight episodes a lake, counted from `first`, or those within `limit`: from a start to
    a hole, a goal or the step limit (a goal reached by the last step is no truncation to us)."""
    lakes = [any_lake(i, *size) for i, size in enumerate(product(range(2, 6), repeat=2))]
    numbers = [window(lake, rng(i)) for i, lake in enumerate(lakes)]
    env = FrozenLake(lakes, rng(2), *([max_steps] if max_steps else []), numbers=numbers)
    player = Mock(wraps=make(env, rng(3)))
    played = roll_out(env, player, 8, limit, first=6)
    calls = zip(player.act.mock_calls, player.learn.mock_calls)
    told = np.array([(*act.args, *learn.args[0]) for act, learn in calls])  # (steps, 9, N)
    for i, (lake, own, trial) in enumerate(zip(lakes, numbers, played)):
        rules = {"is_slippery": False, "max_episode_steps": max_steps}
        gym, steps = gymnasium.make("FrozenLake-v1", desc=list(lake.rows), **rules), []
        for number, e in enumerate(trial, 6):
            gym.reset()
            gym.unwrapped.s = own.tolist().index(e.observations[0])
            assert lake.tiles[gym.unwrapped.s] == "S"
            moves = zip(e.observations[:-1], e.actions, e.observations[1:], e.rewards, strict=True)
            for state, action, onward, paid in moves:
                tile, reward, end, cut, _ = gym.step(action)
                cut = not end and cut
                steps.append([state, number, state, action, onward, paid, end, cut, True])
                assert (onward, paid) == (own[tile], reward)
            assert (end or cut, e.truncated, e.total) == (True, cut, reward)
        assert told[: len(steps), :, i].tolist() == steps
        finished = len(trial) == 8  # or what was begun when the limit came is dropped
        assert finished or len(told) == limit
        assert (told[len(steps) :, 1::7, i] == [6 + len(trial), not finished]).all()


def test_starts_are_uniform_by_any_numbers():
    lakes = [Lake(("SFS", "GSF")), Lake(("SSS", "SGS"))]
    numbers = [np.arange(6), np.array([9, 2, 7, 0, 4, 1])]
    env = FrozenLake(lakes * 500, rng(), numbers=numbers * 500)
    drawn = np.stack([env.reset(np.ones(1000, bool)) for _ in range(30)])
    for i, starts in enumerate([[0, 2, 4], [9, 2, 7, 0, 1]]):
        count = Counter(drawn[:, i::2].ravel().tolist())
        assert count == pytest.approx(dict.fromkeys(starts, 15_000 / len(starts)), abs=230)  # 4 sd


@pytest.mark.parametrize("ask", [(3, 5, 4, 0), (3, 5, 4, 1), (2, 2, 1, 1), (6, 6, 5, 0)])
def test_random_lakes_keep_the_rules(ask):
    """All sizes asked for, all goals in reach and far enough, fewer are the first of more."""
    low, high, min_hops, test = ask
    draw = partial(random_lakes, sides=(low, high), min_hops=min_hops, test=test)
    lakes = draw(150, rng(1))
    sizes = Counter((len(lake.rows), lake.width) for lake in lakes)
    assert sizes.keys() == {*product(range(low, high + 1), repeat=2)}
    assert all(keeps_the_rules(lake, min_hops) and lake.is_test == test for lake in lakes)
    assert [draw(n, rng(1)) for n in (0, 1, 120)] == [[], lakes[:1], lakes[:120]]
    assert draw(9, rng(2)) != lakes[:9]


def test_sizes_and_letters_are_as_frequent_as_the_rules_make_them():
    """Lakes of two by two or three are as in an enumeration of all such maps, by probability."""
    weight, chance = Counter(), {"S": 0.1, "G": 0.9 * 0.1, "H": 0.81 * 0.2, "F": 0.81 * 0.8}
    for height, width in [(2, 2), (2, 3), (3, 2)]:
        for tiles in product("SFHG", repeat=height * width):
            if {"S", "G"} <= {*tiles}:
                lake = Lake((*map("".join, np.reshape(tiles, (height, width))),))
                kept = keeps_the_rules(lake, 1) and not lake.is_test
                for kind in ("lakes", (height, width), *tiles):
                    weight[kind] += kept * math.prod(map(chance.get, tiles))
    lakes = random_lakes(30_000, rng(3), (2, 3), 1, test=False)
    small = [lake for lake in lakes if lake.tiles.size < 9]
    drawn = Counter((len(lake.rows), lake.width) for lake in small)
    drawn += Counter("".join(row for lake in small for row in lake.rows))
    for kind in ((2, 2), (2, 3), (3, 2), *"SGH"):
        assert drawn[kind] / len(small) == pytest.approx(weight[kind] / weight["lakes"], abs=0.018)


def test_a_tenth_of_all_lakes_is_set_aside():
    """By the map alone, the same in every process, and the paper's notebook's; whoever draws lakes
    says of which kind."""
    aside = [i for i in range(4000) if any_lake(i, 4, 4).is_test]
    assert (len(aside), aside[:5]) == (pytest.approx(400, abs=76), [5, 8, 40, 66, 70])  # four sd
    notebook = ("HHFF", "FFFF", "SFFH", "HFFF", "HFFF", "HFGF")
    assert Lake(notebook) == world.NOTEBOOK_LAKE
    assert [Lake((*notebook[:5], last)).is_test for last in ("HFGF", "FFGF")] == [True, False]
    with pytest.raises(TypeError, match="test"):
        random_lakes(1, rng())


def test_a_faulty_map_size_or_distance_is_refused_in_a_sentence():
    for rows in [("SX", "FG"), ("Sg",), ("FG",), ("SH",), ("SFF", "FG"), ("SG", ""), (), ("",)]:
        said = re.escape(f"{rows} is no lake: that takes rows of equal length over S, F, H and G, ")
        with pytest.raises(ValueError, match=rf"^{said}[^.]+\.$"):
            Lake(rows)
    for *sides, hops in [(1, 3, 1), (3, 11, 4), (5, 3, 4), (3, 5, 0), (3, 5, 9), (2, 2, 3)]:
        asked = rf"of every size from {sides[0]} to {sides[1]} tiles a side [^.]+ {hops} hops away"
        with pytest.raises(ValueError, match=rf"^There are [^.]*{asked}: [^.]+ fewer hops[^.]*\.$"):
            random_lakes(1, rng(), sides, hops, test=False)


@pytest.mark.parametrize(("height", "width"), [(3, 5), (5, 3), (9, 3), (4, 8), (10, 10)])
def test_a_window_is_any_part_of_a_map_of_seven_tiles_a_side(height, width):
    """Every place of the lake in every such map occurs, no other, and no number beyond 99."""
    lake, expected, generator = any_lake(0, height, width), set(), rng(5)
    for columns in range(width, max(7, width) + 1):
        board = np.arange(100)[: 100 // columns * columns].reshape(-1, columns)
        for top, left in product(range(max(7 - height, 0) + 1), range(columns - width + 1)):
            expected.add((*board[top : top + height, left : left + width].flat,))
    assert {(*window(lake, generator),) for _ in range(1500)} == expected


def test_worlds_are_other_than_they_seem_as_often_as_asked():
    """Numbers drawn from 0 to 48 and words, or numbers of windows, of the shares of lakes."""
    lakes = random_lakes(2000, rng(20), test=False)
    plain, env = world.worlds(lakes, rng(21)), world.worlds(lakes, rng(21), 9, 0.4, 0.5, 0.25)
    assert not plain.slippery.any()
    assert all((own == np.arange(own.size)).all() for own in plain.numbers)
    assert (plain.words == np.arange(4)).all()
    usual = (env.words == np.arange(4)).all(1)
    same = np.array([(own == np.arange(own.size)).all() for own in env.numbers])
    shares = [(~usual).mean(), same.mean(), env.slippery.mean(), env.slippery[usual].mean()]
    assert shares == pytest.approx([0.4 * 23 / 24, 0.6 * (0.5 + 0.5 * 0.1), 0.25, 0.25], abs=0.05)
    drawn = [own for own, known in zip(env.numbers, usual) if not known]
    assert all(len(set(own.tolist())) == own.size for own in drawn)
    count = np.bincount(np.concatenate(drawn))
    assert count == pytest.approx([count.mean()] * 49, rel=0.3)  # more than four sd
    assert {*map(tuple, env.words.tolist())} == {*permutations(range(4))}


def test_graphs_have_far_goals_and_lead_where_they_say():
    """9 to 25 tiles; by a breadth-first search every start is 3 or more steps from a goal."""
    graphs = world.random_graphs(300, rng(22))
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


@pytest.mark.parametrize("slippery", [False, True])
def test_the_planner_earns_what_dynamic_programming_on_gymnasiums_table_says(slippery):
    """The best expected return of 12 steps, by any numbers and words, on three lakes."""
    rows = [("SFFF", "FHFH", "FFFH", "HFFG"), ("HSH", "FFF", "FHG"), ("SFFG",)]
    lakes = [lake for lake in map(Lake, rows) for _ in range(3000)]
    env = world.worlds(lakes, rng(24), 12, shuffled=1.0, slippery=float(slippery))
    played = roll_out(env, world.Planner(env, None), 1)
    returns = np.reshape([trial[0].total for trial in played], (3, -1)).mean(1)
    for row, mean in zip(rows, returns):
        gym = gymnasium.make("FrozenLake-v1", desc=list(row), is_slippery=slippery).unwrapped
        value = np.zeros(len(gym.P))
        for _ in range(12):
            value = [
                max(
                    sum(p * (reward + (not end) * value[onward]) for p, onward, reward, end in row)
                    for row in gym.P[tile].values()
                )
                for tile in gym.P
            ]
        assert mean == pytest.approx(value["".join(row).index("S")], abs=0.03)


def test_what_players_earn():
    """15.5 % by chance, on lakes like the paper's; tabular Q-learning, on small ones, all."""
    env = FrozenLake(random_lakes(2000, rng(6), test=False), rng(7))
    returns = [[e.total for e in trial] for trial in roll_out(env, RandomPlayer(env, rng(8)), 10)]
    assert np.mean(returns) == pytest.approx(0.155, abs=0.015)  # three sd
    env = FrozenLake(random_lakes(50, rng(15), (3, 3), 2, test=False), rng(16))
    player = TabularQ(env, rng(17), greedy=lambda episode: episode / 40)
    returns = np.array([[e.total for e in trial] for trial in roll_out(env, player, 60)])
    assert returns[:, :5].mean() < 0.6
    assert returns[:, -5:].mean() > 0.9


def test_the_explorer_wastes_no_episode_and_forgets_a_lake_that_is_no_longer_there():
    """It takes the shortest way that it knows; knowing none, it tries something new."""
    lakes = random_lakes(120, rng(11), test=False)
    env, other = FrozenLake(lakes[:60], rng(12)), FrozenLake(lakes[60:], rng(12))
    played = roll_out(env, player := world.Explorer(env, rng(13)), 30)
    for lake, trial in zip(lakes, played):
        goals, tried, onward = {*np.flatnonzero(lake.tiles == "G")}, set(), defaultdict(set)
        for e in trial:
            path, steps = e.observations.tolist(), {*zip(e.observations.tolist(), e.actions)}
            hops = fewest_steps(path[0], goals, onward.__getitem__)
            assert (steps - tried) if math.isinf(hops) else (e.total, len(path)) == (1, hops + 1)
            tried |= steps
            for tile, successor in pairwise(path):
                onward[tile].add(successor)
    played += roll_out(other, player, 50, first=30)
    assert {episode.total for trial in played for episode in trial[-5:]} == {1}


def test_tabular_q_update_by_hand():
    """It bootstraps at a step limit, not at an end, and learns nothing where nobody plays."""
    env = FrozenLake([Lake(("SFG",))], rng())
    player = TabularQ(env, rng(), greedy=np.ones_like, gamma=0.9, rate=0.5)
    player.q[0, 2] = 7.0  # the goal's own values, which an update must never read
    for step in (  # told from the end, so that the values travel back
        (1, RIGHT, 2, 1.0, True, False, True),  # Q(1, right) = 0 + 0.5 (1 - 0) = 0.5
        (0, RIGHT, 1, 0.0, False, False, True),  # 0 + 0.5 (0 + 0.9 * 0.5 - 0) = 0.225
        (1, RIGHT, 2, 1.0, True, False, True),  # 0.5 + 0.5 (1 - 0.5) = 0.75
        (0, RIGHT, 1, 0.0, False, True, True),  # 0.225 + 0.5 (0 + 0.9 * 0.75 - 0.225) = 0.45
        (1, LEFT, 0, 0.0, False, False, True),  # 0 + 0.5 (0 + 0.9 * 0.45 - 0) = 0.2025
        (1, RIGHT, 2, 1.0, True, False, False),
    ):
        player.learn(world.Step(*map(np.atleast_1d, step)))
    assert player.q[0] == pytest.approx(np.array([[0, 0, 0.45, 0], [0.2025, 0, 0.75, 0], [7] * 4]))


def test_tabular_q_acts_by_its_schedule():
    """Its best action by chance greedy(e), else any; equally good ones are equally likely."""
    env = FrozenLake([Lake(("SG",))] * 20_000, rng())
    player = TabularQ(env, rng(14), greedy=np.array([0.0, 0.6, 1.0]).take)
    player.q[:, 0, [UP, RIGHT]] = 0.5
    for episode, best in enumerate((0.25, 0.6 / 2 + 0.4 / 4, 0.5)):
        share = np.bincount(player.act(env.state, np.full(20_000, episode)), minlength=4) / 20_000
        assert share == pytest.approx([0.5 - best, 0.5 - best, best, best], abs=0.015)


def test_drawing_by_hand():
    """Visited tiles stand in brackets, the last one in <>, also if the path crosses it before."""
    lake = Lake(("SFF", "HFG"))
    assert world.draw(lake) == " S  F  F \n H  F  G "
    assert world.draw(lake, [0, 1, 4, 5]) == "[S][F] F \n H [F]<G>"
    assert world.draw(lake, np.array([0, 1, 1, 0])) == "<S>[F] F \n H  F  G "


def test_the_file_runs():
    """`python frozen_lake.py` prints the returns of three players, and a lake that is no test's."""
    printed = subprocess.check_output([sys.executable, world.__file__], text=True)
    rows = re.findall(r"^([a-zA-Z -]+?) +(?: [01]){30}$", printed, re.M)
    assert rows == ["random", "tabular Q-learning", "systematic explorer"]
    lake = Lake((*re.sub(r"[^SFHG\n]", "", printed.rpartition("\n\n")[2]).split(),))
    assert (keeps_the_rules(lake, 4), lake.is_test) == (True, False)
