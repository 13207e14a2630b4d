"""The layout from local copies of the public data sets, in their real schemas, and from a simulated hub."""

import gzip
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Translation, Value

from common.cli import parse_flags
from common.errors import InputError
from common.io import read_json, sha256, write_json
from mindmerger.data import read_evaluation, read_training
from mindmerger.tasks import EVALUATION_TASKS, LANGUAGES, TRAINING_TASKS
from tests.conftest import REPOSITORY
from tests.mindmerger.datas import write_lines
from tests.mindmerger.scripts import ENVIRONMENT
from tools import sources
from tools.prepare_data import (
    PrepareDataFlags,
    clean_pairs,
    prepare,
    sentence_key,
    translated_questions,
)
from tools.sources import SOURCES

X_CSQA_FEATURES = Features(
    {
        "id": Value("string"),
        "lang": Value("string"),
        "question": {"stem": Value("string"), "choices": Sequence({"label": Value("string"), "text": Value("string")})},
        "answerKey": Value("string"),
    }
)
XNLI_FEATURES = Features(
    {
        "premise": Value("string"),
        "hypothesis": Value("string"),
        "label": ClassLabel(names=["entailment", "neutral", "contradiction"]),
    }
)
CODES = ("de", "sw", "ja", "en")
QUESTION = "Wie viele {} hat Anna, wenn sie zwei davon isst?"


def prompt(language: str, question: str) -> str:
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request in "
        f"{language}. Please answer in {language}.\n\n### Instruction:\n{question}\n\n### Response:"
    )


def x_csqa(code: str, numbers: range) -> list[dict]:
    return [
        {
            "id": f"{n}",
            "lang": code,
            "question": {
                "stem": f"{code} Frage {n}?",
                "choices": {"label": list("ABCDE"), "text": [f"Ort {n} {letter}" for letter in "ABCDE"]},
            },
            "answerKey": "ABCDE"[n % 5],
        }
        for n in numbers
    ]


def xnli(code: str, numbers: range) -> list[dict]:
    return [{"premise": f"{code} premise {n}", "hypothesis": "Yes.", "label": n % 3} for n in numbers]


def write_parquet(path: Path, rows: list[dict], features: Features | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=features).to_parquet(path)


