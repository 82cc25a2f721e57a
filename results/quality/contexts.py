"""Why the quality of the data matters (figure 6): what each run does in contexts with few and with many successes.

    PYTHONPATH=. python results/quality/contexts.py RUN RUN ...

Each trial begins with eight given episodes of tabular Q-learning on a test lake, of which 0, 1, 2, 4 or 8 succeeded, and the
network then plays one episode, choosing every action itself. All runs get the same contexts; episodes of more than 15 steps are
left out, so that the eight fit into a slice. Writes contexts.csv beside this file.
"""

import csv
import sys
from pathlib import Path

import numpy as np

from eval import always, by_network, returns_of, test_lakes, wilson
from frozen_lake import FrozenLake, TabularQ, roll_out
from ia3 import replacing
from icrl import load_run

GIVEN, LONGEST, SUCCESSES = 8, 15, (0, 1, 2, 4, 8)

try:
    runs = [load_run(folder) for folder in sys.argv[1:]]
except ValueError as error:
    sys.exit(f"contexts.py: {error}")
if not runs:
    sys.exit("contexts.py: no run was named: give the folders of one or more.")
lakes = test_lakes(400, (3, 5), 4)
rng = np.random.default_rng(0)
env = FrozenLake(lakes, rng)
played = roll_out(env, TabularQ(env, rng, lambda episode: np.where(episode < 30, 0.0, 0.8)), 100)
short = [[e for e in trial if len(e.actions) <= LONGEST] for trial in played]
good, bad = ([[e for e in trial if (e.total > 0) == success] for trial in short] for success in (True, False))
usable = [i for i in range(len(lakes)) if min(len(good[i]), len(bad[i])) >= GIVEN]
draw = lambda episodes, count: [episodes[i] for i in rng.choice(len(episodes), count, replace=False)]  # noqa: E731

rows = []
for successes in SUCCESSES:
    contexts = [draw(draw(good[i], successes) + draw(bad[i], GIVEN - successes), GIVEN) for i in usable]
    for run in runs:
        r = returns_of(by_network(run, [lakes[i] for i in usable], 0, 1, contexts, probability=always))[:, 0]
        values = (f"{v:.4f}" for v in (r.mean(), *wilson(r.mean(), len(r))))
        rows.append((run.folder.name, successes, *values, len(r)))
rows.sort(key=lambda row: [run.folder.name for run in runs].index(row[0]))

print(f"return of the next episode, by how many of {GIVEN} given episodes succeeded; {len(usable)} lakes\n")
print(f"{'':20}" + "".join(f"{n:>8}" for n in SUCCESSES))
for run in runs:
    print(f"{run.folder.name:20}" + "".join(f"{float(row[2]):8.3f}" for row in rows if row[0] == run.folder.name))
with replacing(Path(__file__).with_name("contexts.csv")) as temporary, open(temporary, "w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("run", "successes_of_8", "mean_return", "ci_low", "ci_high", "trials"))
    writer.writerows(rows)
