// Records of the server as elements. Text only ever enters through textContent: nothing a file or a state is called can
// become markup.

const EXPERTS_SHOWN = 14;

/** An element with properties and children; `dataset` and `aria-*` included, null children are left out. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || key === "role" || key === "scope") node.setAttribute(key, value);
    else node[key] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined).map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

export const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)}%`;
export const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;
export const number = (value) => (Math.abs(value) >= 0.01 && Math.abs(value) < 1e5 ? Number(value.toPrecision(4)).toString() : value.toExponential(2));

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB"];
  let rank = 0;
  for (; count >= 999.5 && rank < units.length - 1; rank += 1) count /= 1000;
  return `${rank && count < 99.5 ? count.toFixed(1) : Math.round(count)} ${units[rank]}`;
}

export function seconds(value) {
  return value < 1 ? `${Math.max(1, Math.round(1000 * value))} ms` : `${value.toFixed(1)} s`;
}

function bar(share) {
  const fill = el("i");
  fill.style.width = percent(Math.min(1, Math.max(0, share)), 1);
  return el("span", { className: "bar", "aria-hidden": "true" }, fill);
}

function lossChange(before, after) {
  if (before === null || before === undefined) return null;
  return after === null || after === undefined ? number(before) : `${number(before)} → ${number(after)}`;
}

/** An error as a panel: what happened, what to do, and the code to look up. */
export function alertPanel(error, onClose) {
  const retry = error.retryAfter ? ` Try again in ${plural(error.retryAfter, "second")}.` : "";
  const code = [error.code, error.status || ""].filter(Boolean).join(" · ");
  const close = el("button", { type: "button", className: "quiet", "aria-label": "Dismiss this error" }, "Dismiss");
  close.addEventListener("click", onClose);
  return el("div", {}, el("span", { className: "mark", "aria-hidden": "true" }, "!"),
    el("div", {}, el("p", { className: "what" }, error.message), el("p", { className: "fix" }, `${error.fix ?? ""}${retry}`.trim()),
      error.details?.length > 1 ? el("ul", {}, ...error.details.map((text) => el("li", {}, text))) : null,
      code ? el("p", { className: "code" }, code) : null), close);
}

/** A thumbnail; small images keep their pixels. `address` is a blob: URL. */
export function thumbnail(address, name) {
  const image = el("img", { alt: name, title: name, src: address, decoding: "async" });
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < 96));
  // Not an image, or a format that the browser cannot show; the server may read it all the same.
  image.addEventListener("error", () => image.replaceWith(el("span", { className: "tile", role: "img", "aria-label": name || "no preview" }, "no preview")));
  return image;
}

function side(title, kind, prediction) {
  const score = prediction.confidence;
  return el("div", { className: `side ${kind}` }, el("dt", {}, title),
    el("dd", {}, el("span", { className: "label" }, prediction.label), score === null || score === undefined ? null : bar(score),
      score === null || score === undefined ? null : el("span", { className: "score" }, percent(score))));
}

/** One image with its prediction before and, if there is one, after. */
export function card(address, name, { before, after }) {
  const changed = Boolean(after) && before.label !== after.label;
  const sides = after ? [side("Before", "before", before), side("After", "after", after)] : [side("Prediction", "before", before)];
  if (changed) sides[1].querySelector("dd").append(el("span", { className: "visually-hidden" }, " changed"));
  return el("li", { className: changed ? "card changed" : "card" }, thumbnail(address, name), el("dl", { className: "sides" }, ...sides));
}

const figure = (parts, text) => el("div", {}, el("p", { className: "figure" }, ...parts), el("p", {}, text));
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

/** Figures over all cards: how many labels changed, mean confidence before and after. */
export function summary(rows) {
  const scored = (key) => rows.map((row) => row[key]?.confidence).filter((value) => typeof value === "number");
  const before = scored("before");
  const after = scored("after");
  if (!rows[0]?.after) {
    return [figure([rows.length], rows.length === 1 ? "image" : "images"), ...(before.length ? [figure([percent(mean(before))], "mean confidence")] : [])];
  }
  const changed = rows.filter((row) => row.before.label !== row.after.label).length;
  return [figure([el("b", {}, changed), ` of ${rows.length}`], "predictions changed"),
    ...(before.length && after.length ? [figure([`${percent(mean(before))} → `, el("b", {}, percent(mean(after)))], "mean confidence")] : [])];
}

