"""The vocabulary: text by BPE, images by VQ code, and the layouts that frame an image.

Everything is read from the names in a `text_tokenizer.json` (the file Meta ships), so that a 65536-word Chameleon and a
2048-word mini go through the same code (facts: chameleon.md 3.1):

    name                            Chameleon id     meaning
    <s>                             0                bos, the attention sink
    <pad>                           1                padding
    </s>                            2                eos, ends an answer
    IMGIMG + letters + Z            4 .. 8195        image codes: digits written A..J, so IMGIMGBCZ is code 12
    <eoss>                          8196             end of image (eoi)
    <racm3:break>                   8197             begin of image (boi)
    <reserved08706>                 8710             end of the user's turn (sep)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers

from xprompt_jax.errors import UserError

CODE = -1
"""Marks the places of image codes in a layout's template."""

IMAGE_START = 4
"""Id of code 0 in every published tokenizer and in ours; `Vocabulary` checks it."""

_LETTERS = "ABCDEFGHIJ"
_LUMINA_SIDES = 16
"""Height and width words a mini tokenizer carries, in units of 32 pixels."""


def image_token_name(code: int) -> str:
    """The vocabulary name of an image code: 12 -> 'IMGIMGBCZ'."""
    return "IMGIMG" + "".join(_LETTERS[int(d)] for d in str(code)) + "Z"


