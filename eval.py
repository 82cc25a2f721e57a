"""Look at what was learned: play lakes that no training saw, beside players that need no network.

    python eval.py RUN unseen      the paper's figure 3 for any run: a table, a plot, RUN/curve.csv and RUN/curve.png
    python eval.py RUN --watch     one trial on the terminal: the lake, the path, the Q-values of each step (figure 1)

Part of the paper: section 4.2, evaluation. Every trial is one lake and one growing context; no weight changes. Departures:
the curves come with 95 % confidence intervals and with reference players (uniform random, tabular Q-learning from nothing
with the same exploration schedule, and a systematic explorer), and there are 200 trials instead of 50.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch

from frozen_lake import ACTIONS, Explorer, FrozenLake, Lake, RandomPlayer, TabularQ, draw, random_lakes, roll_out
from ia3 import replacing
from icrl import Encoder, InContext, QNetwork, explain, load_run, model_probability, play

EPISODES = 30
TEST_SEED = 2501_14176
HEADER = ("experiment", "player", "episode", "mean_return", "ci_low", "ci_high", "trials")
TRANSFORMER = "transformer in context"
# one colour and one letter for each player, everywhere; the colours are Okabe and Ito's, for colour-blind readers
PLAYERS = {
    TRANSFORMER: ("#0072B2", "T"),
    "systematic explorer": ("#009E73", "e"),
    "tabular Q-learning": ("#E69F00", "q"),
    "uniform random": ("#7F7F7F", "r"),
}


def test_lakes(count: int, sides: tuple[int, int], min_hops: int) -> list[Lake]:
    """The first `count` test lakes of a distribution, the same ones every time. Raises ValueError if `count` is below 1."""
    if count < 1:
        raise ValueError(f"An evaluation needs at least one trial, but {count} were asked for.")
    return random_lakes(count, np.random.default_rng(TEST_SEED), sides, min_hops, test=True)


def returns_of(played) -> np.ndarray:
    """(trials, episodes) undiscounted returns."""
    return np.array([[episode.total for episode in trial] for trial in played])


def unseen(network: QNetwork, encoder: Encoder, lakes: list[Lake], recipe: dict, seed: int = 0, with_references=True) -> dict:
    """Returns (trials, episodes) of the network, and of the reference players on the same lakes, by name.

    Of the run's recipe it takes `tokens`, the limit of the context, and `max_steps`.
    """
    rng, max_steps = np.random.default_rng(seed), recipe["max_steps"]
    returns = {TRANSFORMER: returns_of(play(network, encoder, lakes, EPISODES, rng, recipe["tokens"], max_steps))}
    tabular = lambda env, rng: TabularQ(env, rng, model_probability)  # noqa: E731
    references = {"systematic explorer": Explorer, "tabular Q-learning": tabular, "uniform random": RandomPlayer}
    for name, player in references.items() if with_references else ():
        rng = np.random.default_rng(seed)  # its own, so that its curve does not depend on the network's games
        env = FrozenLake(lakes, rng, max_steps=max_steps)
        returns[name] = returns_of(roll_out(env, player(env, rng), EPISODES))
    return returns


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


def plot_curve(path: Path, title: str, returns: dict[str, np.ndarray]) -> bool:
    """Draw the curves as a PNG; False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for player, r in returns.items():
        mean, (colour, _) = r.mean(0), PLAYERS[player]
        axes.fill_between(range(len(mean)), *wilson(mean, len(r)), color=colour, alpha=0.15, linewidth=0)
        axes.plot(mean, color=colour, label=player, linewidth=2.2 if player == TRANSFORMER else 1.4)
    axes.set(xlabel="episode in the same context", ylabel="mean return (goals an episode)", title=title)
    axes.set(xlim=(0, EPISODES - 1), ylim=(-0.02, 1.02))
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=len(returns), frameon=False, fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return True


