"""README.md and docs/: every command parses, every file exists, and commands that can run on tiny models are run.

`LLM`, `MT`, `A` and `B`, and the published names, are folders of tiny random models here, so that commands run
unchanged; only sizes are cut (`SMALL`). Pages that change the code are tested in a copy of it.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny_models
from tests.commands import NEEDS, blocks, check, commands, missing_paths, run
from tests.conftest import REPOSITORY
from tests.mindmerger.datas import ROWS, sentence, write_datas, write_lines

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
CHANGING = {"adding_a_language.md", "adding_a_task.md"}
LLMS = ("LLM", "A", "B", "meta-math/MetaMath-7B-V1.0")
CHAT_MODELS = ("rombodawg/rombos_Replete-Coder-Llama3-8B", "TIGER-Lab/MAmmoTH2-8B")
MTS = ("MT", "google/mt5-xl")
TEXTS = ("a.jsonl", "b.jsonl", "data.jsonl", "Replete-AI/code_bagel_hermes-2.5", "TIGER-Lab/WebInstructSub")
COLUMNS = ("text", "question", "answer", "instruction", "input", "output")
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
# Appended to a command that runs: the last of two flags counts.
SMALL = {
    "run_training.py": "--overwrite --dev_size 4 --epoch_num 1",
    "run_evaluation.py": "--overwrite --test_num 1 --max_gen_len 4",
    "compute_gram.py": "--overwrite --dtype float32",
    "benchmarks.mapping_control": "--train_num 12 --dev_size 4 --translations 1",
}
# Flags on pages that belong to other programs, or stand for any flag.
FOREIGN = {
    *("--num_gpus", "--node_rank", "--no_ssh", "--master_addr", "--hypothesis-profile", "--help", "--config"),
    *("--apply_chat_template", "--batch_size", "--metadata", "--no-deps", "--num_accelerators", "--index-url"),
    *("--model", "--model_args", "--tasks", "--include_path", "--log_samples", "--confirm_run_unsafe_code", "--logdir"),
    "--master_port",
}


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with all inputs of the commands."""
    from mindmerger.config import ModelPair
    from mindmerger.modeling import MindMergerForCausalLM, mapping_config

    folder = tmp_path_factory.mktemp("material")
    tiny_models.tiny_llama(folder / "LLM")
    tiny_models.tiny_mt5(folder / "MT")
    for seed, name in enumerate((*LLMS[1:], *CHAT_MODELS)):
        shutil.copytree(folder / "LLM", folder / name)
        weights = load_file(folder / name / "model.safetensors")
        torch.manual_seed(seed)
        changed = {key: tensor + 0.01 * torch.randn_like(tensor) for key, tensor in weights.items()}
        save_file(changed, folder / name / "model.safetensors", {"format": "pt"})
    for name in ("LORA_A", "LORA_B"):
        settings = {"peft_type": "LORA", "base_model_name_or_path": "LLM"}
        write_lines(folder / name / "adapter_config.json", [json.dumps(settings)])
        factors = {f"model.layers.0.self_attn.q_proj.lora_{part}.weight": torch.ones(32, 32) for part in "AB"}
        save_file(factors, folder / name / "adapter_model.safetensors")
    for name in ("B", *CHAT_MODELS):
        (folder / name / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    shutil.copytree(folder / "MT", folder / MTS[1])
    write_datas(folder / "datas")
    topics = [json.dumps({"text": sentence("German", n), "category": "travel"}) for n in range(ROWS)]
    for code in ("de", "sw", "en"):
        write_lines(folder / f"datas/query_translation/sib200/train_{code}.jsonl", topics)
        write_lines(folder / f"datas/evaluation/sib200/test_{code}.jsonl", topics[:2])
    rows = [json.dumps({column: f"{sentence('English', n)} {column}" for column in COLUMNS}) for n in range(10)]
    for name in TEXTS:
        write_lines(folder / name if name.endswith(".jsonl") else folder / name / "train.jsonl", rows)
    (folder / "gram.pkl").write_bytes(pickle.dumps({"model.layers.0.mlp.down_proj": torch.eye(64)}))

    with contextlib.chdir(folder):
        model = MindMergerForCausalLM.from_base_models(mapping_config(ModelPair(llm_path="LLM", mt_path="MT"), 1))
        for stage in ("mapping", "augmentation"):
            model.config.task, model.config.stage, model.config.augmentation = "math", stage, stage != "mapping"
            model.save_pretrained(folder / "outputs/MergeMinds" / stage)
        shutil.copyfile("outputs/MergeMinds/augmentation/pytorch_model.bin", "outputs/MergeMinds/pytorch_model.bin")
    return folder


def make_world(folder: Path, page: Path, material: Path | None = None, copy_code: bool = False) -> None:
    """Fill `folder` with the repository, the page's own files and, if commands are to run, their inputs."""
    skip = {".git", "outputs", "results", "runs", "datas", ".venv"}
    for path in REPOSITORY.iterdir():
        if copy_code and path.name == "mindmerger":
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.name not in skip:
            (folder / path.name).symlink_to(path)
    for block in blocks(page):
        if block.language in ("yaml", "text") and (named := re.match(r"# ([\w.-]+)\n", block.text)):
            (folder / named[1]).write_text(block.text)
    if material is not None:
        for path in material.iterdir():
            # A run may write to outputs/ and datas/; the rest is only read.
            if path.name in ("outputs", "datas"):
                shutil.copytree(path, folder / path.name)
            else:
                (folder / path.name).symlink_to(path)


def run_page(page: Path) -> None:
    """Run, in the current folder and in order, all of a page's commands and Python that can run here."""
    done: list[list[str]] = []
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.needs:
            continue
        if block.language == "python":
            exec(compile(block.text, block.place, "exec"), names)
        for words in commands(block.text) if block.language == "bash" else []:
            if words not in done:
                done.append(words)
                print(f"--- {block.place}: {' '.join(words)}", flush=True)
                small = next((more.split() for name, more in SMALL.items() if name in words), [])
                run(words + ([] if "convert" in words else small))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    make_world(tmp_path, page)
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        assert block.needs <= NEEDS.keys(), f"{block.place}: needs {block.needs - NEEDS.keys()}; known: {list(NEEDS)}"
        if block.language == "bash":
            syntax = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
            assert syntax.returncode == 0, f"{block.place}: {syntax.stderr}"
            for words in commands(block.text):
                try:
                    check(words)
                except SystemExit as error:
                    message = capsys.readouterr().err
                    # An optional package is not installed, and the program's message has the command for it.
                    if "package" not in block.needs or "pip install" not in message:
                        raise AssertionError(f"{block.place}: {' '.join(words)}: {message}") from error


@pytest.mark.parametrize(
    "line",
    [
        "python run_evaluation.py --baselin --llm_path LLM",
        "python run_evaluation.py --llm_path LLM --mt_path MT",
        "python merge_model.py average",
        "python -m benchmarks.quickstart",
        "python run_evaluation.py --config configs/evaluation/mgms.yaml",
        "deepspeed --num_gpu_s 8 run_training.py --deepspeed --llm_path LLM --mt_path MT",
        "deepspeed --num_gpus 3 run_training.py --llm_path LLM --mt_path MT --train_batch_size 128",
        "srun bash -c 'torchrun --nproc_per_node 2 compute_gram.py --model A'",
        "export X=1; if true; then run_training.py; fi",
        "make quickstarts",
    ],
)
def test_a_wrong_command_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises((AssertionError, SystemExit)):
        for words in commands(line):
            check(words)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in CHANGING], ids=lambda page: page.name)
