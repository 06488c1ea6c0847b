// A page of pictures with their captions. Filter and page are in the address, so that a reload shows the same.
const at = id => document.getElementById(id);
const [show, find, list, place, told] = ["show", "find", "captions", "place", "status"].map(at);
let page = 0;
let loading = 0;

function read_address() {
  const given = new URLSearchParams(location.hash.slice(1));
  show.value = [...show.options].some(each => each.value === given.get("show")) ? given.get("show") : "all";
  find.value = given.get("find") ?? "";
  page = Number.parseInt(given.get("page") ?? "1", 10) - 1 || 0;
}

function tell(words, is_alert = false) {
  told.textContent = words;
  told.classList.toggle("alert", is_alert);
}

async function answer_of(path, request) {
  let response;
  try {
    response = await fetch(path, request);
  } catch {
    throw new Error("the command on this machine no longer runs");
  }
  const answer = await response.json();
  if (!response.ok) throw new Error(typeof answer.detail === "string" ? answer.detail : "a caption needs words");
  return answer;
}

const saving = new Set();
const unsaved = () => [...list.querySelectorAll("figure.unsaved")];

async function turn_to(number) {
  await Promise.all(saving); // of the caption that was left for this
  if (unsaved().length && !confirm("Edits that are not saved would be lost. Go on?")) return;
  const turn = ++loading;
  const query = new URLSearchParams({show: show.value, find: find.value, page: number});
  try {
    const found = await answer_of(`captions?${query}`);
    if (turn !== loading) return;
    page = found.page;
    history.replaceState(null, "", `#${new URLSearchParams({show: show.value, find: find.value, page: page + 1})}`);
    for (const option of show.options) {
      option.textContent = `${option.textContent.replace(/ \(.*/, "")} (${found.counts[option.value].toLocaleString("en")})`;
    }
    place.textContent = `page ${page + 1} of ${found.pages}`;
    at("previous").disabled = page === 0;
    at("next").disabled = page + 1 === found.pages;
    list.replaceChildren(...found.items.map(figure));
    tell(found.items.length ? "" : "No picture is shown by this filter.");
    scrollTo(0, 0);
  } catch (error) {
    tell(error.message, true);
  }
}

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function facts(item) {
  const parts = [item.name];
  if (item.edited) parts.push("edited");
  else if (item.written_by) parts.push(`by ${item.written_by}`);
  if (item.same > 1) parts.push(`${item.same} alike`);
  return parts.join(" · ");
}

function figure(item) {
  const image = element("img", {src: `pictures/${item.number}`, alt: item.name, loading: "lazy"});
  const link = element("a", {href: `pictures/${item.number}?whole=true`, target: "_blank", tabIndex: -1}, image);
  const text = element("textarea", {value: item.text, spellcheck: true});
  text.setAttribute("aria-label", `Caption of ${item.name}`);
  const about = element("small", {textContent: facts(item), title: item.source});
  const state = element("small", {className: "told"});
  state.setAttribute("role", "status");
  const card = element("figure", {className: "card"}, link, text, about, state);
  let saved = item.text;

  function save() {
    const done = send().finally(() => saving.delete(done));
    saving.add(done);
    return done;
  }

  async function send() {
    const words = text.value.trim();
    if (words === saved) {
      text.value = saved;
      card.classList.remove("unsaved", "failed");
      return true;
    }
    try {
      const answer = await answer_of(`captions/${item.number}`, {
        method: "PUT",
        headers: {"content-type": "application/json"},
        body: JSON.stringify({text: words, before: saved}),
      });
      saved = answer.text;
      if (text.value.trim() === saved) card.classList.remove("unsaved");
      card.classList.remove("failed");
      state.textContent = "saved";
      about.textContent = facts({...item, edited: true, same: 1});
      return true;
    } catch (error) {
      card.classList.add("failed");
      state.textContent = `not saved: ${error.message}`;
      return false;
    }
  }

  text.addEventListener("input", () => {
    card.classList.toggle("unsaved", text.value.trim() !== saved);
    state.textContent = "";
  });
  text.addEventListener("change", save);
  text.addEventListener("keydown", async event => {
    if (event.key === "Escape") {
      text.value = saved;
      state.textContent = "";
      card.classList.remove("unsaved", "failed");
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!await save()) return;
      const next = card.nextElementSibling?.querySelector("textarea");
      if (next) next.focus();
      else if (!at("next").disabled) {
        await turn_to(page + 1);
        list.querySelector("textarea")?.focus();
      }
    }
  });
  return card;
}

show.addEventListener("change", () => turn_to(0));
find.addEventListener("input", () => turn_to(0));
at("filter").addEventListener("submit", event => event.preventDefault());
at("previous").addEventListener("click", () => turn_to(page - 1));
at("next").addEventListener("click", () => turn_to(page + 1));
addEventListener("keydown", event => {
  const is_typing = event.target.matches("textarea, input");
  if (event.key === "/" && !is_typing) {
    event.preventDefault();
    find.focus();
  } else if (event.altKey && event.key === "ArrowLeft" && !at("previous").disabled) {
    event.preventDefault();
    turn_to(page - 1);
  } else if (event.altKey && event.key === "ArrowRight" && !at("next").disabled) {
    event.preventDefault();
    turn_to(page + 1);
  }
});
addEventListener("beforeunload", event => { if (unsaved().length) event.preventDefault(); });
addEventListener("hashchange", () => { read_address(); turn_to(page); });
read_address();
turn_to(page);
