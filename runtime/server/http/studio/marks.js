// Marks as masks, and as what the server finds by them.

import { Refused, segment } from "./api.js";

export const clickText = ({ x, y, outside }) => `${outside ? "!" : ""}${x},${y}`;

// A mark as a PNG file of a picture's size: white inside, black elsewhere.
export async function maskOf(mark, { width, height }) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  if (mark.painted) context.drawImage(mark.painted, 0, 0);
  else context.fillRect(mark.box[0], mark.box[1], mark.box[2] - mark.box[0], mark.box[3] - mark.box[1]);
  const image = context.getImageData(0, 0, width, height);
  for (let index = 0; index < image.data.length; index += 4) {
    const value = image.data[index + 3] > 127 ? 255 : 0;
    image.data.set([value, value, value, 255], index);
  }
  context.putImageData(image, 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}

// Fetches what a mark's clicks show, and draws it on the stage; `say` gets what the server refuses, or "".
export async function showFound(file, mark, stage, say) {
  if (!mark.clicks.some((click) => !click.outside)) {
    mark.found = null;
    stage.draw();
    return;
  }
  try {
    const mask = await segment(file, mark.clicks.map(clickText));
    mark.found = stencil(mask, (context) => {
      context.fillStyle = "#1faa5f";
      context.fillRect(0, 0, mask.width, mask.height);
    });
    say("");
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    say(error.message);
  }
  stage.draw(); // a mark that newer clicks have replaced is no longer on it
}

// A picture with all that is outside of a mask cut away, as a canvas.
export function stencil(mask, paint) {
  const canvas = new OffscreenCanvas(mask.width, mask.height);
  const context = canvas.getContext("2d");
  context.drawImage(mask, 0, 0);
  const image = context.getImageData(0, 0, mask.width, mask.height);
  for (let index = 0; index < image.data.length; index += 4) image.data[index + 3] = image.data[index];
  context.putImageData(image, 0, 0);
  context.globalCompositeOperation = "source-in";
  paint(context);
  return canvas;
}
