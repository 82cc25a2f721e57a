"""The README is true: its links point at the code, its figures are those of the shipped curves, the files it lists exist."""

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_line_links_point_at_what_they_name():
    """Every [`name`](file.py#Lnumber) leads to the line that defines the name."""
    links = re.findall(r"\[`(?:\w+\.)?(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) > 10
    for name, file, number in links:
        line = (ROOT / file).read_text().splitlines()[int(number) - 1]
        assert re.match(rf"\s*(def|class) {name}\b", line), f"{name} is not at {file}:{number}, but {line!r}"


def test_the_files_of_the_tree_exist():
    """Each relative link and each name of the annotated tree is there."""
    names = re.findall(r"\]\((?!http)([^)#]+)", README) + re.findall(r"^(\w+\.py|\w+/) ", README, re.M)
    assert len(names) > 8
    assert all((ROOT / name).exists() for name in names)


TABLE = re.findall(r"^\| .*\(results/(\w+)/curve\.csv\) \| ([\d.]+) \| ([\d.]+) \|", README, re.M)


def test_the_table_quotes_the_shipped_curves():
    """Mean returns of episode 0 and of episodes 25 to 29, as rounded there."""
    assert len(TABLE) >= 2
    for name, first, last in TABLE:
        with open(ROOT / "results" / name / "curve.csv") as file:
            curve = [float(r["mean_return"]) for r in csv.DictReader(file) if r["player"] == "transformer in context"]
        assert float(first) == pytest.approx(curve[0], abs=0.0051)
        assert float(last) == pytest.approx(sum(curve[25:30]) / 5, abs=0.00051)
