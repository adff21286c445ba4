"""Example pairs: what a sub-task is, what it works on and what it yields. The sub-tasks themselves are in `tasks.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from xprompt_jax.data import palettes, world
from xprompt_jax.data.render import FLOOR_KINDS, MATERIALS, Render, Scene, render_batch
from xprompt_jax.errors import UserError

GENERIC = (
    "do what the example shows", "apply the change of the example", "repeat the edit of the example pair",
    "transform the image as in the example", "follow the example", "do the same here",
)  # fmt: skip
"""Instructions that say nothing about the task: only the example tells."""

_JOINT, _REVERSED = "; the output image ", "/reverse"


@dataclass(frozen=True, eq=False)
class Pair:
    """One example of one sub-task."""

    input: np.ndarray  # uint8 [h, w, 3]
    output: np.ndarray  # uint8 [h, w, 3]
    instruction: str
    reverse_instruction: str
    description: str
    """The difference in words: "The input image ...; the output image ..."."""
    task: str
    """Name of the sub-task, with "/reverse" behind it if swapped."""
    parameters: dict
    caption: str
    """The scene that the forward task starts from, in words; "" for photographs."""

    def reversed(self) -> Pair:
        """The same pair backwards, images and words."""
        before, after = self.description.removeprefix("The input image ").removesuffix(".").split(_JOINT)
        name = self.task.removesuffix(_REVERSED) if self.task.endswith(_REVERSED) else self.task + _REVERSED
        return dataclasses.replace(
            self, input=self.output, output=self.input, instruction=self.reverse_instruction,
            reverse_instruction=self.instruction, description=_describe(after, before), task=name,
        )  # fmt: skip


def _describe(before: str, after: str) -> str:
    return f"The input image {before}{_JOINT}{after}."


@dataclass(frozen=True, eq=False)
class Source:
    """An image to work on; scene and render are None for a photograph."""

    image: np.ndarray  # uint8 [h, w, 3]
    scene: Scene | None = None
    render: Render | None = None

    @property
    def depth(self) -> np.ndarray | None:
        """Metres [h, w] if known."""
        return None if self.render is None else self.render.depth


def photo_source(image) -> Source:
    """A photograph, uint8 [h, w, 3]."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise UserError(f"photo of type {image.dtype} and shape {image.shape}: give uint8 [height, width, 3]")
    return Source(image)


def scene_sources(seed: int, count: int, size: int, *, zoom: float = 1.0, plain: bool = False) -> list[Source]:
    """`count` rendered scenes of `size` x `size` pixels; source i depends on the other arguments and i alone.

    Args:
      zoom: times the focal length. Above 1, objects fill more of a small image and those at the side leave it.
      plain: no patterns on floor or objects, which a small image tokenizer could not show anyway.
    """
    scenes = _unstack(jax.device_get(world.sample_scenes(jax.random.key(seed), _padded(count))), count)
    scenes = [scene._replace(camera=scene.camera * np.array([1, 1, zoom], np.float32)) for scene in scenes]
    if plain:
        matte, bare = MATERIALS.index("matte"), FLOOR_KINDS.index("plain")
        scenes = [s._replace(material=np.full_like(s.material, matte), floor_kind=np.full_like(s.floor_kind, bare)) for s in scenes]
    return [Source(r.rgb, s, r) for s, r in zip(scenes, _render(scenes, size), strict=True)]


def _padded(count: int) -> int:
    """The next power of two, so that few batch shapes are ever compiled."""
    return 1 << max(count - 1, 0).bit_length()


def _unstack(batch, count: int) -> list:
    return [jax.tree.map(lambda leaf, i=i: leaf[i], batch) for i in range(count)]


def _render(scenes: Sequence[Scene], size: int) -> list[Render]:
    padded = [*scenes, *[scenes[0]] * (_padded(len(scenes)) - len(scenes))] if scenes else []
    if not padded:
        return []
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *padded)
    return _unstack(jax.device_get(render_batch(stacked, size)), len(scenes))


