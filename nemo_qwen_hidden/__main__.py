"""``python -m nemo_qwen_hidden`` and ``torchrun -m nemo_qwen_hidden``."""

import sys

from nemo_qwen_hidden.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
