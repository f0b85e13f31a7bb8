"""Tiny random pipelines of many families, made of the real classes: one builder per family, in FAMILIES by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import tiny
import torch
import transformers

from ipgo_opt.models.gate import denoiser

WIDTH = 16
"""Width of the text encoders (of one attention head of most denoisers, too)."""

FAMILIES: dict[str, Callable[[], Any]] = {}
SIZES = {"sana": 32, "lumina_2": 64}
"""Side that is asked for where it is not 16: Sana wants multiples of 32, Lumina 2 divides by 8 whatever its VAE."""

NEEDS = {"krea_2": "accelerate", "kolors": "sentencepiece"}
"""What has to be installed to load one from disk."""

CHAT = "{% for m in messages %}{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}{% endfor %}"


def family(build: Callable[[], Any]) -> Callable[[], Any]:
    """Registers a builder under its own name; its weights are the same in every process."""

    def built() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipeline = build()
            for parameter in denoiser(pipeline).parameters():
                if not parameter.any():  # layers that start at zero would keep the text from the image
                    torch.nn.init.normal_(parameter, std=0.1)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    FAMILIES[build.__name__] = built
    return built


def tokenizer(reads: int = 64) -> Any:
    """A tokenizer of single letters with a chat template, such as T5 and language models have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<pad>", "</s>", "<unk>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, [], unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    letters.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=reads,
        chat_template=CHAT,
    )  # fmt: skip


def language_model(name: str, **changed: Any) -> Any:
    """A decoder-only text encoder of two layers."""
    shape: dict[str, Any] = {
        "vocab_size": 264, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048, "pad_token_id": 0,
    }  # fmt: skip
    model = getattr(transformers, name)
    return model(model.config_class(**(shape | changed))).eval()


def t5(name: str = "T5EncoderModel") -> Any:
    """An encoder of two layers."""
    model = getattr(transformers, name)
    return model(
        model.config_class(vocab_size=264, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0)
    ).eval()


def clip(projected: bool = False) -> Any:
    """CLIP's text encoder."""
    config = tiny.text_config(tiny.tokenizer(), **({"projection_dim": WIDTH} if projected else {}))
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config).eval()


def flux_vae(**changed: Any) -> Any:
    """An AutoencoderKL with one latent channel, which pipelines pack into four."""
    shape: dict[str, Any] = {
        "block_out_channels": (4,), "latent_channels": 1, "norm_num_groups": 1, "sample_size": 16,
        "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.06, "scaling_factor": 1.5,
    }  # fmt: skip
    return diffusers.AutoencoderKL(**(shape | changed))


def flow(**changed: Any) -> Any:
    """The scheduler of flow matching."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**changed)


@family
def stable_diffusion() -> Any:
    return tiny.pipeline()


@family
def stable_diffusion_xl() -> Any:
    return tiny.pipeline_xl()


@family
def stable_diffusion_pag() -> Any:
    """Perturbed-attention guidance: three passes in one batch."""
    parts = {name: part for name, part in tiny.pipeline().components.items() if part is not None}
    return diffusers.StableDiffusionPAGPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False, pag_applied_layers="mid"
    )


@family
def latent_consistency() -> Any:
    return diffusers.LatentConsistencyModelPipeline(
        vae=tiny.vae(), text_encoder=clip(), tokenizer=tiny.tokenizer(), unet=tiny.unet(time_cond_proj_dim=8),
        scheduler=tiny.scheduler("LCMScheduler"), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


@family
def stable_diffusion_3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=2 * WIDTH, caption_projection_dim=16, pooled_projection_dim=2 * WIDTH, out_channels=4,
        ),
        text_encoder=clip(True), text_encoder_2=clip(True), text_encoder_3=language_width_32(),
        tokenizer=tiny.tokenizer(), tokenizer_2=tiny.tokenizer(), tokenizer_3=tokenizer(),
        vae=flux_vae(latent_channels=4), scheduler=flow(),
    )  # fmt: skip


def language_width_32() -> Any:
    """T5 as wide as SD 3's two CLIP encoders together."""
    return transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=264, d_model=2 * WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    ).eval()


