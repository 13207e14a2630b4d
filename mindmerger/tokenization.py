"""Text to token ids, once per example: special tokens by id, and the query cut where a text is too long."""

import math
import re
from dataclasses import asdict

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.errors import InputError
from common.models import base_config, load_tokenizer
from mindmerger.batching import KINDS, Tokens
from mindmerger.config import Limits, ModelPair
from mindmerger.data import Example
from mindmerger.frozen_models import encoder_shape
from mindmerger.init.ridge import Span
from mindmerger.tasks import LANGUAGES, Language, Prompt

# Texts by which the tokenizer's backend is compared with the tokenizer.
_CHECKED = 16
# eng_Latn (NLLB), __en__ (M2M100), en_XX (mBART), __en_XX__ (PLBart), __eng__ (SeamlessM4T).
_LANGUAGE_TOKEN = re.compile(r"(?P<nllb>[a-z]{3}_[A-Z][a-z]{3})|[a-z]{2}_[A-Z]{2}|__[a-z]{2,3}(_[A-Z]\w+)?__")
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
        mt_tokenizer, mt_config: the multilingual model's, None for the LLM alone, which reads no source. Where the
            tokenizer puts a language token around a text, a source gets its own language's.
        llm_tokenizer: the LLM's.
        augmentation: True if the prompt follows the mapped states.
        max_seq_len: tokens of a source, its special tokens included.
        max_prompt_len: tokens of a prompt.
        max_gen_len: tokens of a target, its eos included.

    Attributes:
        names_language: True if its language's token stands before or after a source.

    Raises:
        InputError: the LLM's tokenizer names no eos token, or the encoder takes a language as anything but a token.
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
        if mt_config is not None:
            _refuse_languages_beside_tokens(mt_config, mt_tokenizer.name_or_path)
        self._source_prefix, self._source_suffix = _special_tokens(mt_tokenizer) if mt_tokenizer else ([], [])
        self._language_id = self._find_language() if mt_tokenizer else None
        self.names_language = self._language_id is not None

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
        texts: dict[str, tuple[list[list[int]], set[int]]] = dict.fromkeys(KINDS, ([[]] * len(examples), set()))
        if self.mt_tokenizer is not None:
            specials = len(self._source_prefix) + len(self._source_suffix)
            sources = [example.source for example in examples]
            texts["source"] = _fit_all(sources, self.mt_tokenizer, self.max_seq_len - specials, "--max_seq_len")
        if self.augmentation:
            prompts = [example.prompt for example in examples]
            texts["prompt"] = _fit_all(prompts, self.llm_tokenizer, self.max_prompt_len, "--max_prompt_len")
        if with_targets:
            texts["target"] = self._targets([example.target for example in examples])

        tokens = []
        around = {language: self._around_source(language) for language in {e.language for e in examples}}
        for row, (example, source, prompt, target) in enumerate(
            zip(examples, *(ids for ids, _ in texts.values()), strict=True)
        ):
            prefix, suffix = around[example.language]
            cut = tuple([kind for kind, (_, cut_rows) in texts.items() if row in cut_rows])
            tokens.append(Tokens([*prefix, *source, *suffix], prompt, target, example.language.name, cut))
        return tokens

    def sources_with_spans(self, texts: list[str], language: Language) -> list[tuple[list[int], list[Span]]]:
        """The source ids of texts in one language, cut to their limit, and each token's span, (0, 0) if special.

        Raises:
            InputError: the tokenizer gives no character offsets, or the encoder lacks the language.
        """
        prefix, suffix = self._around_source(language)
        limit = self.max_seq_len - len(prefix) - len(suffix)
        return [
            ([*prefix, *ids[:limit], *suffix], [*[(0, 0)] * len(prefix), *spans[:limit], *[(0, 0)] * len(suffix)])
            for ids, spans in ids_with_spans(self.mt_tokenizer, texts)
        ]

    def label_ids(self, label: str) -> list[int]:
        """A label word as a target begins with it: without eos."""
        return _ids(self.llm_tokenizer, [label])[0]

    def _targets(self, texts: list[str]) -> tuple[list[list[int]], set[int]]:
        """The ids of every target, closed by eos unless it was cut; and which were.

        A model must not learn that a solution ends where the limit happened to fall.
        """
        eos, limit = self.llm_tokenizer.eos_token_id, self.max_gen_len
        targets = _ids(self.llm_tokenizer, texts)
        cut = {row for row, ids in enumerate(targets) if len(ids) >= limit}
        return [ids[:limit] if row in cut else [*ids, eos] for row, ids in enumerate(targets)], cut

    def _find_language(self) -> int | None:
        """The language token among the special tokens around a source."""
        specials = [*self._source_prefix, *self._source_suffix]
        for index, token in zip(specials, self.mt_tokenizer.convert_ids_to_tokens(specials), strict=True):
            if match := _LANGUAGE_TOKEN.fullmatch(token):
                if match["nllb"]:
                    # Where NLLB's tokenizers put the language has changed; the models were trained on this order.
                    self._source_prefix, self._source_suffix = [index], [self.mt_tokenizer.eos_token_id]
                return index
        return None

    def _around_source(self, language: Language) -> tuple[list[int], list[int]]:
        """The special tokens before and after a source in `language`."""
        if not self.names_language:
            return self._source_prefix, self._source_suffix
        own = self._token_of(language)
        if own is None:
            known = [other.code for other in LANGUAGES.values() if self._token_of(other) is not None]
            raise InputError(
                f"{self.mt_tokenizer.name_or_path} has no language token for {language.name}: "
                f"leave it out, as in --languages {','.join(known)}"
            )
        prefix, suffix = (
            [own if index == self._language_id else index for index in specials]
            for specials in (self._source_prefix, self._source_suffix)
        )
        return prefix, suffix

    def _token_of(self, language: Language) -> int | None:
        indices = self.mt_tokenizer.convert_tokens_to_ids(list(language.tokens))
        return next((index for index in indices if index not in (None, self.mt_tokenizer.unk_token_id)), None)


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
    """The ids of each text, without special tokens.

    Many texts go straight to the tokenizer's backend, which takes half the time of the tokenizer's own call. Some
    tokenizers change a text before that: where the two differ on the first texts, the call is used.
    """
    first = tokenizer(texts[:_CHECKED], **_PLAIN).input_ids if texts else []
    if len(texts) <= _CHECKED:
        return first
    # That call has set the backend to our options.
    if not tokenizer.is_fast or _backend_ids(tokenizer, texts[:_CHECKED]) != first:
        return tokenizer(texts, **_PLAIN).input_ids
    return _backend_ids(tokenizer, texts)


def _backend_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _refuse_languages_beside_tokens(config: PretrainedConfig, path: str) -> None:
    """Refuse X-MOD, which has an adapter for each language, and XLM where it has embeddings of languages."""
    if config.model_type == "xmod" or (getattr(config, "use_lang_emb", False) and config.n_langs > 1):
        raise InputError(
            f"{path} is told a source's language by ids beside its tokens, which are not given here: take an encoder "
            "that reads all languages alike or has language tokens"
        )


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
) -> tuple[list[list[int]], set[int]]:
    """The ids of every prompt, none longer than `limit`; and which prompts were cut."""
    fitted = _ids(tokenizer, [prompt.text for prompt in prompts])
    cut = {row for row, ids in enumerate(fitted) if len(ids) > limit}
    for row in cut:
        fitted[row] = _cut_query(prompts[row], tokenizer, limit, flag)
    return fitted, cut


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
