"""Transformers by `reshape=`: tokens become cells; MONAI's ViT and the encoder of SwinUNETR."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import ViT
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import nn

import camtrain as ct

B, L = 2, 3
GRADIENT = [r.name for r in ct.methods() if r.family == "gradient" and r.name != "cam"]


def vit():
    torch.manual_seed(0)
    return ViT(
        in_channels=1,
        img_size=(16, 24, 32),
        patch_size=8,
        hidden_size=24,
        mlp_dim=48,
        num_layers=2,
        num_heads=4,
        classification=True,
        num_classes=L,
        post_activation="none",  # any other word than "Tanh" leaves the logits as they are
    ).eval()


def cells(tokens):
    """(B, 1 + 24, C) -> (B, C, 2, 3, 4): drop the class token, then back to the grid of patches."""
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (2, 3, 4))


class SwinClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = SwinTransformer(1, 12, (3, 3, 3), (2, 2, 2), (1, 1, 1, 1), (1, 2, 2, 4), spatial_dims=3)
        self.fc = nn.Linear(192, L)

    def forward(self, image):
        return self.fc(self.encoder(image)[-1].mean(dim=(2, 3, 4)))


def image(*grid):
    return torch.rand(B, 1, *grid, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", GRADIENT)
def test_vit_tokens(method):
    maps = ct.explain(
        vit(), image(16, 24, 32), method, "blocks.0", logits=lambda y: y[0], reshape=cells, labels=[2, 0], size="image"
    )
    assert maps.shape == (B, 2, 16, 24, 32)
    assert torch.isfinite(maps).all()
    assert maps.abs().amax(dim=(2, 3, 4)).min() > 0


def test_patch_tokens_of_the_last_block_reach_no_logit():
    """What the documentation says: only the class token is read, so an earlier block must be taken."""
    maps = ct.explain(vit(), image(16, 24, 32), layer="blocks.1", logits=lambda y: y[0], reshape=cells)
    assert (maps == 0).all()


def test_vit_hirescam_by_hand():
    model, x, kept = vit(), image(16, 24, 32), {}
    handle = model.blocks[0].register_forward_hook(lambda m, i, o: kept.update(a=o))
    logits = model(x)[0]
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), kept["a"])
    expected = (kept["a"] * gradient)[:, 1:].sum(dim=2).reshape(B, 2, 3, 4).detach()
    maps = ct.explain(model, x, layer="blocks.0", logits=lambda y: y[0], reshape=cells, labels=[1])
    torch.testing.assert_close(maps[:, 0], expected)


@pytest.mark.parametrize("method", GRADIENT)
def test_swin_encoder_stages_need_no_reshape(method):
    maps = ct.explain(SwinClassifier().eval(), image(32, 64, 32), method, "encoder.layers3.0", labels=[1])
    assert maps.shape == (B, 1, 2, 4, 2)
    assert torch.isfinite(maps).all()


def test_swin_blocks_work_with_the_channels_last():
    model = SwinClassifier().eval()
    maps = ct.explain(
        model, image(32, 64, 32), layer="encoder.layers3.0.blocks.0", reshape=lambda t: t.movedim(-1, 1), labels=[1]
    )
    assert maps.shape == (B, 1, 4, 8, 4)
    (name,) = [r.name for r in ct.layers(model, image(32, 64, 32), seen=False) if r.default]
    assert name.startswith("encoder.layers4")


def test_without_reshape_the_error_says_what_to_do():
    with pytest.raises(ct.InputError, match=r"blocks\.0.*reshape="):
        # A token sequence (B, N, C) has one axis too few for a volume.
        ct.explain(vit(), image(16, 24, 32), layer="blocks.0", logits=lambda y: y[0])


def test_lrp_has_no_rule_for_attention():
    with pytest.raises(ct.InputError, match=r"SABlock|attn"):
        ct.explain(vit(), image(16, 24, 32), "lrp", "blocks.0", logits=lambda y: y[0], reshape=cells)
