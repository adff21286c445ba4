"""What is asked about a pair, and when an answer can be used."""

import base64
import contextlib
import io
import json
import re

import numpy as np
import PIL.Image
import pytest

from tests.data.endpoint_server import make_manifest
from xprompt_jax.data.endpoint import chat_body
from xprompt_jax.data.questions import QUESTIONS, parse_answer, requests_for


def test_keys_follow_the_words_and_not_the_place(manifest, tmp_path):
    keys = [r.key for r in requests_for(manifest, "reverse")]
    assert len(set(keys)) == 12 and all(re.fullmatch("[0-9a-f]{32}", key) for key in keys)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "pairs.jsonl").write_text(manifest.read_text())
    assert [r.key for r in requests_for(elsewhere / "pairs.jsonl", "reverse")] == keys
    assert len({next(requests_for(manifest, kind)).key for kind in QUESTIONS}) == len(QUESTIONS)


@pytest.mark.parametrize(
    "kind, answer, told",
    [
        ("describe", {"description": "The input image and the output image differ a lot."}, "no text in 'reverse_description'"),
        ("describe", {"description": "A red ball becomes a blue ball on the floor."}, "does not speak of"),
        ("describe", {"description": "The input image; the output image."}, "has 6 words, not 8 to 300"),
        ("describe", {"description": "The input image and the output image. I'm sorry, I see none."}, "is a refusal"),
        ("describe", {"description": "The input image is red, the output image is blue.", "subtask": "Cooking"}, "not one of Style"),
        ("describe", {"description": "the input image \ud800 and the output image are not alike"}, "surrogates not allowed"),
        ("reverse", {"reverse_instruction": ["a"]}, "no text"),
        ("reverse", {"reverse_instruction": "please turn the red ball into a blue one"}, "the same as forwards"),
        ("holdout", {"reason": "x", "answer": "perhaps"}, "not one of yes, no"),
        ("caption", [], "no JSON object"),
    ],
)  # fmt: skip
def test_useless_answers_are_told_apart(tmp_path, kind, answer, told):
    manifest = make_manifest(tmp_path, 1)
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "instruction": "turn the red ball into a blue one"}))
    if told.startswith("not one"):
        answer = {"reverse_description": "The input image is blue, the output image is red.", **answer}
    elif kind == "describe" and "reverse" not in told:
        answer = {"reverse_description": "The input image and the output image, as they are.", "subtask": "OTHER_SUBTASK", **answer}
    with pytest.raises(ValueError, match=told):
        parse_answer(next(requests_for(manifest, kind)), json.dumps(answer))


def test_usable_answers_are_understood(tmp_path):
    manifest = make_manifest(tmp_path, 1)
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "instruction": "turn red into blue"}))
    reverse, holdout = (next(requests_for(manifest, kind)) for kind in ("reverse", "holdout"))
    swapped = 'Sure:\n```json\n{"reverse_instruction": "turn blue\\n into red", "more": 1}\n```'
    assert parse_answer(reverse, swapped) == {"reverse_instruction": "turn blue into red"}
    assert parse_answer(holdout, '{"reason": "I cannot say why", "answer": "No."}') == {"reason": "I cannot say why", "answer": "no"}
    with contextlib.suppress(ValueError):  # nesting must not crash
        parse_answer(reverse, '{"a": ' + "[" * 100_000 + "}")


def test_large_images_are_sent_small(manifest, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (500, 2000, 3), np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "red.png")
    url = chat_body(next(requests_for(manifest, "caption")), "m")["messages"][0]["content"][0]["image_url"]["url"]
    assert PIL.Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size == (768, 192)
