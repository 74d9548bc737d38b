"""What differs between model families, as data. One row per family; no code here knows a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .attention import AttentionLengths, ParaAttnProcessor, SeveralTextsProcessor
from .processors import CogVideoXProcessor, Flux2Processor, FluxProcessor, JointProcessor, WanProcessor


@dataclass(frozen=True)
class ShardPlan:
    """How a family's forward is spread over ranks.

    Attributes:
        samples: names of the transformer's arguments whose first dimension is the batch, a multiple of it with what
            belongs to one sample side by side, or 1 for all samples; the latents first. What a batch of prompts is
            split by.
        rows: names of the transformer's arguments that may have an entry for each of the video's tokens, (B, S): they
            are cut as the video is, which must be the whole joint sequence.
        prefix: name of the blocks' argument, where they have it, that says how many of the video's first tokens they
            treat unlike the others; every rank is told how many of its own are such.
        output: name of the transformer's only output, whose first dimension is the batch.
        text: name of the transformer argument that holds the text (B, T, ...); None where it is not in the joint
            sequence.
        patch: what turns latents into video tokens: their dimensions that count, each with the patch's extent along
            it, as a number, the name of a config entry (None is 1), or such a name and an index into its value.
        heads: name of the config entry with the number of attention heads.
        sequence: names of the blocks' streams, (B, rows, C) each, in the order in which attention joins them. Padding
            may stand at the end of the last one only. This joint sequence is what the ranks share out.
        text_cost: what a row of the text costs in a step, in rows of the video; ranks are given rows of equal cost.
        gathered_at: path of the submodule, called once after the last block with the video stream alone, whose output
            (B, rows, ...) is gathered: the later, the less there is to send.
        noise: name of the pipeline's method that returns the latents that a call starts from, alone or in a tuple.
    """

    samples: tuple[str, ...]
    text: str | None
    patch: tuple[tuple[int, str | tuple[str, int] | int], ...]
    sequence: tuple[str, ...]
    text_cost: float = 1.0
    rows: tuple[str, ...] = ()
    prefix: str | None = None
    output: str = "sample"
    heads: str = "num_attention_heads"
    gathered_at: str = "proj_out"
    noise: str = "prepare_latents"


@dataclass(frozen=True)
class Modulation:
    """What scales and shifts the first block's normalised input by the timestep embedding, for TeaCache.

    Attributes:
        submodule: path of it in the first block; its output, or the first of a tuple, is (B, rows, C).
        arguments: (its argument, the block's argument that is given for it).
    """

    submodule: str
    arguments: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Conditioning:
    """What the timestep alone decides, and every rank would compute for itself: conditioning.py.

    Attributes:
        embedder: path of the transformer's submodule, called once before the blocks, whose output is a vector (B, C).
        linears: paths within a block, each of which a block may have, of the linears that are given that vector's SiLU
            and nothing else.
        argument: name of the blocks' argument that is the vector.
    """

    embedder: str
    linears: tuple[str, ...]
    argument: str = "temb"


@dataclass(frozen=True)
class Passes:
    """How the passes of one step are told apart where the pipeline announces them by no `cache_context`.

    Attributes:
        names: of the passes, in the order in which a step runs them.
        prompts: names of the transformer's arguments in which a pass is given the same objects at every step, and
            every pass of a step others.
    """

    names: tuple[str, ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One row: how a family's pipeline and transformer are recognised, and where things stand in them.

    Attributes:
        name: the family's name, for messages.
        pipelines: class names of the pipelines that are supported; subclasses are too.
        transformers: class names of their transformers.
        components: names of the pipeline's components that are such transformers; each may be missing, not all.
        config: values that the transformer's config must have.
        without: dotted paths from the pipeline that must lead to None, False or nothing.
        head_dim: name of the config entry with the channels per attention head.
        processor: makes the attention processor from the lengths it is to read, an object with those as `lengths`.
        text_mask: name of the transformer argument that holds the text's key mask (B, T), ones before zeros; None
            where no key is masked.
        refiner: path of the submodule that refines the text by self attention and would build a (B, 1, T, T) mask
            from `refiner_mask`.
        refiner_mask: name of that submodule's mask argument.
        block_lists: names of the lists of transformer blocks, in the order in which they run.
        block_arguments: names of the streams among the arguments of every block, the video stream first.
        block_returns: the same names in the order in which every block returns them.
        joined: names of the block lists, of the last ones, whose blocks take and return all streams in one, joined in
            the order of `shards.sequence`, as the first of `block_arguments`.
        reused_streams: the streams that are still needed after the last block; of the others no residual is kept.
        cache_threshold: First Block Cache's default threshold.
        shards: how the forward is spread over ranks.
        modulation: what TeaCache looks at; None where it cannot be used.
        conditioning: what ranks share out beside the rows; None where it is not worth it, as for a video's step.
        kept_linears: names, with wildcards, of what stands in a block and keeps its precision where linears are
            quantised, with all that is below it.
        teacache_rescale: TeaCache's published polynomial, the highest power first; None where there is none.
        passes: what tells calls apart that a pipeline makes without a `cache_context`; None where they are all one
            pass, or there are none.
    """

    name: str
    pipelines: tuple[str, ...]
    transformers: tuple[str, ...]
    cache_threshold: float
    shards: ShardPlan
    components: tuple[str, ...] = ("transformer",)
    block_lists: tuple[str, ...] = ("transformer_blocks",)
    block_arguments: tuple[str, ...] = ("hidden_states", "encoder_hidden_states")
    block_returns: tuple[str, ...] = ("hidden_states", "encoder_hidden_states")
    joined: tuple[str, ...] = ()
    reused_streams: tuple[str, ...] = ("hidden_states",)
    processor: Callable[[AttentionLengths], object] = ParaAttnProcessor
    config: tuple[tuple[str, object], ...] = ()
    without: tuple[str, ...] = ()
    head_dim: str = "attention_head_dim"
    text_mask: str | None = None
    refiner: str | None = None
    refiner_mask: str = "attention_mask"
    modulation: Modulation | None = None
    conditioning: Conditioning | None = None
    # Modulations stand in the norms. They act once per sample, so that there is no time to gain, only memory; and an
    # error in them moves every token alike. (On the shipped pipeline, 4 prompts and 10 steps, they alone in FP8 leave
    # 54 dB, the blocks' other linears 42.) LoRAs are too small to gain.
    kept_linears: tuple[str, ...] = ("norm*", "lora_*")
    teacache_rescale: tuple[float, ...] | None = None
    passes: Passes | None = None


HUNYUAN_VIDEO = Family(
    name="HunyuanVideo (text to video)",
    pipelines=("HunyuanVideoPipeline",),
    transformers=("HunyuanVideoTransformer3DModel",),
    config=(("image_condition_type", None),),
    text_mask="encoder_attention_mask",
    refiner="context_embedder.token_refiner",
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    cache_threshold=0.06,
    shards=ShardPlan(
        samples=(
            "hidden_states",
            "timestep",
            "encoder_hidden_states",
            "encoder_attention_mask",
            "pooled_projections",
            "guidance",
        ),
        text="encoder_hidden_states",
        patch=((2, "patch_size_t"), (3, "patch_size"), (4, "patch_size")),
        sequence=("hidden_states", "encoder_hidden_states"),
    ),
    modulation=Modulation("norm1", (("x", "hidden_states"), ("emb", "temb"))),
    # github.com/ali-vilab/TeaCache, TeaCache4HunyuanVideo: fitted on the 13B model at 50 steps.
    teacache_rescale=(7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02),
)

HUNYUAN_VIDEO_IMAGE = Family(
    name="HunyuanVideo (image to video)",
    pipelines=("HunyuanVideoImageToVideoPipeline",),
    transformers=("HunyuanVideoTransformer3DModel",),
    text_mask="encoder_attention_mask",
    refiner="context_embedder.token_refiner",
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    cache_threshold=0.06,
    shards=replace(HUNYUAN_VIDEO.shards, prefix="num_tokens"),  # of the first frame, where it is the image
    passes=Passes(("cond", "uncond"), ("encoder_hidden_states", "pooled_projections")),
)

HUNYUAN_VIDEO_15 = Family(
    name="HunyuanVideo 1.5 (text to video, image to video)",
    pipelines=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
    transformers=("HunyuanVideo15Transformer3DModel",),
    processor=SeveralTextsProcessor,
    text_mask="encoder_attention_mask",
    refiner="context_embedder.token_refiner",
    cache_threshold=0.06,
    shards=ShardPlan(
        samples=(
            "hidden_states",
            "timestep",
            "encoder_hidden_states",
            "encoder_attention_mask",
            "timestep_r",
            "encoder_hidden_states_2",
            "encoder_attention_mask_2",
            "image_embeds",
        ),
        text="encoder_hidden_states",
        patch=((2, "patch_size_t"), (3, "patch_size"), (4, "patch_size")),
        sequence=("hidden_states", "encoder_hidden_states"),
    ),
)

FLUX = Family(
    name="FLUX.1 (dev, schnell, Fill, Kontext)",
    pipelines=("FluxPipeline", "FluxFillPipeline", "FluxKontextPipeline"),
    transformers=("FluxTransformer2DModel",),
    without=("transformer.encoder_hid_proj",),  # an IP adapter, whose attention is of its own
    processor=FluxProcessor,
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    block_returns=("encoder_hidden_states", "hidden_states"),
    cache_threshold=0.08,
    shards=ShardPlan(
        samples=("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections", "guidance"),
        text="encoder_hidden_states",
        patch=((1, 1),),
        sequence=("encoder_hidden_states", "hidden_states"),
        # In a third of the blocks the text has products and element-wise operations of its own, too small for a GPU. A
        # step on two H200s takes 74.6 ms with 1, 71.5 to 71.9 with 1.08 to 1.24.
        text_cost=1.16,
    ),
    modulation=Modulation("norm1", (("x", "hidden_states"), ("emb", "temb"))),
    conditioning=Conditioning("time_text_embed", ("norm1.linear", "norm1_context.linear", "norm.linear")),
    # github.com/ali-vilab/TeaCache, TeaCache4FLUX: fitted on FLUX.1-dev.
    teacache_rescale=(4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01),
    passes=Passes(("cond", "uncond"), ("encoder_hidden_states", "pooled_projections")),  # Kontext; Fill has one pass
)

FLUX_2 = Family(
    name="FLUX.2 (dev, klein)",
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    transformers=("Flux2Transformer2DModel",),
    processor=Flux2Processor,
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    block_returns=("encoder_hidden_states", "hidden_states"),
    joined=("single_transformer_blocks",),
    cache_threshold=0.08,
    shards=ShardPlan(
        samples=("hidden_states", "timestep", "encoder_hidden_states", "guidance"),
        text="encoder_hidden_states",
        patch=((1, 1),),
        sequence=("encoder_hidden_states", "hidden_states"),
    ),
)

WAN = Family(
    name="Wan (text to video, image to video)",
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    transformers=("WanTransformer3DModel",),
    components=("transformer", "transformer_2"),
    processor=WanProcessor,
    block_lists=("blocks",),
    block_arguments=("hidden_states",),
    block_returns=("hidden_states",),
    cache_threshold=0.03,
    shards=ShardPlan(
        samples=("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image"),
        rows=("timestep",),  # of Wan 2.2's 5B, whose image is a frame without noise
        text=None,
        patch=((2, ("patch_size", 0)), (3, ("patch_size", 1)), (4, ("patch_size", 2))),
        sequence=("hidden_states",),
    ),
)

COGVIDEOX = Family(
    name="CogVideoX (text to video, image to video)",
    pipelines=("CogVideoXPipeline", "CogVideoXImageToVideoPipeline"),
    transformers=("CogVideoXTransformer3DModel",),
    processor=CogVideoXProcessor,
    cache_threshold=0.04,
    shards=ShardPlan(
        samples=("hidden_states", "timestep", "encoder_hidden_states", "ofs"),
        text="encoder_hidden_states",
        patch=((1, "patch_size_t"), (3, "patch_size"), (4, "patch_size")),
        sequence=("encoder_hidden_states", "hidden_states"),
    ),
)

MOCHI = Family(
    name="Mochi",
    pipelines=("MochiPipeline",),
    transformers=("MochiTransformer3DModel",),
    processor=JointProcessor,
    text_mask="encoder_attention_mask",
    cache_threshold=0.06,
    shards=ShardPlan(
        samples=("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask"),
        text="encoder_hidden_states",
        patch=((2, 1), (3, "patch_size"), (4, "patch_size")),
        sequence=("hidden_states", "encoder_hidden_states"),
    ),
)

STABLE_DIFFUSION_3 = Family(
    name="Stable Diffusion 3 and 3.5",
    pipelines=("StableDiffusion3Pipeline",),
    transformers=("SD3Transformer2DModel",),
    without=("transformer.image_proj",),  # an IP adapter, whose attention is of its own
    processor=JointProcessor,
    block_returns=("encoder_hidden_states", "hidden_states"),
    cache_threshold=0.08,
    shards=ShardPlan(
        samples=("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"),
        text="encoder_hidden_states",
        patch=((2, "patch_size"), (3, "patch_size")),
        sequence=("hidden_states", "encoder_hidden_states"),
    ),
    conditioning=Conditioning("time_text_embed", ("norm1.linear", "norm1_context.linear")),
    # Skip layer guidance has a second pass, in some of the steps.
    passes=Passes(("cond_uncond", "skip_layers"), ("encoder_hidden_states", "pooled_projections")),
)

FAMILIES = (
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_IMAGE,
    HUNYUAN_VIDEO_15,
    FLUX,
    FLUX_2,
    WAN,
    COGVIDEOX,
    MOCHI,
    STABLE_DIFFUSION_3,
)
