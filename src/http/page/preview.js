// Generated HTML as a page, in a frame that has nothing to do with this one: its origin is nobody's, and its own policy keeps it from
// the network. Nowhere else is generated text taken for anything but text.

/** The HTML in what a model wrote, if there is any. Where a prompt was continued, the document may begin in it. */
export function page(prompt, text, chat) {
    const whole = chat ? text : prompt + text;
    const fence = /```html\s*\n([\s\S]*?)(?:```|$)/iu.exec(whole);
    if (fence) return fence[1];
    const start = whole.search(/<!doctype html|<html[\s>]|<body[\s>]|<svg[\s>]|<script[\s>]/iu);
    return start < 0 ? undefined : whole.slice(start);
}

export class Preview {
    constructor(button, place) {
        this.button = button;
        this.place = place;
        button.addEventListener("click", () => this.toggle());
    }

    /** Offers to show a page, or nothing. */
    offer(html) {
        this.html = html;
        this.button.hidden = html === undefined;
        this.close();
    }

    toggle() {
        if (this.place.hidden) this.open();
        else this.close();
    }

    open() {
        const frame = document.createElement("iframe");
        frame.setAttribute("sandbox", "allow-scripts");
        frame.title = "What the model wrote, as a page";
        frame.referrerPolicy = "no-referrer";
        const { html } = this;
        // Its origin is opaque, so the message can name none. The frame's own document is there when it has loaded; what it becomes
        // loads too, and is told nothing.
        frame.addEventListener("load", () => frame.contentWindow.postMessage(html, "*"), { once: true });
        frame.src = "frame.html";
        this.place.replaceChildren(frame);
        this.place.hidden = false;
        this.place.scrollIntoView({ block: "nearest" });
        this.button.setAttribute("aria-expanded", "true");
        this.button.textContent = "Hide the page";
    }

    close() {
        this.place.replaceChildren();
        this.place.hidden = true;
        this.button.setAttribute("aria-expanded", "false");
        this.button.textContent = "Show as a page";
    }
}
