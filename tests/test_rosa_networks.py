"""The original's models and losses: the same weights and inputs give the same numbers."""

import json

import numpy as np
import pytest
import torch
from conftest import golden
from safetensors.torch import load_file

from scellfm import AssetError, OptionError
from scellfm.rosa import networks
from scellfm.rosa.networks import NETWORKS, NetworkConfig, build_network, load_original

FOLDER = golden("rosa")
INFO = json.loads((FOLDER / "model_info.json").read_text())


def weights(name: str) -> dict:
    "The original's tensors."
    return load_file(FOLDER / f"model_{name}.safetensors")


def recorded() -> dict:
    "Inputs and outputs of the original's models as tensors."
    both = {**np.load(FOLDER / "model_batch.npz"), **np.load(FOLDER / "model_outputs.npz")}
    return {name: torch.from_numpy(values) for name, values in both.items()}


def config_of(name: str) -> NetworkConfig:
    "The shape of one of the recorded models."
    options, more = INFO["options"], {}
    if name == "perceiver":
        own = options["perceiver"]
        more = {"depth": own["depth"], "latents": own["num_latents"], "latent_dim": own["latent_dim"]}
        more |= {"dim_head": own["cross_dim_head"]}
    depth = 0 if name == "performer_depth0" else options["depth"]
    base = {"width": options["in_dim"], "n_out": options["n_bins"], "depth": depth, "dropout": 0.0}
    base |= {key: options[key] for key in ("n_bins", "dim", "heads", "dim_head")}
    return NetworkConfig(**{**base, **more, "gated": name != "encoder_decoder_noglu"})


def build(name: str) -> torch.nn.Module:
    "One of the recorded models with its weights."
    config = config_of(name)
    if name.startswith("encoder_decoder"):
        network = networks.EncoderDecoder(config)
    elif name == "performer_autoregressive":
        network = networks.AutoregressivePerformer(config)
    elif name == "perceiver":
        network = networks.PerceiverNetwork(config, latent_heads=INFO["options"]["perceiver"]["latent_heads"])
    elif name == "cross_transformer":
        layers = {key.split(".")[3] for key in weights(name) if key.startswith("transformer.core.layers")}
        heads = {key.split(".")[6] for key in weights(name) if ".attention.heads." in key}
        key_dim = len(weights(name)["transformer.core.layers.0.attention.heads.0.q.weight"])
        config = NetworkConfig(**{**vars(config), "depth": len(layers), "heads": len(heads)})
        network = networks.CrossTransformer(config, key_dim=key_dim)
    else:
        network = networks.Performer(config, masked_keys=True)
    return load_original(network, weights(name))


