"""The quickstart's runner and its page, on invented figures."""

import json
from pathlib import Path

import pytest

import quickstart.__main__ as runner
from common.errors import InputError
from common.io import read_json, write_json
from quickstart import results

LANGUAGES = ("German", "Spanish", "Swahili", "Russian", "Chinese", "English")
MERGES = {
    "specialists": {"problems": {"problems": 0.9, "programs": 0.1}, "programs": {"problems": 0.0, "programs": 0.8}},
    "average": {"problems": 0.4, "programs": 0.3},
    "regmean": {"0.5": {"problems": 0.6, "programs": 0.5}, "0.9": {"problems": 0.7, "programs": 0.7}},
    "regmean_asym_counts": {"0.9": {"problems": 0.9, "programs": 0.8}},
}


def write_results(folder: Path, accuracy: float, answer: str) -> None:
    languages = {language: {"accuracy": accuracy} for language in LANGUAGES}
    write_json(folder / "scores.json", {"languages": languages})
    (folder / "predictions").mkdir()
    for code, language in zip(("de", "es", "sw", "ru", "zh", "en"), LANGUAGES, strict=True):
        row = {
            "problem": 0,
            "language": language,
            "question": "2 < 3?",
            "output": answer,
            "gold": "5",
            "right": answer == "5",
        }
        (folder / "predictions" / f"{code}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with results, which the page is made from and written to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "HOME", tmp_path)
    write_results(results.BASELINE, 0.1, "<b>no</b>")
    write_results(results.MAPPED, 0.8, "5")
    write_json(results.MERGES, {**MERGES, "base": {}, "counts": {}})
    return tmp_path


def test_results_hold_every_figure(home: Path) -> None:
    text = results.report({"world": 3.0, "mapping stage": 60.0})
    saved = read_json(home / "results.json")
    assert saved["mindmerger"]["baseline"] == dict.fromkeys(LANGUAGES, 0.1)
    assert saved["mindmerger"]["mapped"] == dict.fromkeys(LANGUAGES, 0.8)
    assert saved["regmean"] == MERGES
    assert saved["seconds"] == {"world": 3.0, "mapping stage": 60.0}
    assert "80.0" in text and "RegMean, alpha 0.9" in text and "70.0" in text
    assert "asymmetric, counts, alpha 0.9" in text and "85.0" in text


def test_the_page_shows_answers_as_text_and_both_charts(home: Path) -> None:
    results.report({"world": 3.0})
    page = (home / "results.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;no&lt;/b&gt;" in page and "<b>no" not in page
    assert page.count("<svg") == 2
    assert page.count("2 &lt; 3?") == 5
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "https://matplotlib.org", ""
    ).replace("http://creativecommons.org", "")


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[runner.Step]:
    """Two steps that each add a line to a file of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "RECORD", tmp_path / "steps.json")
    monkeypatch.setattr(results, "report", lambda seconds: f"{sorted(seconds)}")
    program = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(exist_ok=True); "
    program += "f = (p / 'log').open('a'); f.write('ran ')"
    made = [runner.Step(name, f'python -c "{program}" {name}', Path(name)) for name in ("one", "two")]
    monkeypatch.setattr(runner, "STEPS", made)
    return made


def test_what_is_done_stays_done(steps: list[runner.Step], capsys: pytest.CaptureFixture[str]) -> None:
    runner.main()
    assert "['one', 'two']" in capsys.readouterr().out
    runner.main()
    assert [Path(step.output, "log").read_text() for step in steps] == ["ran ", "ran "]


def test_another_command_starts_that_step_and_all_after_it_anew(
    steps: list[runner.Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.main()
    changed = runner.Step("one", steps[0].command + " more", steps[0].output)
    monkeypatch.setattr(runner, "STEPS", [changed, steps[1]])
    for step in steps:
        (step.output / "log").write_text("old ")
    runner.main()
    assert [Path(step.output, "log").read_text() for step in steps] == ["ran ", "ran "]


def test_an_interrupted_step_keeps_what_it_has(steps: list[runner.Step], monkeypatch: pytest.MonkeyPatch) -> None:
    failing = runner.Step("two", 'python -c "import sys; sys.exit(3)"', steps[1].output, resumes=True)
    monkeypatch.setattr(runner, "STEPS", [steps[0], failing])
    with pytest.raises(InputError, match="'two' ended with exit code 3"):
        runner.main()
    failing.output.mkdir()
    (failing.output / "state").write_text("half")
    with pytest.raises(InputError, match="'two'"):
        runner.main()
    assert (failing.output / "state").read_text() == "half"
    assert Path("one/log").read_text() == "ran "


def test_a_step_that_cannot_go_on_begins_anew(steps: list[runner.Step]) -> None:
    """State after a kill between a step's last line and its record."""
    runner.main()
    record = json.loads(runner.RECORD.read_text())
    del record["two"]["seconds"]
    runner.RECORD.write_text(json.dumps(record))
    runner.main()
    assert [Path(step.output, "log").read_text() for step in steps] == ["ran ", "ran "]
