"""Frozen Lake against gymnasium, against a breadth-first search, and against examples worked by hand."""

import math
from collections import Counter, defaultdict, deque
from itertools import product

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frozen_lake import (
    MAX_STEPS,
    ChangingLake,
    Explorer,
    FrozenLake,
    Lake,
    RandomPlayer,
    ShortestPath,
    Step,
    TabularQ,
    Windows,
    _random_tiles,
    draw,
    random_lakes,
    roll_out,
)

LEFT, DOWN, RIGHT, UP = range(4)  # written out here: the tests do not trust the module's own table
MAP_4X4 = ("SFFF", "FHFH", "FFFH", "HFFG")  # gymnasium's default map
quick = settings(max_examples=25, deadline=None, derandomize=True)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ------------------------------------------------------------------------------------------- an independent Frozen Lake


def move(lake: Lake, tile: int, action: int) -> int:
    """Where one step leads, from the rules of the game."""
    row, column = divmod(tile, len(lake.rows[0]))
    if action == LEFT and column > 0:
        return tile - 1
    if action == RIGHT and column < len(lake.rows[0]) - 1:
        return tile + 1
    if action == UP and row > 0:
        return tile - len(lake.rows[0])
    if action == DOWN and row < len(lake.rows) - 1:
        return tile + len(lake.rows[0])
    return tile


def places(lake: Lake, letters: str) -> set[int]:
    return {i for i, letter in enumerate("".join(lake.rows)) if letter in letters}


def fewest_steps(start: int, goals: set[int], successors) -> float:
    """Breadth-first search from one tile to the nearest goal; inf if there is no way."""
    distance, queue = {start: 0}, deque([start])
    while queue:
        tile = queue.popleft()
        if tile in goals:
            return distance[tile]
        for onward in successors(tile):
            if onward not in distance:
                distance[onward] = distance[tile] + 1
                queue.append(onward)
    return math.inf


def fewest_steps_on(lake: Lake, start: int) -> float:
    """Fewest steps from `start` to a goal of the lake, never through a hole or a goal."""
    ends = places(lake, "HG")
    return fewest_steps(start, places(lake, "G"), lambda tile: [] if tile in ends else [move(lake, tile, a) for a in range(4)])


@st.composite
def any_lake(draw_from, sides=(2, 5)) -> Lake:
    """A map with at least one start and one goal, and otherwise anything; there may be no way to the goal."""
    height, width = draw_from(st.integers(*sides)), draw_from(st.integers(*sides))
    letters = draw_from(st.lists(st.sampled_from("SFHG"), min_size=height * width, max_size=height * width))
    start, goal = draw_from(st.lists(st.integers(0, height * width - 1), min_size=2, max_size=2, unique=True))
    letters[start], letters[goal] = "S", "G"
    return Lake(tuple("".join(letters[i : i + width]) for i in range(0, len(letters), width)))


several_lakes = st.lists(any_lake(), min_size=1, max_size=4)


# ---------------------------------------------------------------------------------------------- gymnasium is the oracle


class SlipsInTurn:
    """Stands in for the environment's generator: slips are -1, 0, 1, -1, ..., so three copies of a case meet each once."""

    def random(self, count: int) -> np.ndarray:
        return np.zeros(count)

    def integers(self, low: int, high: int, count: int) -> np.ndarray:
        assert (low, high) == (-1, 2)
        return np.resize([-1, 0, 1], count)


def our_transitions(lakes: list[Lake], slippery: bool) -> dict:
    """{(lake, state, action): {(successor, reward, terminated): probability}}, all from one step of one environment."""
    slips = 3 if slippery else 1
    cases = [
        (i, state, action)
        for i, lake in enumerate(lakes)
        for state, action, _ in product(range(lake.height * lake.width), range(4), range(slips))
    ]
    index, state, action = np.array(cases).T
    env = FrozenLake([lakes[i] for i in index], SlipsInTurn(), slippery)
    env.state = state
    successor, reward, terminated, _ = env.step(action)
    table = defaultdict(Counter)
    for case, *outcome in zip(cases, successor.tolist(), reward.tolist(), terminated.tolist()):
        table[case][tuple(outcome)] += 1 / slips
    return table


