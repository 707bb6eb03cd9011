// Draws cells: a span each, of which only those that changed are touched. All text is text, whatever it looks like.

/** What must not reach the page as it is: it would move or hide what stands beside it. */
const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/gu;

export class CanvasView {
    constructor(element) {
        this.element = element;
        this.prompt = document.createElement("span");
        this.prompt.className = "given";
        element.replaceChildren(this.prompt);
        this.spans = [];
        this.cells = [];
        element.addEventListener("pointerover", ({ target }) => this.explain(target));
    }

    /** `prompt` stands before the cells. */
    show(prompt, cells) {
        if (this.prompt.textContent !== prompt) this.prompt.textContent = prompt;
        while (this.spans.length > cells.length) this.spans.pop().remove();
        const added = [];
        while (this.spans.length < cells.length) {
            const span = document.createElement("span");
            this.spans.push(span);
            added.push(span);
        }
        cells.forEach((cell, at) => {
            if (this.cells[at] !== cell || at >= cells.length - added.length) draw(this.spans[at], cell);
        });
        this.element.append(...added);
        this.cells = cells;
    }

    /** A cell that is pointed at says what it is. */
    explain(target) {
        const cell = this.cells[this.spans.indexOf(target)];
        if (!cell || target.title) return;
        const sure = cell.confidence === undefined ? "" : `, ${(100 * cell.confidence).toFixed(1)} % sure`;
        const words = {
            fixed: "given",
            masked: "masked",
            guess: `a guess${sure}`,
            committed: cell.step === undefined ? "" : `step ${cell.step + 1}${sure}`,
        };
        target.title = words[cell.look];
    }
}

function draw(span, cell) {
    const classes = [
        "cell",
        cell.look,
        cell.change && `now-${cell.change}`,
        cell.edited && "edited",
        cell.remasked && "remasked",
        cell.end && "end",
    ];
    span.className = classes.filter(Boolean).join(" ");
    span.removeAttribute("title");
    const shaded = cell.look === "guess";
    if (shaded) span.style.setProperty("--confidence", cell.confidence.toFixed(3));
    else span.style.removeProperty("--confidence");
    span.textContent = words(cell);
}

function words(cell) {
    if (cell.look === "masked" || cell.end) return "";
    const text = cell.text.replace(CONTROL, "\ufffd");
    // A guess at a line's end must be seen.
    return cell.look === "guess" ? text.replaceAll("\n", "↵\n") : text;
}
