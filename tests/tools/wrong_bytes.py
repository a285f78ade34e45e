"""How a sound file's bytes are made wrong: ways that `mutate.py` chooses from by a seed."""

import json
import random
import re
import zlib
from typing import Any

_BYTES = (0, 1, 9, 32, 34, 44, 45, 48, 57, 91, 93, 123, 125, 127, 128, 255)
_NUMBERS = (b"0", b"-1", b"1", b"7", b"65536", b"2147483648", b"9223372036854775808", b"1e400", b"-0.0", b"NaN", b"1.5")
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 64, 1 << 20, 1 << 31, 1 << 63, 10**30, 0.5, -0.5, 1e308, float("nan")),
    *("", "x", "../x", "\0", "\ud800", "4", "a" * 5000, [], {}, [[]], [1, 2, 3], [0], [-1], {"a": 1}, [None], {"": {}}),
)


def other_bytes(content: bytes, rng: random.Random, limit: int) -> bytes:
    """Up to three bytes, or one run of them, changed within the first `limit`."""
    data = bytearray(content)
    kind = rng.randrange(8)
    at, length = rng.randrange(limit), rng.choice((1, 2, 4, 8, 64))
    if kind < 4:
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(limit)] = rng.choice((*_BYTES, rng.randrange(256)))
    elif kind == 4:
        data[at : at + length] = b""
    elif kind == 5:
        data[at:at] = bytes(rng.choice(_BYTES) for _ in range(length))
    elif kind == 6:
        data[at:at] = data[at : at + length]
    else:
        data[at : at + 8] = rng.choice((0, 1, 1 << 31, 1 << 40, 1 << 60, (1 << 64) - 1)).to_bytes(8, "little")
    return bytes(data)


def other_number(content: bytes, rng: random.Random, limit: int) -> bytes:
    """One of the numbers in a header's text replaced; the 8 bytes of a safetensors header's length are put right."""
    framed = content[8:9] == b"{"
    begin = 8 if framed else 0
    found = list(re.finditer(rb"-?\d+(\.\d+)?", content[begin:limit]))
    if not found:
        return content
    match = rng.choice(found)
    start, end = begin + match.start(), begin + match.end()
    new = rng.choice(_NUMBERS)
    length = int.from_bytes(content[:8], "little") + len(new) - (end - start)
    head = length.to_bytes(8, "little") if framed else b""
    return head + content[begin:start] + new + content[end:]


def other_value(content: bytes, rng: random.Random, limit: int) -> bytes:
    """A value somewhere in a JSON file replaced, removed or doubled under another name."""
    values = json.loads(content)
    place: Any = values
    while True:
        key: Any = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.2:
            break
        place = inner
    kind = rng.randrange(6)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place, dict):
        place[f"{key}x"] = inner
    else:
        place[key] = rng.choice(_VALUES)
    return json.dumps(values).encode("utf-8", "surrogatepass")


_ROLES = "lora_A.weight lora_B.weight lora_mid.weight lora_up.bias alpha dora_scale magnitude diff diff_b hada_w1_a "
_ROLES += "hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2 lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b "
_ROLES += "lokr_t1 lokr_t2 lora_embedding_A lora_embedding_B oft_blocks mystery"
_SAME_SIZE = {"F32": ("I32", "U32", "F32"), "F16": ("BF16", "I16", "U16"), "BF16": ("F16",), "U8": ("F8_E4M3", "BOOL")}
_STATED = ("lora_alpha", "alpha", "r", "alpha_pattern", "rank_pattern", "use_rslora", "init_lora_weights", "peft_type")


