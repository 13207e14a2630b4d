import json
from pathlib import Path

import pytest
from scipy.stats import binomtest

from mindmerger.evaluation.metrics import score, table, wilson_interval
from mindmerger.evaluation.report import append_predictions, drop_cut_lines, read_predictions, write_report


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

    write_report(tmp_path, scores)
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert (tmp_path / "scores.tsv").read_text() == table(scores)
    assert "German\t50.0" in table(scores)
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_that_a_kill_has_cut_short_is_dropped_and_spoils_no_other(tmp_path: Path) -> None:
    def answers(*problems: int, language: str = "German") -> list[dict]:
        return [record(language, True) | {"problem": problem} for problem in problems]

    append_predictions(tmp_path, answers(4, 2), rank=0)
    append_predictions(tmp_path, answers(3), rank=1)
    append_predictions(tmp_path, answers(9, language="Thai"), rank=0)
    files = [tmp_path / "predictions" / name for name in ("de.jsonl", "de.rank_1.jsonl", "th.jsonl")]
    assert sorted((tmp_path / "predictions").iterdir()) == files
    assert [len(path.read_text().splitlines()) for path in files] == [2, 1, 1]
    whole = [path.read_bytes() for path in files]
    files[0].write_bytes(whole[0] + whole[0][:30])
    files[2].write_bytes(whole[2][:-1])
    drop_cut_lines(tmp_path)
    assert [path.read_bytes() for path in files] == [*whole[:2], b""]
    append_predictions(tmp_path, answers(1), rank=0)
    assert [answer["problem"] for answer in read_predictions(tmp_path)] == [1, 2, 3, 4]
