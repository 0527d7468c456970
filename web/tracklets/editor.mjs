// An editor of tracklets: boxes on a frame, key frames on a timeline. It reads and writes JSON text, nothing else.

import { addStyle, el } from "../shared/dom.mjs";
import { MAX_ID, MAX_OBJECTS, MIN_SIDE, PALETTE, boxAt, format, inReach, parse, toVideo } from "./data.mjs";
import { HANDLES, paintFrame } from "./picture.mjs";

const MARGIN = 18; // pixels around the frame, where boxes that leave it can be caught
const GRIP = 8;

export class TrackletEditor {
    /** `host` has read() and write(text) for the JSON, and size(): width, height and frames of the video. */
    constructor(host) {
        this.host = host;
        this.frame = 0;
        this.selected = null; // id
        this.history = [];
        this.image = null;

        const button = (label, title, onclick) => el("button", { type: "button", textContent: label, title, onclick });
        this.playButton = button("▶", "Play", () => this.play());
        this.time = el("span", { className: "kl-time" });
        this.keyButton = button("Key", "Add or remove a key frame here (K)", () => this.toggleKey());
        const hardMeans = "Hard: the object fills the box. Soft: it is somewhere in it. For the key frame here (H)";
        this.hardButton = button("Hard", hardMeans, () => this.toggleHard());
        this.enterButton = button("Enter", "The object is there from this frame on ([)", () => this.mark("enter"));
        this.leaveButton = button("Leave", "The object is there up to this frame (])", () => this.mark("leave"));
        this.between = el("select", { title: "Boxes between key frames", onchange: () => this.setBetween() });
        this.between.append(el("option", { value: "hard", textContent: "between: hard" }));
        this.between.append(el("option", { value: "soft", textContent: "between: soft" }));
        this.undoButton = button("Undo", "Undo the last change (Ctrl+Z)", () => this.undo());
        this.jsonButton = button("JSON", "Show the text", () => this.toggleText());
        this.canvas = el("canvas");
        this.error = el("pre", { className: "kl-error", hidden: true });
        this.stage = el("div", { className: "kl-stage" }, this.canvas, this.error);
        this.area = el("textarea", { className: "kl-scroll", hidden: true, spellcheck: false });
        this.area.onfocus = () => (this.typedOver = this.host.read());
        this.area.oninput = () => this.host.write(this.area.value);
        this.area.onchange = () => this.history.push(this.typedOver);
        this.rows = el("div", { className: "kl-rows kl-scroll" });
        // keeps the keyboard: ComfyUI leaves keys alone that go to an input
        this.scrub = el("input", { type: "range", className: "kl-scrub", min: 0, ariaLabel: "frame" });
        this.scrub.oninput = () => this.seek(this.scrub.valueAsNumber);
        this.hint = el("div", { className: "kl-hint" });
        const edit = [this.keyButton, this.hardButton, this.enterButton, this.leaveButton, this.between];
        const tools = [this.playButton, this.time, ...edit, el("span", { className: "kl-space" }), this.undoButton];
        const bar = el("div", { className: "kl-bar" }, ...tools, this.jsonButton);
        const parts = [bar, this.stage, this.area, this.rows, this.hint, this.scrub];
        this.root = el("div", { className: "kl-tracklets" }, ...parts);
        this.root.addEventListener("keydown", (event) => this.keydown(event));
        this.root.addEventListener("click", (event) => event.target.closest("button") && this.scrub.focus());

        this.canvas.addEventListener("pointerdown", (event) => event.button === 0 && this.grab(event));
        this.canvas.addEventListener("pointermove", (event) => this.drag(event));
        this.canvas.addEventListener("pointerup", (event) => this.release(event));
        this.canvas.addEventListener("pointercancel", (event) => this.release(event));
        this.observer = new ResizeObserver(() => this.draw());
        this.observer.observe(this.stage);
        this.load();
        addStyle(new URL("./tracklets.css", import.meta.url));
    }

    remove() {
        clearInterval(this.playing);
        this.observer.disconnect();
    }

    // -- state

    /** Take over the text and the size of the video. */
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

