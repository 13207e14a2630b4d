"""The published commands, as a user types them."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._yaml_loader import load_yaml
from safetensors.torch import save_file

import compute_gram
import merge_model
from common.cli import parse_flags
from common.errors import InputError
from regmean.config import GramFlags, MergeFlags
from regmean.gram_file import open_grams
from tests.regmean.conftest import make_llama

REPOSITORY = Path(__file__).parents[2]
LM_EVAL_TASKS = REPOSITORY / "configs" / "lm_eval"


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a script's `main` on a command line, in a working folder that is not the repository."""
    monkeypatch.chdir(tmp_path)

    def call_main(main: Callable[[], None], *words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["script", *words])
        main()

    return call_main


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=180
    )


def test_the_published_words_carry_the_published_settings() -> None:
    code = parse_flags(GramFlags, ["code"], presets=compute_gram.PRESETS)
    math = parse_flags(GramFlags, ["math"], presets=compute_gram.PRESETS)
    assert (code.model, code.output_dir) == ("rombodawg/rombos_Replete-Coder-Llama3-8B", "runs/merges/code-llama3")
    assert (math.model, math.output_dir) == ("TIGER-Lab/MAmmoTH2-8B", "runs/merges/math-llama3")
    assert {(f.num_examples, f.max_length) for f in (code, math)} == {(10_000, 256)}
    assert code.roles() == {"system": "instruction", "user": "input", "assistant": "output"}
    assert math.roles() == {"user": "question", "assistant": "answer"}

    avg = parse_flags(MergeFlags, ["avg"], presets=merge_model.PRESETS)
    regmean = parse_flags(MergeFlags, ["regmean"], presets=merge_model.PRESETS)
    assert avg.models == regmean.models
    assert sorted(avg.models) == sorted([code.model, math.model])
    assert [str(path) for path in avg.output_dirs()] == ["runs/merges/avg"]
    assert [str(path) for path in regmean.output_dirs()] == ["runs/merges/regmean_0.1"]
    # Each model with its own Grams.
    output_of = {f.model: f.output_dir for f in (code, math)}
    assert regmean.grams == [output_of[model] for model in regmean.models]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "m"], "--dataset is missing"),
        (["code", "--text_column", "text"], "either --text_column or chat columns"),
        (["code", "--num_examples", "0"], "--num_examples must be at least 1"),
        (["code", "--dtype", "int4"], "--dtype is one of"),
        (["cod"], "no preset 'cod'"),
    ],
)
def test_bad_flags_of_compute_gram_are_named(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_flags(GramFlags, words, presets=compute_gram.PRESETS)


def test_grams_and_merges_from_the_command_line(
    save: Callable, texts: Path, tmp_path: Path, call: Callable, capsys: pytest.CaptureFixture
) -> None:
    """Presets overridden by flags, as for a user's own models."""
    for seed, name in enumerate("AB"):
        save(make_llama(seed), name)
        call(compute_gram.main, "math", "--model", name, "--dataset", str(texts), "--user_column", "text",
             "--assistant_column", "", "--dtype", "float32", "--output_dir", f"gram_{name}")  # fmt: skip
    assert "plan: 15 layers with 9 distinct inputs" in capsys.readouterr().out
    call(merge_model.main, "regmean", "--models", "A", "B", "--grams", "gram_A", "gram_B", "--alpha", "0.1", "0.9")
    lines = capsys.readouterr().out.splitlines()
    # One line per system and alpha, with its solver.
    assert sum("cholesky float32" in line for line in lines) == 2 * 9
    assert (tmp_path / "runs/merges/regmean_0.9/model.safetensors").exists()
    report = json.loads((tmp_path / "runs/merges/regmean_0.1/merge_report.json").read_text())
    assert report["command"].startswith("python merge_model.py regmean --models A B")


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (merge_model.main, ["regmean++"]),
        (merge_model.main, ["regmean", "--models", "A", "B"]),
        (compute_gram.main, ["code"]),
    ],
)
def test_ranks_wait_for_the_first_as_long_as_it_writes(
    main: Callable[[], None], words: list[str], call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(device: str, timeout: timedelta = timedelta(minutes=30)) -> None:
        raise InterruptedError(timeout.days)

    monkeypatch.setattr("common.ranks.start_process", stop)
    monkeypatch.setattr("regmean.merge.plan_merge", lambda *args: SimpleNamespace(layout={}))
    monkeypatch.setattr("regmean.merge.open_models", lambda *args: [])
    monkeypatch.setattr("regmean.merge.open_grams", lambda *args: None)
    with pytest.raises(InterruptedError, match="30"):
        call(main, *words)


def test_convert_takes_a_file(tmp_path: Path, call: Callable) -> None:
    (tmp_path / "gram.pkl").write_bytes(pickle.dumps({"model.layers.0.mlp.down_proj": torch.eye(24)}))
    call(compute_gram.main, "convert", "gram.pkl")
    np.testing.assert_array_equal(open_grams(tmp_path).read("model.layers.0.mlp.down_proj"), np.eye(24))
    call(compute_gram.main, "convert", "gram.pkl", "--output_dir", "elsewhere")
    assert (tmp_path / "elsewhere" / "gram.safetensors").exists()
    with pytest.raises(InputError, match=r"compute_gram\.py convert gram\.pkl"):
        call(compute_gram.main, "convert")
    with pytest.raises(InputError, match="nowhere.pkl: cannot be read: No such file"):
        call(compute_gram.main, "convert", "nowhere.pkl", "--output_dir", "new")


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, save: Callable) -> None:
    save(make_llama(), "A")
    result = run([str(REPOSITORY / "merge_model.py"), "avg", "--models", "A", "nowhere"], tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: model nowhere: no such folder here, and the download failed")
    assert "Traceback" not in result.stderr


def test_an_average_needs_no_torch(save: Callable, tmp_path: Path) -> None:
    for seed, name in enumerate("AB"):
        save(make_llama(seed), name)
    (tmp_path / "C").mkdir()
    (tmp_path / "C/adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "A"}')
    query = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{query}.lora_{part}.weight": torch.ones(16, 16) for part in "AB"}
    save_file(factors, tmp_path / "C/adapter_model.safetensors")
    words = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
sys.argv = ["merge_model.py", "avg", "--models", "A", "B", "C"]
import merge_model
merge_model.main()
assert "torch" not in sys.modules
"""
    result = run(["-c", words], tmp_path)
    assert result.returncode == 0, result.stderr


def test_the_harness_evaluates_a_merged_model(save: Callable, tmp_path: Path, call: Callable) -> None:
    for seed, name in enumerate("AB"):
        save(make_llama(seed), name)
    call(merge_model.main, "avg", "--models", "A", "B")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"question": f"w{i} plus", "choices": ["w1", "w2"], "answer": i % 2} for i in range(4)]
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tasks / "tiny_choice.yaml").write_text(yaml.safe_dump(task))
    call(cli_evaluate, "--model", "hf", "--model_args", "pretrained=runs/merges/avg,dtype=float32", "--tasks",
         "tiny_choice", "--include_path", str(tasks), "--device", "cpu", "--output_path", "results")  # fmt: skip
    scores = json.loads(next((tmp_path / "results").rglob("results*.json")).read_text())["results"]["tiny_choice"]
    assert scores["acc,none"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert scores["sample_len"] == 4


@pytest.mark.slow
def test_the_code_fence_is_added_to_the_harness_own_task(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[tuple] = []

    def record(self: TaskFactory, entry, overrides: dict) -> list:
        # Building the task itself would download it.
        built.append((entry, overrides))
        return []

    monkeypatch.setattr(TaskFactory, "_build_task", record)
    monkeypatch.setattr("lm_eval.api.group.Group.add", lambda self, child: None)
    TaskManager(include_path=str(LM_EVAL_TASKS)).load(["humaneval_instruct_fenced"])
    [(entry, overrides)] = built
    theirs = load_yaml(entry.yaml_path, resolve_func=False)
    assert theirs["task"] == "humaneval_instruct"
    assert overrides.keys() == {"task", "generation_kwargs"}
    until = overrides["generation_kwargs"].pop("until")
    assert until == [*theirs["generation_kwargs"].pop("until"), "```"]
    assert overrides["generation_kwargs"] == theirs["generation_kwargs"]
