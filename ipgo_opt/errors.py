"""The two families of errors: what the caller got wrong, and what went wrong in a run."""


class IpgoError(Exception):
    """Base of every error raised on purpose by this package."""


class BadInput(IpgoError, ValueError):
    """The caller's input breaks a rule; the message states the rule and the value received (exit code 2)."""


class RunFailed(IpgoError, RuntimeError):
    """A run could not go on; what it had recorded is kept (exit code 1)."""
