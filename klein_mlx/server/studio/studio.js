// The page: what is asked for, what is shown. No request leaves the server that it came from.
import { fit, Pictures, button } from "/edit.js";
import { blobOf, Live } from "/live.js";
import { Results } from "/results.js";

const at = (id) => document.getElementById(id);
const SLOW_SECONDS = 5; // a picture that takes longer is announced before it starts
const IDEAS = {
  tiny: ["a red circle left of a blue square", "a green star above a yellow circle", "a purple triangle"],
  other: ["a fox reading in an autumn forest", "a paper boat on a calm lake, morning fog", "a bowl of lemons, oil painting"],
};
let facts = null; // of GET /api/status
let shown = null; // {blob, prompt, seed, seconds, width, height, recipe} on the stage
let drafted = false; // whether it is a draft
let kept = true;
let visible = ""; // the prompt of what is seen
let given = 0; // pictures of this run
let known; // to be called once the model's size is known, or cannot be
const sized = new Promise((done) => (known = done));

const pictures = new Pictures(changed, tell);
const results = new Results((result) => {
  live.stop();
  at("prompt").value = result.prompt;
  at("seed").value = result.seed;
  show(result, false);
  kept = true;
  before(null);
  tell(told(result));
});
const live = new Live({ body, start, event: happened, end, keep, mended });

// ---- what is asked for ----

function changed() {
  if (at("typing").checked) live.changed();
}

async function body(draft) {
  const prompt = at("prompt").value.trim();
  if (!prompt) return null;
  if (!facts?.model.size) tell("The model is being loaded ...");
  await sized;
  const side = draft ? Math.min(facts?.draft.side ?? 256, fullSide()) : fullSide();
  const steps = draft ? Math.min(facts?.draft.steps ?? fullSteps(), fullSteps()) : fullSteps();
  const [width, height] = fit(Number(at("shape").value), side);
  const loras = [...document.querySelectorAll("#loras input")].filter((input) => Number(input.value));
  return {
    prompt, width, height, steps, seed: seed(),
    ...(loras.length && { lora: loras.map((input) => ({ name: input.name, scale: Number(input.value) })) }),
    ...(pictures.first && (await pictures.fields(side))),
  };
}

const fullSide = () => Number(at("size").value) || facts?.model.size || 512;
const fullSteps = () => Math.min(100, Math.max(1, Math.round(Number(at("steps").value)) || facts?.model.steps || 4));
const seed = () => Math.min(2 ** 32 - 1, Math.max(0, Math.round(Number(at("seed").value)) || 0));
const random = () => crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;

// ---- what happens ----

function start(kind, asked) {
  given = 0;
  results.expectNone(); // of a run that this one replaces
  at("stop").disabled = false;
  at("progress").hidden = false;
  at("progress").style.setProperty("--part", "2%");
  at("frame").setAttribute("aria-busy", "true");
  const seconds = predicted(kind, asked.n ?? 1);
  if (seconds > SLOW_SECONDS) tell(`A picture takes about ${Math.round(seconds)} s on this machine.`);
  else if (facts && !["ready", "busy"].includes(facts.worker)) tell("The model is being loaded ...");
  if (kind === "vary") results.expect(asked.n);
}

function happened(event, kind, asked) {
  if (event.type === "queued" && event.position > 1) tell(`${event.position} requests come before this one.`);
  if (event.type === "step") {
    const part = ((event.picture ?? 0) + event.index / event.of) / (asked.n ?? 1);
    at("progress").style.setProperty("--part", `${100 * part}%`);
    const better = kind === "draft" || visible !== asked.prompt || event.index * 2 > event.of; // than what is seen
    if (event.image && better) see(event.image, asked.prompt, "sketch");
    tell(`Step ${event.index} of ${event.of}, ${event.seconds.toFixed(2)} s`);
  }
  if (event.type === "image") {
    const result = { prompt: asked.prompt, blob: blobOf(event.image), seed: event.seed, seconds: event.seconds, width: event.width, height: event.height, recipe: event.recipe };
    given++;
    show(result, kind === "draft" && smaller(asked));
    before(pictures.first, result);
    kept = kind !== "draft";
    if (kept) results.add(result);
  }
}

