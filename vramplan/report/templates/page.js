"use strict";
// Sends where the controls stand and shows what comes back. Nothing is computed here.

const form = document.getElementById("controls");
const part = (id) => document.getElementById(id);
const REST = 250; // milliseconds without a movement, after which the slower parts are asked for
let batches = [];
let batch = 16;
let free = null; // null: the card's own
let running = false;
let again = false;
let resting = null;

function query() {
  const asked = new URLSearchParams();
  for (const [name, value] of new FormData(form)) {
    if (name !== "batch-place" && name !== "free") asked.set(name, value);
  }
  asked.set("batch", batch);
  if (free !== null) asked.set("free", free);
  return asked.toString();
}

async function ask(path, words) {
  const answer = await fetch(`${path}?${words}`);
  if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
  return answer.json();
}

function place(state) {
  if (state.batches === undefined) return;
  batches = state.batches;
  batch = state.batch;
  const batchSlider = form.elements["batch-place"];
  batchSlider.max = batches.length - 1;
  batchSlider.value = batches.indexOf(batch);
  batchSlider.setAttribute("aria-valuetext", state.batch_words);
  part("batch-words").textContent = state.batch_words;
  const freeSlider = form.elements.free;
  freeSlider.max = Math.max(state.free_most, state.free);
  freeSlider.value = state.free;
  part("free-words").textContent = `${state.free.toFixed(2)} GiB`;
  part("size-words").textContent = state.size_words;
  form.elements.size.setAttribute("aria-valuetext", state.size_words);
}

function show(state) {
  part("problem").textContent = state.problem || "";
  for (const name of ["verdict", "timeline", "levers", "card"]) fill(`${name}-part`, state[name]);
  part("command").textContent = state.command || "";
  part("tools").hidden = !state.command; // nothing to copy or to download while it is impossible
}

function fill(id, html) {
  const target = part(id);
  const open = [...target.querySelectorAll("details")].map((details) => details.open);
  target.innerHTML = html || "";
  target.querySelectorAll("details").forEach((details, i) => { details.open = open[i] ?? details.open; });
}

async function follow() {
  clearTimeout(resting);
  if (running) { again = true; return; }
  running = true;
  try {
    do {
      again = false;
      const words = query();
      const state = await ask("/view", words);
      if (again) continue; // the controls have moved on: they are the user's, not this answer's
      place(state);
      show(state);
      for (const name of ["repair", "risk-part", "ways-part"]) part(name).classList.add("stale");
      part("download").href = `/configuration.toml?${query()}`;
      document.body.dataset.shown = query();
    } while (again);
    resting = setTimeout(rest, REST);
  } catch (error) {
    gone(error);
  } finally {
    running = false;
  }
}

async function rest() {
  const words = query();
  try {
    const found = await ask("/more", words);
    if (running || words !== query()) return;
    if (found.problem) { part("problem").textContent = found.problem; return; }
    if (found.levers) fill("levers-part", found.levers);
    fill("repair", found.repair);
    fill("risk-part", found.risk);
    fill("ways-part", found.ways);
    for (const name of ["repair", "risk-part", "ways-part"]) part(name).classList.remove("stale");
    document.body.dataset.rested = words;
  } catch (error) {
    gone(error);
  }
}

function gone(error) {
  part("problem").textContent = `No answer (${error.message}): what is shown below is old. Is vramplan ui still running?`;
}

form.addEventListener("input", (event) => {
  if (event.target.name === "batch-place") batch = batches[Number(event.target.value)];
  if (event.target.name === "free") free = event.target.value;
  if (event.target.name === "gpu") free = null;
  follow();
});
form.addEventListener("submit", (event) => event.preventDefault());

part("best").addEventListener("click", async () => {
  part("best").disabled = true;
  try {
    const found = await ask("/best", query());
    if (found.problem) { part("problem").textContent = found.problem; return; }
    batch = found.batch;
    for (const [name, value] of Object.entries(found)) {
      if (name !== "batch") form.elements[name].value = value;
    }
    await follow();
  } catch (error) {
    gone(error);
  } finally {
    part("best").disabled = false;
  }
});

part("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(part("command").textContent);
    part("copy").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(part("command"));
    part("copy").textContent = "Selected: press Ctrl+C";
  }
  setTimeout(() => { part("copy").textContent = "Copy the command"; }, 2000);
});

follow();
