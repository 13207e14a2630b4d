"""Tokenization of examples: special tokens are added by id, and the query of a text that is too long is cut."""

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.errors import InputError
from common.models import base_config, load_tokenizer
from mindmerger.batching import KINDS, Tokens
from mindmerger.chat import ChatTemplate
from mindmerger.config import Limits, ModelPair
from mindmerger.data import Example
from mindmerger.frozen_models import encoder_shape
from mindmerger.init.ridge import Span
from mindmerger.tasks import LANGUAGES, NO_PROMPT, Language, Prompt

# Function from texts to their ids.
Reader = Callable[[list[str]], list[list[int]]]
# Texts on which the tokenizer's backend is compared with the tokenizer.
_CHECKED = 16
# eng_Latn (NLLB), __en__ (M2M100), en_XX (mBART), __en_XX__ (PLBart), __eng__ (SeamlessM4T).
_LANGUAGE_TOKEN = re.compile(r"(?P<nllb>[a-z]{3}_[A-Z][a-z]{3})|[a-z]{2}_[A-Z]{2}|__[a-z]{2,3}(_[A-Z]\w+)?__")
# A "</s>" in a text is plain text. verbose=False: no warning of long texts, which are cut below.
_PLAIN = {
    "add_special_tokens": False,
    "split_special_tokens": True,
    "return_attention_mask": False,
    "verbose": False,
}


