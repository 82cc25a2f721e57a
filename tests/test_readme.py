"""The README is true: its links, its figures, and the files that it lists."""

import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


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
    """In a link's text and the cells behind it: the last five of 30 or 60 episodes, or the first."""
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
