"""Channel weights: with the activations they give the map back; Grad-CAM's are its neuron importances."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import camtrain as ct
from camtrain.cam.channel_weights import WITH_WEIGHTS

B, K, L = 2, 6, 4


class Net(nn.Module):
    def __init__(self, pool=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act = nn.Conv3d(1, K, 3), nn.ReLU()
        self.pool, self.hidden = pool, nn.Sequential(nn.Linear(K * 3 * 5 * 4, 8), nn.ReLU(), nn.Linear(8, L))
        self.fc = nn.Linear(K, L)

    def forward(self, image):
        features = self.act(self.conv(image))
        return self.fc(features.mean(dim=(2, 3, 4))) if self.pool else self.hidden(features.flatten(1))


def image():
    return torch.rand(B, 1, 5, 7, 6, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("method", WITH_WEIGHTS)
def test_weights_times_activations_are_the_map(method):
    model, x = Net(pool=method == "cam").double().eval(), image()
    weights = ct.channel_weights(model, x, method, "act")
    assert weights.shape == (B, L, K)
    active = model.act(model.conv(x)).detach()
    torch.testing.assert_close(
        torch.einsum("blk,bkxyz->blxyz", weights, active), ct.explain(model, x, method, "act"), rtol=1e-6, atol=1e-12
    )


@pytest.mark.parametrize("method", WITH_WEIGHTS)
def test_labels_and_targets(method):
    model, x = Net(pool=method == "cam").double().eval(), image()
    every = ct.channel_weights(model, x, method, "act")
    picks = torch.tensor([[3, 1], [0, 0]])
    chosen = ct.channel_weights(model, x, method, "act", labels=picks)
    for i in range(B):
        torch.testing.assert_close(chosen[i], every[i, picks[i]])
    mask = torch.tensor([[True, False, False, False], [False, True, True, False]])
    masked = ct.channel_weights(model, x, method, "act", labels=mask)
    assert masked[~mask].isnan().all()
    torch.testing.assert_close(masked[mask], every[mask])
    # A target is not proven to be linear, and the others are not linear in the score.
    if method not in ("cam", "relevancecam", "gradcam++"):
        score = ct.channel_weights(model, x, method, "act", target=lambda y: y[:, 2])
        torch.testing.assert_close(score[:, 0], every[:, 2])


def test_grad_cams_weights_are_mean_gradients():
    model, x, kept = Net().double().eval(), image(), {}
    handle = model.act.register_forward_hook(lambda m, i, o: kept.update(a=o))
    logits = model(x)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), kept["a"])
    torch.testing.assert_close(
        ct.channel_weights(model, x, layer="act", labels=[1])[:, 0], gradient.mean(dim=(2, 3, 4))
    )


def test_methods_without_channel_weights_and_heads_without_cam():
    with pytest.raises(ct.InputError, match="use one of gradcam"):
        ct.channel_weights(Net().eval(), image().float(), "hirescam", "act")
    mlp = nn.Sequential(
        nn.Conv3d(1, K, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(K, 5), nn.ReLU()
    )
    for model, layer in ((Net().double().eval(), "act"), (mlp.double().eval(), "1")):
        with pytest.raises(ct.InputError, match="needs global average pooling"):
            ct.channel_weights(model, image(), "cam", layer)
