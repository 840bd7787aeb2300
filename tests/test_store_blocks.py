"""Rows computed in blocks: kept, resumed to the same bytes after any kill, refused when changed, at linear cost."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scellfm.core import DataError, OptionError, StoreError
from scellfm.store import Store, each_block, rows_in_blocks

ROOT = Path(__file__).resolve().parent.parent


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def squares(rows):
    return {"square": (rows**2).astype(np.float32), "name": np.array([f"row {row}" for row in rows])}


def run(folder, n=10, compute=squares, block=4, **settings):
    return rows_in_blocks(folder, n, compute, inputs={"n": n}, settings=settings, block=block)


KILLED = """
import os, shutil, signal, sys
import numpy as np
from pathlib import Path
from scellfm.store import rows_in_blocks
base = Path(sys.argv[1])
def work(folder, kill_at):
    calls = 0
    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == kill_at: os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    os.fsync = lambda descriptor: None  # what was written survives the death of a process without it
    for name in ("open", "write", "fsync", "replace", "unlink", "mkdir", "rename", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    compute = lambda rows: {"x": np.random.default_rng(int(rows[0])).normal(size=(len(rows), 50)), "row": rows}
    rows_in_blocks(folder, 7, compute, inputs={"seed": 0}, block=3)
def in_child(folder, kill_at=0):
    if (folder / "lock").exists() and not (folder / "lock").read_text():
        os.utime(folder / "lock", (0, 0))  # a writer that dies before it has filled it is given ten seconds
    pid = os.fork()
    if pid == 0:
        try:
            work(folder, kill_at)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]
contents = lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()}
assert in_child(base / "whole") == 0
step = 0
while True:
    step += 1
    folder = base / str(step)
    status = in_child(folder, step)
    if status == 0: break
    assert status == signal.SIGKILL, status
    if step % 4 == 1: in_child(folder, 2 + step % 7)  # and the resumed run is killed as well
    assert in_child(folder) == 0, step
    assert contents(folder) == contents(base / "whole"), step
    shutil.rmtree(folder)
