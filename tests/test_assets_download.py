"""Files over HTTPS, on a loopback server that misbehaves; archives that try to leave their folder."""

import io
import stat
import zipfile

import anndata
import numpy as np
import pandas as pd
import pytest
from hub_server import Hub

from scellfm.assets import download
from scellfm.assets.download import check_address, download_file, part_files, unpack_zip
from scellfm.core import AssetError, StoreError
from scellfm.scgenept import PerturbationData, gears_folder
from scellfm.store.lock import Lock

CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCELLFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "PAUSE", 0.0)


@pytest.fixture
def hub():
    with Hub({"org/data": {"file.bin": CONTENT}}) as server:
        server.address = f"{server.url}/org/data/resolve/main"
        yield server


def zipped(members: dict, link: str | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        if link:
            entry = zipfile.ZipInfo(link)
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, "/etc")
    return buffer.getvalue()


def published_cells() -> bytes:
    labels = ["ctrl"] * 5 + ["A+ctrl"] * 4
    values = np.random.default_rng(0).random((9, 3)).astype(np.float32)
    adata = anndata.AnnData(values, pd.DataFrame({"condition": labels}, index=[f"c{i}" for i in range(9)]))
    adata.var_names = list("ABC")
    return adata


def test_a_broken_download_goes_on_where_it_stopped(hub, tmp_path):
    hub.cut["file.bin"] = 2
    path = download_file(f"{hub.address}/file.bin", tmp_path / "file.bin")
    assert path.read_bytes() == CONTENT
    ranges = [wanted for command, _, wanted in hub.requests if command == "GET"]
    assert ranges[0] is None and len(ranges) == 3 and all(wanted.startswith("bytes=") for wanted in ranges[1:])
    assert not any(part.exists() for part in part_files(path))


