"""Files are whole or absent; a run resumes to the same bytes; what changed is named."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scellfm.core import OptionError, ScellfmWarning, StoreError
from scellfm.store import FolderKind, Store, atomic_write, fingerprint, sha256
from scellfm.store.writers import _host, sweep

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, *arguments, **kwargs) -> subprocess.Popen:
    "A python process that runs `code`."
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "random"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- atomic writes


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    with atomic_write(tmp_path / "deep" / "genes.txt") as path:
        path.write_text("JAK3")
        assert path.parent == tmp_path / "deep" and not (tmp_path / "deep" / "genes.txt").exists()
    assert contents(tmp_path / "deep") == {"genes.txt": b"JAK3"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, StoreError])
def test_an_error_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "genes.txt").write_text("JAK3")
    with pytest.raises(error), atomic_write(tmp_path / "genes.txt") as path:
        path.write_text("half")
        raise error("stop")
    assert contents(tmp_path) == {"genes.txt": b"JAK3"}


MODEL = FolderKind("a model", {"config.json": dict}, ("inner", "weights"))


def test_a_folder_replaces_a_folder(tmp_path):
    for round_ in ("one", "two"):
        with atomic_write(tmp_path / "model", kind=MODEL) as path:
            (path / "inner").mkdir(parents=True)
            (path / "config.json").write_text("{}")
            (path / "inner" / round_).write_text(round_)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert contents(tmp_path / "model" / "inner") == {"two": b"two"}


def test_an_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    with atomic_write(tmp_path / "model", kind=MODEL) as path:
        path.mkdir()
        (path / "config.json").write_text("{}")
        (path / "weights").write_text("old")
    rename, calls = os.replace, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(StoreError, match="No space left"), atomic_write(tmp_path / "model", kind=MODEL) as path:
        path.mkdir()
        (path / "weights").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert contents(tmp_path / "model") == {"config.json": b"{}", "weights": b"old"}


def test_the_suffix_survives_in_the_temporary_name(tmp_path):
    frame = pd.DataFrame({"gene": ["JAK3"]})
    with atomic_write(tmp_path / "table.csv.gz") as path:
        frame.to_csv(path, index=False)
    assert pd.read_csv(tmp_path / "table.csv.gz").equals(frame)


@pytest.fixture
def small_disk():
    "No file of this process may grow over 64 KiB; the write fails as on a full disk."
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_names_the_file_and_the_room_and_keeps_the_old(tmp_path, small_disk):
    (tmp_path / "big.bin").write_bytes(b"old")
    with pytest.raises(StoreError, match=r"big\.bin could not be written.*MiB are free in .*free some disk space"):
        with atomic_write(tmp_path / "big.bin") as path:
            path.write_bytes(bytes(10**6))
    assert contents(tmp_path) == {"big.bin": b"old"}


def test_a_full_disk_stops_a_store_which_then_resumes(tmp_path, small_disk):
    with Store(tmp_path / "run", {"seed": 0}) as store:
        store.write("small", x=np.zeros(10))
        with pytest.raises(StoreError, match="big.npz could not be written"):
            store.write("big", x=np.zeros(10**5))
        assert store.names == ["small"] and not store.done("big")
    assert set(contents(tmp_path / "run")) == {"small.npz", "manifest.json"}
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with Store(tmp_path / "run", {"seed": 0}) as store:
        store.write("big", x=np.zeros(10**5))
        assert store.names == ["big", "small"]


def test_a_place_that_is_no_folder_is_a_store_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="could not be written"), atomic_write(tmp_path / "file" / "x") as path:
        path.write_text("x")
    with pytest.raises(StoreError, match="could not be written"):
        Store(tmp_path / "file" / "run", {})


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_is_a_store_error_that_speaks_of_permissions(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(StoreError, match="permission"), atomic_write(tmp_path / "x") as path:
            path.write_text("x")
        with pytest.raises(StoreError, match="permission"):
            Store(tmp_path / "run", {})
    finally:
        tmp_path.chmod(0o755)


def test_a_file_system_that_is_read_only_is_a_store_error(monkeypatch, tmp_path):
    "The same for every user: the operating system refuses to create or rename."

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StoreError, match="Read-only file system.*check the permissions"):
        with atomic_write(tmp_path / "x") as path:
            path.write_text("x")
    assert not contents(tmp_path)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StoreError, match="Read-only file system"):
        Store(tmp_path / "run", {})


def test_a_finished_store_opens_where_nothing_can_be_written(monkeypatch, tmp_path):
    with Store(tmp_path / "run", {"seed": 0}) as store:
        store.write("a", x=np.arange(3))
        store.finish()
    before = contents(tmp_path / "run")

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    assert Store(tmp_path / "run", {"seed": 0}).read("a")["x"].tolist() == [0, 1, 2]
    assert contents(tmp_path / "run") == before


def test_sha256_agrees_with_the_standards_example(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# ---- fingerprints

SAMPLES = """
import numpy as np, pandas as pd, scipy.sparse as sp
counts = sp.csr_matrix(np.array([[0, 3, 0], [1, 0, 2]], dtype=np.float32))
table = pd.DataFrame({"donor": ["d1", None], "n": [1, 2], "x": [0.5, np.nan]}, index=["c1", "c2"])
samples = [None, True, 1, 1.5, "JAK3", "\\u00e9", b"x", [1, "a"], {"b": 1, "a": {"c": 2}}, {"x", "y", "z"},
           np.arange(6.0).reshape(2, 3),
           np.array(["a", "bc"]), counts, table, table["donor"].astype("category")]
