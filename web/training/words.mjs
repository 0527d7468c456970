// The server's words (nodes/training/words.py). They are empty until the page has fetched them.

export const words = {
    events: [],
    deleted: null,
    going: [],
    ended: [],
    train_nodes: [],
    result_node: null,
};

export const hasEnded = (job) => words.ended.includes(job.status);
