#!/usr/bin/env bash
# `take` of a few rows of a column in many chunks copies the whole column, at every call: the chunks are concatenated first.
# Memory and time grow with the table, not with the rows, also if the file is memory-mapped, which was to keep it out of the
# processes' memory. Indexing the column row by row (`column[i].values.to_numpy()`) allocates nothing.
#
# Seen with pyarrow 26.0.1, 900 chunks of 1000 lists of 50 int32, eight rows taken:
#   take 183,603,456 bytes, one by one 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1 numpy==2.4.6
cat > "$work/take.py" <<'PYTHON'
import numpy as np
import pyarrow as pa

CHUNKS, ROWS, LENGTH = 900, 1000, 50
ids = pa.array(np.arange(ROWS * LENGTH, dtype=np.int32))
lists = pa.ListArray.from_arrays(pa.array(np.arange(0, ROWS * LENGTH + 1, LENGTH, dtype=np.int32)), ids)
schema = pa.schema([("ids", pa.list_(pa.int32()))])
with pa.OSFile("rows.arrow", "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
    for _ in range(CHUNKS):
        writer.write_batch(pa.record_batch([lists], schema=schema))
with pa.memory_map("rows.arrow") as file, pa.ipc.open_stream(file) as stream:
    table = stream.read_all()

rows = np.linspace(0, CHUNKS * ROWS - 1, 8).astype(np.int64)
pool = pa.default_memory_pool()


def allocated(read) -> int:
    before, total = pool.bytes_allocated(), pool.total_bytes_allocated()
    kept = read()
    assert len(kept) == len(rows) and pool.bytes_allocated() >= before
    return pool.total_bytes_allocated() - total


column = table.column("ids")
by_take = allocated(lambda: column.take(rows))
one_by_one = allocated(lambda: [column[row].values.to_numpy() for row in rows.tolist()])
print(f"take {by_take:,} bytes, one by one {one_by_one:,}")
raise SystemExit(not (by_take > CHUNKS * ROWS * LENGTH * 4 and one_by_one == 0))
PYTHON
(cd "$work" && "$work/venv/bin/python" take.py) || { echo "the behaviour has changed"; exit 1; }
