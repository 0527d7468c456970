// Checks the JSON of tracklets by the rules of trainers/conditions/tracklets.py.

export const MAX_OBJECTS = 20;
export const MIN_SIDE = 0.01;
export const MAX_ID = 2 ** 31 - 1;
const [MAX_SIDE, MAX_FRAMES, REACH] = [16384, 100_000, 10];
export const PALETTE = (
    "#ff0000 #00ff00 #1e3cff #ffff00 #e100ff #00f0ff #ffb400 #8700e1 #00c387 #e178b4 #0096d2 #b47800 #a5c3ff #1e7800 " +
    "#ff781e #874b87 #c3ffc3 #d20096 #9678ff #b42d00 #a5d21e #ffa5ff #2d6996 #009678 #ffb4a5 #00a500 #0ff0a5 #ff69ff " +
    "#00c3e1"
).split(" ");

/** The parsed text with defaults filled in. An Error names field, value and expected values, as the node's error does. */
export function parse(text) {
    return check(JSON.parse(text));
}

/** The value with defaults filled in. An Error if Draw Tracklets would refuse it. */
export function check(value) {
    known("", value, ["width", "height", "frames", "tracklets"], ["interpolated"]);
    whole("width", value.width, 1, MAX_SIDE);
    whole("height", value.height, 1, MAX_SIDE);
    whole("frames", value.frames, 1, MAX_FRAMES);
    value.interpolated = value.interpolated === undefined ? "hard" : value.interpolated;
    expect(["hard", "soft"].includes(value.interpolated), "interpolated", value.interpolated, "hard or soft");
    expect(Array.isArray(value.tracklets), "tracklets", value.tracklets, "a list");
    expect(value.tracklets.length <= MAX_OBJECTS, "tracklets", value.tracklets.length, `at most ${MAX_OBJECTS}`);
    const ids = new Set();
    value.tracklets.forEach((tracklet, index) => {
        checkTracklet(tracklet, index, value.frames);
        expect(!ids.has(tracklet.id), `tracklets[${index}].id`, tracklet.id, "an id that no other tracklet has");
        ids.add(tracklet.id);
    });
    return value;
}

function checkTracklet(tracklet, index, frames) {
    const place = `tracklets[${index}].`;
    known(place, tracklet, ["id", "keyframes"], ["name", "color", "enter", "leave"]);
    const { id, name = `object ${id}`, color = PALETTE[index], keyframes: keys } = tracklet;
    whole(`${place}id`, id, 1, MAX_ID);
    expect(typeof name === "string", `${place}name`, name, "text");
    const coloured = typeof color === "string" && /^#[0-9a-f]{6}$/i.test(color);
    expect(coloured, `${place}color`, color, "a colour such as #ff0000");
    Object.assign(tracklet, { name, color });
    for (const at of ["enter", "leave"]) {
        if (tracklet[at] === null) delete tracklet[at]; // the first and the last frame
        if (at in tracklet) whole(place + at, tracklet[at], 0, frames - 1);
    }
    const ordered = (tracklet.enter ?? 0) <= (tracklet.leave ?? frames);
    expect(ordered, `${place}leave`, tracklet.leave, `a frame not before enter=${tracklet.enter}`);
    expect(Array.isArray(keys) && keys.length, `${place}keyframes`, keys, "at least one key frame");
    keys.forEach((key, number) => checkKey(key, `${place}keyframes[${number}].`, frames));
    keys.sort((a, b) => a.frame - b.frame);
    const taken = keys.map(({ frame }) => frame);
    expect(new Set(taken).size === taken.length, `${place}keyframes`, taken, "ascending frames, each once");
}

function checkKey(key, place, frames) {
    known(place, key, ["frame", "box"], ["hard"]);
    const { frame, box, hard = true } = key;
    whole(`${place}frame`, frame, 0, frames - 1);
    expect(typeof hard === "boolean", `${place}hard`, hard, "true or false");
    key.hard = hard;
    const four = Array.isArray(box) && box.length === 4 && box.every(inReach);
    const wanted = `x1, y1, x2, y2 as fractions of the frame, within -${REACH}..${REACH}, x1 < x2 and y1 < y2`;
    expect(four && box[0] < box[2] && box[1] < box[3], `${place}box`, box, wanted);
}

export const inReach = (edge) => typeof edge === "number" && Math.abs(edge) <= REACH;

function expect(right, name, found, wanted) {
    if (!right) throw new Error(`${name}=${JSON.stringify(found)}: expected ${wanted}`);
}

function whole(name, found, low, high) {
    expect(Number.isInteger(found) && found >= low && found <= high, name, found, `a whole number ${low}..${high}`);
}

function known(place, value, needed, others) {
    const kind = typeof value === "object" && value !== null && !Array.isArray(value);
    expect(kind, place.slice(0, -1) || "tracklets", value, `an object with ${needed.join(", ")}`);
    const names = [...needed, ...others];
    for (const [name, found] of Object.entries(value))
        expect(names.includes(name), place + name, found, `one of ${names.join(", ")}`);
    for (const name of needed) expect(name in value, place + name, null, `a value; ${needed.join(", ")} are needed`);
}
