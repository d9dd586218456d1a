// The studio in Chromium, against a server with the example model: `make browser`. Screenshots go to build/studio.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { after, before, test } from "node:test";
import { chromium } from "playwright-core";

const ROOT = resolve(import.meta.dirname, "../..");
const PYTHON = process.env.PYTHON ?? join(ROOT, ".venv/bin/python");
const SHOTS = join(ROOT, "build/studio");
const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const SCENE = join(ROOT, "examples/scene.png");
const OBJECT = join(ROOT, "examples/object.png");
const PATIENCE = 120_000;
const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"];
const QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync"];

let browser;
let server;

// `anydoor serve` on free ports.
async function serve(...flags) {
  const common = ["-m", "runtime", "serve", "--bundle", join(ROOT, "examples/anydoor-small")];
  const ports = ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--studio"];
  const process_ = spawn(PYTHON, [...common, ...ports, ...flags], { cwd: ROOT, stdio: ["ignore", "ignore", "pipe"] });
  let log = "";
  const address = await new Promise((found, failed) => {
    process_.stderr.on("data", (data) => {
      log += data;
      if (log.includes('"serving"')) found(/"http": "([^"]+)"/.exec(log)[1]);
    });
    process_.on("exit", () => failed(new Error(log)));
  });
  return { url: `http://${address}/studio/`, stop: (signal) => process_.kill(signal) };
}

