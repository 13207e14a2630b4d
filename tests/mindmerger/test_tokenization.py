import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer
from transformers import (
    BatchEncoding,
    M2M100Tokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
    PLBartTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    SeamlessM4TTokenizer,
    XLMConfig,
    XmodConfig,
)

from common.errors import InputError
from common.models import base_config, load_tokenizer
from mindmerger.data import Example
from mindmerger.tasks import LANGUAGES, Prompt, math_prompt, x_csqa_prompt, xnli_prompt
from mindmerger.tokenization import ExampleTokenizer
from tests.tiny_models import tiny_tokenizer

GERMAN = LANGUAGES["German"]


def example(prompt: Prompt, target: str = "7", language: str = "German") -> Example:
    return Example(Prompt("", prompt.query, ""), prompt, target, LANGUAGES[language])


@pytest.mark.parametrize(
    "prompt",
    [
        math_prompt("Anna hat viele Äpfel. " * 40),
        x_csqa_prompt("Wo kauft man Äpfel? " * 40, ["Markt", "Mond", "Meer", "Moor", "Mars"]),
        xnli_prompt("Anna kauft Äpfel auf dem Markt. " * 40, "Anna war auf dem Markt."),
    ],
)
def test_a_cut_prompt_keeps_template_and_tail(build: Callable, prompt: Prompt) -> None:
    _, tokenizer = build(max_prompt_len=260, max_seq_len=50)
    tokens = tokenizer([example(prompt)])[0]
    text = tokenizer.llm_tokenizer.decode(tokens.prompt)
    assert text.startswith(prompt.before) and text.endswith(prompt.after)
    kept = text.removeprefix(prompt.before).removesuffix(prompt.after)
    assert prompt.query.startswith(kept)
    # The longest part of the query that fits is kept: one more character would not fit.
    longer = prompt.before + prompt.query[: len(kept) + 1] + prompt.after
    assert len(tokens.prompt) <= 260 < len(tokenizer.llm_tokenizer(longer, add_special_tokens=False).input_ids)
    assert len(tokens.source) <= 50
    assert tokens.cut == ("source", "prompt")


def test_a_cut_target_carries_no_eos(build: Callable) -> None:
    _, tokenizer = build(max_gen_len=5)
    target = "3 + 4 = 7. The answer is: 7"
    ids = tokenizer.llm_tokenizer(target, add_special_tokens=False).input_ids
    cut = tokenizer([example(math_prompt("?"), target)])[0]
    assert (list(cut.target), cut.cut) == (ids[:5], ("target",))
    _, tokenizer = build(max_gen_len=len(ids) + 1)
    whole = tokenizer([example(math_prompt("?"), target)])[0]
    assert (list(whole.target), whole.cut) == ([*ids, 2], ())
    _, tokenizer = build(max_gen_len=len(ids))
    assert list(tokenizer([example(math_prompt("?"), target)])[0].target) == ids


def test_special_tokens_are_added_by_id_and_once(build: Callable) -> None:
    prompt = math_prompt("Anna")
    for mt, prefix in (("mt5", []), ("xlm_roberta", ["<s>"]), ("nllb", ["deu_Latn"]), ("qwen", [])):
        _, tokenizer = build(mt=mt)
        tokens = tokenizer([example(prompt)])[0]
        suffix = [] if mt == "qwen" else ["</s>"]
        plain = tokenizer.mt_tokenizer.tokenize("Anna")
        assert tokenizer.mt_tokenizer.convert_ids_to_tokens(tokens.source) == [*prefix, *plain, *suffix]
        assert 1 not in tokens.prompt and 2 not in tokens.prompt
        assert tokenizer.llm_tokenizer.decode(tokens.prompt) == prompt.text


def test_special_tokens_in_a_text_are_text(build: Callable) -> None:
    _, tokenizer = build()
    tokens = tokenizer([example(math_prompt("a </s> b"), "c </s> d")])[0]
    assert list(tokens.target).count(2) == 1 and tokens.target[-1] == 2
    assert 2 not in tokens.prompt and list(tokens.source).count(2) == 1
    assert tokenizer.llm_tokenizer.decode(tokens.target[:-1]) == "c </s> d"


