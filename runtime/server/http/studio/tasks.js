// What can be done to a scene: which marks a task needs on it, whether it needs an object from elsewhere, and whether
// it draws one of the scene's own.
// A mark that is a box is sent as one where `byBox` says so; if it says nothing, where the server finds objects in boxes.

const FIND = ["click", "not", "box", "paint", "erase"];
const OBJECT = { name: "object", label: "The object", tools: FIND };
const OTHER = { name: "other", label: "The other object", tools: FIND };
const PLACE = { name: "place", label: "Its new place", tools: ["box"], byBox: true };
const OUTLINE = { name: "outline", label: "Its new outline", tools: ["paint", "erase", "box"], byBox: false };

export const TARGET = { name: "mask", label: "Place", tools: ["box", "paint", "erase"] };

export const TASKS = {
  composite: { label: "Place objects", start: "Draw", marks: null, reference: true, mode: true },
  remove: { label: "Remove an object", start: "Remove", marks: [OBJECT] },
  move: { label: "Move an object", start: "Move", marks: [OBJECT, PLACE], redraws: true },
  reshape: { label: "Give an object another outline", start: "Reshape", marks: [OBJECT, OUTLINE], redraws: true },
  swap: { label: "Swap an object for another", start: "Swap", marks: [OBJECT], reference: true, mode: true },
  exchange: { label: "Let two objects change places", start: "Swap", marks: [OBJECT, OTHER], redraws: true },
  "try-on": { label: "Try a garment on", start: "Try on", marks: [{ ...OBJECT, label: "What it covers" }], reference: true },
};
