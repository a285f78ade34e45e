"""The Model Context Protocol over stdio: JSON-RPC, one object a line; tools that make and edit pictures.

It needs the standard library only; MLX runs in a worker process, as for the HTTP server. A client is an agent that
others can talk into things: it reads and writes files below `root` only, and never replaces one.
"""

import asyncio
import base64
import json
import os
import queue
import signal
import stat
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from klein_mlx.errors import KleinError, RequestError
from klein_mlx.server.asks import FORMATS, LONG, MEDIA, arguments_of, checked, loras_of, make_job, prompt_of
from klein_mlx.server.errors import ApiError, printable
from klein_mlx.server.jobs import Jobs, QueueFull
from klein_mlx.server.pictures import decode_base64
from klein_mlx.server.process import Worker
from klein_mlx.server.settings import MAX_BODY, MAX_IMAGES, MAX_REFERENCES, Settings

VERSIONS = ("2024-11-05", "2025-06-18", "2025-11-25")  # 2025-03-26 alone has batches, which no client sends
PARSE_ERROR, INVALID_REQUEST, UNKNOWN_METHOD, INVALID_PARAMS = -32700, -32600, -32601, -32602
MAX_KEPT = 16  # results that a later call may name
CHUNK = 1 << 16
DRAIN_SECONDS = 2.0

Message = dict[str, Any]


