"""Tiny made-up copies of every dataset in every layout that its adapter reads: same folders, names and file formats, random pictures.

`MADE[name, layout](root)` writes a copy and returns the number of pairs of each split.
"""

import json

import numpy as np

from tests.data.made_dense import ade20k, normals_geonet, normals_nyud_mt, nyu_bts, nyu_h5, nyu_mat, nyu_tars, nyu_tfds, scannet
from tests.data.making import N, coded, folders, hash_of, jsonl, picture, pixels, struct, table, tar, write, zip_crypto


def dfwb_photographs(root, below="Downloads"):
    for i, folder in enumerate(("DIV2K/DIV2K_train_HR", "Flickr2K", "WaterlooED", "BSD400")):
        write(root / below / folder / f"000{i}.png", i)
    large = np.kron(np.arange(32).reshape(4, 8, 1), np.ones((210, 210, 3))).astype(np.uint8)  # 840 high, 1680 wide
    picture(root / below / "DIV2K" / "DIV2K_train_HR" / "0900.png", large)
    return {"train": 4 + 2 * 4}  # tops 0, 328; lefts 0, 416, 832, 1168


def dfwb_crops(root):
    for i, name in enumerate(("DIV2K-0001-1", "DIV2K-0001-2", "Flickr2K-000001-12", "WaterlooED-00001")):
        write(root / "train" / "DFWB" / f"{name}.png", i)
    for name in ("CBSD68", "Kodak", "McMaster", "Urban100"):
        write(root / "test" / name / "a.png", 9)
    return {"train": N, "CBSD68": 1, "Kodak": 1, "McMaster": 1, "Urban100": 1}


def gopro_official(root):
    for split in ("train", "test"):
        for i in range(N):
            for kind in ("blur", "blur_gamma", "sharp"):
                write(root / split / f"GOPR00{i % 2}_11_00" / kind / f"{i:06d}.png", hash_of(split, i, kind))
    return {"train": N, "test": N}


def fivek_480p(root):
    make = folders(("all", "input/JPG/480p", "expertC/JPG/480p"), names=lambda i: (f"a000{i}", f"a000{i}"), suffix=".jpg", n=6)
    make(root)
    write(root / "train_input.txt", "a0000\na0001\n")
    write(root / "train_label.txt", "a0002.jpg\na0003.jpg\n")
    write(root / "test.txt", "a0004\na0005\n")
    return {"train": 4, "test": 2}


def fivek_raw(root):
    import pytest

    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("rawpy")
    for i in range(2):
        path = root / "raw_photos" / "HQa1to700" / "photos" / f"a000{i}-kme.dng"
        path.parent.mkdir(parents=True, exist_ok=True)
        mosaic = np.random.default_rng(i).integers(0, 4000, (64, 96)).astype(np.uint16)
        tifffile.imwrite(path, mosaic, photometric="cfa", extratags=[  # the least that makes a DNG
            (33421, "H", 2, (2, 2), True), (33422, "B", 4, (0, 1, 1, 2), True), (50706, "B", 4, (1, 4, 0, 0), True),
            (50708, "s", 0, "made up", True), (50721, "2i", 9, (1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1), True),
            (50714, "H", 1, 0, True), (50717, "H", 1, 4095, True),
        ])  # fmt: skip
        after = root / "img" / "tiff16_c" / f"a000{i}-kme.tif"
        after.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(after, pixels(i).astype(np.uint16) * 257, photometric="rgb")
    return {"train": 2}


def ultraedit(pattern):
    def make(root):
        rows = [
            {"clip_sim_source": 0.3, "source_caption": f"a field {i}.", "target_caption": f"a field {i} with a barn", "idx": i,
             "edit_prompt": ("add a barn", "remove the dog", "make it winter", "turn the sky red")[i],
             "source_image": struct(10 * i), "edited_image": struct(10 * i + 1)} for i in range(N)
        ]  # fmt: skip
        table(root, pattern, rows)
        return {"train": N}

    return make


