"""Configs of latent diffusion models in the form of CompVis/latent-diffusion, as they are written."""

from typing import Any

from ldm.bridge.compvis import NORM_GROUPS, published_config
from ldm.bridge.compvis_ldm_config import (
    ENCODERS,
    IDENTITY,
    IS_FIRST_STAGE,
    LATENT_DIFFUSION,
    NUM_IMAGENET,
    UNCONDITIONAL,
    UNET,
)
from ldm.errors import CheckpointError
from ldm.model_config import AnyConditioning, LatentDiffusionModel
from ldm.network_config import (
    CaptionConditioning,
    ClassConditioning,
    ClassVectorConditioning,
    EmbeddingsConditioning,
    HybridConditioning,
    LayoutConditioning,
    LowResConditioning,
    MaskedImageConditioning,
    SegmentationConditioning,
    UNetConfig,
)

BASE_LR = 1e-6


def published_diffusion_config(
    config: LatentDiffusionModel, *, scale_in_checkpoint: bool, use_ema: bool
) -> dict[str, Any]:
    """The published form of a config.

    Args:
        config: ours.
        scale_in_checkpoint: the scale is a buffer of the checkpoint, not a number of the config.
        use_ema: the checkpoint holds averaged weights.

    Raises:
        CheckpointError: the published code has no such model; the message names the setting.
    """
    diffusion, encoder = config.diffusion, published_encoder(config)
    if diffusion.schedule == "flow" or diffusion.objective == "flow" or diffusion.weighting != "simple":
        raise CheckpointError(
            f"the published code has no diffusion.schedule or objective flow, and no weighting, got "
            f"{diffusion.schedule}, {diffusion.objective} and {diffusion.weighting}; it cannot be exported"
        )
    key = conditioning_key(config.conditioning)
    scale = {"scale_by_std": True} if scale_in_checkpoint else {"scale_factor": config.scale}
    return {
        "model": {
            "base_learning_rate": BASE_LR,
            "target": LATENT_DIFFUSION,
            "params": {
                "beta_schedule": diffusion.schedule,
                "linear_start": diffusion.linear_start,
                "linear_end": diffusion.linear_end,
                "timesteps": diffusion.num_timesteps,
                "parameterization": diffusion.objective,
                "loss_type": diffusion.loss,
                "learn_logvar": diffusion.learn_log_variance,
                "original_elbo_weight": config.elbo_weight,
                "image_size": config.latent_size,
                "channels": config.latent_channels,
                "first_stage_key": "image",
                "use_ema": use_ema,
                **({} if key is None else {"conditioning_key": key}),
                **scale,
                "unet_config": {"target": UNET, "params": published_unet(config.unet, config.latent_size)},
                "first_stage_config": published_first_stage(config),
                "cond_stage_config": encoder,
            },
        }
    }


def published_first_stage(config: LatentDiffusionModel) -> dict[str, Any]:
    """The first stage inside a diffusion model."""
    if config.first_stage.kind == "identity":
        return {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    section = published_config(config.first_stage)["model"]
    del section["base_learning_rate"]
    if config.first_stage.kind == "vq":
        section["target"] = "ldm.models.autoencoder.VQModelInterface"
    return section


def conditioning_key(conditioning: AnyConditioning | None) -> str | None:
    """How the condition enters, in the published words."""
    match conditioning:
        case None:
            return None
        case HybridConditioning():
            return "hybrid"
        case ClassVectorConditioning():
            return "adm"
        case SegmentationConditioning() | LowResConditioning() | MaskedImageConditioning():
            return "concat"
        case _:
            return "crossattn"


def published_unet(unet: UNetConfig, latent_size: int) -> dict[str, Any]:
    """The parameters of the UNet; one head of all transformers is num_heads 1, which all versions read so."""
    if unet.norm_groups != NORM_GROUPS:
        raise CheckpointError(
            f"the published code has {NORM_GROUPS} groups in every GroupNorm, and this model has "
            f"unet.norm_groups {unet.norm_groups}; it cannot be exported so"
        )
    heads = (
        {"num_heads": unet.num_heads}
        if unet.head_channels is None
        else {"num_head_channels": unet.head_channels}
    )
    transformers = {
        "use_spatial_transformer": True,
        "transformer_depth": unet.transformer_depth,
        "context_dim": unet.context_dim,
    }
    return {
        "image_size": latent_size,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "model_channels": unet.model_channels,
        "attention_resolutions": list(unet.attention_factors),
        "num_res_blocks": unet.num_res_blocks,
        "channel_mult": list(unet.channel_mult),
        "dropout": unet.dropout,
        "resblock_updown": unet.resblock_updown,
        "use_scale_shift_norm": unet.scale_shift_norm,
        "use_checkpoint": unet.checkpoint_activations,
        **({"num_heads": 1} if unet.one_head_transformers else heads),
        **({} if unet.num_classes is None else {"num_classes": unet.num_classes}),
        **({} if unet.context_dim is None else transformers),
    }


def published_encoder(config: LatentDiffusionModel) -> Any:
    """The section of the conditioning encoder; of a hybrid, that of its part with weights."""
    conditioning = config.conditioning
    if isinstance(conditioning, HybridConditioning):
        given = isinstance(conditioning.tokens, EmbeddingsConditioning)
        conditioning = conditioning.maps if given else conditioning.tokens
    match conditioning:
        case None:
            return UNCONDITIONAL
        case MaskedImageConditioning():
            return IS_FIRST_STAGE
        case ClassConditioning():
            rows = config.num_classes + conditioning.null_class
            if conditioning.null_class == (rows == NUM_IMAGENET):
                raise CheckpointError(
                    f"the published code has a null class unless there are {NUM_IMAGENET} classes, and this "
                    f"model has {rows} and null_class {conditioning.null_class}; it cannot be exported so"
                )
            name, parameters = "ClassEmbedder", {"n_classes": rows, "embed_dim": conditioning.context_dim}
        case CaptionConditioning() | LayoutConditioning():
            if isinstance(conditioning, CaptionConditioning) and conditioning.encoder != "transformer":
                raise CheckpointError(
                    f"the published code has no conditioning.encoder {conditioning.encoder!r}; a model with "
                    "it cannot be exported"
                )
            name, parameters = (
                "BERTEmbedder",
                {
                    "n_embed": conditioning.context_dim,
                    "n_layer": conditioning.depth,
                    "vocab_size": conditioning.vocab_size,
                    "max_seq_len": conditioning.num_tokens,
                    "use_tokenizer": isinstance(conditioning, CaptionConditioning),
                },
            )
        case SegmentationConditioning():
            name, parameters = (
                "SpatialRescaler",
                {
                    "n_stages": conditioning.num_stages,
                    "in_channels": conditioning.num_classes,
                    "out_channels": conditioning.channels,
                },
            )
        case EmbeddingsConditioning() | LowResConditioning() | ClassVectorConditioning():
            return {"target": IDENTITY}
    return {"target": ENCODERS + name, "params": parameters}
