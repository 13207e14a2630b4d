"""Readers of files from other programs, on damaged files: each file is read or refused by an InputError.

About fifteen hundred cases; `pytest tests/test_fuzz.py --hypothesis-profile thorough` runs 45 times as many.
"""

import io
import json
import pickle
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from common.cli import parse_flags
from common.errors import InputError
from mindmerger.checkpoint import mapping_shapes, read_mapping, write_mapping
from mindmerger.config import EvaluationFlags, TrainingFlags
from mindmerger.data import read_evaluation, read_training
from mindmerger.evaluation.answerer import trained_models
from mindmerger.tasks import EVALUATION_TASKS, LANGUAGES, TRAINING_TASKS, select_languages
from regmean.adapter_folder import base_of, open_models, read_settings
from regmean.config import GramFlags, MergeFlags
from regmean.gram_file import Gram, open_grams, write_grams
from regmean.merge_plan import plan_merge
from regmean.model_folder import base_vocabulary, open_checkpoint
from regmean.report import Provenance, model_card
from tests.mindmerger.datas import write_datas

ROOM = 4 << 30


@pytest.fixture(autouse=True, scope="module")
def little_memory() -> Iterator[None]:
    """Limit the memory, so that a file with a huge declared size fails the test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# Values are damaged with Python's random generator, for which Hypothesis draws the seed. This is ten times as fast as
# Hypothesis's own draws and equally repeatable.
seeds = st.randoms(use_true_random=True, note_method_calls=False)
ODD_TEXTS = (
    "",
    "\0",
    "\ud800",
    "../../etc/passwd",
    "/etc/passwd",
    "x" * 300,
    "9" * 5000,
    "\u2028",
    "a\rb",
    "`|<b>",
    "de",
    "é",
)
ODD_NUMBERS = (-1, 0, 1, 3, 2**31, 2**63, 10**30, 10**4000, 0.5, -0.0, 1e300, float("nan"), float("inf"))
ODD_BYTES = (b"[" * 20_000, b"9" * 5000, b"\xff\xfe", b"NaN", b"\n", b"\0", b'"', b"{}", b"\r\n")


def odd_value(random: Random, depth: int = 0) -> Any:
    """A JSON value to damage a field of a file with."""
    kind = random.randrange(6 if depth < 3 else 4)
    if kind == 0:
        return random.choice((None, True, False))
    if kind == 1:
        return random.choice((*ODD_NUMBERS, random.randrange(100)))
    if kind < 4:
        return random.choice(
            (*ODD_TEXTS, "".join(chr(random.randrange(1, 0x3000)) for _ in range(random.randrange(9))))
        )
    inner = [odd_value(random, depth + 1) for _ in range(random.randrange(4))]
    return inner if kind == 4 else {random.choice(ODD_TEXTS): item for item in inner}


def spoilt_bytes(whole: bytes) -> st.SearchStrategy[bytes]:
    """`whole` with a few bytes flipped, set, cut out, put in or repeated."""

    def spoil(random: Random) -> bytes:
        content = bytearray(whole)
        for _ in range(random.randint(1, 4)):
            start = random.randint(0, len(content))
            stop = min(len(content), start + random.randint(1, 40))
            kind = random.randrange(6)
            if kind == 0 and start < len(content):
                content[start] ^= 1 << random.randrange(8)
            elif kind == 1:
                content[start:stop] = bytes([random.choice((0, 0xFF, 0x72, 0x8A, 0x7F))]) * (stop - start)
            elif kind == 2:
                del content[start:stop]
            elif kind == 3:
                content[start:start] = random.choice((*ODD_BYTES, random.randbytes(random.randrange(20))))
            elif kind == 4:
                content[start:start] = content[start:stop] * random.randint(1, 20)
            else:
                del content[start:]
        return bytes(content)

    return seeds.map(spoil)


def paths_in(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of all values in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, item in inner for deeper in paths_in(item, (*path, key)))]


def spoilt_json(whole: Any) -> st.SearchStrategy[Any]:
    """`whole` with values replaced, removed or renamed."""

    def spoil(random: Random) -> Any:
        content = json.loads(json.dumps(whole))
        for _ in range(random.randint(1, 3)):
            path = random.choice(paths_in(content))
            if not path:
                content = odd_value(random) if random.random() < 0.1 else content
                continue
            parent = content
            for key in path[:-1]:
                parent = parent[key]
            kind = random.randrange(4)
            if kind < 2:
                parent[path[-1]] = odd_value(random)
            elif kind == 2 or isinstance(parent, list):
                del parent[path[-1]]
            else:
                parent[random.choice(ODD_TEXTS)] = parent.pop(path[-1])
        return content

    return seeds.map(spoil)


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def spoilt_file(whole: bytes) -> st.SearchStrategy[bytes]:
    """A JSON file, damaged as bytes or as a value."""
    return st.one_of(spoilt_bytes(whole), spoilt_json(json.loads(whole)).map(dumps))


def try_reading(folder: Path, read: Callable[[], Any]) -> None:
    """Assert that the file is read or refused by an InputError, and that nothing is written."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    try:
        read()
    except InputError as error:
        assert str(error)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


