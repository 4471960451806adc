"""Where tensors are computed: what is chosen, and that nothing is left behind on the CPU.

No GPU is needed. A stand-in device named "meta" computes on the CPU, and like a GPU refuses an operation
whose tensors are on different devices. What runs on it gives what the CPU gives, up to rounding in attention,
for which the CPU has a kernel of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from datasets.manifest import Manifest
from datasets.store import Store
from ldm.conditions import fields_of
from ldm.config import Recipe
from ldm.device import CPU, facts, full_float32, home, resolve
from ldm.edits import Edit
from ldm.encoding import encode
from ldm.errors import RecipeError
from ldm.evaluation.classifier import accuracy, train_classifier
from ldm.evaluation.roundtrip import round_trip
from ldm.evaluation.sets import reconstruct
from ldm.latent_diffusion import LatentDiffusion, assemble
from ldm.model import Autoencoder, build_denoising, load_first_stage, moved
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.first_stage import FirstStage
from ldm.models.lpips import build_lpips
from ldm.range import from_uint8
from ldm.stages.stage import environment

OTHER = torch.device("meta")
ANY_DEVICE = {"aten._to_copy", "aten.copy_", "aten._has_compatible_shallow_copy_type"}
BY_INDEX = {"aten.index", "aten.index_put", "aten.index_put_"}
"""Operations that a GPU does with tensors of a CPU too: all of them, or the indices alone."""


class Elsewhere(Tensor):
    """A tensor on the stand-in device; `here` holds its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "Elsewhere":
        made = Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=OTHER,
        )
        made.here = here
        return made

    def tolist(self) -> Any:
        """Its numbers, which wrappers do not give by themselves."""
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_stand_in(func, args, kwargs or {})


