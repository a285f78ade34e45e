"""Messages between the server and its worker: a JSON object and binary blobs, over a socket pair.

A frame is the JSON's length and the blobs' total length (big-endian, 4 bytes each), the JSON, the blobs. JSON and not
pickle: a worker that a hostile picture took over must not take over the server.
"""

import json
import struct
from collections.abc import Sequence
from typing import Any

HEAD = struct.Struct(">II")
MAX_FRAME = 1 << 30


def pack(message: dict[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    """A whole frame. message: JSON values; its key "blobs" is the frame's own."""
    body = json.dumps({**message, "blobs": [len(blob) for blob in blobs]}).encode()
    return HEAD.pack(len(body), sum(map(len, blobs))) + body + b"".join(blobs)


def unpack(body: bytes, blobs: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """The message and its blobs. Raises ValueError for lengths that do not add up."""
    message = json.loads(body)
    parts, start = [], 0
    for length in message.pop("blobs"):
        parts.append(blobs[start : start + length])
        start += length
    if start != len(blobs):
        raise ValueError("a frame's blobs do not have the lengths that it states")
    return message, parts