def their_transitions(lakes: list[Lake], slippery: bool) -> dict:
    """The same from gymnasium's own table."""
    table = defaultdict(Counter)
    for i, lake in enumerate(lakes):
        env = gymnasium.make("FrozenLake-v1", desc=list(lake.rows), is_slippery=slippery).unwrapped
        for state, actions in env.P.items():
            for action, outcomes in actions.items():
                for probability, *outcome in outcomes:
                    table[i, state, action][tuple(outcome)] += probability
    return table


def assert_equal_to_gymnasium(lakes: list[Lake], slippery: bool) -> None:
    ours, theirs = our_transitions(lakes, slippery), their_transitions(lakes, slippery)
    assert ours.keys() == theirs.keys()
    for case in theirs:
        assert ours[case] == pytest.approx(theirs[case]), f"{lakes[case[0]].rows}, (lake, state, action) = {case}"


@pytest.mark.parametrize("slippery", [False, True])
def test_every_transition_of_every_size_is_gymnasiums(slippery):
    """From every state by every action on random maps of all sizes from 2x2 to 8x8: gymnasium's successors, reward, end."""
    generator = rng()
    for height, width in product(range(2, 9), repeat=2):
        letters = generator.choice(list("SFHG"), height * width)
        letters[generator.permutation(height * width)[:2]] = "S", "G"
        assert_equal_to_gymnasium([Lake(tuple("".join(row) for row in letters.reshape(height, width)))], slippery)


@quick
@given(several_lakes, st.booleans())
def test_lakes_side_by_side_do_not_disturb_each_other(lakes, slippery):
    """Whatever maps share an environment, of whatever sizes, each keeps gymnasium's transitions."""
    assert_equal_to_gymnasium(lakes, slippery)


def flags(env, actions: list[int]) -> list[tuple[bool, bool]]:
    """(terminated, truncated) after each action, from our environment or from gymnasium's."""
    env.reset()
    if isinstance(env, FrozenLake):
        return [tuple(bool(flag[0]) for flag in env.step(np.array([action]))[2:]) for action in actions]
    return [tuple(bool(flag) for flag in env.step(action)[2:4]) for action in actions]


def both_envs(limit: int | None) -> tuple[FrozenLake, gymnasium.Env]:
    """The default map twice; a limit of None leaves each side its own default."""
    ours = FrozenLake([Lake(MAP_4X4)], rng(), **({} if limit is None else {"max_steps": limit}))
    theirs = gymnasium.make("FrozenLake-v1", desc=list(MAP_4X4), is_slippery=False, max_episode_steps=limit)
    return ours, theirs


@pytest.mark.parametrize(("limit", "steps"), [(None, 100), (7, 7), (1, 1)])
def test_the_step_limit_is_gymnasiums(limit, steps):
    """Whoever is still on the ice after the last allowed step is truncated there, and not a step before."""
    ours, theirs = both_envs(limit)
    expected = [(False, False)] * (steps - 1) + [(False, True)]
    assert flags(ours, [LEFT] * steps) == expected  # left of the first tile is the edge: the walker stays there
    assert flags(theirs, [LEFT] * steps) == expected


def test_the_default_limit_is_gymnasiums():
    """MAX_STEPS is the limit that gymnasium registers for FrozenLake-v1."""
    assert gymnasium.spec("FrozenLake-v1").max_episode_steps == MAX_STEPS


@pytest.mark.parametrize(("limit", "steps"), [(None, 100), (9, 9), (6, 6)])
def test_a_goal_reached_at_the_limit_is_a_goal(limit, steps):
    """Entering the goal with the last allowed step terminates; gymnasium calls that truncated as well, we do not."""
    ours, theirs = both_envs(limit)
    way = [DOWN, DOWN, RIGHT, DOWN, RIGHT, RIGHT]
    actions = [LEFT] * (steps - len(way)) + way
    assert flags(ours, actions) == [(False, False)] * (steps - 1) + [(True, False)]
    assert flags(theirs, actions) == [(False, False)] * (steps - 1) + [(True, True)]