def magicbrush(packed):
    def make(root):
        for split in ("train", "dev"):
            rows = [
                {
                    "img_id": str(100 + i // 2),
                    "turn_index": i % 2 + 1,
                    "source_img": struct(hash_of(split, i)),
                    "mask_img": struct(i),
                    "instruction": f"do {i}",
                    "target_img": struct(hash_of(split, i, 1)),
                }
                for i in range(N)
            ]
            table(root, "data/" + split + "-{:05d}-of-{:05d}.parquet", rows)
        files, turns, captions = {}, [], {}
        for image in ("7", "8"):
            before = f"{image}-input.png"
            files[f"images/{image}/{before}"] = coded(int(image))
            captions[image] = {before: f"scene {image}"}
            for k in (1, 2):
                after = f"{image}-output{k}.png"
                files |= {f"images/{image}/{after}": coded(int(image) + 10 * k), f"images/{image}/{image}-mask{k}.png": coded(3)}
                turns.append({"input": before, "mask": f"{image}-mask{k}.png", "output": after, "instruction": f"edit {image} {k}"})
                captions[image][after] = f"scene {image} after {k}"
                before = after
        files |= {"edit_turns.json": json.dumps(turns).encode(), "global_descriptions.json": json.dumps(captions).encode()}
        if packed:
            zip_crypto(root / "MagicBrush_test.zip", {f"test/{name}": data for name, data in files.items()}, b"MagicBrush")
        else:
            for name, data in files.items():
                write(root / "test" / name, data)
        return {"train": N, "dev": N, "test": 4}

    return make


def ip2p_folders(root):
    seeds = []
    for i in range(20):
        folder = f"{i:07d}"
        seeds.append([folder, [str(50 + i), str(90 + i)]])
        write(root / folder / "prompt.json", json.dumps({"input": f"a cat {i}", "edit": f"add a hat {i}", "output": f"a cat {i} in a hat"}))
        write(root / folder / "metadata.jsonl", "{}\n")
        for seed in seeds[-1][1]:
            for side in (0, 1):
                write(root / folder / f"{seed}_{side}.jpg", hash_of(i, seed, side))
    write(root / "seeds.json", json.dumps(seeds))
    return {"train": 36, "val": 2, "test": 2}


def ip2p_parquet(root):
    rows = [{"original_prompt": f"a cat {i}", "original_image": struct(i), "edit_prompt": f"add a hat {i}",
             "edited_prompt": f"a cat {i} in a hat", "edited_image": struct(50 + i)} for i in range(N)]  # fmt: skip
    table(root, "data/train-{:05d}-of-{:05d}.parquet", rows)
    return {"train": N}


def multigen(root):
    total = 0
    for control, file in (("depth", "depth"), ("seg", "segbase"), ("hed", "hed"), ("normal", "normal")):
        rows = []
        for i in range(2):
            write(root / "images" / "aesthetics_6_plus_0" / f"{i}.jpg", i)
            write(root / "conditions" / f"group_0_{control}" / f"{i}.png", hash_of(control, i))
            rows.append(
                {"source": f"aesthetics_6_plus_0/{i}.jpg", "prompt": f"a tree {i}.", f"control_{control}": f"group_0_{control}/{i}.png"}
            )
        jsonl(root / "json_files" / f"aesthetics_plus_all_group_{file}_all.json", rows)
        total += 2
    return {"train": total}


def multigen_own(root):
    rows = []
    for i in range(N):
        write(root / f"{i}.png", i)
        write(root / f"{i}-lines.png", i + 50)
        rows.append({"image": f"{i}.png", "control": f"{i}-lines.png", "prompt": f"a house {i}", "task": "mlsd"})
    jsonl(root / "lines.jsonl", rows)
    return {"train": N}


def laion(below):
    def make(root):
        for shard in range(2):
            files = {}
            for i in range(4):
                key = f"{shard:05d}{i:04d}"
                field = ("AESTHETIC_SCORE", "aesthetic")[shard]
                files[f"{key}.txt"] = f"original {key}".encode()
                files[f"{key}.json"] = json.dumps({"key": key, field: 5.0 + i}).encode()
                if i != 2:  # a dead link
                    files[f"{key}.jpg"] = coded(10 * shard + i, "JPEG")
            tar(root / below / f"{shard:05d}.tar", files)
            write(root / below / f"{shard:05d}_stats.json", "{}")
        return {"train": 4}  # of scores 5, 6, (7), 8 in each tar: two of at least 6

    return make


def style_pairs(root):
    rows = []
    for i in range(N):
        for name in ("style", "source", "output"):
            write(root / name / f"{i}.png", hash_of(name, i))
        rows.append(
            {"style_image": f"style/{i}.png", "source": f"source/{i}.png", "output": f"output/{i}.png", "prompt": f"melting gold {i}"}
        )
    jsonl(root / "pairs.jsonl", [*rows, rows[0] | {"style_same": "yes", "layout_same": "no"}])
    return {"train": N}


def ip_adapter(root):
    rows = []
    for i in range(N):
        for name in ("a", "b", "c"):
            write(root / f"{name}{i}.png", hash_of(name, i))
        rows.append(
            {"image1": f"a{i}.png", "image2": f"b{i}.png", "output": f"c{i}.png", "description": "the cat of one, the light of two"}
        )
    jsonl(root / "compositions.jsonl", rows)
    return {"train": N}


def viton(helper):
    def make(root):
        for split in ("train", "test"):
            for i in range(N):
                for name in ("image", "cloth"):
                    write(root / split / name / f"0000{i}_00.jpg", hash_of(split, name, i))
                if helper == "agnostic":
                    write(root / split / "agnostic-v3.2" / f"0000{i}_00.jpg", i)
                else:
                    picture(root / split / "image-parse-v3" / f"0000{i}_00.png", np.full((20, 28), (0, 5, 6, 9)[i], np.uint8))
            write(root / f"{split}_pairs.txt", "".join(f"0000{i}_00.jpg 0000{(i + 1) % N}_00.jpg\n" for i in range(N)))
        return {"train": N, "test": N}

    return make


def pose_action(root):
    rows = []
    for i in range(N):
        write(root / f"{i}a.png", i)
        write(root / f"{i}b.png", i + 50)
        rows.append(
            {"input": f"{i}a.png", "output": f"{i}b.png", "instruction": "let her sit down", "reverse_instruction": "let her stand up"}
        )
    jsonl(root / "pose.jsonl", rows)
    return {"train": N}


def mimicbrush(root):
    rows = []
    for i in range(N):
        for name in ("source", "reference", "output"):
            write(root / f"{name}{i}.png", hash_of(name, i))
        picture(root / f"mask{i}.png", np.pad(np.full((10, 10), 255, np.uint8), ((5, 5), (9, 9))))
        rows.append({name: f"{name}{i}.png" for name in ("source", "reference", "output", "mask")})
    jsonl(root / "imitations.jsonl", [*rows[1:], {k: v for k, v in rows[0].items() if k != "mask"}])
    return {"train": N}


def tfds_pairs(below):
    def make(root):
        from xprompt_jax.data.datasets.base import Rows
        from xprompt_jax.data.datasets.tfds import prepare

        made = Rows([{"key": str(i), "input": coded(i), "output": coded(50 + i)} for i in range(N)], simple)
        copy = prepare({"train": made}, root.parent / "prepared")
        (root / below).parent.mkdir(parents=True, exist_ok=True)
        copy.rename(root / below)
        return {"train": N}

    return make


def simple(row):
    from xprompt_jax.data.datasets.base import pair_of

    return pair_of(row, task="derain", group="made")


_RAIN = tuple((name, f"test/{name}/input", f"test/{name}/target") for name in ("Rain100L", "Rain100H", "Test100", "Test1200", "Test2800"))
_LOL = lambda folder: folders(
    ("train", f"{folder}/Train/Low", f"{folder}/Train/Normal"), ("test", f"{folder}/Test/Low", f"{folder}/Test/Normal"),
    names=lambda i: (f"low0000{i}", f"normal0000{i}"),
)  # fmt: skip

MADE = {
    ("dfwb", "photographs"): dfwb_photographs,
    ("dfwb", "photographs without Downloads/"): lambda root: dfwb_photographs(root, "."),
    ("dfwb", "crops"): dfwb_crops,
    ("gopro", "crops of 512 pixels"): folders(
        ("train", "train/input_crops", "train/target_crops"), ("test", "test/input", "test/target"), names=lambda i: (f"GOPR-{i}-1",) * 2
    ),
    ("gopro", "MPRNet's"): folders(("train", "train/input", "train/target"), ("test", "test/input", "test/target")),
    ("gopro", "official"): gopro_official,
    ("rain13k", "MPRNet's"): folders(("train", "train/Rain13K/input", "train/Rain13K/target"), *_RAIN),
    ("rain13k", "Painter's"): folders(("train", "train/input", "train/target"), *_RAIN, suffix=".jpg"),
    ("rain13k", "a test set alone"): folders(("Rain100L", "Rain100L", "Rain100L"), names=lambda i: (f"rain-00{i}", f"norain-00{i}")),
    ("lol_v1", "official"): folders(("train", "our485/low", "our485/high"), ("test", "eval15/low", "eval15/high")),
    ("lol_v1", "Retinexformer's"): folders(("train", "Train/input", "Train/target"), ("test", "Test/input", "Test/target")),
    ("lol_v2_real", "official, or Retinexformer's names"): _LOL("Real_captured"),
    ("lol_v2_synthetic", "official, or Retinexformer's names"): folders(
        ("train", "Synthetic/Train/Low", "Synthetic/Train/Normal"), ("test", "Synthetic/Test/Low", "Synthetic/Test/Normal")
    ),
    ("fivek", "official, raw"): fivek_raw,
    ("fivek", "Zeng's 480p"): fivek_480p,
    ("fivek", "Retinexformer's"): folders(("train", "train/input", "train/target"), ("test", "test/input", "test/target"), suffix=".jpg"),
    ("laion_aesthetics", "tars"): laion("."),
    ("laion_aesthetics", "folders of tars"): laion("part0"),
    ("multigen", "json_files/"): multigen,
    ("multigen", "JSONL"): multigen_own,
    ("ultraedit", "UltraEdit_500k"): ultraedit("data/FreeForm-{:05d}-of-{:05d}.parquet"),
    ("ultraedit", "the whole set"): ultraedit("data/FreeForm_{}-00000-of-0000{}.parquet"),
    ("ultraedit", "UltraEdit_Region_Based_100k"): ultraedit("data/RegionBase-{:05d}-of-{:05d}.parquet"),
    ("magicbrush", "parquet, test unpacked"): magicbrush(packed=False),
    ("magicbrush", "parquet, test as archive"): magicbrush(packed=True),
    ("instructpix2pix", "folders with seeds.json"): ip2p_folders,
    ("instructpix2pix", "parquet"): ip2p_parquet,
    ("nyuv2_depth", "labelled .mat and splits.mat"): nyu_mat,
    ("nyuv2_depth", "BTS, Painter"): nyu_bts,
    ("nyuv2_depth", "FastDepth's .h5"): nyu_h5,
    ("nyuv2_depth", "tars of FastDepth's .h5"): nyu_tars,
    ("nyuv2_depth", "TensorFlow Datasets"): nyu_tfds("nyu_depth_v2/0.0.1"),
    ("nyuv2_depth", "TensorFlow Datasets, version folder"): nyu_tfds("."),
    ("nyuv2_normals", "GeoNet, as Bae et al. have it"): normals_geonet,
    ("nyuv2_normals", "NYUD_MT"): normals_nyud_mt,
    ("scannet_normals", "FrameNet's"): scannet("pickle"),
    ("scannet_normals", "with lists"): scannet("lists"),
    ("scannet_normals", "frames alone"): scannet(""),
    ("ade20k", "ADEChallengeData2016"): ade20k,
    ("style_pairs", "JSONL"): style_pairs,
    ("ip_adapter", "JSONL"): ip_adapter,
    ("viton_hd", "zip"): viton("agnostic"),
    ("pose_action", "JSONL"): pose_action,
    ("mimicbrush", "JSONL"): mimicbrush,
    ("tfds_pairs", "version folder"): tfds_pairs("."),
    ("tfds_pairs", "dataset folder"): tfds_pairs("1.0.0"),
}
