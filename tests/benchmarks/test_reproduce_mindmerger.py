"""MindMerger's tables in miniature: assignment of problems, gains, and a whole run on very small models."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import benchmarks.aligned_start
import benchmarks.reproduce.mindmerger as reproduce
import benchmarks.reproduce.without_harm as without_harm
import tests.mindmerger.datas as datas
from benchmarks.reproduce.texts import Text
from common.cli import parse_flags
from common.errors import InputError
from common.io import read_json
from mindmerger.config import EvaluationFlags
from mindmerger.evaluation.run import evaluate
from mindmerger.tasks import math_prompt
from tests.conftest import REPOSITORY
from tests.mindmerger.scripts import forget_ranks, train_here


@pytest.fixture
def flags(work: Path, monkeypatch: pytest.MonkeyPatch) -> reproduce.MiniatureFlags:
    """Flags of a run with one step of each kind, in a temporary folder and in this process."""

    def launch_here(script: str, words: str, ranks: int = 2) -> None:
        if script == "run_training.py":
            train_here(work, *words.split())
        else:
            evaluate(parse_flags(EvaluationFlags, words.split()))
            forget_ranks()

    monkeypatch.setattr(datas, "ROWS", 80)
    monkeypatch.setattr(reproduce, "launch", launch_here)
    monkeypatch.setattr(benchmarks.aligned_start, "launch", launch_here)
    for limit, tokens in (("ANSWER_TOKENS", 4), ("QUESTION_TOKENS", 32), ("MAX_TOKENS", 64)):
        monkeypatch.setattr(reproduce, limit, tokens)
    # One start of the two: both go through the same steps.
    monkeypatch.delitem(reproduce.STARTS, "scaled")
    datas.write_datas(work / "datas")
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
        mapping_num=10,
        augmentation_num=5,
        dev_size=8,
        translations=1,
        test_num=2,
    )


def test_every_problem_is_in_one_place_and_one_language(flags: reproduce.MiniatureFlags) -> None:
    # The two files differ in white space.
    english = Path("datas/bilingual_pairs/en-de/train_100k.en")
    english.write_text(english.read_text().replace(" ", "  "))
    reproduce.write_data(flags, Path("own"))
    pairs = []
    for code in ("de", "sw"):
        sides = [
            Path(f"own/bilingual_pairs/en-{code}/train_100k.{side}").read_text().splitlines() for side in (code, "en")
        ]
        numbers = [[int(line.split()[1].rstrip(":")) for line in side] for side in sides]
        assert numbers[0] == numbers[1] and len(numbers[0]) == flags.mapping_num
        pairs += numbers[0]
    of_llm = [int(learned.split()[2].rstrip(".")) for _, learned in read_json(Path("own") / reproduce.LLM_PROBLEMS)]
    assert len(of_llm) == 8
    left = [int(row["response"].split()[2].rstrip(".")) for row in read_json(Path("own/query_translation/math.json"))]
    assert sorted(pairs + of_llm + left) == list(range(datas.ROWS))


@pytest.mark.parametrize("brings_bos", [False, True])
def test_the_llm_learns_what_it_will_be_asked(brings_bos: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "quickstart/models/llm", add_bos_token=brings_bos)
    assert bool(tokenizer("").input_ids) == brings_bos
    problem = reproduce.as_read(Text("How many?", "Two."), tokenizer)
    ids = tokenizer(problem.read).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert problem.read.endswith(math_prompt("How many?").text) and problem.learned == "Two."


def test_a_gain_is_of_problems_and_not_of_english() -> None:
    alone = {"English": [True, True, True], "German": [False, False, True], "Swahili": [False, False, False]}
    first = {"English": [False, False, False], "German": [True, False, True], "Swahili": [True, False, False]}
    second = {"English": [False, False, False], "German": [True, False, True], "Swahili": [True, False, True]}
    found = reproduce.gain(alone, [first, second])
    assert found["value"] == pytest.approx((2 + 0 + 0.5) / 2 / 3)  # problem by problem, two languages, three problems
    assert found["low"] == 0.0 and found["high"] == pytest.approx(1.0)


def test_a_ways_gain_is_over_tokens_and_not_of_english() -> None:
    nats = {"English": (9.0, 9.0, 9.0, 50), "German": (2.0, 1.5, 2.5, 10), "Swahili": (4.0, 3.0, 4.0, 30)}
    found = {
        "end": {
            "languages": {
                name: {"perplexity": math.exp(own), "shuffled": math.exp(shuffled), "tokens": tokens}
                for name, (_, own, shuffled, tokens) in nats.items()
            }
        },
        "verdicts": {name: {"alone": alone, "verdict": "helps"} for name, (alone, *_) in nats.items()},
    }
    assert without_harm.gain(found) == pytest.approx((10 * 0.5 + 30 * 1.0) / 40)
    assert without_harm.gain(found, "shuffled") == pytest.approx((10 * -0.5 + 30 * 0.0) / 40)
    lines = without_harm.table({"ways": {"as published": [found]}}).splitlines()
    assert lines[2].startswith(
        "| as published, seed 0 | 8103.084, 8103.084 (8103.084), helps | 7.389, 4.482 (12.182), "
    )
    assert lines[2].endswith("| 0.875 (-0.125) |")
    with pytest.raises(InputError, match="--best 'nothing' is none of: as published, replay"):
        without_harm.HarmFlags(llm_path="a", mt_path="b", best="nothing")


def test_the_whole_is_done_once(
    flags: reproduce.MiniatureFlags, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    result = reproduce.reproduce(flags)
    (aligned,) = result["starts"]["aligned"]
    assert set(aligned["mapping"]) == {"curve", "end", "start"}
    assert [examples for examples, _ in aligned["mapping"]["curve"]] == [0, 12]
    assert {"perplexity", "shuffled", "numbers_kept", "chrf"} == set(aligned["mapping"]["end"]["mean"])
    assert set(aligned["asked"]["mgsm"]["right"]) == {"German", "Swahili", "English"}
    assert set(aligned["asked"]["msvamp"]["right"]) == {"Swahili", "English"}
    held_out = aligned["augmentation"]["end"]["languages"]
    assert set(result["alone"]["perplexity"][0]) == set(held_out)
    assert read_json(reproduce.RESULTS) == json.loads(json.dumps(result))
    assert {"data", "llm", "asked", "alone_0", "aligned_0_asked"} <= set(result["steps"])

    def stop(*_, **__):
        raise AssertionError("this was done before")

    for name in ("fine_tune", "train", "launch"):
        monkeypatch.setattr(reproduce, name, stop)
    words = [f"--{name}={value}" for name, value in vars(flags).items() if name not in ("overwrite", "encoder_layer")]
    monkeypatch.setattr("sys.argv", ["mindmerger", *words])
    capsys.readouterr()
    reproduce.main()
    output = capsys.readouterr().out
    assert json.loads(output.splitlines()[-1]) == json.loads(json.dumps(result))
    assert reproduce.PICTURE.stat().st_size > 10_000
    assert "| aligned start, no pair seen, seed 0 |" in output and "| the LLM alone |" in output
    with pytest.raises(InputError, match="mapping_num was 10, now 9"):
        reproduce.reproduce(replace(flags, mapping_num=9))


def test_what_is_wrong_is_told_before_the_llm_is_trained(
    flags: reproduce.MiniatureFlags, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(reproduce, "fine_tune")
    for changed, message in (
        ({"llm_steps": 9}, "--llm_steps needs 72 English problems, and there are"),
        ({"mapping_num": 30}, "--mapping_num needs 30 pairs of German, and there are"),
        ({"augmentation_num": 20}, "--augmentation_num needs 20 problems of German, and there are"),
        ({"dev_size": 1}, "--dev_size 1 holds out no mapping row of"),
        ({"languages": "de,en"}, "English is there in any case"),
        ({"msvamp_languages": "fr"}, "--msvamp_languages fr: French is not in --languages"),
        ({"seeds": 0}, "--seeds 0 must be above 0"),
        ({"work_dir": "."}, "--work_dir . names no folder"),
    ):
        with pytest.raises(InputError, match=message):
            reproduce.reproduce(replace(flags, overwrite=True, **changed))
    german = Path("datas/evaluation/mgsm/mgsm_de.tsv")
    german.write_text("".join(reversed(german.read_text().splitlines(keepends=True))))
    with pytest.raises(InputError, match="mgsm_de.tsv, line 1: not the problems of the English file"):
        reproduce.reproduce(flags)
