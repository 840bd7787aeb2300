"""Whatever stands in the place of an argument: our error or a result; never an error of Python's, never a hang (D)."""

import odd_arguments
import pytest

pytestmark = pytest.mark.filterwarnings("ignore")

CLASS_WEIGHTS = "-1, True, bytes, a list of None, a function, a path"
WINDOWS = "0, 2.5, True, empty text, bytes, a list of numbers, no dictionary, an object, a table, a path, no cells"
NO_NAMES = "-1, 2.5, True, an object, a function, a path"

FOUND = {  # what once ended in an error of Python's, by door and argument
    "match_genes": {
        "ids_or_adata": "-1, 2.5, an array",
        "counts": "a dictionary, a path",
        "vocabulary": "None, 2.5, another text, an object, a path",
    },
    "RankTokenizer.fit": {"adata": "None, no list, 2.5, a dictionary, an array, a path"},
    "tokenize_files": {"columns": "None, 2.5", "path_or_folder": "None, no list, 2.5"},
    "Geneformer.from_config": {"device": "True, a dictionary, a path", "tokenizer": "None, no cells"},
    "embed": {
        "data": "None, no list, 2.5, a dictionary, an array",
        "key_added": "2.5, empty text",
        "emb_layer": "no list",
    },
    "finetune": {
        "class_weights": CLASS_WEIGHTS,
        "label": "an array, an object",
        "lora": "10**12",
        "split": "None, 2.5",
    },
    "finetune tasks": {
        "class_weights": CLASS_WEIGHTS,
        "label": "-1, an array, a function",
        "task_weights": "True, a path, a list of None",
    },
    "finetune_genes": {"class_weights": CLASS_WEIGHTS, "data": "no list, a list of None"},
    "search": {"space": "another text, bytes, a list of None, a list of texts, an object"},
    "perturb": {"alt": "nan, 10**12, a function, a path, a table", "genes": "None, 2.5, a function, a path"},
    "perturb by gradient": {"model_of": "True, a list of None, a dictionary, an object, a function"},
    "predict": {"data": "None, a list of None, a list of numbers, 2.5"},
    "predict tasks": {"data": "a list of None, a list of numbers"},
    "predict genes": {"data": "no list, a list of None", "genes": "2.5, True, a path"},
    "recover": {"known": NO_NAMES},
    "screen_test": {"log2fc": "nan, a function, a path"},
    "log2_fold_change": {
        "genes": "10**12, bytes, a list of None, a list of numbers, a path",
        "mask": "an array",
        "state": "empty text, no list",
    },
    "ScGPT.from_config": {
        "device": "nan, no list, a list of texts, a dictionary, an object",
        "n_layers": "nan, another text, a list of texts, a function, 10**12",
        "dropout": "-1, another text, no list",
    },
    "scGPT embed": {"adata": "None, no list, 2.5, a dictionary, a table", "key_added": "2.5, empty text"},
    "ReferenceMap": {
        "use_rep": "no list, a list of texts",
        "label": "no dictionary, a list of texts",
        "min_confidence": "another text, a dictionary, None",
        "max_distance": "another text, a function, nan",
    },
    "integration": {"adata": "None, no list, 2.5", "batch": "no list"},
    "classification": {
        "classes": "-1, 2.5, None, another text, an array",
        "truth": "None, another text, an object",
        "groups": "-1, another text",
        "probabilities": "None, another text, an object, a list of None",
    },
    "hold_out": {"adata": "None, no list, 2.5, a dictionary"},
    "PerturbationData": {
        "control": "10**12, a function, a path",
        "layer": "a list of None, no dictionary, a table",
        "normalize": "an array, a table",
        "cell_type": "a table",
    },
    "split": {"kind": "no list, a list of texts, a list of numbers, an array, None"},
    "ScGenePT.from_config": {
        "d_model": "a function, a path, nan, 10**12",
        "n_heads": "a path, 0",
        "d_hid": "no list, a list of numbers, a dictionary",
        "n_layers": "nan, another text, a list of texts, a function",
    },
    "ScGenePT.evaluate": {"metrics": "a table, an object", "baselines": "10**12, True, an object, a function, a path"},
    "rosa embed_genes": {"windows": WINDOWS, "tracks": "2.5, an object", "shifts": "10**12"},
    "embed_bins": {"windows": WINDOWS},
    "variant_effect": {"windows": WINDOWS, "model": "None, True, a list of None, a path, an array"},
    "hold_out_grid": {"context": "a function", "held_cells": "-1"},
    "Rosa.fit": {"layer": "a table", "grid": "None, another text", "adata": "None, a list of numbers"},
    "Rosa.predict": {"genes": f"nan, no list, no cells, {NO_NAMES}"},
    "ridge predict": {"genes": f"10**12, {NO_NAMES}"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return odd_arguments.World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("door", FOUND)
def test_an_argument_of_another_kind_is_named(world, door):
    trials = [(name, odd) for name, odds in FOUND[door].items() for odd in odds.split(", ")]
    said = {f"{name}={odd}": odd_arguments.outcome(world, door, name, odd) for name, odd in trials}
    assert {trial: words for trial, words in said.items() if not words.startswith("ours: ")} == {}


@pytest.mark.slow
@pytest.mark.parametrize("door", [*FOUND, *odd_arguments.OTHERS])
def test_every_odd_argument_is_named_or_taken(world, door):
    said = odd_arguments.outcome(world, door, None, None)
    assert said == "content", f"{door} with its arguments as they should be: {said}"
    said = {trial[1:]: odd_arguments.outcome(world, *trial) for trial in odd_arguments.trials(world, door)}
    assert {trial: words for trial, words in said.items() if not odd_arguments.is_fine(words)} == {}
