"""lm-evaluation-harness and `run_evaluation.py` on the same tiny models and local data: the same answers."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager

from common.cli import parse_flags
from common.errors import InputError
from common.ranks import Process
from mindmerger.checkpoint import SAFETENSORS, write_verdicts
from mindmerger.config import EvaluationFlags
from mindmerger.evaluation.answerer import Answerer
from mindmerger.evaluation.report import read_predictions
from mindmerger.evaluation.run import evaluate
from mindmerger.tasks import EVALUATION_TASKS, LANGUAGES, UNKNOWN
from tests.conftest import REPOSITORY
from tests.mindmerger.scripts import run, torchrun_command
from tools import harness, lm_eval

TASKS = REPOSITORY / "configs/lm_eval"


@pytest.fixture
def checkpoint(work: Path, build: Callable, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random mapping for augmentation, in a user's folder."""
    monkeypatch.chdir(work)
    model, _ = build()
    model.config.augmentation = True
    model.save_pretrained(work / "checkpoint")
    return work / "checkpoint"


@pytest.fixture
def call(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, list[dict]]]:
    """Function that runs the harness and returns its logged samples by task."""

    def call_harness(*words: object, model_args: str = "") -> dict[str, list[dict]]:
        words = ("lm_eval", "--model", "mindmerger", "--include_path", TASKS, "--output_path", "harness",
                 "--model_args", f"checkpoint={checkpoint}{model_args}", "--log_samples", *words)  # fmt: skip
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        # Listing its ten thousand tasks and pip's packages would take far longer than the tiny models.
        ours_only = partialmethod(TaskManager.__init__, include_defaults=False)
        monkeypatch.setattr(TaskManager, "__init__", ours_only)
        monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        for path in Path("harness").rglob("*.json*"):
            path.unlink()
        lm_eval.main()
        return logged()

    return call_harness


def logged() -> dict[str, list[dict]]:
    paths = Path("harness").rglob("samples_*.jsonl")
    rows = {path.name.split("_2")[0].removeprefix("samples_"): path.read_text().splitlines() for path in paths}
    return {
        task: sorted((json.loads(line) for line in lines), key=lambda row: row["doc_id"])
        for task, lines in rows.items()
    }


def ours(task: str, *words: object) -> dict[str, list[dict]]:
    words = ("--init_checkpoint", "checkpoint", "--save_name", "ours", "--task", task, "--overwrite", *words)
    evaluate(parse_flags(EvaluationFlags, [str(word) for word in words]))
    found: dict[str, list[dict]] = {}
    for record in read_predictions(Path("results/ours", task)):
        found.setdefault(LANGUAGES[record["language"]].code, []).append(record)
    return found


# The second of them cuts questions: to the same tokens here and there.
@pytest.mark.parametrize("limits", [{}, {"max_seq_len": 24, "max_prompt_len": 150}])
def test_answers_are_those_of_run_evaluation(call: Callable, limits: dict[str, int], checkpoint: Path) -> None:
    write_verdicts(checkpoint / SAFETENSORS, {"German": {"verdict": "harms"}})
    theirs = call("--tasks", "msvamp", "--gen_kwargs", "max_gen_toks=12", "--batch_size", 3,
                  model_args="".join(f",{name}={value}" for name, value in limits.items()))  # fmt: skip
    words = [word for name, value in limits.items() for word in (f"--{name}", value)]
    expected = ours("msvamp", "--max_gen_len", 12, *words)
    assert len(expected) == 10 and {f"msvamp_{code}" for code in expected} == theirs.keys()
    assert any(row["cut"] for rows in expected.values() for row in rows) == bool(limits)
    if not limits:
        switched = expected["de"]
        expected = ours("msvamp", "--max_gen_len", 12, "--switch", "off") | {"de": switched}
        assert expected["de"] != ours("msvamp", "--max_gen_len", 12, "--switch", "off")["de"]
    for code, rows in expected.items():
        assert [row["output"] for row in rows] == [row["filtered_resps"][0] for row in theirs[f"msvamp_{code}"]]
        assert [row["right"] for row in rows] == [bool(row["acc"]) for row in theirs[f"msvamp_{code}"]]


