"""`run_evaluation.py` on tiny models: alone, with a mapping, on several ranks, interrupted."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.cli import parse_flags
from common.errors import InputError, Stopped
from common.io import sha256
from common.locks import locked
from mindmerger import modeling
from mindmerger.batching import lay_out
from mindmerger.checkpoint import SAFETENSORS, write_verdicts
from mindmerger.config import EvaluationFlags
from mindmerger.data import Example
from mindmerger.evaluation import answerer as answerer_module
from mindmerger.evaluation import decoding
from mindmerger.evaluation import run as evaluation
from mindmerger.evaluation.answerer import Answerer
from mindmerger.evaluation.decoding import greedy, label_log_likelihoods
from mindmerger.evaluation.report import read_predictions
from mindmerger.evaluation.run import evaluate
from mindmerger.tasks import EVALUATION_TASKS, LANGUAGES, Prompt, math
from mindmerger.tasks.answers import parse_answer
from tests.mindmerger.scripts import run_ranks, trained_before_5

Words = tuple[object, ...]


@pytest.fixture
def words(work: Path, build: Callable, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Words:
    """Flags that evaluate a random mapping, from a user's folder."""
    monkeypatch.chdir(work)
    model, _ = build()
    model.config.augmentation = False
    model.save_pretrained(work / "checkpoint")
    return ("--llm_path", models["llama"], "--mt_path", models["mt5"], "--init_checkpoint", "checkpoint",
            "--max_gen_len", 12)  # fmt: skip


def evaluate_words(*words: object) -> None:
    evaluate(parse_flags(EvaluationFlags, [str(word) for word in words]))


def predictions(folder: Path) -> dict[str, list[dict]]:
    """Answers by language code; every line of every file must be an answer."""
    lines = [line for path in (folder / "predictions").iterdir() for line in path.read_text().splitlines()]
    records = read_predictions(folder)
    assert sorted(map(json.loads, lines), key=lambda record: record["problem"]) == records
    found: dict[str, list[dict]] = {}
    for record in records:
        found.setdefault(LANGUAGES[record["language"]].code, []).append(record)
    return found


def test_all_tasks_with_every_output(words: Words) -> None:
    evaluate_words(*words, "--task", "mgsm,msvamp,x-csqa,xnli", "--save_name", "all")
    for task, languages in {"mgsm": 11, "msvamp": 10, "x-csqa": 16, "xnli": 15}.items():
        folder = Path("results/all") / task
        scores = json.loads((folder / "scores.json").read_text())
        assert len(scores["languages"]) == languages
        assert {entry["count"] for entry in scores["languages"].values()} == {2}
        assert (folder / "scores.tsv").exists() and (folder / "accuracy.png").exists()
        rows = [row for rows in predictions(folder).values() for row in rows]
        assert len(rows) == 2 * languages
        assert {"language", "question", "output", "parsed", "gold", "right", "cut"} <= rows[0].keys()
        for language, entry in scores["languages"].items():
            right = [row["right"] for row in rows if row["language"] == language]
            assert entry["accuracy"] == sum(right) / 2
    chosen = {row["output"] for rows in predictions(Path("results/all/xnli")).values() for row in rows}
    assert chosen <= {"entailment", "neutral", "contradiction"}


def test_two_ranks_answer_each_problem_once_and_as_one_does(work: Path, words: Words) -> None:
    run_ranks(2, work, "run_evaluation.py", *words, "--save_name", "two", "--eval_batch_size", 3)
    evaluate_words(*words, "--save_name", "one", "--eval_batch_size", 8)
    assert predictions(Path("results/two/mgsm")) == predictions(Path("results/one/mgsm"))
    paths = list(Path("results/two/mgsm/predictions").iterdir())
    of_second = sum(len(path.read_text().splitlines()) for path in paths if path.name.endswith(".rank_1.jsonl"))
    assert sum(len(path.read_text().splitlines()) for path in paths) == 22 and 8 <= of_second <= 14


