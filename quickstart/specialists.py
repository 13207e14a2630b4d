"""RegMean's three small models, trained from a seed: `python -m quickstart.specialists FOLDER`.

One LLaMA trained briefly on word problems and Python functions, and two specialists fine-tuned from it, one on each.
They are shipped in `quickstart/models/regmean/`, in place of downloads.
"""

import argparse
import copy
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from common.logging import quiet_libraries
from quickstart.exercises import LARGEST_NUMBER, TASKS, texts
from quickstart.fit import Lessons, causal_batches, fit, save, small_llama
from quickstart.programs import programs
from quickstart.world import problems

TOKENIZER_TEXTS = 2000  # of each task; they contain every word of both worlds many times

BATCH_SIZE = 16
# Two phases of the base: seed, steps, learning rate, fractions of word problems and of functions in its lessons.
PHASES = ((0, 2500, 3e-3, 0.2, 0.1), (5, 300, 2e-3, 0.4, 0.2))
STEPS, LR = 500, 1e-3


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over both tasks, a digit a token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((text for task in TASKS for text in texts(task, TOKENIZER_TEXTS, seed=0)), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def task_lessons(task: str, seed: int) -> Lessons:
    """Questions to read and solutions to learn."""
    for exercise in TASKS[task]("train", seed):
        yield exercise.prompt, exercise.solution


def plain_texts(seed: int) -> Lessons:
    """Equations, questions and functions by themselves."""
    rng = random.Random(seed)
    stories, functions = problems("train", seed, LARGEST_NUMBER), programs("train", seed)
    while True:
        kind = rng.choices(("equations", "story", "function"), (0.6, 0.2, 0.2))[0]
        if kind == "equations":
            equations: list[str] = []
            while len(equations) < 5:
                equations += next(stories).equations
            yield "", ". ".join(equations) + "."
        elif kind == "story":
            yield "", next(stories).question("en")
        else:
            function = next(functions)
            yield "", function.question if rng.random() < 0.5 else function.solution


def base_lessons(problem_share: float, program_share: float, seed: int) -> Lessons:
    """Lessons of both tasks in these fractions, among plain texts."""
    rng = random.Random(seed)
    # Other exercises than those of the plain texts.
    streams = [*(task_lessons(task, seed + 7) for task in TASKS), plain_texts(seed)]
    shares = (problem_share, program_share, 1 - problem_share - program_share)
    while True:
        yield next(rng.choices(streams, shares)[0])


def train_base(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Train the base of both specialists, 0.45M parameters; it is the same for every seed of the specialists."""
    torch.manual_seed(0)
    model = small_llama(tokenizer, hidden=96, intermediate=256, layers=3, positions=256)
    for seed, steps, lr, *shares in PHASES:
        fit(model, causal_batches(base_lessons(*shares, seed), tokenizer, BATCH_SIZE), lr, steps, "base")
    return model


def train_specialist(
    base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: str, seed: int
) -> LlamaForCausalLM:
    """A copy of the base, all of its weights fine-tuned on one task."""
    batches = causal_batches(task_lessons(task, 100 + seed), tokenizer, BATCH_SIZE)
    return fit(copy.deepcopy(base), batches, LR, STEPS, task)


def train_all(folder: Path, seed: int) -> None:
    """Write base and specialists in half precision, each as a whole Hugging Face folder.

    Args:
        folder: gets `base`, `problems` and `programs`. A base that it holds already is kept.
        seed: of the specialists' lessons.
    """
    tokenizer = make_tokenizer()
    home = folder / "base"
    if not home.exists():
        save(train_base(tokenizer), tokenizer, home)
    # Rounded as on disk: the shipped base is the one that is fine-tuned.
    base = LlamaForCausalLM.from_pretrained(home, dtype=torch.float32)
    for task in TASKS:
        save(train_specialist(base, tokenizer, task, seed), tokenizer, folder / task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the specialists' lessons")
    flags = parser.parse_args()
    quiet_libraries()
    train_all(flags.folder, flags.seed)


if __name__ == "__main__":
    main()
