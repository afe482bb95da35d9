// The images that were chosen. They stay in the browser until they are sent; each is `{ file, address }`.

import { at, clearAlert, say } from "./shell.js";
import { bytes, el, plural, thumbnail } from "./views.js";

const THUMBNAILS = 200;
let images = [];
let reached = 0; // the thumbnail that the Tab key stops at; arrow keys move on from there

export const chosenImages = () => images;

export function addImages(files) {
  clearAlert();
  images = [...images, ...[...files].map((file) => ({ file, address: URL.createObjectURL(file) }))];
  draw();
}

export function clearImages() {
  for (const { address } of images) URL.revokeObjectURL(address);
  images = [];
  draw();
}

function removeImage(index) {
  const [{ file, address }] = images.splice(index, 1);
  URL.revokeObjectURL(address);
  reached = Math.max(0, Math.min(index, images.length - 1));
  draw();
  say(`${file.name} removed, ${plural(images.length, "image")} left.`);
  (thumbs()[reached] ?? at("images")).focus();
}

const thumbs = () => [...at("thumbs").querySelectorAll("button")];

function draw() {
  reached = Math.min(reached, Math.max(0, images.length - 1));
  at("thumbs").replaceChildren(...images.slice(0, THUMBNAILS).map(({ file, address }, index) => {
    const button = el("button", { type: "button", className: "thumb", tabIndex: index === reached ? 0 : -1, title: `Remove ${file.name}`, "aria-label": `Remove ${file.name}` }, thumbnail(address, ""));
    button.addEventListener("click", () => removeImage(index));
    return el("li", {}, button);
  }));
  at("drop").classList.toggle("filled", images.length > 0);
  at("chosen").hidden = images.length === 0;
  const total = images.reduce((sum, { file }) => sum + file.size, 0);
  at("chosen-text").textContent = `${plural(images.length, "image")}, ${bytes(total)}`;
  say(images.length ? `${plural(images.length, "image")} chosen.` : "No images chosen.");
}

/** Arrow keys, Home and End walk through the thumbnails; Delete removes like Enter. */
function walk(event) {
  const buttons = thumbs();
  const now = buttons.indexOf(document.activeElement);
  const steps = { ArrowRight: now + 1, ArrowDown: now + 1, ArrowLeft: now - 1, ArrowUp: now - 1, Home: 0, End: buttons.length - 1 };
  if (now < 0 || !(event.key in steps || event.key === "Delete")) return;
  event.preventDefault();
  if (event.key === "Delete") return void removeImage(now);
  buttons[now].tabIndex = -1;
  reached = Math.max(0, Math.min(steps[event.key], buttons.length - 1));
  buttons[reached].tabIndex = 0;
  buttons[reached].focus();
}

function wireDrop(drop) {
  const holds = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  let depth = 0; // dragenter and dragleave also fire for children
  drop.addEventListener("dragenter", () => drop.classList.toggle("over", ++depth > 0));
  drop.addEventListener("dragleave", () => drop.classList.toggle("over", --depth > 0));
  drop.addEventListener("drop", (event) => {
    depth = 0;
    drop.classList.remove("over");
    if (holds(event)) addImages(event.dataTransfer.files);
  });
  // A file that misses the field must not replace the page.
  for (const kind of ["dragover", "drop"]) window.addEventListener(kind, (event) => holds(event) && event.preventDefault());
}

export function wireImages() {
  at("images").addEventListener("change", (event) => {
    addImages(event.target.files);
    event.target.value = ""; // the same file may be chosen again after "Remove all"
  });
  at("clear").addEventListener("click", () => { clearImages(); at("images").focus(); });
  at("thumbs").addEventListener("keydown", walk);
  wireDrop(at("drop"));
}
