#!/usr/bin/env bash
# PEFT's setting fan_in_fan_out (true for layers such as GPT-2's, which store their weight as (in, out)) is one value for all
# layers of an adapter, and peft changes it while it wraps them: after a layer of the other kind, adapter_config.json has
# the value of the last layer, although the layers before it are trained and merged with their own. A program that reads the
# file by itself and believes it adds the update of a square weight transposed, without an error: shapes fit either way.
# PEFT itself is right, since it sets the value of each layer again when it loads the adapter.
# The base's own headers tell the orientation: a bias is as long as its weight has outputs.
#
# Seen with peft 0.21.2, transformers 5.23.0, torch 2.13.0; GPT-2's attn.c_proj and lm_head as targets, fan_in_fan_out=True:
#   saved: False; layers: attn.c_proj True, lm_head False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$work/show.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import peft
from transformers import GPT2Config, GPT2LMHeadModel

config = GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
lora = peft.LoraConfig(r=2, target_modules=r".*attn\.c_proj|lm_head", fan_in_fan_out=True)
model = peft.get_peft_model(GPT2LMHeadModel(config), lora)
model.save_pretrained(sys.argv[1])
saved = json.loads((Path(sys.argv[1]) / "adapter_config.json").read_text())["fan_in_fan_out"]
layers = [name for name, layer in model.named_modules() if hasattr(layer, "fan_in_fan_out")]
own = ", ".join(f"{name.split('.h.0.')[-1].split('.model.')[-1]} {model.get_submodule(name).fan_in_fan_out}" for name in layers)
print(f"saved: {saved}; layers: {own}")
PYTHON
seen=$("$work/venv/bin/python" -W ignore "$work/show.py" "$work/adapter" 2> "$work/errors" | tail -1) || { cat "$work/errors"; exit 1; }
echo "$seen"
[ "$seen" = "saved: False; layers: attn.c_proj True, lm_head False" ] || { echo "the behaviour has changed"; exit 1; }