function end(event, kind, asked) {
  if (document.activeElement === at("stop")) at("make").focus();
  at("stop").disabled = true;
  at("progress").hidden = true;
  at("frame").removeAttribute("aria-busy");
  results.expectNone();
  if (event.type !== "done" && shown) seen(); // not the sketch of what will never be
  if (event.type === "done") {
    const { encode = 0, steps = 0, decode = 0 } = event.seconds;
    tell(told(shown));
    at("budget").textContent = `Text ${encode.toFixed(2)} s, steps ${steps.toFixed(2)} s, decoding ${decode.toFixed(2)} s. ${plan()}`;
    if (kind !== "draft") say(`${given > 1 ? `${given} pictures are` : "The picture is"} ready. ${asked.prompt}`);
    at("banner").hidden = true;
  } else if (event.type === "error") tell(event.message, true);
  else if (event.type === "cancelled") tell("Stopped.");
  poll();
}

/** The draft that is seen has the full size: it is the picture. */
function keep() {
  if (kept || !shown) return;
  kept = true;
  results.add(shown);
  say(`The picture is ready. ${shown.prompt}`);
}

function mended(error) {
  if (error.code === "worker_crashed") {
    alarm("The model's process died. A new one starts, and your last request is made once more.");
    return true;
  }
  if (!pictures.first || !["references", "init_image", "image"].includes(error.param)) return false;
  pictures.forget(); // the server dropped what was sent ahead
  return true;
}

// ---- what is shown ----

function see(source, prompt, word) {
  at("welcome").hidden = true;
  at("frame").classList.remove("empty");
  at("picture").hidden = false;
  at("picture").src = source;
  at("picture").alt = prompt;
  at("draft").textContent = word;
  at("draft").hidden = !word;
  visible = prompt;
  at("picture").classList.toggle("soft", Boolean(word));
}

function show(result, isDraft) {
  const old = at("save").href;
  shown = result;
  drafted = isDraft;
  at("save").href = URL.createObjectURL(result.blob);
  at("save").download = `klein-${result.seed}.png`;
  seen();
  at("actions").hidden = at("about").hidden = false;
  at("recipe").textContent = typeof result.recipe === "string" ? result.recipe : JSON.stringify(result.recipe, null, 1);
  if (old) URL.revokeObjectURL(old);
}

function seen() {
  see(at("save").href, shown.prompt, drafted ? "draft" : "");
}

/** The picture before an edit, in the result's size, under a slider; null for none. */
function before(picture, result) {
  at("before").hidden = at("comparing").hidden = !picture;
  const url = picture?.urls.get(`${result.width}x${result.height}`) ?? picture?.url;
  if (picture && at("before").src !== url) {
    at("before").src = url;
    at("compare").value = 0;
    at("before").style.setProperty("--shown", "0%");
  }
}

const told = (result) => `Seed ${result.seed}, ${result.width} x ${result.height}, ${result.seconds.toFixed(2)} s`;

function tell(words, bad = false) {
  at("status").textContent = words;
  at("status").classList.toggle("bad", bad);
  if (bad) say(words);
}

function say(words) {
  at("live").textContent = words;
}

function alarm(words) {
  at("banner").textContent = words;
  at("banner").hidden = false;
}

// ---- the server's state and the budget ----

function smaller(asked) {
  const [width, height] = fit(asked.width / asked.height, fullSide());
  return asked.width * asked.height < width * height || asked.steps < fullSteps();
}

function predicted(kind, count) {
  return kind === "draft" ? facts?.draft.predicted?.seconds : facts?.seconds && count * facts.seconds.seconds;
}

function plan() {
  const draft = facts?.draft, seconds = (value) => (value < 10 ? value.toFixed(1) : Math.round(value));
  if (!draft?.predicted) return "";
  const full = facts.seconds && `; ${facts.model.size} px takes about ${seconds(facts.seconds.seconds)} s`;
  return `While you type: ${draft.side} px in ${draft.steps} step${draft.steps > 1 ? "s" : ""}, about ${seconds(draft.predicted.seconds)} s${full ?? ""}.`;
}