# -------------------------------------------------------------------------------------------------- starts and restarts


def test_starts_are_uniform():
    """Every start of a lake is equally likely, also beside a lake that has more of them."""
    few, many = Lake(("SFS", "GSF")), Lake(("SSS", "SGS"))  # 3 and 5 starts
    env = FrozenLake([few, many] * 500, rng())
    drawn = np.stack([env.reset() for _ in range(30)])
    for row, lake in enumerate((few, many)):
        counts = Counter(drawn[:, row::2].ravel().tolist())
        assert counts.keys() == places(lake, "S")
        expected = 30 * 500 / len(counts)
        chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
        assert chi_square < 18.5  # a uniform draw exceeds this, with 4 degrees of freedom, once in a thousand times


def test_a_partial_reset_leaves_the_other_rows_alone():
    """reset(rows) moves the given rows to a start with a fresh step count; the others keep their tile and their count."""
    env = FrozenLake([Lake(MAP_4X4)] * 4, rng(), max_steps=3)
    env.step(np.array([RIGHT] * 4))
    env.step(np.array([RIGHT] * 4))
    states = env.reset(np.array([True, False, False, True]))
    assert states.tolist() == env.state.tolist() == [0, 2, 2, 0]
    states, _, _, truncated = env.step(np.array([RIGHT] * 4))
    assert states.tolist() == [1, 3, 3, 1]
    assert truncated.tolist() == [False, True, True, False]


def test_what_a_step_returned_survives_the_reset():
    """The tile on which an episode ended can still be read after the next one has begun."""
    env = FrozenLake([Lake(("SG",)), Lake(("SF", "FG"))], rng())
    states, _, terminated, _ = env.step(np.array([RIGHT, RIGHT]))
    env.reset(terminated)
    assert states.tolist() == [1, 1]


# ----------------------------------------------------------------------------------------------------------- random maps


@pytest.mark.parametrize(("sides", "min_hops"), [((3, 5), 4), ((2, 2), 1), ((3, 3), 2), ((6, 7), 5)])
def test_random_lakes_keep_the_rules(sides, min_hops):
    """Every size in the range occurs and no other; each start has its nearest goal in reach, at least `min_hops` away."""
    lakes = random_lakes(500, rng(1), sides, min_hops)
    assert len(lakes) == 500
    assert {(lake.height, lake.width) for lake in lakes} == set(product(range(sides[0], sides[1] + 1), repeat=2))
    for lake in lakes:
        for start in places(lake, "S"):
            assert min_hops <= fewest_steps_on(lake, start) < math.inf


def test_fewer_random_lakes_are_the_first_of_more():
    """The same seed gives the same lakes, another seed others, and asking for fewer gives the first of them."""
    lakes = random_lakes(800, rng(2))  # more than one round of candidates
    assert random_lakes(800, rng(2)) == lakes
    assert random_lakes(800, rng(3)) != lakes
    for fewer in (0, 1, 10, 500, 799):
        assert random_lakes(fewer, rng(2)) == lakes[:fewer]


def test_a_tenth_of_all_lakes_is_set_aside_for_tests():
    """`test` keeps the test lakes, the others, or all, in the same order; a lake is one of them wherever it is drawn."""
    lakes = random_lakes(4000, rng(4), (3, 4), 2)
    tests, others = [lake for lake in lakes if lake.is_test], [lake for lake in lakes if not lake.is_test]
    assert 0.08 < len(tests) / 4000 < 0.12  # 0.1, four standard deviations
    assert random_lakes(len(tests), rng(4), (3, 4), 2, test=True) == tests
    assert random_lakes(len(others), rng(4), (3, 4), 2, test=False) == others
    assert Lake(("SFFF", "FFHG")).is_test == Lake(["SFFF", "FFHG"]).is_test


def test_tiles_are_drawn_by_three_successive_chances():
    """A tile is S with chance 0.1, else G with 0.1, else H with 0.2, else F."""
    tiles = _random_tiles(10_000, 16, rng())
    assert tiles.shape == (10_000, 16)
    share = {str(letter): float((tiles == letter).mean()) for letter in np.unique(tiles)}
    goal = 0.9 * 0.1
    hole = 0.81 * 0.2
    expected = {"S": 0.1, "G": goal, "H": hole, "F": 1 - 0.1 - goal - hole}
    assert share == pytest.approx(expected, abs=0.005)  # four standard deviations of the widest


