// An editor of tracklets: boxes on a frame, key frames on a timeline. It reads and writes only JSON text.

import { addStyle, el } from "../shared/dom.mjs";
import { boxAt, format, parse, toVideo } from "./data.mjs";
import { mark, nudge, toggleHard, toggleKey } from "./edits.mjs";
import { Mouse } from "./mouse.mjs";
import { paintFrame } from "./picture.mjs";
import { Timeline } from "./timeline.mjs";

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const PLAYED = 125; // milliseconds of a frame

export class TrackletEditor {
    /** `host` has read() and write(text) for the JSON, and size(): width, height and frames of the video. */
    constructor(host) {
        this.host = host;
        this.frame = 0;
        this.selected = null; // id
        this.history = [];
        this.image = null;
        this.canvas = el("canvas");
        this.error = el("pre", { className: "kl-error", hidden: true });
        this.stage = el("div", { className: "kl-stage" }, this.canvas, this.error);
        this.area = el("textarea", { className: "kl-scroll", hidden: true, spellcheck: false });
        this.area.onfocus = () => (this.typedOver = this.host.read());
        this.area.oninput = () => this.host.write(this.area.value);
        this.area.onchange = () => this.history.push(this.typedOver);
        this.timeline = new Timeline(this);
        // takes the keyboard: ComfyUI ignores keys that are typed into an input
        this.scrub = el("input", { type: "range", className: "kl-scrub", min: 0, ariaLabel: "frame" });
        this.scrub.oninput = () => this.seek(this.scrub.valueAsNumber);
        this.hint = el("div", { className: "kl-hint" });
        const parts = [this.bar(), this.stage, this.area, this.timeline.root, this.hint, this.scrub];
        this.root = el("div", { className: "kl-tracklets" }, ...parts);
        this.root.addEventListener("keydown", (event) => this.keydown(event));
        this.root.addEventListener("click", (event) => event.target.closest("button") && this.scrub.focus());
        this.mouse = new Mouse(this);
        this.observer = new ResizeObserver(() => this.draw());
        this.observer.observe(this.stage);
        this.load();
        addStyle(new URL("./tracklets.css", import.meta.url));
    }

    bar() {
        const button = (label, title, onclick) => el("button", { type: "button", textContent: label, title, onclick });
        const edit = (change) => () => {
            change(this.data, this.tracklet, this.frame);
            this.commit();
        };
        const at = (name) => edit((_, tracklet, frame) => mark(tracklet, name, frame));
        this.playButton = button("▶", "Play", () => this.play());
        this.time = el("span", { className: "kl-time" });
        this.keyButton = button("Key", "Add or remove a key frame here (K)", edit(toggleKey));
        const hardMeans = "Hard: the object fills the box. Soft: it is somewhere in it. For the key frame here (H)";
        this.hardButton = button("Hard", hardMeans, edit(toggleHard));
        this.enterButton = button("Enter", "The object is there from this frame on ([)", at("enter"));
        this.leaveButton = button("Leave", "The object is there up to this frame (])", at("leave"));
        const onchange = edit((data) => (data.interpolated = this.between.value));
        this.between = el("select", { title: "Boxes between key frames", onchange });
        this.between.append(el("option", { value: "hard", textContent: "between: hard" }));
        this.between.append(el("option", { value: "soft", textContent: "between: soft" }));
        this.undoButton = button("Undo", "Undo the last change (Ctrl+Z)", () => this.undo());
        this.jsonButton = button("JSON", "Show the text", () => this.toggleText());
        const edits = [this.keyButton, this.hardButton, this.enterButton, this.leaveButton, this.between];
        const tools = [this.playButton, this.time, ...edits, el("span", { className: "kl-space" }), this.undoButton];
        return el("div", { className: "kl-bar" }, ...tools, this.jsonButton);
    }

    remove() {
        clearInterval(this.playing);
        this.observer.disconnect();
    }

    /** Load the JSON text and the video's size. */
    load() {
        const [width, height, frames] = this.host.size();
        const text = this.host.read();
        if (document.activeElement !== this.area) this.area.value = text;
        this.error.hidden = true;
        this.data = { width, height, frames, interpolated: "hard", tracklets: [] };
        try {
            if (text.trim()) this.data = toVideo(parse(text), width, height, frames);
        } catch (error) {
            this.error.textContent = `The JSON cannot be used.\n\n${error.message}`;
            this.error.hidden = false;
            this.jsonButton.classList.add("kl-on");
            this.area.hidden = false;
        }
        this.refresh();
    }

