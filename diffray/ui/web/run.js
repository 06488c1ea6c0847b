// A run: what it does, its scores and pictures, and the model that it makes.

import { get, runPath, send } from "./api.js";
import { at, duration, make, moment, repeat, say, showState, spent } from "./dom.js";

const MOVES = ["running", "waiting", "unreached"]; // states that may change by themselves
let open = null;

class RunView {
  constructor(name) {
    Object.assign(this, { name, seen: "", trial: "", rungs: 0, state: "", version: null });
    at("run-heading").textContent = name;
    for (const id of ["run-facts", "run-line", "run-error", "log", "configuration", "version", "endpoint-line"])
      at(id).textContent = "";
    for (const id of ["model", "charts", "rungs", "try", "numbers-details", "configuration-details"]) at(id).hidden = true;
    at("charts").replaceChildren();
    at("strip").replaceChildren();
    at("drawn").replaceChildren();
    this.polling = repeat(() => this.look());
  }

  async look() {
    let run;
    try {
      run = await get(runPath(this.name, `?seen=${this.seen}`));
      say("");
    } catch (error) {
      if (open === this) say(error.message);
      return error.status === 404 ? 3600 : 5;
    }
    if (open !== this) return 3600;
    this.show(run);
    return MOVES.includes(run.state) ? 2 : 15;
  }

  show(run) {
    showState(at("run-state"), run);
    const until = run.ended ?? (run.state === "running" ? Date.now() / 1000 : null);
    const facts = [
      run.base && `${run.method} of ${run.base}`,
      run.address,
      `${run.state === "waiting" ? "asked for" : "started"} ${moment(run.started)}`,
      until && until > run.started && `for ${duration(until - run.started)}`,
      run.best && `${run.winner ? "winner:" : "best"} ${run.measure} ${run.best} at ${run.step.toLocaleString()} steps`,
      run.rungs && `${run.rungs} rungs`,
      spent(run) && spent(run).replace(/ h$/, " worker hours").replace(" h,", " worker hours, cost"),
    ];
    at("run-facts").textContent = facts.filter(Boolean).join(" · ");
    at("run-line").textContent = run.line;
    at("run-signs").replaceChildren(...(run.signs ?? []).map((textContent) => make("li", { textContent })));
    at("stop").hidden = !["running", "waiting"].includes(run.state);
    at("resume").hidden = !["failed", "stopped"].includes(run.state);
    at("report").hidden = !run.report;
    at("report").href = runPath(this.name, "/report");
    this.showLog(run.log ?? "");
    at("configuration").textContent = run.configuration ?? "";
    at("configuration-details").hidden = !run.configuration;
    if (run.charts) {
      at("charts").innerHTML = run.charts; // the server's own drawing, escaped there
      at("numbers").innerHTML = run.numbers;
    }
    const drawn = at("charts").childElementCount > 0; // the loss before the first rung
    this.seen = drawn ? (run.stamp ?? "") : "";
    at("charts").hidden = !drawn;
    at("numbers-details").hidden = !run.rungs;
    this.showTrials(run);
    if (run.published && this.version !== run.published) {
      this.version = run.published;
      this.showVersion();
    }
    at("model").hidden = !run.published;
    if (run.published) this.showEndpoint();
  }

  showLog(text) {
    const log = at("log");
    if (log.textContent === text) return;
    const atEnd = log.scrollTop + log.clientHeight > log.scrollHeight - 8;
    log.textContent = text;
    if (atEnd) log.scrollTop = log.scrollHeight;
  }

  showTrials(run) {
    const trials = run.trials ?? [];
    if (!trials.length || (run.rungs === this.rungs && run.winner === this.winner)) return;
    Object.assign(this, { rungs: run.rungs, winner: run.winner, best: trials[0][0] });
    at("trial").replaceChildren(...trials.map(([value, textContent]) => make("option", { value, textContent })));
    if (trials.some(([trial]) => trial === this.trial)) at("trial").value = this.trial;
    this.showPictures();
  }

  async showPictures() {
    const trial = (this.trial = at("trial").value);
    let rungs, given;
    try {
      [rungs, given] = await Promise.all([
        get(runPath(this.name, `/rungs?${new URLSearchParams({ trial })}`)),
        get(runPath(this.name, "/given")),
      ]);
    } catch (error) {
      return say(error.message);
    }
    if (open !== this || trial !== this.trial) return; // another one was chosen meanwhile
    const columns = rungs.map((rung) => {
      const wins = rung.step === this.winner && trial === this.best;
      const step = `${rung.step.toLocaleString()}${wins ? " ★" : ""}`;
      return make("th", { scope: "col", className: wins ? "winner" : "" }, step, make("small", { textContent: rung.score }));
    });
    // Of edits also what they begin with and what they should become.
    const before = Array.from({ length: given.references }, (_, n) => [String(n), given.references > 1 ? `before ${n + 1}` : "before"]);
    const beside = given.rows ? [...before, ["target", "target"]] : [];
    columns.unshift(...beside.map(([, textContent]) => make("th", { scope: "col", textContent })));
    const rows = [];
    for (const kind of ["samples", "prompts"]) {
      const files = [...new Set(rungs.flatMap((rung) => rung.files[kind]))];
      files.sort((one, other) => parseInt(one) - parseInt(other));
      const which = beside.filter(([name]) => kind === "samples" || name !== "target"); // own prompts have none
      for (const file of files) {
        const row = this.pictures(rungs, kind, file);
        const cells = parseInt(file) < given.rows ? which.map((each) => this.given(parseInt(file), ...each)) : [];
        while (cells.length < beside.length) cells.push(make("td"));
        row.firstChild.after(...cells);
        rows.push(row);
      }
    }
    at("rungs").hidden = !rows.length;
    at("strip").replaceChildren(
      make("thead", {}, make("tr", {}, make("td"), ...columns)),
      make("tbody", {}, ...rows),
    );
  }