async function open(url, options = {}) {
  const context = await browser.newContext({ acceptDownloads: true, ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(PATIENCE);
  const problems = [];
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
  await page.goto(url);
  await page.getByText("anydoor, fp32").waitFor();
  return { page, problems };
}

async function drop(page, target, path) {
  const content = readFileSync(path).toString("base64");
  const data = await page.evaluateHandle(async (base64) => {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
    return transfer;
  }, content);
  await page.locator(target).dispatchEvent("drop", { dataTransfer: data });
}

async function drag(page, from, to) {
  const box = await page.locator("#canvas").boundingBox();
  const scale = box.width / 400;
  await page.mouse.move(box.x + from[0] * scale, box.y + from[1] * scale);
  await page.mouse.down();
  await page.mouse.move(box.x + to[0] * scale, box.y + to[1] * scale, { steps: 5 });
  await page.mouse.up();
}

async function prepare(page, steps = "4") {
  await drop(page, "#canvas-box", SCENE);
  await drop(page, ".thumb", OBJECT);
  await drag(page, [150, 30], [265, 239]);
  await page.locator("#steps").fill(steps);
}

const finished = (page) => page.waitForFunction(() => !document.getElementById("download").disabled
  && document.getElementById("progress").hidden);
const pixels = (page) => page.evaluate(() => document.getElementById("canvas").toDataURL());

before(async () => {
  mkdirSync(SHOTS, { recursive: true });
  const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
  assert.ok(existsSync(executablePath), `there is no ${executablePath}: install Debian's package chromium`);
  browser = await chromium.launch({ executablePath, args: [...FLAGS, ...QUIET] });
  server = await serve();
});

after(async () => {
  await browser?.close();
  server?.stop("SIGTERM");
});

test("an object is dropped, placed, composited, rolled again, compared, undone and downloaded", async () => {
  const { page, problems } = await open(server.url);
  await prepare(page);
  await page.locator("#seed").fill("7");
  await page.screenshot({ path: join(SHOTS, "placed.png") });
  const placed = await pixels(page);
  await page.locator("#start").click();
  await page.getByText(/step \d of 4/).waitFor();
  await finished(page);
  const first = await pixels(page);
  assert.notEqual(first, placed);
  await page.screenshot({ path: join(SHOTS, "light.png") });

  await page.locator("#slider").fill("0");
  const sceneAlone = await pixels(page);
  assert.notEqual(sceneAlone, first);
  await page.locator("#slider").fill("100");

  await page.locator("#again").click();
  await page.waitForFunction(() => !document.getElementById("undo").disabled);
  assert.notEqual(await pixels(page), first);
  await page.keyboard.press("Control+z");
  assert.equal(await pixels(page), first);

  const waiting = page.waitForEvent("download");
  await page.locator("#download").click();
  const download = await waiting;
  assert.equal(download.suggestedFilename(), "anydoor-7.png");
  const path = join(mkdtempSync(join(tmpdir(), "studio-")), "out.png");
  await download.saveAs(path);
  const text = readFileSync(path).toString("latin1");
  assert.match(text, /iTXtanydoor\0\0\0\0\0\{"scene":"dropped\.png".*"box":\[150,30,265,239\].*"seed":7/);
  const check = spawn(PYTHON, ["-c", `from PIL import Image; i = Image.open("${path}"); i.load(); assert "box" in i.text["anydoor"]`]);
  assert.equal(await new Promise((done) => check.on("exit", done)), 0);
  assert.deepEqual(problems, []);
});

test("a painted place, two objects, and the keyboard", async () => {
  const { page, problems } = await open(server.url);
  await prepare(page, "2");
  await page.getByText("Add an object").click();
  await drop(page, ".object:nth-child(2) .thumb", OBJECT);
  await page.getByLabel("Paint").check();
  await drag(page, [300, 80], [340, 200]);
  await page.locator("#start").click();
  await finished(page);
  await page.locator(".object:nth-child(2) .remove").click();
  await page.locator("#canvas-box").focus();
  const start = await pixels(page);
  await page.keyboard.press("ArrowRight");
  const moved = await pixels(page);
  await page.keyboard.press("Shift+ArrowDown");
  assert.equal(new Set([start, moved, await pixels(page)]).size, 3);
  assert.deepEqual(problems, []);
});

test("it is accessible, in light, in the dark and on a phone", async () => {
  const looks = { light: {}, dark: { colorScheme: "dark" }, phone: { viewport: { width: 390, height: 844 }, hasTouch: true } };
  for (const [name, options] of Object.entries(looks)) {
    const { page } = await open(server.url, options);
    await prepare(page);
    await page.screenshot({ path: join(SHOTS, `${name}-ready.png`), fullPage: true });
    await page.evaluate(AXE);
    const { violations } = await page.evaluate(() => window.axe.run());
    const serious = violations.filter((each) => ["serious", "critical"].includes(each.impact));
    assert.deepEqual(serious.map((each) => `${name}: ${each.id}: ${each.nodes[0].html}`), []);
    const overflow = await page.evaluate(() => document.documentElement.scrollWidth > window.innerWidth);
    assert.equal(overflow, false, name);
  }
});

test("what is refused, a full queue, cancelling, and a server that is gone are said", async () => {
  const small = await serve("--queue", "0", "--max-batch", "1");
  const { page } = await open(small.url);
  await prepare(page, "1000");
  await page.locator("#steps").evaluate((input) => (input.max = ""));
  await page.locator("#start").click();
  await page.getByText("steps must be a whole number from 1 to 100").waitFor();

  const busy = new AbortController();
  const form = new FormData();
  form.append("scene", new Blob([readFileSync(SCENE)]), "scene.png");
  form.append("reference", new Blob([readFileSync(OBJECT)]), "object.png");
  for (const [name, value] of [["box", "10,10,90,90"], ["num_images", "8"], ["sampling.steps", "100"]]) form.append(name, value);
  const asked = { method: "POST", body: form, signal: busy.signal, headers: { accept: "text/event-stream" } };
  const other = await fetch(new URL("/v1/composite", small.url), asked); // its first event has come: it is accepted
  await page.locator("#steps").fill("100");
  await page.locator("#start").click();
  await page.getByText("queue full").waitFor();
  await page.screenshot({ path: join(SHOTS, "full.png") });
  busy.abort();
  await other.text().catch(() => {});

  const begin = async () => {
    while (!(await page.getByText(/step \d+ of 100/).isVisible())) {
      if (await page.locator("#start").isEnabled()) await page.locator("#start").click();
      await page.waitForTimeout(100);
    }
  };
  await begin();
  await page.locator("#cancel").click();
  await page.waitForFunction(() => document.getElementById("progress").hidden);
  await begin();
  small.stop("SIGKILL");
  await page.locator("#message").filter({ hasText: /connection was lost|cannot be reached|network/i }).waitFor();
  await page.screenshot({ path: join(SHOTS, "gone.png") });
});
