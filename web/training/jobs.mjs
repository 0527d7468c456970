// This page's copy of the server's training jobs: all summaries, and the histories that are shown.

import { read } from "./history.mjs";
import { curves } from "./series.mjs";
import { hasEnded, words } from "./words.mjs";

const PAGE = 100;
const LOOK = 5000; // milliseconds between two looks at runs of another ComfyUI, which sends no events
const PAUSE = 150; // milliseconds between two changes, at least

/**
 * Sends "change", which may take a fifth of the page's time; "ended" (detail: the job) and "error" (detail: a message).
 */
export class Jobs extends EventTarget {
    constructor(api) {
        super();
        this.api = api;
        this.summaries = new Map();
        this.gone = new Set(); // ids of deleted jobs, of which an answer may still be under way
        this.histories = new Map(); // id -> {entries, epoch, config, pending: events heard while it is being fetched}
        this.total = 0;
        this.pause = PAUSE;
        this.heard = new Set(); // ids, since the last refresh began
        api.addEventListener("kinoloom.job", ({ detail }) => this.hear(detail));
        api.addEventListener("reconnected", () => this.refresh());
    }

    get list() {
        return [...this.summaries.values()].sort((a, b) => b.created - a.created);
    }

    ask(path, options) {
        return this.call(`/jobs${path}`, options);
    }

    async call(path, options) {
        const response = await this.api.fetchApi(`/kinoloom${path}`, options);
        const body = await response.json().catch(() => ({}));
        if (!response.ok) throw new Error(body.error ?? `${response.status} ${response.statusText}`);
        return body;
    }

    url(id, path) {
        return this.api.apiURL(`/kinoloom/jobs/${encodeURIComponent(id)}/${path}`);
    }

    sample(id, name) {
        return this.url(id, `samples/${encodeURIComponent(name)}`);
    }

    /** Send errors as "error", which shows a message. The request is repeated when the socket reconnects. */
    async attempt(work) {
        try {
            return await work();
        } catch (error) {
            this.dispatchEvent(new CustomEvent("error", { detail: error.message }));
        }
    }

    post(id, action) {
        return this.attempt(async () => {
            this.heard.delete(id);
            const answer = await this.ask(`/${id}/${action}`, { method: "POST" });
            if (action === "delete") this.forget(id);
            else if (!this.heard.has(id)) this.take(answer); // else it may be older than what was heard
        });
    }

    /** Fetch everything again, after the page was opened or the socket reconnected. */
    async refresh(wanted = Math.max(this.summaries.size, PAGE)) {
        this.heard.clear();
        const found = new Map();
        await this.attempt(async () => {
            let page;
            let offset = 0;
            do {
                page = await this.ask(`?offset=${offset}&limit=${PAGE}`);
                offset += page.jobs.length;
                for (const job of page.jobs) found.set(job.id, job);
            } while (page.jobs.length && offset < Math.min(wanted, page.total));
            for (const id of this.summaries.keys()) if (!found.has(id) && !this.heard.has(id)) this.forget(id);
            for (const job of found.values()) if (!this.heard.has(job.id) && !this.gone.has(job.id)) this.take(job);
            this.total = page.total;
        });
        for (const id of this.histories.keys()) this.catchUp(id);
        clearTimeout(this.look);
        if (this.list.some(({ elsewhere }) => elsewhere)) this.look = setTimeout(() => this.refresh(), LOOK);
        this.changed();
    }

    more() {
        return this.refresh(this.summaries.size + PAGE);
    }

    hear({ job, event, ...rest }) {
        if (event === words.deleted) this.gone.add(job.id);
        if (this.gone.has(job.id)) return this.forget(job.id);
        this.heard.add(job.id);
        this.take(job);
        const kept = this.histories.get(job.id);
        const entry = { event, ...rest };
        if (kept?.pending) kept.pending.push(entry);
        else if (kept && !this.append(kept, entry)) this.catchUp(job.id);
    }

    take(job) {
        const before = this.summaries.get(job.id);
        if (!before && !this.list.some(({ created }) => created > job.created)) this.total += 1; // an older one is counted
        this.summaries.set(job.id, job);
        if (before && !hasEnded(before) && hasEnded(job)) this.dispatchEvent(new CustomEvent("ended", { detail: job }));
        this.changed();
    }

    forget(id) {
        this.histories.delete(id);
        if (this.summaries.delete(id)) this.total -= 1;
        this.changed();
    }

    changed() {
        this.timer ??= setTimeout(() => {
            this.timer = null;
            const began = performance.now();
            this.dispatchEvent(new Event("change"));
            this.pause = Math.max(PAUSE, 5 * (performance.now() - began));
        }, this.pause);
    }

    /** A job's history, which is kept up to date from now on. */
    follow(id) {
        if (!this.histories.has(id)) {
            this.histories.set(id, { entries: [], epoch: null, config: null, pending: null });
            this.catchUp(id);
        }
        return this.histories.get(id);
    }

    /** The shown parts of a followed history: samples, why sampling stopped, and the curves. */
    shown(id) {
        const kept = this.histories.get(id);
        const { entries, shown } = kept;
        if (shown?.entries !== entries || shown.length !== entries.length) {
            const found = read(entries);
            kept.shown = { entries, length: entries.length, ...found, curves: curves(found) };
        }
        return kept.shown;
    }

    async catchUp(id) {
        const kept = this.histories.get(id);
        if (kept.pending) return;
        kept.pending = [];
        await this.attempt(async () => {
            let whole = false;
            while (!whole) {
                let after = kept.entries.length;
                let found = await this.ask(`/${id}?after=${after}`);
                if (after && found.epoch !== kept.epoch) found = await this.ask(`/${id}?after=${(after = 0)}`);
                kept.entries = kept.entries.slice(0, after).concat(found.history);
                Object.assign(kept, { epoch: found.epoch, config: found.config });
                whole = kept.pending.splice(0).every((entry) => this.append(kept, entry));
            }
        });
        kept.pending = null;
        this.changed();
    }

    /** False if entries before this one are missing, or the history was cut. */
    append(kept, { index, epoch = kept.epoch, ...entry }) {
        if (epoch !== kept.epoch || index > kept.entries.length) return false;
        if (index === kept.entries.length) kept.entries.push(entry);
        return true;
    }
}
