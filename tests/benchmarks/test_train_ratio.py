"""Operations of a training step against the published way's: counted, so that the machine's load does not matter."""

import random
from array import array

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MT5Config, MT5EncoderModel

from benchmarks.padded import collate
from benchmarks.train import published_loss
from mindmerger.batching import Tokens, lay_out, plan_epoch
from mindmerger.modeling import MindMergerConfig, MindMergerForCausalLM

ROWS, MICRO = 32, 8


def test_a_step_takes_less_work_than_the_published_one_and_gives_the_same_loss() -> None:
    torch.manual_seed(0)
    llm = LlamaForCausalLM(
        LlamaConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, vocab_size=2048)
    )
    encoder = MT5EncoderModel(MT5Config(d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, vocab_size=2048))
    config = MindMergerConfig(llm_hidden_size=128, mt_hidden_size=64, llm_bos_token_id=1)
    model = MindMergerForCausalLM(config, encoder, llm)
    draw = random.Random(0)
    lengths = [round(draw.lognormvariate(4.0, 0.4)) for _ in range(ROWS)]
    rows = [
        Tokens(*(array("i", [draw.randrange(3, 2048) for _ in range(n)]) for n in (length, 0, length)), "", ())
        for length in lengths
    ]
    drawn = [rows[start : start + MICRO] for start in range(0, ROWS, MICRO)]
    (step,) = plan_epoch(list(map(len, rows)), ROWS, ROWS // MICRO, 1, seed=0, epoch=0)
    planned = [[rows[row] for row in micro[0]] for micro in step]

    def cost(micro_batches: list[list[Tokens]], published: bool) -> tuple[int, float]:
        """(floating-point operations of products, summed loss)."""
        total = 0.0
        with FlopCounterMode(display=False) as counter:
            for micro_batch in micro_batches:
                if published:
                    loss = published_loss(model, collate(micro_batch, 0), 1.0)
                else:
                    loss = model(batch=lay_out(micro_batch, 1, packed=True), num_items_in_batch=1.0).loss
                loss.backward()
                total += loss.item()
        return counter.get_total_flops(), total

    published = cost(drawn, published=True)
    assert model.pack_rows()
    packed = cost(planned, published=False)
    assert packed[1] == pytest.approx(published[1], rel=1e-5)
    # Counted: 1.72.
    assert published[0] > 1.5 * packed[0], f"{published[0] / packed[0]:.2f} times"
