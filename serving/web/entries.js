// How an entry of the gallery looks: one picture, or two side by side, from the first noise to the vote.

import { drawPicture } from "./drawing.js";

const parts = (root, selector) => root.querySelector(selector);
const clone = (id) => document.getElementById(id).content.firstElementChild.cloneNode(true);

/** Show the files that a picture is drawn from, in place of those before. */
export function showGiven(root, files) {
  for (const image of root.children) URL.revokeObjectURL(image.src);
  const images = files.map((file) => Object.assign(new Image(), { src: URL.createObjectURL(file), alt: file.name }));
  root.replaceChildren(...images);
  root.hidden = !files.length;
}

/** One picture: drawn before your eyes, then rated, saved, copied. */
export class PictureView {
  constructor(request, index, acts) {
    this.request = request;
    this.name = "AB"[index]; // of a compared picture until the vote
    this.root = clone("picture");
    [this.image, this.progress, this.meta, this.message] = ["img", "progress", ".meta", ".message"].map((each) =>
      parts(this.root, each),
    );
    const on = (selector, act) => parts(this.root, selector).addEventListener("click", act);
    on(".up", () => acts.rate(this, this.picture.rating === 1 ? 0 : 1));
    on(".down", () => acts.rate(this, this.picture.rating === -1 ? 0 : -1));
    on(".curl", () => acts.copy(this.picture, "curl"));
    on(".python", () => acts.copy(this.picture, "Python"));
    on(".prefer", () => acts.prefer(this));
    const [width, height] = (request.size ?? "").split("x").map(Number);
    if (width && height) parts(this.root, ".frame").style.aspectRatio = `${width} / ${height}`;
    this.meta.textContent = "waiting";
  }

  display(blob) {
    URL.revokeObjectURL(this.image.src);
    this.image.src = URL.createObjectURL(blob);
    this.image.hidden = false;
  }

  partial(blob, index) {
    this.display(blob);
    this.image.dataset.partial = index;
    this.progress.value = index + 1;
    this.meta.textContent = "drawing";
  }

  wait(error, seconds) {
    this.message.textContent = error ? `${error.words} Next try in ${seconds} s.` : "";
  }

  fail(words) {
    this.root.classList.remove("busy");
    this.root.classList.add("failed");
    this.progress.hidden = true;
    this.meta.textContent = "";
    this.message.textContent = words;
  }

  /** The finished picture. */
  show(picture) {
    this.picture = picture;
    this.root.className = "picture done";
    this.display(picture.blob);
    delete this.image.dataset.partial;
    this.image.alt = picture.request.prompt;
    this.progress.hidden = true;
    parts(this.root, ".frame").style.aspectRatio = picture.size.replace("x", " / ");
    parts(this.root, ".actions").hidden = false;
    const save = parts(this.root, ".save");
    save.href = this.image.src;
    save.download = `${picture.request.prompt.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60)}-${picture.seed}.png`;
    this.update();
  }

  /** Ratings and names as they are now. */
  update({ blind = false, winner = null } = {}) {
    const { rating = 0, model, seed, size, image_id } = this.picture;
    parts(this.root, ".up").setAttribute("aria-pressed", rating === 1);
    parts(this.root, ".down").setAttribute("aria-pressed", rating === -1);
    this.root.classList.toggle("winner", winner === image_id);
    const named = blind ? `Picture ${this.name}` : model;
    const words = [named, `seed ${seed}`, size.replace("x", "\u2009×\u2009")];
    if (winner === image_id) words.push("your choice");
    this.meta.textContent = words.join(" · ");
    for (const copy of this.root.querySelectorAll(".curl, .python")) copy.hidden = blind;
  }
}

/** One picture or two of one seed, with the prompt below. */
export class EntryView {
  /** `models`: one, or two to compare; `acts`: what the buttons do. */
  constructor(request, models, acts) {
    this.request = request;
    this.entry = null; // what is kept in the history, once all is drawn
    this.root = clone("entry");
    this.root.classList.toggle("pair", models.length > 1);
    this.ofPictures = { ...acts, rate: (...what) => acts.rate(this, ...what), prefer: (view) => acts.prefer(this, view) };
    this.models = models;
    parts(this.root, ".prompt").textContent = request.prompt;
    this.given = parts(this.root, ".given");
    showGiven(this.given, [...(request.images ?? []), ...(request.mask ? [request.mask] : [])]);
    const on = (selector, act) => parts(this.root, selector).addEventListener("click", () => act(this));
    on(".again", acts.again);
    on(".reuse", acts.reuse);
    on(".delete", acts.remove);
    this.makePictures();
  }

  /** An entry of the history. */
  static of(entry, acts) {
    const view = new EntryView(entry.request, entry.pictures.map((each) => each.model), acts);
    view.show(entry);
    return view;
  }

  makePictures() {
    this.pictures = this.models.map((model, index) => {
      const request = model ? { ...this.request, model } : this.request;
      return new PictureView(request, index, this.ofPictures);
    });
    parts(this.root, ".pictures").replaceChildren(...this.pictures.map((each) => each.root));
    parts(this.root, ".again").hidden = true;
  }

  /** Draw all; gives the entry for the history. What goes wrong is shown, and thrown. */
  async draw() {
    this.controller = new AbortController();
    const { signal } = this.controller;
    this.makePictures();
    this.root.setAttribute("aria-busy", "true");
    try {
      const drawn = this.pictures.map(async (view) => {
        const picture = await drawPicture(view.request, view, signal);
        view.show(picture);
        if (this.models.length > 1) view.update({ blind: true });
        return picture;
      });
      const pictures = await Promise.all(drawn);
      this.show({ request: this.request, created: Date.now(), pictures, winner: null });
      return this.entry;
    } catch (error) {
      this.controller.abort();
      const words = error.name === "AbortError" ? "Cancelled." : (error.words ?? String(error));
      for (const view of this.pictures) if (!view.picture) view.fail(words);
      parts(this.root, ".again").hidden = false;
      throw error;
    } finally {
      this.root.removeAttribute("aria-busy");
    }
  }

  show(entry) {
    this.entry = entry;
    entry.pictures.forEach((picture, index) => this.pictures[index].show(picture));
    this.update();
  }

  /** Ratings, names and the question as they are now; a comparison is blind until the vote. */
  update() {
    const compares = this.pictures.length > 1, { winner } = this.entry;
    const asks = compares && !winner;
    for (const view of this.pictures) {
      view.update({ blind: asks, winner });
      const prefer = parts(view.root, ".prefer");
      prefer.hidden = !asks;
      prefer.textContent = `${view.name} is better`;
    }
    parts(this.root, ".question").hidden = !asks;
  }
}
