"""HTTP routes for runs. POST is only accepted from this server's pages. No name from a client is used as a path."""

import asyncio
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiohttp import web

from ...trainers.run.job import Job
from ...trainers.run.log import last_lines
from ...trainers.run.report import POLICY
from ...trainers.run.shown import loader_name
from ...trainers.run.unreadable import Unreadable
from ..data.encoding import cache
from ..folders import FOLDERS
from .generation import generation, workflow
from .registry import registry
from .words import words

PAGE = 100  # most jobs in an answer
LARGEST_PAGE = 1000
LOG_LINES = 200
LARGEST_BODY = 1 << 16  # bytes
LARGEST_NUMBER = 10**9
SAMPLE_NAME = r"[\w-]+\.webp"


def add_routes(routes: web.RouteTableDef) -> None:
    """The paths are in the README; errors are {"error": text} with status 400, 403, 404, 409 or 413."""

    @routes.get("/kinoloom/words")
    async def show_words(request: web.Request) -> web.Response:
        return web.json_response(words())

    @routes.get("/kinoloom/jobs")
    async def list_jobs(request: web.Request) -> web.Response:
        offset = number(request, "offset", 0, 0, LARGEST_NUMBER)
        limit = number(request, "limit", PAGE, 1, LARGEST_PAGE)
        return web.json_response(text=await asyncio.to_thread(page, offset, limit))

    @routes.get("/kinoloom/jobs/{id}")
    async def show_job(request: web.Request) -> web.Response:
        after = number(request, "after", 0, 0, LARGEST_NUMBER)
        return await answer(lambda job: details(job, after), find_any(request))

    add_result_routes(routes)
    add_change_routes(routes)
    add_cache_routes(routes)


