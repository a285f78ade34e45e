// The results strip: the last pictures, kept in this browser.
import { button } from "/edit.js";

const at = (id) => document.getElementById(id);
const LIMIT = 200;
const THUMB = 272;

/** shown: called with a result that was chosen. */
export class Results {
  constructor(shown) {
    this.shown = shown;
    this.store = null;
    at("clear").addEventListener("click", () => this.clear());
    at("strip").addEventListener("keydown", (event) => {
      const item = event.target.closest("li");
      const next = { ArrowRight: item?.nextElementSibling, ArrowLeft: item?.previousElementSibling }[event.key];
      next?.querySelector("button")?.focus();
    });
    this.opened = this.open();
  }

  async open() {
    try {
      const asked = indexedDB.open("klein", 1);
      asked.onupgradeneeded = () => {
        asked.result.createObjectStore("pictures", { autoIncrement: true });
        asked.result.createObjectStore("thumbs", { autoIncrement: true });
      };
      this.store = await answer(asked);
      const [keys, thumbs] = await Promise.all(["getAllKeys", "getAll"].map((name) => answer(this.in("thumbs", "readonly")[name]())));
      keys.forEach((key, index) => at("strip").prepend(this.item(thumbs[index], key)));
      this.trim();
    } catch {
      this.store = null; // a private window: results live as long as the page
    }
    this.tally();
  }

  in(name, mode = "readwrite") {
    return this.store.transaction(name, mode).objectStore(name);
  }

  /** Keep a result: {blob, prompt, seed, seconds, width, height, recipe}. */
  async add(result) {
    await this.opened;
    const { blob, recipe, ...told } = result;
    const thumb = { ...told, blob: await shrunk(blob) };
    let key = null;
    if (this.store) {
      try {
        key = await answer(this.in("pictures").add(result));
        await answer(this.in("thumbs").put(thumb, key));
      } catch {
        key = null; // the disk is full: this one lives as long as the page
      }
    }
    const item = this.item(thumb, key, result), pending = at("strip").querySelector(".pending")?.closest("li");
    if (pending) pending.replaceWith(item);
    else at("strip").prepend(item);
    this.trim();
    this.tally();
  }

  /** Places of pictures that are being made. */
  expect(count) {
    for (let index = 0; index < count; index++) {
      const item = document.createElement("li"), place = document.createElement("div");
      place.className = "pending";
      item.append(place);
      at("strip").prepend(item);
    }
  }

  expectNone() {
    for (const place of at("strip").querySelectorAll(".pending")) place.closest("li").remove();
  }

  item(thumb, key, result) {
    const item = document.createElement("li"), image = new Image();
    const open = button("", "", async () => {
      const found = result ?? (await answer(this.in("pictures", "readonly").get(key)));
      if (found) this.shown(found);
      else this.drop(item); // another window of this page removed it
    });
    if (key !== null) result = undefined; // read again when wanted
    image.loading = "lazy";
    image.alt = "";
    image.src = URL.createObjectURL(thumb.blob);
    open.title = thumb.prompt;
    open.append(image, text(thumb.prompt, "words"), text(`seed ${thumb.seed}, ${thumb.seconds.toFixed(1)} s`));
    item.append(open);
    item.key = key;
    return item;
  }

  trim() {
    while (at("strip").children.length > LIMIT) this.drop(at("strip").lastElementChild);
  }

  drop(item) {
    const image = item.querySelector("img");
    if (image) URL.revokeObjectURL(image.src);
    if (this.store && item.key != null) for (const name of ["pictures", "thumbs"]) this.in(name).delete(item.key);
    item.remove();
  }

  clear() {
    if (!confirm("Remove all results from this browser?")) return;
    for (const item of [...at("strip").children]) this.drop(item);
    this.tally();
    at("prompt").focus();
  }

  tally() {
    const count = at("strip").querySelectorAll("img").length;
    at("count").textContent = count ? `${count} of at most ${LIMIT}` : "";
    at("clear").hidden = !count;
  }
}

function text(words, name = "") {
  return Object.assign(document.createElement("span"), { textContent: words, className: name });
}

function answer(asked) {
  return new Promise((done, failed) => {
    asked.onsuccess = () => done(asked.result);
    asked.onerror = () => failed(asked.error);
  });
}

async function shrunk(blob) {
  const bitmap = await createImageBitmap(blob);
  const scale = Math.min(1, THUMB / Math.min(bitmap.width, bitmap.height));
  const board = Object.assign(document.createElement("canvas"), { width: Math.round(bitmap.width * scale), height: Math.round(bitmap.height * scale) });
  board.getContext("2d").drawImage(bitmap, 0, 0, board.width, board.height);
  bitmap.close();
  return new Promise((done) => board.toBlob(done, "image/webp", 0.85));
}
