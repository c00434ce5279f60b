"""The picture of a case and label: planes through the organ and through the peak, with masks over the image alone."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from camtrain._errors import InputError
from camtrain.reporting import CasePicture, _draw, compose_case, compose_overview
from camtrain.reporting._draw import fitted, text_width
from camtrain.reporting.case_picture import SEPARATOR, _lines, case_scenes, draw_case
from camtrain.reporting.epoch_strip import COLUMNS, epoch_strip
from camtrain.reporting.overlays import OUTLINE


def peaked(shape=(5, 4, 3), at=(3, 2, 1), below=(0, 1, 1)):
    values = np.zeros(shape)
    values[at], values[below] = 1.0, -1.0
    return values


def halves(picture):
    """(left, right) of the pixels and of the masks."""
    middle = picture.pixels.shape[1] // 2
    return [(half(picture.pixels), {name: half(m) for name, m in picture.masks.items()})
            for half in (lambda a: a[:, :middle], lambda a: a[:, middle:])]  # fmt: skip


def coloured(pixels):
    return (np.ptp(pixels.astype(int), axis=-1) > 30) & ~(pixels == OUTLINE).all(-1)


def test_one_side_stays_with_the_organ_the_other_follows_the_peak(chest):
    image, lungs = chest
    first, second = (
        compose_case(image, {"hirescam": peaked(at=at)}, lungs, scale={"hirescam": 1.0}, axes="RAS")
        for at in ((3, 2, 1), (1, 1, 2))
    )
    assert first.pixels.shape == second.pixels.shape
    (left, masks_left), (right, masks_right) = halves(first)
    (left2, masks_left2), (_, masks_right2) = halves(second)
    np.testing.assert_array_equal(masks_left["allowed region"], masks_left2["allowed region"])
    assert (masks_right["allowed region"] != masks_right2["allowed region"]).any()
    # The peak is seen at full strength on the side that goes through it, and perhaps nowhere on the other.
    for masks in (masks_right, masks_right2):
        assert (masks["attention"] == 4).any()
    assert coloured(right).any()
    assert (left != left2).any()  # the map itself moved


def test_masks_agree_with_the_colours_below_them(chest):
    image, lungs = chest
    picture = compose_case(np.full_like(image, 0.5), {"m": peaked()}, lungs, scale={"m": 1.0}, window=(0, 1))
    attention, region = picture.masks["attention"], picture.masks["allowed region"]
    assert attention.shape == region.shape == picture.pixels.shape[:2]
    rows = np.nonzero(region.any(1))[0]
    high = rows[-1] - rows[0] + 1
    below = slice(rows[0] + high, None)
    # Every pixel under a mask is the plain image; the same planes stand below, warm for the label and cool against it.
    assert not coloured(picture.pixels[rows[0] : rows[-1] + 1]).any()
    warm = picture.pixels[below].astype(int)[..., 0] - picture.pixels[below].astype(int)[..., 2]
    assert (warm > 60).any()
    assert set(np.unique(attention)) >= {0, 3, 4}
    strong = compose_case(image, {"m": peaked() * 0.05}, lungs, scale={"m": 1.0}).masks["attention"]
    assert not strong.any()  # below a seventh of the scale nothing is marked


def test_a_map_against_the_label_has_its_own_classes(chest):
    image, lungs = chest
    picture = compose_case(image, {"m": np.minimum(-peaked(), 0) - 0.3}, lungs, scale={"m": 1.0})
    assert set(np.unique(picture.masks["attention"])) <= {0, 1, 2}
    assert (picture.masks["attention"] == 2).any()
    assert CasePicture.classes_of("attention")[1] == "against, strong"


def test_without_a_positive_cell_the_right_side_goes_through_the_organ(chest):
    image, lungs = chest
    for values in (-np.ones((5, 4, 3)), np.full((5, 4, 3), np.nan), np.zeros((5, 4, 3))):
        picture = compose_case(image, {"m": values}, lungs, scale={"m": 1.0})
        (_, left), (_, right) = halves(picture)
        assert np.count_nonzero(left["allowed region"]) == np.count_nonzero(right["allowed region"]) > 0


def test_several_methods_have_a_mask_and_a_row_each(chest):
    image, lungs = chest
    one = compose_case(image, {"a": peaked()}, lungs, scale={"a": 1.0})
    two = compose_case(image, {"a": peaked(), "b": peaked() / 100}, lungs, scale={"a": 1.0, "b": 0.01})
    assert sorted(two.masks) == ["allowed region", "attention a", "attention b"]
    np.testing.assert_array_equal(two.masks["attention a"], two.masks["attention b"])
    assert two.pixels.shape[0] > one.pixels.shape[0]


def test_no_region_photographs_and_signals(chest):
    image, _ = chest
    assert sorted(compose_case(image, {"m": peaked()}, scale={"m": 1.0}).masks) == ["attention"]
    photo = compose_case(np.random.default_rng(0).random((3, 50, 70)), {"m": np.ones((5, 7))}, scale={"m": 1.0})
    assert photo.pixels.shape[1] == 840
    signal = compose_case(np.ones((1, 300)), {"m": np.arange(20.0)}, np.arange(300) > 100, scale={"m": 19.0})
    assert signal.pixels.shape[1] == 840
    assert (signal.masks["allowed region"] == 1).any()


def test_errors(chest):
    with pytest.raises(InputError, match="at least one map"):
        compose_case(chest[0], {}, scale={})
    with pytest.raises(InputError, match="positive finite scale"):
        compose_case(chest[0], {"m": peaked()}, scale={"m": 0.0})
    with pytest.raises(InputError, match="a title for each"):
        compose_overview([], [])


def test_overview(chest):
    image, lungs = chest
    tile = compose_case(image, {"m": peaked()}, lungs, scale={"m": 1.0}).tile
    sheet = compose_overview([tile] * 5, [f"case {i}" for i in range(5)], cell=100)
    assert sheet.shape[1] == 3 * 100 + 2 * 2
    assert coloured(sheet).any()


@pytest.mark.parametrize(("cell", "shown"), [(60, 60), (120, 120), (130, 120), (200, 200)])
def test_a_tile_fills_its_cell_in_an_overview_unless_it_would_grow_by_little(cell, shown):
    tile = np.random.default_rng(0).integers(40, 256, (90, 120, 3), dtype=np.uint8)
    sheet = compose_overview([tile], [""], cell=cell)
    columns = np.flatnonzero((sheet > 30).all(-1).sum(0) > 20)
    assert np.ptp(columns) + 1 == shown
    assert len(placed(sheet, tile, range(len(sheet)), range(sheet.shape[1]))) == (shown == 120)


@pytest.mark.parametrize("size", [11, 14])
@pytest.mark.parametrize(
    "text",
    [
        "case_7  ·  finding 3: present, p = 0.47  ·  OrganIoU 0.71 (above 0.25), energy inside 0.17 (hirescam)",
        "AVATAR To VW: j fi 'quoted' (above) {j} |x| ·V`> J^vn; ~Oab, 7s7tD&rU 9c`;lz .5e-06   three spaces   ",
    ],
)
def test_a_caption_drawn_word_by_word_is_the_caption_drawn_at_once(text, size):
    font = _draw.font(size)
    line = Image.new("L", (1200, 24))
    ImageDraw.Draw(line).text((0, 12), text, fill=255, font=font, anchor="lm")
    wanted = _draw.sheet(24, 1200)
    _draw._lay(wanted, np.asarray(line)[..., None], 0, 0, _draw.INK)
    drawn = _draw.write(_draw.sheet(24, 1200), [(text, (0.0, 12.0), "lm", size, _draw.INK)])
    np.testing.assert_array_equal(drawn, wanted)


def test_a_caption_of_two_methods_stands_on_two_lines_and_nothing_of_it_is_cut(chest):
    image, lungs = chest
    parts = ["case 7", "finding: present, p = 0.47", *["OrganIoU 0.71 (above 0.25), energy inside 0.17 (hirescam)"] * 2]
    caption = SEPARATOR.join(parts)
    given = {"scale": {"m": 1.0}}
    whole, short = (
        compose_case(image, {"m": peaked()}, lungs, caption=text, **given)
        for text in (caption, SEPARATOR.join(parts[:2]))
    )
    assert len(whole.pixels) - len(short.pixels) == round(1.5 * 14) + 2
    added = len(whole.pixels) - len(short.pixels)
    for name, mask in whole.masks.items():
        np.testing.assert_array_equal(mask[added:], short.masks[name])
    lines = _lines(caption, 828)
    assert SEPARATOR.join(lines) == caption
    assert len(lines) == 2
    assert all(fitted(line, 14, 828) == line for line in lines)
    assert _lines("", 828) == []
    assert _lines("a word as wide as that " * 9, 100) == ["a word as wide as that " * 9]  # `fitted` cuts it


def test_masks_are_made_where_they_are_wanted_only():
    image, maps = np.random.default_rng(0).random((12, 10, 8)), {"hirescam": np.eye(4)[None].repeat(4, 0)}
    scenes, options = case_scenes(image, maps, image > 0.5), {"caption": "a", "scale": {"hirescam": 1.0}}
    with_masks, without = draw_case(scenes, maps, **options), draw_case(scenes, maps, **options, masked=False)
    assert set(with_masks.masks) == {"allowed region", "attention"}
    assert without.masks == {}
    np.testing.assert_array_equal(with_masks.pixels, without.pixels)


def placed(page, tile, rows, columns):
    """Where a tile lies in a part of a page."""
    high, wide = tile.shape[:2]
    return [
        (top, left)
        for top in range(rows.start, rows.stop - high + 1)
        for left in range(columns.start, columns.stop - wide + 1)
        if np.array_equal(page[top : top + high, left : left + wide], tile)
    ]


@pytest.mark.parametrize("axes", [None, "LPS", "SRA"])
@pytest.mark.parametrize("rank", [2, 3])
def test_all_planes_stand_there_for_each_epoch_in_the_colours_of_this_picture(chest, rank, axes):
    """Also those through the peak: where the attention is now, one sees since when it is there."""
    image, lungs = chest if rank == 3 else (chest[0][:, :, 14], chest[1][:, :, 14])
    values = np.random.default_rng(0).standard_normal((5, 4, 3)[:rank])
    maps, given = {"m": values, "other": values}, {"caption": "a", "scale": {"m": 2.0, "other": 1.0}}
    spacing = {"spacing": (1.0, 1.3, 2.1)[:rank]}
    scenes = case_scenes(image, maps, lungs, axes=axes if rank == 3 else None, **spacing)
    shares = [0.0, 0.25, 0.5, 1.0]
    epochs = {f"epoch {10 * place}": values * share for place, share in enumerate(shares)}
    past = {"m": epochs, "gone": {"now": values}, "other": {}}
    drawn, without = draw_case(scenes, maps, **given, past=past), draw_case(scenes, maps, **given)
    before, high = len(without.pixels), drawn.pixels.shape[0] - without.pixels.shape[0]
    assert drawn.masks.keys() == without.masks.keys()
    for name, mask in drawn.masks.items():
        np.testing.assert_array_equal(mask[:before], without.masks[name])
        assert not mask[before:].any()
    assert len(scenes) == (2 if rank == 3 else 1)
    inner = 840 - 12
    across = (inner - 8 * (len(scenes) - 1)) // len(scenes)
    step, legend = (across + 4) // COLUMNS, 30
    strip = drawn.pixels[before - legend : before - legend + high]
    for side, scene in enumerate(scenes.values()):
        extents = [scene.extent(plane) for plane in scene.planes]
        wide, tall = max(w for _, w in extents), max(h for h, _ in extents)
        zoom = min((step - 4) / wide, 1.5 * (step - 4) / tall)
        below = 0
        for plane, (down, right) in zip(scene.planes, extents, strict=True):
            size = int(down * zoom), int(right * zoom)
            found = []
            for place, share in enumerate(shares):
                tile = scene.tile(plane, size, scene.orient(values * share), scale=2.0)
                left = 6 + side * (across + 8) + place * step
                found += placed(strip, tile, range(below, len(strip)), range(left, left + size[1]))
            assert len(found) == len(shares), f"{plane}: not each epoch in its column"
            assert len({top for top, _ in found}) == 1  # a row of its own
            below = found[0][0] + size[0]


def test_only_the_last_epochs_have_a_place(chest):
    scene = next(iter(case_scenes(chest[0], {"m": peaked()}, chest[1]).values()))
    epochs = {f"epoch {place}": peaked() * place for place in range(COLUMNS + 3)}
    last = dict(list(epochs.items())[3:])
    many, few = (epoch_strip(scene, "m", shown, 9.0, 410) for shown in (epochs, last))
    np.testing.assert_array_equal(many, few)
    assert many.shape[1] == 410


def test_the_names_below_narrow_tiles_are_whole():
    image = np.random.default_rng(0).random((24, 128, 20))
    scenes, ones = case_scenes(image, {"m": np.ones((2, 4, 2))}), np.ones((2, 4, 2), np.float32)
    given = {"caption": "", "scale": {"m": 1.0}}
    drawn = draw_case(scenes, {"m": ones}, **given, past={"m": {"epoch 100": ones}})
    other = draw_case(scenes, {"m": ones}, **given, past={"m": {"poch 100": ones}})
    apart = np.argwhere((drawn.pixels != other.pixels).any(-1))
    assert apart[:, 1].min() >= 6  # not cut at the page's margin
    written = np.argwhere(drawn.pixels[apart[:, 0].min() : apart[:, 0].max() + 1, :200].max(-1) > 60)
    assert np.ptp(written[:, 1]) >= text_width("epoch 100", 10) - 3


@pytest.mark.parametrize("shape", [(1, 64, 64), (64, 1, 64), (64, 64, 1), (1, 32, 32), (1, 1, 9)])
def test_volumes_one_voxel_thick_are_drawn(shape):
    maps = {"m": np.random.default_rng(0).standard_normal([max(1, n // 16) for n in shape])}
    picture = compose_case(np.random.default_rng(0).random(shape), maps, np.ones(shape, bool), scale={"m": 1.0})
    assert all(mask.shape == picture.pixels.shape[:2] for mask in picture.masks.values())
    assert coloured(picture.pixels).any()


def test_names_in_an_overview_stay_distinguishable():
    tile = np.zeros((40, 60, 3), np.uint8)
    ids = [f"valid_of_the_second_hospital_{i:04d}" for i in range(2)]
    lines = [f"Interlobular septal thickening\npresent, p 0.95, inside 0.53\n{case}" for case in ids]
    sheet = compose_overview([tile, tile], lines)
    assert (sheet[:, :150] != sheet[:, 152:302]).any()
    for case in ids:
        cut = fitted(case, 10, 150, middle=True)
        assert text_width(cut, 10) <= 150
        assert (cut[:5], cut[-5:]) == (case[:5], case[-5:])
    assert fitted("short", 10, 150, middle=True) == "short"
    assert fitted("anything", 10, 3, middle=True) == ""
