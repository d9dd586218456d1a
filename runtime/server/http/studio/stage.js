// The canvas: a picture, what is marked on it, and the result beside it. A mark is a box, what is painted, or
// clicks, with what the server found by them.

const ACCENT = "#1faa5f";
const OUTSIDE = "#b3261e";
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const within = (value, most) => Math.round(Math.min(Math.max(value, 0), most));

export class Stage {
  // `onMark` is called with a mark that the pointer or the keyboard has changed, and with null for one that is gone.
  constructor(canvas, keys, onMark) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.onMark = onMark;
    this.scene = null;
    this.result = null;
    this.share = 1; // of the result that is shown, from the left
    this.marks = [];
    this.chosen = 0;
    this.tool = "box";
    this.brush = 24;
    this.tallest = 75; // in hundredths of the window
    this.cursor = null; // where a click of the keyboard goes
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => this.#up(event));
    keys.addEventListener("keydown", (event) => this.#key(event));
  }

  setScene(image) {
    this.scene = image;
    this.result = null;
    this.cursor = null;
    this.canvas.width = image.width;
    this.canvas.height = image.height;
    this.canvas.style.width = `min(100%, ${(this.tallest * image.width) / image.height}vh)`;
    this.draw();
  }

  get #clicks() {
    return this.tool === "click" || this.tool === "not";
  }

  // --- drawing ---

  draw() {
    const { context, canvas, scene, result } = this;
    if (!scene) return;
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(scene, 0, 0);
    if (result) {
      const width = Math.round(canvas.width * this.share);
      if (width) context.drawImage(result, 0, 0, width, canvas.height, 0, 0, width, canvas.height);
      if (this.share < 1) this.#line(width);
      return;
    }
    this.marks.forEach((mark, index) => this.#mark(mark, index === this.chosen));
    if (this.cursor && this.#clicks) this.#sign({ x: this.cursor[0], y: this.cursor[1], outside: this.tool === "not" }, 0.6);
  }

  #line(x) {
    this.context.fillStyle = ACCENT;
    this.context.fillRect(x - 1, 0, 2, this.canvas.height);
  }

  #mark(mark, isChosen) {
    const { context } = this;
    const area = mark?.painted ?? mark?.found;
    context.save();
    if (area) {
      context.globalAlpha = isChosen ? 0.55 : 0.3;
      context.drawImage(area, 0, 0);
    } else if (mark?.box) {
      context.lineWidth = Math.max(2, this.canvas.width / 300);
      context.strokeStyle = ACCENT;
      context.setLineDash(isChosen ? [] : [context.lineWidth * 3]);
      context.strokeRect(...this.#area(mark.box));
      context.fillStyle = ACCENT;
      context.globalAlpha = 0.15;
      context.fillRect(...this.#area(mark.box));
    }
    context.restore();
    for (const click of mark?.clicks ?? []) this.#sign(click, isChosen ? 1 : 0.6);
  }

  // A disc with plus or minus.
  #sign({ x, y, outside }, alpha) {
    const { context } = this;
    const radius = Math.max(5, this.canvas.width / 60);
    context.save();
    context.globalAlpha = alpha;
    context.fillStyle = outside ? OUTSIDE : ACCENT;
    context.strokeStyle = "white";
    context.lineWidth = radius / 3;
    context.beginPath();
    context.arc(x + 0.5, y + 0.5, radius, 0, 7);
    context.fill();
    context.stroke();
    context.beginPath();
    context.moveTo(x - radius / 2, y + 0.5);
    context.lineTo(x + 1 + radius / 2, y + 0.5);
    if (!outside) {
      context.moveTo(x + 0.5, y - radius / 2);
      context.lineTo(x + 0.5, y + 1 + radius / 2);
    }
    context.stroke();
    context.restore();
  }

  // --- pointer ---

  #point(event) {
    const area = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / area.width;
    return [(event.clientX - area.left) * scale, (event.clientY - area.top) * scale];
  }

  #down(event) {
    if (!this.scene || event.button || this.from) return; // a second finger draws nothing
    this.result = null;
    const point = this.#point(event);
    if (this.#clicks) {
      this.#click(...point);
      return;
    }
    this.canvas.setPointerCapture(event.pointerId);
    this.pointer = event.pointerId;
    this.from = point;
    if (this.tool !== "box") {
      this.#stroke(this.from, this.from);
      this.draw();
    }
  }

  #move(event) {
    if (!this.from || event.pointerId !== this.pointer) return;
    const to = this.#point(event);
    if (this.tool === "box") {
      this.marks[this.chosen] = { box: this.#box(this.from, to) };
    } else {
      this.#stroke(this.from, to);
      this.from = to;
    }
    this.draw();
  }

  #up(event) {
    if (!this.from || event.pointerId !== this.pointer) return;
    this.from = null;
    const box = this.marks[this.chosen]?.box;
    if (box && (box[2] - box[0] < 2 || box[3] - box[1] < 2)) delete this.marks[this.chosen];
    this.#changed();
  }

  #click(x, y) {
    const { width, height } = this.canvas;
    const before = this.marks[this.chosen];
    const click = { x: Math.min(within(x - 0.5, width), width - 1), y: Math.min(within(y - 0.5, height), height - 1) };
    const clicks = [...(before?.clicks ?? []), { ...click, outside: this.tool === "not" }];
    this.marks[this.chosen] = { clicks, found: before?.found };
    this.#changed();
  }

  #changed() {
    this.draw();
    this.onMark(this.marks[this.chosen] ?? null);
  }

  #box([ax, ay], [bx, by]) {
    const { width, height } = this.canvas;
    return [
      within(Math.min(ax, bx), width),
      within(Math.min(ay, by), height),
      within(Math.max(ax, bx), width),
      within(Math.max(ay, by), height),
    ];
  }

  #stroke(from, to) {
    const before = this.marks[this.chosen];
    if (this.tool === "erase" && !before) return;
    const painted = before?.painted ?? new OffscreenCanvas(this.canvas.width, this.canvas.height);
    const context = painted.getContext("2d");
    if (!before?.painted) {
      this.marks[this.chosen] = { painted };
      context.fillStyle = ACCENT;
      // what was found is corrected; a box is painted anew, unless a part of it is to go
      if (before?.found) context.drawImage(before.found, 0, 0);
      else if (before?.box && this.tool === "erase") context.fillRect(...this.#area(before.box));
    }
    context.globalCompositeOperation = this.tool === "erase" ? "destination-out" : "source-over";
    context.strokeStyle = ACCENT;
    context.lineCap = "round";
    context.lineWidth = (this.brush * this.canvas.width) / 600;
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(to[0] + 0.01, to[1]);
    context.stroke();
  }

  #area([x0, y0, x1, y1]) {
    return [x0, y0, x1 - x0, y1 - y0];
  }

  // --- keyboard ---

  #key(event) {
    if (!this.scene) return;
    const isArrow = event.key in ARROWS;
    if (!isArrow && !(this.#clicks && ["Enter", " ", "Backspace"].includes(event.key))) return;
    if (!this.#clicks && this.marks[this.chosen]?.painted) return; // there is no box to move
    event.preventDefault();
    this.result = null;
    const step = Math.max(1, Math.round(this.canvas.width / 100));
    const by = isArrow ? ARROWS[event.key].map((one) => one * step) : null;
    if (!this.#clicks) this.#moveBox(...by, event.shiftKey);
    else if (by) this.#moveCursor(...by);
    else if (event.key === "Backspace") this.#takeBack();
    else this.#click(...this.#place());
  }

  #place() {
    this.cursor ??= [this.canvas.width / 2, this.canvas.height / 2].map(Math.round);
    return this.cursor;
  }

  #moveCursor(dx, dy) {
    const [x, y] = this.#place();
    this.cursor = [within(x + dx, this.canvas.width - 1), within(y + dy, this.canvas.height - 1)];
    this.draw();
  }

  #takeBack() {
    const mark = this.marks[this.chosen];
    if (!mark?.clicks) return;
    const clicks = mark.clicks.slice(0, -1);
    if (clicks.length) this.marks[this.chosen] = { clicks, found: mark.found };
    else delete this.marks[this.chosen];
    this.#changed();
  }

  #moveBox(dx, dy, isResized) {
    const { width, height } = this.canvas;
    const middle = [width * 0.35, height * 0.35, width * 0.65, height * 0.65].map(Math.round);
    const [x0, y0, x1, y1] = this.marks[this.chosen]?.box ?? middle;
    const moved = isResized ? [x0, y0, x1 + dx, y1 + dy] : [x0 + dx, y0 + dy, x1 + dx, y1 + dy];
    const isInside = moved[2] > 4 && moved[3] > 4 && moved[0] < width - 4 && moved[1] < height - 4;
    if (isInside && moved[2] - moved[0] > 3 && moved[3] - moved[1] > 3) this.marks[this.chosen] = { box: moved };
    this.#changed();
  }
}