    /** Write `this.data` as the text, and add the earlier text to the undo history. */
    commit() {
        this.history.push(this.host.read());
        this.host.write(format(this.data));
    }

    undo() {
        if (this.history.length) this.host.write(this.history.pop());
    }

    get tracklet() {
        return this.data.tracklets.find(({ id }) => id === this.selected);
    }

    seek(frame) {
        this.frame = Math.min(Math.max(frame, 0), this.data.frames - 1);
        this.refresh();
    }

    select(id) {
        this.selected = id;
        this.refresh();
    }

    play() {
        clearInterval(this.playing);
        this.playing = this.playing ? null : setInterval(() => this.seek((this.frame + 1) % this.data.frames), PLAYED);
        this.playButton.textContent = this.playing ? "❚❚" : "▶";
    }

    delete(id) {
        this.data.tracklets = this.data.tracklets.filter((tracklet) => tracklet.id !== id);
        this.commit();
    }

    toggleText() {
        this.area.hidden = !this.jsonButton.classList.toggle("kl-on");
    }

    keydown(event) {
        if (event.target.matches("textarea, input[type=text], select")) return event.stopPropagation();
        const { key, shiftKey } = event;
        const step = STEPS[key];
        if ((event.ctrlKey || event.metaKey) && key === "z") this.undo();
        else if (event.ctrlKey || event.metaKey || event.altKey) return;
        else if (step && shiftKey) nudge(this.data, this.tracklet, this.frame, ...step) && this.commit();
        else if (step?.[0]) this.seek(this.frame + step[0]);
        else if (step) this.selectNext(step[1]);
        else if (key === "Delete" || key === "Backspace") this.tracklet && this.delete(this.selected);
        else if (key === "k") this.keyButton.click();
        else if (key === "h") this.hardButton.click();
        else if (key === "[") this.enterButton.click();
        else if (key === "]") this.leaveButton.click();
        else return;
        event.preventDefault();
        event.stopPropagation();
    }

    selectNext(step) {
        const ids = this.data.tracklets.map(({ id }) => id);
        if (ids.length) this.select(ids[(ids.indexOf(this.selected) + step + ids.length) % ids.length]);
    }

    /** Show the image at this URL as the first frame, or none. */
    show(url) {
        if (this.url === url) return;
        this.url = url;
        this.image = null;
        if (url) {
            const image = new Image();
            image.onload = () => {
                if (this.url !== url) return;
                this.image = image;
                this.draw();
            };
            image.src = url;
        }
        this.draw();
    }

    refresh() {
        const { frames, tracklets } = this.data;
        this.frame = Math.min(this.frame, frames - 1);
        const at = this.tracklet && boxAt(this.data, this.tracklet, this.frame);
        this.scrub.max = frames - 1;
        this.scrub.value = this.frame;
        this.time.textContent = `${this.frame} / ${frames - 1}`;
        this.keyButton.disabled = !at || (at.key && this.tracklet.keyframes.length === 1);
        this.hardButton.disabled = !at?.key;
        this.hardButton.textContent = at?.hard === false ? "Soft" : "Hard";
        for (const [button, on] of [
            [this.keyButton, at?.key],
            [this.enterButton, this.tracklet?.enter === this.frame],
            [this.leaveButton, this.tracklet?.leave === this.frame],
        ]) button.classList.toggle("kl-on", Boolean(on));
        this.enterButton.disabled = this.leaveButton.disabled = !this.tracklet;
        this.undoButton.disabled = !this.history.length;
        this.between.value = this.data.interpolated;
        this.between.disabled = !this.error.hidden; // nothing may overwrite a text that is being mended
        this.hint.textContent = !tracklets.length
            ? "Drag on the frame to draw a box around an object."
            : !this.tracklet
              ? "Click a box to select it, drag to draw another; with Alt inside of a box."
              : "Go to another frame and move the box. Arrows: frame, object; with Shift: nudge. Delete removes.";
        this.timeline.refresh();
        this.draw();
    }

    draw() {
        const { clientWidth, clientHeight } = this.stage;
        if (!clientWidth) return;
        const ratio = Math.min(devicePixelRatio * 2, 3); // sharp when zoomed in
        Object.assign(this.canvas, { width: clientWidth * ratio, height: clientHeight * ratio });
        const context = this.canvas.getContext("2d");
        context.scale(ratio, ratio);
        const { data, frame, image, tracklet } = this;
        const { view, drawn } = this.mouse;
        paintFrame(context, view, { data, frame, image, selected: tracklet, drawn });
    }
}
