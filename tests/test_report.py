"""The report: whole, self-contained, honest, the same in HTML and JSON."""

import base64
import html
import json
import re
import shutil
import subprocess
import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("agg")
import matplotlib.pyplot as plt

from scellfm.core import DataError, ScellfmWarning, StoreError, warn
from scellfm.report import Report
from scellfm.scores.table import Scores

EVIL = "<script>alert('x')</script> & \"quoted\" $\\x$"


def full_report():
    report = Report(f"Title {EVIL}", f"First paragraph {EVIL}.\n\nSecond.")
    report.add_text(f"Text {EVIL} and half a character \udc80", f"Heading {EVIL}")
    wide = pd.DataFrame(
        np.random.default_rng(0).normal(size=(120, 14)), columns=[f"a long column name {i}" for i in range(14)]
    )
    wide.insert(0, "gene", [EVIL] + [f"gene{i}" for i in range(119)])
    wide.iloc[3, 4] = np.nan
    report.add_table(wide, "Table", f"caption {EVIL}", rows=30)
    table = pd.DataFrame({"accuracy": [0.9, np.nan]}, index=[f"model {EVIL}", "majority class"])
    report.add_scores(Scores(table, title=EVIL, origin={"split": EVIL}))
    figure, ax = plt.subplots()
    ax.plot([1, 2, 3])
    report.add_figure(figure, f"A line {EVIL}", "Figure")
    report.add_figure(ax, "The same, by its axes")
    plt.close(figure)
    report.add_warnings([EVIL, EVIL, "another"])
    report.add_settings({"seed": 0, "path": None, "rates": [1e-5, float("nan")], EVIL: EVIL}, epochs=3)
    report.add_input("numbers", np.arange(5))
    return report


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new" / "folder"
    page = full_report().save(folder)
    return (
        page,
        page.read_text(encoding="utf8"),
        json.loads((folder / "report.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} in JSON")),
    )


def test_nothing_is_loaded_from_outside_and_nothing_runs(saved):
    text = saved[1]
    assert "<script" not in text and EVIL not in text
    assert "default-src 'none'" in text
    sources = re.findall(r"""(?:src|href)=["']?([^"'\s>]+)""", text)
    assert sources and all(s.startswith(("data:image/png;base64,", "#")) for s in sources)
    assert "url(" not in text and "@import" not in text


def test_pictures_are_inside_and_described(saved):
    pictures = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)"', saved[1])
    assert len(pictures) == 3
    for alt, data in pictures:
        assert alt and base64.b64decode(data).startswith(b"\x89PNG")


def test_headings_are_in_order_and_linked(saved):
    text = saved[1]
    assert text.count("<h1>") == 1 and re.findall(r"<h(\d)", text)[0] == "1"
    anchors, targets = re.findall(r'href="#(\w+)"', text), re.findall(r'<section id="(\w+)"', text)
    assert anchors == targets and len(targets) >= 8
    assert text.index("Warnings</h2>") < text.index("Table</h2>")


def test_json_holds_the_same_facts(saved):
    record = saved[2]
    assert [s["kind"] for s in record["sections"]] == ["text", "table", "scores", "figure", "figure"]
    table = record["sections"][1]["table"]
    assert len(table["data"]) == 120 and table["data"][3][4] is None and table["data"][0][0] == EVIL
    assert record["settings"] == {"seed": 0, "path": None, "rates": [1e-5, None], EVIL: EVIL, "epochs": 3}
    assert record["warnings"] == [{"message": EVIL, "times": 2}, {"message": "another", "times": 1}]
    assert record["sections"][2]["table"]["data"] == [[0.9], [None]]
    assert {"scellfm", "python", "torch", "numpy"} <= set(record["versions"]) and record["elapsed_seconds"] >= 0
    assert len(record["inputs"]["numbers"]["sha256"]) == 64
    assert {"system", "processor", "cores"} <= set(record["hardware"])


def test_page_shows_the_first_rows_and_says_so(saved):
    assert "The first 30 of 120 rows" in saved[1] and "gene28" in saved[1] and "gene29" not in saved[1]