let polling;
async function poll() {
  clearTimeout(polling);
  try {
    const reply = await fetch("/api/status"), found = await reply.json();
    if (!reply.ok) throw new Error(found.error.message);
    if (found.worker !== facts?.worker && found.worker === "ready") loras();
    facts = found;
    state();
  } catch (error) {
    known();
    at("worker").dataset.state = "down";
    at("worker").textContent = "not connected";
    alarm(error instanceof TypeError ? "The server cannot be reached. This page goes on when it is back." : error.message);
    facts = null;
  }
  polling = setTimeout(poll, facts?.worker === "ready" ? 5000 : facts && !facts.model.size ? 250 : 1500);
}

const WORDS = { off: "at rest", loading: "loading", ready: "ready", busy: "working", down: "stopped" };
function state() {
  const model = facts.model, waits = facts.queue ? `, ${facts.queue} waiting` : "";
  at("worker").dataset.state = facts.worker;
  at("worker").textContent = `${model.name}: ${WORDS[facts.worker] ?? facts.worker}${waits}`;
  at("worker").title = `${facts.memory_gb} GB in use, ${facts.memory_peak_gb} GB at most`;
  if (facts.worker === "down") alarm(facts.reason);
  else if (["ready", "busy"].includes(facts.worker)) at("banner").hidden = true;
  if (!at("budget").textContent) at("budget").textContent = plan();
  if (!at("ideas").children.length) ideas(IDEAS[model.name] ?? IDEAS.other);
  if (model.size && !at("size").children.length) {
    const sides = [model.size / 2, model.size * 0.75, model.size].filter((side) => side % 16 === 0 && side >= 64);
    at("size").replaceChildren(...sides.map((side) => new Option(`${side} px`, side, side === model.size, side === model.size)));
    at("steps").value = model.steps;
  }
  if (model.size || facts.worker !== "loading") known();
}

function ideas(all) {
  at("ideas").replaceChildren(...all.map((words) => button(words, words, () => {
    at("prompt").value = words;
    at("prompt").focus();
    live.changed();
  })));
}

async function loras() {
  if (at("loras").children.length) return;
  const reply = await fetch("/api/loras").catch(() => null);
  if (!reply?.ok) return;
  at("loras").replaceChildren(...(await reply.json()).loras.map(({ name }) => {
    const row = document.createElement("label"), value = document.createElement("output");
    const slider = Object.assign(document.createElement("input"), { type: "range", min: "0", max: "2", step: "0.05", value: "0", name });
    row.className = "lora";
    value.textContent = "off";
    slider.addEventListener("input", () => {
      value.textContent = Number(slider.value) ? slider.value : "off";
      changed();
    });
    row.append(name, slider, value);
    return row;
  }));
}

// ---- the controls ----

const on = (id, kind, action) => at(id).addEventListener(kind, action);
for (const id of ["prompt", "seed", "steps"]) on(id, "input", changed);
for (const id of ["shape", "size"]) on(id, "change", changed);
on("dice", "click", () => {
  at("seed").value = random();
  live.changed();
});
on("make", "click", () => live.full(true));
on("stop", "click", () => live.stop());
on("choose", "click", () => at("files").click());
on("files", "change", () => {
  pictures.add([...at("files").files]);
  at("files").value = "";
});
on("compare", "input", () => at("before").style.setProperty("--shown", `${at("compare").value}%`));
on("vary", "click", () => {
  at("seed").value = random();
  live.ask(false, "vary", { n: 4 });
});
on("reuse", "click", () => pictures.add([shown.blob]));
on("copy", "click", async () => {
  try {
    await navigator.clipboard.write([new ClipboardItem({ "image/png": shown.blob })]);
    tell("Copied.");
  } catch {
    tell("The browser does not let this page copy; use Save PNG.", true);
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) live.full(true);
  if (event.key === "Escape" && !at("masker").open) live.stop();
});
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
  if (files.length) {
    event.preventDefault();
    pictures.add(files);
  }
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return; // text, for a field
    event.preventDefault();
    document.body.classList.toggle("dropping", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) pictures.add([...event.dataTransfer.files]);
  });
}
if (/Mac|iP/.test(navigator.platform)) for (const key of document.querySelectorAll(".command")) key.textContent = "\u2318";
const here = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
tell(here ? "Nothing leaves this machine." : "Pictures are made on the machine that serves this page.");
poll();
