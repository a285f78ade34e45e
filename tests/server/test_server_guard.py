"""The guard, with raw bytes where a client library would mend them: hosts, origins, tokens, sizes, slow clients."""

import json
import os
import select
import socket
from collections.abc import Iterator

import pytest
from serving_tools import client, port_of, raw, resident, running

from klein_mlx.server.guard import file_key
from klein_mlx.server.serving import Background

TOKEN = "a-token-of-tests"


@pytest.fixture(scope="module")
def server() -> Iterator[Background]:
    with running(read_seconds=0.5, hosts=("studio.example",), origins=("https://friend.example",)) as server:
        yield server


@pytest.fixture(scope="module")
def locked() -> Iterator[Background]:
    with running(token=TOKEN) as server:
        yield server


def ask(server: Background, *headers: str, line: str = "GET /healthz HTTP/1.1", body: bytes = b"") -> tuple[int, str]:
    """Status and the whole reply of a request with just these headers."""
    text = "\r\n".join([line, *headers, "Connection: close", "", ""])
    reply = raw(server, text.encode() + body)
    return int(reply.split(b" ", 2)[1]) if reply else 0, reply.decode("latin-1")


def host(server: Background) -> str:
    return f"Host: 127.0.0.1:{port_of(server)}"


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("127.0.0.1:PORT", 200),
        ("localhost:PORT", 200),
        ("LOCALHOST:PORT", 200),
        ("[::1]:PORT", 200),
        ("studio.example", 200),
        ("studio.example:443", 200),
        ("evil.example", 421),
        ("evil.example:PORT", 421),
        ("127.0.0.1.nip.io:PORT", 421),
        ("127.0.0.1", 421),
        ("127.0.0.1:1", 421),
        ("127.0.0.1:PORT@evil.example", 421),
        ("127.0.0.1:PORTx", 421),
        ("192.168.1.5:PORT", 421),
        ("", 421),
    ],
)
def test_hosts(server: Background, name: str, status: int) -> None:
    found, reply = ask(server, f"Host: {name.replace('PORT', str(port_of(server)))}")
    assert found == status, reply


def test_a_request_without_a_host_or_with_two_is_refused(server: Background) -> None:
    assert ask(server)[0] == 400
    assert ask(server, line="GET /healthz HTTP/1.0")[0] == 400
    assert ask(server, host(server), "Host: evil.example")[0] == 400


def test_the_host_is_looked_at_before_anything_else(locked: Background) -> None:
    assert ask(locked, "Host: evil.example", "Origin: http://evil.example", "Content-Length: 99999999999")[0] == 421


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (["Origin: http://127.0.0.1:PORT"], 200),
        (["Origin: https://friend.example"], 200),
        (["Origin: http://evil.example"], 403),
        (["Origin: http://127.0.0.1:1"], 403),
        (["Origin: null"], 403),
        (["Origin: http://127.0.0.1:PORT", "Origin: http://evil.example"], 403),
        (["Sec-Fetch-Site: same-origin"], 200),
        (["Sec-Fetch-Site: none"], 200),
        (["Sec-Fetch-Site: cross-site"], 403),
        (["Sec-Fetch-Site: same-site"], 403),
        (["Sec-Fetch-Site: Cross-Site"], 403),
        (["Sec-Fetch-Site: other-site"], 403),
        (["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: image"], 403),
        (["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: iframe"], 403),
        (["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"], 200),
    ],
)
def test_origins(server: Background, headers: list[str], status: int) -> None:
    headers = [header.replace("PORT", str(port_of(server))) for header in headers]
    found, reply = ask(server, host(server), *headers)
    assert found == status
    assert ("access-control-allow-origin" in reply.lower()) == ("friend" in headers[0])


def test_a_navigation_from_elsewhere_may_look_but_not_post(server: Background) -> None:
    fetch = ["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"]
    assert ask(server, host(server), *fetch, line="POST /api/wake HTTP/1.1")[0] == 403


