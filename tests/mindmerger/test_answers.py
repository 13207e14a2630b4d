"""Answer parsing. Each case: a text, the number in it, and the published parser's result."""

import csv
import json
from fractions import Fraction
from pathlib import Path

import pytest

from mindmerger.tasks import LANGUAGES, Example, Prompt, math_prompt
from mindmerger.tasks.answers import parse_answer, parse_answer_published
from mindmerger.tasks.math import grade_number
from tools.harness_tasks import judge_number

CASES: list[tuple[str, str | None, str]] = [
    # markers
    ("The answer is: 18", "18", "18"),
    ("She makes 9 * 2 = 18 dollars.\nThe answer is: 18", "18", "18"),
    ("The answer is 18.", "18", "18"),
    ("the final answer is 7", "7", "7"),
    ("THE ANSWER IS: 7, as shown in step 3", "7", "3"),
    ("The answer is: 18 (see step 2)", "18", "2"),
    ("The answer is: 18 (x=2)", "18", "2"),
    ("The answer is 18, since a = 3", "18", "3"),
    ("The answer is: 2 + 3 = 4 + 1 = 5", "5", "5"),
    ("\\boxed{1\\frac{1}{2}}", "3/2", "2"),
    ("18 (see step 2)", "2", "2"),
    ("#### 42", "42", "42"),
    ("#### 42\n\nQuestion 2: next", "42", "2"),
    ("\\boxed{12}", "12", "12"),
    ("\\boxed{12} because of step 3", "12", "3"),
    ("\\boxed{\\frac{3}{4}}", "3/4", "4"),
    ("\\boxed{-\\dfrac{1}{2}}", "-1/2", "2"),
    ("so \\boxed{x = 5}.", "5", "5"),
    ("The answer is: 3. Wait. The answer is: 4", "4", "4"),
    ("The answer is 18.\nThe answer is: unknown", "18", "18"),
    ("The answer is: unknown, though 5 is near", "5", "5"),
    ("The answer is:\n12", "12", "12"),
    ("The answer is: 3 * 4 = 12", "12", "12"),
    ("The answer is: x = -3", "-3", "3"),
    ("The answer is: $\\$1{,}500$", "1500", "500"),
    ("There are 3 ways, so 12.", "12", "12"),
    ("The answer is $45,000, as said in step 2", "45000", "2"),
    # equations: the last of the sides with the fewest numbers
    ("The answer is 9 x 2 = 18", "18", "18"),
    ("The answer is 9 eggs * $2 = $18", "18", "18"),
    ("The answer is 20% of 50 = 10", "10", "10"),
    ("So the answer is 9 * 2 = $<<9*2=18>>18.", "18", "18"),
    ("#### 18 = 9 * 2", "18", "2"),
    ("The answer is $5/hour * 3 hours = $15/day", "15", "15"),
    ("The answer is: 2 (3 + 4) = 14", "14", "14"),
    ("The answer is 12 apples -5 apples = 7", "7", "7"),
    ("The answer is 1600/1.5 \\approx 1067 photos", "1067", "1067"),
    ("The answer is 9 * 2 => **18** for 3 days", "18", "3"),
    ("\\boxed{3 \\times 6 = 2 \\cdot 9 = 18}", "18", "18"),
    ("The answer is 3 dozen = 36", "36", "36"),
    ("The answer is: 2 + 3 = 4 + 1", "4", "1"),
    ("The answer is 36 (6 * 2 = 12 in each)", "36", "12"),
    ("The answer is 12 eggs, since each of 3 boxes has 2 * 2 = 4", "12", "4"),
    ("The answer is 12 because each of the 3 boxes has 2 * 2 = 4", "12", "4"),
    ("The answer is 12 and the rest is 3 * 2 = 6", "12", "6"),
    ("The answer is 144 miles = miles the 3 ran", "144", "3"),
    ("The answer is 9*2＝18", "18", "18"),
    ("The answer is ９×２＝＄１８", "18", "18"),
    ("The answer is ９＋２＝１１ (x＝2)", "11", "2"),
    ("The answer is 36（6×2＝12）", "36", "12"),
    ("The answer is 9 * 2 = USD 18", "18", "18"),
    ("The answer is 9 * 2 = US$18", "18", "18"),
    ("The answer is 9 * 2 = Rs. 18", "18", "18"),
    ("The answer is 9 * 2 = Rs.18", "18", "18"),
    ("The answer is 9 + 2 equals 11", "11", "11"),
    ("The answer is 9 + 2 is equal to 11", "11", "11"),
    ("The answer is 18, which equals 9 * 2", "18", "2"),
    ("The answer is 9 + 2 → 11", "11", "11"),
    ("The answer is 9 + 2 -> 11", "11", "11"),
    ("The answer is 9 + 2 \\Rightarrow 11", "11", "11"),
    # the prompt of a generated next problem ends the answer
    ("The answer is: 18\n\n### Instruction:\nAnna has 2 + 3 eggs.\n\n### Response: The answer is: 5", "18", "5"),
    ("18 eggs\nBelow is an instruction that describes a task. Write 5.", "18", "5"),
    ("9 * 2 = 18.\n\n### Response: The answer is: 18", "18", "18"),
    ("\n### Instruction:\nThe answer is: 5", None, "5"),
    ("The answer is: 18\n\n### Response:\n2 + 3 = 5.\nThe answer is: 5", "18", "5"),
    ("Step 1.\n### Response: The answer is: 18", "18", "18"),
    ("Step 1.\n### Response: 18", "18", "18"),
    # signs
    ("-5", "-5", "5"),
    ("−5", "-5", "5"),
    ("+5", "5", "5"),
    ("x=-3", "-3", "3"),
    ("(-7)", "-7", "7"),
    ("10-5", "5", "5"),
    ("10 - 5", "5", "5"),
    ("10 -5", "5", "5"),
    ("The answer is -2.5 degrees", "-5/2", "2.5"),
    ("pages 3–7", "7", "7"),
    ("twenty-5", "5", "5"),
    # currency and units
    ("$.50", "1/2", "50"),
    ("$0.50", "1/2", "0.50"),
    ("Rs.50", "50", "50"),
    ("-$5", "-5", "5"),
    ("$-5", "-5", "5"),
    ("$1,234.50", "2469/2", "1234.50"),
    ("€ 12", "12", "12"),
    ("50%", "50", "50"),
    ("12 apples and 3.", "3", "3"),
    ("3.5kg", "7/2", "3.5"),
    # thousands and decimals
    ("1,234", "1234", "1234"),
    ("2,125", "2125", "2125"),
    ("1,234,567", "1234567", "1234567"),
    ("1,23,456", "123456", "123456"),
    ("1.234,56", "30864/25", "1.23456"),
    ("1.234.567", "1234567", "567"),
    ("1.234", "617/500", "1.234"),
    ("1'234'567", "1234567", "567"),
    ("1’234", "1234", "234"),
    ("1\u00a0234", "1234", "234"),
    ("1\u202f234,5", "2469/2", "2345"),
    ("1,5", "3/2", "15"),
    ("0,25", "1/4", "025"),
    ("1, 2, 3", "3", "3"),
    ("1,2,3", "3", "3"),
    ("3 4", "4", "4"),
    ("1 000", "1000", "000"),
    ("\\boxed{9\\;500}", "9500", "500"),
    ("\\boxed{9\\ 500\\;\\text{kg}}", "9500", "500"),
    ("\\boxed{9\\text{,}500}", "9500", "500"),
    ("12 345 678", "12345678", "678"),
    ("2020 100", "100", "100"),
    ("7\n1/2 of it", "1/2", "2"),
    ("007", "7", "007"),
    ("12.", "12", "12"),
    ("8.0", "8", "8.0"),
    ("1.5e3", "1500", "3"),
    ("2E-2", "1/50", "2"),
    ("1e999999999", None, "999999999"),
    # powers
    ("10^{3}", "1000", "3"),
    ("\\boxed{10^{3}}", "1000", "3"),
    ("2^5", "32", "5"),
    ("2 \\times 10^3", "2000", "3"),
    ("1.5 x 10^{-1}", "3/20", "1"),
    ("0^{-1}", None, "1"),
    ("10^{999}", None, "999"),
    # fractions
    ("3/4", "3/4", "4"),
    ("-3/4", "-3/4", "4"),
    ("1 1/2", "3/2", "2"),
    ("½", "1/2", "0"),
    ("2½", "5/2", "2"),
    ("3 / 4", "3/4", "4"),
    ("5/0", None, "0"),
    ("\\frac{1}{0}", None, "0"),
    # digits of other scripts
    ("উত্তর হল ১২", "12", "12"),
    ("১,২৩৪.৫", "2469/2", "1234.5"),
    ("คำตอบคือ ๑๘", "18", "18"),
    ("الجواب ٣٫٥", "7/2", "5"),
    ("١٬٢٣٤", "1234", "234"),
    ("۱۲", "12", "12"),
    ("१२३", "123", "123"),
    ("答えは１２です", "12", "12"),
    ("సమాధానం ౧౦", "10", "10"),
    ("7万", "70000", "7"),
    ("答えは1.5億円です", "150000000", "1.5"),
    ("7万5000", "75000", "5000"),
    # not read
    ("1.5 million", "3/2", "1.5"),
    ("3億5000万", "50000000", "5000"),
    ("5千", "5", "5"),
    # no number
    ("", None, "0"),
    ("I cannot tell.", None, "0"),
    ("The answer is: none", None, "0"),
    ("$", None, "0"),
    ("...", None, "0"),
]


