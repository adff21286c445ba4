"""Vocabulary, tokenizer file and image layouts."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import tiny_tokenizer
from xprompt_jax.errors import UserError
from xprompt_jax.tokens import Layout, Tokenizer, Vocabulary, image_token_name, reserved_name


def chameleon_names() -> dict[str, int]:
    """The special part of the real vocabulary, by the fact sheet's table, and two text pieces."""
    names = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<eoss>": 8196, "<racm3:break>": 8197}
    names |= {image_token_name(c): c + 4 for c in range(8192)}
    names |= {reserved_name(n): n + 4 for n in range(8706, 16380)}
    return names | {"a": 16384, "<": 16385, "b": 65535}


def test_real_ids():
    v = Vocabulary.from_names(chameleon_names())
    assert (v.bos, v.pad, v.eos, v.boi, v.eoi, v.sep) == (0, 1, 2, 8197, 8196, 8710)
    assert (v.image_start, v.num_codes, v.size) == (4, 8192, 65536)
    assert v.newline == 8803 and v.side_start + 16 == 8820
    assert v.text_ids == (16384, 16385, 65535)


def test_image_names_count_in_letters():
    assert image_token_name(0) == "IMGIMGAZ" and image_token_name(8191) == "IMGIMGIBJBZ"


def test_lumina_sizes():
    layout = Layout("lumina", Vocabulary.from_names(chameleon_names()))
    assert [layout.num_tokens(s // 16, s // 16) for s in (512, 768, 1024)] == [1060, 2356, 4164]
    assert list(layout.template(32, 48)[:3]) == [8197, 8804 + 16, 8804 + 24]


def test_shuffled_image_words_are_refused():
    names = chameleon_names()
    names[image_token_name(7)], names[image_token_name(8)] = names[image_token_name(8)], names[image_token_name(7)]
    with pytest.raises(UserError, match="code 7 has id 12"):
        Vocabulary.from_names(names)


def test_lumina_refuses_sides_that_have_no_word():
    """A small tokenizer has words for 16 sides; the ids behind them are text."""
    layout = Layout("lumina", tiny_tokenizer().vocab)
    assert len(layout.template(32, 32)) == 32 * 33 + 4
    with pytest.raises(UserError, match="no size words for 1024 x 512 pixels"):
        layout.template(64, 32)


@pytest.mark.parametrize("kind", ["plain", "lumina"])
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), seed=st.integers(0, 99))
def test_layout_round_trip(kind, rows, columns, seed):
    rows, columns = 2 * rows, 2 * columns
    codes = np.random.default_rng(seed).integers(0, 32, (rows, columns))
    layout = Layout(kind, tiny_tokenizer().vocab)
    ids = layout.encode(codes)
    assert len(ids) == layout.num_tokens(rows, columns)
    np.testing.assert_array_equal(layout.decode(ids, rows, columns), codes)
    ids[-1] += 1
    with pytest.raises(UserError, match="not a"):
        layout.decode(ids, rows, columns)


def test_codes_outside_the_book_are_refused():
    with pytest.raises(UserError, match=r"0\.\.31"):
        Layout("plain", tiny_tokenizer().vocab).encode(np.full((2, 2), 32))


def test_text_round_trip_and_file(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save(tmp_path / "text_tokenizer.json")
    again = Tokenizer.from_file(tmp_path / "text_tokenizer.json")
    text = "remove the rain, Straße 北京 🙂"
    assert again.decode(again.encode(text)) == text
    assert again.fingerprint == tokenizer.fingerprint and again.vocab == tokenizer.vocab


@settings(max_examples=50, deadline=None)
@given(
    st.text(max_size=20),
    st.sampled_from(["<s>", "</s>", "<racm3:break>", "IMGIMGAZ", "IMGIMGIMGAZ", "IMGIMGIMGIMGIMGBCZ", "<reserved08706>", ""]),
)
def test_text_cannot_forge_structure(text, name):
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(text + name)
    assert set(ids) <= set(tokenizer.vocab.text_ids)


def test_half_a_character_is_a_question_mark():
    tokenizer = tiny_tokenizer()
    assert tokenizer.encode("a \ud800 b") == tokenizer.encode("a ? b")


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "text_tokenizer.json"
    with pytest.raises(UserError, match="no such file"):
        Tokenizer.from_file(path)
    path.write_text("{}")
    with pytest.raises(UserError, match=r"text_tokenizer\.json: not a tokenizer"):
        Tokenizer.from_file(path)
    plain = json.loads(tiny_tokenizer()._backend.to_str())
    plain["model"]["vocab"].pop("<eoss>")
    plain["added_tokens"] = [t for t in plain["added_tokens"] if t["content"] != "<eoss>"]
    path.write_text(json.dumps(plain))
    with pytest.raises(UserError, match="<eoss>"):
        Tokenizer.from_file(path)
