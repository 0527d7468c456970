"""Jobs over HTTP: pages, partial histories, files, log, report, samples, deletion, and refused requests."""

import http.client
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import server as comfy_server
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from kinoloom.nodes.training import registry as jobs
from kinoloom.nodes.training import routes
from kinoloom.trainers.run.report import POLICY
from yarl import URL

from ..coroutines import result_of
from ..runs import make_config, make_job
from ..server_prompts import train, write_clips
from comfy_client import Client, PromptError, Server

WAN = "KinoloomTrainWanLora"
Ask = Callable[..., tuple[int, Any]]


# -- the routes on a registry of many jobs, without ComfyUI's own checks before them -----------------------------------------


@pytest.fixture(scope="module")
def registry(inputs: Callable, tmp_path_factory: pytest.TempPathFactory) -> Iterator[jobs.Registry]:
    """A thousand runs that an earlier server finished, number 7 of which has a sample; no history is there to be read."""
    tmp_path = tmp_path_factory.mktemp("registry")
    job = make_job(tmp_path, *inputs(WAN), make_config(WAN), WAN)
    job.status, job.tally.losses = "finished", {"lora": 0.25}
    job.write()
    kept = json.loads((job.folder / "job.json").read_text())
    for i in range(1000):
        folder = tmp_path / "jobs" / f"job{i}"
        folder.mkdir(parents=True)
        kept["spec"] |= {"id": f"job{i}", "run_name": f"run {i}", "created": float(i)}
        (folder / "job.json").write_text(json.dumps(kept))
    samples = tmp_path / "jobs" / "job7" / "samples"
    samples.mkdir()
    (samples / "000001-0.webp").write_bytes(b"picture")
    (samples.parent / "secret.webp").write_bytes(b"secret")
    (samples / "link.webp").symlink_to(samples.parent / "secret.webp")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jobs, "_registry", jobs.Registry(tmp_path / "jobs"))
        yield jobs.registry()


@pytest.fixture
def ask(registry: jobs.Registry) -> Ask:
    """Status and answer, parsed where it is JSON, of one request."""
    table = web.RouteTableDef()
    routes.add_routes(table)

    async def request(method: str, path: str, options: dict) -> tuple[int, Any]:
        app = web.Application()
        app.add_routes(table)
        async with TestClient(TestServer(app)) as client:
            answer = await client.request(method, URL(path, encoded=True), **options)
            if answer.content_type == "application/json":
                return answer.status, await answer.json()
            return answer.status, await answer.read()

    return lambda method, path, **options: result_of(request(method, path, options))


def test_the_page_asks_for_the_words_it_goes_by(ask: Ask) -> None:
    status, words = ask("GET", "/kinoloom/words")
    assert status == 200 and words["ended"] == ["finished", "stopped", "failed", "interrupted", "unreadable"]
    assert words["result_node"] == "KinoloomTrainingResult" and WAN in words["train_nodes"]


def test_a_thousand_jobs_are_listed_in_pages_without_their_histories(ask: Ask, registry: jobs.Registry) -> None:
    status, page = ask("GET", "/kinoloom/jobs")
    assert (status, page["total"], len(page["jobs"])) == (200, 1000, 100)
    assert [job["id"] for job in page["jobs"][:3]] == ["job999", "job998", "job997"]
    assert page["jobs"][0]["losses"] == {"lora": 0.25} and page["jobs"][0]["title"] == "Train Wan LoRA"
    assert page["jobs"][0]["status"] == "finished"
    assert [job["id"] for job in ask("GET", "/kinoloom/jobs?offset=995&limit=50")[1]["jobs"]] == [
        f"job{i}" for i in (4, 3, 2, 1, 0)
    ]
    assert ask("GET", "/kinoloom/jobs?offset=5000")[1] == {"jobs": [], "total": 1000}
    assert len(ask("GET", "/kinoloom/jobs?limit=1000")[1]["jobs"]) == 1000
    assert ask("GET", "/kinoloom/jobs/job7")[1]["history"] == []


@pytest.mark.parametrize("flags", [["block_external"], ["cors"], ["origin_only"], ["cors", "block_external"]])
def test_the_policy_of_a_report_holds_under_every_flag_of_the_server(flags: list[str], registry: jobs.Registry) -> None:
    """With the middlewares of ComfyUI that --disable-api-nodes and --enable-cors-header put before every route."""
    made = {name: getattr(comfy_server, f"create_{name}_middleware") for name in ("block_external", "origin_only")}
    made["cors"] = lambda: comfy_server.create_cors_middleware("*")
    table = web.RouteTableDef()
    routes.add_routes(table)

    async def request() -> tuple[str, str]:
        app = web.Application(middlewares=[made[flag]() for flag in flags])
        app.add_routes(table)
        async with TestClient(TestServer(app)) as client:
            answer = await client.get("/kinoloom/jobs/job7/report.html")
            return answer.headers["Content-Security-Policy"], await answer.text()

    header, page = result_of(request())
    assert header == f"{POLICY}; sandbox" and page.index(POLICY) < page.index("<title>")


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=x", "offset=-1", "offset=1e3", "limit=", "offset=%00"]
)
def test_pages_that_are_none_are_refused(ask: Ask, query: str) -> None:
    status, answer = ask("GET", f"/kinoloom/jobs?{query}")
    assert status == 400 and query.split("=")[0] in answer["error"]


