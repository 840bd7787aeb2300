"""scGPT embedding at true shape: `ScGPT.embed` against torch's nn.TransformerEncoder fast path in padded batches of 16.

One thread, random weights of the whole-human shape, cells of 1,000 to 1,500 expressed genes cut to 1,200 tokens. The
reference receives finished tokens; ours starts from the AnnData. Pairs alternate; the ratio is the median over pairs.
Time is processor time, which on an idle machine equals wall time (one thread).

    python benchmarks/scgpt_embedding.py [--quick]
"""

import statistics
import sys
import warnings

import harness
import anndata
import numpy as np
import torch
from scipy import sparse
from torch import nn

from scellfm.scgpt import ScGPT, Vocabulary
from scellfm.scgpt.tokenizer import tokenize

N_GENES, N_TOKENS, N_CELLS, BATCH, MAX_LENGTH = 20_000, 60_697, 16, 16, 1200


def simulated_cells(seed: int = 0) -> anndata.AnnData:
    "16 cells with 1,000 to 1,500 of 20,000 genes expressed."
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(N_CELLS):
        row = np.zeros(N_GENES, dtype=np.float32)
        seen = rng.choice(N_GENES, rng.integers(1000, 1501), replace=False)
        row[seen] = 1 + rng.poisson(rng.gamma(0.4, 4.0, len(seen)))
        rows.append(sparse.csr_matrix(row))
    adata = anndata.AnnData(sparse.vstack(rows, format="csr"))
    adata.var_names = [f"GENE{i}" for i in range(N_GENES)]
    return adata


def torch_encoder(gpt: ScGPT) -> nn.TransformerEncoder:
    "torch's own encoder with the same weights, as in the original; in evaluation it uses its fast path."
    c = gpt.model.config
    layer = nn.TransformerEncoderLayer(c.d_model, c.n_heads, c.d_hid, c.dropout, batch_first=True)
    encoder = nn.TransformerEncoder(layer, c.n_layers)
    encoder.load_state_dict(gpt.model.transformer_encoder.state_dict())
    return encoder.eval()


@torch.no_grad()
def reference(gpt: ScGPT, encoder: nn.TransformerEncoder, batches: list) -> np.ndarray:
    "Cell vectors from finished padded batches."
    vectors = []
    for genes, values, mask in batches:
        x = gpt.model.encoder(genes) + gpt.model.value_encoder(values)
        vectors.append(nn.functional.normalize(encoder(x, src_key_padding_mask=~mask)[:, 0], dim=1))
    return torch.cat(vectors).numpy()


def main() -> int:
    options = harness.parser(__doc__, quick="one pair instead of five").parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    adata = simulated_cells()
    vocabulary = Vocabulary([*adata.var_names, *(f"OTHER{i}" for i in range(N_TOKENS - 3 - N_GENES))])
    gpt = ScGPT.from_config("human", vocabulary, device="cpu")
    index = vocabulary.match(adata).index
    cells = next(tokenize(adata, adata.obs_names, index, vocabulary, max_length=MAX_LENGTH))[1]
    batches = [cells.batch(range(i, min(i + BATCH, len(cells))), vocabulary.pad) for i in range(0, len(cells), BATCH)]
    ours, theirs, peak = [], [], None
    encoder = None
    for pair in range(1 if options.quick else options.pairs):
        _, spent, vectors = harness.timed(lambda: gpt.embed(adata, max_length=MAX_LENGTH, copy=True).obsm["X_scGPT"])
        ours.append(spent)
        if peak is None:  # before the reference has run
            peak = harness.peak_memory() / 1024
            encoder = torch_encoder(gpt)
        _, spent, expected = harness.timed(lambda: reference(gpt, encoder, batches))
        theirs.append(spent)
        print(
            f"pair {pair + 1}: scellfm {ours[-1]:.1f} s, torch {theirs[-1]:.1f} s, ratio {theirs[-1] / ours[-1]:.2f}",
            flush=True,
        )
    cosine = float((vectors * expected).sum(1).min())
    ratio = statistics.median(b / a for a, b in zip(ours, theirs))
    print(f"{min(ours) / N_CELLS:.2f} s per cell")
    return harness.verdict(
        ("ratio to torch's fast path", ratio, "floor", 2),
        ("least cosine", cosine, "floor", 0.99999),
        ("peak memory in GB", peak, "ceiling", 3),
    )


if __name__ == "__main__":
    sys.exit(main())
