"""`klein-mlx` alone in a terminal: a session with the model kept in memory; a line is a prompt or a command."""

import argparse
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klein_mlx.cli.options import (
    FLAGS,
    asked_loras,
    bits_given,
    call_arguments,
    in_options,
    lora_options,
    parse_size,
    typed_options,
)
from klein_mlx.errors import KleinError, RequestError, Stopped, nearest

if TYPE_CHECKING:
    from PIL import Image

    from klein_mlx.cli.options import RunOptions
    from klein_mlx.pipeline import KleinPipeline

PROMPT = "klein> "
HISTORY = 1000  # lines that are kept
NOT_OF_A_SESSION = ("output", "grid", "json", "enhance", "force", "open", "progress_format")
WELCOME = "{model}. Type a prompt; !help lists commands; Ctrl-C cancels a picture, Ctrl-D ends the session."
HELP = """type a prompt to make a picture; {red|blue} and __name__ vary it by its seed
  512x768 a lighthouse     its size first
  $ make it autumn         changes the last picture; $2 the second; several make several references; $$ is a dollar sign
  !seed 7                  the seed of all that follows; !seed random
  !size 768x1024           the size of all that follows; !size 16:9, !size 2mp; !size default
  !steps 8                 denoising steps; !steps default
  !model 4b-q4             another model, with its own defaults; !model
  !guidance 4              guidance scale, with base variants; !negative TEXT: what to steer away from
  !lora FILE:0.8           applies a LoRA; !lora off
  !open 2                  opens picture 2, or the last, in the system's viewer
  !show 2                  draws picture 2, or the last; !show on, !show off: draw each; !show steps: sketches too
  !save fox.png            writes the last picture there too; !save fox.png $2 the second
  !undo                    forgets the last picture (its file stays)
  !help, !quit"""


@dataclass(frozen=True)
class Asked:
    """A line that asks for a picture. references: numbers of earlier pictures, from 1. size: width, height or None."""

    prompt: str
    references: list[int] = field(default_factory=list)
    size: tuple[int, int] | None = None


