// Adds the editor to Draw Tracklets. Its state is the node's JSON text, which workflows and prompts save.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { after, forwardPanAndZoom } from "../shared/dom.mjs";
import { TrackletEditor } from "./editor.mjs";

const editors = new Map(); // node -> its editor

app.registerExtension({
    name: "Kinoloom.Tracklets",
    setup() {
        api.addEventListener("graphChanged", showFrames); // another file in Load Image
    },
    nodeCreated(node) {
        if (node.constructor.comfyClass === "KinoloomTracklets") addEditor(node);
    },
    afterConfigureGraph: showFrames,
});

function addEditor(node) {
    const widget = (name) => node.widgets.find((found) => found.name === name);
    const text = widget("json");
    const editor = new TrackletEditor({
        read: () => text.value ?? "",
        write(value) {
            app.canvas?.emitBeforeChange();
            text.value = value;
            app.canvas?.emitAfterChange(); // what ComfyUI's own undo goes back to
        },
        size: () => ["width", "height", "frames"].map((name) => widget(name).value),
    });
    text.hidden = text.options.hidden = true; // the editor shows it
    for (const name of ["width", "height", "frames", "json"]) after(widget(name), "callback", () => editor.load());

    const shown = node.addDOMWidget("editor", "kinoloom_tracklets", editor.root, {
        serialize: false,
        hideOnZoom: false,
        getMinHeight: () => 420,
    });
    shown.serialize = false;
    forwardPanAndZoom(editor.root);
    node.setSize([Math.max(node.size[0], 560), Math.max(node.size[1], 640)]);

    editors.set(node, editor);
    after(node, "onConnectionsChange", showFrames);
    after(node, "onExecuted", (output) => {
        node.kinoloomFrame = output?.kinoloom_frame?.[0];
        showFrames();
    });
    after(node, "onRemoved", () => {
        editor.remove();
        editors.delete(node);
    });
}

function showFrames() {
    for (const [node, editor] of editors) editor.show(frameOf(node));
}

/** The URL of the first frame: Load Image's file, else the last run's image, or null. */
function frameOf(node) {
    const slot = node.inputs?.findIndex((input) => input.name === "image") ?? -1;
    const source = slot < 0 ? null : node.getInputNode(slot);
    if (!source) return null;
    const loads = source.comfyClass?.startsWith("LoadImage");
    const file = loads && source.widgets?.find(({ name }) => name === "image")?.value;
    const place = file ? fileOf(file) : node.kinoloomFrame ?? app.nodeOutputs?.[node.id]?.kinoloom_frame?.[0];
    return place ? api.apiURL(`/view?${new URLSearchParams(place)}`) : null;
}

/** "folder/name.png [output]" as the query of ComfyUI's route for files. */
function fileOf(value) {
    const [, path, type] = /^(.*?)(?: \[(\w+)\])?$/.exec(value);
    const cut = path.lastIndexOf("/");
    return { filename: path.slice(cut + 1), subfolder: path.slice(0, Math.max(cut, 0)), type: type ?? "input" };
}
