// Plays lanes' recordings on one clock, so that a race can be watched: runs of milliseconds are slowed, and slow ones hurried.

/** Milliseconds for a step, and for the whole. */
const STEP_MS = 110;
const WHOLE_MS = [1200, 8000];

export class Replay {
    /** `tell` is told when playing starts and ends. */
    constructor(tell) {
        this.tell = tell;
        this.lanes = [];
        this.frame = undefined;
    }

    get playing() {
        return this.lanes.length > 0;
    }

    /** Plays `lanes` from where they are, or from the beginning if they are at their ends. How many times slower than they ran. */
    play(lanes, { fromStart = false } = {}) {
        this.stop();
        const seconds = Math.max(...lanes.map(({ recording }) => recording.secondsAt(recording.length)));
        const whole = Math.min(
            Math.max(STEP_MS * Math.max(...lanes.map(({ recording }) => recording.length)), WHOLE_MS[0]),
            WHOLE_MS[1],
        );
        const slower = whole / 1000 / seconds;
        const anew = fromStart || lanes.every((lane) => lane.position >= lane.recording.length);
        const start = anew ? 0 : Math.max(...lanes.map((lane) => lane.recording.secondsAt(lane.position)));
        const began = performance.now();
        const tick = (now) => {
            const clock = start + (now - began) / 1000 / slower;
            for (const lane of lanes) {
                const position = lane.recording.positionAt(clock);
                lane.show(position, { clock: position < lane.recording.length ? clock : undefined });
            }
            if (lanes.every((lane) => lane.position >= lane.recording.length)) this.stop();
            else this.frame = requestAnimationFrame(tick);
        };
        this.lanes = lanes;
        this.frame = requestAnimationFrame(tick);
        this.tell(this);
        return slower;
    }

    stop() {
        if (!this.playing) return;
        cancelAnimationFrame(this.frame);
        this.lanes = [];
        this.tell(this);
    }

    /** Stops, with everything at its end. */
    finish() {
        const { lanes } = this;
        this.stop();
        for (const lane of lanes) lane.show(lane.recording.length);
    }
}
