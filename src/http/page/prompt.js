// The prompt box: a text in which ⟦8⟧ stands for a hole of eight tokens. `parse` is pure; the box draws holes behind the text.

const HOLE = /⟦(\d{1,6})⟧/gu;

/** A text as the fields of a GenerateRequest: what stands before the first hole is the prompt, the rest a template. */
export function parse(text) {
    const pieces = [];
    let at = 0;
    for (const found of text.matchAll(HOLE)) {
        if (found.index > at) pieces.push({ text: text.slice(at, found.index) });
        pieces.push({ hole: Number(found[1]) });
        at = found.index + found[0].length;
    }
    if (pieces.length === 0) return { text };
    if (at < text.length) pieces.push({ text: text.slice(at) });
    const before = pieces[0].text;
    return before === undefined ? { template: pieces } : { text: before, template: pieces.slice(1) };
}

export class PromptBox {
    /** `count` gives the tokens of a text, or fails. */
    constructor(textarea, backdrop, count) {
        this.textarea = textarea;
        this.backdrop = backdrop;
        this.count = count;
        textarea.addEventListener("input", () => this.draw());
        textarea.addEventListener("scroll", () => this.follow());
        new ResizeObserver(() => this.follow()).observe(textarea);
        this.draw();
    }

    get text() {
        return this.textarea.value;
    }

    set text(text) {
        this.textarea.value = text;
        this.draw();
    }

    /** Puts a hole in the place of what is selected, as long as that is in tokens; with nothing selected, one of eight tokens. */
    async makeHole() {
        const { selectionStart: start, selectionEnd: end } = this.textarea;
        const selected = this.text.slice(start, end);
        const tokens = selected === "" ? 8 : await this.count(selected).catch(() => Math.ceil(selected.length / 3));
        this.textarea.focus();
        this.textarea.setRangeText(`⟦${Math.max(tokens, 1)}⟧`, start, end, "end");
        this.textarea.dispatchEvent(new Event("input", { bubbles: true }));
    }

    draw() {
        const parts = [];
        let at = 0;
        for (const found of this.text.matchAll(HOLE)) {
            const mark = document.createElement("mark");
            mark.textContent = found[0];
            parts.push(this.text.slice(at, found.index), mark);
            at = found.index + found[0].length;
        }
        // A line's end at the end takes room only with something behind it.
        this.backdrop.replaceChildren(...parts, `${this.text.slice(at)}\u200b`);
        this.follow();
    }

    follow() {
        this.backdrop.style.setProperty("width", `${this.textarea.clientWidth}px`);
        this.backdrop.scrollTop = this.textarea.scrollTop;
    }
}
