// One job in the training tab.

import { el, fill } from "../shared/dom.mjs";
import { Chart } from "./chart.mjs";
import { bar, button, duration, icon, size, stateOf, steps, timeLeft } from "./facts.mjs";
import { Samples } from "./samples.mjs";
import { lossSeries } from "./series.mjs";
import { hasEnded } from "./words.mjs";

const LOG_SECONDS = 3;
const ELSEWHERE = "This run is in use by another ComfyUI with the same base directory. Stop it there.";

export class JobView {
    /**
     * `host` has back(), setting(name) and copy(text). Its confirm(title, message) and openTab(workflow, name) return
     * promises.
     */
    constructor(jobs, id, host) {
        Object.assign(this, { jobs, id, host });
        const part = (className) => el("div", { className });
        this.head = part("kl-head");
        this.actions = part("kl-actions");
        this.trouble = part("kl-trouble");
        this.numbers = part("kl-numbers");

        this.log = el("input", { type: "checkbox", checked: host.setting("LogScale"), onchange: () => this.update() });
        const smoothing = { type: "range", min: 0, max: 0.99, step: 0.01, value: host.setting("Smoothing") };
        this.smoothing = el("input", { ...smoothing, ariaLabel: "smoothing", oninput: () => this.update() });
        this.smoothed = el("span", { className: "kl-value" });
        const controls = el("div", { className: "kl-controls" });
        controls.append(el("label", {}, "smoothing", this.smoothing, this.smoothed), el("label", {}, this.log, "log"));
        this.losses = new Chart({ height: 190, sync: id });
        this.rates = new Chart({ height: 90, sync: id });
        this.curves = el("section", {}, el("h4", { textContent: "Loss" }), controls, this.losses.root);
        this.curves.append(el("h4", { textContent: "Learning rate" }), this.rates.root);

        this.samples = new Samples((name) => jobs.sample(id, name));
        const titled = (title, ...children) => el("section", {}, el("h4", { textContent: title }), ...children);
        this.unsampled = part("kl-error");
        this.sampled = titled("Samples", this.unsampled, this.samples.root);
        this.plan = part("kl-plan");
        this.planned = titled("Plan", this.plan);
        this.files = part("kl-files");
        this.config = part("kl-table");
        this.lines = el("pre", { className: "kl-log kl-scroll" });
        const folded = (title, child, ontoggle) =>
            el("details", { ontoggle }, el("summary", { textContent: title }), child);
        this.logged = folded("Log", this.lines, () => this.readLog());
        const parts = [this.head, this.actions, this.trouble, this.numbers, this.curves, this.sampled, this.planned];
        parts.push(titled("Files", this.files), folded("Options", this.config), this.logged);
        this.root = el("div", { className: "kl-job" }, ...parts);
    }

    remove() {
        clearTimeout(this.timer);
        this.losses.remove();
        this.rates.remove();
    }

    update() {
        const job = this.jobs.summaries.get(this.id);
        if (!job) return this.host.back();
        const { epoch, config } = this.jobs.follow(this.id);
        const { samples, unsampled, curves } = this.jobs.shown(this.id);
        const { status, pause_requested, resumable, error, advice, plan } = job;
        fill(this.head, [job.run_name, job.title, status, pause_requested, job.in_line], () => [
            button("", "pi-arrow-left", "All runs", () => this.host.back()),
            el("div", { className: "kl-title" }, el("b", { textContent: job.run_name }), el("small", {}, job.title)),
            stateOf(job),
        ]);
        const kept = [job.checkpoint, job.main_file, hasEnded(job) && job.state_bytes];
        const offered = [status, job.elsewhere, pause_requested, resumable, job.dead_end, ...kept];
        fill(this.actions, offered, () => this.buttons(job));
        fill(this.trouble, [error, advice, job.dead_end, job.elsewhere], () => this.troubles(job));
        fill(this.numbers, job, () => this.table(job));
        this.drawCurves(curves);
        this.sampled.hidden = !samples.length && !unsampled;
        this.samples.show(samples, epoch);
        this.unsampled.textContent = unsampled;
        this.unsampled.hidden = !unsampled;
        this.planned.hidden = !plan;
        this.plan.textContent = plan?.text ?? "";
        fill(this.config, config, () => rows(Object.entries(config ?? {})));
        if (status !== "unreadable") this.listFiles(JSON.stringify([job.files, status]));
        if (status !== this.status) this.readLog();
        this.status = status;
    }

