"""Look at what was learned: play lakes that no training saw.

    python eval.py [RUN] [EXPERIMENT]    RUN: by default the shipped one
    python eval.py RUN RUN ... [compare] [EXPERIMENT]    figures 3 and 6: several runs side by side
    python eval.py [RUN] --watch         one trial, step by step, with its Q-values

    unseen       figure 3: the return rises from episode to episode
    stitching    figure 5: two given paths cross, one of which wins
    changing     figure 7: each lake is another one from episode 30 on
    beliefs      figure 1, and the best action on each tile; --gif: a film

A single run plays these twice, the second time with nothing forced:
    exploration  section 4.6: the lakes of `unseen` (several runs: nothing forced)
    larger       figure 4: lakes of 6-7 tiles a side
    harder       5 x 5 tiles, goals 7 hops away or more
    shuffled     tile numbers and action words that mean something else on each lake
    graphs       no grid: any action leads anywhere
    slippery     a step may go to either side
"""

import argparse
import csv
import os
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from frozen_lake import ACTIONS, DIRECTIONS, NOTEBOOK_LAKE, Episode, Explorer, Planner, RandomPlayer
from frozen_lake import TabularQ, draw, hops, random_graphs, random_lakes, roll_out, worlds
from icrl import SHIPPED, InContext, load_run, model_probability, play, replacing
from llama import DEVICE, device, exit_in_one_sentence

os.environ["MPLBACKEND"] = "agg"  # no window; and a notebook's may be missing here
TEST_SEED = 2501_14176
REFERENCES = {
    "systematic explorer": Explorer,
    "tabular Q-learning": lambda env, rng: TabularQ(env, rng, model_probability),
    "uniform random": RandomPlayer,
}
TRANSFORMER, UNFORCED = "transformer in context", "transformer, nothing forced"
BEST = "best possible"
OKABE_ITO = "#0072B2 #CC79A7 #009E73 #E69F00 #7F7F7F #56B4E9".split()
COLOURS = dict(zip((TRANSFORMER, UNFORCED, *REFERENCES, BEST), OKABE_ITO))
ON_LAKES = "unseen larger harder shuffled graphs slippery exploration".split()
ALWAYS = np.ones_like  # the network chooses with probability 1


def test_lakes(count, sides, min_hops):
    """The first `count` test lakes of a distribution, always the same."""
    if count < 1:
        raise ValueError(f"At least one test lake has to be played, not {count}.")
    return random_lakes(count, np.random.default_rng(TEST_SEED), sides, min_hops, test=True)


def by_references(run, seed, *stages, episodes=30, **kind):
    """What players without a network do on the lakes of one stage after another, by name."""
    played, best = {}, {BEST: Planner} if kind.get("slippery") else {}
    for name, make in (REFERENCES | best).items():
        rng = np.random.default_rng(seed)
        envs = [worlds(lakes, rng, run.recipe.max_steps, **kind) for lakes in stages]
        player = make(max(envs, key=lambda env: env.moves.size), rng)  # its tables fit all stages
        turns = [roll_out(env, player, episodes, first=i * episodes) for i, env in enumerate(envs)]
        played[name] = [list(chain(*trial)) for trial in zip(*turns)]
    return played


def returns_of(played):
    """(trials, episodes) undiscounted returns."""
    return np.array([[episode.total for episode in trial] for trial in played])


def wilson(mean, trials):
    """95 % confidence intervals (2, ...) of shares (Wilson 1927)."""
    z = 1.96
    centre = mean + z**2 / (2 * trials)
    half = z * np.sqrt(mean * (1 - mean) / trials + (z / (2 * trials)) ** 2)
    return np.clip(np.array([centre - half, centre + half]) / (1 + z**2 / trials), 0, 1)


def sparkline(played):
    """The mean returns of the episodes in one word."""
    bars = "▁▂▃▄▅▆▇█"
    return "".join(bars[min(int(8 * mean), 7)] for mean in returns_of(played).mean(0))


