"""docs/data.md, followed to the letter: from copies as they lie on disk to the paper's mixture."""

import json
import re
import shutil
from pathlib import Path

from tests.data.made import MADE
from tests.data.making import jsonl
from xprompt_jax.cli import main
from xprompt_jax.convert import weights
from xprompt_jax.data import tokenise
from xprompt_jax.data.mixture import PAPER
from xprompt_jax.data.store import Store

ROOT = Path(__file__).parents[2]
DISK = {
    "Datasets": [("dfwb", "photographs"), ("rain13k", "MPRNet's")], "GoPro": [("gopro", "official")],
    "LOLdataset": [("lol_v1", "official")],
    "LOL-v2": [(f"lol_v2_{kind}", "official, or Retinexformer's names") for kind in ("real", "synthetic")],
    "fivek_dataset": [("fivek", "Zeng's 480p")], "nyudepthv2": [("nyuv2_depth", "BTS, Painter")],
    "framenet": [("scannet_normals", "FrameNet's")], "ADEChallengeData2016": [("ade20k", "ADEChallengeData2016")],
    "MultiGen-20M": [("multigen", "json_files/")], "mlsd": [("multigen", "JSONL")], "zalando-hd-resized": [("viton_hd", "zip")],
    "pose": [("pose_action", "JSONL")], "mimicbrush": [("mimicbrush", "JSONL")], "UltraEdit_500k": [("ultraedit", "UltraEdit_500k")],
    "MagicBrush": [("magicbrush", "parquet, test as archive")], "laion": [("laion_aesthetics", "tars")],
    "style": [("style_pairs", "JSONL")], "compositions": [("ip_adapter", "JSONL")],
}  # fmt: skip
"""Folders below ~ that the page names, and the made-up copies in them."""


def commands():
    """Every command of the section, as its words."""
    section = re.search(r"## From downloads to the whole mixture\n(.*?)\n## ", (ROOT / "docs/data.md").read_text(), re.S)[1]
    return [line.split()[1:] for block in re.findall(r"```\n(.*?)```", section, re.S) for line in block.splitlines()]


def one_model(monkeypatch, kept):
    """All commands name one model: it is read once, and its tokenizers are written once and copied."""
    read, write = weights.load_vqgan, tokenise.save_tokenizers
    known = []

    def load(source):
        known[:] = known or [read(source)]
        return known[0]

    def save(folder, vqgan, tokenizer):
        if not kept.exists():
            write(kept, vqgan, tokenizer)
        shutil.copytree(kept, folder)

    monkeypatch.setattr(weights, "load_vqgan", load)
    monkeypatch.setattr(tokenise, "save_tokenizers", save)


def test_the_page_builds_every_row_of_the_papers_tables(tiny_model, server, tmp_path, monkeypatch, capsys):
    for folder, copies in DISK.items():
        (tmp_path / "home" / folder).mkdir(parents=True)
        for copy in copies:
            MADE[copy](tmp_path / "home" / folder)
    compositions = tmp_path / "home/compositions/compositions.jsonl"  # without the words that are to be asked for
    jsonl(compositions, [{k: v for k, v in json.loads(row).items() if k != "description"} for row in compositions.read_text().splitlines()])
    monkeypatch.chdir(tmp_path)
    one_model(monkeypatch, tmp_path / "tokenizers")
    said = {"MODEL": str(tiny_model), "URL": server.url, "NAME": "m", "configs/paper_mixture.py": str(ROOT / "configs/paper_mixture.py")}
    roots = set()
    for words in commands():
        words = [said.get(word, word) for word in words]
        roots |= {word[2:] for word in words if word.startswith("~/")}
        words = [word.replace("~", str(tmp_path / "home"), 1) if word.startswith("~/") else word for word in words]
        main(words + ["--allow-partial"] * ("--dataset" in words))  # the copies are small
    assert roots == {*DISK}

    store = Store.open("data/all")
    table = capsys.readouterr().out.rpartition("samples        here")[2]
    kinds = [(p.split, p.dataset, p.task) for p in store.pairs]
    for row in PAPER:
        here = sum(split == "train" and bool({dataset, task} & row.ours.keys()) for split, dataset, task in kinds)
        assert here > 0, row.name
        assert re.search(rf"^{re.escape(row.name)} .* {here:,}  {', '.join(row.ours)}$", table, re.M), row.name

    pairs = list(store.pairs)
    edits = [p for p in pairs if p.task == "edit"]
    assert {p.dataset for p in edits} == {"ultraedit", "magicbrush"} and {p.holdout for p in edits} == {"yes"}
    taught = [p for p in edits if p.split == "train"]  # MagicBrush's test turns come with captions
    assert {p.group for p in taught} == {"ultraedit/Object Modification", "magicbrush/Object Modification"}
    assert all(p.reverse_instruction.startswith("paint the square") for p in edits)
    assert all("square" in p.description for p in edits if p.dataset == "ultraedit")  # in place of its captions
    captions = [p.caption for p in pairs if p.task == "text_to_image"]
    assert [p.description for p in pairs if p.task == "text_to_image"] == captions and any("square" in c for c in captions)
    assert all("lives on" in p.instruction and len(p.more_inputs) == 1 for p in pairs if p.task == "compose")
    assert {p.task.partition("/")[2] for p in pairs if p.dataset == "nyuv2_depth"} <= {"turbo", "grey", "magma", "viridis"}
