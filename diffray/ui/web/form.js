// A new run: pictures, recipe, plan, start.

import { get, post, upload } from "./api.js";
import { at, make, say } from "./dom.js";

const NUMBERS = ["epochs", "hour_price", "images_per_second"];
const TEXTS = ["data", "reference_columns", "mask_column", "instance_prompt", "class_prompt", "recipe", "base", "method", "name", "address"];
const FIELDS = [...TEXTS, ...NUMBERS, "settings"];
const METHODS = { lora: "LoRA", full: "Full training" };
const ENDED = { finished: true, failed: true, stopped: true };
let options = null;
const watching = {}; // the timer of each check
const asked = {}; // the run of each check that goes on
const shown = {}; // the run of each check whose result is shown
let named = ""; // the name that the page has proposed

const checkPath = (kind, name) => `checks/${kind}/${encodeURIComponent(name)}`;

// --- what was typed, which a reload of the page must not lose

const KEPT = [...FIELDS, "upload-name"];

/** The browser's copy of the form; null if there is none. Another page of this address has other folders. */
function kept(change) {
  const key = `new run below ${options.folders[0]}`;
  try {
    change?.(key);
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null; // this browser stores nothing for the page, or not this
  }
}

function keep() {
  const typed = Object.fromEntries(KEPT.map((id) => [id, at(id).value]));
  if (options) kept((key) => localStorage.setItem(key, JSON.stringify({ typed, named, checks: shown })));
}

const forget = () => kept((key) => localStorage.removeItem(key));

function restore() {
  const found = kept();
  if (!found) return;
  for (const id of KEPT) at(id).value = found.typed[id] ?? "";
  if (at("recipe").selectedIndex < 0) at("recipe").selectedIndex = 1; // one that is gone
  named = found.named;
  for (const id of ["more", "subject", "pairs"]) at(id).open = [...at(id).querySelectorAll("[name]")].some((each) => each.value);
  for (const [kind, name] of Object.entries(found.checks))
    get(checkPath(kind, name)).then((check) => showCheck(kind, check), () => {}); // or it is gone
}

export function openForm() {
  if (!options) load();
  for (const kind of Object.keys(asked))
    if (asked[kind]) follow(kind, get(checkPath(kind, asked[kind])));
  return () => Object.values(watching).forEach(clearTimeout);
}

async function load() {
  try {
    options = await get("options");
  } catch (error) {
    return say(error.message);
  }
  at("recipe").replaceChildren(
    make("option", { value: "", textContent: "the one made for the base model and method below" }),
    ...options.recipes.map((each) => make("option", { value: each.name, textContent: each.name })),
  );
  at("recipe").selectedIndex = 1;
  const bases = new Set(options.recipes.map((each) => each.base));
  at("bases").replaceChildren(...[...bases].map((value) => make("option", { value })));
  at("start-hint").textContent = `At most ${options.at_once} on this machine at once; others wait.`;
  at("data-hint").textContent = `Below ${options.folders.join(" or ")}.`;
  at("upload-hint").prepend(`Made in ${options.folders[0]}. `);
  restore();
  showRecipe();
}

function showRecipe() {
  const chosen = options.recipes.find((each) => each.name === at("recipe").value);
  at("recipe-hint").textContent = chosen ? `${chosen.text} ${METHODS[chosen.method]}, ${chosen.resolution} pixels.` : "";
  at("base").placeholder = chosen?.base ?? "a model of the hub, or a folder";
}

// --- what is asked for

function formBody() {
  const body = {};
  for (const name of TEXTS) if (at(name).value.trim()) body[name] = at(name).value.trim();
  for (const name of NUMBERS) if (at(name).value) body[name] = Number(at(name).value);
  const lines = at("settings").value.split("\n").map((each) => each.trim());
  body.settings = lines.filter(Boolean);
  body.data ??= "";
  return body;
}

