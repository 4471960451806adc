"""First stages of the published code: its stored outputs, the key layouts of what was released, round trips.

B batch, C channels of the latent, h w its height and width.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import ldm
from datasets.keys import sha256_file
from ldm.bridge.compvis import first_stage_config, published_config, published_loss
from ldm.bridge.foreign import read_checkpoint
from ldm.bridge.section import Section
from ldm.bridge.transfer import export_to_folder, import_to_folder
from ldm.first_stage_config import FirstStageModel
from ldm.layout import first_stage_layout
from ldm.model import Autoencoder
from ldm.model_folder import read_model_folder
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.first_stage import KLModel, VQModel
from ldm.models.gaussian import kl_to_standard_normal, split_moments
from ldm.models.lpips import LPIPS, build_lpips
from ldm.recipe import FIRST_STAGES

pytestmark = pytest.mark.parity

FIXTURES = Path(__file__).parent / "fixtures"
CASES = ("vq_first_stage", "kl_first_stage")
# Released first stage -> layers of its discriminator.
RELEASED = {
    "kl-f4": 3,
    "kl-f8": 3,
    "kl-f16": 3,
    "kl-f32": 3,
    "vq-f4": 3,
    "vq-f4-noattn": 3,
    "vq-f8": 2,
    "vq-f8-n256": 3,
    "vq-f16": 2,
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folder of each case, made by the public import."""
    folders = {case: tmp_path_factory.mktemp("imported") / case for case in CASES}
    for case, folder in folders.items():
        import_to_folder(FIXTURES / case / "config.yaml", FIXTURES / case / "model.ckpt", output=folder)
    return folders


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return build_lpips()


def outputs_of(folder: Path, given: Mapping[str, Tensor], *, suffix: str) -> dict[str, Tensor]:
    """Everything that a first stage computes from `image` or `image_wide`, under the fixtures' names."""
    autoencoder, x = ldm.load(folder), given[f"image{suffix}"]
    assert isinstance(autoencoder, Autoencoder)
    model = autoencoder.first_stage
    if isinstance(model, VQModel):
        z = autoencoder.encode(x)
        quantized = model.quantize(z)
        made = {"prequant": z, "quant": quantized.latent, "indices": quantized.indices}
        made |= {"codebook_loss": quantized.loss, "reconstruction": autoencoder.decode(z)}
        if not suffix:
            made["from_indices"] = model.decode_codes(model.quantize.lookup(quantized.indices))
    else:
        assert isinstance(model, KLModel)
        moments = model.encode(x)
        mean, logvar = split_moments(moments)
        made = {"mean": autoencoder.encode(x), "logvar": logvar, "kl": kl_to_standard_normal(moments)}
        made["reconstruction_mode"] = autoencoder.decode(mean)
        if not suffix:
            made["sample"] = model.latent(moments, given["posterior_noise"])
            made["reconstruction_sample"] = autoencoder.decode(made["sample"])
    return {f"{name}{suffix}": tensor for name, tensor in made.items()}


@pytest.mark.parametrize("case", CASES)
def test_every_stored_output_of_the_published_code_is_reproduced(
    case: str, imported: dict[str, Path], differs: Callable[..., str]
) -> None:
    given, want = (load_file(FIXTURES / case / f"{name}.safetensors") for name in ("in", "out"))
    rules = json.loads((FIXTURES / case / "tolerances.json").read_text("utf-8"))
    got: dict[str, Tensor] = {}
    for suffix in ("", "_wide"):
        got |= outputs_of(imported[case], given, suffix=suffix)
    assert got.keys() == want.keys() == rules.keys()
    verdicts = {name: differs(got[name], want[name], **rule) for name, rule in rules.items()}
    assert not any(verdicts.values()), verdicts


def test_the_judge_sees_a_number_outside_its_bound(differs: Callable[..., str]) -> None:
    one = torch.ones(2)
    assert not differs(one + 5e-4, one, atol=2e-4, rtol=4e-4)
    assert "1.00e-03" in differs(one + 1e-3, one, atol=2e-4, rtol=4e-4)
    assert "largest error" in differs(torch.tensor([1.0, torch.nan]), one, atol=1.0, rtol=1.0)
    assert differs(torch.tensor([1, 2]), torch.tensor([1, 3]), atol=9, rtol=9) == "1 differ"
    assert "shape" in differs(torch.ones(1), one, atol=1.0, rtol=1.0)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_written_back_key_for_key_and_bit_for_bit(
    case: str, imported: dict[str, Path], tmp_path: Path
) -> None:
    export_to_folder(read_model_folder(imported[case]), tmp_path / "back", format="compvis")
    before = read_checkpoint(FIXTURES / case / "model.ckpt")
    after = read_checkpoint(tmp_path / "back" / "model.ckpt")
    assert any(name.startswith("loss.") for name in before.tensors)
    assert after.tensors.keys() == before.tensors.keys()
    for name, tensor in before.tensors.items():
        assert after.tensors[name].dtype == tensor.dtype, name
        assert torch.equal(after.tensors[name], tensor), name
    assert after.facts == before.facts == {"global_step": 1234, "epoch": 5}
    parity = json.loads((tmp_path / "back" / "parity.json").read_text("utf-8"))["parity"]
    assert parity["largest_difference"] == {"latent": 0.0, "reconstruction": 0.0}


def recipe_model(name: str) -> FirstStageModel:
    """The network of a first stage's recipe."""
    return FirstStageModel.model_validate(
        yaml.safe_load((FIRST_STAGES / f"{name}.yaml").read_text("utf-8"))["model"]
    )


@pytest.mark.parametrize("name", list(RELEASED))
def test_our_networks_have_the_keys_and_shapes_of_a_released_checkpoint(name: str, lpips: LPIPS) -> None:
    want = json.loads((FIXTURES / "layouts" / f"{name}.json").read_text("utf-8"))
    config = recipe_model(name)
    with torch.device("meta"):
        discriminator = PatchDiscriminator(num_layers=RELEASED[name])
    loss = published_loss(lpips, discriminator, kind=config.kind)
    ours = {name: list(shape) for name, shape in first_stage_layout(config).items()}
    ours |= {name: list(tensor.shape) for name, tensor in loss.items()}
    assert ours == want


@pytest.mark.parametrize("name", list(RELEASED))
def test_the_config_of_a_recipe_survives_the_published_form(name: str) -> None:
    config = recipe_model(name)
    written = yaml.safe_load(yaml.safe_dump(published_config(config)))
    assert first_stage_config(Section("config.yaml", "", written).section("model")) == config


def test_the_fixtures_are_the_files_that_their_readme_names() -> None:
    named = dict(
        re.findall(r"\| `(\S+)` \| `([0-9a-f]{64})` \|", (FIXTURES / "README.md").read_text("utf-8"))
    )
    files = [path for path in FIXTURES.rglob("*") if path.is_file() and path.name != "README.md"]
    assert named == {path.relative_to(FIXTURES).as_posix(): sha256_file(path) for path in files}