class StandIn(TorchDispatchMode):
    """Within it the device "meta" is the stand-in."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_stand_in(func, args, kwargs or {})


def on_stand_in(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do one operation on the device that it belongs to; RuntimeError where a GPU would raise one."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        with StandIn():  # operations made of others arrive whole in inference mode
            return func.decompose(*args, **kwargs)
    name = str(func).rpartition(".")[0]
    checked = args[:1] if name in BY_INDEX else (args, kwargs)
    tensors = [x for x in tree_leaves(checked) if isinstance(x, Tensor)]
    there = any(isinstance(x, Elsewhere) for x in tensors)
    if there and name not in ANY_DEVICE and any(x.ndim and not isinstance(x, Elsewhere) for x in tensors):
        raise RuntimeError(f"{name} of tensors on different devices")
    asked, real = kwargs.get("device"), dict(kwargs)
    if asked is not None:
        there, real["device"] = torch.device(asked) == OTHER, CPU
    elif name == "aten.copy_":
        there = isinstance(args[0], Elsewhere)
    out = func(*tree_map(here, args), **tree_map(here, real))
    if not there:
        return out
    wrapped = tree_map(lambda x: Elsewhere(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if tensors and asked is None else wrapped


def here(value: Any) -> Any:
    return value.here if isinstance(value, Elsewhere) else value


@contextmanager
def on_other_device() -> Iterator[torch.device]:
    with StandIn():
        yield OTHER


class Chain(Protocol):
    """What the fixtures of conftest.py give."""

    recipe: Recipe
    store: Store
    first_stage: Manifest


def test_the_stand_in_refuses_to_mix_devices_and_computes_the_same() -> None:
    torch.manual_seed(0)
    network, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    expected = network(x)
    with StandIn():
        network.to(OTHER)
        assert network(x.to(OTHER)).device == OTHER
        assert torch.equal(network(x.to(OTHER)).cpu(), expected)
        with pytest.raises(RuntimeError, match="different devices"):
            network(x)
        with pytest.raises(RuntimeError, match="different devices"):
            torch.add(x.to(OTHER), torch.arange(8))
        network(x.to(OTHER)).sum().backward()
        assert network.weight.grad is not None
        assert network.weight.grad.device == OTHER


TEXT = "{kind: caption, depth: 1, num_tokens: 8, context_dim: 16, drop_rate: 0.1}"
MAPS = ("unet.context_dim=null", "sampling.guidance=1")
KINDS: dict[str, tuple[str, ...]] = {
    "class_label": (),
    "class_vector": (
        "conditioning={kind: class_vector}",
        "unet.context_dim=null",
        "unet.num_classes=16",
    ),
    "caption": (f"conditioning={TEXT}",),
    "minilm": (
        "conditioning={kind: caption, encoder: minilm, num_tokens: 8, context_dim: 384, drop_rate: 0.1}",
        "unet.context_dim=384",
    ),
    "layout": (
        "conditioning={kind: layout, depth: 1, vocab_size: 16, num_tokens: 5, context_dim: 16}",
        "conditioning.drop_rate=0.1",
    ),
    "embeddings": ("conditioning={kind: embeddings, context_dim: 16, drop_rate: 0.1}",),
    "segmentation": (
        "conditioning={kind: segmentation, num_classes: 3, drop_rate: 0.1}",
        "unet.in_channels=7",
        *MAPS,
    ),
    "low_res": ("conditioning={kind: low_res, drop_rate: 0.1}", "unet.in_channels=7", *MAPS),
    "masked_image": ("conditioning={kind: masked_image, drop_rate: 0.1}", "unet.in_channels=9", *MAPS),
    "hybrid": (
        f"conditioning={{kind: hybrid, tokens: {TEXT}, maps: {{kind: low_res}}}}",
        "unet.in_channels=7",
    ),
}
"""What makes the tiny recipe one of each kind of condition."""
SAMPLERS = ["ddim", "dpmpp_2m_sde", "unipc", "heun"]


def given_of(kind: str) -> dict[str, Any]:
    """Two conditions of a kind."""
    draws = torch.Generator().manual_seed(1)
    pictures = torch.rand(2, 3, 32, 32, generator=draws) * 2 - 1
    match kind:
        case "class_label" | "class_vector":
            return {"class_label": torch.tensor([3, 14])}
        case "caption" | "minilm":
            return {"caption": ["a dark cat", "two bright cats"]}
        case "layout":
            return {"layout": torch.tensor([[1, 2, 3, 4, 15], [6, 2, 3, 4, 15]])}
        case "embeddings":
            return {"embeddings": torch.randn(2, 3, 16, generator=draws)}
        case "segmentation":
            return {"segmentation": torch.randint(3, (2, 32, 32), generator=draws)}
        case "low_res":
            return {"low_res": pictures[:, :, ::4, ::4].contiguous()}
        case "masked_image":
            return {"image": pictures, "mask": (pictures[:, :1] > 0).float()}
        case _:
            return given_of("caption") | given_of("low_res")


def some_model(chain: Chain, recipe: Recipe) -> LatentDiffusion:
    """A model of random weights, none of them zero."""
    torch.manual_seed(0)
    networks = build_denoising(recipe, num_classes=15).requires_grad_(False).eval()
    for parameter in networks.parameters():
        parameter += 0.1 * torch.randn(parameter.shape)
    classes = [f"colour {label}" for label in range(15)]
    first_stage = load_first_stage(chain.store, chain.first_stage)
    return assemble(recipe, networks, first_stage, scale=2.0, classes=classes)


def assert_same_there(chain: Chain, recipe: Recipe, run: Callable[[LatentDiffusion], Tensor]) -> None:
    """What `run` makes of a model on another device is on the CPU, and what a CPU makes."""
    expected = run(some_model(chain, recipe))
    with on_other_device() as device:
        model = some_model(chain, recipe).to(device)
        assert model.device == device
        found = run(model)
    assert found.device == CPU
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_every_condition_samples_on_its_device(
    kind: str, vq_chain: Chain, tiny_recipe: Callable[..., Recipe]
) -> None:
    recipe = tiny_recipe(*KINDS[kind])
    assert set(fields_of(recipe.conditioning)) == set(given_of(kind))
    settings: dict[str, Any] = {"guidance": 2.0, "guidance_rescale": 0.5, "micro_batch": 2, "steps": 2}
    assert_same_there(
        vq_chain, recipe, lambda model: model.sample(model.condition(**given_of(kind)), **settings)
    )


@pytest.mark.parametrize(
    "sampler",
    [*SAMPLERS, *(pytest.param(name, marks=pytest.mark.slow) for name in ("plms", "dpmpp_2m", "euler"))],
)
def test_every_sampler_runs_on_the_models_device(
    sampler: str, kl_chain: Chain, tiny_recipe: Callable[..., Recipe]
) -> None:
    settings: dict[str, Any] = {"sampler": sampler, "eta": 1.0 if sampler == "ddim" else 0.0, "steps": 4}
    labels = torch.tensor([3, -1, 14])
    assert_same_there(
        kl_chain,
        kl_chain.recipe,
        lambda model: model.sample(model.condition(class_label=labels), micro_batch=2, **settings),
    )


@pytest.mark.parametrize("objective", ["v", "x0", "flow"])
def test_every_objective_is_read_on_the_models_device(
    objective: str, vq_chain: Chain, tiny_recipe: Callable[..., Recipe]
) -> None:
    recipe = tiny_recipe(f"diffusion.objective={objective}", "unet.resblock_updown=true")
    labels = torch.tensor([3, 4])
    assert_same_there(
        vq_chain,
        recipe,
        lambda model: model.sample(model.condition(class_label=labels), micro_batch=2, steps=2),
    )


def test_edits_and_given_noise_come_to_the_models_device(
    vq_chain: Chain, tiny_recipe: Callable[..., Recipe]
) -> None:
    draws = torch.Generator().manual_seed(2)
    image = torch.rand(1, 3, 32, 32, generator=draws) * 2 - 1
    edit = Edit(
        image,
        strength=0.8,
        mask=(image[:, :1] > 0).float(),
        target=torch.rand(1, 3, 16, 16, generator=draws),
    )
    start = torch.randn(3, 4, 8, 8, generator=draws)
    labels = torch.tensor([3, 4, 5])

    def edited(model: LatentDiffusion) -> Tensor:
        settings: dict[str, Any] = {"eta": 1.0, "noise": lambda step: start.roll(step, 0)}
        condition = model.condition(class_label=labels)
        return model.sample(condition, edit=edit, start=start, micro_batch=2, steps=3, **settings)

    assert_same_there(vq_chain, vq_chain.recipe, edited)


def test_losses_are_computed_on_the_models_device(vq_chain: Chain) -> None:
    draws = torch.Generator().manual_seed(3)
    z, eps = torch.randn(2, 2, 4, 8, 8, generator=draws)
    t, labels = torch.tensor([7, 900]), torch.tensor([3, 4])

    def losses(model: LatentDiffusion) -> Tensor:
        condition = model.condition(class_label=labels)
        there = {"z": z, "t": t, "eps": eps}
        given = {name: tensor.to(model.device) for name, tensor in there.items()}
        return torch.stack(list(model.losses(**given, condition=condition).values())).cpu()

    assert_same_there(vq_chain, vq_chain.recipe, losses)


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_a_first_stage_codes_on_its_device_whole_in_bands_and_in_micro_batches(
    kind: str, request: pytest.FixtureRequest
) -> None:
    chain: Chain = request.getfixturevalue(f"{kind}_chain")
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)

    def coded(first_stage: FirstStage) -> list[Any]:
        model = Autoencoder(first_stage, chain.recipe.first_stage.model)
        x = from_uint8(pictures)
        decoded = [
            model.decode(model.encode(x, memory_gib=memory), memory_gib=memory).cpu()
            for memory in (None, 0.0006)
        ]
        stored = encode(first_stage, pictures, micro_batch=2)
        return [*decoded, stored, torch.from_numpy(reconstruct(first_stage, pictures, micro_batch=2))]

    expected = coded(load_first_stage(chain.store, chain.first_stage))
    with on_other_device() as device:
        first_stage = moved(load_first_stage(chain.store, chain.first_stage), device)
        assert home(first_stage) == device
        found = coded(first_stage)
    assert all(tensor.device == CPU for tensor in found)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            one.float(), other.float(), rtol=0, atol=2e-4 if one.is_floating_point() else 1
        )


def test_codes_are_looked_up_on_the_first_stages_device(vq_chain: Chain) -> None:
    codes = torch.arange(4).view(1, 2, 2)
    with on_other_device() as device:
        first_stage = moved(load_first_stage(vq_chain.store, vq_chain.first_stage), device)
        found = Autoencoder(first_stage, vq_chain.recipe.first_stage.model).decode_codes(codes)
    assert found.device == device


def test_round_trips_are_scored_on_the_networks_device(vq_chain: Chain) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    config = vq_chain.recipe.first_stage.model
    first_stage = load_first_stage(vq_chain.store, vq_chain.first_stage)
    expected = round_trip(Autoencoder(first_stage, config), picture, build_lpips())
    with on_other_device() as device:
        model = Autoencoder(moved(first_stage, device), config)
        found = round_trip(model, picture, build_lpips().to(device))
    assert found.scores == expected.scores


def test_losses_of_a_first_stage_have_gradients_on_its_device() -> None:
    x, y = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    discriminator, lpips = PatchDiscriminator(8, 2), build_lpips()
    with on_other_device() as device:
        there = x.to(device).requires_grad_()
        loss = discriminator.to(device)(there).mean() + lpips.to(device)(there, y.to(device)).mean()
        loss.backward()
        assert there.grad is not None
        assert there.grad.device == device


def test_the_class_judge_is_trained_and_asked_on_its_device() -> None:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (70, 3, 40, 40), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, 3, 70))
    settings: dict[str, Any] = {"num_classes": 3, "seed": 0, "num_images": 192}
    expected = train_classifier(images, labels, **settings)
    with on_other_device() as device:
        found = train_classifier(images, labels, device=device, **settings)
        assert home(found) == device
        share = accuracy(found, images, labels)
        weights = {name: value.cpu() for name, value in found.state_dict().items()}
    assert share == accuracy(expected, images, labels)
    assert all(torch.equal(value, weights[name]) for name, value in expected.state_dict().items())


@pytest.mark.slow
def test_the_features_of_fid_are_extracted_on_their_device(tmp_path: Path) -> None:
    from ldm.evaluation.features import kept_features

    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    expected = kept_features(images, cache_dir=tmp_path, micro_batch=2)
    with on_other_device() as device:
        found = kept_features(images, cache_dir=tmp_path, micro_batch=2, device=device)
    assert np.array_equal(found, expected)
    assert len(list(tmp_path.glob("features-*"))) == 2, "another class of device has features of its own"


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve("auto") == resolve("cpu") == CPU
    with pytest.raises(RecipeError, match="got cuda and torch sees no GPU; use device=cpu or auto"):
        resolve("cuda")


def test_auto_is_a_gpu_where_there_is_one_and_each_rank_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve("cpu") == CPU
    assert resolve("auto") == resolve("cuda") == torch.device("cuda", 0)
    assert [resolve("auto", worker=number).index for number in range(4)] == [0, 1, 0, 1]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve("auto") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RecipeError, match="LOCAL_RANK=2 and torch sees 2; start at most 2 ranks"):
        resolve("auto")


def test_scores_are_made_without_tf32_and_training_finds_it_as_it_was() -> None:
    cudnn: Any = torch.backends.cudnn
    settings = (cudnn.conv, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    with full_float32():
        assert [setting.fp32_precision for setting in settings] == ["ieee", "ieee"]
    assert [setting.fp32_precision for setting in settings] == before


def test_the_device_is_recorded_and_no_part_of_a_key(tiny_recipe: Callable[..., Recipe]) -> None:
    from ldm.stages import STAGES

    recipe, other = tiny_recipe(), tiny_recipe("device=cpu")
    assert recipe.device == "auto"
    assert environment(other)["device"] == "cpu"
    assert facts(CPU)["device_name"]
    for stage in STAGES.values():
        assert stage.what(recipe) == stage.what(other)


def test_a_device_that_is_not_there_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tiny_recipe: Callable[..., Recipe]
) -> None:
    from flows.preflight import check_machine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_machine(tiny_recipe())
    with pytest.raises(RecipeError, match="device must be one that is there"):
        check_machine(tiny_recipe("device=cuda"))
