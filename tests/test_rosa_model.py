"""rosa as a whole: nothing held out reaches a model, every kind answers what it can, bad inputs are refused by name."""

from functools import cache

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scellfm import AssetError, DataError, OptionError, ScellfmWarning
from scellfm.data import GeneVectors
from scellfm.rosa import Rosa, compare_vectors, hold_out_grid
from scellfm.rosa.expression import read_expression
from scellfm.rosa.hold_outs import QUADRANTS
from scellfm.rosa.rosa import effects_by_type
from scellfm.rosa.training import KINDS, Settings, learnable

TINY = {"dim": 16, "heads": 2, "dim_head": 8, "depth": 1, "latents": 4, "latent_dim": 8, "dropout": 0.0}
NETWORKS = [kind for kind in KINDS if kind != "ridge"]


def simulated(n_cells: int = 72, n_genes: int = 90, width: int = 6, seed: int = 0) -> tuple:
    "(cells, vectors): the expression of a gene in a type is a function of its vector."
    draws = np.random.default_rng(seed)
    vectors = draws.normal(size=(n_genes, width))
    by_type = vectors @ draws.normal(0, 0.6, (width, 3)) + 0.5 * draws.normal(size=(n_genes, 1))
    kind = np.arange(n_cells) % 3
    rate = 3 * np.exp(by_type.T[kind] - 0.5)
    obs = pd.DataFrame(
        {"donor": [f"d{i // 3 % 4}" for i in range(n_cells)], "cell_type": np.array(["B", "T", "NK"])[kind]},
        index=[f"cell{i}" for i in range(n_cells)],
    )
    counts = sparse.csr_matrix(draws.poisson(rate).astype(np.float32))
    adata = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"G{i:03d}" for i in range(n_genes)]))
    return adata, GeneVectors(adata.var_names, vectors.astype(np.float32), None, {"source": "simulated"})


CELLS, VECTORS = simulated()
GRID = hold_out_grid(CELLS, cells="donor", seed=1)


def fitted(kind: str, cells=CELLS, vectors=VECTORS, grid=GRID, loss: str = "mse", **recipe) -> Rosa:
    "A small model of a kind."
    recipe = {} if kind == "ridge" else {"epochs": 2, "batch_size": 8, **recipe}
    return Rosa(kind, loss=loss, device="cpu", size=TINY, asked=16, read=40).fit(cells, vectors, grid, **recipe)