@family
def flux() -> Any:
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        text_encoder=clip(), tokenizer=tiny.tokenizer(), text_encoder_2=t5(), tokenizer_2=tokenizer(),
        vae=flux_vae(), scheduler=flow(),
    )  # fmt: skip


def flux_2_parts() -> dict[str, Any]:
    """What Flux 2 and its distilled sister share."""
    return {
        "transformer": diffusers.Flux2Transformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=3 * WIDTH, axes_dims_rope=(4, 4, 4, 4),
        ),
        "vae": diffusers.AutoencoderKLFlux2(
            block_out_channels=(4,), latent_channels=1, norm_num_groups=1, sample_size=16, use_quant_conv=False,
            use_post_quant_conv=False, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        ),
        "scheduler": flow(),
    }  # fmt: skip


@family
def flux_2_klein() -> Any:
    return diffusers.Flux2KleinPipeline(
        **flux_2_parts(), tokenizer=tokenizer(), text_encoder=language_model("Qwen3ForCausalLM", num_hidden_layers=28)
    )


@family
def flux_2() -> Any:
    parts = flux_2_parts()
    shape = language_model("MistralModel", num_hidden_layers=31).config.to_dict()
    config = transformers.Mistral3Config(
        text_config=shape, image_token_index=1,
        vision_config={
            "model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "image_size": 12, "patch_size": 6,
        },
    )  # fmt: skip
    return diffusers.Flux2Pipeline(
        **parts, tokenizer=tokenizer(), text_encoder=transformers.Mistral3ForConditionalGeneration(config).eval()
    )