def test_a_source_ends_where_the_encoders_positions_do(build: Callable) -> None:
    _, tokenizer = build(mt="xlm_roberta", max_seq_len=5000)
    tokens = tokenizer([Example(Prompt("", "Äpfel " * 2000, ""), math_prompt("?"), "7", GERMAN)])[0]
    assert len(tokens.source) == 512 and tokens.cut == ("source",)


def test_a_template_longer_than_its_limit_is_refused(build: Callable) -> None:
    _, tokenizer = build(max_prompt_len=10)
    with pytest.raises(InputError, match="--max_prompt_len 10 leaves no room: the template alone has"):
        tokenizer([example(math_prompt("Anna"))])


def test_without_augmentation_there_is_no_prompt(build: Callable) -> None:
    _, tokenizer = build(augmentation=False)
    assert len(tokenizer([example(math_prompt("Anna"))])[0].prompt) == 0


def test_an_encoder_that_lacks_a_language_says_so(build: Callable, models: dict[str, Path]) -> None:
    _, pair = build(mt="nllb")
    # M2M100's spelling, without Telugu, which M2M100 lacks.
    m2m100 = tiny_tokenizer(["__en__"], ["</s>"], ("__en__", "__de__"))
    limits = {"augmentation": True, "max_seq_len": 50, "max_prompt_len": 300, "max_gen_len": 9}
    tokenizer = ExampleTokenizer(m2m100, base_config(str(models["nllb"])), pair.llm_tokenizer, **limits)
    assert tokenizer([example(math_prompt("?"))])[0].source[0] == m2m100.convert_tokens_to_ids("__de__")
    with pytest.raises(InputError, match=r"no language token for Telugu: leave it out, as in --languages en,de"):
        tokenizer([example(math_prompt("?"), language="Telugu")])


@pytest.fixture(scope="module")
def language_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny tokenizers of the classes that mark a source's language."""
    folder = tmp_path_factory.mktemp("tokenizers")
    SentencePieceTrainer.train(
        sentence_iterator=iter(["abcde abc"]), model_prefix=str(folder / "spm"), vocab_size=10, num_threads=1,
        pad_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "vocab.json").write_text(json.dumps({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4}))
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "▁": 4, "a": 5}
    makers = {
        "mbart50": lambda: MBart50Tokenizer(),
        "mbart": lambda: MBartTokenizer(),
        "nllb": lambda: NllbTokenizer(vocab, [], src_lang="fin_Latn"),
        "nllb_suffix": lambda: NllbTokenizer(vocab, [], legacy_behaviour=True),
        "m2m100": lambda: M2M100Tokenizer(folder / "vocab.json", folder / "spm.model"),
        "seamless": lambda: SeamlessM4TTokenizer(vocab, [], extra_special_tokens=["__eng__", "__swh__", "__cmn__"]),
        "plbart": lambda: PLBartTokenizer(str(folder / "spm.model"), language_codes="multi"),
    }
    for name, make in makers.items():
        make().save_pretrained(folder / name)
    return {name: folder / name for name in makers}


@pytest.fixture
def tokenizer_of(models: dict[str, Path], language_tokenizers: dict[str, Path]) -> Callable[[str], ExampleTokenizer]:
    limits = {"augmentation": False, "max_seq_len": 5, "max_prompt_len": 300, "max_gen_len": 9}
    llm_tokenizer, config = load_tokenizer(str(models["llama"])), base_config(str(models["mt5"]))
    return lambda name: ExampleTokenizer(
        load_tokenizer(str(language_tokenizers[name])), config, llm_tokenizer, **limits
    )


@pytest.mark.parametrize(
    ("name", "language", "before", "after"),
    [
        ("mbart50", "Swahili", ["sw_KE"], ["</s>"]),
        ("mbart", "Chinese", [], ["</s>", "zh_CN"]),
        ("nllb", "Swahili", ["swh_Latn"], ["</s>"]),
        ("nllb_suffix", "Chinese", ["zho_Hans"], ["</s>"]),
        ("m2m100", "Swahili", ["__sw__"], ["</s>"]),
        ("seamless", "Swahili", ["__swh__"], ["</s>"]),
        ("seamless", "Chinese", ["__cmn__"], ["</s>"]),
        ("plbart", "English", [], ["</s>", "__en_XX__"]),
    ],
)
def test_a_source_carries_its_own_languages_token(
    tokenizer_of: Callable, name: str, language: str, before: list[str], after: list[str]
) -> None:
    tokenizer = tokenizer_of(name)
    mt = tokenizer.mt_tokenizer
    prefix, suffix = mt.convert_tokens_to_ids(before), mt.convert_tokens_to_ids(after)
    assert tokenizer.names_language and mt.unk_token_id not in (*prefix, *suffix)
    short, long = tokenizer([example(Prompt("", text, ""), language=language) for text in ("a", "a " * 9)])
    assert list(short.source) == [*prefix, *mt("a", add_special_tokens=False).input_ids, *suffix]
    assert list(long.source[: len(prefix)]) == prefix and list(long.source[-len(suffix) :]) == suffix
    assert len(long.source) <= 5 and long.cut == ("source",)


