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


def test_figures_are_those_of_the_curves_that_they_link_to():
    """In a link's text and the cells behind it: the last five of all episodes, or the first."""
    pattern, quoted = r"\[([^]]*)\]\(results/([\w/-]+)/curve\.csv\)([^\[\n]*)", []
    for text, folder, cells in re.findall(pattern, README):
        path = ROOT / "results" / folder / "curve.csv"
        episode, mean = np.loadtxt(path, delimiter=",", skiprows=1, usecols=(2, 3), quotechar='"').T
        ends = mean.reshape(-1, round(episode.max() + 1) // 5, 5).mean(2)[:, ::-6]  # by agent
        known = np.append(ends, mean[episode == 0])
        for figure in re.findall(r"\b[01]\.\d{3}\b", text + cells):
            quoted.append(np.abs(known - float(figure)).min() < 0.00051)
        assert all(quoted), f"{text} {cells} is not what {path} says"
    assert len(quoted) > 5


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


def test_every_mean_return_in_results_is_in_a_csv():
    """Numbers of three decimals, from a curve, a run, or the mean of a setting's runs."""
    known = set()
    for path in (ROOT / "results").rglob("*.csv"):
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        groups = defaultdict(list)
        for row in rows:
            if path.name == "curve.csv":
                groups[row["agent"]].append(float(row["mean_return"]))
                continue
            for name in row.keys() - {"seed", "seconds", "curve"}:
                if re.fullmatch(r"[01]\.\d+", row[name]):
                    groups[row["setting"], name].append(float(row[name]))
        for values in groups.values():
            if path.name == "curve.csv":
                known |= {np.mean(values[:5]), np.mean(values[-5:])}
            else:
                known |= {*values, np.mean(values)}
    known = np.array(sorted(known))
    for figure in re.findall(r"\b[01]\.\d{3}\b", RESULTS):
        assert np.abs(known - float(figure)).min() < 0.00051, figure


def test_your_own_world_runs(capsys):
    """The page's Python: the pretrained network learns it in its context."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(code, {})
    assert re.search(r"pretrained .* 1\.000 +100% +0\.0%", capsys.readouterr().out)
