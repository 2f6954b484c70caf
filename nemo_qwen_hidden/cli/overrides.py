"""What stands on the command line, ``group.key=value`` or ``group=preset``, read with Hydra's grammar and checked."""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from nemo_qwen_hidden.cli import known
from nemo_qwen_hidden.cli.known import Kind
from nemo_qwen_hidden.config import Settings
from nemo_qwen_hidden.errors import ConfigError, UserError, raise_all


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """The overrides as Hydra is to read them, the keys that they set, and the groups that they take a preset of."""

    texts: tuple[str, ...]
    keys: frozenset[str]
    groups: frozenset[str]


def read(texts: Sequence[str], kind: Kind = Settings) -> Overrides:
    """Checks every override by itself; values' types are not looked at.

    Raises:
        UserError: one problem, or ``ConfigErrors`` with all of them.
    """
    problems: list[UserError] = []
    read_texts, names = [], []
    parser = OverridesParser.create()
    for text in texts:
        try:
            text, override = _parse(text, parser, kind)
            _check(text, override, kind)
        except ConfigError as problem:
            problems.append(problem)
            continue
        read_texts.append(text)
        names.append(override.key_or_group)
    raise_all(problems)
    groups = frozenset(known.groups(kind)).intersection(names)
    return Overrides(texts=tuple(read_texts), keys=frozenset(names) - groups, groups=groups)


def _parse(text: str, parser: OverridesParser, kind: Kind) -> tuple[str, Override]:
    """``text`` and what it says.

    A setting that holds text takes ``2024_01`` or ``notes (1).txt`` as it stands, which Hydra's grammar would read as
    a number or refuse: such a value is quoted here.
    """
    key, equals, value = text.partition("=")
    override = _understood(text, parser)
    taken = override is not None and isinstance(override.value(), str | list | dict | None)
    if equals and not taken and known.kinds(kind).get(key) is str and not set(value) & set("'\"\\"):
        text = f'{key}="{value}"'
        override = _understood(text, parser)
    if override is not None:
        return text, override
    if not equals:
        raise ConfigError(text or "override", "must be written `key=value`", text)
    raise ConfigError(key, "must be readable by Hydra: text that holds brackets or quotes stands in quotes", value)


def _understood(text: str, parser: OverridesParser) -> Override | None:
    try:
        return parser.parse_override(text)
    except HydraException:
        return None


def _check(text: str, override: Override, kind: Kind) -> None:
    key = override.key_or_group
    is_group = key in known.groups(kind)
    if not is_group and key not in known.kinds(kind):
        raise known.unknown(key or text, text, kind)
    if text[0] in "+~" or override.package is not None:
        raise ConfigError(key, "must be set as `key=value`, without `+`, `~` or `@`", text)
    if is_group and override.value() not in known.presets(key):
        raise known.unknown_preset(key, text.partition("=")[2])
    if override.is_sweep_override() or isinstance(override.value(), dict):
        rule = "must be one value; a list stands in [brackets], text with a comma in quotes"
        raise ConfigError(key, rule, text.partition("=")[2])
