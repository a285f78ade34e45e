"""What a run will do, before anything is loaded: the data's table, the model, the bits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from klein_mlx.config import TINY, VARIANTS, ModelConfig
from klein_mlx.errors import RequestError, human_bytes
from klein_mlx.formats.open import open_model
from klein_mlx.runtime.memory import compute_dtype
from klein_mlx.train.dataset import Item, Table, check_items, split_held_out
from klein_mlx.train.memory import TrainEstimate, check_training_fits, estimate_training
from klein_mlx.train.options import TrainOptions, table
from klein_mlx.weights.bits import Asked, parse, settle
from klein_mlx.weights.checkpoint import Source, read_tokenizer
from klein_mlx.weights.quantize import Quantization


@dataclass(frozen=True)
class Plan:
    """options: checked. quantization: of parts that are quantized while loading. cut: captions over the model's text
    length, with how many tokens that is too many."""

    options: TrainOptions
    source: Source
    table: Table
    dtype: mx.Dtype
    quantization: Mapping[str, Quantization]
    training: list[Item]
    held_out: list[Item]
    estimate: TrainEstimate
    cut: list[tuple[str, int]] = field(default_factory=list)

    @property
    def captions(self) -> list[str]:
        """All that have to be encoded."""
        options, captions = self.options, [item.caption or "" for item in self.table.items]
        kept = [class_caption(options, caption) for caption in captions] if options.keep else []
        return [*captions, *kept, *([""] if options.dropout > 0 else [])]

    def lines(self) -> list[str]:
        """For a person."""
        told = self.table.lines()
        if self.cut:
            caption, count = self.cut[0]
            told.append(f"cut        {len(self.cut)} captions are too long, {caption[:30]!r} by {count} tokens")
        for name, why in self.options.unused().items():
            if getattr(self.options, name) != table()[name].default:
                told.append(f"ignored    {name}: {why}")
        told += [self.estimate.line(), self._disk(), self._time()]
        return [*told, f"held out   {len(self.held_out)} of {len(self.table.items)}"]

    def _disk(self) -> str:
        """What the run's folder will hold of encoded samples."""
        config, wide = self.source.config, 2 if self.dtype == mx.bfloat16 else 4
        captions = len(dict.fromkeys(self.captions))
        embeds = captions * config.max_sequence_length * config.transformer.joint_attention_dim * wide
        pixels = sum(w * h for item in self.table.items for w, h in (item.size, *item.reference_sizes))
        latents = pixels // config.pixels_per_token**2 * config.transformer.in_channels * wide
        if self.options.flip:
            latents *= 2
        return f"on disk    {human_bytes(embeds)} for {captions} captions, {human_bytes(latents)} for pictures"

    def _time(self) -> str:
        """An update's arithmetic with the largest sample; on an Apple chip how long the run will take."""
        from klein_mlx.bench.predict import EFFICIENCY, find_chip

        options, config = self.options, self.source.config
        c, largest = config.transformer, _largest(self.table.items)
        pixels = sum(w * h for w, h in (largest.size, *largest.reference_sizes))
        tokens = config.max_sequence_length + pixels // config.pixels_per_token**2
        single = (4 * c.hidden_size + 3 * c.mlp_size) * c.hidden_size  # weights that a token meets in any block
        forward = (c.num_layers + c.num_single_layers) * tokens * (2 * single + 4 * tokens * c.hidden_size)
        passes = 4 if options.method == "full" else 3  # forward, again, back to the inputs; back to the weights
        work = passes * forward * options.batch * (options.accumulate or 1) * (2 if options.keep else 1)
        told = f"time       {work / 1e12:.3g} TFLOP an update"
        chip = find_chip(str(mx.device_info().get("device_name", "")))
        if chip is None:
            return told
        seconds = work / (chip.tflops * 1e12 * EFFICIENCY[chip.generation][1])
        return f"{told}: {seconds:.2g} s on {chip.name}, {options.steps * seconds / 3600:.2g} hours in all (estimates)"


def _largest(items: Sequence[Item]) -> Item:
    return max(items, key=lambda item: sum(w * h for w, h in (item.size, *item.reference_sizes)))


def class_caption(options: TrainOptions, caption: str) -> str:
    """A caption with the class in the trigger's place."""
    return caption.replace(options.trigger or "", options.keep or "")


def make_plan(options: TrainOptions) -> Plan:
    """Check options, model and data. Raises RequestError and CheckpointError."""
    options = options.checked()
    source = open_model(options.model)
    config = source.config
    check_variant(config, options)
    dtype = training_dtype(options.dtype)
    if options.method == "full" and "transformer" in source.quantization:
        raise RequestError(f"model is {options.model!r}, which is quantized; full training starts from the original")
    quantization = settle(_bits(options), source)
    table = check_items(options, config.pixels_per_token)
    tokenizer = read_tokenizer(source.tokenizer_file, config.text_encoder.vocab_size)
    captions = list(dict.fromkeys(item.caption or "" for item in table.items))
    over = tokenizer(captions, config.max_sequence_length).cut
    cut = [(caption, count) for caption, count in zip(captions, over, strict=True) if count]
    training, held_out = split_held_out(table.items, options.held_out_of(len(table.items)), options.seed)
    largest = _largest(table.items)
    known = estimate_training(source, options, dtype, quantization, largest.size, largest.reference_sizes)
    check_training_fits(source, options, known, dtype, largest.size)
    return Plan(options, source, table, dtype, quantization, training, held_out, known, cut)


def training_dtype(asked: mx.Dtype | str | None) -> mx.Dtype:
    """As for pictures, but for float16. Raises RequestError where that is asked for."""
    dtype = compute_dtype(asked)
    if dtype != mx.float16:
        return dtype
    if asked is None:
        return mx.bfloat16  # what is fastest for pictures is none of training's
    raise RequestError("dtype is 'float16'; training is done in bfloat16 or float32")


def _bits(options: TrainOptions) -> Asked | None:
    try:
        return parse(options.bits)
    except RequestError as error:
        raise RequestError(error.told({"quantize": "bits"})) from None


def check_variant(config: ModelConfig, options: TrainOptions) -> None:
    """Distilled models lose their few steps when they are trained plainly; tiny was made to be."""
    variant = config.variant
    if variant.embeds_guidance:
        raise RequestError(f"model is {options.model!r}, which is {variant.family}; FLUX.2 [klein] can be trained")
    if not config.is_distilled or variant is TINY or variant.hub_id is None or options.anyway:
        return
    base = next(v for v in VARIANTS if v.dimensions == variant.dimensions and not v.is_distilled)
    raise RequestError(
        f"model is {options.model!r}, which is distilled and would lose its few steps; train {base.name}, whose LoRAs"
        " work on it, or give --anyway"
    )


def partner(config: ModelConfig) -> str | None:
    """The distilled variant on which a base model's LoRAs are used; None for any other model."""
    variant = config.variant
    if config.is_distilled or variant.hub_id is None:
        return None
    return next(v.name for v in VARIANTS if v.dimensions == variant.dimensions and v.is_distilled)
