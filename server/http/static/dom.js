// The few things that the other modules need of the document. Text only ever becomes text, never markup.

/** The element of the page with this id. */
export const byId = (id) => document.getElementById(id);

/**
 * A new element. `attributes`: strings are attributes, true is an empty one, false and null are none, functions are
 * listeners ("click": f). `children`: nodes and strings; null is none.
 */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(key, value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value != null) made.setAttribute(key, value);
  }
  made.append(...children.flat().filter((child) => child != null));
  return made;
}

/** A row of radio buttons that looks like one control. `choices`: [value, label] pairs. */
export function segmented(name, label, choices, chosen, onChange) {
  const inputs = choices.map(([value, text]) => {
    const input = element("input", { type: "radio", name, value, change: () => onChange(value) });
    input.checked = value === chosen;
    return element("label", {}, input, element("span", {}, text));
  });
  return element("div", { class: "segmented", role: "radiogroup", "aria-label": label }, ...inputs);
}

/** Puts text on the clipboard. True if that worked: an insecure address has no clipboard. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}
