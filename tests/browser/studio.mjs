// A server, a browser, and what a hand does in the studio.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { existsSync, mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, join, resolve } from "node:path";
import { chromium } from "playwright-core";

export const ROOT = resolve(import.meta.dirname, "../..");
export const PYTHON = process.env.PYTHON ?? join(ROOT, ".venv/bin/python");
export const SHOTS = join(ROOT, "build/studio");
export const BUNDLE = join(ROOT, "examples/anydoor-small");
export const SCENE = join(ROOT, "examples/scene.png");
export const OBJECT = join(ROOT, "examples/object.png");
const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
export const PATIENCE = 120_000;
const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"];
const QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync"];

let browser;

export async function launch() {
  mkdirSync(SHOTS, { recursive: true });
  const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
  assert.ok(existsSync(executablePath), `there is no ${executablePath}: install Debian's package chromium`);
  browser = await chromium.launch({ executablePath, args: [...FLAGS, ...QUIET] });
  return browser;
}

// What axe-core finds that is serious.
export async function faults(page) {
  await page.evaluate(AXE);
  const { violations } = await page.evaluate(() => window.axe.run());
  const serious = violations.filter((each) => ["serious", "critical"].includes(each.impact));
  return serious.map((each) => `${each.id}: ${each.nodes[0].html}`);
}

// `anydoor serve` on free ports.
export async function serve(...flags) {
  const bundle = flags.includes("--bundle") ? [] : ["--bundle", BUNDLE];
  const common = ["-m", "runtime", "serve", ...bundle];
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
  const grpc = /"addresses": \["([^"]+)"/.exec(log)?.[1];
  return { url: `http://${address}/studio/`, grpc, stop: (signal) => process_.kill(signal) };
}

export async function open(url, options = {}) {
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

export async function drop(page, target, path) {
  const given = { base64: readFileSync(path).toString("base64"), name: basename(path) };
  const data = await page.evaluateHandle(async ({ base64, name }) => {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, { type: "image/png" }));
    return transfer;
  }, given);
  await page.locator(target).dispatchEvent("drop", { dataTransfer: data });
}

// Where a point of a picture is on the page.
async function place(page, [x, y], canvas = "#canvas") {
  const box = await page.locator(canvas).boundingBox();
  const scale = box.width / (await page.locator(canvas).evaluate((element) => element.width));
  return [box.x + x * scale, box.y + y * scale];
}

export async function drag(page, from, to, meanwhile = () => {}) {
  await page.mouse.move(...(await place(page, from)));
  await page.mouse.down();
  await meanwhile();
  await page.mouse.move(...(await place(page, to)), { steps: 5 });
  await page.mouse.up();
}

// On the middle of a pixel.
export async function click(page, [x, y], canvas) {
  await page.mouse.click(...(await place(page, [x + 0.5, y + 0.5], canvas)));
}

export async function prepare(page, steps = "4") {
  await drop(page, "#canvas-box", SCENE);
  await drop(page, ".thumb", OBJECT);
  await drag(page, [150, 30], [265, 239]);
  await page.locator("#steps").fill(steps);
}

export const finished = (page) => page.waitForFunction(() => !document.getElementById("download").disabled
  && document.getElementById("progress").hidden);
export const pixels = (page) => page.evaluate(() => document.getElementById("canvas").toDataURL());