# --------------------------------------------------------------------------------------------------------- clear errors


def sentence(word: str) -> str:
    """A pattern for exactly one sentence that contains `word`."""
    return rf"^[A-Z][^.]*{word}[^.]*\.$"


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        (("SFX", "FFG"), "unknown tile 'X'"),
        (("SFg", "FFG"), "unknown tile 'g'"),
        (("FFF", "FFG"), "start"),
        (("SFF", "FFH"), "goal"),
        (("SFF", "FG"), "length"),
        (("SG", ""), "length"),
        ((), "at least one tile"),
        (("",), "at least one tile"),
    ],
)
def test_a_faulty_map_is_refused(rows, word):
    """A map that is no Frozen Lake raises ValueError with one sentence that names the fault."""
    with pytest.raises(ValueError, match=sentence(word)):
        Lake(rows)


def test_a_lake_is_a_value():
    """Lakes with the same rows are equal, also if they were given as a list, and can be kept in sets."""
    assert {Lake(("SF", "FG")), Lake(["SF", "FG"])} == {Lake(("SF", "FG"))}
    assert Lake(("SF", "FG")) != Lake(("SF", "HG"))
    assert str(Lake(("SF", "FG"))) == "SF\nFG"


@pytest.mark.parametrize(
    ("sides", "min_hops", "word"),
    [
        ((1, 3), 1, "2 to 10 tiles a side"),
        ((3, 11), 4, "2 to 10 tiles a side"),
        ((5, 3), 4, "smaller number first"),
        ((3, 5), 0, "hops"),
        ((3, 5), 9, "hops"),  # nine tiles are at most eight steps apart
        ((2, 2), 3, "fewer hops or larger lakes"),  # in range, but no map of 2 x 2 has it
    ],
)
def test_impossible_lakes_are_refused(sides, min_hops, word):
    """Sizes or distances that no map can have raise ValueError with one sentence that names them."""
    with pytest.raises(ValueError, match=sentence(word)):
        random_lakes(1, rng(), sides, min_hops)


def test_an_empty_environment_is_refused():
    """An environment without lakes, or with episodes of no steps, raises ValueError."""
    with pytest.raises(ValueError, match=sentence("at least one lake")):
        FrozenLake([], rng())
    with pytest.raises(ValueError, match=sentence("at least one step")):
        FrozenLake([Lake(MAP_4X4)], rng(), max_steps=0)


# -------------------------------------------------------------------------------------------------------------- episodes

PLAYERS = {
    "random": lambda env: RandomPlayer(env, rng(5)),
    "tabular": lambda env: TabularQ(env, rng(5), greedy=lambda episode: episode / 4),
    "explorer": lambda env: Explorer(env, rng(5)),
    "shortest": ShortestPath,
}


@pytest.mark.parametrize("name", PLAYERS)
@quick
@given(lakes=several_lakes, max_steps=st.integers(1, 25), slippery=st.booleans(), seed=st.integers(0, 99))
def test_every_episode_is_a_legal_path(name, lakes, max_steps, slippery, seed):
    """From a start, by legal moves, paid only on entering a goal, to the first hole or goal or else to the step limit."""
    env = FrozenLake(lakes, rng(seed), slippery, max_steps)
    played = roll_out(env, PLAYERS[name](env), 5)
    assert [len(episodes) for episodes in played] == [5] * len(lakes)
    for lake, episodes in zip(lakes, played):
        starts, goals, ends = places(lake, "S"), places(lake, "G"), places(lake, "GH")
        for episode in episodes:
            path, actions, rewards = episode.observations.tolist(), episode.actions.tolist(), episode.rewards.tolist()
            assert 1 <= len(actions) == len(rewards) == len(path) - 1 <= max_steps
            assert path[0] in starts
            for tile, action, onward in zip(path, actions, path[1:]):
                asked = [(action + slip) % 4 for slip in ((-1, 0, 1) if slippery else (0,))]
                assert onward in {move(lake, tile, a) for a in asked}
            assert rewards == [float(tile in goals) for tile in path[1:]]
            assert episode.total == sum(rewards)
            assert not ends & set(path[:-1])
            assert episode.truncated == (path[-1] not in ends)
            assert not episode.truncated or len(actions) == max_steps


