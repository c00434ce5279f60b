"""What the tests of the account share: a network with constants of every kind, and the sums it must give."""

from __future__ import annotations

import torch
from torch import nn

B, L = 2, 3
GRIDS = {1: (11,), 2: (8, 7), 3: (6, 8, 7)}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def shaken(model):
    """BatchNorms and biases as after some training, so that every constant matters."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                nn.init.normal_(parameter, 0, 0.3)
            if name == "weight" and isinstance(module, nn.modules.batchnorm._NormBase):
                nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def cnn(rank, between_layers=()):
    """Layer "1" is a ReLU; behind it convolutions, an eval BatchNorm, in-place ReLUs, pooling and an MLP."""
    torch.manual_seed(0)
    pool = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}[rank]
    return shaken(
        nn.Sequential(
            *(CONV[rank](2, 4, 3), nn.ReLU()),
            *between_layers,
            *(CONV[rank](4, 5, 3, padding=1), NORM[rank](5), nn.ReLU(inplace=True), pool(2), nn.Flatten()),
            *(nn.Linear(5 * 2**rank, 6), nn.LeakyReLU(0.1, inplace=True), nn.Linear(6, L)),
        ).double()
    ).eval()


def image(rank, batch=B):
    torch.manual_seed(1)
    return torch.randn(batch, 2, *GRIDS[rank], dtype=torch.float64)


def total(found):
    return found.cells.flatten(2).sum(dim=2) + found.bias


def bias_by_parameters(model, modules, picture):
    """sum <b, d logit / d b> of each sample alone, from the parameters' own gradients."""
    rows = []
    for one in picture.split(1):
        logits = model(one)[0]
        row = []
        for logit in logits:
            part = 0.0
            for module in modules:
                (gradient,) = torch.autograd.grad(logit, module.bias, retain_graph=True)
                constant = module.bias
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    constant = constant - module.weight * module.running_mean / (module.running_var + module.eps).sqrt()
                part += float((constant.detach() * gradient).sum())
            row.append(part)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)
