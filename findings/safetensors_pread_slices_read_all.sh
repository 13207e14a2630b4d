#!/usr/bin/env bash
# `safe_open(path, framework="np", backend="pread")` reads a whole tensor for each slice of it: rows that are read one block
# after the other take time that grows with the square of the tensor's size. The default backend, which maps the file into
# memory, reads the slice alone. The bytes are counted by the kernel (`rchar` in /proc/self/io).
#
# Seen with safetensors 0.8.0 (PyPI), numpy 2.3.5, a tensor of 40 MB, a slice of 4 kB:
#   pread  40,000,000 bytes or more are read
#   mmap   fewer than 100,000
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.3.5
cat > "$work/slices.py" <<'EOF'
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

path = Path(sys.argv[1]) / "tensor.safetensors"
save_file({"x": np.arange(10_000_000, dtype=np.float32)}, path)


def read_by(**options: str) -> int:
    def count() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])

    with safe_open(path, framework="np", **options) as file:
        piece = file.get_slice("x")
        before = count()
        assert piece[1000:2000].tolist() == list(range(1000, 2000))
        return count() - before


pread, mapped = read_by(backend="pread"), read_by()
print(f"pread {pread:,} bytes, mmap {mapped:,} bytes")
sys.exit(not (pread >= 40_000_000 and mapped < 100_000))
EOF
"$work/venv/bin/python" "$work/slices.py" "$work" || { echo "the behaviour has changed"; exit 1; }
