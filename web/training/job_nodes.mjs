// The widgets on Train nodes and Training Result that show their job.

import { api } from "../../../scripts/api.js";
import { after, el, fill, forwardPanAndZoom } from "../shared/dom.mjs";
import { Chart } from "./chart.mjs";
import { bar, button, stateOf, steps, timeLeft } from "./facts.mjs";
import { Samples } from "./samples.mjs";
import { lossSeries } from "./series.mjs";
import { words } from "./words.mjs";

const HEIGHT = { empty: 28, chart: 140, samples: 340 };

const kind = (node) => node.constructor.comfyClass;
const isResult = (node) => kind(node) === words.result_node;
const showsJob = (node) => isResult(node) || words.train_nodes.includes(kind(node));

class JobWidget {
    constructor(node, jobs, open, setting) {
        Object.assign(this, { node, jobs, setting });
        this.result = isResult(node);
        this.chart = new Chart();
        [this.state, this.facts] = [el("span"), el("small", { className: "kl-title" })];
        this.progress = el("div", { className: "kl-whole" });
        this.note = el("div", { className: "kl-note" });
        this.samples = new Samples((name) => jobs.sample(this.id, name), { strip: false });
        this.open = button("", "pi-external-link", "Open in the training tab", () => open(this.id));
        const head = el("div", { className: "kl-head" }, this.state, this.facts, this.open, this.progress);
        const parts = [head, this.note, this.chart.root, this.samples.root];
        this.root = el("div", { className: "kl-training kl-node" }, ...parts);
        this.samples.show([]);
        forwardPanAndZoom(this.root);
    }

    get height() {
        return this.id ? (this.samples.root.hidden ? HEIGHT.chart : HEIGHT.samples) : HEIGHT.empty;
    }

    update() {
        const job = jobOf(this.node, this.jobs);
        this.id = job?.id;
        this.open.hidden = !job;
        this.facts.textContent = job ? [steps(job), timeLeft(job), job.run_name].filter(Boolean).join(" · ") : "No run yet.";
        fill(this.state, [job?.status, job?.pause_requested, job?.in_line], () => (job ? [stateOf(job)] : []));
        fill(this.progress, [job?.status, job?.done, job?.total], () => (job ? [bar(job)] : []));
        this.note.textContent = job?.error ?? "";
        const { epoch } = job ? this.jobs.follow(job.id) : {};
        const { samples, curves } = job ? this.jobs.shown(job.id) : {};
        this.chart.root.hidden = !curves?.x.length;
        if (curves?.x.length) {
            const series = lossSeries(curves, this.setting("Smoothing"));
            this.chart.show(curves.x, series, { log: this.setting("LogScale"), mark: curves.best, markLabel: "best" });
        }
        this.samples.show((this.result && samples) || [], epoch);
        this.grow();
    }

    /** Enlarge the node for new content. */
    grow() {
        if (this.grown === this.height) return;
        this.grown = this.height;
        this.root.style.minHeight = `${this.height}px`;
        const [width, height] = this.node.computeSize();
        this.node.setSize([Math.max(this.node.size[0], width), Math.max(this.node.size[1], height)]);
        this.node.graph?.setDirtyCanvas(true, true);
    }
}

/** The job that a node's last run started, else the newest with its run name. Training Result: its Train node's job. */
function jobOf(node, jobs) {
    const said = jobs.summaries.get(node.kinoloomJob);
    if (isResult(node)) {
        const source = node.getInputNode(0);
        return (source && showsJob(source) && jobOf(source, jobs)) || said;
    }
    const folded = (text = "") => text.trim().toLowerCase();
    const name = folded(node.widgets.find((widget) => widget.name === "run_name")?.value ?? "");
    const asked = (job) => folded(job.asked_as) === name;
    const called = (job) => folded(job.run_name) === name;
    if (said && (asked(said) || called(said))) return said;
    const own = jobs.list.filter((job) => job.recipe === kind(node));
    return own.find(asked) ?? own.find(called);
}

/** Keeps the widgets of all nodes up to date. Returns a function to call for each new node. */
export function jobWidgets(jobs, open, setting) {
    const shown = new Map(); // node -> widget
    const update = () => shown.forEach((widget) => widget.root.isConnected && widget.update());
    jobs.addEventListener("change", update);
    api.addEventListener("graphChanged", update);
    return (node) => {
        if (!showsJob(node)) return;
        const widget = new JobWidget(node, jobs, open, setting);
        const options = { serialize: false, hideOnZoom: false, getMinHeight: () => widget.height };
        node.addDOMWidget("training", "kinoloom_training", widget.root, options).serialize = false;
        shown.set(node, widget);
        setTimeout(() => widget.update());
        after(node, "onExecuted", (output) => {
            node.kinoloomJob = output?.kinoloom_job?.[0];
            widget.update();
        });
        after(node, "onConnectionsChange", () => setTimeout(() => widget.update()));
        after(node, "onRemoved", () => {
            widget.chart.remove();
            shown.delete(node);
        });
    };
}