def add_result_routes(routes: web.RouteTableDef) -> None:
    """What a run has made."""

    @routes.get("/kinoloom/jobs/{id}/files")
    async def list_files(request: web.Request) -> web.Response:
        return await answer(files, find(request))

    @routes.get("/kinoloom/jobs/{id}/generation")
    async def show_generation(request: web.Request) -> web.Response:
        try:
            return await answer(generated, find(request))
        except ValueError as error:
            raise refusal(web.HTTPConflict, str(error)) from error

    @routes.get("/kinoloom/jobs/{id}/log")
    async def show_log(request: web.Request) -> web.Response:
        return await answer(lambda job: {"lines": last_lines(job.log_path, LOG_LINES)}, find_any(request))

    @routes.get("/kinoloom/jobs/{id}/report.html")
    async def show_report(request: web.Request) -> web.Response:
        page = await asyncio.to_thread(find(request).report)
        return ReportPage(text=page, content_type="text/html", headers={"X-Content-Type-Options": "nosniff"})

    @routes.get("/kinoloom/jobs/{id}/samples/{name}")
    async def show_sample(request: web.Request) -> web.FileResponse:
        path = sample_path(find(request), request.match_info["name"])
        headers = {"Content-Type": "image/webp", "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return web.FileResponse(path, headers=headers)


def add_change_routes(routes: web.RouteTableDef) -> None:
    """What the panel does to a run."""

    @routes.post("/kinoloom/jobs/{id}/stop")
    async def stop(request: web.Request) -> web.Response:
        return await change(request, Job.stop)

    @routes.post("/kinoloom/jobs/{id}/pause")
    async def pause(request: web.Request) -> web.Response:
        return await change(request, Job.pause)

    @routes.post("/kinoloom/jobs/{id}/resume")
    async def resume(request: web.Request) -> web.Response:
        return await change(request, registry().resume)

    @routes.post("/kinoloom/jobs/{id}/free")
    async def free(request: web.Request) -> web.Response:
        return await change(request, registry().free)

    @routes.post("/kinoloom/jobs/{id}/restart")
    async def restart(request: web.Request) -> web.Response:
        return await change(request, registry().restart)

    @routes.post("/kinoloom/jobs/{id}/earlier")
    async def earlier(request: web.Request) -> web.Response:
        return await change(request, lambda job: registry().move(job, -1))

    @routes.post("/kinoloom/jobs/{id}/later")
    async def later(request: web.Request) -> web.Response:
        return await change(request, lambda job: registry().move(job, 1))

    @routes.post("/kinoloom/jobs/{id}/delete")
    async def delete(request: web.Request) -> web.Response:
        return await change(request, registry().delete, find_any)


def add_cache_routes(routes: web.RouteTableDef) -> None:
    """Routes for the data cache: its size, its limit, and deleting unused files."""

    @routes.get("/kinoloom/cache")
    async def show_cache(request: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(cache.state, cache.data_folder()))

    @routes.post("/kinoloom/cache")
    async def set_limit(request: web.Request) -> web.Response:
        require_own_page(request)
        limit = (await read_object(request)).get("limit_gb")
        try:
            await asyncio.to_thread(cache.set_limit, cache.data_folder(), limit)
        except (ValueError, OverflowError) as error:
            raise refusal(web.HTTPBadRequest, str(error)) from error
        except OSError as error:
            raise refusal(web.HTTPConflict, str(error)) from error
        await asyncio.to_thread(cache.keep_to_limit, cache.data_folder())
        return await show_cache(request)

    @routes.post("/kinoloom/cache/free")
    async def free_cache(request: web.Request) -> web.Response:
        require_own_page(request)
        await read_object(request)
        try:
            await asyncio.to_thread(cache.prune, cache.data_folder(), 0)
        except OSError as error:
            raise refusal(web.HTTPConflict, str(error)) from error
        return await show_cache(request)


class ReportPage(web.Response):
    """A report, with its content policy set last: --disable-api-nodes sets ComfyUI's policy, which allows scripts."""

    async def prepare(self, request: web.BaseRequest) -> Any:
        self.headers["Content-Security-Policy"] = f"{POLICY}; sandbox"
        return await super().prepare(request)


def page(offset: int, limit: int) -> str:
    registry().look()
    jobs = registry().newest_first()
    return json.dumps({"jobs": [job.summary() for job in jobs[offset : offset + limit]], "total": len(jobs)})


def details(job: Job | Unreadable, after: int) -> dict[str, Any]:
    registry().look(now=job.elsewhere)
    epoch = job.epoch  # read before the history, so that the client notices a cut in between
    history = job.history[after:]
    place = {"history": history, "next": after + len(history), "epoch": epoch}
    config = {} if isinstance(job, Unreadable) else job.spec.config
    return {**job.summary(), "config": config, **place}


def files(job: Job) -> dict[str, Any]:
    """The complete files in a run's output folders."""
    found = []
    for kind, folder in job.spec.outputs.items():
        has_loras = kind in FOLDERS and FOLDERS[kind].has_loras
        for path in sorted(Path(folder).glob("[!.]*.safetensors")) if os.path.isdir(folder) else ():
            with suppress(FileNotFoundError):  # a best file that was just replaced
                stat, name = path.stat(), loader_name(path) if has_loras else None
                found.append({"name": path.name, "bytes": stat.st_size, "modified": stat.st_mtime, "lora_name": name})
    return {"folder": f"kinoloom/{job.spec.run_name}", "files": found}


def generated(job: Job) -> dict[str, Any]:
    found = generation(job)
    return {**found, "workflow": workflow(**found)}


def sample_path(job: Job, name: str) -> Path:
    """The path of a sample of the job by file name. 404 if there is none."""
    path = job.samples_folder / name
    if not re.fullmatch(SAMPLE_NAME, name) or not path.is_file() or path.is_symlink():
        raise refusal(web.HTTPNotFound, "unknown sample")
    return path


def find(request: web.Request) -> Job:
    job = find_any(request)
    if isinstance(job, Unreadable):
        raise refusal(web.HTTPConflict, job.summary()["error"])
    return job


def find_any(request: web.Request) -> Job | Unreadable:
    job = registry().find(request.match_info["id"])
    if job is None:
        raise refusal(web.HTTPNotFound, "unknown job")
    return job


async def answer(make: Callable[[Any], Any], job: Job | Unreadable) -> web.Response:
    """Make an answer in a thread, because it may read files and block the server."""
    text = await asyncio.to_thread(lambda: json.dumps(make(job)))
    return web.json_response(text=text)


async def change(request: web.Request, act: Callable[[Any], None], find: Callable = find) -> web.Response:
    require_own_page(request)
    job = find(request)
    await read_object(request)
    try:
        await asyncio.to_thread(registry().change, job, act)
    except (ValueError, OSError) as error:
        raise refusal(web.HTTPConflict, str(error)) from error
    return web.json_response(job.summary())


def require_own_page(request: web.Request) -> None:
    """403 for a request from the page of another origin. https://web.dev/articles/fetch-metadata"""
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    named = origin is None or origin.split("://")[-1].lower() == request.host.lower()
    own = site in ("same-origin", "none") if site else named
    if not own:
        raise refusal(web.HTTPForbidden, "this request comes from the page of another origin")


async def read_object(request: web.Request) -> dict[str, Any]:
    """The body as a JSON object, {} for an empty body."""
    body = b""
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > LARGEST_BODY:
            raise refusal(
                web.HTTPRequestEntityTooLarge,
                f"body: expected at most {LARGEST_BODY} bytes",
                max_size=LARGEST_BODY,
                actual_size=len(body),
            )
    try:
        value = json.loads(body) if body else {}
    except (ValueError, RecursionError) as error:
        raise refusal(web.HTTPBadRequest, "body: expected JSON") from error
    if not isinstance(value, dict):
        raise refusal(web.HTTPBadRequest, f"body: expected a JSON object, not {type(value).__name__}")
    return value


def number(request: web.Request, name: str, default: int, low: int, high: int) -> int:
    """A whole number from the query string."""
    text = request.query.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,10}", text) or not low <= int(text) <= high:
        raise refusal(web.HTTPBadRequest, f"{name}={text[:20]!r}: expected {low}..{high}")
    return int(text)


def refusal(kind: type[web.HTTPException], message: str, **details: Any) -> web.HTTPException:
    return kind(text=json.dumps({"error": message}), content_type="application/json", **details)