@pytest.mark.parametrize(
    ("name", "language"), [("mbart50", "Greek"), ("mbart", "Swahili"), ("seamless", "German"), ("plbart", "German")]
)
def test_a_language_without_a_token_is_refused(tokenizer_of: Callable, name: str, language: str) -> None:
    with pytest.raises(InputError, match=f"{name} has no language token for {language}: leave it out, as in .*en"):
        tokenizer_of(name)([example(Prompt("", "a", ""), language=language)])


@pytest.mark.parametrize("config", [XmodConfig(), XLMConfig(n_langs=15, use_lang_emb=True)])
def test_an_encoder_told_the_language_beside_its_tokens_is_refused(build: Callable, config: PretrainedConfig) -> None:
    _, pair = build()
    limits = {"augmentation": True, "max_seq_len": 50, "max_prompt_len": 300, "max_gen_len": 9}
    with pytest.raises(InputError, match="takes a source's language as an id beside its tokens"):
        ExampleTokenizer(pair.mt_tokenizer, config, pair.llm_tokenizer, **limits)


def test_language_tokens_exist() -> None:
    """Language tokens are compared with transformers' own lists."""
    codes = {
        name: import_module(f"transformers.models.{name}.tokenization_{name}").FAIRSEQ_LANGUAGE_CODES
        for name in ("nllb", "mbart50", "m2m_100")
    }
    lacking = {
        name: {language.name for language in LANGUAGES.values() if getattr(language, code) not in known}
        for name, code, known in (
            ("nllb", "nllb", codes["nllb"]),
            ("mbart50", "mbart", codes["mbart50"]),
            ("m2m_100", "code", codes["m2m_100"]["m2m100"]),
        )
    }
    assert lacking == {"nllb": set(), "mbart50": {"Bulgarian", "Greek"}, "m2m_100": {"Telugu"}}


def test_the_llm_alone_reads_no_source(build: Callable) -> None:
    _, pair = build()
    alone = ExampleTokenizer(
        None, None, pair.llm_tokenizer, augmentation=True, max_seq_len=9, max_prompt_len=300, max_gen_len=9
    )
    tokens = alone([example(math_prompt("Anna"))], with_targets=False)[0]
    assert (len(tokens.source), len(tokens.target), alone.source_pad_id) == (0, 0, 0)


def test_many_texts_have_the_ids_of_the_tokenizers_own_call(build: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"Anna hat {n} Äpfel </s> und <s> {n + 1}  Birnen" for n in range(40)]
    rows = [example(math_prompt(text), text) for text in texts]

    def call(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    _, tokenizer = build()
    llm_tokenizer = tokenizer.llm_tokenizer
    # Options of an earlier call have no effect.
    llm_tokenizer("Anna </s>", padding="max_length", max_length=8, truncation=True)
    for row, text in zip(tokenizer(rows), texts, strict=True):
        assert row.source[:-1] == call(tokenizer.mt_tokenizer, text)
        assert row.target[:-1] == call(llm_tokenizer, text)

    # A tokenizer that changes a text before its backend reads it.
    own_call = type(llm_tokenizer).__call__

    def lower(self: PreTrainedTokenizerBase, text: str | list[str], **options: object) -> BatchEncoding:
        return own_call(self, text.lower() if isinstance(text, str) else [one.lower() for one in text], **options)

    monkeypatch.setattr(type(llm_tokenizer), "__call__", lower)
    changed = tokenizer(rows)
    assert [row.target[:-1] for row in changed] == [call(llm_tokenizer, text) for text in texts]
    assert changed[0].target != tokenizer.llm_tokenizer.backend_tokenizer.encode(texts[0]).ids
