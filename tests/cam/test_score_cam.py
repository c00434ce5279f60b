"""Score-CAM against a loop written from the paper; what it costs; which channels, labels and layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_cam_tools import MODES, SIZES, B, K, L, Net, image
from torch import nn

import camtrain as ct
from camtrain.cam.score_cam import ScoreCAMOptions, masked, unit_masks


def reference(model, x, layer, background=0.0, keep=None):
    """Sample by sample, channel by channel, label by label, with the base score that cancels."""
    kept = []
    handle = dict(model.named_modules())[layer].register_forward_hook(lambda *a: kept.append(a[2].detach().clone()))
    model(x)
    handle.remove()
    activations, rank = kept[0], x.ndim - 2
    result = torch.zeros(len(x), L, *activations.shape[2:], dtype=x.dtype)
    for b in range(len(x)):
        base = model(torch.full_like(x[b : b + 1], background))[0].detach()
        increase, used = [], []
        for k in range(activations.shape[1]):
            a = activations[b, k]
            if a.max() == a.min() or (keep is not None and k not in keep[b]):
                continue
            up = nn.functional.interpolate(a[None, None], x.shape[2:], mode=MODES[rank], align_corners=False)
            mask = (up - up.min()) / (up.max() - up.min())
            increase.append(model(background + mask * (x[b : b + 1] - background))[0].detach() - base)
            used.append(k)
        if used:
            weights = torch.stack(increase).softmax(dim=0)
            for label in range(L):
                result[b, label] = sum(w * activations[b, k] for w, k in zip(weights[:, label], used, strict=True))
    return result


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("background", [0.0, -0.7])
def test_equals_the_loop(rank, background):
    model, x = Net(rank).double().eval(), image(rank).double()
    for layer in ("norm", "one"):
        maps = ct.explain(model, x, "scorecam", layer, background=background)
        assert maps.dtype == torch.float64
        torch.testing.assert_close(maps, reference(model, x, layer, background), rtol=1e-10, atol=1e-12)
        if layer == "norm":
            assert (maps < 0).any(), "no outer ReLU"


def test_the_weights_are_positive_and_sum_to_one():
    """The channels of a net whose features are one-hot in space can be read off its map."""
    model, x = Net(2).eval(), image(2)
    ones = ct.explain(model, x, "scorecam", "two")
    with torch.no_grad():
        model.two.bias += 3.0  # every channel + 3: so is every map
        model.norm.running_mean += 3.0
    torch.testing.assert_close(ct.explain(model, x, "scorecam", "two"), ones + 3, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_chunks_do_not_matter_and_bound_the_forward(chunk):
    model, x = Net().double().eval(), image().double()
    expected = ct.explain(model, x, "scorecam", "norm", chunk=5)
    model.seen.clear()
    maps = ct.explain(model, x, "scorecam", "norm", chunk=chunk)
    torch.testing.assert_close(maps, expected, rtol=1e-10, atol=1e-12)
    first, *masks = model.seen
    assert first == B
    assert max(masks) <= chunk
    assert sum(masks) == B * K
    assert len(masks) == -(-B * K // chunk)


def test_labels_cost_nothing():
    model, x = Net().eval(), image()
    ct.explain(model, x, "scorecam", "act", labels=[0])
    one = list(model.seen)
    model.seen.clear()
    ct.explain(model, x, "scorecam", "act")
    assert model.seen == one
    model.seen.clear()
    assert ct.explain(model, x, "scorecam", "act", labels=[]).shape == (B, 0, 4, 5, 4)
    none = ct.explain(model, x, "scorecam", "act", labels=torch.zeros(B, L).bool())
    assert none.shape == (B, L, 4, 5, 4)
    assert none.isnan().all()
    assert model.seen == [B, B], "where nothing is asked, no mask is tried"


def test_no_tensor_of_all_masks():
    """Nothing of B x K images, nor of B x K masks, is ever made: sizes of all results of operators are watched."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    Watch.largest = max(Watch.largest, tensor.numel())
            return out

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(1, 64, 5, stride=4), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, L)).eval()
    x = torch.rand(2, 1, 20, 24, 16)
    with Watch():
        ct.explain(model, x, "scorecam", "0", chunk=3)
    assert 3 * x[0].numel() <= Watch.largest < 4 * x[0].numel()


# channels ------------------------------------------------------------------------------------------------------------


