"""`rode serve`: an OpenAI-compatible server for a model and its adapters.

From below: `errors`, `limits`, `text` (tokens to text), `choice` (how a token is picked), `models` (what is served), `batch` (one
call of `generate` for several requests), `engine` (the thread that owns the model, and its queue), `metrics`, `pictures`,
`messages` (a request's body), `answers` (what is sent back), `guard` (who may ask), `app` (the routes), `listen` (the socket).
"""
