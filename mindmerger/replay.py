"""Replayed rows, against harm in languages that the LLM already reads: their target is its own answer to the prompt."""

import hashlib
import json
import random
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import within_memory
from common.io import sha256
from common.logging import progress, say
from common.models import base_config
from common.ranks import Process
from mindmerger.batching import plan_once
from mindmerger.chat import without_thinking
from mindmerger.config import ModelPair
from mindmerger.evaluation.answerer import Answerer
from mindmerger.evaluation.decoding import greedy_steps
from mindmerger.frozen_models import load_llm
from mindmerger.modeling import InputEmbeds
from mindmerger.probe import check_answers
from mindmerger.tasks import Task
from mindmerger.tasks.answers import is_same_number, parse_answer
from mindmerger.token_table import Rows, TokenTable, open_replaced
from mindmerger.tokenization import ExampleTokenizer


@dataclass(frozen=True)
class OwnAnswers:
    """The LLM's own answers to some training rows, made by all ranks together and cached beside the token table.

    Attributes:
        models: names of the models.
        task: task of the training rows.
        keeps_all: True to keep every answer that ended, not only right ones.
        tokenizer: tokenizer of examples.
        dtype: dtype of the LLM.
        slots: rows that a rank answers at once.
    """

    models: ModelPair
    task: Task
    keeps_all: bool
    tokenizer: ExampleTokenizer
    dtype: torch.dtype
    slots: int

    def replay(
        self,
        table: TokenTable,
        train: Rows,
        fraction: float,
        seed: int,
        process: Process,
        languages: Collection[str] | None = None,
    ) -> Rows:
        """Add to `train` a copy of some of its rows, with the LLM's own answers as targets.

        Args:
            table: table of all rows.
            train: training rows.
            fraction: number of answered rows by that of training rows.
            seed: seed of the choice.
            process: this rank.
            languages: English names of the languages of answered rows; None for all.

        Raises:
            InputError: out of memory, or the LLM cannot be loaded.
        """
        rows = [row for row, name in enumerate(train.row_languages()) if languages is None or name in languages]
        count = min(round(fraction * len(train)), len(rows))
        asked = train.index[sorted(random.Random(f"{seed} replay").sample(rows, count))]
        folder = table.folder.parent / self._key(table, asked)
        answers: dict[int, list[int]] = {}
        (known,) = process.sum(folder.exists())
        if known < process.world_size:
            with within_memory(
                f"out of memory while the LLM, whole on each device, answers {self.slots} rows at once for --replay: "
                "lower --eval_batch_size, use bf16 in --deepspeed_config, or leave --replay out; --plan shows what fits"
            ):
                answers = self._answer(table.rows(asked), process)
        own = open_replaced(folder, table, {int(asked[row]): ids for row, ids in answers.items()})
        process.barrier()
        say(process, f"replay: {len(own)} of {count} answers of the LLM alone are kept, in {folder}")
        return train.joined(own)

    def _key(self, table: TokenTable, asked: np.ndarray) -> str:
        """Name of the table of answers: a hash of everything that determines them."""
        config = base_config(self.models.llm_path, self.models.llm_revision, self.models.trust_remote_code)
        local = sorted(Path(self.models.llm_path).glob("*.*")) if Path(self.models.llm_path).is_dir() else []
        content: dict[str, Any] = {
            "table": table.folder.name,
            "rows": hashlib.sha256(asked.tobytes()).hexdigest(),
            # Private: a config has no public attribute with the hub revision that it was loaded from.
            "llm": [self.models.llm_path, getattr(config, "_commit_hash", None), config.to_dict()],
            "files": [[path.name, path.stat().st_size, _digest(path)] for path in local],
            "dtype": str(self.dtype),
            "keeps_all": self.keeps_all,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def _answer(self, rows: Rows, process: Process) -> dict[int, list[int]]:
        """Answer `rows` by the LLM alone, each rank its part; return the ids of kept answers by row, on every rank."""
        llm = load_llm(self.models.llm_path, self.models.llm_revision, self.dtype, self.models.trust_remote_code)
        llm.to(process.device)
        check_answers(llm)
        answerer, found = Answerer(llm, self.tokenizer), {}
        plan = plan_once(rows.lengths, 1, process.world_size)[process.rank]
        tokens = {row: rows.tokens([row])[0] for batch in plan for row in batch}

        def input_of(chosen: list[int]) -> InputEmbeds:
            return answerer.embed([replace(tokens[row], target=[]) for row in chosen])

        limit, ends = self.tokenizer.max_gen_len, answerer.eos_token_ids
        with progress(process, total=len(tokens), desc="the LLM's own answers", unit="row") as bar:
            for answers in greedy_steps(llm, tokens, input_of, self.slots, limit, ends):
                if done := {answer.problem: answer.ids for answer in answers if answer.is_done}:
                    found |= {row: ids for row, ids in done.items() if self._is_kept(ids, tokens[row].target, ends)}
                    bar.update(len(done))
        return {row: ids for own in process.gather(found) for row, ids in own.items()}

    def _is_kept(self, ids: list[int], target: np.ndarray, ends: set[int]) -> bool:
        """True if an answer ended, and has the label or the number of the target unless all such are kept."""
        if ids[-1] not in ends:
            return False
        own, wanted = (self.tokenizer.llm_tokenizer.decode(row, skip_special_tokens=True) for row in (ids, target))
        own = without_thinking(own)
        if self.keeps_all:
            return bool(own.strip())
        if self.task.labels:
            return own.strip() == wanted.strip()
        number = parse_answer(wanted)
        return number is not None and is_same_number(parse_answer(own), number)


def _digest(path: Path) -> str | int:
    """Hash of a small file; time of the last change of weights, which would take long to hash."""
    return path.stat().st_mtime_ns if path.stat().st_size > 10**8 else sha256(path)