def qwen_vae() -> Any:
    """The video autoencoder of Qwen-Image, for images of one frame."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip


@family
def qwen_image() -> Any:
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 264, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": rope, "pad_token_id": 0,
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        vision_end_token_id=3, vision_start_token_id=4, vision_token_id=5, image_token_id=6, video_token_id=7,
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        transformer=diffusers.QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4),
        ),
        vae=qwen_vae(), scheduler=flow(), tokenizer=tokenizer(),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config).eval(),
    )  # fmt: skip


@family
def krea_2() -> Any:
    """Every token brings the states of several layers: (B, L, layers, d)."""
    rope = {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 1e6}
    config = transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": 264, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8,
            "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": rope, "pad_token_id": 0,
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
            "deepstack_visual_indexes": [0],
        },
        vision_end_token_id=3, vision_start_token_id=4, image_token_id=6, video_token_id=7,
    )  # fmt: skip
    return diffusers.Krea2Pipeline(
        transformer=diffusers.Krea2Transformer2DModel(
            in_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=24, timestep_embed_dim=8, text_hidden_dim=WIDTH, num_text_layers=2,
            text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=24,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(8, 4, 4),
        ),
        vae=qwen_vae(), scheduler=flow(), tokenizer=tokenizer(), text_encoder_select_layers=(1, 2),
        text_encoder=transformers.Qwen3VLModel(config).eval(),
    )  # fmt: skip


@family
def z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4], axes_lens=[512, 32, 32],
    )  # fmt: skip
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)  # the class leaves them as memory was
    return diffusers.ZImagePipeline(
        transformer=transformer,
        vae=flux_vae(latent_channels=4),
        scheduler=flow(),
        tokenizer=tokenizer(),
        text_encoder=language_model("Qwen3Model"),
    )


@family
def pixart_sigma() -> Any:
    return diffusers.PixArtSigmaPipeline(
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
            caption_channels=WIDTH, cross_attention_dim=16, out_channels=8, use_additional_conditions=False,
        ),
        text_encoder=t5(), tokenizer=tokenizer(), vae=tiny.vae(), scheduler=tiny.scheduler("DDIMScheduler"),
    )  # fmt: skip


@family
def sana() -> Any:
    return diffusers.SanaPipeline(
        transformer=diffusers.SanaTransformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
            num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=WIDTH,
            sample_size=16,
        ),
        vae=diffusers.AutoencoderDC(
            latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock",) * 2,
            decoder_block_types=("ResBlock",) * 2, encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()), downsample_block_type="conv",
            upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
            scaling_factor=0.4,
        ),
        text_encoder=language_model("Gemma2Model"), tokenizer=tokenizer(), scheduler=flow(),
    )  # fmt: skip


@family
def lumina_2() -> Any:
    return diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=8, in_channels=4, hidden_size=16, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
            num_kv_heads=1, multiple_of=16, cap_feat_dim=WIDTH, axes_dim_rope=(4, 2, 2), axes_lens=(512, 32, 32),
        ),
        vae=flux_vae(latent_channels=4), text_encoder=language_model("Gemma2Model"), tokenizer=tokenizer(),
        scheduler=flow(),
    )  # fmt: skip


@family
def chroma() -> Any:
    return diffusers.ChromaPipeline(
        transformer=diffusers.ChromaTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=16, approximator_layers=1,
            approximator_num_channels=16,
        ),
        text_encoder=t5(), tokenizer=tokenizer(), vae=flux_vae(), scheduler=flow(),
    )  # fmt: skip


@family
def cogview_4() -> Any:
    return diffusers.CogView4Pipeline(
        transformer=diffusers.CogView4Transformer2DModel(
            in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, out_channels=4,
            text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=4,
        ),
        vae=tiny.vae(), text_encoder=language_model("GlmForCausalLM"), tokenizer=tokenizer(),
        scheduler=flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"),
    )  # fmt: skip


@family
def cogview_3() -> Any:
    return diffusers.CogView3PlusPipeline(
        transformer=diffusers.CogView3PlusTransformer2DModel(
            in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, out_channels=4,
            text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=4, pos_embed_max_size=16, sample_size=8,
        ),
        vae=tiny.vae(), text_encoder=t5(), tokenizer=tokenizer(reads=224), scheduler=tiny.scheduler("DDIMScheduler"),
    )  # fmt: skip


@family
def aura_flow() -> Any:
    return diffusers.AuraFlowPipeline(
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
            num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=WIDTH, out_channels=4,
            pos_embed_max_size=64,
        ),
        text_encoder=t5("UMT5EncoderModel"), tokenizer=tokenizer(), vae=tiny.vae(), scheduler=flow(),
    )  # fmt: skip


@family
def hunyuan_dit() -> Any:
    words = tokenizer(reads=77)
    bert = transformers.BertConfig(
        vocab_size=264, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=80,
    )  # fmt: skip
    return diffusers.HunyuanDiTPipeline(
        transformer=diffusers.HunyuanDiT2DModel(
            sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
            cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH, pooled_projection_dim=16, hidden_size=16,
            activation_fn="gelu-approximate",
        ),
        vae=tiny.vae(), scheduler=tiny.scheduler("DDPMScheduler"), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, text_encoder=transformers.BertModel(bert).eval(), tokenizer=words,
        text_encoder_2=t5(), tokenizer_2=tokenizer(reads=256),
    )  # fmt: skip


@family
def kandinsky_3() -> Any:
    return diffusers.Kandinsky3Pipeline(
        unet=diffusers.Kandinsky3UNet(
            in_channels=4, time_embedding_dim=8, groups=2, attention_head_dim=4, layers_per_block=3,
            block_out_channels=(32, 64), cross_attention_dim=8, encoder_hid_dim=WIDTH,
        ),
        movq=diffusers.VQModel(
            block_out_channels=(32, 32), latent_channels=4, norm_num_groups=4, norm_type="spatial",
            num_vq_embeddings=12, vq_embed_dim=4, down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        ),
        text_encoder=t5(), tokenizer=tokenizer(), scheduler=tiny.scheduler("DDIMScheduler"),
    )  # fmt: skip


@family
def deepfloyd_if() -> Any:
    """Without an autoencoder: it paints pixels, and predicts their variance too."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=3, out_channels=6, block_out_channels=(32, 64), norm_num_groups=4,
        layers_per_block=1, attention_head_dim=4, cross_attention_dim=32, encoder_hid_dim=WIDTH,
        addition_embed_type="text", addition_embed_type_num_heads=2, act_fn="gelu", only_cross_attention=True,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift",
        cross_attention_norm="group_norm",
    )  # fmt: skip
    return diffusers.IFPipeline(
        tokenizer=tokenizer(reads=77), text_encoder=t5(), unet=unet, safety_checker=None, feature_extractor=None,
        watermarker=None, requires_safety_checker=False,
        scheduler=diffusers.DDPMScheduler(variance_type="learned_range", beta_schedule="squaredcos_cap_v2"),
    )  # fmt: skip


