// Collects the data that the page shows from a run's history.

const inSummary = () => {}; // the job's summary says it

/** Handlers by the event's name. A test compares the names with the server's. */
export const READERS = {
    plan: inSummary,
    step: (found, entry) => found.steps.push(entry),
    validation: (found, entry) => found.validations.push(entry),
    sample: (found, entry) => found.samples.push(entry),
    samplefailed: (found, entry) => (found.unsampled = entry.error),
    saved: inSummary,
    finished: inSummary,
    failed: inSummary,
};

/** {steps, validations, samples, unsampled}: entries in order. unsampled: why sampling stopped, if it did. */
export function read(history) {
    const found = { steps: [], validations: [], samples: [], unsampled: "" };
    for (const entry of history) READERS[entry.event]?.(found, entry);
    return found;
}
