"""What other programs call an option or a command: mflux, mlx-lm, diffusers' scripts, flux2.c, sd-scripts."""

import re
from collections.abc import Collection

from klein_mlx.errors import nearest

_USE = {  # an option as it is spelled elsewhere -> here; of use where the command knows all the flags on the right
    "--cfg --cfg-scale --true-cfg-scale --distilled-guidance": "--guidance",
    "--neg": "--negative",
    "--lora-scale --lora-scales --lora-weights --lora-weight": "--lora FILE:SCALE",
    "--lora-path --lora-paths": "--lora FILE, once for each",
    "--lora-dir --lora-model-dir": "--lora-folder",
    "--low-ram --low-memory --lowvram --medvram --offload-to-cpu --cpu-offload --vae-on-cpu --clip-on-cpu": (
        "--keep nothing, and fewer bits: -q 4"
    ),
    "--bits --q-bits --type --quantization": "--quantize",
    "--precision --torch-dtype": "--dtype",
    "--diffusion-model --unet --dit": "--transformer",
    "--llm --clip --clip-l --t5xxl --qwen": "--text-encoder",
    "--vae-path": "--vae",
    "--aspect --aspect-ratio": "--size 16:9",
    "--resolution --width --height -W -H": "--size 1024x768",
    "--batch --batch-size --batch-count -b --num-images --auto-seeds --samples --num-samples --n-iter --repeat": (
        "--count"
    ),
    "--num-steps --n-steps": "--steps",
    "--image-path --image-paths --images --input --reference -r --ref-image --ref --control-image": (
        "--image, once for each"
    ),
    "--controlnet --control-net --ip-adapter": "--image: a reference image guides the picture",
    "--image-strength --denoise --denoising-strength": "--init-image and --strength",
    "--sampling-steps --iters": "--steps",
    "--schedule --shift --sigma-schedule": "--sigmas for noise levels of your own",
    "--preview": "--show-steps",
    "--upscale --upscaler --upscale-model --hires-fix --hires": "--size 2mp: there is no upscaler",
    "--mask-path --masked-image-path": "--mask",
    "--path --dir -d --base-model --model-path --hf-path": "--model",
    "--out --outfile --output-path --output-file": "--output",
    "--output-dir --out-dir --outdir --outputs-dir --outpath": "--output FOLDER",
    "--output-format --extension": "--format",
    "--config-from-metadata": "klein-mlx again PICTURE",
    "--stepwise-image-output-dir": "--show-steps",
    "--hf-token --token": "the environment variable HF_TOKEN, or hf auth login",
    "--no-download": "--offline",
    "--disable-tqdm --no-progress": "--quiet",
}
_LEFT_OUT = {  # likewise -> why it is not needed
    "--metadata": "recipes are kept unless you add --no-metadata",
    "--device --mlx --metal --mps --gpu": "MLX uses the GPU by itself",
    "--scheduler --sampler --sampler-name --sampling-method": "the sampler is Euler's",
    "--vae-tiling --vae-slicing": "the VAE decodes in strips by itself, exactly",
    "--threads -t": "MLX chooses its threads",
    "--flash-attention --flash-attn --fa --diffusion-fa --xformers": "MLX has an attention kernel of its own",
    "--clip-skip": "the checkpoint says which layers are used",
    "--style --styles": "describe the style in the prompt",
    "--compile": "blocks are compiled by themselves",
    "--mlx-cache-limit --mlx-cache-limit-gb": "memory is planned by itself",
    "--verbose -v": "progress goes to stderr anyway",
    "--gradient-checkpointing": "memory is planned by itself",
}
_OF_COMMANDS = {
    "convert": {
        "-m --model -o --output --hf-path --mlx-path": "klein-mlx convert SOURCE DESTINATION",
        "--upload-repo": "--upload owner/name",
    },
    "bench": {"-n --count --iterations --num-runs": "--runs"},
    "info": {"-i --image": "--references N"},
    "serve": {
        "-p": "--port",
        "--api-key": "--token",
        "--listen": "--host 0.0.0.0 --token",
        "--cors --cors-origins": "--allow-origin",
    },
    "train": {
        "--lr": "--learning-rate",
        "--quantize --q-bits": "--bits",
        "--low-ram --low-memory --lowvram": "--bits 4",
        "--alpha --lora-alpha --network-alpha": "--rank: alpha is equal to it",
        "--epochs --num-train-epochs --max-train-epochs --iters --max-train-steps --train-steps": "--steps",
        "--batch-size --train-batch-size": "--batch",
        "--data --dataset --instance-data-dir --train-data-dir": "klein-mlx train DATA -o NAME.safetensors",
        "--instance-prompt --caption": "--prompt",
        "--network-dim --lora-rank": "--rank",
        "--gradient-accumulation-steps --grad-accumulate": "--accumulate",
        "--output-dir --out-dir --outdir --output-name": "-o NAME.safetensors",
        "--validation-prompt --sample-prompts": "--preview",
        "--max-grad-norm": "--clip",
        "--lr-scheduler --scheduler": "--schedule",
        "--lr-warmup-steps --warmup-steps": "--warmup",
        "--checkpointing-steps --save-every-n-steps": "--save-every",
        "--resume-from-checkpoint": "--resume RUN",
        "--pretrained-model-name-or-path": "--model",
        "--mixed-precision": "--dtype",
        "--size --width --height": "--resolution",
        "--use-8bit-adam": "--optimizer adafactor",
    },
}
_COMMANDS = {  # a command that is not one -> what was meant
    "list ls": "models",
    "pull download": "models pull NAME",
    "rm remove delete": "models rm NAME",
    "quantize quantise": "convert MODEL FOLDER -q 4",
    "benchmark": "bench",
    "finetune": "train",
    "ui gui web studio": "serve --open",
    "edit img2img inpaint": '"PROMPT" -i FILE',
    "version": "--version",
}


def _row(table: dict[str, str], word: str) -> str | None:
    return next((value for names, value in table.items() if word in names.split()), None)


def _flags(words: str) -> set[str]:
    return set(re.findall(r"(?<!\S)--?[a-z][\w-]*", words))


def option_hint(option: str, known: Collection[str], command: str) -> str:
    """What to write for an option that a command does not know, as the end of a sentence; "" where nothing is near."""
    plain = option.replace("_", "-")
    for table in (_OF_COMMANDS.get(command, {}), _USE):
        if (use := _row(table, plain)) and ("klein-mlx" in use or _flags(use) <= set(known)):
            return f"; use {use}"
    if (why := _row(_LEFT_OUT, plain)) and _flags(why) <= set(known):
        return f"; leave it out: {why}"
    near = nearest(plain.lstrip("-"), (by_name := {name.lstrip("-"): name for name in known}))
    return f"; did you mean {by_name[near]}?" if near else ""


def command_hint(word: str, commands: Collection[str]) -> str | None:
    """The command line that was probably meant by a first word that is not a command, without klein-mlx; or None."""
    if word in ("interactive", "repl"):
        return ""
    if found := _row(_COMMANDS, word):
        return found
    return nearest(word, commands)
