"""A VQGAN in a file of its own: Meta's `vqgan.ckpt`, or a safetensors file with the same names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import yaml

from xprompt_jax.config import VQConfig
from xprompt_jax.convert.names import HF_VQGAN_PREFIX, load_conv, save_conv
from xprompt_jax.convert.torchfile import TorchFile
from xprompt_jax.convert.torchwriter import TorchWriter
from xprompt_jax.errors import UserError

PLACES = ("vqgan.ckpt", "tokenizer/vqgan.ckpt", "original_tokenizers/vqgan.ckpt", "../tokenizer/vqgan.ckpt", "../../tokenizer/vqgan.ckpt")
"""Where releases keep it, relative to the folder of the decoder."""


class VQGANFile:
    """The tensors of a VQGAN under our names; the architecture is read off their shapes.

    Args:
      path: a .ckpt (its names may stand under "state_dict") or a .safetensors file (with or without `model.vqmodel.`).

    Raises:
      UserError: the file cannot be read, or is no VQGAN with a decoder.
    """

    def __init__(self, path: Path):
        self.path = path
        tensors: Mapping[str, np.ndarray] = TorchFile(path) if path.suffix != ".safetensors" else _Safetensors(path)
        names = list(tensors)
        prefix = next((p for p in ("", "state_dict.", HF_VQGAN_PREFIX) if f"{p}quantize.embedding.weight" in names), None)
        if prefix is None:
            raise UserError(f"{path}: no quantize.embedding.weight; not a VQGAN")
        if f"{prefix}decoder.conv_in.weight" not in names:
            raise UserError(f"{path}: a VQGAN without its decoder cannot draw; use Meta's vqgan.ckpt or a fork's")
        self._tensors, self._prefix = tensors, prefix
        self.config = self._read_config({n.removeprefix(prefix) for n in names if n.startswith(prefix)})

    @classmethod
    def find(cls, folder: Path, given: Path | None) -> VQGANFile:
        """The file that was given, or the one beside a decoder.

        Raises:
          UserError: there is none.
        """
        if given is not None:
            if given.is_dir():
                return cls.find(given, None)
            if not given.is_file():
                raise UserError(f"--vqgan {given}: no such file")
            return cls(given)
        found = next((folder / place for place in PLACES if (folder / place).is_file()), None)
        if found is None:
            raise UserError(f"{folder}: no VQGAN decoder (Hugging Face's own conversion leaves it out), so images cannot be drawn; "
                            "name Meta's vqgan.ckpt with --vqgan FILE")  # fmt: skip
        return cls(found)

    def __getitem__(self, name: str) -> np.ndarray:
        """One tensor in our layout."""
        try:
            return load_conv(self._tensors[self._prefix + name])
        except KeyError:
            raise UserError(f"{self.path}: no tensor {name}; the file is damaged or no Chameleon VQGAN") from None

    def _read_config(self, names: set[str]) -> VQConfig:
        width = lambda name, axis: int(self._tensors[self._prefix + name].shape[axis])
        if any(re.match(r"encoder\.down\.\d+\.attn\.", name) for name in names):
            raise UserError(f"{self.path}: attention between the blocks of a VQGAN; Chameleon's has it in the middle alone")
        channels = width("encoder.conv_in.weight", 0)
        levels = 1 + max(int(m[1]) for n in names if (m := re.match(r"encoder\.down\.(\d+)\.", n)))
        blocks = 1 + max(int(m[1]) for n in names if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", n)))
        codes, embed = self._tensors[self._prefix + "quantize.embedding.weight"].shape
        widths = [width(f"encoder.down.{i}.block.0.conv1.weight", 0) for i in range(levels)]
        return VQConfig(
            channels=channels, channel_multipliers=tuple(w // channels for w in widths), num_res_blocks=blocks,
            latent_channels=width("encoder.conv_out.weight", 0), embed_dim=int(embed), num_codes=int(codes), image_size=self._resolution(),
        )  # fmt: skip

    def _resolution(self) -> int:
        """The image size in vqgan.yaml; it is in no tensor, since a VQGAN takes any size."""
        path = self.path.with_suffix(".yaml")
        if not path.exists():
            return 512
        try:
            content = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as e:
            raise UserError(f"{path}: cannot read ({e})") from None
        found = re.search(r"'resolution': (\d+)", str(content))
        return int(found[1]) if found else 512


class _Safetensors(Mapping[str, np.ndarray]):
    def __init__(self, path: Path):
        try:
            self._file = safetensors.safe_open(path, "numpy")
            self._names = tuple(self._file.keys())
        except (safetensors.SafetensorError, OSError) as e:
            raise UserError(f"{path}: not a readable safetensors file ({e}); fetch it again") from None

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_vqgan(folder: Path, config: VQConfig, tensors: Mapping[str, np.ndarray] | list[tuple[str, np.ndarray]]) -> None:
    """Writes vqgan.ckpt and vqgan.yaml as Meta lays them out; tensors are ours, by name."""
    with TorchWriter(folder / "vqgan.ckpt", root="state_dict") as out:
        for name, value in dict(tensors).items():
            out.write(name, save_conv(value))
    ddconfig = {
        "double_z": False, "z_channels": config.latent_channels, "resolution": config.image_size, "in_channels": 3, "out_ch": 3,
        "ch": config.channels, "ch_mult": list(config.channel_multipliers), "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    params = {"embed_dim": config.embed_dim, "n_embed": config.num_codes, "ddconfig": ddconfig}
    (folder / "vqgan.yaml").write_text(yaml.safe_dump({"model": {"params": params}}, sort_keys=False))
