"""Help drawn from conf/: whole, short, and the same as the dataclasses."""

from omegaconf import OmegaConf

from nemo_qwen_hidden.cli import known
from nemo_qwen_hidden.cli.compose import compose_finetuning
from nemo_qwen_hidden.cli.conf_folder import conf_folder
from nemo_qwen_hidden.cli.settings_table import SettingHelp, presets_table, settings_table
from nemo_qwen_hidden.config import FinetuneSettings, Settings

ROOTS: dict[str, known.Kind] = {"config": Settings, "finetune": FinetuneSettings}


def test_every_setting_has_its_line_in_order() -> None:
    for kind in ROOTS.values():
        assert [row.key for row in settings_table(kind)] == list(known.kinds(kind))


def test_a_line_holds_the_default_and_the_meaning() -> None:
    rows = {row.key: row for row in settings_table()}
    assert rows["store.shard_rows"] == SettingHelp(
        key="store.shard_rows", default="65536", help="rows (tokens) in one shard file"
    )
    assert rows["capture.hook_points"].default == "[all]"


def test_every_line_of_a_default_is_a_setting() -> None:
    for kind in ROOTS.values():
        texts = [(conf_folder() / group / "default.yaml").read_text(encoding="utf-8") for group in known.groups(kind)]
        lines = [line for text in texts for line in text.splitlines()]
        assert len(lines) == len(settings_table(kind))
        assert max(map(len, lines)) <= 120


def test_the_folder_holds_the_known_groups_and_no_more() -> None:
    groups = {group for kind in ROOTS.values() for group in known.groups(kind)}
    assert {path.name for path in conf_folder().iterdir()} == groups | {f"{root}.yaml" for root in ROOTS}
    for root, kind in ROOTS.items():
        defaults = OmegaConf.to_container(OmegaConf.load(conf_folder() / f"{root}.yaml")["defaults"])
        assert defaults == [*({group: "default"} for group in known.groups(kind)), "_self_"]


def test_defaults_of_finetuning_are_those_of_the_dataclasses() -> None:
    assert compose_finetuning([]) == FinetuneSettings()


def test_groups_with_presets() -> None:
    assert list(presets_table()) == ["parallel", "capture", "precision", "tokens"]