@dataclass(frozen=True)
class Task:
    """A sub-task. `change` does the work: edits: (source, parameters, rng) -> (arranged scene, Edit of it);
    all others: -> (input, output, what the input image shows, what the output image shows)."""

    name: str
    prototype: str
    needs_scene: bool
    instructions: tuple[str, ...]
    """Paraphrases; str.format templates over the parameters (edits: over {words})."""
    reverse_instructions: tuple[str, ...]
    draw: Callable[[np.random.Generator], dict]
    change: Callable

    def sample_parameters(self, rng: np.random.Generator) -> dict:
        """Draws what defines the change; JSON-able."""
        return self.draw(rng)

    def apply(self, source: Source, parameters: dict, rng: np.random.Generator) -> Pair:
        """One pair.

        Raises:
          UserError: if the task needs a scene and the source is a photograph.
        """
        return apply_all(self, parameters, [source], [rng])[0]


def apply_all(task: Task, parameters: dict, sources: Sequence[Source], rngs: Sequence[np.random.Generator]) -> list[Pair]:
    """`Task.apply` for many sources of one size; an edit renders all its scenes at once."""
    if task.needs_scene and any(s.scene is None for s in sources):
        raise UserError(f"task {task.name!r} needs a scene with ground truth, not a photograph: use scene_sources")
    changes = [task.change(source, parameters, rng) for source, rng in zip(sources, rngs, strict=True)]
    if task.prototype == "edit":
        return _edited(task, parameters, sources, changes, rngs)
    pairs = []
    for source, (before, after, shown, then), rng in zip(sources, changes, rngs, strict=True):
        caption = "" if source.scene is None else world.describe_scene(source.scene)
        pairs.append(_pair(task, parameters, (before, after), (shown, then), (parameters, parameters), caption, rng))
    return pairs


def _edited(task, parameters, sources, changes, rngs) -> list[Pair]:
    sizes = sorted({s.image.shape[:2] for s in sources})
    if len(sizes) > 1:
        raise UserError(f"sources of {sizes} pixels in one call: make the pairs of one size at a time")
    scenes = [scene for before, edit in changes for scene in (before, edit.scene)]
    images = iter([r.rgb for r in _render(scenes, sizes[0][0])] if sizes else [])
    pairs = []
    for (before, edit), rng in zip(changes, rngs, strict=True):
        words = {"words": edit.words}, {"words": edit.reverse}
        caption = world.describe_scene(before)
        pairs.append(_pair(task, parameters, (next(images), next(images)), (edit.before, edit.after), words, caption, rng))
    return pairs


def _pair(task, parameters, images, shown, words, caption, rng) -> Pair:
    forward, backward = str(rng.choice(task.instructions)), str(rng.choice(task.reverse_instructions))
    before, after = images
    forward, backward = forward.format(**words[0]), backward.format(**words[1])
    return Pair(before, after, forward, backward, _describe(*shown), task.name, parameters, caption)


def draw_real(rng: np.random.Generator, low: float, high: float, digits: int = 2) -> float:
    """Uniform, rounded so that words and JSON hold exactly what is applied."""
    return round(float(rng.uniform(low, high)), digits)


def draw_one(rng: np.random.Generator, options) -> str:
    """One of the options."""
    return str(rng.choice(list(options)))


def draw_two(rng: np.random.Generator, options) -> tuple[str, str]:
    """Two different ones of the options."""
    first, second = rng.choice(list(options), 2, replace=False)
    return str(first), str(second)


def draw_two_colors(rng, first: str, second: str) -> dict:
    """Two colours that lie far apart, and their names."""
    a, b = palettes.distinct_colors(rng, 2, separation=200).tolist()
    while palettes.color_name(a) == palettes.color_name(b):
        a, b = palettes.distinct_colors(rng, 2, separation=200).tolist()
    return {first: a, second: b, f"{first}_name": palettes.color_name(a), f"{second}_name": palettes.color_name(b)}
