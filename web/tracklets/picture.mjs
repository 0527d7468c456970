// Paints tracklets on the editor's canvas.

import { boxAt } from "./data.mjs";

export const HANDLES = [[0, 0], [0.5, 0], [1, 0], [1, 0.5], [1, 1], [0.5, 1], [0, 1], [0, 0.5]];

/** Paint frame number `frame` at `view`. `selected` is a tracklet, `drawn` a box that is being drawn. */
export function paintFrame(context, view, { data, frame, image, selected, drawn }) {
    context.fillStyle = "#000";
    context.fillRect(view.x, view.y, view.w, view.h);
    if (image) paintImage(context, view, image, frame);
    const others = data.tracklets.filter((tracklet) => tracklet !== selected);
    for (const tracklet of selected ? [...others, selected] : others) {
        const at = boxAt(data, tracklet, frame);
        if (at) paintBox(context, view, tracklet, at, tracklet === selected);
    }
    if (selected) paintPath(context, view, data, selected);
    if (drawn) outline(context, view, drawn, "#fff", [4, 3], 2);
}

/** Paint the centre crop of the first frame. It is faint on other frames, whose pictures are unknown. */
function paintImage(context, { x, y, w, h }, image, frame) {
    const { naturalWidth, naturalHeight } = image;
    const scale = Math.max(w / naturalWidth, h / naturalHeight);
    const [sw, sh] = [w / scale, h / scale];
    context.globalAlpha = frame ? 0.5 : 1;
    context.drawImage(image, (naturalWidth - sw) / 2, (naturalHeight - sh) / 2, sw, sh, x, y, w, h);
    context.globalAlpha = 1;
}

function outline(context, { x, y, w, h }, [x1, y1, x2, y2], color, dash, width) {
    context.setLineDash(dash);
    context.lineWidth = width;
    context.strokeStyle = color;
    context.strokeRect(x + x1 * w, y + y1 * h, (x2 - x1) * w, (y2 - y1) * h);
    context.setLineDash([]);
}

/** Paint a box: dashed if soft, with handles if selected, which are filled on key frames. */
function paintBox(context, view, { name, color }, { box, hard, key }, selected) {
    const { x, y, w, h } = view;
    const [x1, y1, x2, y2] = box;
    outline(context, view, box, color, hard ? [] : [6, 4], selected ? 3 : 2);
    context.font = "11px sans-serif";
    const [left, top] = [x + x1 * w - 1, Math.max(y + y1 * h - 17, 1)];
    context.fillStyle = color;
    context.fillRect(left, top, context.measureText(name).width + 8, 16);
    context.fillStyle = isLight(color) ? "#000" : "#fff";
    context.fillText(name, left + 4, top + 12);
    if (!selected) return;
    [context.fillStyle, context.strokeStyle] = key ? [color, "#fff"] : ["#fff", color];
    context.lineWidth = 1.5;
    for (const [hx, hy] of HANDLES) {
        const corner = [x + (x1 + (x2 - x1) * hx) * w - 4, y + (y1 + (y2 - y1) * hy) * h - 4];
        context.fillRect(...corner, 8, 8);
        context.strokeRect(...corner, 8, 8);
    }
}

/** Paint the path of the box's centre: a dot for each frame, a larger one for key frames. */
function paintPath(context, { x, y, w, h }, data, tracklet) {
    context.fillStyle = tracklet.color;
    for (let frame = 0; frame < data.frames; frame++) {
        const at = boxAt(data, tracklet, frame);
        if (!at) continue;
        const [x1, y1, x2, y2] = at.box;
        context.beginPath();
        context.arc(x + ((x1 + x2) / 2) * w, y + ((y1 + y2) / 2) * h, at.key ? 4 : 1.8, 0, 2 * Math.PI);
        context.fill();
    }
}

function isLight(color) {
    const [red, green, blue] = [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
    return 0.3 * red + 0.59 * green + 0.11 * blue > 140;
}
