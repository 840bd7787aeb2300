"""Small random Enformers whose output depends strongly on the sequence, as that of a fresh one does not."""

import torch

from scellfm.rosa import Enformer


def lively(seed: int = 0, **changes) -> Enformer:
    "A tiny Enformer that attends, with running statistics of normalisation as a trained one has them."
    model = Enformer.from_config("tiny", device="cpu", seed=seed, **changes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model.module.train()
        codes = torch.randint(0, 4, (4, model.bin_size * 16))
        for layer in model.module.transformer:
            torch.nn.init.normal_(layer[0].fn[1].to_out.weight, std=0.1)
        for norm in model.module.modules():
            if isinstance(norm, torch.nn.BatchNorm1d):
                norm.momentum = 1.0
        model.forward(codes.to(torch.uint8))
        model.module.eval()
    return model