def fraction(text: str | None) -> Fraction | None:
    return None if text is None else Fraction(text)


@pytest.mark.parametrize(("text", "expected", "published"), CASES)
def test_answers(text: str, expected: str | None, published: str) -> None:
    assert parse_answer(text) == fraction(expected)
    assert parse_answer_published(text) == fraction(published)


def test_a_next_problem_ends_an_answer_in_both_evaluations() -> None:
    question, gold = Prompt("", "2 + 3?", ""), Fraction(18)
    example = Example(question, math_prompt("9 * 2?"), "18", LANGUAGES["English"], number=gold)
    output = f" 9 * 2 = 18. The answer is: 18{math_prompt(question.text).text} The answer is: 5"
    assert grade_number(example, output, "default") == (18.0, True)
    assert grade_number(example, output, "published") == (5.0, False)
    assert judge_number({"answer": "18"}, [output]) == {"acc": 1.0}


def test_a_loop_of_digits_is_no_number_and_ends_soon() -> None:
    assert parse_answer("9" * 100_000) is None
    assert parse_answer("1234567890e300") is None
    assert parse_answer_published("9" * 400) == parse_answer_published("9" * 100_000) == 0
    assert parse_answer("1," * 50_000 + "1") == 1


def test_every_gold_answer_of_mgsm_and_msvamp(shared_datas: Path) -> None:
    counted = 0
    for path in sorted((shared_datas / "evaluation/mgsm").glob("*.tsv")):
        with path.open(encoding="utf-8", newline="") as file:
            for _, gold in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                assert parse_answer(gold) == Fraction(gold.strip().replace(",", "")), (path.name, gold)
                assert parse_answer_published(gold) == parse_answer(gold), (path.name, gold)
                counted += 1
    for path in sorted((shared_datas / "evaluation/msvamp").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            gold = json.loads(line)["response"]
            assert parse_answer(gold) == Fraction(gold), (path.name, gold)
            assert parse_answer_published(gold) == parse_answer(gold), (path.name, gold)
            counted += 1
    assert counted == 11 * 250 + 4 * 1000


def test_both_parsers_on_real_solutions(shared_datas: Path) -> None:
    """GSM8K's training solutions in English: the published parser is wrong on fractions and signs."""
    rows = json.loads((shared_datas / "query_translation/math.json").read_text(encoding="utf-8"))
    solutions = [row["response"] for row in rows if row["lang"] == "English"]
    apart = [text for text in solutions if parse_answer(text) != parse_answer_published(text)]
    assert (len(solutions), len(apart)) == (7461, 12)
