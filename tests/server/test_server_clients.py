"""Clients that take seconds to start: litellm, and OpenAI's for Node."""

import io
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_tools import npm_install, opened, picture_bytes, running

from klein_mlx.server.serving import Background

LORAS = Path(__file__).resolve().parents[2] / "examples/tiny"


@pytest.fixture(scope="module")
def server() -> Iterator[Background]:
    with running(loras=str(LORAS)) as server:
        yield server


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # litellm's own
def test_litellm(server: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network for prices
    litellm = pytest.importorskip("litellm", reason="the tests' clients are not installed: klein-mlx[server-test]")
    options = {"model": "openai/tiny", "api_base": f"{server.url}v1", "api_key": "any", "size": "64x64"}
    reply = litellm.image_generation(prompt="a red circle", n=2, **options)
    assert [opened(one.b64_json).size for one in reply.data] == [(64, 64)] * 2
    files = [io.BytesIO(picture_bytes(color, (64, 64))) for color in ("red", "blue")]
    reply = litellm.image_edit(image=files, prompt="a circle", **options)
    assert opened(reply.data[0].b64_json).size == (64, 64)


NODE = """
import OpenAI, { toFile } from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "any" });
const small = { prompt: "a red circle", size: "64x64", seed: 5, steps: 1 };
const made = await client.images.generate({ ...small, n: 2 });
const told = [made.size, made.data.map((one) => one.seed)];
const file = await toFile(Buffer.from(made.data[0].b64_json, "base64"), "a.png", { type: "image/png" });
const loras = [{ name: "silhouettes", scale: 0.5 }];
const edit = await client.images.edit({ prompt: "a circle", image: [file, file], n: 1, steps: 1, loras });
told.push(edit.usage.input_tokens_details.image_tokens);
const kinds = [];
for await (const event of await client.images.edit({
  prompt: "a circle", image: file, steps: 2, stream: true, partial_images: 1,
})) kinds.push(event.type);
told.push(kinds);
await client.images.generate({ ...small, n: 11 }).catch((error) => told.push(error.status, error.param));
for await (const model of client.models.list()) told.push(model.id);
console.log(JSON.stringify(told));
"""


@pytest.mark.slow
def test_node(server: Background, tmp_path: Path) -> None:
    npm_install(tmp_path, "openai")
    (tmp_path / "client.mjs").write_text(NODE)
    words = ["node", str(tmp_path / "client.mjs"), f"{server.url}v1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    kinds = ["image_edit.partial_image", "image_edit.completed"]
    assert json.loads(done.stdout) == ["64x64", [5, 6], 32, kinds, 400, "n", "tiny"]
