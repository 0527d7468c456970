// How much the encoded clips take on disk, the limit of that, and a button that deletes what nothing needs.

import { el } from "../shared/dom.mjs";
import { button } from "./facts.mjs";

const gb = (bytes) => `${Number((bytes / 1e9).toPrecision(2))} GB`;

export class Cache {
    constructor(jobs, confirm) {
        Object.assign(this, { jobs, confirm });
        this.size = el("span");
        const title = "Gigabytes of encoded clips that are kept. Those used longest ago go first.";
        const send = () => this.ask("", { limit_gb: this.limit.valueAsNumber });
        this.limit = el("input", { type: "number", min: 0, step: "any", title, onchange: send });
        this.free = button("Free", "pi-trash", "Delete the encoded clips that nothing needs", () => this.clear());
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

    /** A GET, or with a body a POST; either answers with the state, which is shown. */
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
