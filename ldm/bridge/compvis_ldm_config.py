"""Configs of latent diffusion models of CompVis/latent-diffusion, read value by value."""

from datasets.conditions.text import MAX_TOKENS, NUM_WORDS, SEP
from ldm.bridge.compvis import first_stage_config
from ldm.bridge.section import Section, validated
from ldm.config import Diffusion
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

LATENT_DIFFUSION = "ldm.models.diffusion.ddpm.LatentDiffusion"
TARGETS = (LATENT_DIFFUSION, "ldm.models.diffusion.ddpm.Layout2ImgDiffusion")
"""Classes named by a published config; the second only checks its cond_stage_key."""
UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
ENCODERS = "ldm.modules.encoders.modules."
IDENTITY = "torch.nn.Identity"
UNCONDITIONAL, IS_FIRST_STAGE = "__is_unconditional__", "__is_first_stage__"
NUM_IMAGENET = 1000
"""Classes of the published embedder without a null class; with any other number, the last is the null."""

SCHEDULES = {"linear": "linear", "cosine": "cosine", "sqrt_linear": "sqrt_linear", "sqrt": "sqrt"}
COSINE_OFFSET = 8e-3
OF_TRAINING = {
    "base_learning_rate",
    "channels",
    "ckpt_path",
    "clip_denoised",  # latents are never clipped, whatever it says
    "cond_stage_key",
    "cond_stage_trainable",
    "first_stage_key",
    "ignore_keys",
    "load_only_unet",
    "log_every_t",
    "monitor",
    "scheduler_config",
    "use_ema",  # whether there is an average is seen in the checkpoint
}
"""Parameters that say nothing about the networks or the noise."""
FIXED = {
    "cond_stage_forward": None,
    "given_betas": None,
    "l_simple_weight": 1.0,
    "logvar_init": 0.0,
    "num_timesteps_cond": 1,
    "use_positional_encodings": False,
    "v_posterior": 0.0,
}
TRANSLATED = {
    "beta_schedule",
    "concat_mode",
    "cond_stage_config",
    "conditioning_key",
    "cosine_s",
    "first_stage_config",
    "image_size",
    "learn_logvar",
    "linear_end",
    "linear_start",
    "loss_type",
    "original_elbo_weight",
    "parameterization",
    "scale_by_std",
    "scale_factor",
    "timesteps",
    "unet_config",
}
FIXED_UNET = {
    "conv_resample": True,
    "dims": 2,
    "n_embed": None,
    "num_heads_upsample": -1,
    "use_fp16": False,
    "use_new_attention_order": False,
}
TRANSLATED_UNET = {
    "attention_resolutions",
    "channel_mult",
    "context_dim",
    "dropout",
    "in_channels",
    "model_channels",
    "num_classes",
    "num_head_channels",
    "num_heads",
    "num_res_blocks",
    "out_channels",
    "resblock_updown",
    "transformer_depth",
    "use_checkpoint",
    "use_scale_shift_norm",
    "use_spatial_transformer",
}
NAMELESS_UNET = {"image_size", "legacy"}
"""Say nothing: nominal, and see `may_have_one_head`."""


def latent_diffusion_config(section: Section, *, one_head: bool) -> LatentDiffusionModel:
    """Our config of the `model` section of a published YAML; whether there is an average is not in it.

    Args:
        section: target and params.
        one_head: every transformer has one head (see `may_have_one_head`).

    Raises:
        CheckpointError: an unknown class or setting, or a value that our models do not have.
    """
    parameters = section.section("params")
    parameters.require_known({*OF_TRAINING, *FIXED, *TRANSLATED})
    parameters.require_equal(FIXED)
    first_stage = first_stage_config(parameters.section("first_stage_config"))
    unet = unet_config(parameters.section("unet_config"), one_head=one_head)
    conditioning, num_classes = conditioning_config(
        parameters, unet, first_stage.embed_dim, first_stage.factor
    )
    return validated(
        LatentDiffusionModel,
        section.source,
        first_stage=first_stage,
        unet=unet,
        conditioning=conditioning,
        num_classes=num_classes,
        diffusion=diffusion_config(parameters),
        elbo_weight=parameters.value("original_elbo_weight", float, 0.0),
        scale=parameters.value("scale_factor", float, 1.0),
        latent_size=parameters.value("image_size", int),
    )


