"""NIfTI maps of the monitor lie exactly where the scan lies."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

import camtrain as ct
from camtrain import InputError
from camtrain.reporting._files import file_stem

SPACING = (0.7, 0.9, 2.5)


def oblique_lps():
    """(4, 4) of a volume that runs to the left, to the back and upwards, turned by a few degrees about two axes."""
    a, b = 0.2, -0.15
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ tilt @ np.diag([-1, -1, 1]) @ np.diag(SPACING)
    affine[:3, 3] = 11.0, -23.0, 140.0
    return affine


def run(kit, folder, cases, **options):
    added = ct.AttentionMonitor(kit.LAYER, kit.TABLE, **options)
    trainer = kit.make_trainer(folder, added, max_epochs=3)
    module = kit.make_lit(kit.make_net())
    trainer.fit(module, kit.loader(cases), kit.loader(cases))
    return module.net, added.publisher.run_dir.path / "nifti"


def files_in(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.nii.gz"))


@pytest.mark.slow
def test_affine_axes_and_values_of_an_oblique_anisotropic_lps_volume(kit, tmp_path):
    affine, cases = oblique_lps(), kit.make_cases()
    for case in cases:
        case["affine"] = torch.from_numpy(affine)
    methods = ["hirescam", "gradcam"]
    net, folder = run(kit, tmp_path, cases, methods=methods, nifti_cases=["case00"], nifti_epochs=[2], panel_cases=4)
    labels = [i for i in range(3) if cases[0]["label"][i] == 1]
    assert labels
    expected = [f"0002/case00_{kit.LABELS[i]}_{m}.nii.gz" for i in labels for m in methods]
    assert files_in(folder) == sorted(expected)
    assert "".join(nib.aff2axcodes(affine)) == "LPS"
    for method in methods:
        # Another road to the same numbers: explain's own enlargement of the map of the trained net.
        maps = ct.explain(net, cases[0]["image"][None], method=method, layer=kit.LAYER, size="image")[0]
        for index in labels:
            image = nib.load(folder / f"0002/case00_{kit.LABELS[index]}_{method}.nii.gz")
            assert image.shape == kit.SIZE
            assert image.get_data_dtype() == np.float32
            np.testing.assert_allclose(image.affine, affine, atol=1e-4)
            np.testing.assert_allclose(image.header.get_zooms(), SPACING, rtol=1e-5)
            assert (image.header["qform_code"], image.header["sform_code"]) == (1, 1)
            np.testing.assert_allclose(image.header.get_qform(), image.header.get_sform(), atol=1e-3)
            values = np.asarray(image.dataobj)
            np.testing.assert_allclose(values, maps[index].numpy(), atol=1e-5 * float(maps[index].abs().max()) + 1e-8)
            assert np.ptp(values) > 0
            assert method in str(image.header["descrip"])


@pytest.mark.slow
def test_the_grid_of_the_scan_before_the_transforms(kit, tmp_path):
    """The network saw a turned and flipped copy; the file is in the order of the scan."""
    affine, cases = oblique_lps(), kit.make_cases()
    seen_shape = kit.SIZE
    # The scan's axes are (z, x, y) of what the network sees, the last one backwards.
    order, back = (2, 0, 1), np.eye(4)
    original_shape = [seen_shape[axis] for axis in order]
    to_seen = np.zeros((4, 4))
    for place, axis in enumerate(order):
        to_seen[axis, place] = 1
    to_seen[order[2], 2], to_seen[order[2], 3], to_seen[3, 3] = -1, seen_shape[order[2]] - 1, 1
    original = affine @ to_seen @ back
    for case in cases:
        case["affine"] = torch.from_numpy(affine)
        case["original_affine"] = torch.from_numpy(original)
        case["original_shape"] = torch.tensor(original_shape)
    net, folder = run(kit, tmp_path, cases, nifti_cases=1, nifti_epochs=[2])
    (first, *_) = files_in(folder)
    case, label = first.removeprefix("0002/").removesuffix("_hirescam.nii.gz").split("_")
    maps = ct.explain(net, cases[int(case[4:])]["image"][None], layer=kit.LAYER, size="image")[0]
    image = nib.load(folder / first)
    np.testing.assert_allclose(image.affine, original, atol=1e-4)
    expected = maps[kit.LABELS.index(label)].numpy().transpose(order)[:, :, ::-1]
    np.testing.assert_allclose(np.asarray(image.dataobj), expected, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.slow
def test_unknown_geometry_is_told_once_and_nothing_is_written(kit, tmp_path):
    with pytest.warns(UserWarning, match="no NIfTI map of case00: the batch has no affine") as seen:
        _, folder = run(kit, tmp_path, kit.make_cases(), nifti_cases=["case00"])
    assert sum("no NIfTI map" in str(w.message) for w in seen) == 1
    assert not folder.exists()


def test_a_name_that_no_case_has_is_told_once(kit, tmp_path):
    cases = kit.make_cases()
    for case in cases:
        case["affine"] = torch.eye(4)
    said = r"no NIfTI map of case0I: nifti_cases= names them, but val has no case of that id"
    with pytest.warns(UserWarning, match=said) as seen:
        _, folder = run(kit, tmp_path, cases, nifti_cases=["case0I", "case01"], labels_per_case=1)
    assert sum("nifti_cases=" in str(w.message) for w in seen) == 1
    assert len(files_in(folder)) == 3


@pytest.mark.slow
def test_any_names_and_every_epoch(kit, tmp_path):
    cases = kit.make_cases()
    for case in cases:
        case["affine"], case["id"] = torch.eye(4), f"../<b>{case['id']}</b> ü"
    _, folder = run(kit, tmp_path / "with space ü", cases, nifti_cases=2, labels_per_case=1)
    assert len(files_in(folder)) == 6
    assert all(p.parent.parent == folder for p in folder.rglob("*.nii.gz"))
    assert files_in(folder)[0].startswith(f"0000/{file_stem(cases[0]['id'])}")
    assert not list(tmp_path.rglob("nifti/*/*/*"))


def test_wrong_arguments(kit):
    with pytest.raises(InputError, match="nifti_cases= expects a number"):
        ct.AttentionMonitor(kit.LAYER, nifti_cases=-1)
    with pytest.raises(InputError, match="wandb_budget_mb= expects 0"):
        ct.AttentionMonitor(kit.LAYER, wandb_budget_mb=-1)
