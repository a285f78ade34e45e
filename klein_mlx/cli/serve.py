"""`klein-mlx serve`: the studio page and the HTTP server. MLX is not loaded here: the server's worker does that."""

import argparse
import logging
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

from klein_mlx.cli.options import BITS, DEFAULT_MODEL, add_options, typed_options
from klein_mlx.cli.output import note, say, say_json
from klein_mlx.cli.settings import read_settings
from klein_mlx.config import PARTS
from klein_mlx.errors import KleinError, RequestError

EXTRA = "the server needs three packages: pip install starlette uvicorn python-multipart"
_OBTAIN = (
    "import sys; sys.path[:] = sys.argv[2:]; from klein_mlx.cli.serve import obtain_here; obtain_here(sys.argv[1])"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `klein-mlx serve` takes."""
    add_model_arguments(parser)
    add = parser.add_argument
    add("--demo", action="store_true", help="the built-in toy model: try the page without a download")
    add("--host", default="127.0.0.1", help="address to listen at; other than loopback needs --token")
    add("--port", type=int, default=7860, help="port to listen at (default: 7860; 0: a free one)")
    add("--token", nargs="?", const="", metavar="TOKEN", help="require a token; without a value one is generated")
    add("--open", action="store_true", help="open the page in the browser")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="HOST",
        help="also answer to this host name (repeat for more)",
    )
    add("--allow-origin", action="append", default=[], metavar="ORIGIN", help="let pages of this origin use the API")
    add("--save", type=Path, metavar="DIR", help="keep every finished picture in this folder")
    add("--queue", type=int, default=16, metavar="N", help="requests that may wait (default: 16)")
    add("--any-model", action="store_true", help='accept any model\'s name in requests, such as "gpt-image-1"')
    add("--log-prompts", action="store_true", help="write prompts to the log")
    add("--quiet", action="store_true", help="only errors on stderr")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it is loaded."""
    add_options(
        parser, ("model", *BITS, "transformer", "text_encoder", "vae", "variant", "dtype", "keep", "prompt_cache")
    )
    add_options(parser, ("lora_folder", "offline", "yes"))
    parser.add_argument(
        "--idle-unload",
        type=float,
        default=10.0,
        metavar="MIN",
        help="minutes until an idle model is freed; 0: never (default: 10)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted. Returns the exit code; raises KleinError."""
    if args.demo and args.model not in (None, "tiny"):
        raise RequestError(f"--demo uses tiny, and --model is {args.model}; give one of them")
    _check(args)
    try:
        from klein_mlx.server.serving import serve
        from klein_mlx.server.settings import Settings
    except ImportError as error:
        raise RequestError(f"{EXTRA} ({error.name} is missing)") from None
    args.model = "tiny" if args.demo else args.model
    model, name = obtained(args)
    settings = Settings(
        model=model,
        pipeline=pipeline_arguments(args),
        aliases=tuple({name} - {model}),
        host=args.host,
        port=args.port,
        token=_token(args),
        hosts=tuple(args.allow_host),
        origins=tuple(args.allow_origin),
        save=args.save,
        queue=args.queue,
        idle_seconds=60 * args.idle_unload,
        any_model=args.any_model,
        log_prompts=args.log_prompts,
        loras=lora_folder(args),
    )
    log_to_stderr(args.quiet)

    def ready(url: str) -> None:
        say(url)
        sys.stdout.flush()
        if args.open:
            import webbrowser

            webbrowser.open(url)

    serve(settings, ready)
    return 0


def obtained(args: argparse.Namespace) -> tuple[str, str]:
    """(folder or hub id, name) of the model, downloaded first if the user agrees, as are parts from elsewhere; these
    stand in `args` as what they mean then.

    In a process of its own: looking for a model loads MLX, which the server must not.
    """
    typed_options(args)
    config = read_settings()
    name = args.model or config.values.get("model") or DEFAULT_MODEL
    bits = _bits(args)
    parts = {part: value for part in PARTS if (value := getattr(args, part))}
    if name == "tiny" and not (bits or parts or args.variant):
        return name, name
    import json

    own = {"variant": args.variant, "own": dict(config.models), "consent": (args.offline, args.yes)}
    words = json.dumps({"model": name, "parts": parts, "bits": bits, **own})
    done = subprocess.run([sys.executable, "-P", "-c", _OBTAIN, words, *sys.path], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    model, meant = json.loads(done.stdout)
    vars(args).update(meant)
    return model, name


def obtain_here(words: str) -> None:
    """The process of `obtained`: print where the model and its parts are."""
    import json

    from klein_mlx.cli.download import Consent, obtain, obtain_part
    from klein_mlx.formats.open import open_model
    from klein_mlx.weights.bits import from_options

    told = json.loads(words)
    try:
        if told["bits"]:
            from_options(*told["bits"])
        options = {"own": told["own"], "consent": Consent(*told["consent"])}
        parts = {part: obtain_part(part, value, **options) for part, value in told["parts"].items()}
        model = obtain(told["model"], parts=[part for part in PARTS if part not in parts], **options)
        open_model(model, parts=parts, variant=told["variant"], local_files_only=True)  # or every client would be told
        say_json([str(model), parts])
    except KleinError as error:
        note(f"error: {error}")
        raise SystemExit(2) from None


def _bits(args: argparse.Namespace) -> list[Any] | None:
    """The options that quantize, as `klein_mlx.weights.bits.from_options` takes them; None where none is given."""
    given = [args.quantize, args.group_size, args.transformer_bits, args.text_encoder_bits, args.quantize_layer or []]
    return given if any(given) else None


def pipeline_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What `KleinPipeline.from_pretrained` takes besides the model, JSON values."""
    from_options = {
        "bits": _bits(args),
        "dtype": args.dtype,
        "keep": args.keep,
        "prompt_cache": args.prompt_cache,
        "vae": args.vae,
        "transformer": args.transformer,
        "text_encoder": args.text_encoder,
        "variant": args.variant,
    }
    found = {name: value for name, value in from_options.items() if value is not None}
    return {**found, "local_files_only": True}


def lora_folder(args: argparse.Namespace) -> str | None:
    """Where LoRAs are looked up: as typed, or the config's; None for the usual place."""
    folder = args.lora_folder or read_settings().folders.get("loras")
    return None if folder is None else str(folder)


def _check(args: argparse.Namespace) -> None:
    typed_options(args)
    if not 0 <= args.port <= 65535:
        raise RequestError(f"--port is {args.port}; it must be from 0 to 65535")
    if not 1 <= args.queue <= 1000:
        raise RequestError(f"--queue is {args.queue}; it must be from 1 to 1000")
    if not 0 <= args.idle_unload < 1e6:
        raise RequestError(f"--idle-unload is {args.idle_unload:g}; it must be minutes, 0 or more")
    if args.quiet and args.log_prompts:
        raise RequestError("--log-prompts writes to the log, which --quiet silences; give one of them")
    if args.save is not None and not (args.save.is_dir() and os.access(args.save, os.W_OK)):
        raise RequestError(f"--save {args.save} is not a folder that can be written to; make it first")


def _token(args: argparse.Namespace) -> str | None:
    """The token that clients must present. RequestError where the network could connect without one."""
    from klein_mlx.server.settings import LOOPBACK

    if args.token is None and args.host not in LOOPBACK:
        raise RequestError(
            f"--host {args.host} lets other machines connect; add a token: --token {secrets.token_urlsafe(18)}"
        )
    if args.token is not None and args.token != "" and len(args.token) < 8:
        raise RequestError("--token is too short; it must have 8 characters or more")
    return secrets.token_urlsafe(18) if args.token == "" else args.token


def log_to_stderr(quiet: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("klein_mlx")
    log.handlers = [handler]  # instead of the one that prints notes
    log.setLevel(logging.ERROR if quiet else logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