def test_top_channels_by_standard_deviation():
    model, x = Net().double().eval(), image().double()
    with torch.no_grad():
        model.two.weight *= torch.tensor([0.1, 9, 1, 4, 0.5, 2, 3]).reshape(-1, 1, 1, 1, 1)
        features = model.two(model.one(x).relu())
    keep = features.flatten(2).std(dim=2).topk(3, dim=1).indices.tolist()
    maps = ct.explain(model, x, "scorecam", "two", channels=3)
    torch.testing.assert_close(maps, reference(model, x, "two", keep=keep), rtol=1e-10, atol=1e-12)
    model.seen.clear()
    ct.explain(model, x, "scorecam", "two", channels=3, chunk=4)
    assert sum(model.seen) == B + 3 * B
    full = ct.explain(model, x, "scorecam", "two")
    for many in (K, K + 5):
        torch.testing.assert_close(ct.explain(model, x, "scorecam", "two", channels=many), full)


class Planted(nn.Module):
    """Its layer returns what it is told; the logits read the image's two halves."""

    def __init__(self, features):
        super().__init__()
        self.layer, self.features = nn.Identity(), features

    def forward(self, image):
        features = self.features if self.features is not None else image
        kept = self.layer(features[: len(image)] + 0 * image.sum())
        half = image.flatten(2).chunk(2, dim=2)
        return torch.stack([h.sum(dim=(1, 2)) for h in half], dim=1) + 0 * kept.sum()


def test_a_channel_that_covers_the_evidence_gets_the_weight():
    left = torch.tensor([5.0, 5, 0, 0])
    model = Planted(torch.stack([left, left.flip(0)])[None])
    maps = ct.explain(model, torch.full((1, 1, 16), 20.0), "scorecam", "layer")
    # Half the image is worth 8 x 20 in one logit, so that the softmax is all or nothing.
    torch.testing.assert_close(maps[0], torch.stack([left, left.flip(0)]), rtol=1e-5, atol=1e-5)
    # On an image of which the background takes nothing away all channels are worth the same.
    even = ct.explain(model, torch.full((1, 1, 16), 20.0), "scorecam", "layer", background=20.0)
    torch.testing.assert_close(even[0], torch.full((2, 4), 2.5))


def test_constant_channels_count_for_nothing():
    features = torch.rand(2, 4, 5, 3)
    features[0, 1] = 4.0
    features[0, 2] = 0.0
    features[1] = torch.arange(4.0).reshape(4, 1, 1)
    model = Planted(features)
    x = torch.rand(2, 1, 10, 6)
    maps = ct.explain(model, x, "scorecam", "layer")
    alone = ct.explain(Planted(features[:1, [0, 3]]), x[:1], "scorecam", "layer")
    torch.testing.assert_close(maps[:1], alone)
    assert torch.equal(maps[1], torch.zeros_like(maps[1])), "all channels constant: no map, and no NaN"
    for options in ({"channels": 1}, {"target": lambda y: y[:, 0]}):
        again = ct.explain(model, x, "scorecam", "layer", **options)
        assert torch.isfinite(again).all()
        assert not again[1].any()
        assert again[0].any()


@pytest.mark.parametrize("channels", [2, None])
def test_a_channel_that_is_constant_but_for_rounding_is_constant(channels):
    x, others, large = torch.rand(1, 1, 12), torch.rand(1, 2, 6), torch.tensor(1e8)
    without = ct.explain(Planted(others), x, "scorecam", "layer")
    for steps in (1, 2, 4):
        features = torch.cat([large.expand(1, 1, 6), others], dim=1)
        for _ in range(steps):
            features[0, 0, 2] = torch.nextafter(features[0, 0, 2], 2 * large)
        maps = ct.explain(Planted(features), x, "scorecam", "layer", channels=channels)
        if steps <= 2:
            # The weight of the large channel is exactly 0, and it took no other's place.
            torch.testing.assert_close(maps, without)
        else:
            assert maps.abs().max() > 1e6


def test_a_layer_of_one_cell_gives_zero():
    model = Net(2).eval()
    assert not ct.explain(model, torch.rand(B, 2, 1, 1), "scorecam", "two").any()


# who asks what -------------------------------------------------------------------------------------------------------


def test_labels_forms():
    model, x = Net().double().eval(), image().double()
    full = ct.explain(model, x, "scorecam", "act")
    torch.testing.assert_close(ct.explain(model, x, "scorecam", "act", labels=[3, 0]), full[:, [3, 0]])
    own = torch.tensor([[3, 1], [0, 0], [2, 3]])
    expected = torch.stack([full[b, own[b]] for b in range(B)])
    torch.testing.assert_close(ct.explain(model, x, "scorecam", "act", labels=own), expected)
    mask = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()
    maps = ct.explain(model, x, "scorecam", "act", labels=mask)
    assert maps[~mask].isnan().all()
    torch.testing.assert_close(maps[mask], full[mask])
    with pytest.raises(ct.InputError, match=r"0\.\.3"):
        ct.explain(model, x, "scorecam", "act", labels=[4])


