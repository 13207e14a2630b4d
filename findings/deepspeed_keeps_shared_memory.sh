#!/usr/bin/env bash
# On a CPU, DeepSpeed opens shared memory for its all-reduce, 69,206,024 bytes a rank, and leaves it in /dev/shm when the
# processes end without an error: a machine loses this memory with every run, until it restarts or someone deletes the files
# deepspeed_allreduce_buffer_{user}_{address}_{port}_{rank}. A run on a port of an earlier run uses the file again.
# The operator has a function that removes the name (csrc/cpu/comm/shm.cpp, shared_close), which is not called at the end.
# Once every rank has opened the memory, a name can be removed at any time: the memory lives as long as its processes.
#
# Seen with deepspeed 0.19.8 and torch 2.13.0 (CPU), two ranks that only call deepspeed.init_distributed():
#   2 files left, 138412048 bytes
set -euo pipefail
work=$(mktemp -d)
port=29871
left() { find /dev/shm -name "deepspeed_allreduce_buffer_*_${port}_*" "$@"; }
trap 'left -delete; rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check deepspeed==0.19.8 torch==2.13.0 ninja==1.13.0 numpy setuptools
cat > "$work/start.py" <<'PYTHON'
import deepspeed

deepspeed.init_distributed(dist_backend="gloo")
deepspeed.comm.barrier()
PYTHON
export PATH="$work/venv/bin:$PATH" TORCH_EXTENSIONS_DIR="$work/extensions" DS_ACCELERATOR=cpu
deepspeed --num_accelerators 2 --master_port $port "$work/start.py" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
seen="$(left | wc -l) files left, $(left -printf '%s\n' | awk '{ sum += $1 } END { print sum }') bytes"
echo "$seen"
[ "$seen" = "2 files left, 138412048 bytes" ] || { echo "the behaviour has changed"; exit 1; }