GERMAN = (LANGUAGES["German"],)
DATA_FILES: dict[str, Callable[[Path], Any]] = {
    "bilingual_pairs/en-de/train_100k.de": lambda d: list(
        read_training(d, TRAINING_TASKS["math"], "mapping", GERMAN, 9)
    ),
    "query_translation/math.json": lambda d: list(read_training(d, TRAINING_TASKS["math"], "augmentation", GERMAN, 9)),
    "query_translation/x-csqa/train_de.jsonl": lambda d: list(
        read_training(d, TRAINING_TASKS["x-csqa"], "augmentation", GERMAN, 9)
    ),
    "query_translation/xnli_dev.json": lambda d: list(
        read_training(d, TRAINING_TASKS["xnli"], "augmentation", GERMAN, 9)
    ),
    "evaluation/mgsm/mgsm_de.tsv": lambda d: read_evaluation(d, EVALUATION_TASKS["mgsm"], GERMAN),
    "evaluation/msvamp/test_German.jsonl": lambda d: read_evaluation(d, EVALUATION_TASKS["msvamp"], GERMAN),
}


@pytest.mark.parametrize("name", DATA_FILES)
def test_data_files(tmp_path: Path, name: str) -> None:
    write_datas(tmp_path / "all")
    datas = tmp_path / "datas"
    shutil.copytree((tmp_path / "all" / name).parent, (datas / name).parent)
    path, whole = datas / name, (datas / name).read_bytes()
    lines = whole.split(b"\n")
    strategy = spoilt_bytes(whole)
    if name.endswith(".json"):
        few = json.dumps(json.loads(whole)[:3]).encode()
        strategy |= spoilt_json(json.loads(few)).map(dumps)
    elif name.endswith(".jsonl"):
        strategy |= spoilt_json(json.loads(lines[0])).map(lambda row: dumps(row) + b"\n" + lines[1])

    @settings()
    @given(strategy)
    def check(content: bytes) -> None:
        path.write_bytes(content)

        def read() -> None:
            found = DATA_FILES[name](datas)
            # The value can be written to a digest and to a file.
            rows = found if isinstance(found, list) else [row for rows in found.values() for row in rows]
            assert rows and all(row.location and (row.source.text + row.target).encode() for row in rows)

        try_reading(datas, read)

    check()


FLAGS = {
    "training": (
        TrainingFlags,
        {"llm_path": "L", "mt_path": "M", "train_batch_size": 8, "warmup_ratio": 0.1, "lr": 1e-3, "languages": ["de"]},
    ),
    "evaluation": (EvaluationFlags, {"llm_path": "L", "baseline": True, "test_num": 3, "task": "mgsm,xnli"}),
    "gram": (GramFlags, {"model": "M", "dataset": "d.jsonl", "text_column": "text", "output_dir": "o"}),
    "merge": (
        MergeFlags,
        {"method": "regmean", "models": ["a", "b"], "grams": ["a", "b"], "alpha": [0.1], "include": ["mlp"]},
    ),
}


def use_flags(flags: Any) -> None:
    """Use flags as a script does before it reads a file."""
    if isinstance(flags, MergeFlags):
        flags.weights(), flags.output_dirs(), flags.selects("model.layers.0.mlp.up_proj.weight")
    if isinstance(flags, TrainingFlags | EvaluationFlags):
        select_languages(flags.languages)
        Path("outputs", flags.save_name).exists()


