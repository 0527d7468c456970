// Full-quality samples through the queue: the shipped workflow that generates, with a run's files in its loaders.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const PACK = decodeURIComponent(new URL("..", import.meta.url).pathname.split("/").at(-2));
const BYPASSED = 4; // LiteGraph's mode

/** Open it in a tab of its own. Throws if the server knows none. */
export async function openGeneration(jobs, job) {
    const { template, loaders } = await jobs.ask(`/${job.id}/generation`);
    const workflow = await read(`/workflow_templates/${encodeURIComponent(PACK)}/${template}.json`);
    for (const node of workflow.nodes) {
        const file = loaders[node.title] ?? loaders[node.type];
        if (file) node.widgets_values[0] = file;
        else if (node.title in loaders || node.type in loaders) node.mode = BYPASSED;
    }
    await app.refreshComboInNodes(); // the lists of files have grown
    await app.loadGraphData(workflow, true, true, `${job.run_name}, ${template}`);
}

async function read(path) {
    const response = await api.fetchApi(path);
    if (!response.ok) throw new Error(`${path}: ${response.status} ${response.statusText}`);
    return response.json();
}