/** Bars of the experts' weights in the experts' order; of many, the most heard. Scaled to the largest, labelled with the share. */
export function experts(weights) {
  const all = (weights ?? []).map((weight, index) => ({ name: `Expert ${index + 1}`, weight }));
  if (!all.length) return null;
  const heard = [...all].sort((one, other) => other.weight - one.weight);
  const shown = all.length <= EXPERTS_SHOWN ? all : heard.slice(0, EXPERTS_SHOWN);
  const top = Math.max(heard[0].weight, Number.MIN_VALUE);
  const items = shown.map(({ name, weight }) =>
    el("li", {}, el("span", { className: "name" }, name), bar(weight / top), el("span", { className: "score" }, percent(weight, 1))));
  const rest = heard.slice(shown.length);
  const others = rest.length ? `The other ${rest.length} have ${percent(rest.reduce((sum, { weight }) => sum + weight, 0), 1)} together.` : "";
  return el("div", { className: "block" }, el("h3", { id: "experts-title" }, "Experts heard"),
    el("p", { className: "note" }, "Share of each in the signal that the model was pulled towards"),
    el("ul", { className: "experts", "aria-labelledby": "experts-title" }, ...items), others ? el("p", { className: "note" }, others) : null);
}

/** Facts of an adaptation, from its report or from the record of a state; what is not known is left out. */
export function facts(title, record) {
  const check = record.collapse_check ?? {};
  const share = (value) => (typeof value === "number" ? percent(value) : null);
  const top = share(check.top_share_before) && share(check.top_share_after);
  const rows = [
    ["Method", record.method],
    ["Images", record.support],
    ["Steps", record.steps],
    ["Loss", lossChange(record.loss_before, record.loss_after)],
    ["Collapse check", check.collapsed ? `failed: ${record.collapse}` : record.collapse],
    ["Most frequent answer", top ? `${share(check.top_share_before)} → ${share(check.top_share_after)}` : null],
    ["Time", typeof record.seconds === "number" ? seconds(record.seconds) : null],
    ["Size of the state", record.bytes ? bytes(record.bytes) : null],
    ["Version", record.version],
  ].filter(([, value]) => value !== null && value !== undefined && value !== "");
  return el("div", { className: check.collapsed ? "block undone" : "block" }, el("h3", {}, title),
    check.collapsed ? el("p", { className: "note" }, check.message ?? "") : null,
    el("dl", { className: "facts" }, ...rows.map(([term, value]) => el("div", {}, el("dt", {}, term), el("dd", {}, value)))));
}

const when = (stamp) => {
  const date = new Date(1000 * stamp);
  return date.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
};

/** The versions of a state as options, newest first, without the one that is served. */
export const versionOptions = (versions) => versions.filter(({ current }) => !current).sort((one, other) => other.version - one.version)
  .map((record) => el("option", { value: record.version }, `Version ${record.version}: ${record.method}, ${plural(record.support, "image")}, ${when(record.created)}`));

/** The table of states. `actions` is a list of `{ key, text(record), run(record, button) }`; `current` is the shown state, `any` whether there is a state at all. */
export function statesTable(records, actions, current, any) {
  if (!records.length) return el("p", { className: "empty" }, any ? "No state has such a name." : "No state yet. Adapt to some images, and it appears here.");
  const columns = ["State", "Version", "Method", "Images", "Loss", "Size", "Made", ""];
  const head = el("tr", {}, ...columns.map((text) => el("th", { scope: "col" }, text || el("span", { className: "visually-hidden" }, "Actions"))));
  const rows = records.map((record) => {
    const buttons = actions.map(({ key, text, run }) => {
      const button = el("button", { type: "button", className: "quiet", "aria-label": `${text(record)}: ${record.name}` }, text(record));
      button.dataset.action = key;
      button.dataset.state = record.name;
      button.addEventListener("click", () => run(record, button));
      return button;
    });
    const cells = [record.version, record.method, record.support, lossChange(record.loss_before, record.loss_after) ?? "–", bytes(record.bytes), when(record.created)];
    const tag = record.pinned ? el("span", { className: "tag" }, "pinned") : null;
    return el("tr", { className: record.name === current ? "current" : "" }, el("th", { scope: "row" }, record.name, tag),
      ...cells.map((value, index) => el("td", { "data-label": columns[index + 1] }, value)), el("td", { className: "acts" }, ...buttons));
  });
  return el("table", { "aria-labelledby": "states-title" }, el("thead", {}, head), el("tbody", {}, ...rows));
}