@pytest.mark.parametrize("script", FLAGS)
def test_flags(tmp_path: Path, script: str) -> None:
    flags_class, whole = FLAGS[script]
    names = [f"--{name}" for name in flags_class.__dataclass_fields__]
    given_once = {name: str(value) for name, value in whole.items() if not isinstance(value, list)}
    words = [word for name, value in given_once.items() for word in (f"--{name}", value)]
    odd = [
        "nan",
        "inf",
        "-1",
        "0",
        "True",
        "--",
        "-h=",
        "--lr=",
        "(((",
        "(?P<a>",
        "a{9999999999999}",
        "[" * 4000,
        "de,xx",
    ]
    numbers = [f"{number:.5g}" if isinstance(number, float) else hex(number) for number in ODD_NUMBERS]
    word = st.one_of(st.sampled_from(names), st.sampled_from([*odd, *numbers, *ODD_TEXTS]), st.text(max_size=20))

    @settings()
    @given(st.lists(word, max_size=4), st.integers(0, 20))
    def check(more: list[str], place: int) -> None:
        line = [*words[:place], *more, *words[place:]]
        # --help ends a script.
        if not any(word.startswith(("--config", "--help", "-h")) for word in line):
            try_reading(tmp_path, lambda: use_flags(parse_flags(flags_class, line)))

    check()


def tensor_file() -> bytes:
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.ones(3, 2), "b": torch.zeros(4, dtype=torch.bfloat16)}
    return save(tensors, metadata={"format": "pt"})


def split_header(whole: bytes) -> tuple[Any, bytes]:
    (length,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def with_header(header: Any, data: bytes) -> bytes:
    text = dumps(header)
    return struct.pack("<Q", len(text)) + text + data


def spoilt_safetensors(whole: bytes) -> st.SearchStrategy[bytes]:
    header, data = split_header(whole)
    lengths = st.integers(0, 2**64 - 1).map(lambda n: struct.pack("<Q", n) + whole[8:])
    return st.one_of(spoilt_bytes(whole), lengths, spoilt_json(header).map(lambda h: with_header(h, data)))


def model_folder(folder: Path) -> None:
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "vocab_size": 4, "tie_word_embeddings": False})
    )
    tokenizer = {"added_tokens": [{"id": 0, "content": "<s>"}], "model": {"vocab": {"a": 1, "b": 2}}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "model-1.safetensors").write_bytes(tensor_file())
    names = ("model.layers.0.mlp.up_proj.weight", "b")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors.index.json", "model-1.safetensors"]
)
def test_model_folders(tmp_path: Path, name: str) -> None:
    for model in "AB":
        (tmp_path / model).mkdir()
        model_folder(tmp_path / model)
    path, whole = tmp_path / "A" / name, (tmp_path / "A" / name).read_bytes()
    other = open_checkpoint(str(tmp_path / "B"))
    flags = MergeFlags(method="avg", models=["A", "B"], output_dir=str(tmp_path / "out"))

    @settings()
    @given(spoilt_safetensors(whole) if name.endswith(".safetensors") else spoilt_file(whole))
    def check(content: bytes) -> None:
        path.write_bytes(content)

        def read() -> None:
            model = open_checkpoint(str(tmp_path / "A"))
            assert all(info.path == tmp_path / "A/model-1.safetensors" for info in model.tensors.values())
            base_vocabulary(model)
            plan_merge([model, other], flags.weights(), [], flags.selects, flags.dtype)
            model.fingerprint()
            for info in model.tensors.values():
                info.read()

        try_reading(tmp_path, read)

    check()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapter_folders(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regmean.architectures.build_on_meta", lambda model: None)
    for folder in (tmp_path / "base", tmp_path / "lora"):
        folder.mkdir()
    model_folder(tmp_path / "base")
    settings_of_adapter = {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "revision": None, "r": 2,
                           "lora_alpha": 4, "alpha_pattern": {"up_proj": 3}, "use_rslora": True, "use_dora": True,
                           "trainable_token_indices": {"b": [0, 1]}, "init_lora_weights": True}  # fmt: skip
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings_of_adapter))
    factors = {
        "lora_A.weight": torch.ones(2, 2),
        "lora_B.weight": torch.ones(3, 2),
        "lora_magnitude_vector": torch.ones(3),
    }
    tensors = {f"base_model.model.model.layers.0.mlp.up_proj.{part}": value for part, value in factors.items()}
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(save(tensors | {"b": torch.ones(4)}))
    path, whole = tmp_path / "lora" / name, (tmp_path / "lora" / name).read_bytes()

    @settings()
    @given(spoilt_safetensors(whole) if name.endswith(".safetensors") else spoilt_file(whole))
    def check(content: bytes) -> None:
        path.write_bytes(content)

        def read() -> None:
            base_of(path.parent, read_settings(path.parent), None)
            (model,) = open_models([str(path.parent)], [], str(tmp_path / "base"))
            model.fingerprint()
            with np.errstate(all="ignore"):
                for info in model.tensors.values():
                    info.read()

        try_reading(tmp_path, read)

    check()


