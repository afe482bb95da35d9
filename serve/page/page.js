// The page: what is chosen, what is shown, and what each control does. Routes are in api.js, elements in views.js,
// alerts and dialogs in shell.js.

import * as api from "./api.js";
import { addImages, chosenImages, clearImages, wireImages } from "./images.js";
import { ask, at, clearAlert, guarded, say, showError, wireShell } from "./shell.js";
import * as views from "./views.js";

const SHOWN = 48; // predictions of the first images; more would only scroll
const ROWS = 100;
const FIND_FROM = 10;
const POLL_MS = 250;
const MEANING = {
  distill: "The experts look at the images; the model takes a step towards what they agree on.",
  bn: "Statistics of the normalisation layers are taken from the images.",
  tent: "Scales and shifts of the normalisation layers move until predictions are more certain.",
  eata: "As tent, on reliable and varied images only, held close to the base model.",
  none: "Nothing changes; for comparison.",
};

const { plural } = views;
let states = []; // current versions, the latest first
let current = ""; // the state whose predictions are shown
let suggested = at("name").value; // what the page itself wrote into the name

/* The model and its methods */

async function loadModel() {
  const info = await api.readModel();
  const classes = info.task === "regression" ? "one value" : plural(info.class_names.length, "class", "classes");
  const teachers = info.experts ? plural(info.experts, "expert") : "no experts";
  const size = `${info.image_size.join(" × ")} pixels`;
  at("model").replaceChildren(views.el("strong", {}, info.name), [info.version.slice(0, 12), classes, teachers, size].map((part) => ` · ${part}`).join(""));
  const entries = Object.entries(info.methods);
  const usable = entries.filter(([, reason]) => reason === null).map(([name]) => name);
  const select = at("method");
  select.replaceChildren(...usable.map((name) => views.el("option", { value: name }, name)));
  if (usable.includes("distill")) select.value = "distill";
  const refused = entries.filter(([, reason]) => reason !== null);
  at("unusable").replaceChildren(...(refused.length ? [views.el("p", {}, "Not possible with this model:"),
    views.el("ul", {}, ...refused.map(([name, reason]) => views.el("li", {}, views.el("strong", {}, name), `: ${reason}`)))] : []));
  describeMethod();
}

function describeMethod() { at("method-hint").textContent = MEANING[at("method").value] ?? ""; }

/* Images */

function requireImages() {
  if (chosenImages().length) return true;
  showError(new api.ApiError({ message: "There are no images yet.", fix: "Choose some, or drop them on the field.", code: "no-images" }));
  at("images").focus();
  return false;
}

async function offerSamples() {
  const samples = await api.listSamples();
  const domains = [...new Set(samples.map(({ domain }) => domain))];
  const [button, select] = [at("samples"), at("sample-domain")];
  button.hidden = samples.length === 0;
  at("sample-field").hidden = domains.length < 2;
  select.replaceChildren(...domains.map((domain) => views.el("option", { value: domain }, domain || "(no folder)")));
  button.onclick = () => guarded(button, async () => {
    const domain = domains.length < 2 ? domains[0] : select.value;
    const files = await Promise.all(samples.filter((sample) => sample.domain === domain).map(api.readSample));
    clearImages();
    addImages(files);
    nameAfter(domain);
  });
}

/** The name of the state follows the sample domain until somebody types another one. */
function nameAfter(domain) {
  const field = at("name");
  const plain = domain.replace(/[^A-Za-z0-9_-]+/g, "-").replace(/^[-_]+/, "").slice(0, 64);
  if (plain && field.value === suggested) field.value = suggested = plain;
}

/* Predictions */

async function compare(state, heading, report = null) {
  const shown = chosenImages().slice(0, SHOWN);
  const rows = shown.length ? (await api.predict(shown.map(({ file }) => file), state)).predictions : [];
  current = state;
  at("results-name").textContent = heading;
  at("summary").replaceChildren(...(rows.length ? views.summary(rows) : []));
  at("cards").classList.toggle("both", Boolean(rows[0]?.after));
  at("cards").replaceChildren(...rows.map((row, index) => views.card(shown[index].address, shown[index].file.name, row)));
  at("cards-note").textContent = chosenImages().length > shown.length ? `The first ${shown.length} of ${chosenImages().length} images are shown.` : "";
  showReport(report);
  at("results").hidden = false;
}

function showReport(report) {
  const parts = report ? [views.experts(report.expert_weights), views.facts("The adaptation", report)].filter(Boolean) : [];
  at("report").replaceChildren(...parts);
  at("compare").classList.toggle("alone", parts.length === 0);
}

function reveal() {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  at("results").focus({ preventScroll: true });
  at("results").scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "start" });
}

async function predictOnly() {
  if (!requireImages()) return;
  await compare("", "Predictions of the base model");
  reveal();
  say(`Predictions of the base model for ${plural(Math.min(chosenImages().length, SHOWN), "image")}.`);
}

/* Adaptation */

function showProgress(done, total) {
  const bar = at("progress-bar");
  if (total > 0) {
    bar.max = total;
    bar.value = done;
  } else {
    bar.removeAttribute("value");
  }
  at("progress-text").textContent = total > 0 ? `Adapting: ${views.percent(done / total)}` : "Adapting…";
}

async function follow(job) {
  let quarter = 0;
  while (job.status === "queued" || job.status === "running") {
    showProgress(job.done, job.total);
    const reached = job.total > 0 ? Math.floor((4 * job.done) / job.total) : 0;
    if (reached > quarter && reached < 4) say(`${25 * reached}% done.`);
    quarter = reached;
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    job = await api.readJob(job.id);
  }
  showProgress(job.total, job.total);
  if (job.error) throw new api.ApiError(job.error);
  return job.report;
}