UNKNOWN = ["nonsense", "..", "%2e%2e", "..%2f..", "job7%00", "job7%2f..%2fjob8", "<script>", "%ff", "a" * 5000]


@pytest.mark.parametrize("job_id", UNKNOWN)
def test_unknown_jobs(ask: Ask, job_id: str) -> None:
    for method, path in (
        ("GET", ""), ("GET", "/files"), ("GET", "/log"), ("GET", "/report.html"), ("GET", "/samples/000001-0.webp"),
        ("POST", "/stop"), ("POST", "/pause"), ("POST", "/resume"), ("POST", "/delete"),
        ("POST", "/restart"), ("POST", "/free"), ("POST", "/earlier"), ("POST", "/later"),
    ):  # fmt: skip
        status, _ = ask(method, f"/kinoloom/jobs/{job_id}{path}")
        assert status in (404, 405), (method, path)


@pytest.mark.parametrize(
    "file",
    [
        "../secret.webp", "..%2fsecret.webp", "%2e%2e%2fsecret.webp", "..%5csecret.webp", "link.webp", "secret.webp",
        "..%2f..%2fjob8%2fjob.json", "%2fetc%2fpasswd", "000001-0.webp%00", "000001-0.webp%0a", "000001-0.webp%3astream",
        ".", "..", "", "000001-0.png", "C%3a%5cx.webp", ".webp", "~.webp",
    ],
)  # fmt: skip
def test_no_name_leads_out_of_the_samples(ask: Ask, file: str) -> None:
    status, answer = ask("GET", f"/kinoloom/jobs/job7/samples/{file}")
    assert status == 404 and b"secret" not in bytes(str(answer), "utf-8")


def test_a_sample_is_served(ask: Ask) -> None:
    assert ask("GET", "/kinoloom/jobs/job7/samples/000001-0.webp") == (200, b"picture")
    assert ask("GET", "/kinoloom/jobs/job8/samples/000001-0.webp")[0] == 404


HOST = {"Host": "127.0.0.1:8188"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://127.0.0.1:8188"}, 200),
        ({"Origin": "http://proxy.example", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:8189"}, 403),
        ({"Origin": "http://127.0.0.1:8188.evil.example"}, 403),
        ({"Origin": "http://evil.example://127.0.0.1:81"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "http://["}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://127.0.0.1:8188", "Sec-Fetch-Site": "cross-site"}, 403),
    ],
)
def test_pages_of_other_origins_change_nothing(ask: Ask, headers: dict, status: int) -> None:
    for action in ("stop", "pause"):
        got, answer = ask("POST", f"/kinoloom/jobs/job7/{action}", headers={**HOST, **headers})
        assert got == status and ("error" in answer if status != 200 else answer["id"] == "job7")
    if status == 403:
        assert ask("POST", "/kinoloom/jobs/job7/delete", headers={**HOST, **headers})[0] == 403
        assert ask("GET", "/kinoloom/jobs/job7")[0] == 200


@pytest.mark.parametrize("action", ["stop", "delete"])
def test_getting_changes_nothing(ask: Ask, action: str) -> None:
    assert ask("GET", f"/kinoloom/jobs/job7/{action}")[0] == 405
    assert ask("GET", "/kinoloom/jobs/job7")[1]["status"] == "finished"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 200), (b"{}", 200), (b'{"a": 1}', 200), (b"null", 400), (b"[]", 400), (b"1", 400), (b"{", 400),
        (b"\xff\xfe\x00", 400), (b"[" * 60_000, 400), (b" " * (1 << 20), 413), (b'{"a": "' + b"x" * (1 << 24), 413),
    ],
    ids=lambda value: repr(value[:8]) if isinstance(value, bytes) else None,
)  # fmt: skip
def test_bodies(ask: Ask, body: bytes, status: int) -> None:
    got, answer = ask("POST", "/kinoloom/jobs/job7/pause", data=body)
    assert got == status and ("error" in answer) == (status != 200 or answer["error"] == "")


def test_resuming_a_finished_run_is_refused(ask: Ask) -> None:
    status, answer = ask("POST", "/kinoloom/jobs/job7/resume")
    assert status == 409 and "finished" in answer["error"]


@pytest.mark.parametrize(("action", "why"), [("restart", "only a run that ended and"), ("earlier", "not waiting in line")])
def test_what_a_finished_run_cannot_do_is_refused(ask: Ask, action: str, why: str) -> None:
    status, answer = ask("POST", f"/kinoloom/jobs/job7/{action}")
    assert status == 409 and "run 'run 7' is finished" in answer["error"] and why in answer["error"]