print(step)
"""


def test_killed_before_any_call_to_the_system_the_resumed_folder_has_the_same_bytes(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20  # moments at which it was killed


def test_only_the_missing_blocks_are_computed(tmp_path):
    seen = []

    def compute(rows):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(rows.tolist())
        return squares(rows)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, compute=compute)
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]]
    seen.clear()
    found = run(tmp_path, compute=compute)
    assert seen == [[8, 9]]
    again = run(tmp_path, compute=None)  # finished: nothing is computed
    for name, values in run(None).items():
        assert np.array_equal(found[name], values) and np.array_equal(again[name], values)
        assert found[name].dtype == values.dtype


def test_one_array_comes_back_as_one_array(tmp_path):
    for folder in (None, tmp_path, tmp_path):
        rows = rows_in_blocks(folder, 5, lambda rows: rows[:, None] * np.ones(3), inputs={}, block=2)
        assert rows.shape == (5, 3) and rows[4].tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    "changed, named",
    [
        (dict(layer=2), r"settings: layer \(was 1, is 2\)"),
        (dict(), r"settings: layer \(was 1, is absent\)"),
        (dict(layer=1, block=5), r"settings: block \(was 4, is 5\)"),
        (dict(layer=1, n=11), r"inputs: n \(was 10, is 11\); settings: n_rows \(was 10, is 11\)"),
    ],
)
def test_what_changed_is_refused_by_name_and_nothing_is_touched(tmp_path, changed, named):
    run(tmp_path, layer=1)
    before = contents(tmp_path)
    with pytest.raises(StoreError, match=named):
        run(tmp_path, **changed)
    assert contents(tmp_path) == before


def test_a_second_writer_is_refused(tmp_path):
    def compute(rows):
        with pytest.raises(StoreError, match=f"being written by process {os.getpid()}"):
            run(tmp_path)
        return squares(rows)

    run(tmp_path, compute=compute)
    assert "lock" not in contents(tmp_path)


@pytest.mark.parametrize(
    "compute, error, message",
    [
        (lambda rows: np.zeros(len(rows) + 1), DataError, r"shape \(5,\) for a block of 4 rows"),
        (lambda rows: np.float32(1), DataError, r"shape \(\) for a block"),
        (lambda rows: np.zeros(len(rows), np.float32 if rows[0] else np.float64), DataError, "float32 in one block"),
        (lambda rows: np.zeros((len(rows), 1 + rows[0])), DataError, r"shape \(5,\) and type float64 in one block"),
        (lambda rows: {"ab"[rows[0] // 4]: rows} if rows[0] < 8 else {}, DataError, r"arrays \['b'\] where others"),
        (lambda rows: {"record": rows}, OptionError, "'record' is reserved"),
        (lambda rows: np.array([None] * len(rows)), OptionError, "holds Python objects"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path, compute, error, message):
    with pytest.raises(error, match=message):
        run(tmp_path, compute=compute)


def test_no_rows_and_no_block_are_refused(tmp_path):
    with pytest.raises(DataError, match="no rows"):
        run(tmp_path, n=0)
    with pytest.raises(OptionError, match="block=0 must be a whole number"):
        run(tmp_path, block=0)
    assert not contents(tmp_path)


def test_what_happened_in_a_block_is_told_again(tmp_path):
    def compute(rows):
        if rows[0] == 4:
            record.append({"token_budget": 9, "remaining": 2})
        return rows

    for _ in range(2):
        record = ["before"]
        rows_in_blocks(tmp_path, 10, compute, inputs={}, block=4, record=record)
        assert record == ["before", {"token_budget": 9, "remaining": 2}]


def test_a_block_that_was_lost_is_computed_again_and_one_that_was_changed_is_an_error(tmp_path):
    run(tmp_path)
    before = contents(tmp_path)
    (tmp_path / "block-00001.npz").unlink()
    run(tmp_path)
    assert contents(tmp_path) == before
    data = bytearray(before["block-00001.npz"])
    data[100] ^= 1
    (tmp_path / "block-00001.npz").write_bytes(data)
    with pytest.raises(StoreError, match="block-00001.npz was changed or damaged.*delete it and run again"):
        run(tmp_path)


# ---- the record of finished shards


def test_two_thousand_shards_cost_the_same_each(tmp_path, monkeypatch):
    "The manifest is not written again, and the second half takes no longer than the first."
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the disk's own time is not ours
    times = [time.process_time()]
    with Store(tmp_path, {"seed": 0}) as store:
        store.write("first", x=np.arange(3))
        manifest = (tmp_path / "manifest.json").stat()
        for half in range(2):
            for number in range(1000):
                store.write(f"{half}-{number:04d}", x=np.arange(3))
            times.append(time.process_time())
        assert (tmp_path / "manifest.json").stat().st_mtime_ns == manifest.st_mtime_ns
        lines = (tmp_path / "records-main.jsonl").read_bytes().splitlines()
        assert len(lines) == 2001 and max(map(len, lines)) < 120
        store.finish()
    first, second = np.diff(times)
    assert second < 3 * first
    assert len(Store(tmp_path, {"seed": 0}).names) == 2001 and not list(tmp_path.glob("records-*"))


def unfinished(folder: Path, names: str) -> None:
    "A store whose writer was killed, as far as the folder shows."
    store = Store(folder, {"seed": 0})
    for name in names:
        store.write(name, x=np.array([name]))
    store._lock.release()


def test_records_of_several_writers_make_one_store(tmp_path):
    for folder, names in (("one", "ab"), ("two", "cd")):
        unfinished(tmp_path / folder, names)
        (tmp_path / folder / "records-main.jsonl").rename(tmp_path / folder / f"records-{folder}.jsonl")
    for path in (tmp_path / "two").glob("[rcd]*"):
        path.rename(tmp_path / "one" / path.name)
    with Store(tmp_path / "one", {"seed": 0}) as store:
        assert store.names == ["a", "b", "c", "d"] and all(str(store.read(name)["x"][0]) == name for name in "abcd")
    assert set(contents(tmp_path / "one")) == {"a.npz", "b.npz", "c.npz", "d.npz", "manifest.json"}


@pytest.mark.parametrize(
    "damage", [b'{"c": {"byt', b"\n", b"\x00\x00\n", b"[]\n", b'{"c": {"bytes": "a"}}\n', b"\xff\xff\n"]
)
def test_behind_a_damaged_line_no_record_counts(tmp_path, damage):
    unfinished(tmp_path, "ab")
    records = tmp_path / "records-main.jsonl"
    first, second = records.read_bytes().splitlines(keepends=True)
    records.write_bytes(first + damage + (second if damage.endswith(b"\n") else b""))
    with Store(tmp_path, {"seed": 0}) as store:
        assert store.names == ["a"]
        store.write("b", x=np.array(["b"]))
        assert store.names == ["a", "b"]


def test_a_record_that_found_no_room_leaves_no_trace(tmp_path):
    "The line that failed is overwritten by the next one, and the shard without a record is made again."
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    name = "a" * 150
    with Store(tmp_path, {"seed": 0}) as store:
        store.write("0", x=np.zeros(1))
        for number in range(5):
            store.write(f"{name}{number}", x=np.zeros(1))
        size = (tmp_path / "records-main.jsonl").stat().st_size
        assert size > 1000
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, old[1]))  # room for a shard, not for its line
            with pytest.raises(StoreError, match="records-main.jsonl could not be written"):
                store.write("b" * 150, x=np.zeros(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert not store.done("b" * 150)
        store.write("c", x=np.zeros(1))
        assert len((tmp_path / "records-main.jsonl").read_bytes().splitlines()) == 7
    with Store(tmp_path, {"seed": 0}) as store:
        assert store.done("c") and not store.done("b" * 150) and len(store.names) == 7


def test_stores_of_before_the_records_open(tmp_path):
    "An unfinished folder whose manifest lists its shards."
    with Store(tmp_path, {"seed": 0}) as store:
        store.write("a", x=np.zeros(1))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert list(manifest["shards"]) == ["a"] and set(contents(tmp_path)) == {"a.npz", "manifest.json"}
    with Store(tmp_path, {"seed": 0}) as store:
        assert store.done("a")
        store.write("b", x=np.zeros(1))
        store.finish()
    assert list(json.loads((tmp_path / "manifest.json").read_text())["shards"]) == ["a", "b"]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(format=2), "has 2 as format.*from 1 to 1"),
        (dict(shards={"a": {"bytes": 3}}), "lacks shards.a.sha256"),
        (dict(shards=[]), r"has \[\] as shards, which should be a dictionary.*delete it"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_named(tmp_path, change, message):
    with Store(tmp_path, {}) as store:
        store.write("a", x=np.zeros(1))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(StoreError, match=message):
        Store(tmp_path, {})


def test_blocks_may_hold_any_rows_and_share_a_store(tmp_path):
    with Store(tmp_path, {}) as store:
        for name in ("one", "two"):
            list(each_block(store, [np.array([5, 0]), np.array([3])], lambda rows: rows, name=name))
        found = list(each_block(store, [np.array([5, 0]), np.array([3])], None, name="two"))
    assert [(rows.tolist(), part["rows"].tolist(), kept) for rows, part, kept in found] == [
        ([5, 0], [5, 0], True),
        ([3], [3], True),
    ]
