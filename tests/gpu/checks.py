"""The checks: functions that add to a Bench's rows of results, with `ok` False where one is wrong, or raise an error."""

import contextlib
import logging
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from models import Bench, host
from steps import Done, phases, train
from torch import Tensor
from wan_step import Shape

METHODS: dict[str, dict[str, Any]] = {
    "KinoloomTrainWanLora": {},
    "KinoloomTrainSetAndSequence": {},
    "KinoloomTrainMotionDirector": {"preset": "custom", "spatial_off_prob": 0.0},
    "KinoloomTrainCaLora": {},
    "KinoloomTrainSvdLora": {},
    "KinoloomTrainSvdFinetune": {},
    "KinoloomTrainSvdTracklets": {},
}
WITHOUT_DROPOUT = {  # which is drawn on the device
    "KinoloomTrainSetAndSequence": {"set_dropout": 0.0},
    "KinoloomTrainMotionDirector": {"dropout": 0.0},
}
SMALL = (5, 128, 128)  # frames, height, width
LOSS, GRADIENT = 1e-3, 1e-2  # relative, between a GPU and a CPU in fp32
GIB = 2**30
KEPT = GIB // 16  # bytes that a run may leave on the card
WORKSPACE = GIB // 4  # of libraries such as cuDNN, which no plan counts
TIGHT = 8 * GIB  # of memory: enough for a clip of 33 frames with checkpointing, too little for 81 large ones


def environment(bench: Bench) -> None:
    import comfy.quant_ops

    facts = {**host().environment(), "processor": platform.machine(), "full shapes": bench.full}
    if bench.full:
        card = torch.cuda.get_device_properties(0)
        facts |= {"memory": f"{card.total_memory / GIB:.1f} GiB", "CUDA": torch.version.cuda}
        facts["free"] = f"{torch.cuda.mem_get_info()[0] / GIB:.1f} GiB"
    found = comfy.quant_ops.ck.list_backends()
    facts["kernels"] = ", ".join(name for name, one in found.items() if one["available"] and not one["disabled"])
    bench.rows += [{"fact": name, "value": value} for name, value in facts.items()]


def kernels(bench: Bench) -> None:
    """Rotary embedding and attention against plain formulas in fp64, forward and backward."""
    device = host().torch_device()
    for heads in (12, 40):
        for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
            q, k, v = (_normal(i, 1, 300, heads, 128).to(device, dtype).requires_grad_() for i in range(3))
            angles = torch.arange(300.0, device=device)[:, None] * 100 ** -torch.linspace(0, 1, 64, device=device)
            turns = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).unflatten(-1, (2, 2))
            freqs = turns[None, :, None]
            found = {"rotary": _apart(_rotary, host().Rope.apply, q, freqs)}
            found["attention"] = _apart(_attention, _ours_attention, *(x.flatten(2) for x in (q, k, v)), heads)
            for name, error in found.items():
                row = {"kernel": name, "heads": heads, "dtype": str(dtype), "error": f"{error:.1e}"}
                bench.rows.append({**row, "ok": error < allowed})


