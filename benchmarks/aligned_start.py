"""Comparison of starts of the mapping stage: examples that each needs, and information that the mapping transfers.

    python -m benchmarks.aligned_start                           # the small world, after `make quickstart`
    python -m benchmarks.aligned_start --llm_path LLM --mt_path MT --data_dir ./datas --languages de,es,fr,ru,sw \\
        --name real --variants "aligned: --mapping_init aligned --lr 5e-5 --boundary_lr 5e-3" "scaled: --lr 5e-4"

A variant is a name and flags of `run_training.py`. All are trained on the same rows in the same order, in folders of
outputs/; finished runs are not repeated. Curves go to docs/aligned_start_{name}.png, figures and translations to
results/aligned_start/{name}.json. The last line is one JSON object.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Literal
from zlib import crc32

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from benchmarks.launch import launch
from benchmarks.mapping_control import ControlFlags, measure
from common.cli import flag, parse_flags
from common.errors import InputError, exit_with_message
from common.io import atomic_path, write_json, write_text
from mindmerger.build import ALIGNED_START
from mindmerger.tasks import Language, select_languages

COLOURS = ("#4c78a8", "#e45756", "#72b7b2", "#f58518", "#54a24b", "#b279a2")
DEEPSPEED_CONFIGS = {"float32": "cpu.json", "bfloat16": "zero2_bf16.json"}


@dataclass
class StartFlags:
    """Dev perplexity by examples seen, for several variants and seeds; control, numbers and chrF before and after."""

    name: str = flag("world", "name of the figure and the folders")
    llm_path: str = flag("quickstart/models/llm", "hub id or local folder")
    mt_path: str = flag("quickstart/models/mt", "hub id or local folder")
    data_dir: str = flag("quickstart/build/datas", "folder in the published layout")
    languages: str = flag("de,es,sw,ru,zh", "comma-separated")
    own_english: bool = flag(False, "each English sentence is a row of one language only: no target is in two rows")
    variants: list[str] = flag(
        ["aligned: --mapping_init aligned", "scaled: --mapping_init scaled"], "each a name and its flags of training"
    )
    seeds: int = flag(3, "runs of each variant")
    train_num: int = flag(1200, "rows per language, the dev rows among them")
    dev_size: int = flag(100, "rows held out")
    train_batch_size: int = flag(24, "rows of a step")
    ranks: int = flag(2, "processes")
    lr: float = flag(3e-3, "peak learning rate, where a variant has none of its own")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "of the frozen weights, and of the arithmetic")
    eval_steps: int = flag(20, "steps between evaluations")
    max_len: int = flag(512, "tokens of a source and of a target")
    eval_batch_size: int = flag(50, "rows of a batch at evaluation")
    translations: int = flag(10, "dev rows of each language to translate")

    def __post_init__(self) -> None:
        for variant in self.variants:
            if ":" not in variant:
                raise InputError(f"--variants {variant!r} is not a name, a colon, and flags of run_training.py")


def with_own_english(data_dir: Path, languages: tuple[Language, ...], out: Path) -> Path:
    """Keep each English sentence in one language only, if languages translate the same sentences.

    Otherwise sentences held out in one language are training data in another.

    Returns:
        `out`, in the layout of `data_dir`.
    """
    for number, language in enumerate(languages):
        pair = Path("bilingual_pairs") / f"en-{language.code}"
        sides = [pair / f"train_100k.{code}" for code in (language.code, "en")]
        sources, targets = ((data_dir / side).read_text(encoding="utf-8").splitlines() for side in sides)
        kept = [row for row, target in enumerate(targets) if crc32(target.encode()) % len(languages) == number]
        for side, lines in zip(sides, (sources, targets), strict=True):
            write_text(out / side, "".join(f"{lines[row]}\n" for row in kept))
    return out


def train(flags: StartFlags, stage: str, save_name: str, variant: str, seed: int) -> dict[str, Any]:
    """Run a training stage with the variant's flags, and measure it.

    Returns:
        `curve`; `end`, the result of `control` for the best mapping; and for a mapping stage with an aligned start
        `start`, the same before the first pair.

    Raises:
        InputError: it has failed.
    """
    words = (
        f"--stage_name {stage} --save_name {save_name} --seed {seed} "
        f"--llm_path {quote(flags.llm_path)} --mt_path {quote(flags.mt_path)} --data_dir {quote(flags.data_dir)} "
        f"--languages {flags.languages} --train_num {flags.train_num} --dev_size {flags.dev_size} "
        f"--train_batch_size {flags.train_batch_size} --gradient_accumulation 1 --epoch_num 1 "
        f"--lr {flags.lr} --lr_scheduler cosine --warmup_ratio 0.1 --eval_steps {flags.eval_steps} "
        f"--max_seq_len {flags.max_len} --max_gen_len {flags.max_len} --eval_batch_size {flags.eval_batch_size} "
        f"--deepspeed_config configs/deepspeed/{DEEPSPEED_CONFIGS[flags.dtype]} {variant}"
    )
    launch("run_training.py", words, flags.ranks)
    folder = Path("outputs") / save_name
    run = {"curve": curve(folder / stage, flags.train_batch_size), "end": control(flags, folder / stage, seed)}
    if stage == "mapping" and (folder / ALIGNED_START).exists():
        # The start is a mapping too, and is measured before training.
        run["start"] = control(flags, folder / ALIGNED_START, seed)
    return run


def curve(folder: Path, batch_size: int) -> list[tuple[int, float]]:
    """(examples seen, dev perplexity) at every evaluation of a run."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(row["step"] * batch_size, row["dev_perplexity"]) for row in rows if "dev_perplexity" in row]