// crypto.randomUUID is missing where the page is neither on https nor on localhost.
const newKey = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

async function adapt() {
  if (!requireImages()) return;
  const name = at("name").value.trim();
  at("progress").hidden = false;
  showProgress(0, 0);
  say("The adaptation has started.");
  try {
    const options = { method: at("method").value, stepCap: at("step-cap").value, dryRun: at("dry-run").checked, key: newKey() };
    const report = await follow(await api.adapt(name, chosenImages().map(({ file }) => file), options));
    await showOutcome(name, report);
  } catch (error) {
    at("name").setAttribute("aria-invalid", String(!at("name").checkValidity()));
    if (!at("name").checkValidity()) at("name").focus();
    throw error;
  } finally {
    at("progress").hidden = true;
  }
}

async function showOutcome(name, report) {
  at("name").removeAttribute("aria-invalid");
  if (report.kept) {
    await compare(name, `Before and after: ${name}`, report);
    await loadStates();
    say(`${name} is ready. ${at("summary").textContent}`);
  } else {
    const why = report.collapsed ? "undone: the outcome had collapsed" : "dry run, nothing kept";
    await compare("", `${name}: ${why}`, report);
    say(`${name}: ${why}.`);
  }
  reveal();
}

/* States */

const ACTIONS = [
  { key: "show", text: () => "Compare", run: (record, button) => guarded(button, () => showState(record)) },
  { key: "pin", text: (record) => (record.pinned ? "Unpin" : "Pin"), run: (record, button) => change(record, button, "pin", () => api.pin(record.name, !record.pinned), record.pinned ? "unpinned" : "pinned") },
  { key: "rollback", text: () => "Roll back", run: (record, button) => guarded(button, () => askVersion(record, button)) },
  { key: "export", text: () => "Export", run: (record, button) => guarded(button, () => save(record.name)) },
  { key: "delete", text: () => "Delete", run: (record, button) => askDelete(record, button) },
];

async function loadStates() {
  states = (await api.listStates()).sort((one, other) => other.created - one.created);
  drawStates();
}

function drawStates() {
  at("find-field").hidden = states.length < FIND_FROM;
  const wanted = at("find").value.trim().toLowerCase();
  const found = states.filter(({ name }) => name.toLowerCase().includes(wanted));
  at("states").replaceChildren(views.statesTable(found.slice(0, ROWS), ACTIONS, current, states.length > 0));
  at("states-note").textContent = found.length > ROWS ? `The latest ${ROWS} of ${found.length} are shown.` : "";
}

async function change(record, button, key, action, done) {
  await guarded(button, async () => {
    await action();
    if (key !== "pin" && record.name === current) await compareAgain(key === "delete" ? "" : record.name);
    await loadStates();
    say(`${record.name} ${done}.`);
    // The table was drawn anew: give the focus back to the same control, or to the heading's button.
    const again = [...document.querySelectorAll("[data-action]")].find((node) => node.dataset.action === key && node.dataset.state === record.name);
    (again ?? at("refresh")).focus();
  });
}

async function compareAgain(name) {
  if (chosenImages().length) await compare(name, name ? `Before and after: ${name}` : "Predictions of the base model");
  else at("results").hidden = true;
}

async function showState(record) {
  await compare(record.name, chosenImages().length ? `Before and after: ${record.name}` : record.name, record);
  if (!chosenImages().length) at("cards-note").textContent = "Choose images to see what this state predicts for them.";
  await loadStates();
  reveal();
  say(`Showing ${record.name}. ${at("summary").textContent}`);
}

async function save(name) {
  const { blob, filename } = await api.exportState(name);
  const address = URL.createObjectURL(blob);
  views.el("a", { href: address, download: filename }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
  say(`${filename} saved.`);
}

function askDelete(record, button) {
  const text = "All its versions go, and clients that ask for it get an error. Export it first to keep a copy.";
  ask(`Delete ${record.name}?`, text, "Delete", [], () => change(record, button, "delete", () => api.remove(record.name), "deleted"));
}

async function askVersion(record, button) {
  const options = views.versionOptions(await api.listVersions(record.name));
  if (!options.length) {
    const message = `${record.name} has one version only.`;
    throw new api.ApiError({ message, fix: "Adapt again under this name to make another, or delete it.", code: "one-version" });
  }
  const go = (to) => change(record, button, "rollback", () => api.rollback(record.name, Number(to)), `serves version ${to} now`);
  ask(`Roll ${record.name} back`, `It serves version ${record.version} now. No version is lost.`, "Roll back", options, go);
}

/* Wiring */

function wire() {
  at("method").addEventListener("change", describeMethod);
  at("predict").addEventListener("click", (event) => guarded(event.currentTarget, predictOnly));
  at("find").addEventListener("input", drawStates);
  at("refresh").addEventListener("click", (event) => guarded(event.currentTarget, loadStates));
  at("adapt-form").addEventListener("submit", (event) => { event.preventDefault(); guarded(at("adapt"), adapt); });
  at("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    api.setToken(at("token").value);
    guarded(null, async () => { await load(); at("token-form").hidden = true; at("images").focus(); });
  });
}

async function load() {
  await loadModel();
  await loadStates();
  await offerSamples();
}

wireShell();
wireImages();
wire();
guarded(null, load).then(() => { document.documentElement.dataset.ready = "true"; });
