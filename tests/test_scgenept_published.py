"Published models are fetched from their store by name, and the protocol of their tables can be repeated and resumed."

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from scgenept_golden import fine_tuned, genes, scgpt_folder

from scellfm.assets import save_tensors
from scellfm.core import AssetError, DataError, OptionError, StoreError
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
    assert list(first.index) == ["scgpt", "ncbi"] and first.loc["ncbi", ("pearson_delta", "card")] == 0.548
    files = sorted((tmp_path / "runs").glob("*.json"))
    stamps = [file.stat().st_mtime_ns for file in files]
    again = reproduce(data, tmp_path / "scgpt", vectors, tmp_path / "runs", **call)
    assert first.equals(again) and stamps == [file.stat().st_mtime_ns for file in files]
    assert len(files) == 4 and json.loads(files[0].read_text())["settings"]["training"]["epochs"] == 1
    with pytest.raises(StoreError, match="another run"):
        reproduce(data, tmp_path / "scgpt", vectors, tmp_path / "runs", **call | {"epochs": 2})
    with pytest.raises(DataError, match="no vectors for 'go_f'"):
        reproduce(data, tmp_path / "scgpt", vectors, tmp_path / "runs", knowledge=["go_f"], **call)
