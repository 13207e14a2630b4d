"""RegMean's published table in miniature: two specialists of one real model, and their merges.

    python -m benchmarks.reproduce.regmean --model MODEL --math_data math.json --work_dir runs/reproduce_regmean

For each seed MODEL is fine-tuned twice, on English GSM8K problems and on Python functions with docstrings; each
specialist's Grams are of its own training texts. The loss is on the learned part: the solution given the problem, the
body given signature and docstring. All models are evaluated on the same held-out texts: problems, and functions of
packages that no seed trains on. `math.json` is MindMerger's list of {query, response, lang}; its problems are GSM8K's
training problems, which may be in the training data of MODEL.

`--language Swahili --same_packages` makes specialists that move further apart: the questions are in a language that
MODEL hardly reads, and the held-out functions are unseen ones of the training packages.

Columns: loss in nats per token; the fraction of tokens that the model predicts as most likely; and the fraction of
problems whose last step is more likely with the right result than with three wrong ones (`texts.choices`; guessing
gives 25%). Intervals are 95%, by bootstrap over the held-out texts, and measure the dependence on these texts. The
seeds show the dependence on the training texts.

Finished steps are not repeated: an interrupted run is continued by the same command, and `--seeds` may grow. A seed
takes ten times MODEL's size on disk in float32; the first one, which includes the published algorithm, fourteen times.
Figures go to `results/reproduce/regmean.json` (`regmean_LANGUAGE.json` for other questions than English ones); the last
line printed is the same as one JSON object.
"""

import functools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.published_regmean import write_grams, write_merge
from benchmarks.regmean_inputs import read_texts
from benchmarks.reproduce.bootstrap import ratio_interval
from benchmarks.reproduce.scoring import score_texts
from benchmarks.reproduce.steps import costs, fine_tune, step, training_order
from benchmarks.reproduce.tables import cost_table, markdown
from benchmarks.reproduce.texts import (
    HELD_OUT_PACKAGES,
    TRAINING_PACKAGES,
    Text,
    choices,
    functions,
    problems,
    write_jsonl,
)
from benchmarks.side_by_side import machine
from common.cli import flag, parse_flags
from common.errors import InputError, exit_with_message
from common.io import read_json, sha256, write_json, write_text
from common.locks import locked
from common.logging import quiet_libraries
from common.ranks import start_process
from common.runs import open_run
from mindmerger.frozen_models import load_llm
from regmean.compute import compute_grams
from regmean.config import GramFlags, MergeFlags
from regmean.layerwise.merge import merge_layer_by_layer
from regmean.merge import merge
from regmean.model_folder import open_checkpoint

RESULTS = Path("results/reproduce")
DOMAINS = ("math", "code")
ALPHAS = [0.1, 0.5, 0.9, 0.95, 0.99]
PUBLISHED_ALPHA = 0.1
METHODS = {"regmean": "RegMean", "regmean++": "RegMean++", "regmean_asym": "asymmetric RegMean"}
SEQUENTIAL = ("regmean++", "regmean_asym")
# Merges at one alpha, beside RegMean's at every alpha: method, and how embeddings are merged.
OTHER_MERGES = [
    ("regmean", "counts"),
    ("regmean++", "average"),
    ("regmean_asym", "average"),
    ("regmean_asym", "counts"),
]
SEQUENTIAL_ALPHA = 0.9
MAX_TOKENS = 160  # of a text; longer ones are left out
HELD_OUT = 1000  # problems that are not used for training
COMMAND = "python -m benchmarks.reproduce.regmean"
AVERAGE = "average"
REGMEAN = f"RegMean, alpha {SEQUENTIAL_ALPHA:g}"  # what other merges are compared with, beside the average
# Figure: its name in the table, domain, numerator and denominator of each text, and True if it is a fraction.
FIGURES = {
    "math_loss": ("math loss", "math", "loss", "tokens", False),
    "math_accuracy": ("math tokens, %", "math", "right", "tokens", True),
    "forced_choice": ("forced choice, %", "math", "chosen", None, True),
    "code_loss": ("code loss", "code", "loss", "tokens", False),
    "code_accuracy": ("code tokens, %", "code", "right", "tokens", True),
}
Scores = dict[str, dict[str, list]]  # results of `score_texts` by domain