def test_what_can_run_runs(page: Path, tmp_path: Path, material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_world(tmp_path, page, material)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets_cache"))
    run_page(page)


def test_a_language_and_a_task_are_added_as_the_pages_say(tmp_path: Path, material: Path) -> None:
    """Both pages are tested in one copy of the code and in a process that imports only this copy."""
    pages = [REPOSITORY / "docs" / name for name in sorted(CHANGING)]
    make_world(tmp_path, pages[0], material, copy_code=True)
    for page in pages:
        for block in blocks(page):
            if block.language == "diff":
                apply(block.text, tmp_path)
    add_korean(tmp_path / "datas")
    program = "import sys, pathlib, tests.test_docs as t; [t.run_page(pathlib.Path(p)) for p in sys.argv[1:]]"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, pages)],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    for name, task, languages in (
        ("with-korean", "mgsm", ["Korean", "German", "Swahili"]),
        ("topics", "sib200", ["German", "Swahili", "English"]),
    ):
        scores = json.loads((tmp_path / "results" / name / task / "scores.json").read_text())
        assert list(scores["languages"]) == languages
    assert (tmp_path / "outputs/with-korean/mapping/model.safetensors").exists()
    record = json.loads((tmp_path / "outputs/topics/augmentation/config.json").read_text())
    assert record["prompt"] == "Text: {text}\nTopic:"


