"""Look at what was learned: play lakes that no training saw, beside players that need no network.

    python eval.py [RUN] unseen         figure 3: the return rises from episode to episode
    python eval.py [RUN] larger         figure 4: lakes of 6-7 tiles a side, larger than any in training
    python eval.py [RUN] stitching      figure 5: two given paths cross, one leads into a hole and one to the goal
    python eval.py RUN RUN ... compare  figures 3 and 6: several runs on the same lakes (alpha, quality, any other setting)
    python eval.py [RUN] changing       figure 7: the lake changes without notice after 30 episodes
    python eval.py [RUN] exploration    section 4.6: with and without forced random actions
    python eval.py [RUN] paths          figure 1: early, middle and late paths of one trial, drawn on the lake
    python eval.py [RUN] --watch        one trial on the terminal, with the Q-values of each step

Without RUN it is the run that comes with the project. `torchrun --nproc-per-node 4 eval.py ...` divides the trials.

Part of the paper: section 4. Every trial is one lake and one growing context; no weight changes. Departures: the curves come
with 95 % confidence intervals and with reference players (uniform random, tabular Q-learning from nothing with the same
exploration schedule, and a systematic explorer), and there are 200 trials instead of 50.
"""

import argparse
import csv
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from frozen_lake import (
    ACTIONS,
    ChangingLake,
    Episode,
    Explorer,
    FrozenLake,
    Lake,
    RandomPlayer,
    TabularQ,
    draw,
    grid_moves,
    hops,
    random_lakes,
    roll_out,
)
from ia3 import replacing
from icrl import InContext, Run, explain, load_run, model_probability, play

EPISODES = 30
SHIPPED = Path(__file__).parent / "results" / "hour"  # the run that comes with the project
TEST_SEED = 2501_14176
HEADER = ("experiment", "player", "episode", "mean_return", "ci_low", "ci_high", "trials")
TRANSFORMER, UNFORCED = "transformer in context", "transformer, nothing forced"
# one colour and one letter for each player, everywhere; the colours are Okabe and Ito's, for colour-blind readers
PLAYERS = {
    TRANSFORMER: ("#0072B2", "T"),
    UNFORCED: ("#CC79A7", "n"),
    "systematic explorer": ("#009E73", "e"),
    "tabular Q-learning": ("#E69F00", "q"),
    "uniform random": ("#7F7F7F", "r"),
}
COMPARED = ("#08306B", "#4C9BE8", "#54278F", "#B497D6", "#D55E00", "#7A2E00", "#000000")  # pairs of a hue: two seeds


def test_lakes(count: int, sides: tuple[int, int], min_hops: int) -> list[Lake]:
    """The first `count` test lakes of a distribution, the same ones every time. Raises ValueError if `count` is below 1."""
    if count < 1:
        raise ValueError(f"An evaluation needs at least one trial, but {count} were asked for.")
    return random_lakes(count, np.random.default_rng(TEST_SEED), tuple(sides), min_hops, test=True)


Played = dict[str, list[list[Episode]]]  # by player, trial and episode


def join_others(device: str) -> str:
    """Returns this process's device; under torchrun one of its own, and only the first process prints and writes files.

    Raises ValueError if there is no such device.
    """
    together = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if together and device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"PyTorch has no device {device!r} here: try --device cpu.") from error
    if together:
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=2))
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays open
    return device


