// The page: what is dropped, chosen and started, and what comes back.

import { model, pictures, Refused, setToken } from "./api.js";
import { commandLine, python } from "./commands.js";
import { Cutout } from "./cutout.js";
import { showFound } from "./marks.js";
import { accept, Objects } from "./objects.js";
import { withText } from "./png.js";
import { described, formOf, pathOf, previewEvery } from "./request.js";
import { Stage } from "./stage.js";
import { TARGET, TASKS } from "./tasks.js";

const find = (id) => document.getElementById(id);
const REFINE_FROM = 200; // the timestep of --refine without a number
const QUALITIES = { exact: "exact", balanced: "balanced, twice as fast", fast: "fast, four times as fast" };

let about = null; // what the server says of its model
let scene = null; // File
let shown = null; // the newest picture: { image, file, request }
let running = null; // AbortController
let marksOf = {}; // task -> marks, while another task is chosen
const REMEMBERED = 20;
const history = [];
let asked = 0; // how often the server was asked for a model
let opened = 0; // how often a scene was chosen

const stage = new Stage(find("canvas"), find("canvas-box"), marked);
const cutout = new Cutout(find("cut"));
const objects = new Objects(find("objects"), find("object"), {
  takesWords: () => about?.condition === "text",
  canClick: () => Boolean(about?.clicks),
  hasPlaces: () => task() === "composite",
  choose: (index, isFocused) => {
    choose(index);
    if (isFocused) find("canvas-box").focus();
  },
  changed: refresh,
  removed: (index) => {
    stage.marks.splice(index, 1);
    const chosen = stage.chosen - (index < stage.chosen);
    choose(Math.min(chosen, objects.items.length - 1));
  },
  cut: (each) => {
    const done = (clicks) => {
      Object.assign(each, { clicks, automatic: false });
      objects.showCut(each);
    };
    cutout.open(each.file, done).catch(() => say(`'${each.file.name}' cannot be shown here.`));
  },
  say,
});

const task = () => find("task").value;
// What is marked: a place for each object, or what the task needs.
const needed = () => TASKS[task()].marks ?? objects.items.map(() => TARGET);
const used = () => (TASKS[task()].reference ? (TASKS[task()].marks ? objects.items.slice(0, 1) : objects.items) : []);

// --- what is shown ---

function say(text) {
  find("message").textContent = text;
  find("message").hidden = !text;
}

function refresh() {
  objects.mark(stage.chosen);
  for (const [index, button] of [...find("marks").children].entries()) {
    button.setAttribute("aria-pressed", String(index === stage.chosen));
  }
  const ready = about && scene && needed().every((_, index) => stage.marks[index]) && used().every((each) => objects.said(each));
  find("start").disabled = Boolean(running) || !ready;
  find("again").disabled = Boolean(running) || !shown || !ready;
  for (const id of ["download", "copy-command", "copy-python"]) find(id).disabled = !shown;
  find("undo").disabled = Boolean(running) || !(history.length || isPutAway());
  find("compare").hidden = !stage.result;
  find("progress").hidden = !running;
  find("canvas-box").classList.toggle("has-scene", Boolean(scene));
  find("other-scene").hidden = !scene;
}

// Whether a picture is there, and not shown since something was marked.
const isPutAway = () => Boolean(shown) && !stage.result;

// Shows what a task needs and a model takes.
function arrange() {
  const { marks, reference, redraws, mode, start: verb } = TASKS[task()];
  find("marks").replaceChildren(...(marks ?? []).map((mark, index) => markButton(mark, index)));
  find("sources").hidden = !reference;
  find("add").hidden = Boolean(marks);
  find("modes").hidden = !mode;
  find("starting").hidden = !(reference || redraws) || about?.defaults.strength === undefined;
  find("refining").hidden = !(reference || redraws) || about?.defaults.refine === undefined;
  find("filling").hidden = !about?.filler || !marks || task() === "try-on";
  for (const label of document.querySelectorAll(".sampled")) label.hidden = task() === "remove";
  find("start").textContent = verb;
  objects.draw();
  for (const [index, row] of [...find("objects").children].entries()) row.hidden = Boolean(marks) && index > 0;
  stage.tool = "";
  choose(0);
}

