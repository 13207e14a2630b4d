"""The model card of a mapping: `python -m mindmerger.card --checkpoint outputs/MergeMinds/augmentation`"""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from transformers import PreTrainedModel

from common.cli import flag, parse_flags
from common.errors import InputError, exit_with_message
from common.io import read_json, sha256, write_text
from common.runs import RUN
from mindmerger.checkpoint import CONFIG, PUBLISHED, SAFETENSORS, harmed_languages
from mindmerger.data import MANIFEST
from mindmerger.evaluation.metrics import SCORES
from mindmerger.evaluation.report import find_alone
from mindmerger.tasks import LANGUAGES

CARD = "README.md"


@dataclass
class CardFlags:
    """Write the model card of a mapping, with its scores in `results/`."""

    checkpoint: str = flag("outputs/MergeMinds/augmentation", "folder of the mapping")
    results: str = flag("results", "folder of evaluations")


def write_card(folder: Path, results: Path = Path("results")) -> None:
    """Write `README.md` beside a mapping.

    Args:
        folder: folder with the mapping's config and tensors.
        results: folder to search for evaluations of the same tensors, by the sha256 in their `run.json`.

    Raises:
        InputError: `folder` has no config of a mapping.
    """
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("model_type") != "mindmerger":
        raise InputError(f"{folder / CONFIG} is not the config of a mapping")
    hashes = {sha256(folder / name) for name in (SAFETENSORS, PUBLISHED) if (folder / name).is_file()}
    alone = harmed_languages(folder / SAFETENSORS, config.get("verdicts"), print)
    write_text(folder / CARD, model_card(config, find_scores(results, hashes), alone))


@dataclass(frozen=True)
class Evaluation:
    """Scores of one task, and scores of the LLM alone on the same problems, or None."""

    task: str
    scores: dict[str, Any]
    alone: dict[str, Any] | None


def find_scores(results: Path, hashes: set[str]) -> list[Evaluation]:
    """Find finished evaluations in `results/*/*` of a mapping whose file has one of these sha256."""
    runs = [(path.parent, read_json(path)) for path in sorted(results.glob(f"*/*/{RUN}"))]
    finished = [
        (folder, run["settings"])
        for folder, run in runs
        if isinstance(run, dict) and {"settings", "result"} <= run.keys() and (folder / SCORES).is_file()
    ]
    found, seen = [], []
    for folder, settings in finished:
        # The same evaluation may exist under two names.
        if settings.get("mapping_sha256") in hashes and (folder.name, settings) not in seen:
            seen.append((folder.name, settings))
            alone = find_alone(results, folder.name, settings)
            theirs = None if alone is None else read_json(alone / SCORES)
            found.append(Evaluation(folder.name, read_json(folder / SCORES), theirs))
    return found


def model_card(config: dict[str, Any], evaluations: list[Evaluation], alone: Iterable[str] = ()) -> str:
    """Model card of a mapping, without a licence, which the user adds; `alone`: languages without the mapping."""
    llm, mt = (_Base(config.get(f"{name}_path"), config.get(f"{name}_revision")) for name in ("llm", "mt"))
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mindmerger", "multilingual"],
        base_model=[base.path for base in (llm, mt) if base.is_public] or None,
        language=config.get("languages") or None,
        datasets=config.get("datasets") or None,
    )
    parts = [_INTRODUCTION.format(llm=llm, mt=mt), _training(config), _scores(evaluations), _USE]
    if alone:
        parts.append(_ALONE.format(languages=", ".join(sorted(alone))))
    if not (llm.is_public and mt.is_public):
        parts.append(_LOCAL)
    parts.append(_LICENCE)
    return f"---\n{header.to_yaml()}\n---\n\n" + "\n".join(part for part in parts if part)


def source_datasets(data_dir: Path, files: list[str]) -> list[str]:
    """Hub ids of the data sets that the manifest of `data_dir` lists for these files."""
    if not (data_dir / MANIFEST).is_file():
        return []
    manifest = read_json(data_dir / MANIFEST)
    names = {Path(name).relative_to(data_dir).as_posix() for name in files}
    try:
        known = manifest["files"]
        return sorted({source["dataset"] for name in names & known.keys() for source in known[name]["sources"]})
    except (TypeError, KeyError, AttributeError):
        return []  # a manifest of another format