# --------------------------------------------------------------------------------------------------------------- players


def test_a_random_player_earns_what_the_paper_s_lakes_give_away():
    """On lakes of 3 to 5 tiles a side with goals at least 4 hops away, about 15 % of random episodes reach a goal."""
    env = FrozenLake(random_lakes(1000, rng(6)), rng(7))
    returns = [episode.total for episodes in roll_out(env, RandomPlayer(env, rng(8)), 5) for episode in episodes]
    assert 0.12 < np.mean(returns) < 0.18


@quick
@given(several_lakes)
def test_shortest_path_knows_every_distance(lakes):
    """Its distances are those of a breadth-first search, from every tile of any lake, reachable or not."""
    env = FrozenLake(lakes, rng())
    distance = ShortestPath(env).distance
    for i, lake in enumerate(lakes):
        tiles = range(lake.height * lake.width)
        assert distance[i, : len(tiles)].tolist() == [fewest_steps_on(lake, tile) for tile in tiles]


def test_shortest_path_walks_a_shortest_path():
    """From every start it reaches a goal, in exactly as many steps as the breadth-first search says."""
    lakes = random_lakes(200, rng(9), (3, 6), 4)
    env = FrozenLake(lakes, rng(10))
    for lake, episodes in zip(lakes, roll_out(env, ShortestPath(env), 4)):
        for episode in episodes:
            assert episode.total == 1
            assert len(episode.actions) == fewest_steps_on(lake, int(episode.observations[0]))


def test_the_explorer_wastes_no_episode():
    """Once it knows a way from the start, it takes the shortest known one; before, every episode tries something new."""
    lakes = random_lakes(60, rng(11))
    env = FrozenLake(lakes, rng(12))
    for lake, episodes in zip(lakes, roll_out(env, Explorer(env, rng(13)), 60)):
        goals, known = places(lake, "G"), defaultdict(dict)  # {tile: {action: successor}} of what was seen so far
        for episode in episodes:
            path, actions = episode.observations.tolist(), episode.actions.tolist()
            seen = {tile for after in known.values() for tile in after.values()}
            shortest = fewest_steps(path[0], goals & seen, lambda tile, known=known: known[tile].values())
            untried = [action not in known[tile] for tile, action in zip(path, actions)]
            if math.isfinite(shortest):
                assert episode.total == 1
                assert len(actions) == shortest
            else:
                assert any(untried)
            for tile, action, onward in zip(path, actions, path[1:]):
                known[tile][action] = onward
        assert [episode.total for episode in episodes[-10:]] == [1] * 10


def test_a_lake_changes_after_so_many_episodes():
    """Each row plays its first lake for three episodes and then its second, each with its own starts, moves and rewards."""
    before, after = Lake(("SFG", "FFF")), Lake(("GFF", "HFS"))
    env = ChangingLake([(before, after), (Lake(("SG",)), Lake(("GS",)))], rng(1), episodes=3)
    for trial, lakes in zip(roll_out(env, RandomPlayer(env, rng(2)), 6), ((before, after), (Lake(("SG",)), Lake(("GS",))))):
        for number, episode in enumerate(trial):
            lake = lakes[number >= 3]
            path = episode.observations.tolist()
            assert path[0] in places(lake, "S")
            assert all(move(lake, tile, action) == onward for tile, action, onward in zip(path, episode.actions, path[1:]))
            assert episode.total == (path[-1] in places(lake, "G"))
            assert episode.truncated or path[-1] in places(lake, "GH")


