"""Pictures as PNG: what is read again is what was written, and the files are not much larger than Pillow's."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from camtrain.reporting import compose_panel
from camtrain.reporting._png import png
from camtrain.reporting.case_picture import _CLASSES, _strength


def read(data):
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        return picture.mode, np.asarray(picture)


@pytest.mark.parametrize(
    ("shape", "mode"),
    [((7, 5), "L"), ((7, 5, 3), "RGB"), ((1, 1, 3), "RGB"), ((1, 9), "L"), ((9, 1), "L"), ((4, 6, 4), "RGBA")],
)
@pytest.mark.parametrize("strategy", [zlib.Z_DEFAULT_STRATEGY, zlib.Z_RLE])
def test_pixels_come_back(shape, mode, strategy):
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    found, again = read(png(pixels, strategy))
    assert found == mode
    assert np.array_equal(again, pixels)


def test_views_are_written_as_they_are_seen():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 3)).astype(np.uint8)[::-1, ::2]
    assert np.array_equal(read(png(pixels))[1], pixels)


def test_other_numbers_are_refused():
    with pytest.raises(TypeError):
        png(np.zeros((4, 4, 3), np.float32))


def test_a_picture_is_little_larger_than_pillows():
    rng = np.random.default_rng(0)
    picture = compose_panel(rng.random((24, 18, 24)), rng.standard_normal((6, 5, 6)), caption="case 1: nodule", scale=1)
    pillows = io.BytesIO()
    Image.fromarray(picture).save(pillows, "PNG", compress_level=1)
    assert len(png(picture)) < 1.2 * pillows.tell()


def test_classes_are_those_of_the_edges():
    edges = np.array([-0.5, -0.15, 0.15, 0.5])
    near = [np.nextafter(np.float32(e), np.float32(to)) for e in edges for to in (-1, 1)]
    drawn = np.random.default_rng(0).uniform(-1, 1, 1000)
    share = np.array([*near, *edges, *drawn], np.float32)
    assert np.array_equal(_strength(share), _CLASSES[np.digitize(share, edges)])
