"""What is downloaded is what it says, runs nothing, and is accounted for to the last tensor."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import golden, real_data
from hub_server import Hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scellfm.assets import LoadReport, find, kind_of, load_state, read_dictionary, read_tensors, save_tensors, sha256
from scellfm.assets.dictionaries import read_pickle
from scellfm.assets.files import PINS, known_as
from scellfm.core import AssetError, OptionError, ScellfmWarning

ROOT = Path(__file__).resolve().parent.parent
PYTHONPATH = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))


# ---- files that are not what they seem

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 12345\n"
WRONG = {
    "a git-lfs pointer": (LFS, "git lfs pull"),
    "a web page": (b"\n<!DOCTYPE html><html><body>Please log in</body></html>", "fetch it again"),
    "an empty file": (b"", "fetch it again"),
}


@pytest.mark.parametrize("reader", [read_dictionary, read_tensors])
@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", ["model.safetensors", "best_model.pt", "token_dictionary.pkl", "vocab.json"])
def test_pointers_pages_and_empty_files_are_named(tmp_path, reader, kind, name):
    data, fix = WRONG[kind]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(AssetError, match=f"{name} is {kind} of {len(data)} bytes; .*{fix}"):
        reader(tmp_path / name)


@pytest.mark.parametrize("reader", [read_dictionary, read_tensors])
def test_a_missing_file_says_what_is_there_instead(tmp_path, reader):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(AssetError, match=r"vocabs\.json does not exist; .* holds vocab\.json; check the name"):
        reader(tmp_path / "vocabs.json")
    with pytest.raises(AssetError, match="does not exist; its folder .* does not exist either"):
        reader(tmp_path / "nowhere" / "vocab.json")


def test_a_folder_is_no_dictionary(tmp_path):
    with pytest.raises(AssetError, match="is a folder, not a file"):
        read_dictionary(tmp_path)


@pytest.mark.parametrize(
    "data, kind",
    [
        (b"PK\x03\x04rest", "a zip archive"),
        (b"\x1f\x8brest", "a gzip archive"),
        (b"\x89HDF\r\n\x1a\nrest", "an HDF5 file"),
        (b"\x93NUMPYrest", "a numpy array"),
        (b'  {"a": 1}', "JSON"),
        (b"\xef\xbb\xbf[1]", "JSON"),
        (b"hello", "a file of unknown kind"),
        (pickle.dumps({}), "a pickle"),
    ],
)
def test_a_kind_is_told_from_the_content(tmp_path, data, kind):
    (tmp_path / "any.name").write_bytes(data)
    assert kind_of(tmp_path / "any.name") == kind


# ---- dictionaries

OFFICIAL = [
    ("geneformer-v1", "token_dictionary_gc30M"),
    ("geneformer-v1", "gene_median_dictionary_gc30M"),
    ("geneformer-v2", "token_dictionary_gc104M"),
    ("geneformer-v2", "gene_median_dictionary_gc104M"),
]


@pytest.mark.parametrize("folder, name", OFFICIAL)
def test_the_official_pickles_equal_their_json_copies(folder, name):
    path = real_data(f"{folder}/{name}.pkl")
    found, expected = read_dictionary(path), json.loads(path.with_suffix(".json").read_text())
    assert found == expected and list(found) == list(expected)
    assert {type(value) for value in found.values()} <= {int, float}
    assert known_as(path).startswith("Geneformer V")


@pytest.mark.parametrize("folder, name", OFFICIAL)
def test_a_flipped_bit_in_an_official_dictionary_is_noticed_wherever_it_is(tmp_path, folder, name):
    data = bytearray(real_data(f"{folder}/{name}.pkl").read_bytes())
    for place in (1, 60, len(data) // 2, len(data) - 2):
        damaged = bytearray(data)
        damaged[place] ^= 4
        (tmp_path / f"{name}.pkl").write_bytes(damaged)
        with pytest.raises(AssetError, match=f"{name}.pkl is damaged or was changed: sha256"):
            read_dictionary(tmp_path / f"{name}.pkl")


@pytest.mark.parametrize("folder, name", OFFICIAL)
def test_a_truncated_official_dictionary_is_named(tmp_path, folder, name):
    data = real_data(f"{folder}/{name}.pkl").read_bytes()
    (tmp_path / f"{name}.pkl").write_bytes(data[: len(data) // 2])
    says = rf"{name}\.pkl \(a pickle, \d+ bytes\) cannot be read as a dictionary.*download it again"
    with pytest.warns(ScellfmWarning, match="has the name of the published"), pytest.raises(AssetError, match=says):
        read_dictionary(tmp_path / f"{name}.pkl")


def test_pins_are_hashes_of_the_real_files():
    for folder, name in OFFICIAL:
        path = real_data(f"{folder}/{name}.pkl")
        found = [pin for pin in PINS if pin.name == path.name]
        assert [(pin.sha256, pin.size) for pin in found] == [(sha256(path), path.stat().st_size)]
    for name, pinned in (("vocab", "vocab.json"), ("args", "args.json")):
        path = real_data(f"scgpt/scgpt_human_{name}.json")
        assert known_as(path).startswith("scGPT whole-human")
        assert any(pin.name == pinned and pin.size == path.stat().st_size for pin in PINS)
    assert known_as(real_data("enformer/tf_gammas.pt")) == "Enformer position gammas"


def test_scgpt_vocabulary_is_read():
    vocabulary = read_dictionary(real_data("scgpt/scgpt_human_vocab.json"))
    assert len(vocabulary) == 60697 and vocabulary["<pad>"] == 60694


GOOD = {
    "texts": {"CD3E": "ENSG00000198851", "\u00e9\u4e2d": "x"},
    "numbers": {
        "a": 1,
        "b": -1,
        "c": 2**40,
        "d": 2**100,
        "e": 1.5,
        "f": float("inf"),
        "g": True,
        "h": None,
        "i": 255,
        "j": 65535,
        "k": -(2.0**-1074),
    },
    "integer keys": {0: "ctrl", 1: "stim", -5: "x"},
    "nested": {"weight_map": {"a": "b"}, "empty": {}},
    "many": {f"ENSG{i:011d}": i for i in range(3000)},
    "empty": {},
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("case", GOOD)
def test_plain_dictionaries_are_read_in_every_protocol(case, protocol):
    assert read_pickle(pickle.dumps(GOOD[case], protocol=protocol)) == GOOD[case]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "scalar",
    [
        np.float64(2.5),
        np.float32(0.1),
        np.float16(0.5),
        np.int8(-3),
        np.int16(25425),
        np.int32(7),
        np.int64(-(2**40)),
        np.uint8(200),
        np.uint16(65535),
        np.uint64(2**63),
        np.bool_(True),
        np.str_("T\u00e9"),
        np.array([3.5], ">f8")[0],
        np.array([77], ">i2")[0],
    ],
    ids=repr,
)
def test_numpy_scalars_become_the_same_plain_numbers(scalar, protocol):
    found = read_pickle(pickle.dumps({"x": scalar, "y": scalar}, protocol=protocol))
    assert found == {"x": scalar.item(), "y": scalar.item()} and type(found["x"]) is type(scalar.item())


def test_numpy_scalars_of_numpy_1_are_read():
    data = pickle.dumps({"x": np.float64(2.5)}, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in data and read_pickle(data) == {"x": 2.5}


class Run:
    "A pickle of this calls `function` with `arguments` when it is loaded by the usual means."

    def __init__(self, function, *arguments, state=None):
        self.answer = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.answer


def hostile(canary: Path) -> dict[str, bytes]:
    "Pickles that try to create `canary`, or to break the reader."
    touch, code = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    short = touch.encode()
    dumps = pickle.dumps
    unicode = b"\x8c" + bytes([len(short)]) + short
    recursive: dict = {}
    recursive["self"] = recursive
    laughs: dict = {"a": 1}
    for _ in range(30):
        laughs = {"a": laughs, "b": laughs}
    cases = {f"os.system, protocol {p}": dumps({"x": Run(os.system, touch)}, protocol=p) for p in range(6)}
    cases |= {
        "eval": dumps({"x": Run(eval, code)}),
        "exec": dumps({"x": Run(exec, code)}),
        "open": dumps({"x": Run(open, str(canary), "w")}),
        "as the whole": dumps(Run(os.system, touch)),
        "as a key": dumps({Run(os.system, touch): 1}),
        "nested": dumps({"a": {"b": {"c": Run(os.system, touch)}}}),
        "subprocess": dumps({"x": Run(subprocess.call, ["touch", str(canary)])}),
        "in a dtype": dumps({"x": Run(np.dtype, Run(os.system, touch))}),
        "in a state": dumps({"x": Run(np.dtype, "f8", False, True, state=(3, Run(os.system, touch)))}),
        "numpy loads": dumps({"x": Run(np.load, str(canary), None, True)}),
        "getattr": b"c__builtin__\ngetattr\n(cos\npath\nS'x'\ntR.",
        "a name alone": b"cos\nsystem\n.",
        "a name as a value": b"}X\x01\x00\x00\x00xcos\nsystem\ns.",
        "STACK_GLOBAL": b"\x80\x04}\x8c\x01x\x8c\x02os\x8c\x06system\x93" + unicode + b"\x85Rs.",
        "STACK_GLOBAL of numbers": b"\x80\x04}\x8c\x01xK\x01K\x02\x93" + unicode + b"\x85Rs.",
        "INST": b"(dS'x'\n(S'" + short + b"'\nios\nsystem\ns.",
        "OBJ": b"(dS'x'\n(cos\nsystem\nS'" + short + b"'\nos.",
        "NEWOBJ": b"\x80\x02}X\x01\x00\x00\x00xcos\nsystem\n" + unicode + b"\x85\x81s.",
        "EXT1": b"\x80\x02}X\x01\x00\x00\x00x\x82\x01s.",
        "PERSID": b"}X\x01\x00\x00\x00xPx\ns.",
        "BINPERSID": b"\x80\x02}X\x01\x00\x00\x00xK\x01Qs.",
        "BUILD of a dictionary": b"\x80\x02}}b.",
        "BUILD of a function": b"\x80\x02cnumpy\ndtype\n}X\x08\x00\x00\x00__code__K\x01sb.",
        "REDUCE of a text": b"\x80\x02}X\x01\x00\x00\x00xX\x02\x00\x00\x00osX\x01\x00\x00\x00y\x85Rs.",
        "a dtype as a value": dumps({"x": np.dtype("f8")}),
        "object dtype": dumps({"x": Run(np.dtype, "O")}),
        "scalar of an object": dumps({"x": Run(type(np.float64(1)).__reduce__(np.float64(1))[0], np.dtype("O"), b"x")}),
        "scalar with too few bytes": dumps({"x": Run(np.float64(1).__reduce__()[0], np.dtype("f8"), b"1234")}),
        "scalar with too many bytes": dumps({"x": Run(np.float64(1).__reduce__()[0], np.dtype("f8"), b"1" * 800)}),
        "array": dumps({"x": np.zeros(3)}),
        "list": dumps({"x": [1]}),
        "tuple": dumps({"x": (1,)}),
        "bytes": dumps({"x": b"1"}),
        "set": dumps({"x": {1}}),
        "OrderedDict": dumps(OrderedDict(a=1)),
        "a list": dumps([1]),
        "complex": dumps({"x": 1j}),
        "a text": dumps("hello"),
        "recursive": dumps(recursive),
        "a billion laughs": dumps(laughs),
        "tuple key": dumps({(1, 2): 3}),
        "two objects": b"\x80\x02}}.",
        "nothing": b"\x80\x02.",
        "only a mark": b"(.",
        "memo that is not there": b"\x80\x02}h\x07s.",
        "stack too short": b"\x80\x02}s.",
        "mark missing": b"\x80\x02}u.",
        "odd items": b"\x80\x02}(K\x01u.",
        "mark as a value": b"\x80\x02}K\x01(s.",
        "memo of nothing": b"\x80\x04\x94.",
        "memo swap": b"\x80\x02cos\nsystem\nq\x00}q\x00h\x00.",
        "a text of 4 GB that is not there": b"\x80\x04}X\xff\xff\xff\xffabc",
        "a number of 2 GB that is not there": b"\x80\x02}\x8b\xff\xff\xff\x7f1",
        "a long number": b"(dS'x'\nI" + b"9" * 100000 + b"\ns.",
        "unknown instruction": b"\x80\x02}\xffs.",
        "noise": bytes(range(1, 200)),
        "frame of lies": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",
        "function hidden in a tuple": dumps({"x": (os.system, touch)}),
        "codecs": dumps({"x": Run(__import__("codecs").encode, "x", "rot13")}),
        "dtype of dtype": b"\x80\x02}X\x01\x00\x00\x00xcnumpy\ndtype\ncnumpy\ndtype\nX\x02\x00\x00\x00f8\x85R\x85Rs.",
        "deep marks": b"(" * 100000 + b".",
        "deep tuples": b"\x80\x02}X\x01\x00\x00\x00x)" + b"\x85" * 100000 + b"s.",
    }
    return cases


@pytest.mark.parametrize("case", hostile(Path("/nowhere/canary")))
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path, monkeypatch, case):
    canary = tmp_path / "canary"
    data = hostile(canary)[case]
    (tmp_path / "token_dictionary.pkl").write_bytes(data)
    for name in ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler"):
        monkeypatch.setattr(pickle, name, None)  # nothing here unpickles at all
    if case == "frame of lies":  # a frame is only a hint for buffering: what is in it is an empty dictionary
        assert read_dictionary(tmp_path / "token_dictionary.pkl") == {}
    else:
        with pytest.raises(AssetError, match="token_dictionary.pkl"):
            read_dictionary(tmp_path / "token_dictionary.pkl")
    assert not canary.exists()


@pytest.mark.parametrize(
    "case",
    [
        "os.system, protocol 0",
        "os.system, protocol 5",
        "eval",
        "nested",
        "STACK_GLOBAL",
        "INST",
        "OBJ",
    ],
)
def test_the_hostile_pickles_of_these_tests_do_work(tmp_path, case):
    "They create the canary when loaded by the usual means; else the test above would show nothing."
    code = "import pickle, sys\ntry: pickle.loads(sys.stdin.buffer.read())\nexcept Exception: pass"
    subprocess.run([sys.executable, "-c", code], input=hostile(tmp_path / "canary")[case])
    assert (tmp_path / "canary").exists()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.tuples(st.integers(0, 400), st.integers(0, 255)))
def test_whatever_the_bytes_the_answer_is_a_dictionary_or_an_asset_error(tmp_path, noise):
    "Random bytes, and one changed byte in a good pickle."
    good = bytearray(pickle.dumps({"ENSG1": np.float64(1.5), "ENSG2": 2, "ENSG3": {"a": "b"}}, protocol=4))
    if isinstance(noise, tuple):
        good[noise[0] % len(good)] = noise[1]
        noise = bytes(good)
    (tmp_path / "x.pkl").write_bytes(noise)
    try:
        assert type(read_dictionary(tmp_path / "x.pkl")) is dict
    except AssetError as error:
        assert "x.pkl" in str(error)


@pytest.mark.parametrize(
    "text, says",
    [
        ("[1, 2]", "JSON with a list, not a dictionary"),
        ('{"a": 1', "cannot be read as a dictionary"),
        ('{"a": 1}}', "cannot be read as a dictionary"),
        ('{"a": ' * 100000, "cannot be read as a dictionary"),
    ],
)
def test_json_that_is_cut_or_no_dictionary_is_named(tmp_path, text, says):
    (tmp_path / "vocab.json").write_text(text)
    with pytest.raises(AssetError, match=f"vocab.json.*{says}"):
        read_dictionary(tmp_path / "vocab.json")


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "vocab.json").write_bytes(b'\xef\xbb\xbf{"\xc3\xa9": 1}')
    assert read_dictionary(tmp_path / "vocab.json") == {"\u00e9": 1}


# ---- tensors

STATE = {
    "encoder.weight": torch.arange(600.0).reshape(30, 20),
    "encoder.bias": torch.arange(30),
    "half": torch.ones(3, dtype=torch.bfloat16),
}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def sharded(folder: Path, suffix: str) -> Path:
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    for number, name in enumerate(STATE):
        part = folder / f"{stem}-{number}.{suffix}"
        save_tensors(part, {name: STATE[name]}) if suffix == "safetensors" else torch.save({name: STATE[name]}, part)
    index = folder / f"{stem}.{suffix}.index.json"
    places = {name: f"{stem}-{number}.{suffix}" for number, name in enumerate(STATE)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: save_tensors(folder / "model.safetensors", STATE),
        lambda folder: save_tensors(folder / "other.safetensors", STATE),
        lambda folder: torch.save(STATE, folder / "pytorch_model.bin"),
        lambda folder: torch.save(OrderedDict(STATE), folder / "best_model.pt"),
        lambda folder: torch.save({"model_state_dict": STATE, "epoch": 3}, folder / "x.pt"),
        lambda folder: torch.save({"state_dict": STATE}, folder / "x.ckpt"),
        lambda folder: torch.save(STATE, folder / "old.pth", _use_new_zipfile_serialization=False),
        lambda folder: sharded(folder, "safetensors"),
        lambda folder: sharded(folder, "bin"),
    ],
    ids=["safetensors", "other name", "bin", "pt", "wrapped", "lightning", "legacy", "sharded", "sharded bin"],
)
def test_every_layout_gives_the_same_tensors_and_names_its_files(tmp_path, make):
    make(tmp_path)
    found = read_tensors(tmp_path)
    assert same(found, STATE)
    assert found.files and all(digest == sha256(path) for path, digest in found.files.items())


def test_safetensors_are_preferred(tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    save_tensors(tmp_path / "model.safetensors", STATE)
    assert same(read_tensors(tmp_path), STATE)


def test_a_folder_without_or_with_too_many_weights_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AssetError, match="has no weights .*holds config.json"):
        read_tensors(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save(STATE, tmp_path / name)
    with pytest.raises(AssetError, match=r"several files of weights \(a.pt, b.pt\); name one"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "best_model.pt", "legacy.pth"])
@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.9, 0.999])
def test_truncated_checkpoints_are_named(tmp_path, name, share):
    path = tmp_path / name
    if name == "model.safetensors":
        save_tensors(path, STATE)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=name != "legacy.pth")
    data = path.read_bytes()
    path.write_bytes(data[: max(1, int(share * len(data)))])
    with pytest.raises(AssetError, match=f"{name}.*(damaged|incomplete|whole)"):
        read_tensors(path)


@pytest.mark.parametrize("place", [0, 3, 7, 8, 9, 20, 60, 100])
def test_a_flipped_bit_in_a_safetensors_header_is_noticed_or_harmless_to_shapes(tmp_path, place):
    save_tensors(tmp_path / "model.safetensors", STATE)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[place] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    try:
        found = read_tensors(tmp_path)
    except AssetError as error:
        assert re.search("model.safetensors.*(damaged|incomplete|whole)", str(error))
    else:  # a letter of a name: the accounting finds it
        assert found.keys() != STATE.keys()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), value=st.integers(0, 255), format=st.sampled_from(["safetensors", "pt", "pth"]))
def test_any_changed_byte_gives_tensors_or_an_asset_error(tmp_path, place, value, format):
    path = tmp_path / f"model.{format}"
    if format == "safetensors":
        save_tensors(path, STATE)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=format == "pt")
    data = bytearray(path.read_bytes())
    data[place % len(data)] = value
    path.write_bytes(data)
    try:
        assert all(isinstance(tensor, torch.Tensor) for tensor in read_tensors(path).values())
    except AssetError as error:
        assert path.name in str(error)


class LoadsState:
    def __init__(self, canary):
        self.canary = str(canary)

    def __setstate__(self, state):
        Path(state["canary"]).touch()


def hostile_checkpoints(folder: Path, canary: Path) -> None:
    "Files that create the canary when loaded the old way."
    payload = Run(os.system, f"touch {canary}")
    torch.save({**STATE, "x": payload}, folder / "value.pt")
    torch.save(payload, folder / "whole.pt")
    torch.save({**STATE, "x": payload}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": STATE, "hyper_parameters": LoadsState(canary)}, folder / "wrapped.ckpt")
    torch.save(torch.nn.Linear(2, 2), folder / "module.pt")
    (folder / "plain_pickle.bin").write_bytes(pickle.dumps({**STATE, "x": payload}))
    (folder / "eval.bin").write_bytes(pickle.dumps(Run(eval, f"open({str(canary)!r}, 'w')")))
    torch.jit.script(torch.nn.Linear(2, 2)).save(folder / "script.pt")
    with zipfile.ZipFile(folder / "crafted.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(payload, protocol=2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("../escape", "x")


HOSTILE = [
    "value.pt",
    "whole.pt",
    "legacy.pt",
    "wrapped.ckpt",
    "module.pt",
    "plain_pickle.bin",
    "eval.bin",
    "script.pt",
    "crafted.pt",
]


@pytest.mark.filterwarnings("ignore")  # torch tells of old formats
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoints_are_refused_and_run_nothing(tmp_path, name):
    canary, folder = tmp_path / "canary", tmp_path / "model"
    folder.mkdir()
    hostile_checkpoints(folder, canary)
    with pytest.raises(AssetError, match=name):
        read_tensors(folder / name)
    assert not canary.exists() and not (tmp_path / "escape").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "best_model.pt", "model.safetensors"])
def test_a_hostile_file_under_an_official_name_is_refused_in_its_folder(tmp_path, name):
    torch.save({"x": Run(os.system, f"touch {tmp_path}/canary")}, tmp_path / name)
    with pytest.raises(AssetError, match=name):
        read_tensors(tmp_path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.filterwarnings("ignore")
def test_the_hostile_checkpoints_of_these_tests_do_work(tmp_path):
    hostile_checkpoints(tmp_path, tmp_path / "canary")
    torch.load(tmp_path / "value.pt", weights_only=False)
    assert (tmp_path / "canary").exists()


def test_an_old_torch_reads_no_torch_files(tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "best_model.pt")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(AssetError, match=r"cannot be read safely by torch 2\.5\.1.*torch>=2\.6"):
        read_tensors(tmp_path)


def test_what_is_no_state_dict_is_named(tmp_path):
    for content, says in (
        (torch.zeros(2), "a Tensor"),
        ({"a": 1, "b": torch.zeros(1)}, "a is a int"),
        ({}, "it is empty"),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(AssetError, match="x.pt is .*not a state dict.*save model.state_dict") as caught:
            read_tensors(tmp_path / "x.pt")
        assert says in str(caught.value)


@pytest.mark.parametrize(
    "place", ["../model-0.safetensors", "/etc/passwd", "..", "sub/model-0.safetensors", "model-9.safetensors", 5]
)
def test_an_index_names_only_files_beside_itself(tmp_path, place):
    (tmp_path / "m").mkdir()
    index = sharded(tmp_path / "m", "safetensors")
    save_tensors(tmp_path / "model-0.safetensors", {"encoder.weight": STATE["encoder.weight"]})
    listed = json.loads(index.read_text())
    listed["weight_map"]["encoder.weight"] = place
    index.write_text(json.dumps(listed))
    with pytest.raises(AssetError, match="weight_map|model-9.safetensors does not exist"):
        read_tensors(tmp_path / "m")


def test_an_index_that_disagrees_with_its_shards_is_named(tmp_path):
    index = sharded(tmp_path, "safetensors")
    listed = json.loads(index.read_text())
    listed["weight_map"]["extra"] = listed["weight_map"].pop("half")
    index.write_text(json.dumps(listed))
    with pytest.raises(AssetError, match=r"disagree on 2 tensors \(extra, half\)"):
        read_tensors(tmp_path)


def test_saved_tensors_come_back_and_bytes_are_the_same(tmp_path):
    tied = {
        **STATE,
        "tied": STATE["encoder.weight"],
        "view": STATE["encoder.weight"][:, ::2],
        "empty": torch.zeros(0, 3),
    }
    for name in ("one", "two"):
        save_tensors(tmp_path / name, tied)
    assert same(read_tensors(tmp_path / "one"), tied)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_saving_on_a_full_disk_is_a_store_error_and_leaves_the_old_file(tmp_path):
    code = """