def test_a_window_changes_the_numbers_of_the_tiles_and_nothing_else():
    """Numbers of a 7 x 7 map at most, equally far from row to row, one for each tile; starts, moves and ends stay the same."""
    lakes = random_lakes(80, rng(1), (3, 5), 4)
    env, plain = Windows(FrozenLake(lakes, rng(2)), rng(3), 0.5), FrozenLake(lakes, rng(2))
    renumbered = 0
    for lake, numbers in zip(lakes, env.numbers):
        grid = numbers[: lake.tiles.size].reshape(lake.height, lake.width)
        assert np.all(np.diff(grid, axis=1) == 1)
        (stride,) = set(np.diff(grid, axis=0).ravel().tolist())
        assert lake.width <= stride <= 7
        assert 0 <= grid[0, 0] % stride <= stride - lake.width
        assert grid[-1, -1] < 7 * stride
        renumbered += grid[0, 0] > 0 or stride > lake.width
    assert 20 < renumbered < 60
    names, dice, row = env.numbers, rng(4), np.arange(80)
    assert np.array_equal(env.reset(), names[row, plain.reset()])
    for _ in range(300):
        action = dice.integers(0, 4, 80)
        ours, theirs = env.step(action), plain.step(action)
        assert np.array_equal(ours[0], names[row, theirs[0]])
        assert all(np.array_equal(a, b) for a, b in zip(ours[1:], theirs[1:]))
        assert np.array_equal(env.goal[row, ours[0]], plain.goal[row, theirs[0]])
        over = ours[2] | ours[3]
        assert np.array_equal(env.reset(over), names[row, plain.reset(over)])
    assert [e.total for trial in roll_out(env, ShortestPath(env), 2) for e in trial] == [1] * 160


@pytest.mark.parametrize(("sides", "share"), [((7, 9), 0.0), ((6, 10), 1.0), ((10, 10), 1.0)])
def test_lakes_larger_than_the_map_of_a_window_keep_to_a_hundred_numbers(sides, share):
    """Such a lake is a window of a map with room for it: no number twice, and none beyond those that can be written."""
    lakes = random_lakes(40, rng(1), sides, 4)
    env = Windows(FrozenLake(lakes, rng(2)), rng(3), share)
    for lake, numbers in zip(lakes, env.numbers):
        own = numbers[: lake.tiles.size]
        assert len(set(own.tolist())) == lake.tiles.size
        assert 0 <= own.min() <= own.max() < 100
    assert [e.total for trial in roll_out(env, ShortestPath(env), 1) for e in trial] == [1] * 40


def test_a_roll_out_can_be_cut_off():
    """After 25 steps on each lake all is over: the steps are those of a longer roll-out, and the last episode is truncated."""
    lakes = random_lakes(20, rng(1))
    whole, cut = (
        roll_out(env := FrozenLake(lakes, rng(2)), RandomPlayer(env, rng(3)), 25, limit=limit) for limit in (math.inf, 25)
    )
    for long, short in zip(whole, cut):
        assert sum(len(e.actions) for e in short) == 25
        assert [e.actions.tolist() for e in short[:-1]] == [e.actions.tolist() for e in long[: len(short) - 1]]
        last, there = short[-1], long[len(short) - 1]
        assert last.actions.tolist() == there.actions[: len(last.actions)].tolist()
        assert last.truncated == (len(last.actions) < len(there.actions) or there.truncated)


def test_the_explorer_takes_a_changed_lake_as_it_finds_it():
    """A hole on its old way, and its old goal gone: after a few deaths it finds the new goal and goes there every time."""
    before, after = Lake(("SFG", "FFF", "FFF")), Lake(("SHF", "FFF", "FFG"))
    env = ChangingLake([(before, after)] * 20, rng(3), episodes=10)
    for trial in roll_out(env, Explorer(env, rng(4)), 40):
        assert [episode.total for episode in trial[5:10]] == [1] * 5
        assert [episode.total for episode in trial[20:]] == [1] * 20
        assert {len(episode.actions) for episode in trial[-5:]} == {4}


def test_the_explorer_forgets_a_lake_that_is_no_longer_there():
    """Another lake, of another width: where what it remembers leads nowhere it begins anew, and finds every goal."""
    lakes = random_lakes(200, rng(5))
    env = ChangingLake(list(zip(lakes[:100], lakes[100:])), rng(6), episodes=30)
    for trial in roll_out(env, Explorer(env, rng(7)), 80):
        assert [episode.total for episode in trial[25:30]] == [1] * 5
        assert [episode.total for episode in trial[70:]] == [1] * 10