def table(played):
    """Mean returns, lakes on which a goal was found, and loops: last episodes that were cut off."""
    width = len(next(iter(played.values()))[0])
    size = 5 if width <= 30 else 10
    blocks = range(0, width, size)
    head = "".join(f"{f'{b}-{b + size - 1}':>7}" for b in blocks)
    lines = [f"{'mean return in episodes':28}{f'0-{width - 1}':{width}}{head}  found  loops"]
    for name, trials in played.items():
        r = returns_of(trials)
        cells = "".join(f"{r[:, b : b + size].mean():7.3f}" for b in blocks)
        loops = np.mean([episode.truncated for trial in trials for episode in trial[-size:]])
        cells += f"{(r.max(1) > 0).mean():7.0%}{loops:7.1%}"
        lines.append(f"{name:27} {sparkline(trials)}{cells}")
    return "\n".join(lines)


def plot(path, title, returns):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for player, r in returns.items():
        (line,) = axes.plot(r.mean(0), label=player, color=COLOURS.get(player))
        low, high = wilson(r.mean(0), len(r))
        axes.fill_between(range(len(low)), low, high, color=line.get_color(), alpha=0.15)
    axes.set(title=title, xlabel="episode in the same context", ylabel="mean return", ylim=(0, 1))
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    save_picture(path, figure)


def save_picture(path, figure):
    with replacing(path) as new:
        figure.savefig(new, dpi=150)
    print(f"Written: {path}")


def report(folder, experiment, title, played):
    """Print the table; write curve.csv and, with matplotlib, curve.png."""
    returns = {name: returns_of(trials) for name, trials in played.items()}
    with replacing(folder / "curve.csv") as path, open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow("experiment player episode mean_return ci_low ci_high trials".split())
        for player, r in returns.items():
            for episode, values in enumerate(zip(r.mean(0), *wilson(r.mean(0), len(r)))):
                numbers = (f"{value:.4f}" for value in values)
                writer.writerow((experiment, player, episode, *numbers, len(r)))
    print(f"\n{title}\n\n{table(played)}\n\nWritten: {folder / 'curve.csv'}")
    try:
        plot(folder / "curve.png", title, returns)
    except ImportError:
        print("(for a picture: pip install matplotlib)")
    except Exception as error:  # the figures are safe
        print(f"(no picture: {error!r})")


def on_lakes(experiment, runs, folder, trials, seed):
    """All players on the lakes of an experiment."""
    recipe = runs[0].recipe
    where = {"larger": ((6, 7), 4), "harder": ((5, 5), 7)}
    lakes = test_lakes(trials, *where.get(experiment, (recipe.sides, recipe.min_hops)))
    if experiment == "graphs":
        lakes = random_graphs(trials, np.random.default_rng(TEST_SEED))
    kind = {experiment: 1.0} if experiment in ("shuffled", "slippery") else {}
    names = [str(run.folder) for run in runs] if len(runs) > 1 else [TRANSFORMER]
    how = {"probability": ALWAYS} if len(runs) > 1 and experiment == "exploration" else {}
    played = {name: play(run, lakes, seed, **how, **kind) for name, run in zip(names, runs)}
    if len(runs) == 1 and experiment != "unseen":  # `exploration` is `unseen` and this
        played[UNFORCED] = play(runs[0], lakes, seed, probability=ALWAYS, **kind)
    played |= by_references(runs[0], seed, lakes, **kind)
    report(folder, experiment, f"{experiment}: {trials} worlds that no training saw", played)


def changing(run, folder, trials, seed):
    """Figure 7: after 30 episodes each lake is another one, and nobody says so."""
    lakes = test_lakes(2 * trials, run.recipe.sides, run.recipe.min_hops)
    before, after = lakes[:trials], lakes[trials:]
    earlier = play(run, before, seed)
    later = play(run, after, seed, first=30, given=earlier)  # given: all its past
    played = {TRANSFORMER: [one + other for one, other in zip(earlier, later)]}
    played |= by_references(run, seed, before, after)
    report(folder, "changing", f"{trials} lakes that change after episode 29", played)


def along(lake, start, actions):
    """The episode that these actions make from any tile."""
    tiles = [start]
    for action in actions:
        tiles.append(int(lake.moves[tiles[-1], action]))
    rewards = (lake.tiles[tiles[1:]] == "G").astype(np.float32)
    return Episode(np.array(tiles), np.array(actions), rewards)


