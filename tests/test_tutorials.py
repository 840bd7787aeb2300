"""Every tutorial begins with the same cell, finds its data anywhere, and cuts no table short."""

import configparser
import json
import re

import pytest
from conftest import ROOT

TUTORIALS = sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb"))
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in str(path))


def cells(path, kind=None):
    "The cells of a notebook as (kind, source)."
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]
    return [source for name, source in found if kind in (None, name)]


def plain(html: str) -> str:
    "The text of a piece of HTML."
    return re.sub(r"<[^>]+>", " ", html)


def cut_tables(path) -> list[str]:
    "Kept tables of a notebook that leave columns out."
    found = []
    for cell in json.loads(path.read_text())["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            html, text = ("".join(data.get(kind, "")) for kind in ("text/html", "text/plain"))
            if "</thead>" in html:  # the plain text beside a table is not shown anywhere
                cut = re.search(r"<th[^>]*>\s*(\.\.\.|…)\s*</th>", html.split("</thead>")[0])
            else:
                cut = not html and re.search(r"^\s.*\s\.\.\.(\s|$)", text.split("\n")[0])
            if cut:
                found.append(f"{path.name}: {plain(html or text)[:200]}")
    return found


def test_tutorials_begin_with_the_same_cells():
    setups = {path.stem: cells(path)[2:4] for path in TUTORIALS}
    assert len({tuple(setup) for setup in setups.values()}) == 1, {
        name: setup[1][:80] for name, setup in setups.items()
    }
    words, code = next(iter(setups.values()))
    assert "scellfm[tutorials]" in code and "scellfm[tutorials]" in words


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_opens_on_colab_and_installs_nothing_else(path):
    title, badge, *_ = cells(path)
    assert title.startswith("# ") and f"blob/main/nbs/tutorials/{path.name})" in badge
    code = cells(path, "code")
    assert not [source for source in code[1:] if re.search(r"^\s*[!%]", source, flags=re.M)]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_names_no_file_beside_the_repository(path):
    text = "\n".join(cells(path))
    assert "../shared" not in text and 'environ["' not in text, (
        "data come from SCELLFM_DATA, a download or a simulation"
    )


def test_the_extra_of_the_tutorials_is_made_of_other_extras():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf8")
    extras = {
        key.removesuffix("_requirements"): set(value.split())
        for key, value in parser["DEFAULT"].items()
        if "_req" in key
    }
    others = set().union(*(extras[name] for name in extras if name not in ("tutorials", "dev")))
    assert extras["tutorials"] and extras["tutorials"] <= others


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_kept_tables_show_all_their_columns(path):
    assert cut_tables(path) == []


def test_a_cut_table_would_be_found(tmp_path):
    import pandas as pd

    wide = pd.DataFrame([range(40)])
    for name, data in (
        ("cut", {"text/html": wide.to_html(max_cols=6)}),
        ("plain", {"text/plain": wide.to_string(max_cols=6)}),
        ("whole", {"text/html": wide.to_html(), "text/plain": wide.to_string(max_cols=6)}),
    ):
        path = tmp_path / f"{name}.ipynb"
        path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": [], "outputs": [{"data": data}]}]}))
        assert bool(cut_tables(path)) == (name != "whole"), name