def test_tabular_q_update_by_hand():
    """Q(s, a) moves by rate * (r + gamma * max Q(s', .) - Q(s, a)); no bootstrap at an end, no change where nobody plays."""
    lake = Lake(("SFG",))
    env = FrozenLake([lake, lake], rng())
    player = TabularQ(env, rng(), greedy=lambda episode: 1.0, gamma=0.9, rate=0.5)
    player.q[:, 2] = 7.0  # the goal's own values, which an update must never read

    def learn(tile, action, reward, onward, terminated):
        columns = ([value] * 2 for value in (tile, action, onward, reward, terminated, False))
        player.learn(Step(*map(np.array, columns)), np.array([True, False]))  # on the second lake all has been played

    # Two walks to the right, from tile 0 over tile 1 into the goal, told from the end so that the values travel back:
    learn(1, RIGHT, 1.0, 2, True)  # Q(1, right) = 0     + 0.5 (1             - 0)     = 0.5
    learn(0, RIGHT, 0.0, 1, False)  # Q(0, right) = 0     + 0.5 (0 + 0.9 * 0.5  - 0)     = 0.225
    learn(1, RIGHT, 1.0, 2, True)  # Q(1, right) = 0.5   + 0.5 (1             - 0.5)   = 0.75
    learn(0, RIGHT, 0.0, 1, False)  # Q(0, right) = 0.225 + 0.5 (0 + 0.9 * 0.75 - 0.225) = 0.45
    learn(1, LEFT, 0.0, 0, False)  # Q(1, left)  = 0     + 0.5 (0 + 0.9 * 0.45 - 0)     = 0.2025
    expected = np.zeros((2, 3, 4))
    expected[:, 2] = 7.0
    expected[0, 0, RIGHT], expected[0, 1, RIGHT], expected[0, 1, LEFT] = 0.45, 0.75, 0.2025
    np.testing.assert_allclose(player.q, expected, atol=1e-12)


def test_tabular_q_acts_by_its_schedule():
    """In episode e it takes its best action with chance greedy(e), else any; equally good ones are equally likely."""
    env = FrozenLake([Lake(("SG",))] * 1000, rng())
    player = TabularQ(env, rng(14), greedy=np.array([0.0, 0.6, 1.0]).take)
    player.q[:, 0, UP] = player.q[:, 0, RIGHT] = 0.5
    for episode, best in enumerate((0.25, 0.6 / 2 + 0.4 / 4, 0.5)):
        rows, all_playing = np.full(1000, episode), np.ones(1000, bool)
        actions = np.concatenate([player.act(env.state, rows, all_playing) for _ in range(20)])
        share = np.bincount(actions, minlength=4) / 20_000
        assert share[[UP, RIGHT, LEFT, DOWN]] == pytest.approx([best, best, 0.5 - best, 0.5 - best], abs=0.015)


def test_tabular_q_learns():
    """On small lakes its return rises from near that of a random player to nearly always reaching the goal."""
    env = FrozenLake(random_lakes(50, rng(15), (3, 3), 2), rng(16))
    player = TabularQ(env, rng(17), greedy=lambda episode: np.minimum(1.0, episode / 40))
    returns = np.array([[episode.total for episode in episodes] for episodes in roll_out(env, player, 60)])
    assert returns[:, :5].mean() < 0.6
    assert returns[:, -5:].mean() > 0.9


# --------------------------------------------------------------------------------------------------------------- drawing


def test_drawing_by_hand():
    """Visited tiles stand in brackets, the last one in <>, also if the path crosses it before."""
    lake = Lake(("SFF", "HFG"))
    assert draw(lake) == " S  F  F \n H  F  G "
    assert draw(lake, [0, 1, 4, 5]) == "[S][F] F \n H [F]<G>"
    assert draw(lake, np.array([0, 1, 1, 0])) == "<S>[F] F \n H  F  G "
