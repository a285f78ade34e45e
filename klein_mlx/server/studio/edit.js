// Pictures to edit, and the mask of the first.
const at = (id) => document.getElementById(id);
export const LIMIT = 4;
const MULTIPLE = 16;

/** [width, height] of a side x side area in this shape, multiples of 16. */
export function fit(shape, side) {
  const round = (value) => Math.max(64, Math.round(value / MULTIPLE) * MULTIPLE);
  return [round(side * Math.sqrt(shape)), round(side / Math.sqrt(shape))];
}

/** changed: called when what is asked for changes. tell: shows a sentence. */
export class Pictures {
  constructor(changed, tell) {
    this.changed = changed;
    this.tell = tell;
    this.all = [];
    this.masker = new Masker(() => {
      this.draw();
      changed();
    });
  }

  get first() {
    return this.all[0];
  }

  async add(files) {
    for (const file of files) {
      if (this.all.length === LIMIT) {
        this.tell(`${LIMIT} pictures are the most; remove one first.`, true);
        break;
      }
      try {
        const bitmap = await createImageBitmap(file);
        this.all.push({ bitmap, url: URL.createObjectURL(file), strokes: [], sent: new Map(), urls: new Map() });
      } catch {
        this.tell(`${file.name || "This"} is not a picture that the browser can read.`, true);
      }
    }
    this.draw();
    this.changed();
  }

  remove(picture) {
    this.all = this.all.filter((other) => other !== picture);
    for (const url of [picture.url, ...picture.urls.values()]) URL.revokeObjectURL(url);
    picture.bitmap.close();
    this.draw();
    this.changed();
    (at("tray").querySelector("button") ?? at("choose")).focus();
  }

  draw() {
    at("tray").replaceChildren(...this.all.map((picture, index) => {
      const item = document.createElement("li"), image = new Image();
      image.src = picture.url;
      image.alt = `Picture ${index + 1}`;
      item.append(image);
      if (index === 0) item.append(button(picture.strokes.length ? "Mask set" : "Mask", "Brush a mask", () => this.masker.open(picture)));
      item.append(button("Remove", `Remove picture ${index + 1}`, () => this.remove(picture)));
      return item;
    }));
    at("shape").disabled = Boolean(this.first); // it is the first picture's
    at("choose").disabled = this.all.length === LIMIT;
  }

  /** The fields of a request for these pictures; they are sent ahead, each size once. */
  async fields(side) {
    if (!this.first) return {};
    const sides = (picture) => fit(picture.bitmap.width / picture.bitmap.height, side);
    const [width, height] = sides(this.first);
    const ids = await Promise.all(this.all.map((picture) => this.send(picture, ...sides(picture))));
    if (!this.first.strokes.length) return { width, height, references: ids };
    const mask = paint(canvas(width, height), this.first.strokes, "#000").toDataURL("image/png");
    return { width, height, init_image: ids[0], mask, init_reference: true, references: ids.slice(1) };
  }

  /** Forget what was sent: the server no longer has it. */
  forget() {
    for (const picture of this.all) picture.sent.clear();
  }

  send(picture, width, height) {
    const key = `${width}x${height}`;
    if (!picture.sent.has(key)) {
      const sent = upload(picture, width, height);
      picture.sent.set(key, sent);
      sent.catch(() => picture.sent.delete(key));
    }
    return picture.sent.get(key);
  }
}

async function upload({ bitmap, urls }, width, height) {
  const board = canvas(width, height), form = new FormData();
  const pen = board.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, 0, 0, width, height);
  const blob = await new Promise((done) => board.toBlob(done, "image/png"));
  urls.set(`${width}x${height}`, URL.createObjectURL(blob));
  form.append("image", blob, "picture.png");
  const reply = await fetch("/api/uploads", { method: "POST", body: form });
  const found = await reply.json();
  if (!reply.ok) throw new Error(found.error.message);
  return found.id;
}

function canvas(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

export function button(words, label, action) {
  const made = Object.assign(document.createElement("button"), { type: "button", textContent: words });
  if (label !== words) made.setAttribute("aria-label", `${words}: ${label}`);
  made.addEventListener("click", action);
  return made;
}

/** White strokes on a board. A stroke: {size, points}, in parts of the board's width and height. */
function paint(board, strokes, back) {
  const pen = board.getContext("2d"), { width, height } = board;
  pen.clearRect(0, 0, width, height);
  if (back) {
    pen.fillStyle = back;
    pen.fillRect(0, 0, width, height);
  }
  Object.assign(pen, { strokeStyle: "#fff", lineCap: "round", lineJoin: "round" });
  for (const { size, points } of strokes) {
    pen.lineWidth = size * Math.max(width, height);
    pen.beginPath();
    pen.moveTo(points[0][0] * width, points[0][1] * height);
    for (const [x, y] of points) pen.lineTo(x * width + 0.01, y * height);
    pen.stroke();
  }
  return board;
}

/** The dialog in which the mask is brushed. */
class Masker {
  constructor(done) {
    this.board = at("brush");
    this.here = [0.5, 0.5];
    at("masked-done").addEventListener("click", () => at("masker").close());
    at("masker").addEventListener("close", () => {
      if (this.before !== JSON.stringify(this.picture.strokes)) done();
      at("tray").querySelector("button")?.focus();
    });
    at("undo").addEventListener("click", () => this.undo());
    at("wipe").addEventListener("click", () => {
      this.picture.strokes = [];
      this.draw();
    });
    at("width").addEventListener("input", () => this.draw());
    this.board.addEventListener("pointerdown", (event) => {
      this.board.setPointerCapture(event.pointerId);
      this.begin(this.place(event));
    });
    this.board.addEventListener("pointermove", (event) => {
      if (this.board.hasPointerCapture(event.pointerId)) this.go(this.place(event));
    });
    at("masker").addEventListener("keydown", (event) => this.key(event));
  }

  open(picture) {
    this.picture = picture;
    this.before = JSON.stringify(picture.strokes);
    at("masked").src = picture.url;
    this.board.width = Math.min(1024, Math.max(256, picture.bitmap.width));
    this.board.height = Math.round(this.board.width * picture.bitmap.height / picture.bitmap.width);
    at("masker").showModal();
    this.board.focus();
    this.draw();
  }

  place(event) {
    const box = this.board.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  }

  begin(point) {
    this.picture.strokes.push({ size: at("width").value / 100, points: [point] });
    this.here = point;
    this.draw();
  }

  go(point) {
    this.picture.strokes.at(-1).points.push(point);
    this.here = point;
    this.draw();
  }

  undo() {
    this.picture.strokes.pop();
    this.draw();
  }

  key(event) {
    if (event.key === "z" && (event.ctrlKey || event.metaKey)) return this.undo();
    if (event.target !== this.board) return;
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === " ") this.begin(this.here);
    else if (move) this.here = this.here.map((value, index) => Math.min(1, Math.max(0, value + move[index] * 0.03)));
    else return;
    event.preventDefault();
    this.draw();
  }

  draw() {
    paint(this.board, this.picture.strokes);
    const pen = this.board.getContext("2d"), { width, height } = this.board;
    for (const [color, line] of [["#000", 4], ["#fff", 2]]) {
      Object.assign(pen, { strokeStyle: color, lineWidth: line });
      pen.beginPath();
      pen.arc(this.here[0] * width, this.here[1] * height, at("width").value / 200 * Math.max(width, height), 0, 7);
      pen.stroke();
    }
  }
}
