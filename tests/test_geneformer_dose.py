"""Partial knock-down and knock-up by rank: dose 0 changes nothing, exactly; more of a dose moves a gene further."""

import numpy as np
import pytest
from geneformer_golden import VERSIONS, cells, model

from scellfm.core import OptionError, StoreError
from scellfm.geneformer import perturb
from scellfm.geneformer.perturbation.edits import make_edits, sources
from scellfm.inference import Sequences

DOSES = (0.0, 0.25, 0.5, 0.75, 1.0)


def moved(tokens: list, rank: int, kind: str, dose: float, special: bool) -> list:
    "A cell whose gene at `rank` has gone a share of its way, the plain way."
    genes = list(tokens[1:-1] if special else tokens)
    way = len(genes) - 1 - rank if kind == "inhibit" else rank
    steps = int(np.floor(dose * way + 0.5))
    gene = genes.pop(rank)
    genes.insert(rank + steps if kind == "inhibit" else rank - steps, gene)
    return [tokens[0], *genes, tokens[-1]] if special else genes


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("dose", [*DOSES, 0.1, 1 / 3])
@pytest.mark.parametrize("kind", ["inhibit", "activate"])
def test_every_gene_goes_its_share_of_the_way(kind, dose, special):
    for n in range(2, 30):
        tokens = np.arange(10, 10 + n + 2 * special)
        edits = make_edits(Sequences([tokens]), kind, None, None, special, 64, dose=dose)
        assert (edits.positions[:, 0] - special).tolist() == list(range(n))  # those that stay are kept too
        assert tokens[sources(edits)].tolist() == [moved(tokens.tolist(), r, kind, dose, special) for r in range(n)]


@pytest.mark.parametrize("kind", ["inhibit", "activate"])
def test_genes_that_are_moved_together_are_lost_and_doubled_nowhere(kind):
    draws = np.random.default_rng(0)
    for _ in range(50):
        n = int(draws.integers(4, 20))
        tokens = draws.permutation(np.arange(100, 100 + n))
        genes = draws.choice(tokens, 3, replace=False)
        edits = make_edits(Sequences([tokens]), kind, genes[None], None, False, 64, dose=float(draws.random()))
        assert sorted(tokens[sources(edits)][0]) == sorted(tokens)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("goal", [True, False])
def test_dose_0_gives_a_shift_of_exactly_0(version, goal):
    gf, given = model(version), cells(version)
    states = list(dict.fromkeys(given.obs["state"]))
    how = dict(state="state", start=states[0], goal=states[1], max_cells=3) if goal else {}
    data = given if goal else given[:2]
    for kind in ("inhibit", "activate"):
        none = perturb(gf, data, kind=kind, dose=0, **how)
        half = perturb(gf, data, kind=kind, dose=0.5, **how)
        assert (none.shifts["shift"] == 0).all() and half.shifts["shift"].abs().max() > 0
        assert none.shifts[["gene", "cell"]].equals(half.shifts[["gene", "cell"]])  # the same edits at every dose
        assert none.params["dose"] == 0 and half.params["dose"] == 0.5 and half.params["quartiles"] is None


@pytest.mark.parametrize("version", VERSIONS)
def test_the_full_dose_is_overexpression_or_the_last_rank(version):
    gf, given = model(version), cells(version)[:2]
    front = perturb(gf, given, kind="activate", dose=1).shifts.set_index(["gene", "cell"])["shift"]
    over = perturb(gf, given, kind="overexpress").shifts.set_index(["gene", "cell"])["shift"]
    np.testing.assert_allclose(front.loc[over.index], over, atol=1e-6)
    last = perturb(gf, given, kind="inhibit", dose=1).shifts
    by_quartile = perturb(gf, given, kind="inhibit", quartiles=3).shifts.set_index(["gene", "cell"])["shift"]
    lengths = dict(zip(given.obs.index, given.lengths))
    deep = last[4 * last["rank"] > 2 * last["cell"].map(lengths)].set_index(["gene", "cell"])["shift"]
    shared = deep.index.intersection(by_quartile.index)  # three quartiles down from the lower half is the bottom
    assert len(shared) > 10
    np.testing.assert_allclose(deep.loc[shared], by_quartile.loc[shared], atol=1e-6)


def test_what_goes_with_no_dose_is_refused(tmp_path):
    gf, given = model("v1"), cells("v1")[:2]
    for wrong, message in (
        (dict(kind="delete", dose=0.5), "inhibit"),
        (dict(kind="overexpress", dose=0.5), "inhibit"),
        (dict(kind="inhibit", dose=0.5, quartiles=1), "by the one or by the other"),
        (dict(kind="inhibit", dose=1.5), "dose"),
        (dict(kind="inhibit", dose=-0.1), "dose"),
        (dict(kind="inhibit", dose=float("nan")), "dose"),
    ):
        with pytest.raises(OptionError, match=message):
            perturb(gf, given, **wrong)
    perturb(gf, given, kind="inhibit", dose=0.5, folder=tmp_path / "run")
    with pytest.raises(StoreError):
        perturb(gf, given, kind="inhibit", dose=0.25, folder=tmp_path / "run")