@cache
def shared(kind: str) -> Rosa:
    "One small model of a kind, for every test that only reads it."
    return fitted(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_outside_the_training_quadrant_changes_no_bit_of_the_weights(kind):
    first = shared(kind)
    noisy = CELLS.copy()
    dense = noisy.X.toarray()
    held = np.ones(dense.shape, dtype=bool)
    held[np.ix_(GRID.cell_part == "train", GRID.gene_part == "train")] = False
    dense[held] = np.random.default_rng(9).integers(0, 1000, held.sum())
    noisy.X = sparse.csr_matrix(dense)
    values = VECTORS.values.copy()
    values[GRID.gene_part == "test"] = np.random.default_rng(8).normal(size=(GRID.n_genes("test"), VECTORS.width)) * 50
    second = fitted(kind, noisy, GeneVectors(VECTORS.genes, values))
    one, two = first.fitted.state(), second.fitted.state()
    assert one.keys() == two.keys() and len(one) > 0
    for name in one:
        assert one[name].numpy().tobytes() == two[name].numpy().tobytes(), name
    inside = CELLS.copy()
    dense = inside.X.toarray()
    dense[np.ix_(GRID.cell_part == "train", GRID.gene_part == "train")] += 1
    inside.X = sparse.csr_matrix(dense)
    third = fitted(kind, inside).fitted.state()  # the test can fail: a value inside does change the weights
    assert any(one[name].numpy().tobytes() != third[name].numpy().tobytes() for name in one)


def test_reading_held_out_genes_is_possible_and_reported():
    rosa = Rosa("ridge", normalise="all").fit(CELLS, VECTORS, GRID)
    assert rosa.score(baselines="none").origin["reads_held_out_genes"]
    changed = CELLS.copy()
    changed.X = sparse.csr_matrix(changed.X.toarray() + 5 * (GRID.gene_part == "test"))
    other = Rosa("ridge", normalise="all").fit(changed, VECTORS, GRID)
    assert not np.array_equal(rosa.fitted.weights, other.fitted.weights)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_answers_what_it_can_and_comes_back_from_its_folder(kind, tmp_path):
    rosa = shared(kind)
    scores = rosa.score(baselines="none")
    for quadrant in ("new cells", "new genes and cells"):
        assert scores[quadrant].table.loc[kind].isna().all() == (kind == "mlp")
    assert np.isfinite(scores["new genes"].table.loc[kind].to_numpy(float)).all()
    asked = rosa.predict(["G001", "G002"])
    np.testing.assert_allclose(
        rosa.predict(VECTORS.take(["G002", "G001"]))["G001"], asked["G001"], rtol=1e-4, atol=1e-5
    )
    rosa.save_pretrained(tmp_path / "model")
    again = Rosa.from_pretrained(tmp_path / "model", device="cpu")
    assert again.predict(["G001", "G002"]).equals(asked)
    assert again.scores.table.equals(scores.table)
    if kind != "mlp":
        new = rosa.predict(["G001"], CELLS[GRID.cell_part == "test"])
        assert np.isfinite(new.to_numpy()).all() and len(new) == GRID.n_cells("test")
    else:
        with pytest.raises(OptionError, match="cannot predict new cells"):
            rosa.predict(["G001"], CELLS[:2])


def test_order_of_cells_and_genes_changes_no_prediction():
    draws = np.random.default_rng(2)
    turned = CELLS[draws.permutation(CELLS.n_obs), draws.permutation(CELLS.n_vars)].copy()
    for kind in ("ridge", "transformer"):
        first = shared(kind).predict(["G003", "G050"])
        second = fitted(kind, turned).predict(["G003", "G050"])
        assert first.equals(second)


@pytest.mark.parametrize("loss", ["cross_entropy", "poisson", "negative_binomial"])
@pytest.mark.parametrize("kind", ["mlp", "encoder_decoder"])
def test_other_losses_predict_expression(kind, loss):
    rosa = fitted(kind, loss=loss, epochs=8, learning_rate=5e-3, stop=None)
    genes = list(GRID.genes[(GRID.gene_part == "train") & ~GRID.context])
    predicted = rosa.predict(genes).to_numpy()
    rows, columns = np.flatnonzero(GRID.cell_part == "train"), GRID.genes.get_indexer(genes)
    counts = CELLS.X.toarray()[rows]
    measured = np.log1p(1e4 * counts[:, columns] / counts[:, GRID.gene_part == "train"].sum(axis=1, keepdims=True))
    assert predicted.min() >= 0 and abs(predicted.mean() - measured.mean()) < 2
    assert np.corrcoef(predicted.mean(axis=0), measured.mean(axis=0))[0, 1] > 0.3


def test_ridge_finds_what_is_linear_and_permuted_vectors_do_not():
    rosa = Rosa("ridge").fit(CELLS, VECTORS, GRID)
    for quadrant in ("new genes", "new genes and cells"):
        table = rosa.scores[quadrant]
        for metric in ("pearson_across_genes", "pearson_across_cells_centred"):
            assert table.low.loc["ridge", metric] > table.high.loc["permuted vectors", metric], (quadrant, metric)
        metric = "pearson_across_cells_centred"
        assert table.low.loc["permuted vectors", metric] < 0 < table.high.loc["permuted vectors", metric]
        assert table.table.loc["gene mean", metric] == 0
    ceiling = rosa.scores["new genes"].table.loc["ceiling (donor halves)", "pearson_across_genes"]
    assert ceiling > rosa.scores["new genes"].table.loc["gene mean", "pearson_across_genes"]


def test_all_baselines_have_a_row_given_or_not():
    rosa = Rosa("ridge").fit(CELLS, VECTORS, GRID)
    words = GeneVectors(VECTORS.genes, VECTORS.values[:, :2])
    positions = pd.DataFrame({"gene": VECTORS.genes, "chrom": "1", "tss": np.arange(len(VECTORS.genes))})
    cage = GeneVectors(VECTORS.genes, VECTORS.values[:, :1])
    scores = rosa.score(baselines="all", references={"k-mer ridge": words, "CAGE": cage}, positions=positions)
    table = scores["new genes"].table
    for row in ("k-mer ridge", "nearest gene", "CAGE"):
        assert np.isfinite(table.loc[row, "pearson_across_genes"])
    for row in ("GC", "promoter only", "all tracks"):
        assert table.loc[row].isna().all()
    assert table.loc["CAGE", "pearson_across_cells_centred"] == 0


def test_hypothesis_table_tells_vectors_that_know_from_those_that_do_not():
    noise = GeneVectors(VECTORS.genes, np.random.default_rng(3).normal(size=VECTORS.values.shape))
    scores = compare_vectors(read_expression(CELLS), {"true": VECTORS, "ESM": None, "noise": noise}, GRID)
    table = scores["new genes"].table["pearson_across_cells_centred"]
    assert table["true"] > 0.5 and abs(table["one-hot"]) < 0.2 and table["true"] > table["noise"] + 0.3
    assert list(table.index) == ["true", "ESM", "noise", "one-hot", "permuted", "gene mean"]
    assert scores["new genes"].table.loc["ESM"].isna().all()
    assert scores["new genes"].low.loc["permuted"].max() < 0.05 and scores.origin["permutations"] == 10


def test_permuted_rows_are_the_mean_of_permutations():
    found, vectors = read_expression(CELLS), {"true": VECTORS}
    many, metric = compare_vectors(found, vectors, GRID, permutations=3), "pearson_across_cells_centred"
    single = [compare_vectors(found, {"p": VECTORS.permuted(seed)}, GRID, permutations=1) for seed in range(3)]
    for quadrant in QUADRANTS:
        parts = [scores[quadrant].table.loc["p", metric] for scores in single]
        assert many[quadrant].table.loc["permuted", metric] == pytest.approx(np.mean(parts), abs=1e-6)
    one = compare_vectors(found, vectors, GRID, permutations=1)["new genes"]
    assert one.table.loc["permuted", metric] == pytest.approx(single[0]["new genes"].table.loc["p", metric], abs=1e-6)
    with pytest.raises(OptionError, match="permutations"):
        compare_vectors(found, vectors, GRID, permutations=0)


@pytest.mark.parametrize("kind", ["ridge", "mlp", "transformer", "performer", "encoder_decoder", "perceiver"])
def test_contributions_sum_to_the_difference_of_predictions(kind):
    rosa = shared(kind)
    found = rosa.explain(["G004", "G010"], "B", steps=100)
    task, rows = rosa.task, np.flatnonzero(rosa.grid.obs.loc[rosa.task.cells, "cell_type"] == "B")
    at = task.genes.get_indexer(["G004", "G010"])
    asked = np.concatenate([task.vectors[at], np.zeros((1, task.vectors.shape[1]), np.float32)])
    whole = rosa.fitted.known_cells(task, asked, task.known(at))[rows].mean(axis=0)
    np.testing.assert_allclose(
        whole[:2], rosa.predict(["G004", "G010"]).to_numpy()[rows].mean(axis=0), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(found.sum(axis=1), whole[:2] - whole[2], rtol=0.03, atol=0.01)
    if kind in ("ridge", "mlp"):
        with pytest.raises(OptionError, match="uses no genes of a cell"):
            rosa.explain("G004", of="cell")
    elif kind == "transformer":
        both = rosa.explain("G004", ["cell0"] if "cell0" in task.cells else None, of="both", steps=8)
        assert set(both) == {"gene", "cell"} and both["cell"].shape[1] == 40 and "G004" not in both["cell"]


def test_effects_of_variants_by_cell_type_are_differences_of_predictions(tmp_path):
    from rosa_models import lively

    from scellfm.rosa import embed_genes, tss_windows

    draws = np.random.default_rng(0)
    fasta = tmp_path / "g.fa"
    letters = "".join(draws.choice(list("ACGT"), 40_000))
    fasta.write_text(">1\n" + "\n".join(letters[i : i + 60] for i in range(0, len(letters), 60)) + "\n")
    genes = [f"G{i:03d}" for i in range(12)]
    rows = [
        f'1\tt\ttranscript\t{2500 + 3000 * i}\t{3500 + 3000 * i}\t.\t+\t.\tgene_id "{g}"; transcript_id "{g}t"; '
        f'gene_type "protein_coding";'
        for i, g in enumerate(genes)
    ]
    (tmp_path / "a.gtf").write_text("\n".join(rows) + "\n")
    model = lively()
    windows = tss_windows(tmp_path / "a.gtf", fasta, length=model.bin_size * 16)
    how = {"rule": "tss", "strands": "both", "shifts": (0, 1)}
    vectors = embed_genes(windows, fasta, model=model, **how)
    cells = CELLS[:, :12].copy()
    grid = hold_out_grid(
        cells, genes={g: "test" if i > 8 else "train" for i, g in enumerate(genes)}, held_genes=["test"]
    )
    rosa = Rosa("ridge").fit(cells, vectors, grid)
    at = int(windows.table["tss"].iloc[9])
    table = pd.DataFrame({"chrom": ["1"], "pos": [at + 1], "ref": [letters[at]]})
    table["alt"] = "A" if letters[at] != "A" else "C"
    effects = rosa.variant_effect(table, fasta, model=model, windows=windows)
    assert set(effects["gene"]) >= {genes[9]} and {"B", "T", "NK"} <= set(effects)
    one = effects[effects["gene"] == genes[9]].iloc[0]
    changed = letters[:at] + table["alt"][0] + letters[at + 1 :]
    other = tmp_path / "h.fa"
    other.write_text(">1\n" + "\n".join(changed[i : i + 60] for i in range(0, len(changed), 60)) + "\n")
    changed_windows = tss_windows(tmp_path / "a.gtf", other, length=windows.length)
    after = embed_genes(changed_windows[[9]], other, model=model, **how)
    difference = rosa.predict(after.take([genes[9]])) - rosa.predict(vectors.take([genes[9]]))
    types = grid.obs["cell_type"].reindex(rosa.task.cells)
    expected = difference[genes[9]].groupby(types.to_numpy()).mean()
    np.testing.assert_allclose([one[t] for t in expected.index], expected, rtol=1e-2, atol=1e-4)
    assert abs(expected).max() > 1e-6
    bases = rosa.explain_bases(genes[9], windows, model)
    assert bases.shape == (windows.length, 4) and ((bases != 0).sum(axis=1) <= 1).all() and bases.to_numpy().any()
    whole = rosa.explain_bases(genes[9], windows, model, method="integrated_gradients", steps=40).to_numpy().sum()
    nothing = windows.codes([9]) * 0 + 5  # a quarter of each letter
    bin = vectors.manifest["read"][genes[9]]["bin"]
    empty = model.embed(nothing, bins=[bin], strands="both", shifts=(0, 1))[:, 0]
    parts = [
        rosa.predict(GeneVectors([genes[9]], v)).to_numpy().mean() for v in (vectors.take([genes[9]]).values, empty)
    ]
    np.testing.assert_allclose(whole, parts[0] - parts[1], rtol=0.1, atol=1e-3)
    stranger = lively(seed=5)
    for ask in (
        lambda: rosa.explain_bases(genes[9], windows, stranger),
        lambda: rosa.variant_effect(table, fasta, model=stranger, windows=windows),
    ):
        with pytest.raises(DataError, match="is not the model that made the vectors"):
            ask()


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"vectors": GeneVectors([f"X{i}" for i in range(90)], np.eye(90))}, DataError, "have a vector"),
        ({"vectors": "vectors"}, OptionError, "GeneVectors and a HoldOutGrid"),
        ({"grid": hold_out_grid(simulated(seed=1)[0][:40])}, None, ""),
        ({"kind": "forest"}, OptionError, "kind='forest'"),
        ({"kind": "ridge", "loss": "poisson"}, OptionError, "closed form"),
    ],
)
def test_bad_inputs_are_refused_by_name(change, error, text):
    if error is None:
        other, vectors = simulated(seed=1)
        other.obs_names = [f"x{name}" for name in other.obs_names]
        with pytest.raises(DataError, match="the grid belongs to other data"):
            Rosa("ridge").fit(other, vectors, GRID)
        return
    kind, loss = change.pop("kind", "ridge"), change.pop("loss", "mse")
    with pytest.raises(error, match=text):
        Rosa(kind, loss=loss).fit(CELLS, change.get("vectors", VECTORS), change.get("grid", GRID))


