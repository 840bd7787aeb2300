"""A genome whose rule is known: vectors of an Enformer that learned it tell unseen genes apart, others do not."""

import os
import numpy as np
import pytest
import time

from scellfm.data import GeneVectors, simulate_genome
from scellfm.rosa import Enformer, Rosa, compare_vectors, embed_genes, hold_out_grid, kmer_vectors, log_normalize
from scellfm.rosa import pseudobulk, read_expression, tss_windows
from scellfm.rosa.training import Settings
import pickle


def test_explore(tmp_path):
    kw = eval(os.environ.get("KW", "{}"))
    epochs, lr, bs = kw.pop("epochs", 12), kw.pop("lr", 4e-3), kw.pop("bs", 4)
    kw = {"n_genes": 300, "n_sites": 6.0, "noise": 0.2, "n_cells": 40, "seed": 0} | kw
    clock = time.process_time
    t = clock(); sim = simulate_genome(**kw); print("sim", clock() - t)
    p = sim.write(tmp_path); w = tss_windows(p["annotation"], p["fasta"], length=256)
    chrom = w.table["chrom"].to_numpy(); held = sorted(set(chrom))[-1]; tr = np.flatnonzero(chrom != held)
    t = clock(); cov = sim.coverage(w, 32); print("cov", clock() - t)
    shape = dict(tracks=sim.tracks, output_heads={"human": len(sim.tracks)}, num_downsamples=5, dim=48, dim_divisible_by=6, depth=1, dropout_rate=0.0, device="cpu")
    un, en = (Enformer.from_config("tiny", seed=0, **shape) for _ in range(2))
    t = clock(); h = en.fit(w[tr], cov[tr], epochs=epochs, learning_rate=lr, batch_size=bs); print("train", clock() - t, h.epochs["train_loss"].round(3).tolist())
    t = clock(); vec = {n: embed_genes(w, model=m, rule="tss") for n, m in (("trained", en), ("untrained", un))}; print("embed x2", clock() - t)
    vec["both"] = embed_genes(w, model=en, rule="tss", strands="both")
    vec["k-mers"] = kmer_vectors(w)
    pickle.dump((sim.adata, sim.log_rates, vec, held, w.table), open(os.environ["OUT"], "wb"))
    en.save_pretrained(os.environ["OUT"] + ".model")