def read_prompt(line: str, pictures: int) -> Asked:
    """A prompt's line taken apart. pictures: how many there are to refer to. Raises RequestError for any other $N."""
    size, text = None, line.strip()
    if found := re.match(r"(\d{2,5})x(\d{2,5})\s+(?=\S)", text):
        size, text = (int(found[1]), int(found[2])), text[found.end() :]
    references: list[int] = []

    def refer(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        references.append(_number(found[1], pictures))
        return " "

    text = re.sub(r"\$\$|\$(\d*)(?!\w|[.,]\d)", refer, text)
    text = " ".join(text.split())
    if not text:
        raise RequestError("this line has no prompt; for example: $ make it autumn")
    return Asked(text, references, size)


def _number(text: str, pictures: int) -> int:
    """Which picture "2" or "$2" means; nothing means the last."""
    text = text.removeprefix("$")
    number = int(text) if text.isdecimal() else pictures if not text else 0
    if not 1 <= number <= pictures:
        there = f"there are $1 to ${pictures}" if pictures else "there are none yet"
        raise RequestError(f"${text} is not a picture of this session, {there}; $$ is a dollar sign")
    return number


@dataclass
class Session:
    """What a session remembers. say: prints a line for the user. settings: arguments of `stream` for every picture.

    suffix: of the pictures' names. metadata: whether they hold their recipes. bits: what those say of the weights'.
    loras: arguments of `load_lora` for every LoRA. vary: a prompt and its pictures' seeds -> each picture's prompt.
    reopen: opens another model by its name.
    """

    pipe: "KleinPipeline"
    settings: dict[str, Any]
    say: Callable[..., None]
    show: bool = False
    show_steps: bool = False
    suffix: str = ".png"
    metadata: bool = True
    bits: Mapping[str, Any] = field(default_factory=dict)
    loras: Mapping[str, Any] = field(default_factory=dict)
    vary: Callable[[str, Sequence[int]], list[str]] = lambda prompt, seeds: [prompt] * len(seeds)
    reopen: "Callable[[str], KleinPipeline] | None" = None
    model: str = ""
    pictures: "list[tuple[Image.Image, Path]]" = field(default_factory=list)
    recipes: dict[Path, dict[str, Any]] = field(default_factory=dict)

    def line(self, line: str) -> bool:
        """Do what a line says; False if it ends the session. Raises KleinError, and KeyboardInterrupt for Ctrl-C."""
        line = line.strip()
        if not line:
            return True
        if line.lower() in ("quit", "exit", "help"):
            line = f"!{line.lower()}"
        elif re.fullmatch(r"\d{2,5}x\d{2,5}", line):
            line = f"!size {line}"
        if not line.startswith("!"):
            self.draw(read_prompt(line, len(self.pictures)))
            return True
        name, _, rest = line[1:].partition(" ")
        if name in ("quit", "exit", "q"):
            return False
        commands = [one.removeprefix("do_") for one in dir(self) if one.startswith("do_")]
        if name not in commands:
            near = nearest(name, [*commands, "quit"])
            raise RequestError(f"!{name} is not a command" + (f"; did you mean !{near}?" if near else "; see !help"))
        getattr(self, f"do_{name}")(rest.strip())
        return True

    def draw(self, asked: Asked) -> None:
        """Make a picture, save it under a new name, and show it."""
        from klein_mlx.cli.terminal import keep_sketches

        settings = dict(self.settings)
        if asked.references:
            settings["image"] = [self.pictures[number - 1][0] for number in asked.references]
        if asked.size:
            settings["width"], settings["height"] = asked.size
        if self.show_steps and self.pipe.sketcher is None:
            keep_sketches(self.pipe)
        seeds = self._seeds(settings)
        prompts = self.vary(asked.prompt, seeds)
        if set(prompts) == {asked.prompt}:
            self._draw(asked.prompt, settings)
            return
        for prompt, seed in zip(prompts, seeds, strict=True):
            self.say(prompt)
            extra = {"template": asked.prompt} if prompt != asked.prompt else {}
            self._draw(prompt, settings | {"seed": seed, "num_images_per_prompt": 1}, extra)

    def _draw(self, prompt: str, settings: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> None:
        """Pictures of one prompt. extra: what their recipes say besides."""
        from klein_mlx.cli.batch import free_names, pictures
        from klein_mlx.cli.terminal import view_of
        from klein_mlx.images.saving import save_image_free

        run = self.pipe.stream(prompt, **settings)
        seeds = [seed for _, seed in run.request.pictures]
        names = free_names(prompt, seeds, self.suffix)
        try:
            images = pictures(run, quiet=False, view=view_of(self.show, self.show_steps))
            for picture, path, seed in zip(images, names, seeds, strict=True):
                recipe = {**picture.recipe, **(extra or {}), **self.bits} if self.metadata else None
                path = save_image_free(picture.image, path, recipe)
                self.pictures.append((picture.image, path))
                if recipe is not None:
                    self.recipes[path] = recipe
                self.say(f"${len(self.pictures)}  {path}  seed {seed}  {sum(run.seconds.values()):.1f} s")
        finally:
            run.close()

    def _seeds(self, settings: Mapping[str, Any]) -> list[int]:
        """Every picture's seed; drawn once here, and noted in `settings`, where none is set."""
        seed, count = settings.get("seed"), settings.get("num_images_per_prompt") or 1
        if isinstance(seed, list):
            return seed
        first = secrets.randbits(32) if seed is None else seed
        return list(range(first, first + count))

    def do_model(self, rest: str) -> None:
        """Another model in this one's place, with the LoRAs and the size, steps and guidance that are its own."""
        if rest and self.reopen:
            self.pipe, self.model = self.reopen(rest), rest
            self.settings |= dict.fromkeys(("width", "height", "num_inference_steps", "guidance_scale"))
        self.say(f"model {self.pipe.config.variant.name}: {self.model}")

    def do_help(self, rest: str) -> None:
        self.say(*HELP.split("\n"))

    def do_seed(self, rest: str) -> None:
        if rest in ("random", "default"):
            self.settings["seed"] = None
        elif rest:
            self._try(seed=_whole("!seed", rest))
        self.say(f"seed {'random' if self.settings['seed'] is None else self.settings['seed']}")

    def do_size(self, rest: str) -> None:
        found = re.fullmatch(r"(\d{1,5})\s*[x ]\s*(\d{1,5})", rest)
        if found:
            self._try(width=int(found[1]), height=int(found[2]))
        elif rest == "default":
            self._try(width=None, height=None)
        elif rest:
            config = self.pipe.config
            try:
                width, height = parse_size(rest, config.pixels_per_token, config.default_size)
            except RequestError as error:
                raise RequestError(f"{error.told({'--size': '!size'})}, or default") from None
            self._try(width=width, height=height)
        width, height = self.settings["width"], self.settings["height"]
        side = self.pipe.config.default_size
        self.say(f"size {width}x{height}" if width else f"size {side}x{side}, or that of the picture to change")

    def do_steps(self, rest: str) -> None:
        if rest:
            self._try(num_inference_steps=None if rest == "default" else _whole("!steps", rest))
        self.say(f"steps {self.settings['num_inference_steps'] or self.pipe.config.variant.steps}")

    def do_guidance(self, rest: str) -> None:
        if rest:
            try:
                value = None if rest == "default" else float(rest)
            except ValueError:
                raise RequestError(f"!guidance is {rest[:40]!r}; it must be a number, or default") from None
            self._try(guidance_scale=value)
        value = self.settings["guidance_scale"]
        self.say(f"guidance {self.pipe.config.variant.guidance if value is None else value:g}")

    def do_negative(self, rest: str) -> None:
        if rest:
            text = None if rest == "default" else rest
            self._try(negative_prompt=text, guidance_scale=self.settings["guidance_scale"])
        self.say(f"negative {self.settings['negative_prompt'] or 'none'}")

    def do_lora(self, rest: str) -> None:
        if rest in ("off", "none"):
            self.pipe.unload_lora()
        elif rest:
            ((path, scale),) = asked_loras([rest])
            self.pipe.load_lora(path, scale, **self.loras)
        self.say(", ".join(f"{one.name}:{one.scale:g}" for one in self.pipe.loras) or "no LoRA")

    def do_open(self, rest: str) -> None:
        from klein_mlx.cli.generate import open_files

        _, path = self.pictures[_number(rest, len(self.pictures)) - 1]
        open_files([str(path)])

    def _try(self, **settings: Any) -> None:
        """Take settings over if a request could have them."""
        from klein_mlx.request import check

        check(self.pipe.config, prompt="x", **settings)
        self.settings |= settings

    def do_show(self, rest: str) -> None:
        from klein_mlx.cli.terminal import show

        if rest in ("on", "off", "steps"):
            self.show, self.show_steps = rest != "off", rest == "steps"
            self.say(f"show {rest}")
            return
        image, path = self.pictures[_number(rest, len(self.pictures)) - 1]
        if not show(image, sys.stdout):
            self.say(f"this terminal cannot show pictures; it is in {path}")

    def do_save(self, rest: str) -> None:
        from klein_mlx.images.saving import save_image

        path, _, number = rest.partition(" $")
        if not path.strip():
            raise RequestError("!save needs a name; for example: !save fox.png")
        image, made = self.pictures[_number(number.strip(), len(self.pictures)) - 1]
        save_image(image, Path(os.path.expanduser(path.strip())), recipe=self.recipes.get(made))
        self.say(path.strip())

    def do_undo(self, rest: str) -> None:
        if not self.pictures:
            raise RequestError("there is no picture to forget")
        _, path = self.pictures.pop()
        self.say(f"${len(self.pictures) + 1} is forgotten; {path} stays")


def _whole(what: str, text: str) -> int:
    if not re.fullmatch(r"-?\d{1,30}", text):
        raise RequestError(f"{what} is {text!r}; it must be a whole number, or default")
    return int(text)


# ---- the terminal ----


def run(args: argparse.Namespace) -> int:
    """A session with the options that were given, until Ctrl-D or !quit. Returns the exit code; raises KleinError."""
    from klein_mlx.cli.output import note, say
    from klein_mlx.cli.settings import complete

    typed = typed_options(args)
    for name in NOT_OF_A_SESSION:
        if name in typed and typed[name] != "bar":
            raise RequestError(f"{FLAGS[name]} needs a prompt; a session, which begins without one, does not take it")
    options = complete(typed, session=True)
    configured = [FLAGS[name] for name in NOT_OF_A_SESSION if getattr(options, name) not in (None, False, "bar")]
    if configured and not options.quiet:
        note(f"a session does not take {', '.join(configured)} from the config")
    session = _session(options)
    if not options.quiet:
        say(WELCOME.format(model=f"{session.pipe.config.variant.name}: {options.model}"))
    with _history():
        while True:
            try:
                line = input(PROMPT)
            except EOFError:
                say("")
                return 0
            except Stopped:
                raise
            except KeyboardInterrupt:
                say("", "(!quit or Ctrl-D ends the session)")
                continue
            try:
                if not session.line(line):
                    return 0
            except Stopped:
                raise
            except KeyboardInterrupt:
                say("", "cancelled")
            except KleinError as error:
                note(f"error: {in_options(error)}")


def _session(options: "RunOptions") -> Session:
    from klein_mlx.cli.generate import open_pipeline
    from klein_mlx.cli.output import say
    from klein_mlx.cli.prompts import expand, is_template
    from klein_mlx.cli.terminal import protocol

    pipe = open_pipeline(options)
    draws = (options.show or not options.quiet) and protocol(os.environ) is not None

    def reopen(model: str) -> "KleinPipeline":
        return open_pipeline(replace(options, model=model, revision=None))

    def vary(prompt: str, seeds: Sequence[int]) -> list[str]:
        if options.no_wildcards or not is_template(prompt):
            return [prompt] * len(seeds)
        return [expand(prompt, seed, options.wildcards) for seed in seeds]

    return Session(
        pipe,
        call_arguments(options, pipe.config),
        say,
        show=draws,
        show_steps=draws and options.show_steps,
        suffix=f".{options.format or 'png'}",
        metadata=not options.no_metadata,
        bits=bits_given(options),
        loras=lora_options(options),
        vary=vary,
        reopen=reopen,
        model=str(options.model),
    )


@contextmanager
def _history() -> Iterator[None]:
    """Arrow keys, and the lines of earlier sessions, where this Python has readline; the file is the user's alone."""
    from klein_mlx.paths import state_folder

    folder = state_folder()
    path = folder / "history" if folder else None
    try:
        import readline

        if path:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            path.chmod(0o600)
            if path.stat().st_size:  # libedit, macOS' readline, takes an empty file for a damaged one
                with suppress(OSError):  # of another readline: the lines are written anew
                    readline.read_history_file(path)
    except (ImportError, OSError):
        path = None  # a session without a history
    try:
        yield
    finally:
        if path:
            import readline

            readline.set_history_length(HISTORY)
            with suppress(OSError):
                readline.write_history_file(path)
                path.chmod(0o600)
