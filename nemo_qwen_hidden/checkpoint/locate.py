"""From ``model.path`` to a folder on this machine."""

import re
from pathlib import Path

from nemo_qwen_hidden import demo
from nemo_qwen_hidden.errors import CheckpointError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ("*.json", "*.safetensors", "merges.txt", "vocab.json")


def locate(path: str | None) -> Path:
    """The folder of the model: the embedded one for None, a folder as it is, a hub id from the hub or its cache.

    Raises:
        CheckpointError: no such folder, and no such model on the hub (or no hub to be reached).
    """
    if path is None:
        return demo.model_folder()
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(path):
        raise CheckpointError(
            "model.path", "must be a folder with config.json, or a hub id such as `Qwen/Qwen2.5-0.5B`", path
        )
    return _from_hub(path)


def _from_hub(hub_id: str) -> Path:
    import httpx
    import requests
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_WANTED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, requests.RequestException, httpx.HTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            "model.path", f"must be an existing folder or a hub id that can be fetched ({reason})", hub_id
        ) from error