# -- a real server -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(server: Server) -> dict:
    """A short run that has finished, as its route shows it."""
    write_clips(server.base)
    with server.client() as client:
        client.run(train(client, WAN, "shown", steps=30, validate_every=10))
        (job,) = [job for job in client.jobs() if job["run_name"] == "shown"]
        return {
            **client.get(f"/kinoloom/jobs/{job['id']}"),
            "events": [e["data"] for e in client.events if e["type"] == "kinoloom.job"],
        }


def fetch(server: Server, path: str) -> tuple[http.client.HTTPResponse, bytes]:
    """GET exactly this path, dots and all."""
    connection = http.client.HTTPConnection(server.address, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer, answer.read()


@pytest.mark.smoke
def test_events_and_history_fit_together(shown: dict, client: Client) -> None:
    mine = [e for e in shown["events"] if e["job"]["run_name"] == "shown" and "index" in e]
    assert [e["index"] for e in mine] == list(range(len(shown["history"])))
    for event in mine:
        kept = {k: v for k, v in event.items() if k not in ("job", "index", "epoch")}
        assert kept == shown["history"][event["index"]] and event["epoch"] == shown["epoch"]
    assert shown["next"] == len(shown["history"])
    rest = client.get(f"/kinoloom/jobs/{shown['id']}?after={shown['next'] - 2}")
    assert (rest["history"], rest["next"]) == (shown["history"][-2:], shown["next"])
    assert client.get(f"/kinoloom/jobs/{shown['id']}?after={shown['next']}")["history"] == []
    with pytest.raises(PromptError, match="400.*after"):
        client.get(f"/kinoloom/jobs/{shown['id']}?after=x")


@pytest.mark.smoke
def test_files_log_and_report(shown: dict, client: Client, server: Server) -> None:
    (server.base / "models/loras/kinoloom/shown/.half.part.safetensors").write_bytes(b"x")
    found = client.get(f"/kinoloom/jobs/{shown['id']}/files")
    assert found["folder"] == "kinoloom/shown"
    assert {"kinoloom/shown/shown-lora-000030.safetensors", *shown["lora_names"].values()} == {
        file["lora_name"] for file in found["files"]
    }
    for file in found["files"]:
        stat = (server.base / "models/loras" / file["lora_name"]).stat()
        assert (file["bytes"], file["modified"]) == (stat.st_size, pytest.approx(stat.st_mtime))
    lines = client.get(f"/kinoloom/jobs/{shown['id']}/log")["lines"]
    assert any("Memory" in line for line in lines) and "finished after 30 of 30" in lines[-1]
    answer, page = fetch(server, f"/kinoloom/jobs/{shown['id']}/report.html")
    assert answer.getheader("Content-Type").startswith("text/html") and b"<svg" in page
    assert answer.getheader("Content-Security-Policy") == f"{POLICY}; sandbox" and answer.getheader("X-Content-Type-Options") == "nosniff"


def test_a_sample_and_what_lies_beside_it(shown: dict, server: Server) -> None:
    (folder,) = (server.base / "user").glob(f"*kinoloom/jobs/{shown['id']}")
    (folder / "samples").mkdir(exist_ok=True)
    (folder / "samples" / "000030-0.webp").write_bytes(b"picture")
    at = f"/kinoloom/jobs/{shown['id']}/samples"
    answer, body = fetch(server, f"{at}/000030-0.webp")
    assert (answer.status, answer.getheader("Content-Type"), body) == (200, "image/webp", b"picture")
    for name in ("../job.json", "%2e%2e/job.json", "..%2fjob.json", "..%2f..%2f..%2f..%2fserver.log", "//etc/passwd"):
        answer, body = fetch(server, f"{at}/{name}")
        assert answer.status in (403, 404) and b"spec" not in body, name


def test_deleting_a_run_leaves_its_files_and_the_same_workflow_trains_anew(client: Client, server: Server) -> None:
    write_clips(server.base)
    prompt = train(client, WAN, "gone", wait=False, steps=5000)
    client.run(prompt)
    at = f"/kinoloom/jobs/{next(job['id'] for job in client.jobs() if job['run_name'] == 'gone')}"
    with pytest.raises(PromptError, match="409.*stop it"):
        client.post(f"{at}/delete")
    client.post(f"{at}/stop", {})
    client.wait_event(
        lambda e: e["type"] == "kinoloom.job" and e["data"]["event"] == "status" and e["data"]["job"]["ended"]
    )
    job = client.get(at)
    (folder,) = (server.base / "user").glob(f"*kinoloom/jobs/{job['id']}")
    client.post(f"{at}/delete")
    assert not folder.exists() and Path(job["files"]["lora"]).is_file()
    client.wait_event(
        lambda e: e["type"] == "kinoloom.job" and e["data"] == {"job": {"id": job["id"]}, "event": "deleted"}
    )
    with pytest.raises(PromptError, match="404"):
        client.get(at)
    client.run(prompt)
    (again,) = [job for job in client.jobs() if job["run_name"] == "gone-2"]
    client.post(f"/kinoloom/jobs/{again['id']}/stop")
