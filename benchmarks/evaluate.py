"""Answers to 64 MGSM problems: the published way, and this repository's evaluation.

    python -m benchmarks.evaluate --llm_path LLM --mt_path MT --data_dir ./datas [--quick] [--backend vllm]

As published: batches of 8 in the order of the file, padded, and greedy `llm.generate`, which continues until a batch's
last answer ends. Here: `evaluation.run.answer_all`, grading and writing included. Both have the same inputs
`[bos | mapped states | boundary | prompt]`, with a random mapping at the scale of the LLM's embeddings: the content of
answers does not matter here, but their lengths do. With a trained mapping, solutions have 100 to 150 of at most 512
tokens; with an untrained one and the published prompt, all reach the limit. Therefore the chat template requests one
short sentence, which a chat model ends after different numbers of tokens: `mean_new_tokens` and `at_limit` report the
lengths.

Seconds and peak memory are those of all answers, beside the loaded models; vLLM's own processes are in the seconds and
not in the memory. The difference reported is the fraction of answers that differ in any character.
"""

import sys
import tempfile
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from benchmarks.pair_inputs import PairFlags, unlearned_model
from benchmarks.side_by_side import in_turn, measured, report, run
from common.cli import flag, parse_flags
from common.errors import InputError, exit_with_message
from common.io import read_json, write_json
from common.logging import quiet_libraries
from common.models import load_tokenizer
from common.ranks import Process
from mindmerger.batching import Tokens, lay_out
from mindmerger.config import EvaluationFlags
from mindmerger.data import Example, read_evaluation
from mindmerger.evaluation.answerer import prepare_answerer
from mindmerger.evaluation.report import read_predictions
from mindmerger.evaluation.run import ProblemSet, answer_all
from mindmerger.evaluation.vllm_answerer import VllmAnswerer, check_vllm
from mindmerger.modeling import InputEmbeds
from mindmerger.tasks import EVALUATION_TASKS, select_languages
from mindmerger.tokenization import ExampleTokenizer

TASK = EVALUATION_TASKS["mgsm"]
# Rows of a batch, as published.
BATCH_SIZE = 8
INSTRUCTION = "\nAnswer in one short sentence."


@dataclass
class EvaluateBenchmarkFlags(PairFlags):
    """Compare answers to MGSM problems: the published way and this repository's evaluation."""

    languages: str = flag("en,de,es,fr,ru,sw,th,zh", "comma-separated")
    backend: Literal["transformers", "vllm"] = flag("transformers", "of this repository's side")
    problems: int = flag(8, "of each language")
    max_gen_len: int = flag(128, "tokens of an answer")
    eval_batch_size: int | None = flag(None, "problems at once on this repository's side; default: its own")
    quick: bool = flag(False, "four problems of each language, 48 tokens, one round: noisy, with few long answers")
    side: Literal["", "baseline", "ours"] = flag("", "the side that this process is; its answers go to --work_dir")
    work_dir: str = flag("", "of one side's own process")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quick:
            self.problems, self.max_gen_len, self.rounds = 4, 48, 1

    def evaluation(self) -> EvaluationFlags:
        """The corresponding flags of `run_evaluation.py`."""
        return EvaluationFlags(
            init_checkpoint=str(Path(self.work_dir) / "mapping"),
            data_dir=self.data_dir,
            dtype="float32",
            device="cpu",
            max_gen_len=self.max_gen_len,
            eval_batch_size=self.eval_batch_size,
            backend=self.backend if self.side == "ours" else "transformers",
        )


def save_mapping(flags: EvaluateBenchmarkFlags) -> None:
    """Write a random mapping at the scale of the LLM's embeddings to `work_dir`/mapping."""
    bos_token_id = load_tokenizer(flags.llm_path).bos_token_id
    model = unlearned_model(flags, bos_token_id, lay_out([Tokens(range(3, 300), [], [])], bos_token_id))
    model.config.augmentation = True
    model.save_pretrained(Path(flags.work_dir) / "mapping")