def apply(diff: str, root: Path) -> None:
    """Apply a diff without line numbers: its context must occur in the file exactly once, or the file is new."""
    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        name, _, hunks = part.partition("\n")
        path = root / name
        if not path.exists():
            assert all(line.startswith("+") for line in hunks.splitlines()), f"there is no {name}"
            path.write_text("".join(f"{line[1:]}\n" for line in hunks.splitlines()))
            continue
        for hunk in hunks.split("@@\n"):
            lines = [line or " " for line in hunk.splitlines()]
            before = "\n".join(line[1:] for line in lines if line[0] in " -")
            after = "\n".join(line[1:] for line in lines if line[0] in " +")
            text = path.read_text()
            assert text.count(f"\n{before}\n") == 1, f"{name} has not, or more than once:\n{before}"
            path.write_text(text.replace(f"\n{before}\n", f"\n{after}\n"))


def add_korean(datas: Path) -> None:
    """Write the files that the page requires."""
    pairs = datas / "bilingual_pairs/en-ko"
    write_lines(pairs / "train_100k.ko", [sentence("Korean", n) for n in range(ROWS)])
    write_lines(pairs / "train_100k.en", [sentence("English", n) for n in range(ROWS)])
    queries = datas / "query_translation/math.json"
    rows = json.loads(queries.read_text())
    rows += [{"query": sentence("Korean", n), "response": f"The answer is: {n}", "lang": "Korean"} for n in range(ROWS)]
    queries.write_text(json.dumps(rows))
    write_lines(datas / "evaluation/mgsm/mgsm_ko.tsv", [f"{sentence('Korean', 1)}\t3"])
    problem = {"m_query": sentence("Korean", 1), "response": "3"}
    write_lines(datas / "evaluation/msvamp/test_Korean.jsonl", [json.dumps(problem)])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_files_and_flags_in_the_text_exist(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        path = (page.parent / target) if target else page
        assert path.exists(), f"{page.name}: there is no {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, (target, anchor)
    spans = re.findall(r"`([^`\n]+)`", text)
    assert not (missing := [path for span in spans for path in missing_paths(span)]), f"{page.name}: {missing}"
    for file, test in re.findall(r"`(test_\w+\.py)::(test_\w+)`", text):
        assert any(f"def {test}(" in path.read_text() for path in REPOSITORY.glob(f"tests/**/{file}")), (file, test)
    named = {flag for span in spans for flag in re.findall(r"(?<![\w-])--\w[\w-]*", span)}
    assert not (unknown := named - our_flags() - FOREIGN), f"{page.name}: no program has {sorted(unknown)}"


@cache
def our_flags() -> set[str]:
    """All flags of all programs here."""
    sources = [path for pattern in ("*.py", "[!.t]*/*.py", "tools/*.py") for path in REPOSITORY.glob(pattern)]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    dataclass_fields = re.findall(r"^    (\w+): .* = flag\(", text, flags=re.MULTILINE)
    return {f"--{name}" for name in dataclass_fields} | set(re.findall(r'add_argument\("(--\w+)"', text))
