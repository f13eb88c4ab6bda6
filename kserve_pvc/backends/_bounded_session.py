"""
The HTTP session that s3fs's SDK uses here: it reads a bounded number of bytes of a response, in a bounded time.
"""

from __future__ import annotations

import asyncio
from inspect import signature
from typing import Any

from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from botocore.exceptions import HTTPClientError

from kserve_pvc.backends._object_store import MAX_PAGE_BYTES
from kserve_pvc.backends._xml import is_crowded

_BODY_SECONDS = 60.0
_PIECE_BYTES = 64 * 1024
_OPTION = "http_session_cls"


class BoundedSession(AIOHTTPSession):  # type: ignore[misc]  # Untyped.
    """
    A session that refuses responses to requests for metadata which are longer than a page of a listing can be, or take
    a multiple of the memory of others. Bodies of objects are streamed as before.
    """

    async def send(self, request: Any) -> Any:
        if request.stream_output:
            return await super().send(request)
        request.stream_output = True
        response = await super().send(request)
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for piece in response.raw.content.iter_chunked(_PIECE_BYTES):
                    body += piece
                    if len(body) > MAX_PAGE_BYTES:
                        raise HTTPClientError(error=ValueError(f"response longer than {MAX_PAGE_BYTES} bytes"))
            if is_crowded(body):
                raise HTTPClientError(error=ValueError("response is not a listing of S3"))
        except BaseException:
            response.raw.close()
            raise
        response._content = bytes(body)
        return response


def bounded() -> dict[str, Any]:
    """
    Return the argument of the SDK's configuration that selects this session, if its version has one.
    """
    return {_OPTION: BoundedSession} if _OPTION in signature(AioConfig.__init__).parameters else {}
