"""Rows of other projects' manifests in our own fields.

    OmniGen      {"task_type", "instruction": "<img><|image_1|></img> ...", "input_images": ["a.png"], "output_image": "b.png"}
    Lumina-mGPT  {"conversations": [{"from": "human", "value": "... <|image|>"}, {"from": "gpt", "value": "<|image|>"}], "image": [...]}

Where the answer is an image without an input, the row is a picture to be drawn from its caption; where it is text, the row is a picture,
or a pair of pictures, that is described.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_OMNIGEN = re.compile(r"<img>\s*<\|image_(\d+)\|>\s*</img>")
_LUMINA = re.compile(r"<\|image\|>")


def ours(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row in fields of `sources.Record`; one that is in them already stays as it is.

    Raises:
      ValueError: saying why it cannot be.
    """
    if "conversations" in row:
        return _lumina(row)
    if row.keys() & {"input_images", "output_image", "output_images"}:
        return _omnigen(row)
    return dict(row)


def _omnigen(row: Mapping[str, Any]) -> dict[str, Any]:
    row = dict(row)
    inputs, output = row.pop("input_images", None) or [], row.pop("output_image", None)
    outputs = row.pop("output_images", None)  # their guide's word; their code and toy data say output_image
    if output is None and outputs is not None:
        output = outputs[0] if isinstance(outputs, list) and len(outputs) == 1 else outputs
    if not isinstance(inputs, list) or not isinstance(output, str):
        raise ValueError("'input_images' must be a list of paths and 'output_image' one path")
    if "task_type" in row:
        row["task"] = row.pop("task_type")
    instruction = row.get("instruction")
    if not isinstance(instruction, str):
        return row | {"output": output}
    if "input" in row:
        inputs = [row.pop("input"), *inputs]
    return row | _asked(inputs, output, _without_marks(instruction, _OMNIGEN, len(inputs)))


def _lumina(row: Mapping[str, Any]) -> dict[str, Any]:
    row = dict(row)
    turns, images = row.pop("conversations"), row.pop("image", [])
    images = [images] if isinstance(images, str) else images
    try:
        (asked, question), (told, answer) = ((turn["from"], turn["value"]) for turn in turns)
        fits = (asked, told) == ("human", "gpt") and len(_LUMINA.findall(question + answer)) == len(images)
    except (TypeError, ValueError, KeyError):
        fits = False
    if not fits:
        raise ValueError("'conversations' must be one question (human) and one answer (gpt), with an image for each <|image|>")
    drawn = len(_LUMINA.findall(answer))
    question = _without_marks(question, _LUMINA, len(images) - drawn)
    if drawn == 1:
        return row | _asked(images[:-1], images[-1], question)
    if drawn or not 1 <= len(images) <= 2:
        raise ValueError("the answer must be one image, or words about one image or two")
    task = {"task": row.get("task", "description"), "instruction": ""}
    return row | task | {"input": images[0], "output": images[-1], "description": answer.strip()}


def _asked(inputs: Sequence[Any], output: str, instruction: str) -> dict[str, Any]:
    """Fields of a task with an image as its answer; without an input, the instruction is a caption."""
    if not inputs:
        return {"input": output, "output": output, "instruction": "", "caption": instruction}
    more = {"more_inputs": list(inputs[1:])} if len(inputs) > 1 else {}
    return {"input": inputs[0], "output": output, "instruction": instruction, **more}


def _without_marks(text: str, mark: re.Pattern[str], images: int) -> str:
    """The text without the marks of where images stand: ours stand after it. At its ends they go, inside it they become words."""
    count = iter(range(1, images + 1))

    def words(match: re.Match[str]) -> str:
        number = int(match[1]) if match.groups() else next(count, images)
        if images > 1:
            return f" image {number} "
        return " the image " if text[: match.start()].strip() else " "

    return re.sub(r"\s+([.,;:!?])", r"\1", " ".join(mark.sub(words, text).split()))
