"""The settings that there are: their keys and types from ``config.py``, their presets from ``conf/``."""

import difflib
import types
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from nemo_qwen_hidden.cli.conf_folder import conf_folder
from nemo_qwen_hidden.config import FinetuneSettings, Settings
from nemo_qwen_hidden.errors import ConfigError

Kind = type[Settings | FinetuneSettings]


def groups(kind: Kind = Settings) -> tuple[str, ...]:
    """Names of the groups of settings, such as ``parallel``."""
    return tuple(group.name for group in fields(kind))


def kinds(kind: Kind = Settings) -> dict[str, type]:
    """Every key, such as ``parallel.tp``, with the type of its value where it is not null."""
    return {
        f"{group}.{name}": _kind(annotation)
        for group, settings in get_type_hints(kind).items()
        for name, annotation in get_type_hints(settings).items()
    }


def presets(group: str) -> tuple[str, ...]:
    """Names of the presets of ``group``."""
    return tuple(sorted(path.stem for path in (conf_folder() / group).glob("*.yaml")))


def unknown(key: str, given: object, kind: Kind = Settings) -> ConfigError:
    """The error for a key that is not a setting, with the one that was probably meant."""
    meant = _closest(key, (*kinds(kind), *groups(kind)))
    hint = f"did you mean `{meant}`?" if meant else "`--settings` lists them"
    return ConfigError(key, f"must be one of the known settings ({hint})", given)


def unknown_preset(group: str, given: object) -> ConfigError:
    """The error for a preset that ``group`` lacks."""
    return ConfigError(group, f"must be one of the presets {', '.join(presets(group))}", given)


def _closest(key: str, known: Iterable[str]) -> str | None:
    by_name = {name: name for name in known} | {name.rpartition(".")[2]: name for name in known}
    for asked in (key, key.rpartition(".")[2]):
        if close := difflib.get_close_matches(asked, by_name, n=1, cutoff=0.75):
            return by_name[close[0]]
    return None


def _kind(annotation: Any) -> type:
    """``int`` for ``int | None``, ``tuple`` for ``tuple[str, ...]``."""
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (choice for choice in get_args(annotation) if choice is not type(None))
    kind: type = get_origin(annotation) or annotation
    return kind
