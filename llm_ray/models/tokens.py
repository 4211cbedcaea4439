"""Loads a tokenizer so that it gives the same ids as its tokenizer.json.

AutoTokenizer may rebuild a tokenizer from its vocabulary alone, using the class named in tokenizer_config.json, and
silently drop steps of tokenizer.json (GPT2Tokenizer: splitting digits). Saving it would lose those steps too.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_ray.errors import ModelError
from llm_ray.files import write_json
from llm_ray.models.folder import read_json
from llm_ray.models.gguf import read_fields
from llm_ray.models.pretokenizers import RULES, set_rule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
PROBE = (
    "  Hello there,\tworld!  I'VE  it's we'll DON'T\n\n1. One: 12345 + 6.78 = 0x1F\n2.  Two\r\n\r\n\n10. Ten: "
    "2026-11-30, 1,000,000 €\n"
    "   def f(x):\n        return x**2  # (ok?) ...!!! a_b-c/d\n\n\n"
    "naïve Straße, Ångström, ÉCOLE école, cafe\u0301 ﬁne ½ ² Ⅻ ١٢٣ ৪৫\nПривет, мир! 你好，世界。12月 こんにちは カタカナ 한국어 नमस्ते "
    "ไทย עברית 👩‍👧 🙂🙂\n camelCaseWord HTTPServer \n \n"
)
"""Text on which tokenizers differ: digits, blank lines, spaces, contractions, code, accents, other scripts."""
COMPOSED = unicodedata.normalize("NFC", PROBE)
"""PROBE without decomposed letters, which are rare in text: for some model types transformers composes them regardless
of tokenizer.json."""


def open_tokenizer(source: str, **options: Any) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of the folder or hub id `source`; `options` go to AutoTokenizer.

    It splits text as its tokenizer.json does, or by the rule that the GGUF (`gguf_file`) names, if known. Raises
    ModelError if transformers cannot reproduce its tokenizer.json, and whatever transformers raises about its files.
    """
    from transformers import AutoTokenizer, TokenizersBackend

    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    revision = options.get("revision")
    if gguf_file := options.get("gguf_file"):
        if (file := _file(source, gguf_file, revision)) and (name := rule_name(file)):
            set_rule(tokenizer.backend_tokenizer, name)
        return tokenizer
    file = _file(source, FILE, revision)
    if file is None or agrees(tokenizer, file):
        return tokenizer
    options.pop("trust_remote_code", None)
    whole = TokenizersBackend.from_pretrained(source, **options)
    if not agrees(whole, file):
        raise ModelError(
            f"the tokenizer of {source}: neither {type(tokenizer).__name__}, which its tokenizer_config.json names, "
            f"nor transformers' generic class gives the ids of its {FILE}: set model.tokenizer to a folder in which "
            "they agree"
        )
    return whole


def agrees(tokenizer: PreTrainedTokenizerBase, file: Path, text: str = PROBE) -> bool:
    """Whether `tokenizer` and the tokenizer.json `file` give the same ids for `text`, without special tokens."""
    from tokenizers import Tokenizer

    if not tokenizer.is_fast:  # slow tokenizers run their own code, not tokenizer.json
        return True
    reference = Tokenizer.from_file(str(file))
    reference.no_padding()
    reference.no_truncation()
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids == reference.encode(text, add_special_tokens=False).ids


def rule_name(gguf: Path) -> str | None:
    """Returns the name of the GGUF's rule for splitting text: "" if it is missing, None if its tokenizer type has no
    rules."""
    fields = read_fields(gguf)
    return str(fields.get("tokenizer.ggml.pre", "")) if fields.get("tokenizer.ggml.model") == "gpt2" else None


def doubt(gguf: Path) -> str | None:
    """Returns a warning if the GGUF's rule for splitting text is unknown, else None."""
    name = rule_name(gguf)
    if name is None or name in RULES:
        return None
    message = (
        f"names an unknown rule for splitting text, {name!r}" if name else "does not name its rule for splitting text"
    )
    return (
        f"{gguf.name} {message}: GPT-2's is used, so tokens may differ from those in training. Compare them, or set "
        "the model's original tokenizer with model.tokenizer"
    )


def read_alike(folder: Path, text: str = COMPOSED) -> bool:
    """Whether AutoTokenizer, and so every engine, reads the folder's tokenizer as its tokenizer.json defines it.

    Also True if that cannot be determined: without the file, or if AutoTokenizer cannot read the folder at all.
    """
    from transformers import AutoTokenizer

    if not (folder / FILE).is_file():
        return True
    try:
        return agrees(AutoTokenizer.from_pretrained(folder), folder / FILE, text)
    except Exception:  # open_tokenizer reports it when the tokenizer is used
        return True


def mend_class(folder: Path) -> bool:
    """Changes the class in the folder's tokenizer configuration if engines would misread its tokenizer.json with it.
    Returns whether it was changed. Raises ModelError if that does not help."""
    if read_alike(folder, PROBE):
        return False
    settings = read_json(folder / SETTINGS)
    write_json(folder / SETTINGS, settings | {"tokenizer_class": "TokenizersBackend"})
    if read_alike(folder, PROBE):
        return True
    write_json(folder / SETTINGS, settings)
    check_alike(folder)
    return False


def check_alike(folder: Path) -> None:
    """Raises ModelError if engines would read the folder's tokenizer differently from its tokenizer.json."""
    if not read_alike(folder):
        raise ModelError(
            f"{folder}: transformers, and with it every engine, reads the tokenizer differently from its {FILE}: the "
            "model would get other tokens than in training. Importing the model fixes this if possible: llm-ray "
            f"model import {folder}"
        )


def _file(source: str, name: str, revision: str | None) -> Path | None:
    """Returns the path of a file in a folder, or in the local cache for a hub id; None if it is missing."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir():
        return Path(source, name) if Path(source, name).is_file() else None
    cached = try_to_load_from_cache(source, name, revision=revision)
    return Path(cached) if isinstance(cached, str) else None