def rank_of() -> tuple[int, int]:
    """This process's number and how many there are, (0, 1) but under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def everyones(value) -> list:
    """What each process has here, in order; they wait for each other."""
    values = [value] * rank_of()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def by_network(
    run: Run, lakes: Sequence, seed: int, episodes: int = EPISODES, given: Sequence | None = None, **settings
) -> list[list[Episode]]:
    """The network plays so many episodes on each lake; settings are those of icrl.play.

    Processes divide the lakes; each has its own random numbers, so as many processes are part of what a seed gives.
    """
    (rank, world), recipe = rank_of(), run.recipe
    rng, given, lakes = np.random.default_rng([seed, rank] if rank else seed), given and given[rank::world], lakes[rank::world]
    played = play(run.network, run.encoder, lakes, episodes, rng, recipe["tokens"], recipe["max_steps"], given=given, **settings)
    return [trial for turn in itertools.zip_longest(*everyones(played)) for trial in turn if trial is not None]


def by_references(run: Run, lakes: Sequence, seed: int, episodes: int = EPISODES, world: Callable = FrozenLake) -> Played:
    """What players without a network do on the same lakes; their random numbers depend on nobody else's games."""
    tabular = lambda env, rng: TabularQ(env, rng, model_probability)  # noqa: E731
    played = {}
    for name, player in (("systematic explorer", Explorer), ("tabular Q-learning", tabular), ("uniform random", RandomPlayer)):
        rng = np.random.default_rng(seed)
        env = world(lakes, rng, max_steps=run.recipe["max_steps"])
        played[name] = roll_out(env, player(env, rng), episodes)
    return played


def returns_of(played: list[list[Episode]]) -> np.ndarray:
    """(trials, episodes) undiscounted returns."""
    return np.array([[episode.total for episode in trial] for trial in played])


