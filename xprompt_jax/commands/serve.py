"""`xprompt serve`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from xprompt_jax.commands.sampling import PrecisionFlags
from xprompt_jax.errors import UserError

log = logging.getLogger(__name__)


@dataclass
class Serve(PrecisionFlags):
    """Open a local web page: drop an example pair and new images, and watch the rows appear.

    Whoever reaches the address may draw, without a password, so it listens on this machine alone unless --host says otherwise.

    Examples:
      xprompt serve --model mini
      xprompt serve --model mini --tasks prompts/ --port 8000
    """

    model: str
    """Model folder, or org/name on the Hugging Face hub."""
    tasks: Path | None = None
    """Folder of compiled prompts (*.xprompt) to choose from."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets every machine in that can reach this one."""
    port: int = 7861
    """0 takes a free one."""
    max_upload_mb: float = 20.0
    """Megabytes of one request, all its images together."""
    max_images: int = 8
    """Images that one request may draw."""
    max_queue: int = 8
    """Requests that wait or are being drawn; more are turned away."""

    def run(self) -> None:
        """Serves until Ctrl-C."""
        try:
            import python_multipart  # noqa: F401
            import starlette  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError:
            raise UserError("the web page needs starlette, uvicorn and python-multipart: pip install 'xprompt-jax[serve]'") from None
        from xprompt_jax import XPrompt
        from xprompt_jax.serve.app import LOOPBACK, listen, serve
        from xprompt_jax.serve.studio import Limits, Studio

        limits = Limits(self.max_upload_mb, self.max_images, self.max_queue)
        if self.tasks is not None and not self.tasks.is_dir():
            raise UserError(f"--tasks {self.tasks}: no such folder; give one with .xprompt files in it")
        with listen(self.host, self.port) as listening:  # a taken port is told before the model is loaded
            studio = Studio(XPrompt.from_pretrained(self.model, **self.precision()), tasks=self.tasks, limits=limits)
            for task in studio.tasks():
                if "error" in task:
                    log.warning("left out: %s", task["error"])
            port, host = listening.getsockname()[1], f"[{self.host}]" if ":" in self.host else self.host
            print(f"open http://{host}:{port}  (Ctrl-C stops)", flush=True)
            print(f"at most {limits.upload_mb:g} MB and {limits.images} images a request, {limits.queue} requests in line", flush=True)
            if self.host not in LOOPBACK:
                log.warning("--host %s: whoever can reach this machine may draw; there is no password", self.host)
            serve(studio, listening, self.host)
