"""`xprompt inspect`: what it shows is what the batch holds."""

import base64
import html
import io
import re

import jax
import numpy as np
import PIL.Image
import pytest

from tests.helpers import FP32, TINY, random_rows, tiny_tokenizer
from xprompt_jax.cli import main
from xprompt_jax.config import BucketConfig, Config, DataConfig, to_json
from xprompt_jax.convert.native import load_tokenizers
from xprompt_jax.data.images import postprocess
from xprompt_jax.data.pipeline import Rows
from xprompt_jax.data.store import Store
from xprompt_jax.errors import UserError
from xprompt_jax.inspection.rows import read_row
from xprompt_jax.inspection.show import collect, facts, to_text
from xprompt_jax.prompt import Prompter, Role, Sample, SlotShape, fill, stack
from xprompt_jax.tokens import Layout

PROMPTER = Prompter(tiny_tokenizer(), Layout("plain", tiny_tokenizer().vocab, 4))
BUCKETS = (
    BucketConfig("in_context", examples=2, context=96, todo=96, answer=19, rows=4),
    BucketConfig("describe", examples=1, context=64, todo=240, answer=150, rows=4, kind="describe"),
)


@pytest.mark.parametrize("shape", [SlotShape(2, 20, 3, 30), SlotShape(0, 0, 0, 40), SlotShape(1, 70, 5, 70)], ids=str)
def test_a_batch_says_what_was_filled_in(shape):
    """Whatever the ids are: roles, groups, positions and weights are those of the slots, and the parts cover every slot once."""
    rows = random_rows(0, shape, batch=8, vocab=PROMPTER.vocab.size)
    batch = stack(rows, shape.todo)
    for number, slots in enumerate(rows):
        read = read_row(batch, number, shape, PROMPTER, (4, 4))
        for name in ("ids", "roles", "groups", "positions", "weights"):
            np.testing.assert_array_equal(getattr(read, name), getattr(slots, name), err_msg=name)
        np.testing.assert_array_equal(read.segments, slots.roles != Role.PAD)
        assert [slot for part in read.parts for slot in range(part.start, part.stop)] == list(range(shape.length))
        for part in read.parts:
            assert {*slots.roles[part.start : part.stop]} == {part.role} and {*slots.groups[part.start : part.stop]} == {part.group}
            assert part.loss == (slots.weights[part.start : part.stop] > 0).sum()
    with pytest.raises(UserError, match="slots"):
        read_row(batch, 0, SlotShape(0, 0, 0, 9), PROMPTER, (4, 4))


def test_words_pictures_and_broken_pictures():
    codes = np.arange(16).reshape(4, 4)
    example = PROMPTER.example("remove the rain", codes, codes + 8)
    broken = PROMPTER.task("add rain", codes)
    broken[-3] = PROMPTER.vocab.sep  # a code and its frame are gone
    shape = SlotShape(1, 64, 2, 64)
    row = fill(Sample((example,), broken, PROMPTER.image_answer(codes)), shape, bos=0, pad=1)
    parts = [p for p in read_row(stack([row], 30), 0, shape, PROMPTER, (4, 4)).parts if p.role != Role.PAD]
    assert [(p.role.name, p.kind, p.text) for p in parts if p.kind != "image"][:4] == [
        ("SINK", "special", "bos"), ("IE", "text", "remove the rain"), ("IE", "special", "sep"), ("XP", "xp", ""),
    ]  # fmt: skip
    pictures = [p for p in parts if p.kind == "image"]
    assert [(p.role.name, p.loss) for p in pictures] == [("IE", 0), ("IE", 0), ("TD", 18)]
    np.testing.assert_array_equal(pictures[1].codes, codes + 8)
    (told,) = [p.text for p in parts if "code" in p.text]
    assert told.startswith("boi code 0 code 1 ") and told.endswith("sep eoi sep")


@pytest.fixture
def run(world_store, tmp_path):
    config = Config(model=TINY, compute=FP32, data=DataConfig(store=str(world_store), buckets=BUCKETS, generic_instruction=0.5))
    (tmp_path / "config.json").write_text(to_json(config))
    return config, tmp_path


