// Helpers for elements. Text from the server is only ever set as text.
export const el = (tag, text = "", more = {}) =>
  Object.assign(document.createElement(tag), { textContent: text }, more);
export const short = (text, most) => text.length > most ? text.slice(0, most) + "…" : text;
export const show = (node, text) => { if (node.textContent !== text) node.textContent = text; };
