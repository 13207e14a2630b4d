"""Run the benchmarks and write their results to docs/performance.md.

    python -m benchmarks.table --llm_path LLM --mt_path MT --data_dir ./datas [--only gram train] [--quick]

Rows that are not run again keep their last figures from docs/performance.jsonl, which has one line per benchmark. With
--quick nothing is written: the lines are only printed.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import flag, parse_flags
from common.errors import InputError, exit_with_message
from common.io import atomic_path

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, RECORD = DOCS / "performance.md", DOCS / "performance.jsonl"
BEGIN, END = "<!-- benchmarks.table writes from here -->", "<!-- to here -->"
NAMES = ("gram", "merge", "average", "train", "evaluate")


@dataclass
class TableFlags:
    """Run all benchmarks and update the table of docs/performance.md."""

    llm_path: str = flag("HuggingFaceTB/SmolLM2-135M-Instruct", "LLM, and the model of RegMean's rows")
    mt_path: str = flag("google/gemma-3-270m", "multilingual model")
    data_dir: str = flag("./datas", "folder in the published data layout")
    mergekit: str | None = flag(None, "mergekit-yaml of another environment, for `average` to be compared with")
    only: list[str] = flag(list(NAMES), f"of: {', '.join(NAMES)}")
    quick: bool = flag(False, "small inputs, nothing written")

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.only) - set(NAMES)):
            raise InputError(f"--only {' '.join(unknown)}: choose of {', '.join(NAMES)}")

    def words(self, name: str) -> list[str]:
        """Command line of one benchmark."""
        if name in ("train", "evaluate"):
            words = ["--llm_path", self.llm_path, "--mt_path", self.mt_path, "--data_dir", self.data_dir]
        else:
            words = ["--model", self.llm_path]
        if name == "average" and self.mergekit is not None:
            words += ["--mergekit", self.mergekit]
        return ["-m", f"benchmarks.{name}", *words, *(["--quick"] if self.quick else [])]


def run(words: list[str]) -> list[dict[str, Any]]:
    """Run one benchmark, print its output and return the rows that it reports.

    Raises:
        InputError: it failed.
    """
    rows = []
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith('{"benchmark"'):
                rows.append(json.loads(line))
    if process.returncode:
        raise InputError(f"exit code {process.returncode} of: python {' '.join(words)}")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as Markdown."""
    lines = [
        "| benchmark | published way | here | speed-up | peak memory | here | share | largest relative difference |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "speedup" not in row:
            sizes = f"{_size(row['baseline_bytes'])} | {_size(row['ours_bytes'])} | 1/{row['ratio']:.1f}"
            lines.append(f"| {row['benchmark']} (file) | | | | {sizes} | 0 |")
            continue
        peaks = row["baseline_peak_bytes"], row["ours_peak_bytes"]
        speedup = row["baseline_s"] / row["ours_s"]
        lines.append(
            f"| {row['benchmark']} | {row['baseline_s']:.1f} s | {row['ours_s']:.1f} s | **{speedup:.1f}** | "
            f"{_size(peaks[0])} | {_size(peaks[1])} | 1/{peaks[0] / peaks[1]:.1f} | "
            f"{row['max_relative_difference']:.1g} |"
        )
    machines = sorted({row["machine"] for row in rows})
    return "\n".join([*lines, "", f"Machine: {'; '.join(machines)}."])


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def keep(found: list[dict[str, Any]]) -> None:
    """Replace rows of the same names in the record, and write all rows to the page."""
    old = [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []
    rows = {row["benchmark"]: row for row in old + found}
    with atomic_path(RECORD) as path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    with atomic_path(PAGE) as path:
        path.write_text(f"{before}{BEGIN}\n{table(list(rows.values()))}\n{END}{after}", encoding="utf-8")


def main() -> None:
    flags = parse_flags(TableFlags)
    for name in flags.only:
        found = run(flags.words(name))
        if not flags.quick:
            keep(found)


if __name__ == "__main__":
    exit_with_message(main)
