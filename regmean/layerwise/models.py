"""Models of a merge that are run layer by layer on their calibration texts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PretrainedConfig

from common.errors import InputError, within_memory
from common.logging import quiet_libraries
from common.models import load_tokenizer
from common.ranks import Process
from regmean.architectures import auto_class, config_of
from regmean.calibration import Calibration, check_length, check_tokens, load_calibration, make_batches
from regmean.comparison import check_vocabularies
from regmean.config import MergeFlags
from regmean.experts import ExpertLayer
from regmean.hooks import linear_layers, table_positions
from regmean.layerwise.grams import course_of
from regmean.layerwise.model import BEFORE, Course, LayerwiseModel, build_without_weights, open_layerwise, stored_dtype
from regmean.layerwise.routing import advance, agreement
from regmean.layerwise.survey import Survey, survey
from regmean.memory import BATCHES
from regmean.model_folder import Checkpoint, open_checkpoint
from regmean.report import Routing


@dataclass(frozen=True, eq=False)
class LayerwiseModels:
    """The models' checkpoints, classes, configs, surveys and texts, in their order, and the dtype that they run in."""

    flags: MergeFlags
    checkpoints: list[Checkpoint]
    classes: list[Any]
    configs: list[PretrainedConfig]
    surveys: list[Survey]
    texts: list[Calibration]
    dtype: torch.dtype
    process: Process

    @classmethod
    def of(cls, flags: MergeFlags, checkpoints: list[Checkpoint], process: Process) -> Self:
        """Read the texts, and survey the models.

        Raises:
            InputError: a model that cannot be run layer by layer, texts that cannot be read, or other vocabularies.
        """
        sources = flags.texts()
        # The merge reads the texts of all models.
        check_vocabularies(checkpoints)
        quiet_libraries()
        configs = [config_of(checkpoint) for checkpoint in checkpoints]
        classes = [auto_class(*pair) for pair in zip(checkpoints, configs, strict=True)]
        surveys = [survey(*of, c.name) for *of, c in zip(classes, configs, checkpoints, strict=True)]
        texts = [
            load_calibration(source, load_tokenizer(str(checkpoint.tokenizer_folder)))
            for checkpoint, source in zip(checkpoints, sources, strict=True)
        ]
        dtype = stored_dtype(checkpoints[0], configs[0], flags.dtype)
        if dtype == torch.float16 and process.device.type == "cpu":
            dtype = torch.float32  # CPUs multiply float16 slowly
        return cls(flags, checkpoints, classes, configs, surveys, texts, dtype, process)

    def build(self, index: int, checkpoint: Checkpoint | None = None) -> LayerwiseModel:
        """Build a model without weights, whose files are those of `checkpoint` if it is given."""
        device = self.process.device
        model = build_without_weights(self.classes[index], self.configs[index], self.dtype, device)
        check_tokens(self.texts[index], model.get_input_embeddings())
        check_length(self.texts[index], table_positions(model))
        return open_layerwise(checkpoint or self.checkpoints[index], model, device, self.surveys[0].tuple_length)

    @property
    def has_experts(self) -> bool:
        """True if the first model is a mixture of experts whose routing can be measured."""
        return any(isinstance(layer, ExpertLayer) for layer in linear_layers(self.build(0).model).values())

    def courses(
        self, index: int, merged: LayerwiseModel, own: LayerwiseModel, sampled: int = 1
    ) -> tuple[Course, Course]:
        """This rank's texts of a model before the first step of the merge, and before that of the model itself, which
        gets every batch of the number `sampled`.
        """
        texts, process = self.texts[index], self.process
        size = self.flags.batch_tokens(process.device.type)
        padding = not self.surveys[index].depends_on_padding
        batches = make_batches([len(example) for example in texts.examples], size, padding)
        batches = batches[process.rank :: process.world_size]
        numbers = range(len(batches)), range(0, len(batches), sampled)
        of_merged, of_own = (
            course_of(model, texts, batches, own_numbers, self.flags.offload_dir)
            for model, own_numbers in zip((merged, own), numbers, strict=True)
        )
        return of_merged, of_own

    def routing(self, folder: Path) -> Routing:
        """Compare the routing of the merge in a folder with each model's, layer by layer.

        Raises:
            InputError: a state is NaN or infinite.
        """
        merged, columns = self.build(0, open_checkpoint(str(folder), folder=folder)), []
        for index in range(len(self.checkpoints)):
            pair = self._by_all(lambda index=index: self.courses(index, merged, self.build(index)))
            columns.append([self._agreement(step, pair) for step in range(BEFORE, len(merged.layers))][1:])
        return Routing(self.flags.models, [list(layer) for layer in zip(*columns, strict=True)])

    def _agreement(self, step: int, pair: tuple[Course, Course]) -> float | None:
        def advance_all() -> None:
            for course in pair:
                weights = course.model.weights(step)
                for number in range(len(course.batches)):
                    advance(course, step, weights, number)

        self._by_all(advance_all)
        return agreement(*pair, self.process)

    def _by_all(self, work: Callable[[], Any]) -> Any:
        """The result of `work` on this rank; an `InputError` on one rank is raised on all."""
        done, message = None, ""
        try:
            with within_memory(BATCHES):
                done = work()
        except InputError as error:
            message = str(error)
        if messages := [theirs for theirs in self.process.gather(message) if theirs]:
            raise InputError(messages[0])
        return done
