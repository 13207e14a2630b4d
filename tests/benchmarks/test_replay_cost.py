"""Operations of a step with replayed rows against one without: counted, so that the machine's load does not matter."""

import random

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MT5Config, MT5EncoderModel

from benchmarks.train import ONE_REPLAYED_IN, _step
from mindmerger.batching import Tokens
from mindmerger.modeling import MindMergerConfig, MindMergerForCausalLM


def test_replayed_rows_cost_little() -> None:
    torch.manual_seed(0)
    llm = LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, vocab_size=2048)
    )
    encoder = MT5EncoderModel(MT5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=2048))
    model = MindMergerForCausalLM(
        MindMergerConfig(llm_hidden_size=64, mt_hidden_size=32, llm_bos_token_id=1), encoder, llm
    )
    assert model.pack_rows()
    draw = random.Random(0)
    rows = [
        Tokens(*([draw.randrange(3, 2048) for _ in range(40)] for _ in range(3))) for _ in range(2 * ONE_REPLAYED_IN)
    ]
    micro_batches = [rows[start : start + 2] for start in range(0, len(rows), 2)]

    def operations(own: set[int]) -> int:
        with FlopCounterMode(display=False) as counter:
            _step(model, micro_batches, 0, "ours", own, {})
        return counter.get_total_flops()

    # Counted: 1.03, of which the rows themselves are no part: a step has as many rows with replay as without.
    ratio = operations({id(row) for row in rows[::ONE_REPLAYED_IN]}) / operations(set())
    assert 1 < ratio < 1.1, f"{ratio:.2f} times"
