"The command line: the same names and defaults as the Python, one sentence for a user's error, results alone on stdout."

import argparse
import importlib
import inspect
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import scellfm
from scellfm import cli, commands
from scellfm.commands import demonstration, inputs, options, signatures
from scellfm.core import settings
from scellfm.data.cells import simulate_cells
from scellfm.geneformer import CellClassifier, Geneformer, RankTokenizer, Screen, TokenizedCells
from scellfm.scgpt import ReferenceMap, ScGPT

COMMANDS = [
    "demo",
    "tokenize",
    "embed",
    "finetune",
    "predict",
    "perturb",
    "map",
    "integrate",
    "reproduce",
    "evaluate",
]
# what makes an example quick, and does not change what it does
QUICK = {
    "demo": "--pretrain-epochs 1 --finetune-epochs 1 --max-cells 4",
    "finetune": "--n-boot 5 --batch-size 100",
    "perturb": "--max-cells 2",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with cells.h5ad, a model, and a classifier."
    folder = tmp_path_factory.mktemp("cli")
    adata = simulate_cells(
        60,
        50,
        cell_types=["B", "T"],
        donors=3,
        depth=120,
        regulators=1,
        targets=3,
        programme_size=10,
        programme_effect=2.0,
        seed=2,
    )
    adata.write_h5ad(folder / "cells.h5ad")
    Geneformer.from_config("tiny", RankTokenizer.fit(adata), device="cpu").save_pretrained(folder / "model")
    gpt = ScGPT.from_config("tiny", adata, device="cpu")
    gpt.args.pop("untrained")  # stands for a trained one
    gpt.save_pretrained(folder / "scgpt")
    code = cli.main(
        [
            "finetune",
            str(folder / "cells.h5ad"),
            "--model",
            str(folder / "model"),
            "--label",
            "cell_type",
            "--by",
            "donor",
            "--k",
            "3",
            "--n-boot",
            "5",
            "--out",
            str(folder / "clf"),
            "--device",
            "cpu",
        ]
    )
    assert code == 0
    return folder


def call(arguments, capsys):
    "Exit code, stdout and stderr of a command line run in this process."
    code = cli.main(arguments)
    out = capsys.readouterr()
    return code, out.out, out.err


def shell(*arguments, **more):
    "A command line run in a process of its own."
    return subprocess.run(
        [str(Path(sys.executable).parent / "scellfm"), *arguments], capture_output=True, text=True, **more
    )


def options_of(command):
    "The parsed defaults of a command, by name."
    return vars(cli.build_parser().parse_args(shlex.split(example_of(command))[1:]))


def example_of(command):
    parsers = next(action for action in cli.build_parser()._actions if action.dest == "command" or action.choices)
    epilog = parsers.choices[command].epilog
    assert epilog.startswith("example: scellfm ")
    return epilog.removeprefix("example: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_ends_with_an_example_that_parses(command, capsys):
    code, out, err = call([command, "--help"], capsys)
    assert code == 0 and not err
    last = out.strip().split("\n")[-1]
    assert last == f"example: {example_of(command)}"
    given = shlex.split(last.removeprefix("example: "))
    assert given[:2] == ["scellfm", command]
    path = cli.build_parser().parse_args(given[1:]).run
    assert path.rpartition(".")[2] == command and getattr(commands, command) is not None


@pytest.mark.parametrize(
    "commands_run",
    [COMMANDS[1:], pytest.param(COMMANDS, marks=pytest.mark.slow)],
    ids=["on a new model", "after the demo"],
)
def test_every_example_runs_as_it_stands(commands_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "demo" not in commands_run:  # on a quarter of the cells and genes
        adata, all_cells = scellfm.data.demo(), inputs.demonstration
        monkeypatch.setattr(inputs, "demonstration", lambda name: all_cells(name)[::4, ::4].copy())
        Geneformer.from_config("tiny", RankTokenizer.fit(adata), device="cpu").save_pretrained("runs/demo/classifier")
    for command in commands_run:
        given = shlex.split(f"{example_of(command)} {QUICK.get(command, '')}")[1:]
        code, out, err = call(given, capsys)
        assert code == 0 and out and "error" not in err, (command, err)
        assert Path(given[given.index("--out") + 1]).exists(), command
        last = out.strip().split("\n")[-1]
        assert Path(last.strip()).exists(), (command, last)


def test_every_function_with_an_example_is_a_command_and_public():
    paths = [path for module in cli.MODULES for path in options.commands_in(f"scellfm.commands.{module}")]
    assert sorted(path.rpartition(".")[2] for path in paths) == sorted(COMMANDS) == dir(commands)


def taken(command):
    "The functions whose parameters a command takes, by their dotted paths, and the names that it leaves out."
    function = getattr(commands, command)
    return getattr(function, "takes", ()), getattr(function, "without", ())


def imported(path):
    "A function or method by its dotted path."
    module, names = signatures.split_path(path)
    found = importlib.import_module(module)
    for name in names:
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_read_from_the_source_is_the_signature(command):
    paths, _ = taken(command)
    for path in (*paths, f"{getattr(commands, command).__module__}.{command}"):
        python = inspect.signature(imported(path)).parameters
        for parameter in signatures.parameters_of(path):
            default = python[parameter.name].default
            assert parameter.default is signatures.REQUIRED or parameter.default == default, (path, parameter.name)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_the_functions_is_on_the_command_line_with_a_help(command):
    parsers = next(action for action in cli.build_parser()._actions if action.choices)
    actions = {action.dest: action for action in parsers.choices[command]._actions}
    assert all(action.help for action in actions.values()), [
        name for name, action in actions.items() if not action.help
    ]
    paths, without = taken(command)
    for path in paths:
        for parameter in signatures.parameters_of(path):
            if parameter.name not in without and options.on_a_command_line(parameter):
                action = actions[parameter.name]
                assert action.default in (None, argparse.SUPPRESS), "a default is written once, at the function"
                assert set(action.choices or ()) <= set(parameter.choices) | set(action.choices or ())
                if options.shown_default(parameter.default):
                    assert options.shown_default(parameter.default) in action.help, (command, parameter)


def test_version_and_help_are_quick_and_import_no_model():
    code = (
        "import sys; from scellfm.cli import main; main(['embed', '--help']);"
        "assert not {'torch', 'transformers', 'pandas', 'scanpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_version(capsys):
    assert call(["--version"], capsys) == (0, f"scellfm {scellfm.__version__}\n", "")


def test_the_entry_point_is_installed():
    run = shell("--version")
    assert run.returncode == 0 and run.stdout.strip() == f"scellfm {scellfm.__version__}"


def test_tokenize_writes_what_the_python_gives(place, tmp_path, capsys):
    out = str(tmp_path / "cells.dataset")
    given = [
        "tokenize",
        str(place / "cells.h5ad"),
        "--tokenizer",
        str(place / "model"),
        "--columns",
        "donor",
        "cell_type",
        "--keep-counts",
        "--out",
        out,
    ]
    assert call(given, capsys) == (0, f"{out}\n", "")
    cells = TokenizedCells.load(out)
    python = RankTokenizer.from_pretrained(place / "model")(str(place / "cells.h5ad"), keep_counts=True)
    assert np.array_equal(cells.tokens, python.tokens) and list(cells.obs) == ["donor", "cell_type"]
    np.testing.assert_array_equal(cells.counts, python.counts)


def test_fitted_dictionaries_are_kept_and_used_again(place, tmp_path, capsys):
    fit = ["tokenize", str(place / "cells.h5ad"), "--fit", str(tmp_path / "tok"), "--out", str(tmp_path / "one")]
    again = [
        "tokenize",
        str(place / "cells.h5ad"),
        "--tokenizer",
        str(tmp_path / "tok"),
        "--out",
        str(tmp_path / "two"),
    ]
    assert call(fit, capsys)[0] == call(again, capsys)[0] == 0
    one, two = (TokenizedCells.load(tmp_path / name) for name in ("one", "two"))
    assert np.array_equal(one.tokens, two.tokens)


def test_embed_gives_the_same_vectors_in_every_format(place, tmp_path, capsys):
    import anndata

    model = ["--model", str(place / "model"), "--device", "cpu"]
    for suffix in ("h5ad", "csv", "parquet"):
        code, out, _ = call(
            ["embed", str(place / "cells.h5ad"), *model, "--out", str(tmp_path / f"x.{suffix}"), "--quiet"], capsys
        )
        assert (code, out) == (0, f"{tmp_path / f'x.{suffix}'}\n")
    adata = anndata.read_h5ad(tmp_path / "x.h5ad")
    python = Geneformer.from_pretrained(place / "model", device="cpu").embed(
        anndata.read_h5ad(place / "cells.h5ad"), copy=True
    )
    np.testing.assert_array_equal(adata.obsm["X_geneformer"], python.obsm["X_geneformer"])
    table = pd.read_parquet(tmp_path / "x.parquet")
    np.testing.assert_array_equal(table.to_numpy(), python.obsm["X_geneformer"])
    assert list(table.index) == list(adata.obs_names)
    np.testing.assert_allclose(
        pd.read_csv(tmp_path / "x.csv", index_col="cell").to_numpy(), table.to_numpy(), rtol=1e-6
    )


def test_a_tokenized_data_set_is_embedded_and_its_layer_chosen(place, tmp_path, capsys):
    call(
        ["tokenize", str(place / "cells.h5ad"), "--tokenizer", str(place / "model"), "--out", str(tmp_path / "d")],
        capsys,
    )
    for layer, name in (("-1", "a"), ("second_to_last", "b"), ("0", "c")):
        given = [
            "embed",
            str(tmp_path / "d"),
            "--model",
            str(place / "model"),
            "--emb_layer",
            layer,
            "--device=cpu",
            "--out",
            str(tmp_path / f"{name}.parquet"),
        ]
        assert call(given, capsys)[0] == 0
    a, b, c = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in "abc")
    assert a.equals(b) and not a.equals(c)
    code, _, err = call(
        ["embed", str(tmp_path / "d"), "--model", str(place / "model"), "--out", str(tmp_path / "x.h5ad")], capsys
    )
    assert code == 2 and ".csv or .parquet" in err


def test_the_folder_of_a_scgpt_model_is_recognised(place, tmp_path, capsys):
    import anndata

    python = ScGPT.from_pretrained(place / "scgpt", device="cpu").embed(
        anndata.read_h5ad(place / "cells.h5ad"), copy=True
    )
    for name in ("x.h5ad", "x.parquet"):
        given = [
            "embed",
            str(place / "cells.h5ad"),
            "--model",
            str(place / "scgpt"),
            "--device",
            "cpu",
            "--out",
            str(tmp_path / name),
        ]
        assert call(given, capsys) == (0, f"{tmp_path / name}\n", "")
    np.testing.assert_array_equal(anndata.read_h5ad(tmp_path / "x.h5ad").obsm["X_scGPT"], python.obsm["X_scGPT"])
    table = pd.read_parquet(tmp_path / "x.parquet")  # read from the file block by block
    np.testing.assert_allclose(table.to_numpy(), python.obsm["X_scGPT"], atol=1e-6)
    assert list(table.index) == list(python.obs_names) and table.columns[0] == "X_scGPT_0"
    call(
        [*given[:-1], str(tmp_path / "mean.parquet"), "--pool", "mean", "--max-length", "20", "--overlong", "top"],
        capsys,
    )
    assert not np.allclose(pd.read_parquet(tmp_path / "mean.parquet").to_numpy(), table.to_numpy(), atol=1e-3)


def halves(place):
    "Two files, the cells of one and of the other half, each with an embedding and the labels."
    import anndata

    adata = anndata.read_h5ad(place / "cells.h5ad")
    adata.obsm["X_own"] = np.log1p(adata.X.toarray())
    for i, name in enumerate(("ref", "query")):
        if not (place / f"{name}.h5ad").exists():
            adata[i::2].copy().write_h5ad(place / f"{name}.h5ad")
    return str(place / "ref.h5ad"), str(place / "query.h5ad")


def test_map_names_cells_as_the_python_does_and_judges_them(place, tmp_path, capsys):
    import anndata

    ref, query = halves(place)
    given = [
        "map",
        ref,
        query,
        "--use-rep",
        "X_own",
        "--k",
        "5",
        "--calibrate",
        "--accuracy",
        "0.8",
        "--by",
        "donor",
        "--save",
        str(tmp_path / "saved"),
        "--out",
        str(tmp_path / "out"),
    ]
    code, out, _ = call(given, capsys)
    python = ReferenceMap(anndata.read_h5ad(ref), "X_own", k=5)
    python.calibrate(0.8, by="donor")
    named, scores = python.transfer(anndata.read_h5ad(query), copy=True), python.evaluate(anndata.read_h5ad(query))
    assert (
        code == 0 and scores.to_markdown() in out and "HVG + PCA" in out and out.split()[-1] == str(tmp_path / "saved")
    )
    labels = pd.read_csv(tmp_path / "out" / "labels.csv", index_col="cell")
    assert list(labels["cell_type_transferred"]) == list(named.obs["cell_type_transferred"]) and list(
        labels.index
    ) == list(named.obs_names)
    np.testing.assert_allclose(labels["cell_type_confidence"], named.obs["cell_type_confidence"])
    np.testing.assert_allclose(
        pd.read_csv(tmp_path / "out" / "scores.csv", index_col=0).to_numpy(), scores.table.to_numpy()
    )
    assert list(pd.read_csv(tmp_path / "out" / "classes.csv")["class"]) == ["B", "T"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [section["kind"] for section in report["sections"]] == ["scores", "figure", "table"] and set(
        report["inputs"]
    ) == {"ref", "query"}
    code, out, err = call(["map", str(tmp_path / "saved"), query, "--out", str(tmp_path / "again")], capsys)
    assert code == 0 and "without counts" in err and "HVG + PCA" not in out
    assert (tmp_path / "again" / "labels.csv").read_bytes() == (tmp_path / "out" / "labels.csv").read_bytes()


@pytest.mark.parametrize("model, key", [("scgpt", "X_scGPT"), ("model", "X_geneformer")])
def test_map_embeds_both_with_one_model(place, tmp_path, capsys, model, key):
    import anndata

    ref, query = halves(place)
    unlabelled = anndata.read_h5ad(query)
    del unlabelled.obs["cell_type"]
    unlabelled.write_h5ad(tmp_path / "new.h5ad")
    given = [
        "map",
        ref,
        str(tmp_path / "new.h5ad"),
        "--model",
        str(place / model),
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
    ]
    code, out, _ = call([*given, "--save", str(tmp_path / "saved")], capsys)
    assert code == 0 and key in out and out.count("\n") == 4 and not (tmp_path / "out" / "scores.csv").exists()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [section["kind"] for section in report["sections"]] == ["table"] and str(tmp_path) not in json.dumps(report)
    assert call(["map", str(tmp_path / "saved"), *given[2:-1], str(tmp_path / "again")], capsys)[0] == 0
    assert (tmp_path / "again" / "labels.csv").read_bytes() == (tmp_path / "out" / "labels.csv").read_bytes()
    assert call([*given, "--truth", "donor"], capsys)[0] == 0 and (tmp_path / "out" / "scores.csv").exists()


def test_integrate_prints_and_draws_the_scores_with_their_baselines(place, tmp_path, capsys):
    import anndata

    from scellfm.scores import integration

    cells = halves(place)[0]
    code, out, _ = call(
        ["integrate", cells, "--rep", "X_own", "--batch", "donor", "--label", "cell_type", "--out", str(tmp_path)],
        capsys,
    )
    scores = integration(anndata.read_h5ad(cells), ["X_own"], batch="donor", label="cell_type")
    assert code == 0 and scores.to_markdown() in out and {"X_own", "HVG + PCA"} <= set(scores.table.index)
    np.testing.assert_allclose(pd.read_csv(tmp_path / "scores.csv", index_col=0).to_numpy(), scores.table.to_numpy())
    assert (tmp_path / "umap.png").read_bytes().startswith(b"\x89PNG") and out.split()[-1] == str(
        tmp_path / "report.html"
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert [section["kind"] for section in report["sections"]] == ["scores", "figure"] and report["settings"][
        "batch"
    ] == "donor"


def test_every_kind_of_classifier_is_made_reported_and_predicts(place, tmp_path, capsys):
    cells, adata = str(place / "cells.h5ad"), scellfm.data.read(place / "cells.h5ad")
    genes = list(adata.var_names)
    (tmp_path / "genes.json").write_text(json.dumps({"x": genes[:12], "y": genes[12:24]}))
    more = ["--k", "2", "--n-boot", "5", "--device", "cpu", "--quiet"]
    labels = ["--label", "cell_type", "donor", "--stratify", "cell_type"]
    kinds = {
        "tasks": ("model", labels, ["cell_type_predicted", "donor_confidence"]),
        "genes": ("model", ["--classes", str(tmp_path / "genes.json")], ["predicted", "n_cells"]),
        "annotator": ("scgpt", ["--label", "cell_type", "--epochs", "1"], ["cell_type_predicted"]),
    }
    for kind, (model, asked, columns) in kinds.items():
        made = str(tmp_path / kind)
        code, out, err = call(["finetune", cells, "--model", str(place / model), *asked, *more, "--out", made], capsys)
        assert code == 0 and out.count("held out") >= (2 if kind == "tasks" else 1), (kind, err)
        report = json.loads((tmp_path / kind / "report.json").read_text())
        found = [section["kind"] for section in report["sections"]]
        assert found.count("scores") == (2 if kind == "tasks" else 1) and found.count("figure") >= 2, (kind, found)
        table = str(tmp_path / f"{kind}.csv")
        assert call(["predict", cells, "--model", made, "--device", "cpu", "--out", table], capsys)[0] == 0, kind
        assert set(columns) <= set(pd.read_csv(table).columns), kind


def test_a_prediction_that_the_cells_carry_already_is_made_anew(place, tmp_path, capsys):
    one, two, model = str(tmp_path / "one.h5ad"), str(tmp_path / "two.csv"), ["--model", str(place / "clf")]
    assert call(["predict", str(place / "cells.h5ad"), *model, "--device", "cpu", "--out", one], capsys)[0] == 0
    assert call(["predict", one, *model, "--device", "cpu", "--out", two], capsys)[0] == 0
    assert list(pd.read_csv(two).columns) == ["cell", "cell_type_predicted", "cell_type_confidence"]


def test_a_classifier_takes_the_dictionaries_that_are_named(place, tmp_path, capsys):
    gene = scellfm.data.read(place / "cells.h5ad").var_names[0]
    given = ["perturb", str(place / "cells.h5ad"), "--model", str(place / "clf"), "--tokenizer", str(place / "model")]
    given += ["--genes", gene, "--combine", "each", "--max-cells", "2", "--device", "cpu", "--out", str(tmp_path)]
    code, _, err = call(given, capsys)
    assert code == 0 and (tmp_path / "table.csv").exists(), err


def test_finetune_prints_held_out_scores_beside_simple_methods(place, tmp_path, capsys):
    code, out, _ = call(
        [
            "finetune",
            str(place / "cells.h5ad"),
            "--model",
            str(place / "clf"),
            "--label",
            "cell_type",
            "--fractions",
            ".5",
            "0",
            ".5",
            "--stratify",
            "cell_type",
            "--n-boot",
            "5",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "clf"),
        ],
        capsys,
    )
    assert code == 0 and out.strip().split("\n")[-1] == str(tmp_path / "clf")
    assert "held out" in out and "majority class" in out and "PCA + logistic regression" in out
    assert len(CellClassifier.from_pretrained(tmp_path / "clf", device="cpu").models) == 1
    report = json.loads((tmp_path / "clf" / "report.json").read_text())
    assert [section["kind"] for section in report["sections"]] == ["scores", "text", "figure", "figure"]
    assert report["settings"]["label"] == "cell_type" and (tmp_path / "clf" / "report.html").exists()
    assert len(CellClassifier.from_pretrained(place / "clf", device="cpu").models) == 3


def test_perturb_reads_each_cell_with_the_fold_that_has_not_seen_it(place, tmp_path, capsys):
    given = [
        "perturb",
        str(place / "cells.h5ad"),
        "--model",
        str(place / "clf"),
        "--state",
        "cell_type",
        "--start",
        "B",
        "--goal",
        "T",
        "--max-cells",
        "4",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    code, out, _ = call(given, capsys)
    assert code == 0 and out.split() == [str(tmp_path / name) for name in ("screen", "table.csv", "report.html")]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (
        report["settings"]["goal"] == "T"
        and set(report["inputs"]) == {"cells", "model"}
        and str(place) not in json.dumps(report)
    )
    assert [section["kind"] for section in report["sections"]] == ["table"]  # four cells are too few for a picture
    screen, table = Screen.load(tmp_path / "screen"), pd.read_csv(tmp_path / "table.csv")
    assert screen.shifts["cell"].nunique() == 4 and screen.params["donor"] == "donor"
    assert list(table["gene"]) == list(screen.table()["gene"])


def test_a_joint_perturbation_by_a_plain_model(place, tmp_path, capsys):
    import anndata

    adata = anndata.read_h5ad(place / "cells.h5ad")
    genes = list(adata.var_names[np.argsort(-np.asarray((adata.X > 0).sum(0)).ravel(), kind="stable")[:2]])
    given = [
        "perturb",
        str(place / "cells.h5ad"),
        "--model",
        str(place / "model"),
        "--genes",
        *genes,
        "--kind",
        "overexpress",
        "--max-cells",
        "3",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    code, _, err = call(given, capsys)
    assert code == 0, err
    assert set(Screen.load(tmp_path / "screen").shifts["gene"]) == {"+".join(genes)}


def test_pairs_of_chosen_cells_have_a_table_of_combinations(place, tmp_path, capsys):
    import anndata

    adata = anndata.read_h5ad(place / "cells.h5ad")
    genes = list(adata.var_names[np.argsort(-np.asarray((adata.X > 0).sum(0)).ravel(), kind="stable")[:2]])
    chosen = adata.obs["donor"].astype(str).unique()[:2]
    given = [
        "perturb",
        str(place / "cells.h5ad"),
        "--model",
        str(place / "model"),
        "--genes",
        *genes,
        "--combine",
        "pairs",
        "--donor",
        "donor",
        "--where",
        f"donor={','.join(chosen)}",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    code, _, err = call(given, capsys)
    assert code == 0, err
    screen, table = Screen.load(tmp_path / "screen"), pd.read_csv(tmp_path / "combinations.csv")
    assert set(screen.shifts["donor"]) == set(chosen) and table["gene"].tolist() == ["+".join(genes)]


def test_a_gradient_screen_from_the_command_line(place, tmp_path, capsys):
    given = [
        "perturb",
        str(place / "cells.h5ad"),
        "--model",
        str(place / "clf"),
        "--state",
        "cell_type",
        "--start",
        "B",
        "--goal",
        "T",
        "--max-cells",
        "4",
        "--gradient",
        "top=5",
        "check_cells=2",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    code, _, err = call(given, capsys)
    assert code == 0, err
    assert "estimate" in Screen.load(tmp_path / "screen").shifts and pd.read_csv(tmp_path / "table.csv")["exact"].any()


def spoiled(cells, tmp_path, how):
    "The path of the cells with centred values, or with genes that nobody knows."
    import anndata

    adata = anndata.read_h5ad(cells)
    if how == "scaled":
        adata.X = adata.X.toarray() - adata.X.toarray().mean(0)
    else:
        adata.var_names = [f"X{i}" for i in range(adata.n_vars)]
        adata.var = adata.var[[]]
    adata.write_h5ad(tmp_path / f"{how}.h5ad")
    return str(tmp_path / f"{how}.h5ad")


def wrong(place, tmp_path):
    "Command lines with something that a user can mend, and words of the sentence."
    import anndata

    cells, model, out = str(place / "cells.h5ad"), ["--model", str(place / "model")], ["--out", str(tmp_path / "x.csv")]
    broken = tmp_path / "broken.h5ad"
    broken.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(["TP53"]))
    embed = ["embed", cells, *model]
    finetune = ["finetune", cells, *model, "--out", str(tmp_path / "clf")]
    (ref, query), saved = halves(place), str(tmp_path / "saved")
    scellfm.scgpt.ReferenceMap(anndata.read_h5ad(ref), "X_own").save(saved)
    scgpt, tokens = ["--model", str(place / "scgpt")], str(tmp_path / "tokens")
    RankTokenizer.from_pretrained(place / "model")(cells).save(tokens)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "vocab.json").write_text("{}")
    return [
        ([], "command"),
        (["embd"], "embd"),
        (["embed", cells], "--model"),
        ([*embed, *out, "--emb-layer", "7"], "emb_layer=7"),
        ([*embed, *out, "--pool", "mean"], "pool='mean'"),
        ([*embed, "--out", "x.txt"], ".csv"),
        ([*embed, *out, "--layer", "raw_counts"], "raw_counts"),
        ([*embed, *out, "--dtype", "float8"], "float8"),
        ([*embed, *out, "--token-budget", "many"], "many"),
        (["embed", "nothing.h5ad", *model, *out], "nothing.h5ad"),
        (["embed", str(broken), *model, *out], "broken.h5ad"),
        (["embed", cells, "--model", "no/such/model", *out], "no/such/model"),
        (["embed", cells, *scgpt, *out, "--emb-layer", "0"], "--emb-layer is an option of Geneformer"),
        ([*embed, *out, "--overlong", "top"], "--overlong is an option of scGPT"),
        (["embed", tokens, *scgpt, *out], "tokens for Geneformer"),
        (["embed", cells, *scgpt, *out, "--pool", "cell"], "pool='cell'"),
        (["embed", cells, "--model", str(tmp_path / "half"), *out], "args.json"),
        (["embed", spoiled(cells, tmp_path, "scaled"), *scgpt, *out], "scaled values cannot be binned"),
        (["embed", spoiled(cells, tmp_path, "strange"), *scgpt, *out], "vocabulary"),
        (["finetune", cells, *scgpt, "--classes", str(bad), "--out", str(tmp_path / "clf")], "need Geneformer"),
        (["perturb", cells, *scgpt, *out], "needs Geneformer"),
        ([*finetune, "--label", "cell_type", "--k", "2", "--fractions", ".8", ".1", ".1"], "one of the two"),
        (["tokenize", cells, "--fit", str(tmp_path / "t"), "--version", "V1", *out], "--version does not apply here"),
        (["map", ref, query, "--use-rep", "X_own", "--device", "cpu", *out], "--device does not apply here"),
        (
            ["integrate", ref, "--reps", "X_own", "--batch", "donor", "--revision", "a", *out],
            "--revision does not apply here",
        ),
        (["predict", cells, *model, *out], "holds no classifier"),
        ([*finetune, "--label", "celltype"], "celltype"),
        ([*finetune, "--label", "cell_type", "--by", "dono"], "donor"),
        ([*finetune, "--label", "cell_type", "--fractions", ".5", ".5", ".5"], "sum"),
        (finetune, "--label"),
        ([*finetune, "--classes", str(bad)], "dictionary of lists"),
        ([*finetune, "--classes", "none.json"], "none.json"),
        ([*finetune, "--classes", cells], "JSON"),
        (["map", ref, query, *out], "X_scGPT"),
        (["map", ref, query, "--use-rep", "X_own", "--label", "type", *out], "'type'"),
        (["map", ref, query, *model, "--use-rep", "X_own", *out], "one of the two"),
        (["map", ref, query, "--use-rep", "X_own", "--accuracy", ".9", *out], "--calibrate"),
        (["map", ref, query, "--use-rep", "X_own", "--k", "0", *out], "k=0"),
        (["map", ref, "none.h5ad", *out, *model], "none.h5ad"),
        (["map", ref, query, "--use-rep", "X_own", "--truth", "type", *out], "'type'"),
        (["map", ref, query, "--use-rep", "X_own", "--vote", "all", *out], "'balanced'"),
        (["map", saved, query, "--k", "3", *out], "--k is an option for a new map"),
        (["map", saved, query, "--calibrate", *out], "--calibrate"),
        (["map", ref, tokens, *model, *out], "tokenized"),
        (["map", ref, query], "--out"),
        (["integrate", ref, *out, "--batch", "donor"], "--reps"),
        (["integrate", ref, *out, "--reps", "X_own"], "batch"),
        (["integrate", ref, *out, "--reps", "X_other", "--batch", "donor"], "X_other"),
        (["integrate", ref, *out, "--reps", "X_own", "--batch", "lab"], "'lab'"),
        (["integrate", tokens, *model, *out], "tokenized"),
        (["perturb", cells, *model, *out, "--kind", "delet"], "delete"),
        (["perturb", cells, *model, *out, "--state", "cell_type"], "start"),
        (["perturb", cells, *model, *out, "--method", "ttest"], "goal_state_shift"),
        (["perturb", cells, *model, *out, "--where", "donor"], "sex=female"),
        (["perturb", cells, *model, *out, "--where", "lab=x"], "lab"),
        (["perturb", cells, *model, *out, "--gradient", "top=no"], "gradient"),
        (["tokenize", cells, *out], "--tokenizer"),
        (["tokenize", cells, "--tokenizer", str(tmp_path), *out], "dictionar"),
        (["tokenize", str(tmp_path), "--fit", str(tmp_path / "t"), *out], "h5ad"),
    ]


def test_a_users_errors_are_one_plain_sentence_and_2(place, tmp_path, capsys):
    for arguments, words in wrong(place, tmp_path):
        code, out, err = call(arguments, capsys)
        assert code == 2 and not out, arguments
        assert words in err and "Traceback" not in err, (arguments, err)
        said = [line for line in err.splitlines() if "made by from_config and never trained" not in line]
        assert err.endswith("\n") and len(said) == 1 and re.match(r"scellfm[ a-z]*: error: ", said[0]), (arguments, err)
    assert not (tmp_path / "x.csv").exists() and not (tmp_path / "clf").exists()


def test_the_same_from_a_shell(tmp_path):
    run = shell("embed", "nothing.h5ad", "--model", str(tmp_path), "--out", "x.csv")
    assert run.returncode == 2 and not run.stdout and run.stderr.count("\n") == 1 and "nothing.h5ad" in run.stderr


def test_an_unwritable_place_is_a_users_error(place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    given = [
        "embed",
        str(place / "cells.h5ad"),
        "--model",
        str(place / "model"),
        "--out",
        str(tmp_path / "file" / "x.csv"),
    ]
    code, _, err = call(given, capsys)
    assert code == 2 and "Traceback" not in err and "file" in err


def test_a_fault_of_ours_is_not_dressed_as_a_users(monkeypatch):
    def fault(**settings):
        raise ZeroDivisionError

    monkeypatch.setattr(demonstration, "demo", fault)
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo"])


def test_ctrl_c_is_130_without_traceback(tmp_path):
    program = (
        "import signal, sys, time, scellfm.cli as c, scellfm.commands.demonstration as d\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background shell makes children deaf
        "def wait(**settings):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "d.demo = wait\nsys.exit(c.main(['demo']))"
    )
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "ready\n"
    time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=30)
    assert run.returncode == 130 and "Traceback" not in err


def test_warnings_of_ours_are_one_line_and_those_of_others_stay_out(monkeypatch, capsys):
    import warnings

    def noisy(**settings):
        scellfm.core.warn("two\nlines")
        warnings.warn("for developers", FutureWarning, stacklevel=1)

    monkeypatch.setattr(demonstration, "demo", noisy)
    code, _, err = call(["demo"], capsys)
    assert code == 0 and err == "scellfm: warning: two lines\n"


def test_quiet_turns_progress_off_for_the_call_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(demonstration, "demo", lambda **given: seen.append(settings.progress))
    monkeypatch.setattr(settings, "progress", True)
    cli.main(["demo", "--quiet"])
    cli.main(["demo"])
    assert seen == [False, True] and settings.progress


def test_published_numbers_stand_beside_their_own_data_alone(tmp_path):
    from scellfm.commands.reproductions import card_of

    assert card_of("norman") == card_of(str(tmp_path / "norman")) == "norman"
    assert card_of(str(tmp_path / "adamson")) == "adamson" and card_of(str(tmp_path / "mine")) is None


def test_a_scgenept_predicts_and_is_scored_and_nothing_else(tmp_path, capsys):
    made = tmp_path / "made"
    assert call(["reproduce", "simulated", "--out", str(made), "--seeds", "42", "--epochs", "1"], capsys)[0] == 0
    cells, model = str(made / "cells.h5ad"), str(made / "model")
    out = ["--out", str(tmp_path / "predicted.csv")]
    assert call(["predict", cells, "--model", model, "--perturbations", "G01", "G02+G03", *out], capsys)[0] == 0
    assert list(pd.read_csv(tmp_path / "predicted.csv", index_col=0).index) == ["G01", "G02+G03"]
    code, printed, _ = call(["evaluate", cells, "--model", model, "--out", str(tmp_path / "scores.csv")], capsys)
    assert code == 0 and "training mean" in printed
    for command in (
        ["embed", cells, "--model", model, *out],
        ["integrate", cells, "--model", model, "--batch", "x", *out],
        ["map", cells, cells, "--model", model, "--label", "condition", *out],
    ):
        code, _, error = call(command, capsys)
        assert code == 2 and "scGenePT" in error
    code, _, error = call(["predict", cells, "--model", model, *out], capsys)
    assert code == 2 and "--perturbations" in error
    code, _, error = call(["evaluate", cells, "--model", str(tmp_path), "--out", str(tmp_path / "s.csv")], capsys)
    assert code == 2 and "no trained scGenePT" in error.replace("holds ", "")


@pytest.mark.parametrize("model", ["model", "scgpt"])
def test_how_genes_are_named_is_said_on_the_command_line(place, tmp_path, capsys, model):
    import anndata

    renamed = anndata.read_h5ad(place / "cells.h5ad")
    renamed.var["theirs"], renamed.var_names = renamed.var_names, [f"row{i}" for i in range(renamed.n_vars)]
    renamed.write_h5ad(tmp_path / "renamed.h5ad")
    tables = []
    for cells, more in ((place / "cells.h5ad", []), (tmp_path / "renamed.h5ad", ["--match", "column=theirs"])):
        out = str(tmp_path / f"{len(tables)}.csv")
        given = ["embed", str(cells), "--model", str(place / model), "--out", out, "--device", "cpu", *more]
        code, _, err = call(given, capsys)
        assert code == 0, err
        tables.append(pd.read_csv(out))
    pd.testing.assert_frame_equal(*tables)