    /** Keep `this.data` as the text; what was before can be undone. */
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
        this.playing = this.playing ? null : setInterval(() => this.seek((this.frame + 1) % this.data.frames), 125);
        this.playButton.textContent = this.playing ? "❚❚" : "▶";
    }

    /** Put the box of a tracklet at the frame shown, on the key frame there or a new one. */
    place(tracklet, box) {
        const at = boxAt(this.data, tracklet, this.frame);
        if (at.key) at.key.box = box;
        else {
            tracklet.keyframes.push({ frame: this.frame, box, hard: at.hard });
            tracklet.keyframes.sort((a, b) => a.frame - b.frame);
        }
    }

    toggleKey() {
        const at = boxAt(this.data, this.tracklet, this.frame);
        const keys = this.tracklet.keyframes;
        if (at.key) keys.splice(keys.indexOf(at.key), 1);
        else this.place(this.tracklet, at.box);
        this.commit();
    }

    toggleHard() {
        const { key } = boxAt(this.data, this.tracklet, this.frame);
        key.hard = !key.hard;
        this.commit();
    }

    /** Let the object enter or leave at the frame shown; once more takes it back. */
    mark(name) {
        const { tracklet, frame } = this;
        if (tracklet[name] === frame) delete tracklet[name];
        else tracklet[name] = frame;
        const crossed = (tracklet.leave ?? frame) < (tracklet.enter ?? frame);
        if (crossed) delete tracklet[name === "enter" ? "leave" : "enter"];
        this.commit();
    }

    setBetween() {
        this.data.interpolated = this.between.value;
        this.commit();
    }

    add(box) {
        const { tracklets } = this.data;
        const ids = tracklets.map((tracklet) => tracklet.id);
        let id = Math.max(0, ...ids) + 1;
        if (id > MAX_ID) for (id = 1; ids.includes(id); ) id += 1;
        const color = PALETTE.find((free) => !tracklets.some((tracklet) => tracklet.color === free));
        const enter = this.frame ? { enter: this.frame } : {};
        const keyframes = [{ frame: this.frame, box, hard: true }];
        tracklets.push({ id, name: `object ${id}`, color, ...enter, keyframes });
        this.selected = id;
        this.commit();
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
        const there = this.tracklet && boxAt(this.data, this.tracklet, this.frame);
        const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
        if ((event.ctrlKey || event.metaKey) && key === "z") this.undo();
        else if (event.ctrlKey || event.metaKey || event.altKey) return;
        else if (step && shiftKey) there && this.nudge(there.box, ...step);
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

    nudge([x1, y1, x2, y2], right, down) {
        const [dx, dy] = [right * MIN_SIDE, down * MIN_SIDE];
        const moved = [x1 + dx, y1 + dy, x2 + dx, y2 + dy];
        if (!moved.every(inReach)) return;
        this.place(this.tracklet, moved);
        this.commit();
    }

    selectNext(step) {
        const ids = this.data.tracklets.map(({ id }) => id);
        if (ids.length) this.select(ids[(ids.indexOf(this.selected) + step + ids.length) % ids.length]);
    }

    // -- mouse

    /** Where the frame lies on the canvas, in CSS pixels. */
    get view() {
        const { clientWidth, clientHeight } = this.stage;
        const { width, height } = this.data;
        const scale = Math.min((clientWidth - 2 * MARGIN) / width, (clientHeight - 2 * MARGIN) / height);
        const [w, h] = [width * scale, height * scale];
        return { x: (clientWidth - w) / 2, y: (clientHeight - h) / 2, w, h };
    }

    /** The mouse as a fraction of the frame, whatever the zoom. */
    point(event) {
        const rect = this.canvas.getBoundingClientRect();
        const { x, y, w, h } = this.view;
        const [px, py] = [(event.clientX - rect.x) / rect.width, (event.clientY - rect.y) / rect.height];
        return [(px * this.stage.clientWidth - x) / w, (py * this.stage.clientHeight - y) / h];
    }

    /** What is under the mouse: a handle of the selected box, a box, or nothing. */
    hit([x, y], draw) {
        const { w, h } = this.view;
        const chosen = this.tracklet && boxAt(this.data, this.tracklet, this.frame);
        const near = ([hx, hy]) => {
            const [x1, y1, x2, y2] = chosen.box;
            return Math.abs(x - x1 - (x2 - x1) * hx) * w < GRIP && Math.abs(y - y1 - (y2 - y1) * hy) * h < GRIP;
        };
        const handle = chosen && HANDLES.find(near);
        if (handle) return { tracklet: this.tracklet, box: chosen.box, handle };
        if (draw) return null;
        const covers = (tracklet) => {
            const [x1, y1, x2, y2] = boxAt(this.data, tracklet, this.frame)?.box ?? [];
            return x >= x1 && x <= x2 && y >= y1 && y <= y2;
        };
        const found = chosen && covers(this.tracklet) ? this.tracklet : this.data.tracklets.findLast(covers);
        return found ? { tracklet: found, box: boxAt(this.data, found, this.frame).box } : null;
    }

    grab(event) {
        event.preventDefault();
        if (this.playing) this.play();
        this.scrub.focus();
        this.canvas.setPointerCapture(event.pointerId);
        const start = this.point(event);
        this.dragged = { start, moved: false, ...this.hit(start, event.altKey) };
        this.select(this.dragged.tracklet?.id ?? null);
    }

    drag(event) {
        const [x, y] = this.point(event);
        if (!this.dragged) {
            const hit = this.hit([x, y], event.altKey);
            const [hx, hy] = hit?.handle ?? [];
            const diagonal = hx === hy ? "nwse-resize" : "nesw-resize";
            const resize = hx === 0.5 ? "ns-resize" : hy === 0.5 ? "ew-resize" : diagonal;
            this.canvas.style.cursor = hit ? (hit.handle ? resize : "move") : "crosshair";
            return;
        }
        const { start, tracklet, box, handle } = this.dragged;
        const { w, h } = this.view;
        this.dragged.moved ||= Math.hypot((x - start[0]) * w, (y - start[1]) * h) > 3;
        if (!this.dragged.moved) return;
        const within = (edge) => Math.min(Math.max(edge, -0.5), 1.5);
        const ordered = (a, b) => (a < b ? [a, b] : [b, a]);
        if (!tracklet) {
            const inside = (edge) => Math.min(Math.max(edge, 0), 1);
            const [[x1, x2], [y1, y2]] = [ordered(inside(start[0]), inside(x)), ordered(inside(start[1]), inside(y))];
            this.dragged.drawn = [x1, y1, x2, y2];
        } else if (handle) {
            let [x1, y1, x2, y2] = box;
            if (handle[0] !== 0.5) [x1, x2] = ordered(handle[0] ? x1 : x2, within(x));
            if (handle[1] !== 0.5) [y1, y2] = ordered(handle[1] ? y1 : y2, within(y));
            if (x2 - x1 >= MIN_SIDE && y2 - y1 >= MIN_SIDE) this.place(tracklet, [x1, y1, x2, y2]);
        } else {
            const dx = Math.min(Math.max(x - start[0], -0.5 - box[0]), 1.5 - box[2]);
            const dy = Math.min(Math.max(y - start[1], -0.5 - box[1]), 1.5 - box[3]);
            this.place(tracklet, [box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy]);
        }
        this.draw();
    }

    release() {
        const { drawn, moved, tracklet } = this.dragged ?? {};
        this.dragged = null;
        const large = drawn && drawn[2] - drawn[0] >= MIN_SIDE && drawn[3] - drawn[1] >= MIN_SIDE;
        if (large && this.data.tracklets.length < MAX_OBJECTS) this.add(drawn);
        else if (moved && tracklet) this.commit();
        else this.draw();
    }

    // -- picture

    /** Show the image at this address as the first frame, or none. */
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
        this.drawRows();
        this.draw();
    }

    drawRows() {
        const { frames, tracklets } = this.data;
        const left = (frame) => `${((frame + 0.5) / frames) * 100}%`;
        this.rows.style.setProperty("--kl-at", left(this.frame));
        const lane = (id, ...children) => {
            const made = el("div", { className: "kl-lane" }, ...children);
            const go = (event) => {
                const rect = made.getBoundingClientRect();
                this.seek(Math.floor(((event.clientX - rect.x) / rect.width) * frames));
            };
            made.onpointerdown = (event) => {
                if (event.button !== 0) return;
                event.preventDefault();
                this.scrub.focus();
                const scrubbing = new AbortController(); // rows are made anew while the mouse moves
                addEventListener("pointermove", go, { signal: scrubbing.signal, capture: true });
                addEventListener("pointerup", () => scrubbing.abort(), { signal: scrubbing.signal, capture: true });
                if (id) this.selected = id;
                go(event);
            };
            return made;
        };
        const every = Math.max(Math.ceil(frames / 12), 1);
        const ticks = [...Array(Math.ceil(frames / every)).keys()].map((index) => index * every);
        const mark = (className, frame, props, style) =>
            el("span", { className, ...props, style: { left: left(frame), ...style } });
        const ruler = ticks.map((frame) => mark("kl-tick", frame, { textContent: frame }));
        const title = el("span", { className: "kl-hint", textContent: "frame" });
        const head = el("div", { className: "kl-row" }, el("span"), title, lane(null, ...ruler));
        const rows = tracklets.map((tracklet) => {
            const { id, color, keyframes, enter = 0, leave = frames - 1 } = tracklet;
            const change = (name) => (event) => {
                tracklet[name] = event.target.value;
                this.commit();
            };
            const [start, width] = [enter, leave - enter + 1].map((count) => `${(count / frames) * 100}%`);
            const span = el("span", { className: "kl-span", style: { left: start, width, background: color } });
            const keys = keyframes.map(({ frame, hard }) =>
                mark("kl-key", frame, {}, { borderColor: color, background: hard ? color : "var(--comfy-input-bg)" }),
            );
            const shade = el("input", { type: "color", value: color, title: "Colour", onchange: change("color") });
            const name = el("input", { type: "text", value: tracklet.name, title: "Name", onchange: change("name") });
            name.onfocus = () => (this.selected = id);
            const remove = el("button", { type: "button", textContent: "×", title: "Delete the object (Delete)" });
            remove.onclick = () => this.delete(id);
            const row = el("div", { className: "kl-row" }, shade, name, lane(id, span, ...keys), remove);
            row.classList.toggle("kl-on", id === this.selected);
            return row;
        });
        this.rows.replaceChildren(head, ...rows);
    }

    draw() {
        const { clientWidth, clientHeight } = this.stage;
        if (!clientWidth) return;
        const ratio = Math.min(devicePixelRatio * 2, 3); // sharp when zoomed in
        Object.assign(this.canvas, { width: clientWidth * ratio, height: clientHeight * ratio });
        const context = this.canvas.getContext("2d");
        context.scale(ratio, ratio);
        const { data, frame, image, tracklet } = this;
        paintFrame(context, this.view, { data, frame, image, selected: tracklet, drawn: this.dragged?.drawn });
    }
}
