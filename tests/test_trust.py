"""Operations that the repository never applies to files and texts of others."""

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from common.errors import InputError
from common.io import inside
from common.ranks import start_process
from mindmerger.config import EvaluationFlags, ModelFlags, TrainingFlags
from mindmerger.frozen_models import load_llm
from regmean.compute import compute_grams
from regmean.config import GramFlags
from regmean.model_folder import locate_model, open_checkpoint
from regmean.report import Provenance, model_card
from tests.conftest import REPOSITORY

SOURCES = [
    path
    for pattern in ("*.py", *(f"{name}/**/*.py" for name in ("common", "mindmerger", "regmean", "tools", "quickstart")))
    for path in sorted(REPOSITORY.glob(pattern))
]
SOURCES += sorted((REPOSITORY / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize(
    "pattern",
    [
        # Any unpickling except with weights_only or by the restricted unpickler of common/pickles.py.
        r"\b(pickle|cPickle|dill|joblib|cloudpickle|marshal|shelve)\.loads?\b",
        r"(?<!class _TensorUnpickler\()\bpickle\.Unpickler\b|from pickle import",
        r"torch\.load\((?![^)]*weights_only=True)|_load\([^)]*pickle_module",
        r"load_checkpoint\(|allow_pickle|pd\.read_pickle|np\.load\(",
        r"yaml\.(unsafe_|full_)?load\(",
        # Running code that a model wrote or a file contains.
        r"\b(eval|exec)\(|os\.system\(|shell=True|HF_ALLOW_CODE_EVAL|confirm_run_unsafe_code",
        r"trust_remote_code\s*=\s*True",
    ],
)
def test_no_source_unpickles_freely_or_runs_what_it_reads(pattern: str) -> None:
    assert len(SOURCES) > 30
    found = [
        f"{path}:{number}: {line.strip()}"
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(pattern, line.split("#")[0])
    ]
    # A model's eval() does not evaluate text.
    assert [line for line in found if not re.search(r"\.eval\(\)", line)] == []


def test_foreign_code_is_run_only_when_told_to() -> None:
    assert ModelFlags().trust_remote_code is False
    assert GramFlags(model="M", dataset="d", text_column="t", output_dir="o").trust_remote_code is False
    # Everything that may come from the hub can be pinned.
    pinned = {"llm_revision", "mt_revision"}
    assert pinned <= TrainingFlags.__dataclass_fields__.keys() & EvaluationFlags.__dataclass_fields__.keys()
    assert {"revision", "dataset_revision"} <= GramFlags.__dataclass_fields__.keys()
    for path in (REPOSITORY / "configs/lm_eval").glob("*.yaml"):
        assert "unsafe_code" not in path.read_text()


def weights(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.ones(2)}, folder / name)
    return folder / name


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..", "sub/x.safetensors", ""])
def test_an_index_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    weights(tmp_path / "model", "model-00001-of-00001.safetensors")
    weights(tmp_path, "secret.safetensors")
    (tmp_path / "model/model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{name}"}}}}')
    for read in (open_checkpoint, lambda path: load_llm(path, None, torch.float32, False)):
        with pytest.raises(InputError, match=r"index\.json: .* is not a file of|cannot be read"):
            read(str(tmp_path / "model"))


def test_a_link_leads_nowhere_else_but_within_a_hub_download(tmp_path: Path) -> None:
    secret = weights(tmp_path, "secret.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "model/model.safetensors").symlink_to(secret)
    with pytest.raises(InputError, match=r"model\.safetensors is a link to .*secret\.safetensors, outside its folder"):
        open_checkpoint(str(tmp_path / "model"))
    (tmp_path / "model/loop").symlink_to("loop")
    with pytest.raises(InputError):
        inside(tmp_path / "model", "loop")

    blob = weights(tmp_path / "models--a--b/blobs", "0123")
    snapshot = tmp_path / "models--a--b/snapshots/rev"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/0123"))
    assert open_checkpoint(str(snapshot)).tensors["a"].read().tolist() == [1, 1]
    assert inside(snapshot, "model.safetensors").resolve() == blob


# Provenance of an untrusted Gram file.
FOREIGN = {
    "dataset": "d`</code><script>alert(1)</script>\n\n# Title\r| cell |",
    "split": "![x](http://tracker/)",
    "tokens": "many\n- item",
}


def test_a_model_card_is_not_written_by_others() -> None:
    gram = {"file": "gram.safetensors", **FOREIGN}
    model = {"model": "./M", "weight": 1, "base": FOREIGN["dataset"]}
    card = model_card(Provenance("regmean", 0.1, "cholesky", "command", [model], [gram], {}))
    assert yaml.safe_load(card.split("---\n")[1]).keys() == {"library_name", "tags"}  # "./M" is no id of the hub
    outside_code = re.sub(r"`[^`\n]*`", "", card)
    for trace in ("<", "script", "tracker", "# Title", "item", "cell"):
        assert trace not in outside_code


def test_offline_nothing_is_asked_of_the_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    asked: list[Any] = []

    def connect(self: socket.socket, address: Any) -> None:
        asked.append(address)
        raise OSError("no net in this test")

    monkeypatch.setattr(socket.socket, "connect", connect)
    flags = GramFlags(model="some/model", dataset="some/data", text_column="t", output_dir=str(tmp_path / "o"))
    attempts: list[Callable[[], Any]] = [
        lambda: locate_model("some/model", "main"),
        lambda: load_llm("some/model", "main", torch.float32, False),
        lambda: compute_grams(flags, start_process("cpu")),
    ]
    for attempt in attempts:
        with pytest.raises(InputError, match="some/model"):
            attempt()
    assert asked == []