def _apart(reference: Callable, ours: Callable, *inputs: Any) -> float:
    """The largest relative difference of the outputs and of all gradients."""
    wide = [x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
    own = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
    results = []
    for function, arguments in ((reference, wide), (ours, own)):
        out = function(*arguments)
        out.backward(_normal(9, *out.shape).to(out))
        results.append([out, *(x.grad for x in arguments if isinstance(x, Tensor) and x.requires_grad)])
    return max(float((b.double() - a).norm() / a.norm()) for a, b in zip(*results, strict=True))


def _rotary(x: Tensor, freqs: Tensor) -> Tensor:
    pairs = x.unflatten(-1, (-1, 1, 2))
    return (freqs[..., 0] * pairs[..., 0] + freqs[..., 1] * pairs[..., 1]).flatten(-2)


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return (torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2).flatten(2)


def _ours_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return host().sdpa(lambda: None, q, k, v, heads)


def losses(bench: Bench) -> None:
    """Every method's losses and gradients in fp32, on the device and on the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name, options in METHODS.items():
        options = {**options, **WITHOUT_DROPOUT.get(name, {})}
        ours, reference = (_numbers(bench, name, device, options) for device in (None, "cpu"))
        for key, value in reference.items():
            error = abs(ours[key] / value - 1) if value else abs(ours[key])
            row = {"method": name, "number": key, "device": f"{ours[key]:.6g}", "apart": f"{error:.1e}"}
            bench.rows.append({**row, "ok": error < (GRADIENT if "gradient" in key else LOSS)})


def _numbers(bench: Bench, name: str, device: str | None, options: dict[str, Any]) -> dict[str, float]:
    from kinoloom.trainers.core.rng import Rng

    recipe = bench.recipe(name, device, precision="fp32", checkpointing="on", **options)
    _move_up_factors(recipe)
    found = {}
    for key, loss in recipe.losses(bench.batch(recipe, *SMALL)[0], Rng(0, "check", 0)):
        loss.backward()
        found[f"{key} loss"] = loss.item()
    trained = [p for group in recipe.param_groups(phases(recipe)[0]) for p in group["params"]]
    gradients = [p.grad.norm() for p in trained if p.grad is not None]
    assert gradients, f"{name}: no gradient"
    return {**found, "gradient": float(torch.stack(gradients).norm())}


def _move_up_factors(recipe: Any) -> None:
    """Up factors begin at zero, which leaves the down factors without a gradient."""
    for group in sorted(recipe.lora.active) if hasattr(recipe, "lora") else []:
        for place, up in enumerate(recipe.lora.factors(group, "up").values()):
            up.data = (0.01 * _normal(place, *up.shape)).to(up)


def jobs(bench: Bench) -> None:
    """A prompt has the same result with and without a run beside it, and a run leaves nothing on the GPU."""
    model, _ = bench.model("wan")
    first, alone, before = _sample(model), _sample(model), _allocated()
    apart = float((first - alone).abs().max())
    bench.rows.append({"run": "none", "prompts": 2, "the same": apart == 0, "apart": apart, "ok": True})
    for turn in range(2):
        job = start_job(bench, model, SMALL, steps=12, run=f"beside-{turn}")
        during, asked = [], 0
        while not job.ended.is_set():
            during.append(float((_sample(model) - alone).abs().max()))
            asked += job.status == "running"
        assert job.status == "finished", job.error
        host().release()
        left, same = _allocated() - before, during.count(0.0)
        row = {"run": turn, "prompts": len(during), "while it trained": asked, "the same": same, "left": left}
        bench.rows.append({**row, "apart": max(during), "ok": same == len(during) > 0 and left < KEPT})


def _sample(model: Any) -> Tensor:
    import comfy.sample

    latent = torch.zeros(1, 16, 2, 16, 16)
    width = model.model.diffusion_model.text_dim
    positive, negative = ([[_normal(place, 1, 77, width), {}]] for place in range(2))
    with torch.inference_mode():
        return comfy.sample.sample(
            model, comfy.sample.prepare_noise(latent, 0), 4, 3.0, "euler", "simple", positive, negative, latent,
            disable_pbar=True, seed=0,
        )  # fmt: skip


def start_job(bench: Bench, model: Any, clip: tuple[int, int, int], *, run: str, **options: Any) -> Any:
    """A Wan LoRA run of one clip, begun."""
    from kinoloom.trainers import recipes
    from kinoloom.trainers.core.data import Row, TrainingData, write_column
    from kinoloom.trainers.host.source import ModelSource
    from kinoloom.trainers.run.checkpoint import RunKey
    from kinoloom.trainers.run.job import Job
    from kinoloom.trainers.run.record import Spec
    from steps import prompt

    name, folder, frames = "KinoloomTrainWanLora", bench.folder / run, 1 + (clip[0] - 1) // 4
    latents = _normal(1, 16, frames, clip[1] // 8, clip[2] // 8)
    write_column(folder, "clip", "latents", {"latents": latents})
    write_column(folder, "clip", "prompt_embeds", prompt(_normal(2, 77, model.model.diffusion_model.text_dim)))
    columns = {"latents": "clip", "prompt_embeds": "clip"}
    data = TrainingData(str(folder), (Row("clip", "clips", "train", tuple(latents.shape), columns),))
    method, source = recipes()[name], ModelSource.of(model)
    config = method.Config(validate_every=0, **options)
    run_key = RunKey.of(name, source.key, data.digest, config, {})
    outputs = {"loras": str(folder / "out")}
    spec = Spec(run, run, name, vars(config), data, {"model": source}, run_key, outputs, time.time())
    job = Job(folder / "job", spec, method, lambda job, event: None, lambda job: False)
    job.start({"model": model})
    return job


def memory(bench: Bench) -> None:
    """Each backbone's plan against the peak of a step."""
    from kinoloom.trainers.core import memory
    from kinoloom.trainers.core.rng import Rng

    sizes = {
        "KinoloomTrainWanLora": (33, 512, 512) if bench.full else SMALL,
        "KinoloomTrainMotionDirector": (16, 512, 512) if bench.full else SMALL,
        "KinoloomTrainSvdLora": (14, 576, 320) if bench.full else SMALL,
    }
    for name, size in sizes.items():
        for choice in ("off", "on"):
            recipe = bench.recipe(name, precision="bf16", checkpointing=choice, **METHODS[name])
            batch, states = bench.batch(recipe, *size)[0], 4 * memory.count_trainable(recipe.backbone.module)
            free = host().free_memory(recipe.backbone.device)
            made = memory.make_plan(recipe.backbone, choice, lambda r=recipe, b=batch: r.losses(b, Rng(0, "c", 0)), states, free)
            recipe.backbone.placement, plan = made
            before = _reset_peak()
            for _, loss in recipe.losses(batch, Rng(0, "check", 0)):
                loss.backward()
            peak = torch.cuda.max_memory_allocated() - before if bench.full else None
            row = {"method": name, "checkpointing": choice, "plan MiB": plan.memory_needed >> 20}
            row["peak MiB"] = peak >> 20 if peak else "not measured on a CPU"
            fits = peak is None or peak < plan.memory_needed / memory.HEADROOM + WORKSPACE
            bench.rows.append({**row, "ok": fits})
            del recipe, batch, loss, plan
            host().release()


def out_of_memory(bench: Bench) -> None:
    """A run without enough memory says so and frees its memory, and the next run trains."""
    model, _ = bench.model("wan")
    before = _allocated()
    size = (81, 720, 1280) if bench.full else (33, 640, 640)
    with _little_memory(bench):
        job = start_job(bench, model, size, run="large", steps=2, checkpointing="off")
        job.ended.wait()
        bench.rows.append({"run": "too large", "status": job.status, "said": job.error[:200]})
        bench.rows[-1]["ok"] = job.status == "failed" and "out of memory" in job.error
        if bench.full:
            job = start_job(bench, model, (33, 512, 512), run="spared", steps=2, checkpointing="off")
            job.ended.wait()
            bench.rows.append({"run": "once more with checkpointing", "status": job.status, "said": job.error[:200]})
            bench.rows[-1]["ok"] = job.status == "finished" and job.plan.checkpointing
    job = start_job(bench, model, SMALL, run="small", steps=2)
    job.ended.wait()
    host().release()
    left = _allocated() - before
    bench.rows.append({"run": "small", "status": job.status, "said": job.error[:200], "left": left})
    bench.rows[-1]["ok"] = job.status == "finished" and left < KEPT


@contextlib.contextmanager
def _little_memory(bench: Bench) -> Iterator[None]:
    """Limit memory: to TIGHT bytes on a GPU, on a CPU to 256 MiB of address space above the current use."""
    if bench.full:
        torch.cuda.set_per_process_memory_fraction(TIGHT / torch.cuda.get_device_properties(0).total_memory)
        yield
        torch.cuda.set_per_process_memory_fraction(1.0)
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + GIB // 4, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def times(bench: Bench) -> None:
    """Seconds of a step, peak memory, and for Wan the share of the card's measured matmul rate."""
    plain = {"KinoloomTrainWanLora": (33, 512, 512), "KinoloomTrainMotionDirector": (16, 512, 512)}
    cases = [(name, size, "off") for name, size in plain.items()]
    cases += [("KinoloomTrainSvdLora", (25, 576, 1024), "on"), ("KinoloomTrainWanLora", (81, 480, 832), "on")]
    peak = _matmul_rate(bench)
    for name, size, choice in cases:
        bench.rows.append(_timed(bench, name, size if bench.full else SMALL, choice, peak))


def times_14b(bench: Bench) -> None:
    """A step of the 14B shape with fp8 matrices."""
    size = (33, 480, 832) if bench.full else SMALL
    options = {"kind": "wan 14B", "dtype": torch.float8_e4m3fn, "rank": 32}
    bench.rows.append(_timed(bench, "KinoloomTrainWanLora", size, "on", _matmul_rate(bench), **options))


def _timed(bench: Bench, name: str, size: tuple[int, ...], choice: str, rate: float, **options: Any) -> dict[str, Any]:
    host().release()  # the model of the case before, whose hooks make cycles
    recipe = bench.recipe(name, precision="bf16", checkpointing=choice, **{**METHODS[name], **options})
    rows, taken = bench.batch(recipe, *size), []
    before = _reset_peak()

    def tick() -> None:
        if bench.full:
            torch.cuda.synchronize()
        taken.append(time.perf_counter())
        if len(taken) == 6:
            raise Done

    with contextlib.suppress(Done):
        train(recipe, rows, tick)
    seconds = statistics.median(b - a for a, b in zip(taken[1:], taken[2:], strict=False))
    row = {"method": name, "size": "x".join(map(str, size)), "checkpointing": choice, "s/step": f"{seconds:.3f}"}
    if bench.full:
        row["peak GiB"] = f"{(torch.cuda.max_memory_allocated() - before) / GIB:.1f}"
    if type(recipe).backbone == "wan":
        module = recipe.backbone.module
        grid = (1 + (size[0] - 1) // 4, size[1] // 16, size[2] // 16)
        ffn = module.blocks[0].ffn[0].out_features
        tflop = Shape("", module.dim, ffn, len(module.blocks), grid, recipe.config.rank, "bf16").step_tflop()
        row |= {"TFLOP/s": f"{tflop / seconds:.1f}", "of matmul": f"{tflop / seconds / rate:.2f}"}
    logging.info("%s", row)
    return row


def _matmul_rate(bench: Bench) -> float:
    """TFLOP/s of a large bf16 product."""
    side, device = 8192 if bench.full else 512, host().torch_device()
    a, b = (_normal(i, side, side).to(device, torch.bfloat16) for i in range(2))
    taken = []
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        if bench.full:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return 2 * side**3 / min(taken) / 1e12


def _allocated() -> int:
    """Allocated bytes on the GPU, without the workspaces that cuBLAS keeps per thread, 32 MiB or more on an H100."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def _reset_peak() -> int:
    allocated = _allocated()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return allocated


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CHECKS: dict[str, Callable[[Bench], None]] = {
    check.__name__: check
    for check in (environment, kernels, losses, jobs, memory, out_of_memory, times, times_14b)
}
