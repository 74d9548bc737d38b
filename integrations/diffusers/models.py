"""What differs between model families, as data. One row per family; no code here knows a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ShardPlan:
    """How a family's forward is spread over ranks.

    Attributes:
        samples: names of the transformer's arguments whose first dimension is the batch, the latents first: what a
            batch of prompts is split by.
        output: name of the transformer's only output, whose first dimension is the batch.
        text: name of the transformer argument that holds the text (B, T, ...).
        patch: names of the config entries with the patch's extent along the last dimensions of the latents, an entry
            for each: what turns latents into video tokens.
        heads: name of the config entry with the number of attention heads.
        sequence: names of the blocks' streams, (B, rows, C) each, in the order in which attention joins them. Padding
            may stand at the end of the last one only. This joint sequence is what the ranks share out.
        gathered_at: path of the submodule, called once after the last block with the first stream alone, whose output
            (B, rows, ...) is gathered: the later, the less there is to send.
        noise: name of the pipeline's method that returns the latents that a call starts from.
    """

    samples: tuple[str, ...]
    output: str
    text: str
    patch: tuple[str, ...]
    heads: str
    sequence: tuple[str, ...]
    gathered_at: str
    noise: str


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
class Family:
    """One row: how a family's pipeline and transformer are recognised, and where things stand in them.

    Attributes:
        name: the family's name, for messages.
        pipelines: class names of the pipelines that are supported; subclasses are too.
        transformers: class names of their transformers.
        config: values that the transformer's config must have.
        head_dim: name of the config entry with the channels per attention head.
        text_mask: name of the transformer argument that holds the text's key mask (B, T), ones before zeros.
        refiner: path of the submodule that refines the text by self attention and would build a (B, 1, T, T) mask
            from `refiner_mask`.
        refiner_mask: name of that submodule's mask argument.
        block_lists: names of the lists of transformer blocks, in the order in which they run.
        block_arguments: names of the streams among the arguments of every block, the video stream first.
        block_returns: the same names in the order in which every block returns them.
        reused_streams: the streams that are still needed after the last block; of the others no residual is kept.
        cache_threshold: First Block Cache's default threshold.
        shards: how the forward is spread over ranks.
        modulation: what TeaCache looks at; None where it cannot be used.
        teacache_rescale: TeaCache's published polynomial, the highest power first; None where there is none.
    """

    name: str
    pipelines: tuple[str, ...]
    transformers: tuple[str, ...]
    config: tuple[tuple[str, object], ...]
    head_dim: str
    text_mask: str
    refiner: str | None
    refiner_mask: str
    block_lists: tuple[str, ...]
    block_arguments: tuple[str, ...]
    block_returns: tuple[str, ...]
    reused_streams: tuple[str, ...]
    cache_threshold: float
    shards: ShardPlan
    modulation: Modulation | None = None
    teacache_rescale: tuple[float, ...] | None = None


HUNYUAN_VIDEO = Family(
    name="HunyuanVideo (text to video)",
    pipelines=("HunyuanVideoPipeline",),
    transformers=("HunyuanVideoTransformer3DModel",),
    config=(("image_condition_type", None),),
    head_dim="attention_head_dim",
    text_mask="encoder_attention_mask",
    refiner="context_embedder.token_refiner",
    refiner_mask="attention_mask",
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    block_arguments=("hidden_states", "encoder_hidden_states"),
    block_returns=("hidden_states", "encoder_hidden_states"),
    reused_streams=("hidden_states",),
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
        output="sample",
        text="encoder_hidden_states",
        patch=("patch_size_t", "patch_size", "patch_size"),
        heads="num_attention_heads",
        sequence=("hidden_states", "encoder_hidden_states"),
        gathered_at="proj_out",
        noise="prepare_latents",
    ),
    modulation=Modulation("norm1", (("x", "hidden_states"), ("emb", "temb"))),
    # github.com/ali-vilab/TeaCache, TeaCache4HunyuanVideo: fitted on the 13B model at 50 steps.
    teacache_rescale=(7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02),
)

FAMILIES = (HUNYUAN_VIDEO,)
