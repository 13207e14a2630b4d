"""The small world: one story in every language, right solutions, disjoint sets, valid for the readers."""

import operator
import random
import re
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mindmerger.data import read_evaluation, read_training
from mindmerger.tasks import EVALUATION_TASKS, TRAINING_TASKS
from quickstart.pretrain import FIRST_MIX, broken, english_lessons, unreadable
from quickstart.world import DOLLARS, NOUNS, TEMPLATES, WORLD_LANGUAGES, problems, write_world
from quickstart.world import _count as count

MODELS = Path("quickstart/models")
CODES = [language.code for language in WORLD_LANGUAGES]
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def numbers_of(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_each_template_is_told_in_every_language_with_the_same_numbers() -> None:
    seen = set()
    for problem in islice(problems("train", 0), 600):
        seen.add(TEMPLATES.index(problem.template))
        for code in CODES:
            story = problem.question(code)
            assert numbers_of(story) == list(problem.numbers.values()), story
            assert not re.search(r"[{}_]", story)
    assert len(seen) == len(TEMPLATES) >= 16


def test_solutions_are_right_and_stay_below_a_hundred() -> None:
    for problem in islice(problems("train", 1), 600):
        for equation in problem.equations:
            left, sign, right, _, result = equation.split()
            assert OPERATORS[sign](int(left), int(right)) == int(result)
            assert 0 < int(result) < 100
        assert problem.solution.endswith(f" The answer is: {problem.answer}")
        assert str(problem.answer) == problem.equations[-1].split()[-1]
        # Every number of the story is used.
        assert set(map(str, problem.numbers.values())) <= set(" ".join(problem.equations).split())


def test_no_story_and_numbers_are_in_two_sets() -> None:
    sets = [
        {
            (TEMPLATES.index(problem.template), *sorted(problem.numbers.values()))
            for problem in islice(problems(split, 0), 1500)
        }
        for split in ("train", "dev", "test")
    ]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]


@pytest.mark.parametrize(
    ("number", "form"),
    [(2, "билета"), (5, "билетов"), (11, "билетов"), (12, "билетов"), (21, "билет"), (34, "билета"), (90, "билетов")],
)
def test_russian_counts_agree(number: int, form: str) -> None:
    assert count(number, NOUNS[2], "ru") == f"{number} {form}"


def test_counts_follow_each_language() -> None:
    assert count(7, NOUNS[4], "zh") == "7朵花"
    assert count(7, NOUNS[4], "sw") == "maua 7"
    assert count(7, DOLLARS, "es") == "7 dólares"


def test_sentences_begin_with_a_capital() -> None:
    for problem in islice(problems("train", 2), 200):
        for code in ("en", "de", "es", "sw", "ru"):
            first_letters = re.findall(r"(?:^|[.?] |¿)(\w)", problem.question(code))
            assert all(letter.isupper() or letter.isdigit() for letter in first_letters), problem.question(code)


def test_the_ordinary_readers_read_it(tmp_path: Path) -> None:
    write_world(tmp_path / "datas", pairs=6, queries=4, tests=5, seed=0, split="dev")
    languages = tuple(language for language in WORLD_LANGUAGES if language.code != "en")
    pairs = list(read_training(tmp_path / "datas", TRAINING_TASKS["math"], "mapping", languages, 100))
    assert len(pairs) == 30
    queries = list(read_training(tmp_path / "datas", TRAINING_TASKS["math"], "augmentation", WORLD_LANGUAGES, 100))
    assert len(queries) == 24
    asked = read_evaluation(tmp_path / "datas", EVALUATION_TASKS["mgsm"], WORLD_LANGUAGES, None)
    assert [len(rows) for rows in asked.values()] == [5] * 6
    answers = [[row.target for row in rows] for rows in asked.values()]
    assert all(others == answers[0] for others in answers)


def test_the_same_seed_writes_the_same_world(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_world(tmp_path / name, pairs=3, queries=3, tests=3, seed=4, split="test")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert files
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in files)


def test_broken_and_unreadable_questions_keep_the_numbers_in_order() -> None:
    rng = random.Random(0)
    for problem in islice(problems("train", 3), 100):
        question = problem.question("en")
        assert numbers_of(broken(question, rng)) == numbers_of(question)
        hidden = unreadable(question, rng)
        assert numbers_of(hidden) == numbers_of(question)
        assert not {"has", "many", "how", "there"} & set(hidden.lower().split())


def test_the_llm_reads_english_only() -> None:
    for read, learned in islice(english_lessons(0, FIRST_MIX), 300):
        letters = re.sub(r"[\u25a1]", "", read + learned)
        assert letters.isascii()


def test_a_digit_is_a_token_in_both_models() -> None:
    tokenizers = {name: AutoTokenizer.from_pretrained(MODELS / name) for name in ("llm", "mt")}
    for tokenizer in tokenizers.values():
        pieces = tokenizer.tokenize("Anna has 48 apples. 安娜有7个苹果")
        assert {"4", "8", "7"} <= set(pieces)
        assert not [piece for piece in pieces if len(re.findall(r"\d", piece)) > 1]
    text = "12 + 7 = 19. The answer is: 19"
    assert tokenizers["llm"].decode(tokenizers["llm"](text).input_ids, skip_special_tokens=True) == text
