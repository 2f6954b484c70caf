"""Settings of a run from ``conf/``, a settings file and the command line, through Hydra.

Later wins: defaults, presets and keys of the file, presets and keys of the command line. A preset on the command line
also sets aside what the file says of that group. No ``DictConfig`` leaves this file, and neither torch nor NeMo is
imported to refuse a setting.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_qwen_hidden.cli import config_file, known, overrides
from nemo_qwen_hidden.cli.conf_folder import conf_folder
from nemo_qwen_hidden.cli.known import Kind
from nemo_qwen_hidden.config import FinetuneSettings, Settings
from nemo_qwen_hidden.errors import ConfigError, UserError, raise_all

_RULES = {
    int: "must be a whole number",
    bool: "must be true or false",
    float: "must be a number",
    str: "must be text",
    tuple: "must be a list of texts, such as [embed,all]",
}


def compose(texts: Sequence[str], *, config: str | None = None) -> Settings:
    """The settings of an extraction that command-line overrides ``texts`` and the settings file ``config`` ask for.

    ``config_file`` says what such a file holds. The settings' values fit their types and are otherwise unchecked:
    ``config.check`` is the caller's.

    Raises:
        UserError: one problem, or ``ConfigErrors`` with all of them.
    """
    return cast(Settings, _composed(texts, config, Settings, "config"))


def compose_finetuning(texts: Sequence[str], *, config: str | None = None) -> FinetuneSettings:
    """As ``compose``, the settings of a fine-tuning run."""
    return cast(FinetuneSettings, _composed(texts, config, FinetuneSettings, "finetune"))


def _composed(texts: Sequence[str], config: str | None, kind: Kind, root: str) -> Any:
    asked = overrides.read(texts, kind)
    file = config_file.read(config, kind) if config is not None else config_file.ConfigFile(presets={}, values={})
    presets = [f"{group}={preset}" for group, preset in file.presets.items() if group not in asked.groups]
    tree = _hydra(root, [*presets, *asked.texts])
    for key, value in file.values.items():
        if key not in asked.keys and key.partition(".")[0] not in asked.groups:
            OmegaConf.update(tree, key, value, merge=False)
    return _typed(tree, kind)


def _hydra(root: str, texts: list[str]) -> DictConfig:
    with initialize_config_dir(config_dir=str(conf_folder()), job_name="nemo_qwen_hidden", version_base="1.3"):
        try:
            return hydra_compose(root, overrides=texts)
        except (HydraException, OmegaConfBaseException) as problem:
            raise ConfigError("settings", f"must compose ({_first_line(problem)})", texts) from problem


def _typed(tree: DictConfig, kind: Kind) -> Any:
    """``tree`` as settings: every value of its field's type, every problem reported at once."""
    schema = OmegaConf.structured(kind)
    for group in known.groups(kind):  # The dataclasses are frozen, which OmegaConf takes for read-only.
        OmegaConf.set_readonly(schema[group], False)
    kinds = known.kinds(kind)
    problems: list[UserError] = []
    for group, settings in _plain(tree).items():
        for name, given in settings.items():
            key = f"{group}.{name}"
            if key not in kinds:
                problems.append(known.unknown(key, given, kind))
                continue
            try:
                _assign(schema, key, _resolved(tree, key, given), kinds[key])
            except ConfigError as problem:
                problems.append(problem)
    raise_all(problems)
    made: Any = OmegaConf.to_object(schema)
    return replace(made, **{group: _with_tuples(getattr(made, group)) for group in known.groups(kind)})


def _with_tuples(settings: Any) -> Any:
    """OmegaConf has lists where the settings of a group have tuples."""
    values = {each.name: getattr(settings, each.name) for each in fields(settings)}
    return replace(settings, **{name: tuple(value) for name, value in values.items() if isinstance(value, list)})


def _resolved(tree: DictConfig, key: str, given: object) -> Any:
    """The value of ``key`` with its ``${...}`` filled in."""
    try:
        value = OmegaConf.select(tree, key, throw_on_missing=True)
        return _plain(value) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as problem:
        raise ConfigError(key, f"must have a value ({_first_line(problem)})", given) from None


def _assign(schema: DictConfig, key: str, value: Any, kind: type) -> None:
    if kind is tuple and isinstance(value, str):
        value = [value]
    if key == "capture.heads" and isinstance(value, int) and not isinstance(value, bool):
        value = [str(value)]
    if kind is str and value == "":
        raise ConfigError(key, "must not be empty", value)
    if kind is str and not isinstance(value, str | None):
        raise ConfigError(key, _RULES[kind], value)
    try:
        OmegaConf.update(schema, key, value, merge=False)
    except OmegaConfBaseException:
        raise ConfigError(key, _RULES[kind], value) from None


def _plain(config: Any) -> Any:
    return OmegaConf.to_container(config)


def _first_line(problem: Exception) -> str:
    return str(problem).partition("\n")[0]
