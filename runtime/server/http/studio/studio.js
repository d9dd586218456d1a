// The page: what is dropped, chosen and started, and what comes back.

import { model, pictures, Refused, setToken } from "./api.js";
import { commandLine, python } from "./commands.js";
import { withText } from "./png.js";
import { maskOf, Stage } from "./stage.js";

const find = (id) => document.getElementById(id);
const QUALITIES = { exact: "exact", balanced: "balanced, twice as fast", fast: "fast, four times as fast" };

let about = null; // what the server says of its model
let scene = null; // File
let objects = [{}];
let shown = null; // the newest picture: { image, file, request }
let running = null; // AbortController
const history = [];

const stage = new Stage(find("canvas"), find("canvas-box"), refresh);

// --- what is shown ---

function say(text) {
  find("message").textContent = text;
  find("message").hidden = !text;
}

const takesWords = () => about?.condition === "text";

function refresh() {
  for (const [index, item] of [...find("objects").children].entries()) {
    const isChosen = index === stage.chosen;
    item.classList.toggle("chosen", isChosen);
    const use = item.querySelector(".use");
    use.textContent = isChosen ? "Placing" : "Place";
    use.setAttribute("aria-pressed", String(isChosen));
  }
  const ready = scene && objects.every((each, index) => what(each) && stage.places[index]);
  find("start").disabled = Boolean(running) || !ready;
  find("again").disabled = Boolean(running) || !shown || !ready;
  for (const id of ["download", "copy-command", "copy-python"]) find(id).disabled = !shown;
  find("undo").disabled = Boolean(running) || !history.length;
  find("compare").hidden = !stage.result;
  find("progress").hidden = !running;
  find("canvas-box").classList.toggle("has-scene", Boolean(scene));
}

const what = (each) => (takesWords() ? each.prompt?.trim() : each.file);

function list() {
  find("objects").replaceChildren(...objects.map(row));
  refresh();
}

function row(each, index) {
  const item = find("object").content.firstElementChild.cloneNode(true);
  const [thumb, image] = [item.querySelector(".thumb"), item.querySelector("img")];
  thumb.hidden = takesWords();
  const draw = () => {
    image.src = each.url;
    image.alt = each.file.name;
  };
  if (each.url) draw();
  accept(thumb, item.querySelector("input[type=file]"), (file) => {
    each.file = file;
    if (each.url) URL.revokeObjectURL(each.url);
    each.url = URL.createObjectURL(file);
    draw();
    choose(index);
  });
  const words = item.querySelector(".words");
  words.hidden = !takesWords();
  const text = item.querySelector(".text");
  text.value = each.prompt ?? "";
  text.addEventListener("input", () => {
    each.prompt = text.value;
    refresh();
  });
  const automatic = item.querySelector(".automatic");
  automatic.hidden = takesWords();
  const box = automatic.querySelector("input");
  box.checked = Boolean(each.automatic);
  box.addEventListener("change", () => (each.automatic = box.checked));
  item.querySelector(".use").addEventListener("click", () => {
    choose(index);
    find("canvas-box").focus();
  });
  const remove = item.querySelector(".remove");
  remove.disabled = objects.length === 1;
  remove.addEventListener("click", () => {
    objects.splice(index, 1);
    stage.places.splice(index, 1);
    choose(Math.min(stage.chosen, objects.length - 1));
    list();
  });
  return item;
}

function choose(index) {
  stage.chosen = index;
  stage.result = null;
  stage.draw();
  refresh();
}

// --- what is dropped ---

function accept(area, input, take) {
  const use = (file) => {
    if (!file) return;
    if (!file.type.startsWith("image/")) say(`'${file.name}' is not a picture.`);
    else take(file);
  };
  input.addEventListener("change", () => use(input.files[0]));
  area.addEventListener("dragover", (event) => {
    event.preventDefault();
    area.classList.add("over");
  });
  area.addEventListener("dragleave", () => area.classList.remove("over"));
  area.addEventListener("drop", (event) => {
    event.preventDefault();
    area.classList.remove("over");
    use(event.dataTransfer.files[0]);
  });
}

async function setScene(file) {
  try {
    stage.setScene(await createImageBitmap(file));
  } catch {
    say(`'${file.name}' cannot be read as a picture.`);
    return;
  }
  scene = file;
  shown = null;
  history.length = 0;
  stage.places = [];
  say("");
  refresh();
}

// --- a picture is made ---

