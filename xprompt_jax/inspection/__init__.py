"""Training rows as people read them: `xprompt inspect`."""
