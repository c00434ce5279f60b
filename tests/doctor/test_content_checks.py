"""What volumes hold: intensities, ids, sides, regions of positives, crops, labels against organs."""

from __future__ import annotations

import numpy as np
import pytest

from camtrain.data.manifest import read_manifest
from camtrain.data.manifest_transforms import build_transforms
from camtrain.doctor import Extent
from camtrain.doctor.contents import organ_sizes

FORM = Extent(headers_only=True)


def test_intensities_constant_scaled_or_shifted(study):
    study.save("c0.nii.gz", np.full_like(study.scan(0), 7))
    study.save("c1.nii.gz", ((study.scan(1).clip(-1000, 1000) + 1000) / 2000).astype(np.float32))
    study.save("c2.nii.gz", (study.scan(2) + 1200).astype(np.int16))
    study.save("c3.nii.gz", study.scan(3).byteswap())  # the header says little endian, the data are big
    found = study.examine()
    told = {f.title.split(" ", 2)[2]: [p.id for p in f.places] for f in found.findings if f.check == "intensities"}
    assert told["of one value everywhere"] == ["c0"]
    assert told["that look scaled already (0 to 255 or less)"] == ["c1"]
    assert told["without any value below 0"] == ["c2"]
    assert told["with values that no scanner writes"] == ["c3"]


def test_intensities_far_from_the_others(study):
    study.save("c5.nii.gz", (study.scan(5) + 700).astype(np.int16))
    finding = study.examine().of("intensities", "warning")
    assert "brighter or darker" in finding.title
    assert [place.id for place in finding.places] == ["c5"]


def test_intensities_of_which_the_window_leaves_nothing(study):
    finding = study.examine(window=[2000, 3000]).of("intensities", "warning")
    assert "leaves nothing" in finding.title
    assert len(finding.places) == 12


@pytest.mark.slow
def test_organ_ids_unknown_to_the_table(study):
    ids = study.organs()
    ids[0, 0, :4] = 9
    study.save("c2_seg.nii.gz", ids)
    found = study.examine()
    finding = found.of("organ_ids", "error")
    assert [(place.id, place.got) for place in finding.places] == [("c2", "id 9: 4 voxels")]
    table = study.folder / "table.yaml"
    table.write_text(table.read_text() + "ignore_unknown: true\n")
    assert study.examine().of("organ_ids").severity == "note"


def test_organs_never_there(study):
    for n in range(16):
        ids = study.organs()
        ids[ids == 3] = 0
        study.save(f"c{n}_seg.nii.gz", ids)
    found = study.examine()
    assert found.of("organs_never", "warning").got == "cardiomegaly (heart)"
    assert len(found.of("empty_regions").places) == 6


def test_sides_of_a_mirrored_segmentation(study):
    study.save("c6_seg.nii.gz", study.organs()[::-1])
    finding = study.examine().of("sides", "warning")
    assert [place.id for place in finding.places] == ["c6"]
    assert finding.places[0].got == "lung_left lies right of lung_right"


def test_empty_regions_only_of_positives(study):
    for n in (2, 4):  # cardiomegaly is present in c2 and absent in c4
        ids = study.organs()
        ids[ids == 3] = 0
        study.save(f"c{n}_seg.nii.gz", ids)
    finding = study.examine().of("empty_regions", "warning")
    assert [(place.id, place.got) for place in finding.places] == [("c2", "cardiomegaly: no voxel of heart")]


def test_empty_regions_outside_the_crop(study):
    found = study.examine(spacing=2.0, size=(24, 20, 2))  # 4 mm around the middle; the heart ends 3 mm below it
    assert "outside the crop" in found.of("empty_regions", "warning").places[0].got
    assert "lung_left in 12 of 12 cases" in found.of("crop", "warning").got


@pytest.mark.slow
@pytest.mark.parametrize("spacing", [None, 2.0, (3.0, 2.5, 2.0)])
@pytest.mark.parametrize("size", [(8, 12, 10), (24, 6, 5), (40, 40, 40)])
def test_what_the_crop_keeps_is_what_training_keeps(study, spacing, size):
    found = study.examine(spacing=spacing, size=size)
    data = found.examination.facts
    transforms = build_transforms(data.table, spacing, size)
    kept = transforms(read_manifest(study.folder / "cases.csv").cases[0])["organs"]
    for number, whole in data.contents[0].organs.items():
        voxel = 1.0 if spacing is None else np.prod(np.broadcast_to(spacing, 3)) / np.prod(study.step)
        real = float((kept == number).sum()) * voxel / whole.voxels
        # Resampling by the nearest neighbour rounds an organ's faces by up to a voxel.
        assert whole.inside / whole.voxels == pytest.approx(real, abs=0.0 if spacing is None else 0.2)


def test_balance_of_splits(study):
    for row in study.rows:
        if row[3] == "train":
            row[5] = "0"
        if row[3] == "val":
            row[6] = "-1"
        if row[3] == "test":
            row[6] = "1"
    found = study.examine()
    titles = [(f.title, f.severity) for f in found.findings if f.check == "balance"]
    assert ("1 label without positives in train: such a label cannot be learned", "warning") in titles
    assert ("1 label without known truths in val: such a label has no AUROC there", "warning") in titles
    assert ("1 label without negatives in test: such a label has no AUROC there", "note") in titles


def many(study, number=120):
    """More cases that share files with the first ones' kind, so that shares mean something."""
    study.rows = [
        [f"c{n}", f"c{n % 12}.nii.gz", f"c{n % 12}_seg.nii.gz", study.splits[n % 12], f"p{n % 12}", str(n % 2), "0"]
        for n in range(number)
    ]


def test_segmented_tells_a_label(study):
    many(study)
    for row in study.rows:
        if row[3] == "train" and row[5] == "0":
            row[2] = ""
    found = study.examine(FORM)
    assert "having organs tells 1 label" in [f.title for f in found.findings]
    assert "30 of 30 positives, 0 of 30 negatives" in found.of("segmented", "warning").got


def test_segmented_by_nobody(study):
    for row in study.rows:
        row[2] = ""
    assert "no training case has organs" in study.examine().of("segmented", "warning").title


def test_prevalence_differs(study):
    many(study)
    for row in study.rows:
        if row[3] == "val":
            row[5] = "1"
    assert "50% in 'train', 100% in 'val'" in study.examine(FORM).of("prevalence", "note").got


def test_organ_sizes_of_any_ids():
    rng = np.random.default_rng(0)
    ids = rng.choice([0, 5, 70000], (5, 4, 6))
    found = organ_sizes(ids)
    assert {n: s.voxels for n, s in found.items()} == {n: int((ids == n).sum()) for n in (5, 70000)}
    places = np.argwhere(ids == 5)
    assert found[5].centre == pytest.approx(tuple(places.mean(axis=0)))
    assert found[5].extent == tuple(np.ptp(places, axis=0) + 1.0)
    assert organ_sizes(np.zeros((2, 2), int)) == {}
