from itertools import cycle, repeat

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quickstart.fit import causal_batches, fit
from quickstart.specialists import make_tokenizer


def test_only_what_is_learned_has_labels():
    tokenizer = make_tokenizer()
    batch = next(causal_batches(cycle([("Write it.\n", "12"), ("", "def f(x):")]), tokenizer, 2))
    ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    assert tokenizer.decode(ids[0][mask[0] == 1]) == "<s>Write it.\n12</s>"
    assert tokenizer.decode(ids[1][mask[1] == 1]) == "<s>def f(x):</s>"
    assert tokenizer.decode(labels[0][labels[0] != -100]) == "12</s>"
    assert tokenizer.decode(labels[1][labels[1] != -100]) == "def f(x):</s>"
    for row in range(2):
        assert (labels[row][mask[row] == 0] == -100).all()
        assert mask[row].tolist() == sorted(mask[row].tolist(), reverse=True)


def test_a_model_learns_what_it_is_shown():
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    batches = causal_batches(repeat(("Count.\n", "1 2 3")), tokenizer, 2)
    batch = next(batches)
    before = model(**batch).loss.item()
    assert fit(model, batches, lr=1e-2, steps=40, name="counting") is model
    assert not model.training
    assert model(**batch).loss.item() < before / 20
