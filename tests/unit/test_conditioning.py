from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn

from datasets.conditions.layout import Box, LayoutObject, layout_tokens
from datasets.conditions.text import caption_tokens
from ldm.conditions import Condition, null_condition
from ldm.errors import ContractError
from ldm.model import build_denoising
from ldm.models.conditioning import (
    AsGiven,
    ClassEmbedder,
    Conditioner,
    Hybrid,
    SpatialRescaler,
    TokenEncoder,
    build_conditioner,
    masked_condition,
)
from ldm.models.text_transformer import Transformer
from ldm.network_config import Conditioning
from ldm.recipe import load_recipe

CAPTIONS = ["a spotted orange cat", "a plain blue cat"]
LAYOUT = layout_tokens([LayoutObject(3, Box(0.1, 0.2, 0.3, 0.4))])


def draws(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# Kind -> its configuration, two conditions as a batch holds them, and the shape of what the UNet gets.
KINDS: dict[str, tuple[dict[str, Any], Tensor, tuple[int, ...]]] = {
    "class_label": ({"context_dim": 6}, torch.tensor([0, 2]), (2, 1, 6)),
    "class_vector": ({}, torch.tensor([0, 2]), (2,)),
    "caption": ({"context_dim": 6, "depth": 1}, torch.from_numpy(caption_tokens(CAPTIONS)), (2, 77, 6)),
    "layout": ({"context_dim": 6, "depth": 1}, torch.from_numpy(np.stack([LAYOUT, LAYOUT])), (2, 92, 6)),
    "embeddings": ({"context_dim": 6}, draws(2, 4, 6), (2, 4, 6)),
    "segmentation": ({"num_classes": 5}, torch.arange(512).reshape(2, 16, 16) % 5, (2, 3, 4, 4)),
    "low_res": ({}, draws(2, 3, 4, 4), (2, 3, 4, 4)),
    "masked_image": ({}, draws(2, 5, 4, 4), (2, 5, 4, 4)),
}


def some_conditioner(kind: str, **changes: Any) -> Conditioner:
    config = TypeAdapter(Conditioning).validate_python({"kind": kind} | KINDS[kind][0] | changes)
    torch.manual_seed(0)
    conditioner = build_conditioner(config, num_classes=3)
    assert not isinstance(conditioner, Hybrid | None)
    return conditioner


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_condition_becomes_what_the_unet_gets(kind: str) -> None:
    _, given, shape = KINDS[kind]
    encoded = some_conditioner(kind)(given)
    assert encoded.shape == shape
    assert encoded.isfinite().all()


def asked_and_nothing(kind: str, **changes: Any) -> tuple[Tensor, Tensor, Conditioner]:
    """What the UNet gets of two conditions, and of two that ask for nothing; and the encoder."""
    conditioner, given = some_conditioner(kind, **changes), KINDS[kind][1]
    maps = {"segmentation", "low_res", "masked_image"}
    part = "label" if kind == "class_vector" else "concat" if kind in maps else "context"
    config = TypeAdapter(Conditioning).validate_python({"kind": kind} | KINDS[kind][0] | changes)
    asked = Condition(**{part: conditioner(given)})
    nothing = null_condition(asked, config, conditioner, num_classes=3)
    return asked.parts()[part], nothing.parts()[part], conditioner


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_null_condition_has_the_form_of_a_real_one_and_is_another(kind: str) -> None:
    asked, nothing, _ = asked_and_nothing(kind)
    assert (nothing.shape, nothing.dtype) == (asked.shape, asked.dtype)
    assert torch.equal(nothing[0], nothing[1])
    assert not torch.equal(nothing[0], asked[0])


@pytest.mark.parametrize(
    ("kind", "documented"),
    [
        ("class_label", torch.tensor([3])),
        ("class_vector", torch.tensor([3])),
        ("caption", torch.tensor([[101, 102, *[0] * 75]])),
        ("layout", torch.full((1, 92), 8191)),
        ("embeddings", torch.zeros(1, 4, 6)),
        ("segmentation", torch.full((1, 16, 16), -1)),
        ("low_res", torch.zeros(1, 3, 4, 4)),
        ("masked_image", torch.cat([torch.zeros(1, 4, 4, 4), torch.ones(1, 1, 4, 4)], dim=1)),
    ],
)
def test_null_conditions_are_those_documented(kind: str, documented: Tensor) -> None:
    _, nothing, conditioner = asked_and_nothing(kind)
    torch.testing.assert_close(nothing[:1], conditioner(documented))


def test_the_null_class_of_class_vectors_is_the_last_row_of_the_unets_table() -> None:
    changes = ["conditioning={kind: class_vector}", "unet.context_dim=null", "unet.num_classes=16"]
    networks = build_denoising(load_recipe("demo", changes), num_classes=1)
    labels = torch.tensor([3, 15])
    assert isinstance(networks.conditioner, AsGiven)
    assert networks.conditioner.null(labels).tolist() == [15, 15]
    x, t = torch.zeros(2, 4, 8, 8), torch.tensor([1, 2])
    assert networks.unet(x, t, label=networks.conditioner.null(labels)).shape == x.shape


def test_without_a_null_class_there_is_a_row_less_and_nothing_to_ask_for_nothing_by() -> None:
    with_null, without = ClassEmbedder(3, 6), ClassEmbedder(3, 6, null_class=False)
    assert (with_null.embedding.num_embeddings, without.embedding.num_embeddings) == (4, 3)
    with pytest.raises(ContractError, match=r"this model is one of 'class_label' without a null condition"):
        asked_and_nothing("class_label", null_class=False, drop_rate=0)


def reference_layer(
    width: int, *, norm: nn.LayerNorm, attention: Any, mlp: Any, mlp_norm: nn.LayerNorm
) -> nn.Module:
    """Torch's own pre-norm layer with our weights."""
    layer = nn.TransformerEncoderLayer(
        width, 8, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    with torch.no_grad():
        projections = [attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]
        layer.self_attn.in_proj_weight.copy_(torch.cat(projections))
        layer.self_attn.in_proj_bias.zero_()
    layer.self_attn.out_proj.load_state_dict(attention.to_out.state_dict())
    layer.norm1.load_state_dict(norm.state_dict())
    layer.norm2.load_state_dict(mlp_norm.state_dict())
    layer.linear1.load_state_dict(mlp.net[0][0].state_dict())
    layer.linear2.load_state_dict(mlp.net[2].state_dict())
    return layer


def test_the_transformer_computes_what_torchs_own_does() -> None:
    torch.manual_seed(0)
    width, depth = 512, 2  # eight heads of 64
    ours = Transformer(vocab_size=20, num_tokens=7, width=width, depth=depth)
    tokens = torch.tensor([[1, 5, 0, 0, 19], [3, 3, 2, 1, 0]])
    x = ours.token_emb.weight[tokens] + ours.pos_emb.emb.weight[:5]
    layers: Any = ours.attn_layers.layers
    for i in range(depth):
        (norm, attention), (mlp_norm, mlp) = layers[2 * i], layers[2 * i + 1]
        x = reference_layer(width, norm=norm, attention=attention, mlp=mlp, mlp_norm=mlp_norm)(x)
    torch.testing.assert_close(ours(tokens), ours.norm(x))


def test_gradient_reaches_every_parameter_of_the_transformer_but_the_unused_head() -> None:
    transformer = Transformer(vocab_size=6, num_tokens=6, width=16, depth=2)
    transformer(torch.arange(6)[None]).square().mul(draws(6, 16)).mean().backward()
    reached = {name for name, p in transformer.named_parameters() if p.grad is not None and p.grad.any()}
    missed = {name for name, _ in transformer.named_parameters()} - reached
    assert missed == {"to_logits.weight", "to_logits.bias"}


def test_padding_is_attended_to_as_in_the_published_encoder() -> None:
    encoder, tokens = some_conditioner("caption"), KINDS["caption"][1]
    other = tokens.clone()
    other[:, -1] = 7
    assert not torch.allclose(encoder(tokens)[:, 0], encoder(other)[:, 0], atol=1e-6)


def test_a_map_of_one_class_becomes_that_classs_colour_and_borders_their_mixture() -> None:
    rescaler = some_conditioner("segmentation")
    assert isinstance(rescaler, SpatialRescaler)
    colours = rescaler.channel_mapper.weight[:, :, 0, 0]  # (3, 5)
    for label in range(5):
        out = rescaler(torch.full((1, 8, 8), label))
        torch.testing.assert_close(out, colours[:, label].reshape(1, 3, 1, 1).expand(1, 3, 2, 2))
    assert not rescaler(torch.full((1, 8, 8), -1)).any()
    halves = torch.zeros(1, 4, 4, dtype=torch.int64)
    halves[:, :, 2:] = 3
    torch.testing.assert_close(rescaler(halves)[0, :, 0, 0], (colours[:, 0] + colours[:, 3]) / 2)
    shares = draws(1, 5, 8, 8)
    torch.testing.assert_close(
        rescaler.rescale(shares), rescaler.channel_mapper(F.avg_pool2d(F.avg_pool2d(shares, 2), 2))
    )


def test_inpainting_sees_the_encoded_rest_and_the_nearest_mask_in_plus_and_minus_one() -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[:, :, :4] = 1
    out = masked_condition(draws(1, 3, 2, 2), mask)
    assert torch.equal(out[:, :3], draws(1, 3, 2, 2))
    assert out[0, 3].tolist() == [[1.0, 1.0], [-1.0, -1.0]]


def pooled(encoder: Conditioner, captions: list[str], *, num_tokens: int) -> Tensor:
    tokens = torch.from_numpy(caption_tokens(captions, num_tokens=num_tokens))
    given = (tokens > 0)[..., None]
    return F.normalize((encoder(tokens) * given).sum(1) / given.sum(1), dim=1)


def test_the_frozen_encoder_reads_as_its_authors_weights_do() -> None:
    encoder = some_conditioner("caption", encoder="minilm", context_dim=384)
    assert isinstance(encoder, TokenEncoder)
    assert not encoder.state_dict()
    assert not list(encoder.parameters())
    captions = ["a red cat", "a red kitten", "a blue cat", "a diesel engine"]
    short, long = (pooled(encoder, captions, num_tokens=length) for length in (8, 12))
    torch.testing.assert_close(short, long)  # padding changes nothing
    # cosines of the upstream model, all-MiniLM-L6-v2
    assert (short[0] @ short[1:].T).tolist() == pytest.approx([0.830, 0.712, 0.221], abs=6e-4)