import resource, sys, torch
from scellfm.assets import save_tensors
from scellfm.core import StoreError
save_tensors(sys.argv[1], {"x": torch.zeros(4)})
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    save_tensors(sys.argv[1], {"x": torch.zeros(10**5)})
except StoreError as error:
    print(error)
"""
    process = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model.safetensors"], capture_output=True, text=True, cwd=ROOT
    )
    assert "model.safetensors could not be written" in process.stdout
    assert read_tensors(tmp_path)["x"].shape == (4,) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("system, folder", [("geneformer", "model_v1"), ("geneformer", "model_v2"), ("scgpt", "model")])
def test_the_originals_checkpoints_are_read(system, folder):
    path = golden(system) / folder
    if not path.exists():
        pytest.skip(f"{path} is not here")
    assert all(tensor.isfinite().all() for tensor in read_tensors(path).values())


# ---- accounting


class Net(torch.nn.Module):
    def __init__(self, genes=5, classes=2):
        super().__init__()
        self.embedding = torch.nn.Embedding(genes, 4)
        self.head = torch.nn.Linear(4, classes)
        self.register_buffer("positions", torch.arange(genes))


class TiedNet(Net):
    def __init__(self):
        super().__init__(classes=5)
        self.head.weight = self.embedding.weight


def trained(net=Net, **kwargs) -> dict:
    torch.manual_seed(1)
    return {name: tensor.clone() for name, tensor in net(**kwargs).state_dict().items()}


def untouched(act, net=None):
    "Run `act` on a module, expect an AssetError, and see that no number of the module has changed."
    net = net or Net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(AssetError) as caught:
        act(net)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    return str(caught.value)


def test_a_whole_checkpoint_is_loaded_and_reported():
    net, state = Net(), trained()
    report = load_state(net, state)
    assert all(torch.equal(net.state_dict()[name], state[name]) for name in state)
    assert sorted(report.loaded) == sorted(state) and report.unused == report.fresh == report.tied == []


def test_every_leftover_and_every_gap_is_listed():
    state = trained()
    state["head.wieght"] = state.pop("head.weight")
    state["cls.bias"] = torch.zeros(3)
    message = untouched(lambda net: load_state(net, state))
    assert "head.wieght, cls.bias" in message and "1 is in the model but not in the checkpoint: head.weight" in message


def test_announced_leftovers_and_gaps_are_named_in_the_report():
    state = trained() | {"cls.bias": torch.zeros(3)}
    del state["head.weight"], state["head.bias"]
    net = Net()
    head = net.head.weight.clone()
    report = load_state(net, state, ignore=("cls.",), fresh=("head.",))
    assert report.unused == ["cls.bias"] and report.fresh == ["head.weight", "head.bias"]
    assert torch.equal(net.head.weight, head) and torch.equal(net.embedding.weight, state["embedding.weight"])


def test_shapes_that_do_not_fit_are_listed_with_both():
    message = untouched(lambda net: load_state(net, trained(genes=7, classes=3)))
    for name, found, wanted in (
        ("embedding.weight", "(7, 4)", "(5, 4)"),
        ("head.bias", "(3,)", "(2,)"),
        ("positions", "(7,)", "(5,)"),
    ):
        assert f"{name} (checkpoint {found}, model {wanted})" in message


def test_a_fresh_head_does_not_excuse_a_wrong_shape_alone():
    assert "head.weight" in untouched(lambda net: load_state(net, trained(classes=3), fresh=("head.",)))
    report = load_state(Net(), trained(classes=3), fresh=("head.",), ignore=("head.",))
    assert sorted(report.unused) == sorted(report.fresh) == ["head.bias", "head.weight"]


def test_a_head_that_fits_is_loaded_even_if_it_might_have_been_fresh():
    report = load_state(Net(), trained(), fresh=("head.",), ignore=("head.",))
    assert report.fresh == [] and "head.weight" in report.loaded


@pytest.mark.parametrize(
    "rename",
    [
        {"bert.": "", "bert.head": "head"},
        lambda name: name.removeprefix("bert."),
        {"bert.": "", "unused.rule": "x"},
    ],
)
def test_names_are_translated_by_rules_or_a_function(rename):
    report = load_state(Net(), {f"bert.{name}": tensor for name, tensor in trained().items()}, rename=rename)
    assert sorted(report.loaded) == sorted(trained())


def test_two_tensors_for_one_name_are_an_error():
    state = trained() | {"bert.head.bias": torch.zeros(2)}
    assert "'head.bias' and 'bert.head.bias' of the checkpoint would both become 'head.bias'" in untouched(
        lambda net: load_state(net, state, rename={"bert.": ""})
    )


@pytest.mark.parametrize("present", ["embedding.weight", "head.weight"])
def test_one_name_of_tied_weights_fills_both(present):
    state = trained(TiedNet)
    absent = {"embedding.weight": "head.weight", "head.weight": "embedding.weight"}[present]
    del state[absent]
    net = TiedNet()
    report = load_state(net, state)
    assert torch.equal(net.head.weight, state[present]) and net.head.weight is net.embedding.weight
    assert report.tied == [absent] and report.fresh == []


def test_tied_weights_that_differ_in_the_checkpoint_are_an_error():
    assert load_state(TiedNet(), trained(TiedNet)).tied == []
    state = trained(TiedNet)
    state["head.weight"] = state["head.weight"] + 1
    assert "embedding.weight and head.weight" in untouched(lambda net: load_state(net, state), TiedNet())


def test_conversions_are_counted_and_kinds_of_numbers_not_mixed():
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in trained().items()}
    assert load_state(Net(), half).casts == {"float16 to float32": 3}
    assert "embedding.weight (checkpoint torch.int64, model torch.float32)" in untouched(
        lambda net: load_state(net, trained() | {"embedding.weight": torch.zeros(5, 4, dtype=torch.int64)})
    )


def test_a_module_without_memory_is_refused():
    with torch.device("meta"):
        net = Net()
    with pytest.raises(OptionError, match="device 'meta'"):
        load_state(net, trained())


def test_gradients_and_the_modules_own_tensors_are_kept():
    net = Net()
    parameter = net.embedding.weight
    load_state(net, trained())
    assert net.embedding.weight is parameter and parameter.requires_grad and parameter.grad is None


def test_the_report_prints_all_names_and_the_hash(tmp_path):
    save_tensors(tmp_path / "model.safetensors", trained() | {"<cls>.bias": torch.zeros(3)})
    report = load_state(Net(), read_tensors(tmp_path), ignore=("<cls>.",))
    for text in (str(report), repr(report)):
        assert "4 tensors" in text and "<cls>.bias" in text and sha256(tmp_path / "model.safetensors") in text
    html = report._repr_html_()
    assert "&lt;cls&gt;.bias" in html and "<cls>" not in html and html.startswith("<table>")
    known = LoadReport([], files={Path("gone/tokens.pkl"): PINS[0].sha256})
    assert f"tokens.pkl, {PINS[0].what}, sha256 {PINS[0].sha256}" in str(known)


# ---- the hub

FIND = """
import json, sys, warnings
from scellfm.assets import find
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        path = find(**json.loads(sys.argv[1]))
    except Exception as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
    else:
        files = [p.relative_to(path).as_posix() for p in sorted(path.rglob("*")) if p.is_file()]
        print(json.dumps({"path": str(path), "files": files, "from": [w.filename for w in caught],
                          "warnings": [f"{w.category.__name__}: {w.message}" for w in caught]}))
