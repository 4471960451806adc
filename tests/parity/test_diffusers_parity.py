"""What is exported loads in the library diffusers and computes the same there, and comes back bit for bit.

B batch, C channels of the latent, h w its height and width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ldm
from ldm.bridge.diffusers import CONFIG, WEIGHTS
from ldm.bridge.transfer import export_to_folder, import_to_folder
from ldm.first_stage_config import FirstStageModel
from ldm.layout import first_stage_layout
from ldm.model import Autoencoder
from ldm.model_folder import Origin, StoredModel, autoencoder_of, read_model_folder

pytestmark = pytest.mark.parity

SIZES = {"channels": 16, "channel_mult": [1, 2, 4], "num_res_blocks": 1, "norm_groups": 8}
MODELS = {
    "vq": {"kind": "vq", "num_codes": 24, "z_channels": 5, "embed_dim": 3, "attention_factors": [2]},
    "vq-noattn": {"kind": "vq", "num_codes": 24, "mid_attention": False, "num_res_blocks": 2},
    "kl": {"kind": "kl", "z_channels": 4, "embed_dim": 4, "attention_factors": [1, 4]},
    "kl-f1": {"kind": "kl", "channel_mult": [1]},
}


@pytest.fixture
def diffusers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, told that there is no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import diffusers

    return diffusers


def some_model(name: str) -> StoredModel:
    """A first stage in which every number is random, biases and norms too."""
    config = FirstStageModel.model_validate(SIZES | MODELS[name])
    generator = torch.Generator().manual_seed(1)
    weights = {
        key: torch.randn(shape, generator=generator) * (0.5 if len(shape) < 2 else shape[1:].numel() ** -0.5)
        for key, shape in ((key, torch.Size(shape)) for key, shape in first_stage_layout(config).items())
    }
    origin = Origin(format="artifact", file="0" * 64, sha256="0" * 64)
    return StoredModel(config, weights, origin)


def latent_and_reconstruction(theirs: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a model of the library makes of pictures."""
    with torch.no_grad():
        encoded = theirs.encode(x)
        z = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return z, theirs.decode(z).sample


def assert_equal_tensors(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """The same keys with the same bits."""
    assert got.keys() == want.keys()
    assert [key for key in want if not torch.equal(got[key], want[key])] == []


@pytest.mark.parametrize("name", list(MODELS))
def test_an_exported_model_computes_the_same_in_diffusers_and_comes_back(
    name: str, diffusers: Any, tmp_path: Path
) -> None:
    model = some_model(name)
    export_to_folder(model, tmp_path / "out", format="diffusers")
    library = diffusers.VQModel if model.config.kind == "vq" else diffusers.AutoencoderKL
    theirs, info = library.from_pretrained(tmp_path / "out", local_files_only=True, output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.config.scaling_factor == 1.0
    x = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    z, reconstruction = latent_and_reconstruction(theirs.eval(), x)
    ours = autoencoder_of(model)
    torch.testing.assert_close(z, ours.encode(x), atol=1e-4, rtol=0)
    torch.testing.assert_close(reconstruction, ours.decode(ours.encode(x)), atol=1e-4, rtol=0)

    import_to_folder(tmp_path / "out", None, output=tmp_path / "back")
    back = read_model_folder(tmp_path / "back")
    assert back.config == model.config
    assert_equal_tensors(back.weights, model.weights)
    assert torch.equal(ldm.load(tmp_path / "back").encode(x), ours.encode(x))


def test_a_folder_that_diffusers_wrote_is_read_and_its_scaling_factor_kept(
    diffusers: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        scaling_factor=0.25,
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    import_to_folder(tmp_path / "theirs", None, output=tmp_path / "ours")
    ours = ldm.load(tmp_path / "ours")
    assert isinstance(ours, Autoencoder)
    assert (ours.config.attention_factors, ours.config.channels, ours.config.factor) == ((2,), 8, 2)
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    z, reconstruction = latent_and_reconstruction(theirs, x)
    torch.testing.assert_close(ours.encode(x), z, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.decode(z), reconstruction, atol=1e-5, rtol=0)

    export_to_folder(read_model_folder(tmp_path / "ours"), tmp_path / "back", format="diffusers")
    back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "back", local_files_only=True)
    assert_equal_tensors(back.state_dict(), theirs.state_dict())
    told = {key: value for key, value in theirs.config.items() if key[0] != "_" and key != "sample_size"}
    assert {key: list(v) if isinstance(v := back.config[key], tuple) else v for key in told} == {
        key: list(v) if isinstance(v, tuple) else v for key, v in told.items()
    }


def test_attention_under_the_names_of_old_files_is_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = some_model("kl")
    export_to_folder(model, tmp_path / "new", format="diffusers")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / CONFIG).write_bytes((tmp_path / "new" / CONFIG).read_bytes())
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(tmp_path / "new" / WEIGHTS)
    for today, before in old.items():
        tensors = {key.replace(f".{today}.", f".{before}."): tensor for key, tensor in tensors.items()}
    assert any(".proj_attn." in key for key in tensors)
    save_file(tensors, tmp_path / "old" / WEIGHTS)
    import_to_folder(tmp_path / "old", None, output=tmp_path / "back")
    assert_equal_tensors(read_model_folder(tmp_path / "back").weights, model.weights)
