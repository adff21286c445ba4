"""What the annotator asks about an image pair, and when an answer can be used.

Sources: paper section 3.1 and appendices C.1 to C.4. The differences and the two filters of style pairs are asked for in the paper's words;
where it prints no wording, no form of the answer or no check, they are ours.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from xprompt_jax.data import sources
from xprompt_jax.data.endpoint import Request
from xprompt_jax.errors import UserError

Kind = Literal["describe", "reverse", "caption", "relation", "style_same", "layout_same", "holdout"]
SUBTASKS = (
    "Style Transfer", "Object Removal", "Object Replacement", "Object Addition", "Object Modification", "Season/Time Change",
    "OTHER_SUBTASK",
)  # fmt: skip
KEPT_CAPTIONS = 0.1
"""Share of captions that stay as they are (C.4), chosen by a hash."""
_YES_NO: dict[str, tuple[str, ...]] = {"reason": (), "answer": ("yes", "no")}
_REFUSAL = re.compile(
    r"\b(i['’]?m sorry|i (cannot|can['’]?t|am unable|['’]m unable)|as an ai|unable to (see|view|process))\b", re.IGNORECASE
)


def _both(record: sources.Record) -> tuple[Path, ...]:
    """The input image (of style pairs: the one whose style is taken) and the output image."""
    return record.input, record.output


def _all(record: sources.Record) -> tuple[Path, ...]:
    return record.input, *record.more_inputs, record.output


def _made_from(record: sources.Record) -> tuple[Path, ...]:
    """The image that was changed (of several inputs the last: of style pairs the source) and what became of it."""
    return (record.input, *record.more_inputs)[-1], record.output


@dataclasses.dataclass(frozen=True)
class Question:
    """What one kind asks, and what a usable answer is."""

    prompt: str
    """str.format template over {instruction} and {caption}."""
    images: Callable[[sources.Record], tuple[Path, ...]]
    """Which of a record's images it is about."""
    fields: dict[str, tuple[str, ...]]
    """Fields of the JSON answer, with the values allowed; (): any text."""
    fills: dict[str, str] = dataclasses.field(default_factory=dict)
    """Field of a record -> field of the answer. Rows that have them all are not asked about ..."""
    rewrites: bool = False
    """... unless this is set: then what stands there is replaced."""
    words: tuple[int, int] = (1, 300)
    """Fewest and most words of what fills a record."""

    @functools.cached_property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of the answer."""
        properties = {name: {"type": "string", **({"enum": list(allowed)} if allowed else {})} for name, allowed in self.fields.items()}
        return {"type": "object", "properties": properties, "required": list(self.fields), "additionalProperties": False}


QUESTIONS: dict[str, Question] = {
    "describe": Question(
        'Describe the differences between the two images. Use "input image" to describe the first image and "output image" to describe the '
        f"second image, and describe what subtask it belongs to, choosing from {', '.join(SUBTASKS)}. Answer in JSON. "
        '"description": the differences in one to three sentences. "reverse_description": the same with the roles exchanged, so that the '
        'second image is called the input image and the first the output image. "subtask": one of the names above.',
        _both,
        {"description": (), "reverse_description": (), "subtask": SUBTASKS},
        {"description": "description", "reverse_description": "reverse_description"},
        words=(8, 300),
    ),
    "reverse": Question(
        'The input image was turned into the output image by the instruction "{instruction}". Write the instruction that turns the output '
        'image back into the input image, short, as a person would say it. Answer in JSON: "reverse_instruction".',
        _both,
        {"reverse_instruction": ()},
        {"reverse_instruction": "reverse_instruction"},
        words=(2, 60),
    ),
    "caption": Question(
        "Describe the image for someone who has to draw it without seeing it: what is there, how many, in which colours, where in the "
        'image and relative to what else. Its present caption, perhaps wrong, is "{caption}". Answer in JSON: "caption".',
        lambda record: (record.input,),
        {"caption": ()},
        {"caption": "caption"},
        True,
        (8, 300),
    ),
    "relation": Question(
        "The output image was made from the input image or images. Say densely and concretely which attributes of each (subject, identity, "
        "composition, colours, style, texture) live on in the output image, and which do not; several are called image 1 and image 2. "
        'Answer in JSON: "relation".',
        _all,
        {"relation": ()},
        {"description": "relation"},
        words=(8, 300),
    ),
    "style_same": Question(
        "Do you think the two images share the same style [Yes/No]? Provide your reasoning. "
        'Answer in JSON: "reason" first, then "answer": yes or no.',
        _both,
        _YES_NO,
    ),
    "layout_same": Question(
        "Do you think the two images share the same semantics and basic layout [Yes/No]? Provide your reasoning. "
        'Answer in JSON: "reason" first, then "answer": yes or no.',
        _made_from,
        _YES_NO,
    ),
    "holdout": Question(
        'Does the editing instruction "{instruction}" add an object to an image or remove one? Answer in JSON: "reason" first, then '
        '"answer": yes or no.',
        lambda record: (),
        _YES_NO,
    ),
}
"""By kind. describe, reverse: C.1. style_same, layout_same: the filters of C.2. caption: C.4. holdout: section 4.4."""
assert tuple(QUESTIONS) == get_args(Kind)


def requests_for(manifest: Path, kind: str, *, rewrite: bool = False) -> Iterator[Request]:
    """One request for each row of a manifest that lacks what the kind fills in; with `rewrite`, for every row.

    Raises:
      UserError: an unknown kind, or a manifest that cannot be used.
    """
    if kind not in QUESTIONS:
        raise UserError(f"--kind {kind}: unknown; kinds are {', '.join(QUESTIONS)}")
    for record in sources.manifest(manifest):
        question, request = QUESTIONS[kind], request_for(record, Path(manifest), kind)
        filled = not rewrite and question.fills and all(getattr(record, name) for name in question.fills)
        if not filled or (question.rewrites and sources.held_out(request.key, KEPT_CAPTIONS) == "train"):
            yield request


def request_for(record: sources.Record, manifest: Path, kind: str) -> Request:
    """The question of one kind about one row."""
    question = QUESTIONS[kind]
    text = question.prompt.format(instruction=record.instruction, caption=record.caption)
    images = question.images(record)
    named = [os.path.relpath(path, manifest.parent) for path in images]  # a folder may move with its manifest
    key = hashlib.sha256(json.dumps([kind, text, named]).encode()).hexdigest()[:32]
    return Request(key, kind, images, text, record.instruction, question.schema)


def parse_answer(request: Request, text: str) -> dict[str, str]:
    """Reads an answer: JSON, perhaps in a code fence or after other words.

    Returns:
      its fields, with white space normalised.

    Raises:
      ValueError: why it cannot be used.
    """
    question = QUESTIONS[request.kind]
    try:
        row = json.loads(text[text.index("{") : text.rindex("}") + 1])
    except (ValueError, RecursionError):
        raise ValueError("no JSON object") from None
    parsed: dict[str, str] = {}
    for name, allowed in question.fields.items():
        value = row.get(name) if isinstance(row, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"no text in {name!r}")
        value.encode()  # half a surrogate pair is a UnicodeEncodeError, which is a ValueError
        value = " ".join(value.split())
        if allowed:
            fitting = [choice for choice in allowed if _letters(choice) == _letters(value)]
            if not fitting:
                raise ValueError(f"{name} is {value[:40]!r}, not one of {', '.join(allowed)}")
            value = fitting[0]
        elif name in question.fills.values() and _REFUSAL.search(value):
            raise ValueError(f"{name} is a refusal: {value[:60]!r}")
        elif name in question.fills.values() and not question.words[0] <= len(value.split()) <= question.words[1]:
            raise ValueError(f"{name} has {len(value.split())} words, not {question.words[0]} to {question.words[1]}")
        parsed[name] = value
    for name in {"description", "reverse_description"} & parsed.keys():
        if not all(image in parsed[name].lower() for image in ("input image", "output image")):
            raise ValueError(f"{name} does not speak of the input image and the output image")
    there, back = parsed.get("description", request.instruction), parsed.get("reverse_description", parsed.get("reverse_instruction"))
    # Word order counts: "turn red into blue" and "turn blue into red" are as they should be.
    if back is not None and _essence(there) == _essence(back):
        raise ValueError("backwards says the same as forwards")
    return parsed


def _letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text).lower()


def _essence(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.lower()) if word not in ("the", "a", "an", "please")]
