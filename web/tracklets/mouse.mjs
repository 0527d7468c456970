// The mouse on the editor's canvas: it selects, draws, moves and resizes boxes.

import { MAX_OBJECTS, MIN_SIDE, boxAt } from "./data.mjs";
import { add, place } from "./edits.mjs";
import { HANDLES } from "./picture.mjs";

const MARGIN = 18; // pixels around the frame, where boxes that leave it can be caught
const GRIP = 8;
const REACH = [-0.5, 1.5]; // how far out of the frame an edge can be dragged

const within = (value, low, high) => Math.min(Math.max(value, low), high);
const ordered = (a, b) => (a < b ? [a, b] : [b, a]);

export class Mouse {
    constructor(editor) {
        this.editor = editor;
        const { canvas } = editor;
        canvas.addEventListener("pointerdown", (event) => event.button === 0 && this.grab(event));
        canvas.addEventListener("pointermove", (event) => this.move(event));
        canvas.addEventListener("pointerup", () => this.release());
        canvas.addEventListener("pointercancel", () => this.release());
    }

    /** A box that is being drawn. */
    get drawn() {
        return this.dragged?.drawn;
    }

    /** The frame's rectangle on the canvas, in CSS pixels. */
    get view() {
        const { clientWidth, clientHeight } = this.editor.stage;
        const { width, height } = this.editor.data;
        const scale = Math.min((clientWidth - 2 * MARGIN) / width, (clientHeight - 2 * MARGIN) / height);
        const [w, h] = [width * scale, height * scale];
        return { x: (clientWidth - w) / 2, y: (clientHeight - h) / 2, w, h };
    }

    /** The mouse as a fraction of the frame, whatever the zoom. */
    point(event) {
        const { canvas, stage } = this.editor;
        const rect = canvas.getBoundingClientRect();
        const { x, y, w, h } = this.view;
        const [px, py] = [(event.clientX - rect.x) / rect.width, (event.clientY - rect.y) / rect.height];
        return [(px * stage.clientWidth - x) / w, (py * stage.clientHeight - y) / h];
    }

    /** The thing under the mouse: a handle of the selected box, a box, or nothing. */
    hit([x, y], draw) {
        const { data, frame, tracklet: selected } = this.editor;
        const { w, h } = this.view;
        const chosen = selected && boxAt(data, selected, frame);
        const near = ([hx, hy]) => {
            const [x1, y1, x2, y2] = chosen.box;
            return Math.abs(x - x1 - (x2 - x1) * hx) * w < GRIP && Math.abs(y - y1 - (y2 - y1) * hy) * h < GRIP;
        };
        const handle = chosen && HANDLES.find(near);
        if (handle) return { tracklet: selected, box: chosen.box, handle };
        if (draw) return null;
        const covers = (tracklet) => {
            const [x1, y1, x2, y2] = boxAt(data, tracklet, frame)?.box ?? [];
            return x >= x1 && x <= x2 && y >= y1 && y <= y2;
        };
        const found = chosen && covers(selected) ? selected : data.tracklets.findLast(covers);
        return found ? { tracklet: found, box: boxAt(data, found, frame).box } : null;
    }

    grab(event) {
        const { editor } = this;
        event.preventDefault();
        if (editor.playing) editor.play();
        editor.scrub.focus();
        editor.canvas.setPointerCapture(event.pointerId);
        const start = this.point(event);
        this.dragged = { start, moved: false, ...this.hit(start, event.altKey) };
        editor.select(this.dragged.tracklet?.id ?? null);
    }

    move(event) {
        const to = this.point(event);
        if (!this.dragged) {
            this.editor.canvas.style.cursor = cursor(this.hit(to, event.altKey));
            return;
        }
        const { start } = this.dragged;
        const { w, h } = this.view;
        this.dragged.moved ||= Math.hypot((to[0] - start[0]) * w, (to[1] - start[1]) * h) > 3;
        if (this.dragged.moved) this.drag(to);
    }

    drag([x, y]) {
        const { data, frame } = this.editor;
        const { start, tracklet, box, handle } = this.dragged;
        if (!tracklet) {
            const inside = (edge) => within(edge, 0, 1);
            const [[x1, x2], [y1, y2]] = [ordered(inside(start[0]), inside(x)), ordered(inside(start[1]), inside(y))];
            this.dragged.drawn = [x1, y1, x2, y2];
        } else if (handle) {
            let [x1, y1, x2, y2] = box;
            if (handle[0] !== 0.5) [x1, x2] = ordered(handle[0] ? x1 : x2, within(x, ...REACH));
            if (handle[1] !== 0.5) [y1, y2] = ordered(handle[1] ? y1 : y2, within(y, ...REACH));
            if (x2 - x1 >= MIN_SIDE && y2 - y1 >= MIN_SIDE) place(data, tracklet, frame, [x1, y1, x2, y2]);
        } else {
            const dx = within(x - start[0], REACH[0] - box[0], REACH[1] - box[2]);
            const dy = within(y - start[1], REACH[0] - box[1], REACH[1] - box[3]);
            place(data, tracklet, frame, [box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy]);
        }
        this.editor.draw();
    }

    release() {
        const { editor } = this;
        const { drawn, moved, tracklet } = this.dragged ?? {};
        this.dragged = null;
        const large = drawn && drawn[2] - drawn[0] >= MIN_SIDE && drawn[3] - drawn[1] >= MIN_SIDE;
        if (large && editor.data.tracklets.length < MAX_OBJECTS) {
            editor.selected = add(editor.data, editor.frame, drawn);
            editor.commit();
        } else if (moved && tracklet) editor.commit();
        else editor.draw();
    }
}

/** The CSS cursor for a result of `hit`. */
function cursor(found) {
    if (!found) return "crosshair";
    if (!found.handle) return "move";
    const [x, y] = found.handle;
    if (x === 0.5) return "ns-resize";
    if (y === 0.5) return "ew-resize";
    return x === y ? "nwse-resize" : "nesw-resize";
}
