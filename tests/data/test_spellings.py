"""Other projects' manifests, as their own examples have them."""

import json

import pytest

from tests.data.making import write
from xprompt_jax.data.annotate import merge
from xprompt_jax.data.questions import requests_for
from xprompt_jax.data.sources import ManifestRecords
from xprompt_jax.errors import UserError


def read(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(ManifestRecords(path))


def names(record):
    return record.input.name, record.output.name, tuple(path.name for path in record.more_inputs)


@pytest.mark.parametrize("instruction, inputs, want", [
    ("<img><|image_1|></img> The umbrella should be red.", ["a"], "The umbrella should be red."),
    ("Detect the skeleton of human in <img><|image_1|></img>", ["a"], "Detect the skeleton of human in the image"),
    ("Make <img><|image_1|></img>, please, blue.", ["a"], "Make the image, please, blue."),
    ("<img><|image_1|></img> wears <img><|image_2|></img>.", ["a", "b"], "image 1 wears image 2."),
])  # fmt: skip
def test_omnigen_s_rows(tmp_path, instruction, inputs, want):
    row = {"task_type": "edit", "instruction": instruction, "input_images": inputs}
    for output in ({"output_image": "o"}, {"output_images": ["o"]}, {"output_images": "o"}):
        (record,) = read(tmp_path / "m.jsonl", row | output)
        assert names(record) == (inputs[0], "o", tuple(inputs[1:])) and record.instruction == want and record.task == record.group == "edit"


def test_a_picture_without_an_input_is_drawn_from_its_text(tmp_path):
    drawn = {"task_type": "text_to_image", "instruction": "A white cat.", "output_image": "o"}
    asked = {"conversations": [{"from": "human", "value": "A white cat."}, {"from": "gpt", "value": "<|image|>"}], "image": ["o"]}
    for row in (drawn, drawn | {"input_images": []}, drawn | {"input_images": None}, asked):
        (record,) = read(tmp_path / "m.jsonl", row)
        assert names(record) == ("o", "o", ()) and (record.instruction, record.caption) == ("", "A white cat.")


def test_lumina_s_rows(tmp_path):
    turn = lambda question, answer, *images: {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], "image": list(images),
    }  # fmt: skip
    rows = (
        turn("Hi, please convert this depth image <|image|> to a color image", "Sure: <|image|>", "a", "o"),
        turn("<|image|> <|image|> put these together", "<|image|>", "a", "b", "o"),
        turn("<|image|>What is this?", "A dog by the sea.", "a"),
        turn("<|image|><|image|>What differs?", "The input image is red, the output image blue.", "a", "b"),
    )
    found = read(tmp_path / "m.jsonl", *rows)
    assert [names(r) for r in found] == [("a", "o", ()), ("a", "o", ("b",)), ("a", "a", ()), ("a", "b", ())]
    assert found[0].instruction == "Hi, please convert this depth image the image to a color image"
    assert found[1].instruction == "image 1 image 2 put these together"
    assert [(r.instruction, r.description) for r in found[2:]] == [
        ("", "A dog by the sea."), ("", "The input image is red, the output image blue."),
    ]  # fmt: skip
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))  # their files are one array
    assert [names(r) for r in ManifestRecords(tmp_path / "list.json")] == [names(r) for r in found]


@pytest.mark.parametrize("row, told", [
    ({"conversations": [{"from": "human", "value": "x"}]}, "one question .human. and one answer"),
    ({"conversations": [{"from": "human", "value": "<|image|>"}, {"from": "gpt", "value": "x"}]}, "an image for each"),
    ({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}, "one image, or words about one image or two"),
    ({"conversations": "x"}, "one question"),
    ({"instruction": "x", "input_images": "a", "output_image": "o"}, "'input_images' must be a list"),
    ({"instruction": "x", "input_images": ["a"], "output_images": ["o", "p"]}, "'output_image' one path"),
    ({"input_images": ["a"], "output_image": "o"}, "no text field 'i"),
    ({"input": "a", "output": "b", "instruction": "x", "split": "test"}, "'split' is 'test'; it can be 'train' or 'eval'"),
    ({"input": "a", "output": "b", "instruction": "x", "holdout": "maybe"}, "'holdout' is 'maybe'; it can be '' or 'yes' or 'no'"),
])  # fmt: skip
def test_what_cannot_be_is_told_with_its_line(tmp_path, row, told):
    with pytest.raises(UserError, match=rf"m\.jsonl, line 1: [^\n]*{told}"):
        read(tmp_path / "m.jsonl", row)


def test_they_are_merged_in_our_own_words(tmp_path):
    """The manifest that answers are merged into is ours, whatever the first one was."""
    for i, name in enumerate("ao"):
        write(tmp_path / f"{name}.png", i)
    row = {"task_type": "edit", "instruction": "<img><|image_1|></img> Make it red.", "input_images": ["a.png"], "output_image": "o.png"}
    (tmp_path / "m.json").write_text(json.dumps([row]))
    (request,) = requests_for(tmp_path / "m.json", "reverse")
    answer = {"key": request.key, "kind": "reverse", "model": "m", "text": "", "parsed": {"reverse_instruction": "make it blue"}}
    (tmp_path / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    merge(tmp_path / "m.json", tmp_path / "answers.jsonl", tmp_path / "merged.jsonl")
    assert json.loads((tmp_path / "merged.jsonl").read_text()) == {
        "input": "./a.png", "output": "./o.png", "instruction": "Make it red.", "task": "edit", "reverse_instruction": "make it blue",
    }  # fmt: skip


@pytest.mark.parametrize("change, told", [
    ({"group": ["a"]}, r"'group' must be a text, not \['a'\]"), ({"task": 5}, "'task' must be a text, not 5"),
    ({"caption": []}, r"'caption' must be a text, not \[\]"), ({"exact": "no"}, "'exact' must be true or false, not 'no'"),
    ({"input": "x\0.png"}, "can be no file's name"), ({"output": "\ud83d.png"}, "can be no file's name"),
    ({"more_inputs": ["\0"]}, "can be no file's name"), ({"more_inputs": "a"}, "'more_inputs' is no list of paths"),
])  # fmt: skip
def test_fields_of_another_type_are_told_with_their_line(tmp_path, change, told):
    with pytest.raises(UserError, match=rf"^[^\n]*m\.jsonl, line 1: [^\n]*{told}[^\n]*$"):
        read(tmp_path / "m.jsonl", {"input": "a", "output": "b", "instruction": "x", **change})


def test_null_says_nothing(tmp_path):
    row = {"input": "a", "output": "b", "instruction": "x"}
    assert read(tmp_path / "m.jsonl", row | {"caption": None, "task": None, "split": None}) == read(tmp_path / "m.jsonl", row)