def test_preflights(server: Background) -> None:
    line = "OPTIONS /v1/images/generations HTTP/1.1"
    status, reply = ask(server, host(server), line=line)
    assert status == 200
    assert "access-control" not in reply.lower()
    assert ask(server, host(server), "Origin: http://evil.example", line=line)[0] == 403
    status, reply = ask(server, host(server), "Origin: https://friend.example", line=line)
    assert status == 200
    assert "access-control-allow-methods" in reply.lower()


def test_a_preflight_needs_no_token_and_opens_nothing(locked: Background) -> None:
    for path in ("/v1/images/generations", "/api/status"):
        status, reply = ask(locked, host(locked), line=f"OPTIONS {path} HTTP/1.1")
        assert status == 200
        assert reply.endswith("\r\n\r\n")
    assert ask(locked, host(locked), line="GET /api/status HTTP/1.1")[0] == 401


def test_bodies_must_be_json_or_forms(server: Background) -> None:
    line = "POST /api/generate HTTP/1.1"
    for kind, status in (("text/plain", 415), ("application/x-www-form-urlencoded", 415), ("application/json", 400)):
        headers = [host(server), f"Content-Type: {kind}", "Content-Length: 2"]
        assert ask(server, *headers, line=line, body=b"{}")[0] == status
    assert ask(server, host(server), "Content-Length: 2", line=line, body=b"{}")[0] == 415


