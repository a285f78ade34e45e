"""`klein-mlx mcp`: raw lines, a whole session with tiny, and the public client in both of its modes."""

import asyncio
import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from serving_tools import data_uri, opened, picture_bytes

from klein_mlx.cli.main import main
from klein_mlx.errors import RequestError
from klein_mlx.server.mcp import Mcp, check_arguments, read_below, tools
from klein_mlx.server.settings import Settings

COMMAND = [sys.executable, "-m", "klein_mlx", "mcp", "--model", "tiny"]
SMALL = {"prompt": "a red circle", "width": 64, "height": 64, "steps": 1, "seed": 7}


def answers(*sent: str | bytes) -> list[dict[str, Any]]:
    """What a session without a worker says to these lines."""
    found: list[dict[str, Any]] = []

    async def lines() -> Any:
        for line in sent:
            yield line.encode() if isinstance(line, str) else line

    asyncio.run(Mcp(Settings("tiny"), found.append).serve(lines()))
    return found


def call(method: str, number: Any = 1, /, **params: Any) -> str:
    return json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params})


@pytest.mark.parametrize(
    ("line", "code", "name"),
    [
        ("{not json", -32700, None),
        (b"\xff\xfe", -32700, None),
        ("[" * 100_000, -32700, None),
        ('{"jsonrpc": "2.0", "id": NaN, "method": "ping"}', -32700, None),
        ("[]", -32600, None),
        ("17", -32600, None),
        ('{"id": 1, "method": "ping"}', -32600, 1),
        ('{"jsonrpc": "2.0", "id": 1}', -32600, 1),
        ('{"jsonrpc": "2.0", "id": 1, "method": 5}', -32600, 1),
        ('{"jsonrpc": "2.0", "id": null, "method": "ping"}', -32600, None),
        ('{"jsonrpc": "2.0", "id": true, "method": "ping"}', -32600, None),
        ('{"jsonrpc": "2.0", "id": {}, "method": "ping"}', -32600, None),
        ('{"jsonrpc": "2.0", "id": 1, "method": "ping", "params": []}', -32602, 1),
        (call("server/discover"), -32601, 1),
        (call("resources/list", "x"), -32601, "x"),
        (call("tools/call", name="x"), -32602, 1),
        (call("tools/call", name="rm"), -32602, 1),
        (call("tools/call", name="list_models", arguments=[1]), -32602, 1),
    ],
)  # fmt: skip
def test_a_bad_line_is_answered_and_the_next_is_served(line: str | bytes, code: int, name: Any) -> None:
    bad, good = answers(line, call("ping", 2))
    assert (bad["error"]["code"], bad["id"]) == (code, name)
    assert good == {"jsonrpc": "2.0", "id": 2, "result": {}}


@pytest.mark.parametrize(
    "line",
    [
        "",
        '{"jsonrpc": "2.0", "method": "notifications/initialized"}',
        '{"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 99}}',
        '{"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": []}}',
        '{"jsonrpc": "2.0", "method": "notifications/cancelled", "params": 5}',
        '{"jsonrpc": "2.0", "method": "tools/call", "params": {"name": "generate_image"}}',
        '{"jsonrpc": "2.0", "id": 5, "result": {}}',
    ],
)
def test_a_notification_is_not_answered(line: str) -> None:
    assert answers(line) == []


@pytest.mark.parametrize(("name", "cancels"), [("1", True), ("true", False), ("1.0", False), ('"1"', False)])
def test_only_the_named_request_is_cancelled(name: str, cancels: bool) -> None:
    """In Python a flag is a number, too."""
    mcp, cancelled = Mcp(Settings("tiny"), print), []
    mcp._calls[1] = SimpleNamespace(cancel=lambda: cancelled.append(1))  # type: ignore[assignment]
    mcp._take(f'{{"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {{"requestId": {name}}}}}'.encode())
    assert bool(cancelled) == cancels