def test_gram_files(tmp_path: Path) -> None:
    path = tmp_path / "gram.safetensors"
    x = np.ones((3, 2), np.float32)
    provenance = {"model": "m", "dataset": "d", "split": "s", "tokens": 3, "examples": 1, "fingerprint": "f"}
    name = "model.layers.0.mlp.up_proj"
    write_grams(path, [Gram(name, (name,), 3, 2)], lambda _: x.T @ x, provenance)
    whole = path.read_bytes()
    header, data = split_header(whole)

    def inner(key: str) -> st.SearchStrategy[bytes]:
        spoilt = spoilt_json(json.loads(header["__metadata__"][key])).map(
            lambda value: dumps(value).decode("utf-8", "replace")
        )
        return spoilt.map(
            lambda text: with_header(header | {"__metadata__": header["__metadata__"] | {key: text}}, data)
        )

    (tmp_path / "A").mkdir()
    model_folder(tmp_path / "A")
    model = open_checkpoint(str(tmp_path / "A"))
    model = replace(model, tensors={key: info for key, info in model.tensors.items() if key != "b"})
    flags = MergeFlags(method="regmean", models=["A", "A"], grams=["g", "g"], output_dir=str(tmp_path / "out"))

    @settings()
    @given(st.one_of(spoilt_safetensors(whole), inner("grams"), inner("provenance")))
    def check(content: bytes) -> None:
        path.write_bytes(content)

        def read() -> None:
            file = open_grams(path)
            for gram in file.grams:
                file.read(gram)
            card = model_card(
                Provenance.of("regmean", 0.1, "cholesky", "command", [model, model], [0.5, 0.5], [file, file])
            )
            # Its provenance cannot leave its line of the list.
            assert sum(line.startswith("- `") and line.endswith("`") for line in card.splitlines()) == 2
            plan_merge([model, model], flags.weights(), [file, file], flags.selects, flags.dtype)

        try_reading(tmp_path, read)

    check()


def published(kind: str) -> bytes:
    grams = {"layers.0.q": torch.eye(3), "layers.0.o": torch.eye(2, dtype=torch.bfloat16)}
    state = {name: torch.ones(shape) for name, shape in mapping_shapes(3, 2).items()}
    content = io.BytesIO()
    if kind == "gram pickle":
        return pickle.dumps(grams, protocol=2)
    if kind == "gram pickle 4":
        return pickle.dumps(grams)
    # Private: PyTorch has no public option for the format of its releases before 1.6.
    torch.save(grams if kind == "gram" else {"model_state_dict": state}, content,
               _use_new_zipfile_serialization=kind != "old mapping")  # fmt: skip
    return content.getvalue()


@pytest.mark.parametrize("kind", ["gram", "gram pickle", "gram pickle 4", "mapping", "old mapping"])
def test_published_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("gram.pkl" if "gram" in kind else "pytorch_model.bin")
    whole = published(kind)
    # Opcodes that allocate memory for an index or a count beyond the content.
    endless = [
        b"r\xff\xff\xff\xff",
        b"\x8e" + b"\xff" * 8,
        b"B\xff\xff\xff\x7f",
        b"\x95" + b"\xff" * 8,
        b"\x8b\xff\xff\xff\x7f",
    ]
    greedy = st.sampled_from(endless)
    inserted = st.tuples(greedy, st.integers(2, len(whole))).map(lambda p: whole[: p[1]] + p[0] + whole[p[1] :])

    @settings()
    @given(st.one_of(spoilt_bytes(whole), inserted))
    def check(content: bytes) -> None:
        path.write_bytes(content)

        def read() -> None:
            if "gram" not in kind:
                read_mapping(path, 3, 2)
                return
            file = open_grams(path)
            for gram in file.grams:
                file.read(gram)

        try_reading(tmp_path, read)

    check()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_mapping_folders(tmp_path: Path, name: str) -> None:
    state = {tensor: torch.ones(shape) for tensor, shape in mapping_shapes(3, 2).items()}
    config = {"llm_path": "L", "mt_path": "M", "llm_revision": None, "mt_revision": None, "augmentation": True}
    write_mapping(tmp_path, config, state)
    path, whole = tmp_path / name, (tmp_path / name).read_bytes()

    @settings()
    @given(spoilt_safetensors(whole) if name.endswith(".safetensors") else spoilt_file(whole))
    def check(content: bytes) -> None:
        path.write_bytes(content)

        def read() -> None:
            models = trained_models(EvaluationFlags(init_checkpoint=str(tmp_path)).models, tmp_path)
            assert isinstance(models.llm_path, str) and isinstance(models.mt_path, str)
            read_mapping(tmp_path, 3, 2)

        try_reading(tmp_path, read)

    check()
