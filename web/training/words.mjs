// The server's words (nodes/training/words.py). Until the page has asked for them, they are empty.

export const words = {
    events: [],
    deleted: null,
    going: [],
    ended: [],
    train_nodes: [],
    result_node: null,
};

export const hasEnded = (job) => words.ended.includes(job.status);
