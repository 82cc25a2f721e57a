"""Play lakes that no training has seen, and look at what was learned.

    python eval.py [EXPERIMENT] [RUN ...]    by default `unseen`, by the pretrained network
    python eval.py shuffled runs/1 runs/2    several runs in one picture

Experiments on 200 lakes, played greedily and with the exploration schedule:
    unseen       figure 3: the return rises from episode to episode
    larger       figure 4: lakes of 6 to 7 tiles a side
    changing     figure 7: every lake is replaced by another one after episode 29
    far_goals    5 x 5 tiles, goals 7 or more steps away
    shuffled     tile ids and action words that mean something else on every lake
    graphs       no grid: an action may lead to any tile
    slippery     a step may go to either side
Others:
    stitching    figure 5: two given paths cross, and one of them leads to a goal
    policy_map   figure 1, and the best action on every tile; --gif: as an animation
    watch        one trial, step by step, with its Q-values

To add an experiment `tiny` on lakes of 3 x 3 tiles, put "tiny": "unseen lakes of 3 x 3 tiles" in
TITLES and "tiny": ((3, 3), 2) in LAKE_SIZES. Options of frozen_lake.make_env go in ENV_OPTIONS.
"""

import argparse
import csv
import os
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from frozen_lake import ACTIONS, DIRECTIONS, NOTEBOOK_LAKE, Episode, Explorer, RandomAgent, TabularQ
from frozen_lake import ValueIteration, distance_to_goal, draw, make_env, random_graphs
from frozen_lake import random_lakes, rollout
from icrl import PRETRAINED, InContext, always_greedy, atomic_write, greedy_probability, load_run
from icrl import play
from llama import DEVICE, device_argument, user_errors

TITLES = {
    "unseen": "unseen lakes",
    "larger": "unseen lakes of 6 to 7 tiles a side",
    "changing": "unseen lakes that are replaced after episode 29",
    "far_goals": "unseen lakes of 5 x 5 tiles, goals 7 or more steps away",
    "shuffled": "unseen lakes, tile ids and actions shuffled",
    "graphs": "graphs, on which an action may lead to any tile",
    "slippery": "unseen lakes with slippery ice",
    "stitching": "unseen lakes with two given episodes whose paths cross",
    "policy_map": "",
    "watch": "",
}
LAKE_SIZES = {"larger": ((6, 7), 4), "far_goals": ((5, 5), 7)}  # sides and goal distance
ENV_OPTIONS = {"shuffled": {"shuffled": 1.0}, "slippery": {"slippery": 1.0}}  # of make_env
SCHEDULES = {"greedy": always_greedy, "with the exploration schedule": greedy_probability}
BASELINES = {
    "systematic explorer": Explorer,
    "tabular Q-learning": lambda env, rng: TabularQ(env, rng, greedy_probability),
    "uniform random": RandomAgent,
}
TEST_SEED = 2501_14176  # the paper's number on arXiv
BLOCK = 5  # episodes in a column of the table
os.environ["MPLBACKEND"] = "agg"  # draw into files, also where a notebook has set another backend


def unseen_lakes(count, sides, goal_distance, skip=0):
    """The first `count` test lakes after `skip` others; the same ones in every call."""
    rng = np.random.default_rng(TEST_SEED)
    return random_lakes(skip + count, rng, sides, goal_distance, test=True)[skip:]


def lakes_of(experiment, recipe, trials, skip=0):
    """The lakes of an experiment: a list of stages, each a list of one lake per trial."""
    if experiment == "graphs":
        return [random_graphs(skip + trials, np.random.default_rng(TEST_SEED))[skip:]]
    sides, goal_distance = LAKE_SIZES.get(experiment, (recipe.sides, recipe.goal_distance))
    stages = 2 if experiment == "changing" else 1
    lakes = unseen_lakes(stages * trials, sides, goal_distance, skip)
    return [lakes[stage * trials :][:trials] for stage in range(stages)]


def play_stages(run, stages, seed, **options):
    """30 episodes per stage. The agent is not told of a new stage: its transcript goes on."""
    trials = [[] for _ in stages[0]]
    for number, lakes in enumerate(stages):
        given = trials if number > 0 else None
        played = play(run, lakes, seed, first_episode=30 * number, given=given, **options)
        trials = [before + after for before, after in zip(trials, played)]
    return trials


