"""The README is true: what its links name, its figures, the files that it lists."""

import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_line_links_point_at_what_they_name():
    """Every [`name`](file.py#Lnumber) leads to the line that defines the name."""
    links = re.findall(r"\[`(?:\w+\.)?(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) > 10
    for name, file, number in links:
        line = (ROOT / file).read_text().splitlines()[int(number) - 1]
        definition = rf"\s*((def|class) {name}\b|{name}(: [^=]+)? = )"
        assert re.match(definition, line), f"{name} is not at {file}:{number}, but {line!r}"


def test_the_files_of_the_tree_exist_and_the_page_is_short():
    """Each relative link and each name of the annotated tree is there; at most 200 lines."""
    names = re.findall(r"\]\((?!http|#)([^)#]+)", README)
    names += re.findall(r"^(\w+\.py|\w+/) ", README, re.M)
    assert len(names) > 8
    assert [name for name in names if not (ROOT / name).exists()] == []
    assert len(README.splitlines()) <= 200


def test_figures_are_those_of_the_curves_that_they_link_to():
    """In a link's text and the cells after it: 0.123 is a mean of five episodes, 0.12 of one."""
    pattern, quoted = r"\[([^]]*)\]\(results/([\w/]+)/curve\.csv\)([^\[\n]*)", 0
    for text, folder, cells in re.findall(pattern, README):
        path = ROOT / "results" / folder / "curve.csv"
        curve = np.loadtxt(path, delimiter=",", skiprows=1, usecols=3, quotechar='"')
        means = {3: curve.reshape(-1, 5).mean(1), 2: curve[:1]}
        for figure in re.findall(r"\b[01]\.\d{3}\b", text + cells) + re.findall(
            r"\| (0\.\d\d) ", cells
        ):
            decimals = len(figure) - 2
            error = np.abs(means[decimals] - float(figure)).min()
            assert error < 0.51 * 10**-decimals, f"{figure} is not in {path}"
            quoted += 1
    assert quoted > 5
