"""The commands of `xprompt`: one dataclass of flags each, with a `run` method. Heavy imports stay inside `run`."""
