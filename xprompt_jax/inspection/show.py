"""Rows of a run, decoded, as one self-contained page and in the terminal."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
import PIL.Image

from xprompt_jax.config import Config
from xprompt_jax.convert.native import load_tokenizers
from xprompt_jax.data.images import postprocess
from xprompt_jax.data.pipeline import Choice, Rows
from xprompt_jax.data.store import Store
from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path
from xprompt_jax.inspection.rows import Part, ReadRow, read_row
from xprompt_jax.prompt import Prompter, Role, SlotShape
from xprompt_jax.tokens import Layout

COLOURS = {Role.SINK: "#8a8a90", Role.IE: "#c4663a", Role.XP: "#8657b5", Role.TD: "#3565c4", Role.PAD: "#d8d6d0"}
LEARNED = "#3b8f6b"
_AT_ONCE = 16
"""Pictures decoded at once."""

_decode = jax.jit(lambda vqgan, codes: vqgan.decode(codes))


@dataclass(frozen=True)
class Shown:
    """A row with what it takes to show it."""

    bucket: str
    number: int
    """Of the row, in its bucket and over all hosts."""
    origin: tuple[tuple[str, str], ...]
    """Where it came from: (what, pair)."""
    row: ReadRow
    pictures: dict[int, np.ndarray]
    """First slot of an image -> uint8 [h, w, 3]."""


def collect(config: Config, *, step: int, rows: int, bucket: str = "", split: str = "train") -> list[Shown]:
    """The first rows of every bucket that a step trains on, over all hosts.

    Args:
      config: of the run; its store is opened.
      step: counted as the data counts, from 0.
      rows: of each bucket, at most.
      bucket: one of them alone.

    Raises:
      UserError: no such bucket, or the store cannot serve the run.
    """
    names = [b.name for b in config.data.buckets]
    if bucket and bucket not in names:
        raise UserError(f"--bucket {bucket}: the configuration has {', '.join(names)}")
    store = Store.open(config.data.store)
    vqgan, tokenizer = load_tokenizers(Path(config.data.store) / "tokenizers")
    prompter = Prompter(tokenizer, Layout(config.model.layout, tokenizer.vocab, vqgan.config.downsample))
    source = Rows(store, prompter, config.data, config.model.num_xp_tokens, split=split)
    batches, choices = source(step), source.choices(step)
    grid = store.codes.shape[1], store.codes.shape[2]
    found = []
    for b in config.data.buckets:
        if bucket not in ("", b.name):
            continue
        shape = SlotShape.of(b, config.model.num_xp_tokens, config.data.mode)
        for number in range(min(rows, b.rows)):
            row = read_row(batches[b.name], number, shape, prompter, grid)
            found.append(Shown(b.name, number, _origin(store, choices[b.name][number]), row, {}))
    images = [(shown, part.start, part.codes) for shown in found for part in shown.row.parts if part.codes is not None]
    for first in range(0, len(images), _AT_ONCE):
        some = images[first : first + _AT_ONCE]
        codes = np.stack([codes for _, _, codes in some] + [some[-1][2]] * (_AT_ONCE - len(some)))  # one shape, one compilation
        for (shown, start, _), pixels in zip(some, np.asarray(_decode(vqgan, jnp.asarray(codes))), strict=False):
            shown.pictures[start] = postprocess(pixels)
    return found


def _origin(store: Store, choice: Choice) -> tuple[tuple[str, str], ...]:
    pairs = store.pairs

    def told(number: int, crop: int) -> str:
        name = lambda column: column.names[int(column.codes[number])]
        way = "reversed" if choice.reverse else "forwards"
        which = f", crop {crop}" if store.encoding.crops > 1 else ""
        return f"{name(pairs.dataset) or 'store'} · {name(pairs.task)} · group {name(pairs.group)} · pair {number}, {way}{which}"

    origin = [("query", told(choice.pair, choice.crop))]
    origin += [("example", told(j, crop)) for j, crop in zip(choice.partners, choice.partner_crops, strict=True)]
    if choice.generic:
        origin.append(("instruction", "generic: the task is left to the example"))
    if choice.dropped:
        origin.append(("dropped", "the example says nothing, for guidance"))
    return tuple(origin)


def facts(config: Config, shown: Sequence[Shown], *, step: int, split: str) -> list[tuple[str, str]]:
    """(name, value) of the whole."""
    filled = [float((s.row.roles != Role.PAD).mean()) for s in shown]
    learned = [int((s.row.weights > 0).sum()) for s in shown]
    return [
        ("store", config.data.store), ("split", split), ("step", str(step)), ("mode", config.data.mode), ("loss", config.data.loss),
        ("slots filled", f"{100 * sum(filled) / max(len(filled), 1):.0f} %"), ("with loss a row", f"{np.mean(learned or [0]):.0f}"),
    ]  # fmt: skip


# --- the page


def write_page(path: str | Path, shown: Sequence[Shown], facts: Sequence[tuple[str, str]]) -> Path:
    """Writes the page, whole or not at all; pictures are inside it.

    Returns:
      `path`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("xprompt_jax.inspection", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("page.html.jinja").render(
        facts=facts, shown=shown, sections=sections, data_uri=_data_uri, roles=[role.name for role in Role],
        colours={role.name: colour for role, colour in COLOURS.items()}, learned=LEARNED,
    )  # fmt: skip
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


def sections(row: ReadRow) -> list[list[Part]]:
    """Parts of a row by role and group, in order; padding is left out."""
    found: list[list[Part]] = []
    for part in row.parts:
        if part.role == Role.PAD:
            continue
        if found and (found[-1][0].role, found[-1][0].group) == (part.role, part.group):
            found[-1].append(part)
        else:
            found.append([part])
    return found


def _data_uri(picture: np.ndarray) -> str:
    data = io.BytesIO()
    PIL.Image.fromarray(picture).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


# --- the terminal

_PLAIN = {Role.SINK: "S", Role.IE: "E", Role.XP: "X", Role.TD: "T", Role.PAD: "."}


def to_text(shown: Sequence[Shown], facts: Sequence[tuple[str, str]], *, width: int = 100, colour: bool = True) -> str:
    """The same for a terminal.

    Args:
      width: of a line, in characters.
      colour: pictures and roles in 24-bit colour; without it, letters.
    """
    lines = ["  ".join(f"{name} {value}" for name, value in facts)]
    key = "  ".join(f"{_paint(_PLAIN[role], role, colour)} {role.name}" for role in Role)
    lines += [f"{key}  ^ carries loss", ""]
    for one in shown:
        lines.append(f"{one.bucket}, row {one.number}")
        lines += [f"  {what:12}{told}" for what, told in one.origin]
        lines += _strip(one.row, width, colour)
        for parts in sections(one.row):
            lines += _section(one, parts, width, colour)
        lines.append("")
    return "\n".join(lines)


def _strip(row: ReadRow, width: int, colour: bool) -> list[str]:
    """The row's slots on one line, and where the loss is below it; a column stands for the slots that fall into it."""
    columns = min(width, len(row.roles))
    firsts = np.arange(columns) * len(row.roles) // columns
    carries = np.maximum.reduceat(row.weights, firsts) > 0
    runs = itertools.groupby(Role(row.roles[i]) for i in firsts)
    roles = "".join(_paint(_PLAIN[role] * len(list(run)), role, colour) for role, run in runs)
    return [roles, "".join("^" if loss else " " for loss in carries).rstrip()]


def _section(shown: Shown, parts: Sequence[Part], width: int, colour: bool) -> list[str]:
    first, last = parts[0], parts[-1]
    group = f" {first.group}" if first.role in (Role.IE, Role.XP) else ""
    place = f"slots {first.start}-{last.stop - 1}, positions {first.positions[0]}-{last.positions[1]}"
    words = " ".join(filter(None, (f">{_words(p)}<" if p.loss else _words(p) for p in parts)))
    lines = [f"  {_paint(f'{first.role.name}{group}', first.role, colour)}  {place}  {words}".rstrip()]
    pictures = [shown.pictures[p.start] for p in parts if p.kind == "image"]
    return lines + (_half_blocks(pictures, width) if colour and pictures else [])


def _words(part: Part) -> str:
    if part.codes is not None:
        return f"[image {part.codes.shape[0]}x{part.codes.shape[1]}]"
    return {"text": f'"{part.text}"', "xp": f"{part.stop - part.start} tokens", "special": part.text}.get(part.kind, "")


def _paint(text: str, role: Role, colour: bool) -> str:
    return f"\x1b[1;38;2;{_rgb(COLOURS[role])}m{text}\x1b[0m" if colour else text


def _rgb(colour: str) -> str:
    return ";".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))


def _half_blocks(pictures: Sequence[np.ndarray], width: int, side: int = 32) -> list[str]:
    """Pictures side by side, two pixels a character."""
    side = min(side, (width - 4) // len(pictures) - 2) // 2 * 2
    if side < 4:
        return []
    small = [np.asarray(PIL.Image.fromarray(p).resize((side, side), PIL.Image.Resampling.BOX)) for p in pictures]
    lines = []
    for y in range(0, side, 2):
        pieces = []
        for picture in small:
            pairs = (";".join(map(str, picture[y, x])) + "m\x1b[48;2;" + ";".join(map(str, picture[y + 1, x])) for x in range(side))
            pieces.append("".join(f"\x1b[38;2;{pair}m▀" for pair in pairs) + "\x1b[0m")
        lines.append("    " + "  ".join(pieces))
    return lines