@family
def ovis_image() -> Any:
    return diffusers.OvisImagePipeline(
        transformer=diffusers.OvisImageTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8),
        ),
        vae=flux_vae(), text_encoder=language_model("Qwen3Model"), tokenizer=tokenizer(), scheduler=flow(),
    )  # fmt: skip


@family
def prx() -> Any:
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaConfig, T5GemmaModuleConfig
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    shape: dict[str, Any] = {
        "vocab_size": 264, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["full_attention"], "dropout_rate": 0.0,
        "query_pre_attn_scalar": 4, "pad_token_id": 0, "rms_norm_eps": 1e-6, "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 50.0, "sliding_window": 64,
        "attention_bias": False, "attention_dropout": 0.0,
    }  # fmt: skip
    config = T5GemmaConfig(encoder=T5GemmaModuleConfig(**shape), is_encoder_decoder=False, is_decoder=False, **shape)
    return diffusers.PRXPipeline(
        transformer=diffusers.PRXTransformer2DModel(
            patch_size=1, in_channels=4, context_in_dim=WIDTH, hidden_size=8, mlp_ratio=2.0, num_heads=2, depth=1,
            axes_dim=[2, 2],
        ),
        vae=flux_vae(latent_channels=4), text_encoder=T5GemmaEncoder(config).eval(), tokenizer=tokenizer(),
        scheduler=flow(),
    )  # fmt: skip


@family
def kolors() -> Any:
    """Stable Diffusion XL with a language model that makes the pooled embedding too; its vocabulary is trained here."""
    import io
    import tempfile
    from pathlib import Path

    import sentencepiece
    from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a fox and a rocket on a purple background"] * 9), model_writer=made, vocab_size=40,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    vocabulary = Path(tempfile.mkdtemp()) / "tokenizer.model"  # saving the pipeline copies it
    vocabulary.write_bytes(made.getvalue())
    config = ChatGLMConfig(
        num_layers=2, padded_vocab_size=64, hidden_size=WIDTH, ffn_hidden_size=24, kv_channels=8, num_attention_heads=2,
        multi_query_attention=True, add_qkv_bias=True, seq_length=256, original_rope=True,
    )  # fmt: skip
    text_encoder = ChatGLMModel(config).eval()
    for parameter in text_encoder.parameters():  # the class leaves them as memory was
        torch.nn.init.normal_(parameter, std=0.1)
    return diffusers.KolorsPipeline(
        vae=tiny.vae(), text_encoder=text_encoder, tokenizer=ChatGLMTokenizer(str(vocabulary)),
        unet=tiny.unet(
            cross_attention_dim=WIDTH, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=WIDTH + 6 * 4,
        ),
        scheduler=tiny.scheduler("EulerDiscreteScheduler"), force_zeros_for_empty_prompt=False,
    )  # fmt: skip
