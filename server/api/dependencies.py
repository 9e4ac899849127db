"""What routers reach for: the server's services and the owner of the request."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from reftserve.server.api.auth import owner
from reftserve.server.services import Services


def services(request: Request) -> Services:
    """The services that the application was made with."""
    found: Services = request.app.state.services
    return found


Server = Annotated[Services, Depends(services)]
Owner = Annotated[str, Depends(owner)]
