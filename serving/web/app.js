// The page: what the form asks for, and what the buttons do.

import { ApiError, apiKey, giveFeedback, models, setApiKey } from "./api.js";
import { EntryView, showGiven } from "./entries.js";
import { entries, forget, forgetAll, keep } from "./history.js";
import { clearMask, letPaint, paintedMask, showPainting, takeMask } from "./mask.js";
import { asCurl, asPython, requestOf } from "./recipe.js";

const MAX_SEED = 2 ** 31 - 1;
const at = (id) => document.getElementById(id);
const FIELDS = ["prompt", "strength", "model", "negative_prompt", "size", "steps", "guidance_scale", "seed"];
const NUMBERS = ["strength", "steps", "guidance_scale", "seed"];
const views = new Map(); // the history's id of an entry -> its view
const drawing = new Set();
const lacksKey = new Set(); // views to draw once there is a key

const say = (text) => (at("status").textContent = text);

// --- the form

/** The fields as a request; a field that is empty is left out. */
async function requestOfForm() {
  const request = {};
  for (const name of FIELDS) {
    const text = at(name).value.trim();
    if (text) request[name] = NUMBERS.includes(name) ? Number(text) : text;
  }
  if (at("strength-field").hidden) delete request.strength;
  if (at("image").files.length) request.images = [...at("image").files];
  if (!at("mask-field").hidden) request.mask = await paintedMask();
  return request;
}

function showFieldError(name, words) {
  if (at("settings").contains(at(name))) at("settings").open = true;
  at(`${name}-error`).textContent = words;
  at(name).setAttribute("aria-invalid", "true");
  at(name).focus();
  say(words);
}

function clearFieldErrors() {
  for (const name of [...FIELDS, "image", "mask", "n"]) {
    at(`${name}-error`).textContent = "";
    at(name).removeAttribute("aria-invalid");
  }
}

/** The first field that cannot be sent, told; the server judges everything else. */
function findsMistake() {
  if (!at("prompt").value.trim()) return showFieldError("prompt", "Describe what to draw."), true;
  for (const field of [at("n"), ...NUMBERS.map(at)])
    if (!field.checkValidity()) return showFieldError(field.id, field.validationMessage), true;
  return false;
}

async function drawForm(event) {
  event.preventDefault();
  clearFieldErrors();
  if (findsMistake()) return;
  const request = await requestOfForm();
  if (request.mask === null) return showFieldError("mask", "Paint over what is to be drawn, or choose a mask.");
  const first = request.seed ?? Math.floor(Math.random() * (MAX_SEED + 1));
  const asked = [];
  for (let i = 0; i < Number(at("n").value || 1); i++) {
    const seed = (first + i) % (MAX_SEED + 1);
    const sides = [request.model];
    // By lot, because people prefer what stands first.
    if (at("compare").checked) sides.splice(Math.round(Math.random()), 0, at("rival").value);
    asked.push(new EntryView({ ...request, seed }, sides, acts));
  }
  at("entries").prepend(...asked.map((each) => each.root));
  say(asked.length > 1 ? `Drawing ${asked.length} pictures.` : "Drawing.");
  if (matchMedia("(max-width: 799px)").matches) at("gallery").scrollIntoView();
  for (const view of asked) drawEntry(view);
}

/** Fill the form from an entry. */
function reuse({ request }) {
  for (const name of FIELDS) at(name).value = request[name] ?? "";
  if (at("model").selectedIndex < 0) at("model").value = "";
  chooseImages(request.images ?? [], request.mask);
  showModel();
  at("n").value = 1;
  at("settings").open = true;
  at("prompt").focus();
}

/** Put files into the form, as if a person had chosen them; `mask`: what was painted over the first one. */
function chooseImages(files, mask = null) {
  const chosen = new DataTransfer();
  for (const file of files) chosen.items.add(file);
  at("image").files = chosen.files;
  showImages(mask);
}

/** The chosen files, the first with what `mask` says is painted. */
function showImages(mask = null) {
  const files = [...at("image").files];
  at("chosen").hidden = !files.length;
  showGiven(at("chosen").querySelector(".given"), files);
  at("strength-field").hidden = files.length !== 1; // of several it would mean nothing
  at("mask").value = "";
  showMaskField();
  if (files.length) tryMask(clearMask() && showPainting(files[0], mask)); // also for a model that is chosen later
  showOwnSize();
}

/** A picture is painted over only for a model that paints into masks. */
function showMaskField() {
  const paints = at("model").selectedOptions[0]?.dataset.masks === "true";
  at("mask-field").hidden = !paints || !at("image").files.length;
}

