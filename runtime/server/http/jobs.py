"""Handles jobs, which are answered with an id at once and fetched later: POST /v1/jobs and related paths.

Results are kept for an hour, in the memory for requests or in a folder. Where there is no room, the oldest go
of whoever has most. A job belongs to who asked for it; to others it does not exist.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

from runtime.request import Edit, Request
from runtime.server.call import Call
from runtime.server.edit_wire import asked_from_message
from runtime.server.events import (
    AlreadyGoneError,
    Finished,
    MemoryFullError,
    NotFinishedError,
    Preview,
    Queued,
    StepDone,
    UnknownJobError,
)
from runtime.server.gate import Gate
from runtime.server.http.composites import (
    MEDIA_TYPES,
    Composites,
    check_is_single,
    finished_json,
    plain_event,
    send_json,
    warning_header,
)
from runtime.server.http.context import JSON, HttpContext, server_sent_event
from runtime.server.http.job_context import JobContext
from runtime.server.http.messages import kind_of, message_of, stream_of
from runtime.server.http.result_files import remove, results_in, write_result
from runtime.server.memory import Account

KEPT_SECONDS = 3600.0
_MOST_JOBS = 10_000
_COPIES = 4
"""Copies of a preview while it is sent: itself, its text, the event, and the transport's."""

QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED = "queued", "running", "succeeded", "failed", "cancelled"
ENDED = (SUCCEEDED, FAILED, CANCELLED)


@dataclass(eq=False)
class Job:
    """A request and what came of it."""

    client: str
    model: str
    file_format: str
    id: str = field(default_factory=lambda: f"job-{uuid.uuid4().hex}")
    created: float = field(default_factory=time.time)
    status: str = QUEUED
    position: int | None = None
    steps: tuple[int, int] | None = None
    preview: bytes | None = None
    """The newest, a JPEG file."""
    error: Any = None
    result: bytes | None = None
    """JSON as POST /v1/composite answers it; None also where it is in a file."""
    nbytes: int = 0
    """Size of the result, while there is one."""
    account: Account | None = None
    """The result's share of the memory for requests."""
    file: Path | None = None
    ended: float | None = None
    task: asyncio.Task[None] | None = None
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    changes: int = 0

    def describe(self) -> dict[str, Any]:
        """As clients see it."""
        fields: dict[str, Any] = {"id": self.id, "object": "job", "status": self.status}
        fields["created_at"] = int(self.created)
        if self.position is not None and self.status == QUEUED:
            fields["position"] = self.position
        if self.steps:
            fields["done"], fields["total"] = self.steps
        if self.error:
            fields |= self.error
        if self.status == SUCCEEDED:
            fields["result"] = f"/v1/jobs/{self.id}/result"
        return fields

    def drop_result(self) -> None:
        """Gives its memory, or its place in the folder, back."""
        self.result, self.nbytes = None, 0
        if self.account:
            self.account.close()
        if self.file:
            remove(self.file)
            self.file = None

    async def change(self, **values: Any) -> None:
        """Sets fields, and tells who follows."""
        async with self.changed:
            for name, value in values.items():
                setattr(self, name, value)
            self.changes += 1
            self.changed.notify_all()