def read_problems(flags: EvaluateBenchmarkFlags, tokenizer: ExampleTokenizer) -> tuple[list[Example], list[Tokens]]:
    """Problems in the order of the files, and their tokens."""
    languages = select_languages(flags.languages)
    by_language = read_evaluation(Path(flags.data_dir), TASK, languages, flags.problems)
    examples = [example for rows in by_language.values() for example in rows]
    chat = tokenizer.llm_tokenizer.apply_chat_template
    tokens = []
    for example, row in zip(examples, tokenizer(examples, with_targets=False), strict=True):
        turn = [{"role": "user", "content": example.source.text + INSTRUCTION}]
        prompt = chat(turn, add_generation_prompt=True, return_dict=True).input_ids
        tokens.append(replace(row, prompt=array("i", prompt)))
    return examples, tokens


def published_answers(
    llm: PreTrainedModel,
    read: Callable[[list[int]], InputEmbeds],
    rows: int,
    max_new_tokens: int,
    eos_token_ids: set[int],
) -> list[list[int]]:
    """New token ids of every row, eos included, in batches that run until their last row ends; see `greedy_steps`."""
    answers = []
    for start in range(0, rows, BATCH_SIZE):
        sequence = read(list(range(start, min(start + BATCH_SIZE, rows))))
        new = llm.generate(
            inputs_embeds=sequence.embeds,
            attention_mask=sequence.mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(eos_token_ids),
            pad_token_id=min(eos_token_ids),
        )
        for ids in new.tolist():
            end = next((place for place, token in enumerate(ids, start=1) if token in eos_token_ids), len(ids))
            answers.append(ids[:end])
    return answers


def one_side(flags: EvaluateBenchmarkFlags) -> None:
    """Answer all problems in one way; write `work_dir`/answers.json (published) or records.json (ours)."""
    quiet_libraries()
    evaluation, process = flags.evaluation(), Process(0, 1, torch.device("cpu"))
    checkpoint = Path(evaluation.init_checkpoint)
    parts = prepare_answerer(evaluation.models, checkpoint, evaluation.limits, evaluation.augmentation)
    examples, tokens = read_problems(flags, parts.tokenizer)
    answerer = parts.load(torch.float32, process.device)
    if evaluation.backend == "vllm":
        max_model_len = check_vllm(parts.models, max(map(len, tokens)), flags.max_gen_len, process)
        answerer = VllmAnswerer(answerer, parts.models, torch.float32, process.device, max_model_len)
    slots, answer_parser = evaluation.eval_batch_size, evaluation.answer_parser
    problems = ProblemSet(TASK, examples, tokens, False, flags.max_gen_len, slots, answer_parser)
    folder = Path(tempfile.mkdtemp(dir=flags.work_dir))
    with measured():
        if flags.side == "baseline":
            ids = published_answers(
                answerer.llm,
                lambda numbers: answerer.embed([tokens[number] for number in numbers]),
                len(tokens),
                flags.max_gen_len,
                answerer.eos_token_ids,
            )
        else:
            answer_all(answerer, problems, folder, process)
    if flags.side == "baseline":
        answers = [(answerer.text(row), len(row), row[-1] in answerer.eos_token_ids) for row in ids]
        write_json(Path(flags.work_dir) / "answers.json", answers)
    else:
        write_json(Path(flags.work_dir) / "records.json", read_predictions(folder))


def main() -> None:
    flags = parse_flags(EvaluateBenchmarkFlags)
    if flags.side:
        one_side(flags)
        return
    tokenizer = load_tokenizer(flags.llm_path)
    if not tokenizer.chat_template:
        raise InputError(f"--llm_path {flags.llm_path} has no chat template, and would end no answer by itself")
    with tempfile.TemporaryDirectory() as folder:
        flags.work_dir = folder
        save_mapping(flags)

        def side(name: str) -> list[str]:
            return ["-m", "benchmarks.evaluate", "--side", name, "--work_dir", folder, *sys.argv[1:]]

        baseline, ours = in_turn(lambda: run(side("baseline")), lambda: run(side("ours")), flags.rounds)
        answers = read_json(Path(folder) / "answers.json")
        records = read_json(Path(folder) / "records.json")
    pairs = zip(answers, records, strict=True)
    same = sum((text, ended) == (record["output"], record["stopped"]) for (text, _, ended), record in pairs)
    report(
        "evaluate" if flags.backend == "transformers" else "evaluate, vLLM",
        baseline,
        ours,
        1 - same / len(answers),
        identical=f"{same} of {len(answers)}",
        mean_new_tokens=round(sum(length for _, length, _ in answers) / len(answers), 1),
        at_limit=sum(not ended for *_, ended in answers),
    )


if __name__ == "__main__":
    exit_with_message(main)
