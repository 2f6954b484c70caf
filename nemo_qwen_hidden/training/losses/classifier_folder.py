"""A Hugging Face folder of a sequence classifier, out of that of a decoder and the classifier's head."""

import json
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_qwen_hidden.checkpoint.tensors import OUTPUT, SCORE, TensorFiles
from nemo_qwen_hidden.data.tokenizer import TOKENIZER_FILES
from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.training.losses.kinds import SINGLE_LABEL


def save_classifier(decoder: Path, score: Tensor, to: Path, *, pad_token_id: int, problem: str = SINGLE_LABEL) -> None:
    """Writes what ``Qwen2ForSequenceClassification.from_pretrained(to)`` reads.

    Args:
        decoder: a Hugging Face folder of a Qwen2, whose output layer is left out.
        score: [K, hidden], the weight of a ``SequenceClassifier``'s head (``state_heads.NAME.weight`` of the chunk that
            has it, whole on every tp rank).
        to: a folder that does not exist yet.
        pad_token_id: by which transformers finds the last token of each sequence.

    Raises:
        ConfigError: the folder exists, or the head has another width than the decoder.
    """
    if to.exists():
        raise ConfigError("folder of the classifier", "must not exist yet", str(to))
    settings = json.loads((decoder / "config.json").read_text(encoding="utf-8"))
    if score.ndim != 2 or score.shape[1] != settings["hidden_size"]:
        rule = f"must have shape [classes, {settings['hidden_size']}]"
        raise ConfigError("weight of the classifier's head", rule, list(score.shape))
    files, tensors = TensorFiles.of(decoder), dict[str, Tensor]()
    for file in sorted(set(files.files.values())):
        with safe_open(decoder / file, framework="pt") as handle:
            names = [name for name in handle.keys() if name != OUTPUT]  # noqa: SIM118 - not a dict
            tensors |= {"model." + name.removeprefix(files.prefix): handle.get_tensor(name) for name in names}
    dtype = next(iter(tensors.values())).dtype
    tensors[SCORE] = score.detach().cpu().to(dtype).contiguous()
    settings |= {
        "architectures": ["Qwen2ForSequenceClassification"],
        "id2label": {str(label): f"LABEL_{label}" for label in range(len(score))},
        "label2id": {f"LABEL_{label}": label for label in range(len(score))},
        "problem_type": problem,
        "pad_token_id": pad_token_id,
    }
    to.mkdir(parents=True)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    for name in TOKENIZER_FILES:
        if (decoder / name).is_file():
            shutil.copyfile(decoder / name, to / name)
    (to / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
