"""Ways to train without harm in English, on real weights: perplexity with the mapping and of the LLM alone.

    python -m benchmarks.reproduce.without_harm --llm_path LLM --mt_path MT --data_dir ./datas \\
        --work_dir runs/without_harm

LLM, data and mapping stage (aligned start, one mapping for all) are those of `benchmarks.reproduce.mindmerger`. The
augmentation stage is then trained as there and in each other way of `WAYS` with seed 0, and in the way `--best` with
all seeds. Perplexities are of held-out solutions, over their tokens, with the question's own source and with that of
another row. Finished steps are not repeated. Figures go to `results/reproduce/without_harm.json`; the last line printed
is the same as one JSON object.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.aligned_start import pooled
from benchmarks.reproduce.mindmerger import ENGLISH, RESULT, MiniatureFlags, open_miniature, train_stage
from benchmarks.reproduce.steps import costs, step
from benchmarks.reproduce.tables import cost_table, markdown
from benchmarks.side_by_side import machine
from common.cli import flag, parse_flags
from common.errors import InputError, exit_with_message
from common.io import read_json, write_json
from common.logging import quiet_libraries

RESULTS = Path("results/reproduce/without_harm.json")
START = "aligned"
_ROWS = "--replay 1 --replay_languages en"
PUBLISHED = "as published"
WAYS = {
    PUBLISHED: "",
    "replay": _ROWS,
    "KL": f"{_ROWS} --replay_weight 0 --kl_weight 10",
    "replay and KL": f"{_ROWS} --kl_weight 10",
}


@dataclass
class HarmFlags(MiniatureFlags):
    """Train the augmentation stage in several ways, and compare perplexities with those of the LLM alone."""

    work_dir: str = flag("runs/without_harm", "folder for the LLM and for the results of each step")
    best: str = flag(PUBLISHED, "way that is trained with all seeds")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best not in WAYS:
            raise InputError(f"--best {self.best!r} is none of: {', '.join(WAYS)}")

    def settings(self) -> dict[str, Any]:
        """Settings that identify a run."""
        return {name: value for name, value in super().settings().items() if name != "best"} | {"ways": WAYS}


def compare(flags: HarmFlags) -> dict[str, Any]:
    """Run all unfinished steps.

    Returns:
        The content of the results file: `settings`; results of `benchmarks.aligned_start.train` for the `mapping` stage
        and for each way and seed of `ways`, there with the `verdicts` by language; and the cost of each of the `steps`.
    """
    quiet_libraries()
    with open_miniature(flags) as (work, run_name):
        step(work / "mapping", functools.partial(train_stage, flags, "mapping", START, 0, run_name))
        ways: dict[str, list[dict[str, Any]]] = {}
        for number, (way, words) in enumerate(WAYS.items()):
            for seed in range(flags.seeds if way == flags.best else 1):
                name = f"{run_name}-{number}-{seed}"
                more = f"--init_checkpoint outputs/{run_name}/mapping {words}"
                done = work / f"way_{number}_{seed}"
                step(done, functools.partial(train_stage, flags, "augmentation", START, seed, name, more=more))
                verdicts = read_json(Path("outputs") / name / "augmentation" / "config.json")["verdicts"]["languages"]
                ways.setdefault(way, []).append(read_json(done / RESULT) | {"verdicts": verdicts})
    result = {
        "benchmark": "without_harm",
        "settings": flags.settings() | {"seeds": flags.seeds},
        "mapping": read_json(work / "mapping" / RESULT),
        "ways": ways,
        "steps": costs(work),
        "machine": machine(),
    }
    write_json(RESULTS, result)
    return result


def gain(found: dict[str, Any], key: str = "perplexity") -> float:
    """Nats per token that the mapping saves over the tokens of all languages but English."""
    others = {name: row for name, row in found["end"]["languages"].items() if name != ENGLISH.name}
    tokens = {name: row["tokens"] for name, row in others.items()}
    alone = sum(tokens[name] * found["verdicts"][name]["alone"] for name in others) / sum(tokens.values())
    return alone - math.log(pooled(others, key))


def table(result: dict[str, Any]) -> str:
    """Markdown table of all ways and seeds."""
    languages = list(result["ways"][PUBLISHED][0]["verdicts"])
    lines = []
    for way, of_seeds in result["ways"].items():
        for seed, found in enumerate(of_seeds):
            cells = []
            for name in languages:
                own, verdict = found["end"]["languages"][name], found["verdicts"][name]
                alone = math.exp(verdict["alone"])
                cells.append(f"{alone:.3f}, {own['perplexity']:.3f} ({own['shuffled']:.3f}), {verdict['verdict']}")
            lines.append([f"{way}, seed {seed}", *cells, f"{gain(found):.3f} ({gain(found, 'shuffled'):.3f})"])
    head = "dev perplexity alone, with the mapping (sources shuffled), verdict"
    return markdown([head, *languages, "nats gained without English"], lines)


def main() -> None:
    result = compare(parse_flags(HarmFlags))
    print(f"\n{cost_table(result['steps'])}\n\n{table(result)}\n\n{RESULTS}")
    print(json.dumps(result))


if __name__ == "__main__":
    exit_with_message(main)
