"""The phantom's cases are those of all published figures: recorded before its painting was made faster."""

import hashlib

import numpy as np
import pytest

from camtrain.data.phantom import LABELS, Phantom
from camtrain.data.phantom_frame import Frame, Pose

MATHEMATICS = "85ca9ea3c447"
ONLY = {name: {n: n == name for n in LABELS} for name in LABELS}
WAYS = {
    "as published": ({}, ("train", 0), {}),
    "another seed": ({"size": (28, 22, 26), "seed": 7}, ("val", 3), {}),
    "flat": ({"size": (33, 51, 20), "prevalence": 0.6, "cooccurrence": 0.5}, ("test", 1), {}),
    "coarse, holes": ({"size": (16, 16, 16), "organs": "holes", "prevalence": 0.7}, ("train", 2), {}),
    "clips in other organs": ({"size": (24, 30, 26), "shortcut_at": "other_organ"}, ("shift_random", 5), {}),
    "clips in own organs": (
        {"size": (26, 24, 28), "shortcut_at": "own_organ", "shortcut": 0.7},
        ("shift_reversed", 5),
        {},
    ),
    "healthy": ({"size": (30, 24, 28), "shortcut": None}, ("train", 4), {"label": dict.fromkeys(LABELS, False)}),
    "every finding": ({"size": (40, 30, 36)}, ("shift_free", 6), {"label": dict.fromkeys(LABELS, True)}),
    **{
        name: ({"size": (34, 28, 32)}, ("train", 10 + i), {"label": ONLY[name], "marker": ONLY[name]})
        for i, name in enumerate(LABELS)
    },
}
# Hash of all but the scan, hash of the scan, sum of its HU, and their sum under weights from 0 to 1 along the memory.
RECORDED = {
    "as published": ("a270e7d25a16", "e9a8b7b42538", -41344971.247, -19669605.493),
    "another seed": ("d6993ea9b6f5", "4a190ca390e0", -7449495.081, -3804012.080),
    "flat": ("1ffbe075b08f", "ff26c2054107", -17152328.850, -8743518.978),
    "coarse, holes": ("f79defaf42b4", "c273fd58d419", -1668722.068, -844158.471),
    "clips in other organs": ("c76affdc7812", "633f038bbbaa", -9258454.895, -4951043.929),
    "clips in own organs": ("02b278b04f92", "e15edd7cdc7b", -8456476.310, -4471982.029),
    "healthy": ("566fd9f28a4d", "41e0d070159d", -9609194.625, -4909273.146),
    "every finding": ("3aa4d59d506a", "fed09b96a197", -21434409.537, -10196141.044),
    "nodule": ("dff7cb4c6a6e", "5380eabdf085", -15370894.763, -7687755.937),
    "ground_glass": ("553c39aa25be", "0f80254c0863", -14847354.053, -7822777.146),
    "consolidation": ("97e7b82014f4", "610901d10e2c", -14872587.496, -7596991.784),
    "effusion": ("d7aee91dda31", "c07eb8a63493", -16014365.093, -8245440.138),
    "cardiomegaly": ("9ed5302905c1", "d3f1f93bcc23", -16808565.748, -8443328.892),
    "coronary_calcification": ("db3522335068", "59d2138adae5", -16891954.879, -8544294.104),
    "aneurysm": ("0bb8727f24fb", "b6c39c5df723", -15447679.436, -7725669.798),
    "pericardial_effusion": ("5f8c9c3abc57", "c03069981984", -15757567.396, -7795354.947),
}


def digest(*arrays):
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:12]


def same_mathematics():
    """Does numpy round powers and sines here as where the hashes come from? It may not on another processor."""
    x = np.linspace(0.01, 3, 4099, dtype=np.float32)
    powers = x ** np.float32(2.3), x**0.7, x.astype(float) ** 2.3
    return digest(np.exp(-x), np.sin(x), np.cos(x), *powers) == MATHEMATICS


@pytest.mark.parametrize("way", WAYS)
def test_cases_are_what_they_were(way):
    options, which, forced = WAYS[way]
    case = Phantom(**options).case(*which, **forced)
    rest, scan, total, weighted = RECORDED[way]
    ramp = np.linspace(0, 1, case.hu.size).reshape(case.hu.shape)
    # Last bits aside, which move a sum by thousandths: one voxel of another tissue moves it by tens.
    assert case.hu.sum(dtype=np.float64) == pytest.approx(total, abs=0.5)
    assert (case.hu * ramp).sum(dtype=np.float64) == pytest.approx(weighted, abs=0.5)
    if same_mathematics():
        assert digest(case.hu) == scan
        masks = case.organs, case.lesion_bits, case.marker_bits
        assert digest(*masks, case.label, case.marker, case.affine) == rest


class TestManyAtOnce:
    FRAME = Frame((31, 24, 28), Pose((4, -3, 5), (1.05, 0.95, 1.02), 0.06))

    def found(self, places, whose, number):
        """Voxels of one solid in the list."""
        region = np.zeros(self.FRAME.size, bool)
        region.reshape(-1)[places[whose == number]] = True
        return region

    def expected(self, box, field):
        region = np.zeros(self.FRAME.size, bool)
        region[box] = field < 1
        return region

    def test_tubes_are_capsules(self):
        rng = np.random.default_rng(0)
        starts, ends, radii = rng.uniform(-170, 170, (40, 3)), rng.uniform(-170, 170, (40, 3)), rng.uniform(1, 30, 40)
        starts[:5, :2] = ends[:5, :2]  # upright ones
        places, whose = self.FRAME.tubes(starts, ends, list(radii))
        for n in range(40):
            expected = self.expected(*self.FRAME.capsule(starts[n], ends[n], radii[n]))
            assert np.array_equal(self.found(places, whose, n), expected)

    def test_balls_are_ellipsoids(self):
        rng = np.random.default_rng(0)
        centers, radii = rng.uniform(-170, 170, (40, 3)), rng.uniform(2, 50, (40, 3))
        places, whose = self.FRAME.balls(centers, radii)
        for n in range(40):
            expected = self.expected(*self.FRAME.ellipsoid(centers[n], radii[n]))
            assert np.array_equal(self.found(places, whose, n), expected)