function markButton(mark, index) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = mark.label;
  button.addEventListener("click", () => {
    choose(index);
    find("canvas-box").focus();
  });
  return button;
}

// Makes a mark the one that the tools change.
function choose(index) {
  stage.chosen = index;
  stage.result = null;
  const tools = needed()[index].tools.filter((tool) => about?.clicks || !["click", "not"].includes(tool));
  for (const input of document.getElementsByName("tool")) input.parentElement.hidden = !tools.includes(input.value);
  use(tools.includes(stage.tool) ? stage.tool : tools[0]);
  refresh();
}

function use(tool) {
  stage.tool = tool;
  for (const input of document.getElementsByName("tool")) input.checked = input.value === tool;
  find("brushes").hidden = !["paint", "erase"].includes(tool);
  stage.draw();
}

async function marked(mark) {
  refresh();
  if (mark?.clicks) await showFound(scene, mark, stage, say);
}

async function setScene(file) {
  const turn = ++opened;
  let image;
  try {
    image = await createImageBitmap(file);
  } catch {
    if (turn === opened) say(`'${file.name}' cannot be read as a picture.`);
    return;
  }
  if (turn !== opened) return; // another was chosen meanwhile
  running?.abort();
  stage.setScene(image);
  scene = file;
  shown = null;
  history.length = 0;
  stage.marks = [];
  marksOf = {};
  say("");
  refresh();
}

// --- a picture is made ---

function requested() {
  const number = (id) => (find(id).value === "" ? null : Number(find(id).value));
  const value = (id) => (find(id).closest("label").hidden ? null : find(id).value || null);
  const marks = needed().map(({ name, byBox }, index) => described(stage.marks[index], name, byBox ?? about.clicks));
  const isComposite = task() === "composite";
  const words = about?.condition === "text";
  return {
    scene: scene.name,
    task: task(),
    objects: used().map((each, index) => ({
      ...(words ? { prompt: each.prompt.trim() } : { name: each.file.name, automatic: Boolean(each.automatic) }),
      ...(each.clicks && !words ? { clicks: each.clicks } : {}),
      ...(isComposite ? targetOf(index) : {}),
    })),
    ...(isComposite ? {} : { marks }),
    mode: value("mode"),
    strength: find("starting").hidden ? null : number("strength"),
    refine: refined(),
    quality: value("quality"),
    steps: find("steps").closest("label").hidden ? null : number("steps"),
    fill: value("fill"),
    model: about.models?.length > 1 ? about.model : null,
    seed: number("seed") ?? Math.floor(Math.random() * 2 ** 31),
  };
}

// The timestep that is asked for; null for the model's own.
function refined() {
  const own = about.defaults.refine;
  if (find("refining").hidden || find("refine").checked === Boolean(own)) return null;
  return find("refine").checked ? REFINE_FROM : 0;
}

function targetOf(index) {
  const name = index ? `mask-${index + 1}` : "mask";
  return described(stage.marks[index], name, true);
}

async function start() {
  if (running) return;
  const own = (running = new AbortController());
  const [of, checkpoint] = [scene, about.checkpoint_sha256];
  say("");
  progress("sending", 0);
  refresh();
  try {
    const request = requested();
    const files = { scene, objects: used().map((each) => each.file) };
    const form = await formOf(request, files, stage.marks, find("canvas"));
    form.append("preview_every", previewEvery(request, about));
    for await (const [name, fields] of pictures(form, pathOf(request), own.signal)) {
      if (scene !== of) break;
      if (name === "queued") progress(fields.position ? `waiting, ${fields.position} before` : "starting", 0);
      if (name === "step_done") progress(`step ${fields.done} of ${fields.total}`, fields.done / fields.total);
      if (name === "preview") await show(fields.image, "image/jpeg");
      if (name === "result") await finish(fields, request, checkpoint);
    }
  } catch (error) {
    stage.result = shown?.image ?? null;
    stage.draw();
    if (error.name === "AbortError") say("");
    else if (error instanceof Refused) say(error.message);
    else say(`Something went wrong in this page: ${error.message}`);
  } finally {
    running = null;
    refresh();
  }
}