def test_no_folder_or_host_name_is_told(tmp_path):
    import platform

    file = tmp_path / "cells.bin"
    file.write_bytes(b"abc")
    report = Report("r")
    report.add_input("cells", file)
    report.add_input("folder", tmp_path)
    text = report.save(tmp_path / "out").read_text() + (tmp_path / "out" / "report.json").read_text()
    assert str(tmp_path) not in text and "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" in text
    assert len(platform.node()) < 4 or platform.node() not in text


def test_an_input_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nothing.h5ad"):
        Report("r").add_input("cells", tmp_path / "nothing.h5ad")


def test_input_fingerprints_follow_the_content():
    import anndata

    first = anndata.AnnData(np.eye(3, dtype=np.float32))
    second = first.copy()
    second.X[0, 0] = 2
    prints = []
    for adata in (first, first.copy(), second):
        report = Report("r")
        report.add_input("cells", adata)
        prints.append(report.inputs["cells"]["sha256"])
    assert prints[0] == prints[1] != prints[2]


def test_recording_collects_our_warnings_and_still_shows_all():
    report = Report("r")
    with pytest.warns(UserWarning) as seen, report.recording():
        for _ in range(3):
            warn("few genes are known")
        warnings.warn("not ours", UserWarning, stacklevel=1)
    assert report.warnings == {"few genes are known": 3} and len(seen) == 4
    with pytest.warns(ScellfmWarning):
        warn("afterwards")
    assert "afterwards" not in report.warnings


def test_recording_leaves_the_users_filters_in_force():
    report = Report("r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ScellfmWarning, match="strict"), report.recording():
            warn("strict")


def test_recording_keeps_what_a_filter_hides():
    report = Report("r")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("ignore")
        with report.recording():
            warn("few genes are known")
    assert report.warnings == {"few genes are known": 1} and not seen


def test_an_error_in_the_block_passes_and_warnings_stay():
    report = Report("r")
    with pytest.warns(ScellfmWarning), pytest.raises(KeyError), report.recording():
        warn("before the error")
        raise KeyError("x")
    assert report.warnings == {"before the error": 1}


def test_saving_again_replaces_and_leaves_no_parts(tmp_path):
    report = full_report()
    report.save(tmp_path)
    report.add_text("later words")
    assert "later words" in report.save(tmp_path).read_text(encoding="utf8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_folder_that_cannot_be_written_is_our_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="report.json could not be written.*choose another folder"):
            full_report().save(folder)
    assert (tmp_path / "file").read_text() == "in the way"


def test_figures_do_not_stay_open():
    plt.close("all")
    full_report()
    assert not plt.get_fignums()


def test_page_prints_on_paper(saved, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium on PATH")
    paper = tmp_path / "report.pdf"
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update "
        f"--disable-sync --user-data-dir={tmp_path / 'profile'} --no-pdf-header-footer --print-to-pdf={paper}"
    ).split()
    subprocess.run([browser, *flags, saved[0].as_uri()], capture_output=True, text=True, timeout=120, check=True)
    data = paper.read_bytes()
    pages = len(re.findall(rb"/Type\s*/Page\b", data))
    assert data.startswith(b"%PDF") and 1 < pages < 12, pages


@pytest.mark.parametrize("width", [390, 1100])
def test_page_fits_the_screen_in_a_browser(saved, tmp_path, width):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium on PATH")
    probe = tmp_path / "probe.html"
    script = (
        "const d=this.contentDocument,w=this.contentWindow;"
        "document.title=JSON.stringify({wide:d.documentElement.scrollWidth,"
        "sections:d.querySelectorAll('section').length,images:[...d.images].every(i=>i.naturalWidth>0),"
        "scrolls:[...d.querySelectorAll('.scroll')].some(s=>s.scrollWidth>s.clientWidth)})"
    )
    probe.write_text(
        f'<iframe style="border:0;width:{width}px;height:3000px" srcdoc="{html.escape(saved[1], quote=True)}" '
        f'onload="{html.escape(script)}"></iframe>',
        encoding="utf8",
    )
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update "
        f"--disable-sync --user-data-dir={tmp_path / 'profile'} --dump-dom"
    ).split()
    done = subprocess.run([browser, *flags, probe.as_uri()], capture_output=True, text=True, timeout=120)
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout).group(1)))
    assert found["wide"] <= width and found["images"] and found["sections"] == saved[1].count("<section")
    assert found["scrolls"]  # the wide table scrolls in its box instead