def test_a_second_run_continues_where_the_first_stopped(
    words: Words, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate_words(*words, "--save_name", "stopped")
    folder = Path("results/stopped/mgsm")
    before = predictions(folder)
    # As after a kill of two ranks in the middle of a line: nine whole answers and two that are cut.
    paths = sorted((folder / "predictions").iterdir())
    for path in paths[6:]:
        path.unlink()
    for path in paths[4:6]:
        first, second = path.read_text().splitlines(keepends=True)
        path.write_text((first if path == paths[4] else "") + second[:40])
    paths[4].rename(paths[4].with_suffix(".rank_1.jsonl"))
    settings = json.loads((folder / "run.json").read_text())["settings"]
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    capsys.readouterr()
    evaluate_words(*words, "--save_name", "stopped")
    assert "9 of 22 problems already have answers" in capsys.readouterr().out
    assert predictions(folder) == before

    trained_before_5(Path("checkpoint"), monkeypatch)
    evaluate_words(*words, "--save_name", "stopped")
    printed = capsys.readouterr().out
    assert "already have answers" not in printed and "checkpoint was trained under transformers 4.57.3" in printed
    with pytest.raises(InputError, match="max_gen_len was 12, now 13.*--overwrite"):
        evaluate_words(*words, "--save_name", "stopped", "--max_gen_len", 13)
    evaluate_words(*words, "--save_name", "stopped", "--max_gen_len", 13, "--overwrite")


def test_out_of_memory_halves_the_slots_and_goes_on(
    words: Words, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    sizes: list[int] = []
    lengths: list[int] = []

    def steps(*arguments: object) -> Iterator:
        lengths.extend(arguments[-1].values())
        return decoding.greedy_steps(*arguments)

    def short_of_memory(limit: int, after: int) -> Callable:
        def step(llm: object, inputs: dict[str, torch.Tensor], *rest: object) -> torch.Tensor:
            (rows,) = map(len, inputs.values())
            sizes.append(rows)
            if rows > limit and len(sizes) > after:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return one_step(llm, inputs, *rest)

        return step

    one_step = decoding._next
    with monkeypatch.context() as patch:
        patch.setattr(answerer_module, "greedy_steps", steps)
        evaluate_words(*words, "--save_name", "room", "--eval_batch_size", 8)
    capsys.readouterr()
    # There is memory for eight at first, until the cache grows.
    monkeypatch.setattr(decoding, "_next", short_of_memory(3, after=15))
    evaluate_words(*words, "--save_name", "short", "--eval_batch_size", 8)
    # Seven problems are answered before the first pass that is out of memory, and six before the second.
    assert sizes == _passes(lengths, 8)[:16] + _passes(lengths[7:], 4)[:25] + _passes(lengths[13:], 2)
    assert (sizes[15], sizes[40]) == (7, 4) and set(sizes[41:]) == {1, 2}
    printed = capsys.readouterr().out
    assert "out of memory with 8 problems at once: continuing with 4" in printed
    assert "out of memory with 4 problems at once: continuing with 2" in printed
    assert predictions(Path("results/short/mgsm")) == predictions(Path("results/room/mgsm"))
    monkeypatch.setattr(decoding, "_next", short_of_memory(0, after=0))
    with pytest.raises(InputError, match=r"single problem, .*mgsm_\w+\.tsv, line \d.*--max_gen_len below 12"):
        evaluate_words(*words, "--save_name", "none")


def _passes(lengths: list[int], slots: int) -> list[int]:
    """Rows of each forward pass for problems of falling lengths whose answers all have twelve tokens.

    As many rows start as take the memory of `slots` rows of mean length, at most four in a prefill.
    """
    sizes, whole = [], [length + 12 for length in lengths]
    cells = slots * sum(whole) / len(whole)
    while whole:
        rows = min(slots, max(1, int(cells / whole[0])), len(whole))
        sizes += [4] * (rows // 4) + [rows % 4] * (rows % 4 > 0) + [rows] * 11
        whole = whole[rows:]
    return sizes


def test_labels_scored_out_of_memory_are_halved_too(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    score = Answerer.log_likelihoods

    def short_of_memory(answerer: Answerer, rows: list, labels: list[str]) -> tuple:
        sizes.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return score(answerer, rows, labels)

    evaluate_words(*words, "--task", "xnli", "--save_name", "room")
    monkeypatch.setattr(Answerer, "log_likelihoods", short_of_memory)
    evaluate_words(*words, "--task", "xnli", "--save_name", "short", "--eval_batch_size", 8)
    assert sizes[:3] == [8, 4, 2] and set(sizes[3:]) == {2}
    assert predictions(Path("results/short/xnli")) == predictions(Path("results/room/xnli"))


def test_a_signal_stops_between_two_steps_and_the_answers_so_far_stay(
    words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_step, steps = decoding._next, []

    def step(*arguments: object) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 20:
            os.kill(os.getpid(), signal.SIGUSR1)
        return one_step(*arguments)

    evaluate_words(*words, "--save_name", "calm", "--eval_batch_size", 4)
    monkeypatch.setattr(decoding, "_next", step)
    with pytest.raises(Stopped, match="SIGUSR1: the answers so far are in results/signalled/mgsm/predictions;"):
        evaluate_words(*words, "--save_name", "signalled", "--eval_batch_size", 4)
    assert len(steps) == 20
    # Three of the longest take the memory of four of mean length, and end after twelve passes.
    assert len(read_predictions(Path("results/signalled/mgsm"))) == 3
    evaluate_words(*words, "--save_name", "signalled", "--eval_batch_size", 4)
    assert predictions(Path("results/signalled/mgsm")) == predictions(Path("results/calm/mgsm"))


def test_a_second_evaluation_of_the_same_results_is_refused(words: Words) -> None:
    with locked(Path("results/held/mgsm")), pytest.raises(InputError, match="results/held/mgsm is in use by process"):
        evaluate_words(*words, "--save_name", "held")
    evaluate_words(*words, "--save_name", "held", "--languages", "de")


def test_answers_that_have_not_arrived_are_not_left_out_of_the_score(
    words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "read_predictions", lambda folder: read_predictions(folder)[:-1])
        with pytest.raises(InputError, match="results/late/mgsm has 21 of 22 answers: .* the same command continues"):
            evaluate_words(*words, "--save_name", "late")
    assert not Path("results/late/mgsm/scores.json").exists()
    evaluate_words(*words, "--save_name", "late")
    assert sum(map(len, predictions(Path("results/late/mgsm")).values())) == 22


def test_every_form_of_a_checkpoint_answers_alike(words: Words) -> None:
    results = []
    for form in ("checkpoint", "checkpoint/model.safetensors", "checkpoint/pytorch_model.bin"):
        save_name = form.replace("/", "_")
        evaluate_words(*words, "--init_checkpoint", form, "--save_name", save_name, "--languages", "de,en")
        results.append(predictions(Path("results") / save_name / "mgsm"))
        settings = json.loads(Path("results", save_name, "mgsm/run.json").read_text())["settings"]
        # As recorded beside the file, for all forms of its name.
        assert settings["augmentation"] is False
    assert results[0] == results[1] == results[2]
    shutil.copy("checkpoint/pytorch_model.bin", "published.bin")
    evaluate_words(*words, "--init_checkpoint", "published.bin", "--save_name", "bin", "--languages", "de")
    assert json.loads(Path("results/bin/mgsm/run.json").read_text())["settings"]["augmentation"] is True


def test_the_baseline_is_the_llm_alone_on_the_same_prompts(words: Words, build: Callable, models: dict) -> None:
    evaluate_words("--baseline", "--llm_path", models["llama"], "--max_gen_len", 12, "--languages", "de")
    rows = predictions(Path("results/MergeMinds-baseline/mgsm"))["de"]
    model, tokenizer = build()
    for row in rows:
        prompt = (
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            f"request.\n\n### Instruction:\n{row['question']}\n\n### Response: Let's think step by step."
        )
        ids = torch.tensor([[1, *tokenizer.llm_tokenizer(prompt, add_special_tokens=False).input_ids]])
        new = model.llm.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert row["output"] == tokenizer.llm_tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("task", ["mgsm", "x-csqa"])
def test_the_llm_alone_answers_where_the_mapping_harms(
    words: Words, models: dict[str, Path], task: str, capsys: pytest.CaptureFixture
) -> None:
    """The answers are those of the baseline there, and those of the mapping elsewhere, in mixed batches."""
    words = (*words, "--task", task, "--languages", "de,en,zh,sw", "--eval_batch_size", 3, "--overwrite")
    evaluate_words(*words, "--save_name", "plain")
    alone = ("--baseline", "--llm_path", models["llama"], *words[words.index("--max_gen_len") :])
    evaluate_words(*alone, "--save_name", "plain")
    mapped, baseline = (predictions(Path(f"results/plain{suffix}") / task) for suffix in ("", "-baseline"))
    assert any(mapped[code] != baseline[code] for code in ("en", "zh"))
    verdicts = {"English": "harms", "Chinese": "harms", "German": "helps", "Swahili": "cannot be told"}
    write_verdicts(Path("checkpoint", SAFETENSORS), {name: {"verdict": word} for name, word in verdicts.items()})
    # By the flag, in a published file and without a call for it, nothing is switched.
    published = ("--init_checkpoint", "checkpoint/pytorch_model.bin")
    for more, expected in (((), None), (("--switch", "off"), mapped), (published, mapped)):
        evaluate_words(*words, *more, "--save_name", "switched")
        answers = predictions(Path("results/switched") / task)
        settings = json.loads(Path(f"results/switched/{task}/run.json").read_text())["settings"]
        if expected is None:
            assert "answered by the LLM alone, which the mapping harms" in capsys.readouterr().out
            expected = mapped | {code: baseline[code] for code in ("en", "zh")}
            assert settings["answered_alone"] == ["Chinese", "English"]
        else:
            assert "answered_alone" not in settings
        assert answers == expected


def test_an_evaluation_reports_gains_and_losses_and_decides_on_the_switch(
    words: Words, models: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    words = (*words, "--languages", "de,en", "--save_name", "paired")
    with pytest.raises(InputError, match="no finished evaluation of the LLM alone on these problems of mgsm: run it"):
        evaluate_words(*words, "--switch", "decide")
    evaluate_words(*words)
    assert "gained" not in capsys.readouterr().out
    folder, alone = Path("results/paired/mgsm"), Path("results/paired-baseline/mgsm")
    evaluate_words("--baseline", "--llm_path", models["llama"], *words[words.index("--max_gen_len") :])
    for path, right in ((folder, {"German": True, "English": False}), (alone, {"German": False, "English": True})):
        _as_if_of_many(path, right)
    capsys.readouterr()
    # The finished run's report is completed.
    evaluate_words(*words)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[-3:] for line in lines if line and line[0] in ("language", "German", "English")] == [
        ["gained", "lost", "p"], ["12", "0", "0.00049"], ["0", "12", "0.00049"],
    ]  # fmt: skip
    assert json.loads((folder / "scores.json").read_text())["languages"]["English"]["lost"] == 12
    assert "gained\tlost\tp\n" in (folder / "scores.tsv").read_text()

    with pytest.raises(InputError, match="--switch decide: checkpoint/pytorch_model.bin is no model.safetensors with"):
        evaluate_words(*words, "--init_checkpoint", "checkpoint/pytorch_model.bin", "--switch", "decide")
    with pytest.raises(InputError, match="--baseline has no mapping whose verdicts to decide"):
        evaluate_words("--baseline", "--llm_path", models["llama"], "--switch", "decide")
    evaluate_words(*words, "--switch", "decide")
    assert "against the LLM alone: helps: German; harms: English" in capsys.readouterr().out
    verdicts = json.loads(Path("checkpoint/config.json").read_text())["verdicts"]
    p = 2 / 2**12
    assert verdicts["languages"] == {
        "German": {"verdict": "helps", "by": "answers", "gained": 12, "lost": 0, "p": p},
        "English": {"verdict": "harms", "by": "answers", "gained": 0, "lost": 12, "p": p},
    }
    assert verdicts["mapping_sha256"] == sha256(Path("checkpoint/model.safetensors"))
    with pytest.raises(InputError, match=r"answered_alone was None, now \['English'\]"):
        evaluate_words(*words)


def _as_if_of_many(folder: Path, right: dict[str, bool]) -> None:
    """Change a finished evaluation to one with twelve answers in each language, all right or all wrong."""
    for path in (folder / "predictions").iterdir():
        row = json.loads(path.read_text().splitlines()[0])
        rows = [row | {"problem": row["problem"] * 50 + n, "right": right[row["language"]]} for n in range(12)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_label_likelihoods_equal_the_loss_of_each_label_as_target(build: Callable, examples: list[Example]) -> None:
    model, tokenizer = build()
    labels = ["A", "entailment", "no", "contradiction"]
    label_ids = [tokenizer.label_ids(label) for label in labels]
    assert len({len(ids) for ids in label_ids}) > 2
    questions = tokenizer(examples, with_targets=False)
    with torch.no_grad():
        sequence = Answerer(model.llm, tokenizer, model).embed(questions)
        scores, are_greedy = label_log_likelihoods(model.llm, sequence, label_ids)
        for row, question in enumerate(questions):
            for column, ids in enumerate(label_ids):
                one = lay_out([replace(question, target=ids)], 1, tokenizer.source_pad_id)
                loss = model(batch=one, num_items_in_batch=1.0).loss
                assert float(scores[row, column]) == pytest.approx(-float(loss), abs=1e-4)
        singles, are_greedy_singles = label_log_likelihoods(model.llm, sequence, label_ids[:1])
        torch.testing.assert_close(singles, scores[:, :1])
        assert are_greedy_singles.equal(are_greedy[:, :1])

        said = greedy(model.llm, sequence, 4, set())
        # Each row's own words, and others that equal some row's except at the end.
        words = [*said, *([*ids[:3], ids[3] ^ 1] for ids in said)]
        _, are_greedy = label_log_likelihoods(model.llm, sequence, words)
    assert are_greedy.tolist() == [[ids == word for word in words] for ids in said]


def test_classification_by_generation_as_published(words: Words) -> None:
    evaluate_words(*words, "--task", "xnli", "--languages", "de", "--classification", "generation", "--save_name", "g")
    scores = json.loads(Path("results/g/xnli/scores.json").read_text())
    # A random model generates no label word, and gets no credit for one.
    assert scores["languages"]["German"]["unanswered"] == 2


def test_answers_are_graded_as_numbers_or_as_labels() -> None:
    def grade(target: str, output: str, answer_parser: str) -> tuple[float | None, bool]:
        prompt = Prompt("", "q", "")
        example = Example(prompt, prompt, target, LANGUAGES["German"], number=parse_answer(target))
        return EVALUATION_TASKS["mgsm"].grade(example, output, answer_parser)

    def choose(target: str, output: str) -> tuple[str | None, bool]:
        prompt = Prompt("", "q", "")
        example = Example(prompt, prompt, target, LANGUAGES["German"], tuple("ABC"))
        return EVALUATION_TASKS["x-csqa"].grade(example, output, "default")

    assert grade("2,125", "So 2125.0 it is", "default") == (2125.0, True)
    assert grade("8.0", "The answer is: 8", "default")[1]
    assert grade("0", "I do not know", "default") == (None, False)
    assert grade("0", "I do not know", "published")[1]
    assert not grade("-5", "-5", "published")[1]
    assert not grade("5", "9" * 5000, "published")[1] and not grade("5", "9" * 99, "default")[1]
    assert choose("B", " B\n") == ("B", True)
    assert choose("B", "D") == (None, False)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--task", "gsm8k"), "--task 'gsm8k' is not one of: mgsm, msvamp, x-csqa, xnli"),
        (("--baseline",), "--baseline is the LLM alone: leave --init_checkpoint out"),
        (("--init_checkpoint", "nowhere"), "no mapping at nowhere"),
        (("--test_num", "0"), "--test_num 0 must be above 0"),
        (("--data_dir", "nowhere"), "mgsm_te.tsv: no such file"),
        (("--augmentation", "True", "--max_prompt_len", "5"), "--max_prompt_len 5 leaves no room"),
    ],
)
def test_bad_input_is_told_before_anything_loads(words: Words, more: Words, message: str) -> None:
    with pytest.raises(InputError) as error:
        evaluate_words(*words, "--save_name", "refused", *more)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("place", "alone"),
    [("AutoModelForCausalLM.from_pretrained", False), ("PreTrainedModel.to", False), ("PreTrainedModel.to", True)],
)
def test_models_that_do_not_fit_into_memory_are_one_line(
    words: Words, monkeypatch: pytest.MonkeyPatch, place: str, alone: bool
) -> None:
    def run_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(f"transformers.{place}", run_out)
    words = (*words[:2], "--baseline") if alone else words
    message = r"llama: out of memory while the model loads: .*--dtype.*ZeRO-3.*--plan shows what fits$"
    with pytest.raises(InputError, match=message):
        evaluate_words(*words, "--save_name", "too_large")
    assert not list(Path("results").glob("too_large*"))


def test_a_mapping_of_another_encoder_is_refused(words: Words, models: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"mlp.linear1.weight is \[48, 24\], these models need \[32, 16\]"):
        evaluate_words(*words, "--mt_path", models["xlm_roberta"], "--save_name", "refused")
    assert not Path("results/refused").exists()


def test_an_llm_with_a_wrong_cache_answers_nothing(words: Words, ignore: Callable) -> None:
    ignore("past_key_values", "attention_mask")
    with pytest.raises(InputError, match="gives logits with a cache that differ by .* from those of a row alone"):
        evaluate_words(*words, "--save_name", "wrong_cache")
    assert not list(Path("results/wrong_cache").rglob("*.jsonl"))


def test_answers_of_a_broken_file_are_those_that_are_whole(tmp_path: Path) -> None:
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions/de.jsonl").write_bytes(b'{"problem": 3}\n[1]\n\xff\xfe\n{"problem": 4}\n{"prob')
    (tmp_path / "predictions/de.rank_1.jsonl").write_bytes(b'{"problem": 1}\n')
    (tmp_path / "predictions/el.jsonl").write_bytes(b'{"problem": 0}\n')
    assert [record["problem"] for record in read_predictions(tmp_path)] == [0, 1, 3, 4]
    assert [record["problem"] for record in read_predictions(tmp_path, "de")] == [1, 3, 4]


def test_an_evaluation_reads_the_mapping_once_and_writes_each_answer_once(
    words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, seen, parsed = answerer_module.read_mapping, [], []
    monkeypatch.setattr(answerer_module, "read_mapping", lambda *given: seen.append(given) or read(*given))
    monkeypatch.setattr(modeling, "read_mapping", lambda *given: pytest.fail("read again"))
    monkeypatch.setattr(math, "parse_answer", lambda text: parsed.append(text) or parse_answer(text))
    evaluate_words(*words, "--save_name", "once", "--task", "mgsm,msvamp", "--languages", "de,sw")
    assert len(seen) == 1 and len(parsed) == 8
    for task in ("mgsm", "msvamp"):
        folder = Path("results/once") / task
        assert {path.name for path in folder.iterdir()} == {
            "predictions", "run.json", "scores.json", "scores.tsv", "accuracy.png"
        }  # fmt: skip
        assert {code: len(rows) for code, rows in predictions(folder).items()} == {"de": 2, "sw": 2}