def test_tokens(locked: Background) -> None:
    with client(locked) as http:
        reply = http.get("/healthz")
        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == "invalid_api_key"
        for wrong in ("Bearer x", f"Basic {TOKEN}", "Bearer", f"Bearer {TOKEN}x"):
            assert http.get("/healthz", headers={"Authorization": wrong}).status_code == 401
        assert http.get("/healthz", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
        assert http.get("/?token=wrong").status_code == 401
        assert http.get(f"/healthz?token={TOKEN}").status_code == 401
        reply = http.get(f"/?token={TOKEN}")
        assert (reply.status_code, reply.headers["location"]) == (303, "/")
        cookie = reply.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "samesite=strict" in cookie.lower()
        assert TOKEN not in cookie
        assert http.get("/healthz").status_code == 200  # by the cookie
    with client(locked) as http:
        for name, status in ((cookie.partition(";")[0], 200), (f"klein_mlx={TOKEN}", 401), ("klein_mlx=", 401)):
            assert http.get("/healthz", headers={"Cookie": name}).status_code == status


def test_a_web_uis_password_is_the_token(locked: Background) -> None:
    with client(locked) as http:
        for user, password, status in (("any", TOKEN, 200), ("", TOKEN, 200), (TOKEN, "x", 401), ("any", "", 401)):
            for path in ("/sdapi/v1/options", "/api/status"):
                assert http.get(path, auth=(user, password)).status_code == status
        for wrong in ("Basic", "Basic =", "Basic //8="):
            assert http.get("/healthz", headers={"Authorization": wrong}).status_code == 401


def test_the_url_of_a_file_opens_that_file_alone(locked: Background) -> None:
    name, other = (locked.shared.files.add(data, ".png") for data in (b"one", b"other"))
    key = file_key(TOKEN, f"/api/files/{name}")
    with client(locked) as http:
        reply = http.get(f"/api/files/{name}?key={key}")
        assert (reply.status_code, reply.content, reply.headers["content-type"]) == (200, b"one", "image/png")
        for path in (f"/api/files/{name}", f"/api/files/{name}?key=", f"/api/files/{other}?key={key}"):
            assert http.get(path).status_code == 401
        for path in (f"/?key={key}", f"/api/status?key={key}", f"/api/files/../status?key={key}"):
            assert http.get(path).status_code == 401
        assert http.get("/api/files/none", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 404


def test_a_wide_address_is_served_by_number_and_token_only() -> None:
    from klein_mlx.server.guard import Guard
    from klein_mlx.server.settings import Settings

    guard = Guard(None, Settings("tiny", host="0.0.0.0", token=TOKEN))  # type: ignore[arg-type]
    assert guard._is_own("192.168.1.20:7860")
    assert not guard._is_own("evil.example:7860")
    assert not guard._is_own("192.168.1.20.nip.io:7860")


def test_safe_headers(server: Background) -> None:
    with client(server) as http:
        for path in ("/", "/api/status", "/none", "/api/none"):
            headers = http.get(path).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert "frame-ancestors 'none'" in headers["content-security-policy"]
            assert headers["referrer-policy"] == "no-referrer"
        assert http.get("/api/status").headers["cache-control"] == "no-store"
        assert http.get("/docs").status_code == 404


def test_the_pages_files_are_sent_again_only_if_they_changed(server: Background) -> None:
    with client(server) as http:
        reply = http.get("/studio.js")
        tag = reply.headers["etag"]
        assert (reply.status_code, reply.headers["cache-control"]) == (200, "no-cache")
        for wanted, status in ((tag, 304), ('"other"', 200)):
            assert http.get("/studio.js", headers={"If-None-Match": wanted}).status_code == status
        for name in (".hidden.js", "studio", "..%2fapp.py", "%2fetc%2fpasswd"):
            assert http.get(f"/{name}").status_code == 404


def test_huge_bodies_cost_no_memory(server: Background) -> None:
    line, kind = "POST /api/generate HTTP/1.1", "Content-Type: application/json"
    before = resident(os.getpid())  # the server is in this process
    assert ask(server, host(server), kind, f"Content-Length: {2 << 30}", line=line)[0] == 413
    head = "\r\n".join([line, host(server), kind, "Transfer-Encoding: chunked", "", ""])
    piece = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    with socket.create_connection(("127.0.0.1", port_of(server)), 10) as connection:
        connection.sendall(head.encode())
        pieces = 0
        while not select.select([connection], [], [], 0)[0] and pieces < 2048:
            connection.sendall(piece)
            pieces += 1
        reply = connection.recv(100)
    assert pieces >= 64  # MB
    assert reply.startswith(b"HTTP/1.1 413 ")
    assert resident(os.getpid()) - before < 16


@pytest.mark.parametrize(
    "headers",
    [
        ["Content-Length: -1"],
        ["Content-Length: 2", "Content-Length: 3"],
        ["Content-Length: x"],
        ["Content-Length: 2", "Transfer-Encoding: gzip"],
        [f"X: {'x' * 20_000}"],
    ],
)
def test_malformed_headers(server: Background, headers: list[str]) -> None:
    kind = "Content-Type: application/json"
    status, _ = ask(server, host(server), kind, *headers, line="POST /api/generate HTTP/1.1", body=b"{}")
    assert status == 400


def test_a_body_has_one_length(server: Background) -> None:
    """Of two a proxy in front might follow the other, and take the rest for a request of its own."""
    headers = [host(server), "Content-Type: application/json", "Content-Length: 2", "Transfer-Encoding: chunked"]
    status, reply = ask(server, *headers, line="POST /api/wake HTTP/1.1", body=b"2\r\n{}\r\n0\r\n\r\n")
    assert (status, "bad_length" in reply) == (400, True)


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=b"])
def test_a_client_that_leaves_within_its_body_is_no_error(
    server: Background, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = "/api/uploads" if "form" in kind else "/api/generate"
    head = "\r\n".join([f"POST {path} HTTP/1.1", host(server), f"Content-Type: {kind}", "Content-Length: 9", "", "-"])
    with socket.create_connection(("127.0.0.1", port_of(server)), 10) as connection:
        connection.sendall(head.encode())
        assert ask(server, host(server))[0] == 200  # by now it is read
    assert ask(server, host(server))[0] == 200
    assert not caplog.records


def test_slow_headers_and_bodies_are_hung_up_on(server: Background) -> None:
    for data, reply in (
        (b"", b""),
        (b"GET / HT", b""),
        (
            f"POST /api/generate HTTP/1.1\r\n{host(server)}\r\nContent-Type: application/json\r\n"
            "Content-Length: 100\r\n\r\n{".encode(),
            b" 408 ",
        ),
    ):
        received = raw(server, data, 20)
        assert reply in received if reply else not received


def form(server: Background, body: bytes, kind: str = "multipart/form-data; boundary=b") -> tuple[int, str]:
    headers = [host(server), f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    return ask(server, *headers, line="POST /api/uploads HTTP/1.1", body=body)


def test_malformed_forms(server: Background) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n'
    for body, kind in (
        (part, "multipart/form-data"),
        (part * 100_000 + b"--b--\r\n", "multipart/form-data; boundary=b"),
        (part * 21 + b"--b--\r\n", "multipart/form-data; boundary=b"),
        (b"--b\r\nX: " + b"x" * 10_000_000 + b"\r\n\r\n", "multipart/form-data; boundary=b"),
        (
            b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"x" * 2_000_000,
            "multipart/form-data; boundary=b",
        ),
        (b"--b\r\n\r\nx\r\n--b--\r\n", "multipart/form-data; boundary=b"),
        (b"nothing", "multipart/form-data; boundary=b"),
        (b"", "multipart/form-data; boundary=b"),
    ):
        status, reply = form(server, body, kind)
        assert status == 400, (body[:40], reply)


@pytest.mark.parametrize(
    "body",
    [
        "[" * 100_000,
        '{"a":' * 30 + "1" + "}" * 30,
        '{"prompt": "x", "guidance": 1e400}',
        '{"prompt": "x", "guidance": NaN}',
        "[1]",
        '"x"',
        "{",
        "\x00",
        '{"prompt": "x", "seed": "1e9x1"}{',
        '{"prompt": "x", "\\ud800": 1}',
        b'{"prompt": "\xed\xa0\x80"}',
    ],
)
def test_malformed_json(server: Background, body: str | bytes) -> None:
    with client(server) as http:
        reply = http.post("/api/generate", content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 400
        assert json.loads(reply.text)["error"]["code"] == "invalid_json"


def test_huge_pictures_are_known_by_their_header(server: Background) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (7_100, 65_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
        with client(server) as http:
            reply = http.post("/api/uploads", files={"file": ("x.png", bomb, "image/png")})
        assert reply.status_code == 400
        assert "it may have 50 million pixels" in reply.text


def test_log_lines_cannot_be_forged(caplog: pytest.LogCaptureFixture) -> None:
    from klein_mlx.server.app import Shared
    from klein_mlx.server.jobs import Job
    from klein_mlx.server.settings import Settings

    evil = "x\n12:00:00 all is well\x1b[2J"
    job = Job({"arguments": {"prompt": evil}, "format": ".png"})
    done = {"type": "done", "size": [64, 64], "seconds": {"steps": 1.0}}
    with caplog.at_level("INFO", "klein_mlx"):
        Shared(Settings("tiny"))._log(job, done)
        assert "all is well" not in caplog.text
        Shared(Settings("tiny", log_prompts=True))._log(job, done)
    assert "x\\n12:00:00 all is well\\x1b[2J" in caplog.text


def test_the_command_refuses_an_open_host_without_a_token_and_a_busy_port(server: Background, capsys) -> None:
    from klein_mlx.cli.main import main

    assert main(["serve", "--demo", "--host", "0.0.0.0"]) == 2
    assert "--token " in capsys.readouterr().err
    assert main(["serve", "--demo", "--port", str(port_of(server))]) == 2
    assert "is in use; choose another with --port" in capsys.readouterr().err
    assert main(["serve", "--demo", "--save", "/nowhere"]) == 2
    assert main(["serve", "--demo", "--model", "4b"]) == 2
    assert main(["serve", "--model", "/nowhere/model", "--port", "0"]) == 2  # in the line of another process
    assert main(["serve", "--demo", "--variant", "foo", "--port", "0"]) == 2  # likewise