def crossing_paths(lake, rng):
    """A path from elsewhere to a goal and one from the only start into a hole that cross, or None.

    Neither begins on the other: who starts at S and knows only these has to change over.
    """

    def path(start, letter):
        """A random shortest way to a random tile of this letter, or None."""
        distance = np.full((1, lake.tiles.size), np.inf)
        distance[0, rng.choice(np.flatnonzero(lake.tiles == letter))] = 0.0
        (distance,) = hops(lake.moves[None], distance)
        actions, tile = [], start
        while 0 < distance[tile] < np.inf:
            nearer = np.flatnonzero(distance[lake.moves[tile]] < distance[tile])
            actions.append(int(rng.choice(nearer)))
            tile = lake.moves[tile, actions[-1]]
        return along(lake, start, actions) if actions else None

    start, *more = np.flatnonzero(lake.tiles == "S")
    if more or not {"F", "H"} <= {*lake.tiles}:
        return None
    for _ in range(50):
        other = rng.choice(np.flatnonzero(lake.tiles == "F"))
        winning, losing = path(other, "G"), path(start, "H")
        if winning and losing:
            won, lost = set(winning.observations[:-1]), set(losing.observations[:-1])
            if won & lost and other not in lost and start not in won:
                return [winning, losing]
    return None


def stitching(run, folder, trials, seed):
    """Figure 5: the notebook's lake, five times, and others; nothing is forced on the network."""
    rng = np.random.default_rng(TEST_SEED)
    lakes = [NOTEBOOK_LAKE] * 5
    given = [[along(NOTEBOOK_LAKE, 2, [1] * 5), along(NOTEBOOK_LAKE, 8, [2] * 3)]] * 5
    for lake in test_lakes(20 * trials, run.recipe.sides, run.recipe.min_hops):
        if len(lakes) < trials + 5 and (pair := crossing_paths(lake, rng)):
            lakes.append(lake)
            given.append([pair[i] for i in rng.permutation(2)])
    if len(lakes) == 5:
        raise ValueError(f"No paths cross on {20 * trials} lakes of this run: play another one.")
    played = {TRANSFORMER: play(run, lakes, seed, 5, given=given, probability=ALWAYS)}
    played["without the given episodes"] = play(run, lakes, seed, 5, probability=ALWAYS)
    played |= by_references(run, seed, lakes, episodes=5)
    notebook = {name: games[:5] for name, games in played.items()}
    print(f"\nThe notebook's lake, five times\n\n{table(notebook)}")
    title = f"{len(lakes) - 5} lakes with two given episodes whose paths cross"
    report(folder, "stitching", title, {name: games[5:] for name, games in played.items()})


def watch(run, lake, seed):
    """Every step of one trial, with the Q-values before it; *: a coin chose the action."""
    rng, lines = np.random.default_rng(seed), []

    class Watched(InContext):
        def act(self, state, episode):
            action = super().act(state, episode)
            values = "".join(f"{value:9.3f}" for value in self.q[0])
            coin = "" if self.by_model[0] else " *"
            lines.append(f"  {state[0]:4} {values}   {ACTIONS[action[0]]}{coin}")
            return action

    env = worlds([lake], rng, run.recipe.max_steps)
    (episodes,) = roll_out(env, Watched(run, env, rng), 30)
    print(f"The lake (the model sees tile numbers only):\n{draw(lake)}")
    for number, episode in enumerate(episodes):
        print(f"\nepisode {number}\n  tile " + "".join(f"{f'Q({a})':>9}" for a in ACTIONS))
        for _ in episode.actions:
            print(lines.pop(0))
        print(f"{draw(lake, episode.observations)}\nreturn {episode.total:.0f}")
    print("\nreturns: " + " ".join(f"{episode.total:.0f}" for episode in episodes))


