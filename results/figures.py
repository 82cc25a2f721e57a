"""Draw figures 3 and 6 from their CSVs: `python results/figures.py`.

Thin lines are seeds, thick lines their means: mean return by episode of greedy play on 200 unseen
lakes by which nothing was chosen.
"""

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).parent
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9".split()
TITLES = {
    "figure3": "Figure 3: weight alpha of the online network in each Polyak update",
    "figure6": "Figure 6: quality of the training data, half as many steps",
}


def read_curves(path):
    """The curves (seeds, episodes) of each setting of a CSV."""
    curves = defaultdict(list)
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            curves[row["setting"]].append([float(mean) for mean in row["curve"].split()])
    return {setting: np.array(rows) for setting, rows in curves.items()}


def main():
    for name, title in TITLES.items():
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        axes = figure.subplots()
        curves = read_curves(HERE / f"{name}.csv")
        for (setting, seeds), colour in zip(curves.items(), COLOURS):
            axes.plot(seeds.T, color=colour, linewidth=0.6, alpha=0.6)
            label = f"{setting} ({len(seeds)} seed{'' if len(seeds) == 1 else 's'})"
            axes.plot(seeds.mean(0), color=colour, linewidth=2.2, label=label)
        axes.set(xlabel="episode in the same context", ylabel="mean return, greedy", ylim=(0, 1))
        axes.set_title(title)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(HERE / f"{name}.png", dpi=150)
        print(f"Written: {HERE / name}.png")


if __name__ == "__main__":
    main()
