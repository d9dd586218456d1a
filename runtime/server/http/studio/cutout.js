// A dialog in which an object is cut out by clicks on it and beside it.

import { clickText, showFound } from "./marks.js";
import { Stage } from "./stage.js";

export class Cutout {
  // `dialog` has a canvas in a .clicks, radios named cut-tool, a .state, and buttons .done, .clear and .cancel.
  constructor(dialog) {
    this.dialog = dialog;
    this.stage = new Stage(this.#find("canvas"), this.#find(".clicks"), (mark) => this.#clicked(mark));
    this.stage.tallest = 50;
    for (const input of dialog.querySelectorAll("[name=cut-tool]")) {
      input.addEventListener("change", () => this.#use(input.value));
    }
    this.#find(".clear").addEventListener("click", () => this.#show([]));
    this.#find(".cancel").addEventListener("click", () => dialog.close());
    this.#find(".done").addEventListener("click", () => {
      const clicks = this.stage.marks[0]?.clicks.map(clickText);
      this.dialog.close();
      this.done(clicks ?? null);
    });
  }

  // Opens it for a picture; `done` gets the clicks, or null where there are none.
  async open(file, done) {
    this.file = file;
    this.done = done;
    this.stage.setScene(await createImageBitmap(file));
    this.dialog.showModal();
    this.#show([]);
  }

  #find(selector) {
    return this.dialog.querySelector(selector);
  }

  #use(tool) {
    this.stage.tool = tool;
    this.#find(`[value=${tool}]`).checked = true;
    this.stage.draw();
  }

  #show(marks) {
    this.stage.marks = marks;
    this.#use("click");
    this.#say("");
    this.#find(".clicks").focus();
  }

  #say(text) {
    this.#find(".state").textContent = text;
  }

  #clicked(mark) {
    if (mark) showFound(this.file, mark, this.stage, (text) => this.#say(text));
  }
}
