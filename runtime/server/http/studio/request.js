// What is asked of the server: as plain values, which stay with the picture, and as a form.

import { clickText, maskOf } from "./marks.js";
import { TASKS } from "./tasks.js";

const STEPS = { balanced: 20, fast: 12 }; // of runtime/diffusion/presets.py

// How a mark is said: its clicks, its box, or the name of a file with its mask.
export function described(mark, name, canFind) {
  if (mark.clicks) return { clicks: mark.clicks.map(clickText) };
  return mark.box && canFind ? { box: mark.box } : { mask: `${name}.png` };
}

export const pathOf = (request) => (request.task === "composite" ? "/v1/composite" : "/v1/edit");

// Steps between previews: as few as the server's limit of previews of a picture allows.
export function previewEvery({ task, objects, steps, quality }, about) {
  const most = about.limits.previews ?? 0;
  const placed = steps ?? STEPS[quality] ?? about.defaults.sampling.steps;
  const phases = Array({ composite: objects.length, exchange: 2, remove: 0 }[task] ?? 1).fill(placed);
  if (about.filler && TASKS[task].marks && task !== "try-on") phases.push(about.filler_steps);
  const count = (every) => phases.reduce((sum, all) => sum + Math.floor((all - 1) / every), 0);
  let every = 1;
  while (count(every) > most) every += 1;
  return most ? every : 0;
}

// The form of a request. `files` has the scene's, and those of the objects; `marks` are those that were described.
export async function formOf(request, files, marks, size) {
  const form = new FormData();
  const where = async (path, said, mark) => {
    for (const click of said.clicks ?? []) form.append(`${path}clicks`, click);
    if (said.box) form.append(`${path}box`, said.box.join(","));
    if (said.mask) form.append(`${path}mask`, await maskOf(mark, size), said.mask);
  };
  const passes = (path) => {
    if (request.strength !== null) form.append(`${path}.strength`, request.strength);
    if (request.refine !== null) form.append(`${path}.refine`, request.refine);
  };
  const object = (path, each, file) => {
    if (each.prompt) form.append(`${path}.prompt`, each.prompt);
    else form.append(`${path}.reference`, file);
    for (const click of each.clicks ?? []) form.append(`${path}.reference_clicks`, click);
    if (each.automatic) form.append(`${path}.automatic_mask`, "true");
    if (request.mode) form.append(`${path}.mode`, request.mode);
    passes(path);
  };
  form.append("scene", files.scene);
  if (request.task === "composite") {
    for (const [index, each] of request.objects.entries()) {
      object(`placements[${index}]`, each, files.objects[index]);
      await where(`placements[${index}].`, { box: each.box, mask: each.mask }, marks[index]);
    }
  } else {
    await where("where.", request.marks[0], marks[0]);
    if (request.fill) form.append("fill.prompt", request.fill);
    if (request.task === "remove") form.append("remove", "true");
    if (request.task === "move") form.append("move.to", request.marks[1].box.join(","));
    if (request.task === "reshape") form.append("reshape.to", await maskOf(marks[1], size), request.marks[1].mask);
    if (request.task === "exchange") await where("swap.other.", request.marks[1], marks[1]);
    if (TASKS[request.task].redraws) passes(request.task === "exchange" ? "swap" : request.task);
    if (request.task === "swap") object("swap.placement", request.objects[0], files.objects[0]);
    if (request.task === "try-on") object("try_on", request.objects[0], files.objects[0]);
  }
  if (request.model) form.append("model", request.model);
  if (request.quality) form.append("sampling.quality", request.quality);
  if (request.steps) form.append("sampling.steps", request.steps);
  form.append("seed", request.seed);
  return form;
}
