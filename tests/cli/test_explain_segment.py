"""explain --segment: binary masks in the geometry of the scan, and Dice against known findings."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

import camtrain as ct
from camtrain.data import PhantomDataModule
from camtrain.models import LitClassifier


def scan(trained):
    return trained.manifest.parent / "test-00000_ct.nii.gz"


def masks(folder, *names):
    return [nib.load(folder / f"{name}.segment.nii.gz") for name in names]


def told(folder):
    return json.loads((folder / "scores.json").read_text())["labels"]


@pytest.fixture
def explained(trained, run, tmp_path):
    """Runs explain; the result and the folder."""

    def call(*words, image=None, out="maps"):
        given = ("--ckpt_path", trained.checkpoint, "--image", image or scan(trained), "--out", tmp_path / out)
        return run("explain", *given, *words), tmp_path / out

    return call


def test_mask_is_the_enlarged_map_above_its_own_level(trained, explained):
    result, out = explained("--segment", "mean+std", "--grid", "layer")
    assert result.code == 0, result.err
    model = LitClassifier.load_from_checkpoint(trained.checkpoint).eval()
    data = PhantomDataModule(labels=["effusion", "nodule"], cases=4, test_cases=1, size=(24, 18, 30))
    image = next(iter(data.test_dataloader()[0]))["image"]
    maps = ct.explain(model, image, size="image")[0].numpy()
    for name, values, file in zip(["effusion", "nodule"], maps, masks(out, "effusion", "nodule"), strict=True):
        row, found = told(out)[name]["segment"], file.get_fdata()
        assert set(np.unique(found)) == {0.0, 1.0}
        np.testing.assert_allclose(file.affine, nib.load(scan(trained)).affine)
        level = values.mean() + values.std()
        assert row["level"] == pytest.approx(level, rel=1e-2)
        # The file of the scan holds whole Hounsfield units; what is near the level may fall on either side.
        clear = np.abs(values - level) > 0.02 * np.ptp(values)
        np.testing.assert_array_equal(found[clear] > 0, (values > level)[clear])
        voxel = abs(np.linalg.det(file.affine[:3, :3])) / 1000
        assert row["ml"] == pytest.approx(found.sum() * voxel)
        assert (row["file"], row["rule"]) == (f"{name}.segment.nii.gz", "mean+std")
        assert "dice" not in row


@pytest.mark.slow
def test_dice_against_lesions(trained, explained, tmp_path):
    _, out = explained("--segment", "mean+std", out="first")
    (effusion,) = masks(out, "effusion")
    half = effusion.get_fdata().copy()
    half[: half.shape[0] // 2] = 0
    nib.save(nib.Nifti1Image((3 * half).astype(np.uint8), effusion.affine), tmp_path / "half.nii.gz")
    result, out = explained("--segment", "mean+std", "--lesions", f"effusion={tmp_path / 'half.nii.gz'}", out="b")
    assert result.code == 0, result.err
    whole, part = effusion.get_fdata().sum(), half.sum()
    assert told(out)["effusion"]["segment"]["dice"] == pytest.approx(2 * part / (whole + part))
    assert "dice" not in told(out)["nodule"]["segment"]
    result, out = explained(*("--segment", "mean+std", "--labels", "effusion"),
                            *("--lesions", tmp_path / "half.nii.gz"), out="c")  # fmt: skip
    assert told(out)["effusion"]["segment"]["dice"] == pytest.approx(2 * part / (whole + part))


@pytest.mark.slow
def test_nothing_is_marked_where_the_network_saw_nothing(explained, tmp_path):
    """A wide scan; the network sees its middle, and levels may be negative."""
    affine = np.diag([7.0, 5.0, 9.0, 1.0])
    affine[:3, 3] = [-245.0, -150.0, -180.0]
    image = nib.Nifti1Image(np.random.default_rng(0).integers(-900, 600, (70, 60, 40)).astype(np.int16), affine)
    nib.save(image, tmp_path / "wide.nii.gz")
    result, out = explained("--segment", "mean", image=tmp_path / "wide.nii.gz")
    assert result.code == 0, result.err
    for file in masks(out, "effusion", "nodule"):
        found = file.get_fdata() > 0
        assert found.shape == (70, 60, 40)
        where = np.argwhere(found)
        size = (np.ptp(where, axis=0) + 1) * [7, 5, 9]
        assert (size <= np.array([320, 240, 300]) + 20).all()
        assert found.any()


def test_no_mask_without_the_option(explained):
    _, out = explained()
    assert not list(out.glob("*.segment.nii.gz"))
    assert "segment" not in told(out)["nodule"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--segment", "mean+xstd"), "mean+2std"),
        (("--lesions", "a.nii.gz"), "add --segment"),
        (("--segment", "otsu", "--lesions", "a.nii.gz"), "--lesions effusion=a.nii.gz"),
        (("--segment", "otsu", "--lesions", "efusion=a.nii.gz"), "effusion"),
        (("--segment", "otsu", "--lesions", "effusion=missing.nii.gz"), "cannot read missing.nii.gz"),
    ],
)
def test_mistakes_are_said(explained, words, said):
    result, out = explained(*words)
    assert result.code == 2
    assert said in result.err
    assert not out.exists()


def test_lesions_of_another_grid_or_named_twice(explained, tmp_path):
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "small.nii.gz")
    word = f"effusion={tmp_path / 'small.nii.gz'}"
    result, out = explained("--segment", "otsu", "--lesions", word)
    assert result.code == 2
    assert "resample it to the scan" in result.err
    _, out = explained("--segment", "otsu")
    (effusion,) = masks(out, "effusion")
    nib.save(effusion, tmp_path / "small.nii.gz")
    result, _ = explained("--segment", "otsu", "--lesions", word, "--lesions", word, out="twice")
    assert result.code == 2
    assert "names 'effusion' twice" in result.err