def test_no_overlap_of_vectors_with_the_training_genes_is_refused():
    few = GeneVectors(VECTORS.genes[GRID.gene_part == "test"], VECTORS.values[GRID.gene_part == "test"])
    with pytest.warns(ScellfmWarning, match="without one"), pytest.raises(DataError, match="0 are training genes"):
        Rosa("ridge").fit(CELLS, few, GRID)
    part = VECTORS.take(list(VECTORS.genes[:70]))
    with pytest.warns(ScellfmWarning, match="20 of 90 genes have no vector"):
        rosa = Rosa("ridge").fit(CELLS, part, GRID)
    assert len(rosa.task.left_out) == 20 and len(rosa.task.genes) == 70


def test_one_donor_or_one_type_leaves_dashes_and_no_error():
    one = CELLS.copy()
    one.obs["donor"], one.obs["cell_type"] = "only", "same"
    grid = hold_out_grid(one, seed=1)
    scores = Rosa("ridge").fit(one, VECTORS, grid).scores["new genes"]
    assert scores.table.loc["ceiling (donor halves)"].isna().all()
    assert np.isnan(scores.details["ridge"]["over_donors"]["pearson_across_genes"]).all()


def test_a_cell_without_context_is_counted_and_not_scored():
    bare = CELLS.copy()
    held = np.flatnonzero(GRID.cell_part == "test")[:2]
    dense = bare.X.toarray()
    dense[np.ix_(held, GRID.context)] = 0
    bare.X = sparse.csr_matrix(dense)
    rosa = Rosa("ridge").fit(bare, VECTORS, GRID)
    with pytest.warns(ScellfmWarning, match="2 of .* cells express none of the input genes"):
        scores = rosa.score(baselines="none")
    assert f"{GRID.n_cells('test') - 2} cells" in scores["new cells"].title
    with pytest.warns(ScellfmWarning, match="2 cells express none"):
        predicted = rosa.predict(["G001"], bare[held])
    assert predicted.isna().all().all()
    none = hold_out_grid(CELLS, cells="donor", seed=1, context=0)
    scores = Rosa("ridge").fit(CELLS, VECTORS, none).score(baselines="none")
    assert scores["new genes and cells"].table.isna().all().all() and scores["new genes"].table.notna().all().all()


