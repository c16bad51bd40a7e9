"""The errors people meet: each says what was wrong, where, and what to do next, in one or two lines."""


class MoescopeError(Exception):
    """A mistake in what MoEscope was given (a model, a corpus, a store, an option), not in MoEscope itself.

    The command line prints the message alone and exits with code 2.
    """


class CorpusError(MoescopeError):
    """A corpus that cannot be read as asked: empty, malformed, or without the named field."""


class StoreError(MoescopeError):
    """A store that is absent, incomplete, damaged, busy, or already there."""


class RefusedError(MoescopeError):
    """A model that cannot be captured faithfully; the message carries the reason."""


class CancelledError(MoescopeError):
    """Work that somebody asked to stop; what was finished before stays, and nothing half-done is kept."""
