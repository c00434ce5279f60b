"""The phantom's cases: reproducible, well laid out, and drawn from the population that was asked for."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camtrain._errors import InputError
from camtrain.data.phantom import LABELS, SHIFTS, Phantom, to_image, unpack
from camtrain.data.phantom_body import ORGANS
from camtrain.data.phantom_frame import FIELD_OF_VIEW, Frame, Pose, affine_of, inside

SIZE = (28, 22, 26)
NONE = dict.fromkeys(LABELS, False)


def healthy(index=0, size=SIZE, **kwargs):
    return Phantom(size=size, **kwargs).case("train", index, label=NONE, marker=NONE)


def center_of(case, organ):
    """Centre of an organ in world millimetres."""
    voxels = np.argwhere(case.organs == ORGANS[organ])
    return case.affine[:3, :3] @ voxels.mean(0) + case.affine[:3, 3]


class TestDeterminism:
    def test_same_arguments_same_case(self):
        one, two = Phantom(size=SIZE).case("val", 3), Phantom(size=SIZE).case("val", 3)
        assert np.array_equal(one.hu, two.hu)
        assert np.array_equal(one.organs, two.organs)
        assert np.array_equal(one.lesion_bits, two.lesion_bits)
        assert np.array_equal(one.label, two.label)

    def test_order_does_not_matter(self):
        phantom = Phantom(size=SIZE)
        forth = {i: phantom.case("train", i).hu for i in (0, 1, 2)}
        back = {i: phantom.case("train", i).hu for i in (2, 0, 1)}
        assert all(np.array_equal(forth[i], back[i]) for i in forth)

    def test_global_seed_does_not_matter(self):
        np.random.seed(1)  # noqa: NPY002
        one = healthy().hu
        np.random.seed(2)  # noqa: NPY002
        assert np.array_equal(one, healthy().hu)

    @pytest.mark.parametrize("change", [{"index": 1}, {"seed": 1}, {"split": "val"}])
    def test_another_number_seed_or_split_gives_another_patient(self, change):
        seed, split, index = change.get("seed", 0), change.get("split", "train"), change.get("index", 0)
        other = Phantom(size=SIZE, seed=seed).case(split, index, label=NONE, marker=NONE)
        assert (other.organs != healthy().organs).any()

    def test_a_subset_of_labels_is_the_same_patients_with_the_same_truth(self):
        every = Phantom(size=SIZE)
        some = Phantom(size=SIZE, labels=("effusion", "nodule"))
        for i in range(5):
            a, b = every.case("train", i), some.case("train", i)
            assert b.label.tolist() == [a.label[LABELS.index("effusion")], a.label[LABELS.index("nodule")]]


class TestAnatomy:
    @pytest.mark.parametrize("size", [(16, 16, 16), (24, 40, 18), (64, 48, 60)])
    def test_any_size_holds_every_organ(self, size):
        case = healthy(size=size)
        assert case.hu.shape == case.organs.shape == size
        assert case.hu.dtype == np.float32
        assert case.organs.dtype == np.uint8
        assert set(np.unique(case.organs)) == {0, *ORGANS.values()}

    def test_physical_size_does_not_depend_on_the_grid(self):
        for size in (SIZE, (48, 36, 48)):
            affine = affine_of(size)
            first, last = affine @ [-0.5, -0.5, -0.5, 1], affine @ [*(np.array(size) - 0.5), 1]
            assert (last - first)[:3] == pytest.approx(FIELD_OF_VIEW)
            assert (last + first)[:3] == pytest.approx([0, 0, 0])
        coarse, fine = healthy(), healthy(size=(56, 44, 52))
        for organ in ORGANS:
            assert center_of(coarse, organ) == pytest.approx(center_of(fine, organ), abs=9), organ

    @pytest.mark.parametrize("index", range(6))
    def test_everything_lies_where_it_does_in_a_patient(self, index):
        case = healthy(index)
        at = {organ: center_of(case, organ) for organ in ORGANS}
        assert at["lung_right"][0] > at["mediastinum"][0] > at["lung_left"][0]
        assert at["heart"][0] < (at["lung_left"][0] + at["lung_right"][0]) / 2  # the heart lies to the left
        assert at["spine"][1] < at["heart"][1]
        assert at["heart"][2] < at["great_vessels"][2]

    @pytest.mark.parametrize("index", range(6))
    def test_densities_are_those_of_a_contrast_ct(self, index):
        case = healthy(index, size=(40, 30, 40))
        median = {organ: np.median(case.hu[case.organs == i]) for organ, i in ORGANS.items()}
        assert -900 < median["lung_left"] < -680
        assert -900 < median["lung_right"] < -680
        assert 100 < median["heart"] < 320
        assert 150 < median["great_vessels"] < 320
        assert median["spine"] > 80
        assert case.hu[0, 0, 0] < -900

    def test_patients_differ_in_size_and_shape(self):
        shares = np.array([(healthy(i).organs == ORGANS["heart"]).sum() for i in range(8)])
        assert shares.std() / shares.mean() > 0.03
        assert len({healthy(i).organs.tobytes() for i in range(8)}) == 8

    def test_dependent_lung_is_denser(self):
        case = healthy(size=(40, 40, 40))
        lung = case.organs == ORGANS["lung_right"]
        front = np.broadcast_to(np.arange(40)[None, :, None], lung.shape)
        middle = np.median(front[lung])
        back_hu = np.median(case.hu[lung & (front < middle)])
        assert back_hu > np.median(case.hu[lung & (front > middle)]) + 15


class TestPopulation:
    def test_prevalence(self):
        phantom = Phantom(prevalence=0.3)
        label = np.array([[*phantom._draw_label("train", i).values()] for i in range(2000)])
        assert label.mean(0) == pytest.approx([0.3] * 8, abs=0.05)

    def test_labels_are_independent_without_cooccurrence_and_correlated_with_it(self):
        def correlation(cooccurrence):
            phantom = Phantom(cooccurrence=cooccurrence)
            label = np.array([[*phantom._draw_label("train", i).values()] for i in range(1500)])
            pairs = np.corrcoef(label.T)[np.triu_indices(8, 1)]
            return pairs, label.mean(0)

        pairs, _ = correlation(0.0)
        assert abs(pairs).max() < 0.1
        pairs, prevalence = correlation(0.6)
        assert pairs.min() > 0.25
        assert prevalence == pytest.approx([0.4] * 8, abs=0.06)
        assert correlation(1.0)[0] == pytest.approx(1)

    def test_shift_splits_hold_the_cases_of_test(self):
        phantom = Phantom(size=SIZE)
        base = phantom.case("test", 4)
        for split in SHIFTS:
            shifted = phantom.case(split, 4)
            assert np.array_equal(shifted.label, base.label)
            assert np.array_equal(shifted.organs, base.organs)
            assert np.array_equal(shifted.lesion_bits, base.lesion_bits)
            free = (shifted.marker_bits == 0) & (base.marker_bits == 0)
            assert np.array_equal(shifted.hu[free], base.hu[free])
            assert shifted.id == f"{split}-00004"


class TestTools:
    def test_window(self):
        image = to_image(np.array([-2000, -1000, -100, 800, 3000], np.float32))
        assert image.tolist() == [0, 0, 0.5, 1, 1]
        assert image.dtype == np.float32

    def test_unpack_takes_labels_in_the_given_order(self):
        bits = np.array([[[0b1, 0b10, 0b1010]]], np.uint8)
        masks = unpack(bits, [LABELS[3], LABELS[0], LABELS[1]])
        assert masks[:, 0, 0].tolist() == [[False, False, True], [True, False, False], [False, True, True]]

    def test_inside_is_never_empty_where_there_is_room(self):
        field = np.array([5.0, 3.0, 4.0])
        assert inside(field, np.array([True, False, True])).tolist() == [False, False, True]
        assert not inside(field, np.zeros(3, bool)).any()

    @given(
        shift=st.tuples(*[st.floats(-10, 10)] * 3),
        scale=st.tuples(*[st.floats(0.9, 1.1)] * 3),
        roll=st.floats(-0.2, 0.2),
        center=st.tuples(*[st.floats(-80, 80)] * 3),
        radius=st.floats(12, 40),
    )
    @settings(max_examples=40, deadline=None)
    def test_boxes_hold_their_solids(self, shift, scale, roll, center, radius):
        frame = Frame((30, 24, 28), Pose(shift, scale, roll))
        whole = sum((v - c) ** 2 for v, c in zip((frame.x, frame.y, frame.z), center, strict=True)) / radius**2
        box, dist = frame.ellipsoid(center, (radius,) * 3)
        boxed = np.zeros(frame.size, bool)
        boxed[box] = dist < 1
        # Rounding at the surface aside, nothing of the solid is cut off by its box.
        assert not ((whole < 0.999) & ~boxed).any()
        box, dist = frame.capsule(np.array(center) - 9, np.array(center) + 9, radius)
        assert not ((whole[box] < 0.999) & (dist > 1)).any()

    def test_voxels_hold_their_points_and_points_lie_in_their_voxels(self):
        frame = Frame((30, 24, 28), Pose((4, -3, 5), (1.05, 0.95, 1.02), 0.1))
        box = slice(2, 29), slice(3, 20), slice(4, 25)
        voxels = np.array([0, 1234, 5000])
        points = frame.points(voxels, box)
        assert points[:, 0].tolist() == [frame.x[2, 3, 0], frame.y[2, 3, 0], frame.z[0, 0, 4]]
        i, j, k = np.unravel_index(voxels, (27, 17, 21))
        whole = np.ravel_multi_index((i + 2, j + 3, k + 4), frame.size)
        assert frame.places(points[:, :, None])[:, 0].tolist() == whole.tolist()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"labels": ("noduel",)}, "labels does not know 'noduel'; nearest: nodule"),
        ({"labels": ()}, "labels expects different findings"),
        ({"labels": ("nodule", "nodule")}, "name each one once"),
        ({"size": (15, 30, 30)}, "at least 16 voxels, got (15, 30, 30)"),
        ({"size": (30, 30)}, "three whole numbers"),
        ({"shortcut": 1.2}, "shortcut expects a number from 0 to 1, got 1.2"),
        ({"cooccurrence": -0.1}, "cooccurrence expects"),
        ({"shortcut_at": "skn"}, "shortcut_at does not know 'skn'; nearest: skin"),
        ({"organs": "hole"}, "organs does not know 'hole'; nearest: holes"),
        ({"prevalence": 0}, "prevalence expects"),
        ({"seed": -1}, "seed expects"),
    ],
)
def test_wrong_arguments(kwargs, words):
    with pytest.raises(InputError) as error:
        Phantom(**kwargs)
    assert words in str(error.value)


def test_wrong_split_and_forced_label():
    with pytest.raises(InputError, match=r"split does not know 'shift_reverse'; nearest: shift_reversed"):
        Phantom().case("shift_reverse", 0)
    with pytest.raises(InputError, match="label does not know 'effusion'"):
        Phantom(labels=("nodule",)).case("train", 0, label={"effusion": True})


@pytest.mark.parametrize("options", [{}, {"organs": "holes", "shortcut_at": "own_organ"}, {"labels": ("aneurysm",)}])
@pytest.mark.parametrize("split", ["train", "shift_reversed"])
def test_several_cases_are_those_made_one_by_one(options, split):
    phantom = Phantom(size=(24, 20, 26), cooccurrence=0.3, seed=3, **options)
    indices = [7, 2, 31, 4, 2]
    for index, made in zip(indices, phantom.cases(split, indices), strict=True):
        alone = phantom.case(split, index)
        for field in dataclasses.fields(alone):
            one, other = getattr(alone, field.name), getattr(made, field.name)
            assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other, field.name
    assert phantom.cases(split, []) == []
    forced = phantom.cases(split, [1, 2], label={"aneurysm": True}, marker={"aneurysm": False})
    assert all(case.label[phantom.labels.index("aneurysm")] == 1 for case in forced)
