// A control for every sampling parameter, made from their definitions.

import { element } from "./dom.js";
import { FORMS, formRow } from "./forms.js";
import { GROUPS, parseList } from "./parameters.js";

/** Makes the controls in `root`. onChange(name, value) follows every change by a person. */
export class Controls {
  constructor(root, onChange) {
    this.onChange = onChange;
    this.rows = new Map();
    for (const group of GROUPS) {
      const badge = element("span", { class: "badge" });
      const rows = group.parameters.map((parameter) => this.row(parameter));
      const details = element("details", {}, element("summary", {}, group.title, badge), ...rows);
      details.open = Boolean(group.open);
      group.parameters.forEach(({ name }) => Object.assign(this.rows.get(name), { details, badge, group }));
      root.append(details);
    }
  }

  row(parameter) {
    const { kind, name, label, text } = parameter;
    const id = `parameter-${name}`;
    const problem = element("p", { class: "problem", id: `${id}-problem`, hidden: true });
    const meaning = element("p", { class: "meaning", id: `${id}-meaning` }, text);
    const described = { id, "aria-describedby": `${id}-meaning ${id}-problem` };
    const row = { parameter, problem };
    const names = [element("span", { class: "label" }, label), " ", element("code", {}, name)];
    const made = { number: numberRow, flag: flagRow, list: listRow, form: formRow }[kind](
      parameter, row, described, names,
      (value) => {
        row.unreadable = false;
        this.setProblem(name, null);
        this.settings[name] = value;
        this.mark(name);
        this.onChange(name, value);
      },
      (message) => {
        row.unreadable = true;
        this.setProblem(name, message);
      },
    );
    row.root = element("div", { class: `parameter ${kind}` }, ...made, meaning, problem);
    this.rows.set(name, row);
    return row.root;
  }

  /** Shows these settings; changes go into the same object. */
  load(settings) {
    const others = settings !== this.settings;
    this.settings = settings;
    for (const [name, row] of this.rows) {
      if (row.unreadable && !others) continue; // being written
      row.set(settings[name]);
      row.unreadable = false;
      this.setProblem(name, null);
      this.mark(name);
    }
  }

  /** Whether a parameter does something, and how many of its group do. */
  mark(name) {
    const { badge, group } = this.rows.get(name);
    const acts = ({ kind, name: other, off }) => {
      const value = this.settings[other];
      if (kind === "number") return off !== null && value !== off;
      return kind === "list" ? value.length > 0 : Boolean(value);
    };
    for (const parameter of group.parameters) this.rows.get(parameter.name).root.classList.toggle("acts", acts(parameter));
    const number = group.parameters.filter(acts).length;
    badge.replaceChildren(number ? `${number} on` : "");
  }

  /** Whether all that is written can be sent; goes to the first control where it cannot. */
  readable() {
    const row = [...this.rows.values()].find(({ unreadable }) => unreadable);
    if (!row) return true;
    row.details.open = true;
    row.input.focus();
    return false;
  }

  /** Says what is wrong with a parameter; null takes it back. Returns whether there is such a control. */
  setProblem(name, message) {
    const row = this.rows.get(name in FORMS ? "form" : name);
    if (!row) return false;
    row.problem.hidden = !message;
    row.problem.replaceChildren(message ?? "");
    if (message) {
      row.input.setAttribute("aria-invalid", "true");
      row.details.open = true;
    } else row.input.removeAttribute("aria-invalid");
    return true;
  }
}

function numberRow(parameter, row, described, names, changed) {
  const { name, label, range, slider } = parameter;
  const [least, most] = range;
  const [first, last, step] = slider;
  row.input = element("input", {
    ...described, type: "number", step, min: least, max: most, inputmode: "decimal",
    placeholder: "auto",
    input: () => {
      // What is no number at all counts as not given, like an empty field.
      const value = row.input.value === "" ? null : Number(row.input.value);
      if (value !== null) row.range.value = value;
      changed(value);
    },
  });
  row.range = element("input", {
    type: "range", min: first, max: last, step, "aria-label": `${label}, slider`, tabindex: "-1",
    input: () => {
      row.input.value = row.range.value;
      changed(Number(row.range.value));
    },
  });
  row.set = (value) => {
    row.input.value = value ?? "";
    row.range.value = value ?? last;
  };
  return [element("div", { class: "head" }, element("label", { for: described.id }, ...names), row.input), row.range];
}

function flagRow(parameter, row, described, names, changed) {
  row.input = element("input", { ...described, type: "checkbox", change: () => changed(row.input.checked) });
  row.set = (value) => (row.input.checked = value);
  return [element("label", { class: "head" }, element("span", {}, ...names), row.input)];
}

function listRow(parameter, row, described, names, changed, wrong) {
  const { form, hint } = parameter;
  row.input = element("textarea", {
    ...described, rows: "1", placeholder: hint, spellcheck: "false",
    input: () => {
      try {
        changed(parseList(form, row.input.value));
      } catch (error) {
        wrong(error.message);
      }
    },
  });
  row.set = (value) => {
    const lines = { texts: () => value.map((line) => line.replaceAll("\n", "\\n")).join("\n"), ids: () => value.join(" ") };
    row.input.value = (lines[form] ?? (() => value.map((pair) => pair.join(": ")).join("\n")))();
  };
  return [element("div", { class: "head" }, element("label", { for: described.id }, ...names)), row.input];
}
