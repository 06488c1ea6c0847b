// A study: pairs of pictures in an order of the rater's own, without names; a vote, then the next pair.

import { giveFeedback, nextPair, setApiKey, studyImage } from "./api.js";

const study = new URLSearchParams(location.search).get("study") ?? "";
const at = (id) => document.getElementById(id);
const sides = ["left", "right"];
let pair = null; // null while none can be voted on

function say(error) {
  if (error.status === 401 || error.status === 403) {
    at("key-section").hidden = false;
    at("key-reason").textContent = error.words;
    return;
  }
  at("message").textContent = error.words ?? String(error);
}

async function show() {
  at("message").textContent = "";
  try {
    const next = await nextPair(study);
    at("progress").textContent = `${next.done} of ${next.total}`;
    at("key-section").hidden = true;
    at("pair").hidden = !next.left;
    if (!next.left) {
      at("message").textContent = "That was all. Thank you.";
      return;
    }
    const files = await Promise.all(sides.map((side) => studyImage(study, next[side])));
    sides.forEach((side, number) => {
      URL.revokeObjectURL(at(side).src);
      at(side).src = URL.createObjectURL(files[number]);
    });
    at("prompt").textContent = next.prompt;
    pair = next;
  } catch (error) {
    say(error);
  }
}

async function vote(side) {
  if (!pair) return;
  const voted = pair;
  pair = null;
  try {
    await giveFeedback({ image_id: voted[side], over: voted[side === "left" ? "right" : "left"] });
  } catch (error) {
    pair = voted;
    say(error);
    return;
  }
  await show();
}

for (const side of sides) at(`prefer-${side}`).addEventListener("click", () => vote(side));
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input")) return;
  if (event.key === "ArrowLeft") vote("left");
  if (event.key === "ArrowRight") vote("right");
});
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setApiKey(at("key").value.trim());
  show();
});
show();
