"""Baselines against scipy's Gaussian filter and means taken by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from camtrain import InputError
from camtrain.anatomy.baselines import baseline_of, make_baseline


def _image(*shape, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("size", [(11,), (9, 14), (5, 8, 12), (1, 6, 3)])
@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.6])
def test_blur_is_scipys_gaussian_with_the_border_continued(size, sigma):
    image = _image(2, 3, *size)
    found = make_baseline(image, "blur", sigma=sigma)
    for b, c in np.ndindex(2, 3):
        widths = [sigma * n for n in size]
        radius = [int(np.ceil(4 * w)) for w in widths]
        expected = gaussian_filter(image[b, c].numpy(), widths, mode="nearest", radius=radius)
        np.testing.assert_allclose(found[b, c], expected, atol=1e-12)


def test_default_blur_is_a_tenth_of_the_size():
    image = _image(1, 1, 20, 10)
    torch.testing.assert_close(make_baseline(image, "blur"), make_baseline(image, "blur", sigma=0.1))


def test_blur_of_one_image_does_not_depend_on_the_others():
    image = _image(3, 2, 7, 9, dtype=torch.float32)
    found = make_baseline(image, "blur")
    for b in range(3):
        assert torch.equal(found[b : b + 1], make_baseline(image[b : b + 1], "blur"))


def test_blur_commutes_with_flips_and_keeps_constants():
    image = _image(1, 1, 6, 11)
    torch.testing.assert_close(make_baseline(image.flip(2, 3), "blur"), make_baseline(image, "blur").flip(2, 3))
    flat = torch.full((1, 1, 6, 11), 0.7)
    torch.testing.assert_close(make_baseline(flat, "blur"), flat)


def test_any_memory_layout():
    image = _image(2, 3, 6, 11)
    expected = make_baseline(image, "blur")
    for other in (image.to(memory_format=torch.channels_last), image.transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(make_baseline(other, "blur"), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_kind_keeps_shape_and_dtype(dtype):
    image = _image(2, 3, 4, 7, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for kind in ("air", "mean", "blur", 0.25):
            found = make_baseline(image, kind)
            assert (found.shape, found.dtype) == (image.shape, dtype)
        blur = make_baseline(image, "blur")
    expected = make_baseline(image.double(), "blur")
    torch.testing.assert_close(blur.double(), expected, atol=2 * torch.finfo(dtype).eps, rtol=0)


def test_mean_of_each_image_and_channel():
    image = _image(2, 3, 4, 5, 6)
    found = make_baseline(image, "mean")
    for b, c in np.ndindex(2, 3):
        np.testing.assert_allclose(found[b, c], image[b, c].numpy().mean(), atol=1e-15)


def test_mean_does_not_overflow_in_half_precision():
    image = torch.full((1, 1, 300, 300), 60_000.0, dtype=torch.float16)
    assert make_baseline(image, "mean")[0, 0, 0, 0] == image[0, 0, 0, 0]


def test_air_is_said_and_never_silently_zero():
    windowed, hounsfield = _image(1, 1, 4, 4), _image(1, 1, 4, 4) * 2000 - 1000
    assert (make_baseline(windowed, "air") == 0).all()
    with pytest.raises(InputError, match=r"goes down to -.*-1000 in Hounsfield"):
        make_baseline(hounsfield, "air")
    assert (make_baseline(hounsfield, "air", value=-1000) == -1000).all()
    assert (make_baseline(hounsfield, -1000) == -1000).all()


def test_constant_baselines_take_no_memory():
    image = _image(2, 1, 30, 30)
    for kind in ("air", "mean", 0.5):
        assert make_baseline(image, kind).untyped_storage().nbytes() <= 16


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("blurr", {}, "nearest: blur"),
        ("zero", {}, "air, mean, blur or a number, got 'zero'"),
        (torch.nan, {}, "finite intensity"),
        (True, {}, "finite intensity"),
        (None, {}, "finite intensity"),
        ("air", {"value": torch.inf}, "value= expects"),
        ("blur", {"sigma": 0.0}, "sigma= expects"),
        ("mean", {"value": 0.0}, "value= belongs to the baseline 'air'"),
        ("air", {"sigma": 0.1}, "sigma= belongs to the baseline 'blur'"),
    ],
)
def test_wrong_kinds_are_refused(kind, options, says):
    with pytest.raises(InputError, match=says):
        make_baseline(torch.rand(1, 1, 4), kind, **options)


@pytest.mark.parametrize("image", [torch.rand(3, 4), torch.ones(1, 1, 4, dtype=torch.long), torch.rand(0, 1, 4), None])
def test_wrong_images_are_refused(image):
    with pytest.raises(InputError, match=r"image \(B, C, \*S\)"):
        make_baseline(image, "mean")


def test_ready_images_are_checked():
    image = torch.rand(2, 3, 4, 5)
    assert torch.equal(baseline_of(image, image.double() / 2), image / 2)
    assert torch.equal(baseline_of(image, torch.ones(1, 3, 1, 1)), torch.ones_like(image))
    for wrong in (torch.rand(2, 3, 4), torch.rand(2, 3, 5, 4), torch.full_like(image, torch.nan)):
        with pytest.raises(InputError, match="make_baseline"):
            baseline_of(image, wrong)
