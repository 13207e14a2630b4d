import json
from pathlib import Path

import pytest
from scipy.stats import binomtest

from mindmerger.evaluation.metrics import score, table, wilson_interval
from mindmerger.evaluation.report import write_report


@pytest.mark.parametrize(("right", "count"), [(0, 6), (3, 250), (125, 250), (250, 250), (1, 1)])
def test_wilson_interval_equals_scipys(right: int, count: int) -> None:
    reference = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right, count) == pytest.approx((reference.low, reference.high), abs=1e-4)


def record(language: str, right: bool, parsed: float | None = 1.0, cut: tuple = (), stopped: bool = True) -> dict:
    return {"language": language, "right": right, "parsed": parsed, "cut": list(cut), "stopped": stopped}


def test_scores_count_what_they_say(tmp_path: Path) -> None:
    records = [
        record("German", True),
        record("German", False, parsed=None, stopped=False),
        record("English", True, cut=("source",)),
        record("Thai", False),
    ]
    scores = score("mgsm", records)
    german = scores["languages"]["German"]
    assert (german["accuracy"], german["count"], german["unanswered"], german["unfinished"]) == (0.5, 2, 1, 1)
    assert scores["languages"]["English"]["cut"] == 1
    assert scores["average"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert scores["average_without_english"] == pytest.approx(0.25)
    assert score("mgsm", [record("English", True)])["average_without_english"] is None

    write_report(tmp_path, scores, records)
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert (tmp_path / "scores.tsv").read_text() == table(scores)
    assert "German\t50.0" in table(scores)
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "predictions" / "de.jsonl").read_text().splitlines()) == 2
