"""A mixture behind the HTTP interface of OpenAI's models, and a page to talk to it.

protocol.py   one connection: limits of size and time (uvicorn, h11)
guard.py      one request: host, key, headers
strict_json.py, bodies.py     one body: strict JSON, then typed
app.py        the endpoints (FastAPI)
engine_thread.py, generation.py   the engine's thread, and one request's way through it
answers.py    the objects that go out
page/         the chat page: three static files
"""
