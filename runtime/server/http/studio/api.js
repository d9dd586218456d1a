// What the page asks of the server: its models, masks, and pictures with events on the way (docs/http.md).

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

let token = "";

export function setToken(value) {
  token = value.trim();
}

export async function model(name) {
  const answer = await ask(`/v1/model?model=${encodeURIComponent(name)}`, {});
  return { ...(await answer.json()), grpc_port: answer.headers.get("x-grpc-port") };
}

// Where the object is that clicks, like "3,4" or "!5,6", are on; the main object without any. A mask, white inside.
export async function segment(file, clicks) {
  const form = new FormData();
  form.append("picture", file);
  for (const click of clicks) form.append("clicks", click);
  const answer = await ask("/v1/segment", { method: "POST", body: form, headers: { accept: "image/png" } });
  return createImageBitmap(await answer.blob());
}

// Yields [name, fields] of each event; `signal` cancels, which ends the work on the server, too.
export async function* pictures(form, path, signal) {
  const answer = await ask(path, { method: "POST", body: form, signal, headers: { accept: "text/event-stream" } });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  const pieces = []; // a picture comes in many: they are joined once
  let text = "";
  let ended = false;
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) break;
    pieces.push(value);
    if (!value.includes("\n")) continue;
    text += pieces.splice(0).join("");
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const [first, second] = text.slice(0, end).split("\n");
      if (first.startsWith(":")) continue; // says only that the server is there
      const name = first.replace("event: ", "");
      const fields = JSON.parse(second.replace("data: ", ""));
      if (name === "error") throw new Refused(fields.error.message, 0);
      ended ||= name === "result";
      yield [name, fields];
    }
  }
  if (!ended) throw new Refused("The connection was lost before the picture was finished.", 0);
}

async function ask(path, options) {
  const headers = { ...options.headers };
  if (token) headers.authorization = `Bearer ${token}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (token && /[^\x20-\x7e]/.test(token)) throw new Refused("The token has a character that no token has.", 0);
    throw new Refused("The server cannot be reached. It may have stopped; try again in a moment.", 0);
  }
  if (answer.ok) return answer;
  const found = await answer.json().catch(() => null);
  const message = found?.error?.message ?? `The server answered ${answer.status}.`;
  const later = answer.headers.get("retry-after");
  throw new Refused(later && answer.status === 429 ? `${message} (queue full)` : message, answer.status);
}