@pytest.mark.parametrize("name", INFO["models"])
def test_models_of_the_original(name):
    data, network = recorded(), build(name)
    with torch.no_grad():
        if name.startswith("encoder_decoder"):
            out = network.answer(data["expression_encoder"], data["var_input_encoder"], data["var_input_decoder"])
        elif name == "performer_autoregressive":
            out = network(data["expression_target"], data["var_input"])
        else:
            out = network(data["expression_input"], data["var_input"], data["mask"])
    torch.testing.assert_close(out, data[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", INFO["models"])
def test_a_changed_weight_is_seen(name):
    data, network = recorded(), build(name)
    with torch.no_grad():
        next(p for p in network.parameters() if p.ndim == 2).mul_(1.05)
        if name.startswith("encoder_decoder"):
            out = network.answer(data["expression_encoder"], data["var_input_encoder"], data["var_input_decoder"])
        elif name == "performer_autoregressive":
            out = network(data["expression_target"], data["var_input"])
        else:
            out = network(data["expression_input"], data["var_input"], data["mask"])
    assert (out - data[name]).abs().max() > 1e-3


def test_expression_embeddings_of_the_original():
    data, n_bins = recorded(), INFO["options"]["n_bins"]
    for name in ("sinusoidal", "sinusoidal_odd"):
        rows, dim = data[name].shape
        torch.testing.assert_close(networks.sinus_vectors(torch.arange(rows), n_bins, dim), data[name])
    dim, values = data["numerical"].shape[1], data["numerical"][:, 0]
    torch.testing.assert_close(networks.numerical_vectors(values, dim), data["numerical"], rtol=1e-5, atol=1e-6)


def test_numbers_of_parameters_at_full_size():
    full = json.loads((FOLDER / "provenance.json").read_text())["full_size_param_counts"]
    config = NetworkConfig(width=3072, n_out=8, **networks.SIZES["original"])
    norms = 4 * config.dim  # the recorded numbers of two models lack the norms of their embeddings
    counts = {
        "encoder_decoder": networks.EncoderDecoder(config),
        "performer": networks.Performer(config),
        "performer_autoregressive": networks.AutoregressivePerformer(config),
    }
    for name, network in counts.items():
        n = sum(p.numel() for p in network.parameters())
        assert n == full[name] + (norms if name != "encoder_decoder" else 0)


def test_a_checkpoint_of_another_model_is_refused():
    network = networks.Performer(config_of("performer"))
    with pytest.raises(AssetError, match="of another model"):
        load_original(network, weights("encoder_decoder"))
    tensors = weights("performer")
    tensors["expression_head.model.projection.bias"] = torch.zeros(3)
    with pytest.raises(AssetError, match="head.bias"):
        load_original(network, tensors)


@pytest.mark.parametrize("kind", NETWORKS)
def test_an_answer_depends_on_what_is_read_and_on_its_own_vector_alone(kind):
    config = NetworkConfig(width=12, n_out=2, dim=32, heads=4, dim_head=8)
    network = build_network(kind, config, seed=1).eval()
    draw = torch.Generator().manual_seed(0)
    bins = torch.randint(0, 8, (3, 40), generator=draw)
    known, asked = torch.randn(40, 12, generator=draw), torch.randn(9, 12, generator=draw)
    with torch.no_grad():
        whole = network.answer(bins, known, asked)
        parts = torch.cat([network.answer(bins, known, part) for part in asked.split(4)], dim=1)
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
        order = torch.randperm(40, generator=draw)
        torch.testing.assert_close(network.answer(bins[:, order], known[order], asked), whole, rtol=1e-4, atol=1e-5)
        other = network.answer(bins.roll(1, dims=1), known, asked)
        assert (other - whole).abs().max() > 1e-4


def test_weights_depend_on_the_seed_alone():
    config = NetworkConfig(width=5, n_out=1)
    for kind in NETWORKS:
        torch.manual_seed(7)
        before = torch.rand(1)
        torch.manual_seed(7)
        first, second = (build_network(kind, config, seed=2).state_dict() for _ in range(2))
        assert torch.equal(torch.rand(1), before) and all(torch.equal(first[k], second[k]) for k in first)


def test_impossible_shapes_are_refused():
    with pytest.raises(OptionError, match="Did you mean 'performer'"):
        build_network("perfomer", NetworkConfig(width=5, n_out=1))
    for wrong in ({"heads": 0}, {"dropout": 2.0}, {"n_bins": 1}, {"width": 0}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            NetworkConfig(**{"width": 5, "n_out": 1, **wrong})


def test_losses_and_classes_of_the_original():
    from scellfm.rosa import losses

    data = {name: torch.from_numpy(np.asarray(values)) for name, values in np.load(FOLDER / "scores.npz").items()}
    total, number = losses.cross_entropy(data["logits"], data["target"])
    torch.testing.assert_close(total / number, data["ce_plain"], rtol=1e-5, atol=1e-6)
    counts = torch.bincount(data["target"].flatten(), minlength=data["logits"].shape[-1])
    assert torch.equal(counts, data["counts"])
    total, number = losses.cross_entropy(data["logits"], data["target"], 1 / counts)
    torch.testing.assert_close(total / number, data["ce_weighted"], rtol=1e-5, atol=1e-6)
    zero = counts.clone()
    zero[data["target"][0, 0]] = 0
    assert torch.isnan(data["ce_weighted_zero_count"])  # the original's; ours leaves the class out
    total, number = losses.cross_entropy(data["logits"], data["target"], losses.class_weights(zero))
    assert torch.isfinite(total / number)
    bins, confidence = losses.most_probable(data["logits"])
    assert torch.equal(bins, data["sample_prediction"])
    torch.testing.assert_close(confidence, data["sample_confidence"], rtol=1e-5, atol=1e-6)


def test_count_losses_are_the_likelihoods_of_scipy():
    from scipy import stats

    from scellfm.rosa import losses

    draws = np.random.default_rng(0)
    counts, size = draws.poisson(3.0, 50).astype(float), draws.uniform(0.5, 2.0, 50)
    rate, dispersion = draws.uniform(0.5, 4.0, 50), draws.uniform(0.1, 2.0, 50)
    answers = torch.from_numpy(np.log(np.stack([rate, dispersion], axis=1)))
    found = losses.negative_binomial(answers, torch.from_numpy(counts), torch.from_numpy(size))[0]
    n = 1 / dispersion
    exact = stats.nbinom.logpmf(counts, n, n / (n + rate * size))
    constant = np.array([np.sum(np.log(np.arange(1, c + 1))) for c in counts])
    np.testing.assert_allclose(found, -(exact + constant).sum(), rtol=1e-6)
    found = losses.poisson(answers[:, :1], torch.from_numpy(counts), torch.from_numpy(size))[0]
    np.testing.assert_allclose(found, -(stats.poisson.logpmf(counts, rate * size) + constant).sum(), rtol=1e-6)


def test_ridge_of_the_original():
    from scellfm.rosa.ridge import original_ridge, ridge_weights

    data = np.load(FOLDER / "ridge.npz")
    W, b = ridge_weights(data["X_train"], data["Y_train"], 100.0)
    np.testing.assert_allclose(data["X_test"] @ W + b, data["sklearn_alpha100"], rtol=1e-8, atol=1e-8)
    n_bins = INFO["options"]["n_bins"]
    found = original_ridge(data["X_train"], data["Y_train"], data["X_test"], alpha=100.0, n_bins=n_bins)
    for ours, name in zip(found, ("closed_form_alpha100", "closed_form_rounded", "variant_delta_expression")):
        np.testing.assert_allclose(ours, data[name], rtol=1e-8, atol=1e-8)
    few = ridge_weights(data["X_train"][:7], data["Y_train"][:7], 3.0)[0]
    X = data["X_train"][:7] - data["X_train"][:7].mean(axis=0)
    exact = np.linalg.solve(X.T @ X + 3 * np.eye(X.shape[1]), X.T @ data["Y_train"][:7])
    np.testing.assert_allclose(few, exact, rtol=1e-8)
