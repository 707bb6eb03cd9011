// A finished run in figures.

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const fine = new Intl.NumberFormat("en", { maximumFractionDigits: 1, minimumFractionDigits: 1 });

export function seconds(value) {
    if (value === undefined) return "–";
    if (value < 0.01) return `${(1000 * value).toFixed(1)} ms`;
    if (value < 1) return `${plain.format(1000 * value)} ms`;
    return `${fine.format(value)} s`;
}

/** The large figure: tokens a second, or the time that a replay has come to. */
export function rate(usage, clock) {
    if (clock !== undefined) return [strong(seconds(clock)), " elapsed"];
    if (!usage) return [];
    return [strong(plain.format(usage.decoding_tokens_per_second)), " tokens/s"];
}

function strong(text) {
    const element = document.createElement("strong");
    element.textContent = text;
    return element;
}

export function forwards(usage) {
    const { prefill = 0, denoise = 0, cache_store = 0, verify = 0, decode = 0 } = usage.forwards ?? {};
    return Number(prefill) + Number(denoise) + Number(cache_store) + Number(verify) + Number(decode);
}

/** The list below a canvas, as elements. */
export function figures(usage, recording) {
    if (!usage) return [];
    const kinds = Object.entries(usage.forwards ?? {})
        .filter(([, count]) => count > 0)
        .map(([kind, count]) => `${count} ${kind.replace("_", " ")}`);
    const rows = [
        ["tokens", plain.format(usage.generated_tokens)],
        ["forwards", plain.format(forwards(usage)), kinds.join(", ")],
        ["tokens/forward", fine.format(usage.tokens_per_forward)],
        ["first text", seconds(usage.first_committed_seconds), "from getting a place to the first committed token"],
        [
            "in all",
            seconds(usage.preparing_seconds + usage.queue_seconds + usage.decoding_seconds),
            `${seconds(usage.queue_seconds)} of it waiting`,
        ],
    ];
    const drafts = usage.speculation;
    if (drafts)
        rows.push([
            "acceptance length",
            drafts.drafts > 0 ? fine.format(drafts.acceptance_length) : "no drafts",
            `${drafts.accepted_tokens} tokens accepted of ${drafts.drafts} drafts`,
        ]);
    if (recording.finished.reason === "FINISH_REASON_LENGTH") rows.push(["ended", "canvas full"]);
    return rows.map(row);
}

function row([name, value, more]) {
    const element = document.createElement("div");
    const [term, description] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name;
    description.textContent = value;
    if (more) element.title = more;
    element.dataset.figure = name;
    element.append(term, description);
    return element;
}

/** What two finished lanes came to, in a sentence. */
export function outcome(first, second) {
    const [left, right] = [first, second].map((lane) => lane.recording.finished.usage.decoding_seconds);
    const names = [first, second].map(
        (lane) =>
            (lane.method === "diffusion" ? "Diffusion" : "Autoregression") +
            (first.method === second.method ? ` (${lane.model.name})` : ""),
    );
    const [ahead, behind] = left <= right ? [0, 1] : [1, 0];
    const times = Math.max(left, right) / Math.max(Math.min(left, right), 1e-9);
    const same = first.recording.text === second.recording.text ? "Both wrote the same text." : "The texts differ.";
    return `${names[ahead]} took ${seconds([left, right][ahead])}, ${names[behind].toLowerCase()} ${fine.format(times)} times as long. ${same}`;
}
