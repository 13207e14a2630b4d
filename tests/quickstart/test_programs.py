import random
import re
import time
from itertools import islice

import pytest

from quickstart.programs import INNER, LARGEST_VALUE, OUTER, PARAMETERS, TRANSLATIONS, Refused, evaluate, programs


def random_expression(rng: random.Random, depth: int) -> str:
    if depth == 0:
        return rng.choice(["x", "y", str(rng.randrange(20))])
    a, b, c, d = (random_expression(rng, depth - 1) for _ in range(4))
    forms = [
        f"({a} {rng.choice(['+', '-', '*', '//', '%'])} {b})",
        f"({a} {rng.choice(['+', '-', '*', '//', '%'])} {b})",
        f"({a} if {b} {rng.choice(['<', '<=', '>', '>=', '==', '!='])} {c} else {d})",
        f"(-{a})",
        f"({a} {rng.choice(['<', '=='])} {b})",
        f"({rng.choice('xy')} ** {rng.randrange(4)})",
    ]
    return rng.choice(forms)


def test_evaluator_agrees_with_python():
    rng = random.Random(0)
    compared = divided_by_zero = 0
    while compared < 500:
        expression = random_expression(rng, 3)
        x, y = rng.randrange(-20, 50), rng.randrange(-20, 50)
        source = f"def f(x, y):\n    return {expression}"
        try:
            expected = eval(expression, {"x": x, "y": y})
        except ZeroDivisionError:
            divided_by_zero += 1
            with pytest.raises(Refused):
                evaluate(source, "f", (x, y))
            continue
        try:
            assert evaluate(source, "f", (x, y)) == expected, source
            compared += 1
        except Refused:
            # It may differ from Python only by its limits of size.
            assert len(source) > 300 or "*" in expression, source
    assert divided_by_zero


@pytest.mark.parametrize(
    "source",
    [
        "",
        "return x",
        "def f(x):\n    return",
        "def f(x):\n    x = 2\n    return x",
        "def f(x):\n    return x\nf(1)",
        "import os\ndef f(x):\n    return x",
        "def f(x):\n    return __import__('os').system('true')",
        "def f(x):\n    return print(x)",
        "def f(x):\n    return f(x)",
        "def f(x):\n    return x.real",
        "def f(x):\n    return [x][0]",
        "def f(x):\n    return (y := x)",
        "def f(x):\n    return (lambda: x)()",
        "def f(x):\n    return '3'",
        "def f(x):\n    return x / 2",
        "def f(x):\n    return 1.0 * x",
        "def f(x):\n    return 1j * x",
        "def f(x):\n    return True",
        "def f(x):\n    return None",
        "def f(x):\n    return x and 3",
        "def f(x):\n    return not x",
        "def f(x):\n    return ~x",
        "def f(x):\n    return x << 60",
        "def f(x):\n    return 1 < x < 9",
        "def f(x):\n    return x in x",
        "def f(x):\n    return z",
        "def f(x):\n    yield x",
        "def f(x):\n    return (yield x)",
        "async def f(x):\n    return x",
        "async def f(x):\n    return await x",
        "@print\ndef f(x):\n    return x",
        "def f(x=print(1)):\n    return x",
        "def f(x: print(1)):\n    return x",
        "def f(x) -> print(1):\n    return x",
        "def f[T](x):\n    return x",
        "def f(x, /):\n    return x",
        "def f(*x):\n    return 3",
        "def f(**x):\n    return 3",
        "def f(*, x):\n    return x",
        "def f(x, x):\n    return x",
        "def f(x, y):\n    return x",
        "def f():\n    return 3",
        "def g(x):\n    return x",
        "class f:\n    x = 3",
        "while True: pass",
        "def f(x):\n    while True: pass",
        "def f(x):\n    return x // 0",
        "def f(x):\n    return x % (x - x)",
        "def f(x):\n    return 2 ** -1",
        "def f(x):\n    return 9 ** 9 ** 9",
        "def f(x):\n    return 2 ** 100000000000",
        "def f(x):\n    return 1000000 * 1000000 * 1000000 % 7",
        f"def f(x):\n    return {LARGEST_VALUE + 1} - {LARGEST_VALUE}",
        "def f(x):\n    return " + "9" * 5000,
        "def f(x):\n    return " + "(" * 150 + "x" + ")" * 150,
        "def f(x):\n    return " + "-" * 5000 + "x",
        "def f(x):\n    return " + "+".join("x" * 3000),
        "def f(x):\n return x\0",
        "def f(x)\n    return x",
        "def f(x):\nreturn x",
        "\ud800",
    ],
)  # fmt: skip
def test_refuses_all_else_and_at_once(source: str):
    started = time.monotonic()
    with pytest.raises(Refused):
        evaluate(source, "f", (5,))
    assert time.monotonic() - started < 1


def test_the_deepest_source_is_no_trouble():
    assert evaluate("def f(x):\n    return " + "-" * 270 + "x", "f", (5,)) == 5


def test_asserts_are_what_python_finds():
    for program in islice(programs("train", 0), 200):
        exec("\n".join([program.solution, *program.asserts]), {})
        assert program.is_right(program.solution)


def test_asserts_tell_near_misses():
    """A wrong constant and one parameter for both fail, except for rare equal remainders; a wrong name always fails."""
    accidents = tried = 0
    for program in islice(programs("train", 1), 300):
        constant = program.question.removesuffix(" and rounded down.").rstrip(".").split()[-1]
        head, expression = program.solution.split("return ")
        near = [f"{expression.removesuffix(constant)}{int(constant) + 1}"]
        near += [f"{name}{expression[expression.index(')') + 1 :]}" for name in expression if name in PARAMETERS][:2]
        accidents += sum(program.is_right(f"{head}return {other}") for other in near)
        tried += len(near)
        assert not program.is_right(program.solution.replace(program.name, "other"))
    assert tried >= 900
    assert accidents <= tried / 100


def test_sets_share_no_expression():
    expressions = {
        split: {program.solution.split("return ")[1] for program in islice(programs(split, 0), count)}
        for split, count in (("train", 6000), ("dev", 500), ("test", 500))
    }
    assert len(expressions["dev"]) > 400
    assert not expressions["train"] & (expressions["dev"] | expressions["test"])
    assert not expressions["dev"] & expressions["test"]


def test_a_seed_is_a_stream():
    def some(split: str, seed: int) -> list[str]:
        return [program.question for program in islice(programs(split, seed), 20)]

    assert some("train", 3) == some("train", 3)
    assert some("train", 3) != some("train", 4)


def test_a_question_means_the_same_in_every_language():
    """Sentences of one language differ exactly where the functions do, and name the same things."""
    asked = list(islice(programs("train", 3), 3000))
    for code in TRANSLATIONS:
        assert len({len(words) for words in (*TRANSLATIONS[code][1:3], INNER, OUTER)}) == 1
        meaning: dict[str, set[str]] = {}
        for program in asked:
            question = program.translations[code]
            assert program.name in question and re.findall(r"\d+", question) == re.findall(r"\d+", program.question)
            meaning.setdefault(question, set()).add(program.solution)
        assert all(len(solutions) == 1 for solutions in meaning.values())
        # As many questions as functions: no two operations share their words.
        assert len(meaning) == len({program.solution for program in asked})