@pytest.mark.parametrize(
    ("wanted", "agreed"),
    [
        ("2024-11-05", "2024-11-05"),
        ("2025-03-26", "2024-11-05"),
        ("2025-06-18", "2025-06-18"),
        ("2026-07-28", "2025-11-25"),
        (None, "2025-11-25"),
    ],
)
def test_the_version_is_the_newest_that_the_client_can_know(wanted: str | None, agreed: str) -> None:
    (told,) = answers(call("initialize", protocolVersion=wanted))
    assert told["result"]["protocolVersion"] == agreed
    assert told["result"]["capabilities"] == {"tools": {}}


def test_the_tools_are_described() -> None:
    (told,) = answers(call("tools/list"))
    listed = {one["name"]: one["inputSchema"] for one in told["result"]["tools"]}
    assert list(listed) == ["generate_image", "edit_image", "list_models"]
    assert listed["edit_image"]["required"] == ["prompt", "images"]
    assert "save_as" not in listed["generate_image"]["properties"]  # without a root no path is taken
    assert "save_as" in tools(files=True)[0]["inputSchema"]["properties"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "prompt is missing"),
        ({"prompt": 5}, "prompt is 5; it must be of type string"),
        ({"prompt": "x", "width": "64"}, 'width is "64"; it must be of type integer'),
        ({"prompt": "x", "width": 64.5}, "width is 64.5"),
        ({"prompt": "x", "n": True}, "n is true"),
        ({"prompt": "x", "lora": ["a", 1]}, "an item of lora is 1"),
        ({"prompt": "x", "format": "gif"}, "format is 'gif'; it must be one of png"),
        ({"prompt": "x", "output_path": "/tmp/x"}, "output_path is not an argument of this tool"),
    ],
)
def test_arguments_are_checked_by_the_schema(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match="^" + words.replace("[", r"\[")):
        check_arguments(arguments, tools(files=False)[0]["inputSchema"])