def diffusion_config(parameters: Section) -> Diffusion:
    """The forward process, the objective and its error."""
    parameters.one_of("beta_schedule", SCHEDULES, "linear")
    if parameters.value("cosine_s", float, COSINE_OFFSET) != COSINE_OFFSET:
        raise CheckpointError(f"{parameters.place('cosine_s')} must be {COSINE_OFFSET}, as published")
    return validated(
        Diffusion,
        parameters.source,
        schedule=parameters.value("beta_schedule", str, "linear"),
        num_timesteps=parameters.value("timesteps", int, 1000),
        linear_start=parameters.value("linear_start", float, 1e-4),
        linear_end=parameters.value("linear_end", float, 2e-2),
        objective=parameters.one_of("parameterization", ("eps", "x0", "v"), "eps"),
        loss=parameters.one_of("loss_type", ("l2", "l1"), "l2"),
        learn_log_variance=parameters.value("learn_logvar", bool, False),
    )


def unet_config(section: Section, *, one_head: bool) -> UNetConfig:
    """The UNet."""
    section.one_of("target", (UNET,))
    parameters = section.section("params")
    parameters.require_known({*TRANSLATED_UNET, *FIXED_UNET, *NAMELESS_UNET})
    parameters.require_equal(FIXED_UNET)
    head_channels, num_heads = (
        parameters.value("num_head_channels", int, -1),
        parameters.value("num_heads", int, -1),
    )
    transformers = parameters.value("use_spatial_transformer", bool, False)
    context_dim = parameters.optional("context_dim", int)
    if transformers != (context_dim is not None):
        raise CheckpointError(
            f"{parameters.place('context_dim')} must be given with use_spatial_transformer: true, and left "
            f"out without it, got {context_dim} and {transformers}"
        )
    if one_head and not transformers:
        raise CheckpointError(
            f"--one-head is for models with transformers, and {parameters.place('use_spatial_transformer')} "
            "is not true; leave it out"
        )
    return validated(
        UNetConfig,
        parameters.source,
        in_channels=parameters.value("in_channels", int),
        out_channels=parameters.value("out_channels", int),
        model_channels=parameters.value("model_channels", int),
        channel_mult=parameters.many("channel_mult", int, (1, 2, 4, 8)),
        num_res_blocks=parameters.value("num_res_blocks", int),
        attention_factors=parameters.many("attention_resolutions", int),
        head_channels=None if head_channels == -1 else head_channels,
        num_heads=num_heads if head_channels == -1 and num_heads != -1 else None,
        context_dim=context_dim,
        transformer_depth=parameters.value("transformer_depth", int, 1),
        one_head_transformers=one_head,
        resblock_updown=parameters.value("resblock_updown", bool, False),
        scale_shift_norm=parameters.value("use_scale_shift_norm", bool, False),
        num_classes=parameters.optional("num_classes", int),
        checkpoint_activations=parameters.value("use_checkpoint", bool, False),
        dropout=parameters.value("dropout", float, 0.0),
    )


def may_have_one_head(section: Section) -> bool:
    """Whether a config leaves open how many heads its transformers have.

    Until April 2022 the published code gave transformers one head, whatever num_head_channels said; neither
    the config nor the shapes of the weights tell which code a checkpoint was trained with.
    """
    unet = section.section("params").section("unet_config").section("params").values
    has_head_channels = unet.get("num_head_channels", -1) != -1
    return bool(unet.get("use_spatial_transformer")) and has_head_channels and "legacy" not in unet


def effective_key(parameters: Section) -> str | None:
    """How the condition enters; absent, it depends on two other settings, as in the published code."""
    if parameters.values.get("cond_stage_config") == UNCONDITIONAL:
        return None
    if parameters.values.get("conditioning_key") is None:
        return "concat" if parameters.value("concat_mode", bool, True) else "crossattn"
    return parameters.one_of("conditioning_key", ("concat", "crossattn", "hybrid", "adm"))


def conditioning_config(
    parameters: Section, unet: UNetConfig, latent: int, factor: int
) -> tuple[AnyConditioning | None, int]:
    """The kind of condition, and how many classes there are besides the null class."""
    key = effective_key(parameters)
    if key is None:
        return None, 0
    if key == "adm":
        require_identity(parameters)
        return ClassVectorConditioning(kind="class_vector"), max((unet.num_classes or 0) - 1, 0)
    tokens, num_classes = tokens_config(parameters, unet)
    maps = maps_config(parameters, unet, latent, factor)
    match key:
        case "crossattn" if tokens is not None:
            return tokens, num_classes
        case "concat" if maps is not None:
            return maps, 0
        case "hybrid" if tokens is not None or maps is not None:
            given = EmbeddingsConditioning(kind="embeddings", context_dim=unet.context_dim or 1)
            small = low_res(unet, factor)
            return HybridConditioning(tokens=tokens or given, maps=maps or small), num_classes
    raise CheckpointError(
        f"{parameters.place('cond_stage_config')} names an encoder that does not go with conditioning_key "
        f"{key!r}; known are ClassEmbedder and BERTEmbedder for crossattn, SpatialRescaler and "
        f"{IS_FIRST_STAGE} for concat, {IDENTITY} for both"
    )


