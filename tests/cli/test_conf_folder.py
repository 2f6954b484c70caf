"""conf/ is found inside an installed package and beside a checkout's, and every package folder is one to setuptools."""

from pathlib import Path

import pytest

import nemo_qwen_hidden.cli.conf_folder as module
from nemo_qwen_hidden.cli.conf_folder import conf_folder

ROOT = Path(__file__).parents[2]


def laid_out(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    return folder


def test_a_wheel_holds_it_inside_the_package(tmp_path: Path) -> None:
    inside = laid_out(tmp_path / "site-packages/nemo_qwen_hidden/conf")
    laid_out(tmp_path / "site-packages/conf")
    assert conf_folder(inside.parent) == inside


def test_a_checkout_holds_it_beside_the_package(tmp_path: Path) -> None:
    beside = laid_out(tmp_path / "conf")
    assert conf_folder(tmp_path / "nemo_qwen_hidden") == beside


def test_without_it_the_package_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    with pytest.raises(FileNotFoundError, match="the package is not whole"):
        conf_folder(tmp_path / "nemo_qwen_hidden")


def test_this_one_is_found() -> None:
    assert (conf_folder() / "parallel" / "default.yaml").is_file()
    assert Path(module.__file__).is_relative_to(conf_folder().parent)


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "nemo_qwen_hidden").rglob("*.py")}
    assert [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []
