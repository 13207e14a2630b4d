#!/usr/bin/env bash
# transformers reads a value of the device in every forward pass of a causal model that is given no mask, or a 2-D one:
# on a GPU the host waits for all that it has queued. A 4-D mask is taken as it is; with an empty cache and no mask nothing
# is read either. Shown on the meta device, whose tensors have no values: what reads one raises.
#
# Seen with torch 2.13.0 and transformers 5.23.0 (transformers/masking_utils.py: without a mask and a cache the positions are
# searched for packed sequences, even of rows that all count from 0; of a 2-D mask it is asked whether it hides anything):
#   no mask                  reads a value
#   2-D mask                 reads a value
#   no mask, empty cache     reads none
#   4-D mask                 reads none
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
"$work/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaModel

print("torch", torch.__version__, "transformers", transformers.__version__)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
with torch.device("meta"):
    model = LlamaModel(config).eval()
    ids, mask = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64)
    causal = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
cases = {
    "no mask": {"use_cache": False},
    "2-D mask": {"attention_mask": mask, "use_cache": False},
    "no mask, empty cache": {"past_key_values": DynamicCache(config=config), "use_cache": True},
    "4-D mask": {"attention_mask": causal, "use_cache": False},
}
found = {}
for name, arguments in cases.items():
    try:
        with torch.no_grad():
            model(input_ids=ids, **arguments)
        found[name] = "reads none"
    except RuntimeError as error:
        assert "meta tensors" in str(error), error
        found[name] = "reads a value"
    print(f"{name:<24} {found[name]}")
assert found == dict(zip(cases, ["reads a value", "reads a value", "reads none", "reads none"])), "the behaviour has changed"
PYTHON