def reserved_name(number: int) -> str:
    """Chameleon's name of a reserved word; its id there is number + 4."""
    return f"<reserved{number:05d}>"


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the special tokens and of the image codes, which are contiguous: id = code + image_start."""

    size: int
    bos: int
    pad: int
    eos: int
    boi: int
    eoi: int
    sep: int
    image_start: int
    num_codes: int
    text_ids: tuple[int, ...]
    """Ids that text sampling may choose: no special name, no image code (Meta's rule; eos is added by the sampler)."""
    newline: int | None = None
    """Row end of Lumina's layout."""
    side_start: int | None = None
    """Lumina's word for n x 32 pixels is side_start + n."""

    @classmethod
    def from_names(cls, vocab: dict[str, int], *, source: str = "tokenizer") -> Vocabulary:
        """Finds the special words by name.

        Raises:
          UserError: a special word is missing, or image codes are not contiguous and in order (fact sheet trap 9).
        """

        def word(name: str) -> int:
            if name not in vocab:
                raise UserError(f"{source}: no word {name!r}: not a Chameleon text_tokenizer.json; use the file beside the weights")
            return vocab[name]

        num_codes = 0
        while image_token_name(num_codes) in vocab:
            num_codes += 1
        if not num_codes:
            raise UserError(f"{source}: no image words (IMGIMG...Z): not a Chameleon text_tokenizer.json; use the file beside the weights")
        start = vocab[image_token_name(0)]
        if start != IMAGE_START:
            raise UserError(f"{source}: image code 0 has id {start}, not {IMAGE_START}: not a Chameleon text_tokenizer.json")
        for code in range(num_codes):
            if vocab[image_token_name(code)] != start + code:
                raise UserError(f"{source}: image word of code {code} has id {vocab[image_token_name(code)]}, not {start + code}: "
                                "the file is damaged; fetch it again")  # fmt: skip
        text = sorted(
            i for name, i in vocab.items()
            if not (name.startswith("<") and name != "<") and not start <= i < start + num_codes
        )  # fmt: skip
        return cls(
            size=max(vocab.values()) + 1, bos=word("<s>"), pad=word("<pad>"), eos=word("</s>"), boi=word("<racm3:break>"),
            eoi=word("<eoss>"), sep=word(reserved_name(8706)), image_start=start, num_codes=num_codes, text_ids=tuple(text),
            newline=vocab.get(reserved_name(8799)), side_start=_side_start(vocab),
        )  # fmt: skip

    @cached_property
    def text_mask(self) -> np.ndarray:
        """Bool [size]: ids that text sampling may choose, eos included."""
        mask = np.zeros(self.size, bool)
        mask[list(self.text_ids)] = True
        mask[self.eos] = True
        return mask


def _side_start(vocab: dict[str, int]) -> int | None:
    first = vocab.get(reserved_name(8801))
    return None if first is None else first - 1


class Tokenizer:
    """Text <-> ids, from a `text_tokenizer.json`."""

    def __init__(self, backend: tokenizers.Tokenizer, *, source: str = "tokenizer"):
        self._backend = backend
        self.vocab = Vocabulary.from_names(backend.get_vocab(with_added_tokens=True), source=source)

    @classmethod
    def from_file(cls, path: str | Path, *, limit: int | None = None) -> Tokenizer:
        """Reads the file.

        Args:
          limit: the model's vocab_size. Added words with ids beyond it (Lumina's `<|image|>`) have no embedding and are
            left out.

        Raises:
          UserError: the file is missing or is not a Chameleon tokenizer.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file; copy text_tokenizer.json from the folder of the original weights")
        try:
            content = json.loads(path.read_text())
            if limit is not None:
                content["added_tokens"] = [word for word in content.get("added_tokens", []) if word["id"] < limit]
            backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as e:  # the library raises plain Exception for malformed files
            raise UserError(f"{path}: not a tokenizer file ({e}); fetch it again") from None
        return cls(backend, source=str(path))

    def save(self, path: str | Path) -> None:
        """Writes the same JSON that `from_file` reads."""
        self._backend.save(str(path))

    def words(self) -> dict[str, int]:
        """Every name in the vocabulary and its id."""
        return self._backend.get_vocab(with_added_tokens=True)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of SHA-256 over the tokenizer's JSON."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, no special tokens added. Text is data: special names in it stay letters, half a character is "?"."""
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate, of a JSON escape or a broken command line
        ids = self._backend.encode(text, add_special_tokens=False).ids
        allowed = self.vocab.text_mask
        if all(allowed[i] and i != self.vocab.eos for i in ids):
            return ids
        # A special name was spelled out ("</s>" or "<racm3:break>"): break it up, so that text cannot forge structure.
        return self._backend.encode(re.sub("IMG(?=IMG)", "IMG ", text.replace("<", "< ")), add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ordinary words among `ids`; special tokens and image codes are left out."""
        mask = self.vocab.text_mask
        kept = [int(i) for i in ids if 0 <= i < len(mask) and mask[i] and i != self.vocab.eos]
        return self._backend.decode(kept, skip_special_tokens=False)


def train_tokenizer(texts: Iterable[str], *, num_codes: int, vocab_size: int) -> Tokenizer:
    """A small tokenizer of Chameleon's form: byte-level BPE learned on `texts`, with all special and image words.

    Args:
      texts: the corpus.
      num_codes: image codes of the VQGAN it goes with.
      vocab_size: upper bound of the ids, special and image words included.
    """
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    special += [image_token_name(i) for i in range(num_codes)] + ["<eoss>", "<racm3:break>"]
    special += [reserved_name(n) for n in (8706, 8707, 8799)] + [reserved_name(8800 + n) for n in range(1, _LUMINA_SIDES + 1)]
    if vocab_size < len(special) + 256:
        raise UserError(f"vocab_size {vocab_size} is too small: {num_codes} image codes and 256 bytes need {len(special) + 256}")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


@dataclass(frozen=True)
class Layout:
    """How an image of rows x columns codes is framed by tokens.

    plain (Chameleon):  boi  c c c ... c  eoi                                       rows * columns + 2 tokens
    lumina:             boi H W  c c .. c nl  c c .. c nl ...  eoi                  rows * (columns + 1) + 4 tokens

    One template says it all: the ids in order, CODE where an image code stands. The encoder fills it, the decoder reads
    through it, and the sampler forces every id that is not CODE.
    """

    kind: str
    vocab: Vocabulary
    pixels_per_code: int = 16

    def __post_init__(self):
        if self.kind not in ("plain", "lumina"):
            raise UserError(f"layout {self.kind!r} is unknown; use plain or lumina")
        if self.kind == "lumina" and (self.vocab.newline is None or self.vocab.side_start is None):
            raise UserError("layout lumina: the tokenizer has no row-end and size words (<reserved08799>, <reserved08801>...)")

    @cached_property
    def _templates(self) -> dict[tuple[int, int], np.ndarray]:
        return {}

    def template(self, rows: int, columns: int) -> np.ndarray:
        """int32 [tokens]: forced ids, and CODE where an image code stands. Read-only."""
        if (rows, columns) not in self._templates:
            self._templates[rows, columns] = self._template(rows, columns)
            self._templates[rows, columns].flags.writeable = False
        return self._templates[rows, columns]

    def _template(self, rows: int, columns: int) -> np.ndarray:
        v = self.vocab
        if self.kind == "plain":
            return np.array([v.boi, *[CODE] * (rows * columns), v.eoi], np.int32)
        assert v.side_start is not None and v.newline is not None
        sides = [n * self.pixels_per_code for n in (rows, columns)]
        if any(side % 32 for side in sides):
            raise UserError(f"layout lumina: sides {sides} must be multiples of 32 pixels")
        words = [v.side_start + side // 32 for side in sides]
        if any(word >= len(v.text_mask) or v.text_mask[word] for word in words):
            raise UserError(f"layout lumina: the tokenizer has no size words for {sides[0]} x {sides[1]} pixels; use smaller images")
        row = [CODE] * columns + [v.newline]
        return np.array([v.boi, *words, *row * rows, v.eoi], np.int32)

    def num_tokens(self, rows: int, columns: int) -> int:
        """Tokens of an image, frame included."""
        return len(self.template(rows, columns))

    def encode(self, codes: np.ndarray) -> np.ndarray:
        """int [rows, columns] codes -> int32 [tokens] ids.

        Raises:
          UserError: a code is outside the codebook.
        """
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.min() < 0 or codes.max() >= self.vocab.num_codes:
            raise UserError(f"image codes of shape {codes.shape} must be [rows, columns] in 0..{self.vocab.num_codes - 1}")
        ids = self.template(*codes.shape).copy()
        ids[ids == CODE] = codes.reshape(-1).astype(np.int32) + self.vocab.image_start
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray, rows: int, columns: int) -> np.ndarray:
        """Ids of one image, frame included -> int32 [rows, columns] codes.

        Raises:
          UserError: the ids do not follow the template.
        """
        ids = np.asarray(ids)
        template = self.template(rows, columns)
        code = template == CODE
        if ids.shape != template.shape or (ids[~code] != template[~code]).any():
            raise UserError(f"not a {self.kind} image of {rows} x {columns} codes")
        codes = ids[code] - self.vocab.image_start
        if codes.min() < 0 or codes.max() >= self.vocab.num_codes:
            raise UserError(f"not a {self.kind} image: an id among the codes is no image word")
        return codes.reshape(rows, columns).astype(np.int32)
