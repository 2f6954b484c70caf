"""The settings file of a run, given by ``--config FILE``. A recipe's whole configuration is one such file:

    defaults:                       # optional: presets, as in Hydra; group: name of a file in conf/group/
      - parallel: tp2_pp2
      - precision: bf16
    capture:                        # settings by key, which win over the presets
      hook_points: [resid_post@-1]
    store:
      path: out/run

It stands between the defaults in ``conf/`` and the command line: a key or a preset given there wins over the file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nemo_qwen_hidden.cli import known
from nemo_qwen_hidden.cli.known import Kind
from nemo_qwen_hidden.config import Settings
from nemo_qwen_hidden.errors import ConfigError, UserError, raise_all

SETTING = "--config"


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """presets: preset of each group that the file names. values: each key that it sets."""

    presets: dict[str, str]
    values: dict[str, Any]


def read(path: str, kind: Kind = Settings) -> ConfigFile:
    """Reads and checks the file; values' types are not looked at.

    Raises:
        UserError: one problem, or ``ConfigErrors`` with all of them.
    """
    content = _load(path)
    problems: list[UserError] = []
    presets = _presets(content.pop("defaults", []), problems, kind)
    values: dict[str, Any] = {}
    for group, settings in content.items():
        if group not in known.groups(kind):
            problems.append(known.unknown(str(group), f"{group} in {path}", kind))
        elif not isinstance(settings, dict):
            problems.append(ConfigError(group, "must hold settings by key; a preset stands under `defaults`", settings))
        else:
            values |= {f"{group}.{name}": value for name, value in settings.items()}
    problems += [known.unknown(key, f"{key} in {path}", kind) for key in values if key not in known.kinds(kind)]
    raise_all(problems)
    return ConfigFile(presets=presets, values=values)


def _load(path: str) -> dict[Any, Any]:
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(Path(path)))
    except FileNotFoundError:
        raise ConfigError(SETTING, "must be a file that exists", path) from None
    except UnicodeDecodeError:
        raise ConfigError(SETTING, "must be a YAML file in UTF-8", path) from None
    except YAMLError as problem:
        line = getattr(getattr(problem, "problem_mark", None), "line", None)
        where = "" if line is None else f" (line {line + 1}: {getattr(problem, 'problem', None)})"
        raise ConfigError(SETTING, f"must be valid YAML{where}", path) from None
    except (OSError, OmegaConfBaseException) as problem:
        raise ConfigError(SETTING, f"must be a readable YAML file ({_first_line(problem)})", path) from None
    if not isinstance(loaded, dict):
        raise ConfigError(SETTING, "must hold settings by key", path)
    return loaded


def _presets(defaults: object, problems: list[UserError], kind: Kind) -> dict[str, str]:
    presets: dict[str, str] = {}
    entries = defaults if isinstance(defaults, list) else [defaults]
    for entry in entries:
        if not isinstance(entry, dict):
            problems.append(ConfigError("defaults", "must be a list of `group: preset`", entry))
            continue
        for group, preset in entry.items():
            if group not in known.groups(kind):
                problems.append(known.unknown(str(group), f"{group}: {preset}", kind))
            elif preset not in known.presets(group):
                problems.append(known.unknown_preset(group, preset))
            else:
                presets[group] = preset
    return presets


def _first_line(problem: Exception) -> str:
    return getattr(problem, "strerror", None) or str(problem).partition("\n")[0]