def draw_beliefs(axes, run, env, lake, episodes, number):
    """An episode's path, and on each tile what the network would do there, the redder the better.

    Each tile has a row of the cache, with the episodes before, as if the next one began there.
    """
    tiles = env.numbers[0]
    same = worlds([lake] * len(tiles), env.rng, env.max_steps)  # for its size and step limit
    player = InContext(run, same, env.rng, given=[episodes[:number]] * len(tiles))
    player.act(tiles, episode=number)
    best, value = player.q.argmax(1), player.q.max(1) / run.recipe.reward_scale  # (tiles,)
    down, right = np.transpose(DIRECTIONS)[:, env.words[0, best]]
    row, column = np.divmod(np.arange(len(tiles)), lake.width)
    axes.clear()
    shades = ["H  SFG".index(letter) for letter in lake.tiles]  # from dark to bright
    axes.imshow(np.reshape(shades, (-1, lake.width)), "Blues_r")
    for where in zip(column - 0.42, row - 0.25, lake.tiles):
        axes.text(*where)
    onward = ~env.end[0, tiles]
    arrows = (x[onward] for x in (column, row, right, -down, value))
    axes.quiver(*arrows, pivot="mid", scale=2 * lake.width, cmap="YlOrRd", clim=(0, 1))
    path = [tiles.tolist().index(tile) for tile in episodes[number].observations]
    shift = np.linspace(-0.15, 0.15, len(path))  # a way back must stay visible
    axes.plot(column[path] + shift, row[path] + shift, ".-", color="#009E73")
    axes.set(title=f"episode {number}: {len(path) - 1} steps", xticks=[], yticks=[])


def beliefs(run, path, lake, seed):
    """Figure 1, and the network's reasons: six episodes of a trial, nothing forced; .gif: all."""
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure

    rng = np.random.default_rng(seed)
    env = worlds([lake], rng, run.recipe.max_steps, float(run.recipe.shuffled > 0))
    (episodes,) = roll_out(env, InContext(run, env, rng, ALWAYS), 30)
    if path.suffix == ".png":
        figure = Figure(figsize=(9, 6.2 * len(lake.rows) / lake.width + 0.5), layout="constrained")
        for axes, number in zip(figure.subplots(2, 3).flat, (0, 1, 2, 5, 10, 29)):
            draw_beliefs(axes, run, env, lake, episodes, number)
        return save_picture(path, figure)
    figure, film = Figure(figsize=(4, 4), layout="constrained"), PillowWriter(fps=2)
    axes = figure.subplots()
    with replacing(path) as new, film.saving(figure, new, dpi=70):
        for number in range(len(episodes)):
            draw_beliefs(axes, run, env, lake, episodes, number)
            film.grab_frame()
    print(f"Written: {path}")


def main(arguments=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("what", nargs="*", metavar="RUN | EXPERIMENT", help="see above")
    add("--watch", action="store_true", help="one trial step by step")
    add("--gif", action="store_true", help="beliefs as a film")
    add("--lake", type=int, default=0, help="the test lake to watch or draw")
    add("--trials", type=int, default=200, help="trials to play")
    add("--context", type=int, help="tokens to look back on (default: the run's)")
    add("--device", type=device, default=DEVICE)
    add("--seed", type=int, default=0, help="of all but the lakes")
    add("--out", type=Path, help="default: RUN/EXPERIMENT")
    args = parser.parse_args(arguments)
    alone = {"stitching": stitching, "changing": changing}
    names, what = (*ON_LAKES, *alone, "beliefs"), [w for w in args.what if w != "compare"]
    asked = [w for w in what if w in names] + ["--watch"] * args.watch
    experiment, *more = asked or ["unseen"]
    folders = [Path(word) for word in what if word not in names] or [SHIPPED]
    if more or (len(folders) > 1 and experiment not in ON_LAKES):
        raise ValueError(f"Only one experiment or --watch, most of them on one run: {args.what}.")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed has to be in 0 to {2**32 - 1}, not {args.seed}.")
    run, *others = [load_run(folder, args.device, args.context) for folder in folders]
    out = args.out or run.folder / ("compare" if others else "") / experiment
    if not args.watch:  # can it be written?
        out.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=out).close()
    if args.watch or experiment == "beliefs":
        lake = test_lakes(args.lake + 1, run.recipe.sides, run.recipe.min_hops)[-1]
        if args.watch:
            watch(run, lake, args.seed)
        else:
            beliefs(run, out / f"beliefs.{'gif' if args.gif else 'png'}", lake, args.seed)
    elif experiment in alone:
        alone[experiment](run, out, args.trials, args.seed)
    else:
        on_lakes(experiment, [run, *others], out, args.trials, args.seed)


if __name__ == "__main__":
    with exit_in_one_sentence():
        main()
