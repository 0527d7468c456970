// Adds the training panel: a sidebar tab, live charts on nodes, and a message when a run ends.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { addStyle } from "../shared/dom.mjs";
import { ICONS } from "./facts.mjs";
import { READERS } from "./history.mjs";
import { jobWidgets } from "./job_nodes.mjs";
import { Jobs } from "./jobs.mjs";
import { Panel } from "./panel.mjs";
import { words } from "./words.mjs";

const TAB = "kinoloom-training";
const ICON = "pi pi-chart-line";
const setting = (name) => app.extensionManager.setting.get(`Kinoloom.Training.${name}`);
export const jobs = new Jobs(api);
const panel = new Panel(jobs, setting);
const addWidget = jobWidgets(jobs, open, setting);

function open(id) {
    app.extensionManager.sidebarTab.activeSidebarTabId = TAB;
    if (id !== undefined) panel.open(id);
}

function toast(severity, summary, detail) {
    app.extensionManager.toast.add({ severity, summary, detail, life: severity === "error" ? 20000 : 8000 });
}

/** Fetch the server's words. An Error names words that this page does not know, if the browser cached an old page. */
async function learn() {
    Object.assign(words, await jobs.call("/words"));
    const statuses = [...words.going, ...words.ended].filter((status) => !(status in ICONS));
    const lacking = [...words.events.filter((event) => !(event in READERS)), ...statuses];
    if (lacking.length) throw new Error(`This page is of another version: it lacks ${lacking.join(", ")}. Reload it.`);
}

jobs.addEventListener("error", ({ detail }) => toast("warn", "Kinoloom", detail));
jobs.addEventListener("ended", ({ detail: job }) => {
    if (!setting("Toasts")) return;
    const { status, run_name: name, done, total, error } = job;
    if (status === "failed") toast("error", `Training run ${name} failed`, error);
    else if (status === "finished") toast("success", `Training run ${name} is finished`, `${total} steps`);
    else toast("info", `Training run ${name} was ${status}`, `after ${done} of ${total} steps`);
});

app.registerExtension({
    name: "Kinoloom.Training",
    settings: [
        { id: "Kinoloom.Training.Toasts", name: "Say when a run ends", type: "boolean", defaultValue: true },
        {
            id: "Kinoloom.Training.Smoothing",
            name: "Smoothing of loss curves",
            type: "slider",
            defaultValue: 0.6,
            attrs: { min: 0, max: 0.99, step: 0.01 },
        },
        { id: "Kinoloom.Training.LogScale", name: "Loss curves on a log scale", type: "boolean", defaultValue: false },
    ],
    commands: [{ id: "Kinoloom.OpenTraining", label: "Open the training panel", icon: ICON, function: () => open() }],
    async setup() {
        addStyle(new URL("./training.css", import.meta.url));
        app.extensionManager.registerSidebarTab({
            id: TAB,
            icon: ICON,
            title: "Training",
            tooltip: "Kinoloom: training runs",
            type: "custom",
            render: (element) => panel.show(element),
        });
        app.ui.settings.addEventListener("Comfy.ColorPalette.change", () => jobs.changed());
        api.addEventListener("reconnected", () => jobs.attempt(learn)); // perhaps to a server of another version
        await jobs.attempt(learn);
        jobs.refresh();
    },
    nodeCreated: addWidget,
});