def test_constant_genes_are_left_out_of_the_scores():
    flat = CELLS.copy()
    dense = flat.X.toarray()
    gene = int(np.flatnonzero(GRID.gene_part == "test")[0])
    dense[:, gene] = 0
    flat.X = sparse.csr_matrix(dense)
    scores = Rosa("ridge").fit(flat, VECTORS, GRID).score(baselines="none")["new genes"]
    number = scores.details["ridge"]["n"]["pearson_across_cells"]
    assert number == GRID.n_genes("test") - 1


def test_values_that_are_no_counts_need_to_be_declared():
    logs = CELLS.copy()
    logs.X = logs.X.log1p()
    with pytest.warns(ScellfmWarning, match="not counts"), pytest.raises(DataError, match="normalise='none'"):
        Rosa("ridge").fit(logs, VECTORS, GRID)
    with pytest.warns(ScellfmWarning, match="not counts"):
        rosa = Rosa("ridge", normalise="none").fit(logs, VECTORS, GRID)
    inside = np.ix_(GRID.cell_part == "train", GRID.gene_part == "train")
    np.testing.assert_allclose(rosa.task.values, logs.X.toarray()[inside], rtol=1e-6)


def test_questions_of_an_unknown_or_unfitted_model_are_refused(tmp_path):
    with pytest.raises(DataError, match="not fitted"):
        Rosa("ridge").predict()
    rosa = Rosa("ridge").fit(CELLS, VECTORS, GRID)
    with pytest.raises(DataError, match="'G999'"):
        rosa.predict(["G999"])
    with pytest.raises(DataError, match="width of 3"):
        rosa.predict(GeneVectors(["new"], np.ones((1, 3))))
    with pytest.raises(DataError, match="matches neither names nor cell types"):
        rosa.explain("G001", "nonsense")
    other = CELLS.copy()
    other.var_names = [f"X{i}" for i in range(90)]
    with pytest.raises(DataError, match="none of the .* genes that the model uses"):
        rosa.predict(["G001"], other)
    with pytest.raises(OptionError, match="training loop"):
        Rosa("ridge").fit(CELLS, VECTORS, GRID, epochs=3)
    rosa.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{}")
    with pytest.raises(AssetError, match="lacks format"):
        Rosa.from_pretrained(tmp_path / "m")


