"""`rode serve`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rode.commands.options import all_of_it_must_fit, model_options, saved_experiment
from rode.serving.limits import Limits
from rode_food.commands.options import ParserOptions, Subparsers, positive

if TYPE_CHECKING:
    from typing import Unpack

KEY = "RODE_API_KEY"

DESCRIPTION = """\
Serve a model and its adapters as an OpenAI-compatible server (docs/serving.md): /v1/chat/completions, /v1/models, /health,
/metrics. Needs `pip install 'rode[serve]'`.

PATH is an adapter, a folder of adapters on one model, or a model. Each adapter is a model under its folder's name, and the base
one under its own.

examples:
  rode serve runs/own-records
  rode serve runs --model DIR --port 8080
  RODE_API_KEY=... rode serve runs/own-records --host 0.0.0.0 --allowed-host food.example.org
"""


def add_parser(commands: Subparsers, **options: Unpack[ParserOptions]) -> None:
    options["parents"] = [*options.get("parents", []), model_options(adapter=False, answers=False)]
    sub = commands.add_parser(
        "serve",
        help="an OpenAI-compatible server for a model and its adapters",
        description=DESCRIPTION,
        **options,
    )
    sub.set_defaults(run=run)
    add = sub.add_argument
    add("path", metavar="PATH", help="an adapter, a folder of adapters, or a model")
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    add("--port", type=int, default=8000, help="default 8000; 0 for any free one")
    add("--api-key", metavar="KEY", help=f"that requests must carry; better in the environment: {KEY}")
    add(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which clients reach the server; may be given several times",
    )
    add(
        "--queue",
        type=positive,
        default=Limits.queue,
        metavar="N",
        help="requests that may wait (default %(default)s)",
    )
    add(
        "--timeout",
        type=positive,
        default=Limits.timeout,
        metavar="SECONDS",
        help="of a request (default %(default)g)",
    )
    add(
        "--max-new-tokens",
        type=positive,
        default=Limits.max_new_tokens,
        metavar="N",
        help="longest answer (default %(default)s)",
    )
    add(
        "--max-pictures",
        type=positive,
        default=Limits.max_pictures,
        metavar="N",
        help="of a request (default %(default)s)",
    )
    add(
        "--max-body-mb",
        type=positive,
        default=Limits.max_bytes // 10**6,
        metavar="N",
        help="of a request's body (default %(default)s)",
    )
    add(
        "--strict",
        action="store_true",
        help="refuse an adapter that was trained on another model, or edited since (else a warning)",
    )


def _need_extra() -> None:
    try:
        import fastapi  # noqa: F401
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"rode serve needs {error.name}: pip install 'rode[serve]'") from error


def run(args: argparse.Namespace) -> int:
    _need_extra()
    from rode.serving.guard import host_names, is_loopback

    key = args.api_key or os.environ.get(KEY) or None
    if key is None and not is_loopback(args.host):
        raise ValueError(
            f"--host {args.host}: other machines may reach it, so that a key is needed: set {KEY}, or give --api-key"
        )
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(
            "the key: expected printable ASCII without blanks, as it travels in a header of HTTP"
        )
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port: expected 0 to 65535, got {args.port}")

    from rode.serving.app import Server, make_app
    from rode.serving.listen import bind, listen
    from rode.serving.models import Found, adapters_in, load_models

    limits = Limits(
        batch_size=args.batch_size or Limits.batch_size,
        queue=args.queue,
        timeout=args.timeout,
        max_new_tokens=args.max_new_tokens,
        max_pictures=args.max_pictures,
        max_bytes=args.max_body_mb * 1_000_000,
    )
    folders = adapters_in(Path(args.path).expanduser())
    with bind(args.host, args.port) as socket:  # before the model, which takes longer
        experiments = [saved_experiment(str(folder)) for folder in folders]
        found = [
            Found(folder, None if experiment is None else experiment.model)
            for folder, experiment in zip(folders, experiments, strict=True)
        ]
        if not found and args.model is not None:
            raise ValueError(f"PATH: expected adapters beside --model, got the model {args.path}")
        with all_of_it_must_fit(args.strict):
            models = load_models(
                args.model if found else args.path,
                found,
                dtype=args.dtype,
                device=args.device,
                projector=args.projector,
                prompt=args.prompt,
            )
        app = make_app(Server(models, limits), host_names(args.host, args.allowed_host), key)
        listen(app, socket, limits, quiet=args.quiet, names=list(models))
    return 0