    buttons(job) {
        const { id } = this;
        const post = (action) => () => this.jobs.post(id, action);
        const made = [];
        if (!hasEnded(job) && !job.elsewhere) {
            if (job.pause_requested) made.push(button("Resume", "pi-play", "Go on", post("resume")));
            else made.push(button("Pause", "pi-pause", "Pause after this step; the model stays loaded", post("pause")));
            made.push(button("Stop", "pi-stop", "End after this step, with a usable result", post("stop")));
        } else if (hasEnded(job) && job.resumable) {
            const label = `Resume from step ${job.checkpoint}`;
            made.push(button(label, "pi-play", "Go on from the last checkpoint", post("resume")));
        } else if (job.dead_end && !Object.keys(job.files).length) {
            made.push(button("Start again", "pi-refresh", "From the first step, with the same options", post("restart")));
        }
        const name = job.main_file;
        if (name) {
            const generate = () => this.jobs.attempt(() => this.generate(job));
            made.push(button("Generate", "pi-video", "Open the template that generates with it", generate));
            made.push(button("Copy name", "pi-copy", name, () => this.host.copy(name)));
        }
        if (job.status === "unreadable") return [this.deletion(job)];
        const report = { href: this.jobs.url(id, "report.html"), target: "_blank", rel: "noopener", title: "To share" };
        made.push(el("a", { ...report, className: "kl-button" }, icon("pi-file"), " Report"));
        if (hasEnded(job) && job.state_bytes) {
            const title = "Delete the run's state, which it needs to go on";
            made.push(button(`Free ${size(job.state_bytes)}`, "pi-eraser", title, () => this.free(job)));
        }
        if (hasEnded(job)) made.push(this.deletion(job));
        return made;
    }

    deletion(job) {
        return button("Delete", "pi-trash", "Delete the run's record", () => this.delete(job));
    }

    async generate(job) {
        const { template, workflow } = await this.jobs.ask(`/${job.id}/generation`);
        await this.host.openTab(workflow, `${job.run_name}, ${template}`);
    }

    async free(job) {
        const lost = "Its state is deleted, so it cannot go on. Files, history and samples stay.";
        if (await this.host.confirm(`Free the state of run ${job.run_name}?`, lost)) await this.jobs.post(job.id, "free");
    }

    async delete(job) {
        const kept = "Its history, checkpoint and samples are deleted. LoRA files stay.";
        if (await this.host.confirm(`Delete run ${job.run_name}?`, kept)) await this.jobs.post(job.id, "delete");
    }

    troubles({ error, advice, dead_end, elsewhere }) {
        const shown = error ? [el("div", { className: "kl-error", textContent: error })] : [];
        if (elsewhere) shown.push(el("div", { className: "kl-advice", textContent: ELSEWHERE }));
        if (dead_end) shown.push(el("div", { className: "kl-advice", textContent: dead_end }));
        for (const { text, link } of advice) {
            const safe = link && /^https?:$/.test(new URL(link, location.href).protocol);
            const more = safe ? [" ", el("a", { href: link, target: "_blank", rel: "noopener" }, "More")] : [];
            shown.push(el("div", { className: "kl-advice" }, icon("pi-lightbulb"), ` ${text}`, ...more));
        }
        return shown;
    }

    table(job) {
        const { plan, phase, seconds_per_step: pace, losses } = job;
        const memory = plan && `${size(plan.memory_needed)} of ${size(plan.memory_available)} free`;
        const named = Object.entries(losses).map(([name, value]) => [name, value?.toPrecision(4) ?? "not a number"]);
        const facts = [
            ["step", steps(job)],
            ["phase", phase],
            ["time left", timeLeft(job).replace(" left", "")],
            ["per step", pace && duration(pace)],
            ...named,
            ["memory", memory],
            ["state on disk", job.state_bytes && size(job.state_bytes)],
        ];
        return [bar(job), ...rows(facts.filter(([, value]) => value))];
    }

    drawCurves(found) {
        this.curves.hidden = !found.x.length;
        const smoothing = this.smoothing.valueAsNumber;
        this.smoothed.textContent = smoothing.toFixed(2);
        if (!found.x.length) return;
        const marked = { log: this.log.checked, mark: found.best, markLabel: "best" };
        this.losses.show(found.x, lossSeries(found, smoothing), marked);
        const rate = { label: "learning rate", values: found.rate, stroke: "#94a3b8", width: 1.5, spanGaps: true };
        this.rates.show(found.x, [rate]);
    }

    async listFiles(key) {
        if (this.listed === key) return;
        this.listed = key;
        const found = await this.jobs.attempt(() => this.jobs.ask(`/${this.id}/files`));
        if (!found || this.listed !== key) return;
        fill(this.files, found, () => {
            const lines = found.files.map(({ name, bytes, lora_name }) => {
                const copy = button("", "pi-copy", `Copy ${lora_name}`, () => this.host.copy(lora_name));
                const parts = [el("span", { title: name }, name), el("small", {}, size(bytes))];
                return el("div", {}, ...parts, lora_name ? copy : "");
            });
            return [el("small", { textContent: found.folder }), ...lines];
        });
    }

    /** Update the log's last lines while they are unfolded and the run is active. */
    async readLog() {
        clearTimeout(this.timer);
        if (!this.logged.open) return;
        const found = await this.jobs.attempt(() => this.jobs.ask(`/${this.id}/log`));
        if (!found) return;
        const atEnd = this.lines.scrollTop + this.lines.clientHeight >= this.lines.scrollHeight - 5;
        this.lines.textContent = found.lines.join("\n");
        if (atEnd) this.lines.scrollTop = this.lines.scrollHeight;
        clearTimeout(this.timer);
        const job = this.jobs.summaries.get(this.id);
        const goesOn = this.root.isConnected && job && !hasEnded(job);
        if (goesOn) this.timer = setTimeout(() => this.readLog(), LOG_SECONDS * 1000);
    }
}

function rows(facts) {
    const row = ([name, value]) =>
        el("div", { className: "kl-fact" }, el("span", {}, name), el("span", {}, String(value)));
    return facts.map(row);
}
