"""The mapping stage, common to all tasks: sentences and their English translations."""

from collections.abc import Iterator
from pathlib import Path

from common.errors import InputError
from mindmerger.tasks.languages import ENGLISH, Language
from mindmerger.tasks.readers import text_lines
from mindmerger.tasks.task import NO_PROMPT, Example, Prompt


def translation_prompt(sentence: str, source: Language, target: Language) -> Prompt:
    """Prompt of the mapping stage, for `--augmentation True`."""
    return Prompt(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n### Instruction:\n"
        f"{_request(source, target)}\n### Input:\n",
        sentence,
        "\n### Response:",
    )


def _request(source: Language, target: Language) -> str:
    return f"Translate the following sentences from {source.name} to {target.name}."


def read_pairs(data_dir: Path, language: Language, with_prompts: bool) -> Iterator[Example]:
    """Read each sentence of `language` with its English translation as target; `NO_PROMPT` without prompts.

    Raises:
        InputError: a file is missing, a line is empty, or the two files have different lengths.
    """
    folder = data_dir / "bilingual_pairs" / f"en-{language.code}"
    source_path, target_path = folder / f"train_100k.{language.code}", folder / "train_100k.en"
    sources, targets = text_lines(source_path), text_lines(target_path)
    if len(sources) != len(targets):
        raise InputError(
            f"{source_path} has {len(sources)} lines but {target_path} has {len(targets)}: "
            "line n of one must translate line n of the other"
        )
    for number, (source, target) in enumerate(zip(sources, targets, strict=True), start=1):
        sentence = source.strip()
        yield Example(
            Prompt("", sentence, ""),
            translation_prompt(sentence, language, ENGLISH) if with_prompts else NO_PROMPT,
            target.strip(),
            language,
            location=f"{source_path}, line {number}",
            turn=Prompt(f"{_request(language, ENGLISH)}\n", sentence, ""),
        )
