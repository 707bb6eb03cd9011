// What a generation's events amount to: a canvas, and every step that led to it, so that it can be shown again from the beginning.
// Pure: events in, cells out. It has no clock and knows nothing of the page.
//
// A cell is never changed, only replaced: whoever shows cells sees by identity which are new.
//     look        "fixed" (given by the request), "masked", "guess" (still masked, with what the model would put there), "committed"
//     text        the token for display
//     confidence  0 to 1, of guesses and committed tokens
//     step        the step that committed it, counted from 0
//     change      "committed", "edited" or "remasked" if the last step did that
//     edited, remasked   whether an earlier step did, as long as it matters
//     end         whether the token ends the text

/** Steps from one kept canvas to the next: replaying from the middle costs at most so many. */
const KEYFRAME_STEPS = 64;
/** Edits that are kept. Beyond, guesses of further steps are let go, and only what was committed can be replayed. */
const EDITS_MAX = 1_000_000;

export class Recording {
    /** `ends` are the ids of tokens that end a text. */
    constructor(ends = []) {
        this.ends = new Set(ends);
        this.started = undefined;
        this.steps = [];
        /** The text so far that is final. */
        this.text = "";
        /** The Finished message, once there is one. */
        this.finished = undefined;
        this.edits = 0;
        this.keyframes = [];
        this.newest = undefined;
        this.shown = undefined;
    }

    /** Steps told: positions are 0, before the first, to this, behind the last. */
    get length() {
        return this.steps.length;
    }

    /** Takes a GenerateEvent. */
    apply({ started, step, committed, finished }) {
        if (started) {
            this.started = started;
            this.newest = { position: 0, cells: started.canvas.map((cell) => begin(cell)) };
            this.keyframes = [this.newest.cells];
        } else if (!this.started) throw new Error("the first event is not Started");
        else if (step) this.record(step);
        else if (committed) this.text += committed.text;
        else if (finished) this.finished = finished;
    }

    record(step) {
        this.edits += step.edits.length;
        const edits =
            this.edits > EDITS_MAX ? step.edits.filter((edit) => edit.status !== "EDIT_STATUS_PROVISIONAL") : step.edits;
        this.steps.push({ ...step, edits });
        this.newest = { position: this.length, cells: this.advance(this.newest.cells, step) };
        if (this.length % KEYFRAME_STEPS === 0) this.keyframes.push(this.newest.cells);
    }

    advance(cells, step) {
        const next = cells.map((cell) => (cell.change ? { ...cell, change: undefined } : cell));
        for (const edit of step.edits) {
            const cell = next[edit.position];
            const edited = cell && change(cell, edit, step.step);
            if (edited) next[edit.position] = { ...edited, end: this.ends.has(edit.token_id) && edited.look !== "masked" };
        }
        return next;
    }

    /** The canvas behind so many steps. */
    cellsAt(position) {
        if (!this.started) return [];
        if (position >= this.length) return this.newest.cells;
        const keyframe = Math.floor(position / KEYFRAME_STEPS);
        let from = { position: keyframe * KEYFRAME_STEPS, cells: this.keyframes[keyframe] };
        // Played forwards, the last one shown is nearer.
        if (this.shown && this.shown.position <= position && this.shown.position > from.position) from = this.shown;
        let { cells } = from;
        for (const step of this.steps.slice(from.position, position)) cells = this.advance(cells, step);
        this.shown = { position, cells };
        return cells;
    }

    /**
     * The canvas as it is in the end: the cells that are the text, without the end-of-text and what stands behind it. Where cells and
     * text do not agree (a character of several tokens, a stop string that cuts one) the text is right, and is one cell.
     */
    finalCells() {
        const cells = this.cellsAt(this.length).map((cell) => (cell.change ? { ...cell, change: undefined } : cell));
        let length = 0;
        for (let count = 0; count <= cells.length; count += 1) {
            if (length === this.text.length) {
                const found = cells.slice(0, count);
                if (found.map((cell) => cell.text).join("") === this.text) return found;
                break;
            }
            length += cells[count]?.text.length ?? 0;
        }
        return [{ look: "committed", text: this.text }];
    }

    /**
     * Seconds of decoding until so many steps were done. The server tells when the first came and when all was over, and steps of one
     * run take alike; those of a run that did not finish count as a tenth of a second each.
     */
    secondsAt(position) {
        const usage = this.finished?.usage;
        if (!usage) return position / 10;
        if (position === 0) return 0;
        const whole = usage.decoding_seconds;
        const first = this.length <= 1 ? whole : Math.min(usage.first_provisional_seconds ?? 0, whole);
        return first + ((whole - first) * (position - 1)) / Math.max(this.length - 1, 1);
    }

    /** The position after so many seconds of decoding. */
    positionAt(seconds) {
        let position = 0;
        while (position < this.length && this.secondsAt(position + 1) <= seconds) position += 1;
        return position;
    }
}

function begin({ token_id, text, masked }) {
    return masked ? { look: "masked", text: "" } : { look: "fixed", text, tokenId: token_id };
}

/** A cell after an edit; nothing for a status that is not known. */
function change(cell, { status, text, token_id: tokenId, confidence }, step) {
    switch (status) {
        case "EDIT_STATUS_PROVISIONAL":
            return { look: "guess", text, tokenId, confidence, remasked: cell.remasked };
        case "EDIT_STATUS_COMMITTED":
            return { look: "committed", text, tokenId, confidence, step, change: "committed", edited: cell.remasked };
        case "EDIT_STATUS_EDITED":
            return { look: "committed", text, tokenId, confidence, step, change: "edited", edited: true };
        case "EDIT_STATUS_REMASKED":
            return { look: "masked", text: "", change: "remasked", remasked: true };
        default:
            return undefined;
    }
}
