"""The one exception that a user's mistake raises; the command line prints it as one line and exits with code 2."""


class UserError(ValueError):
    """Bad input, told in one line that names the file, flag or key and the cure."""
