#!/usr/bin/env bash
# datasets 5.2.0 (pyarrow 26.0.1): JSON rows in which one field is a string here and a list there, as `content` is in chat data.
#
# Behaviour: the field becomes a column of type arrow.json, into which strings that look like JSON are written bare, not quoted. Read
# back, the string "007" is the number 7 and "null" is None; and the Parquet file that is written from it holds 007, which is no JSON,
# in a column whose type says that it is. Nothing is raised or warned of.
#
# Seen:
#   [7, None, ['a', 'b'], 'plain']
#   ['007', 'null', '["a","b"]', '"plain"']
#   007 is no JSON
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" env/bin/python - <<'PYTHON'
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

datasets.disable_progress_bars()
written = ["007", "null", ["a", "b"], "plain"]
Path("rows.jsonl").write_text("".join(json.dumps({"content": value}) + "\n" for value in written))
rows = datasets.load_dataset("json", data_files="rows.jsonl", split="train")
read = list(rows["content"])
print(read)
rows.to_parquet("rows.parquet")
column = pq.read_table("rows.parquet").column("content")
stored = column.cast(pa.string()).to_pylist()
print(stored)
try:
    json.loads(stored[0])
    valid = True
except json.JSONDecodeError:
    valid = False
    print(stored[0], "is no JSON")
assert str(column.type) == "extension<arrow.json>", column.type
assert read == [7, None, ["a", "b"], "plain"], read
assert stored == ["007", "null", '["a","b"]', '"plain"'] and not valid, stored
PYTHON
