"""MindMerger's tables in miniature: who has which problem, what a gain is, and the whole on very small models."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import benchmarks.aligned_start
import benchmarks.reproduce.mindmerger as reproduce
import tests.mindmerger.datas as datas
from common.errors import InputError
from common.files import read_json
from common.flags import parse_flags
from mindmerger.evaluation import evaluate
from mindmerger.flags import EvaluationFlags
from tests.conftest import REPOSITORY
from tests.mindmerger.scripts import forget_ranks, train_here


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> reproduce.MiniatureFlags:
    """One step of everything, in a folder of its own, in this process."""

    def launch_here(script: str, words: str, ranks: int = 2) -> None:
        if script == "run_training.py":
            train_here(tmp_path, *words.split())
        else:
            evaluate(parse_flags(EvaluationFlags, words.split()))
            forget_ranks()

    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datas, "ROWS", 40)
    monkeypatch.setattr(reproduce, "launch", launch_here)
    monkeypatch.setattr(benchmarks.aligned_start, "launch", launch_here)
    monkeypatch.setattr(reproduce, "ANSWER_TOKENS", 4)
    datas.write_datas(tmp_path / "datas")
    Path("configs").symlink_to(REPOSITORY / "configs")
    models = REPOSITORY / "quickstart/models"
    return reproduce.MiniatureFlags(
        llm_path=str(models / "llm"),
        mt_path=str(models / "mt"),
        work_dir="work",
        languages="de,sw",
        msvamp_languages="sw",
        seeds=1,
        llm_steps=1,
        mapping_num=12,
        augmentation_num=5,
        dev_size=7,
        train_batch_size=4,
        translations=1,
        test_num=2,
    )


def test_every_problem_is_in_one_language(flags: reproduce.MiniatureFlags) -> None:
    # The two files put blanks differently.
    english = Path("datas/bilingual_pairs/en-de/train_100k.en")
    english.write_text(english.read_text().replace(" ", "  "))
    reproduce.write_data(flags, Path("own"))
    rows = read_json(Path("own/query_translation/math.json"))
    numbers = {name: {r["response"].split()[2] for r in rows if r["lang"] == name} for name in ("German", "Swahili")}
    for name, code in (("German", "de"), ("Swahili", "sw")):
        lines = [
            Path(f"own/bilingual_pairs/en-{code}/train_100k.{side}").read_text().splitlines() for side in (code, "en")
        ]
        assert {line.split()[1].rstrip(":") + "." for line in lines[0]} == numbers[name]
        assert [line.split()[1] for line in lines[0]] == [line.split()[1] for line in lines[1]]
    of_llm = {r["response"].split()[2] for r in rows if r["lang"] == "English"}
    parts = [*numbers.values(), of_llm]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(rows) == datas.ROWS
    assert len(of_llm) > max(map(len, numbers.values())) > 0


def test_a_gain_is_of_problems_and_not_of_english() -> None:
    alone = {"English": [True, True, True], "German": [False, False, True], "Swahili": [False, False, False]}
    first = {"English": [False, False, False], "German": [True, False, True], "Swahili": [True, False, False]}
    second = {"English": [False, False, False], "German": [True, False, True], "Swahili": [True, False, True]}
    found = reproduce.gain(alone, [first, second])
    assert found["value"] == pytest.approx((2 + 0 + 0.5) / 2 / 3)  # problem by problem, two languages, three problems
    assert found["low"] == 0.0 and found["high"] == pytest.approx(1.0)


def test_the_whole_is_done_once(
    flags: reproduce.MiniatureFlags, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    result = reproduce.reproduce(flags)
    (aligned,), (scaled,) = result["starts"]["aligned"], result["starts"]["scaled"]
    assert set(aligned["mapping"]) == {"curve", "end", "start"} and set(scaled["mapping"]) == {"curve", "end"}
    assert [examples for examples, _ in aligned["mapping"]["curve"]] == [0, 12]
    assert {"perplexity", "shuffled", "numbers_kept", "chrf"} == set(aligned["mapping"]["end"]["mean"])
    assert set(aligned["asked"]["mgsm"]["right"]) == {"German", "Swahili", "English"}
    assert set(aligned["asked"]["msvamp"]["right"]) == {"Swahili", "English"}
    held_out = aligned["augmentation"]["end"]["languages"]
    assert set(result["alone"]["perplexity"][0]) == set(held_out)
    assert read_json(reproduce.RESULTS) == json.loads(json.dumps(result))
    assert {"data", "llm", "asked", "seed0/alone", "seed0/scaled/asked"} <= set(result["steps"])

    def stop(*_, **__):
        raise AssertionError("this was done before")

    for name in ("fine_tune", "train", "launch"):
        monkeypatch.setattr(reproduce, name, stop)
    words = [f"--{name}={value}" for name, value in vars(flags).items() if name not in ("overwrite", "encoder_layer")]
    monkeypatch.setattr("sys.argv", ["mindmerger", *words])
    Path("docs").mkdir()
    capsys.readouterr()
    reproduce.main()
    output = capsys.readouterr().out
    assert json.loads(output.splitlines()[-1]) == json.loads(json.dumps(result))
    assert reproduce.PICTURE.stat().st_size > 10_000
    assert "| aligned start, no pair seen, seed 0 |" in output and "| the LLM alone |" in output
    with pytest.raises(InputError, match="mapping_num was 12, now 13"):
        reproduce.reproduce(replace(flags, mapping_num=13))


def test_too_few_problems_and_english_twice(flags: reproduce.MiniatureFlags) -> None:
    with pytest.raises(InputError, match="--llm_steps 9 want 72 English problems, and there are"):
        reproduce.reproduce(replace(flags, llm_steps=9))
    with pytest.raises(InputError, match="English is there in any case"):
        replace(flags, languages="de,en")
