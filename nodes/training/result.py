"""Training Result and Load Trained Model, which pass a run's results to the workflow."""

import logging
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from server import PromptServer

from ...lora_io.file import load
from ...trainers.host.device import make_room
from ...trainers.run.job import Job
from ..wires import TrainingJobType
from .registry import registry, trained_file

POLL_SECONDS = 0.2


class TrainingResult(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomTrainingResult",
            display_name="Training Result",
            category="Kinoloom/training",
            description="Waits for a training job and outputs its LoRA. Cancel stops the job after the current step. "
            "Its result so far is saved, and running the workflow again resumes it.",
            inputs=[TrainingJobType.Input("job", tooltip="A job from one of the Train nodes.")],
            outputs=[
                io.LoraModel.Output("lora", tooltip="The run's main LoRA, for Load LoRA Model."),
                io.String.Output("path", tooltip="Its file. LoRA loaders list it under kinoloom/<run name>."),
                io.LossMap.Output("loss", tooltip="The loss of every step, for Plot Loss Graph."),
                io.Int.Output("steps", tooltip="Number of optimizer steps."),
                io.LoraModel.Output(
                    "all_loras", is_output_list=True, tooltip="All LoRAs of the run."
                ),
                io.String.Output("all_paths", is_output_list=True, tooltip="Their files, in the same order."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, job: str) -> io.NodeOutput:
        found = registry().get(job)
        with registry().waiting():
            _wait(found, cls.hidden.unique_id)
        name, status = found.spec.run_name, found.status
        if status == "failed":
            raise RuntimeError(f"Training run {name!r} failed: {found.error}")
        if status != "finished":
            logging.warning("Kinoloom: run %s was stopped after %d of %d steps", name, found.done, found.total)
        if not found.result_files:
            raise RuntimeError(f"Training run {name!r} ended before it saved anything")
        made = [found.files.get(label) for label, export in found.exports.items() if export.kind == "lora"]
        loras: list[Any] = [load(Path(trained_file(path)))[0] for path in made if path]
        if not loras:
            blocked = f"run {name!r} made no LoRA: connect path instead, to the loader of its file"
            loras = [ExecutionBlocker(blocked)]
        outputs = loras[-1], found.result_files[-1], {"loss": found.losses()}, found.done, loras, found.result_files
        return io.NodeOutput(*outputs, ui={"text": ("\n".join(found.result_files),), "kinoloom_job": (job,)})


def _wait(job: Job, node_id: str) -> None:
    """Show progress and the plan until the job ends. Cancel stops the job, and takes effect when it has saved."""
    bar, shown = None, None
    try:
        while not job.ended.wait(POLL_SECONDS):
            comfy.model_management.throw_exception_if_processing_interrupted()
            if registry().room_wanted.is_set():
                make_room()
            if job.total:
                bar = bar or comfy.utils.ProgressBar(job.total)
                bar.update_absolute(job.done, job.total)
            if shown != (text := job.headline):
                shown = text
                PromptServer.instance.send_progress_text(text, node_id)
    except comfy.model_management.InterruptProcessingException:
        job.stop()
        job.ended.wait()
        raise


class TrainedModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomTrainedModel",
            display_name="Load Trained Model",
            category="Kinoloom/training",
            description="Loads the model of a fine-tune run in the same workflow. Load Diffusion Model lists it too.",
            search_aliases=["fine-tune", "load checkpoint"],
            inputs=[io.String.Input("path", force_input=True, tooltip="path of Training Result.")],
            outputs=[io.Model.Output(tooltip="The fine-tuned model.")],
        )

    @classmethod
    def execute(cls, path: str) -> io.NodeOutput:
        return io.NodeOutput(comfy.sd.load_diffusion_model(trained_file(path)))


NODES = [TrainingResult, TrainedModel]
