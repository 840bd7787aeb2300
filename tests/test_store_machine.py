"""The store against a model of it, in any order: open, write, kill, resume, a second writer, a changed input, damage.

Short: a few hundred steps. Long (--slow): 10,000.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from scellfm.core import StoreError
from scellfm.store import Store
from scellfm.store.shards import Shards, _read_manifest, write_shard

NAMES = st.sampled_from(["a", "b", "c", "d"])
RUNS = ({"cells": "first"}, {"seed": 0}), ({"cells": "second"}, {"seed": 0}), ({"cells": "first"}, {"seed": 1})


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


class StoreMachine(RuleBasedStateMachine):
    "What a user may do to a folder of results, and what must be in it afterwards."

    @initialize()
    def begin(self):
        self.place = Path(tempfile.mkdtemp())
        self.folder = self.place / "run"
        self.shards: dict[str, np.ndarray] = {}  # what was written and recorded
        self.damaged: dict[str, str] = {}  # name: flip, cut or gone
        self.run, self.store, self.finished = None, None, False

    def teardown(self):
        if getattr(self, "store", None) is not None:
            self.store.close()
        shutil.rmtree(getattr(self, "place", "/nowhere"), ignore_errors=True)

    def writable(self) -> bool:
        return self.store is not None and self.store._lock is not None

    def incomplete(self) -> bool:
        "Whether a finished store lacks a shard, so that it opens for writing again."
        return any(kind in ("cut", "gone") for kind in self.damaged.values())

    # ---- what a user does

    @precondition(lambda self: self.store is None)
    @rule(which=st.integers(0, 2))
    def open(self, which):
        begun = self.run is not None and (self.folder / "manifest.json").exists()
        before = tree(self.folder)
        if begun and which != self.run:
            with pytest.raises(StoreError, match="another run"):
                Store(self.folder, *RUNS[which])
            left = {name: data for name, data in before.items() if name.endswith(".npz")}
            assert {name: data for name, data in tree(self.folder).items() if name.endswith(".npz")} == left
            return
        self.store = Store(self.folder, *RUNS[which])
        if not begun:
            self.run = which
        if self.finished and self.incomplete():
            self.finished = False  # it goes on
        assert self.store.names == sorted(self.shards)
        assert self.store.finished == self.finished

    @precondition(lambda self: self.store is not None)
    @rule(name=NAMES, value=st.integers(0, 9))
    def write(self, name, value):
        array = np.full(5, value, dtype=np.int64)
        if not self.writable():
            with pytest.raises(StoreError, match="can only be read"):
                self.store.write(name, x=array)
            return
        self.store.write(name, x=array)
        self.shards[name] = array
        self.damaged.pop(name, None)

    @precondition(lambda self: self.writable())
    @rule(name=NAMES)
    def disk_full(self, name):
        before = {key: value.copy() for key, value in self.shards.items()}
        replace = os.replace

        def refuse(*_):
            raise OSError(28, "No space left on device")

        os.replace = refuse
        try:
            with pytest.raises(StoreError, match="No space left"):
                self.store.write(name, x=np.zeros(5))
        finally:
            os.replace = replace
        assert self.store.names == sorted(before)

    @precondition(lambda self: self.writable() and self.shards and not self.damaged)
    @rule()
    def finish(self):
        self.store.finish()
        self.finished = True

    @precondition(lambda self: self.store is not None)
    @rule()
    def close(self):
        self.store.close()
        self.store = None

    @precondition(lambda self: self.store is not None)
    @rule(which=st.integers(0, 2))
    def second_writer(self, which):
        if self.writable():
            with pytest.raises(StoreError, match="is being written by process"):
                Store(self.folder, *RUNS[which])
        elif which == self.run and self.finished and not self.incomplete():
            Store(self.folder, *RUNS[which]).close()  # a second reader is welcome

    # ---- what happens to a user

    @precondition(lambda self: self.writable())
    @rule(stage=st.sampled_from(["idle", "part", "unrecorded", "half a line"]), name=NAMES, value=st.integers(0, 9))
    def kill(self, stage, name, value):
        "kill -9: nothing is tidied up; the lock and the temporary files name a process that is no more."
        lock = self.folder / "lock"
        holder = json.loads(lock.read_text())
        if stage == "part":
            part = self.folder / f".part-{2**22 + 1}.1.00000000.12345678-{name}.npz"
            part.write_bytes(b"half")
        elif stage == "unrecorded" and name not in self.shards:
            write_shard(self.folder, name, x=np.full(5, value + 10, dtype=np.int64))
        elif stage == "half a line" and (self.folder / "manifest.json").exists():
            with open(self.folder / "records-main.jsonl", "ab") as file:
                file.write(b'{"' + name.encode() + b'": {"bytes"')
        self.store._lock._finalizer.detach()
        lock.write_text(json.dumps(holder | {"pid": 2**22 + 1, "started": "1"}))
        self.store = None

    @precondition(lambda self: self.store is None and self.shards)
    @rule(name=NAMES, kind=st.sampled_from(["flip", "cut", "gone"]), at=st.integers(0, 10**6))
    def damage(self, name, kind, at):
        path = self.folder / f"{name}.npz"
        if name not in self.shards or name in self.damaged:
            return
        data = bytearray(path.read_bytes())
        if kind == "gone":
            path.unlink()
        elif kind == "cut":
            path.write_bytes(data[: at % len(data)])
        else:
            data[at % len(data)] ^= 1 << (at % 8)
            path.write_bytes(data)
        self.damaged[name] = kind

    @precondition(lambda self: self.writable())
    @rule()
    def lock_is_taken_away(self):
        "Somebody deletes the lock: nothing more is written from here."
        (self.folder / "lock").unlink()
        before = tree(self.folder)
        with pytest.raises(StoreError, match="taken by another process or deleted"):
            self.store.write("a", x=np.zeros(5))
        assert tree(self.folder) == before
        self.store.close()
        self.store = None

    @precondition(lambda self: (self.folder / "manifest.json").exists())
    @rule(days=st.integers(-400, 400))
    def clock_is_set(self, days):
        "Files come from another day; who holds the lock still counts."
        for path in self.folder.iterdir():
            os.utime(path, (path.stat().st_atime + 86400 * days, path.stat().st_mtime + 86400 * days))

    # ---- what must hold at any time

    @invariant()
    def what_was_written_is_there_and_nothing_else(self):
        if getattr(self, "store", None) is None:
            return
        assert self.store.names == sorted(self.shards)
        for name, array in self.shards.items():
            if name in self.damaged:
                assert self.store.done(name) == (self.damaged[name] == "flip")
                with pytest.raises(StoreError):
                    self.store.read(name)
            else:
                assert self.store.done(name)
                np.testing.assert_array_equal(self.store.read(name)["x"], array)

    @invariant()
    def a_folder_says_that_it_is_finished_only_if_it_is(self):
        if getattr(self, "folder", None) is None or not (self.folder / "manifest.json").exists():
            return
        found = Shards(self.folder, _read_manifest(self.folder))
        assert not found.finished or self.finished


def play(examples: int, steps: int, phases=(Phase.generate, Phase.shrink)) -> None:
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    how = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=quiet,
        derandomize=True,
        phases=phases,
    )
    run_state_machine_as_test(StoreMachine, settings=how)


def test_the_store_does_what_its_model_does_in_a_few_hundred_steps():
    play(examples=15, steps=20)


@pytest.mark.slow
def test_the_store_does_what_its_model_does_in_ten_thousand_steps():
    play(examples=200, steps=50)


def test_the_machine_finds_a_store_that_reads_damaged_shards(monkeypatch):
    "The test can fail: a store that does not look at hashes is found out."
    from scellfm.store import shards

    def careless(path, entry):
        with np.load(path) as found:
            return dict(found)

    monkeypatch.setattr(shards, "_load_arrays", careless)
    with pytest.raises(BaseException):  # noqa: B017 -- what a damaged shard makes of numpy, or no error at all
        play(examples=40, steps=30, phases=[Phase.generate])
