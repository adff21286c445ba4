"""PyTorch files: what torch wrote, read without it and without running anything; and the other way round."""

import hashlib
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from xprompt_jax.convert.torchfile import TorchFile
from xprompt_jax.convert.torchwriter import TorchWriter
from xprompt_jax.errors import UserError

TYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_]


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    made = {f"layer.{np.dtype(t).name}": (9 * rng.standard_normal((3, 5))).astype(t) for t in TYPES}
    return made | {
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "long": rng.standard_normal(70000).astype(np.float32),
    }


def assert_same(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("root", [None, "state_dict"])
def test_what_is_written_is_read(tmp_path, root):
    made = tensors()
    with TorchWriter(tmp_path / "a.pth", root=root) as out:
        for name, value in made.items():
            out.write(name, value)
    file = TorchFile(tmp_path / "a.pth")
    prefix = f"{root}." if root else ""
    assert list(file) == [prefix + name for name in made]
    for name, value in made.items():
        assert_same(file[prefix + name], value)
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert archive.testzip() is None


def test_a_writer_goes_on_from_its_mark(tmp_path):
    """What a killed writer did after its mark is cut off; the end is the same to the byte, and so is the checksum."""
    made = list(tensors().items())
    with TorchWriter(tmp_path / "whole.pth") as out:
        for name, value in made:
            out.write(name, value)
    for marked in range(1, len(made)):
        path = tmp_path / f"{marked}.pth"
        killed = TorchWriter(path)
        for i, (name, value) in enumerate(made):
            killed.write(name, value)
            if i + 1 == marked:
                killed.mark()
        if marked % 2:
            killed.seal()
        else:
            killed.close()
        again = TorchWriter(path)
        assert [name in again for name, _ in made] == [i < marked for i in range(len(made))]
        for name, value in made[marked:]:
            again.write(name, value)
        md5 = again.seal()
        assert path.read_bytes() == (tmp_path / "whole.pth").read_bytes()
        assert md5 == hashlib.md5(path.read_bytes()).hexdigest()


def test_a_file_shorter_than_its_mark_is_refused(tmp_path):
    """After a power cut, say: bytes that were noted need not have reached the disk."""
    writer = TorchWriter(tmp_path / "a.pth")
    writer.write("x", np.arange(100.0))
    writer.mark()
    writer.close()
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:500])
    with pytest.raises(UserError, match="shorter than its notes say"):
        TorchWriter(tmp_path / "a.pth")


def test_files_beyond_four_gib(tmp_path):
    """Sizes and offsets that need zip64: a sparse file, of which no byte is stored. Python's zipfile reads it as we do."""
    path = tmp_path / "a.pth"
    with TorchWriter(path) as out:
        out.write("first", np.arange(3.0))
        out._zip._file.seek(5 * 2**30)
        out._zip.size = 5 * 2**30  # as if a tensor of that size lay there
        out.write("empty", np.zeros(0, np.uint8))
        out.write("second", np.arange(4.0))
    assert path.stat().st_blocks * 512 < 2**20
    assert_same(TorchFile(path)["second"], np.arange(4.0))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    torch = pytest.importorskip("torch")
    assert torch.load(path, weights_only=True, mmap=True)["second"].tolist() == [0, 1, 2, 3]


def test_torch_reads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    made = tensors()
    with TorchWriter(tmp_path / "a.pth", root="state_dict") as out:
        for name, value in made.items():
            out.write(name, value)
    for mmap in (False, True):
        read = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mmap)["state_dict"]
        assert list(read) == list(made)
        for name, value in made.items():
            got = (
                read[name].view(torch.int16).numpy().view(ml_dtypes.bfloat16) if read[name].dtype == torch.bfloat16 else read[name].numpy()
            )
            assert_same(got, value)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_wrote_is_read(tmp_path, legacy):
    torch = pytest.importorskip("torch")
    base = torch.randn(6, 8)
    state = {
        "whole": base, "transposed": base.t(), "rows": base[2:4], "columns": base[:, 3:5], "parameter": torch.nn.Parameter(torch.randn(3)),
        "shared": base, "half": torch.randn(2, 2).bfloat16(), "scalar": torch.tensor(7), "expanded": torch.ones(1, 3).expand(4, 3),
    }  # fmt: skip
    module = torch.nn.Linear(2, 3)
    content = {"state_dict": state, "module": module.state_dict(), "epoch": 3, "names": ["a", "b"], "rate": 1e-3, "none": None}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    file = TorchFile(tmp_path / "a.pth")
    assert set(file) == {f"state_dict.{n}" for n in state} | {"module.weight", "module.bias"}
    for name, value in state.items():
        np.testing.assert_array_equal(file[f"state_dict.{name}"].astype(np.float32), value.detach().float().numpy())
    np.testing.assert_array_equal(file["module.weight"], module.weight.detach().numpy())


class Evil:
    """Unpickling this would run a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def hostile(path, payload):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_file_that_carries_code_is_refused_by_name_and_not_run(tmp_path, protocol):
    marker = tmp_path / "ran"
    payload = pickle.dumps({"weight": Evil(marker)}, protocol=protocol)
    hostile(tmp_path / "zip.pth", payload)
    (tmp_path / "legacy.pth").write_bytes(payload)
    for name in ("zip.pth", "legacy.pth"):
        with pytest.raises(UserError, match=rf"{name}: would run (posix|nt)\.system"):
            TorchFile(tmp_path / name)
    assert not marker.exists()
    pickle.loads(payload)  # the trap is real
    assert marker.exists()


@pytest.mark.parametrize("payload, message", [
    (b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x00a\x85R.", "would run builtins.eval"),
    (b"\x80\x02ctorch\nload\n.", "would run torch.load"),
    (b"\x80\x02(cos\nsystem\nX\x02\x00\x00\x00lso.", "would run os.system"),
    (b"\x80\x02}(X\x01\x00\x00\x00a", "not a readable PyTorch file"),
    (b"", "not a readable PyTorch file"),
])  # fmt: skip
def test_hostile_and_broken_programs(tmp_path, payload, message):
    hostile(tmp_path / "a.pth", payload)
    with pytest.raises(UserError, match=message):
        TorchFile(tmp_path / "a.pth")


def test_damaged_files_are_named(tmp_path):
    with TorchWriter(tmp_path / "a.pth") as out:
        out.write("w", np.arange(1000, dtype=np.float32))
    data = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("<html>404</html>")
    for name in ("half.pth", "empty.pth", "text.pth", "missing.pth"):
        with pytest.raises(UserError, match=name):
            TorchFile(tmp_path / name)


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    with TorchWriter(tmp_path / "a.pth") as out:
        out.write("w", np.arange(4, dtype=np.float32))
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        program = archive.read("archive/data.pkl")
    assert program.count(b"(\x8a\x01\x04t") == 1  # the shape (4,)
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        archive.writestr("archive/data.pkl", program.replace(b"(\x8a\x01\x04t", b"(\x8a\x01\x09t"))
        archive.writestr("archive/data/0", np.arange(4, dtype=np.float32).tobytes())
    with pytest.raises(UserError, match="w reaches beyond its storage"):
        TorchFile(tmp_path / "b.pth")["w"]


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Tensors are read one at a time: ten of 4 MiB never make 40."""
    import tracemalloc

    with TorchWriter(tmp_path / "a.pth") as out:
        for i in range(10):
            out.write(f"w{i}", np.full((1024, 1024), i, np.float32))
    tracemalloc.start()
    file = TorchFile(tmp_path / "a.pth")
    assert [float(file[name].max()) for name in file] == list(range(10))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 2**20