def text_plot(returns: dict[str, np.ndarray], height: int = 11) -> str:
    """The curves as text, two columns an episode; where they cross, the first player's letter stands on top."""
    width = len(next(iter(returns.values()))[0])
    grid = [[" "] * (2 * width) for _ in range(height)]
    for player, r in reversed(returns.items()):
        for episode, mean in enumerate(r.mean(0)):
            grid[round((1 - mean) * (height - 1))][2 * episode] = PLAYERS[player][1]
    lines = [f"{1 - i / (height - 1):4.1f} |{''.join(row)}" for i, row in enumerate(grid)]
    lines += ["     +" + "-" * (2 * width), "      " + "".join(f"{e:<10}" for e in range(0, width, 5)) + " episode"]
    return "\n".join([*lines, "      " + "   ".join(f"{PLAYERS[p][1]} {p}" for p in returns)])


def table(returns: dict[str, np.ndarray]) -> str:
    """Mean return in blocks of five episodes, and the share of lakes on which each player ever found a goal."""
    blocks = range(0, len(next(iter(returns.values()))[0]), 5)
    lines = [f"{'mean return in episodes':24}" + "".join(f"{f'{b}-{b + 4}':>8}" for b in blocks) + "   goal found"]
    for player, r in returns.items():
        cells = "".join(f"{r[:, b : b + 5].mean():8.3f}" for b in blocks)
        lines.append(f"{player:24}{cells}{(r.max(1) > 0).mean():13.0%}")
    return "\n".join(lines)


def sparkline(r: np.ndarray) -> str:
    """The mean returns of (trials, episodes) in one word."""
    return "".join("▁▂▃▄▅▆▇█"[min(int(8 * m), 7)] for m in r.mean(0))


def report(folder: Path, experiment: str, recipe: dict, returns: dict[str, np.ndarray]) -> None:
    """Print the plot and the table of an experiment; write curve.csv and curve.png into `folder`."""
    trials, (low, high) = len(next(iter(returns.values()))), recipe["sides"]
    title = f"{trials} {experiment} lakes ({low}-{high} tiles a side, goals at least {recipe['min_hops']} hops away)"
    print(f"\n{title}\n\n{text_plot(returns)}\n\n{table(returns)}\n")
    folder.mkdir(parents=True, exist_ok=True)
    write_curve(folder / "curve.csv", experiment, returns)
    if plot_curve(folder / "curve.png", title, returns):
        print(f"Written: {folder / 'curve.csv'} and {folder / 'curve.png'}")
    else:
        print(f"Written: {folder / 'curve.csv'}  (for a picture too: pip install matplotlib)")


# --------------------------------------------------------------------------------------------------------------- watch
def watch(network: QNetwork, encoder: Encoder, lake: Lake, recipe: dict, seed: int) -> None:
    """Play one trial and print every step: the Q-values before it and the action, * where a coin and not the model chose."""
    seen: list[tuple] = []  # Q-values before each step, and whether the model chose

    class Watched(InContext):
        def act(self, *situation):
            action = super().act(*situation)
            seen.append((self.q[0].copy(), self.by_model[0]))
            return action

    rng = np.random.default_rng(seed)
    env = FrozenLake([lake], rng, max_steps=recipe["max_steps"])
    (episodes,) = roll_out(env, Watched(network, encoder, env, rng, recipe["tokens"]), EPISODES)
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
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Evaluate a run on lakes that its training never saw.")
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("experiment", nargs="?", default="unseen", choices=["unseen"], help="default: %(default)s")
    parser.add_argument("--watch", action="store_true", help="show one trial step by step instead")
    parser.add_argument("--lake", type=int, default=0, help="which test lake to watch (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=200, help="test lakes to play (default: %(default)s)")
    parser.add_argument("--context", type=int, help="tokens of context (default: the run's slice length)")
    parser.add_argument("--seed", type=int, default=0, help="of starts and coin tosses (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, help="folder for curve.csv and curve.png (default: the run's, whose own curve is then replaced)"
    )
    args = parser.parse_args(arguments)
    try:
        network, encoder, recipe = load_run(args.run, "cuda" if torch.cuda.is_available() else "cpu")
        recipe["tokens"] = args.context or recipe["tokens"]
        count = args.lake + 1 if args.watch else args.trials
        lakes = test_lakes(count, tuple(recipe["sides"]), recipe["min_hops"])
        if args.watch:
            watch(network, encoder, lakes[args.lake], recipe, args.seed)
        else:
            report(args.out or args.run, "unseen", recipe, unseen(network, encoder, lakes, recipe, args.seed))
    except (ValueError, OSError) as error:
        parser.exit(2, f"eval.py: {explain(error)}\n")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
