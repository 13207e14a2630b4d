"""Both methods on a small world, in minutes on a laptop: `python -m quickstart` (or `make quickstart`).

The steps below are commands as a user would type them, run in this order. Finished steps are not repeated: a second
run only reports. An interrupted step is continued, or started again if it cannot be.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from common.errors import InputError, exit_with_message
from common.io import read_json, write_json

HOME = Path(__file__).parent
BUILD = HOME / "build"
RECORD = BUILD / "steps.json"
CODE = [HOME.parent / package for package in ("common", "mindmerger", "regmean")]


@dataclass(frozen=True)
class Step:
    """One command and the folder that it fills; if `resumes`, the command continues an unfinished folder."""

    name: str
    command: str
    output: Path
    resumes: bool = False


STEPS = (
    Step("world", "python -m quickstart.world quickstart/build/datas", BUILD / "datas"),
    Step(
        "mapping stage",
        "deepspeed --num_accelerators 2 run_training.py --deepspeed --config quickstart/mapping.yaml",
        # With the aligned start beside it.
        Path("outputs/quickstart"),
        resumes=True,
    ),
    Step(
        "augmentation stage",
        "deepspeed --num_accelerators 2 run_training.py --deepspeed --config quickstart/augmentation.yaml",
        Path("outputs/quickstart/augmentation"),
        resumes=True,
    ),
    Step(
        "evaluation with the mapping",
        "torchrun --nproc_per_node 2 run_evaluation.py --config quickstart/evaluation.yaml"
        " --init_checkpoint outputs/quickstart/augmentation",
        Path("results/quickstart"),
        resumes=True,
    ),
    Step(
        "evaluation of the LLM alone",
        "torchrun --nproc_per_node 2 run_evaluation.py --config quickstart/evaluation.yaml --baseline",
        Path("results/quickstart-baseline"),
        resumes=True,
    ),
    Step("texts for the Grams", "python -m quickstart.exercises quickstart/build/texts", BUILD / "texts"),
    Step(
        "Grams of the word problems' specialist",
        "python compute_gram.py --config quickstart/gram_problems.yaml",
        BUILD / "grams/problems",
    ),
    Step(
        "Grams of the programs' specialist",
        "python compute_gram.py --config quickstart/gram_programs.yaml",
        BUILD / "grams/programs",
    ),
    Step("plain average", "python merge_model.py --config quickstart/merge_avg.yaml", BUILD / "merges/avg"),
    Step("RegMean", "python merge_model.py --config quickstart/merge_regmean.yaml", BUILD / "merges/regmean"),
    Step(
        "RegMean, embeddings by token counts",
        "python merge_model.py --config quickstart/merge_regmean.yaml --embeddings counts --alpha 0.99"
        " --output_dir quickstart/build/merges/regmean_counts/alpha_0.99",
        BUILD / "merges/regmean_counts",
    ),
    Step(
        "RegMean++",
        "python merge_model.py --config quickstart/merge_regmean++.yaml",
        BUILD / "merges/regmean++_counts",
    ),
    Step(
        "asymmetric RegMean",
        "python merge_model.py --config quickstart/merge_regmean_asym.yaml",
        BUILD / "merges/regmean_asym_counts",
    ),
    Step("evaluation of the merges", "python -m quickstart.compare_merges", Path("results/quickstart-regmean")),
)


def main() -> None:
    record = read_json(RECORD) if RECORD.exists() else {}
    # A step is identified by its command, all files of the quickstart and of the method, and all steps before it.
    key = _fingerprint()
    for step in STEPS:
        key = sha256(f"{key}\n{step.command}".encode()).hexdigest()
        done = record.get(step.name, {})
        if done.get("key") == key and "seconds" in done:
            continue
        if done.get("key") != key or not step.resumes:
            shutil.rmtree(step.output, ignore_errors=True)
            record[step.name] = {"key": key}
            write_json(RECORD, record)
        print(f"\n\033[1m{step.name}\033[0m\n$ {step.command}", flush=True)
        started = time.monotonic()
        _run(step)
        record[step.name]["seconds"] = round(time.monotonic() - started, 1)
        write_json(RECORD, record)

    # Imported late: Matplotlib takes a second, and an interrupted run does not use it.
    from quickstart.results import report

    print(report({step.name: record[step.name]["seconds"] for step in STEPS}))
    print(f"\nThe page: {HOME / 'results.html'}   Every figure: {HOME / 'results.json'}   Anew: make clean quickstart")


def _run(step: Step) -> None:
    words = shlex.split(step.command)
    # Programs of this environment, activated or not; DeepSpeed calls ninja by name.
    programs = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    # Always on the CPU: the models are too small for a GPU to help, and the figures are the same everywhere.
    environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    code = subprocess.run([programs / words[0], *words[1:]], env=environment, check=False).returncode
    if code:
        raise InputError(f"the step {step.name!r} ended with exit code {code}; its own message is above")


def _fingerprint() -> str:
    made = (BUILD, HOME / "results.html", HOME / "results.json")
    # Includes the method's code: figures must be those of the current code.
    code = [path for folder in CODE for path in folder.rglob("*.py")]
    files = [
        path
        for path in sorted([*HOME.rglob("*"), *code, *HOME.parent.glob("*.py")])
        if path.is_file() and "__pycache__" not in path.parts and not any(path.is_relative_to(other) for other in made)
    ]
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


if __name__ == "__main__":
    exit_with_message(main)
