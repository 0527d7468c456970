// Shows the size of the encoded clips on disk and its limit, with a button that deletes unused ones.

import { el } from "../shared/dom.mjs";
import { button } from "./facts.mjs";

const gb = (bytes) => `${Number((bytes / 1e9).toPrecision(2))} GB`;

export class Cache {
    constructor(jobs, confirm) {
        Object.assign(this, { jobs, confirm });
        this.size = el("span");
        const title = "Limit of encoded clips in gigabytes. Above it the least recently used are deleted.";
        const send = () => this.ask("", { limit_gb: this.limit.valueAsNumber });
        this.limit = el("input", { type: "number", min: 0, step: "any", title, onchange: send });
        this.free = button("Free", "pi-trash", "Delete unused encoded clips", () => this.clear());
        const limit = el("label", {}, "limit", this.limit, "GB");
        this.root = el("div", { className: "kl-controls kl-cache", hidden: true }, this.size, limit, this.free);
        jobs.addEventListener("ended", () => this.refresh());
    }

    async clear() {
        const message =
            `Delete ${gb(this.state.free_bytes)} of encoded clips? They are encoded again when they are needed. Those of ` +
            "runs that are not finished, and of workflows that ran since ComfyUI started, stay.";
        if (await this.confirm("Free encoded clips", message)) await this.ask("/free", {});
    }

    async refresh() {
        if (this.root.isConnected) await this.ask("");
    }

    /** Send a GET, or a POST if there is a body, and show the state in the answer. */
    async ask(path, body) {
        const options = body && { method: "POST", body: JSON.stringify(body) };
        await this.jobs.attempt(async () => this.show(await this.jobs.call(`/cache${path}`, options)));
    }

    show(state) {
        this.state = state;
        this.size.textContent = `Encoded clips: ${gb(state.bytes)}`;
        if (document.activeElement !== this.limit) this.limit.value = state.limit_gb;
        this.free.disabled = !state.free_bytes;
        this.root.hidden = false;
    }
}