def other_structure(content: bytes, rng: random.Random, limit: int) -> bytes:
    """A safetensors header that is sound, of which one or two tensors have another name, shape or dtype; or metadata
    that states anything."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for _ in range(rng.randint(1, 2)):
        name = rng.choice([key for key in header if key != "__metadata__"])
        entry, kind = header[name], rng.randrange(5)
        module = name.rpartition(".")[0].removesuffix(".lora_A").removesuffix(".lora_B")
        if kind == 0:
            header[f"{module}.{rng.choice(_ROLES.split())}"] = header.pop(name)
        elif kind == 1:
            other = rng.choice([key for key in header if key not in (name, "__metadata__")])
            header[name], header[other] = header[other], entry
        elif kind == 2:
            size = 1
            for axis in entry["shape"]:
                size *= axis
            divisor = rng.choice([n for n in range(1, size + 1) if size % n == 0][:40])
            ways = [[size], [divisor, size // divisor], [size // divisor, divisor], [1, *entry["shape"]]]
            entry["shape"] = rng.choice([*ways, [*entry["shape"], 1], [*entry["shape"], 1, 1], entry["shape"][::-1]])
        elif kind == 3:
            entry["dtype"] = rng.choice(_SAME_SIZE.get(entry["dtype"], (entry["dtype"],)))
        else:
            values = {
                f"transformer.{rng.choice(_STATED)}": rng.choice((*_VALUES, {"to_q": 10**400}, {"(a": 1}, "pissa"))
            }
            stated = {"lora_adapter_metadata": json.dumps(values), "lora_alpha": str(rng.choice(_VALUES))[:500]}
            stated["modelspec.architecture"] = rng.choice(("flux-1-dev", "qwen-image", "\x1b[2J", ""))
            key = rng.choice(list(stated))
            header["__metadata__"] = {key: stated[key].encode("utf-8", "replace").decode()}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def cut(content: bytes, rng: random.Random, limit: int) -> bytes:
    """A file that ends too early, in its header or its data, or too late."""
    at = rng.randrange(limit) if rng.random() < 0.5 else rng.randrange(limit, len(content))
    return content[:at] if rng.random() < 0.8 else content + content[at : at + 999]


def other_data(content: bytes, rng: random.Random, limit: int) -> bytes:
    """Other bytes behind the header: any number, NaN and infinity among them, or a run of one byte."""
    at, length = rng.randrange(limit, len(content)), rng.choice((1, 2, 4, 8, 64, 4096))
    end = min(at + length, len(content))
    new = rng.randbytes(end - at) if rng.random() < 0.5 else bytes([rng.choice((0, 0x7F, 0x80, 0xFF))]) * (end - at)
    return content[:at] + new + content[end:]


_WORDS = (
    "F64 F16 BF16 F32 F8_E4M3 F8_E5M2 F8_E8M0 F4 F6_E2M3 I64 I32 I8 U8 U16 U32 U64 BOOL C64 I4 bf16 float32".split()
)


def other_layout(content: bytes, rng: random.Random, limit: int) -> bytes:
    """A safetensors header of which one tensor lies elsewhere (over another, outside, reversed), has another dtype's
    word or shape, is written twice, or leaves a hole."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    names = [key for key in header if key != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    entry, kind = header[name], rng.randrange(7)
    begin, end = entry["data_offsets"]
    if kind == 0:
        entry["data_offsets"] = header[other]["data_offsets"]
    elif kind == 1:
        shift = rng.choice((-(1 << 63), -begin - 1, -2, -1, 1, 2, end - begin, len(content), 1 << 62))
        entry["data_offsets"] = [begin + shift, end + shift]
    elif kind == 2:
        entry["data_offsets"] = rng.choice(([end, begin], [begin, begin], [begin], [], [begin, end, end], None, "0"))
    elif kind == 3:
        entry["dtype"] = rng.choice((*_WORDS, "", None, 7))
    elif kind == 4:
        shape = entry["shape"]
        entry["shape"] = rng.choice((shape[:-1], [*shape, 1], [1 << 32, 1 << 32], [-1, *shape[1:]], [0], [1.0], None))
    elif kind == 5:
        del header[name]
    text = json.dumps(header)
    if kind == 6:
        text = f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[other])}}}"
    raw = text.encode() + b" " * (-len(text) % 8)
    return len(raw).to_bytes(8, "little") + raw + content[8 + length :]


def other_chunk(content: bytes, rng: random.Random, limit: int) -> bytes:
    """One of a PNG's chunks with other bytes, and with the checksum of them."""
    chunks, at = [], 8
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += length + 12
    number = rng.randrange(len(chunks))
    kind, data = chunks[number]
    if rng.random() < 0.2 or not data:
        kind = rng.choice((b"IDAT", b"PLTE", b"tRNS", b"iTXt", b"zTXt", b"acTL", b"fcTL", b"fdAT", b"eXIf", b"iCCP"))
    else:
        data = other_bytes(data, rng, len(data))
    chunks[number] = (kind, data)
    parts = [
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big") for kind, data in chunks
    ]
    return content[:8] + b"".join(parts)


def other_line(content: bytes, rng: random.Random, limit: int) -> bytes:
    """A value of one of the lines."""
    lines = content.split(b"\n")
    at = rng.randrange(3)
    lines[at] = other_value(lines[at], rng, limit)
    return b"\n".join(lines)
