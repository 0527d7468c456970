// The data of a run's charts: columns of numbers over its optimizer steps.

const COLOURS = ["#3b82f6", "#f59e0b", "#10b981", "#a855f7", "#06b6d4", "#ec4899"];
const HELD_OUT = "#f43f5e";

/** TensorBoard's smoothing: a debiased exponential moving average. Null values stay null. */
export function smooth(values, weight) {
    let [mean, count] = [0, 0];
    return values.map((value) => {
        if (value === null) return null;
        mean = mean * weight + value * (1 - weight);
        count += 1;
        return mean / (1 - weight ** count);
    });
}

/**
 * {x, losses: Map(label -> column), rate, validation, heldOut, best}. Columns are as long as x, with null for steps
 * without a measurement. A label is the loss's name, with its phase if there are several. best is the step of the best
 * validation, or null.
 */
export function curves({ steps, validations }) {
    const before = {}; // phase -> steps of the phases before it
    for (const { phase, done, step } of steps) before[phase] ??= done - step;
    const at = (entry) => entry.done ?? (before[entry.phase] ?? 0) + entry.step;
    const x = [...new Set([...steps, ...validations].map(at))].sort((a, b) => a - b);
    const place = new Map(x.map((step, index) => [step, index]));
    const column = () => Array(x.length).fill(null);
    const several = Object.keys(before).length > 1;
    const [losses, rate, validation] = [new Map(), column(), column()];
    let [best, heldOut] = [null, false];
    for (const entry of validations) {
        const index = place.get(at(entry));
        validation[index] = entry.loss;
        heldOut = entry.held_out;
        if (entry.best) best = x[index];
    }
    for (const entry of steps) {
        const index = place.get(at(entry));
        rate[index] = entry.learning_rate;
        for (const [name, value] of Object.entries(entry.losses)) {
            const label = several ? `${entry.phase}: ${name}` : name;
            if (!losses.has(label)) losses.set(label, column());
            losses.get(label)[index] = value;
        }
    }
    return { x, losses, rate, validation, heldOut, best };
}

/** The series of a loss chart. With smoothing the measured values are shown too, faint. */
export function lossSeries({ losses, validation, heldOut }, smoothing) {
    const series = [...losses].flatMap(([label, values], index) => {
        const stroke = COLOURS[index % COLOURS.length];
        const line = { label, values, stroke, width: 1.5, spanGaps: true }; // some steps leave a loss out
        if (!smoothing) return [line];
        const behind = { ...line, label: `${label}, measured`, stroke: `${stroke}44`, width: 1, quiet: true };
        return [behind, { ...line, values: smooth(values, smoothing), width: 2 }];
    });
    if (validation.some((value) => value !== null)) {
        const label = heldOut ? "held-out loss" : "loss on fixed noise";
        series.push({ label, values: validation, stroke: HELD_OUT, width: 1.5, dash: [5, 3], spanGaps: true });
    }
    return series;
}
