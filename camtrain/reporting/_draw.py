"""Text, strips and sheets on dark ground, drawn with Pillow: its built-in font, and DejaVu for what that lacks."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from camtrain.reporting.overlays import OUTLINE, blend

Pixels = npt.NDArray[np.uint8]

GROUND = 15  # one grey for all channels: filling a sheet with it is forty times as fast as with a colour
INK = (232, 232, 228)
FAINT = (150, 152, 156)
_PLAIN = str.maketrans({"–": "-", "—": "-", "−": "-", "×": "x", "→": ">", "≤": "<=", "≥": ">=", "µ": "u"})
_OWN = "·±°…"  # what the built-in font has besides ASCII


@functools.lru_cache(maxsize=32)
def font(size: int, wide: bool = False) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in font at a size in pixels; `wide`: DejaVu Sans, which comes with matplotlib."""
    return ImageFont.truetype(_dejavu(), size) if wide else ImageFont.load_default(size=size)


def _face(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return font(size, wide=not _built_in(text))


def _built_in(text: str) -> bool:
    return (text if text.isascii() else text.translate(_NOTHING)).isascii() and text.isprintable()


_NOTHING = dict.fromkeys(map(ord, _OWN))


def _dejavu() -> str:
    # Most names are ASCII: this import is for those that are not.
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@functools.cache
def _drawable() -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    return frozenset(c for c in map(chr, FT2Font(_dejavu()).get_charmap()) if c.isprintable())


def plain(text: str) -> str:
    """Text in the characters that the two fonts have: European, Greek, Cyrillic, signs; `?` for others, as Chinese.

    Example:
        >>> plain("Gefäß 3–5"), plain("3–5 mm"), plain("肺 λ")
        ('Gefäß 3–5', '3-5 mm', '? λ')
    """
    if text.isascii() and text.isprintable():
        return text
    text = unicodedata.normalize("NFC", text.replace("\n", " "))
    if _built_in(simple := text.translate(_PLAIN)):
        return simple
    return "".join(c if c in _drawable() else "?" for c in text)


@functools.lru_cache(maxsize=1024)
def text_width(text: str, size: int) -> int:
    """Width in pixels."""
    return round(_face(text, size).getlength(text))


@functools.lru_cache(maxsize=32)
def _widest(size: int, wide: bool) -> float:
    """Pixels that one letter more or less can make at most: the widest one, and as much for the gap beside it."""
    if wide:  # the widest of 5,767 letters: 1.75 times the size
        return 3.0 * size
    return 1.5 * max(map(font(size).getlength, (*map(chr, range(32, 127)), *_OWN)))


def fitted(text: str, size: int, width: int, middle: bool = False) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels.

    Args:
        text: One line.
        size: Size of the font in pixels.
        width: Pixels that there are.
        middle: Cut it there: names of cases often differ in their last letters only.

    Example:
        >>> fitted("patient_000123_scan_4", 10, 80), fitted("patient_000123_scan_4", 10, 80, middle=True)
        ('patient_0001...', 'patien..._scan_4')
    """
    text = plain(text)
    if text_width(text, size) <= width:
        return text
    keep, widest = len(text), _widest(size, not _built_in(text))
    while keep and (over := text_width(_cut(text, keep, middle), size) - width) > 0:
        # So many letters less cannot be enough; measured one by one, captions were most of what text costs.
        keep -= max(1, min(keep, int((over - 2) / widest)))
    return _cut(text, keep, middle) if keep else ""


def _cut(text: str, keep: int, middle: bool) -> str:
    end = keep // 2 if middle else 0
    return f"{text[: keep - end].rstrip()}...{text[len(text) - end :].lstrip()}"


def sheet(height: int, width: int) -> Pixels:
    """An empty dark sheet, (height, width, 3)."""
    return np.full((height, width, 3), GROUND, dtype=np.uint8)


def write(pixels: Pixels, entries: Sequence[tuple[str, tuple[float, float], str, int, tuple[int, int, int]]]) -> Pixels:
    """Write text on a picture.

    Args:
        pixels: (H, W, 3); not changed.
        entries: (text, (column, row), Pillow anchor, size, colour) for each piece.

    Returns:
        A new picture.
    """
    page = pixels.copy()
    for text, (column, row), anchor, size, colour in entries:
        text = plain(text)
        words = [(text, 0)] if len(text) <= _WORD or anchor != "lm" else _words(text, size)
        for word, ahead in words:
            left, top, rim, fill = _stamp(word, anchor, size, len(text) <= _WORD)
            at, down = round(column) + ahead + left, round(row) + top
            if rim is not None:
                _lay(page, rim, down, at, (0, 0, 0))
            _lay(page, fill, down, at, colour)
    return page


def _words(text: str, size: int) -> list[tuple[str, int]]:
    """A line in words, each with the pixels ahead of it.

    Rendering is most of what a caption costs, and its words, unlike itself, come back in other pictures. Letters of the
    built-in font stand on whole pixels; some stand nearer to a space before them.
    """
    placed, ahead = [], 0.0
    for number, word in enumerate(text.split(" ")):
        if number and word:
            ahead += _advance(f" {word[0]}", size) - _advance(" ", size) - _advance(word[0], size)
        if word:
            placed.append((word, round(ahead)))
        ahead += _advance(f"{word} ", size)
    return placed


@functools.lru_cache(maxsize=1024)
def _advance(text: str, size: int) -> float:
    return _face(text, size).getlength(text)


_WORD = 40
Stamp = tuple[int, int, Pixels | None, Pixels]


@functools.lru_cache(maxsize=512)
def _stamp(text: str, anchor: str, size: int, rimmed: bool) -> Stamp:
    """Where a text lies beside its anchor (left, top), and how much its rim and its letters cover.

    Rendering is most of what a picture costs, and nearly all words are those of the picture before.
    """
    face = _face(text, size)
    box = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((0, 0), text, font=face, anchor=anchor, stroke_width=1)
    left, top = int(box[0]) - 1, int(box[1]) - 1
    shape = max(1, int(box[2]) - left + 1), max(1, int(box[3]) - top + 1)
    cover = []
    # The dark rim keeps letters legible on bone. Lines of text stand beside the pictures and need none.
    for stroke in (1, 0) if rimmed else (0,):
        picture = Image.new("L", shape)
        draw = ImageDraw.Draw(picture)
        draw.text((-left, -top), text, fill=255, font=face, anchor=anchor, stroke_width=stroke)
        cover.append(np.asarray(picture)[..., None])
    return left, top, cover[0] if len(cover) == 2 else None, cover[-1]


def _lay(page: Pixels, cover: Pixels, top: int, left: int, colour: tuple[int, int, int]) -> None:
    """Lay a colour on a page through a stencil, as far as the stencil lies on it."""
    height, width = page.shape[:2]
    rows = slice(max(0, top), min(height, top + cover.shape[0]))
    columns = slice(max(0, left), min(width, left + cover.shape[1]))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return
    part = cover[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    below = page[rows, columns]
    share = part * np.float32(1 / 255)
    page[rows, columns] = np.rint(below + share * (np.asarray(colour, np.float32) - below))


def stack(blocks: Sequence[Pixels], gap: int, down: bool, centre: bool = False, margin: int = 0) -> Pixels:
    """Blocks below (`down`) or beside each other on dark ground, with a gap between them and a margin around them."""
    along, across = (0, 1) if down else (1, 0)
    length = sum(b.shape[along] for b in blocks) + gap * (len(blocks) - 1)
    breadth = max(b.shape[across] for b in blocks)
    # Ground goes only where no block will lie: pages are large, and each is a part of the next one.
    whole, page = _margined(*((length, breadth) if down else (breadth, length)), margin)
    start = 0
    for block in blocks:
        end, wide = start + block.shape[along], block.shape[across]
        side = (breadth - wide) // 2 if centre else 0
        part = page[start : end + gap] if down else page[:, start : end + gap].swapaxes(0, 1)
        part[end - start :] = GROUND
        if wide < breadth:
            part[: end - start, :side] = part[: end - start, side + wide :] = GROUND
        part[: end - start, side : side + wide] = block if down else block.swapaxes(0, 1)
        start = end + gap
    return whole


def _margined(height: int, width: int, margin: int) -> tuple[Pixels, Pixels]:
    """A page with a dark margin, and the part of it within, which is not filled."""
    whole = np.empty((height + 2 * margin, width + 2 * margin, 3), np.uint8)
    within = whole[margin : margin + height, margin : margin + width]
    whole[:margin] = whole[margin + height :] = GROUND
    whole[margin : margin + height, :margin] = whole[margin : margin + height, margin + width :] = GROUND
    return whole, within


def headline(
    text: str,
    width: int,
    size: int,
    colour: tuple[int, int, int] = INK,
    centre: bool = False,
    middle: bool = False,
) -> Pixels:
    """A strip with one line of text; `middle`: cut there where it is too long."""
    # Short ones are names of labels and maps, which come back in every picture.
    return (_strip if len(text) <= _WORD else _strip.__wrapped__)(text, width, size, colour, centre, middle)


@functools.lru_cache(maxsize=64)
def _strip(text: str, width: int, size: int, colour: tuple[int, int, int], centre: bool, middle: bool) -> Pixels:
    height = round(1.5 * size)
    at, anchor = ((width / 2, height / 2), "mm") if centre else ((0.0, height / 2), "lm")
    strip = write(sheet(height, width), [(fitted(text, size, width, middle), at, anchor, size, colour)])
    strip.setflags(write=False)
    return strip


def number(value: float) -> str:
    """A number for a colour bar: three digits, no needless exponent."""
    return f"{value:.3g}"


@functools.lru_cache(maxsize=64)
def legend(
    width: int, scale: float | None, region: str | None, size: int = 12, own: str = "each map at its own maximum"
) -> Pixels:
    """A strip with the colour bar and the sign of the outline; words give way where the strip is narrow.

    Args:
        width: Width of the strip.
        scale: End of the colour scale; None when each map has its own.
        region: What the outline stands for; None draws no such entry.
        size: Text size.
        own: What to say where each map has its own scale.
    """
    height = round(1.7 * size)
    low_end, high_end = ("", "") if scale is None else ("  -" + number(scale), "+" + number(scale) + "  ")
    own = f"  ({own})" if scale is None else ""
    region = plain(region) if region else ""
    right = text_width(region, size) + 2 * size if region else 0
    for low, high in (
        ("against the label" + low_end, high_end + "for the label" + own),
        ("against" + low_end, high_end + "for"),
        ("-", high_end.strip() or "+"),
    ):
        start = text_width(low, size) + size // 2
        bar = min(12 * size, width - start - text_width(high, size) - right - 2 * size)
        if bar >= 5 * size:
            break
    bar = max(bar, 2 * size)
    page, thick = sheet(height, width), round(0.75 * size)
    top = (height - thick) // 2
    values = np.broadcast_to(np.linspace(-1, 1, bar, dtype=np.float32), (thick, bar))
    page[top : top + thick, start : start + bar] = blend(np.full((thick, bar, 3), 90, np.uint8), values, 1.0)
    entries = [
        (low, (0.0, height / 2), "lm", size, FAINT),
        (high, (start + bar + size / 2, height / 2), "lm", size, FAINT),
    ]
    if region:
        box = slice(max(0, width - right), max(0, width - right) + round(1.4 * size))
        page[top : top + thick, box] = OUTLINE
        page[top + 1 : top + thick - 1, box.start + 1 : box.stop - 1] = GROUND
        entries.append((region, (float(width), height / 2), "rm", size, FAINT))
    strip = write(page, entries)
    strip.setflags(write=False)  # it is kept for the next picture
    return strip
