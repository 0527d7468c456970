// What the page shows of a run's history, event by event.

const inSummary = () => {}; // the job's summary says it

/** By the event's name; a test holds the names against the server's. */
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

/** {steps, validations, samples, unsampled}: entries in order, and why there are no more samples, or nothing. */
export function read(history) {
    const found = { steps: [], validations: [], samples: [], unsampled: "" };
    for (const entry of history) READERS[entry.event]?.(found, entry);
    return found;
}
