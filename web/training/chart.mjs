// A line chart that follows its data and its width.

import { addStyle, el } from "../shared/dom.mjs";
import uPlot from "../vendor/uplot.mjs";

const number = (value) => (value === null || value === undefined ? "–" : String(Number(value.toPrecision(4))));

export class Chart {
    /**
     * With a height the chart has a legend and a cursor, which charts with the same `sync` share. Without a height it
     * has neither and fills its element.
     */
    constructor({ height, sync } = {}) {
        Object.assign(this, { height, sync });
        addStyle(new URL("../vendor/uplot.css", import.meta.url));
        this.root = el("div", { className: "kl-chart", style: { minHeight: `${height ?? 0}px` } });
        this.observer = new ResizeObserver(() => this.resize());
        this.observer.observe(this.root);
    }

    remove() {
        this.observer.disconnect();
        this.plot?.destroy();
    }

    /** Show series over x. Each has label, values and uPlot's options. `mark` is the x of a vertical line. */
    show(x, series, { log = false, mark = null, markLabel = "" } = {}) {
        const usable = (value) => (log && value <= 0 ? null : value);
        this.data = [x, ...series.map(({ values }) => values.map(usable))];
        Object.assign(this, { series, log, mark, markLabel });
        const key = JSON.stringify([log, series.map(({ values, ...style }) => style)]);
        if (this.plot && this.key === key) {
            const { min, max } = this.plot.scales.x;
            const zoomed = min > this.shown[0] || max < this.shown[1];
            this.plot.setData(this.data, !zoomed);
            if (zoomed) this.plot.redraw();
        } else {
            this.key = key;
            this.plot?.destroy();
            this.plot = null;
            this.resize();
        }
        this.shown = [x[0], x.at(-1)];
    }

    resize() {
        const { clientWidth: width, clientHeight } = this.root;
        const height = this.height ?? clientHeight;
        if (!width || !height || !this.data) return;
        if (this.plot) this.plot.setSize({ width, height });
        else this.plot = new uPlot(this.options(width, height), this.data, this.root);
    }

    options(width, height) {
        const colour = (name) => () => getComputedStyle(document.body).getPropertyValue(name);
        const [text, faint] = [colour("--descrip-text"), colour("--border-color")];
        const line = { stroke: faint, width: 0.5 };
        const axis = { stroke: text, grid: line, ticks: { ...line, size: 4 }, font: "10px sans-serif", gap: 3 };
        const values = (_, ticks) => ticks.map((tick) => (tick === null ? "" : number(tick)));
        const near = (_, low, high) => [low * 0.95, high * 1.05]; // not whole decades
        return {
            width,
            height,
            legend: { show: Boolean(this.height) },
            cursor: this.height ? { y: false, sync: { key: this.sync } } : { show: false },
            scales: { x: { time: false }, y: this.log ? { distr: 3, range: near } : {} },
            axes: [
                { ...axis, size: 22, space: 44 },
                { ...axis, size: 46, space: 24, values },
            ],
            series: [
                { label: "step", value: (_, value) => number(value) },
                ...this.series.map(({ values: _column, quiet, ...style }) => ({
                    points: { show: (plot, at) => plot.data[at].filter((value) => value !== null).length < 2, size: 5 },
                    value: (_, value) => number(value),
                    ...style,
                    class: quiet ? "kl-quiet" : undefined,
                })),
            ],
            hooks: { draw: [(plot) => this.drawMark(plot)] },
        };
    }

    drawMark({ ctx, bbox, valToPos, scales }) {
        if (this.mark === null || this.mark < scales.x.min || this.mark > scales.x.max) return;
        const x = valToPos(this.mark, "x", true);
        ctx.save();
        ctx.strokeStyle = ctx.fillStyle = "#10b981";
        ctx.lineWidth = devicePixelRatio;
        ctx.setLineDash([4 * devicePixelRatio, 3 * devicePixelRatio]);
        ctx.beginPath();
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bbox.top + bbox.height);
        ctx.stroke();
        ctx.font = `${10 * devicePixelRatio}px sans-serif`;
        const left = x > bbox.left + bbox.width / 2;
        ctx.textAlign = left ? "right" : "left";
        ctx.fillText(this.markLabel, x + (left ? -4 : 4) * devicePixelRatio, bbox.top + 10 * devicePixelRatio);
        ctx.restore();
    }
}
