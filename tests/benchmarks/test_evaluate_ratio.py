"""Number of steps for 64 answers, published and here: counted, so that the load of the machine does not matter."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.evaluate import BATCH_SIZE, published_answers
from mindmerger.evaluation.decoding import greedy_steps
from mindmerger.modeling import InputEmbeds

MAX_NEW_TOKENS = 64
ROWS = 64


@torch.inference_mode()
def test_slots_take_half_the_steps_and_compute_nothing_that_has_ended() -> None:
    torch.manual_seed(0)
    llm = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=300)
    ).eval()
    for parameter in llm.parameters():
        # An untrained model repeats one token.
        parameter.mul_(3.0)
    vectors = torch.randn(ROWS, 6, 32)
    # Rows of every step: of every pass except prefills.
    sizes: list[int] = []

    def count(_: object, __: object, inputs: dict) -> None:
        if inputs.get("inputs_embeds") is None:
            sizes.append(len(inputs["input_ids"]))

    llm.register_forward_pre_hook(count, with_kwargs=True)

    def read(numbers: list[int]) -> InputEmbeds:
        return InputEmbeds(vectors[numbers], torch.ones(len(numbers), 6, dtype=torch.int64))

    eos = set(range(0, 300, 20))
    expected = published_answers(llm, read, ROWS, MAX_NEW_TOKENS, eos)
    steps, tokens = len(sizes), sum(map(len, expected))
    # Like real answers, they end early and late, and some not at all.
    assert 0.2 < tokens / (ROWS * MAX_NEW_TOKENS) < 0.5 and MAX_NEW_TOKENS in map(len, expected)

    for slots, ratio in ((BATCH_SIZE, 1.7), (2 * BATCH_SIZE, 3.0)):
        sizes.clear()
        answers = {}
        for active in greedy_steps(llm, range(ROWS), read, slots, MAX_NEW_TOKENS, eos):
            answers |= {answer.problem: answer.ids for answer in active}
        assert [answers[row] for row in range(ROWS)] == expected
        assert sum(sizes) == tokens - ROWS, "every row of a step gives a token; a problem's reading gives the first"
        assert steps / len(sizes) > ratio, (slots, steps, len(sizes))
