"""What the tests of LRP share: seeded networks, and the relevance at chosen layers."""

from __future__ import annotations

import torch
from torch import nn

from camtrain.cam.lrp import find_rules, lrp_hooks
from camtrain.cam.lrp_rules import safe


def seeded(module, seed=0):
    """Random weights, and statistics of norms that are not those of a fresh net; eval mode."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.normal_(0, 0.3, generator=g)
                m.running_var.uniform_(0.5, 1.5, generator=g)
            if isinstance(m, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm) and m.weight is not None:
                m.weight.uniform_(0.5, 1.5, generator=g)
                m.bias.normal_(0, 0.3, generator=g)
    return module.eval()


def built(factory, seed=0):
    torch.manual_seed(seed)
    return seeded(factory())


def randn(*size, dtype=torch.float32, seed=1):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relevances(model, image, names, start=None, rules="zplus", gates=None):
    """{name: relevance} at the image ("input") and at layers; the forward's values must not change."""
    with torch.no_grad():
        expected = model(image.clone())
    leaf = image.clone().requires_grad_()
    found = {"input": leaf}

    def keep(name):
        def hook(_, __, output):
            found[name] = output
            return output.clone()

        return hook

    rules = find_rules(rules) if isinstance(rules, str) else rules
    with lrp_hooks(model, rules, gates) as hooks:
        handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        y = model(leaf.clone())
        for handle in handles:
            handle.remove()
    assert torch.equal(y, expected)
    start = torch.ones_like(y) if start is None else start
    gradients = torch.autograd.grad(y, list(found.values()), start / safe(y))
    return {n: safe(a) * g for (n, a), g in zip(found.items(), gradients, strict=True)}, hooks


def shares(relevance, start):
    """Sum of every sample's relevance over what it started with."""
    return relevance.flatten(1).sum(1) / start.flatten(1).sum(1)
