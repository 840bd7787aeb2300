"Language that knows what genes do together helps with held-out genes; the same language under other names does not."

import numpy as np
import pytest

from scellfm.data import simulate_perturbations
from scellfm.scgenept import PerturbationData, ScGenePT, perturbation_folds


@pytest.mark.filterwarnings("ignore")
def test_language_helps_held_out_genes_and_permuted_language_does_not():
    simulated = simulate_perturbations(n_targets=32, n_pairs=0, n_genes=40, n_modules=3, n_cells=10, n_controls=40)
    data = PerturbationData(simulated.adata)
    split = perturbation_folds(data.labels, 4, seed=0)[0]
    names, know = split.perturbations("test"), simulated.vectors["know"]
    truth = simulated.means.loc[names] - simulated.means.loc["ctrl"]
    found = {}
    for kind, vectors in {"know": know, "permuted": know.permuted(0)}.items():
        model = ScGenePT.from_config(
            "tiny",
            data,
            knowledge="programmes",
            gene_vectors=vectors,
            d_model=32,
            n_heads=2,
            d_hid=32,
            n_layers=1,
            dropout=0.0,
            device="cpu",
        )
        model.fit(data, split, epochs=45, batch_size=32, learning_rate=1e-2, decay=0.98, seed=0)
        change = model.predict(names, n_controls=20) - data.means().loc["ctrl"]
        found[kind] = np.mean([np.corrcoef(change.loc[name], truth.loc[name])[0, 1] for name in names])
    assert found["know"] > found["permuted"] + 0.05, found