class RpcError(Exception):
    """A request that is refused as such. code: JSON-RPC's."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


class Mcp:
    """One client's session. root: the folder whose files it may name, or None. send: takes each message for it."""

    def __init__(self, settings: Settings, send: Callable[[Message], None], root: Path | None = None):
        self.settings, self.send = settings, send
        self.root = None if root is None else root.resolve()
        self.worker = Worker(settings)
        self.jobs = Jobs(self.worker, settings.queue, settings.idle_seconds)
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._made = 0
        self._calls: dict[Any, asyncio.Task[None]] = {}
        self._tools = {"generate_image": self._generate, "edit_image": self._edit, "list_models": self._list}

    async def serve(self, lines: AsyncIterator[bytes]) -> None:
        """Answer until the lines end; what runs then is cancelled."""
        self.jobs.start()
        try:
            async for line in lines:
                if line.strip():
                    self._take(line)
        finally:
            for task in self._calls.values():
                task.cancel()
            await asyncio.gather(*self._calls.values(), return_exceptions=True)
            await self.jobs.stop()

    def _take(self, line: bytes) -> None:
        """One message: answered at once, or by a task of its own where pictures are made."""
        name = None
        try:
            message = _parse(line)
            name = message.get("id")
            if "method" not in message and ("result" in message or "error" in message):
                return  # an answer; nothing was asked
            if "id" in message and (isinstance(name, bool) or not isinstance(name, str | int)):
                name = None
                raise RpcError(INVALID_REQUEST, "id must be a string or a whole number")
            if message.get("jsonrpc") != "2.0" or not isinstance(message.get("method"), str):
                raise RpcError(INVALID_REQUEST, 'a message needs "jsonrpc": "2.0" and a method')
            params = message.get("params", {})
            if "id" not in message:
                self._notified(message["method"], params)
                return
            if not isinstance(params, dict):
                raise RpcError(INVALID_PARAMS, "params must be an object")
            result = self._answer(name, message["method"], params)
            if result is not None:
                self._reply(name, result)
        except RpcError as error:
            self.send({"jsonrpc": "2.0", "id": name, "error": {"code": error.code, "message": printable(str(error))}})

    def _reply(self, name: Any, result: Message) -> None:
        self.send({"jsonrpc": "2.0", "id": name, "result": result})

    def _notified(self, method: str, params: Any) -> None:
        """A notification gets no answer, whatever it says."""
        if method == "notifications/cancelled" and isinstance(params, dict):
            name = params.get("requestId")
            if isinstance(name, str | int) and not isinstance(name, bool) and name in self._calls:  # True is not 1
                self._calls[name].cancel()

    def _answer(self, name: Any, method: str, params: Message) -> Message | None:
        """The result of a request, or None if a task will send it. Raises RpcError."""
        if method == "initialize":
            return self._hello(params)
        if method == "ping":
            return {}
        if method == "tools/list":
            return {"tools": tools(self.root is not None)}
        if method == "tools/call":
            self._call(name, params)
            return None
        raise RpcError(UNKNOWN_METHOD, f"there is no method {method[:100]!r}")

    def _hello(self, params: Message) -> Message:
        from klein_mlx.paths import version

        wanted = params.get("protocolVersion")
        agreed = [one for one in VERSIONS if isinstance(wanted, str) and one <= wanted] or VERSIONS
        return {
            "protocolVersion": agreed[-1],
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "klein-mlx", "version": version()},
            "instructions": "Makes and edits pictures with FLUX.2 [klein] on this machine. Results have names "
            "(picture-1, ...), which edit_image takes.",
        }

    def _call(self, name: Any, params: Message) -> None:
        """Start a tool. Raises RpcError for a call that names none."""
        tool, arguments, meta = params.get("name"), params.get("arguments") or {}, params.get("_meta") or {}
        if not isinstance(tool, str) or tool not in self._tools:
            raise RpcError(INVALID_PARAMS, f"there is no tool {str(tool)[:100]!r}; there are {', '.join(self._tools)}")
        if not isinstance(arguments, dict) or not isinstance(meta, dict):
            raise RpcError(INVALID_PARAMS, "arguments and _meta must be objects")
        if name in self._calls:
            raise RpcError(INVALID_REQUEST, f"request {name!r} is still being worked on")
        task = asyncio.create_task(self._work(name, tool, arguments, meta.get("progressToken")))
        self._calls[name] = task
        task.add_done_callback(lambda _: self._calls.pop(name, None))

    async def _work(self, name: Any, tool: str, arguments: Message, token: Any) -> None:
        def progress(done: float, total: int | None, words: str) -> None:
            if isinstance(token, str | int) and not isinstance(token, bool):
                told = {"progressToken": token, "progress": done, "message": words}
                params = told if total is None else {**told, "total": total}
                self.send({"jsonrpc": "2.0", "method": "notifications/progress", "params": params})

        try:
            known = next(one for one in tools(self.root is not None) if one["name"] == tool)["inputSchema"]
            check_arguments(arguments, known)
            content = await self._tools[tool](arguments, progress)
            self._reply(name, {"content": content, "isError": False})
        except (KleinError, ApiError, QueueFull) as error:
            words = f"{self.jobs.limit} requests are waiting; try later" if isinstance(error, QueueFull) else str(error)
            self._reply(name, {"content": [_text(printable(words))], "isError": True})

    async def _list(self, arguments: Message, progress: Callable[..., None]) -> list[Message]:
        await self.worker.ready()
        told = ("variant", "size", "multiple", "steps", "guidance", "distilled")
        facts = {key: self.worker.facts[key] for key in told}
        loras = (await self.worker.ask("loras"))["loras"]
        model = {"name": self.settings.name, "aliases": list(self.settings.aliases), **facts, "loras": loras}
        return [_text(json.dumps({"models": [model]}))]

    async def _generate(self, arguments: Message, progress: Callable[..., None]) -> list[Message]:
        return await self._pictures(arguments, [], progress)

    async def _edit(self, arguments: Message, progress: Callable[..., None]) -> list[Message]:
        named = arguments["images"]
        if not named:
            raise RequestError("images is empty; name one picture or more")
        images = [self._picture(one, "images") for one in named]
        if "mask" not in arguments:
            return await self._pictures(arguments, [("image", one) for one in images], progress)
        mask = self._picture(arguments["mask"], "mask")
        pictures = [("init_image", images[0]), ("mask_image", mask), *(("image", one) for one in images[1:])]
        return await self._pictures({**arguments, "init_reference": True}, pictures, progress)

    async def _pictures(
        self, values: Message, pictures: list[tuple[str, bytes]], progress: Callable[..., None]
    ) -> list[Message]:
        """Run a job; its pictures and a line on each."""
        kind = FORMATS[values.get("format", "png")]
        count = values.get("n", 1)
        paths = self._outputs(values["save_as"], count, kind) if "save_as" in values else None
        own = ("images", "mask", "lora", "format", "save_as")
        arguments = {"prompt": prompt_of(values), **arguments_of(values, [], own)}
        job = make_job(arguments, pictures, loras=loras_of(values), format=kind)
        content: list[Message] = []
        self.jobs.submit(job)
        try:
            async for event in job.events():
                if event["type"] == "queued":
                    words = "waiting" if event["position"] else "starting"
                    progress(0, None, words if self.worker.state in ("ready", "busy") else "loading the model")
                elif event["type"] == "step":
                    done, of = event["picture"] * event["of"] + event["index"], event["of"]
                    progress(done, of * count, f"step {event['index']} of {of}")
                elif event["type"] == "image":
                    content += self._finished(event, kind, paths)
                elif event["type"] == "done":
                    content += [_text(note) for note in event["notes"]]
                elif event["type"] != "start":
                    raise RequestError(_in_own_words(event))
        finally:
            self.jobs.cancel(job)
        return content

    def _finished(self, event: Message, kind: str, paths: list[Path] | None) -> list[Message]:
        """A picture as content; kept for later calls, and saved if a path was named."""
        data = event["data"]
        self._made += 1
        name = f"picture-{self._made}"
        self._kept[name] = data
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        words = f"{name}: {event['width']} x {event['height']}, seed {event['seed']}, {event['seconds']:.2f} s"
        if paths is not None:
            from klein_mlx.images.saving import save_bytes

            path = paths[event["index"]]
            save_bytes(data, path)
            words += f", saved as {path.relative_to(self.root or path.parent)}"
        image = {"type": "image", "data": base64.b64encode(data).decode(), "mimeType": MEDIA[kind]}
        return [image, _text(words)]

    def _picture(self, value: str, what: str) -> bytes:
        """The bytes of an earlier result, of a data URI, or of a file below the root. Raises KleinError, ApiError."""
        if value in self._kept:
            return self._kept[value]
        if value[:5].lower() == "data:" or "://" in value[:20]:
            return checked(decode_base64(value, what), what)
        return checked(read_below(self._below(value, what), what, value), what)

    def _below(self, name: str, what: str) -> Path:
        """A path of the client's, links followed. Raises RequestError unless it is below the root."""
        if self.root is None:
            raise RequestError(
                f"{what} is {name[:200]!r}, and this server opens no files; name an earlier picture, send a data URI, "
                "or start it with --root FOLDER"
            )
        try:
            path = Path(os.path.realpath(self.root / name))
        except (OSError, ValueError):  # a zero byte
            path = None
        if path is None or not path.is_relative_to(self.root):
            raise RequestError(f"{what} is {name[:200]!r}; it must be a path below the server's --root folder")
        return path

    def _outputs(self, name: str, count: int, kind: str) -> list[Path]:
        """Where `count` pictures go: NAME, or NAME-1, NAME-2, ... Raises RequestError for what could not be written."""
        from klein_mlx.images.saving import check_output

        path = self._below(name, "save_as")
        if FORMATS.get(path.suffix.lower().removeprefix(".")) != kind:
            raise RequestError(f"save_as is {name[:200]!r}; a picture of this format must end in {kind}")
        paths = [path] if count == 1 else [path.with_stem(f"{path.stem}-{number}") for number in range(1, count + 1)]
        for one in paths:
            if os.path.lexists(one):
                raise RequestError(f"save_as: {one.relative_to(self.root or '/')} exists; choose another name")
            check_output(one, overwrite=False)
        return paths


