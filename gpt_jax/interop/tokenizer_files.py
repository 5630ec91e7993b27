"""Tokenizers of other codebases: found in a folder of weights, and written where a tokenizer can be said as theirs."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from gpt_jax.data.byte_level_bpe import GPT2Tokenizer, HuggingFaceTokenizer, byte_characters, load_gpt2
from gpt_jax.data.sentencepieces import SentencePieceTokenizer
from gpt_jax.data.token_ids import IdsTokenizer
from gpt_jax.data.tokenizer import ByteTokenizer, Tokenizer
from gpt_jax.errors import UserError

# What an exported tokenizer must split as ours does, before it is written: spaces, breaks, digits, letters of two to
# four bytes, a name of a special token, an unfinished word.
_PROBES = (
    "It was the best of times, it was the worst of times;\n\n\tdef f(x, *, y=1_000):  # 3.14\n        return 'x'",
    "  leading and trailing  ",
    "naïve Ünïcode: Ελληνικά, 汉字, 🙂🙃, e\u0301\r\n<0x0A> <unk> hel",
    "",
)


def find_tokenizer(folder: pathlib.Path, family: str, tree: Mapping[str, Any], vocab_size: int) -> Tokenizer:
    """Returns the tokenizer of a folder of weights: tokenizer.json, GPT-2's two files, or else ids as text.

    Args:
      family: of the model. tree: its config.json. vocab_size: of the model.

    Raises:
      UserError: the files are damaged, or hold more tokens than the model.
    """
    end = tree.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    tokenizer: Tokenizer
    if (folder / "tokenizer.json").is_file():
        try:
            text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{folder / 'tokenizer.json'} is not valid UTF-8 ({error.reason}).") from None
        name = _token_of(text, end)
        tokenizer = HuggingFaceTokenizer(text, end=name)
        known = HuggingFaceTokenizer(text, ("eot",), end=name)
        tokenizer = known if known.vocab_size == tokenizer.vocab_size else tokenizer  # it has an end token, or none
    elif family == "gpt2" and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        tokenizer = load_gpt2(folder)
        known = load_gpt2(folder, ("eot",))
        tokenizer = known if known.vocab_size == tokenizer.vocab_size else tokenizer
    else:
        end = end if isinstance(end, int) and 0 <= end < vocab_size else None
        return IdsTokenizer(vocab_size, ("eot",) if end is not None else (), end)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer in {str(folder)!r} has {tokenizer.vocab_size} tokens, but config.json has "
            f"vocab_size={vocab_size}."
        )
    return tokenizer


def _token_of(text: str, token: Any) -> str:
    """The content of an added token of a tokenizer.json by its id, '' if there is none."""
    try:
        added = json.loads(text).get("added_tokens") or []
        return next((entry["content"] for entry in added if entry["id"] == token), "")
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""  # the library says what is wrong with the file


def write_tokenizer(tokenizer: Tokenizer, folder: pathlib.Path, context: int) -> str:
    """Writes tokenizer.json and tokenizer_config.json, where ours can be said as theirs.

    Args:
      context: positions of the model.

    Returns:
      '' or why nothing was written.
    """
    if isinstance(tokenizer, IdsTokenizer):
        return "the run has none"
    if isinstance(tokenizer, HuggingFaceTokenizer):
        text = tokenizer._files()["tokenizer.json"].decode()
    else:
        build = {ByteTokenizer: _bytes, GPT2Tokenizer: _gpt2, SentencePieceTokenizer: _unigram}.get(type(tokenizer))
        if build is None or tokenizer.kind == "bpe":
            return f"one of kind {tokenizer.kind!r} has no tokenizer.json"
        library = build(tokenizer)
        names = {i: _special(library, i, name) for name, i in tokenizer.specials.items()}
        _add_specials(library, [names[i] for i in sorted(names)])
        for probe in _PROBES:
            if library.encode(probe, add_special_tokens=False).ids != tokenizer.encode(probe).tolist():
                return f"one of kind {tokenizer.kind!r} could not be written exactly"
        text = library.to_str()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.eot is not None:
        settings["eos_token"] = _name_in(text, tokenizer.eot)
    if tokenizer.begin and tokenizer.begin[0] is not None:
        settings["bos_token"] = _name_in(text, tokenizer.begin[0])
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return ""


def _name_in(text: str, token: int) -> str:
    import tokenizers

    return tokenizers.Tokenizer.from_str(text).id_to_token(token)


def _special(library: Any, token: int, name: str) -> str:
    return library.id_to_token(token) or f"<|{name}|>"


def _add_specials(library: Any, names: list[str]) -> None:
    import tokenizers

    library.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])


def _bytes(tokenizer: ByteTokenizer) -> Any:
    import tokenizers

    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=byte_characters(), merges=[]))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    return library


def _gpt2(tokenizer: GPT2Tokenizer) -> Any:
    import tokenizers

    library = tokenizers.Tokenizer.from_str(tokenizer._library.to_str())
    library.decoder = tokenizers.decoders.ByteLevel()
    return library


def _unigram(tokenizer: SentencePieceTokenizer) -> Any:
    """The same pieces and scores; sentencepiece's <unk>, which is never produced, has no place among the ids."""
    import tokenizers

    pieces = tokenizer._processor
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(1, pieces.get_piece_size())]
    library = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, 0, byte_fallback=True))
    replace = [*tokenizer._rewritten, (" ", "\u2581")]
    library.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Replace(a, b) for a, b in replace])
    # A byte's piece is spelled '<0x0A>', and the library would find it in a text that spells these characters out.
    spelled = tokenizers.Regex("<(?=0x[0-9A-F]{2}>)")
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split(spelled, "isolated")
    library.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.ByteFallback(),
            *(tokenizers.decoders.Replace(b, a) for a, b in replace),
            tokenizers.decoders.Fuse(),
        ]
    )
    return library