"""


def test_fingerprints_are_the_same_in_every_session():
    "Two processes with different hash seeds; what they say must also never change between releases."
    code = SAMPLES + "from scellfm.store import fingerprint\nprint([fingerprint(s) for s in samples])"
    answers = [process.communicate()[0] for process in [python(code) for _ in range(2)]]
    assert answers[0] == answers[1] and answers[0].count("'") == 2 * 15
    assert len(set(answers[0].split(","))) == 15
    assert fingerprint("JAK3", 1, {"a": [0.5, None]}) == FROZEN


FROZEN = "25d5dd45db45490fb3ce92afc8a6ce645e4383f361d78de78e3b7964013ae34e"


@pytest.mark.parametrize(
    "one, other",
    [
        (1, 1.0),
        (1, True),
        (0, False),
        (1, "1"),
        ("a", b"a"),
        (None, "None"),
        (["ab", "c"], ["a", "bc"]),
        ([1, [2]], [1, 2]),
        ([], {}),
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"b": 1}),
        (np.zeros(2), np.zeros(2, np.float32)),
        (np.zeros((1, 2)), np.zeros((2, 1))),
        (np.zeros(()), np.zeros(1)),
        (np.array(["ab", "c"]), np.array(["a", "bc"])),
        (0.1, 0.1 + 2e-17 * 8),
        (-1, 1),
        ("x", ["x"]),
        (pd.Series([1, 2]), pd.Series([1, 2], index=[5, 6])),
        (pd.DataFrame({"a": [1]}), pd.DataFrame({"b": [1]})),
        (sparse.csr_matrix(np.eye(2)), sparse.csr_matrix(np.eye(2)[::-1])),
        (torch.ones(2), torch.ones(2, dtype=torch.bfloat16)),
    ],
)
def test_different_values_have_different_fingerprints(one, other):
    assert fingerprint(one) != fingerprint(other)


def equals():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    matrix = sparse.random(20, 30, density=0.2, random_state=0, format="csr", dtype=np.float32)
    unsorted = sparse.csr_matrix(
        (matrix.data[::-1].copy(), matrix.indices[::-1].copy(), matrix.nnz - matrix.indptr[::-1]), matrix.shape
    )
    unsorted = unsorted[::-1]  # rows in order again, their entries backwards
    zeros = sparse.csr_matrix((np.r_[np.float32(0), 1], [0, 1], [0, 2, 2]), (2, 3))
    wide = matrix.copy()
    wide.indices, wide.indptr = wide.indices.astype(np.int64), wide.indptr.astype(np.int64)
    text = pd.Series(["a", None, "b"])
    return {
        "memory order": (array, np.asfortranarray(array)),
        "byte order": (array, array.astype(">f4")),
        "a view": (array[:, ::2], array[:, ::2].copy()),
        "numpy scalar": (np.int64(3), 3),
        "float32 scalar": (np.float32(0.5), 0.5),
        "csr and csc": (matrix, matrix.tocsc()),
        "csr and coo": (matrix, matrix.tocoo()),
        "unsorted": (matrix, unsorted),
        "wide indices": (matrix, wide),
        "sparse array": (matrix, sparse.csr_array(matrix)),
        "stored zeros": (zeros, sparse.csr_matrix(np.array([[0, 1, 0], [0, 0, 0]], np.float32))),
        "categorical": (text, text.astype("category")),
        "string dtype": (text, text.astype("string")),
        "dict order": ({"a": 1, "b": [2]}, {"b": [2], "a": 1}),
        "tuple": ((1, 2), [1, 2]),
        "missing": ([None], [float("nan")]),
        "tensor and array": (torch.arange(3.0), torch.arange(6.0)[::2] / 2),
    }


@pytest.mark.parametrize("case", equals())
def test_the_same_value_in_another_form_has_the_same_fingerprint(case):
    one, other = equals()[case]
    assert fingerprint(one) == fingerprint(other)


def test_fingerprinting_changes_nothing():
    matrix = sparse.csr_matrix((np.array([0.0, 2.0, 1.0]), np.array([2, 1, 0]), np.array([0, 3])), (1, 3))
    before = matrix.data.copy(), matrix.indices.copy()
    table = pd.DataFrame({"a": ["x", None]})
    fingerprint(matrix, table)
    assert (matrix.data == before[0]).all() and (matrix.indices == before[1]).all()
    assert table["a"].isna().tolist() == [False, True]


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.floats(allow_nan=False),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
        max_leaves=8,
    )
)
def test_a_fingerprint_sees_what_json_sees(value):
    "Two values with the same JSON text have the same fingerprint, and wrapping changes it."
    again = json.loads(json.dumps(value))
    assert fingerprint(value) == fingerprint(again)
    assert fingerprint(value) != fingerprint([value])


def test_a_path_stands_for_its_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("same")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "b" / "x.txt").write_text("other")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
    assert fingerprint(tmp_path / "a") != fingerprint(str(tmp_path / "a"))
    with pytest.raises(StoreError, match="none.txt.*does not exist"):
        fingerprint(tmp_path / "none.txt")


@pytest.mark.parametrize("part", ["X", "obs", "var", "obsm", "layers", "names"])
def test_the_fingerprint_of_cells_sees_every_part(part):
    def cells():
        return anndata.AnnData(
            sparse.csr_matrix(np.eye(3, 4, dtype=np.float32)),
            obs=pd.DataFrame({"d": list("abc")}, index=list("xyz")),
            var=pd.DataFrame(index=list("ABCD")),
            obsm={"P": np.zeros((3, 2))},
            layers={"c": np.ones((3, 4))},
        )

    changed = cells()
    match part:
        case "X":
            changed.X[0, 0] = 5
        case "obs":
            changed.obs["d"] = ["a", "b", "d"]
        case "var":
            changed.var["chromosome"] = "1"
        case "obsm":
            changed.obsm["P"][0, 0] = 1
        case "layers":
            changed.layers["c"][0, 0] = 2
        case "names":
            changed.obs_names = list("xyw")
    assert fingerprint(cells()) == fingerprint(cells()) != fingerprint(changed)


def test_backed_cells_count_by_their_file(tmp_path):
    adata = anndata.AnnData(sparse.csr_matrix(np.eye(3, dtype=np.float32)))
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    assert fingerprint(backed) == fingerprint(tmp_path / "a.h5ad")


def test_what_has_no_fingerprint_is_named():
    with pytest.raises(OptionError, match="builtins.function has no fingerprint; pass arrays"):
        fingerprint(lambda: 0)


# ---- the store

RUN = """
import sys, time, os
import numpy as np
import scellfm.store.shards as shards
from scellfm.store import Store
folder, slow = sys.argv[1], float(sys.argv[2])
write = np.lib.format.write_array
def slowly(file, array, **kwargs):
    write(file, array[:len(array) // 2], **kwargs)
    if slow:
        print("half", flush=True)
        time.sleep(slow)
    write(file, array, **kwargs)
np.lib.format.write_array = slowly
made = []
with Store(folder, inputs={"cells": np.arange(10)}, settings={"seed": 0}) as store:
    for part in range(4):
        if not store.done(f"part{part}"):
            if part < 2: np.lib.format.write_array = write
            else: np.lib.format.write_array = slowly if slow else write
            store.write(f"part{part}", x=np.random.default_rng(part).normal(size=5000), names=np.array(["a", "b"]))
            made.append(part)
    store.finish()
print(made)
"""


def test_killed_in_the_middle_of_a_write_the_resumed_run_has_the_same_bytes(tmp_path):
    assert python(RUN, tmp_path / "whole", 0).communicate()[0].strip() == "[0, 1, 2, 3]"
    victim = python(RUN, tmp_path / "killed", 60)
    assert victim.stdout.readline().strip() == "half"
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    left = set(contents(tmp_path / "killed"))
    assert {"part0.npz", "part1.npz", "manifest.json", "lock"} < left and "part2.npz" not in left
    assert any(name.startswith(".part-") for name in left)
    assert python(RUN, tmp_path / "killed", 0).communicate()[0].strip() == "[2, 3]"
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_ctrl_c_keeps_what_is_finished_and_gives_the_folder_back(tmp_path):
    # a shell in the background makes its children deaf to Ctrl-C
    listens = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    process = python(listens + RUN, tmp_path / "run", 60)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate()[1]
    assert set(contents(tmp_path / "run")) == {"part0.npz", "part1.npz", "manifest.json"}
    assert python(RUN, tmp_path / "run", 0).communicate()[0].strip() == "[2, 3]"


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path):
    with Store(tmp_path, {"seed": 0}):
        with pytest.raises(StoreError, match=rf"being written by process {os.getpid()} on .*wait for it"):
            Store(tmp_path, {"seed": 0})
        code = "import sys; from scellfm.store import Store; Store(sys.argv[1], {'seed': 0})"
        assert f"being written by process {os.getpid()}" in python(code, tmp_path).communicate()[1]
    Store(tmp_path, {"seed": 0}).close()


@pytest.mark.parametrize("claimed", [False, True])
def test_of_many_writers_at_once_exactly_one_gets_in(tmp_path, claimed):
    code = """
import sys, time
from scellfm.store import Store
from scellfm.core import StoreError
while time.time() < float(sys.argv[2]): pass
try:
    store = Store(sys.argv[1], {"seed": 0})
except StoreError:
    print("refused", flush=True)
else:
    print("in", flush=True)
    sys.stdin.read()
"""
    start = time.time() + 3
    (tmp_path / "lock").write_text(
        json.dumps({"host": socket.gethostname(), "pid": 2**22 + 5, "started": "1", "token": ""})
    )
    if claimed:  # by a process of this machine that was killed
        (tmp_path / ".part-clearing" / f".part-{2**22 + 5}.1.{_host()}.0badc0de-lock").mkdir(parents=True)
    writers = [python(code, tmp_path, start, stdin=subprocess.PIPE) for _ in range(4)]
    answers = [writer.stdout.readline().strip() for writer in writers]
    errors = [writer.communicate()[1] for writer in writers]
    assert sorted(answers) == ["in", "refused", "refused", "refused"], errors


def test_a_lock_that_was_made_while_the_old_one_was_judged_stays(tmp_path, monkeypatch):
    from scellfm.store import lock as locks

    lock, live = (
        tmp_path / "lock",
        json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": "1", "token": "b"}),
    )
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 5, "started": "1", "token": "a"}))

    def meanwhile(text, age):
        lock.write_text(live)  # another process cleared the stale lock and is in
        return True

    monkeypatch.setattr(locks, "_is_stale", meanwhile)
    locks._clear_stale(lock)
    assert contents(tmp_path) == {"lock": live.encode()}


@pytest.mark.parametrize("text", ["", '{"host": "a", "pi', "123"])
def test_a_lock_that_is_not_filled_is_waited_for_and_then_cleared(tmp_path, text):
    from scellfm.store import lock as locks

    (tmp_path / "lock").write_text(text)
    locks._clear_stale(tmp_path / "lock")
    assert set(contents(tmp_path)) == {"lock"}
    os.utime(tmp_path / "lock", (time.time() - 60, time.time() - 60))
    with Store(tmp_path, {}) as store:
        store.write("a", x=np.zeros(1))
    assert set(contents(tmp_path)) == {"a.npz", "manifest.json"}


STALE = json.dumps({"host": socket.gethostname(), "pid": 2**22 + 5, "started": "1", "token": "a"})
CLEARS = """
import os, signal, sys
from pathlib import Path
from scellfm.store.lock import Lock
lock, cleared = Path(sys.argv[1]), False
def hook(event, arguments):
    global cleared
    if event in ("os.remove", "os.rmdir", "os.rename") and cleared:
        cleared = False
        if sys.argv[2] == "die": os.kill(os.getpid(), signal.SIGKILL)
        print("holds the claim", flush=True)
        sys.stdin.readline()
    cleared = cleared or event == "os.remove" and Path(arguments[0]) == lock
sys.addaudithook(hook)
Lock(lock)
"""  # a process that clears a stale lock, and dies or waits before it removes its claim


def test_a_claim_of_a_process_that_died_is_removed_at_once_by_the_next_run(tmp_path):
    (tmp_path / "lock").write_text(STALE)
    assert python(CLEARS, tmp_path / "lock", "die").wait() == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".part-clearing"]
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_claim_of_a_process_that_died_does_not_hold_up_the_next_lock(tmp_path):
    (tmp_path / "lock").write_text(STALE)
    assert python(CLEARS, tmp_path / "lock", "die").wait() == -signal.SIGKILL
    (tmp_path / "lock").write_text(STALE)
    began = time.monotonic()
    with Store(tmp_path, {}) as store:
        store.write("a", x=np.zeros(1))
    assert time.monotonic() - began < 2
    assert set(contents(tmp_path)) == {"a.npz", "manifest.json"}


def test_a_claim_of_a_running_process_is_respected_however_old_it_is(tmp_path):
    from scellfm.store import lock as locks

    (tmp_path / "lock").write_text(STALE)
    holder = python(CLEARS, tmp_path / "lock", "wait", stdin=subprocess.PIPE)
    assert holder.stdout.readline() == "holds the claim\n"
    claim = tmp_path / ".part-clearing"
    os.utime(claim, (time.time() - 86400,) * 2)
    (tmp_path / "lock").write_text(STALE)
    sweep(tmp_path)
    locks._clear_stale(tmp_path / "lock")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".part-clearing", "lock"]
    (tmp_path / "lock").unlink()
    assert holder.communicate("\n")[1] == "" and holder.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_claim_that_was_taken_while_the_old_one_was_judged_stays(tmp_path, monkeypatch):
    from scellfm.store import lock as locks
    from scellfm.store import writers

    lock, claim, live = tmp_path / "lock", tmp_path / writers.CLAIM, writers.temporary_for(tmp_path / "lock").name
    gone = live.replace(str(os.getpid()), str(2**22 + 5))
    lock.write_text(STALE)
    (claim / gone).mkdir(parents=True)
    judge = writers._is_abandoned

    def meanwhile(path):
        if path.name == gone and path.exists():
            path.rename(claim / live)  # another process has removed the old claim and has taken it
            return True
        return judge(path)

    monkeypatch.setattr(writers, "_is_abandoned", meanwhile)
    locks._unlink_once(lock, STALE)
    assert lock.exists() and [path.name for path in claim.iterdir()] == [live]
    assert sorted(path.name for path in tmp_path.iterdir()) == [writers.CLAIM, "lock"]


@pytest.mark.parametrize("age", [0, 60, -86400])
def test_a_claim_without_an_owner_of_an_earlier_version_does_not_stay(tmp_path, age):
    (tmp_path / "lock").write_text(STALE)
    (tmp_path / ".part-clearing").touch()
    os.utime(tmp_path / ".part-clearing", (time.time() - age,) * 2)
    with Store(tmp_path, {}) as store:
        store.write("a", x=np.zeros(1))
    assert set(contents(tmp_path)) == {"a.npz", "manifest.json"}


def test_a_claim_of_another_machine_is_respected_and_named(tmp_path, monkeypatch):
    from scellfm.store import lock as locks

    monkeypatch.setattr(locks.time, "sleep", lambda seconds: None)
    (tmp_path / "lock").write_text(STALE)
    (tmp_path / ".part-clearing" / ".part-1.1.00000000.0badc0de-lock").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"again and again.*If not, delete .*\.part-clearing"):
        Store(tmp_path, {})
    shutil.rmtree(tmp_path / ".part-clearing")
    Store(tmp_path, {}).close()


def test_a_lock_of_a_killed_process_is_cleared(tmp_path):
    code = "import sys, time; from scellfm.store import Store; s = Store(sys.argv[1], {}); print(flush=True)"
    code += "; time.sleep(60)"
    process = python(code, tmp_path)
    process.stdout.readline()
    process.kill()
    assert (tmp_path / "lock").exists()  # also while the process is a zombie that nobody has waited for
    time.sleep(0.2)
    Store(tmp_path, {}).close()
    process.communicate()
    assert not (tmp_path / "lock").exists()


def test_a_process_number_that_was_given_again_does_not_hold_a_lock(tmp_path):
    (tmp_path / "lock").write_text(
        json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": "1", "token": ""})
    )
    Store(tmp_path, {}).close()


def test_a_lock_of_another_machine_is_respected(tmp_path):
    (tmp_path / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "token": ""}))
    with pytest.raises(StoreError, match=r"process 1 on elsewhere.*no longer runs, delete .*lock"):
        Store(tmp_path, {})


def test_an_empty_lock_that_nobody_filled_is_cleared(tmp_path):
    (tmp_path / "lock").touch()
    os.utime(tmp_path / "lock", (time.time() - 60,) * 2)
    Store(tmp_path, {}).close()


def test_a_writer_whose_lock_was_taken_stops(tmp_path):
    store = Store(tmp_path, {})
    (tmp_path / "lock").write_text("{}")
    with pytest.raises(StoreError, match="taken"):
        store.write("a", x=np.zeros(1))
    assert not (tmp_path / "a.npz").exists()


def test_resume_refuses_changed_inputs_and_names_them(tmp_path):
    inputs, options = {"cells": np.arange(3), "checkpoint": "a" * 64}, {"seed": 0, "layer": None}
    with Store(tmp_path, inputs, options) as store:
        store.write("a", x=np.zeros(2))
    before = contents(tmp_path)
    for changed_inputs, changed_options, named in (
        ({**inputs, "cells": np.arange(4)}, options, r"inputs: cells \(was fingerprint"),
        (inputs, {**options, "seed": 1}, r"settings: seed \(was 0, is 1\)"),
        (inputs, {**options, "layer": "counts"}, r"settings: layer \(was None, is counts\)"),
        (inputs, {"seed": 0}, r"settings: layer \(was None, is absent\)"),
        ({**inputs, "genes": "all"}, options, r"inputs: genes \(was absent, is all\)"),
    ):
        with pytest.raises(StoreError, match=named + ".*delete this one"):
            Store(tmp_path, changed_inputs, changed_options)
    assert contents(tmp_path) == before
    assert Store(tmp_path, dict(reversed(inputs.items())), options).done("a")


def test_arrays_come_back_as_they_were(tmp_path):
    arrays = {
        "x": np.arange(6, dtype=np.float16).reshape(2, 3),
        "names": np.array(["JAK3", "\u00e9"]),
        "n": np.uint16(3),
        "file": np.zeros(0),
        "flags": np.array([True, False]),
    }
    with Store(tmp_path, {}) as store:
        store.write("a", **arrays)
        found = store.read("a")
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key], array)
        assert found[key].dtype == np.asarray(array).dtype


def test_objects_would_need_pickle_and_are_refused(tmp_path):
    with Store(tmp_path, {}) as store:
        with pytest.raises(OptionError, match=r"'x' holds Python objects.*astype\(str\)"):
            store.write("a", x=np.array(["a", None], dtype=object))
        assert not store.done("a") and set(contents(tmp_path)) == {"lock"}


def test_a_damaged_or_missing_shard_is_noticed(tmp_path):
    with Store(tmp_path, {}) as store:
        store.write("a", x=np.zeros(100))
        data = bytearray((tmp_path / "a.npz").read_bytes())
        data[200] ^= 1
        (tmp_path / "a.npz").write_bytes(data)
        with pytest.raises(StoreError, match="a.npz was changed or damaged.*delete it and run again"):
            store.read("a")
        (tmp_path / "a.npz").write_bytes(data[:50])
        assert not store.done("a")
        (tmp_path / "a.npz").unlink()
        assert not store.done("a")
        with pytest.raises(StoreError, match="no complete shard 'b', but a"):
            store.read("b")


@pytest.mark.parametrize("name", ["../a", "a/b", "", ".hidden", "a b", "C:\\x"])
def test_a_shard_name_that_is_no_file_name_is_refused(tmp_path, name):
    with Store(tmp_path / "run", {}) as store, pytest.raises(OptionError, match="not usable as a file name"):
        store.write(name, x=np.zeros(1))


def test_a_finished_store_is_read_by_many_and_written_by_none(tmp_path):
    with Store(tmp_path, {}) as store:
        store.write("a", x=np.zeros(1))
        store.finish()
    one, two = Store(tmp_path, {}), Store(tmp_path, {})
    assert one.read("a").keys() == two.read("a").keys()
    with pytest.raises(StoreError, match="is finished and can only be read"):
        one.write("b", x=np.zeros(1))


def test_a_finished_store_that_lost_a_shard_no_longer_says_that_it_is_finished(tmp_path):
    with Store(tmp_path / "run", {}) as store:
        for name in ("a", "b"):
            store.write(name, x=np.zeros(1))
        store.finish()
    (tmp_path / "run/a.npz").unlink()
    with Store(tmp_path / "run", {}) as store:
        assert not json.loads((tmp_path / "run/manifest.json").read_text())["finished"]
        assert not store.done("a") and store.done("b")


def test_a_manifest_that_is_none_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(StoreError, match="manifest.json holds .* which should be a dictionary"):
        Store(tmp_path, {})


def test_other_versions_are_warned_of(tmp_path):
    Store(tmp_path, {}).close()
    with Store(tmp_path, {}) as store:
        store.write("a", x=np.zeros(1))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["versions"]["numpy"] = "1.0"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.warns(ScellfmWarning, match=r"numpy \(was 1.0, is"):
        Store(tmp_path, {}).close()