function requested() {
  const number = (id) => (find(id).value === "" ? null : Number(find(id).value));
  return {
    scene: scene.name,
    objects: objects.map((each, index) => ({
      name: each.file?.name,
      prompt: takesWords() ? each.prompt.trim() : null,
      automatic: !takesWords() && Boolean(each.automatic),
      box: stage.places[index].box ?? null,
    })),
    mode: find("mode").value || null,
    quality: find("quality").value || null,
    steps: number("steps"),
    seed: number("seed") ?? Math.floor(Math.random() * 2 ** 31),
  };
}

async function formOf(request) {
  const form = new FormData();
  form.append("scene", scene);
  for (const [index, each] of request.objects.entries()) {
    const field = (name) => `placements[${index}].${name}`;
    if (each.prompt) form.append(field("prompt"), each.prompt);
    else form.append(field("reference"), objects[index].file);
    if (each.automatic) form.append(field("automatic_mask"), "true");
    if (each.box) form.append(field("box"), each.box.join(","));
    else form.append(field("mask"), await maskOf(stage.places[index].painted), "mask.png");
    if (request.mode) form.append(field("mode"), request.mode);
  }
  if (request.quality) form.append("sampling.quality", request.quality);
  if (request.steps) form.append("sampling.steps", request.steps);
  form.append("seed", request.seed);
  form.append("preview_every", Math.max(1, Math.ceil((request.steps ?? stepsOf(request.quality)) / 4)));
  return form;
}

const stepsOf = (quality) => ({ balanced: 12, fast: 8 })[quality] ?? about?.defaults?.sampling?.steps ?? 50;

async function start() {
  if (running) return;
  const request = requested();
  running = new AbortController();
  say("");
  progress("sending", 0);
  refresh();
  try {
    const form = await formOf(request);
    for await (const [name, fields] of pictures(form, "/v1/composite", running.signal)) {
      if (name === "queued") progress(fields.position ? `waiting, ${fields.position} before` : "starting", 0);
      if (name === "step_done") progress(`step ${fields.done} of ${fields.total}`, fields.done / fields.total);
      if (name === "preview") await show(fields.image, "image/jpeg");
      if (name === "result") await finish(fields, request);
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

async function show(base64, type) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  stage.result = await createImageBitmap(new Blob([bytes], { type }));
  stage.share = 1;
  find("slider").value = 100;
  stage.draw();
  return bytes;
}

async function finish(result, request) {
  const bytes = await show(result.images[0].image, "image/png");
  if (shown) history.push(shown);
  const parameters = JSON.stringify({ ...request, checkpoint: about?.checkpoint_sha256 });
  shown = { image: stage.result, file: withText(bytes, "anydoor", parameters), request };
  if (result.warnings?.length) say(result.warnings.join(" "));
}

function undo() {
  if (running || !history.length) return;
  shown = history.pop();
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
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    say(text); // without permission, at least it can be read
  }
  setTimeout(() => (button.textContent = before), 1500);
}

// --- the page ---

async function connect() {
  try {
    about = await model();
    find("model").textContent = `${about.system}, ${about.precision}, ${about.backend} on ${about.device}`;
    find("quality").replaceChildren(
      new Option("of the model", ""),
      ...about.qualities.map((name) => new Option(QUALITIES[name] ?? name, name)),
    );
    find("steps").max = about.limits.steps;
    find("start").textContent = takesWords() ? "Draw it in" : "Composite";
    say("");
  } catch (error) {
    find("model").textContent = "not connected";
    say(error.message);
  }
  list();
}

accept(find("canvas-box"), find("scene-file"), setScene);
find("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
find("again").addEventListener("click", () => {
  find("seed").value = "";
  start();
});
find("cancel").addEventListener("click", () => running?.abort());
find("add").addEventListener("click", () => {
  objects.push({});
  choose(objects.length - 1);
  list();
});
find("undo").addEventListener("click", undo);
find("download").addEventListener("click", download);
const origin = () => document.body.dataset.grpc || location.hostname + ":50051";
find("copy-command").addEventListener("click", (event) => copy(event.target, commandLine(shown.request, origin())));
find("copy-python").addEventListener("click", (event) => copy(event.target, python(shown.request, origin())));
find("slider").addEventListener("input", (event) => {
  stage.share = event.target.value / 100;
  stage.draw();
});
find("brush").addEventListener("input", (event) => (stage.brush = Number(event.target.value)));
for (const input of document.getElementsByName("tool")) {
  input.addEventListener("change", () => (stage.tool = input.value));
}
find("token").addEventListener("change", (event) => {
  setToken(event.target.value);
  connect();
});
document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "z" && event.target.tagName !== "INPUT") undo();
});
list();
connect();