function clearErrors() {
  at("form-error").textContent = "";
  for (const name of FIELDS) {
    const told = at(`${name}-error`);
    if (told) told.textContent = "";
    at(name).removeAttribute("aria-invalid");
  }
}

/** Tell an error beside its input, or beside the buttons if it has none. */
function showError(error, place = at("form-error")) {
  const input = FIELDS.includes(error.field) ? at(error.field) : null;
  const told = input && at(`${error.field}-error`);
  if (!told) {
    place.textContent = error.message;
    return place.scrollIntoView({ block: "nearest" });
  }
  for (let each = input.closest("details"); each; each = each.parentElement.closest("details")) each.open = true;
  told.textContent = error.message;
  input.setAttribute("aria-invalid", "true");
  input.focus();
}

/** The first input that the browser itself refuses, told. */
function findsMistake() {
  for (const name of [...NUMBERS, "address"]) {
    if (!at(name).checkValidity()) {
      showError({ field: name, message: at(name).validationMessage });
      return true;
    }
  }
  return false;
}

// --- dry run and plan

async function check(kind, again = false) {
  clearErrors();
  if (findsMistake()) return;
  at(kind).disabled = true;
  try {
    showCheck(kind, await post(`checks/${kind}${again ? "?again=true" : ""}`, formBody()));
  } catch (error) {
    tellCheck(kind, error);
  } finally {
    at(kind).disabled = false;
  }
}

const VERDICTS = {
  preview: { running: "Looking at the pictures …", finished: "These pictures can be used.", failed: "The pictures cannot be used like this." },
  plan: { running: "Planning …", finished: "It fits.", failed: "It does not fit, or cannot be planned." },
};
const MARKS = { finished: " good", failed: " wrong" };

function verdict(kind, words, mark = "") {
  const told = at(`${kind}-result`).firstElementChild;
  at(`${kind}-result`).hidden = false;
  told.className = `verdict${mark}`;
  if (told.textContent !== words) told.textContent = words; // a screen reader tells it once
}

/** Tell why a check was not made, beside its input or its button. */
function tellCheck(kind, error) {
  const body = at(`${kind}-result`).lastElementChild;
  verdict(kind, "", " wrong");
  body.replaceChildren();
  body.dataset.shown = "";
  showError(error, at(`${kind}-result`).firstElementChild);
}

function showCheck(kind, found) {
  const path = checkPath(kind, found.name);
  const button = (textContent, onclick) => make("button", { type: "button", textContent, onclick });
  clearTimeout(watching[kind]);
  asked[kind] = ENDED[found.status] ? null : found.name;
  shown[kind] = found.name;
  keep();
  verdict(kind, VERDICTS[kind][found.status] ?? `${found.status}.`, MARKS[found.status]);
  const parts = [];
  if (kind === "plan" && ENDED[found.status]) parts.push(essence(found.log));
  if (found.log) parts.push(make("pre", { textContent: found.log, tabIndex: 0 }));
  if (found.page) {
    const src = `${path}/page?${Date.now()}`;
    parts.push(make("iframe", { src, title: "What would be kept, and what not" }));
    parts.push(make("a", { href: src, target: "_blank", rel: "noopener", textContent: "Open in its own tab" }));
  }
  if (asked[kind]) parts.push(button("Stop", () => follow(kind, post(`${path}/stop`))));
  else if (kind === "preview") parts.push(button("Look again", () => check(kind, true)));
  const body = at(`${kind}-result`).lastElementChild;
  const now = JSON.stringify(found);
  if (body.dataset.shown !== now) body.replaceChildren(...parts);
  body.dataset.shown = now;
  if (asked[kind]) watching[kind] = setTimeout(() => follow(kind, get(path)), 1000);
}

async function follow(kind, answer) {
  try {
    showCheck(kind, await answer);
  } catch (error) {
    tellCheck(kind, error);
  }
}

