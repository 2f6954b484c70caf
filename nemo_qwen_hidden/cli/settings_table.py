"""What ``--settings`` says of every setting, read from ``conf/group/default.yaml`` so that the two cannot differ."""

import re
from dataclasses import dataclass

from nemo_qwen_hidden.cli import known
from nemo_qwen_hidden.cli.conf_folder import conf_folder
from nemo_qwen_hidden.cli.known import Kind
from nemo_qwen_hidden.config import Settings

_LINE = re.compile(r"(?P<name>\w+): (?P<default>.*\S)  # (?P<help>.+)")


@dataclass(frozen=True, kw_only=True)
class SettingHelp:
    """One setting: its key, its default as YAML, and what it means, with its unit."""

    key: str
    default: str
    help: str


def settings_table(kind: Kind = Settings) -> tuple[SettingHelp, ...]:
    """Every setting, in the order of ``kind``."""
    return tuple(row for group in known.groups(kind) for row in _rows(group))


def presets_table(kind: Kind = Settings) -> dict[str, tuple[str, ...]]:
    """The presets of every group that has more than its default."""
    presets = {group: known.presets(group) for group in known.groups(kind)}
    return {group: names for group, names in presets.items() if len(names) > 1}


def _rows(group: str) -> list[SettingHelp]:
    lines = (conf_folder() / group / "default.yaml").read_text(encoding="utf-8").splitlines()
    found = [match for line in lines if (match := _LINE.fullmatch(line))]
    return [SettingHelp(key=f"{group}.{row['name']}", default=row["default"], help=row["help"]) for row in found]
