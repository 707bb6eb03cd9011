// Reads and checks fields of a form as far as the wire needs it, and says at a field what is wrong with it. What values mean, and
// which are allowed, is the server's to say.

/** A value that cannot even be sent. */
export class FieldProblem extends Error {
    constructor(field, message) {
        super(message);
        this.field = field;
    }
}

/** A whole number of an input, exact however large; undefined for an empty one. */
export function whole(input, field) {
    const text = input.value.trim();
    if (text === "") return undefined;
    if (!/^\d{1,20}$/.test(text) || BigInt(text) >= 1n << 64n) throw new FieldProblem(field, `“${text}” is not a whole number`);
    return BigInt(text);
}

export function real(input, field) {
    const text = input.value.trim().replace(",", ".");
    if (text === "") return undefined;
    if (!Number.isFinite(Number(text))) throw new FieldProblem(field, `“${text}” is not a number`);
    return Number(text);
}

let problems = 0;

/** Says at a field, found by its path in the request in the first of `roots` that has it, what is wrong. Whether there is one. */
export function showProblem(roots, path, message) {
    const root = roots.find((root) => find(root, path));
    if (!root) return false;
    const field = find(root, path);
    for (let outer = field.closest("details"); outer; outer = outer.parentElement.closest("details")) outer.open = true;
    const control = field.matches("input, select, textarea") ? field : field.querySelector("input, select, textarea");
    const note = document.createElement("p");
    note.className = "problem";
    note.id = `problem-${(problems += 1)}`;
    const name = field.querySelector(":scope > span")?.textContent;
    note.textContent = name ? `${name}: ${message}` : message;
    // Both lanes may say the same of what they share.
    if ([...root.querySelectorAll(".problem")].some((other) => other.textContent === note.textContent)) return true;
    field.parentElement.append(note);
    control.setAttribute("aria-invalid", "true");
    control.dataset.described ??= control.getAttribute("aria-describedby") ?? "";
    control.setAttribute("aria-describedby", `${note.id} ${control.dataset.described}`.trim());
    control.focus();
    return true;
}

export function clearProblems(root) {
    for (const note of root.querySelectorAll(".problem")) note.remove();
    for (const control of root.querySelectorAll("[aria-invalid]")) {
        control.removeAttribute("aria-invalid");
        control.setAttribute("aria-describedby", control.dataset.described);
    }
}

/** `data-field` holds paths; what a request says in several ways has one box. */
function find(root, path) {
    const prompt = /^(text|chat|token_ids|prompt|template|suffix)\b/.test(path);
    const wanted = prompt ? "prompt" : path;
    return [...root.querySelectorAll("[data-field]")].find((field) => field.dataset.field.split(" ").includes(wanted));
}

/** Fills a select with `[value, text]` and keeps what was chosen, if that is still there. */
export function options(select, entries) {
    const chosen = select.value;
    select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
    if (entries.some(([value]) => value === chosen)) select.value = chosen;
}