def test_the_page_shows_the_rows_of_the_step(run, world_store):
    """Pictures against the VQGAN and the store, texts against the tokenizer, roles and loss against the trainer's batch."""
    config, folder = run
    main(["inspect", "--workdir", str(folder), "--step", "3", "--rows", "2", "--out", str(folder / "rows.html")])
    page = (folder / "rows.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    store, (vqgan, _) = Store.open(world_store), load_tokenizers(world_store / "tokenizers")
    decode = jax.jit(lambda model, codes: model.decode(codes))
    source = Rows(store, PROMPTER, config.data, TINY.num_xp_tokens)
    batches, choices = source(3), source.choices(3)
    shown = re.findall(r'<section class="row" data-bucket="(\w+)" data-row="(\d)">(.*?)</section>', page, re.S)
    assert [(bucket, int(row)) for bucket, row, _ in shown] == [(b.name, i) for b in BUCKETS for i in range(2)]
    for bucket, number, text in shown:
        row, batch, choice = int(number), batches[bucket], choices[bucket][int(number)]
        pairs = [(j, choice.reverse) for j in (*choice.partners, choice.pair)]
        want = [image for j, back in pairs for image in (store.pairs[j].input, store.pairs[j].output)[:: -1 if back else 1]]
        pictures = [np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data)))) for data in re.findall(r"png;base64,([^\"]+)", text)]
        assert len(pictures) == len(want)
        for picture, image in zip(pictures, want, strict=True):
            decoded = postprocess(np.asarray(decode(vqgan, store.codes[image][None].astype(np.int32)))[0])
            assert np.abs(picture.astype(int) - decoded).max() <= 1  # compiled for another number of images
        learned = {*batch["targets"][row][batch["weights"][row] > 0].tolist()}
        marked = set()
        for cells in re.findall(r"<tr><td>(.*?)</td></tr>", text):
            slots, role, _, _, positions, loss, what = html.unescape(cells).split("</td><td>")
            first, last = map(int, slots.split("-"))
            if int(loss):
                marked |= set(range(first, last + 1))
            if role != "PAD":
                assert positions == f"{batch['positions'][row][first]}-{batch['positions'][row][last]}"
            if what.startswith("text: "):
                assert what[6:] == PROMPTER.tokenizer.decode(batch["ids"][row][first : last + 1])
        assert marked == learned and learned
        group = store.pairs[choice.pair].group
        assert f"group {group} · pair {choice.pair}, {'reversed' if choice.reverse else 'forwards'}" in text
        strip = re.findall(r'<span class="(\w+)( learned)?" style="flex-grow: (\d+)"', text)
        assert sum(int(n) for *_, n in strip) == batch["ids"].shape[1]
        assert sum(int(n) for _, mark, n in strip if mark) == len(learned)
        assert sum(int(n) for role, _, n in strip if role == "IE") == batch["example_lengths"][row].sum()


def test_the_terminal_shows_the_same(run, capsys):
    config, folder = run
    main(["inspect", "--config", str(folder / "config.json"), "--rows", "1", "--bucket", "in_context", "--split", "eval"])
    out = capsys.readouterr().out
    (shown,) = collect(config, step=0, rows=1, bucket="in_context", split="eval")
    about = facts(config, [shown], step=0, split="eval")
    lines = to_text([shown], about, width=len(shown.row.ids), colour=False).split("\n")
    at = next(i for i, line in enumerate(lines) if line.startswith("SE"))
    assert lines[at] == "".join("SEXT."[role] for role in shown.row.roles)
    assert lines[at + 1].ljust(len(lines[at])) == "".join(" ^"[int(w > 0)] for w in shown.row.weights)
    assert ">[image 4x4]< >eos<" in lines[-2] and lines[-2] in out and "split eval" in out
    coloured = to_text([shown], about, width=120, colour=True)
    answer = list(shown.pictures.values())[-1]
    assert f"\x1b[38;2;{';'.join(map(str, answer[0, 0]))}m\x1b[48;2;" in coloured and coloured.count("▀") == 6 * 32 * 16


@pytest.mark.parametrize("flags, told", [
    (["--bucket", "x"], "--bucket x: the configuration has in_context, describe"),
    (["--rows", "0"], "--rows at least 1"),
    (["--data.store", "elsewhere"], "elsewhere: not a complete token store"),
    (["--config", "configs/debug_cpu.py"], "give one of --config FILE and --workdir DIR"),
])  # fmt: skip
def test_mistakes_are_told(run, capsys, flags, told):
    with pytest.raises(SystemExit):
        main(["inspect", "--workdir", str(run[1]), *flags])
    assert told in capsys.readouterr().err