def test_target_runs_whole_batches():
    """A target may tell the samples of the batch apart, so that they must stay together and in order."""
    model, x = Net().double().eval(), image().double()
    full = ct.explain(model, x, "scorecam", "norm")
    columns = torch.tensor([2, 0, 3])
    model.seen.clear()
    maps = ct.explain(model, x, "scorecam", "norm", target=lambda y: y[torch.arange(B), columns], chunk=1)
    assert model.seen == [B] * (K + 1)
    torch.testing.assert_close(maps[:, 0], full[torch.arange(B), columns])
    difference = ct.explain(model, x, "scorecam", "norm", target=lambda y: y[:, 1] - y[:, 1])
    with torch.no_grad():
        features = model.norm(model.two(model.one(x).relu()))
    # No difference: all channels are worth the same.
    torch.testing.assert_close(difference[:, 0], features.mean(dim=1))


@given(batch=st.integers(1, 4), chunk=st.integers(1, 9), channels=st.one_of(st.none(), st.integers(1, 9)))
@settings(max_examples=15, deadline=None)
def test_samples_do_not_see_each_other(batch, chunk, channels):
    model, x = NET, image(1, batch).double()
    together = ct.explain(model, x, "scorecam", "norm", chunk=chunk, channels=channels)
    each = [ct.explain(model, x[b : b + 1], "scorecam", "norm", channels=channels) for b in range(batch)]
    torch.testing.assert_close(together, torch.cat(each), rtol=1e-9, atol=1e-11)


NET = Net(1).double().eval()


def test_several_layers_and_sizes():
    model, x = Net().eval(), image()
    maps = ct.explain(model, x, "scorecam", layer=["act", "one"])
    for name in maps:
        torch.testing.assert_close(maps[name], ct.explain(model, x, "scorecam", name))
    assert ct.explain(model, x, "scorecam", layer=["act", "one"], fuse="mean").shape == (B, L, *SIZES[3])
    assert ct.explain(model, x, "scorecam", size="image").shape == (B, L, *SIZES[3])


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.mix, self.fc = nn.Conv2d(2, K, 3, stride=3), nn.Linear(K, K), nn.Linear(K, L)

    def forward(self, image):
        tokens = self.mix(self.patch(image).flatten(2).transpose(1, 2))
        return self.fc(tokens.relu().mean(dim=1))


def test_tokens_by_reshape():
    model, x = Tokens().eval(), torch.rand(B, 2, 12, 9)
    back = lambda t: t.transpose(1, 2).reshape(B, K, 4, 3)  # noqa: E731
    assert ct.explain(model, x, "scorecam", "mix", reshape=back).shape == (B, L, 4, 3)
    with pytest.raises(ct.InputError, match="as many as the image has"):
        ct.explain(model, x, "scorecam", "mix", reshape=lambda t: t.transpose(1, 2))


def test_slices_folded_into_the_batch_are_refused():
    class Slices(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv1d(2, K, 1), nn.Linear(K, L)

        def forward(self, image):
            folded = self.conv(image.transpose(1, 2).flatten(0, 1))
            return self.fc(folded.unflatten(0, (len(image), -1)).mean(dim=(1, 3)))

    with pytest.raises(ct.InputError, match=r"reshape="):
        ct.explain(Slices(), image(2), "scorecam", "conv")
    with pytest.raises(ct.InputError, match=r"\(33, 7, 8\) for 3 images.*reshape="):
        ct.explain(Slices(), image(2), "scorecam", "conv", reshape=lambda t: t)


def test_the_pieces():
    masks = unit_masks(torch.randn(2, 3, 4, 5), (7, 9))
    assert masks.amin() == 0
    assert masks.amax() == 1
    assert masks.shape == (2, 3, 7, 9)
    x = torch.rand(2, 1, 7, 9, dtype=torch.bfloat16)
    assert masked(x, torch.ones(2, 1, 7, 9), -3.0).equal(x)
    assert masked(x, torch.zeros(2, 1, 7, 9), -3.0).eq(-3).all()
    assert ScoreCAMOptions() == ScoreCAMOptions(None, 8, 0.0, True)