# ------------------------------------------------------------------------------------------------------------- results
def wilson(mean: np.ndarray, trials: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % confidence interval of a share (Wilson 1927): the return of an episode is 0 or 1. Honest at 0 and at 1 too."""
    z = 1.96
    centre = (mean + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * np.sqrt(mean * (1 - mean) / trials + z * z / (4 * trials * trials))
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def write_curve(path: Path, experiment: str, returns: dict[str, np.ndarray]) -> None:
    """The CSV contract: for each player and episode the mean return over trials and its interval."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        for player, r in returns.items():
            for episode, values in enumerate(zip(r.mean(0), *wilson(r.mean(0), len(r)))):
                writer.writerow((experiment, player, episode, *(f"{v:.4f}" for v in values), len(r)))


def style(player: str, players: list[str]) -> tuple[str, str]:
    """A player's colour and letter; compared runs take theirs in order."""
    number = players.index(player)
    return PLAYERS.get(player, (COMPARED[number % len(COMPARED)], "abcdfghijk"[number % 10]))


def save_picture(path: Path, figure) -> None:
    if rank_of()[0]:
        return
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def plot_curve(path: Path, title: str, returns: dict[str, np.ndarray]) -> None:
    """Draw the curves as a PNG. Raises ImportError if matplotlib is not installed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for player, r in returns.items():
        mean, (colour, _) = r.mean(0), style(player, list(returns))
        axes.fill_between(range(len(mean)), *wilson(mean, len(r)), color=colour, alpha=0.15, linewidth=0)
        axes.plot(mean, color=colour, label=player, linewidth=2.2 if player == TRANSFORMER else 1.4)
    axes.set(xlabel="episode in the same context", ylabel="mean return (goals an episode)")
    axes.set_title(title, fontsize="medium")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlim=(0, len(mean) - 1), ylim=(-0.02, 1.02))
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    save_picture(path, figure)


def text_plot(returns: dict[str, np.ndarray], height: int = 11) -> str:
    """The curves as text, two columns an episode; where they cross, the first player's letter stands on top."""
    width, players = len(next(iter(returns.values()))[0]), list(returns)
    grid = [[" "] * (2 * width) for _ in range(height)]
    for player, r in reversed(returns.items()):
        for episode, mean in enumerate(r.mean(0)):
            grid[round((1 - mean) * (height - 1))][2 * episode] = style(player, players)[1]
    lines = [f"{1 - i / (height - 1):4.1f} |{''.join(row)}".rstrip() for i, row in enumerate(grid)]
    lines += ["     +" + "-" * (2 * width), "      " + "".join(f"{e:<10}" for e in range(0, width, 5)) + " episode"]
    return "\n".join([*lines, "      " + "   ".join(f"{style(p, players)[1]} {p}" for p in players)])


def table(returns: dict[str, np.ndarray]) -> str:
    """Mean return in blocks of five episodes, and the share of lakes on which each player ever found a goal."""
    size = 5 if len(next(iter(returns.values()))[0]) <= 30 else 10
    blocks = range(0, len(next(iter(returns.values()))[0]), size)
    lines = [f"{'mean return in episodes':28}" + "".join(f"{f'{b}-{b + size - 1}':>8}" for b in blocks) + "   goal found"]
    for player, r in returns.items():
        cells = "".join(f"{r[:, b : b + size].mean():8.3f}" for b in blocks)
        lines.append(f"{player:28}{cells}{(r.max(1) > 0).mean():13.0%}")
    return "\n".join(lines)


def sparkline(r: np.ndarray) -> str:
    """The mean returns of (trials, episodes) in one word."""
    return "".join("▁▂▃▄▅▆▇█"[min(int(8 * m), 7)] for m in r.mean(0))


def report(folder: Path, experiment: str, title: str, played: Played) -> None:
    """Print the plot and the table of an experiment; write curve.csv and curve.png into `folder`."""
    if rank_of()[0]:
        return
    returns = {player: returns_of(trials) for player, trials in played.items()}
    print(f"\n{title}\n\n{text_plot(returns)}\n\n{table(returns)}\n")
    folder.mkdir(parents=True, exist_ok=True)
    write_curve(folder / "curve.csv", experiment, returns)
    try:
        plot_curve(folder / "curve.png", title, returns)
        print(f"Written: {folder / 'curve.csv'} and {folder / 'curve.png'}")
    except ImportError:
        print(f"Written: {folder / 'curve.csv'}  (for a picture too: pip install matplotlib)")


# --------------------------------------------------------------------------------------------------------- experiments
def always(episode: np.ndarray) -> np.ndarray:
    """The model chooses every action."""
    return np.ones(len(episode))


def described(count: int, kind: str, sides: tuple[int, int], min_hops: int) -> str:
    return f"{count} {kind} ({sides[0]}-{sides[1]} tiles a side, goals at least {min_hops} hops away)"


def unseen(run: Run, folder: Path, trials: int, seed: int = 0) -> None:
    """Figure 3: lakes of the training's distribution that it never saw."""
    on_lakes(run, folder, "unseen", trials, run.recipe["sides"], run.recipe["min_hops"], seed)


def larger(run: Run, folder: Path, trials: int, seed: int) -> None:
    """Figure 4: lakes of 6 to 7 tiles a side."""
    on_lakes(run, folder, "larger", trials, (6, 7), 4, seed)


def on_lakes(run: Run, folder: Path, kind: str, trials: int, sides: tuple[int, int], min_hops: int, seed: int) -> None:
    lakes = test_lakes(trials, sides, min_hops)
    played = {TRANSFORMER: by_network(run, lakes, seed)} | by_references(run, lakes, seed)
    report(folder, kind, described(trials, f"{kind} lakes", sides, min_hops), played)


def changing(run: Run, folder: Path, trials: int, seed: int) -> None:
    """Figure 7: after 30 episodes each lake is another one, and nobody says so."""
    sides, min_hops = run.recipe["sides"], run.recipe["min_hops"]
    lakes = test_lakes(2 * trials, sides, min_hops)
    pairs = list(zip(lakes[:trials], lakes[trials:]))
    played = {TRANSFORMER: by_network(run, pairs, seed, 60, world=ChangingLake)}
    played |= by_references(run, pairs, seed, 60, ChangingLake)
    report(folder, "changing", described(trials, "lakes that change after episode 29", sides, min_hops), played)


def exploration(run: Run, folder: Path, trials: int, seed: int) -> None:
    """Section 4.6: the same lakes with and without the forced random actions of the first twenty episodes."""
    sides, min_hops = run.recipe["sides"], run.recipe["min_hops"]
    lakes = test_lakes(trials, sides, min_hops)
    played = {TRANSFORMER: by_network(run, lakes, seed)}
    played[UNFORCED] = by_network(run, lakes, seed, probability=always)
    played |= by_references(run, lakes, seed)
    report(folder, "exploration", described(trials, "unseen lakes", sides, min_hops), played)
    print(f"\n{'':28}  goal ever found   return in 25-29, if found   episodes 25-29 that loop")
    for player, games in played.items():
        r, late = returns_of(games), slice(25, EPISODES)
        found = r.max(1) > 0
        loops = np.mean([episode.truncated for trial in games for episode in trial[late]])
        print(f"{player:28}{found.mean():17.0%}{r[found][:, late].mean() if found.any() else np.nan:28.3f}{loops:27.1%}")


NOTEBOOK_LAKE = Lake(("HHFF", "FFFF", "SFFH", "HFFF", "HFFF", "HFGF"))


def along(lake: Lake, start: int, actions: Sequence[int]) -> Episode:
    """The episode that these actions make from the tile `start`, be it a start of the lake or not."""
    moves, tiles = grid_moves(lake.height, lake.width), [start]
    for action in actions:
        tiles.append(int(moves[tiles[-1], action]))
    paid = np.zeros(len(actions), np.float32)
    paid[-1] = lake.tiles[tiles[-1]] == "G"
    return Episode(np.array(tiles), np.array(actions), paid, truncated=False)


def crossing_paths(lake: Lake, rng: np.random.Generator) -> tuple[Episode, Episode] | None:
    """Two shortest paths that cross: from elsewhere to a goal, and from the lake's one start into a hole; None if there are none.

    The winning one begins beside the losing one, not on it, so whoever starts on the losing path has to change over.
    """
    holes, goals, ends = (np.flatnonzero(np.isin(lake.tiles, list(which))) for which in ("H", "G", "HG"))
    moves = grid_moves(lake.height, lake.width).copy()
    moves[ends] = -1

    def path(start: int, target: int) -> Episode | None:
        """A random shortest way."""
        distance = hops(moves[None], (np.arange(len(moves)) == target)[None])[0]
        actions, tile = [], start
        while np.isfinite(distance[tile]) and tile != target:
            actions.append(int(rng.choice([a for a in range(4) if distance[moves[tile, a]] < distance[tile]])))
            tile = moves[tile, actions[-1]]
        return along(lake, start, actions) if actions else None

    (start,) = np.flatnonzero(lake.tiles == "S")
    for _ in range(50 if len(holes) else 0):
        other = rng.choice(np.setdiff1d(np.arange(len(moves)), ends))
        losing, winning = path(start, rng.choice(holes)), path(other, rng.choice(goals))
        if losing and winning and other not in losing.observations and start not in winning.observations:
            crossing = set(losing.observations[:-1]) & set(winning.observations[:-1])
            if crossing:
                return winning, losing
    return None


def stitching(run: Run, folder: Path, trials: int, seed: int) -> None:
    """Figure 5: the notebook's lake, and generated ones; nothing is forced, and the trial starts where the losing path did."""
    rng = np.random.default_rng(TEST_SEED)
    given = [(NOTEBOOK_LAKE, [along(NOTEBOOK_LAKE, 2, [1] * 5), along(NOTEBOOK_LAKE, 8, [2] * 3)])] * 5
    for lake in test_lakes(20 * trials, run.recipe["sides"], run.recipe["min_hops"]):
        if len(given) < trials + 5 and "".join(lake.rows).count("S") == 1 and (pair := crossing_paths(lake, rng)):
            given.append((lake, [pair[i] for i in rng.permutation(2)]))
    lakes, episodes = zip(*given)
    played = by_network(run, lakes, seed, 5, probability=always, given=episodes)
    without = by_network(run, lakes, seed, 5, probability=always)
    everyone = {TRANSFORMER: played, "without the given episodes": without} | by_references(run, lakes, seed, 5)
    print(f"{'':28}  solved at once   within five episodes")
    for what, trial in (("the notebook's lake, 5 trials", slice(0, 5)), (f"{len(lakes) - 5} generated lakes", slice(5, None))):
        print(what)
        for name, games in everyone.items():
            r = returns_of(games[trial])
            print(f"  {name:26}{r[:, 0].mean():16.0%}{(r.max(1) > 0).mean():23.0%}")
    title = f"{len(lakes) - 5} lakes with two given episodes whose paths cross"
    report(folder, "stitching", title, {name: games[5:] for name, games in everyone.items()})


def compare(runs: list[Run], folder: Path, trials: int, seed: int) -> None:
    """Figures 3 and 6: each run on the same lakes, named by its folder and, if these are few, the settings that differ."""
    first, how = runs[0].recipe, {"steps", "at_once", "checkpointing", "compile"}
    differing = [key for key in first if len({str(run.recipe.get(key)) for run in runs}) > 1 and key not in how]
    lakes = test_lakes(trials, first["sides"], first["min_hops"])
    played = {}
    for run in runs:
        settings = ", ".join(f"{key} {run.recipe.get(key)}" for key in differing)
        played[f"{run.folder.name} ({settings})" if 0 < len(differing) < 3 else run.folder.name] = by_network(run, lakes, seed)
    played |= by_references(runs[0], lakes, seed)
    report(folder, "compare", described(trials, "unseen lakes", first["sides"], first["min_hops"]), played)


def paths(run: Run, folder: Path, trial: int, seed: int) -> None:
    """Figure 1: paths of one trial in its first, a middle and its last episode."""
    lake = test_lakes(trial + 1, run.recipe["sides"], run.recipe["min_hops"])[trial]
    (episodes,) = by_network(run, [lake], seed)
    chosen = (0, 10, EPISODES - 1)
    for number in chosen:
        print(f"\nepisode {number}, return {episodes[number].total:.0f}\n{draw(lake, episodes[number].observations.tolist())}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        plot_paths(folder / "paths.png", lake, {f"episode {n}": episodes[n] for n in chosen})
        print(f"\nWritten: {folder / 'paths.png'}")
    except ImportError:
        print("(for a picture: pip install matplotlib)")


def plot_paths(path: Path, lake: Lake, episodes: dict[str, Episode]) -> None:
    """Each episode as a line on the lake, a dot for every step; the last one is red."""
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    colours = {tile: to_rgb(c) for tile, c in {"S": "#B3E5FC", "F": "#E8F4FA", "H": "#5B6770", "G": "#F0C419"}.items()}
    figure = Figure(figsize=(2.6 * len(episodes), 2.6 * lake.height / lake.width + 0.5), layout="constrained")
    for axes, (title, episode) in zip(np.atleast_1d(figure.subplots(1, len(episodes))), episodes.items()):
        axes.imshow([[colours[letter] for letter in row] for row in lake.rows])
        for tile, letter in enumerate(lake.tiles):
            axes.text(tile % lake.width - 0.4, tile // lake.width - 0.25, letter, color="white" if letter == "H" else "black")
        rows, columns = np.divmod(episode.observations, lake.width)
        shift = np.linspace(-0.15, 0.15, len(rows))  # so that a way back does not hide the way there
        axes.plot(columns + shift, rows + shift, color="#0072B2", linewidth=1.6, marker=".", markersize=4)
        axes.plot(columns[-1] + shift[-1], rows[-1] + shift[-1], "o", color="#D55E00", markersize=7)
        outcome = "goal" if episode.total else "cut off" if episode.truncated else "hole"
        axes.set_title(f"{title}: {len(episode.actions)} step{'s' if len(episode.actions) > 1 else ''}, {outcome}", fontsize=8)
        axes.set(xticks=[], yticks=[])
    save_picture(path, figure)


# --------------------------------------------------------------------------------------------------------------- watch
def watch(run: Run, lake: Lake, seed: int) -> None:
    """Play one trial and print every step: the Q-values before it and the action, * where a coin and not the model chose."""
    seen: list[tuple] = []  # Q-values before each step, and whether the model chose

    class Watched(InContext):
        def act(self, *situation):
            action = super().act(*situation)
            seen.append((self.q[0].copy(), self.by_model[0]))
            return action

    rng = np.random.default_rng(seed)
    env = FrozenLake([lake], rng, max_steps=run.recipe["max_steps"])
    (episodes,) = roll_out(env, Watched(run.network, run.encoder, env, rng, run.recipe["tokens"]), EPISODES)
    print(f"The lake (the model sees tile numbers only):\n{draw(lake)}")
    steps = iter(seen)
    for number, episode in enumerate(episodes):
        print(f"\nepisode {number}: the model chooses with probability {model_probability(number):.1f}")
        print("  tile " + "".join(f"{f'Q({a})':>9}" for a in ACTIONS) + "   action")
        for tile, action in zip(episode.observations, episode.actions):
            q, by_model = next(steps)
            print(f"  {tile:>4} " + "".join(f"{v:9.3f}" for v in q) + f"   {ACTIONS[action]}{'' if by_model else ' *'}")
        end = "the goal" if episode.total else "the step limit" if episode.truncated else "a hole"
        print(f"{draw(lake, episode.observations.tolist())}\nended by {end}, return {episode.total:.0f}")
    print("\nreturns: " + " ".join(f"{e.total:.0f}" for e in episodes))


# ----------------------------------------------------------------------------------------------------------------- main
EXPERIMENTS = {f.__name__: f for f in (unseen, larger, stitching, changing, exploration)}


def main(arguments: list[str] | None = None) -> None:
    names = [*EXPERIMENTS, "compare", "paths"]
    parser = argparse.ArgumentParser(description="Evaluate a run on lakes that no training saw.")
    parser.add_argument("what", nargs="*", metavar="RUN | EXPERIMENT", help=f"folders of runs, and one of {', '.join(names)}")
    parser.add_argument("--watch", action="store_true", help="show one trial step by step instead")
    parser.add_argument("--lake", type=int, default=0, help="which test lake to watch or draw (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=200, help="test lakes to play (default: %(default)s)")
    parser.add_argument("--context", type=int, help="tokens of context (default: the run's slice length)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of starts and coin tosses (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, help="folder for the results (default: that of the run for unseen, else EXPERIMENT/ in it)"
    )
    args = parser.parse_args(arguments)
    try:
        folders = [Path(word) for word in args.what if word not in names] or [SHIPPED]
        experiment, *others = [word for word in args.what if word in names] or ["unseen"]
        if others or (len(folders) > 1 and experiment != "compare"):
            raise ValueError(f"One experiment and one run at a time, of which compare takes several: {' '.join(args.what)}.")
        if args.lake < 0:
            raise ValueError(f"Test lakes are counted from 0, so there is no --lake {args.lake}.")
        for folder in folders:
            if not folder.exists():
                raise ValueError(f"{folder} is neither a run's folder nor one of {', '.join(names)}.")
        device = join_others(args.device)
        runs = [load_run(folder, device) for folder in folders]
        for run in runs:
            run.recipe["tokens"] = run.recipe["tokens"] if args.context is None else args.context
        here = SHIPPED.parent if folders == [SHIPPED] else folders[0]
        out = args.out or (folders[0] if experiment == "unseen" and folders != [SHIPPED] else here / experiment)
        if args.watch:
            watch(runs[0], test_lakes(args.lake + 1, runs[0].recipe["sides"], runs[0].recipe["min_hops"])[args.lake], args.seed)
        elif experiment == "compare":
            compare(runs, out, args.trials, args.seed)
        elif experiment == "paths":
            paths(runs[0], out, args.lake, args.seed)
        else:
            EXPERIMENTS[experiment](runs[0], out, args.trials, args.seed)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        parser.exit(2, f"eval.py: {explain(error)}\n")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
