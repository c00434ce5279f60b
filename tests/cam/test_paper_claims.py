"""What the papers claim, on a small trained network: sums that tell scores, and maps that depend on the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.stats import kendalltau, spearmanr
from torch import nn

import camtrain as ct

pytestmark = pytest.mark.slow
SIDE, CLASSES = 16, 4


def particles(n, seed):
    """Globule, shell, rod and two blobs in noise, at random places: (n, 1, 16, 16, 16) and their class."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(*[torch.arange(SIDE).float()] * 3, indexing="ij"))
    kinds = torch.arange(n) % CLASSES
    volumes = []
    for kind in kinds.tolist():
        centre = SIDE / 2 - 0.5 + 4 * (torch.rand(3, generator=generator) - 0.5)
        offset = grid - centre[:, None, None, None]
        axis = int(torch.randint(3, (1,), generator=generator))
        radius = offset.square().sum(0).sqrt()
        apart = (offset.square().sum(0) - offset[axis].square()).clamp(min=0).sqrt()
        shape = {
            0: 3.5 - radius,
            1: 1.0 - (radius - 4).abs(),
            2: torch.minimum(1.6 - apart, 6 - offset[axis].abs()),
            3: 2.2 - (apart.square() + (offset[axis].abs() - 3.5).square()).sqrt(),
        }[kind]
        volumes.append(torch.sigmoid(shape / 0.5) + 0.1 * torch.randn(radius.shape, generator=generator))
    stacked = torch.stack(volumes)
    flat = stacked.flatten(1)
    return ((stacked - flat.mean(1)[:, None, None, None]) / flat.std(1)[:, None, None, None])[:, None], kinds


class CNN(nn.Module):
    """The shape of Respond-CAM's CNN-1: two blocks of convolutions, pools, and fully connected layers, with biases."""

    def __init__(self):
        super().__init__()
        self.c1, self.r1, self.p1 = nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2)
        self.c2, self.r2, self.p2 = nn.Conv3d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2)
        self.f1, self.r3, self.f2 = nn.Linear(16 * 4**3, 32), nn.ReLU(), nn.Linear(32, CLASSES)

    def forward(self, image):
        features = self.p2(self.r2(self.c2(self.p1(self.r1(self.c1(image))))))
        return self.f2(self.r3(self.f1(features.flatten(1))))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = CNN()
    images, kinds = particles(240, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(10):
        for rows in torch.randperm(len(images)).split(24):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), kinds[rows]).backward()
            optimizer.step()
    model.eval()
    tests, truth = particles(24, 1)
    accuracy = (model(tests).argmax(1) == truth).float().mean().item()
    assert accuracy > 0.8, accuracy
    return model, tests


def test_respond_cam_sums_to_the_score_and_grad_cam_does_not(trained):
    """L1 a tenth of Grad-CAM's at most, ranks of the classes kept; with the biases exact."""
    model, tests = trained
    logits = model(tests).detach()
    total = {m: ct.explain(model, tests, m, "p2").flatten(2).sum(2) for m in ("gradcam", "respondcam", "hirescam")}
    error = {m: (s - logits).abs().mean() for m, s in total.items()}
    ranks = {m: [kendalltau(a, b).statistic for a, b in zip(s, logits, strict=True)] for m, s in total.items()}
    assert error["respondcam"] < 0.1 * error["gradcam"]
    assert sum(ranks["respondcam"]) / len(ranks["respondcam"]) > 0.95
    torch.testing.assert_close(total["respondcam"], total["hirescam"], rtol=1e-4, atol=1e-4)
    account = ct.account(model, tests, "p2")
    assert (total["respondcam"] + account.bias - logits).abs().max() < 1e-5 * logits.abs().max()


def test_maps_depend_on_the_weights_of_the_head_and_guided_backprop_hardly(trained):
    """Adebayo et al. 2018: the head is made random again; guided backprop is the negative control."""
    model, tests = trained
    scrambled = copy.deepcopy(model)
    torch.manual_seed(7)
    for layer in (scrambled.f2, scrambled.f1):
        layer.reset_parameters()
    labels = model(tests).argmax(1, keepdim=True)
    dependent = ("hirescam", "gradcam", "respondcam", "relevancecam")
    asked = {name: {"method": name} for name in (*dependent, "guided_backprop")}
    asked["official code"] = {"method": "relevancecam", "contrast": "official-code"}
    alike = {}
    for name, how in asked.items():
        pair = [ct.explain(m, tests, layer="p2", labels=labels, **how).flatten(1) for m in (model, scrambled)]
        pair = [p.abs() for p in pair] if name == "guided_backprop" else pair
        alike[name] = sum(spearmanr(a, b).statistic for a, b in zip(*pair, strict=True)) / len(tests)
    for name in dependent:
        assert abs(alike[name]) < 0.7, alike
        assert abs(alike[name]) < alike["guided_backprop"], alike
    # With few labels the official contrast leaves the map that no label and no head has a part in.
    assert alike["official code"] > 0.9, alike


def test_how_much_contrast_makes_relevance_cam_tell_classes_apart(trained):
    """Gu et al. 2018: z+ alone is blind to the class, and the 1 / N that the official code leaves is z+ alone."""
    model, tests = trained
    signs = model(tests).detach().sign()[..., None]

    def alike(contrast):
        maps = ct.explain(model, tests, "relevancecam", "p1", contrast=contrast).flatten(2)
        maps = maps * signs if contrast in ("none", "paper") else maps  # these two turn with the logit
        return torch.stack([torch.corrcoef(m) for m in maps])[:, ~torch.eye(CLASSES, dtype=torch.bool)].mean()

    assert alike("none") > 0.99
    assert alike("official-code") > 0.9
    assert alike("others") < 0.2
    torch.testing.assert_close(alike("paper"), alike("others"), rtol=1e-3, atol=1e-3)
