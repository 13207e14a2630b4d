"""Import of the package under the transformers that vLLM's environment pins."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

IMPORT_ALL = """
import importlib, pkgutil, transformers, mindmerger, tools.demo, run_training, run_evaluation
for module in pkgutil.walk_packages(mindmerger.__path__, "mindmerger."):
    importlib.import_module(module.name)
print(transformers.__version__)
"""


@pytest.mark.slow  # downloads a package
def test_the_package_imports_under_vllms_transformers(tmp_path: Path) -> None:
    pinned = re.search(r"^transformers==(\S+)$", (REPOSITORY / "requirements-vllm.txt").read_text(), re.MULTILINE)[1]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    if subprocess.run([*install, f"transformers=={pinned}"], check=False).returncode:
        pytest.skip("no package index")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == pinned
