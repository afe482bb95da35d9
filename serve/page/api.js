// The server's routes. Addresses are relative to the page, so a gateway may add a prefix.

/** An answer that is not a success, or none at all. `fix` says what to do about it. */
export class ApiError extends Error {
  constructor({ message, fix = "", code = "", details = [], status = 0, retryAfter = null }) {
    super(message);
    Object.assign(this, { fix, code, details, status, retryAfter });
  }
}

const TOKEN_KEY = "moepipe-token";
const UNREACHABLE = { message: "The server cannot be reached.", fix: "Check that it runs, then try again.", code: "unreachable" };
const BODY_LIMIT_HINT = "Choose fewer or smaller images.";

let token = readToken();

function readToken() {
  try { return sessionStorage.getItem(TOKEN_KEY) ?? ""; } catch { return ""; }
}

/** Use `value` as bearer token from now on; it is forgotten when the tab is closed. */
export function setToken(value) {
  token = value.trim();
  try { sessionStorage.setItem(TOKEN_KEY, token); } catch { /* Storage is switched off: the token lives in this page. */ }
}

async function request(path, { query = {}, ...options } = {}) {
  const address = new URL(path, document.baseURI);
  for (const [key, value] of Object.entries(query)) {
    if (value !== null && value !== undefined && value !== "") address.searchParams.set(key, String(value));
  }
  const headers = new Headers(options.headers);
  if (token) headers.set("Authorization", `Bearer ${token}`);
  let response;
  try {
    response = await fetch(address, { ...options, headers });
  } catch {
    // A server that refuses a large upload before reading it may close the connection under the browser.
    const sent = options.body instanceof FormData;
    throw new ApiError(sent ? { ...UNREACHABLE, fix: `${UNREACHABLE.fix} If it does run: ${BODY_LIMIT_HINT.toLowerCase()}` } : UNREACHABLE);
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  const plain = { message: `The server answered ${response.status} ${response.statusText}`.trim() + ".", status: response.status, retryAfter };
  try {
    const { error } = await response.json();
    if (typeof error === "string") return new ApiError({ ...plain, message: error });
    return new ApiError({ ...plain, message: error.message ?? plain.message, fix: error.fix ?? "", code: error.code ?? "", details: error.details ?? [] });
  } catch {
    return new ApiError(plain);
  }
}

const json = async (path, options) => (await request(path, options)).json();
const state = (name) => `v1/states/${encodeURIComponent(name)}`;

function upload(files) {
  const form = new FormData();
  for (const file of files) form.append("files", file, file.name);
  return form;
}

export const readModel = () => json("v1/model");
export const listStates = async () => (await json("v1/states")).states;
export const readJob = (id) => json(`v1/jobs/${encodeURIComponent(id)}`);
export const pin = (name, pinned) => json(`${state(name)}/${pinned ? "pin" : "unpin"}`, { method: "POST" });
export const listVersions = async (name) => (await json(state(name))).versions;
export const rollback = (name, to) =>
  json(`${state(name)}/rollback`, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ to }) });
export const remove = (name) => request(state(name), { method: "DELETE" });

/** Start an adaptation; the answer is a job to follow with `readJob`. `key` makes a repeated click harmless. */
export const adapt = (name, files, { method, stepCap, dryRun, key }) =>
  json(state(name), {
    method: "POST",
    query: { method, step_cap: stepCap, dry_run: dryRun || null, wait: false },
    headers: { "Idempotency-Key": key },
    body: upload(files),
  });

/** Labels and confidences of `files`; before and after when `name` is a state. */
export const predict = (files, name = "") => json("v1/predict", { method: "POST", query: { state: name }, body: upload(files) });

/** The file of a state as the server exports it: `{ blob, filename }`. */
export async function exportState(name) {
  const response = await request(`${state(name)}/export`);
  const given = /filename="?([^";]+)"?/.exec(response.headers.get("Content-Disposition") ?? "");
  return { blob: await response.blob(), filename: given ? given[1] : `${name}.safetensors` };
}

/** Names and domains of the sample images, empty when the server offers none. */
export async function listSamples() {
  try { return (await json("v1/samples")).samples ?? []; } catch { return []; }
}

export async function readSample(sample) {
  const parts = sample.name.split("/");
  const blob = await (await request(`v1/samples/${parts.map(encodeURIComponent).join("/")}`)).blob();
  return new File([blob], parts.at(-1), { type: blob.type });
}
