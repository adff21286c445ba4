"""CLIP's text tokenizer: lower-case byte-pair encoding, between a start and an end token, at most 77 in all.

Hugging Face's folders hold it as tokenizer.json, or as vocab.json and merges.txt; the `tokenizers` library runs both.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from xprompt_jax.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
# Words, single digits, runs of other signs, English endings; spaces part them and vanish.
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """Texts -> token ids.

    Args:
      folder: has tokenizer.json, or vocab.json and merges.txt.
      context: most tokens of a text, with start and end.

    Raises:
      UserError: the files are missing or damaged.
    """

    def __init__(self, folder: Path, context: int = 77):
        self._tokenizer, self._context = _open(folder), context
        start, end = (self._tokenizer.token_to_id(token) for token in (START, END))
        if start is None or end is None:
            raise UserError(f"{folder}: its tokenizer has no {START} or no {END}; give a folder of CLIP")
        self.start, self.end = start, end

    @property
    def vocab_size(self) -> int:
        """Largest id + 1."""
        return max(self._tokenizer.get_vocab().values()) + 1

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Start, tokens and end of each text; what does not fit is cut off before the end.

        HTML entities are resolved, as OpenAI's code does; its repair of broken Unicode (ftfy) is not done.
        """
        texts = [text.encode("utf-8", "replace").decode() for text in texts]  # half a letter, of a JSON escape
        clean = [html.unescape(html.unescape(text)).strip() for text in texts]
        encoded = self._tokenizer.encode_batch(clean, add_special_tokens=False)
        return [[self.start, *e.ids[: self._context - 2], self.end] for e in encoded]


def _open(folder: Path) -> Tokenizer:
    whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if not whole.is_file() and not (vocab.is_file() and merges.is_file()):
        raise UserError(f"{folder}: no tokenizer.json, nor vocab.json and merges.txt; fetch them with CLIP's weights")
    try:
        if whole.is_file():
            tokenizer = Tokenizer.from_file(str(whole))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return tokenizer
        tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges), unk_token=END, end_of_word_suffix="</w>"))
    except Exception as e:  # the library raises plain exceptions
        raise UserError(f"{whole if whole.is_file() else vocab}: not a readable tokenizer ({e}); fetch it again") from None
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_PIECES), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.add_special_tokens([START, END])
    return tokenizer
