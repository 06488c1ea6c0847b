// The page: which view is open, and the key that it may ask for.

import { send } from "./api.js";
import { at, say } from "./dom.js";
import { openForm } from "./form.js";
import { openList } from "./list.js";
import { openRun } from "./run.js";

let close = () => {};
let moved = false;

function route() {
  const [, page, name] = location.hash.split("/");
  close();
  say("");
  const view = page === "new" ? "new" : page === "runs" && name ? "run" : "list";
  for (const each of ["list", "new", "run"]) at(`${each}-view`).hidden = each !== view;
  for (const each of ["list", "new"]) {
    if (each === view) at(`to-${each}`).setAttribute("aria-current", "page");
    else at(`to-${each}`).removeAttribute("aria-current");
  }
  const open = { list: openList, new: openForm, run: () => openRun(decodeURIComponent(name)) }[view];
  close = open() ?? (() => {});
  const heading = at(`${view}-heading`);
  document.title = `diffray: ${view === "run" ? decodeURIComponent(name) : heading.textContent}`;
  if (moved) heading.focus(); // so that a screen reader tells the new page
  moved = true;
}

addEventListener("hashchange", route);
addEventListener("key-needed", ({ detail }) => {
  at("key-section").hidden = false;
  at("key-reason").textContent = detail;
  say("");
});
at("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await send("POST", "session", { key: at("key").value });
  } catch (error) {
    at("key-reason").textContent = error.message;
    at("key").focus();
    return;
  }
  at("key").value = "";
  at("key-section").hidden = true;
  route();
});
route();