def test_a_download_goes_on_in_another_session(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    hub.cut["file.bin"] = 1
    with pytest.raises(AssetError, match="what arrived is kept"):
        download_file(f"{hub.address}/file.bin", tmp_path / "file.bin")
    arrived = part_files(tmp_path / "file.bin")[0].stat().st_size
    assert 0 < arrived < len(CONTENT)
    download_file(f"{hub.address}/file.bin", tmp_path / "file.bin")
    assert hub.requests[-1][2] == f"bytes={arrived}-" and (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(hub, tmp_path):
    hub.busy = 2
    assert download_file(f"{hub.address}/file.bin", tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_missing_file_is_said_at_once(hub, tmp_path):
    with pytest.raises(AssetError, match="404"):
        download_file(f"{hub.address}/none", tmp_path / "none")
    assert len(hub.requests) == 1


def test_a_page_in_place_of_the_file_is_refused(hub, tmp_path):
    hub.altered["file.bin"] = b"<!doctype html><html>log in</html>"
    with pytest.raises(AssetError, match="web page"):
        download_file(f"{hub.address}/file.bin", tmp_path / "file.bin")
    assert not (tmp_path / "file.bin").exists()
    del hub.altered["file.bin"]
    assert download_file(f"{hub.address}/file.bin", tmp_path / "file.bin").read_bytes() == CONTENT


def test_other_bytes_than_at_the_first_use_are_refused(hub, tmp_path):
    download_file(f"{hub.address}/file.bin", tmp_path / "first.bin")
    hub.altered["file.bin"] = CONTENT[:-1] + b"!"
    with pytest.raises(AssetError, match="other contents than at its first use"):
        download_file(f"{hub.address}/file.bin", tmp_path / "second.bin")
    assert not (tmp_path / "second.bin").exists()


def test_a_file_that_was_changed_on_the_disk_is_refused(hub, tmp_path):
    path = download_file(f"{hub.address}/file.bin", tmp_path / "file.bin")
    path.write_bytes(b"changed")
    with pytest.raises(AssetError, match="other contents.*it was there before and stays"):
        download_file(f"{hub.address}/file.bin", path)
    assert path.read_bytes() == b"changed" and [p.name for p in tmp_path.iterdir() if p.is_file()] == ["file.bin"]


def test_a_folder_of_the_user_in_the_place_of_the_file_stays(hub, tmp_path):
    (tmp_path / "file.bin").mkdir()
    (tmp_path / "file.bin" / "chapter.md").write_text("mine")
    with pytest.raises(StoreError, match="nothing was touched"):
        download_file(f"{hub.address}/file.bin", tmp_path / "file.bin")
    assert (tmp_path / "file.bin" / "chapter.md").read_text() == "mine"


def test_one_process_fetches_a_file_at_a_time_and_what_a_killed_one_left_is_swept(hub, tmp_path):
    held = Lock(tmp_path / ".lock-file.bin")
    with pytest.raises(StoreError, match="is being written by process"):
        download_file(f"{hub.address}/file.bin", tmp_path / "file.bin")
    held.release()
    path = download_file(f"{hub.address}/file.bin", tmp_path / "file.bin")
    part_files(path)[1].write_text("the mark of a process that was killed after the last byte")
    download_file(f"{hub.address}/file.bin", path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "file.bin"]


def test_a_part_that_no_server_continues_is_named_and_not_a_python_error(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    part, mark = part_files(tmp_path / "file.bin")
    part.write_bytes(CONTENT * 2)
    mark.write_text("of another file")
    monkeypatch.setattr(hub, "deliver", lambda request, *names: hub.send(request, 416, b""))
    with pytest.raises(AssetError, match="answered 416"):
        download_file(f"{hub.address}/file.bin", tmp_path / "file.bin")


def test_the_place_of_a_download_or_of_an_archive_is_a_path_like_any_other(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert download_file(f"{hub.address}/file.bin", "~/new/file.bin") == tmp_path / "home" / "new" / "file.bin"
    (tmp_path / "file").write_text("mine")
    (tmp_path / "good.zip").write_bytes(zipped({"a/b.txt": "text"}))
    for ask in (
        lambda: download_file(f"{hub.address}/file.bin", tmp_path / "file" / "x.bin"),
        lambda: unpack_zip(tmp_path / "good.zip", tmp_path / "file"),
    ):
        with pytest.raises(StoreError, match="could not be written"):
            ask()
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "~").exists()


def test_only_https_is_asked():
    for address in ("http://example.org/x", "ftp://example.org/x", "file:///etc/passwd"):
        with pytest.raises(AssetError, match="only https"):
            check_address(address)
    with pytest.raises(AssetError, match="only https"):
        download.SafeRedirects().redirect_request(None, None, 302, "", {}, "http://example.org/x")


@pytest.mark.parametrize("name", ["../out.txt", "/out.txt", "a/../../out.txt", "..\\out.txt", "C:/out.txt"])
def test_a_member_that_leaves_its_folder_is_refused(name, tmp_path):
    (tmp_path / "bad.zip").write_bytes(zipped({"good.txt": "x", name: "!"}))
    with pytest.raises(AssetError, match="outside its folder"):
        unpack_zip(tmp_path / "bad.zip", tmp_path / "inner" / "here")
    assert sorted(p.name for p in tmp_path.rglob("*.txt")) == []


def test_a_link_in_an_archive_is_refused(tmp_path):
    (tmp_path / "bad.zip").write_bytes(zipped({"good.txt": "x"}, link="etc"))
    with pytest.raises(AssetError, match="link"):
        unpack_zip(tmp_path / "bad.zip", tmp_path / "here")


def test_a_damaged_archive_is_refused(tmp_path):
    data = zipped({"a.txt": "x" * 10_000})
    for damaged in (data[:-30], data[:40] + b"\0" * 20 + data[60:], b"no archive"):
        (tmp_path / "bad.zip").write_bytes(damaged)
        with pytest.raises(AssetError):
            unpack_zip(tmp_path / "bad.zip", tmp_path / "here")
        assert not (tmp_path / "here" / "a.txt").exists()


def test_a_member_larger_than_it_claims_is_refused(tmp_path):
    data = bytearray(zipped({"a.txt": "x" * 10_000}))
    place = data.rindex(b"PK\x01\x02") + 24  # the size in the central directory
    data[place : place + 4] = (100).to_bytes(4, "little")
    (tmp_path / "bad.zip").write_bytes(bytes(data))
    with pytest.raises(AssetError):
        unpack_zip(tmp_path / "bad.zip", tmp_path / "here")
    assert not (tmp_path / "here" / "a.txt").exists()


def test_published_perturb_seq_data_are_fetched_by_name(tmp_path, monkeypatch):
    published_cells().write_h5ad(tmp_path / "cells.h5ad")
    members = {"norman/perturb_processed.h5ad": (tmp_path / "cells.h5ad").read_bytes()}
    archive = zipped({**members, "norman/data_pyg/cell_graphs.pkl": b"\x80\x04never"})
    with Hub({"org/data": {str(gears_folder.PUBLISHED["norman"]): archive}}) as hub:
        monkeypatch.setattr(gears_folder, "SERVER", f"{hub.url}/org/data/resolve/main")
        hub.cut[str(gears_folder.PUBLISHED["norman"])] = 1
        data = PerturbationData.load("norman", root=tmp_path / "sets")
        n_requests = len(hub.requests)
        again = PerturbationData.load("norman", root=tmp_path / "sets")
    assert data.conditions == again.conditions == ["A"] and len(hub.requests) == n_requests
    assert not list(tmp_path.rglob("*.pkl")) and not list(tmp_path.rglob("*.zip*"))


def test_an_archive_without_the_cells_is_told(tmp_path, monkeypatch):
    with Hub({"org/data": {str(gears_folder.PUBLISHED["dixit"]): zipped({"other/readme.txt": "x"})}}) as hub:
        monkeypatch.setattr(gears_folder, "SERVER", f"{hub.url}/org/data/resolve/main")
        with pytest.raises(AssetError, match="has no dixit/perturb_processed.h5ad"):
            PerturbationData.load("dixit", root=tmp_path / "sets")
    with pytest.raises(AssetError, match="there is no"):
        PerturbationData.load("adamson", root=tmp_path / "sets", download=False)
