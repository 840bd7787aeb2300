"""The tables of the page "What tiny models trained here show".

`python tools/small_models.py` takes them from the saved outputs of the tutorials. With `--run` it first runs these
tutorials at full size (an hour or more on two cores) and measures the cost of embedding. With your own checkpoints and
data it computes the same tables from them:

    python tools/small_models.py --out runs/mine --geneformer FOLDER --scgpt FOLDER --cells cells.h5ad --query new.h5ad
        --label cell_type --state condition --donor donor --batch batch
    SCELLFM_TABLES=runs/mine python tools/run_notebooks.py nbs/small_models.ipynb
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "nbs" / "small_models"


@dataclass(frozen=True)
class Piece:
    "One table: a question, the page and the cell that computed it, and what it was computed from."

    name: str
    question: str
    data: str
    model: str
    page: str = ""
    cell: str = ""
    columns: tuple[str, ...] = ()  # all by default


PIECES = (
    Piece(
        "cell_types",
        "Which cell type?",
        "blood cells that ship with scanpy; three folds, each cell predicted by a model that was not trained on it",
        "Geneformer of 3 layers and 64 dimensions, pretrained and fine-tuned on these cells",
        "tutorials/geneformer_cell_classification",
        "03fa6996",
    ),
    Piece(
        "states",
        "Is a cell of a held-out donor stimulated or not?",
        "blood cells of eight donors, half of the cells with interferon beta (Kang et al. 2018)",
        "Geneformer of 3 layers and 64 dimensions, pretrained and fine-tuned on these cells",
        "tutorials/interferon_screen",
        "91eeab61",
    ),
    Piece(
        "mapping",
        "Which label does a cell of a new donor get?",
        "the cells of Kang et al. (2018): six annotated donors, two new ones",
        "scGPT of 2 layers and 64 dimensions, trained on the annotated donors; random weights as a control",
        "tutorials/scgpt_reference_mapping",
        "6d02e8d3",
    ),
    Piece(
        "integration",
        "Are types kept apart and laboratories mixed?",
        "blood cells of two laboratories (Zheng et al. 2017, Kang et al. 2018)",
        "scGPT of 64 dimensions, trained on these cells; random weights as a control",
        "tutorials/scgpt_integration",
        "06205a28",
    ),
    Piece(
        "perturbation",
        "What does an unseen perturbation do?",
        "THP-1 cells with 25 genes switched off (Papalexi et al. 2021), five folds",
        "scGenePT of 1 layer and 32 dimensions, pretrained on the control cells",
        "scgenept/language_experiment",
        "81a6921b",
    ),
    Piece(
        "sequence",
        "How is a held-out gene expressed, judged by its sequence?",
        "fifty genes in blood cells (seq2cells), the nine genes that Enformer was not trained on are held out",
        "a small rosa on vectors of the published Enformer, which ship with seq2cells",
        "tutorials/rosa_sequence_to_expression",
        "ef19e99f",
        ("pearson_across_genes", "pearson_across_cells", "pearson_across_cells_centred"),
    ),
)


class TableReader(HTMLParser):
    "The rows of the first table of a page."

    def __init__(self):
        super().__init__()
        self.rows, self.inside = [], False

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        self.inside = tag in ("td", "th")
        if self.inside:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data.strip()


def from_markdown(text: str) -> pd.DataFrame:
    "The first Markdown table in a text; its first column is the method."
    lines = [line.strip().strip("|") for line in text.splitlines() if line.strip().startswith("|")]
    head, _, *rows = [[word.strip().replace("*", "") for word in line.split("|")] for line in lines]
    return pd.DataFrame(rows, columns=["method", *head[1:]]).set_index("method")


def from_html(text: str) -> pd.DataFrame:
    "The first table of a page; its first column is the method."
    reader = TableReader()
    reader.feed(text)
    head, *rows = [row for row in reader.rows if row]
    return pd.DataFrame(rows, columns=["method", *head[1:]]).set_index("method")


def kept_table(piece: Piece) -> pd.DataFrame:
    "The table in the saved output of a cell. LookupError: no such cell, or no table."
    cells = json.loads((ROOT / "nbs" / f"{piece.page}.ipynb").read_text(encoding="utf8"))["cells"]
    for output in next(cell for cell in cells if cell["id"] == piece.cell)["outputs"]:
        shown = {kind: "".join(text) for kind, text in output.get("data", {}).items()}
        for text in (shown.get("text/markdown", ""), shown.get("text/plain", "")):
            if "\n|" in f"\n{text}" and "---" in text:
                return from_markdown(text)
        if "<table" in shown.get("text/html", ""):
            return from_html(shown["text/html"])
    raise LookupError(f"{piece.page}, cell {piece.cell}: no table is kept; run the page")


def cost(models: dict, cells) -> pd.DataFrame:
    "Processor seconds (all threads) of embedding, scaled to 1,000 cells."
    rows = {}
    for name, model in models.items():
        model.embed(cells[:20].copy())  # one-time compiling and importing are not counted
        start = time.process_time()
        model.embed(cells.copy())
        rows[name] = {"processor seconds per 1,000 cells": round((time.process_time() - start) * 1000 / len(cells), 2)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def tiny_models(cells) -> dict:
    "The shapes of the tutorials; their weights do not matter for the time."
    from scellfm.geneformer import Geneformer, RankTokenizer
    from scellfm.scgpt import ScGPT

    return {
        "Geneformer, 3 layers, 64 dimensions": Geneformer.from_config("tiny", RankTokenizer.fit(cells), device="cpu"),
        "scGPT, 2 layers, 64 dimensions": ScGPT.from_config("tiny", cells, n_layers=2, device="cpu"),
    }


def write(folder: Path, pieces: dict[Piece, pd.DataFrame], costs: pd.DataFrame | None) -> None:
    "Write a CSV file for each table, one that describes their data and models, and the costs."
    folder.mkdir(parents=True, exist_ok=True)
    for piece, table in pieces.items():
        table.to_csv(folder / f"{piece.name}.csv")
    about = pd.DataFrame([asdict(piece) for piece in pieces]).drop(columns=["cell", "columns"])
    about.to_csv(folder / "about.csv", index=False)
    if costs is not None:
        costs.to_csv(folder / "cost.csv")


def shown(scores) -> pd.DataFrame:
    "A Scores table as text: numbers with their intervals, as the page shows them."
    return from_markdown(scores.to_markdown())


def of_classifier(gf, cells, column: str, donor: str | None) -> pd.DataFrame:
    "Held-out scores of a fine-tuned classifier, by donor if there are donors."
    from scellfm.data import folds

    return shown(gf.finetune(cells, column, split=folds(cells, by=donor, k=4)).scores)


def own_tables(given) -> tuple[dict[Piece, pd.DataFrame], pd.DataFrame]:
    "The tables of a user's own checkpoints and cells; tables whose inputs are missing are left out."
    from scellfm.data import read
    from scellfm.geneformer import Geneformer
    from scellfm.scgpt import ReferenceMap, ScGPT
    from scellfm.scores import integration

    cells, made, models = read(given.cells), {}, {}
    named = {piece.name: piece for piece in PIECES}

    def keep(name: str, model: str, table: pd.DataFrame) -> None:
        made[Piece(name, named[name].question, str(given.cells), model)] = table

    if given.geneformer:
        gf = models[given.geneformer] = Geneformer.from_pretrained(given.geneformer)
        for name, column in (("cell_types", given.label), ("states", given.state)):
            if column:
                keep(name, given.geneformer, of_classifier(gf, cells, column, given.donor))
    if given.scgpt:
        gpt = models[given.scgpt] = ScGPT.from_pretrained(given.scgpt)
        gpt.embed(cells)
        if given.query:
            query = read(given.query)
            gpt.embed(query)
            keep("mapping", given.scgpt, shown(ReferenceMap(cells, label=given.label).evaluate(query)))
        if given.batch:
            keep("integration", given.scgpt, shown(integration(cells, ["X_scGPT"], given.batch, given.label)))
    return made, cost(models, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="first run the tutorials at full size, and measure the cost")
    parser.add_argument("--cost", action="store_true", help="measure the cost of embedding again")
    parser.add_argument("--out", type=Path, default=TABLES, help="folder of the tables")
    for name in ("geneformer", "scgpt", "cells", "query", "label", "state", "donor", "batch"):
        parser.add_argument(f"--{name}")
    given = parser.parse_args()
    if given.cells:
        write(given.out, *own_tables(given))
        return
    if given.run:
        pages = [str(ROOT / "nbs" / f"{piece.page}.ipynb") for piece in PIECES]
        subprocess.run([sys.executable, str(ROOT / "tools" / "run_notebooks.py"), *pages], check=True)
    costs = None
    if given.run or given.cost:
        from scellfm.data import demo

        cells = demo()
        costs = cost(tiny_models(cells), cells)
    tables = {piece: kept_table(piece) for piece in PIECES}
    write(given.out, {piece: table[list(piece.columns or table.columns)] for piece, table in tables.items()}, costs)


if __name__ == "__main__":
    main()
