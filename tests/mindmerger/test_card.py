import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml

from common.errors import InputError
from common.io import sha256, write_json
from mindmerger.card import model_card, source_datasets, write_card
from mindmerger.checkpoint import write_mapping, write_verdicts
from mindmerger.evaluation.metrics import score

CONFIG = {
    "model_type": "mindmerger",
    "llm_path": "meta-math/MetaMath-7B-V1.0",
    "llm_revision": "0123abc",
    "mt_path": "google/mt5-xl",
    "mt_revision": None,
    "task": "math",
    "stage": "augmentation",
    "augmentation": True,
    "languages": ["de", "sw"],
    "train_rows": 1234,
    "datasets": ["meta-math/MetaMathQA"],
}


def header(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def write_evaluation(folder: Path, right: int, **settings: object) -> None:
    records = [{"language": "German", "right": n < right, "parsed": 1.0, "cut": [], "stopped": True} for n in range(10)]
    write_json(folder / "scores.json", score("mgsm", records))
    same = {"llm_path": CONFIG["llm_path"], "problems_sha256": "p", "mapping_sha256": None}
    write_json(folder / "run.json", {"settings": same | settings, "result": {}})


def test_the_card_tells_models_languages_data_and_the_scores_of_this_very_mapping(tmp_path: Path) -> None:
    write_mapping(tmp_path / "mapping", CONFIG, {"end_boundary": torch.zeros(1, 1, 4)})
    results = tmp_path / "results"
    digest = sha256(tmp_path / "mapping/model.safetensors")
    write_evaluation(results / "ours/mgsm", 7, mapping_sha256=digest)
    write_evaluation(results / "ours-again/mgsm", 7, mapping_sha256=digest)
    write_evaluation(results / "another/mgsm", 9, mapping_sha256="other")
    write_evaluation(results / "other-problems-baseline/mgsm", 8, problems_sha256="q")
    write_evaluation(results / "ours-baseline/mgsm", 2)
    write_card(tmp_path / "mapping", results)

    card = (tmp_path / "mapping/README.md").read_text()
    assert header(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mindmerger", "multilingual"],
        "base_model": ["meta-math/MetaMath-7B-V1.0", "google/mt5-xl"],
        "language": ["de", "sw"],
        "datasets": ["meta-math/MetaMathQA"],
    }
    assert (
        "| LLM | [meta-math/MetaMath-7B-V1.0](https://huggingface.co/meta-math/MetaMath-7B-V1.0), revision `0123abc` |"
        in card
    )
    assert "| Languages | German, Swahili |\n| Rows | 1234 |" in card
    assert "| German (10) | 70.0 (39.7-89.2) | 20.0 (5.7-51.0) |\n| average | 70.0 | 20.0 |" in card
    assert card.count("### mgsm") == 1
    assert "90.0" not in card and "80.0" not in card

    assert "does harm" not in card
    write_verdicts(tmp_path / "mapping/model.safetensors", {name: {"verdict": "harms"} for name in ("Thai", "English")})
    write_card(tmp_path / "mapping", tmp_path / "nothing")
    assert "does harm in English, Thai: there evaluations" in (tmp_path / "mapping/README.md").read_text()
    assert "## Scores" not in (tmp_path / "mapping/README.md").read_text()
    with pytest.raises(InputError, match="no such file"):
        write_card(tmp_path)
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    with pytest.raises(InputError, match="not the config of a mapping"):
        write_card(tmp_path)


def test_local_models_are_no_names_on_the_hub(tmp_path: Path) -> None:
    card = model_card({"llm_path": str(tmp_path), "mt_path": "google/mt5-xl"}, [])
    assert header(card)["base_model"] == ["google/mt5-xl"]
    assert "names a local folder" in card and "## Training" not in card


def test_data_sets_come_from_the_manifest(tmp_path: Path) -> None:
    assert source_datasets(tmp_path, [str(tmp_path / "a.tsv")]) == []
    files = {name: {"sources": [{"dataset": dataset}]} for name, dataset in (("a.tsv", "x/a"), ("b/c.json", "x/b"))}
    write_json(tmp_path / "manifest.json", {"files": files})
    assert source_datasets(tmp_path, [str(tmp_path / "b/c.json"), str(tmp_path / "own.tsv")]) == ["x/b"]


def test_pushing_uploads_the_mapping_and_its_card(build: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = build()
    model.config.languages = ["de"]
    uploaded: dict[str, str] = {}

    def upload_folder(_: object, repo_id: str, folder_path: str, **options: object) -> SimpleNamespace:
        uploaded.update({path.name: path.read_text(errors="replace") for path in Path(folder_path).iterdir()})
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")

    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda _, name, **__: SimpleNamespace(repo_id=f"me/{name}")
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    assert model.push_to_hub("mapping") == "https://huggingface.co/me/mapping/commit/1"
    assert set(uploaded) == {"README.md", "config.json", "model.safetensors", "pytorch_model.bin"}
    assert header(uploaded["README.md"])["language"] == ["de"]
    assert json.loads(uploaded["config.json"])["languages"] == ["de"]