def play_baselines(run, stages, seed, episodes=30, **env_options):
    """What agents without a network do on the lakes of one stage after another, by name."""
    agents = dict(BASELINES)
    if env_options.get("slippery"):  # elsewhere the optimal return is simply 1
        agents["optimal"] = ValueIteration
    played = {}
    for name, make_agent in agents.items():
        rng = np.random.default_rng(seed)
        envs = [make_env(lakes, rng, run.recipe.max_steps, **env_options) for lakes in stages]
        # The same agent plays all stages, and keeps what it knows. It has a table with a row per
        # state; one for the largest lakes serves all stages. (ValueIteration plays one stage only.)
        largest = max(envs, key=lambda env: env.moves.size)
        agent = make_agent(largest, rng)
        trials = [[] for _ in stages[0]]
        for number, env in enumerate(envs):
            more = rollout(env, agent, episodes, first_episode=number * episodes)
            trials = [before + after for before, after in zip(trials, more)]
        played[name] = trials
    return played


def names_of(runs):
    """The names of the runs' folders, or their whole paths if two names are the same."""
    names = [run.folder.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    return names


def evaluate(experiment, runs, out, trials, seed=0, skip=0):
    """Play the lakes of an experiment with every run and every baseline, and report."""
    stages = lakes_of(experiment, runs[0].recipe, trials, skip)
    ensure_writable(out)
    env_options = ENV_OPTIONS.get(experiment, {})
    played = {}
    for name, run in zip(names_of(runs), runs):
        for variant, schedule in SCHEDULES.items():
            label = f"{name}, {variant}"
            played[label] = play_stages(run, stages, seed, schedule=schedule, **env_options)
    played |= play_baselines(runs[0], stages, seed, **env_options)
    report(out, experiment, f"{trials} {TITLES[experiment]}", played)


# ---- tables and pictures
def ensure_writable(folder):
    """Make the folder of the results; OSError if nothing can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=folder).close()


def returns_of(trials):
    """(trials, episodes) returns."""
    return np.array([[episode.episode_return for episode in trial] for trial in trials])


def wilson(mean, trials):
    """95 % confidence intervals (2, ...) of fractions (Wilson 1927)."""
    z = 1.96
    centre = mean + z**2 / (2 * trials)
    half = z * np.sqrt(mean * (1 - mean) / trials + (z / (2 * trials)) ** 2)
    return np.clip(np.array([centre - half, centre + half]) / (1 + z**2 / trials), 0, 1)


def sparkline(trials):
    """The mean return of each episode as a bar of text."""
    bars = "▁▂▃▄▅▆▇█"
    return "".join(bars[min(int(8 * mean), 7)] for mean in returns_of(trials).mean(0))


def table(played):
    """Mean returns; lakes solved at least once; timeouts among the last episodes."""
    trials = next(iter(played.values()))
    count = len(trials[0])
    block = BLOCK if count <= 30 else 2 * BLOCK
    starts = range(0, count, block)
    ranges = (f"{start}-{min(start + block, count) - 1}" for start in starts)
    head = "".join(f"{episodes:>7}" for episodes in ranges)
    width = max(map(len, [*played, "mean return in episodes"])) + 1
    title = "mean return in episodes".ljust(width) + f"0-{count - 1}".ljust(count)
    lines = [f"{title}{head}  solved  timeouts"]
    for name, trials in played.items():
        returns = returns_of(trials)
        cells = "".join(f"{returns[:, start : start + block].mean():7.3f}" for start in starts)
        solved = (returns.max(1) > 0).mean()
        timeouts = np.mean([episode.truncated for trial in trials for episode in trial[-block:]])
        cells += f"{solved:8.0%}{timeouts:10.1%}"
        lines.append(f"{name:{width}}{sparkline(trials)}{cells}")
    return "\n".join(lines)


RUN_COLOURS = "#0072B2 #D55E00 #CC79A7 #000000 #8B4513 #6A3D9A".split()
BASELINE_COLOURS = dict(zip((*BASELINES, "optimal"), "#009E73 #E69F00 #999999 #56B4E9".split()))


def plot(path, title, returns):
    """Mean returns with 95 % intervals; one colour per run, solid lines for greedy play."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    # A name is "RUN, VARIANT", or that of a baseline.
    runs = list(dict.fromkeys(name.partition(", ")[0] for name in returns if ", " in name))
    for name, values in returns.items():
        run, _, variant = name.partition(", ")
        colour = BASELINE_COLOURS.get(name)
        if run in runs:
            colour = RUN_COLOURS[runs.index(run) % len(RUN_COLOURS)]
        dashed = variant not in ("", "greedy")
        mean = values.mean(0)
        axes.plot(mean, "--" if dashed else "-", label=name, color=colour)
        axes.fill_between(range(len(mean)), *wilson(mean, len(values)), color=colour, alpha=0.12)
    axes.set(title=title, xlabel="episode in the same context", ylabel="mean return", ylim=(0, 1))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    save_picture(path, figure.savefig, dpi=150)


def save_picture(path, save, **options):
    """Let `save` write a picture. ValueError if that fails for any reason."""
    try:
        with atomic_write(path) as temporary:
            save(temporary, **options)
    except Exception as error:
        raise ValueError(f"{path} cannot be drawn: {error!r}") from error


def report(folder, experiment, title, played):
    """Write curve.csv, draw curve.png if matplotlib is installed, and print the table."""
    returns = {name: returns_of(trials) for name, trials in played.items()}
    with atomic_write(folder / "curve.csv") as path, open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow("experiment agent episode mean_return ci_low ci_high trials".split())
        for name, values in returns.items():
            mean = values.mean(0)
            for episode, row in enumerate(zip(mean, *wilson(mean, len(values)))):
                cells = [f"{value:.4f}" for value in row]
                writer.writerow([experiment, name, episode, *cells, len(values)])
    picture = f"Written: {folder / 'curve.png'}"
    try:
        plot(folder / "curve.png", title, returns)
    except ImportError:
        picture = "(for a picture: pip install matplotlib)"
    except ValueError as error:  # the curve itself is safe in the file
        picture = f"(no picture: {error})"
    print(f"\n{title}\n\n{table(played)}\n\nWritten: {folder / 'curve.csv'}\n{picture}")


# ---- stitching
def episode_from_actions(lake, start, actions):
    """The episode that these actions make from any tile."""
    tiles = [start]
    for action in actions:
        tiles.append(int(lake.moves[tiles[-1], action]))
    rewards = (lake.tiles[tiles[1:]] == "G").astype(np.float32)
    return Episode(np.array(tiles), np.array(actions), rewards)


def random_path(lake, start, letter, rng):
    """A random shortest path to a random tile of this letter, as an episode, or None."""
    distance = np.full((1, lake.tiles.size), np.inf)
    distance[0, rng.choice(np.flatnonzero(lake.tiles == letter))] = 0.0
    (distance,) = distance_to_goal(lake.moves[None], distance)
    actions = []
    tile = start
    while 0 < distance[tile] < np.inf:
        nearer = np.flatnonzero(distance[lake.moves[tile]] < distance[tile])
        actions.append(int(rng.choice(nearer)))
        tile = lake.moves[tile, actions[-1]]
    return episode_from_actions(lake, start, actions) if actions else None


def crossing_paths(lake, rng):
    """Two episodes whose paths cross: one from elsewhere to a goal, one from the start into a hole.

    Neither path begins on the other one, so an agent that starts at S has to switch paths. None if
    no such paths were found.
    """
    starts = np.flatnonzero(lake.tiles == "S")
    if len(starts) > 1 or not {"F", "H"} <= {*lake.tiles}:
        return None
    for _ in range(50):
        elsewhere = rng.choice(np.flatnonzero(lake.tiles == "F"))
        winning = random_path(lake, elsewhere, "G", rng)
        losing = random_path(lake, starts[0], "H", rng)
        if winning and losing:
            won = set(winning.observations[:-1])
            lost = set(losing.observations[:-1])
            if won & lost and elsewhere not in lost and starts[0] not in won:
                return [winning, losing]
    return None


def stitching(runs, out, trials, seed, skip):
    """Figure 5, played greedily: the notebook's lake, and others.

    As in the notebook, its lake is played five times. The network's five trials are the same, since
    greedy play is deterministic.
    On the notebook's lake the winning path goes down the third column, from tile 2 to the goal at
    22; the losing one goes right from the start at tile 8 into the hole at 11. They cross at 10.
    """
    rng = np.random.default_rng(TEST_SEED)
    recipe = runs[0].recipe
    winning = episode_from_actions(NOTEBOOK_LAKE, 2, [ACTIONS.index("down")] * 5)
    losing = episode_from_actions(NOTEBOOK_LAKE, 8, [ACTIONS.index("right")] * 3)
    lakes = [NOTEBOOK_LAKE] * 5
    given = [[winning, losing]] * 5
    # Few lakes have such paths: about one in ten.
    for lake in unseen_lakes(20 * trials, recipe.sides, recipe.goal_distance, skip):
        if len(lakes) < trials + 5 and (pair := crossing_paths(lake, rng)):
            lakes.append(lake)
            given.append([pair[i] for i in rng.permutation(2)])
    if len(lakes) == 5:
        raise ValueError(f"No paths cross on {20 * trials} lakes of this run: play another one.")
    ensure_writable(out)

    played = {}
    for name, run in zip(names_of(runs), runs):
        played[f"{name}, greedy"] = play(run, lakes, seed, 5, given=given, schedule=always_greedy)
        without = play(run, lakes, seed, 5, schedule=always_greedy)
        played[f"{name}, without the given episodes"] = without
    played |= play_baselines(runs[0], [lakes], seed, episodes=5)
    notebook = {name: trials[:5] for name, trials in played.items()}
    others = {name: trials[5:] for name, trials in played.items()}
    print(f"\nThe notebook's lake, five times\n\n{table(notebook)}")
    report(out, "stitching", f"{len(lakes) - 5} {TITLES['stitching']}", others)


# ---- a single trial
class Watched(InContext):
    """Prints the Q-values before each step; * marks a random action."""

    def act(self, state, episode):
        action = super().act(state, episode)
        values = "".join(f"{value:9.3f}" for value in self.q[0])
        print(f"  {state[0]:4} {values}   {ACTIONS[action[0]]}{'' if self.greedy[0] else ' *'}")
        return action


def watch(run, lake, seed):
    """Print every step of one trial."""
    rng = np.random.default_rng(seed)
    env = make_env([lake], rng, run.recipe.max_steps)
    agent = Watched(run, 1, rng)
    print(f"The lake, of which the network sees tile ids only:\n{draw(lake)}")
    for number in range(30):
        print(f"\nepisode {number}\n  tile " + "".join(f"{f'Q({word})':>9}" for word in ACTIONS))
        ((episode,),) = rollout(env, agent, 1, first_episode=number)
        print(f"{draw(lake, episode.observations)}\nreturn {episode.episode_return:.0f}")


TILE_COLOURS = {"start": "#C6DBEF", "frozen": "#F7FBFF", "hole": "#08306B", "goal": "#A1D99B"}
PATH_COLOUR = "#6A3D9A"


def policy_of(run, env, given):
    """The direction of the best action on each tile, (tiles, 2) rows and columns, and its Q-value.

    N trials, one per tile, have the given episodes as their transcript; in each of them the next
    episode begins on that tile.
    """
    ids = env.tile_ids[0]
    agent = InContext(run, len(ids), env.rng, given=[given] * len(ids))
    q = agent.read_transcripts(ids)  # (tiles, A)
    direction = env.action_map[0, q.argmax(1)]
    return np.array(DIRECTIONS)[direction], q.max(1) / run.recipe.reward_scale


def draw_episode(axes, run, env, lake, episodes, number):
    """Draw an episode's path and, on every tile, the policy before that episode."""
    from matplotlib.colors import ListedColormap

    axes.clear()
    letters = ["SFHG".index(letter) for letter in lake.tiles]
    axes.imshow(np.reshape(letters, (-1, lake.width)), ListedColormap([*TILE_COLOURS.values()]))
    row, column = np.divmod(np.arange(lake.tiles.size), lake.width)
    for x, y, letter in zip(column, row, lake.tiles):
        axes.text(x - 0.42, y - 0.25, letter, color="white" if letter == "H" else "black")

    direction, value = policy_of(run, env, episodes[:number])
    down, right = direction.T
    alive = np.isin(lake.tiles, ["S", "F"])
    arrows = (values[alive] for values in (column, row, right, -down, value))  # quiver's y is up
    outline = {"edgecolor": "black", "linewidth": 0.4}
    axes.quiver(*arrows, pivot="mid", scale=2 * lake.width, cmap="YlOrRd", clim=(0, 1), **outline)

    path = [env.tile_ids[0].tolist().index(tile) for tile in episodes[number].observations]
    shift = np.linspace(-0.15, 0.15, len(path))  # so that a way back does not hide the way there
    x = column[path] + shift
    y = row[path] + shift
    scale = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.008}
    axes.quiver(x[:-1], y[:-1], np.diff(x), np.diff(y), color=PATH_COLOUR, **scale)
    steps = len(path) - 1
    title = f"episode {number}: {steps} step{'' if steps == 1 else 's'}"
    axes.set(title=title, xticks=[], yticks=[])