/** Show what is wrong with a mask or its picture, once that is known. */
async function tryMask(tried) {
  at("mask-error").textContent = await tried.catch(() => "This picture cannot be shown.");
}

/** Which size is drawn if none is given: that of the first picture that the model looks at, or the model's own. */
function showOwnSize() {
  const { size = "", references = 0 } = at("model").selectedOptions[0]?.dataset ?? {};
  const begins = !at("strength-field").hidden && at("strength").value.trim();
  const looks = Number(references) && at("image").files.length && !begins;
  at("size").placeholder = looks ? "as the picture" : size;
}

/** What the chosen model makes of pictures, and which sizes it draws. */
function showModel() {
  const { size, references = 0, masks } = at("model").selectedOptions[0]?.dataset ?? {};
  const most = Number(references);
  at("image").multiple = most > 1;
  at("image-hint").textContent = most
    ? `The model looks at ${most > 1 ? `up to ${most} pictures` : "a picture"} while it draws.`
    : masks === "true"
      ? "The model paints into the part of the picture that you choose."
      : "Drawing begins with the picture.";
  showMaskField();
  const optional = most || masks === "true";
  at("strength").placeholder = optional ? "none" : "0.8";
  at("strength-hint").textContent = optional
    ? "Optional, up to 1: drawing then begins with the picture and changes it that far."
    : "How far the picture may change, up to 1: completely.";
  if (size) showSizes(size);
  showOwnSize();
}

// --- drawing

async function drawEntry(view) {
  drawing.add(view);
  showState();
  try {
    const entry = await view.draw();
    await remember(view, entry);
    if (drawing.size === 1) say("Done.");
  } catch (error) {
    told(error, view);
  } finally {
    drawing.delete(view);
    showState();
  }
}

/** Show an error where it can be fixed. */
function told(error, view) {
  if (error.name === "AbortError") return say("Cancelled.");
  if (!(error instanceof ApiError)) throw error;
  if (error.status === 401 || error.code === "insufficient_scope") {
    if (view) lacksKey.add(view);
    return askForKey(error);
  }
  if (view && error.param && document.querySelector(`#${CSS.escape(error.param)}-error`) && error.status < 500) {
    view.root.remove();
    if (error.param === "model") listModels();
    return showFieldError(error.param, error.words);
  }
  say(error.words);
}

function showState() {
  const focused = document.activeElement === at("cancel");
  at("cancel").hidden = drawing.size === 0;
  if (focused && at("cancel").hidden) at("draw").focus();
  at("empty").hidden = at("entries").children.length > 0;
  at("clear").hidden = views.size === 0;
}

// --- the history

async function remember(view, entry) {
  try {
    for (const id of await keep(entry)) dropView(views.get(id));
    views.set(entry.id, view);
  } catch (error) {
    say(`Done, but the picture could not be saved in this browser: ${error?.message ?? error}`);
  }
}

function dropView(view) {
  if (!view) return;
  for (const { image } of view.pictures) URL.revokeObjectURL(image.src);
  showGiven(view.given, []);
  view.root.remove();
  views.delete(view.entry?.id);
  lacksKey.delete(view);
  showState();
}

async function showHistory() {
  try {
    for (const entry of await entries()) {
      const view = EntryView.of(entry, acts);
      views.set(entry.id, view);
      at("entries").prepend(view.root);
    }
  } catch (error) {
    say(`Pictures cannot be saved in this browser: ${error?.message ?? error}`);
  }
  showState();
}

// --- what the buttons of an entry do

const acts = {
  again: (view) => drawEntry(view),
  reuse,

  async remove(view) {
    const next = view.root.nextElementSibling ?? view.root.previousElementSibling;
    view.controller?.abort();
    if (view.entry?.id) await forget(view.entry.id);
    dropView(view);
    (next?.querySelector(".delete") ?? at("prompt")).focus();
    say("Deleted.");
  },

  async rate(entryView, pictureView, rating) {
    const { picture } = pictureView;
    await feedback(entryView, { image_id: picture.image_id, rating }, () => (picture.rating = rating));
  },

  async prefer(entryView, { picture }) {
    const other = entryView.pictures.find((each) => each.picture !== picture).picture;
    const vote = { image_id: picture.image_id, over: other.image_id };
    await feedback(entryView, vote, () => (entryView.entry.winner = picture.image_id));
    entryView.root.querySelector(".winner .up")?.focus();
  },

  async copy(picture, language) {
    const where = { root: document.baseURI.replace(/[^/]*$/, ""), needsKey: Boolean(apiKey()) };
    const text = (language === "curl" ? asCurl : asPython)(requestOf(picture), where);
    try {
      await navigator.clipboard.writeText(text);
      say(`Copied as ${language}.`);
    } catch {
      // Without TLS, or without leave, browsers have no clipboard for pages.
      at("text").value = text;
      at("text-dialog").showModal();
      at("text").select();
    }
  },
};

