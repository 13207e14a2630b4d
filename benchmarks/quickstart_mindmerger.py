"""The quickstart's MindMerger half with several seeds, and ablations of one part of the method at a time.

    python -m benchmarks.quickstart_mindmerger                  # three seeds, then the ablations
    python -m benchmarks.quickstart_mindmerger --harm           # three seeds of each way to train without harm

Every run is the quickstart's commands with other flags, in its own folders of outputs/ and results/; finished runs are
not repeated. Accuracies are on the test problems, which no run was tuned on. The last line is one JSON object.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from transformers import MT5ForConditionalGeneration

from benchmarks.launch import launch
from benchmarks.mapping_control import shuffled_sources
from common.io import read_json, write_json
from common.logging import quiet_libraries
from common.models import base_config, load_tokenizer
from mindmerger.batching import plan_once
from mindmerger.config import EvaluationFlags
from mindmerger.data import read_evaluation
from mindmerger.evaluation.answerer import Answerer
from mindmerger.evaluation.decoding import greedy
from mindmerger.modeling import MindMergerForCausalLM
from mindmerger.tasks import EVALUATION_TASKS, math_prompt
from mindmerger.tasks.answers import parse_answer
from mindmerger.tokenization import ExampleTokenizer
from quickstart.results import without_english
from quickstart.world import WORLD_LANGUAGES

DATAS = Path("quickstart/build/datas")
LLM, MT = "quickstart/models/llm", "quickstart/models/mt"
RANDOM_MT = Path("quickstart/build/random_mt")


@dataclass(frozen=True)
class Variant:
    """One variant of training and evaluation.

    Attributes:
        mapping: flags of the mapping stage; None to skip it.
        augmentation: flags of the augmentation stage; None to skip it.
        asked: flags of the evaluation, by default of the augmentation stage's mapping.
    """

    mapping: str | None = ""
    augmentation: str | None = ""
    asked: str = ""


_FIRST = "outputs/ablation-seed-0/mapping"
_ADAMW = "--optimizer adamw"
ABLATIONS = {
    "without the mapping stage": Variant(None, "--init_checkpoint none"),
    "without the augmentation stage": Variant(None, None, f"--init_checkpoint {_FIRST} --augmentation True"),
    "without the prompt": Variant(None, f"--init_checkpoint {_FIRST} --augmentation False", "--augmentation False"),
    "boundary starts at zero": Variant("--boundary_init zero", "--boundary_init zero"),
    "AdamW": Variant(f"{_ADAMW} --lr 1e-3", f"{_ADAMW} --lr 3e-3"),
    "scaled start": Variant("--mapping_init scaled"),
    "scaled start, all rows": Variant("--mapping_init scaled --train_num 1200", "--train_num 2000"),
    "scaled start, all rows, AdamW": Variant(
        f"--mapping_init scaled --train_num 1200 {_ADAMW} --lr 3e-3", f"--train_num 2000 {_ADAMW} --lr 3e-3"
    ),
    "aligned start, no mapping stage": Variant(None, "--init_checkpoint none --mapping_init aligned"),
    "random encoder": Variant(*[f"--mt_path {RANDOM_MT}"] * 3),
}


CHAT_LLM = "quickstart/build/chat_llm"
_CHAT = f"--llm_path {CHAT_LLM} --prompt chat"
_REPLAY, _KL = "--replay 0.1", "--kl_weight 1"
# The switch by language is on unless an evaluation turns it off.
_OFF = "--switch off" if any(field.name == "switch" for field in fields(EvaluationFlags)) else ""
_STAGES = "--init_checkpoint outputs/harm-{number}-seed-{{seed}}/{stage}"
_START = _STAGES.format(number=0, stage="mapping")
# Numbered in this order; {seed} is filled in.
HARM = {
    "baseline": Variant(asked=_OFF),
    "chat": Variant(_CHAT, _CHAT, f"--llm_path {CHAT_LLM} {_OFF}"),
    "replay": Variant(None, f"{_START} {_REPLAY}", _OFF),
    "KL": Variant(None, f"{_START} {_REPLAY} --replay_weight 0 {_KL}", _OFF),
    "replay and KL": Variant(None, f"{_START} {_REPLAY} {_KL}", _OFF),
    "switch": Variant(None, None, _STAGES.format(number=0, stage="augmentation")),
    "switch, replay and KL": Variant(None, None, _STAGES.format(number=4, stage="augmentation")),
}


def write_chat_llm() -> None:
    """Write the small world's LLM with a chat template: the prompt that it was trained on."""
    shutil.copytree(LLM, CHAT_LLM, dirs_exist_ok=True)
    prompt = math_prompt("")
    turns = "{% for turn in messages %}{% if turn.role == 'user' %}"
    answer = "{% else %}{{ turn.content }}{{ eos_token }}{% endif %}{% endfor %}"
    template = f"{{{{ bos_token }}}}{turns}{prompt.before}{{{{ turn.content }}}}{prompt.after}{answer}"
    (Path(CHAT_LLM) / "chat_template.jinja").write_text(template)


