"""From ``model.path`` to a folder on this machine."""

import re
from pathlib import Path

from nemo_qwen_hidden import demo
from nemo_qwen_hidden.errors import CheckpointError

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
ANSWER_SECS = 10.0
_WANTED = ("*.json", "*.safetensors", "merges.txt", "vocab.json")


def locate(path: str | None, setting: str = "model.path") -> Path:
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
        rule = "must be a folder with config.json, or a hub id such as `Qwen/Qwen2.5-0.5B`"
        raise CheckpointError(setting, rule, path)
    return _from_hub(path, setting)


def _from_hub(hub_id: str, setting: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    wanted = list(_WANTED)
    try:
        try:
            # snapshot_download asks the same, but waits for an answer for ever.
            HfApi().model_info(hub_id, timeout=ANSWER_SECS)
        except OSError as error:  # of requests and huggingface_hub; also where HF_HUB_OFFLINE is set
            try:
                return Path(snapshot_download(hub_id, allow_patterns=wanted, local_files_only=True))
            except LocalEntryNotFoundError:
                raise error from None
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except (OSError, HFValidationError) as error:
        rule = f"must be an existing folder or a hub id that can be fetched ({_reason(error)})"
        raise CheckpointError(setting, rule, hub_id) from error


def _reason(error: OSError | ValueError) -> str:
    """Why the hub gave nothing; what requests says of a dead line is long and of no use."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "no such folder, and not in the hub's cache, which is all there is with HF_HUB_OFFLINE"
    if isinstance(error, OSError) and not isinstance(error, HfHubHTTPError):
        return error.strerror or "no such folder, not in the hub's cache, and the hub cannot be reached"
    return " ".join(str(error).strip().partition("\n")[0].split()) or type(error).__name__
