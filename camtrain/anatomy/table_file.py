"""Reading an organ table: the file, its three sections, and one sentence for everything that can be wrong with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from camtrain._errors import InputError, nearest
from camtrain.anatomy.rules import Rule

KEYS = ("organs", "groups", "labels", "ignore_unknown")
OPTIONS = ("organs", "hull", "close_mm", "fill", "minus", "dilate_mm")
ANYWHERE = "anywhere"


def shipped_names() -> list[str]:
    """Names of the tables that come with camtrain.

    Example:
        >>> shipped_names()
        ['ct_rate', 'phantom', 'rad_chestct', 'rad_chestct_plain', 'totalsegmentator_abdomen', 'totalsegmentator_chest']
    """
    folder = resources.files("camtrain.anatomy") / "tables"
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".yaml"))


def read_table(source: str | Path) -> Any:
    """Parse the YAML of a shipped table or of a file.

    Args:
        source: A shipped name, or the path of a YAML file.

    Returns:
        What the YAML holds, unchecked.

    Raises:
        InputError: There is no such file or shipped table, or it is no readable YAML.
    """
    shipped = shipped_names()
    if str(source) in shipped:
        text = (resources.files("camtrain.anatomy") / "tables" / f"{source}.yaml").read_text(encoding="utf-8")
    else:
        text = _read_file(Path(source), shipped)
    try:
        return yaml.load(text, Loader=_UniqueKeys)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise InputError(f"expected an organ table in YAML, but {source} cannot be parsed: {problem}") from error


def _read_file(path: Path, shipped: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        hint = nearest(str(path), shipped)
        raise InputError(
            f"expected the path of an organ table or the name of a shipped one, got {str(path)!r}, "
            f"which is neither{hint}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"expected a readable organ table (YAML text), but {path} cannot be read: {error}") from error


class _UniqueKeys(yaml.SafeLoader):
    """YAML's last-one-wins would drop an organ or a label that is written twice."""


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is written twice", key.start_mark)
        seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def check_sections(content: Any, where: str) -> dict[str, Any]:
    """The sections of a table as keyword arguments.

    Args:
        content: What the YAML holds.
        where: Name of the source, for messages.

    Returns:
        A dict with `organs` and `labels`, perhaps `groups` and `ignore_unknown`.

    Raises:
        InputError: `content` is no mapping, has a key of another name, or lacks `organs` or `labels`.
    """
    if not isinstance(content, Mapping):
        raise InputError(f"{where}: expected the keys organs and labels, got {type(content).__name__}")
    for key in content:
        if key not in KEYS:
            raise InputError(f"{where}: expected the keys {', '.join(KEYS)}, got {key!r}{nearest(str(key), KEYS)}")
    for key in ("organs", "labels"):
        if not isinstance(content.get(key), Mapping) or not content[key]:
            raise InputError(f"{where}: expected a mapping with entries under {key!r}, got {content.get(key)!r}")
    if not isinstance(content.get("groups") or {}, Mapping):
        raise InputError(f"{where}: expected a mapping under 'groups' (name: [organs]), got {content['groups']!r}")
    if not isinstance(content.get("ignore_unknown", False), bool):
        raise InputError(f"{where}: ignore_unknown expects true or false, got {content['ignore_unknown']!r}")
    return dict(content)


def parse_organs(organs: Mapping[Any, Any], where: str) -> dict[str, tuple[int, ...]]:
    """Organ name -> ids, each id once in the table.

    Args:
        organs: Name -> id or ids, as in the YAML.
        where: Name of the source, for messages.

    Returns:
        Name -> ids, in the order of the YAML.

    Raises:
        InputError: A name is no text, an id is no whole number above 0, or an id is used twice.

    Example:
        >>> parse_organs({"heart": 3, "aorta": [4, 5]}, "table")
        {'heart': (3,), 'aorta': (4, 5)}
    """
    parsed: dict[str, tuple[int, ...]] = {}
    owner: dict[int, str] = {}
    for name, value in organs.items():
        _text(name, "organ", where)
        ids = value if isinstance(value, (list, tuple)) else [value]
        if not ids:
            raise InputError(f"{where}: organ {name!r} has no id: give it the id or ids it has in the segmentation")
        for i in ids:
            if isinstance(i, bool) or not isinstance(i, int) or i < 1:
                reason = (
                    "0 is the background" if i == 0 and not isinstance(i, bool) else "ids are whole numbers above 0"
                )
                raise InputError(
                    f"{where}: organ {name!r} has the id {i!r}, but {reason}: use the ids in the segmentation"
                )
            if i in owner:
                raise InputError(
                    f"{where}: id {i} is used twice, by {owner[i]!r} and {name!r}: give each organ its own ids"
                )
            owner[i] = name
        parsed[name] = tuple(ids)
    return parsed


