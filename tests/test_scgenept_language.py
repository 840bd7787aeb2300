"""Gene vectors from texts: what the sentence model gives, resumable, honest about genes and words that are missing."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import real_data
from safetensors.torch import load_file, save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from scellfm import AssetError, DataError, OptionError, ScellfmWarning, StoreError
from scellfm.data import GeneVectors
from scellfm.scgenept import (
    go_annotations,
    go_texts,
    go_vectors,
    merge_texts,
    read_texts,
    read_uniprot,
    text_vectors,
    tfidf_vectors,
)

WORDS = "kinase receptor ribosome translation signal binds of the nucleus cytosol factor".split()
DRAW = np.random.default_rng(0)
TEXTS = {f"G{i}": [" ".join(DRAW.choice(WORDS, DRAW.integers(2, 9))) for _ in range(1 + i % 3)] for i in range(12)}
LIMIT = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    names = ["[PAD]", "[UNK]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    kwargs = dict(pad_token="[PAD]", unk_token="[UNK]", model_max_length=LIMIT)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kwargs).save_pretrained(folder)
    torch.manual_seed(1)
    BertModel(BertConfig(len(names), 16, 2, 2, 32, max_position_embeddings=LIMIT)).save_pretrained(folder)
    return folder


def by_hand(folder, sentence, scaled=False):
    "Mean over tokens of one sentence alone."
    ids = [2 + WORDS.index(word) for word in sentence.split()][:LIMIT]
    hidden = BertModel.from_pretrained(folder).eval()(input_ids=torch.tensor([ids])).last_hidden_state[0]
    found = hidden.mean(0).detach().numpy()
    return found / np.linalg.norm(found) if scaled else found


def described(folder, target, modules=("Transformer", "Pooling"), **modes):
    "A copy of the model with the files that say how to pool."
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    (target / "pool").mkdir()
    kinds = [{"type": f"sentence_transformers.models.{name}", "path": "pool" * (name == "Pooling")} for name in modules]
    (target / "modules.json").write_text(json.dumps(kinds))
    (target / "pool" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16} | modes))
    return target


def test_a_gene_has_the_mean_of_its_sentences_each_the_mean_of_its_tokens(model):
    found = text_vectors(TEXTS, model, token_budget=24)
    for gene in ("G0", "G5"):
        expected = np.mean([by_hand(model, sentence) for sentence in TEXTS[gene]], axis=0)
        np.testing.assert_allclose(found.frame().loc[gene], expected, atol=1e-5)
    other = text_vectors(dict(reversed(TEXTS.items())), model, token_budget=4096)
    np.testing.assert_allclose(other.frame().loc[found.genes], found.values, atol=1e-5)


def test_one_long_text_is_cut_counted_and_warned_of(model):
    with pytest.warns(ScellfmWarning, match="longer than the model's 8 tokens"):
        found = text_vectors(TEXTS, model, join="concat")
    long = next(gene for gene, sentences in TEXTS.items() if len(" ".join(sentences).split()) > LIMIT)
    np.testing.assert_allclose(found.frame().loc[long], by_hand(model, " ".join(TEXTS[long])), atol=1e-5)
    assert found.manifest["cut"] == sum(len(" ".join(sentences).split()) > LIMIT for sentences in TEXTS.values())
    assert found.manifest["join"] == "concat" and found.manifest["limit"] == LIMIT


def test_the_folder_says_how_to_pool(model, tmp_path):
    sentence = TEXTS["G0"][0]
    texts = {"A": sentence, "B": TEXTS["G1"]}
    scaled = described(model, tmp_path, ("Transformer", "Pooling", "Normalize"), pooling_mode_mean_tokens=True)
    found = text_vectors(texts, scaled)
    np.testing.assert_allclose(found.frame().loc["A"], by_hand(model, sentence, scaled=True), atol=1e-5)
    (tmp_path / "pool" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert not np.allclose(text_vectors(texts, scaled).values, found.values)
    (tmp_path / "pool" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(AssetError, match="max_tokens"):
        text_vectors(texts, scaled)


def test_a_stopped_run_goes_on_and_another_one_is_refused(model, tmp_path, monkeypatch):
    from scellfm.scgenept import language

    whole = text_vectors(TEXTS, model)
    monkeypatch.setattr(language, "BLOCK", 4)
    plain, calls = language.encode, []

    def failing(*arguments):
        calls.append(len(arguments[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(language, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        text_vectors(TEXTS, model, folder=tmp_path / "run")
    found = text_vectors(TEXTS, model, folder=tmp_path / "run")
    n_blocks = -(-len({s for sentences in TEXTS.values() for s in sentences}) // 4)
    assert len(calls) == 3 + n_blocks - 2  # two blocks were kept
    np.testing.assert_allclose(found.values, whole.values, atol=1e-6)
    with pytest.raises(StoreError):
        text_vectors(TEXTS | {"G0": "kinase"}, model, folder=tmp_path / "run")


def test_a_weight_that_the_file_lacks_is_an_error(model, tmp_path):
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if "layer.1" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(AssetError, match="1 weights are not in the file"):
        text_vectors(TEXTS, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(AssetError, match="cannot be read as a sentence model"):
        text_vectors(TEXTS, tmp_path)


def test_genes_without_a_text_are_treated_as_asked_and_reported(model):
    wanted = ["G3", "NEW", "G1"]
    with pytest.warns(ScellfmWarning, match="2 of 3 genes have a vector"):
        found = text_vectors(TEXTS, model, genes=wanted, missing="random", seed=4)
    assert found.covered.tolist() == [True, False, True] and list(found.genes) == wanted
    step = found.manifest["steps"][-1]
    assert step["missing_genes"] == ["NEW"] and step["treatment"] == "random" and step["seed"] == 4
    with pytest.warns(ScellfmWarning):
        again, other = (text_vectors(TEXTS, model, genes=wanted, missing="random", seed=s) for s in (4, 5))
    assert np.array_equal(again.values, found.values) and not np.array_equal(other.values[1], found.values[1])
    with pytest.raises(DataError, match="missing='mean'"):
        tfidf_vectors(TEXTS, 2, genes=wanted, missing="error")


def test_words_are_weighted_as_scikit_learn_weights_them():
    found = tfidf_vectors(TEXTS, 3)
    counter = TfidfVectorizer(sublinear_tf=True, min_df=2, token_pattern=r"(?u)\b\w[\w-]+\b", stop_words="english")
    matrix = counter.fit_transform([" ".join(sentences) for sentences in TEXTS.values()]).toarray()
    left, sizes, _ = np.linalg.svd(matrix, full_matrices=False)
    expected = left[:, :3] * sizes[:3]
    np.testing.assert_allclose(found.values @ found.values.T, expected @ expected.T, atol=1e-4)
    assert found.manifest["kept"] == pytest.approx((sizes[:3] ** 2).sum() / (sizes**2).sum(), abs=1e-4)


def test_the_order_of_genes_and_terms_changes_nothing():
    draw = np.random.default_rng(2)
    annotations = {f"G{i}": list(draw.choice(list("abcdefgh"), 4, replace=False)) for i in range(10)} | {"ALONE": ["z"]}
    turned = {gene: terms[::-1] for gene, terms in reversed(annotations.items())}
    first, second = go_vectors(annotations, 3), go_vectors(turned, 3)
    one, two = first.frame(), second.frame().loc[first.genes]
    np.testing.assert_allclose(one @ one.T, two @ two.T, atol=1e-4)
    assert not first.frame().loc["ALONE"].any() and first.covered.sum() == 10
    table = pd.DataFrame(
        [(gene, term) for gene, terms in annotations.items() for term in terms], columns=["gene", "term"]
    )
    np.testing.assert_allclose(go_vectors(table, 3).frame().loc[first.genes] @ one.T, one @ one.T, atol=1e-4)


def test_tables_of_annotations_in_both_published_forms_give_the_same_texts(tmp_path):
    annotations = pd.DataFrame(
        [
            ("E1", "GO:2", "IDA"),
            ("E1", "GO:1", "IEA"),
            ("E2", "GO:1", "ND"),
            ("E9", "GO:1", "IDA"),
            ("E1b", "GO:2", "TAS"),
        ],
        columns=["ensembl_id", "term", "evidence"],
    )
    terms = pd.DataFrame([("GO:1", "F", "binding"), ("GO:2", "C", "cytosol")], columns=["term", "aspect", "name"])
    names = {"E1": "JAK2", "E2": "STAT1", "E1b": "JAK2"}
    annotations.to_parquet(tmp_path / "annotations.parquet")
    terms.to_csv(tmp_path / "terms.csv", index=False)
    table = go_annotations(tmp_path / "annotations.parquet", tmp_path / "terms.csv", names=names)
    assert table.attrs == {"genes_without_a_name": 1, "genes": 1, "left_out": 1}
    assert go_texts(table) == {"JAK2": ["Molecular function: binding.", "Cellular component: cytosol."]}
    assert go_texts(table, aspect="C") == {"JAK2": ["Cellular component: cytosol."]}
    assert go_annotations(annotations, terms, names=names, without=["IEA"])["term"].tolist() == ["GO:2"]
    other = pd.DataFrame(
        {
            "gene": ["x", "x"],
            "gene_name": ["JAK2", "JAK2"],
            "ontology_aspect": ["molecular_function", "cellular_component"],
            "direct_class_label": ["binding", "cytosol"],
        }
    )
    assert go_texts(go_annotations(other)) == go_texts(table)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (lambda: go_annotations(pd.DataFrame({"x": [1]})), DataError, "no column for the gene"),
        (lambda: go_annotations(pd.DataFrame({"gene": ["A"], "term": ["t"]})), DataError, "give terms="),
        (
            lambda: go_annotations(
                pd.DataFrame({"gene": ["A"], "term": ["t"]}),
                pd.DataFrame({"term": ["u"], "aspect": ["F"], "name": ["n"]}),
            ),
            DataError,
            "'t' is not described",
        ),
        (lambda: go_annotations("nowhere.csv"), AssetError, "nowhere.csv"),
        (
            lambda: go_texts(pd.DataFrame({"gene": ["A"], "aspect": ["X"], "name": ["n"]})),
            DataError,
            "'X' is not an aspect",
        ),
        (lambda: merge_texts(["A"]), DataError, "source 0 is a list"),
        (lambda: merge_texts({"A": [1]}), DataError, "hold a int"),
        (lambda: tfidf_vectors({"A": "kinase"}), DataError, "1 of 1 genes have a text"),
        (lambda: tfidf_vectors({"A": "kinase", "B": "nucleus"}), DataError, "share no word"),
        (lambda: tfidf_vectors(TEXTS, 99), OptionError, "have at most"),
        (lambda: go_vectors({"A": ["x"], "B": ["y"]}), DataError, "share no term"),
        (lambda: text_vectors(TEXTS, "model", join="sum"), OptionError, "join='sum'"),
        (lambda: text_vectors(["kinase"], "model"), DataError, "texts is a list"),
        (lambda: text_vectors(TEXTS, "no such folder"), AssetError, "does not exist"),
    ],
)
def test_bad_inputs_are_named(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


def test_empty_and_foreign_files_of_texts(tmp_path):
    path = tmp_path / "texts.json"
    path.write_text(json.dumps({"A": "kinase  of", "B": " "}))
    with pytest.warns(ScellfmWarning, match="1 of 2 genes have no text"):
        assert read_texts(path) == {"A": "kinase of"}
    path.write_text(json.dumps({"A": ["kinase"]}))
    with pytest.raises(AssetError, match="not a dictionary of texts"):
        read_texts(path)


PROTEINS = """ID   AAA_HUMAN               Reviewed;         100 AA.
AC   Q00001;
GN   Name=AAA {ECO:0000312|HGNC:HGNC:1}; Synonyms=ZZZ, YYY; ORFNames=XXX;
GN   and
GN   Name=AAB; OrderedLocusNames=WWW;
OS   Homo sapiens (Human).
OX   NCBI_TaxID=9606 {ECO:0000312|Proteomes:UP000005640};
CC   -!- FUNCTION: [Isoform 1]: Cuts long chains
CC       (PubMed:111,
CC       PubMed:222). Needs "zinc" (By similarity). {ECO:0000250|UniProtKB:Q9,
CC       ECO:0000269|PubMed:111}.
CC   -!- FUNCTION: Binds DNA.
CC   ---------------------------------------------------------------------------
CC   Copyrighted by nobody.
CC   ---------------------------------------------------------------------------
DR   EMBL; X; Y; -; mRNA.
//
ID   AAA2_HUMAN              Unreviewed;       100 AA.
GN   Name=AAA;
OX   NCBI_TaxID=9606;
CC   -!- FUNCTION: A guess.
//
ID   AAA_MOUSE               Reviewed;         100 AA.
GN   Name=Aaa;
OX   NCBI_TaxID=10090;
CC   -!- FUNCTION: Of a mouse.
//
ID   CCC_HUMAN               Reviewed;          50 AA.
GN   Name=CCC;
OX   NCBI_TaxID=9606;
CC   -!- SUBUNIT: Alone.
//
"""
FUNCTIONS = (
    'FUNCTION: [Isoform 1]: Cuts long chains (PubMed:111, PubMed:222). Needs "zinc" (By similarity).'
    " {ECO:0000250|UniProtKB:Q9, ECO:0000269|PubMed:111}. FUNCTION: Binds DNA."
)
TABLE = [
    ["Entry", "Reviewed", "Gene Names (primary)", "Organism (ID)", "Function [CC]"],
    ["Q1", "reviewed", "AAA; AAB", "9606", FUNCTIONS],
    ["Q2", "unreviewed", "AAA", "9606", "FUNCTION: A guess."],
    ["Q3", "reviewed", "Aaa", "10090", "FUNCTION: Of a mouse."],
    ["Q4", "reviewed", "CCC", "9606", ""],
]
ROWS = "".join("\t".join(row) + "\n" for row in TABLE)


@pytest.mark.parametrize(
    "name, content", [("p.txt", PROTEINS), ("p.dat.gz", PROTEINS), ("p.tsv", ROWS), ("p.tsv.gz", ROWS)]
)
def test_uniprot_is_read_in_both_forms(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    with pytest.warns(ScellfmWarning, match="1 of 3 genes have no FUNCTION text"):
        found = read_uniprot(path)
    said = ['[Isoform 1]: Cuts long chains. Needs "zinc" (By similarity).', "Binds DNA."]
    assert found == {"AAA": said, "AAB": said}
    with pytest.warns(ScellfmWarning):
        assert read_uniprot(path, unreviewed=True)["AAA"] == [*said, "A guess."]
    assert read_uniprot(path, taxon=10090) == {"Aaa": ["Of a mouse."]}
    with pytest.warns(ScellfmWarning):
        assert set(read_uniprot(path, taxon=None)) == {"AAA", "AAB", "Aaa"}
    with pytest.raises(DataError, match=r"species 7227; it holds \['10090', '9606'\]"):
        read_uniprot(path, taxon=7227)
    assert merge_texts({"AAB": "NCBI."}, found)["AAB"] == ["NCBI.", *said]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("cut.txt", PROTEINS[:-20].encode(), "cut.txt ends inside an entry"),
        ("cut.txt.gz", gzip.compress(PROTEINS.encode())[:-30], "cut.txt.gz cannot be read"),
        ("page.txt", b"<!DOCTYPE html><html></html>", "page.txt is"),
        ("other.tsv", b"gene\ttext\nA\tb\n", "those of UniProt are"),
        ("other.txt", b">sp|Q1|AAA_HUMAN\nMKV\n", "not a file of UniProt"),
        ("latin.txt", PROTEINS.replace("zinc", "z\u00efnc").encode("latin-1"), "cannot be read"),
        ("plain.tsv.gz", ROWS.encode(), "cannot be read"),
    ],
)
def test_files_that_are_not_of_uniprot_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AssetError, match=message):
        read_uniprot(tmp_path / name)
    with pytest.raises(AssetError, match="does not exist"):
        read_uniprot(tmp_path / "nowhere.txt")


@pytest.fixture(scope="module")
def real_table():
    names = json.loads((real_data("geneformer-v2") / "gene_name_id_dict_gc104M.json").read_text())
    folder = real_data("go-texts")
    swapped = {identifier: name for name, identifier in names.items()}
    return go_annotations(folder / "annotations.parquet", folder / "terms.parquet", names=swapped)


def test_real_texts_cover_the_targets_of_norman_and_papalexi(real_table):
    import anndata

    texts = go_texts(real_table)
    norman = anndata.read_h5ad(real_data("norman19") / "norman19_3375x500.h5ad", backed="r")
    papalexi = anndata.read_h5ad(real_data("papalexi21") / "papalexi21_lowmoi.h5ad", backed="r")
    targets = {gene for label in norman.obs["condition"].unique() for gene in label.split("+")} - {"control"}
    assert len(targets) == 31 and targets - set(texts) == {"IER5L"}
    assert sum(gene in texts for gene in norman.var_names) == 441
    assert set(papalexi.obs["top_target"]) - {"non-targeting"} - set(texts) == {"MARCH8"}


def test_a_real_sentence_model_reads_real_texts(real_table):
    texts = {gene: sentences[:4] for gene, sentences in go_texts(real_table, aspect="F").items() if gene in GENES}
    found = text_vectors(texts, real_data("minilm"))
    assert isinstance(found, GeneVectors) and found.width == 384 and set(found.genes) == set(GENES)
    assert found.manifest["scaled"] and found.manifest["limit"] == 256
    unit = found.frame().div(np.linalg.norm(found.values, axis=1), axis=0)
    near = unit @ unit.T
    assert near.loc["JAK1", "JAK2"] > max(near.loc["JAK1", "RPL3"], near.loc["JAK2", "RPS6"])
    assert near.loc["RPL3", "RPS6"] > max(near.loc["RPL3", "JAK2"], near.loc["RPS6", "JAK1"])


GENES = ("JAK1", "JAK2", "RPL3", "RPS6")
