"""Small whole files of the kinds of which no seeds are kept: made by the package itself, and read through its doors.

`make(folder)` writes them; `DOORS` and `PLACES` go into those of `fuzz_readers`.
"""

import gzip
import json
import pickle
import zipfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

GENES = [f"ENSG{i:011d}" for i in range(12)]
SYMBOLS = [f"GENE{i}" for i in range(12)]


def cells(n: int = 12) -> anndata.AnnData:
    "Counts of twelve genes with labels."
    draws = np.random.default_rng(0)
    obs = {"cell_type": ["B", "T"] * (n // 2), "donor": [f"d{i % 3}" for i in range(n)]}
    counts = sparse.csr_matrix(draws.poisson(2.0, (n, 12)).astype(np.float32))
    return anndata.AnnData(
        counts, obs=pd.DataFrame(obs, index=[f"c{i}" for i in range(n)]), var=pd.DataFrame(index=GENES)
    )


def make_genome(folder: Path) -> None:
    "A FASTA file (plain and block-gzipped), GTF, BED, a table, VCF (plain and gzipped), regions, proteins, tracks."
    from scellfm.rosa.blockgzip import write_blocks

    draws = np.random.default_rng(0)
    bases = "".join(draws.choice(list("ACGT"), 1200))
    fasta = f">chr1\n{bases[:600]}\n>chr2\n{bases[600:]}\n"
    (folder / "fasta").mkdir()
    (folder / "fasta" / "genome.fa").write_text(fasta)
    (folder / "bgzip").mkdir()
    write_blocks(folder / "bgzip" / "genome.fa.gz", fasta.encode())
    lines, bed, table = ["#!genome-build test"], [], ["gene\tchrom\tstrand\ttx_start\ttx_end"]
    for i, (gene, symbol) in enumerate(zip(GENES[:6], SYMBOLS)):
        chrom, start, strand = f"chr{i % 2 + 1}", 80 + 60 * i, "+-"[i % 2]
        about = f'gene_id "{gene}"; gene_name "{symbol}"; gene_type "protein_coding";'
        for feature, more in (
            ("gene", ""),
            ("transcript", f' transcript_id "T{i}";'),
            ("exon", f' transcript_id "T{i}";'),
        ):
            lines.append(f"{chrom}\ttest\t{feature}\t{start + 1}\t{start + 50}\t.\t{strand}\t.\t{about}{more}")
        bed.append(f"{chrom}\t{start}\t{start + 50}\t{gene}\t0\t{strand}")
        table.append(f"{gene}\t{chrom}\t{strand}\t{start}\t{start + 50}")
    (folder / "genes.gtf").write_text("\n".join(lines) + "\n")
    (folder / "zipped.gtf.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "genes.bed").write_text("\n".join(bed) + "\n")
    (folder / "genes.tsv").write_text("\n".join(table) + "\n")
    header = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tS1\n"
    records = [
        f"chr1\t{at}\tv{at}\t{bases[at - 1]}\t{'A' if bases[at - 1] != 'A' else 'C'}\t.\tPASS\tAF=0.1\tGT\t0|1"
        for at in (100, 180, 260)
    ]
    vcf = header + "\n".join(records) + "\n"
    (folder / "variants.vcf").write_text(vcf)
    (folder / "zipped.vcf.gz").write_bytes(gzip.compress(vcf.encode()))
    rows = [f"chr1\t{at}\t{bases[at - 1]}\t{'A' if bases[at - 1] != 'A' else 'C'}" for at in (100, 180)]
    (folder / "variants.tsv").write_text("chrom\tpos\tref\talt\n" + "\n".join(rows) + "\n")
    (folder / "regions.bed").write_text("chr1\t0\t300\ttrain\nchr1\t300\t600\ttest\nchr2\t0\t600\tvalid\n")
    letters = list("ACDEFGHIKLMNPQRSTVWY")
    proteins = [f">P{i} {gene}\n{''.join(draws.choice(letters, 40))}\n" for i, gene in enumerate(GENES[:4])]
    (folder / "proteins.fa").write_text("".join(proteins))
    tracks = [f"{i}\ttrack{i}\t{'CAGE' if i > 2 else 'DNASE'}:cell {i}" for i in range(5)]
    (folder / "targets.txt").write_text("index\tidentifier\tdescription\n" + "\n".join(tracks) + "\n")


def make_vectors(folder: Path) -> None:
    "A table of gene vectors of ours and of every published form; texts and a table of orthologs."
    from scellfm.data import GeneVectors

    values = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    GeneVectors(GENES, values, None, {"source": "simulated"}).save(folder / "vectors")
    by_gene = dict(zip(GENES, values))
    (folder / "vectors.pickle").write_bytes(pickle.dumps(by_gene))
    (folder / "lists.pickle").write_bytes(pickle.dumps({gene: row.tolist() for gene, row in by_gene.items()}))
    (folder / "vectors.json").write_text(json.dumps({gene: row.tolist() for gene, row in by_gene.items()}))
    np.save(folder / "vectors.npy", values)
    lines = [f"{gene} {' '.join(map(str, row))}" for gene, row in by_gene.items()]
    (folder / "vectors.txt").write_text("\n".join(lines) + "\n")
    (folder / "texts.json").write_text(json.dumps({gene: f"what {gene} does" for gene in GENES}))
    entries = [
        f"ID   P{i}_HUMAN  Reviewed;  100 AA.\nAC   P{i};\nGN   Name={symbol};\nOX   NCBI_TaxID=9606;\n"
        f"CC   -!- FUNCTION: Does number {i}.\n//\n"
        for i, symbol in enumerate(SYMBOLS[:3])
    ]
    (folder / "uniprot.txt").write_text("".join(entries))
    pairs = [f"ENSMUSG{i:011d},{gene}" for i, gene in enumerate(GENES)]
    (folder / "orthologs.csv").write_text("mouse,human\n" + "\n".join(pairs) + "\n")
    (folder / "classes.json").write_text(json.dumps({"a": GENES[:4], "b": GENES[4:8]}))
    table = pd.DataFrame(np.abs(values) * 9, index=GENES, columns=list("abcd"))
    table.to_csv(folder / "measured.csv")


def make_models(folder: Path) -> None:
    "A small scGenePT, rosa, Enformer and scGPT classifier; a folder and an archive in GEARS's layout; an atlas."
    from scellfm import atlas
    from scellfm.data import GeneVectors, hold_out, simulate_perturbations
    from scellfm.geneformer import Geneformer, RankTokenizer
    from scellfm.rosa import Enformer, Rosa, hold_out_grid
    from scellfm.scgenept import PerturbationData, ScGenePT
    from scellfm.scgpt import ScGPT

    adata = cells()
    adata.write_h5ad(folder / "made.h5ad")
    Geneformer.from_config("tiny", RankTokenizer.fit(adata), device="cpu").save_pretrained(folder / "tiny")
    simulated = simulate_perturbations(n_targets=6, n_pairs=0, n_genes=20, n_modules=2, n_cells=3, n_controls=6)
    data = PerturbationData(simulated.adata)
    (folder / "norman").mkdir()
    simulated.adata.write_h5ad(folder / "norman" / "perturb_processed.h5ad")
    with zipfile.ZipFile(folder / "norman.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "norman" / "perturb_processed.h5ad", "norman/perturb_processed.h5ad")
        archive.writestr("norman/go.csv", "source,target\n")
    small = dict(d_model=8, n_heads=2, d_hid=8, n_layers=1)
    ScGenePT.from_config("tiny", data, device="cpu", **small).save_pretrained(folder / "scgenept")
    vectors = GeneVectors.load(folder / "vectors")
    grid = hold_out_grid(adata, fraction=0.3)
    Rosa("ridge", device="cpu").fit(adata, vectors, grid).save_pretrained(folder / "rosa")
    Enformer.from_config("tiny").save_pretrained(folder / "enformer")
    gpt = ScGPT.from_config("tiny", GENES, device="cpu", d_model=8, n_heads=2, d_hid=8, n_layers=1)
    split = hold_out(adata, fractions=(0.5, 0, 0.5))
    gpt.finetune(adata, "cell_type", split=split, epochs=1, n_boot=0).save_pretrained(folder / "annotator")
    ask = dict(model=folder / "tiny", out=folder / "atlas", workers=1, loading={"device": "cpu"})
    atlas.run("embed", folder / "made.h5ad", **ask)


def make(folder: Path) -> Path:
    "Write all seeds into a folder."
    folder.mkdir(parents=True, exist_ok=True)
    make_genome(folder)
    make_vectors(folder)
    make_models(folder)
    return folder


def annotation(name: str):
    def door(folder: Path):
        from scellfm.rosa import read_annotation, tss_windows

        found = read_annotation(folder / name)
        repr(found)
        tss_windows(found, chrom_sizes={"chr1": 600, "chr2": 600}, length=64)

    return door


def fasta(name: str):
    def door(folder: Path):
        from scellfm.rosa import Genome, KmerEncoder, embed_genes, tss_windows

        windows = tss_windows(folder / "genes.bed", Genome(folder / name), length=128)
        embed_genes(windows, folder / name, model=KmerEncoder(2))

    return door


def variants(name: str):
    def door(folder: Path):
        from scellfm.rosa import read_variants

        found = read_variants(folder / name, folder / "fasta" / "genome.fa", mismatch="leave_out")
        repr(found)
        if name.endswith((".vcf", ".vcf.gz")):
            read_variants(folder / name, samples="S1")

    return door


def regions(folder: Path):
    from scellfm.rosa import read_annotation, region_sets

    region_sets(read_annotation(folder / "genes.bed"), folder / "regions.bed")


def proteins(folder: Path):
    from scellfm.rosa import read_proteins

    repr(read_proteins(folder / "proteins.fa"))


def tracks(folder: Path):
    from scellfm.rosa.tracks import read_tracks

    repr(read_tracks(folder / "targets.txt"))


def vectors(name: str):
    def door(folder: Path):
        from scellfm.data import GeneVectors, read_vectors

        genes = GENES if name.endswith(".npy") else None
        found = GeneVectors.load(folder / name) if name == "vectors" else read_vectors(folder / name, genes=genes)
        repr(found)
        found.take(GENES[:3], missing="random")

    return door


def texts(name: str):
    def door(folder: Path):
        from scellfm.scgenept import read_texts, read_uniprot

        (read_texts if name.endswith(".json") else read_uniprot)(folder / name)

    return door


def orthologs(folder: Path):
    from scellfm.geneformer import RankTokenizer

    mouse = cells()
    mouse.var_names = [f"ENSMUSG{i:011d}" for i in range(12)]
    tokenizer = RankTokenizer.from_pretrained(folder / "tiny")
    tokenizer(mouse, match={"orthologs": folder / "orthologs.csv"}, empty="keep")


def gene_classes(folder: Path):
    from scellfm.commands.classifiers import gene_classes

    gene_classes(str(folder / "classes.json"))


def expression_tables(folder: Path):
    from scellfm.commands.protocols import expression_table

    expression_table(folder / "measured.csv")


def gears_folder(folder: Path):
    from scellfm.scgenept import PerturbationData

    data = PerturbationData.load(folder / "norman")
    repr(data)
    data.split("simulation", seed=1)


def gears_zip(folder: Path):
    "Unpack where nothing else lies; whatever the archive says, nothing lies elsewhere afterwards."
    import tempfile

    from scellfm.assets.download import unpack_zip
    from scellfm.scgenept import PerturbationData

    with tempfile.TemporaryDirectory() as place:
        inside = Path(place) / "inside"
        inside.mkdir()
        try:
            unpack_zip(folder / "norman.zip", inside, skip=(".pkl", ".pickle"))
        finally:
            if sorted(path.name for path in Path(place).iterdir()) != ["inside"]:
                raise AssertionError(f"the archive reached beyond its folder: {list(Path(place).iterdir())}")
        PerturbationData.load("norman", root=inside, download=False)


def scgenept(folder: Path):
    from scellfm.scgenept import ScGenePT

    repr(ScGenePT.from_pretrained(folder / "scgenept", device="cpu"))


def rosa(folder: Path):
    from scellfm.rosa import Rosa

    found = Rosa.from_pretrained(folder / "rosa", device="cpu")
    repr(found)
    found.predict()


def enformer(folder: Path):
    from scellfm.rosa import Enformer

    repr(Enformer.from_pretrained(folder / "enformer", device="cpu"))


def annotator(folder: Path):
    from scellfm.scgpt import CellClassifier

    found = CellClassifier.from_pretrained(folder / "annotator", device="cpu")
    repr(found), found.scores
    found.predict(cells())


def atlas_records(folder: Path):
    from scellfm import atlas

    found = atlas.read(folder / "atlas")
    repr(found)
    found.to_df(), found.obs, dict(found.uns)


DOORS = {
    "gtf": annotation("genes.gtf"),
    "gtf_gz": annotation("zipped.gtf.gz"),
    "bed": annotation("genes.bed"),
    "annotation_table": annotation("genes.tsv"),
    "fasta": fasta("fasta/genome.fa"),
    "fasta_bgzip": fasta("bgzip/genome.fa.gz"),
    "vcf": variants("variants.vcf"),
    "vcf_gz": variants("zipped.vcf.gz"),
    "variants_table": variants("variants.tsv"),
    "folds_of_regions": regions,
    "proteins": proteins,
    "tracks": tracks,
    "gene_vectors": vectors("vectors"),
    "vectors_pickle": vectors("vectors.pickle"),
    "vectors_pickled_lists": vectors("lists.pickle"),
    "vectors_json": vectors("vectors.json"),
    "vectors_npy": vectors("vectors.npy"),
    "vectors_text": vectors("vectors.txt"),
    "gene_texts": texts("texts.json"),
    "uniprot": texts("uniprot.txt"),
    "orthologs": orthologs,
    "gene_classes": gene_classes,
    "expression_tables": expression_tables,
    "gears_folder": gears_folder,
    "gears_zip": gears_zip,
    "scgenept": scgenept,
    "rosa": rosa,
    "enformer": enformer,
    "annotator": annotator,
    "atlas_records": atlas_records,
}
PLACES = {
    "gtf": "genes.gtf",
    "gtf_gz": "zipped.gtf.gz",
    "bed": "genes.bed",
    "annotation_table": "genes.tsv",
    "fasta": "fasta/genome.fa",
    "fasta_bgzip": "bgzip/genome.fa.gz",
    "vcf": "variants.vcf",
    "vcf_gz": "zipped.vcf.gz",
    "variants_table": "variants.tsv",
    "folds_of_regions": "regions.bed",
    "proteins": "proteins.fa",
    "tracks": "targets.txt",
    "gene_vectors": "vectors",
    "vectors_pickle": "vectors.pickle",
    "vectors_pickled_lists": "lists.pickle",
    "vectors_json": "vectors.json",
    "vectors_npy": "vectors.npy",
    "vectors_text": "vectors.txt",
    "gene_texts": "texts.json",
    "uniprot": "uniprot.txt",
    "orthologs": "orthologs.csv",
    "gene_classes": "classes.json",
    "expression_tables": "measured.csv",
    "gears_folder": "norman",
    "gears_zip": "norman.zip",
    "scgenept": "scgenept",
    "rosa": "rosa",
    "enformer": "enformer",
    "annotator": "annotator",
    "atlas_records": "atlas",
}
