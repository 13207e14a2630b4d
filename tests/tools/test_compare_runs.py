import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from scipy.stats import binomtest

from common.errors import InputError
from common.io import write_json
from tests.conftest import REPOSITORY
from tests.mindmerger.datas import write_lines
from tests.mindmerger.scripts import run
from tools.compare_runs import mcnemar, pair, parse_comparison, read_answers, read_runs, write_comparison

SCRIPT = "<script>alert('it got out')</script>"


def compare(words: list[str]) -> str:
    return write_comparison(parse_comparison(words))


@pytest.mark.parametrize("only_first", [0, 1, 5, 40, 400])
@pytest.mark.parametrize("only_second", [0, 1, 7, 41, 6000])
def test_mcnemar_equals_the_binomial_test(only_first: int, only_second: int) -> None:
    count = only_first + only_second
    expected = binomtest(only_first, count, 0.5).pvalue if count else 1.0
    assert mcnemar(only_first, only_second) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def answer(question: str, right: bool, language: str = "German", **changes: object) -> dict:
    return {
        "language": language,
        "question": question,
        "output": "The answer is: 3" if right else f"{SCRIPT} & so on",
        "parsed": 3.0 if right else None,
        "gold": "3",
        "right": right,
        "problem": 0,
        "cut": [],
        "stopped": right,
    } | changes


def write_results(folder: Path, german: list[dict], swahili: list[dict] | None = None) -> Path:
    for code, records in (("de", german), ("sw", swahili or [])):
        if records:
            lines = [json.dumps(record, ensure_ascii=False) for record in records]
            write_lines(folder / "mgsm" / "predictions" / f"{code}.jsonl", lines)
    write_json(folder / "mgsm" / "run.json", {"settings": {}, "result": {}})
    return folder


@pytest.fixture
def results(tmp_path: Path) -> list[Path]:
    """Three runs: B solves the problems that A does not, C has fewer problems."""
    questions = [f"Frage {SCRIPT} {n}\u2028?" for n in range(10)]
    a = [answer(question, n < 2) for n, question in enumerate(questions)]
    b = [answer(question, n != 1) for n, question in enumerate(questions)]
    swahili = [answer("Ngapi?", True, "Swahili"), answer("Ngapi?", False, "Swahili", cut=["source"])]
    return [
        write_results(tmp_path / "A", a, swahili),
        write_results(tmp_path / "B|B", b, swahili),
        write_results(tmp_path / "C<i>", b[:4]),
    ]


def test_runs_are_paired_by_question(results: list[Path]) -> None:
    first, second, third = (read_answers(folder / "mgsm") for folder in results)
    both = pair(first, second)
    assert (both["German"].count, both["German"].only_first, both["German"].only_second) == (10, 1, 8)
    assert both["German"].difference == pytest.approx(0.7)
    # The same question twice is two problems.
    assert (both["Swahili"].count, both["Swahili"].difference, both["Swahili"].p_value) == (2, 0, 1)
    assert pair(first, third)["German"].count == 4 and "Swahili" not in pair(first, third)


def test_the_files_of_several_ranks_are_one_language_in_the_order_of_its_problems(tmp_path: Path) -> None:
    rows = [answer("twice", n == 2, problem=n) for n in range(4)]
    one = write_results(tmp_path / "one", rows)
    two = write_results(tmp_path / "two", [rows[3], rows[1]])
    lines = [json.dumps(row) for row in (rows[2], rows[0])]
    write_lines(two / "mgsm/predictions/de.rank_1.jsonl", lines)
    assert list(read_answers(one / "mgsm").items()) == list(read_answers(two / "mgsm").items())


def test_an_unfinished_task_is_left_out(results: list[Path]) -> None:
    (results[0] / "msvamp/predictions").mkdir(parents=True)
    write_json(results[0] / "msvamp/run.json", {"settings": {}})
    assert read_runs(results[:1])[0].tasks.keys() == {"mgsm"}
    with pytest.raises(InputError, match=r"msvamp: no predictions/ of a finished evaluation"):
        read_runs([results[0] / "msvamp"])


def test_the_markdown_table(results: list[Path], tmp_path: Path) -> None:
    compare([*map(str, results), "--out", str(tmp_path / "page.html")])
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert lines[:4] == [
        "## mgsm",
        "",
        "| language | A, % | B/B, % | difference | p | C<i>, % | difference | p |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    assert "| German | 20.0 (5.7-51.0) | 90.0 (59.6-98.2) | +70.0 | 0.039 | 75.0 (30.1-95.4) | +25.0 | 1.000 |" in lines
    assert any("C<i> and A have 4 common problems of 4 and 12" in line for line in lines)


class Page(HTMLParser):
    """Parser of tags and texts that checks that tags are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_what_a_model_wrote_stays_text(results: list[Path], tmp_path: Path) -> None:
    compare([*map(str, results), "--out", str(tmp_path / "page.html")])
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count("script") == 1
    # Two runs differ in nine problems, of which all three have the first four.
    problems = [attributes for tag, attributes in page.tags if "data-solved" in attributes]
    assert [problem["data-solved"] for problem in problems] == ["A", "B|B and C<i>", "B|B and C<i>"]
    assert f"{SCRIPT} & so on" in page.words
    assert not any(name in ("src", "href") for tag, attributes in page.tags if tag != "use" for name in attributes)


def test_learning_curves(results: list[Path], tmp_path: Path) -> None:
    for name, lines in (
        ("one", ['{"step": 0, "dev_perplexity": 9.0}', '{"step": 1, "loss": 2.5, "lr": 0.1}']),
        ("two", ['{"step": 1, "loss": 2.5}', '{"step": 2, "skipped_steps": 1, "rows": ["x"]}']),
    ):
        write_lines(tmp_path / name / "metrics.jsonl", lines)
    words = [*map(str, results[:2]), "--out", str(tmp_path / "page.html"), "--training"]
    compare([*words, str(tmp_path / "one"), str(tmp_path / "two")])
    page = Page((tmp_path / "page.html").read_text())
    assert [tag for tag, _ in page.tags].count("svg") == 2
    with pytest.raises(InputError, match="three/metrics.jsonl: no metrics"):
        compare([*words, str(tmp_path / "three")])


def test_what_cannot_be_compared_is_said(results: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two or more folders"):
        compare([str(results[0])])
    with pytest.raises(InputError, match="nothing: no predictions/"):
        compare([str(results[0]), str(tmp_path / "nothing")])
    with pytest.raises(InputError, match=r"must end in \.html"):
        compare([*map(str, results), "--out", "page"])
    (tmp_path / "other").mkdir()
    (results[1] / "mgsm").rename(tmp_path / "other" / "msvamp")
    with pytest.raises(InputError, match="no task in common"):
        compare([str(results[0]), str(tmp_path / "other")])
    for line in ("{", "[]", '{"language": "German"}', json.dumps(answer("?", True, "<b>")), json.dumps(answer("?", 1))):
        write_lines(results[0] / "mgsm/predictions/de.jsonl", [line])
        with pytest.raises(InputError, match=r"de.jsonl, line 1"):
            read_runs(results[:1])


def test_the_command_names_runs_by_their_folders(results: list[Path], tmp_path: Path) -> None:
    tasks = [folder / "mgsm" for folder in results]
    words = [*map(str, tasks[:2]), "--out", str(tmp_path / "page.html")]
    output = run([sys.executable, "-m", "tools.compare_runs", *words], REPOSITORY)
    assert "| language | A, % | B/B, % |" in output
    assert (tmp_path / "page.html").stat().st_size > 1000