function progress(text, share) {
  find("state").textContent = text;
  find("bar").value = share;
}

function decoded(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i); // a callback for each takes seconds
  return bytes;
}

async function show(base64, type) {
  const bytes = decoded(base64);
  const of = scene;
  const image = await createImageBitmap(new Blob([bytes], { type }));
  if (scene !== of) throw new DOMException("another scene was chosen", "AbortError");
  stage.result = image;
  stage.share = 1;
  find("slider").value = 100;
  stage.draw();
  return bytes;
}

async function finish(result, request, checkpoint) {
  const bytes = await show(result.images[0].image, "image/png");
  if (shown) history.push(shown);
  if (history.length > REMEMBERED) history.shift().image.close();
  const parameters = JSON.stringify({ ...request, checkpoint });
  shown = { image: stage.result, file: withText(bytes, "anydoor", parameters), request };
  if (result.warnings?.length) say(result.warnings.join(" "));
}

// Shows the newest picture again, if marks took it away; else the one before.
function undo() {
  if (running || !(history.length || isPutAway())) return;
  if (!isPutAway()) shown = history.pop();
  stage.result = shown.image;
  stage.draw();
  refresh();
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([shown.file], { type: "image/png" }));
  link.download = `anydoor-${shown.request.seed}.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function copy(button, text) {
  const before = (button.dataset.name ??= button.textContent);
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    say(text); // without permission, at least it can be read
  }
  setTimeout(() => (button.textContent = before), 1500);
}

// --- the page ---

async function connect(name = "") {
  const turn = ++asked;
  find("model").textContent = "connecting …";
  about = null;
  refresh();
  try {
    const found = await model(name);
    if (turn !== asked) return;
    about = found;
    find("model").textContent = `${about.system}, ${about.precision}, ${about.backend} on ${about.device}`;
    find("quality").replaceChildren(
      new Option("the model's default", ""),
      ...about.qualities.map((quality) => new Option(QUALITIES[quality] ?? quality, quality)),
    );
    find("steps").max = about.limits.steps;
    find("refine").checked = Boolean(about.defaults.refine);
    find("models").replaceChildren(...about.models.map((each) => new Option(each, each, false, each === about.model)));
    find("models").hidden = about.models.length < 2;
    say("");
  } catch (error) {
    if (turn !== asked) return;
    find("model").textContent = "not connected";
    say(error.message);
  }
  arrange();
}

find("task").replaceChildren(...Object.entries(TASKS).map(([name, { label }]) => new Option(label, name)));
let before = task();
find("task").addEventListener("change", () => {
  marksOf[before] = stage.marks;
  before = task();
  stage.marks = marksOf[before] ?? [];
  arrange();
});
find("other-scene").addEventListener("click", () => find("scene-file").click());
find("models").addEventListener("change", (event) => connect(event.target.value));
accept(find("canvas-box"), find("scene-file"), setScene, say);
find("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
find("again").addEventListener("click", () => {
  find("seed").value = "";
  find("controls").requestSubmit();
});
// a file that is dropped beside the areas would be opened in place of the page
for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault());
find("cancel").addEventListener("click", () => running?.abort());
find("add").addEventListener("click", () => {
  objects.add();
  choose(objects.items.length - 1);
});
find("undo").addEventListener("click", undo);
find("download").addEventListener("click", download);
const origin = () => `${location.hostname}:${about?.grpc_port || 50051}`;
find("copy-command").addEventListener("click", (event) => copy(event.target, commandLine(shown.request, origin())));
find("copy-python").addEventListener("click", (event) => copy(event.target, python(shown.request, origin())));
find("slider").addEventListener("input", (event) => {
  stage.share = event.target.value / 100;
  stage.draw();
});
find("brush").addEventListener("input", (event) => (stage.brush = Number(event.target.value)));
for (const input of document.getElementsByName("tool")) input.addEventListener("change", () => use(input.value));
find("token").addEventListener("change", (event) => {
  setToken(event.target.value);
  connect(find("models").value);
});
document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "z" && event.target.tagName !== "INPUT") undo();
});
arrange();
connect();
