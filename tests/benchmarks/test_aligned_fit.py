"""Choices of an aligned start's regression: each is a different mapping with its own figures."""

import json
import sys
from pathlib import Path

import pytest

import benchmarks.aligned_fit as aligned_fit
import tests.mindmerger.datas as datas
from tests.conftest import REPOSITORY


def test_choices_differ_where_they_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datas, "ROWS", 60)
    monkeypatch.setattr(aligned_fit, "HELD_OUT", 10)
    datas.write_datas(Path("datas"))
    models = REPOSITORY / "quickstart/models"
    words = f"--llm_path {models / 'llm'} --mt_path {models / 'mt'} --data_dir datas --languages de,sw --dev_size 6"
    numbers = "--sentences 20 10 --penalties 0.01 1 --descents 2 --pairs 8"
    monkeypatch.setattr(sys, "argv", ["aligned_fit", *words.split(), *numbers.split()])
    aligned_fit.main()
    table = json.loads(capsys.readouterr().out.splitlines()[-1])["choices"]
    first, no_boundary = table.pop("ridge 0.01, 20 sentences"), table.pop("boundary zero")
    assert set(table) == {"10 sentences", "ridge 1", "both layers by AdamW, 2 steps", "8 sentence pairs besides"}
    # The boundary is not part of the regression, but of the LLM's input.
    for figure in ("relative_error", "correlation"):
        assert no_boundary[figure] == first[figure]
    assert no_boundary["perplexity"] != first["perplexity"]
    for name, row in table.items():
        assert row["relative_error"] != first["relative_error"], name
        assert row["perplexity"] != first["perplexity"], name