"""
WEIGHTS = bytes(range(256)) * 100
REPOSITORY = {
    "config.json": b'{"model_type": "bert"}',
    "model.safetensors": WEIGHTS,
    "V1/config.json": b"{}",
    "V1/model.safetensors": WEIGHTS[:999],
    "V1/old/model.safetensors": b"old",
    "geneformer/tokens.pkl": pickle.dumps({"<pad>": 0}),
}


def ask(url: str, home: Path, environment=(), **arguments) -> dict:
    "Call `find` in a process of its own, whose hub is `url` and whose caches are in `home`."
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    variables |= {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home / "hf"),
        "SCELLFM_CACHE": str(home / "scellfm"),
        "PYTHONPATH": PYTHONPATH,
        "NO_PROXY": "127.0.0.1",
        **dict(environment),
    }
    process = subprocess.run(
        [sys.executable, "-c", FIND, json.dumps(arguments)], env=variables, capture_output=True, text=True
    )
    assert process.stdout, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture
def hub():
    with Hub({"org/model": dict(REPOSITORY)}) as server:
        yield server


def test_a_repository_is_fetched_and_then_found_without_a_network(hub, tmp_path):
    first = ask(hub.url, tmp_path, path_or_hub_id="org/model")
    assert first["files"] == ["config.json", "model.safetensors"]
    (warning,) = first["warnings"]
    assert warning.startswith("ScellfmWarning: org/model: no revision is given")
    assert first["from"] == ["<string>"]  # the warning points at the line that called find
    hub.requests.clear()
    for offline in ({"local_files_only": True}, {"environment": {"HF_HUB_OFFLINE": "1"}}):
        again = ask(hub.url, tmp_path, path_or_hub_id="org/model", revision="main", **offline)
        assert again["path"] == first["path"] and again["warnings"] == []
    assert hub.requests == []
    gone = ask("http://127.0.0.1:9", tmp_path, path_or_hub_id="org/model", revision=hub.commit("org/model"))
    assert gone["files"] == first["files"]


def test_a_subfolder_and_a_pinned_revision(hub, tmp_path):
    found = ask(hub.url, tmp_path, path_or_hub_id="org/model", subfolder="V1", revision=hub.commit("org/model"))
    assert found["files"] == ["config.json", "model.safetensors"] and found["path"].endswith("/V1")
    assert found["warnings"] == []
    fetched = [path for command, path, _ in hub.requests if command == "GET" and "/resolve/" in path]
    assert sorted(path.split("/")[-2] for path in fetched) == ["V1", "V1"]  # nothing but what was asked for


def test_patterns_choose_files(hub, tmp_path):
    found = ask(hub.url, tmp_path, path_or_hub_id="org/model", revision="main", patterns=["*.json"])
    assert found["files"] == ["V1/config.json", "config.json"]


def test_a_connection_that_is_cut_is_taken_up_where_it_broke(hub, tmp_path):
    hub.repositories["org/model"]["model.safetensors"] = os.urandom(2**10) * 24 * 2**10  # hub's pieces are 10 MB
    hub.cut = {"model.safetensors": 1}
    found = ask(hub.url, tmp_path, path_or_hub_id="org/model", revision="main")
    path = Path(found["path"]) / "model.safetensors"
    assert path.read_bytes() == hub.repositories["org/model"]["model.safetensors"]
    ranges = [part for command, file, part in hub.requests if command == "GET" and file.endswith("/model.safetensors")]
    assert ranges[0] is None and ranges[1] is not None and ranges[1] != "bytes=0-"


def test_a_connection_that_is_always_cut_is_an_error_and_can_be_resumed_later(hub, tmp_path):
    hub.cut = {"model.safetensors": 100}
    found = ask(hub.url, tmp_path, path_or_hub_id="org/model", revision="main")
    assert found["error"] == "AssetError" and "broke off" in found["message"] and "run again" in found["message"]
    hub.cut = {}
    assert ask(hub.url, tmp_path, path_or_hub_id="org/model", revision="main")["files"] == [
        "config.json",
        "model.safetensors",
    ]


def test_a_busy_server_is_asked_again(hub, tmp_path):
    hub.busy = 2
    assert ask(hub.url, tmp_path, path_or_hub_id="org/model", revision="main")["files"] == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_other_bytes_than_announced_are_refused_put_aside_and_fetched_anew(hub, tmp_path, file):
    hub.altered = {file: REPOSITORY[file][::-1]}
    found = ask(hub.url, tmp_path, path_or_hub_id="org/model", revision="main")
    assert found["error"] == "AssetError"
    assert re.search(f"{file} differs from the published file.*run again to download it again", found["message"])
    hub.altered = {}
    found = ask(hub.url, tmp_path, path_or_hub_id="org/model", revision="main")
    assert (Path(found["path"]) / file).read_bytes() == REPOSITORY[file]


def test_a_bit_that_flips_in_the_cache_is_noticed_offline(hub, tmp_path):
    found = ask(hub.url, tmp_path, path_or_hub_id="org/model", revision="main")
    path = Path(found["path"]) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[500] ^= 16
    path.write_bytes(data)
    found = ask(hub.url, tmp_path, path_or_hub_id="org/model", revision="main", local_files_only=True)
    assert found["error"] == "AssetError" and "differs from the published file" in found["message"]


def test_a_moved_main_is_told_at_the_next_use(hub, tmp_path):
    ask(hub.url, tmp_path, path_or_hub_id="org/model", revision="main")
    hub.repositories["org/model"]["config.json"] = b'{"model_type": "gpt"}'
    found = ask(hub.url, tmp_path, path_or_hub_id="org/model", revision="main")
    (warning,) = found["warnings"]
    assert "has changed since its first use: config.json (first used 20" in warning
    assert ask(hub.url, tmp_path, path_or_hub_id="org/model", revision="main")["warnings"] == []


def test_other_contents_of_one_commit_are_an_error(hub, tmp_path):
    commit = hub.commit("org/model")
    ask(hub.url, tmp_path, path_or_hub_id="org/model", revision=commit)
    notes = json.loads((tmp_path / "scellfm" / "hub.json").read_text())
    notes[f"org/model@{commit}"]["config.json"][0] = "0" * 64
    (tmp_path / "scellfm" / "hub.json").write_text(json.dumps(notes))
    found = ask(hub.url, tmp_path, path_or_hub_id="org/model", revision=commit)
    assert found["error"] == "AssetError" and "is a fixed commit, but its content has changed" in found["message"]


def test_what_cannot_be_had_says_why(hub, tmp_path):
    hub.closed = {"org/gated": (403, "GatedRepo"), "org/private": (401, "")}
    for arguments, says in (
        ({"path_or_hub_id": "org/none"}, r"no repository of that name is open to you (HTTP 404); check its name"),
        ({"path_or_hub_id": "org/private"}, "check its name, or log in"),
        ({"path_or_hub_id": "org/gated"}, f"it is gated: accept its conditions at {hub.url}/org/gated"),
        ({"path_or_hub_id": "org/model", "revision": "v9"}, "it has no revision 'v9'"),
        ({"path_or_hub_id": "org/model", "revision": "main", "subfolder": "V9"}, "has no files V9/*"),
        ({"path_or_hub_id": "org/new", "local_files_only": True}, "is not in the cache"),
        ({"path_or_hub_id": "org/new", "environment": {"HF_HUB_OFFLINE": "1"}}, "fetch it once with a network"),
        ({"path_or_hub_id": "org/a--b"}, "nor a valid hub id"),
    ):
        found = ask(hub.url, tmp_path, **arguments)
        assert found["error"] == "AssetError"
        assert says in found["message"] and arguments["path_or_hub_id"] in found["message"]


def test_a_hub_that_is_not_there_says_so(tmp_path):
    found = ask("http://127.0.0.1:9", tmp_path, path_or_hub_id="org/model")
    assert found["error"] == "AssetError"
    assert re.search("127.0.0.1:9 could not be reached.*refused", found["message"])


def test_a_login_page_in_place_of_the_hub_is_an_asset_error(tmp_path):
    "A proxy that answers everything with 200 and a web page."
    with Hub({}) as proxy:
        proxy.answer = lambda request: proxy.send(request, 200, b"<!doctype html><html>log in</html>")
        found = ask(proxy.url, tmp_path, path_or_hub_id="org/model", revision="main")
    assert found["error"] == "AssetError" and "could not be reached or the connection broke off" in found["message"]


def test_caches_that_cannot_be_written(hub, tmp_path):
    "No one, root included, can make a folder in /proc."
    found = ask(hub.url, tmp_path, path_or_hub_id="org/model", environment={"HF_HOME": "/proc/nowhere"})
    assert found["error"] == "AssetError"
    assert re.search("could not be written.*HF_HOME", found["message"])
    found = ask(
        hub.url, tmp_path, path_or_hub_id="org/model", revision="main", environment={"SCELLFM_CACHE": "/proc/nowhere"}
    )
    assert found["files"] == ["config.json", "model.safetensors"]


# ---- folders


def test_a_local_folder_or_file_is_found_as_it_is(tmp_path):
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "org" / "model" / "x.pt").touch()
    assert find(tmp_path / "org" / "model") == tmp_path / "org" / "model"
    assert find(str(tmp_path / "org"), subfolder="model") == tmp_path / "org" / "model"
    assert find(tmp_path / "org" / "model" / "x.pt") == tmp_path / "org" / "model" / "x.pt"


def test_a_local_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find("org/model") == Path("org/model")


@pytest.mark.parametrize("wrong", ["./org/model", "/nowhere/model", "model", "a/b/c", "~/no/such/folder", "../x"])
def test_a_path_that_does_not_exist_is_no_hub_id(tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssetError, match="does not exist, and is not a hub id like"):
        find(wrong)


def test_an_empty_path_is_named():
    with pytest.raises(OptionError, match="path_or_hub_id='' is empty"):
        find("")


def test_a_missing_subfolder_says_which_there_are(tmp_path):
    (tmp_path / "V1-10M").mkdir()
    with pytest.raises(AssetError, match="has no 'V1'; .* holds V1-10M"):
        find(tmp_path, subfolder="V1")
