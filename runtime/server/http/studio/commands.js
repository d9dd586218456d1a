// The same picture by the command line, and in Python.

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const text = JSON.stringify;

// --- command line ---

function whereFlags(said, click, prefix) {
  if (said.clicks) return said.clicks.map((each) => `--${click} ${quoted(each)}`);
  return [said.box ? `--${prefix}box=${said.box.join(",")}` : `--${prefix}mask ${quoted(said.mask)}`];
}

function objectFlags(each, index, all) {
  if (each.prompt) return [`--prompt ${quoted(each.prompt)}`];
  const clicks = (each.clicks ?? []).map((click) => `--reference-click ${quoted(click)}`);
  const mask = all.some((other) => other.automatic) ? [`--reference-mask ${each.automatic ? "auto" : "none"}`] : [];
  return [`--reference ${quoted(each.name)}`, ...clicks, ...mask];
}

function actionFlags({ task, marks, objects }) {
  if (task === "move") return [`--to=${marks[1].box.join(",")}`];
  if (task === "reshape") return [`--to ${quoted(marks[1].mask)}`];
  if (task === "exchange") return whereFlags(marks[1], "other-click", "other-");
  return objects.flatMap(objectFlags);
}

export function commandLine(request, origin) {
  const isComposite = request.task === "composite";
  const command = request.task === "exchange" ? "swap" : request.task;
  const words = [`anydoor ${command}`, `--server ${origin}`, `--scene ${quoted(request.scene)}`];
  if (request.model) words.push(`--model ${quoted(request.model)}`);
  if (isComposite) {
    for (const [index, each] of request.objects.entries()) {
      words.push(...objectFlags(each, index, request.objects), ...whereFlags(placeOf(each), "", ""));
    }
  }
  else words.push(...whereFlags(request.marks[0], "click", "object-"), ...actionFlags(request));
  if (request.fill) words.push(`--fill-prompt ${quoted(request.fill)}`);
  if (request.mode) words.push(`--mode ${request.mode}`);
  if (request.strength !== null) words.push(`--strength ${request.strength}`);
  if (request.refine !== null) words.push(`--refine ${request.refine}`);
  if (request.quality) words.push(`--quality ${request.quality}`);
  if (request.steps) words.push(`--steps ${request.steps}`);
  words.push(`--seed ${request.seed}`, "-o out.png");
  return words.join(" \\\n    ");
}

const placeOf = ({ box, mask }) => ({ box, mask });

// --- Python ---

const NAMES = ["Edit", "Fill", "Move", "Placement", "Remove", "Reshape", "Sampling", "Swap", "SwapPlaces", "TryOn", "Where"];

const clicksOf = (clicks) =>
  `[${clicks.map((each) => `(${each.replace("!", "").replace(",", ", ")}${each.startsWith("!") ? ", False" : ""})`).join(", ")}]`;

function whereOf(said) {
  if (said.clicks) return `clicks=${clicksOf(said.clicks)}`;
  return said.box ? `box=(${said.box.join(", ")})` : `mask=${text(said.mask)}`;
}

function passes({ strength, refine }) {
  return [...(strength === null ? [] : [`strength=${strength}`]), ...(refine === null ? [] : [`refine=${refine}`])];
}

function placement(each, request, place) {
  const given = each.prompt ? [`prompt=${text(each.prompt)}`] : [text(each.name)];
  if (each.automatic) given.push('reference_mask="auto"');
  if (each.clicks) given.push(`reference_clicks=${clicksOf(each.clicks)}`);
  if (place) given.push(whereOf(place));
  if (request.mode) given.push(`mode=${text(request.mode)}`);
  return `Placement(${[...given, ...passes(request)].join(", ")})`;
}

function action(request) {
  const { task, marks, objects } = request;
  if (task === "remove") return "Remove()";
  const given = (to) => [to, ...passes(request)].join(", ");
  if (task === "move") return `Move(${given(`(${marks[1].box.join(", ")})`)})`;
  if (task === "reshape") return `Reshape(${given(text(marks[1].mask))})`;
  if (task === "exchange") return `SwapPlaces(${given(`Where(${whereOf(marks[1])})`)})`;
  return `${task === "swap" ? "Swap" : "TryOn"}(${placement(objects[0], request)})`;
}

export function python(request, origin) {
  const sampling = [];
  if (request.quality) sampling.push(`quality=${text(request.quality)}`);
  if (request.steps) sampling.push(`steps=${request.steps}`);
  const others = [`seed=${request.seed}`, ...(sampling.length ? [`sampling=Sampling(${sampling.join(", ")})`] : [])];
  const client = `Client(${[text(origin), ...(request.model ? [`model=${text(request.model)}`] : [])].join(", ")})`;
  return (request.task === "composite" ? compositing(request, client, others) : editing(request, client, others)).join("\n");
}

function compositing(request, client, others) {
  return [
    "from runtime import Placement, Sampling",
    "from runtime.client import Client",
    "",
    "placements = [",
    ...request.objects.map((each) => `    ${placement(each, request, placeOf(each))},`),
    "]",
    `with ${client} as client:`,
    `    image = client.composite(${text(request.scene)}, placements, ${others.join(", ")})`,
    'image.save("out.png")',
  ];
}

function editing(request, client, others) {
  const what = action(request);
  if (request.fill) others.unshift(`fill=Fill(${text(request.fill)})`);
  const names = NAMES.filter((name) => ["Edit", "Where"].includes(name) || `${what} ${others}`.includes(`${name}(`));
  return [
    "from runtime.client import Client",
    `from runtime.request import ${names.join(", ")}`,
    "",
    `edit = Edit(${text(request.scene)}, Where(${whereOf(request.marks[0])}), ${what}, ${others.join(", ")})`,
    `with ${client} as client:`,
    "    (picture,) = client.edit(edit)",
    'picture.to_pillow().save("out.png")',
  ];
}
