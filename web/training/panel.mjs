// The training tab, which shows the list of jobs or one job.

import { app } from "../../../scripts/app.js";
import { el, fill } from "../shared/dom.mjs";
import { Cache } from "./cache.mjs";
import { bar, button, duration, size, stateOf, steps, timeLeft } from "./facts.mjs";
import { JobView } from "./job_view.mjs";

export class Panel {
    constructor(jobs, setting) {
        Object.assign(this, { jobs, setting });
        this.rows = new Map(); // id -> its row
        this.list = el("div", { className: "kl-list" });
        this.more = button("Show more", "pi-angle-down", "Older runs", () => jobs.more());
        const head = el("div", { className: "kl-head" }, el("b", { className: "kl-title" }, "Training"));
        this.count = el("small");
        head.append(this.count);
        this.cache = new Cache(jobs, this.host().confirm);
        this.all = el("div", {}, head, this.list, this.more, this.cache.root);
        this.root = el("div", { className: "kl-training kl-scroll" }, this.all);
        jobs.addEventListener("change", () => this.update());
    }

    /** The front end may call this more than once for the same element. */
    show(element) {
        Object.assign(element.style, { height: "100%" });
        if (this.root.parentElement !== element) element.replaceChildren(this.root);
        setTimeout(() => {
            this.update(); // the element is not on the page yet
            this.view?.readLog();
            this.cache.refresh();
        });
    }

    open(id) {
        this.view?.remove();
        this.view = id ? new JobView(this.jobs, id, this.host()) : null;
        this.root.replaceChildren(this.view ? this.view.root : this.all);
        this.root.scrollTop = 0;
        this.cache.refresh();
        this.update();
    }

    host() {
        return {
            back: () => this.open(null),
            setting: this.setting,
            confirm: (title, message) => app.extensionManager.dialog.confirm({ title, message, type: "delete" }),
            copy,
            openTab,
        };
    }

    update() {
        if (!this.root.isConnected) return;
        if (this.view) return this.view.update();
        const { list, total } = this.jobs;
        this.count.textContent = total ? `${total} ${total === 1 ? "run" : "runs"}` : "";
        this.more.hidden = list.length >= total;
        fill(this.list, list.map(({ id }) => id), () => {
            const old = this.rows;
            this.rows = new Map(list.map(({ id }) => [id, old.get(id) ?? this.row(id)]));
            const empty = "No run yet. Queue a workflow with a Train node, such as one of Kinoloom's templates.";
            const shown = [...this.rows.values()].map(({ moves, open }) => el("div", { className: "kl-line" }, open, moves));
            return list.length ? shown : [el("p", { textContent: empty })];
        });
        for (const job of list) {
            const { open, moves } = this.rows.get(job.id);
            fill(open, job, () => this.line(job));
            moves.hidden = !job.in_line;
        }
    }

    row(id) {
        const move = (iconName, title, action) => button("", iconName, title, () => this.jobs.post(id, action));
        const moves = el("div", { className: "kl-moves", hidden: true });
        moves.append(move("pi-arrow-up", "Start earlier", "earlier"), move("pi-arrow-down", "Start later", "later"));
        return { open: el("button", { type: "button", className: "kl-row", onclick: () => this.open(id) }), moves };
    }

    line(job) {
        const { plan, phase, seconds_per_step: pace } = job;
        const facts = [steps(job), phase, timeLeft(job), pace && `${duration(pace)} / step`];
        facts.push(plan && size(plan.memory_needed));
        return [
            el("div", {}, el("b", { textContent: job.run_name }), stateOf(job)),
            el("small", { textContent: job.title }),
            bar(job),
            el("small", { textContent: job.error || facts.filter(Boolean).join(" · "), title: job.error }),
        ];
    }
}

async function copy(text) {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else {
        const area = el("textarea", { value: text }); // no clipboard where the page is not served over https
        document.body.append(area);
        area.select();
        document.execCommand("copy");
        area.remove();
    }
    app.extensionManager.toast.add({ severity: "info", summary: "Copied", detail: text, life: 3000 });
}

/** Open a workflow in a tab of its own. */
async function openTab(workflow, name) {
    await app.refreshComboInNodes(); // the lists of files have grown
    await app.loadGraphData(workflow, true, true, name);
}
