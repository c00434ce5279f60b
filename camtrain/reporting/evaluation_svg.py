"""Figures as small inline SVG: real text, colours by CSS class, the same bytes for the same figure."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence
from typing import Any, Final

from matplotlib.backend_bases import GraphicsContextBase, RendererBase
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.transforms import Transform

# The light palette; figures use these colours, the page gives the classes other ones in the dark.
# Series colours keep 3:1 against the ground of either theme and differ in lightness as well as in hue.
COLOURS: Final = {
    "ink": "#1c2127",
    "faint": "#565d66",
    "grid": "#d5d9de",
    "band": "#f1f3f5",
    "warm": "#c23b0e",
    "cool": "#2457c5",
    "s0": "#0b5cad",
    "s1": "#c4500a",
    "s2": "#00795b",
    "s3": "#8e3a9d",
    "s4": "#7d6608",
    "s5": "#3d4650",
}
_CLASSES: Final = {colour: name for name, colour in COLOURS.items()}
_WIDTH: Final = 0.56  # of an average letter, as a share of the font size, in common sans-serif fonts
PIXELS: Final = 72  # dots per inch: one point of matplotlib is one pixel of the page


def figure_svg(figure: Figure, *, title: str, description: str, ident: str) -> str:
    """A figure as an `svg` element for an HTML page.

    Text stays text, in the page's own font. Colours of `COLOURS` become the classes `f-NAME` (filled) and `l-NAME`
    (lines), which the page's style sheet defines. The gid of a text is its tooltip. Nothing global is changed, so that
    threads may draw at once.

    Args:
        figure: Made with `dpi=PIXELS`.
        title: Name for screen readers.
        description: What is to be seen, for screen readers.
        ident: Prefix of all ids, unique on the page: letters, digits and hyphens.

    Returns:
        Markup without a namespace declaration, as HTML wants it.

    Example:
        >>> markup = figure_svg(Figure(figsize=(1, 1), dpi=PIXELS), title="a < b", description="", ident="p1")
        >>> markup.startswith('<svg role="img"'), "a &lt; b" in markup
        (True, True)
    """
    width, height = (round(float(size) * PIXELS) for size in figure.get_size_inches())
    renderer = _SvgRenderer(width, height, ident)
    figure.draw(renderer)
    label = f'role="img" aria-labelledby="{ident}-t {ident}-d"'
    return (
        f'<svg {label} width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f'<title id="{ident}-t">{html.escape(title)}</title><desc id="{ident}-d">{html.escape(description)}</desc>'
        f"{''.join(renderer.parts)}</svg>"
    )


def plain_text(text: str) -> str:
    """One line without control characters, marks of writing direction included.

    Example:
        >>> plain_text(f"a{chr(10)}b{chr(0)}c")
        'a b c'
    """
    return " ".join("".join(" " if unicodedata.category(c)[0] == "C" else c for c in text).split())


def text_width(text: str, size: float) -> float:
    """Width in pixels, estimated; wide characters of East Asian scripts count double.

    Example:
        >>> round(text_width("abcd", 10), 1)
        22.4
    """
    letters = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
    return _WIDTH * size * letters


def fitted(text: str, size: float, width: float) -> str:
    """The text, shortened in its middle where it is wider than `width` pixels: both ends tell names apart.

    Example:
        >>> fitted("left_upper_lobe_nodule", 10, 80)
        'left_up…nodule'
    """
    text = plain_text(text)
    if text_width(text, size) <= width:
        return text
    keep = len(text)
    while keep > 2 and text_width(_shortened(text, keep), size) > width:
        keep -= 1
    return _shortened(text, keep)


def _shortened(text: str, keep: int) -> str:
    head = (keep + 1) // 2
    return f"{text[:head]}…{text[len(text) - (keep - head) :]}"


class _SvgRenderer(RendererBase):
    """Collects markup.

    matplotlib's own SVG backend is not used: it takes its font mode and its ids from global settings, writes a style
    sheet that would leak into the page, and needs several times the bytes.
    """

    def __init__(self, width: int, height: int, ident: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._size = width, height
        self._ident = ident
        self._symbols: dict[str, str] = {}

    def draw_path(
        self,
        gc: GraphicsContextBase,
        path: Path,
        transform: Transform,
        rgbFace: Any = None,  # noqa: N803
    ) -> None:
        clip = gc.get_clip_rectangle()
        bounds = None if clip is None or rgbFace is not None else _bounds(clip.bounds)
        data = _path_data(path, transform, self._size[1], bounds)
        if data:
            self.parts.append(f'<path{_paint(gc, rgbFace)} d="{data}"/>')

    def draw_markers(
        self,
        gc: GraphicsContextBase,
        marker_path: Path,
        marker_trans: Transform,
        path: Path,
        trans: Transform,
        rgbFace: Any = None,  # noqa: N803
    ) -> None:
        data = _path_data(marker_path, marker_trans, 0, None)
        known = f"{data}{_paint(gc, rgbFace)}"
        if known not in self._symbols:
            self._symbols[known] = f"{self._ident}-{len(self._symbols)}"
            self.parts.append(f'<defs><path id="{self._symbols[known]}"{_paint(gc, rgbFace)} d="{data}"/></defs>')
        clip = gc.get_clip_rectangle()
        for vertices, _ in path.iter_segments(trans, simplify=False):
            x, y = float(vertices[-2]), float(vertices[-1])
            if clip is None or _within(clip.bounds, x, y):
                at = f'x="{_short(x)}" y="{_short(self._size[1] - y)}"'
                self.parts.append(f'<use href="#{self._symbols[known]}" {at}/>')

    def draw_text(
        self,
        gc: GraphicsContextBase,
        x: float,
        y: float,
        s: str,
        prop: FontProperties,
        angle: float,
        ismath: Any = False,
        mtext: Any = None,
    ) -> None:
        anchor, width = "", text_width(s, prop.get_size_in_points())
        align = mtext.get_horizontalalignment() if mtext is not None else "left"
        if align in ("right", "center"):
            # Fonts differ in width: what must be exact is the side at which the text is held.
            anchor = f' text-anchor="{"end" if align == "right" else "middle"}"'
            x += width if align == "right" else width / 2
        weight = ' font-weight="600"' if prop.get_weight() in ("bold", "semibold", 600, 700) else ""
        name = _CLASSES.get(to_hex(gc.get_rgb()), "ink")
        size = f' font-size="{_short(prop.get_size_in_points())}"'
        whole = mtext.get_gid() if mtext is not None else None
        full = f"<title>{html.escape(whole)}</title>" if whole else ""
        self.parts.append(
            f'<text class="f-{name}" x="{_short(x)}" y="{_short(y)}"{size}{anchor}{weight}>'
            f"{html.escape(plain_text(s))}{full}</text>"
        )

    def draw_tex(self, gc: Any, x: float, y: float, s: str, prop: Any, angle: float, *, mtext: Any = None) -> None:
        self.draw_text(gc, x, y, s, prop, angle, mtext=mtext)

    def draw_image(self, gc: Any, x: float, y: float, im: Any, transform: Any = None) -> None:
        raise NotImplementedError("pages of an evaluation hold no pixel pictures")

    def get_text_width_height_descent(self, s: str, prop: FontProperties, ismath: Any) -> tuple[float, float, float]:
        size = prop.get_size_in_points()
        return text_width(s, size), 0.95 * size, 0.22 * size

    def get_canvas_width_height(self) -> tuple[float, float]:
        return self._size

    def flipy(self) -> bool:
        return True


def _bounds(clip: Sequence[float]) -> tuple[float, float, float, float]:
    x, y, width, height = clip
    return x, y, x + width, y + height


def _within(clip: Sequence[float], x: float, y: float) -> bool:
    left, low, right, high = _bounds(clip)
    return left - 0.5 <= x <= right + 0.5 and low - 0.5 <= y <= high + 0.5


def _short(value: float) -> str:
    """A tenth of a pixel is enough."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def _path_data(path: Path, transform: Transform, height: float, clip: tuple[float, float, float, float] | None) -> str:
    """The `d` of a path; y runs downwards there."""
    letters = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C"}
    parts = []
    for vertices, code in path.iter_segments(transform, simplify=False, clip=clip):
        if code == Path.CLOSEPOLY:
            parts.append("Z")
            continue
        pairs = zip(vertices[::2], vertices[1::2], strict=True)
        numbers = " ".join(f"{_short(float(x))} {_short(height - float(y))}" for x, y in pairs)
        parts.append(f"{letters[code]}{numbers}")
    return "".join(parts) if len(parts) > 1 else ""


def _paint(gc: GraphicsContextBase, face: Any) -> str:
    """Classes of a shape, and colours that are none of `COLOURS` as they are."""
    names: list[str] = []
    style = ""
    if face is not None and (len(face) < 4 or face[3] > 0):
        style += _coloured("f", "fill", to_hex(face), names)
    else:
        style += ' fill="none"'  # without it a path would be black
    if gc.get_linewidth() > 0 and gc.get_alpha() != 0 and gc.get_rgb()[3] > 0:
        style += _coloured("l", "stroke", to_hex(gc.get_rgb()), names) + f' stroke-width="{_short(gc.get_linewidth())}"'
        dashes: Any = gc.get_dashes()[1]
        style += f' stroke-dasharray="{" ".join(_short(float(d)) for d in dashes)}"' if dashes is not None else ""
    return (f' class="{" ".join(names)}"' if names else "") + style


def _coloured(letter: str, attribute: str, colour: str, names: list[str]) -> str:
    """Add the colour's class to `names`; for other colours the attribute."""
    if colour in _CLASSES:
        names.append(f"{letter}-{_CLASSES[colour]}")
        return ""
    return f' {attribute}="{colour}"'
