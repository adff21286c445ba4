"""Made-up copies of the datasets of depth, normals and classes."""

import io
import pickle

import numpy as np

from tests.data.making import N, coded, h5, hash_of, metres, normal_map, picture, pixels, tar, write


def nyu_mat(root):
    import pytest
    import scipy.io

    h5py = pytest.importorskip("h5py")
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = np.stack([pixels(i).transpose(2, 1, 0) for i in range(5)])
        file["depths"] = np.stack([metres(i).T for i in range(5)])
        file["rawDepths"] = np.stack([np.where(metres(i) < 2, 0, metres(i)).T for i in range(5)])
    scipy.io.savemat(root / "splits.mat", {"trainNdxs": np.array([[1], [3], [5]]), "testNdxs": np.array([[2], [4]])})
    return {"train": 3, "test": 2}


def nyu_bts(root):
    for split, folder in (("train", "sync"), ("train795", "official_splits/train"), ("test", "official_splits/test")):
        for i in range(N):
            scene = root / folder / f"kitchen_000{i % 2}"
            write(scene / f"rgb_{i:05d}.jpg", hash_of(split, i))
            picture(scene / f"sync_depth_{i:05d}.png", (metres(i) * 1000).astype(np.uint16))
    return {"train": N, "train795": N, "test": N}


def nyu_h5(root):
    for split in ("train", "val"):
        for i in range(N):
            write(root / split / f"basement_{i % 2}" / f"{i:05d}.h5", h5(i))
    return {"train": N, "val": N}


def nyu_tars(root):
    for split in ("train", "val"):
        for shard in range(2):
            tar(root / "data" / f"{split}-00000{shard}.tar", {f"basement_{shard}/{i:05d}.h5": h5(10 * shard + i) for i in range(2)})
    return {"train": N, "val": N}


def nyu_tfds(below):
    def make(root):
        import tensorflow_datasets as tfds

        class NyuDepthV2(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version("0.0.1")
            code_path = None

            def _info(self):
                features = {
                    "image": tfds.features.Image(shape=(20, 28, 3)),
                    "depth": tfds.features.Tensor(shape=(20, 28), dtype=np.float16),
                }
                return tfds.core.DatasetInfo(builder=self, description="made up", features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples(0), "validation": self._generate_examples(50)}

            def _generate_examples(self, first):
                for i in range(first, first + N):
                    yield i, {"image": io.BytesIO(coded(i)), "depth": metres(i).astype(np.float16)}

        NyuDepthV2(data_dir=str(root.parent / "prepared"), file_format="array_record").download_and_prepare()
        place = root / below
        place.parent.mkdir(parents=True, exist_ok=True)
        (root.parent / "prepared" / "nyu_depth_v2" / "0.0.1").rename(place)
        return {"train": N, "validation": N}

    return make


def normals_geonet(root):
    for split in ("train", "test"):
        for i in range(N):
            write(root / split / "img" / f"{i:06d}.png", hash_of(split, i))
            picture(root / split / "norm" / f"{i:06d}.png", normal_map(i))
    return {"train": N, "test": N}


def normals_nyud_mt(root):
    for i in range(6):
        write(root / "images" / f"{i}.png", i)
        picture(root / "normals" / f"{i}.png", normal_map(i))
        picture(root / "segmentation" / f"{i}.png", np.zeros((20, 28), np.uint8))
    write(root / "gt_sets" / "train.txt", "0\n1\n2\n3\n")
    write(root / "gt_sets" / "val.txt", "4\n5\n")
    return {"train": 4, "val": 2}


def scannet(listed):
    """With the split as FrameNet's pickle, as lists, or not at all."""

    def make(root):
        for scene in ("scene0000_00", "scene0001_01"):
            for i in range(0, 30, 10):
                frame = root / "scannet-frames" / scene / f"frame-{i:06d}"
                write(frame.with_name(f"{frame.name}-color.png"), hash_of(scene, i))
                picture(frame.with_name(f"{frame.name}-normal.png"), normal_map(i))
                for other in ("orient", "orient-X", "orient-Y", "orient-mask"):
                    write(frame.with_name(f"{frame.name}-{other}.png"), 0)
        split = {"train": [f"scene0000_00/frame-{i:06d}" for i in (0, 10, 20)], "test": ["scene0001_01/frame-000000",
                 "scene0001_01/frame-000020"]}  # fmt: skip
        if listed == "pickle":
            kinds = ("color", "orient", "orient-mask")
            paths = {k: [[f"/orion/u/someone/scannet-frames/{f}-{kind}.png" for f in v] for kind in kinds] for k, v in split.items()}
            write(root / "train_test_split.pkl", pickle.dumps(paths))
        elif listed:
            write(root / "train.txt", "scene0000_00\n")
            write(root / "test.txt", "".join(f"{name.replace('frame-', '')}\n" for name in split["test"]))
        return {"train": 3, "test": 2} if listed else {"train": 6}

    return make


def ade20k(root):
    for split, folder, n in (("train", "training", 3), ("val", "validation", 2)):
        for i in range(n):
            write(root / "images" / folder / f"ADE_{split}_{i:08d}.jpg", i)
            labels = np.random.default_rng(i).integers(0, 151, (20, 28), dtype=np.uint8)
            picture(root / "annotations" / folder / f"ADE_{split}_{i:08d}.png", labels)
    write(root / "objectInfo150.txt", "Idx\tName\n")
    return {"train": 3, "val": 2}
