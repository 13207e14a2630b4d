"""The small world's decoder-only model: a folder that an aligned start reads like any other decoder's."""

import json
import sys
from itertools import islice
from pathlib import Path

import pytest

import benchmarks.aligned_fit as aligned_fit
import benchmarks.decoder_world as decoder_world
import tests.mindmerger.datas as datas
from quickstart.world import problems
from tests.conftest import REPOSITORY


def test_a_translation_is_of_its_own_source() -> None:
    pairs = list(islice(decoder_world.translations(0), 40))
    asked = list(islice(problems("train", 0), 40))
    for (source, target), problem in zip(pairs, asked, strict=True):
        assert target == problem.question("en")
        assert source in {problem.question(language.code) for language in decoder_world.WORLD_LANGUAGES}
    assert sum(source == target for source, target in pairs) < 20


def test_its_folder_is_a_decoder_only_encoder_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["decoder_world", "decoder", "--steps", "2"])
    decoder_world.main()
    monkeypatch.setattr(datas, "ROWS", 60)
    monkeypatch.setattr(aligned_fit, "HELD_OUT", 10)
    datas.write_datas(Path("datas"))
    llm = REPOSITORY / "quickstart/models/llm"
    words = f"--llm_path {llm} --mt_path decoder --data_dir datas --languages de,sw --dev_size 6 --layers 2 5"
    numbers = "--sentences 20 --penalties 0.01 --descents 1 --pairs 8"
    monkeypatch.setattr(sys, "argv", ["aligned_fit", *words.split(), *numbers.split()])
    aligned_fit.main()
    table = json.loads(capsys.readouterr().out.splitlines()[-1])["choices"]
    layers = [table[f"layer {layer}, ridge 0.01, 20 sentences"] for layer in (2, 5)]
    assert layers[0]["perplexity"] != layers[1]["perplexity"]
    # A state contains its own token from the first step on.
    assert all(row["relative_error"] < 0.9 for row in layers)
