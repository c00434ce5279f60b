"""A page of a network's errors: missed findings and false alarms, each with its maps and what spoke for and against."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from camtrain._errors import InputError
from camtrain.reporting._files import replacing
from camtrain.reporting._pages import asset, environment

KINDS = {
    "fn": ("False negatives", "The finding is there, and the network says no."),
    "fp": ("False positives", "The finding is not there, and the network says yes."),
}


@dataclass(frozen=True)
class ErrorCard:
    """One error.

    Attributes:
        kind: `fn` or `fp`, as `camtrain.evaluation.case_filter` names them.
        case: Name of the case.
        label: Name of the label.
        probability: What the network says.
        picture: (H, W, 3) uint8, of `side_by_side` for instance.
        alt: What the picture shows, for those who do not see it.
        columns: Headings of the numbers in `rows`.
        rows: Part of the body -> one number per heading, such as mass by organ; NaN is shown as a dash.
        note: A sentence below.
    """

    kind: str
    case: str
    label: str
    probability: float
    picture: npt.NDArray[np.uint8]
    alt: str
    columns: Sequence[str] = ()
    rows: Mapping[str, Sequence[float]] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind= expects {' or '.join(KINDS)}, got {self.kind!r}")
        if self.picture.ndim != 3 or self.picture.shape[2] != 3 or self.picture.dtype != np.uint8:
            raise InputError(f"picture= expects (H, W, 3) uint8, got {self.picture.shape} in {self.picture.dtype}")
        if wrong := [name for name, values in self.rows.items() if len(values) != len(self.columns)]:
            raise InputError(f"expected {len(self.columns)} numbers, one per heading, for {wrong[0]!r}")


def error_gallery_html(cards: Sequence[ErrorCard], title: str, lead: str = "", colours: int = 256) -> str:
    """The page as one string: pictures lie in it, no request leaves it, and it has no script.

    Errors stand in two sections, by kind; within one the network's surest errors come first.

    Args:
        cards: Errors; none is an answer too, and the page says so.
        title: Heading.
        lead: What the network is and which cases were looked at.
        colours: Of each picture: 256 keep a page of fifty pictures small.

    Returns:
        HTML.

    Example:
        >>> picture = np.zeros((4, 6, 3), np.uint8)
        >>> page = error_gallery_html([ErrorCard("fn", "case 7", "<nodule>", 0.02, picture, "maps")], "Errors")
        >>> "&lt;nodule&gt;" in page, page.count("data:image/png;base64,")
        (True, 1)
    """
    sections = []
    for kind, (heading, says) in KINDS.items():
        of = [card for card in cards if card.kind == kind]
        of.sort(key=lambda card: card.probability if card.kind == "fn" else -card.probability)
        sections.append((kind, heading, says, [(card, _data_uri(card.picture, colours)) for card in of]))
    template = environment().get_template("error_gallery.html.j2")
    return template.render(title=title, lead=lead, sections=sections, style=asset("evaluation.css"))


def write_error_gallery(path: Path, cards: Sequence[ErrorCard], title: str, lead: str = "", colours: int = 256) -> Path:
    """Write the page; the file is whole or not there.

    Args:
        path: File to make or to replace.
        cards: See `error_gallery_html`.
        title: Heading.
        lead: What the network is.
        colours: Of each picture.

    Returns:
        The path.
    """
    text = error_gallery_html(cards, title, lead, colours)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _data_uri(picture: npt.NDArray[np.uint8], colours: int) -> str:
    drawn = Image.fromarray(picture).quantize(colours, dither=Image.Dither.NONE)
    file = io.BytesIO()
    drawn.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
