// How the editor changes tracklets, in place.

import { MAX_ID, MIN_SIDE, PALETTE, boxAt, inReach } from "./data.mjs";

/** Set a tracklet's box at a frame, on the key frame there or a new one. */
export function place(data, tracklet, frame, box) {
    const at = boxAt(data, tracklet, frame);
    if (at.key) at.key.box = box;
    else {
        tracklet.keyframes.push({ frame, box, hard: at.hard });
        tracklet.keyframes.sort((a, b) => a.frame - b.frame);
    }
}

/** Remove the key frame at a frame, or make one there. */
export function toggleKey(data, tracklet, frame) {
    const at = boxAt(data, tracklet, frame);
    const keys = tracklet.keyframes;
    if (at.key) keys.splice(keys.indexOf(at.key), 1);
    else place(data, tracklet, frame, at.box);
}

export function toggleHard(data, tracklet, frame) {
    const { key } = boxAt(data, tracklet, frame);
    key.hard = !key.hard;
}

/** Let the object enter or leave at a frame. A second call undoes it. */
export function mark(tracklet, name, frame) {
    if (tracklet[name] === frame) delete tracklet[name];
    else tracklet[name] = frame;
    const crossed = (tracklet.leave ?? frame) < (tracklet.enter ?? frame);
    if (crossed) delete tracklet[name === "enter" ? "leave" : "enter"];
}

/** Add an object that enters with this box at this frame; returns its id. */
export function add({ tracklets }, frame, box) {
    const ids = tracklets.map((tracklet) => tracklet.id);
    let id = Math.max(0, ...ids) + 1;
    if (id > MAX_ID) for (id = 1; ids.includes(id); ) id += 1;
    const color = PALETTE.find((free) => !tracklets.some((tracklet) => tracklet.color === free));
    const enter = frame ? { enter: frame } : {};
    tracklets.push({ id, name: `object ${id}`, color, ...enter, keyframes: [{ frame, box, hard: true }] });
    return id;
}

/** Move the box at a frame by a number of smallest steps. False if there is no box or the move is out of range. */
export function nudge(data, tracklet, frame, right, down) {
    const there = tracklet && boxAt(data, tracklet, frame);
    const moved = there?.box.map((edge, index) => edge + (index % 2 ? down : right) * MIN_SIDE);
    if (!moved?.every(inReach)) return false;
    place(data, tracklet, frame, moved);
    return true;
}
