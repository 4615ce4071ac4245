"use strict";
// The page of a human evaluation: shows one item after the other, keeps the votes, saves and loads them. No network.
(() => {
  const FORMAT = "srlm human evaluation votes 1";
  const KINDS = ["left", "right", "tie"];
  const data = JSON.parse(document.getElementById("data").textContent);
  const store = "srlm-human-evaluation-" + data.page;
  const byId = (id) => document.getElementById(id);
  const known = new Set(data.items.map((item) => item.id));
  let state = { annotator: "", votes: {}, history: [], place: 0 };
  let saved = true;  // Whether a file holds all votes.
  let kept = true;  // Whether this browser keeps them.

  const say = (text) => { byId("status").textContent = text; };
  const count = () => Object.keys(state.votes).length;
  const names = { left: "left is better", right: "right is better", tie: "a tie" };

  // Votes from outside, a file or the browser's storage: only what this page can have written is taken.
  function checked(found) {
    if (typeof found !== "object" || found === null) throw new Error("it holds no votes");
    if (found.format !== FORMAT) throw new Error("it was not saved by such a page");
    if (found.page !== data.page) throw new Error("it holds votes on another page");
    const votes = {};
    for (const [id, vote] of Object.entries(found.votes || {})) {
      if (!known.has(id) || !KINDS.includes(vote)) throw new Error("it holds a vote that this page cannot have made");
      votes[id] = vote;
    }
    return { annotator: String(found.annotator || "").slice(0, 200), votes };
  }

  function parsed(text) {
    try {
      return JSON.parse(text);
    } catch (error) {
      throw new Error("it holds no votes");
    }
  }

  const ballot = () => ({ format: FORMAT, page: data.page, annotator: state.annotator, votes: state.votes });

  function keep() {
    try {
      localStorage.setItem(store, JSON.stringify(ballot()));
      kept = true;
    } catch (error) {
      kept = false;
      say("This browser keeps nothing for this page: save your votes before you close it.");
    }
  }

  function firstOpen() {
    const open = data.items.findIndex((item) => !(item.id in state.votes));
    return open < 0 ? data.items.length - 1 : open;
  }

  function show() {
    const item = data.items[state.place];
    const vote = state.votes[item.id];
    byId("instruction").textContent = item.instruction;
    byId("left-text").textContent = item.left;
    byId("right-text").textContent = item.right;
    byId("position").textContent = `${state.place + 1} of ${data.items.length}`;
    byId("count").textContent = `${count()} of ${data.items.length} done`;
    byId("progress").value = count();
    byId("done").hidden = count() < data.items.length;
    byId("undo").disabled = state.history.length === 0;
    byId("previous").disabled = state.place === 0;
    byId("next").disabled = state.place === data.items.length - 1;
    byId("annotator").value = state.annotator;
    for (const kind of KINDS) byId("vote-" + kind).setAttribute("aria-pressed", String(vote === kind));
    byId("left").classList.toggle("chosen", vote === "left");
    byId("right").classList.toggle("chosen", vote === "right");
  }

  function move(place) {
    state.place = Math.min(Math.max(place, 0), data.items.length - 1);
    show();
    window.scrollTo(0, 0);
  }

  function cast(kind) {
    const item = data.items[state.place];
    const before = state.votes[item.id];
    state.history.push({ id: item.id, before: before === undefined ? null : before });
    state.votes[item.id] = kind;
    saved = false;
    say(`${state.place + 1}: ${names[kind]}.`);
    keep();
    // On to the next item; from the last one, to the first that is still open.
    move(state.place + 1 < data.items.length ? state.place + 1 : firstOpen());
  }

  function undo() {
    const last = state.history.pop();
    if (!last) return;
    if (last.before === null) delete state.votes[last.id];
    else state.votes[last.id] = last.before;
    saved = false;
    keep();
    const place = data.items.findIndex((item) => item.id === last.id);
    say(`${place + 1}: vote taken back.`);
    move(place);
  }

  function save() {
    state.annotator = byId("annotator").value.trim();
    if (!state.annotator) {
      say("Enter your name first: it tells your votes from those of others.");
      byId("annotator").focus();
      return;
    }
    keep();
    const link = document.createElement("a");
    const url = URL.createObjectURL(new Blob([JSON.stringify(ballot(), null, 1)], { type: "application/json" }));
    link.href = url;
    link.download = `votes-${state.annotator.replace(/[^\p{L}\p{N}]+/gu, "-")}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
    saved = true;
    say(`Saved ${count()} of ${data.items.length} votes as ${link.download}.`);
  }

  async function load(file) {
    try {
      const found = checked(parsed(await file.text()));
      if (count() && !confirm("Replace the votes on this page by those of the file?")) return;
      state = { ...found, history: [], place: 0 };
      saved = true;
      keep();
      move(firstOpen());
      say(`Loaded ${count()} votes of ${state.annotator || "nobody by name"}.`);
    } catch (error) {
      say(`${file.name} cannot be loaded: ${error.message}.`);
    }
  }

  function clear() {
    if (!confirm("Delete all votes on this page? Saved files stay.")) return;
    state = { annotator: "", votes: {}, history: [], place: 0 };
    saved = true;
    try {
      localStorage.removeItem(store);
    } catch (error) {
      // Nothing was kept there.
    }
    move(0);
    say("All votes are deleted.");
  }

  const keys = {
    "1": () => cast("left"), ArrowLeft: () => cast("left"),
    "2": () => cast("right"), ArrowRight: () => cast("right"),
    "0": () => cast("tie"), ArrowDown: () => cast("tie"),
    u: undo, Backspace: undo,
    p: () => move(state.place - 1), n: () => move(state.place + 1),
  };
  document.addEventListener("keydown", (event) => {
    const typing = event.target instanceof HTMLInputElement;
    const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action || typing || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    action();
  });

  for (const kind of KINDS) byId("vote-" + kind).addEventListener("click", () => cast(kind));
  byId("undo").addEventListener("click", undo);
  byId("previous").addEventListener("click", () => move(state.place - 1));
  byId("next").addEventListener("click", () => move(state.place + 1));
  byId("save").addEventListener("click", save);
  byId("clear").addEventListener("click", clear);
  byId("load").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (file) load(file);
  });
  byId("annotator").addEventListener("input", (event) => { state.annotator = event.target.value; keep(); });
  window.addEventListener("beforeunload", (event) => { if (!saved && !kept) event.preventDefault(); });

  try {
    const found = localStorage.getItem(store);
    if (found) {
      state = { ...state, ...checked(JSON.parse(found)) };
      say(`Going on with ${count()} votes that this browser kept.`);
    }
  } catch (error) {
    say("Votes that this browser kept could not be read; load a saved file, if you have one.");
  }
  byId("progress").max = data.items.length;
  byId("app").hidden = false;
  move(firstOpen());
})();
