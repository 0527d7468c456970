// Full-quality samples through the queue: the shipped workflow that generates, with a run's files in its loaders.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const PACK = decodeURIComponent(new URL(".", import.meta.url).pathname.split("/").at(-2));
const LOADERS = ["LoraLoaderModelOnly", "KinoloomLoadMotionLora", "KinoloomLoadTrackletControl"];

/** Open it in a tab of its own. Throws for a method without one. */
export async function openGeneration(job) {
    const method = job.recipe.replace("KinoloomTrain", "").replace(/\B[A-Z]/g, "_$&").toLowerCase();
    const { [PACK]: names = [] } = await read("/workflow_templates");
    const template = names.find((name) => name.startsWith(`${method}_`) && name.endsWith("_generate"));
    if (!template) throw new Error(`No template generates with ${job.title}: load the model it made in your workflow`);
    const workflow = await read(`/workflow_templates/${encodeURIComponent(PACK)}/${template}.json`);
    for (const node of workflow.nodes)
        if (LOADERS.includes(node.type)) node.widgets_values[0] = fileFor(node, job.lora_names);
    await app.refreshComboInNodes(); // the lists of files have grown
    await app.loadGraphData(workflow, true, true, `${job.run_name}, ${template}`);
}

/** The run's main file, else the best so far; nothing if there is none. */
export function mainFile(names) {
    const parts = Object.keys(names);
    return names[parts.findLast((part) => !part.endsWith("-best")) ?? parts.at(-1)];
}

/** That of the part in the loader's title, else the run's main one. */
function fileFor({ title = "" }, names) {
    return names[Object.keys(names).find((part) => title.endsWith(`: ${part}`))] ?? mainFile(names);
}

async function read(path) {
    const response = await api.fetchApi(path);
    if (!response.ok) throw new Error(`${path}: ${response.status} ${response.statusText}`);
    return response.json();
}
