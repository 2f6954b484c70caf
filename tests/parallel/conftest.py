"""A fork server for each file of this folder."""

from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest

from nemo_qwen_hidden.parallel import launch


@pytest.fixture(autouse=True, scope="module")
def light_server(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fork server of the file's own, which imports its ``PRELOAD``, if it has one: the one of the other tests has
    NeMo, and stays as it is."""
    server = forkserver.ForkServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "PRELOAD", getattr(request.module, "PRELOAD", ()))
        patch.setattr(launch, "GRACE_SECS", 0.6)
        patch.setattr(forkserver, "_forkserver", server)
        for name in ("ensure_running", "connect_to_new_process", "set_forkserver_preload"):
            patch.setattr(forkserver, name, getattr(server, name))
        yield
        server._stop()  # type: ignore[attr-defined]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "ranks.log"
