// Edits, objects that are cut out, and several models in the studio: against a server with segmenters.

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { copyFileSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { BUNDLE, click, drag, drop, faults, finished, launch, OBJECT, open, pixels, PYTHON, ROOT, SCENE, serve, SHOTS } from "./studio.mjs";

const GREEN = (r, g, b) => g > r + 20 && g > b + 20;
const folder = mkdtempSync(join(tmpdir(), "studio-"));
const SHELF = join(folder, "shelf.png"); // a white thing at 24,24, and a grey one at 72,27

let browser;
let server;

before(async () => {
  run(PYTHON, ["-m", "tests.support.segmenters", folder], ROOT);
  copyFileSync(OBJECT, join(folder, "object.png"));
  copyFileSync(SCENE, join(folder, "scene.png"));
  browser = await launch();
  const models = ["--bundle", `cup=${BUNDLE}`, "--bundle", `bear=${BUNDLE}`];
  server = await serve(...models, "--segmenter", join(folder, "u2net"), "--segmenter", join(folder, "sam"));
});

after(async () => {
  await browser?.close();
  server?.stop("SIGTERM");
  rmSync(folder, { recursive: true });
});

function run(command, words, cwd) {
  const done = spawnSync(command, words, { cwd, encoding: "utf8", env: { ...process.env, PYTHONPATH: ROOT } });
  assert.equal(done.status, 0, done.stderr);
  return done.stdout;
}

// A page with a scene, at a task.
async function at(task, options) {
  const { page, problems } = await open(server.url, { permissions: ["clipboard-read", "clipboard-write"], ...options });
  await drop(page, "#canvas-box", SHELF);
  await page.locator("#task").selectOption(task);
  return { page, problems };
}

const colour = (page, x, y) =>
  page.evaluate(([x, y]) => [...document.getElementById("canvas").getContext("2d").getImageData(x, y, 1, 1).data], [x, y]);

async function found(page, x, y, isFound = true) {
  for (;;) {
    if (GREEN(...(await colour(page, x, y))) === isFound) return;
    await page.waitForTimeout(50);
  }
}

async function start(page, steps) {
  if (steps) await page.locator("#steps").fill(steps);
  await page.locator("#seed").fill("7");
  await page.locator("#start").click();
  await finished(page);
}

// The pictures that the copied command line and the copied Python make, and the one that is downloaded, are one.
async function sameAsCopied(page) {
  const waiting = page.waitForEvent("download");
  await page.locator("#download").click();
  await (await waiting).saveAs(join(folder, "page.png"));
  const copied = async (id) => {
    await page.locator(id).click();
    await page.waitForFunction((id) => document.querySelector(id).textContent === "Copied", id);
    return page.evaluate(() => navigator.clipboard.readText());
  };
  const python = await copied("#copy-python");
  run(PYTHON, ["-c", `${python.replace("out.png", "python.png")}`], folder);
  const command = (await copied("#copy-command")).replace("anydoor ", `${PYTHON} -m runtime `);
  run("bash", ["-c", command], folder);
  const check = "from PIL import Image; import json; a, b, c = map(Image.open, ('page.png', 'out.png', 'python.png'));"
    + "assert a.convert('RGB').tobytes() == b.convert('RGB').tobytes() == c.convert('RGB').tobytes(); print(a.text['anydoor'])";
  return JSON.parse(run(PYTHON, ["-c", check], folder));
}

test("an object that is clicked on is removed", async () => {
  const { page, problems } = await at("remove");
  assert.equal(await page.locator("#start").isDisabled(), true);
  await click(page, [20, 20]);
  await found(page, 30, 30);
  await page.screenshot({ path: join(SHOTS, "found.png") });
  await page.getByLabel("Not this").check();
  await click(page, [72, 27]);
  await start(page);
  assert.ok((await colour(page, 24, 24))[0] < 60);
  assert.ok((await colour(page, 72, 24))[0] > 120);
  await page.screenshot({ path: join(SHOTS, "removed.png") });
  const parameters = await sameAsCopied(page);
  assert.deepEqual([parameters.task, parameters.marks], ["remove", [{ clicks: ["20,20", "!72,27"] }]]);
  assert.deepEqual(problems, []);
});

test("an object is moved with the keyboard alone", async () => {
  const { page, problems } = await at("move");
  await page.locator("#canvas-box").focus();
  for (let step = 0; step < 20; step++) await page.keyboard.press("ArrowLeft");
  await page.keyboard.press("Enter");
  await found(page, 16, 16);
  await page.keyboard.press("Backspace");
  await found(page, 16, 16, false);
  await page.keyboard.press("Enter");
  await found(page, 16, 16);
  await page.getByRole("button", { name: "Its new place" }).press("Enter");
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("Shift+ArrowDown");
  await page.getByLabel("Strength").fill("0.5");
  await start(page, "4");
  const parameters = await sameAsCopied(page);
  assert.equal(parameters.strength, 0.5);
  assert.deepEqual(parameters.marks, [{ clicks: ["28,24"] }, { box: [35, 17, 63, 32] }]);
  assert.deepEqual(problems, []);
});

test("an object is swapped for another, which is cut out by clicks", async () => {
  const { page, problems } = await at("swap");
  await drop(page, ".thumb", OBJECT);
  await click(page, [72, 27]);
  await found(page, 80, 30);
  await page.getByRole("button", { name: "Cut out by clicks" }).click();
  const size = await page.locator("#cut canvas").evaluate((canvas) => [canvas.width, canvas.height]);
  await click(page, size.map((side) => side / 2), "#cut canvas");
  await page.waitForFunction(() => [...document.querySelectorAll("#cut .state")].every((each) => !each.textContent));
  assert.deepEqual(await faults(page), []);
  await page.screenshot({ path: join(SHOTS, "cut.png") });
  await page.getByRole("button", { name: "Use it" }).click();
  await page.waitForFunction(() => document.querySelector(".cut").getAttribute("aria-pressed") === "true");
  await start(page, "1");
  const parameters = await sameAsCopied(page);
  assert.equal(parameters.objects[0].clicks.length, 1);
  assert.deepEqual(problems, []);
});

test("outlines, places of two objects and garments", async () => {
  const { page, problems } = await at("reshape");
  await click(page, [20, 20]);
  await page.getByRole("button", { name: "Its new outline" }).click();
  await drag(page, [40, 10], [44, 40]);
  await start(page, "1");

  await page.locator("#task").selectOption("exchange");
  await click(page, [20, 20]);
  await page.getByRole("button", { name: "The other object" }).click();
  await click(page, [72, 27]);
  await start(page, "8");
  await sameAsCopied(page);

  await page.locator("#task").selectOption("try-on");
  await drop(page, ".thumb", OBJECT);
  await page.getByRole("radio", { name: "Box" }).check();
  await drag(page, [58, 14], [86, 40]);
  await start(page, "1");
  await sameAsCopied(page);
  assert.deepEqual(problems, []);
});

test("an object is cut out automatically, and what is refused is said", async () => {
  const { page } = await at("composite");
  await drop(page, ".thumb", SHELF);
  const before = await page.locator(".thumb img").getAttribute("src");
  await page.getByLabel("Cut it out automatically").check();
  await page.waitForFunction((before) => document.querySelector(".thumb img").src !== before, before);
  await page.locator("#task").selectOption("exchange");
  await click(page, [20, 20]);
  await page.getByRole("button", { name: "The other object" }).click();
  await click(page, [22, 22]);
  await page.locator("#steps").fill("1");
  await page.locator("#start").click();
  await page.getByText("both selections are the same object").waitFor();
});

// Composites the object into a large place.
async function compositeLarge(page, steps) {
  await drop(page, "#canvas-box", SCENE);
  await drop(page, ".thumb", OBJECT);
  await drag(page, [150, 30], [265, 239]);
  await start(page, steps);
}

test("of two objects one is cut out, and the copied command says which", async () => {
  const { page, problems } = await at("composite");
  await drop(page, ".thumb", OBJECT);
  await drag(page, [4, 4], [40, 44]);
  await page.getByText("Add an object").click();
  await drop(page, ".object:nth-child(2) .thumb", SHELF);
  await page.locator(".object:nth-child(2)").getByLabel("Cut it out automatically").check();
  await page.locator(".object:nth-child(2) .use").click();
  await drag(page, [50, 4], [90, 44]);
  await start(page, "2");
  const parameters = await sameAsCopied(page);
  assert.deepEqual(parameters.objects.map((each) => each.automatic), [false, true]);
  assert.deepEqual(problems, []);
});

test("a hole is filled by a network, with previews of both", async (context) => {
  const make = "from tests.support.stable_diffusion import tiny_stable_diffusion_bundle as make; print(make(9))";
  const filler = run(PYTHON, ["-c", make], ROOT).trim();
  const filling = await serve("--filler", filler);
  context.after(() => filling.stop("SIGTERM"));
  const { page, problems } = await open(filling.url);
  await drop(page, "#canvas-box", SCENE);
  for (const task of ["move", "remove"]) {
    await page.locator("#task").selectOption(task);
    await page.getByRole("radio", { name: "Box" }).check();
    await drag(page, [20, 20], [80, 80]);
    if (task === "move") {
      await page.getByRole("button", { name: "Its new place" }).click();
      await drag(page, [150, 30], [200, 90]);
    }
    await page.locator("#start").click();
    await page.waitForFunction(() => document.getElementById("progress").hidden);
    assert.doesNotMatch(await page.locator("#message").textContent(), /previews/);
    await finished(page);
  }
  assert.deepEqual(problems, []);
});

test("less strength keeps more of the object", async () => {
  const { page, problems } = await at("composite");
  const strength = page.getByLabel("Strength");
  await compositeLarge(page, "4");
  const full = await pixels(page);
  await strength.fill("0.5");
  await start(page, "4");
  assert.notEqual(await pixels(page), full);
  const parameters = await sameAsCopied(page);
  assert.equal(parameters.strength, 0.5);
  await page.locator("#task").selectOption("remove");
  assert.equal(await strength.isVisible(), false);
  assert.deepEqual(problems, []);
});

test("a large place is refined, with the keyboard", async () => {
  const { page, problems } = await at("composite");
  const refine = page.getByLabel("Refine large places");
  await compositeLarge(page, "5");
  const once = await pixels(page);
  await refine.focus();
  await page.keyboard.press("Space");
  await start(page, "5");
  assert.notEqual(await pixels(page), once);
  const parameters = await sameAsCopied(page);
  assert.equal(parameters.refine, 200);
  await page.locator("#task").selectOption("remove");
  assert.equal(await refine.isVisible(), false);
  await page.locator("#task").selectOption("swap");
  assert.equal(await refine.isVisible(), true);
  assert.deepEqual(problems, []);
});

test("a model is chosen", async () => {
  const { page, problems } = await at("composite");
  await page.getByLabel("Model", { exact: true }).selectOption("bear");
  await page.getByText("anydoor, fp32").waitFor();
  await drop(page, ".thumb", OBJECT);
  await drag(page, [10, 8], [50, 40]);
  await start(page, "1");
  const parameters = await sameAsCopied(page);
  assert.equal(parameters.model, "bear");
  assert.deepEqual(problems, []);
});

test("edits are accessible, in light, in the dark and on a phone", async () => {
  const looks = { light: {}, dark: { colorScheme: "dark" }, phone: { viewport: { width: 390, height: 844 }, hasTouch: true } };
  for (const [name, options] of Object.entries(looks)) {
    const { page } = await at("swap", options);
    await click(page, [20, 20]);
    await found(page, 30, 30);
    await page.screenshot({ path: join(SHOTS, `${name}-edit.png`), fullPage: true });
    assert.deepEqual(await faults(page), [], name);
    assert.equal(await page.evaluate(() => document.documentElement.scrollWidth > window.innerWidth), false, name);
  }
});
