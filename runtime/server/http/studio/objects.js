// The list of objects: a picture or words for each, and how it is cut out.

import { Refused, segment } from "./api.js";
import { stencil } from "./marks.js";

// Lets files be dropped on an area or chosen with an input. `take` gets a picture's file, `say` what is wrong.
export function accept(area, input, take, say) {
  const use = (file) => {
    if (!file) return;
    if (!file.type.startsWith("image/")) say(`'${file.name}' is not a picture.`);
    else take(file);
  };
  input.addEventListener("change", () => {
    use(input.files[0]);
    input.value = ""; // the same file may be chosen again
  });
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

export class Objects {
  // `page` knows what the model takes (`takesWords`, `canClick`), whether each object has a place (`hasPlaces`),
  // and is told of what happens here (`choose`, `changed`, `removed`, `cut`, `say`).
  constructor(list, template, page) {
    this.list = list;
    this.template = template;
    this.page = page;
    this.items = [{}];
  }

  // What says what is drawn; undefined where that is missing.
  said(each) {
    return this.page.takesWords() ? each.prompt?.trim() : each.file;
  }

  add() {
    this.items.push({});
    this.draw();
  }

  draw() {
    this.list.replaceChildren(...this.items.map((each, index) => this.#row(each, index)));
  }

  // Marks the row whose place is being set.
  mark(chosen) {
    for (const [index, row] of [...this.list.children].entries()) {
      const isChosen = this.page.hasPlaces() && index === chosen;
      row.classList.toggle("chosen", isChosen);
      const use = row.querySelector(".use");
      use.textContent = isChosen ? "Placing" : "Place";
      use.setAttribute("aria-pressed", String(isChosen));
    }
  }

  // Shows an object without what is around it, as its clicks or the server's own finding say.
  async showCut(each) {
    const { clicks, automatic, file } = each;
    const isStill = () => each.clicks === clicks && each.automatic === automatic && each.file === file;
    if (each.cut) URL.revokeObjectURL(each.cut);
    each.cut = null;
    try {
      if (clicks || automatic) {
        const [mask, picture] = await Promise.all([segment(file, clicks ?? []), createImageBitmap(file)]);
        const cut = stencil(mask, (context) => context.drawImage(picture, 0, 0));
        const blob = await cut.convertToBlob({ type: "image/png" });
        if (isStill()) each.cut = URL.createObjectURL(blob);
      }
      this.page.say("");
    } catch (error) {
      if (!(error instanceof Refused || error instanceof DOMException)) throw error;
      // the browser reads fewer kinds of pictures than the server
      if (isStill()) this.page.say(error instanceof Refused ? error.message : `'${file.name}' cannot be shown here.`);
    }
    this.draw();
    this.page.changed();
  }

  #row(each, index) {
    const row = this.template.content.firstElementChild.cloneNode(true);
    const find = (selector) => row.querySelector(selector);
    const { page } = this;
    const words = page.takesWords();
    find(".thumb").hidden = find(".automatic").hidden = words;
    find(".words").hidden = !words;
    if (each.file) {
      find("img").src = each.cut ?? each.url;
      find("img").alt = each.file.name;
    }
    accept(find(".thumb"), find("input[type=file]"), (file) => this.#take(each, file, index), page.say);
    find(".text").value = each.prompt ?? "";
    find(".text").addEventListener("input", (event) => {
      each.prompt = event.target.value;
      page.changed();
    });
    const automatic = find(".automatic input");
    automatic.checked = Boolean(each.automatic);
    automatic.addEventListener("change", () => {
      each.automatic = automatic.checked;
      each.clicks = null;
      if (each.file) this.showCut(each);
    });
    const cut = find(".cut");
    cut.hidden = words || !page.canClick();
    cut.disabled = !each.file;
    cut.setAttribute("aria-pressed", String(Boolean(each.clicks)));
    cut.addEventListener("click", () => page.cut(each));
    find(".use").hidden = find(".remove").hidden = !page.hasPlaces();
    find(".use").addEventListener("click", () => page.choose(index, true));
    find(".remove").disabled = this.items.length === 1;
    find(".remove").addEventListener("click", () => {
      for (const url of [each.url, each.cut]) if (url) URL.revokeObjectURL(url);
      this.items.splice(index, 1);
      this.draw();
      page.removed(index);
    });
    return row;
  }

  #take(each, file, index) {
    for (const url of [each.url, each.cut]) if (url) URL.revokeObjectURL(url);
    Object.assign(each, { file, url: URL.createObjectURL(file), cut: null, clicks: null });
    this.draw();
    if (this.page.hasPlaces()) this.page.choose(index, false);
    if (each.automatic) this.showCut(each);
    this.page.changed();
  }
}
