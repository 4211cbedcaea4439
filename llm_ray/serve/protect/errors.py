# Placeholder of the lead until the real module lands: overwrite freely.
from starlette.responses import JSONResponse


def openai_error(status, message, type=None, code=None, param=None, headers=None):
    return JSONResponse(
        {"error": {"message": message, "type": type or "invalid_request_error", "param": param, "code": code}}, status, headers
    )
