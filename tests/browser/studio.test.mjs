// The studio in Chromium, against a server with the example model: `make browser`. Screenshots go to build/studio.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { drag, drop, faults, finished, launch, open, OBJECT, pixels, prepare, PYTHON, SCENE, serve, SHOTS } from "./studio.mjs";

let browser;
let server;

before(async () => {
  browser = await launch();
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
  // four steps may be over, and the line hidden, before anybody looks
  await page.getByText(/step \d of 4/).waitFor({ state: "attached" });
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
  const [, text] = /iTXtanydoor\0{5}(\{.*\}).{8}IEND/s.exec(readFileSync(path).toString("latin1"));
  const { scene, objects: [object], seed } = JSON.parse(text);
  assert.deepEqual([scene, object.box, seed], ["scene.png", [150, 30, 265, 239], 7]);
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

test("every quality is drawn, with previews", async () => {
  const { page, problems } = await open(server.url);
  await prepare(page, "");
  for (const quality of ["balanced", "fast"]) {
    await page.locator("#quality").selectOption(quality);
    await page.locator("#start").click();
    await page.waitForFunction(() => document.getElementById("compare").hidden === false || document.getElementById("message").textContent);
    await finished(page);
    assert.equal(await page.locator("#message").textContent(), "");
  }
  assert.deepEqual(problems, []);
});

test("another scene ends what is drawn into the one before", async () => {
  const { page, problems } = await open(server.url);
  await prepare(page, "100");
  const before = await pixels(page);
  await page.locator("#start").click();
  await page.getByText(/step \d+ of 100/).waitFor();
  await page.locator("#scene-file").setInputFiles(OBJECT);
  await page.waitForFunction(() => document.getElementById("progress").hidden);
  const after = await pixels(page);
  assert.notEqual(after, before);
  assert.equal(await page.locator("#download").isDisabled(), true);
  const chooser = page.waitForEvent("filechooser");
  await page.getByRole("button", { name: "Another scene" }).click();
  await (await chooser).setFiles(SCENE);
  await page.waitForFunction((after) => document.getElementById("canvas").toDataURL() !== after, after);
  assert.deepEqual(problems, []);
});

test("a part of a box is erased, a painted place stays where it is, and a picture that was put away comes back", async () => {
  const { page, problems } = await open(server.url);
  await prepare(page, "2");
  const box = await pixels(page);
  await page.getByLabel("Erase").check();
  await drag(page, [160, 40], [160, 220]);
  const erased = await pixels(page);
  assert.notEqual(erased, box);
  const inside = await page.evaluate(() => [...document.getElementById("canvas").getContext("2d").getImageData(240, 120, 1, 1).data]);
  assert.ok(inside[1] > inside[0], "the rest of the box is still marked");
  await page.locator("#canvas-box").focus();
  await page.keyboard.press("ArrowDown");
  assert.equal(await pixels(page), erased);

  await page.locator("#start").click();
  await finished(page);
  const picture = await pixels(page);
  await page.locator("#canvas").click({ button: "right" });
  assert.equal(await pixels(page), picture);
  await page.getByLabel("Box", { exact: true }).check();
  await drag(page, [10, 10], [90, 90]);
  assert.notEqual(await pixels(page), picture);
  await page.getByRole("button", { name: "Undo" }).click();
  assert.equal(await pixels(page), picture);
  assert.deepEqual(problems, []);
});

test("a server that asks for a token gets it", async (context) => {
  const tokens = join(mkdtempSync(join(tmpdir(), "studio-")), "tokens");
  writeFileSync(tokens, "open-sesame\n", { mode: 0o600 });
  const guarded = await serve("--tokens", tokens);
  context.after(() => guarded.stop("SIGTERM"));
  const page = await (await browser.newContext()).newPage();
  await page.goto(guarded.url);
  await page.getByText("not connected").waitFor();
  await prepare(page, "1");
  assert.equal(await page.locator("#start").isDisabled(), true);
  await page.getByText("Access").click();
  await page.getByLabel("Token").fill("open-sesame");
  await page.getByLabel("Token").press("Enter");
  await page.getByText("anydoor, fp32").waitFor();
  await drag(page, [150, 30], [265, 239]);
  await page.locator("#start").click();
  await finished(page);
});

test("it is accessible, in light, in the dark and on a phone", async () => {
  const looks = { light: {}, dark: { colorScheme: "dark" }, phone: { viewport: { width: 390, height: 844 }, hasTouch: true } };
  for (const [name, options] of Object.entries(looks)) {
    const { page } = await open(server.url, options);
    await prepare(page);
    await page.screenshot({ path: join(SHOTS, `${name}-ready.png`), fullPage: true });
    assert.deepEqual(await faults(page), [], name);
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

test("odd sequences leave nothing behind", async () => {
  const { page, problems } = await open(server.url);
  await prepare(page);
  await page.locator("#start").click();
  await finished(page);
  const label = await page.locator("#copy-command").textContent();
  await page.locator("#copy-command").click();
  await page.locator("#copy-command").click();
  await page.waitForFunction((text) => document.getElementById("copy-command").textContent === text, label);

  // a file that is dropped beside the areas does not take the place of the page
  const isPrevented = (name) => !document.body.dispatchEvent(new DragEvent(name, { bubbles: true, cancelable: true }));
  for (const name of ["dragover", "drop"]) assert.ok(await page.evaluate(isPrevented, name));

  // a second finger that is lifted does not end what the first one draws
  await page.locator("#canvas").scrollIntoViewIfNeeded();
  await drag(page, [150, 30], [265, 239]);
  const alone = await pixels(page);
  await drag(page, [10, 10], [60, 60]);
  assert.notEqual(await pixels(page), alone);
  await drag(page, [150, 30], [265, 239], () => page.locator("#canvas").dispatchEvent("pointerup", { pointerId: 7 }));
  assert.equal(await pixels(page), alone);

  // the object that is chosen stays so when one before it goes
  await page.locator("#add").click();
  await page.locator("#add").click();
  const objects = page.locator("#objects > *");
  assert.equal(await objects.count(), 3);
  await objects.nth(1).click();
  const chosen = () => page.locator("#objects > *").evaluateAll((all) => all.findIndex((each) => each.matches(".chosen, [aria-current='true']") || each.querySelector("[aria-current='true'], [aria-pressed='true']")));
  assert.equal(await chosen(), 1);
  await objects.nth(0).locator(".remove").click();
  assert.equal(await chosen(), 0);
  assert.deepEqual(problems, []);
});