def require_identity(parameters: Section) -> None:
    """Refuse an encoder of class vectors: the UNet has the table."""
    parameters.section("cond_stage_config").one_of("target", (IDENTITY,))


def encoder_section(parameters: Section, name: str) -> Section | None:
    """The parameters of the conditioning encoder if it is of this class; they may be left out."""
    section = parameters.values.get("cond_stage_config")
    if section == IS_FIRST_STAGE:
        return None
    encoder = parameters.section("cond_stage_config")
    known = [*(ENCODERS + name for name in ("ClassEmbedder", "BERTEmbedder", "SpatialRescaler")), IDENTITY]
    if encoder.one_of("target", known) not in (name, ENCODERS + name):
        return None
    return encoder.section("params") if encoder.values.get("params") is not None else encoder.empty("params")


def tokens_config(
    parameters: Section, unet: UNetConfig
) -> tuple[ClassConditioning | CaptionConditioning | LayoutConditioning | EmbeddingsConditioning | None, int]:
    """What becomes tokens, and how many classes there are besides the null class; None for other encoders."""
    if classes := encoder_section(parameters, "ClassEmbedder"):
        classes.require_known({"n_classes", "embed_dim", "key"})
        rows = classes.value("n_classes", int, NUM_IMAGENET)
        has_null = rows != NUM_IMAGENET
        made = validated(
            ClassConditioning,
            parameters.source,
            kind="class_label",
            context_dim=classes.value("embed_dim", int),
            null_class=has_null,
            drop_rate=0.1 if has_null else 0.0,
        )
        return made, rows - has_null
    if text := encoder_section(parameters, "BERTEmbedder"):
        text.require_known(
            {"n_embed", "n_layer", "vocab_size", "max_seq_len", "use_tokenizer"}
            | {"device", "embedding_dropout"}  # of no effect on what is computed
        )
        words = text.value("vocab_size", int, NUM_WORDS)
        # tokens that are made elsewhere are those of captions if the config says so
        says_caption = parameters.values.get("cond_stage_key") == "caption" and words > SEP
        is_caption = text.value("use_tokenizer", bool, True) or says_caption
        made = validated(
            CaptionConditioning if is_caption else LayoutConditioning,
            parameters.source,
            kind="caption" if is_caption else "layout",
            context_dim=text.value("n_embed", int),
            depth=text.value("n_layer", int),
            vocab_size=words,
            num_tokens=text.value("max_seq_len", int, MAX_TOKENS),
        )
        return made, 0
    if encoder_section(parameters, "torch.nn.Identity") is not None and unet.context_dim is not None:
        return EmbeddingsConditioning(kind="embeddings", context_dim=unet.context_dim), 0
    return None, 0


def maps_config(
    parameters: Section, unet: UNetConfig, latent: int, factor: int
) -> SegmentationConditioning | LowResConditioning | MaskedImageConditioning | None:
    """What becomes maps beside the latent; None for other encoders."""
    if parameters.values.get("cond_stage_config") == IS_FIRST_STAGE:
        return MaskedImageConditioning(kind="masked_image")
    if rescaler := encoder_section(parameters, "SpatialRescaler"):
        fixed = {"bias": False, "method": "bilinear", "multiplier": 0.5}
        rescaler.require_known({"in_channels", "n_stages", "out_channels", *fixed})
        rescaler.require_equal(fixed)
        return validated(
            SegmentationConditioning,
            parameters.source,
            kind="segmentation",
            num_classes=rescaler.value("in_channels", int, 3),
            num_stages=rescaler.value("n_stages", int, 1),
            channels=rescaler.value("out_channels", int),
        )
    if encoder_section(parameters, "torch.nn.Identity") is not None and unet.in_channels > latent:
        return low_res(unet, factor)
    return None


def low_res(unet: UNetConfig, factor: int) -> LowResConditioning:
    """Maps given as they are, as many channels as the UNet has place for."""
    return LowResConditioning(
        kind="low_res", channels=max(unet.in_channels - unet.out_channels, 1), factor=factor
    )
