// The same picture by the command line, and in Python.

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function commandLine(request, origin) {
  const words = ["anydoor composite", `--server ${origin}`, `--scene ${quoted(request.scene)}`];
  for (const each of request.objects) {
    if (each.prompt) words.push(`--prompt ${quoted(each.prompt)}`);
    else words.push(`--reference ${quoted(each.name)}`);
    if (each.automatic) words.push("--reference-mask auto");
    words.push(each.box ? `--box=${each.box.join(",")}` : "--mask mask.png");
  }
  if (request.mode) words.push(`--mode ${request.mode}`);
  if (request.quality) words.push(`--quality ${request.quality}`);
  if (request.steps) words.push(`--steps ${request.steps}`);
  words.push(`--seed ${request.seed}`, "-o out.png");
  return words.join(" \\\n    ");
}

export function python(request, origin) {
  const text = JSON.stringify;
  const placements = request.objects.map((each) => {
    const given = each.prompt ? [`prompt=${text(each.prompt)}`] : [text(each.name)];
    if (each.automatic) given.push('reference_mask="auto"');
    given.push(each.box ? `box=(${each.box.join(", ")})` : 'mask="mask.png"');
    if (request.mode) given.push(`mode=${text(request.mode)}`);
    return `    Placement(${given.join(", ")}),`;
  });
  const sampling = [];
  if (request.quality) sampling.push(`quality=${text(request.quality)}`);
  if (request.steps) sampling.push(`steps=${request.steps}`);
  return [
    "from runtime import Placement, Sampling",
    "from runtime.client import Client",
    "",
    "placements = [",
    ...placements,
    "]",
    `with Client(${text(origin)}) as client:`,
    `    image = client.composite(${text(request.scene)}, placements, seed=${request.seed}, sampling=Sampling(${sampling.join(", ")}))`,
    'image.save("out.png")',
  ].join("\n");
}
