"""Inhibition and activation: a gene is moved by quartiles of the ranking, as the original documents and never built."""

import numpy as np
import pytest
import torch
from geneformer_golden import VERSIONS, cells, model

from scellfm.core import DataError, OptionError, StoreError
from scellfm.geneformer import gene_effects, perturb
from scellfm.geneformer.perturbation.edits import make_edits, sources
from scellfm.inference import Sequences

KINDS, QUARTILES = ("inhibit", "activate"), (1, 2, 3)


def new_rank(rank: int, n: int, kind: str, quartiles: int) -> int:
    "The rank after the move, as the manual says: middle of the quartile so many below or above, else bottom or front."
    quartile = next(q for q in range(4) if rank < (q + 1) * n / 4)
    aim = quartile + quartiles if kind == "inhibit" else quartile - quartiles
    if not 0 <= aim <= 3:
        return 0 if aim < 0 else n - 1
    return int((aim * n / 4 + (aim + 1) * n / 4) / 2)


def moved(tokens: list, rank: int, kind: str, quartiles: int, special: bool) -> list:
    "A cell whose gene at `rank` is moved, the plain way."
    genes = list(tokens[1:-1] if special else tokens)
    n = len(genes)
    gene = genes.pop(rank)
    genes.insert(new_rank(rank, n, kind, quartiles), gene)
    return [tokens[0], *genes, tokens[-1]] if special else genes


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("quartiles", QUARTILES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_gene_goes_where_the_manual_says(kind, quartiles, special):
    for n in range(1, 40):
        tokens = np.arange(10, 10 + n + 2 * special)
        edits = make_edits(Sequences([tokens]), kind, None, None, special, 64, quartiles)
        wanted = {r: moved(tokens.tolist(), r, kind, quartiles, special) for r in range(n)}
        wanted = {r: cell for r, cell in wanted.items() if cell != tokens.tolist()}
        assert (edits.positions[:, 0] - special).tolist() == list(wanted)
        assert (edits.lengths == len(tokens)).all()
        if len(edits):
            assert tokens[sources(edits)].tolist() == list(wanted.values())


def test_examples_of_the_manual():
    "Forty genes: the first quartile's go to the middle of the third by two, and so on."
    forty = Sequences([np.arange(40)])
    by = {
        (kind, q): dict(zip(e.positions[:, 0], e.targets[:, 0]))
        for kind in KINDS
        for q in (1, 2)
        for e in [make_edits(forty, kind, None, None, False, 64, q)]
    }
    assert {by["activate", 1][r] for r in range(30, 40)} == {25} and {by["activate", 1][r] for r in range(20, 30)} == {
        15
    }
    assert {by["activate", 1][r] for r in range(10, 20)} == {5} and {by["activate", 1][r] for r in range(1, 10)} == {0}
    assert {by["inhibit", 2][r] for r in range(10)} == {25} and {by["inhibit", 2][r] for r in range(10, 20)} == {35}
    assert {by["inhibit", 2][r] for r in range(20, 39)} == {39} and 39 not in by["inhibit", 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_joint_move_keeps_every_gene_once_and_the_order_of_the_rest(kind):
    random = np.random.default_rng(0)
    for _ in range(200):
        n, m = int(random.integers(3, 20)), int(random.integers(2, 4))
        tokens = random.permutation(np.arange(50, 50 + n))
        genes = random.choice(tokens, min(m, n), replace=False)
        quartiles = int(random.integers(1, 4))
        edits = make_edits(Sequences([tokens]), kind, genes[None], None, False, 64, quartiles)
        if not len(edits):
            continue
        after = tokens[sources(edits)[0]]
        assert sorted(after) == sorted(tokens)
        assert [g for g in after if g not in genes] == [g for g in tokens if g not in genes]
        old, new = ({g: list(cell).index(g) for g in genes} for cell in (tokens, after))
        aims = {g: new_rank(old[g], n, kind, quartiles) for g in genes}
        apart = np.array(sorted(aims.values()))
        if (np.diff(apart) > 0).all():
            assert new == aims
        assert sorted(genes, key=new.get) == sorted(genes, key=lambda g: (aims[g], old[g]))


@torch.inference_mode()
def plain(gf, tokens) -> torch.Tensor:
    "Second to last layer of one cell, through the whole BertForMaskedLM."
    return gf.model(torch.tensor([list(map(int, tokens))]), output_hidden_states=True).hidden_states[-2][0]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind, quartiles", [("inhibit", 1), ("inhibit", 3), ("activate", 2)])
def test_effects_equal_the_plain_way(version, kind, quartiles):
    gf, given = model(version), cells(version)[:2]
    shifts = perturb(gf, given, kind=kind, quartiles=quartiles).shifts
    for name, rows in shifts.groupby("cell"):
        tokens = given[list(given.obs.index).index(name)].tolist()
        before = plain(gf, tokens)
        for gene, rank, cosine in rows[["gene", "rank", "cosine"]].iloc[::7].itertuples(index=False):
            edited = moved(tokens, rank, kind, quartiles, gf.special)
            after = plain(gf, edited)
            if gf.special:
                expected = torch.cosine_similarity(after[0], before[0], dim=0)
            else:
                pairs = [(edited.index(t), tokens.index(t)) for t in tokens if t != tokens[rank]]
                expected = torch.stack([torch.cosine_similarity(after[a], before[b], dim=0) for a, b in pairs]).mean()
            assert gf.tokenizer.genes[tokens[rank + gf.special]] == gene
            assert cosine == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_shifts_to_a_goal_and_effects_on_genes_take_the_kind_too(version):
    gf, given = model(version), cells(version)
    states = list(dict.fromkeys(given.obs["state"]))
    screen = perturb(
        gf, given, kind="inhibit", quartiles=2, state="state", start=states[0], goal=states[1], max_cells=2
    )
    assert (
        screen.params["kind"] == "inhibit"
        and screen.params["quartiles"] == 2
        and screen.shifts["shift"].abs().max() > 0
    )
    gene = screen.shifts["gene"].iloc[0]
    effects = gene_effects(gf, given, kind="inhibit", genes=[gene], quartiles=2)
    assert set(effects["gene"]) == {gene} and gene not in set(effects["affected"])
    assert effects.groupby("cell").size().max() <= gf.max_length


def test_moving_a_gene_to_the_front_is_overexpression():
    gf, given = model("v1"), cells("v1")[:3]
    front = perturb(gf, given, kind="activate", quartiles=3).shifts
    over = perturb(gf, given, kind="overexpress").shifts.set_index(["gene", "cell"])["shift"]
    lengths = dict(zip(given.obs.index, given.lengths))
    front = front[4 * front["rank"] < 3 * front["cell"].map(lengths)]  # those with no three quartiles above them
    assert len(front) > 20
    np.testing.assert_allclose(front["shift"], over.loc[list(zip(front["gene"], front["cell"]))], atol=1e-6)


def test_what_cannot_be_asked(tmp_path):
    gf, given = model("v1"), cells("v1")[:2]
    for wrong, message in (
        (dict(kind="delete", quartiles=1), "inhibit"),
        (dict(kind="inhibit", quartiles=4), "quartiles"),
        (dict(kind="activate", quartiles=0), "quartiles"),
        (dict(kind="inhibit", anchor="x"), "anchor"),
    ):
        with pytest.raises(OptionError, match=message):
            perturb(gf, given, **wrong)
    top = str(gf.tokenizer.genes[given[0][0]])
    with pytest.raises(DataError, match="can move"):
        perturb(gf, given[:1], kind="activate", genes=[top])
    perturb(gf, given, kind="inhibit", folder=tmp_path / "run")
    with pytest.raises(StoreError):
        perturb(gf, given, kind="inhibit", quartiles=2, folder=tmp_path / "run")
