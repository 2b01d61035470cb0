"""Refusals on gRPC: `google.rpc.Status` with `ErrorInfo`, from the one error table."""

from typing import NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyProto
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from steward.errors import ERRORS, Reason, StewardError

DOMAIN = "steward"


async def abort(
    context: "grpc.aio.ServicerContext[object, object]", error: StewardError
) -> NoReturn:
    """End a call with a row of the error table. Never returns."""
    detail = AnyProto()
    detail.Pack(error_details_pb2.ErrorInfo(reason=error.reason.value, domain=DOMAIN))
    status = status_pb2.Status(
        code=code_pb2.Code.Value(ERRORS[error.reason].grpc_code),
        message=error.message,
        details=[detail],
    )
    rich = rpc_status.to_status(status)
    context.set_trailing_metadata(rich.trailing_metadata)
    await context.abort(rich.code, rich.details)


def error_of(failure: grpc.RpcError) -> StewardError:
    """The refusal inside a failed call; a failure without one is INTERNAL.

    A transport that broke (UNAVAILABLE without details) has the reason MANAGER_UNAVAILABLE.
    """
    refusal = refusal_of(failure)
    if refusal is not None:
        return refusal
    if is_unreachable(failure):
        details = failure.details() if isinstance(failure, grpc.aio.AioRpcError) else None
        return StewardError(Reason.MANAGER_UNAVAILABLE, details or "peer unreachable")
    return StewardError(Reason.INTERNAL, "the peer failed without a reason")


def is_unreachable(failure: grpc.RpcError) -> bool:
    """Whether the call failed on the way: the peer is away, silent, or not ours."""
    # CANCELLED: the peer saw the deadline of this call first. Who cancels a call of its own gets
    # CancelledError, not this.
    codes = (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    )
    if not isinstance(failure, grpc.aio.AioRpcError) or failure.code() not in codes:
        return False
    return refusal_of(failure) is None


def refusal_of(failure: grpc.RpcError) -> StewardError | None:
    """The refusal that a peer ended the call with; None when the failure carries none."""
    if isinstance(failure, grpc.aio.AioRpcError):
        for key, value in failure.trailing_metadata() or ():
            if key == "grpc-status-details-bin" and isinstance(value, bytes):
                status = status_pb2.Status.FromString(value)
                info = error_details_pb2.ErrorInfo()
                for detail in status.details:
                    ours = detail.Unpack(info) and info.domain == DOMAIN
                    if ours and info.reason in Reason.__members__:
                        return StewardError(Reason(info.reason), status.message)
    return None