def _in_own_words(event: Message) -> str:
    """A job's final event, other than done, as a sentence that names arguments as the tools do."""
    message = event.get("message") or f"the request was {event['type']}"
    param = event.get("param") or ""
    own = {**LONG, "image": "images"}.get(param, param)
    return own + message[len(param) :] if param and message.startswith(param) else message


def _text(words: str) -> Message:
    return {"type": "text", "text": words}


def _parse(line: bytes) -> Message:
    """A line's JSON object. Raises RpcError."""
    try:
        message = json.loads(line.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise RpcError(PARSE_ERROR, "the line is not JSON") from None
    if not isinstance(message, dict):
        raise RpcError(INVALID_REQUEST, "a message must be an object; send one per line")
    return message


def _refuse(word: str) -> float:
    raise ValueError(word)


def read_below(path: Path, what: str, name: str) -> bytes:
    """A regular file's bytes; `name` is how the client called it. Raises RequestError."""
    try:
        # Resolved before, so a link is new here; a FIFO must not make it wait.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise RequestError(f"{what} is {name[:200]!r}, which is not a file; name a picture")
            if found.st_size > MAX_BODY:
                raise RequestError(f"{what} is {name[:200]!r}, a file of over {MAX_BODY >> 20} MB; name a smaller one")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(MAX_BODY)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise RequestError(f"{what} is {name[:200]!r}, which cannot be read ({error.strerror})") from None


def check_arguments(values: Message, schema: Message) -> None:
    """Raise RequestError unless names and types are those of a tool's schema; ranges are the model's to check."""
    known = schema["properties"]
    for name in schema["required"]:
        if name not in values:
            raise RequestError(f"{name} is missing; {known[name]['description'].lower()}")
    for name, value in values.items():
        if name not in known:
            raise RequestError(f"{name[:100]} is not an argument of this tool; it takes {', '.join(known)}")
        _check_type(name, value, known[name])


def _check_type(name: str, value: Any, schema: Message) -> None:
    kinds = {"string": str, "integer": int, "number": (int, float), "array": list}
    if isinstance(value, bool) or not isinstance(value, kinds[schema["type"]]):
        raise RequestError(f"{name} is {json.dumps(value)[:60]}; it must be of type {schema['type']}")
    if "enum" in schema and value not in schema["enum"]:
        raise RequestError(f"{name} is {str(value)[:60]!r}; it must be one of {', '.join(schema['enum'])}")
    for item in value if isinstance(value, list) else ():
        _check_type(f"an item of {name}", item, schema["items"])


def tools(files: bool) -> list[Message]:
    """The tools, as tools/list tells them. files: whether paths may be named."""
    source = "a path below the server's folder, " if files else ""
    source += "the name of an earlier result (picture-1), or a data URI"
    common: Message = {
        "width": {"type": "integer", "description": "Pixels, a multiple of 16"},
        "height": {"type": "integer", "description": "Pixels, a multiple of 16"},
        "steps": {"type": "integer", "description": "Denoising steps; leave it out for the model's own"},
        "seed": {"type": "integer", "description": "The same seed makes the same picture; random if left out"},
        "n": {"type": "integer", "description": f"Pictures to make, 1 to {MAX_IMAGES}, each with a seed of its own"},
        "guidance": {"type": "number", "description": "Guidance scale; only for models that are not distilled"},
        "negative_prompt": {"type": "string", "description": "What to avoid; only for models that are not distilled"},
        "lora": {
            "type": "array",
            "items": {"type": "string"},
            "description": "LoRAs, as list_models names them, each as NAME or NAME:STRENGTH",
        },
        "format": {
            "type": "string",
            "enum": list(FORMATS),
            "description": "File format of the result; png if left out",
        },
    }
    if files:
        common["save_as"] = {
            "type": "string",
            "description": "Also save the picture at this path below the server's folder; never replaces a file",
        }
    draw = {"prompt": {"type": "string", "description": "What the picture shows, in plain words"}, **common}
    change = {
        "prompt": {"type": "string", "description": "The change, as an instruction: make the hat red"},
        "images": {
            "type": "array",
            "items": {"type": "string"},
            "minItems": 1,
            "maxItems": MAX_REFERENCES,
            "description": f"The picture to change, then further reference pictures; each is {source}",
        },
        "mask": {
            "type": "string",
            "description": f"Where the first picture may change: white is repainted, all else stays exactly; {source}",
        },
        **common,
    }
    return [
        _tool("generate_image", "Make a picture from a description.", draw, ["prompt"]),
        _tool(
            "edit_image", "Change a picture by an instruction, or draw from references.", change, ["prompt", "images"]
        ),
        _tool("list_models", "The model that this server runs, its sizes and LoRAs.", {}, []),
    ]


def _tool(name: str, words: str, properties: Message, required: list[str]) -> Message:
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"name": name, "description": words, "inputSchema": schema}