class Jobs:
    """All jobs of a server."""

    def __init__(self, composites: Composites, gate: Gate, room: float, spool: Path | None) -> None:
        """Starts with none.

        Args:
            composites: what reads bodies, and has the service.
            gate: lets calls in.
            room: bytes that all results may take.
            spool: a folder for results; None keeps them in memory.
        """
        self._composites = composites
        self._gate = gate
        self._room = room
        self._spool = spool
        self._jobs: dict[str, Job] = {}
        self._left = results_in(spool) if spool else {}
        """Files of a server that ran before: nobody can ask for them, but another server may have its own
        there."""

    # --- methods ------------------------------------------------------------------------------------------

    async def create(self, content: bytes, call: Call) -> None:
        """POST /v1/jobs: a body as of /v1/composite, /v1/draw or /v1/edit."""
        fields = await self._composites.fields(content, call)
        stream_of(fields)  # its events have a path of their own
        message, every = await asyncio.to_thread(message_of, fields, kind_of(fields))
        request, file_format = asked_from_message(message)
        job = Job(call.client, self._composites.models.find(message.model), file_format)
        del message
        fields.clear()
        self._make_room()
        accepted = asyncio.get_running_loop().create_future()
        # what this call has of the memory is the job's from now on
        nbytes = call.account.nbytes
        call.account.set(0)
        context = JobContext(call.context.peer())
        job.task = asyncio.create_task(self._work(job, context, [request], every, nbytes, accepted))
        del request
        self._jobs[job.id] = job
        if not self._composites.models.is_loaded(job.model):
            accepted.set_result(None)  # who asks for a job does not wait for the model
        try:
            if error := await accepted:  # a queue that is full is told at once
                raise error
            await send_json(call, job.describe(), HTTPStatus.ACCEPTED, location=f"/v1/jobs/{job.id}")
        except BaseException:
            # nobody knows of the job
            job.task.cancel()
            self._forget(job)
            raise

    async def show(self, content: bytes, call: Call) -> None:
        """GET /v1/jobs/ID."""
        await send_json(call, self._find(call).describe(), cache_control="no-store")

    async def follow(self, content: bytes, call: Call) -> None:
        """GET /v1/jobs/ID/events: what changes, until it has ended."""
        job = self._find(call)
        cast(HttpContext, call.context).head_of_events()
        seen, preview = -1, None
        while True:
            async with job.changed:
                while job.changes == seen and job.status not in ENDED:
                    await job.changed.wait()
                seen, described, newest = job.changes, job.describe(), job.preview
            if newest is not None and newest is not preview:
                preview = newest
                with suppress(MemoryFullError):
                    call.account.set(_COPIES * len(newest))
                    image = base64.b64encode(newest).decode()
                    await call.write(server_sent_event("preview", {"image": image}))
            await call.write(server_sent_event(described["status"], described))
            if described["status"] in ENDED:
                return

    async def result(self, content: bytes, call: Call) -> None:
        """GET /v1/jobs/ID/result: as of /v1/composite.

        The answer is on the job's account, unless it is read from its file. On the call's is the transport's
        copy; of a single picture, the text and the file in it, which only results up to a sixth of the memory
        for requests leave room for.
        """
        job, context = self._find(call), cast(HttpContext, call.context)
        if job.status not in ENDED:
            raise NotFinishedError(job.status)
        is_file = context.wants("image/")
        call.account.set(((2 if is_file else 1) + bool(job.file)) * job.nbytes)
        answer = job.result
        if job.file:
            with suppress(OSError):
                answer = await asyncio.to_thread(job.file.read_bytes)
        if answer is None:
            raise AlreadyGoneError(job.status)
        if is_file:
            seed, warnings, image = await asyncio.to_thread(_single_picture, answer)
            context.head(MEDIA_TYPES[job.file_format], HTTPStatus.OK, x_seed=seed, **warning_header(warnings))
            await call.write(image)
            return
        context.head(JSON)
        await call.write(answer)

    async def cancel(self, content: bytes, call: Call) -> None:
        """DELETE /v1/jobs/ID: ends it, and forgets it."""
        job = self._find(call)
        if job.task and not job.task.done():
            job.task.cancel()
            await asyncio.wait({job.task})
        self._forget(job)
        await send_json(call, {"id": job.id, "object": "job", "deleted": True})

    # --- how a job goes -----------------------------------------------------------------------------------

    async def _work(
        self,
        job: Job,
        context: JobContext,
        request: list[Request | Edit],
        every: int,
        nbytes: int,
        accepted: asyncio.Future[Exception | None],
    ) -> None:
        async def serve(content: bytes, call: Call) -> None:
            try:
                call.account.set(nbytes)
                async with (
                    self._composites.models.use(job.model, call) as model,
                    aclosing(model.events(call, request.pop(), job.file_format, every)) as events,
                ):
                    async for event in events:
                        if not accepted.done():
                            accepted.set_result(None)
                        await self._note(job, event, call)
            except Exception as error:
                if not accepted.done():
                    accepted.set_result(error)
                raise

        try:
            await self._gate.answer(context, "job", serve, job.client, has_message=False)
        except asyncio.CancelledError:
            await job.change(status=CANCELLED, ended=time.monotonic())
        if context.error:
            await job.change(status=FAILED, error=context.error, ended=time.monotonic())
        if not accepted.done():
            accepted.set_result(None)
        job.preview = None

    async def _note(self, job: Job, event: Any, call: Call) -> None:
        if isinstance(event, Queued):
            _, fields = plain_event(event)
            await job.change(**fields)
        elif isinstance(event, StepDone):
            await job.change(status=RUNNING, steps=(event.done, event.total))
        elif isinstance(event, Preview):
            before = len(job.preview or b"")
            await job.change(status=RUNNING, preview=event.image)
            call.account.add(-before)
        elif isinstance(event, Finished):
            content = await finished_json(event, call)
            await self._keep(job, content, call)

    async def _keep(self, job: Job, content: bytes, call: Call) -> None:
        job.preview = None
        if self._spool is not None:
            job.file = self._spool / f"{job.id}.json"
            try:
                await write_result(job.file, content)
            except BaseException:
                job.drop_result()
                raise
        else:
            call.account.set(0)
            job.account = self._gate.ledger.open(job.client)
            job.account.set(len(content))
            job.result = content
        job.nbytes = len(content)
        await job.change(status=SUCCEEDED, ended=time.monotonic())
        self._make_room()

    # --- what is kept -------------------------------------------------------------------------------------

    def _find(self, call: Call) -> Job:
        self._make_room()
        identity = cast(HttpContext, call.context).path.get("id", "")
        job = self._jobs.get(identity)
        if job is None or job.client != call.client:
            raise UnknownJobError()
        return job

    def _make_room(self) -> None:
        """Forgets jobs that ended more than an hour ago, and drops results beyond the room."""
        now = time.monotonic()
        for job in [job for job in self._jobs.values() if job.ended and now - job.ended > KEPT_SECONDS]:
            self._forget(job)
        while len(self._jobs) > _MOST_JOBS and (oldest := _next_to_go(self._jobs, lambda job: 1)):
            self._forget(oldest)
        room, left = self._room, self._left
        for file in [file for file, (_, written) in left.items() if time.time() - written > KEPT_SECONDS]:
            remove(file)
            del left[file]
        while (
            sum(job.nbytes for job in self._jobs.values()) + sum(nbytes for nbytes, _ in left.values()) > room
        ):
            if left:
                oldest_file = min(left, key=lambda file: left[file][1])
                remove(oldest_file)
                del left[oldest_file]
            elif largest := _next_to_go(self._jobs, lambda job: job.nbytes):
                largest.drop_result()

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
        job.drop_result()

    async def stop(self) -> None:
        """Ends the jobs that still run."""
        running = [job.task for job in self._jobs.values() if job.task and not job.task.done()]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)


def _single_picture(answer: bytes) -> tuple[str, list[str], bytes]:
    """Returns seed, warnings and file of the only picture of a result.

    Raises:
        InputError: there are several.
    """
    result = json.loads(answer)
    check_is_single(len(result["images"]))
    (image,) = result["images"]
    return str(image["seed"]), result["warnings"], base64.b64decode(image["image"])


def _next_to_go(jobs: Mapping[str, Job], size: Callable[[Job], int]) -> Job | None:
    """Returns the oldest job of the client whose ended jobs are the largest together; None if none has
    ended."""
    sizes: Counter[str] = Counter()
    ended = [job for job in jobs.values() if job.ended and size(job)]
    for job in ended:
        sizes[job.client] += size(job)
    largest = max(sizes, key=sizes.__getitem__, default="")
    return min((job for job in ended if job.client == largest), key=_when, default=None)


def _when(job: Job) -> float:
    return job.ended or 0.0
