"""What routers reach for: the server's services and the owner of the request; and what every request must keep to."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from reftserve.client.schemas.unicode import half_pair
from reftserve.server.api.auth import owner
from reftserve.server.errors import InvalidRequest
from reftserve.server.services import Services


def services(request: Request) -> Services:
    """The services that the application was made with."""
    found: Services = request.app.state.services
    return found


async def check_parameters(request: Request) -> None:
    """Refuse path and query parameters that no database can look up; a dependency of the whole application.

    Raises InvalidRequest that names the parameter.
    """
    for name, value in [*request.path_params.items(), *request.query_params.multi_items()]:
        if isinstance(value, str) and ("\0" in value or half_pair(value) is not None):
            raise InvalidRequest(
                f"parameter {name!r} is {value!a}; expected text without NUL and half surrogate pairs",
                param=name,
                code="invalid_value",
            )


Server = Annotated[Services, Depends(services)]
Owner = Annotated[str, Depends(owner)]
