"""Languages, prompts and tasks: what is asked, in which words, of whom.

The prompts are those of the published checkpoints, to the letter.
"""

import difflib
import reprlib
from dataclasses import dataclass

from common.errors import InputError


@dataclass(frozen=True)
class Language:
    """A language under the three names that data files and multilingual models use.

    Attributes:
        name: English name, as in the data and the prompts.
        code: ISO 639-1, as in file names; M2M100's language token is `__code__`.
        nllb: FLORES-200 code, NLLB's language token.
    """

    name: str
    code: str
    nllb: str


LANGUAGES = {
    language.name: language
    for language in (
        Language("Arabic", "ar", "arb_Arab"),
        Language("Bengali", "bn", "ben_Beng"),
        Language("Bulgarian", "bg", "bul_Cyrl"),
        Language("Chinese", "zh", "zho_Hans"),
        Language("English", "en", "eng_Latn"),
        Language("Flemish", "nl", "nld_Latn"),
        Language("French", "fr", "fra_Latn"),
        Language("German", "de", "deu_Latn"),
        Language("Greek", "el", "ell_Grek"),
        Language("Hindi", "hi", "hin_Deva"),
        Language("Italian", "it", "ita_Latn"),
        Language("Japanese", "ja", "jpn_Jpan"),
        Language("Polish", "pl", "pol_Latn"),
        Language("Portuguese", "pt", "por_Latn"),
        Language("Russian", "ru", "rus_Cyrl"),
        Language("Spanish", "es", "spa_Latn"),
        Language("Swahili", "sw", "swh_Latn"),
        Language("Telugu", "te", "tel_Telu"),
        Language("Thai", "th", "tha_Thai"),
        Language("Turkish", "tr", "tur_Latn"),
        Language("Urdu", "ur", "urd_Arab"),
        Language("Vietnamese", "vi", "vie_Latn"),
    )
}
_BY_WORD = {word.lower(): language for language in LANGUAGES.values() for word in (language.name, language.code)}


def find_language(word: str) -> Language:
    """The language that `word` names, by English name or ISO code, whatever its case.

    Raises:
        InputError: no task has such a language; the nearest name is suggested.
    """
    language = _BY_WORD.get(word.strip().lower())
    if language is None:
        nearest = difflib.get_close_matches(word, LANGUAGES, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(LANGUAGES)}"
        raise InputError(f"unknown language {reprlib.repr(word)}; {hint}")
    return language


@dataclass(frozen=True)
class Prompt:
    """A text of which only the middle may be cut: template, query, template."""

    before: str
    query: str
    after: str

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.before + self.query + self.after


def translation_prompt(sentence: str, source: Language, target: Language) -> Prompt:
    """The mapping stage's prompt, used where `--augmentation True` is asked of it."""
    return Prompt(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n### Instruction:\n"
        f"Translate the following sentences from {source.name} to {target.name}.\n### Input:\n",
        sentence,
        "\n### Response:",
    )


def math_prompt(question: str) -> Prompt:
    """MetaMath's own prompt, for MGSM and MSVAMP."""
    return Prompt(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n",
        question,
        "\n\n### Response: Let's think step by step.",
    )


def x_csqa_prompt(stem: str, choices: list[str]) -> Prompt:
    """X-CSQA: the options are part of the template, so that none is ever cut off."""
    options = "\t".join(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices))
    return Prompt("", stem, f"\nOptions:{options}\nAnswer:")


def xnli_prompt(premise: str, hypothesis: str) -> Prompt:
    """XNLI: the premise, the longer of the two, is what may be cut."""
    return Prompt("Premise: ", premise, f"\nHypothesis: {hypothesis}\nLabel:")


def prompt_template(task: str, stage: str) -> str:
    """The prompt of a training stage with placeholders where an example's own words go, for the record."""
    if stage == "mapping":
        source = Language("{source language}", "", "")
        return translation_prompt("{sentence}", source, LANGUAGES["English"]).text
    return TRAINING_TASKS[task].template


@dataclass(frozen=True)
class Task:
    """What one value of `--task` stands for.

    Attributes:
        name: as on the command line.
        languages: those the task comes in, in the published order.
        labels: the words between which a classification decides; empty where an answer is generated.
        template: of a training task, its prompt with placeholders where an example's own words go.
    """

    name: str
    languages: tuple[Language, ...]
    labels: tuple[str, ...] = ()
    template: str = ""


def _named(names: str) -> tuple[Language, ...]:
    return tuple(LANGUAGES[name] for name in names.split())


_MATH = "Bengali Thai Swahili Japanese Chinese German French Russian Spanish"
_X_CSQA = (
    "Urdu Hindi Swahili Japanese Vietnamese Polish Chinese Flemish Russian Italian German Portuguese French Spanish"
    " Arabic"
)
_XNLI = "Swahili Urdu Hindi Thai Arabic Turkish Greek Vietnamese Chinese Russian Bulgarian German French Spanish"

# A training task's languages are those that its mapping stage translates from.
TRAINING_TASKS = {
    task.name: task
    for task in (
        Task("math", _named(_MATH), template=math_prompt("{question}").text),
        Task("x-csqa", _named(_X_CSQA), template=x_csqa_prompt("{stem}", ["{choice}"]).text),
        Task("xnli", _named(_XNLI), template=xnli_prompt("{premise}", "{hypothesis}").text),
    )
}
_LETTERS = tuple("ABCDE")
_NLI = ("entailment", "neutral", "contradiction")
EVALUATION_TASKS = {
    task.name: task
    for task in (
        Task("mgsm", _named(f"Telugu {_MATH} English")),
        Task("msvamp", _named(f"{_MATH} English")),
        Task("x-csqa", _named(f"{_X_CSQA} English"), _LETTERS),
        Task("xnli", _named(f"{_XNLI} English"), _NLI),
    )
}


def find_task(name: str, tasks: dict[str, Task]) -> Task:
    """The task of that name among `tasks`.

    Raises:
        InputError: there is none.
    """
    if name not in tasks:
        raise InputError(f"--task {name!r} is not one of: {', '.join(tasks)}")
    return tasks[name]


def select_languages(words: str | None) -> tuple[Language, ...] | None:
    """The languages named in the comma-separated `--languages`; None where the flag is not given.

    Raises:
        InputError: an unknown language, or one named twice.
    """
    if words is None:
        return None
    chosen = tuple(find_language(word) for word in words.split(","))
    if len(set(chosen)) < len(chosen):
        raise InputError(f"--languages {words}: a language is named twice")
    return chosen
