"""MindMerger as a model of lm-evaluation-harness 0.4.13."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from common.cli import parse_flags
from common.errors import InputError
from common.logging import progress, quiet_libraries
from common.ranks import start_process
from mindmerger.batching import Tokens
from mindmerger.checkpoint import switched_languages, warn_of_scale
from mindmerger.config import EvaluationFlags
from mindmerger.data import Example
from mindmerger.evaluation.answerer import pick_dtype, prepare_answerer
from mindmerger.frozen_models import check_context
from mindmerger.tasks import LANGUAGES, UNKNOWN, Language, Prompt, find_language, math_prompt

# The flags of run_evaluation.py on models and limits.
_FLAGS = (
    *("llm_path", "llm_revision", "mt_path", "mt_revision", "trust_remote_code", "dtype"),
    *("encoder_layer", "augmentation", "prompt", "max_seq_len", "max_prompt_len", "max_gen_len", "switch"),
)


@register_model("mindmerger")
class MindMergerLM(LM):
    """An LLM with a mapping: the encoder's input is the question of a row, the LLM's the whole context.

    The context corresponds to `Example.prompt`, the continuation to the target. Each is tokenized separately, as in
    training. If a text is too long, the question in it is cut. In languages that the mapping harms, by its verdicts,
    the LLM alone reads the context, unless `switch=off`; a task of unknown language never switches.

    Args:
        checkpoint: mapping: folder, `.safetensors` or `pytorch_model.bin`.
        batch_size: rows of a batch.
        max_batch_size: argument of the harness for automatic batch sizes.
        device: device, by the harness's name.
        source_field: field of a task's rows that is the encoder's input. If a row has a `stem`, only this part may be
            cut.
        source_language: English name or ISO code of the language of all rows; default: the language code at the end
            of the task's name, as in mgsm_direct_de.
        flags: flags of `run_evaluation.py` in `_FLAGS`.

    Raises:
        InputError: an argument is invalid.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
        source_field: str = "question",
        source_language: str | None = None,
        **flags: Any,
    ):
        super().__init__()
        if checkpoint is None:
            raise InputError("--model_args checkpoint=FOLDER is needed: the mapping to evaluate")
        unknown = flags.keys() - set(_FLAGS)
        if unknown:
            known = ("checkpoint", "source_field", "source_language", *_FLAGS)
            raise InputError(f"--model_args takes no {', '.join(sorted(unknown))}; it takes {', '.join(known)}")
        if not str(batch_size).isdecimal():
            raise InputError(f"--batch_size {batch_size} must be a number of rows")
        # For the harness's default device, each rank uses its own GPU, or the CPU if there is none.
        device = "auto" if device in (None, "cuda", "cuda:0") else device
        words = {"init_checkpoint": checkpoint, "eval_batch_size": batch_size, "device": device} | flags
        self._flags = given = parse_flags(
            EvaluationFlags, [f"--{name}={value}" for name, value in words.items() if value is not None]
        )
        self._source_field = source_field
        self._source_language = None if source_language is None else find_language(source_language)

        self._process = start_process(self._flags.device)
        quiet_libraries()
        self._rank, self._world_size, self._device = self._process.rank, self._process.world_size, self._process.device
        dtype = pick_dtype(given.dtype, self._process.device)
        if given.switch == "decide":
            raise InputError("--model_args switch=decide: run_evaluation.py decides, here it is on or off")
        alone = switched_languages(Path(checkpoint), given.switch, self._process)
        parts = prepare_answerer(given.models, Path(checkpoint), given.limits, given.augmentation, alone, given.prompt)
        warn_of_scale(parts.models, Path(checkpoint), self._process)
        self._models, self._answerer = parts.models, parts.load(dtype, self._process.device)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate greedy answers, each up to the first of its stop strings.

        Raises:
            InputError: a task needs sampling, has no field for the encoder, or has rows too long for the LLM.
        """

        def answer(rows: list[Tokens], settings: str) -> Iterator[list[tuple[int, str]]]:
            until, max_new_tokens = json.loads(settings)
            slots = self._flags.eval_batch_size
            for ended in self._answerer.generate(dict(enumerate(rows)), max_new_tokens, slots, self._has_ended(until)):
                yield [(index, postprocess_generated_text(text, until, None)) for index, text, _ in ended]

        settings = []
        for request in requests:
            kwargs = normalize_gen_kwargs(request.args[1], self._flags.max_gen_len)
            if kwargs["do_sample"]:
                raise InputError(f"task {request.task_name} needs sampling, and MindMerger decodes greedily")
            settings.append(json.dumps([[stop for stop in kwargs["until"] if stop], kwargs["max_gen_toks"]]))
        texts = [""] * len(requests)
        lengths = [json.loads(setting)[1] for setting in settings]
        for number, text in self._answers(requests, settings, lengths, answer, disable_tqdm):
            texts[number] = text
            self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Compute (log probability in nats, True if it is the greedy answer) of each continuation.

        Raises:
            InputError: a task has no field for the encoder, or rows too long for the LLM.
        """
        # The continuations of one context are scored together, and contexts with the same ones in one batch.
        groups: dict[tuple[str | None, int | None, str], list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault((request.task_name, request.doc_id, request.args[0]), []).append(number)
        members = list(groups.values())
        continuations = [[requests[number].args[1] for number in group] for group in members]
        words, label_ids = list(map(json.dumps, continuations)), self._answerer.tokenizer.label_ids
        lengths = [max(len(label_ids(word)) for word in group) for group in continuations]

        def score(rows: list[Tokens], words: str) -> Iterator[list[tuple[int, list[tuple[float, bool]]]]]:
            size = self._flags.eval_batch_size
            for start in range(0, len(rows), size):
                scores, are_greedy = self._answerer.log_likelihoods(rows[start : start + size], json.loads(words))
                pairs = zip(scores.tolist(), are_greedy.tolist(), strict=True)
                yield [(index, list(zip(*pair, strict=True))) for index, pair in enumerate(pairs, start)]

        results = [(0.0, False)] * len(requests)
        firsts = [requests[group[0]] for group in members]
        for index, scored in self._answers(firsts, words, lengths, score, disable_tqdm):
            for number, result in zip(members[index], scored, strict=True):
                results[number] = result
                self.cache_hook.add_partial("loglikelihood", requests[number].args, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Raise InputError: a whole text has no question for the encoder."""
        raise InputError(
            f"task {requests[0].task_name} needs the likelihood of a whole text (loglikelihood_rolling), without a "
            "question for the encoder: use --model hf for the LLM alone"
        )

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The LLM's chat template; InputError for a mapping trained with published prompts, or a template's name."""
        if self._answerer.tokenizer.chat is None or isinstance(chat_template, str):
            raise InputError("--apply_chat_template needs a mapping trained with --prompt chat, and no template's name")
        return str(self._answerer.tokenizer.llm_tokenizer.chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Text of the user's turn, the only one allowed; the tokenizer of the mapping adds the template."""
        if [turn["role"] for turn in chat_history] != ["user"] or not add_generation_prompt:
            raise InputError(
                f"--apply_chat_template: turns of {', '.join(turn['role'] for turn in chat_history)}, not one user's: "
                "leave out --system_instruction and the task's gen_prefix, and set --fewshot_as_multiturn False"
            )
        return chat_history[0]["content"]

    @property
    def tokenizer_name(self) -> str:
        """Name of the LLM's tokenizer, in the key of the harness's cache of requests."""
        return self._models.llm_path

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Stack `tensor` of every rank."""
        # Through host memory, since a tensor would arrive on the device of the sending rank.
        return torch.stack(self._process.gather(tensor.cpu())).to(tensor.device)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Gather `obj` of every rank on rank `dst`."""
        gathered = self._process.gather(obj)
        return gathered if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._process.barrier()

    def _answers(
        self,
        requests: list[Instance],
        settings: list[str],
        lengths: list[int],
        answer: Callable[[list[Tokens], str], Iterator[list[tuple[int, Any]]]],
        disable_tqdm: bool,
    ) -> Iterator[tuple[int, Any]]:
        """Yield (number of a request, result of `answer`), grouped by equal settings, longest first.

        `lengths` are tokens of the longest answer to each request. The last token of an answer is no input.
        """
        tokens = self._answerer.tokenizer([self._example(request) for request in requests], with_targets=False)
        longest = max((len(row) + length for row, length in zip(tokens, lengths, strict=True)), default=1)
        check_context(self._models, longest - 1)
        with progress(self._process, total=len(requests), unit="request", leave=not disable_tqdm) as bar:
            for setting in dict.fromkeys(settings):
                numbers = [number for number, other in enumerate(settings) if other == setting]
                numbers.sort(key=lambda number: -len(tokens[number]))
                for answers in answer([tokens[number] for number in numbers], setting):
                    yield from ((numbers[index], result) for index, result in answers)
                    bar.update(len(answers))

    def _example(self, request: Instance) -> Example:
        question = request.doc.get(self._source_field)
        if not isinstance(question, str) or not question.strip():
            raise InputError(
                f"task {request.task_name}: its rows have no text {self._source_field!r} for the encoder to read, but "
                f"{', '.join(map(str, request.doc))}: name one, as in --model_args source_field=NAME"
            )
        stem = str(request.doc.get("stem") or question).strip()
        source, prompt, language = _split(question, stem), request.args[0], self._language(request.task_name)
        # In a chat the prompt of run_evaluation.py is the question alone.
        turn = source if prompt == math_prompt(question).text else None
        return Example(source, _split(prompt, stem), "", language, turn=turn)

    def _language(self, task: str) -> Language:
        if self._source_language is not None:
            return self._source_language
        for language in LANGUAGES.values():
            if task.endswith((f"_{language.code}", f"_{language.nllb}")):
                return language
        if self._answerer.tokenizer.names_language:
            raise InputError(
                f"the encoder needs the language of a question: name that of {task}, as in "
                "--model_args source_language=de"
            )
        return UNKNOWN

    def _has_ended(self, until: list[str]) -> Callable[[list[int]], bool] | None:
        if not until:
            return None
        decode = self._answerer.tokenizer.llm_tokenizer.decode
        # A token has at least one byte; one more, since a decoder may strip a space from the first.
        longest = max(len(stop.encode()) for stop in until) + 1

        def has_ended(ids: list[int]) -> bool:
            # With special tokens, since the stop strings of tasks include chat models' end of turn.
            end = decode(ids[-longest:])
            return any(stop in end for stop in until)

        return has_ended


def _split(text: str, query: str) -> Prompt:
    """Split `text` at the last occurrence of `query`, which may be cut; without one, no part may be cut."""
    before, query, after = text.rpartition(query)
    return Prompt(before, query, after) if query else Prompt(text, "", "")
