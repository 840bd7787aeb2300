"Published models are fetched from their store by name, and the protocol of their tables can be repeated and resumed."

import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from scgenept_golden import fine_tuned, genes, scgpt_folder

from scellfm.assets import save_tensors
from scellfm.core import AssetError, DataError, OptionError
from scellfm.data import simulate_perturbations
from scellfm.scgenept import PerturbationData, ScGenePT, fetch_model, published, reproduce
from scellfm.scgpt.model import ScGPTModel


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *rest):
        pass


@pytest.fixture
def store(tmp_path, monkeypatch):
    "A store on this machine with one model in it."
    place = tmp_path / "store" / "models" / "finetuned" / "scgenept_ncbi" / "norman"
    fine_tuned(place, "scgenept_ncbi_gpt")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "store")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(published, "STORE", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("SCELLFM_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    server.shutdown()


def test_a_published_model_is_fetched_by_name_and_opens(store):
    path = fetch_model("ncbi", "norman", store / "models")
    assert path.name == "best_model_gpt3.5_ada_rnd_seed_42.pt"
    model = ScGenePT.from_pretrained(path, scgpt=scgpt_folder(store / "scgpt"), genes=genes(), device="cpu")
    assert model.inputs.languages == {"ncbi": "genept_encoder"} and not model.load_report.unused
    assert fetch_model("scGenePT_NCBI", "norman", store / "models") == path
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(AssetError):
        fetch_model("ncbi", "norman", store / "models")


def test_what_the_store_does_not_have_is_said(store):
    with pytest.raises(AssetError, match="404"):
        fetch_model("go_f", "norman", store / "models")
    with pytest.raises(OptionError, match="dixit"):
        fetch_model("ncbi", "dixit", store / "models")


def test_the_protocol_resumes_and_refuses_other_settings(tmp_path):
    simulated = simulate_perturbations(n_targets=10, n_pairs=4, n_genes=30, n_modules=2, n_cells=6, n_controls=12)
    data = PerturbationData(simulated.adata)
    small = dict(d_model=16, n_heads=2, d_hid=16, n_layers=1)
    start = ScGenePT.from_config("tiny", data, device="cpu", **small)
    start.save_pretrained(tmp_path / "scgpt")
    (tmp_path / "scgpt" / "scgenept.json").unlink()
    save_tensors(tmp_path / "scgpt" / "model.safetensors", ScGPTModel(start.model.config.encoder).state_dict())
    vectors = {"ncbi": simulated.vectors["know"]}
    call = dict(seeds=(42, 23), epochs=1, batch_size=32)
    first = reproduce(data, tmp_path / "scgpt", vectors, tmp_path / "runs", **call)
    assert list(first.index) == ["scgpt", "ncbi"]
    for column in ("pearson_delta", "pearson_delta_by_subgroup"):  # the card does not say which of both it reports
        assert first.loc["ncbi", (column, "card")] == 0.548 and np.isfinite(first.loc["ncbi", (column, "here")])
    files = sorted((tmp_path / "runs").glob("*.json"))
    stamps = [file.stat().st_mtime_ns for file in files]
    again = reproduce(data, tmp_path / "scgpt", vectors, tmp_path / "runs", **call)
    assert first.equals(again) and stamps == [file.stat().st_mtime_ns for file in files]
    assert len(files) == 4 and json.loads(files[0].read_text())["settings"]["training"]["epochs"] == 1
    with pytest.raises(OptionError, match="differs in training"):
        reproduce(data, tmp_path / "scgpt", vectors, tmp_path / "runs", **call | {"epochs": 2})
    with pytest.raises(OptionError, match="differs in vectors"):
        reproduce(data, tmp_path / "scgpt", {"ncbi": simulated.vectors["none"]}, tmp_path / "runs", **call)
    turned = simulated.adata.copy()
    turned.obs["condition"] = turned.obs["condition"].astype(str).replace({"G00": "G01", "G01": "G00"})
    with pytest.raises(OptionError, match="differs in data"):
        reproduce(PerturbationData(turned), tmp_path / "scgpt", vectors, tmp_path / "runs", **call)
    renamed = simulated.adata.copy()
    renamed.obs_names = [f"other{i}" for i in range(renamed.n_obs)]  # draws are keyed by the names of cells
    with pytest.raises(OptionError, match="differs in cells"):
        reproduce(PerturbationData(renamed), tmp_path / "scgpt", vectors, tmp_path / "runs", **call)
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "scgpt", other)
    weights = ScGPTModel(start.model.config.encoder).state_dict()
    save_tensors(other / "model.safetensors", {name: value + 1 for name, value in weights.items()})
    with pytest.raises(OptionError, match="differs in scgpt"):
        reproduce(data, other, vectors, tmp_path / "runs", **call)
    alone = reproduce(data, tmp_path / "scgpt", vectors, tmp_path / "runs", dataset=None, **call)
    assert alone.xs("card", axis=1, level=1).isna().all(axis=None) and (
        alone.dropna(axis=1) == first[alone.dropna(axis=1).columns]
    ).all(axis=None)
    with pytest.raises(DataError, match="no vectors for 'go_f'"):
        reproduce(data, tmp_path / "scgpt", vectors, tmp_path / "runs", knowledge=["go_f"], **call)


def test_the_pearson_numbers_are_means_of_conditions_and_of_subgroups():
    from scellfm.scgenept.reproduction import own_numbers

    found = {"test_mse": 1.0, "test_mse_de": 2.0}
    for group, value in (("combo_seen1", 0.8), ("unseen_single", 0.2)):
        found |= {f"test_{group}_pearson_delta": value, f"test_{group}_pearson_delta_de": value / 2}
    numbers = own_numbers(found, {"combo_seen1": ["A+B", "A+C", "A+D"], "unseen_single": ["B"], "combo_seen0": []})
    assert numbers["pearson_delta"] == pytest.approx((3 * 0.8 + 0.2) / 4)
    assert numbers["pearson_delta_by_subgroup"] == pytest.approx(0.5)
    assert numbers["pearson_delta_top20"] == pytest.approx((3 * 0.4 + 0.1) / 4)
    assert numbers["pearson_delta_top20_by_subgroup"] == pytest.approx(0.25)
