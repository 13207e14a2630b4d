"""Languages, with their names in data files, prompts and multilingual models."""

import difflib
import reprlib
from dataclasses import dataclass

from common.errors import InputError


@dataclass(frozen=True)
class Language:
    """A language, with its names in data files and multilingual models.

    Attributes:
        name: English name, used in the data and the prompts.
        code: ISO 639-1 code, used in file names; M2M100's language token is `__code__`.
        nllb: FLORES-200 code, NLLB's language token.
        mbart: mBART's language token; empty if it has none.
    """

    name: str
    code: str
    nllb: str
    mbart: str = ""

    @property
    def tokens(self) -> tuple[str, ...]:
        """Language tokens of NLLB, M2M100, mBART, PLBart and SeamlessM4T."""
        seamless = "cmn" if self.code == "zh" else self.nllb[:3]
        return self.nllb, f"__{self.code}__", self.mbart, f"__{self.mbart}__", f"__{seamless}__"


LANGUAGES = {
    language.name: language
    for language in (
        Language("Arabic", "ar", "arb_Arab", "ar_AR"),
        Language("Bengali", "bn", "ben_Beng", "bn_IN"),
        Language("Bulgarian", "bg", "bul_Cyrl"),
        Language("Chinese", "zh", "zho_Hans", "zh_CN"),
        Language("English", "en", "eng_Latn", "en_XX"),
        Language("Flemish", "nl", "nld_Latn", "nl_XX"),
        Language("French", "fr", "fra_Latn", "fr_XX"),
        Language("German", "de", "deu_Latn", "de_DE"),
        Language("Greek", "el", "ell_Grek"),
        Language("Hindi", "hi", "hin_Deva", "hi_IN"),
        Language("Italian", "it", "ita_Latn", "it_IT"),
        Language("Japanese", "ja", "jpn_Jpan", "ja_XX"),
        Language("Polish", "pl", "pol_Latn", "pl_PL"),
        Language("Portuguese", "pt", "por_Latn", "pt_XX"),
        Language("Russian", "ru", "rus_Cyrl", "ru_RU"),
        Language("Spanish", "es", "spa_Latn", "es_XX"),
        Language("Swahili", "sw", "swh_Latn", "sw_KE"),
        Language("Telugu", "te", "tel_Telu", "te_IN"),
        Language("Thai", "th", "tha_Thai", "th_TH"),
        Language("Turkish", "tr", "tur_Latn", "tr_TR"),
        Language("Urdu", "ur", "urd_Arab", "ur_PK"),
        Language("Vietnamese", "vi", "vie_Latn", "vi_VN"),
    )
}
ENGLISH = LANGUAGES["English"]
# Language of a text of which none is given; it is in no verdict.
UNKNOWN = Language("", "", "")
_BY_WORD = {word.lower(): language for language in LANGUAGES.values() for word in (language.name, language.code)}


def find_language(word: str) -> Language:
    """Find a language by its English name or ISO code, in any case.

    Raises:
        InputError: there is no such language; the message suggests the nearest name.
    """
    language = _BY_WORD.get(word.strip().lower())
    if language is None:
        nearest = difflib.get_close_matches(word, LANGUAGES, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(LANGUAGES)}"
        raise InputError(f"unknown language {reprlib.repr(word)}; {hint}")
    return language


def named(names: str) -> tuple[Language, ...]:
    """Languages of English names separated by spaces."""
    return tuple(LANGUAGES[name] for name in names.split())


def select_languages(words: str | None, flag: str = "--languages") -> tuple[Language, ...] | None:
    """Parse the comma-separated languages of `flag`; None if the flag is not given.

    Raises:
        InputError: a language is unknown or named twice.
    """
    if words is None:
        return None
    try:
        chosen = tuple(find_language(word) for word in words.split(","))
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error
    if len(set(chosen)) < len(chosen):
        raise InputError(f"{flag} {words}: a language is named twice")
    return chosen
