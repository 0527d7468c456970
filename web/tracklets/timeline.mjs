// The rows under the editor's picture: for each object its colour, its name and its key frames over time.

import { el } from "../shared/dom.mjs";

const TICKS = 12; // at most, on the ruler

export class Timeline {
    constructor(editor) {
        this.editor = editor;
        this.root = el("div", { className: "kl-rows kl-scroll" });
    }

    refresh() {
        const { data, frame } = this.editor;
        this.root.style.setProperty("--kl-at", this.left(frame));
        this.root.replaceChildren(this.ruler(), ...data.tracklets.map((tracklet) => this.row(tracklet)));
    }

    left(frame) {
        return `${((frame + 0.5) / this.editor.data.frames) * 100}%`;
    }

    mark(className, frame, props, style) {
        return el("span", { className, ...props, style: { left: this.left(frame), ...style } });
    }

    ruler() {
        const { frames } = this.editor.data;
        const every = Math.max(Math.ceil(frames / TICKS), 1);
        const ticks = [...Array(Math.ceil(frames / every)).keys()].map((index) => index * every);
        const marks = ticks.map((frame) => this.mark("kl-tick", frame, { textContent: frame }));
        const title = el("span", { className: "kl-hint", textContent: "frame" });
        return el("div", { className: "kl-row" }, el("span"), title, this.lane(null, ...marks));
    }

    row(tracklet) {
        const { editor } = this;
        const { frames } = editor.data;
        const { id, color, keyframes, enter = 0, leave = frames - 1 } = tracklet;
        const change = (name) => (event) => {
            tracklet[name] = event.target.value;
            editor.commit();
        };
        const [start, width] = [enter, leave - enter + 1].map((count) => `${(count / frames) * 100}%`);
        const span = el("span", { className: "kl-span", style: { left: start, width, background: color } });
        const keys = keyframes.map(({ frame, hard }) => {
            const background = hard ? color : "var(--comfy-input-bg)";
            return this.mark("kl-key", frame, {}, { borderColor: color, background });
        });
        const shade = el("input", { type: "color", value: color, title: "Colour", onchange: change("color") });
        const name = el("input", { type: "text", value: tracklet.name, title: "Name", onchange: change("name") });
        name.onfocus = () => (editor.selected = id);
        const remove = el("button", { type: "button", textContent: "×", title: "Delete the object (Delete)" });
        remove.onclick = () => editor.delete(id);
        const made = el("div", { className: "kl-row" }, shade, name, this.lane(id, span, ...keys), remove);
        made.classList.toggle("kl-on", id === editor.selected);
        return made;
    }

    /** An object's strip over time. A click goes to that frame and selects the object. */
    lane(id, ...children) {
        const { editor } = this;
        const made = el("div", { className: "kl-lane" }, ...children);
        const go = (event) => {
            const rect = made.getBoundingClientRect();
            editor.seek(Math.floor(((event.clientX - rect.x) / rect.width) * editor.data.frames));
        };
        made.onpointerdown = (event) => {
            if (event.button !== 0) return;
            event.preventDefault();
            editor.scrub.focus();
            const scrubbing = new AbortController(); // rows are made anew while the mouse moves
            addEventListener("pointermove", go, { signal: scrubbing.signal, capture: true });
            addEventListener("pointerup", () => scrubbing.abort(), { signal: scrubbing.signal, capture: true });
            if (id) editor.selected = id;
            go(event);
        };
        return made;
    }
}
