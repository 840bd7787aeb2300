"Attention that keeps no weights has the numbers and gradients of torch's attention."

import pytest
import torch
import torch.nn.functional as F

from scellfm.scgpt import attention, model
from scellfm.scgpt.attention import lean_attention
from scellfm.scgpt.model import Encoder, ScGPTConfig


def inputs(n_genes=50, n_cells=2, d=8):
    torch.manual_seed(0)
    return [torch.randn(n_cells, 3, n_genes, d, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("rows", [7, 50, 192])
@pytest.mark.parametrize("hidden", [0, 9])
def test_without_dropout_it_is_torchs_attention(monkeypatch, rows, hidden):
    monkeypatch.setattr(attention, "ROWS", rows)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[0, 50 - hidden :] = False
    q, k, v = inputs()
    weight = torch.randn_like(q)
    found = lean_attention(q, k, v, mask)
    gradients = torch.autograd.grad((found * weight).sum(), (q, k, v))
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    for one, other in zip(gradients, torch.autograd.grad((wanted * weight).sum(), (q, k, v))):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_the_same_seed_drops_the_same_and_the_size_of_a_block_is_no_matter_of_the_share():
    q, k, v = inputs(300, 1)
    ones = torch.ones_like(v)
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        results.append(lean_attention(q, k, ones, dropout=0.3))
    assert torch.equal(*results)
    assert abs(float(results[0].detach().mean()) - 1) < 0.01  # what is kept is scaled up


def test_dropout_has_its_share():
    q = torch.zeros(1, 1, 400, 4)
    kept = torch.cat([kept.flatten() for *_, kept in attention.Blocks(q, q, None, 0.2, 3)])
    assert abs(float(kept.mean()) - 0.8) < 0.005


def test_gradients_with_dropout_are_those_of_differences():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda *x: attention.LeanAttention.apply(*x, None, 0.4, 3), (q, k, v))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_encoder_that_spares_memory_learns_the_same(monkeypatch, checkpointing):
    torch.manual_seed(0)
    monkeypatch.setattr(model, "LONG", 1)
    encoder = Encoder(ScGPTConfig(5, 0, d_model=16, n_heads=2, d_hid=16, n_layers=2, dropout=0.0)).train()
    x = torch.randn(2, 11, 16)
    gradients = []
    for lean in (False, True):
        encoder.spare(lean=lean, checkpointing=checkpointing and lean)
        for layer in encoder.layers:
            layer.self_attn.dropout = 1e-9 if lean else 0.0  # takes the lean way and drops nothing
        encoder.zero_grad()
        encoder(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in encoder.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-4)


def test_checkpointing_repeats_the_dropout_of_the_forward_pass(monkeypatch):
    monkeypatch.setattr(model, "LONG", 1)
    encoder = Encoder(ScGPTConfig(5, 0, d_model=16, n_heads=2, d_hid=16, n_layers=2, dropout=0.3)).train()
    x = torch.randn(2, 11, 16)
    gradients = []
    for checkpointing in (False, True):
        encoder.spare(checkpointing=checkpointing)
        encoder.zero_grad()
        torch.manual_seed(3)
        encoder(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in encoder.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)