def test_context_sizes_are_estimated_from_the_context_alone():
    task = learnable(read_expression(CELLS), VECTORS, GRID, Settings())
    counts = CELLS.X.toarray()[GRID.cell_part == "train"][:, GRID.context]
    readable = task.readable(counts, task.context, task.share)
    exact = task.values[:, np.isin(task.train, task.context)]
    assert (
        abs(readable.values.mean() - exact.mean()) < 0.1
        and np.corrcoef(readable.values.ravel(), exact.ravel())[0, 1] > 0.99
    )


def test_a_missing_type_is_no_type_and_stays_missing_in_a_folder(tmp_path):
    cells = CELLS.copy()
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(object)
    cells.obs.iloc[:5, cells.obs.columns.get_loc("cell_type")] = None
    grid = hold_out_grid(cells, cells="donor", seed=1)
    fitted("ridge", cells=cells, grid=grid).save_pretrained(tmp_path / "model")
    again = Rosa.from_pretrained(tmp_path / "model", device="cpu")
    types = again.grid.obs["cell_type"]
    assert types.isna().sum() == grid.obs["cell_type"].reindex(types.index).isna().sum() > 0
    assert not {"nan", "None"} & set(types.dropna())
    assert list(effects_by_type(np.ones((3, 1)), pd.Series(["T", None, "B"]))) == ["B", "T"]