def control(flags: StartFlags, checkpoint: Path, seed: int) -> dict[str, Any]:
    """Run `measure` for a mapping and average over languages."""
    languages = measure(
        ControlFlags(
            init_checkpoint=str(checkpoint),
            data_dir=flags.data_dir,
            languages=flags.languages,
            train_num=flags.train_num,
            dev_size=flags.dev_size,
            seed=seed,
            max_seq_len=flags.max_len,
            max_gen_len=flags.max_len,
            eval_batch_size=flags.eval_batch_size,
            translations=flags.translations,
            dtype=flags.dtype,
        )
    )
    keys = ("perplexity", "shuffled", *(("numbers_kept", "chrf") if flags.translations else ()))
    mean = {key: sum(row[key] for row in languages.values()) / len(languages) for key in keys}
    return {"mean": mean, "languages": languages}


def examples_to_reach(points: list[tuple[int, float]], perplexity: float) -> int | None:
    """Examples seen at the first evaluation with at most this perplexity; None if there is none."""
    return next((examples for examples, reached in points if reached <= perplexity), None)


def pooled(languages: dict[str, dict[str, Any]], key: str) -> float:
    """Perplexity over the tokens of all languages, from that of each, as in the curves."""
    rows = languages.values()
    return math.exp(sum(row["tokens"] * math.log(row[key]) for row in rows) / sum(row["tokens"] for row in rows))


def draw_curves(axes: Axes, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Draw each run's dev perplexity by examples seen, and that of shuffled sources at the end."""
    for colour, (name, of_seeds) in zip(COLOURS, runs.items(), strict=False):
        for number, run in enumerate(of_seeds):
            examples, perplexities = zip(*run["curve"], strict=True)
            label = name if number == 0 else None
            axes.plot(examples, perplexities, color=colour, linewidth=1.4, alpha=0.9, label=label)
            last = pooled(run["end"]["languages"], "shuffled")
            label = f"{name}, sources shuffled, at the end" if number == 0 else None
            axes.plot(examples[-1], last, marker="x", linestyle="none", color=colour, label=label)
    axes.set_yscale("log")
    for axis_ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_ticks(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("examples seen")
    axes.set_ylabel("dev perplexity of the English target")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def draw(flags: StartFlags, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Draw all curves in one figure."""
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    draw_curves(figure.add_subplot(), runs)
    with atomic_path(Path("docs") / f"aligned_start_{flags.name}.png") as partial:
        figure.savefig(partial, format="png", dpi=130)


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Table of all runs before and after training, one row each."""
    keys = next(iter(runs.values()))[0]["end"]["mean"]
    lines = [f"| variant | seed | examples | {' | '.join(keys)} |", "| --- " * (3 + len(keys)) + "|"]
    for name, of_seeds in runs.items():
        for run in of_seeds:
            ends = [(0, run["start"])] if "start" in run else []
            for examples, result in [*ends, (run["curve"][-1][0], run["end"])]:
                cells = " | ".join(f"{result['mean'][key]:.3g}" for key in keys)
                lines.append(f"| {name} | {run['seed']} | {examples} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    flags = parse_flags(StartFlags)
    variants = {name.strip(): words for name, words in (variant.split(":", 1) for variant in flags.variants)}
    if flags.own_english:
        own = Path("results/aligned_start") / f"{flags.name}-datas"
        flags.data_dir = str(with_own_english(Path(flags.data_dir), select_languages(flags.languages), own))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for seed in range(flags.seeds):
        for name, of_seeds in runs.items():
            save_name = f"aligned_start-{flags.name}-{name.replace(' ', '_')}-{seed}"
            of_seeds.append({"seed": seed, **train(flags, "mapping", save_name, variants[name], seed)})
            write_json(Path("results/aligned_start") / f"{flags.name}.json", runs)

    print(f"\n{table(runs)}")
    first, *others = runs
    for other in others:
        for ours, theirs in zip(runs[first], runs[other], strict=True):
            best = min(perplexity for _, perplexity in theirs["curve"])
            needed = [examples_to_reach(run["curve"], best) for run in (theirs, ours)]
            print(f"seed {ours['seed']}: {other} reaches {best:.3f} after {needed[0]} examples, {first} {needed[1]}")
    draw(flags, runs)
    print(json.dumps({"benchmark": "aligned_start", "name": flags.name, "runs": runs}))


if __name__ == "__main__":
    exit_with_message(main)