def parse_groups(groups: Mapping[Any, Any], organs: Mapping[str, object], where: str) -> dict[str, tuple[str, ...]]:
    """Group name -> names of its members, which are organs or other groups.

    Args:
        groups: Name -> list of names, as in the YAML.
        organs: The table's organs.
        where: Name of the source, for messages.

    Returns:
        Name -> members, in the order of the YAML.

    Raises:
        InputError: A group bears an organ's name, is empty, names an unknown member, or contains itself.

    Example:
        >>> parse_groups({"lungs": ["left", "right"]}, {"left": (1,), "right": (2,)}, "table")
        {'lungs': ('left', 'right')}
    """
    for name in groups:
        _text(name, "group", where)
        if name in organs:
            raise InputError(f"{where}: {name!r} is an organ and a group: rename the group")
    parsed = {n: _names(m, [*organs, *groups], f"{where}: group {n!r}") for n, m in groups.items()}
    for name in parsed:
        _flatten(name, parsed, f"{where}: group {name!r}")
    return parsed


def parse_rule(
    label: Any, value: Any, organs: Mapping[str, object], groups: Mapping[str, tuple[str, ...]], where: str
) -> Rule:
    """One label's entry in the YAML as a `Rule`.

    Args:
        label: The label's name.
        value: `anywhere`, a name, a list of organs or groups, or a mapping with the options of a rule.
        organs: The table's organs.
        groups: The table's groups, as `parse_groups` gives them.
        where: Name of the source, for messages.

    Returns:
        The rule, with groups resolved to organs.

    Raises:
        InputError: A name or option is unknown, the list is empty, or an option has a wrong value.

    Example:
        >>> rule = parse_rule("mass", {"organs": ["both"], "hull": True}, {"l": 1, "r": 2}, {"both": ["l", "r"]}, "")
        >>> rule.units, rule.hull
        ((('l',), ('r',)), True)
    """
    _text(label, "label", where)
    at = f"{where}: label {label!r}"
    if value in (ANYWHERE, [ANYWHERE]):
        return Rule()
    options = dict(value) if isinstance(value, Mapping) else {"organs": value}
    for key in options:
        if key not in OPTIONS:
            raise InputError(f"{at}: a rule knows {', '.join(OPTIONS)}, got {key!r}{nearest(str(key), OPTIONS)}")
    known = [*organs, *groups]
    entries = _names(options.get("organs"), known if isinstance(value, Mapping) else [*known, ANYWHERE], at)
    members = [m for entry in entries for m in groups.get(entry, (entry,))]
    minus = _names(options["minus"], known, f"{at}: minus") if options.get("minus") else ()
    hull = _flag(options, "hull", at)
    units = dict.fromkeys(_flatten(m, groups, at) for m in members)
    if not hull:  # one spelling for one set of organs, so that equal regions are found to be equal
        units = dict.fromkeys((name,) for name in sorted({n for unit in units for n in unit}))
    return Rule(
        units=tuple(units),
        hull=hull,
        close_mm=_length(options, "close_mm", at),
        fill=_flag(options, "fill", at),
        minus=tuple(sorted({n for m in minus for n in _flatten(m, groups, at)})),
        dilate_mm=_length(options, "dilate_mm", at),
    )


def _text(name: Any, kind: str, where: str) -> None:
    if not isinstance(name, str) or not name:
        raise InputError(
            f"{where}: {kind} names are text, got {name!r}: put it in quotes (YAML reads no, on, 1 otherwise)"
        )
    if name == ANYWHERE:
        raise InputError(f"{where}: {ANYWHERE!r} means no constraint and names nothing else: rename the {kind}")


def _names(value: Any, known: Sequence[str], at: str) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not names:
        raise InputError(f"{at}: expected a list with at least one organ or group, or {ANYWHERE}, got {value!r}")
    for name in names:
        if name == ANYWHERE or name not in known:
            raise InputError(f"{at}: {name!r} is no organ or group of the table{nearest(str(name), known)}")
    return tuple(names)


def _flatten(name: str, groups: Mapping[str, tuple[str, ...]], at: str, path: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Organ names behind a name, sorted."""
    if name in path:
        raise InputError(f"{at}: the group contains itself ({' > '.join([*path, name])}): list organs instead")
    if name not in groups:
        return (name,)
    return tuple(sorted({n for member in groups[name] for n in _flatten(member, groups, at, (*path, name))}))


def _flag(options: Mapping[str, Any], key: str, at: str) -> bool:
    value = options.get(key, False)
    if not isinstance(value, bool):
        raise InputError(f"{at}: {key} expects true or false, got {value!r}")
    return value


def _length(options: Mapping[str, Any], key: str, at: str) -> float:
    value = options.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise InputError(f"{at}: {key} expects a length in mm, 0 or more, got {value!r}")
    return float(value)
