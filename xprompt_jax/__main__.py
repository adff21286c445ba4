"""`python -m xprompt_jax` is `xprompt`."""

from xprompt_jax.cli import main

main()
