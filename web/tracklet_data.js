// What the JSON of tracklets means, as trainers/core/tracklets.py says it.

export const MAX_OBJECTS = 20;
export const MIN_SIDE = 0.01;
const REACH = 10;
export const PALETTE = (
    "#ff0000 #00ff00 #1e3cff #ffff00 #e100ff #00f0ff #ffb400 #8700e1 #00c387 #e178b4 #0096d2 #b47800 #a5c3ff #1e7800 " +
    "#ff781e #874b87 #c3ffc3 #d20096 #9678ff #b42d00 #a5d21e #ffa5ff #2d6996 #009678 #ffb4a5 #00a500 #0ff0a5 #ff69ff " +
    "#00c3e1"
).split(" ");

/** The parsed text; an Error names field, value and what was expected. The node checks again, and more. */
export function parse(text) {
    const value = JSON.parse(text);
    const expect = (right, name, found, wanted) => {
        if (!right) throw new Error(`${name}=${JSON.stringify(found)}: expected ${wanted}`);
    };
    const whole = (name, found, low, high) =>
        expect(Number.isInteger(found) && found >= low && found <= high, name, found, `a whole number ${low}..${high}`);
    expect(value && Array.isArray(value.tracklets), "tracklets", value?.tracklets, "a list");
    expect(value.tracklets.length <= MAX_OBJECTS, "tracklets", value.tracklets.length, `at most ${MAX_OBJECTS}`);
    for (const name of ["width", "height", "frames"]) whole(name, value[name], 1, 16384);
    const ids = new Set();
    value.tracklets.forEach((tracklet, index) => {
        const place = `tracklets[${index}]`;
        whole(`${place}.id`, tracklet?.id, 1, 2 ** 31 - 1);
        expect(!ids.has(tracklet.id), `${place}.id`, tracklet.id, "an id that no other tracklet has");
        ids.add(tracklet.id);
        tracklet.name ??= `object ${tracklet.id}`;
        tracklet.color ??= PALETTE[index];
        expect(/^#[0-9a-f]{6}$/i.test(tracklet.color), `${place}.color`, tracklet.color, "a colour such as #ff0000");
        for (const name of ["enter", "leave"])
            if (tracklet[name] !== undefined) whole(`${place}.${name}`, tracklet[name], 0, value.frames - 1);
        const keys = tracklet.keyframes;
        expect(Array.isArray(keys) && keys.length, `${place}.keyframes`, keys, "at least one key frame");
        keys.forEach((key, at) => {
            whole(`${place}.keyframes[${at}].frame`, key?.frame, 0, value.frames - 1);
            const { box } = key;
            const inside = (edge) => typeof edge === "number" && Math.abs(edge) <= REACH;
            const four = Array.isArray(box) && box.length === 4 && box.every(inside);
            const wanted = "x1, y1, x2, y2 as fractions of the frame, x1 < x2 and y1 < y2";
            expect(four && box[0] < box[2] && box[1] < box[3], `${place}.keyframes[${at}].box`, box, wanted);
            key.hard ??= true;
        });
        keys.sort((a, b) => a.frame - b.frame);
    });
    return value;
}

/** Text that people can read: one line per key frame. */
export function format(value) {
    const rounded = (key, found) => (typeof found === "number" ? Math.round(found * 1e4) / 1e4 : found);
    return JSON.stringify(value, rounded, 2).replace(/\{\s+"frame"[^{}]*\}/g, (found) => found.replace(/\s+/g, " "));
}

function fit(value, width, height) {
    const scale = Math.max(width / value.width, height / value.height);
    const cropW = Math.min(Math.round(width / scale), value.width);
    const cropH = Math.min(Math.round(height / scale), value.height);
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
        const off = ({ frame }) => Math.abs(frame * scale - Math.round(frame * scale));
        const kept = new Map(); // of several that go to one frame the one nearest in time, then the first
        for (const key of tracklet.keyframes.toSorted((a, b) => off(a) - off(b))) {
            const frame = Math.round(key.frame * scale);
            if (!kept.has(frame)) kept.set(frame, { ...key, frame });
        }
        tracklet.keyframes = [...kept.values()].sort((a, b) => a.frame - b.frame);
        for (const name of ["enter", "leave"])
            if (tracklet[name] !== undefined) tracklet[name] = Math.round(tracklet[name] * scale);
    }
    return moved;
}

/** The same boxes in a video of another size and length. */
export function toVideo(value, width, height, frames) {
    return retime(fit(value, width, height), frames);
}

function mapKeys(value, change) {
    return { ...value, tracklets: value.tracklets.map((item) => ({ ...item, keyframes: item.keyframes.map(change) })) };
}

/** The box of a tracklet at a frame: {box, hard, key}, key being the key frame there; null when it is not there. */
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