_NOT_SETTINGS = ("model", "math_data", "work_dir", "seeds", "overwrite")  # given by content, or free to change


@dataclass
class ReproduceFlags:
    """Fine-tune two specialists of a model, merge them in every way, and compare all on held-out texts."""

    model: str | None = flag(None, "hub id or local folder of the model that both specialists start from")
    math_data: str | None = flag(None, "MindMerger's math.json")
    work_dir: str = flag("runs/reproduce_regmean", "folder for models, Grams and scores")
    seeds: int = flag(3, "pairs of specialists, each fine-tuned on other texts")
    steps: int = flag(48, "steps of fine-tuning a specialist")
    batch_size: int = flag(8, "texts of a step")
    lr: float = flag(5e-5, "highest learning rate, of AdamW with warm-up and cosine decay")
    language: str = flag("English", "language of the questions, as math.json names it; solutions are English")
    same_packages: bool = flag(False, "hold out functions of the training packages, not whole packages")
    dtype: str = flag("bfloat16", "of forward passes; float32 is faster on a CPU without bfloat16 instructions")
    num_examples: int = flag(192, "training texts that a Gram is computed from")
    alphas: list[float] = flag(ALPHAS, f"alphas of RegMean, of which {SEQUENTIAL_ALPHA:g} is one")
    token_counts: bool = flag(True, "merge with embeddings by token counts, too")
    published: bool = flag(True, "merge by the published solver, and the first pair by the published algorithm")
    test_num: int = flag(150, "held-out texts of each domain")
    overwrite: bool = flag(False, "replace a run of other settings in --work_dir")

    def __post_init__(self) -> None:
        for name in ("model", "math_data"):
            if getattr(self, name) is None:
                raise InputError(f"--{name} is missing")
        for name in ("seeds", "steps", "batch_size", "num_examples"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1")
        if SEQUENTIAL_ALPHA not in self.alphas:
            raise InputError(f"--alphas must have {SEQUENTIAL_ALPHA:g}, which other merges are compared at")
        if self.dtype not in ("bfloat16", "float32"):
            raise InputError("--dtype is bfloat16 or float32")
        if self.test_num < 2 or self.test_num > HELD_OUT:
            raise InputError(f"--test_num must be from 2 to {HELD_OUT}")

    def settings(self) -> dict[str, Any]:
        """Settings that identify a run."""
        return {
            "model": open_checkpoint(self.model).fingerprint(),
            "math_data": sha256(Path(self.math_data)),
            **{name: value for name, value in vars(self).items() if name not in _NOT_SETTINGS},
        }


@dataclass(frozen=True)
class Texts:
    """Texts by domain; no seed trains on the held-out ones."""

    training: dict[str, list[Text]]
    held_out: dict[str, list[Text]]


def write_all_texts(folder: Path, flags: ReproduceFlags, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the texts of both domains with at most MAX_TOKENS tokens, in a fixed random order."""

    def short(texts: list[Text]) -> list[Text]:
        ids = tokenizer([text.read + text.learned for text in texts]).input_ids if texts else []
        kept = [text for text, row in zip(texts, ids, strict=True) if len(row) <= MAX_TOKENS]
        random.Random(0).shuffle(kept)
        return kept

    asked = [text for text in short(problems(Path(flags.math_data), flags.language)) if choices(text) is not None]
    learned = functions(TRAINING_PACKAGES)
    bodies, training = {text.learned for text in learned}, short(learned)
    held_out, training = training[:HELD_OUT], training[HELD_OUT:]
    if not flags.same_packages:
        training = held_out + training
        held_out = short([text for text in functions(HELD_OUT_PACKAGES) if text.learned not in bodies])
    sets = {"math_held_out": asked[:HELD_OUT], "math_training": asked[HELD_OUT:]}
    sets |= {"code_held_out": held_out, "code_training": training}
    for name, texts in sets.items():
        write_json(folder / f"{name}.json", texts)
        print(f"{name}: {len(texts):,} texts", flush=True)


def read_all_texts(folder: Path, test_num: int, training_num: int) -> Texts:
    """Read the texts of `write_all_texts`.

    Raises:
        InputError: there are fewer texts than requested.
    """
    sets = {}
    for kind, wanted in (("training", training_num), ("held_out", test_num)):
        sets[kind] = {domain: [Text(*row) for row in read_json(folder / f"{domain}_{kind}.json")] for domain in DOMAINS}
        for domain, texts in sets[kind].items():
            if len(texts) < wanted:
                raise InputError(f"{wanted:,} {kind} texts of {domain} are needed, and there are {len(texts):,}")
    return Texts(sets["training"], {domain: texts[:test_num] for domain, texts in sets["held_out"].items()})


def specialist(flags: ReproduceFlags, texts: list[Text], seed: int, folder: Path) -> None:
    """Fine-tune a specialist; write the model, and its texts in the form that `compute_gram.py` reads."""
    drawn = training_order(texts, flags.steps, flags.batch_size, seed)
    fine_tune(flags.model, drawn, flags.batch_size, flags.lr, folder / "model", getattr(torch, flags.dtype))
    write_jsonl(folder / "texts.jsonl", drawn)


def write_all_grams(flags: ReproduceFlags, home: Path) -> list[str]:
    """Compute the Grams of one seed's specialists; return their folders."""

    def gram(domain: str, folder: Path) -> None:
        gram_flags = GramFlags(
            model=str(home / domain / "model"),
            dataset=str(home / domain / "texts.jsonl"),
            text_column="text",
            num_examples=flags.num_examples,
            max_length=MAX_TOKENS,
            output_dir=str(folder / "gram"),
            dtype=flags.dtype,
            device="cpu",
        )
        compute_grams(gram_flags, start_process("cpu"))

    for domain in DOMAINS:
        step(home / f"gram_{domain}", functools.partial(gram, domain))
    return [str(home / f"gram_{domain}" / "gram") for domain in DOMAINS]


def merged_models(flags: ReproduceFlags, home: Path, seed: int) -> dict[str, Path]:
    """Compute one seed's Grams and merges; return the folders of all merged models, in the table's order."""
    specialists = [str(home / domain / "model") for domain in DOMAINS]

    def merging(method: str, embeddings: str, folder: Path, **options: Any) -> None:
        output = str(folder / "model")
        of = MergeFlags(method, specialists, device="cpu", embeddings=embeddings, output_dir=output, **options)
        if method in SEQUENTIAL:
            merge_layer_by_layer(of, start_process("cpu"), COMMAND)
        else:
            merge(of, COMMAND)

    grams = write_all_grams(flags, home)
    step(home / "avg", functools.partial(merging, "avg", "average"))
    step(home / "regmean", functools.partial(merging, "regmean", "average", grams=grams, alpha=flags.alphas))
    folders = {AVERAGE: home / "avg" / "model"}
    folders |= {f"RegMean, alpha {alpha:g}": home / "regmean" / f"model_{alpha:g}" for alpha in flags.alphas}
    texts = [write_calibration(flags, home / domain / "texts.jsonl", home / f"{domain}.yaml") for domain in DOMAINS]
    given = {"regmean": {"grams": grams}} | {method: {"calibration": texts} for method in SEQUENTIAL}
    for method, embeddings in OTHER_MERGES:
        if embeddings == "counts" and not flags.token_counts:
            continue
        folder, name = home / f"{method}_{embeddings}", f"{METHODS[method]}, alpha {SEQUENTIAL_ALPHA:g}"
        step(folder, functools.partial(merging, method, embeddings, alpha=[SEQUENTIAL_ALPHA], **given[method]))
        folders[name if embeddings == "average" else f"{name}, token counts"] = folder / "model"
    if not flags.published:
        return folders
    one = {"grams": grams, "alpha": [PUBLISHED_ALPHA], "solver": "lstsq"}
    step(home / "lstsq", functools.partial(merging, "regmean", "average", **one))
    folders[f"RegMean, alpha {PUBLISHED_ALPHA:g}, lstsq"] = home / "lstsq" / "model"
    return folders | (published_merges(flags, home) if seed == 0 else {})


def published_merges(flags: ReproduceFlags, home: Path) -> dict[str, Path]:
    """Merge one seed's specialists by the published algorithm; return the folders of the merges."""
    specialists = [str(home / domain / "model") for domain in DOMAINS]

    def gram(domain: str, folder: Path) -> None:
        texts = read_texts(home / domain / "texts.jsonl")[: flags.num_examples]
        write_grams(str(home / domain / "model"), texts, MAX_TOKENS, folder / "gram.pkl")

    for domain in DOMAINS:
        step(home / f"published_gram_{domain}", functools.partial(gram, domain))
    pickles = [home / f"published_gram_{domain}" / "gram.pkl" for domain in DOMAINS]

    def merging(driver: str | None, folder: Path) -> None:
        write_merge(specialists, pickles, PUBLISHED_ALPHA, driver, str(folder / "model"))

    folders = {}
    for place, name, driver in (("gels", "gels", "gels"), ("default", "torch's own choice", None)):
        folder = home / f"published_{place}"
        step(folder, functools.partial(merging, driver))
        folders[f"published algorithm, alpha {PUBLISHED_ALPHA:g}, lstsq by {name}"] = folder / "model"
    return folders


def write_calibration(flags: ReproduceFlags, texts: Path, path: Path) -> str:
    """Write the texts of a specialist's Grams as settings of a layer-sequential merge; return the file."""
    settings = {"text_column": "text", "num_examples": flags.num_examples, "max_length": MAX_TOKENS}
    write_text(path, "".join(f"{name}: {value}\n" for name, value in ({"dataset": texts} | settings).items()))
    return str(path)


def scores_of(flags: ReproduceFlags, model: str | Path, folder: Path, texts: Texts) -> Scores:
    """Scores of one model on the held-out texts."""

    def score(to: Path) -> None:
        llm = load_llm(str(model), None, torch.float32, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(model)
        with torch.autocast("cpu", getattr(torch, flags.dtype), enabled=flags.dtype != "float32"):
            write_json(to / "scores.json", {d: score_texts(llm, tokenizer, texts.held_out[d]) for d in DOMAINS})

    step(folder, score)
    return read_json(folder / "scores.json")


def run_seed(flags: ReproduceFlags, home: Path, texts: Texts, seed: int) -> dict[str, Scores]:
    """Run all steps of one seed; return the scores of each model by its name in the table."""
    with locked(home):
        folders = {}
        for domain in DOMAINS:
            train = functools.partial(specialist, flags, texts.training[domain], seed)
            step(home / domain, train)
            folders[f"{domain} model"] = home / domain / "model"
        folders |= merged_models(flags, home, seed)
        return {
            name: scores_of(flags, folder, home / f"scores_{number}", texts)
            for number, (name, folder) in enumerate(folders.items())
        }


def per_text(scores: Scores, figure: str) -> tuple[np.ndarray, np.ndarray]:
    """Numerator and denominator of a figure, float64 [texts] each."""
    _, domain, numerator, denominator, _ = FIGURES[figure]
    values = np.array(scores[domain][numerator], dtype=np.float64)
    return values, np.array(scores[domain][denominator], np.float64) if denominator else np.ones_like(values)


def summary(by_seed: list[dict[str, Scores]]) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Figures of every model, and of every merge minus the average and minus RegMean.

    Args:
        by_seed: the scores of each seed's models by name; some models may be missing for some seeds.

    Returns:
        `models`, `less_average`, `less_regmean`: by model and figure `mean` over its seeds, `low` and `high`, the 95%
        interval of that mean over texts, paired if models are compared; and `seeds`: `value`, `low` and `high` of each.
        Fractions are from 0 to 1.
    """

    def interval(numerators: np.ndarray, denominators: np.ndarray) -> dict[str, float]:
        low, high = ratio_interval(numerators, denominators)
        return {"value": float(numerators.sum() / denominators.sum()), "low": low, "high": high}

    def figures(pairs: list[tuple[Scores, Scores | None]]) -> dict[str, dict[str, Any]]:
        found = {}
        for figure in FIGURES:
            numerators = []
            for own, other in pairs:
                numerator, denominator = per_text(own, figure)
                numerators.append(numerator - per_text(other, figure)[0] if other else numerator)
            # All seeds have the same held-out texts, so the denominators are equal.
            whole = interval(np.mean(numerators, axis=0), denominator)
            found[figure] = {"mean": whole["value"], "low": whole["low"], "high": whole["high"]}
            found[figure]["seeds"] = [interval(numerator, denominator) for numerator in numerators]
        return found

    names = list(by_seed[0])
    merges = names[names.index(AVERAGE) + 1 :]
    own = {name: [models for models in by_seed if name in models] for name in names}

    def less(other: str) -> dict[str, dict[str, Any]]:
        compared = [name for name in merges if name != other and other in names]
        return {name: figures([(models[name], models[other]) for models in own[name]]) for name in compared}

    return {
        "models": {name: figures([(models[name], None) for models in own[name]]) for name in names},
        "less_average": less(AVERAGE),
        "less_regmean": less(REGMEAN),
    }


def table(result: dict[str, Any]) -> str:
    """Format a `summary` as Markdown: means with their intervals, those of each seed, and gains of merges."""

    def cell(figure: str, value: float, sign: str = "") -> str:
        return f"{100 * value:{sign}.1f}" if FIGURES[figure][-1] else f"{value:{sign}.4f}"

    def whole(figure: str, entry: dict[str, Any], sign: str = "") -> str:
        ends = " to ".join(cell(figure, entry[end], sign) for end in ("low", "high"))
        return f"{cell(figure, entry['mean'], sign)} ({ends})"

    def seeds(figure: str, entry: dict[str, Any]) -> str:
        return " / ".join(cell(figure, one["value"]) for one in entry["seeds"])

    def rows(title: str, models: dict[str, Any], write: Callable[[str, dict[str, Any]], str]) -> str:
        return markdown(
            [title, *(names[0] for names in FIGURES.values())],
            [[name, *(write(figure, own[figure]) for figure in FIGURES)] for name, own in models.items()],
        )

    return "\n\n".join(
        [
            rows("mean of the seeds (95% interval over texts)", result["models"], whole),
            rows("each seed", result["models"], seeds),
            rows("less the average, paired", result["less_average"], functools.partial(whole, sign="+")),
            rows(f"less {REGMEAN}, paired", result["less_regmean"], functools.partial(whole, sign="+")),
        ]
    )


def reproduce(flags: ReproduceFlags) -> dict[str, Any]:
    """Run all unfinished steps.

    Returns:
        The content of `results_file`: `settings`, the tables of `summary`, and for each of the
        `steps` its `seconds` and its `cpu_seconds` over all threads.

    Raises:
        InputError: no such model or data, too few texts, or a `--work_dir` of other settings.
    """
    quiet_libraries()
    work, settings = Path(flags.work_dir), flags.settings()
    with open_run(work, settings, flags.overwrite, start_process("cpu")) as run:
        run.start()
        tokenizer = AutoTokenizer.from_pretrained(flags.model)
        step(work / "texts", lambda folder: write_all_texts(folder, flags, tokenizer))
        texts = read_all_texts(work / "texts", flags.test_num, flags.steps * flags.batch_size)
        base = {"base": scores_of(flags, flags.model, work / "scores_base", texts)}
        homes = [work / f"seed{seed}" for seed in range(flags.seeds)]
        by_seed = [base | run_seed(flags, home, texts, seed) for seed, home in enumerate(homes)]

    result = {
        "benchmark": "reproduce_regmean",
        "settings": settings | {"seeds": flags.seeds},
        **summary(by_seed),
        "steps": costs(work),
        "machine": machine(),
    }
    write_json(results_file(flags), result)
    return result


def results_file(flags: ReproduceFlags) -> Path:
    """The file of all figures."""
    return RESULTS / ("regmean.json" if flags.language == "English" else f"regmean_{flags.language}.json")


def main() -> None:
    flags = parse_flags(ReproduceFlags)
    result = reproduce(flags)
    print(f"\n{cost_table(result['steps'])}")
    print(f"\n{table(result)}\n\n{results_file(flags)}")
    print(json.dumps(result))


if __name__ == "__main__":
    exit_with_message(main)
