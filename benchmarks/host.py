"""The host's work in Grams and merges: GB/s of Gram files, and seconds of the mean of two bfloat16 tensors.

    python -m benchmarks.host [--baseline FOLDER]

With a second checkout of this repository, both are measured in turn, a new process for each. `gram write` includes the
file system's work but not the disk's, if TMPDIR is in memory (/dev/shm). `merge` is the host's part of a RegMean merge
of one bfloat16 layer of Llama-3-8B's shape, from files to files, with a copy in place of the solver.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
Row = tuple[str, float, float, float]  # name, seconds, CPU seconds, GB


def gram_rows(folder: Path, width: int) -> list[Row]:
    """Write and read a Gram."""
    import numpy as np

    from regmean.gram_file import Gram, GramFile, write_grams

    square = np.random.default_rng(0).standard_normal((width, width), dtype=np.float32)
    np.fill_diagonal(square, 1.0)
    path, gigabytes = folder / "gram.safetensors", 2e-9 * width * (width + 1)
    described = [Gram("a", ("a",), 10, width)]
    writing = seconds_of(lambda: write_grams(path, described, lambda name: square, {}))
    reading = seconds_of(lambda: GramFile(path).read("a"))
    return [(f"gram write {width}", *writing, gigabytes), (f"gram read {width}", *reading, gigabytes)]


def mean_rows(folder: Path, elements: int) -> list[Row]:
    """Average two models of one bfloat16 tensor as merge_model.py does, without writing."""
    import numpy as np

    from regmean import average
    from regmean.merge_plan import MergePlan
    from regmean.model_folder import Checkpoint
    from regmean.tensor_file import TensorFile, TensorWriter, encode

    models = []
    for seed in range(2):
        values = encode(np.random.default_rng(seed).standard_normal(elements, dtype=np.float32), "BF16")
        with TensorWriter(folder / f"{seed}.safetensors", {"a": ("BF16", (elements,))}, {}) as writer:
            writer.write("a", values)
        models.append(Checkpoint(str(seed), folder, {}, TensorFile(folder / f"{seed}.safetensors").tensors))
    layout = {"a": ("BF16", (elements,))}
    given = {"models": models, "model_weights": [0.5, 0.5], "layout": layout, "averaged": ["a"], "copied": {}}
    given["untied"] = False
    # Other checkouts have other lists.
    plan = MergePlan(**{field.name: given.get(field.name, []) for field in fields(MergePlan)})
    sink = SimpleNamespace(write=lambda *values: None, holds=lambda name: True)
    return [("mean", *seconds_of(lambda: average.write_averages(plan, [sink], lambda count: None)), 6e-9 * elements)]


@contextlib.contextmanager
def copied_means() -> Iterator[None]:
    """Let RegMean read all Grams, and take a copy of the mean for every solution."""
    from regmean import regmean
    from regmean.solve import Objective

    class Copy:
        def __init__(self, read: Callable, tokens: list, weights: list, name: str, for_each: Callable = map):
            self._grams = for_each(read, range(len(tokens)))
            self.solvers: dict[float, Any] = defaultdict(lambda: SimpleNamespace(label="copy", condition=None))
            self.objectives: dict[float, Objective] = {}

        def regress(self, values: list, mean: Any) -> SimpleNamespace:
            for gram in self._grams:  # at the first block; the iterator is then empty
                assert gram.shape[0] == mean.shape[1]
            return SimpleNamespace(solve=lambda alpha: self._copy(alpha, mean))

        def _copy(self, alpha: float, mean: Any) -> Any:
            self.objectives[alpha], self.solvers[alpha] = Objective(), self.solvers[alpha]
            return mean.clone()

    kept, regmean.System = regmean.System, Copy
    try:
        yield
    finally:
        regmean.System = kept


def merge_rows(folder: Path, *_: int, device: str = "cpu") -> list[Row]:
    """Merge the models in `folder`, without solving."""
    from regmean.config import MergeFlags
    from regmean.merge import merge

    models = [str(folder / name) for name in "AB"]
    output = str(folder / f"out{os.getpid()}")
    flags = MergeFlags("regmean", models, grams=models, alpha=[0.1], device=device, output_dir=output)
    with copied_means(), contextlib.redirect_stdout(sys.stderr):
        cost = seconds_of(lambda: merge(flags, "benchmarks.host"), times=1)
    read = sum(file.stat().st_size for model in models for file in Path(model).glob("*.safetensors"))
    return [("merge, not solved", *cost, read / 1e9)]


def seconds_of(work: Callable[[], Any], times: int = 3) -> tuple[float, float]:
    """Seconds and CPU seconds of a call, the least of some."""
    found = []
    for _ in range(times):
        started, cpu = time.perf_counter(), time.process_time()
        work()
        found.append((time.perf_counter() - started, time.process_time() - cpu))
    return min(seconds for seconds, _ in found), min(cpu for _, cpu in found)


def write_models(folder: Path, intermediate: int) -> list[Row]:
    """Write two models of one layer, in bfloat16, with Grams of random values."""
    import numpy as np
    import torch

    from benchmarks.regmean_inputs import make_layer, make_sibling
    from regmean.gram_file import FILE_NAME, Gram, write_grams

    hidden = 4096 if intermediate == 14336 else 512
    make_sibling(make_layer(folder / "A", hidden, intermediate, torch.bfloat16), folder / "B")
    layer = "model.layers.0."
    names = {"self_attn.q_proj": ("self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj": ()}
    names |= {"mlp.gate_proj": ("mlp.up_proj",), "mlp.down_proj": ()}
    grams = []
    for name, others in names.items():
        width = intermediate if "down" in name else hidden
        grams.append(Gram(layer + name, tuple(layer + each for each in (name, *others)), 1000, width))

    def random_square(name: str) -> np.ndarray:
        width = next(gram.width for gram in grams if gram.name == name)
        square = np.random.default_rng(width).standard_normal((width, width), dtype=np.float32)
        np.fill_diagonal(square, 1.0)
        return square

    for model in "AB":
        write_grams(folder / model / FILE_NAME, grams, random_square, {})
    return []


# Run in processes of their own: the memory of a parent counts in the peak of its children.
SIDES: dict[str, Callable[..., list[Row]]] = {
    "gram": gram_rows,
    "mean": mean_rows,
    "merge": merge_rows,
    "write": write_models,
}
ROWS = ["gram", "mean", "merge"]


def run_side(repository: Path, side: str, folder: Path, size: int) -> list[dict[str, Any]]:
    """Rows of one side, measured in a new process that imports the packages of `repository`."""
    words = [sys.executable, __file__, "--side", side, "--work", str(folder), "--size", str(size)]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    done = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="another checkout")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=ROWS, action="append", help="default: all")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        names = ("row", "s", "cpu_s", "GB")
        rows = [dict(zip(names, row, strict=True)) for row in SIDES[args.side](args.work, args.size)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps([row | {"peak_GB": peak} for row in rows]))
        return
    for row in args.only or ROWS:
        measure(row, args.baseline, args.rounds, args.quick)


def measure(row: str, baseline: Path | None, rounds: int, quick: bool) -> None:
    """Print the lines of a row, here and in another checkout."""
    sizes = {"gram": [4096, 14336], "mean": [1 << 26], "merge": [14336]}
    if quick:
        sizes = {"gram": [512, 700], "mean": [1 << 20], "merge": [700]}
    repositories = {"here": REPOSITORY} | ({"baseline": baseline} if baseline else {})
    for size in sizes[row]:
        with tempfile.TemporaryDirectory() as folder:
            if row == "merge":
                run_side(REPOSITORY, "write", Path(folder), size)
            found: dict[str, list] = {name: [] for name in repositories}
            for _ in range(rounds):
                for name, repository in repositories.items():
                    found[name].append(run_side(repository, row, Path(folder), size))
        report(found)


def report(found: dict[str, list[list[dict[str, Any]]]]) -> None:
    """Print a JSON line with medians for each row and checkout."""
    for number in range(len(found["here"][0])):
        for name, rounds in found.items():
            rows = [rows[number] for rows in rounds]
            medians = {key: round(statistics.median(row[key] for row in rows), 3) for key in ("s", "peak_GB", "cpu_s")}
            line = {
                "row": rows[0]["row"],
                "checkout": name,
                **medians,
                "GB_per_s": round(rows[0]["GB"] / medians["s"], 3),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