def run(script: str, config: str, name: str, words: str) -> None:
    """Run one of the quickstart's commands with more flags."""
    launch(script, f"--config quickstart/{config}.yaml --save_name {name} {words}")


def accuracies(name: str, variant: Variant, seed: int) -> dict[str, float]:
    """Train and evaluate; return accuracy by language."""
    if variant.mapping is not None:
        run("run_training.py", "mapping", name, f"{variant.mapping} --seed {seed}")
    if variant.augmentation is not None:
        run("run_training.py", "augmentation", name, f"{variant.augmentation} --seed {seed}")
    run("run_evaluation.py", "evaluation", name, f"--init_checkpoint outputs/{name}/augmentation {variant.asked}")
    return of_results(name)


def of_results(name: str) -> dict[str, float]:
    """Accuracy by language of a finished evaluation."""
    languages = read_json(Path("results") / name / "mgsm" / "scores.json")["languages"]
    return {language: entry["accuracy"] for language, entry in languages.items()}


@torch.inference_mode()
def control(checkpoint: str) -> dict[str, float]:
    """Accuracy by language if the encoder reads a different problem from the prompt's."""
    model = MindMergerForCausalLM.from_pretrained(checkpoint)
    limits = {"max_seq_len": 512, "max_prompt_len": 512, "max_gen_len": 48}
    tokenizer = ExampleTokenizer(load_tokenizer(MT), base_config(MT), load_tokenizer(LLM), augmentation=True, **limits)
    eos = {tokenizer.llm_tokenizer.eos_token_id}
    result = {}
    for language, problems in read_evaluation(DATAS, EVALUATION_TASKS["mgsm"], WORLD_LANGUAGES, None).items():
        rows = tokenizer(shuffled_sources(problems, 0), with_targets=False)
        right = 0
        (plan,) = plan_once([len(row) for row in rows], 50, ranks=1)
        for batch in plan:
            sequence = Answerer(model.llm, tokenizer, model).embed([rows[row] for row in batch])
            for row, ids in zip(batch, greedy(model.llm, sequence, 48, eos), strict=True):
                text = tokenizer.llm_tokenizer.decode(ids, skip_special_tokens=True)
                right += parse_answer(text) == parse_answer(problems[row].target)
        result[language.name] = right / len(rows)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--harm", action="store_true", help="ways to train without harm, instead of the ablations")
    flags = parser.parse_args()
    quiet_libraries()
    if not DATAS.exists():
        subprocess.run([sys.executable, "-m", "quickstart.world", str(DATAS)], check=True)
    if not RANDOM_MT.exists():
        torch.manual_seed(0)
        MT5ForConditionalGeneration(base_config(MT)).save_pretrained(RANDOM_MT)
        load_tokenizer(MT).save_pretrained(RANDOM_MT)

    run("run_evaluation.py", "evaluation", "ablation", "--baseline")
    if flags.harm:
        finish(without_harm(flags.seeds), "quickstart_without_harm")
        return
    table = {"LLM alone": of_results("ablation-baseline")}
    for seed in range(flags.seeds):
        table[f"seed {seed}"] = accuracies(f"ablation-seed-{seed}", Variant(), seed)
    seeds = [table[f"seed {seed}"] for seed in range(flags.seeds)]
    table["mean of the seeds"] = {key: sum(row[key] for row in seeds) / len(seeds) for key in seeds[0]}
    table["sources shuffled among problems"] = control("outputs/ablation-seed-0/augmentation")
    for number, (name, variant) in enumerate(ABLATIONS.items()):
        table[name] = accuracies(f"ablation-{number}", variant, seed=0)

    finish(table, "quickstart_mindmerger")


def without_harm(seeds: int) -> dict[str, dict[str, float]]:
    """Train and evaluate every variant of `HARM`; return accuracies of each seed, and their mean."""
    write_chat_llm()
    table = {"LLM alone": of_results("ablation-baseline")}
    for number, (name, variant) in enumerate(HARM.items()):
        rows = []
        for seed in range(seeds):
            words = {part: flags and flags.replace("{seed}", str(seed)) for part, flags in vars(variant).items()}
            rows.append(accuracies(f"harm-{number}-seed-{seed}", Variant(**words), seed))
        table |= {f"{name}, seed {seed}": row for seed, row in enumerate(rows)}
        table[f"{name}, mean"] = {key: sum(row[key] for row in rows) / seeds for key in rows[0]}
    return table


def finish(table: dict[str, dict[str, float]], name: str) -> None:
    """Print a table of accuracies and write it to `results/{name}.json`."""
    languages = [language.name for language in WORLD_LANGUAGES]
    print(f"\n| accuracy, % | {' | '.join(languages)} | without English |\n|{' --- |' * (len(languages) + 2)}")
    for title, row in table.items():
        cells = [row[language] for language in languages] + [without_english(row)]
        print(f"| {title} | {' | '.join(f'{100 * cell:.1f}' for cell in cells)} |")
    write_json(Path("results", f"{name}.json"), table)
    print(json.dumps({"benchmark": name, "accuracies": table}))


if __name__ == "__main__":
    main()
