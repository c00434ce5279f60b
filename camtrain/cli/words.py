"""Options that hold several words: `a,b`, or YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from camtrain._errors import InputError


def split_words(text: str | None) -> list[str]:
    """The words between commas.

    Example:
        >>> split_words("a, b,"), split_words(None)
        (['a', 'b'], [])
    """
    return [] if text is None else [word.strip() for word in text.split(",") if word.strip()]


def read_methods(text: str) -> list[str | Mapping[str, Any]]:
    """`hirescam,gradcam`, or YAML such as `[hirescam, {name: lrp, contrast: paper}]`.

    Raises:
        InputError: YAML that is no list.

    Example:
        >>> read_methods("[hirescam, {name: lrp, contrast: paper}]")
        ['hirescam', {'name': 'lrp', 'contrast': 'paper'}]
    """
    if not text.lstrip().startswith("["):
        return list(split_words(text))
    found = read_yaml(text, "--methods")
    if not isinstance(found, list):
        raise InputError(f"--methods expects names, or a YAML list, got {text!r}")
    return found


def read_yaml(text: str, option: str) -> Any:
    """What YAML text says.

    Raises:
        InputError: It is no YAML.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{option} cannot be read as YAML: {' '.join(str(error).split())}") from error
