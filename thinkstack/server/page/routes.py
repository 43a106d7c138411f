"""All routes of the page."""

from fastapi import FastAPI

from thinkstack.server.page.account_routes import account_routes, key_routes, session_routes
from thinkstack.server.page.conversation_routes import conversation_routes, transfer_routes
from thinkstack.server.page.message_routes import answer_routes, message_routes
from thinkstack.server.page.page import Page, file_routes

ROUTES = (
    account_routes,
    session_routes,
    key_routes,
    conversation_routes,
    transfer_routes,
    message_routes,
    answer_routes,
)


def add_page(app: FastAPI, page: Page) -> None:
    """Add the page to an application."""
    for make in ROUTES:
        app.include_router(make(page))
    app.include_router(file_routes())
