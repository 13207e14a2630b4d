"""The quickstart's two small models, trained from a seed: `python -m quickstart.pretrain FOLDER`.

A LLaMA trained on English problems only, and an mT5 trained to translate six languages into English. Both are Hugging
Face checkpoints of these classes and are shipped in `quickstart/models/`, in place of downloads.
"""

import argparse
import random
import string
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from mindmerger.batching import IGNORED
from mindmerger.tasks import math_prompt
from quickstart.fit import Lessons, causal_batches, fit, padded, save, small_llama
from quickstart.world import WORLD_LANGUAGES, Problem, problems

# Texts that a tokenizer is trained on; they contain every word of the world many times.
TOKENIZER_PROBLEMS = 3000
# Relative frequency of each of `english_lessons`, at first and after the LLM has learned to solve, to keep this stable
# after a longer text.
FIRST_MIX = {"prompt": 25, "broken, prompt": 7, "broken, unreadable prompt": 25, "repeat": 15, "drills": 25, "plain": 3}
LAST_MIX = {"prompt": 15, "broken, prompt": 22, "broken, unreadable prompt": 20, "repeat": 10, "drills": 31, "plain": 2}
# (highest learning rate, steps, mix of lessons) of each round.
LLM_ROUNDS = ((2e-3, 3500, FIRST_MIX), (1e-3, 1500, FIRST_MIX), (1e-3, 1800, LAST_MIX))
MT_ROUND = (2e-3, 2000)
LLM_BATCH, MT_BATCH = 24, 32
_SORTED_TOGETHER = 8  # batches
_SPECIALS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def llm_tokenizer() -> PreTrainedTokenizerFast:
    """BPE over English alone: words of other languages become short pieces, other scripts `<unk>`.

    Each word around the question, the same in every prompt, is one token; else they would be a third of all tokens.
    """
    texts = (
        problem.question("en") + "\n" + problem.solution for problem in islice(problems("train", 0), TOKENIZER_PROBLEMS)
    )
    tokenizer = _tokenizer(texts, ["<s>"], [])
    template = math_prompt("")
    tokenizer.add_tokens([template.before, template.after])
    return tokenizer


def mt_tokenizer() -> PreTrainedTokenizerFast:
    """BPE over all six languages, a Chinese character a token."""
    texts = (
        problem.question(language.code)
        for problem in islice(problems("train", 0), TOKENIZER_PROBLEMS)
        for language in WORLD_LANGUAGES
    )
    return _tokenizer(texts, [], ["</s>"])


def _tokenizer(texts: Iterable[str], opening: list[str], closing: list[str]) -> PreTrainedTokenizerFast:
    """Train a BPE tokenizer in which each digit is a token, so that numbers are copied, not memorized."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    pieces = Regex(r"\d|\p{Han}|\n+|\u2581?[^\w\s\u2581]+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(pieces, "isolated")]
    )
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=list(_SPECIALS.values()),
        initial_alphabet=list(string.printable[:94]),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join([*opening, "$A", *closing]),
        special_tokens=[(token, backend.token_to_id(token)) for token in {*opening, *closing}],
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **_SPECIALS)


def train_llm(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A LLaMA of 0.9M parameters that solves English problems, repeats them, and reads broken English, too."""
    torch.manual_seed(seed)
    model = small_llama(tokenizer, hidden=128, intermediate=384, layers=4, positions=512)
    for number, (lr, steps, mix) in enumerate(LLM_ROUNDS):
        lessons = by_length(english_lessons(seed + number, mix), tokenizer, LLM_BATCH)
        fit(model, causal_batches(lessons, tokenizer, LLM_BATCH), lr, steps, f"LLaMA, round {number + 1}")
    return model


def train_mt(tokenizer: PreTrainedTokenizerFast, seed: int) -> MT5ForConditionalGeneration:
    """An mT5 of 1.1M parameters that translates any of the six languages into English.

    The decoder is shallow, so that a sentence's meaning is computed in the encoder, whose states MindMerger uses.
    """
    torch.manual_seed(seed)
    config = MT5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=4,
        num_decoder_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = MT5ForConditionalGeneration(config)
    # The embeddings are also the head: with the library's standard deviation of 1, initial logits would be huge.
    torch.nn.init.normal_(model.shared.weight, std=config.d_model**-0.5)
    return fit(model, _translation_batches(tokenizer, MT_BATCH, seed), *MT_ROUND, "mT5")


