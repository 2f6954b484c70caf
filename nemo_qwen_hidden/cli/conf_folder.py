"""Where the YAML settings lie: inside an installed package, or beside the package in a checkout."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def conf_folder(package: Path = _PACKAGE) -> Path:
    """The folder that holds ``config.yaml`` and its groups, for the package in folder ``package``.

    Raises:
        FileNotFoundError: the package was installed without its settings.
    """
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf/config.yaml in {package} or beside it: the package is not whole")