def policy_map(run, path, lake, seed):
    """Figure 1: six episodes of a greedy trial, with the policy before each; .gif: all episodes."""
    from matplotlib.animation import FuncAnimation
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ensure_writable(path.parent)
    rng = np.random.default_rng(seed)
    shuffled = 1.0 if run.recipe.shuffled else 0.0  # if it was trained for it
    env = make_env([lake], rng, run.recipe.max_steps, shuffled=shuffled)
    (episodes,) = rollout(env, InContext(run, 1, rng, always_greedy), 30)

    animated = path.suffix == ".gif"
    size = (5, 5) if animated else (9, 6.2 * len(lake.rows) / lake.width + 1)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, 1) if animated else figure.subplots(2, 3)
    colours = TILE_COLOURS | {"path": PATH_COLOUR}
    patches = [Patch(facecolor=colours[name], ec="black", label=name) for name in colours]
    figure.legend(handles=patches, loc="outside lower center", ncols=5, frameon=False)
    figure.colorbar(ScalarMappable(Normalize(0, 1), "YlOrRd"), ax=panels, label="Q, best action")
    if animated:

        def frame(number):
            draw_episode(panels, run, env, lake, episodes, number)

        animation = FuncAnimation(figure, frame, frames=30)
        save_picture(path, animation.save, writer="pillow", fps=2, dpi=70)
    else:
        for axes, number in zip(panels.flat, (0, 1, 2, 5, 10, 29)):
            draw_episode(axes, run, env, lake, episodes, number)
        save_picture(path, figure.savefig, dpi=150)
    print(f"Written: {path}")


def main(arguments=None):
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("experiment", nargs="?", default="unseen", help="see above")
    add("runs", nargs="*", type=Path, metavar="RUN", help="default: the pretrained network")
    add("--gif", action="store_true", help="policy_map as an animation")
    add("--lake", type=int, default=0, help="number of the test lake for policy_map and watch")
    add("--trials", type=int, default=200, help="lakes to play")
    add("--skip", type=int, default=0, help="number of test lakes to skip before those")
    add("--context", type=int, default=0, help="context in tokens (0: as in training)")
    add("--device", type=device_argument, default=DEVICE, help="cpu, cuda, cuda:1, ...")
    add("--seed", type=int, default=0, help="seed of everything but the lakes")
    add("--out", type=Path, help="folder (default: RUN/EXPERIMENT, or RUN/EXPERIMENT-RUN2-...)")
    args = parser.parse_args(arguments)
    experiment = args.experiment
    if experiment not in TITLES:
        if Path(experiment).is_dir():
            raise ValueError(f"Name the experiment first: python eval.py unseen {experiment}")
        raise ValueError(f"There is no experiment {experiment!r}: choose from {', '.join(TITLES)}.")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed has to be in 0 to {2**32 - 1}, not {args.seed}.")
    if args.trials < 1 or min(args.skip, args.lake, args.context) < 0:
        raise ValueError("--trials has to be at least 1; --skip, --lake and --context at least 0.")
    if experiment in ("watch", "policy_map") and len(args.runs) > 1:
        raise ValueError(f"{experiment} shows one run: leave out {args.runs[1]}.")

    runs = [load_run(run, args.device, args.context) for run in args.runs or [PRETRAINED]]
    first = runs[0]
    others = [run.folder.resolve().name for run in runs[1:]]
    out = args.out or first.folder / "-".join([experiment, *others])
    if experiment == "watch":
        return watch(first, one_lake(first.recipe, args), args.seed)
    if experiment == "policy_map":
        path = out / f"policy_map.{'gif' if args.gif else 'png'}"
        policy_map(first, path, one_lake(first.recipe, args), args.seed)
    elif experiment == "stitching":
        stitching(runs, out, args.trials, args.seed, args.skip)
    else:
        evaluate(experiment, runs, out, args.trials, args.seed, args.skip)


def one_lake(recipe, args):
    (lake,) = unseen_lakes(1, recipe.sides, recipe.goal_distance, skip=args.lake)
    return lake


if __name__ == "__main__":
    with user_errors():
        main()