class ExampleTokenizer:
    """Tokenizer of examples for one pair of models.

    Args:
        mt_tokenizer, mt_config: tokenizer and config of the multilingual model; None for the LLM alone. If the
            tokenizer adds a language token, each source gets the token of its language.
        llm_tokenizer: tokenizer of the LLM.
        augmentation: True if the prompt follows the mapped states.
        max_seq_len: maximum tokens of a source, its special tokens included.
        max_prompt_len: maximum tokens of a prompt.
        max_gen_len: maximum tokens of a target, its eos included.
        chats: True for prompts in the LLM's chat template, with the mapped states inside the user's turn.

    Attributes:
        names_language: True if a source has a language token.
        alone: English names of languages whose examples have the prompt only, for the LLM alone.
        chat: the chat template; None for published prompts.
        bos_token_id: first token of every sequence of the LLM; None if it has none.
        opening: ids between bos and mapped states; see `Tokens`.
        closing: ids at the end of a target that was not cut.

    Raises:
        InputError: the LLM's tokenizer has no eos token, or no usable chat template for `chats`, or the encoder needs a
            language in another form than a token.
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
        chats: bool = False,
    ):
        self.limits = Limits(max_seq_len, max_prompt_len, max_gen_len)
        if llm_tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer in {llm_tokenizer.name_or_path} has no eos token to end a target with")
        self.mt_tokenizer = mt_tokenizer
        self.llm_tokenizer = llm_tokenizer
        self.augmentation = augmentation
        self.alone: frozenset[str] = frozenset()
        # An encoder with learned positions has none beyond its own limit.
        self.max_seq_len = min(max_seq_len, mt_tokenizer.model_max_length) if mt_tokenizer else max_seq_len
        self.max_prompt_len = max_prompt_len
        self.max_gen_len = max_gen_len
        if mt_config is not None:
            _refuse_languages_beside_tokens(mt_config, mt_tokenizer.name_or_path)
        self._source_prefix, self._source_suffix = _special_tokens(mt_tokenizer) if mt_tokenizer else ([], [])
        self._language_id = self._find_language() if mt_tokenizer else None
        self.names_language = self._language_id is not None
        self.chat = ChatTemplate(llm_tokenizer) if chats else None
        self.bos_token_id = llm_tokenizer.bos_token_id
        self.opening: list[int] = []
        self.closing = [llm_tokenizer.eos_token_id]
        if self.chat is not None:
            self._open_chat()

    @property
    def source_pad_id(self) -> int:
        """Padding id of sources: the encoder's own, since some encoders derive positions from it."""
        pad_id = None if self.mt_tokenizer is None else self.mt_tokenizer.pad_token_id
        return 0 if pad_id is None else pad_id

    def __call__(self, examples: list[Example], with_targets: bool = True) -> list[Tokens]:
        """Tokenize `examples`; without targets for generation.

        Raises:
            InputError: a template alone is longer than its limit, or the encoder has no token for a language.
        """
        texts: dict[str, tuple[list[list[int]], set[int]]] = dict.fromkeys(KINDS, ([[]] * len(examples), set()))
        mapped = [self.mt_tokenizer is not None and example.language.name not in self.alone for example in examples]
        if any(mapped):
            specials = len(self._source_prefix) + len(self._source_suffix)
            sources = [example.source if row else NO_PROMPT for example, row in zip(examples, mapped, strict=True)]
            read = partial(_ids, self.mt_tokenizer)
            texts["source"] = _fit_all(sources, read, self.max_seq_len - specials, "--max_seq_len")
        # The LLM alone reads the prompt in any case.
        shows = [self.augmentation or not row for row in mapped]
        if self.chat is not None:
            texts["prompt"] = self._chat_prompts(examples, shows)
        elif any(shows):
            prompts = [row.prompt if shown else NO_PROMPT for row, shown in zip(examples, shows, strict=True)]
            read = partial(_ids, self.llm_tokenizer)
            texts["prompt"] = _fit_all(prompts, read, self.max_prompt_len, "--max_prompt_len")
        if with_targets:
            texts["target"] = self._targets([example.target for example in examples])

        tokens = []
        languages = {example.language for example, row in zip(examples, mapped, strict=True) if row}
        around = {language: self._around_source(language) for language in languages}
        for row, (example, source, prompt, target) in enumerate(
            zip(examples, *(ids for ids, _ in texts.values()), strict=True)
        ):
            cut = tuple([kind for kind, (_, cut_rows) in texts.items() if row in cut_rows])
            # Some tokenizers give an empty text a token.
            ids, shown = [], prompt if shows[row] or self.chat is not None else []
            if mapped[row]:
                prefix, suffix = around[example.language]
                ids = [*prefix, *source, *suffix]
            tokens.append(Tokens(ids, shown, target, example.language.name, cut, mapped[row], self.opening))
        return tokens

    def sources_with_spans(self, texts: list[str], language: Language) -> list[tuple[list[int], list[Span]]]:
        """Source ids of texts in one language, cut to the limit, and the span of each token, (0, 0) if special.

        Raises:
            InputError: the tokenizer has no character offsets, or the encoder has no token for the language.
        """
        prefix, suffix = self._around_source(language)
        limit = self.max_seq_len - len(prefix) - len(suffix)
        return [
            ([*prefix, *ids[:limit], *suffix], [*[(0, 0)] * len(prefix), *spans[:limit], *[(0, 0)] * len(suffix)])
            for ids, spans in ids_with_spans(self.mt_tokenizer, texts)
        ]

    def label_ids(self, label: str) -> list[int]:
        """Token ids of a label word as the beginning of a target, without eos."""
        return _ids(self.llm_tokenizer, [label])[0]

    def _targets(self, texts: list[str]) -> tuple[list[list[int]], set[int]]:
        """Ids of every target, and the numbers of those that were cut.

        A cut target has no eos, so that the model does not learn to end a solution at the limit.
        """
        limit = self.max_gen_len
        targets = _ids(self.llm_tokenizer, texts)
        cut = {row for row, ids in enumerate(targets) if len(ids) + len(self.closing) > limit}
        return [ids[:limit] if row in cut else [*ids, *self.closing] for row, ids in enumerate(targets)], cut

    def _open_chat(self) -> None:
        """Set bos, opening and closing by the chat template.

        The LLM has a bos if the template or the tokenizer itself adds one. The opening is what all prompts share.
        """
        turns = [self.chat.prompt(Prompt("", text, "")).text for text in ("a", "1", "(", "Ä", "中", "")]
        # A space before the turn belongs to the turn's first token.
        prompts = self.chat.ids([*turns, self.chat.before.rstrip(" ")])
        if prompts[0][:1] != [self.bos_token_id] and self.llm_tokenizer("a").input_ids[:1] != [self.bos_token_id]:
            self.bos_token_id = None
        columns = zip(*map(self._without_bos, prompts), strict=False)
        self.opening = [ids[0] for ids in itertools.takewhile(lambda ids: len(set(ids)) == 1, columns)]
        self.closing = self.chat.closing

    def _without_bos(self, ids: list[int]) -> list[int]:
        return ids[1:] if self.bos_token_id is not None and ids[:1] == [self.bos_token_id] else ids

    def _chat_prompts(self, examples: list[Example], shows: list[bool]) -> tuple[list[list[int]], set[int]]:
        """Ids after the opening of every prompt in the chat template, and the numbers of the prompts that were cut.

        The turn of the user has the text of examples for which `shows` is true, else only the mapped states.
        """
        turns = [(row.turn or row.prompt) if shown else NO_PROMPT for row, shown in zip(examples, shows, strict=True)]
        prompts = [self.chat.prompt(turn) for turn in turns]
        whole, cut = _fit_all(prompts, self.chat.ids, self.max_prompt_len, "--max_prompt_len")
        rest, length = [self._without_bos(ids) for ids in whole], len(self.opening)
        if other := [row for row, ids in enumerate(rest) if ids[:length] != self.opening]:
            raise InputError(
                f"--prompt chat: {examples[other[0]].location} has other tokens before the user's turn than other rows"
            )
        return [ids[length:] for ids in rest], cut

    def _find_language(self) -> int | None:
        """Find the language token among the special tokens of a source."""
        specials = [*self._source_prefix, *self._source_suffix]
        for index, token in zip(specials, self.mt_tokenizer.convert_ids_to_tokens(specials), strict=True):
            if match := _LANGUAGE_TOKEN.fullmatch(token):
                if match["nllb"]:
                    # NLLB's tokenizers have changed the order; the models were trained on this one.
                    self._source_prefix, self._source_suffix = [index], [self.mt_tokenizer.eos_token_id]
                return index
        return None

    def _around_source(self, language: Language) -> tuple[list[int], list[int]]:
        """Special tokens before and after a source in `language`."""
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


