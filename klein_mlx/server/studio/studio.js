// The live page: the newest request of the session replaces older ones; answers to older ones are never shown.
const at = (id) => document.getElementById(id);
const session = crypto.getRandomValues(new Uint32Array(4)).join("-");
let newest = 0, timer, open;

async function make() {
  const prompt = at("prompt").value.trim(), own = ++newest;
  open?.abort();
  if (!prompt) return;
  open = new AbortController();
  try {
    const reply = await fetch("/api/generate", {
      method: "POST", signal: open.signal, headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ prompt, session, seed: Number(at("seed").value), draft: true }),
    });
    if (!reply.ok) return tell((await reply.json()).error.message);
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ; ) {
      const { value, done } = await reader.read();
      if (done || own !== newest) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) show(JSON.parse(line));
    }
  } catch (error) {
    if (error.name !== "AbortError") tell("The server cannot be reached.");
  }
}

function show(event) {
  if (event.image) {
    at("picture").src = event.image;
    at("picture").hidden = false;
    at("picture").className = event.type === "step" ? "draft" : "";
    at("picture").alt = at("prompt").value;
  }
  if (event.type === "queued") tell("Waiting for the model ...");
  if (event.type === "step") tell(`Step ${event.index} of ${event.of}`);
  if (event.type === "image") {
    at("save").href = event.image;
    at("save").hidden = false;
    tell(`Seed ${event.seed}, ${event.width} x ${event.height}, ${event.seconds.toFixed(2)} s`);
  }
  if (event.type === "error") tell(event.message);
}

const tell = (words) => { at("status").textContent = words; };
const soon = () => { clearTimeout(timer); timer = setTimeout(make, 64); };
at("prompt").addEventListener("input", soon);
at("seed").addEventListener("input", soon);
at("dice").addEventListener("click", () => { at("seed").value = crypto.getRandomValues(new Uint32Array(1))[0]; soon(); });
