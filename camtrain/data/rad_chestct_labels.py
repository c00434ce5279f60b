"""Findings of RAD-ChestCT: its vocabulary, the authors' 80 labels with their places, and what a report says of sides.

The published tables have a column `finding*place` for every finding and place. A label of the study is the largest of
some of them: `heart_calcification` is calcification in the heart or one of its valves. Only lung labels know sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from camtrain._errors import InputError, nearest

Sides = Literal["reported", "authors"]
LabelSet = Literal["located", "plain"]
Floats = NDArray[np.float32]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


LUNG_FINDINGS = _words(
    "bandlike_or_linear bronchial_wall_thickening groundglass honeycombing reticulation tree_in_bud airspace_disease "
    "air_trapping aspiration atelectasis bronchiectasis bronchiolectasis bronchiolitis bronchitis emphysema hemothorax "
    "interstitial_lung_disease lung_resection mucous_plugging pleural_effusion pleural_thickening pneumonia "
    "pneumonitis pneumothorax pulmonary_edema septal_thickening tuberculosis"
)
"""Findings of the lungs alone."""
HEART_FINDINGS = _words(
    "cabg cardiomegaly coronary_artery_disease heart_failure heart_valve_replacement pacemaker_or_defib "
    "pericardial_effusion pericardial_thickening sternotomy"
)
"""Findings of the heart alone."""
GENERIC_FINDINGS = _words(
    "arthritis atherosclerosis aneurysm breast_implant breast_surgery calcification cancer catheter_or_port cavitation "
    "clip congestion consolidation cyst debris deformity density dilation_or_ectasia distention fibrosis fracture "
    "granuloma hardware hernia infection infiltrate inflammation lesion lucency lymphadenopathy mass nodule "
    "nodulegr1cm opacity plaque postsurgical scarring scattered_calc scattered_nod secretion soft_tissue staple stent "
    "suture transplant chest_tube tracheal_tube gi_tube"
)
"""Findings that many organs may have."""
FINDINGS = tuple(sorted([*LUNG_FINDINGS, *HEART_FINDINGS, *GENERIC_FINDINGS, "other_path"]))
"""All 84."""
LEFT_LUNG = ("left_upper", "left_mid", "left_lower", "left_lung")
RIGHT_LUNG = ("right_upper", "right_mid", "right_lower", "right_lung")
PLACES_OF = {
    "h_great_vessel": ("aorta", "svc", "ivc", "pulmonary_artery", "pulmonary_vein"),
    "h_mediastinum": ("mediastinum", "hilum"),
    "heart": ("heart", "mitral_valve", "aortic_valve", "tricuspid_valve", "pulmonary_valve"),
    "lung": (*LEFT_LUNG, *RIGHT_LUNG),
}
"""First words of a label -> places of the tables."""
PLACES = (
    *(*LEFT_LUNG[:3], *RIGHT_LUNG[:3], "right_lung", "left_lung", "lung", "airways"),
    *(*PLACES_OF["heart"], *PLACES_OF["h_great_vessel"]),
    *("right", "left", "anterior", "posterior", "superior", "inferior", "medial", "lateral"),
    *("interstitial", "subpleural", "centrilobular", "thyroid", "breast", "axilla", "chest_wall", "rib", "spine"),
    *("bone", "mediastinum", "diaphragm", "hilum", "abdomen", "esophagus", "stomach", "intestine", "liver"),
    *("gallbladder", "kidney", "adrenal_gland", "spleen", "pancreas", "other_location"),
)
"""All 52."""


@dataclass(frozen=True)
class Truths:
    """What the tables say of N cases and L labels.

    Attributes:
        label: (N, L) 1 there, 0 not there, NaN unknown.
        left: (N, L) bool, the label may be on the left; True wherever no report says otherwise.
        right: (N, L) bool.
    """

    label: Floats
    left: NDArray[np.bool_]
    right: NDArray[np.bool_]


def split_label(label: str) -> tuple[str, str]:
    """Place and finding of a label.

    Raises:
        InputError: The label has another form.

    Example:
        >>> split_label("heart_heart_failure"), split_label("h_great_vessel_aneurysm")
        (('heart', 'heart_failure'), ('h_great_vessel', 'aneurysm'))
    """
    for place in PLACES_OF:
        if label.startswith(f"{place}_") and label.removeprefix(f"{place}_") in FINDINGS:
            return place, label.removeprefix(f"{place}_")
    raise InputError(
        f"expected a label made of a place ({', '.join(PLACES_OF)}) and a finding of RAD-ChestCT, such as lung_nodule, "
        f"got {label!r}{nearest(label.split('_', 1)[-1], FINDINGS)}"
    )


def columns_of(label: str, label_set: LabelSet, header: Iterable[str]) -> list[str]:
    """Columns that a label is made of.

    Args:
        label: A label of the set.
        label_set: `"located"`, or `"plain"`: one label per finding, in any place.
        header: Names of the columns; a finding's end at the star (`nodule*` is not `nodulegr1cm*`), or are the finding.

    Returns:
        Names in the order of the header.

    Raises:
        InputError: The table has no such column.

    Example:
        >>> columns_of("nodule", "plain", ["nodule*lung", "nodulegr1cm*lung", "nodule*spine"])
        ['nodule*lung', 'nodule*spine']
    """
    listed = list(header)
    place, finding = split_label(label) if label_set == "located" else ("", label)
    of_finding = [name for name in listed if name.partition("*")[0] == finding]
    # A lung finding counts wherever the report puts it; what only lungs have is in a lung.
    everywhere = label_set == "plain" or (place == "lung" and finding in LUNG_FINDINGS)
    found = [n for n in of_finding if everywhere or n.partition("*")[2] in PLACES_OF[place]]
    if not found:
        known = dict.fromkeys(name.partition("*")[0] for name in listed)
        what = "finding*place" if label_set == "located" else "finding*place or finding"
        raise InputError(
            f"label {label!r}: expected columns {what} of the finding {finding!r}, got none{nearest(finding, known)}: "
            "leave the label out with labels=, or correct the table"
        )
    return found


def make_truths(
    columns: Mapping[str, Floats], labels: Sequence[str], label_set: LabelSet = "located", sides: Sides = "reported"
) -> Truths:
    """Labels and sides of cases from the columns of the tables.

    A label is there where one of its columns is 1, and unknown where none is 1 and one is unknown. A lung label of a
    finding that other organs have too needs a place in one lung; a finding of the lungs alone is there wherever the
    report puts it. Where no lung is named, both may show it.

    Args:
        columns: Name -> (N,) of 0, 1, NaN.
        labels: L labels of the set.
        label_set: See `columns_of`.
        sides: `"reported"`: the sides that the report names. `"authors"`: as their program does it, a finding of the
            lungs alone may be in both wherever it is there, also where the report names one side.

    Returns:
        The truths.

    Raises:
        InputError: A label has no column.

    Example:
        >>> columns = {"mass*left_lower": np.array([1, 0.0]), "mass*spine": np.array([0, 1.0])}
        >>> truths = make_truths(columns, ["lung_mass"])
        >>> truths.label.tolist(), truths.left.tolist(), truths.right.tolist()
        ([[1.0], [0.0]], [[True], [True]], [[False], [True]])
    """
    cases = len(next(iter(columns.values())))
    shape = (cases, len(labels))
    truths = Truths(np.empty(shape, dtype=np.float32), np.ones(shape, dtype=np.bool_), np.ones(shape, dtype=np.bool_))
    for index, label in enumerate(labels):
        used = columns_of(label, label_set, columns)
        truths.label[:, index] = largest(columns[name] for name in used)
        place, finding = split_label(label) if label_set == "located" else ("", label)
        if place != "lung" or (sides == "authors" and finding in LUNG_FINDINGS):
            continue
        left, right = _named(columns, used, LEFT_LUNG), _named(columns, used, RIGHT_LUNG)
        neither = ~(left | right) | (truths.label[:, index] != 1)
        truths.left[:, index], truths.right[:, index] = left | neither, right | neither
    return truths


def _named(columns: Mapping[str, Floats], used: Iterable[str], places: Sequence[str]) -> NDArray[np.bool_]:
    """(N,) bool: is one of the columns of these places 1?"""
    some = [columns[name] == 1 for name in used if name.partition("*")[2] in places]
    return np.logical_or.reduce(some) if some else np.zeros(len(next(iter(columns.values()))), dtype=bool)


def largest(values: Iterable[Floats]) -> Floats:
    """1 where one is 1, else NaN where one is unknown, else 0.

    Example:
        >>> largest([np.array([1, 0, 0]), np.array([np.nan, np.nan, 0])]).tolist()
        [1.0, nan, 0.0]
    """
    stacked = np.stack([np.asarray(each, dtype=np.float32) for each in values])
    result: Floats = np.where((stacked == 1).any(axis=0), np.float32(1), stacked.max(axis=0))
    return result


def side_of(organ: str) -> str:
    """`"left"`, `"right"`, or `""`, from an organ's name.

    Example:
        >>> side_of("lung_upper_lobe_left"), side_of("rough_right"), side_of("heart")
        ('left', 'right', '')
    """
    found = {"left", "right"} & set(re.split(r"[^a-z]+", organ.lower()))
    return found.pop() if len(found) == 1 else ""


def organs_told(left: NDArray[np.bool_], right: NDArray[np.bool_], organs: Sequence[str]) -> NDArray[np.bool_]:
    """Which organs each label may be read from, as far as sides say it: the batch key `allowed_organs`.

    Args:
        left: (L,) bool, the label may be on the left.
        right: (L,) bool.
        organs: O names, as in a table; those that bear no side are always True.

    Returns:
        (L, O) bool.

    Example:
        >>> organs_told(np.array([True]), np.array([False]), ["lung_right", "heart", "lung_left"]).tolist()
        [[False, True, True]]
    """
    may = {"left": left, "right": right, "": np.ones_like(left)}
    return np.stack([may[side_of(organ)] for organ in organs], axis=-1)
