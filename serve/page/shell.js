// What surrounds the page: alerts, the live region, the dialog and the theme.

import { ApiError } from "./api.js";
import { alertPanel } from "./views.js";

const THEMES = ["system", "light", "dark"];

export const at = (id) => document.getElementById(id);

export function say(text) { at("live").textContent = text; }

export function clearAlert() { at("alert").replaceChildren(); }

export function showError(error) {
  const known = error instanceof ApiError;
  if (error.status === 401) at("token-form").hidden = false;
  const shown = known ? error : { message: `The page failed: ${error.message}`, fix: "Reload the page.", code: "page" };
  at("alert").replaceChildren(alertPanel(shown, clearAlert));
  at("alert").scrollIntoView({ block: "nearest" });
  if (error.status === 401) at("token").focus();
}

/** Run `action` with errors shown; `button` is off meanwhile, but keeps the focus (`disabled` would lose it). */
export async function guarded(button, action) {
  if (button?.getAttribute("aria-disabled") === "true") return null;
  clearAlert();
  button?.setAttribute("aria-disabled", "true");
  try {
    return await action();
  } catch (error) {
    showError(error);
    return null;
  } finally {
    button?.removeAttribute("aria-disabled");
  }
}

/** Ask before something is done that cannot be taken back, or that needs a choice among `options`. */
export function ask(title, text, yes, options, action) {
  at("confirm-title").textContent = title;
  at("confirm-text").textContent = text;
  at("confirm-yes").textContent = yes;
  at("confirm-field").hidden = options.length === 0;
  at("confirm-version").replaceChildren(...options);
  at("confirm-yes").onclick = () => {
    at("confirm").close();
    action(at("confirm-version").value);
  };
  at("confirm").showModal();
  (options.length ? at("confirm-version") : at("confirm-no")).focus();
}

/* Theme: the system's, or one that stays */

function useTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  at("theme").textContent = `Theme: ${theme}`;
  try { localStorage.setItem("moepipe-theme", theme); } catch { /* Storage is switched off: until the page is left. */ }
}

function storedTheme() {
  try { return localStorage.getItem("moepipe-theme") ?? "system"; } catch { return "system"; }
}

export function wireShell() {
  useTheme(THEMES.includes(storedTheme()) ? storedTheme() : "system");
  at("theme").addEventListener("click", () => {
    const now = document.documentElement.dataset.theme ?? "system";
    useTheme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
  });
  at("confirm-no").addEventListener("click", () => at("confirm").close());
}
