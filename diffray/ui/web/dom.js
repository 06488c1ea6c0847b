// Elements, times and states, as every view writes them.

export const at = (id) => document.getElementById(id);

export const say = (text) => (at("status").textContent = text);

/** An element with properties and children; a child that is text stays text. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** Call `look` now and, while the page is seen, again after the seconds that it returns. Returns what ends it. */
export function repeat(look) {
  let timer = null;
  let ended = false;
  const next = async () => {
    clearTimeout(timer);
    const seconds = document.hidden ? 1 : await look();
    if (!ended) timer = setTimeout(next, 1000 * seconds);
  };
  next();
  return { end: () => ((ended = true), clearTimeout(timer)), now: next };
}

export function duration(seconds) {
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  return minutes < 48 * 60 ? `${Math.floor(minutes / 60)} h ${minutes % 60} min` : `${Math.round(minutes / 1440)} days`;
}

export const moment = (seconds) =>
  new Date(1000 * seconds).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });

export const spent = (run) =>
  run.rungs ? `${run.hours.toFixed(2)} h${run.cost === null ? "" : `, ${run.cost.toFixed(2)}`}` : "";

export function showState(element, run) {
  element.className = `state ${run.state}`;
  element.textContent = run.state === "waiting" ? `waiting, place ${run.place}` : run.state;
  return element;
}