def test_chats_are_those_of_run_evaluation(call: Callable, checkpoint: Path, work: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    shutil.copytree(config["llm_path"], work / "chat_llm", dirs_exist_ok=True)
    template = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    (work / "chat_llm/chat_template.jinja").write_text(template)
    changed = {"llm_path": str(work / "chat_llm"), "prompt_format": "chat"}
    (checkpoint / "config.json").write_text(json.dumps(config | changed))
    words = ("--tasks", "msvamp_de,x_csqa_de", "--gen_kwargs", "max_gen_toks=12")
    theirs, applied = call(*words), call(*words, "--apply_chat_template")
    for task in ("msvamp", "x-csqa"):
        rows = ours(task, "--languages", "de", "--max_gen_len", 12)["de"]
        for logged_rows in (theirs, applied):
            own = logged_rows[f"{task.replace('-', '_')}_de"]
            if task == "msvamp":
                assert [row["output"] for row in rows] == [row["filtered_resps"][0] for row in own]
            assert [row["right"] for row in rows] == [bool(row["acc"]) for row in own]
    with pytest.raises(InputError, match="turns of system, user, not one user's"):
        call(*words, "--apply_chat_template", "--system_instruction", "Be good")


def test_choices_are_those_of_run_evaluation(call: Callable) -> None:
    theirs = call("--tasks", "x_csqa", "--batch_size", 4)
    expected = ours("x-csqa")
    assert len(expected) == 16 and {f"x_csqa_{code}" for code in expected} == theirs.keys()
    chosen = set()
    for code, rows in expected.items():
        for row, logged_row in zip(rows, theirs[f"x_csqa_{code}"], strict=True):
            likelihoods = [float(pair[0]) for pair in logged_row["filtered_resps"]]
            chosen.add(row["output"])
            assert "ABCDE"[likelihoods.index(max(likelihoods))] == row["output"]
            assert bool(logged_row["acc"]) == row["right"]
    assert len(chosen) > 1


@pytest.mark.slow  # each of its ranks lists the harness's own tasks
def test_two_ranks_answer_as_one(work: Path, call: Callable) -> None:
    words = ("--tasks", "msvamp_de,x_csqa_de", "--gen_kwargs", "max_gen_toks=8")
    one = call(*words)
    launcher = torchrun_command(2, "")[:-1]
    run([*launcher, "-m", "tools.lm_eval", *sys.argv[1:]], work, environment={"PYTHONPATH": str(REPOSITORY)})
    assert len(one) == 2
    for task, rows in logged().items():
        assert [row["filtered_resps"] for row in rows] == [row["filtered_resps"] for row in one[task]]


@pytest.mark.parametrize("task", ["msvamp", "x-csqa"])
def test_rows_beyond_the_llms_positions_are_refused_as_in_run_evaluation(
    call: Callable, work: Path, models: dict[str, Path], task: str
) -> None:
    llm = work / f"switching-{task}"
    shutil.copytree(models["llama"], llm)
    config = json.loads((llm / "config.json").read_text())
    config |= {"max_position_embeddings": 50, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}
    (llm / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="the longest row has .* more than 50: lower") as refusal:
        ours(task, "--max_gen_len", 12, "--llm_path", llm)
    words = ("--tasks", task.replace("-", "_"), "--gen_kwargs", "max_gen_toks=12")
    with pytest.raises(InputError, match=f"^{re.escape(str(refusal.value))}$"):
        call(*words, model_args=f",llm_path={llm}")
    assert not logged()


def write_task(folder: Path, rows: list[dict], **task: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
    } | task
    (folder / "task.yaml").write_text(yaml.safe_dump(task))


def test_the_encoder_reads_the_bare_question_and_stop_strings_end_an_answer(
    call: Callable, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in the harness's own mgsm_direct_de.
    rows = [{"question": "Wie viele Äpfel?", "answer_number": 3}, {"question": "Und Birnen?", "answer_number": 4}]
    task = {
        "task": "tiny_direct_de",
        "output_type": "generate_until",
        "doc_to_text": '{{"Frage: "+question+"\\nAntwort:"}}',
        "doc_to_target": "{{answer_number|string}}",
    }
    write_task(work / "tasks", rows, **task, generation_kwargs={"until": ["Frage:"], "do_sample": False})
    read = []
    tokenize = harness.MindMergerLM._example
    monkeypatch.setattr(harness.MindMergerLM, "_example", lambda *given: read.append(tokenize(*given)) or read[-1])
    words = ("--tasks", "tiny_direct_de", "--include_path", "tasks", "--limit", 2, "--gen_kwargs")
    [whole] = call(*words, "max_gen_toks=24").values()
    assert [example.source.text for example in read] == ["Wie viele Äpfel?", "Und Birnen?"]
    assert [example.prompt.text for example in read] == [f"Frage: {row['question']}\nAntwort:" for row in rows]
    assert {example.language.code for example in read} == {"de"}

    texts = [row["filtered_resps"][0] for row in whole]
    middle = len(texts[0]) // 2
    stop = texts[0][middle : middle + 3]
    write_task(work / "tasks", rows, **task, generation_kwargs={"until": [stop], "do_sample": False})
    lengths = []
    greedy = harness.MindMergerLM._has_ended

    def counting(self: harness.MindMergerLM, until: list[str]) -> Callable:
        has_ended = greedy(self, until)
        return lambda ids: lengths.append(len(ids)) or has_ended(ids)

    monkeypatch.setattr(harness.MindMergerLM, "_has_ended", counting)
    [cut] = call(*words, "max_gen_toks=24", "--batch_size", 1).values()
    assert [row["filtered_resps"][0] for row in cut] == [text.split(stop)[0] for text in texts]
    # Generation ended at the stop text and was not cut later.
    assert lengths.index(1, 1) < 24

    write_task(work / "tasks", rows, **task, generation_kwargs={"until": [stop], "do_sample": True})
    with pytest.raises(InputError, match="tiny_direct_de needs sampling"):
        call(*words, "max_gen_toks=24")


def test_what_it_cannot_do_is_refused(call: Callable, work: Path, models: dict[str, Path]) -> None:
    here = ("--include_path", "tasks", "--tasks")
    text = {"output_type": "loglikelihood_rolling", "doc_to_target": "{{text}}", "doc_to_text": ""}
    write_task(work / "tasks", [{"text": "So it is."}], task="tiny_text", **text)
    with pytest.raises(InputError, match="tiny_text needs the likelihood of a whole text"):
        call(*here, "tiny_text")
    generate = {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "text"}
    write_task(work / "tasks", [{"text": "So?"}], task="tiny_field", **generate)
    with pytest.raises(
        InputError, match=r"rows have no text 'question'.* but text: name one, as in .*source_field=NAME"
    ):
        call(*here, "tiny_field")
    call(*here, "tiny_field", "--gen_kwargs", "max_gen_toks=2", model_args=",source_field=text")
    for words, model_args, message in (
        (("--apply_chat_template",), "", "--apply_chat_template needs a mapping trained with --prompt chat"),
        ((), ",prompt=chat", "--prompt chat: .*checkpoint was trained with --prompt published"),
        (("--batch_size", "auto"), "", "--batch_size auto must be a number"),
        ((), ",test_num=3", "--model_args takes no test_num"),
        ((), ",max_seq_len=many", "max_seq_len"),
        ((), ",checkpoint=nowhere", "no mapping at nowhere"),
        ((), ",switch=decide", "switch=decide: run_evaluation.py decides"),
    ):
        with pytest.raises(InputError, match=message):
            call("--tasks", "msvamp_de", *words, model_args=model_args)


def test_an_encoder_that_is_told_the_language_gets_the_tasks_own(build: Callable) -> None:
    model, tokenizer = build(mt="nllb")
    lm = harness.MindMergerLM.__new__(harness.MindMergerLM)
    lm._process, lm._source_language = Process(0, 1, torch.device("cpu")), None
    lm._answerer = Answerer(model.llm, tokenizer, model)
    assert [lm._language(task).code for task in ("msvamp_sw", "mgsm_direct_zh", "belebele_deu_Latn")] == [
        "sw", "zh", "de"
    ]  # fmt: skip
    with pytest.raises(InputError, match="name that of hellaswag"):
        lm._language("hellaswag")
    # Where no language is needed it stays unknown, and is not switched as English.
    lm._answerer.tokenizer.names_language = False
    assert lm._language("hellaswag") == UNKNOWN


@pytest.mark.parametrize(("task", "folder"), [("msvamp", "msvamp"), ("x-csqa", "x_csqa")])
def test_the_task_files_are_those_of_the_tasks_languages(task: str, folder: str) -> None:
    codes = {language.code for language in EVALUATION_TASKS[task].languages}
    assert {path.stem for path in (TASKS / folder).glob(f"{folder}_*.yaml")} == {f"{folder}_{code}" for code in codes}
    group = yaml.safe_load((TASKS / folder / f"{folder}.yaml").read_text())
    assert set(group["task"]) == {f"{folder}_{code}" for code in codes}
