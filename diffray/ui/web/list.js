// The list of all runs.

import { get } from "./api.js";
import { at, make, moment, repeat, say, showState, spent } from "./dom.js";

const FEW = 8; // runs among which nobody needs to search
let shown = "";
let runs = [];

export function openList() {
  const polling = repeat(async () => {
    try {
      runs = await get("runs");
      say("");
    } catch (error) {
      say(error.message);
      return 5;
    }
    fill();
    return 5;
  });
  at("filter").oninput = fill;
  return polling.end;
}

function fill() {
  const sought = at("filter").value.trim().toLowerCase();
  const found = runs.filter((run) => `${run.name} ${run.base} ${run.state}`.toLowerCase().includes(sought));
  at("no-runs").hidden = runs.length > 0;
  at("runs").hidden = runs.length === 0;
  at("filter-field").hidden = runs.length <= FEW;
  const now = JSON.stringify(found);
  if (now === shown) return; // the focus stays where it is
  shown = now;
  const focused = document.activeElement?.closest("#runs")?.querySelector("a:focus")?.href;
  at("runs").tBodies[0].replaceChildren(...found.map(row));
  if (focused) [...at("runs").querySelectorAll("a")].find((each) => each.href === focused)?.focus();
}

function row(run) {
  const link = make("a", { href: `#/runs/${encodeURIComponent(run.name)}`, textContent: run.name });
  const about = [run.base, run.address].filter(Boolean).join(", ");
  const score = run.best ? `${run.measure} ${run.best} at ${run.step.toLocaleString()} steps` : "";
  return make(
    "tr",
    {},
    make("td", {}, link, make("small", { textContent: about })),
    make("td", {}, showState(make("span"), run)),
    make("td", { textContent: score }),
    make("td", { textContent: spent(run) }),
    make("td", { textContent: moment(run.started) }),
  );
}
