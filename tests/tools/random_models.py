"""Random-weight FLUX.2 [klein] folders in diffusers' layout, made with diffusers' and transformers' own classes.

Needs torch. The weights come from numpy's generator and a seed, so a folder can be made again anywhere. They are scaled
such that every part matters: attention is not uniform, gates and modulations are of order 1, norms and statistics are
neither ones nor zeros, and a few projections are so small that a wrong `eps` shows.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.models.mistral3.configuration_mistral3 import Mistral3Config
from transformers.models.mistral3.modeling_mistral3 import Mistral3ForConditionalGeneration
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX, Qwen2Tokenizer
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM
from transformers.tokenization_utils_tokenizers import TokenizersBackend

VOCAB_SIZE = 512
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ADDED_TOKENS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
MISTRAL_TOKENS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% set text = message['content'][0]['text'] %}"
    "{% if message['role'] == 'system' %}{{ '[SYSTEM_PROMPT]' + text + '[/SYSTEM_PROMPT]' }}"
    "{% else %}{{ '[INST]' + text + '[/INST]' }}{% endif %}{% endfor %}"
)
# Of Mistral's tekken.json, and as transformers writes it into most tokenizer.json files.
TEKKEN_REGEX = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}"
    r"\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONVERTED_REGEX = PRETOKENIZE_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CORPUS = (
    "a red fox in the snow, a blue square left of a red circle on a green background",
    "the small picture of a house by the sea at night, with a cat and a dog in front of it",
    "make it autumn: change the colour of the leaves, remove the second circle, and keep everything else",
    "user assistant 一只红色的狐狸 一只蓝色的猫 在雪地里 très beau 🦊 🦊 don't we'll it's\n\n",
)


@dataclass(frozen=True)
class Size:
    """The dimensions in which the two random models differ."""

    heads: int
    head_dim: int
    double_blocks: int
    single_blocks: int
    encoder_hidden: int
    encoder_mlp: int
    encoder_layers: int
    encoder_heads: int
    encoder_head_dim: int
    vae_channels: tuple[int, ...]
    vae_layers: int
    latent_channels: int
    norm_groups: int


TINY = Size(2, 32, 1, 2, 64, 160, 4, 4, 32, (16, 16, 32, 32), 1, 8, 4)  # 0.9 M parameters
MEDIUM = Size(8, 128, 2, 4, 512, 1536, 8, 8, 128, (64, 128, 128, 128), 2, 32, 32)  # 0.18 G, klein's head size and rope

# (name, gain): a weight is normal with standard deviation gain / sqrt(inputs). The first match counts; 1 without one.
TRANSFORMER_GAINS = (
    (r"^x_embedder|^context_embedder", 0.05),  # the residual stream starts small: LayerNorm's eps shows
    (r"timestep_embedder|guidance_embedder", 2.0),
    (r"modulation", 1.0),
    (r"^transformer_blocks\.0\.attn\.(to_q|to_k|add_q_proj|add_k_proj)", 0.003),  # q and k so small that eps shows
    (r"norm_out", 1.5),
    (r"proj_out", 0.4),
)
ENCODER_GAINS = (
    (r"embed_tokens", 0.02),  # not divided by sqrt(inputs); so small that eps shows in the first layer
    (r"layers\.0\.self_attn\.(q_proj|k_proj)", 0.003),
    (r"mlp\.down_proj", 2.0),
)
VAE_GAINS = ((r"\.conv_in", 0.05), (r"attentions.*to_[qk]", 2.0), (r"decoder\.conv_out", 0.5))


def make_dev(folder: Path, size: Size, seed: int = 0, regex: str = TEKKEN_REGEX) -> None:
    """As `make`, of FLUX.2 [dev]. Its tokenizer stands where the pipeline has a processor, which adds pictures only."""
    rng = np.random.default_rng(seed)
    parts: list[Any] = [_transformer(size, guidance_embeds=True), _mistral(size), _vae(size)]
    for part, gains in zip(parts, (TRANSFORMER_GAINS, ENCODER_GAINS, VAE_GAINS), strict=True):
        _fill(part, rng, gains)
    _shrink_single_queries(parts[0])
    for part in parts:
        part.to(torch.bfloat16)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    transformer, encoder, vae = parts
    Flux2Pipeline(scheduler, vae, encoder, mistral_tokenizer(regex), transformer).save_pretrained(str(folder))


def _mistral(size: Size) -> Mistral3ForConditionalGeneration:
    text = {
        "model_type": "mistral",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": size.encoder_hidden,
        "intermediate_size": size.encoder_mlp,
        "num_hidden_layers": size.encoder_layers,
        "num_attention_heads": size.encoder_heads,
        "num_key_value_heads": size.encoder_heads // 2,
        "head_dim": size.encoder_head_dim,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e9,
        "sliding_window": None,
        "max_position_embeddings": 2048,
    }
    sees = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"model_type": "pixtral", "head_dim": 16, "image_size": 28, "patch_size": 14, **sees}
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision, image_token_index=5))


def mistral_tokenizer(regex: str = TEKKEN_REGEX) -> TokenizersBackend:
    """A byte-level BPE laid out as Mistral's: the special tokens are the first of the vocabulary."""
    trained = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(pattern=Regex(regex), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, letters])  # type: ignore[attr-defined]
    trainer = trainers.BpeTrainer(
        vocab_size=460,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(MISTRAL_TOKENS),
    )
    trained.train_from_iterator(CORPUS, trainer)
    trained.decoder = decoders.ByteLevel()  # type: ignore[attr-defined]
    bos = ("<s>", MISTRAL_TOKENS.index("<s>"))
    trained.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])  # type: ignore
    return TokenizersBackend(
        tokenizer_object=trained,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        chat_template=MISTRAL_TEMPLATE,
        model_max_length=4096,
    )