@dataclass(frozen=True)
class _Base:
    path: str | None
    revision: str | None

    @property
    def is_public(self) -> bool:
        """True if the path can be a Hub id and is not a local folder."""
        return self.path is not None and self.path.count("/") <= 1 and not Path(self.path).exists()

    def __str__(self) -> str:
        if not self.is_public:
            return f"`{self.path}` (a local folder)"
        revision = f", revision `{self.revision}`" if self.revision else ""
        return f"[{self.path}](https://huggingface.co/{self.path}){revision}"


def _training(config: dict[str, Any]) -> str:
    if not config.get("stage"):
        return ""
    names = {language.code: language.name for language in LANGUAGES.values()}
    languages = ", ".join(names.get(code, code) for code in config.get("languages") or []) or "unknown"
    rows = {
        "Stage": f"{config['stage']}, task {config.get('task')}",
        "Languages": languages,
        "Rows": config.get("train_rows") or "unknown",
        "Data sets": ", ".join(config.get("datasets") or []) or "unknown",
        "Prompt after the mapped states": "yes" if config.get("augmentation") else "no",
        "Prompts": config.get("prompt_format") or "published",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["## Training", "", "| | |", "| --- | --- |", *lines, ""])


def _scores(evaluations: list[Evaluation]) -> str:
    parts = []
    for evaluation in evaluations:
        both = evaluation.alone is not None
        parts += [f"### {evaluation.task}", "", f"| | with the mapping |{' LLM alone |' if both else ''}"]
        parts.append(f"| --- | --- |{' --- |' if both else ''}")
        for language, entry in evaluation.scores["languages"].items():
            theirs = f" {_accuracy(evaluation.alone['languages'][language])} |" if both else ""
            parts.append(f"| {language} ({entry['count']}) | {_accuracy(entry)} |{theirs}")
        theirs = f" {100 * evaluation.alone['average']:.1f} |" if both else ""
        parts += [f"| average | {100 * evaluation.scores['average']:.1f} |{theirs}", ""]
    return "\n".join(["## Scores", "", "Accuracy in %, with its 95% Wilson interval.", "", *parts]) if parts else ""


def _accuracy(entry: dict[str, Any]) -> str:
    return f"{100 * entry['accuracy']:.1f} ({100 * entry['low']:.1f}-{100 * entry['high']:.1f})"


_INTRODUCTION = """# A MindMerger mapping

The trained mapping between two frozen models ([Huang et al., NeurIPS 2024](https://arxiv.org/abs/2405.17386)): a
multilingual encoder reads the question, the mapping turns its states into vectors of the LLM's embedding space, the LLM
answers. The two models themselves are not in here.

| | |
| --- | --- |
| LLM | {llm} |
| Multilingual model | {mt} |
"""
_USE = """## Use

With the repository MindMerger + RegMean on the path:

```python
import torch
from transformers import AutoModelForCausalLM

import mindmerger.modeling  # registers the class

model = AutoModelForCausalLM.from_pretrained("THIS MODEL'S NAME OR FOLDER", dtype=torch.bfloat16)
```
"""
_ALONE = """By the verdicts in `config.json` the mapping does harm in {languages}: there evaluations and
`model.generate(..., language=...)` use the LLM alone.
"""
_LOCAL = """`config.json` names a local folder: to load this elsewhere, pass a `config=MindMergerConfig(...)` that
names your own copies of the two models, or `--llm_path` and `--mt_path` to `run_evaluation.py`.
"""
_LICENCE = """## Licence

Not stated yet: add `license:` to the header. The licences of both models and of the data bear on it.
"""


def main() -> None:
    """Parse the command line and write the card."""
    flags = parse_flags(CardFlags)
    write_card(Path(flags.checkpoint), Path(flags.results))
    print(f"{Path(flags.checkpoint) / CARD} is written")


if __name__ == "__main__":
    exit_with_message(main)


def upload(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str = "Upload MindMerger mapping",
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload what the model's `save_pretrained` writes to the Hub's `repo_id`; returns the commit's URL."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    options = {"commit_message": commit_message, "revision": revision, "create_pr": create_pr}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options).commit_url)
