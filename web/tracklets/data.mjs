// Reads and changes the JSON of tracklets, with the same rules as trainers/conditions/tracklets.py.

import { check } from "./rule.mjs";

export * from "./rule.mjs";

/** Readable JSON with one line per key frame. Numbers are rounded, unless rounding would make a box flat. */
export function format(value) {
    const rounded = (key, found) => (typeof found === "number" ? Math.round(found * 1e4) / 1e4 : found);
    const same = (one, other) => rounded("", one) === rounded("", other);
    const flat = ({ box: [x1, y1, x2, y2] }) => same(x1, x2) || same(y1, y2);
    const exact = value.tracklets.some(({ keyframes }) => keyframes.some(flat));
    const text = JSON.stringify(value, exact ? undefined : rounded, 2);
    return text.replace(/\{\s+"frame"[^{}]*\}/g, (found) => found.replace(/\s+/g, " "));
}

/** Rounds as Python does: a half to the even number. */
const even = (number) => (number % 1 === 0.5 ? 2 * Math.round(number / 2) : Math.round(number));

const nearest = (number) => Math.floor(number + 0.5);

function fit(value, width, height) {
    const scale = Math.max(width / value.width, height / value.height);
    const cropW = Math.min(Math.max(even(width / scale), 1), value.width);
    const cropH = Math.min(Math.max(even(height / scale), 1), value.height);
    const left = Math.floor((value.width - cropW) / 2);
    const top = Math.floor((value.height - cropH) / 2);
    const x = (edge) => (edge * value.width - left) / cropW;
    const y = (edge) => (edge * value.height - top) / cropH;
    return mapKeys({ ...value, width, height }, (key) => {
        const [x1, y1, x2, y2] = key.box;
        return { ...key, box: [x(x1), y(y1), x(x2), y(y2)] };
    });
}

function retime(value, frames) {
    const scale = (frames - 1) / Math.max(value.frames - 1, 1);
    const moved = mapKeys({ ...value, frames }, (key) => key);
    for (const tracklet of moved.tracklets) {
        const off = ({ frame }) => Math.abs(frame * scale - nearest(frame * scale));
        const kept = new Map(); // of several that go to one frame the one nearest in time, then the first
        for (const key of tracklet.keyframes.toSorted((a, b) => off(a) - off(b))) {
            const frame = nearest(key.frame * scale);
            if (!kept.has(frame)) kept.set(frame, { ...key, frame });
        }
        tracklet.keyframes = [...kept.values()].sort((a, b) => a.frame - b.frame);
        for (const name of ["enter", "leave"])
            if (tracklet[name] !== undefined) tracklet[name] = nearest(tracklet[name] * scale);
    }
    return moved;
}

/** The same boxes in a video of another size and length; an Error if one is out of reach there. */
export function toVideo(value, width, height, frames) {
    return check(retime(fit(value, width, height), frames));
}

function mapKeys(value, change) {
    return { ...value, tracklets: value.tracklets.map((item) => ({ ...item, keyframes: item.keyframes.map(change) })) };
}

/** A tracklet's box at a frame: {box, hard, key}, where key is the key frame there. Null if the object is absent. */
export function boxAt(value, tracklet, frame) {
    if (frame < (tracklet.enter ?? 0) || frame > (tracklet.leave ?? value.frames - 1)) return null;
    const keys = tracklet.keyframes;
    const before = keys.findLast((key) => key.frame <= frame) ?? keys[0];
    const next = keys.find((key) => key.frame >= frame) ?? keys.at(-1);
    if (before.frame === frame) return { box: before.box, hard: before.hard, key: before };
    const part = (frame - before.frame) / Math.max(next.frame - before.frame, 1);
    const box = before.box.map((edge, index) => edge + (next.box[index] - edge) * part);
    return { box, hard: value.interpolated !== "soft" && before.hard && next.hard, key: null };
}
