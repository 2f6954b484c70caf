"""The embedded text with one more field in each record: ``kind``, whether it is source or reference text.

python recipes/drift/probes.py FILE.jsonl
"""

import json
import sys
from pathlib import Path

from nemo_qwen_hidden import demo


def main(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with demo.text_path().open(encoding="utf-8") as texts, path.open("w", encoding="utf-8") as written:
        for line in texts:
            record = json.loads(line)
            record["kind"] = "reference" if record["id"].startswith("topics/") else "source"
            written.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