  given(number, which, words) {
    const source = runPath(this.name, `/given/picture?${new URLSearchParams({ number, which })}`);
    const image = make("img", { src: `${source}&small=true`, alt: `${words} of row ${number + 1}`, loading: "lazy" });
    return make("td", {}, make("a", { href: source, target: "_blank", rel: "noopener" }, image));
  }

  pictures(rungs, kind, file) {
    const caption = file.replace(/^\d+-/, "").replace(/(-[0-9a-f]{8})?\.png$/, "").replaceAll("-", " ");
    const cells = rungs.map((rung) => {
      if (!rung.files[kind].includes(file)) return make("td");
      const query = new URLSearchParams({ trial: this.trial, step: rung.step, kind, file });
      const source = runPath(this.name, `/picture?${query}`);
      const alt = `${caption}, ${rung.step.toLocaleString()} steps`;
      const image = make("img", { src: `${source}&small=true`, alt, loading: "lazy" });
      return make("td", {}, make("a", { href: source, target: "_blank", rel: "noopener" }, image));
    });
    return make("tr", {}, make("th", { scope: "row" }, make("span", { textContent: caption })), ...cells);
  }

  async showVersion() {
    try {
      const { model, version, champion, decision } = await get(runPath(this.name, "/version"));
      const served = champion === null ? "There is no champion yet, which an endpoint would serve."
        : version === champion ? "It is the champion, which an endpoint serves."
        : `An endpoint serves the champion, version ${champion}.`;
      const [reason] = (decision ?? "registered").split("; to promote it"); // the button below does
      at("version").textContent = `${model}, version ${version}: ${reason}. ${served}`;
      at("promote").hidden = version === champion;
    } catch (error) {
      this.version = null; // asked again with the next look
      at("run-error").textContent = error.message;
    }
  }

  async showEndpoint() {
    const found = await get(runPath(this.name, "/endpoint")).catch(() => null);
    if (!found || open !== this) return;
    const words = { off: "No endpoint runs.", starting: "The endpoint starts.", ready: `Served at ${found.url}`, failed: "" };
    at("endpoint-line").textContent = [words[found.state], found.line].filter(Boolean).join(" ");
    at("endpoint-line").className = found.state === "failed" ? "error" : "hint";
    at("deploy").hidden = !["off", "failed"].includes(found.state);
    at("undeploy").hidden = !["starting", "ready"].includes(found.state);
    at("endpoint").hidden = at("try").hidden = found.state !== "ready";
    at("endpoint").href = found.url;
    if (found.state === "starting") setTimeout(() => open === this && this.showEndpoint(), 1500);
  }

  /** Do what a button says; the reason why not is told beside the buttons. */
  async act(button, words, request) {
    at("run-error").textContent = "";
    button.disabled = true;
    say(words);
    try {
      return await request();
    } catch (error) {
      at("run-error").textContent = error.message;
      return null;
    } finally {
      button.disabled = false;
      say("");
      if (open === this) this.polling.now();
    }
  }
}

const act = (id, words, request) =>
  at(id).addEventListener("click", () => open?.act(at(id), words, () => request(open)));

act("stop", "Stopping.", (run) => send("POST", runPath(run.name, "/stop")));
act("resume", "Starting.", (run) => send("POST", runPath(run.name, "/resume")));
act("promote", "Promoting.", async (run) => {
  await send("POST", runPath(run.name, "/promote"));
  await run.showVersion();
});
act("deploy", "Starting the endpoint.", (run) => send("POST", runPath(run.name, "/deploy")));
act("undeploy", "Stopping the endpoint.", (run) => send("DELETE", runPath(run.name, "/endpoint")));

at("delete").addEventListener("click", () => {
  at("delete-heading").textContent = `Delete ${open.name}?`;
  at("delete-dialog").returnValue = "";
  at("delete-dialog").showModal();
});
at("delete-dialog").addEventListener("close", async () => {
  if (at("delete-dialog").returnValue !== "delete") return;
  const done = await open.act(at("delete"), "Deleting.", () => send("DELETE", runPath(open.name)));
  if (done) location.hash = "#/";
});
at("trial").addEventListener("change", () => open?.showPictures());
at("try").addEventListener("submit", (event) => {
  event.preventDefault();
  open?.act(at("draw"), "Drawing.", async () => {
    const prompt = at("prompt").value.trim();
    const answer = await send("POST", runPath(open.name, "/draw"), { prompt });
    const image = make("img", { src: URL.createObjectURL(await answer.blob()), alt: prompt });
    at("drawn").prepend(image);
  });
});

export function openRun(name) {
  const view = new RunView(name);
  open = view;
  return () => {
    view.polling.end();
    open = null;
  };
}
