// The canvas: the scene, the places of the objects, what is painted, and the result beside the scene.

const ACCENT = "#1faa5f";

export class Stage {
  // `onPlace` is called when a place has been changed by the pointer or the keyboard.
  constructor(canvas, keys, onPlace) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.onPlace = onPlace;
    this.scene = null;
    this.result = null;
    this.share = 1; // of the result that is shown, from the left
    this.places = [];
    this.chosen = 0;
    this.tool = "box";
    this.brush = 24;
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.#up());
    keys.addEventListener("keydown", (event) => this.#key(event));
  }

  setScene(image) {
    this.scene = image;
    this.result = null;
    this.canvas.width = image.width;
    this.canvas.height = image.height;
    this.canvas.style.width = `min(100%, ${(75 * image.width) / image.height}vh)`;
    this.draw();
  }

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
    this.places.forEach((place, index) => this.#place(place, index === this.chosen));
  }

  #line(x) {
    this.context.fillStyle = ACCENT;
    this.context.fillRect(x - 1, 0, 2, this.canvas.height);
  }

  #place(place, isChosen) {
    const { context } = this;
    context.save();
    if (place?.painted) {
      context.globalAlpha = isChosen ? 0.55 : 0.3;
      context.drawImage(place.painted, 0, 0);
    } else if (place?.box) {
      const [x0, y0, x1, y1] = place.box;
      context.lineWidth = Math.max(2, this.canvas.width / 300);
      context.strokeStyle = ACCENT;
      context.setLineDash(isChosen ? [] : [context.lineWidth * 3]);
      context.strokeRect(x0, y0, x1 - x0, y1 - y0);
      context.fillStyle = ACCENT;
      context.globalAlpha = 0.15;
      context.fillRect(x0, y0, x1 - x0, y1 - y0);
    }
    context.restore();
  }

  #point(event) {
    const area = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / area.width;
    return [(event.clientX - area.left) * scale, (event.clientY - area.top) * scale];
  }

  #down(event) {
    if (!this.scene) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.result = null;
    this.from = this.#point(event);
    if (this.tool !== "box") {
      this.#stroke(this.from, this.from);
      this.draw();
    }
  }

  #move(event) {
    if (!this.from) return;
    const to = this.#point(event);
    if (this.tool === "box") {
      this.places[this.chosen] = { box: this.#box(this.from, to) };
    } else {
      this.#stroke(this.from, to);
      this.from = to;
    }
    this.draw();
  }

  #up() {
    if (!this.from) return;
    this.from = null;
    const box = this.places[this.chosen]?.box;
    if (box && (box[2] - box[0] < 2 || box[3] - box[1] < 2)) delete this.places[this.chosen];
    this.draw();
    this.onPlace();
  }

  #box([ax, ay], [bx, by]) {
    const within = (value, most) => Math.round(Math.min(Math.max(value, 0), most));
    const { width, height } = this.canvas;
    return [
      within(Math.min(ax, bx), width),
      within(Math.min(ay, by), height),
      within(Math.max(ax, bx), width),
      within(Math.max(ay, by), height),
    ];
  }

  #stroke(from, to) {
    let painted = this.places[this.chosen]?.painted;
    if (!painted) {
      painted = new OffscreenCanvas(this.canvas.width, this.canvas.height);
      this.places[this.chosen] = { painted };
    }
    const context = painted.getContext("2d");
    context.globalCompositeOperation = this.tool === "erase" ? "destination-out" : "source-over";
    context.strokeStyle = ACCENT;
    context.lineCap = "round";
    context.lineWidth = (this.brush * this.canvas.width) / 600;
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(to[0] + 0.01, to[1]);
    context.stroke();
  }

  #key(event) {
    const step = Math.max(1, Math.round(this.canvas.width / 100));
    const by = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
    if (!by || !this.scene) return;
    event.preventDefault();
    this.result = null;
    const { width, height } = this.canvas;
    const quarter = [width * 0.35, height * 0.35, width * 0.65, height * 0.65].map(Math.round);
    const [x0, y0, x1, y1] = this.places[this.chosen]?.box ?? quarter;
    const [dx, dy] = by;
    const moved = event.shiftKey ? [x0, y0, x1 + dx, y1 + dy] : [x0 + dx, y0 + dy, x1 + dx, y1 + dy];
    const isInside = moved[2] > 4 && moved[3] > 4 && moved[0] < width - 4 && moved[1] < height - 4;
    if (isInside && moved[2] - moved[0] > 3 && moved[3] - moved[1] > 3) this.places[this.chosen] = { box: moved };
    this.draw();
    this.onPlace();
  }
}

// The mask of a painted place as a PNG file: white inside, black elsewhere.
export async function maskOf(painted) {
  const canvas = new OffscreenCanvas(painted.width, painted.height);
  const context = canvas.getContext("2d");
  const data = painted.getContext("2d").getImageData(0, 0, painted.width, painted.height);
  for (let index = 0; index < data.data.length; index += 4) {
    const value = data.data[index + 3] > 127 ? 255 : 0;
    data.data.set([value, value, value, 255], index);
  }
  context.putImageData(data, 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}
