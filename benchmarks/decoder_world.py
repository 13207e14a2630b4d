"""A decoder-only model of the small world's six languages, used as the encoder in place of the quickstart's mT5.

    python -m benchmarks.decoder_world FOLDER
    python -m benchmarks.aligned_fit --mt_path FOLDER --layers 1 2 3 4 5
    python -m benchmarks.aligned_start --name decoder --mt_path FOLDER

It has the mT5's tokenizer and width, as many layers as its encoder and decoder together, and is trained on the same
rows in as many steps: to write the English question after the same one in any language. The difference is that no
state depends on later tokens.
"""

import argparse
import random
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from quickstart.fit import Lessons, causal_batches, fit, save, small_llama
from quickstart.pretrain import MT_BATCH, MT_ROUND, by_length, mt_tokenizer
from quickstart.world import WORLD_LANGUAGES, problems


def translations(seed: int) -> Lessons:
    """(question in one of the six languages, the same in English)."""
    rng = random.Random(seed)
    for problem in problems("train", seed):
        yield problem.question(rng.choice(WORLD_LANGUAGES).code), problem.question("en")


def train_decoder(tokenizer: PreTrainedTokenizerFast, steps: int) -> LlamaForCausalLM:
    """A LLaMA of 1.2M parameters that translates any of the six languages into English."""
    torch.manual_seed(0)
    model = small_llama(tokenizer, hidden=128, intermediate=256, layers=5, positions=512)
    lessons = by_length(translations(0), tokenizer, MT_BATCH)
    batches = causal_batches(lessons, tokenizer, MT_BATCH)
    return fit(model, batches, MT_ROUND[0], steps, "decoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=MT_ROUND[1])
    flags = parser.parse_args()
    tokenizer = mt_tokenizer()
    save(train_decoder(tokenizer, flags.steps), tokenizer, flags.folder)


if __name__ == "__main__":
    main()
