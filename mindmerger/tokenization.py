"""Text to token ids, once per example: special tokens by id, and the query cut where a text is too long."""

import math
from array import array
from dataclasses import asdict

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.errors import InputError
from common.models import base_config, load_tokenizer
from mindmerger.batching import Tokens
from mindmerger.config import Limits, ModelPair
from mindmerger.data import Example
from mindmerger.frozen_models import encoder_shape
from mindmerger.init.ridge import Span
from mindmerger.tasks import LANGUAGES, Language, Prompt

# Texts handed to a tokenizer at a time: enough for its threads, few enough for its memory.
_AT_ONCE = 10_000
# A "</s>" in somebody's text is text. verbose=False: what is too long is cut below, by our own rule.
_PLAIN = {
    "add_special_tokens": False,
    "split_special_tokens": True,
    "return_attention_mask": False,
    "verbose": False,
}


class ExampleTokenizer:
    """Turns examples into `Tokens` for one pair of models.

    Args:
        mt_tokenizer, mt_config: the multilingual model's, None for the LLM alone, which reads no source. M2M100 and
            NLLB open a source with its language's token.
        llm_tokenizer: the LLM's.
        augmentation: whether the prompt follows the mapped states.
        max_seq_len: tokens of a source, its special tokens included.
        max_prompt_len: tokens of a prompt.
        max_gen_len: tokens of a target, its eos included.

    Attributes:
        names_language: whether a source is opened by its language's token.

    Raises:
        InputError: the LLM's tokenizer names no eos token.
    """

    def __init__(
        self,
        mt_tokenizer: PreTrainedTokenizerBase | None,
        mt_config: PretrainedConfig | None,
        llm_tokenizer: PreTrainedTokenizerBase,
        *,
        augmentation: bool,
        max_seq_len: int,
        max_prompt_len: int,
        max_gen_len: int,
    ):
        self.limits = Limits(max_seq_len, max_prompt_len, max_gen_len)
        if llm_tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer in {llm_tokenizer.name_or_path} names no eos token to end a target with")
        self.mt_tokenizer = mt_tokenizer
        self.llm_tokenizer = llm_tokenizer
        self.augmentation = augmentation
        # Beyond its own limit an encoder with learned positions has none.
        self.max_seq_len = min(max_seq_len, mt_tokenizer.model_max_length) if mt_tokenizer else max_seq_len
        self.max_prompt_len = max_prompt_len
        self.max_gen_len = max_gen_len
        self.names_language = mt_config is not None and mt_config.model_type == "m2m_100"
        self._source_prefix, self._source_suffix = _special_tokens(mt_tokenizer) if mt_tokenizer else ([], [])
        if self.names_language:
            # Where such a tokenizer itself puts the language has changed; the models were trained on this order.
            self._source_suffix = [mt_tokenizer.eos_token_id]

    @property
    def source_pad_id(self) -> int:
        """What pads a source: the encoder's own padding id, by which some encoders count positions."""
        pad_id = None if self.mt_tokenizer is None else self.mt_tokenizer.pad_token_id
        return 0 if pad_id is None else pad_id

    def __call__(self, examples: list[Example], with_targets: bool = True) -> list[Tokens]:
        """Tokenize `examples`; without targets for generation.

        Raises:
            InputError: a template alone is longer than its limit, or the encoder lacks a source's language.
        """
        rows: list[Tokens] = []
        for start in range(0, len(examples), _AT_ONCE):
            rows += self._tokenize(examples[start : start + _AT_ONCE], with_targets)
        return rows

    def _tokenize(self, examples: list[Example], with_targets: bool) -> list[Tokens]:
        if self.mt_tokenizer is not None:
            specials = (1 if self.names_language else len(self._source_prefix)) + len(self._source_suffix)
            limit = self.max_seq_len - specials
            sources = _fit_all([example.source for example in examples], self.mt_tokenizer, limit, "--max_seq_len")
        else:
            sources = [([], False)] * len(examples)
        if self.augmentation:
            prompts = _fit_all(
                [example.prompt for example in examples], self.llm_tokenizer, self.max_prompt_len, "--max_prompt_len"
            )
        else:
            prompts = [([], False)] * len(examples)
        if with_targets:
            targets = [self._target(ids) for ids in _ids(self.llm_tokenizer, [e.target for e in examples])]
        else:
            targets = [([], False)] * len(examples)

        tokens = []
        for example, source, prompt, target in zip(examples, sources, prompts, targets, strict=True):
            prefix = self._source_prefix_of(example.language)
            kinds = {"source": source, "prompt": prompt, "target": target}
            tokens.append(
                Tokens(
                    source=array("i", [*prefix, *source[0], *self._source_suffix]),
                    prompt=array("i", prompt[0]),
                    target=array("i", target[0]),
                    language=example.language.name,
                    cut=tuple(kind for kind, (_, was_cut) in kinds.items() if was_cut),
                )
            )
        return tokens

    def sources_with_spans(self, texts: list[str], language: Language) -> list[tuple[list[int], list[Span]]]:
        """The source ids of texts in one language, cut to their limit, and each token's span, (0, 0) if special.

        Raises:
            InputError: the tokenizer gives no character offsets, or the encoder lacks the language.
        """
        prefix, suffix = self._source_prefix_of(language), self._source_suffix
        limit = self.max_seq_len - len(prefix) - len(suffix)
        return [
            ([*prefix, *ids[:limit], *suffix], [*[(0, 0)] * len(prefix), *spans[:limit], *[(0, 0)] * len(suffix)])
            for ids, spans in ids_with_spans(self.mt_tokenizer, texts)
        ]

    def label_ids(self, label: str) -> list[int]:
        """A label word as a target begins with it: without eos."""
        return _ids(self.llm_tokenizer, [label])[0]

    def _target(self, ids: list[int]) -> tuple[list[int], bool]:
        if len(ids) < self.max_gen_len:
            return [*ids, self.llm_tokenizer.eos_token_id], False
        # A model must not learn that a solution ends where the limit happened to fall.
        return ids[: self.max_gen_len], True

    def _source_prefix_of(self, language: Language) -> list[int]:
        return [self._language_token(language)] if self.names_language else self._source_prefix

    def _language_token(self, language: Language) -> int:
        for token in (language.nllb, f"__{language.code}__"):
            index = self.mt_tokenizer.convert_tokens_to_ids(token)
            if index is not None and index != self.mt_tokenizer.unk_token_id:
                return index
        known = [other.code for other in LANGUAGES.values() if self._knows(other)]
        raise InputError(
            f"{self.mt_tokenizer.name_or_path} has no language token for {language.name}: "
            f"leave it out, as in --languages {','.join(known)}"
        )

    def _knows(self, language: Language) -> bool:
        tokens = self.mt_tokenizer.convert_tokens_to_ids([language.nllb, f"__{language.code}__"])
        return any(index not in (None, self.mt_tokenizer.unk_token_id) for index in tokens)