/** The lines of a plan that decide: what does not fit, memory, length, hours, cost. */
function essence(log) {
  const decides = /^(does not fit|error|hours|cost|the search|a trial|an epoch)\b|^ +(in all|room per rank)\b/;
  const lines = log.split("\n").filter((line) => decides.test(line));
  const words = (line) => line.trim().replace(/^hours: give --images-per-second,/, "hours: give a speed under More settings,").replace(/^in all +/, "memory per worker: ").replace(/^room per rank +/, "room for it: ");
  return make("ul", { className: "essence" }, ...lines.map((line) => make("li", { textContent: words(line) })));
}

// --- folders and uploads

async function browse(path) {
  if (!options) return;
  let found;
  try {
    found = path ? await get(`folders?${new URLSearchParams({ path })}`) : null;
  } catch (error) {
    return showError(error);
  }
  const entries = found ? [...(found.above ? [found.above] : [""]), ...found.folders] : options.folders;
  const label = (each) => (each === found?.above || !each ? "‥ up" : found ? each.split("/").pop() : each);
  const buttons = entries.map((each) =>
    make("button", { type: "button", textContent: label(each), onclick: () => browse(each) }),
  );
  at("folders").replaceChildren(...buttons.map((each) => make("li", {}, each)));
  if (document.activeElement === document.body) buttons[0]?.focus();
  if (found) choose(found);
}

function choose(found) {
  at("data").value = found.path;
  const captions = found.captioned ? "with captions" : "without captions";
  at("data-hint").textContent = `${found.pictures.toLocaleString()} pictures directly in it, ${captions}.`;
  propose(found.path);
  keep();
}

/** A name after the folder, unless the person has given one. */
function propose(path) {
  if (at("name").value !== named) return;
  named = path.split("/").filter(Boolean).pop()?.replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "") ?? "";
  at("name").value = named;
  keep();
}

async function sendFiles() {
  const files = [...at("files").files];
  const name = at("upload-name").value.trim();
  const errors = at("upload-errors");
  errors.replaceChildren();
  const told = (text) => errors.append(make("li", { textContent: text }));
  if (!name || /[/\\]/.test(name)) return told("Name the new folder, without slashes."), at("upload-name").focus();
  if (!files.length) return told("Choose pictures."), at("files").focus();
  const folder = `${options.folders[0]}/${name}`;
  const progress = Object.assign(at("upload-progress"), { hidden: false, max: files.length, value: 0 });
  at("send").disabled = true;
  let done = 0;
  let stopped = false; // then the folder is not there yet; the same upload goes on
  for (const file of files) {
    try {
      await upload(folder, file);
      done += 1;
    } catch (error) {
      told(error.message);
      stopped = error.status === 0 || error.status === 401;
      if (stopped) break;
    }
    progress.value += 1;
  }
  say(`${done} of ${files.length} files uploaded.`);
  try {
    if (done && !stopped) {
      choose(await post("uploads/finish", { folder }));
      at("files").value = "";
    }
  } catch (error) {
    told(error.message);
  }
  at("send").disabled = false;
  progress.hidden = true;
}

// --- start

async function start() {
  clearErrors();
  if (findsMistake()) return;
  at("start").disabled = true;
  say("Starting.");
  try {
    const { name } = await post("runs", formBody());
    forget();
    location.hash = `#/runs/${encodeURIComponent(name)}`;
  } catch (error) {
    say("");
    showError(error);
  } finally {
    at("start").disabled = false;
  }
}

at("start").addEventListener("click", start); // not by Enter in an input: a run costs hours
at("form").addEventListener("submit", (event) => event.preventDefault());
at("form").addEventListener("input", keep);
at("recipe").addEventListener("change", showRecipe);
at("data").addEventListener("change", () => propose(at("data").value));
at("browse").addEventListener("toggle", () => at("browse").open && browse(at("data").value || ""));
at("send").addEventListener("click", sendFiles);
at("preview").addEventListener("click", () => check("preview"));
at("plan").addEventListener("click", () => check("plan"));
