"""What the tasks of real datasets are called: many ways to ask for each, forwards and backwards, and what the two images show.

Which of them a pair gets is decided by a hash of its key, so that a store can be made again word for word. The form that says nothing
about the task ("do what the example shows") is drawn at training time (`pipeline.GENERIC_INSTRUCTIONS`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Phrases:
    """The words of a task; str.format templates."""

    forward: tuple[str, ...]
    backward: tuple[str, ...] = ()
    """Empty: the task is not trained backwards."""
    before: tuple[str, ...] = ()
    """What the input image shows, after "The input image"; empty: pairs are not described."""
    after: tuple[str, ...] = ()
    """What the output image shows, after "the output image"."""


def pick(options: Sequence[str], key: str) -> str:
    """One of the options, by a hash of the key: always the same one."""
    return options[int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big") % len(options)]


def say(task: str, key: str, **values: str) -> dict[str, Any]:
    """The words of one pair, as fields of `sources.Record`.

    Args:
      task: a key of `PHRASES`.
      key: of the pair.
      values: what the templates name.
    """
    phrases = PHRASES[task]
    chosen = {name: pick(options, f"{task}/{name}/{key}").format(**values) for name, options in vars(phrases).items() if options}
    fields = {"instruction": chosen["forward"], "reverse_instruction": chosen.get("backward", "")}
    if "before" in chosen:
        fields |= difference(chosen["before"], chosen["after"])
    return fields


def difference(before: str, after: str) -> dict[str, Any]:
    """The difference in words, both ways, as fields of `sources.Record`."""
    return {
        "description": f"The input image {before}; the output image {after}.",
        "reverse_description": f"The input image {after}; the output image {before}.",
    }


_CLEAN = ("is the same view, clean and undisturbed", "shows the same scene as it should look", "is the same picture in good quality")
_PICTURE = ("is a photograph of a scene", "is an ordinary photograph", "shows a scene in its natural colours")


def _control(what: str, *also: str) -> Phrases:
    """A picture of `what` to an image with the caption {prompt}, and back."""
    names = (what, *also)
    return Phrases(
        tuple(form.format(name) + ": {prompt}" for name in names for form in (
            "turn this {} into a picture", "paint an image that follows this {}", "make a photograph out of the {}",
            "generate an image from the {}", "draw the picture that this {} belongs to", "use the {} to create an image",
        )),
        tuple(form.format(name) for name in names for form in (
            "show the {} of the image", "extract the {}", "turn the picture into its {}", "compute the {} of this image",
            "give me the {}", "what is the {} of this picture?",
        )),
        tuple(f"is the {name} of a picture" for name in names),
        ("is a picture of {prompt}", "shows {prompt}", "is the finished image: {prompt}"),
    )  # fmt: skip


PHRASES: dict[str, Phrases] = {
    "denoise": Phrases(
        ("remove the noise", "denoise the image", "clean up the noise", "get rid of the grain", "make the picture clean",
         "filter out the noise", "restore the noisy photograph", "take the noise out of this image", "suppress the sensor noise",
         "this picture is noisy, clean it", "recover the clean image", "smooth away the grain but keep the details"),
        ("add noise", "make the image noisy", "add Gaussian noise", "cover the picture with grain", "degrade the image with noise",
         "simulate a noisy sensor", "put strong grain on the photograph"),
        ("suffers from noise", "is covered with grain", "is spoilt by random noise"), _CLEAN,
    ),
    "deblur": Phrases(
        ("remove the motion blur", "deblur the image", "sharpen the blurred photograph", "undo the camera shake", "make the image sharp",
         "restore the sharp picture", "get rid of the blur", "this photograph is blurred, fix it", "recover the details lost to motion",
         "take away the motion blur", "turn the shaky shot into a sharp one", "correct the blur"),
        ("add motion blur", "blur the image", "shake the camera", "make it look like a moving camera", "smear the picture by motion",
         "simulate camera shake", "make the photograph unsharp"),
        ("is blurred by motion", "suffers from camera shake", "is unsharp because things moved"), _CLEAN,
    ),
    "derain": Phrases(
        ("remove the rain", "derain the image", "clear away the rain", "take the rain out of the picture", "make the rain stop",
         "erase the rain streaks", "get rid of the raindrops", "clean the image of rain", "show the scene without rain",
         "remove all rain streaks from this photograph", "restore the picture from rain", "give me the dry scene"),
        ("add rain", "make it rain", "put rain into the picture", "let it rain in this scene", "draw rain streaks",
         "make the weather rainy", "cover the image with rain"),
        ("is covered with rain streaks", "was taken in the rain", "suffers from rain"), _CLEAN,
    ),
    "low_light": Phrases(
        ("brighten the dark photograph", "enhance the low-light image", "light up the picture", "make the dark image visible",
         "lift the shadows of this dark picture", "improve the lighting", "correct the underexposure", "make it as bright as by day",
         "recover the picture from the dark", "turn up the light", "increase the exposure", "show what is hidden in the dark"),
        ("darken the image", "make the image underexposed", "turn down the light", "make it a low-light photograph", "dim the picture",
         "take the picture as if there were hardly any light", "reduce the exposure"),
        ("is dark and underexposed", "was taken in low light", "is too dark to see much"),
        ("shows the same scene in normal light", "is well exposed", "shows the same view, bright and clear"),
    ),
    "retouch": Phrases(
        ("retouch the photograph", "enhance the colours", "edit the photo like an expert", "improve tone and colour",
         "develop the raw image", "make the photograph look professional", "adjust exposure, contrast and colour",
         "give the picture a better look", "correct the colours and the light", "bring out the best of this photograph",
         "finish the picture as a retoucher would"),
        ("undo the retouching", "make the photograph look unedited", "flatten the colours", "bring back the raw look",
         "remove the colour grading", "show the picture as the camera took it"),
        ("is an unedited photograph with flat tones", "looks as the camera took it", "is dull in light and colour"),
        ("is the same photograph after retouching", "has better exposure and colours", "is the same view, retouched by an expert"),
    ),
    "depth": Phrases(
        ("show the depth in the {palette} palette", "estimate depth, coloured {palette}", "turn the image into a {palette} depth map",
         "how far away is everything? paint it in {palette}", "paint the depth with {palette} colours", "make a depth map in {palette}",
         "predict the distance of every pixel, {palette} colours", "render the scene's depth using {palette}",
         "convert the picture to depth ({palette})", "give me the {palette} depth map", "colour every pixel by its depth, {palette}"),
        ("turn the {palette} depth map into a picture", "paint a scene for this {palette} depth map",
         "make a photograph from the {palette} depth map", "imagine the picture behind this {palette} depth map",
         "generate an image with this depth ({palette})", "fill the {palette} depth map with a real scene"),
        _PICTURE, ("shows its depth in the {palette} palette", "is the depth map of the same view in {palette} colours",
                   "says by {palette} colours how far everything is"),
    ),
    "normals": Phrases(
        ("paint the surface normals", "estimate surface normals", "show which way the surfaces face", "turn the image into a normal map",
         "make a normal map", "predict the surface normals", "colour every pixel by its surface normal",
         "give me the normal map of the scene", "compute the normals", "show the orientation of all surfaces",
         "render the normals of this picture"),
        ("turn the normal map into a picture", "paint a scene for these surface normals", "make a photograph from the normal map",
         "imagine the picture behind this normal map", "generate an image with these normals"),
        _PICTURE, ("shows its surface normals as colours", "is the normal map of the same view",
                   "says by colour which way every surface faces"),
    ),
    "segmentation": Phrases(
        ("paint every class in its colour", "segment the image", "show the semantic segmentation", "label every pixel by its class",
         "make a segmentation map", "colour each kind of thing differently", "turn the image into a segmentation map",
         "divide the picture into its classes", "predict the semantic map", "what is where? paint the classes",
         "mark all regions by class"),
        ("turn the segmentation into a picture", "paint a scene for this segmentation", "make a photograph from the segmentation map",
         "imagine the picture behind these regions", "generate an image with this layout", "fill the class map with a real scene"),
        _PICTURE, ("paints every class of it in a colour of its own", "is the segmentation map of the same view",
                   "says by colour what every pixel belongs to"),
    ),
    "control_canny": _control("edge map", "Canny edges"),
    "control_hed": _control("soft edge map", "HED edges"),
    "control_hedsketch": _control("sketch", "pencil sketch"),
    "control_mlsd": _control("map of straight lines", "line drawing of straight edges"),
    "control_depth": _control("depth map", "grey depth map"),
    "control_normal": _control("normal map", "map of surface normals"),
    "control_seg": _control("segmentation map", "map of coloured regions"),
    "control_openpose": _control("pose skeleton", "stick figure of the pose"),
    "control_bbox": _control("map of boxes", "layout of bounding boxes"),
    "control_blur": _control("blurred image", "out-of-focus version"),
    "control_grayscale": _control("black and white image", "grey version"),
    "control_inpainting": _control("image with holes", "picture with missing parts"),
    "control_outpainting": _control("cropped image", "middle part of a picture"),
    "style": Phrases(
        ("paint the second image in the style of the first: {prompt}", "transfer the style of the first image to the second: {prompt}",
         "give the second picture the look of the first: {prompt}", "redraw the second image as the first one is drawn: {prompt}",
         "use the first image as style reference for the second: {prompt}", "make the second image look like the first: {prompt}",
         "keep the content of the second image, take the style of the first: {prompt}",
         "restyle the second picture after the first: {prompt}", "what would the second image be in the manner of the first? {prompt}",
         "borrow the style of image 1 for image 2: {prompt}"),
    ),
    "compose": Phrases(
        ("combine the two images: {prompt}", "make one image out of both: {prompt}", "merge what the two images show: {prompt}",
         "create a new picture from these two: {prompt}", "take from both images and draw: {prompt}",
         "bring the two images together: {prompt}", "use both images as references: {prompt}", "compose a picture of these two: {prompt}",
         "mix the first image with the second: {prompt}", "let the two images become one: {prompt}"),
    ),
    "try_on": Phrases(
        ("dress the person in this garment", "put the garment on the person", "let the person wear the clothing of the second image",
         "try this garment on", "show the person wearing these clothes", "fit the garment to the person",
         "virtual try-on: person first, garment second", "replace what is missing of the person by this garment",
         "change the clothes of the person to the second image's", "how would this person look in the garment?"),
    ),
    "imitate": Phrases(
        ("fill the missing part of the first image as in the second", "complete the first image with what the second shows",
         "copy the part from the reference into the first image", "edit the first image so that it imitates the second",
         "take the look of the second image for the masked region", "imitate the reference in the empty region",
         "redraw the grey part after the second image", "transfer the part that the second image shows",
         "close the hole with the reference",
         "paint into the first image what the second one shows"),
    ),
}  # fmt: skip
"""By task."""
