"""The README is true: its links, its figures, and the files that it lists."""

import csv
import re
import runpy
import shlex
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from test_official import save_checkpoint
from test_train import finished  # noqa: F401  (a fixture)

import eval as evaluation
import llama
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "results" / "README.md").read_text()
COMMAND = r"python ((?:\w+/)?\w+\.py\b[^`#&\n]*)"
COMMANDS = sorted({command.strip() for command in re.findall(COMMAND, README + RESULTS)})
SLOW = ("tests/benchmark.py", "tests/memory.py", "results/figures.py")  # only looked for


def test_line_links_point_at_what_they_name():
    """Every [`name`](file.py#L12) leads to the line that defines the name."""
    links = re.findall(r"\[`(?:\w+\.)?(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) > 10
    for name, file, number in links:
        line = (ROOT / file).read_text().splitlines()[int(number) - 1]
        definition = rf"\s*((def|class) {name}\b|{name}(: [^=]+)? = )"
        assert re.match(definition, line), f"{name} is not at {file}:{number}, but {line!r}"


def test_the_files_exist_and_the_page_is_short():
    """Of every relative link, and of every line that begins with a file's name. 200 lines."""
    names = re.findall(r"\]\((?!http|#)([^)#]+)", README)
    names += re.findall(r"^(\w+\.py|\w+/) ", README, re.M)
    assert len(names) > 8
    assert [name for name in names if not (ROOT / name).exists()] == []
    assert len(README.splitlines()) <= 200


def curves(run, experiment):
    """Mean returns (agents, episodes) of a curve.csv: greedy, with the schedule, baselines."""
    path = ROOT / "results" / run / experiment / "curve.csv"
    episode, mean = np.loadtxt(path, delimiter=",", skiprows=1, usecols=(2, 3), quotechar='"').T
    return mean.reshape(-1, int(episode.max()) + 1)


def test_figures_are_those_of_the_curves_that_they_link_to():
    """A link's text: the network's last five episodes, or its first; behind it two baselines."""
    links = re.findall(r"\[([\d.]+)\]\(results/(\w+)/(\w+)/curve\.csv\)([^\[\n]*)", README)
    assert len(links) > 10
    for figure, run, experiment, rest in links:
        greedy, scheduled, explorer, q_learning, *_ = curves(run, experiment)
        network = scheduled if "with the schedule" in rest else greedy
        mean = network[0] if "in the first episode" in rest else network[-5:].mean()
        assert float(figure) == pytest.approx(mean, abs=0.00051), (run, experiment)
        numbers = [float(number) for number in re.findall(r"\b[01]\.\d{3}\b", rest)]
        expected = [q_learning[-5:].mean(), explorer[-5:].mean()] if numbers else []
        assert numbers == pytest.approx(expected, abs=0.00051), experiment


def test_the_table_of_experiments_in_results_is_that_of_the_curves():
    rows = re.findall(r"^\| `(\w+)` \|((?: [01]\.\d{3} \|){6})$", RESULTS, re.M)
    assert len(rows) == 6
    for experiment, cells in rows:
        plain, general = curves("plain", experiment), curves("general", experiment)
        parts = [plain[0, -5:], general[0, -5:], general[3, -5:], general[2, -5:]]
        expected = np.mean([*parts, general[0, :5], general[2, :5]], axis=1)
        found = [float(cell) for cell in cells.split("|")[:-1]]
        assert found == pytest.approx(expected, abs=0.00051), experiment
    with open(ROOT / "results" / "cropped.csv", newline="") as file:
        for row in csv.DictReader(file):
            means = [f"{float(row[name]):.3f}" for name in row if "with" in name]
            lakes = f"{int(row['trials']):,}{' others' * (row['skip'] != '0')}"
            assert f"| `{row['experiment']}` | {lakes} | {' | '.join(means)} |" in RESULTS
    ice, optimal = curves("ice", "slippery")[[0, -1], -5:].mean(1)
    assert f"ends at {ice:.3f} of an optimal {optimal:.3f}" in RESULTS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_on_the_pages_runs(finished, tmp_path, monkeypatch, command):  # noqa: F811
    """For one step and one trial, without --compile. Hub names load a small checkpoint instead."""
    program, *words = shlex.split(command)
    assert (ROOT / program).exists()
    if program in SLOW:
        return
    run = shutil.copytree(finished, tmp_path / "run")
    save_checkpoint(tmp_path / "hub", "ChatML")
    monkeypatch.setattr(llama, "snapshot_download", lambda *_, **__: str(tmp_path / "hub"))
    values = {"RUN": run, "runs/1": run, "runs/2": run, "EXPERIMENT": "unseen", "NAME": "unseen"}
    values |= {"results/NAME": ROOT / "results/plain", "A": "0.01", "S": "1", "Q": "high"}
    words = [str(values.get(word, word)) for word in words if word != "--compile"]
    words = [str(ROOT / word) if word.startswith("results/") else word for word in words]
    if program == "train.py":
        out = [] if "--resume" in words else ["--out", tmp_path / "new", "--steps", 1]
        train.main([*words, *map(str, out), "--trials", "1"])
    elif program == "eval.py":
        evaluation.main([*words, "--trials", "1", "--out", str(tmp_path / "out")])
    else:
        monkeypatch.setattr(sys, "argv", [program, *words])
        runpy.run_path(str(ROOT / program), run_name="__main__")


def test_the_rows_of_seeds_in_results_are_those_of_the_csv_files():
    """Each cell of a row is "mean (low to high)" of a setting's seeds, or what one seed has."""
    columns = "greedy_0_4 greedy_25_29 scheduled_25_29 solved larger_greedy_25_29".split()
    seeds = defaultdict(list)
    for path in (ROOT / "results").glob("*.csv"):
        with open(path, newline="") as file:
            for row in csv.DictReader(file) if path.name != "cropped.csv" else ():
                seeds[row["setting"]].append([float(row[name] or 9) for name in columns])
    settings = {}
    for name, values in seeds.items():
        settings[name] = np.transpose([np.mean(values, 0), np.min(values, 0), np.max(values, 0)])
    mean = r"([01]\.\d{3})(?: \(([\d.]+) to ([\d.]+)\))? \|"
    rows = [
        line for line in RESULTS.splitlines() if re.match(r"\| [\w., ()-]+ \|.*\d \| *0\.", line)
    ]
    assert len(rows) > 20
    for line in rows:
        cells = np.array([(m, low or m, high or m) for m, low, high in re.findall(mean, line)])
        apart = [
            np.abs(cells.astype(float)[:, None] - known).max(2).min(1).max()
            for name, known in settings.items()
            if line.split("|")[1].strip() in name
        ]
        assert min(apart) < 0.00051, line


def test_your_own_world_runs(capsys):
    """The page's Python: the pretrained network learns it in its context."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(code, {})
    assert re.search(r"pretrained .* 1\.000 +100% +0\.0%", capsys.readouterr().out)
