"""The pack in a real ComfyUI server: training in the background, results, cancel, crash, resume, isolation."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ..server_prompts import node, sample, train, write_clips
from comfy_client import Client, PromptError, Server, make_base

WAN, SNS = "KinoloomTrainWanLora", "KinoloomTrainSetAndSequence"


@pytest.fixture(scope="session")
def clips(server: Server) -> None:
    write_clips(server.base)


@pytest.fixture
def on(client: Client, clips: None) -> Client:
    return client


def jobs(client: Client, run_name: str) -> list[dict]:
    return [job for job in client.jobs() if job["run_name"] == run_name]


def job_event(client: Client, run_name: str, accept, timeout: float = 60.0) -> dict:
    """The first websocket message about the run that `accept` takes."""

    def wanted(event: dict) -> bool:
        return (
            event["type"] == "kinoloom.job" and event["data"]["job"]["run_name"] == run_name and accept(event["data"])
        )

    return client.wait_event(wanted, timeout)["data"]


def step_reached(number: int):
    return lambda data: data["event"] == "step" and data["done"] >= number


def ended(data: dict) -> bool:
    return data["event"] == "status" and data["job"]["status"] in ("finished", "stopped", "failed")


def shown_path(outputs: dict) -> str:
    """The LoRA file that Training Result gave."""
    return json.loads(f'"{outputs["show"]["text"][0]}"')


def test_set_and_sequence_from_video_to_sampling(server: Server, on: Client) -> None:
    before = len(server.log.read_text())
    outputs = on.run(train(on, SNS, "full", set_steps=3, sequence_steps=4, gradient_accumulation=1))
    job = jobs(on, "full")[0]
    assert job["status"] == "finished" and job["done"] == job["total"] == 7
    assert shown_path(outputs) == job["files"]["combined"]
    assert shown_path(outputs).endswith("models/loras/kinoloom/full/full-combined-000007.safetensors")
    assert set(job["files"]) == {"identity", "motion", "combined"}
    base = on.files(on.run(sample(prefix="full_base")))
    with_lora = on.files(on.run(sample(lora="kinoloom/full/full-combined-000007.safetensors", prefix="full_lora")))
    plain, changed = (load_file(server.base / files[0])["latent_tensor"] for files in (base, with_lora))
    assert torch.isfinite(changed).all() and not torch.equal(plain, changed)
    log = server.log.read_text()[before:]
    assert "lora key not loaded" not in log and "Traceback" not in log


def test_identity_then_motion_equals_combined(server: Server, on: Client) -> None:
    on.run(train(on, SNS, "parts", set_steps=2, sequence_steps=2, gradient_accumulation=1, save_precision="fp32"))
    files = {
        name: str(Path(path).relative_to(server.base / "models" / "loras"))
        for name, path in jobs(on, "parts")[0]["files"].items()
    }
    chained = sample(lora=files["identity"], prefix="chained")
    chained["motion"] = node("LoraLoaderModelOnly", model=["lora", 0], lora_name=files["motion"], strength_model=1.0)
    chained["sample"]["inputs"]["model"] = ["motion", 0]
    one, two = (
        load_file(server.base / on.files(on.run(prompt))[0])["latent_tensor"]
        for prompt in (sample(lora=files["combined"], prefix="combined"), chained)
    )
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_stage_two_from_an_identity_file(on: Client) -> None:
    on.run(train(on, SNS, "stage1", set_steps=2, sequence_steps=0, gradient_accumulation=1))
    assert set(jobs(on, "stage1")[0]["files"]) == {"identity"}
    on._object_info = None  # the list of LoRA files has grown
    identity = "kinoloom/stage1/stage1-identity-000002.safetensors"
    on.run(train(on, SNS, "stage2", set_steps=0, sequence_steps=2, gradient_accumulation=1, identity_file=identity))
    job = jobs(on, "stage2")[0]
    assert set(job["files"]) == {"motion", "combined"}
    first = load_file(jobs(on, "stage1")[0]["files"]["identity"])
    second = load_file(job["files"]["combined"])
    downs = [key for key in first if key.endswith("lora_A.weight")]
    assert downs and all(torch.equal(first[key], second[key]) for key in downs)


def test_name_folder_and_options_may_arrive_by_wire(server: Server, on: Client) -> None:
    folder = server.base / "input" / "wired"
    shutil.copytree(server.base / "input" / "clips", folder)
    prompt = train(on, WAN, "x", wait=False)
    prompt["where"] = node("PrimitiveString", value="wired")
    prompt["folder"] = node("ComfySwitchNode", switch=True, on_true=["where", 0], on_false=["where", 0])
    prompt["name"] = node("PrimitiveString", value=" by wire ")
    prompt["steps"] = node("PrimitiveInt", value=2)
    prompt["data"]["inputs"]["folder"] = ["folder", 0]
    prompt["train"]["inputs"] |= {"run_name": ["name", 0], "steps": ["steps", 0]}
    prompt["result"] = node("KinoloomTrainingResult", job=["train", 0])
    prompt["show"] = node("PreviewAny", source=["result", 1])
    first = shown_path(on.run(prompt))
    assert Path(first).parts[-2:] == ("by wire", "by wire-lora-000002.safetensors")
    on.run(prompt)
    assert [job["done"] for job in jobs(on, "by wire")] == [2] and not jobs(on, "by wire-2")
    (folder / "square.motion.txt").write_text("a [v] square on a wall, [u] resting")
    assert Path(shown_path(on.run(prompt))).parts[-2] == "by wire-2", "the folder's files are read again"
    for name, value, message in (
        ("where", "../input", "folder='../input'"), ("where", "../..", "folder='../..' leads out of the input folder"),
        ("where", "gone", "folder='gone': there is no such folder"), ("name", "con", "run_name='con': expected another"),
        ("name", "../up", "run_name='../up': expected letters"), ("steps", 0, "steps=0: expected 1"),
    ):  # fmt: skip
        wrong = {**prompt, name: node(prompt[name]["class_type"], value=value)}
        with pytest.raises(PromptError, match=re.escape(message)):
            on.run(wrong)


def test_train_node_alone_returns_at_once_and_unchanged_queue_trains_once(on: Client) -> None:
    prompt = train(on, WAN, "alone", wait=False, steps=400)
    on.run(prompt)
    assert jobs(on, "alone")[0]["done"] < 400, "the node must not wait for its job"
    on.run(prompt)
    job_event(on, "alone", ended)
    on.run(prompt)
    assert [job["done"] for job in jobs(on, "alone")] == [400]


def test_prompts_during_a_job_are_bit_identical(server: Server, on: Client) -> None:
    def latent(prefix: str, seed: int) -> torch.Tensor:
        return load_file(server.base / on.files(on.run(sample(prefix=prefix, seed=seed)))[0])["latent_tensor"]

    quiet = [latent("quiet", seed) for seed in range(4)]
    on.run(train(on, WAN, "noisy", wait=False, steps=5000))
    job_event(on, "noisy", step_reached(2))
    before = jobs(on, "noisy")[0]["done"]
    during = [latent("during", seed) for seed in range(4)]
    after = jobs(on, "noisy")[0]
    on.post(f"/kinoloom/jobs/{after['id']}/stop")
    assert after["status"] == "running" and after["done"] > before, "the job has to train while the prompts run"
    assert all(torch.equal(a, b) for a, b in zip(quiet, during, strict=True))


def test_cancelling_a_prompt_leaves_the_job_alone_and_is_not_swallowed(on: Client) -> None:
    on.run(train(on, WAN, "bystander", wait=False, steps=5000))
    job_event(on, "bystander", step_reached(1))
    prompt_id = on.submit(sample(prefix="cancelled", steps=2000))
    on.wait_event(lambda e: e["type"] == "progress" and e["data"]["prompt_id"] == prompt_id)
    on.interrupt()
    with pytest.raises(PromptError, match="interrupted"):
        on.wait(prompt_id)
    job = jobs(on, "bystander")[0]
    assert job["status"] == "running"
    job_event(on, "bystander", step_reached(job["done"] + 5))
    on.post(f"/kinoloom/jobs/{job['id']}/stop")


def test_cancel_through_training_result_saves_and_the_same_prompt_resumes_exactly(on: Client) -> None:
    options = {"set_steps": 60, "sequence_steps": 60, "gradient_accumulation": 1, "save_precision": "fp32"}
    on.run(train(on, SNS, "straight", **options))
    for stop_at in (20, 80):  # one stop in each stage
        prompt_id = on.submit(train(on, SNS, "cancelled", **options))
        job_event(on, "cancelled", step_reached(stop_at))
        on.interrupt()
        with pytest.raises(PromptError, match="interrupted"):
            on.wait(prompt_id)
        stopped = jobs(on, "cancelled")[0]
        assert stopped["status"] == "stopped" and stop_at <= stopped["done"] < 120 and stopped["resumable"]
        assert load_file(list(stopped["files"].values())[-1])
    on.run(train(on, SNS, "cancelled", **options))
    compare_runs(on, "straight", "cancelled")


def compare_runs(client: Client, one: str, other: str) -> None:
    """Same loss history and bit-equal final files."""
    (first,), (second,) = jobs(client, one), jobs(client, other)
    assert first["status"] == second["status"] == "finished"
    assert histories(client, first) == histories(client, second)
    for name in ("identity", "motion", "combined"):
        a, b = load_file(first["files"][name]), load_file(second["files"][name])
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name


def histories(client: Client, job: dict) -> list:
    history = client.get(f"/kinoloom/jobs/{job['id']}")["history"]
    return [(e["done"], e["losses"], e["grad_norm"]) for e in history if e["event"] == "step"]


def test_resume_with_changed_options_or_data_is_refused_by_name(server: Server, on: Client) -> None:
    on.run(train(on, WAN, "strict", wait=False, steps=5000))
    job_event(on, "strict", step_reached(2))
    on.post(f"/kinoloom/jobs/{jobs(on, 'strict')[0]['id']}/stop")
    job_event(on, "strict", ended)
    with pytest.raises(PromptError, match=r"rank \(was 4, now 8\)"):
        on.run(train(on, WAN, "strict", wait=False, steps=5000, rank=8))
    other = train(on, WAN, "strict", wait=False, steps=5000)
    other["data"]["inputs"]["single_frames"] = 2
    with pytest.raises(PromptError, match="training data"):
        on.run(other)
    on.run(train(on, WAN, "strict", wait=False, steps=5000, save_every=7, checkpointing="on"))
    before = jobs(on, "strict")[0]["done"]
    job_event(on, "strict", step_reached(before + 2))
    job = on.get(f"/kinoloom/jobs/{jobs(on, 'strict')[0]['id']}")
    on.post(f"/kinoloom/jobs/{job['id']}/stop")
    assert (job["config"]["save_every"], job["config"]["checkpointing"]) == (7, "on")
    assert [e["checkpointing"] for e in job["history"] if e["event"] == "plan"][-1]


def test_a_finished_run_is_never_overwritten(server: Server, on: Client) -> None:
    on.run(train(on, WAN, "kept", steps=2))
    first = jobs(on, "kept")[0]["files"]["lora"]
    content = Path(first).read_bytes()
    on.run(train(on, WAN, "kept", steps=2, learning_rate=1e-3))
    second = jobs(on, "kept-2")[0]["files"]["lora"]
    assert first != second and Path(first).read_bytes() == content != Path(second).read_bytes()
    (server.base / "models" / "loras" / "kinoloom" / "orphan").mkdir()  # files whose job was deleted
    on.run(train(on, WAN, "orphan", steps=2))
    assert not jobs(on, "orphan") and "orphan-2" in jobs(on, "orphan-2")[0]["files"]["lora"]


def test_bad_inputs_give_one_clear_error(server: Server, on: Client) -> None:
    import tiny

    tiny.write_wan(server.base / "models" / "diffusion_models" / "tiny_i2v.safetensors", i2v=True)
    on._object_info = None
    for options, message in (
        ({"unet": "tiny_i2v.safetensors"}, "model: found Wan 2.1 image-to-video"),
        ({"run_name": "../escape"}, "run_name="),
    ):
        values = {"run_name": "bad", "steps": 2, **options}
        with pytest.raises(PromptError, match=message):
            on.run(train(on, WAN, **values))
    with pytest.raises(PromptError, match="self_conditioning_prob=0.9"):
        on.run(train(on, SNS, "bad2", self_conditioning_prob=0.9))
    no_frames = train(on, SNS, "bad3")
    no_frames["data"]["inputs"]["single_frames"] = 0
    with pytest.raises(PromptError, match="no frames to train on"):
        on.run(no_frames)


def test_pause_resume_stop_and_unknown_jobs_over_http(on: Client) -> None:
    on.run(train(on, WAN, "steered", wait=False, steps=5000))
    job_event(on, "steered", step_reached(1))
    job_id = jobs(on, "steered")[0]["id"]
    on.post(f"/kinoloom/jobs/{job_id}/pause")
    paused = job_event(on, "steered", lambda d: d["event"] == "status" and d["job"]["status"] == "paused")["job"]
    assert jobs(on, "steered")[0]["done"] == paused["done"]
    on.post(f"/kinoloom/jobs/{job_id}/resume")
    job_event(on, "steered", step_reached(paused["done"] + 2))
    on.post(f"/kinoloom/jobs/{job_id}/stop")
    done = job_event(on, "steered", ended)["job"]
    assert done["status"] == "stopped" and done["files"]
    on.post(f"/kinoloom/jobs/{job_id}/resume")
    job_event(on, "steered", step_reached(done["done"] + 2))
    on.post(f"/kinoloom/jobs/{job_id}/stop")
    with pytest.raises(PromptError, match="404"):
        on.get("/kinoloom/jobs/nonsense")
    with pytest.raises(PromptError, match="404"):
        on.post("/kinoloom/jobs/nonsense/stop")
    finished = next(job for job in on.jobs() if job["status"] == "finished")
    with pytest.raises(PromptError, match="409.*finished"):
        on.post(f"/kinoloom/jobs/{finished['id']}/resume")


def test_a_run_stopped_and_resumed_from_the_page_gives_its_nodes_the_whole_result(on: Client) -> None:
    prompt = train(on, WAN, "taken up", steps=200)
    waiting = on.submit(prompt)
    job_event(on, "taken up", step_reached(2))
    job_id = jobs(on, "taken up")[0]["id"]
    on.post(f"/kinoloom/jobs/{job_id}/stop")
    assert not shown_path(on.wait(waiting)).endswith("-000200.safetensors")
    on.post(f"/kinoloom/jobs/{job_id}/resume")
    job_event(on, "taken up", lambda data: data["job"]["status"] == "finished")
    assert shown_path(on.run(prompt)).endswith("-000200.safetensors")


def test_a_polite_job_waits_while_the_queue_is_busy(on: Client) -> None:
    on.run(train(on, WAN, "polite", wait=False, steps=5000, pause_when_busy=True))
    job_event(on, "polite", step_reached(1))
    prompt_id = on.submit(sample(prefix="busy", steps=200))
    job_event(on, "polite", lambda d: d["event"] == "status" and d["job"]["status"] == "paused")
    at_pause = jobs(on, "polite")[0]["done"]
    on.wait(prompt_id)
    job_event(on, "polite", step_reached(at_pause + 3))
    on.post(f"/kinoloom/jobs/{jobs(on, 'polite')[0]['id']}/stop")
    outputs = on.run(train(on, WAN, "waited for", steps=5, pause_when_busy=True))
    assert shown_path(outputs).endswith("-lora-000005.safetensors")


def own_base(tiny_models: Path, folder: Path) -> Path:
    """A base directory with the pack, tiny models and clips."""
    base = make_base(folder / "base", Path(__file__).resolve().parents[2])
    for model in tiny_models.glob("*/*.safetensors"):
        link = base / "models" / model.relative_to(tiny_models)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(model)
    write_clips(base)
    return base


def test_kill_and_restart_loses_at_most_the_steps_since_the_checkpoint(
    comfyui_dir: Path, tiny_models: Path, tmp_path: Path
) -> None:
    base = own_base(tiny_models, tmp_path)
    options = {
        "set_steps": 40,
        "sequence_steps": 40,
        "gradient_accumulation": 1,
        "save_every": 10,
        "save_precision": "fp32",
    }
    with Server(comfyui_dir, base) as server, server.client() as client:
        client.run(train(client, SNS, "straight", **options))
        client.run(train(client, SNS, "killed", wait=False, **options))
        job_event(client, "killed", step_reached(25))
        server.kill()
        before = json.loads(next((base / "user").glob("*kinoloom/jobs/*/job.json"), None).read_text())  # still whole
        assert before["spec"]["recipe"] == SNS
        server.start()
        with server.client() as again:
            job = jobs(again, "killed")[0]
            assert job["status"] == "interrupted" and job["resumable"] and job["done"] >= 25
            again.post(f"/kinoloom/jobs/{job['id']}/resume")
            job_event(again, "killed", step_reached(50))
            server.kill()
        server.start()
        with server.client() as again:
            again.run(train(again, SNS, "killed", **options))
            compare_runs(again, "straight", "killed")


def test_two_servers_on_one_base_share_its_runs_and_a_signal_saves_as_stop_does(
    comfyui_dir: Path, tiny_models: Path, tmp_path: Path
) -> None:
    base = own_base(tiny_models, tmp_path)
    second = Server(comfyui_dir, base, log=tmp_path / "second.log")
    with Server(comfyui_dir, base) as server, server.client() as client, second, second.client() as other:
        client.run(train(client, WAN, "shared", wait=False, steps=50_000, save_every=50_000))
        job_event(client, "shared", step_reached(3))
        (seen,) = jobs(other, "shared")
        assert seen["elsewhere"] and seen["status"] == "running" and seen["done"] >= 3 and not seen["dead_end"]
        for action in ("stop", "pause", "resume", "delete"):
            with pytest.raises(PromptError, match="409.*in use by another ComfyUI"):
                other.post(f"/kinoloom/jobs/{seen['id']}/{action}")
        with pytest.raises(PromptError, match="in use by another ComfyUI"):
            other.run(train(other, WAN, "shared", wait=False, steps=50_000, save_every=50_000))
        server.stop()
        assert server.process.returncode == -signal.SIGTERM
        found = other.get(f"/kinoloom/jobs/{seen['id']}")
        assert not found["elsewhere"] and found["status"] == "stopped" and found["resumable"]
        assert found["checkpoint"] == found["done"] >= 3 and Path(found["files"]["lora"]).is_file()
        other.post(f"/kinoloom/jobs/{seen['id']}/resume")
        job_event(other, "shared", step_reached(found["done"] + 1))
