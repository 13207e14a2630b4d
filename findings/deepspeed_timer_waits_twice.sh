#!/usr/bin/env bash
# DeepSpeed's throughput timer is on by default and synchronizes the device twice in every micro batch, from the third step
# on: before the forward pass and in engine.step(), also in micro batches that only accumulate. On a GPU the host then
# waits for all queued work, and what it could prepare meanwhile comes on top.
# "wall_clock_breakdown": false does not change this; {"timers": {"throughput": {"enabled": false}}} does.
#
# Seen with deepspeed 0.19.8 and torch 2.13.0 (CPU), 8 steps of 4 micro batches each:
#   48 synchronizations, 0 with the timer off
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"; rm -f /dev/shm/deepspeed_allreduce_buffer_*_29873_*' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check deepspeed==0.19.8 torch==2.13.0 ninja==1.13.0 numpy setuptools
cat > "$work/steps.py" <<'PYTHON'
import sys

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

STEPS, ACCUMULATION = 8, 4
config = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": ACCUMULATION,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "wall_clock_breakdown": False,
}
if sys.argv[-1] == "off":
    config["timers"] = {"throughput": {"enabled": False}}
model = torch.nn.Linear(4, 1)
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
waits = []
type(get_accelerator()).synchronize = lambda *_: waits.append(1)
for _ in range(STEPS * ACCUMULATION):
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
print(f"synchronizations: {len(waits)}")
PYTHON
export PATH="$work/venv/bin:$PATH" TORCH_EXTENSIONS_DIR="$work/extensions" DS_ACCELERATOR=cpu
count() {
  deepspeed --num_accelerators 1 --master_port 29873 "$work/steps.py" "$1" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
  sed -n 's/^synchronizations: //p' "$work/log"
}
seen="$(count on) synchronizations, $(count off) with the timer off"
echo "$seen"
[ "$seen" = "48 synchronizations, 0 with the timer off" ] || { echo "the behaviour has changed"; exit 1; }
