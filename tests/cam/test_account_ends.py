"""Where a logit is more than its cells and biases, the account says so; and where it only seems to, it does not."""

from __future__ import annotations

import pytest
import torch
from account_tools import CONV, INSTANCE, L, cnn, image, total
from torch import nn

from camtrain.cam.account import account


@pytest.mark.parametrize("norm", [
    nn.InstanceNorm3d(4, eps=1e-12),
    nn.GroupNorm(1, 4, eps=1e-12, affine=False),
    nn.BatchNorm3d(4, eps=1e-12, track_running_stats=False, affine=False),
    nn.LayerNorm([4, 4, 6, 5], eps=1e-12, elementwise_affine=False),
], ids=lambda norm: type(norm).__name__)  # fmt: skip
def test_a_norm_on_its_own_statistics_makes_the_sum_zero_and_the_account_says_so(norm):
    model = nn.Sequential(*cnn(3)[:2], norm.double(), nn.Flatten(), nn.Linear(480, L).double())
    found = account(model, image(3), "1")
    assert found.logits.abs().max() > 0.1
    assert found.cells.abs().max() > 1e-3
    # Statistics of the batch tie its samples together: there the sum is 0 over all of them.
    sums = found.cells.flatten(2).sum(dim=2)
    assert (sums.sum(dim=0) if isinstance(norm, nn.BatchNorm3d) else sums).abs().max() < 1e-6
    assert not found.valid
    assert "sum is 0 whatever the logit is" in found.why[0]
    assert "sum is 0 whatever the logit is" in found.respond_why[0]
    assert "not valid" in repr(found)
    behind = account(model, image(3), "2")
    assert behind.valid, behind.why


def test_an_instance_norm_on_running_statistics_is_affine():
    model = cnn(3, [INSTANCE[3](4, affine=True, track_running_stats=True)])
    found = account(model, image(3), "1")
    assert found.valid, found.why
    torch.testing.assert_close(total(found), found.logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("activation", "named"), [(nn.SiLU(), "Silu"), (nn.GELU(), "Gelu"), (nn.Sigmoid(), "Sigmoid")])
def test_other_activations_end_the_account(activation, named):
    found = account(cnn(2, [CONV[2](4, 4, 1), activation]), image(2), "1")
    assert not found.valid
    assert named in found.why[0]
    assert "not piecewise linear" in found.why[0]
    assert found.obstacles == found.why


class Gate(nn.Module):
    def forward(self, maps):
        return maps * maps.mean(dim=(2, 3), keepdim=True)


def test_a_gate_ends_the_account_and_a_fixed_factor_does_not():
    assert "Mul of two of its features" in account(cnn(2, [Gate()]), image(2), "1").why[0]

    class Factor(nn.Module):
        def forward(self, maps):
            return 3 * maps / 2 - maps

    assert account(cnn(2, [Factor()]), image(2), "1").valid


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layer, self.fc = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, L)

    def forward(self, picture):
        maps = self.stem(picture)
        return self.fc((maps + self.layer(maps)).mean(dim=(2, 3)))


def test_a_way_around_the_layer_is_said():
    model = Around()
    found = account(model, image(2).float(), "layer")
    assert "around layer 'layer'" in found.why[0]
    assert found.obstacles == ()
    assert account(model, image(2).float(), "stem").valid
    # The cells and the bias are still those of the layer; what went around it is what is left.
    stem = model.stem(image(2).float()).mean(dim=(2, 3)) @ model.fc.weight.t()
    torch.testing.assert_close(found.residual, stem.detach(), rtol=0, atol=1e-5)


def test_what_saturates_is_left_over_in_that_sample_only():
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU6(), nn.Flatten(), nn.Linear(4 * 56, L))
    picture = image(2).float()
    picture[1] *= 100
    found = account(model, picture, "0")
    assert found.balanced.tolist() == [[True] * L, [False] * L]
    assert "saturates" in found.why[0]


def test_rows_that_belong_to_no_sample_are_told():
    class Mixed(nn.Module):
        """Drops a slice of the batch before a layer with a bias: 2 x 3 - 1 rows for 2 samples."""

        def __init__(self):
            super().__init__()
            self.layer, self.fc = nn.Conv3d(1, 4, 1), nn.Linear(4, L)

        def forward(self, volume):
            rows = self.layer(volume).transpose(1, 2).flatten(0, 1).mean(dim=(2, 3))
            scores = self.fc(rows[:-1])
            return torch.stack([scores[:3].sum(dim=0), scores[3:].sum(dim=0)])[: len(volume)]

    found = account(Mixed(), torch.rand(2, 1, 3, 4, 5), "layer")
    assert "one image at a time" in found.why[0]


def test_a_signed_layer_is_named_as_a_caveat_of_respond_cam():
    found = account(cnn(2), image(2), "3")  # a BatchNorm
    assert found.signed_share.min() > 0.01
    assert "negative values" in found.respond_why[0]
    assert account(cnn(2), image(2), "1").respond_why == ()
