// The live loop: one request at a time, the newest wins, and answers to older ones are never shown.
const KEY_MS = 64, REST_MS = 400;
const FINAL = ["done", "error", "superseded", "cancelled"];

/** on: body(draft) -> the request or null; start, event, end, keep: what the page does;
    mended(error) -> whether to ask once more. */
export class Live {
  constructor(on) {
    this.on = on;
    this.session = crypto.getRandomValues(new Uint32Array(4)).join("-");
    this.newest = 0;
    this.asked = 0;
    this.busy = this.seen = this.dirty = this.rested = false;
    this.made = "";
  }

  /** Something was typed: a draft now if nothing runs, or what runs is seen and has steps to go (one in its last part
      may end first); else soon; the full size after a rest. */
  changed() {
    this.dirty = true;
    this.rested = false;
    clearTimeout(this.timer);
    clearTimeout(this.rest);
    this.rest = setTimeout(() => this.full(), REST_MS);
    if (this.busy && !this.seen) this.timer = setTimeout(() => this.draft(), KEY_MS);
    else this.draft();
  }

  async draft() {
    this.dirty = false;
    clearTimeout(this.timer);
    await this.ask(true, "draft");
  }

  /** The picture in its full size; a draft that runs may end first, one of the same size is it. */
  async full(now = false) {
    clearTimeout(this.rest);
    this.rested = true;
    if (!now && this.busy) return;
    clearTimeout(this.timer);
    this.dirty = false;
    await this.ask(false, "full");
  }

  async ask(draft, kind, changes = {}, again = true) {
    const asked = ++this.asked;
    let body;
    try {
      body = await this.on.body(draft);
    } catch (error) {
      if (asked === this.asked) this.on.end({ type: "error", message: error.message }, kind);
      return;
    }
    if (asked !== this.asked) return;
    if (!body) return this.stop();
    body = { ...body, ...changes };
    if (kind === "full" && this.made === JSON.stringify(body)) return this.on.keep();
    await this.run(body, kind, changes, again);
  }

  stop() {
    for (const timer of [this.timer, this.rest]) clearTimeout(timer);
    this.newest++;
    this.asked++;
    this.controller?.abort();
    const was = this.busy;
    this.busy = this.dirty = this.rested = false;
    if (was) this.on.end({ type: "cancelled" });
  }

  async run(body, kind, changes, again) {
    const own = ++this.newest;
    this.controller?.abort();
    const controller = (this.controller = new AbortController());
    this.busy = true;
    this.seen = false;
    this.on.start(kind, body);
    let end = { type: "error", code: "unreachable", message: "The server cannot be reached. Is it still running?" };
    try {
      const reply = await fetch("/api/generate", {
        method: "POST",
        signal: controller.signal,
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ ...body, session: this.session, draft: kind === "draft" }),
      });
      if (!reply.ok) end = { ...(await reply.json()).error, type: "error" };
      else {
        for await (const event of lines(reply.body)) {
          if (own !== this.newest) return;
          if (FINAL.includes(event.type)) end = event;
          else this.on.event(event, kind, body);
          this.seen = event.type === "step" && event.index < event.of;
        }
      }
    } catch {
      // Aborted, or the connection broke: `end` says so, if this is still the newest.
    }
    if (own !== this.newest) return;
    this.busy = false;
    if (again && end.type === "error" && this.on.mended(end)) return this.ask(kind === "draft", kind, changes, false);
    if (end.type === "done" && kind === "draft") this.made = JSON.stringify(body);
    this.on.end(end, kind, body);
    if (this.dirty) return this.draft();
    if (kind === "draft" && end.type === "done" && this.rested) return this.full();
  }
}

/** The JSON lines of a stream, as they come. */
async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let parts = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const found = value.split("\n");
    while (found.length > 1) {
      parts.push(found.shift());
      yield JSON.parse(parts.join(""));
      parts = [];
    }
    parts.push(found[0]);
  }
}

/** A data URI as a Blob. */
export function blobOf(uri) {
  const [head, data] = uri.split(",", 2);
  return new Blob([Uint8Array.from(atob(data), (sign) => sign.charCodeAt(0))], { type: head.slice(5).split(";")[0] });
}