/** Send an opinion; once the server has it, note and show it. */
async function feedback(view, body, note) {
  try {
    await giveFeedback(body);
  } catch (error) {
    return told(error);
  }
  note();
  view.update();
  say("Thank you. Your feedback was saved.");
  if (view.entry.id) await keep(view.entry);
}

// --- models

function optionsOf(cards) {
  const groups = { "": [], Versions: [], Other: [] };
  for (const card of cards) {
    const text = card.version && !card.id.includes("@") ? `${card.id} (version ${card.version})` : card.id;
    const option = new Option(text, card.id);
    Object.assign(option.dataset, { size: card.size, references: card.references, masks: card.masks });
    groups[card.id === "base" ? "Other" : card.id.includes("@") ? "Versions" : ""].push(option);
  }
  return Object.entries(groups).flatMap(([label, options]) => {
    if (!label || !options.length) return options;
    const group = Object.assign(document.createElement("optgroup"), { label });
    group.append(...options);
    return [group];
  });
}

async function listModels() {
  let cards;
  try {
    cards = await models();
  } catch (error) {
    return told(error);
  }
  const [chosen, rival] = [at("model").value, at("rival").value];
  at("model").replaceChildren(...optionsOf(cards));
  at("rival").replaceChildren(...optionsOf(cards));
  const has = (id) => cards.some((card) => card.id === id);
  at("model").value = has(chosen) ? chosen : cards[0].id;
  const candidate = cards.find((card) => card.id.endsWith(":candidate")) ?? cards.at(-1);
  at("rival").value = has(rival) ? rival : candidate.id;
  at("serving").textContent = `Drawing with ${cards[0].id}${cards[0].version ? `, version ${cards[0].version}` : ""}.`;
  showModel();
}

function showSizes(own) {
  const [side] = own.split("x").map(Number);
  const sizes = [own, `${side}x${1.5 * side}`, `${1.5 * side}x${side}`, `${2 * side}x${2 * side}`];
  at("sizes").replaceChildren(...sizes.map((each) => new Option(each, each)));
}

/** Comparing means the champion by its name, not whoever answers this time. */
function showComparing() {
  const compares = at("compare").checked;
  at("rival-field").hidden = !compares;
  const champion = [...at("model").options].find((each) => each.value === `${at("model").value}:champion`);
  if (compares && champion) at("model").value = champion.value;
}

// --- the key

function askForKey(error) {
  at("key-reason").textContent = apiKey() ? error.words : "";
  at("key-section").hidden = false;
  at("key").focus();
  say(error.words);
}

function changeKey(key) {
  setApiKey(key);
  at("key").value = "";
  at("key-section").hidden = true;
  at("change-key").hidden = !key;
  at("prompt").focus();
  listModels();
  const retried = [...lacksKey];
  lacksKey.clear();
  if (key) retried.forEach(drawEntry);
}

// --- wiring

at("draw-form").addEventListener("submit", drawForm);
at("draw-form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) drawForm(event);
});
at("cancel").addEventListener("click", () => drawing.forEach((view) => view.controller.abort()));
at("compare").addEventListener("change", showComparing);
at("model").addEventListener("change", showModel);
at("image").addEventListener("change", () => showImages());
at("mask").addEventListener("change", () => at("mask").files.length && tryMask(takeMask(at("mask").files[0])));
at("clear-mask").addEventListener("click", () => (clearMask(), (at("mask").value = "")));
letPaint(() => (at("mask-error").textContent = ""));
at("strength").addEventListener("input", showOwnSize);
at("without").addEventListener("click", () => (chooseImages([]), at("image").focus()));
at("key-form").addEventListener("submit", (event) => (event.preventDefault(), changeKey(at("key").value.trim())));
at("forget-key").addEventListener("click", () => changeKey(null));
at("change-key").addEventListener("click", () => {
  at("key-reason").textContent = "";
  at("key-section").hidden = false;
  at("key").focus();
});
at("clear").addEventListener("click", () => at("clear-dialog").showModal());
at("clear-dialog").addEventListener("close", async () => {
  if (at("clear-dialog").returnValue !== "delete") return;
  at("clear-dialog").returnValue = "";
  await forgetAll();
  [...views.values()].forEach(dropView);
  say("All pictures are deleted.");
});

at("settings").open = matchMedia("(min-width: 800px)").matches;
at("change-key").hidden = !apiKey();
showHistory();
listModels();