def load_example_tokenizer(
    models: ModelPair, limits: Limits, augmentation: bool, chats: bool = False
) -> ExampleTokenizer:
    """Load the tokenizers of `models`.

    Raises:
        InputError: a tokenizer or the multilingual model's config cannot be loaded.
    """
    mt_tokenizer = mt_config = None
    if models.mt_path is not None:
        mt_tokenizer = load_tokenizer(models.mt_path, models.mt_revision, models.trust_remote_code)
        mt_config = base_config(models.mt_path, models.mt_revision, models.trust_remote_code)
        # Some tokenizers have no limit.
        mt_tokenizer.model_max_length = min(mt_tokenizer.model_max_length, encoder_shape(models)[1] or math.inf)
    llm_tokenizer = load_tokenizer(models.llm_path, models.llm_revision, models.trust_remote_code)
    options = {"augmentation": augmentation, "chats": chats, **asdict(limits)}
    return ExampleTokenizer(mt_tokenizer, mt_config, llm_tokenizer, **options)


def ids_with_spans(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[tuple[list[int], list[Span]]]:
    """Ids of each text, without special tokens, and the span of each token in it, without surrounding spaces.

    Raises:
        InputError: the tokenizer has no character offsets.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer in {tokenizer.name_or_path} is not a fast one, and has no character offsets, which an "
            "aligned start needs: use another --mapping_init"
        )
    encoded = tokenizer(texts, return_offsets_mapping=True, **_PLAIN)
    return [
        (ids, [_without_spaces(text, start, end) for start, end in offsets])
        for text, ids, offsets in zip(texts, encoded.input_ids, encoded.offset_mapping, strict=True)
    ]


def _without_spaces(text: str, start: int, end: int) -> Span:
    """Shorten a span by the spaces at its ends, which only some tokenizers include."""
    end = start + len(text[start:end].rstrip())
    return end - len(text[start:end].lstrip()), end


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of each text, without special tokens.

    Many texts are passed directly to the tokenizer's backend, which takes half the time of a call of the tokenizer.
    Some tokenizers change a text before: if the two differ on the first texts, the tokenizer is called.
    """
    first = tokenizer(texts[:_CHECKED], **_PLAIN).input_ids if texts else []
    if len(texts) <= _CHECKED:
        return first
    # The call above has also set the options of the backend.
    if not tokenizer.is_fast or _backend_ids(tokenizer, texts[:_CHECKED]) != first:
        return tokenizer(texts, **_PLAIN).input_ids
    return _backend_ids(tokenizer, texts)


def _backend_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _refuse_languages_beside_tokens(config: PretrainedConfig, path: str) -> None:
    """Raise InputError for X-MOD, with an adapter for each language, and for XLM with language embeddings."""
    if config.model_type == "xmod" or (getattr(config, "use_lang_emb", False) and config.n_langs > 1):
        raise InputError(
            f"{path} takes a source's language as an id beside its tokens, which is not supported: use an encoder with "
            "language tokens, or with the same input for all languages"
        )


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer adds before and after a text."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    raise InputError(f"cannot find the special tokens that {tokenizer.name_or_path} adds to a text: {full}")


def _fit_all(prompts: list[Prompt], read: Reader, limit: int, flag: str) -> tuple[list[list[int]], set[int]]:
    """Ids of every prompt, cut to `limit`, and the numbers of the prompts that were cut."""
    fitted = read([prompt.text for prompt in prompts])
    cut = {row for row, ids in enumerate(fitted) if len(ids) > limit}
    for row in cut:
        fitted[row] = _cut_query(prompts[row], read, limit, flag)
    return fitted, cut


def _cut_query(prompt: Prompt, read: Reader, limit: int, flag: str) -> list[int]:
    """Ids of the prompt with the longest beginning of its query that fits, found by bisection over characters.

    The whole text is tokenized, since joined parts could have other token ids.
    """

    def ids_with(characters: int) -> list[int]:
        return read([prompt.before + prompt.query[:characters] + prompt.after])[0]

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