def load_example_tokenizer(models: ModelPair, limits: Limits, augmentation: bool) -> ExampleTokenizer:
    """The tokenizers of `models`, with limits.

    Raises:
        InputError: a tokenizer or the multilingual model's config cannot be loaded.
    """
    mt_tokenizer = mt_config = None
    if models.mt_path is not None:
        mt_tokenizer = load_tokenizer(models.mt_path, models.mt_revision, models.trust_remote_code)
        mt_config = base_config(models.mt_path, models.mt_revision, models.trust_remote_code)
        # Some tokenizers name no limit.
        mt_tokenizer.model_max_length = min(mt_tokenizer.model_max_length, encoder_shape(models)[1] or math.inf)
    llm_tokenizer = load_tokenizer(models.llm_path, models.llm_revision, models.trust_remote_code)
    return ExampleTokenizer(mt_tokenizer, mt_config, llm_tokenizer, augmentation=augmentation, **asdict(limits))


def ids_with_spans(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[tuple[list[int], list[Span]]]:
    """The ids of each text, without special tokens, and the span of each token in it, without spaces around.

    Raises:
        InputError: the tokenizer gives no character offsets.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer in {tokenizer.name_or_path} is no fast one and does not tell where its tokens stand in a "
            "text, by which an aligned start matches them: take another --mapping_init"
        )
    encoded = tokenizer(texts, return_offsets_mapping=True, **_PLAIN)
    return [
        (ids, [_without_spaces(text, start, end) for start, end in offsets])
        for text, ids, offsets in zip(texts, encoded.input_ids, encoded.offset_mapping, strict=True)
    ]


def _without_spaces(text: str, start: int, end: int) -> Span:
    """Some tokenizers count the space before a word to its first token, others do not."""
    end = start + len(text[start:end].rstrip())
    return end - len(text[start:end].lstrip()), end


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, **_PLAIN).input_ids


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    raise InputError(f"cannot tell which special tokens {tokenizer.name_or_path} puts around a text: {full}")


def _fit_all(
    prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, limit: int, flag: str
) -> list[tuple[list[int], bool]]:
    """(ids, was cut) of every prompt, none longer than `limit`."""
    fitted = []
    for prompt, ids in zip(prompts, _ids(tokenizer, [prompt.text for prompt in prompts]), strict=True):
        was_cut = len(ids) > limit
        fitted.append((_cut_query(prompt, tokenizer, limit, flag) if was_cut else ids, was_cut))
    return fitted


def _cut_query(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, limit: int, flag: str) -> list[int]:
    """The ids of the prompt with the longest beginning of its query that fits, found by bisection over characters.

    Token ids are not cut and pasted: only the whole text tokenizes as the model has seen it.
    """

    def ids_with(characters: int) -> list[int]:
        return _ids(tokenizer, [prompt.before + prompt.query[:characters] + prompt.after])[0]

    best = ids_with(0)
    if len(best) > limit:
        raise InputError(f"{flag} {limit} leaves no room: the template alone has {len(best)} tokens")
    fits, too_long = 0, len(prompt.query)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        ids = ids_with(middle)
        if len(ids) <= limit:
            fits, best = middle, ids
        else:
            too_long = middle
    return best
