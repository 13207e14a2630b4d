#!/usr/bin/env bash
# RecurrentGemma keeps the state of its convolutions in its modules, not in the cache that is given to it: a cache of its own
# does not keep two texts apart, and one that is reordered for more rows is read behind a state of zeros. No error, no
# warning; a text continued at once is right.
#
# Seen with torch 2.13.0 and transformers 5.23.0 (transformers/models/recurrent_gemma/modeling_recurrent_gemma.py:
# self.conv1d_state), float64, largest difference of the logits from those of the whole text without a cache:
#   continued at once                    0
#   another text between, own cache      0.58
#   cache reordered for two rows         1.5
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
"$work/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import DynamicCache, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
config = RecurrentGemmaConfig(
    vocab_size=64, hidden_size=32, lru_width=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=1, attention_window_size=32, initializer_range=0.3, w_init_variance_scale=1.0,
)
model = RecurrentGemmaForCausalLM(config).double().eval()
ids = torch.tensor([[5, 9, 13, 17, 21, 25]])


def begin(text):
    cache = DynamicCache(config=config)
    model(text, past_key_values=cache, use_cache=True)
    return cache


def difference(cache, rows):
    positions = torch.full((rows, 1), 5)
    logits = model(ids[:, 5:].repeat(rows, 1), past_key_values=cache, use_cache=True, position_ids=positions).logits
    return (logits[:, -1] - whole).abs().max().item()


with torch.no_grad():
    whole = model(ids, use_cache=False).logits[0, -1]
    found = {"continued at once": difference(begin(ids[:, :5]), 1)}
    cache, _ = begin(ids[:, :5]), begin(ids.flip(1)[:, :5])
    found["another text between, own cache"] = difference(cache, 1)
    cache = begin(ids[:, :5])
    cache.reorder_cache(torch.tensor([0, 0]))
    found["cache reordered for two rows"] = difference(cache, 2)
for name, value in found.items():
    print(f"{name:<36} {value:.2g}")
small, *large = found.values()
assert small < 1e-9 and all(value > 0.1 for value in large), "the behaviour has changed"
PYTHON
