// Shows a run's samples: for each prompt the first next to a chosen one, and all of them over time.

import { el, fill } from "../shared/dom.mjs";

export class Samples {
    /** `url(name)` returns a sample's URL. `strip`: also show all samples, to choose from. */
    constructor(url, { strip = true } = {}) {
        Object.assign(this, { url, strip });
        this.chosen = null; // null: always the newest
        this.slider = el("input", { type: "range", min: 0, className: "kl-when", ariaLabel: "sample" });
        this.slider.oninput = () => this.choose(this.slider.valueAsNumber);
        this.rows = el("div");
        this.root = el("div", { className: "kl-samples" }, this.slider, this.rows);
    }

    choose(index) {
        this.chosen = index === this.samples.length - 1 ? null : index;
        this.show(this.samples, this.epoch);
    }

    /** Show the sample entries of a history. A rewound history (another `epoch`) may reuse file names. */
    show(samples, epoch) {
        Object.assign(this, { samples, epoch });
        if (this.chosen >= samples.length) this.chosen = null;
        const last = samples.length - 1;
        const now = this.chosen ?? last;
        this.root.hidden = last < 0;
        this.slider.hidden = last < 1;
        this.slider.max = last;
        this.slider.value = now;
        const files = samples.map((sample) => sample.files);
        fill(this.rows, [files, now, epoch], () => (last < 0 ? [] : this.prompts(now)));
    }

    prompts(now) {
        const { samples } = this;
        const image = (at, row) => {
            const src = `${this.url(samples[at].files[row])}?epoch=${this.epoch}`;
            return el("img", { src, alt: `step ${samples[at].done}`, loading: "lazy" });
        };
        const figure = (at, row, note) =>
            el("figure", {}, image(at, row), el("figcaption", { textContent: `step ${samples[at].done}${note}` }));
        return samples[now].files.map((_, row) => {
            const first = samples.findIndex(({ files }) => files[row]);
            const pair = [figure(now, row, now === samples.length - 1 ? ", newest" : "")];
            if (first !== now) pair.unshift(figure(first, row, ", first"));
            const parts = [
                el("div", { className: "kl-prompt", textContent: samples[now].prompts[row] }),
                el("div", { className: "kl-pair" }, ...pair),
            ];
            if (this.strip && samples.length > 2) parts.push(this.all(now, row, image));
            return el("div", { className: "kl-sample" }, ...parts);
        });
    }

    all(now, row, image) {
        const thumb = (at) => {
            const title = `step ${this.samples[at].done}`;
            const made = el("button", { type: "button", title, onclick: () => this.choose(at) }, image(at, row));
            made.classList.toggle("kl-on", at === now);
            return made;
        };
        const there = [...this.samples.keys()].filter((at) => this.samples[at].files[row]);
        return el("div", { className: "kl-strip kl-scroll" }, ...there.map(thumb));
    }
}