@pytest.fixture(scope="module")
def local_copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All sources in four languages, each with some rows that must be dropped."""
    root = tmp_path_factory.mktemp("sources")
    for code in CODES:
        language = next(language for language in LANGUAGES.values() if language.code == code)
        questions = [f"{language.name} {QUESTION.format(n)}\t1,00{n}" for n in range(3)]
        write_lines(root / "juletxara/mgsm" / f"mgsm_{code}.tsv", questions)
        rows = [{"m_query": f"{language.name} msvamp {n}", "response": f"{n}.0", "equation": "-"} for n in range(3)]
        write_lines(root / "Mathoctopus/MSVAMP" / f"test_{language.name}.json", [json.dumps(row) for row in rows])

        folder = root / "INK-USC/xcsr" / f"X-CSQA-{'jap' if code == 'ja' else code}"
        write_parquet(folder / "validation-00000-of-00001.parquet", x_csqa(code, range(3)), X_CSQA_FEATURES)
        if code != "ja":
            folder = root / "facebook/xnli" / code
            write_parquet(folder / "test-00000-of-00001.parquet", xnli(code, range(4)), XNLI_FEATURES)
            # Row 3 is a test problem, too.
            write_parquet(folder / "validation-00000-of-00001.parquet", xnli(code, range(3, 6)), XNLI_FEATURES)
        if code in ("de", "ja"):
            pair = "-".join(sorted((code, "en")))
            pairs = [{code: f"{code} Satz Nummer {n}", "en": f"english sentence number {n}"} for n in range(6)]
            pairs[1:1] = [
                pairs[0],
                {code: "!!!", "en": "what?"},
                {code: "München", "en": "MÜNCHEN"},
                {code: "ein Satz", "en": "word " * 200},
                {code: f"{language.name} msvamp 2", "en": "a question of the evaluation"},
            ]
            features = Features({"translation": Translation([code, "en"])})
            folder = root / "Helsinki-NLP/opus-100" / pair
            write_parquet(folder / "train-00000-of-00001.parquet", [{"translation": p} for p in pairs], features)

    # Row 1 is a dev problem, too.
    write_parquet(
        root / "INK-USC/xcsr/X-CSQA-en/train-00000-of-00001.parquet", x_csqa("en", range(2, 6)), X_CSQA_FEATURES
    )
    instruct = []
    for n in range(20):
        steps = f"Anna hat {n} + 2 = <<{n}+2={n + 2}>>{n + 2}.\n#### {n + 2}"
        instruct.append({"prompt": prompt("English", f"How many of {n}?"), "chosen": steps})
        for name in ("German", "Swahili", "Japanese", "Telugu"):
            wrong = name == "German" and n == 7
            instruct.append(
                {
                    "prompt": prompt(name, f"{name} question {n}?"),
                    "chosen": f"7\n#### {'99' if wrong else n + 2}",
                }
            )
    instruct.append({"prompt": prompt("Swahili", f"Swahili {QUESTION.format(1)}"), "chosen": "#### 21"})
    folder = root / "Mathoctopus/GSM8KInstruct_Parallel"
    write_lines(folder / "MGSM8KInstruct_Parallel.json", [json.dumps(row) for row in instruct])
    metamath = [{"query": f"MetaMath {n}?", "response": f"So.\nThe answer is: {n}"} for n in (0, 1, 1, 2)]
    write_lines(root / "meta-math/MetaMathQA/MetaMathQA-395K.json", [json.dumps(metamath)])

    path = root / "allenai/nllb/eng_Latn-swh_Latn.gz"
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for n in range(6):
            file.write(f'an "english line {n}\tmstari wa kiswahili\u2028 {n}\t1.2{n}\t0.9\t\tcrawl\n')
    return root


def run(*words: object) -> None:
    prepare(parse_flags(PrepareDataFlags, [str(word) for word in words]))


@pytest.fixture(scope="module")
def built(local_copies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "datas"
    words = ("--languages", "de,sw,ja,en", "--train_num", 4, "--check_counts", "False")
    run("--output_dir", folder, "--source_dir", local_copies, *words)
    return folder


def test_what_is_built_is_what_training_and_evaluation_read(built: Path) -> None:
    languages = tuple(LANGUAGES[name] for name in ("German", "Swahili", "Japanese"))
    for name in ("mgsm", "msvamp", "x-csqa"):
        rows = read_evaluation(built, EVALUATION_TASKS[name], (*languages, LANGUAGES["English"]))
        assert [len(problems) for problems in rows.values()] == [3] * 4
    german = read_evaluation(built, EVALUATION_TASKS["mgsm"], languages)[LANGUAGES["German"]]
    assert (german[1].source.text, german[1].target) == (f"German {QUESTION.format(1)}", "1,001")
    xnli_test = read_evaluation(built, EVALUATION_TASKS["xnli"], (LANGUAGES["Swahili"],))[LANGUAGES["Swahili"]]
    assert [row.target for row in xnli_test] == ["entailment", "neutral", "contradiction", "entailment"]

    pairs = list(read_training(built, TRAINING_TASKS["math"], "mapping", languages, 100))
    assert [len([row for row in pairs if row.language == language]) for language in languages] == [4, 4, 4]
    swahili = next(row for row in pairs if row.language.code == "sw")
    assert (swahili.source.text, swahili.target) == ("mstari wa kiswahili\u2028 0", 'an "english line 0')

    math = list(read_training(built, TRAINING_TASKS["math"], "augmentation", None, 100))
    counts = {name: sum(row.language.name == name for row in math) for name in ("German", "Swahili", "English")}
    assert counts == {"German": 19, "Swahili": 20, "English": 23}
    german = next(row for row in math if row.language.code == "de")
    assert german.source.text == "German question 0?"
    assert german.target == "Anna hat 0 + 2 = 2.\nThe answer is: 2"

    rows = list(read_training(built, TRAINING_TASKS["x-csqa"], "augmentation", (LANGUAGES["English"],), 100))
    assert [row.source.query for row in rows] == [f"en Frage {n}?" for n in (3, 4, 5)]
    rows = list(read_training(built, TRAINING_TASKS["xnli"], "augmentation", None, 100))
    assert len(rows) == 3 * 2


def test_questions_and_their_translations_are_pairs_too(local_copies: Path, tmp_path: Path) -> None:
    words = ("--source_dir", local_copies, "--languages", "de,sw", "--check_counts", "False", "--pairs", "questions")
    run("--output_dir", tmp_path / "datas", "--task", "math", *words)
    languages = (LANGUAGES["German"], LANGUAGES["Swahili"])
    pairs = list(read_training(tmp_path / "datas", TRAINING_TASKS["math"], "mapping", languages, 100))
    assert [(row.source.text, row.target) for row in pairs if row.language.code == "de"] == [
        (f"German question {n}?", f"How many of {n}?") for n in range(20) if n != 7
    ]
    # The additional row in Swahili is an evaluation question.
    assert sum(row.language.code == "sw" for row in pairs) == 20
    with pytest.raises(InputError, match="--pairs questions are GSM8K's: use --task math, not xnli"):
        run("--output_dir", tmp_path / "other", "--task", "xnli", *words)


def test_the_manifest_counts_what_was_left_out(built: Path) -> None:
    files = read_json(built / "manifest.json")["files"]
    on_disk = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()} - {"manifest.json"}
    assert set(files) == on_disk
    assert all(entry["sha256"] == sha256(built / name) for name, entry in files.items())

    pairs = files["bilingual_pairs/en-de/train_100k.de"]
    assert pairs["dropped"] == {
        "duplicate(s)": 1,
        "of unlikely length": 2,
        "not translated": 1,
        "evaluation question(s)": 1,
    }
    assert pairs["rows"] == 4
    assert pairs["sources"] == [
        {
            "dataset": "Helsinki-NLP/opus-100",
            "revision": None,
            "files": ["de-en/train-00000-of-00001.parquet"],
            "licence": "unknown",
            "rows_read": 9,
        }
    ]
    math = files["query_translation/math.json"]
    assert math["dropped"] == {
        "whose answer is not the English one": 1,
        "evaluation question(s)": 1,
        "duplicate(s)": 1,
    }
    assert [source["dataset"] for source in math["sources"]] == [
        "Mathoctopus/GSM8KInstruct_Parallel",
        "meta-math/MetaMathQA",
    ]
    assert files["query_translation/xnli_dev.json"]["dropped"] == {"evaluation question(s)": 3}
    assert files["query_translation/x-csqa/train_en.jsonl"]["dropped"] == {"evaluation question(s)": 1}


def test_nothing_of_the_evaluation_is_in_training(built: Path) -> None:
    questions = {
        sentence_key(row.source.query)
        for name in EVALUATION_TASKS
        for language in (LANGUAGES[name] for name in ("German", "Swahili", "English"))
        for row in read_evaluation(built, EVALUATION_TASKS[name], (language,))[language]
    }
    languages = (LANGUAGES["German"], LANGUAGES["Swahili"])
    for task in TRAINING_TASKS.values():
        rows = list(read_training(built, task, "mapping", languages, 100))
        assert not any(sentence_key(text) in questions for row in rows for text in (row.source.text, row.target))
    rows = list(read_training(built, TRAINING_TASKS["math"], "augmentation", None, 100))
    assert not any(sentence_key(row.source.query) in questions for row in rows)


def test_what_is_done_stays_and_other_folders_are_refused(
    local_copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--task", "xnli", "--languages", "de", "--source_dir", local_copies, "--check_counts", "False")
    folder = tmp_path / "datas"
    run("--output_dir", folder, *words)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    (folder / "query_translation/xnli_dev.json").write_text("[]")
    run("--output_dir", folder, *words)
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"xnli_dev.json", "manifest.json"}

    # As before the choice of pairs was added.
    manifest = read_json(folder / "manifest.json")
    del manifest["settings"]["pairs"]
    write_json(folder / "manifest.json", manifest)
    run("--output_dir", folder, *words)

    with pytest.raises(InputError, match="other settings"):
        run("--output_dir", folder, *words, "--train_num", 3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(InputError, match="not from this command"):
        run("--output_dir", tmp_path / "mine", *words)


def test_a_source_is_as_published_or_refused(local_copies: Path, tmp_path: Path) -> None:
    words = ("--task", "math", "--languages", "de", "--output_dir", tmp_path / "datas", "--source_dir")
    with pytest.raises(InputError, match=r"mgsm_de.tsv: 3 rows, but 250 are published"):
        run(*words, local_copies)
    assert not (tmp_path / "datas").exists()

    spoilt = tmp_path / "spoilt"
    with pytest.raises(InputError, match=r"juletxara/mgsm: no such folder.*hf download juletxara/mgsm"):
        run(*words, spoilt)
    write_lines(spoilt / "juletxara/mgsm/README.md", ["nothing"])
    with pytest.raises(InputError, match=r"has no file de/test-\*.parquet or mgsm_de.tsv"):
        sources._repository.cache_clear()
        run(*words, spoilt)
    write_lines(spoilt / "juletxara/mgsm/mgsm_de.tsv", ["Wie viele?\t18", "Und jetzt?"])
    sources._repository.cache_clear()
    with pytest.raises(InputError, match=r"mgsm_de.tsv, row 2: not the published schema of juletxara/mgsm"):
        run(*words, spoilt)
    (spoilt / "juletxara/mgsm/mgsm_de.tsv").write_bytes(b"Wie viele\xff?\t18\n")
    with pytest.raises(InputError, match=r"mgsm_de.tsv, row 0: cannot be read"):
        run(*words, spoilt)


def test_rows_of_the_converted_mgsm_are_the_published_ones() -> None:
    row = {"question": "Wie\tviele?\n", "answer": None, "answer_number": 18, "equation_solution": None}
    assert sources.mgsm(row, LANGUAGES["German"]) == "Wie viele?\t18"


def test_real_files_come_through_unchanged(shared_datas: Path, tmp_path: Path) -> None:
    evaluation = shared_datas / "evaluation"
    copies = {f"juletxara/mgsm/{path.name}": path for path in (evaluation / "mgsm").iterdir()}
    copies |= {f"Mathoctopus/MSVAMP/{path.stem}.json": path for path in (evaluation / "msvamp").iterdir()}
    for name, path in copies.items():
        (tmp_path / "sources" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sources" / name).symlink_to(path)
    for name, source in (("mgsm", "mgsm"), ("msvamp", "msvamp")):
        for language in EVALUATION_TASKS[name].languages:
            file = "mgsm_{0.code}.tsv" if name == "mgsm" else "test_{0.name}.jsonl"
            original = evaluation / name / file.format(language)
            if not original.exists():
                continue
            rows = list(sources.Reading(SOURCES[source], language, tmp_path / "sources"))
            if name == "mgsm":
                assert "".join(f"{row}\n" for row in rows).split() == original.read_text(encoding="utf-8").split()
            else:
                lines = [json.loads(line) for line in original.read_text(encoding="utf-8").splitlines()]
                assert rows == [{"m_query": line["m_query"].strip(), "response": line["response"]} for line in lines]


def test_a_translation_needs_the_answer_of_the_english_row() -> None:
    rows = [("English", f"q{n}", f"{n} apples\n#### 1,{n:03}") for n in range(30)]
    in_order = [row for english in rows for row in (english, ("German", f"de {english[1]}", english[2]))]
    kept, dropped = translated_questions(in_order)
    assert len(kept) == 60 and not dropped
    assert kept[1] == {"query": "de q0", "response": "0 apples\nThe answer is: 1000", "lang": "German"}

    german = [("German", f"de {question}", text) for _, question, text in rows]
    with pytest.raises(InputError, match="only 1 of 30 translated solutions"):
        translated_questions(rows + german)
    kept, dropped = translated_questions([("English", "q", "No number."), ("German", "q", "#### 1"), *in_order])
    assert len(kept) == 60 and dropped == {"without an English answer": 2}


def test_spelling_hides_no_question() -> None:
    assert sentence_key("Ｈow many－ apples?") == sentence_key("how  many apples")
    assert sentence_key("कितने") != sentence_key("कतन")
    kept, dropped = clean_pairs([("Wie viele Äpfel?!", "fine text")], {sentence_key("wie viele äpfel")}, 5)
    assert not kept and dropped == {"evaluation question(s)": 1}


@pytest.fixture
def played_hub(local_copies: Path) -> Iterator[str]:
    """The used part of the hub's HTTP interface, over the local copies."""
    commit = "0123456789abcdef0123456789abcdef01234567"

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            words = path.strip("/").split("/")
            if path.startswith("/api/datasets/") and len(words) in (4, 6):
                folder = local_copies / "/".join(words[2:4])
                names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
                siblings = [{"rfilename": name} for name in names]
                self.answer(json.dumps({"id": "/".join(words[2:4]), "sha": commit, "siblings": siblings}).encode())
            elif path.startswith("/api/datasets/") and words[4] == "tree":
                folder = local_copies / "/".join(words[2:4])
                files = sorted((folder / "/".join(words[6:])).iterdir())
                names = [file.relative_to(folder).as_posix() for file in files]
                sizes = [file.stat().st_size for file in files]
                entries = [
                    {"type": "file", "path": name, "size": size, "oid": "0"}
                    for name, size in zip(names, sizes, strict=True)
                ]
                self.answer(json.dumps(entries).encode())
            elif path.startswith("/datasets/") and words[3] == "resolve" and words[4] == commit:
                self.answer((local_copies / "/".join(words[1:3]) / "/".join(words[5:])).read_bytes(), commit)
            else:
                self.send_error(404)

        def answer(self, content: bytes, commit: str | None = None) -> None:
            start, end = 0, len(content) - 1
            if self.headers.get("Range"):
                first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                start, end = int(first), min(end, int(last)) if last else end
            self.send_response(206 if self.headers.get("Range") else 200)
            self.send_header("Content-Length", str(end + 1 - start))
            self.send_header("ETag", '"0"')
            if commit:
                self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[start : end + 1])

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_hub_is_read_through_the_same_code(played_hub: str, tmp_path: Path) -> None:
    words = ["--task", "xnli", "--languages", "de", "--check_counts", "False", "--train_num", "4"]
    environment = ENVIRONMENT | {"HF_ENDPOINT": played_hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "tools.prepare_data", "--output_dir", str(tmp_path / "datas"), *words],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "query_translation/xnli_dev.json: 2 rows, left out: 1 evaluation question(s)" in done.stdout
    files = read_json(tmp_path / "datas/manifest.json")["files"]
    assert files["evaluation/xnli/test.json"]["rows"] == 4
    assert {source["revision"] for entry in files.values() for source in entry["sources"]} == {
        "0123456789abcdef0123456789abcdef01234567"
    }
    assert (tmp_path / "datas/bilingual_pairs/en-de/train_100k.de").read_text().splitlines()[0] == "de Satz Nummer 0"
