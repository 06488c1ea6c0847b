"""Routes of jobs: their state and result, their cancellation, and the secret of webhooks."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serving.http.asgi_exchange import context_of
from serving.jobs import Job, WebhookSecret
from serving.schemas import ErrorResponse
from serving.service.jobs import Jobs


def prefers_async(request: Request) -> bool:
    """Return whether a client asks for a job (RFC 7240, section 4.1)."""
    preferences = ",".join(request.headers.getlist("prefer")).split(",")
    return any(each.partition(";")[0].strip().lower() == "respond-async" for each in preferences)


def accepted(job: Job) -> Response:
    """Return the answer to a request that became a job."""
    headers = {"Location": f"/v1/jobs/{job.id}", "Preference-Applied": "respond-async"}
    return Response(job.model_dump_json(), 202, headers, media_type="application/json")


def jobs_router(jobs: Jobs) -> APIRouter:
    """Make the router of `/v1/jobs/`."""
    router = APIRouter(tags=["jobs"])
    missing = {"model": ErrorResponse, "description": "The client has no such job, or no longer."}
    unavailable = {"model": ErrorResponse, "description": "The database or the storage is unavailable."}

    @router.get("/v1/jobs/{job_id}", responses={404: missing, 503: unavailable})
    async def job(job_id: str, request: Request) -> Job:
        """Return a job's state, and its result once it is completed."""
        return await jobs.get(job_id, context_of(request.scope))

    @router.post("/v1/jobs/{job_id}/cancel", responses={404: missing, 503: unavailable})
    async def cancel(job_id: str, request: Request) -> Job:
        """Cancel a job; one that has ended stays as it is."""
        return await jobs.cancel(job_id, context_of(request.scope))

    @router.get("/v1/webhooks/secret", responses={503: unavailable})
    def secret(request: Request) -> WebhookSecret:
        """Return the secret with which this API key's webhooks are signed."""
        return WebhookSecret(secret=jobs.webhooks.secret_of(context_of(request.scope).owner))

    return router