def test_no_package_is_needed() -> None:
    code = (
        "import sys; sys.modules.update(starlette=None, uvicorn=None, mcp=None, multipart=None)\n"
        "import klein_mlx.cli.mcp, klein_mlx.server.mcp\n"
        "assert 'mlx.core' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Session:
    """`klein-mlx mcp` with tiny and a root, spoken to line by line."""

    def __init__(self, root: Path):
        self.root = root
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([*COMMAND, "--root", str(root)], stdin=pipe, stdout=pipe, stderr=pipe)
        self.number = 0

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def tool(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """The result of a tool; no other message comes."""
        self.number += 1
        self.send(call("tools/call", self.number, name=tool, arguments=arguments))
        told = self.read()
        assert told["id"] == self.number, told
        return told["result"]

    def refused(self, tool: str, **arguments: Any) -> str:
        found = self.tool(tool, **arguments)
        assert found["isError"], found
        return found["content"][0]["text"]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    session = Session(tmp_path_factory.mktemp("root"))
    yield session
    rest, log = session.process.communicate(timeout=10)  # its end is the client's end
    assert (session.process.returncode, rest, log) == (0, b"", b"")


def test_a_picture_is_made_with_progress(session: Session) -> None:
    arguments = {**SMALL, "steps": 2, "n": 2}
    session.send(call("tools/call", "one", name="generate_image", arguments=arguments, _meta={"progressToken": "p"}))
    told = [session.read()]
    while "id" not in told[-1]:
        told.append(session.read())
    steps = [one["params"] for one in told[:-1]]
    assert {one["progressToken"] for one in steps} == {"p"}
    done = [one["progress"] for one in steps]
    assert done == sorted(set(done))  # a client that is slow gets the newest
    assert (done[-1], steps[-1]["total"]) == (4, 4)
    first, words, second, other = told[-1]["result"]["content"]
    assert (told[-1]["id"], told[-1]["result"]["isError"]) == ("one", False)
    assert (first["type"], first["mimeType"]) == ("image", "image/png")
    assert opened(first["data"]).size == opened(second["data"]).size == (64, 64)
    assert words["text"].startswith("picture-1: 64 x 64, seed 7, ")
    assert other["text"].startswith("picture-2: 64 x 64, seed 8, ")


def test_the_models_are_listed(session: Session) -> None:
    (told,) = session.tool("list_models")["content"]
    (model,) = json.loads(told["text"])["models"]
    assert (model["name"], model["steps"], model["size"]) == ("tiny", 4, 128)


def test_an_edit_keeps_what_is_outside_the_mask(session: Session) -> None:
    before = Image.new("RGB", (64, 64), "blue")
    before.save(session.root / "blue.png")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    mask.save(session.root / "mask.png")
    found = session.tool("edit_image", **{**SMALL, "prompt": "make it red"}, images=["blue.png"], mask="mask.png")
    after = opened(found["content"][0]["data"]).convert("RGB")
    assert after.crop((0, 0, 24, 64)).tobytes() == before.crop((0, 0, 24, 64)).tobytes()
    assert after.crop((40, 0, 64, 64)).tobytes() != before.crop((40, 0, 64, 64)).tobytes()


def test_an_earlier_result_and_a_data_uri_can_be_edited(session: Session) -> None:
    session.tool("generate_image", **SMALL)
    images = ["picture-1", data_uri(picture_bytes("blue", (64, 64)))]
    assert not session.tool("edit_image", **SMALL, images=images)["isError"]


def test_pictures_are_saved_below_the_root_and_never_replaced(session: Session) -> None:
    (session.root / "sub").mkdir()
    found = session.tool("generate_image", **SMALL, n=2, format="webp", save_as="sub/fox.webp")
    assert "saved as sub/fox-1.webp" in found["content"][1]["text"]
    data = [base64.b64decode(one["data"]) for one in found["content"] if one["type"] == "image"]
    assert data == [(session.root / f"sub/fox-{number}.webp").read_bytes() for number in (1, 2)]
    again = session.refused("generate_image", **SMALL, n=2, format="webp", save_as="sub/fox.webp")
    assert again == "save_as: sub/fox-1.webp exists; choose another name"
    assert "must end in .png" in session.refused("generate_image", **SMALL, save_as="fox.jpg")


def test_no_path_leads_out_of_the_root(session: Session, tmp_path: Path) -> None:
    outside = tmp_path / "secret.png"
    outside.write_bytes(picture_bytes())
    (session.root / "link.png").symlink_to(outside)
    (session.root / "folder").symlink_to(tmp_path)
    (session.root / "loop").symlink_to("loop")
    os.mkfifo(session.root / "fifo")
    (session.root / "notes.txt").write_text("no picture")
    outer = (str(outside), "../secret.png", "link.png", "folder", "folder/secret.png", "sub/../..", "a\0b", "/dev/zero")
    for name, words in (
        *((name, f"images is {name!r}; it must be a path below the server's --root folder") for name in outer),
        ("~/x.png", "images is '~/x.png', which cannot be read (No such file or directory)"),
        ("loop", "images is 'loop', which cannot be read (Too many levels of symbolic links)"),
        ("fifo", "images is 'fifo', which is not a file; name a picture"),
        (".", "images is '.', which is not a file; name a picture"),
        ("none.png", "images is 'none.png', which cannot be read (No such file or directory)"),
    ):
        assert session.refused("edit_image", **SMALL, images=[name]) == words
    for name, words in (
        ("notes.txt", "images is not a picture"),
        ("https://example.com/x.png", "images is a URL"),
        ("file:///etc/passwd", "images is a URL"),
    ):
        assert session.refused("edit_image", **SMALL, images=[name]).startswith(words), name
    for name in (str(tmp_path / "x.png"), "../x.png", "folder/x.png", "sub/../../x.png", "link.png"):
        assert "must be a path below" in session.refused("generate_image", **SMALL, save_as=name), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret.png"]


def test_a_refused_folder_leaves_no_file_open(tmp_path: Path) -> None:
    free = os.dup(0)
    os.close(free)
    with pytest.raises(RequestError, match="is not a file"):
        read_below(tmp_path, "images", ".")
    again = os.dup(0)
    os.close(again)
    assert again == free


def test_without_a_root_no_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(picture_bytes())

    async def one() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        mcp = Mcp(Settings("tiny"), found.append)

        async def lines() -> Any:
            arguments = {**SMALL, "images": [str(tmp_path / "x.png")]}
            yield call("tools/call", name="edit_image", arguments=arguments).encode()
            while not found:
                await asyncio.sleep(0)

        await mcp.serve(lines())
        return found

    (told,) = asyncio.run(one())
    assert told["result"]["isError"]
    assert "--root FOLDER" in told["result"]["content"][0]["text"]


def test_bad_arguments_are_a_result_and_not_an_error(session: Session) -> None:
    assert session.refused("generate_image", **{**SMALL, "width": 100}).startswith("width is 100; it must be")
    assert session.refused("generate_image", **{**SMALL, "steps": 0}).startswith("steps is 0; it must be")
    assert session.refused("generate_image", **{**SMALL, "prompt": " "}) == "prompt is empty; describe a picture"
    assert session.refused("generate_image", **SMALL, n=11).startswith("n is 11; it must be")
    assert session.refused("edit_image", **SMALL, images=[]).startswith("images is empty")
    assert "LoRA folder" in session.refused("generate_image", **SMALL, lora=["../../x"])


def test_a_cancelled_call_is_not_answered_and_the_next_is(session: Session) -> None:
    session.send(call("tools/call", "long", name="generate_image", arguments={**SMALL, "steps": 900}))
    session.send('{"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": "long"}}')
    assert not session.tool("generate_image", **SMALL)["isError"]


@pytest.mark.slow
def test_a_dead_worker_is_told_and_the_next_call_has_another(session: Session) -> None:
    session.tool("generate_image", **SMALL)
    found = subprocess.run(["pgrep", "-P", str(session.process.pid)], capture_output=True, text=True, check=True)
    (worker,) = found.stdout.split()
    arguments, token = {**SMALL, "steps": 900}, {"progressToken": "dies"}
    session.send(call("tools/call", "dies", name="generate_image", arguments=arguments, _meta=token))
    while session.read()["params"]["progress"] < 1:  # a job that has not begun is made by the next worker
        pass
    os.kill(int(worker), 9)
    told = session.read()
    while "id" not in told:
        told = session.read()
    assert told["id"] == "dies"
    assert "died (signal 9)" in told["result"]["content"][0]["text"]
    assert not session.tool("generate_image", **SMALL)["isError"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_the_public_client(mode: Any) -> None:
    mcp = pytest.importorskip("mcp", reason="the MCP client is not installed: klein-mlx[server-test]")
    seen: list[tuple[float, float | None]] = []

    async def progress(done: float, total: float | None, message: str | None) -> None:
        seen.append((done, total))

    async def talk() -> tuple[Any, Any, Any]:
        server = mcp.StdioServerParameters(command=COMMAND[0], args=COMMAND[1:], env=dict(os.environ))
        async with mcp.Client(server, mode=mode) as client:
            listed = [tool.name for tool in (await client.list_tools()).tools]
            assert listed == ["generate_image", "edit_image", "list_models"]
            made = await client.call_tool("generate_image", SMALL, progress_callback=progress)
            with pytest.raises(mcp.MCPError):  # it gives up, and says so to the server
                await client.call_tool("generate_image", {**SMALL, "steps": 1000}, read_timeout_seconds=0.2)
            edited = await client.call_tool("edit_image", {**SMALL, "images": ["picture-1"]})
            return made, edited, await client.call_tool("edit_image", {**SMALL, "images": ["picture-3"]})

    made, edited, none = asyncio.run(talk())
    assert not made.is_error
    assert opened(made.content[0].data).size == (64, 64)
    assert seen[-1] == (1, 1)
    assert edited.content[1].text.startswith("picture-2: ")
    assert none.is_error


def test_options_are_checked_before_anything_is_read(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["mcp", "--model", "tiny", "--root", str(tmp_path / "none")]) == 2
    assert main(["mcp", "--model", "tiny", "--idle-unload", "-1"]) == 2
    out, told = capfd.readouterr()
    assert out == ""
    assert [line.partition(" ")[0] for line in told.splitlines()] == ["error:", "error:"]
