"""What this machine and this installation are: chip, memory, versions, disk. No row holds a user's name or a path."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from klein_mlx.bench.checks import Row, Setting
from klein_mlx.bench.measure import device_name
from klein_mlx.errors import human_bytes
from klein_mlx.paths import cache_folder, cached_models, own_models, version
from klein_mlx.runtime.memory import choices_told, chosen_device, machine_memory
from klein_mlx.weights.hub import cache_folder as hub_cache

NAME = "environment"
OLDEST_MACOS = (14, 0)
NEEDED_DISK = 1 << 30
FIRST_ACCELERATED = (26, 2)  # macOS in which MLX uses the M5's matrix units


class Bad(NamedTuple):
    """A version of MLX that computes wrongly. before: the first good one. generation: of GPUs from which it holds."""

    before: tuple[int, int, int]
    generation: int
    what: str


KNOWN_BAD = (
    Bad((0, 32, 0), 17, "matmuls of 12288 inputs in 16 bits are wrong on an M5"),
    Bad((0, 32, 2), 0, "quantized weights are dequantized in 16 bits, which loses what 8 bits hold"),
)


def generation() -> int:
    """Apple's GPU generation as MLX names it (applegpu_g13s is 13); 0 where there is no such GPU."""
    name = str(mx.device_info().get("architecture", "")) if _on_gpu() else ""
    found = re.match(r"applegpu_g(\d+)", name)
    return int(found[1]) if found else 0


def _on_gpu() -> bool:
    return mx.default_device().type == mx.DeviceType.gpu


def check_environment(setting: Setting) -> Iterator[Row]:
    """Everything that a report has to say about where it comes from, and what of it cannot work."""
    yield from _system()
    yield _memory()
    yield from _versions(setting)
    yield from _disk()
    yield _config()
    yield _row(f"computes with {choices_told(chosen_device())}")


def _row(text: str, holds: bool | None = None, remedy: str = "") -> Row:
    return Row(NAME, text, holds, remedy)


def _system() -> Iterator[Row]:
    yield _row(f"chip: {device_name()}{_cores()}")
    release = platform.mac_ver()[0]
    if not release:
        yield _row(f"system: {platform.system()} {platform.machine()}")
        return
    numbers = _numbers(release)
    text = f"system: macOS {release}"
    if generation() >= 17 and numbers < FIRST_ACCELERATED:
        text += "; from macOS 26.2 on, MLX uses this chip's matrix units: three to four times as fast"
    yield _row(text, numbers >= OLDEST_MACOS, "klein-mlx needs macOS 14 or later")


def _cores() -> str:
    """How many cores the GPU has, where macOS tells."""
    found = re.search(r'"gpu-core-count"\s*=\s*(\d+)', _command("ioreg", "-rc", "AGXAccelerator", "-d", "1"))
    return f", {found[1]} GPU cores" if found else ""


def _command(*words: str) -> str:
    """What a program of macOS prints; nothing where it is missing."""
    if sys.platform != "darwin":
        return ""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _memory() -> Row:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = f"memory: {human_bytes(whole)}, of which {human_bytes(machine_memory())} may be used"
    largest = mx.device_info().get("max_buffer_length") if _on_gpu() else None
    return _row(text + (f", {human_bytes(int(largest))} in one array" if largest else ""))


def _versions(setting: Setting) -> Iterator[Row]:
    rosetta = _command("sysctl", "-n", "sysctl.proc_translated").strip() == "1"
    kind = "under Rosetta" if rosetta else platform.machine()
    yield _row(f"Python {platform.python_version()}, {kind}", not rosetta, "install a native (arm64) Python")
    yield _row(f"klein-mlx {version()}")
    mlx = version("mlx")
    metal = f", mlx-metal {version('mlx-metal')}" if sys.platform == "darwin" else ""
    faults = [bad.what for bad in KNOWN_BAD if _numbers(mlx) < bad.before and _is_of(bad, setting)]
    yield _row(
        f"mlx {mlx}{metal}{''.join(f'; {fault}' for fault in faults)}",
        not faults,
        "upgrade: pip install -U mlx",
    )
    changed = sorted(name for name in os.environ if re.fullmatch(r"MLX_[A-Z0-9_]+", name))
    if changed:
        yield _row("set in the environment: " + ", ".join(f"{n}={_short(os.environ[n])}" for n in changed))


def _is_of(bad: Bad, setting: Setting) -> bool:
    return setting.generation >= bad.generation


def _short(value: str) -> str:
    """A number as it is; anything else may be a path."""
    return value if re.fullmatch(r"[\w.]{1,12}", value) else "..."


def _numbers(release: str) -> tuple[int, ...]:
    """0.32.4.dev1 -> (0, 32, 4)."""
    return tuple(int(part) for part in re.findall(r"\d+", release)[:3])


def _disk() -> Iterator[Row]:
    for what, folder in (("models", hub_cache()), ("caches", cache_folder())):
        if folder is None:
            yield _row(f"disk for {what}: there is no home folder")
            continue
        free = shutil.disk_usage(_existing(folder)).free
        remedy = f"free some disk: less than {human_bytes(NEEDED_DISK)} is left for {what}"
        yield _row(f"disk for {what}: {human_bytes(free)} free", free >= NEEDED_DISK, remedy)
    cached = cached_models()
    yield _row(f"models on disk: {len(own_models())} of one's own, {len(cached)} in the Hub's cache")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that there is."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def _config() -> Row:
    """Whether the config file parses; what stands in it is the command's affair."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    try:
        text = (Path(home) / "klein-mlx" / "config.toml").read_text()
    except FileNotFoundError:
        return _row("config file: none")
    except (OSError, UnicodeDecodeError):
        return _row("config file: cannot be read", False, "see its permissions, and that it is UTF-8")
    try:
        tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        return _row("config file: is not TOML", False, f"mend config.toml: {_where(error)}")
    return _row("config file: read", True)


def _where(error: Exception) -> str:
    found = re.search(r"at (line \d+)", str(error))
    return found[1] if found else "its syntax"