def english_lessons(seed: int, mix: dict[str, int]) -> Lessons:
    """Training texts of the LLM: (text that is only read, text that is learned), both English.

    Besides problems, drills and repetition there are questions followed by an unreadable prompt, and broken English:
    large models can handle both, and a mapping relies on it.
    """
    rng = random.Random(seed)
    for problem in problems("train", seed):
        question, solution = problem.question("en"), " " + problem.solution
        before = broken(question, rng) + "\n"
        (lesson,) = rng.choices(list(mix), list(mix.values()))
        if lesson == "prompt":
            yield math_prompt(question).text, solution
        elif lesson == "broken, prompt":
            yield before + math_prompt(question).text, solution
        elif lesson == "broken, unreadable prompt":
            yield before + math_prompt(unreadable(question, rng)).text, solution
        elif lesson == "repeat":
            yield before, question
        elif lesson == "drills":
            yield "", " ".join(drill(rng) + "." for _ in range(6))
        else:
            yield "", question


def broken(question: str, rng: random.Random) -> str:
    """Make broken English of a question: words missing, words out of place.

    All numbers are kept in their order, since the answer depends on it.
    """
    words = [word for word in question.split() if _has_digit(word) or rng.random() > 0.15]
    reach = rng.choice((0, 2, 4))
    places = sorted(range(len(words)), key=lambda place: place + rng.uniform(0, reach))
    moved = [words[place] for place in places]
    numbers = iter([word for word in words if _has_digit(word)])
    return " ".join(next(numbers) if _has_digit(word) else word for word in moved)


def unreadable(question: str, rng: random.Random) -> str:
    """Replace the words of a question by random letters; numbers are kept, as between languages."""
    latin, spaced = rng.random() < 0.6, rng.random() < 0.8
    words = []
    for word in question.split():
        letters = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 5))) if latin else "\u25a1"
        words.append(word if _has_digit(word) else letters)
    return (" " if spaced else "").join(words)


def drill(rng: random.Random) -> str:
    """One equation, as in "12 + 7 = 19"; all results from 1 to 99."""
    while True:
        a, b, operator = rng.randint(1, 98), rng.randint(1, 98), rng.choice("+-*/")
        if operator in "*/":
            a, b = rng.randint(1, 20), rng.randint(1, 49)
        if operator == "/":
            a, b = a * b, rng.choice((a, b))
        if b and 1 <= (result := {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operator]) <= 99 >= a:
            return f"{a} {operator} {b} = {result}"


def _has_digit(word: str) -> bool:
    return any(character.isdigit() for character in word)


def by_length(lessons: Lessons, tokenizer: PreTrainedTokenizerFast, size: int) -> Lessons:
    """Order lessons so that those of one batch have similar lengths and need little padding."""
    order = random.Random(0)
    while True:
        drawn = sorted(
            islice(lessons, size * _SORTED_TOGETHER), key=lambda lesson: len(tokenizer("".join(lesson)).input_ids)
        )
        for start in order.sample(range(0, len(drawn), size), _SORTED_TOGETHER):
            yield from drawn[start : start + size]


def _translation_batches(tokenizer: PreTrainedTokenizerFast, size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    rng, stream = random.Random(seed), problems("train", seed)
    while True:
        batch: list[Problem] = list(islice(stream, size))
        sources = [tokenizer(problem.question(rng.choice(WORLD_LANGUAGES).code)).input_ids for problem in batch]
        targets = [tokenizer(problem.question("en")).input_ids for problem in batch]
        yield {
            "input_ids": padded(sources, tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(ids) for ids in sources], 0),
            "labels": padded(targets, IGNORED),
        }


def make_llm(folder: Path, seed: int) -> None:
    """Train the LLM and save it: about 30 minutes of one core."""
    tokenizer = llm_tokenizer()
    save(train_llm(tokenizer, seed), tokenizer, folder)


def make_mt(folder: Path, seed: int) -> None:
    """Train the mT5 and save it: about 15 minutes of one core."""
    tokenizer = mt_tokenizer()
    save(train_mt(tokenizer, seed), tokenizer, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    make_llm(flags.folder / "llm", flags.seed)
    make_mt(flags.folder / "mt", flags.seed)


if __name__ == "__main__":
    main()