def run(settings: Settings, root: Path | None, source: int, target: int) -> None:
    """Serve a client that writes to one file descriptor and reads from another, until it ends or a signal comes."""
    outgoing: queue.SimpleQueue[Message | None] = queue.SimpleQueue()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=2 * MAX_BODY)
        task = asyncio.create_task(Mcp(settings, outgoing.put, root).serve(_lines(reader)))

        def end() -> None:
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end)
        threading.Thread(target=_pump, args=(source, loop, reader), daemon=True).start()
        writer = threading.Thread(target=_write, args=(target, outgoing, loop, end), daemon=True)
        writer.start()
        await asyncio.wait([task])
        outgoing.put(None)
        await asyncio.to_thread(writer.join, DRAIN_SECONDS)
        if not task.cancelled():
            task.result()

    asyncio.run(main())


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while True:
        try:
            line = await reader.readline()
        except ValueError:  # longer than the limit; what was read of it is dropped
            line = b"too long\n"
        if not line:
            return
        yield line


def _pump(source: int, loop: asyncio.AbstractEventLoop, reader: asyncio.StreamReader) -> None:
    """The reading thread; os.read, because a thread within a buffered read blocks the interpreter's exit."""
    with suppress(RuntimeError):  # the loop is closed
        with suppress(OSError):
            while data := os.read(source, CHUNK):
                loop.call_soon_threadsafe(reader.feed_data, data)
        loop.call_soon_threadsafe(reader.feed_eof)


def _write(
    target: int, outgoing: "queue.SimpleQueue[Message | None]", loop: asyncio.AbstractEventLoop, end: Callable[[], None]
) -> None:
    """The writing thread: a client that does not read stops nothing else."""
    try:
        while (message := outgoing.get()) is not None:
            data = memoryview(json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n")
            while data:
                data = data[os.write(target, data) :]
    except OSError:
        loop.call_soon_threadsafe(end)
