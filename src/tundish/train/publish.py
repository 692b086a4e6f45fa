"""What is saved and logged is sent on while training goes on."""

from composer import Callback, Logger, State

from tundish.tracking.publishing import Publisher


class PublishWhileTraining(Callback):
    """From the first batch until everything is closed; what is left then waits on the disk.

    Args:
        publisher: of the run.
    """

    def __init__(self, publisher: Publisher) -> None:
        self.publisher = publisher

    def fit_start(self, state: State, logger: Logger) -> None:
        """Training begins, or goes on."""
        self.publisher.start()

    def post_close(self) -> None:
        """All others have said their last word."""
        self.publisher.finish()