def make(folder: Path, size: Size, seed: int = 0, is_distilled: bool = True) -> None:
    """Write a whole pipeline folder: bfloat16 weights, the same for the same size and seed."""
    rng = np.random.default_rng(seed)
    transformer = _transformer(size)
    encoder = _encoder(size)
    vae = _vae(size)
    _fill(transformer, rng, TRANSFORMER_GAINS)
    _shrink_single_queries(transformer)
    _fill(encoder, rng, ENCODER_GAINS)
    _fill(vae, rng, VAE_GAINS)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    parts: list[Any] = [transformer, encoder, vae]
    for part in parts:
        part.to(torch.bfloat16)
    pipe = Flux2KleinPipeline(scheduler, vae, encoder, _tokenizer(), transformer, is_distilled=is_distilled)
    pipe.save_pretrained(str(folder))


def _transformer(size: Size, guidance_embeds: bool = False) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=4 * size.latent_channels,
        num_layers=size.double_blocks,
        num_single_layers=size.single_blocks,
        attention_head_dim=size.head_dim,
        num_attention_heads=size.heads,
        joint_attention_dim=3 * size.encoder_hidden,
        axes_dims_rope=(size.head_dim // 4,) * 4,
        guidance_embeds=guidance_embeds,
    )


def _encoder(size: Size) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=size.encoder_hidden,
        intermediate_size=size.encoder_mlp,
        num_hidden_layers=size.encoder_layers,
        num_attention_heads=size.encoder_heads,
        num_key_value_heads=size.encoder_heads // 2,
        head_dim=size.encoder_head_dim,
        max_position_embeddings=2048,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def _vae(size: Size) -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        block_out_channels=size.vae_channels,
        layers_per_block=size.vae_layers,
        latent_channels=size.latent_channels,
        norm_num_groups=size.norm_groups,
    )


def _tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE of a few hundred tokens, laid out as Qwen's: the added tokens follow the vocabulary."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.NFC()  # type: ignore[attr-defined]
    trained.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[attr-defined]
        [
            pre_tokenizers.Split(pattern=Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=460,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
    )
    trained.train_from_iterator(CORPUS, trainer)
    model = Qwen2Tokenizer(
        vocab=trained.get_vocab(),
        merges=_merges(trained),  # type: ignore[arg-type]
        eos_token="<|im_end|>",
        unk_token=None,  # type: ignore[arg-type]
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )
    model.add_tokens(list(ADDED_TOKENS))
    return model


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def _fill(module: torch.nn.Module, rng: np.random.Generator, gains: tuple[tuple[str, float], ...]) -> None:
    """Overwrite every parameter and buffer of `module`, in the order of their names."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for name in sorted(tensors):
            tensor = tensors[name]
            if name.endswith("num_batches_tracked") or "inv_freq" in name:
                continue
            values = _values(name, tuple(tensor.shape), rng, gains)
            tensor.copy_(torch.from_numpy(values.astype(np.float32)))


def _values(
    name: str, shape: tuple[int, ...], rng: np.random.Generator, gains: tuple[tuple[str, float], ...]
) -> np.ndarray:
    if name.endswith("running_mean"):
        return rng.normal(0, 0.5, shape)
    if name.endswith("running_var"):
        return np.exp(rng.uniform(np.log(0.01), np.log(3.0), shape))
    gain = next((g for pattern, g in gains if re.search(pattern, name)), 1.0)
    if name.endswith("bias"):
        return rng.normal(0, 0.2 * min(gain, 1.0), shape)
    if len(shape) == 1:
        wide = re.search(r"norm_(added_)?[qk]\.|[qk]_norm\.", name) is not None
        return rng.uniform(1.0, 2.4, shape) if wide else rng.uniform(0.6, 1.5, shape)
    inputs = 1 if "embed_tokens" in name else int(np.prod(shape[1:]))
    return rng.standard_normal(shape, dtype=np.float32) * (gain / np.sqrt(inputs))


def _shrink_single_queries(transformer: Flux2Transformer2DModel) -> None:
    """Make q and k of the first single block as small as those of the first double block."""
    weight = dict(transformer.named_parameters())["single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight"]
    with torch.no_grad():
        weight[: 2 * transformer.inner_dim] *= 0.003
