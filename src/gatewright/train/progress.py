"""What a person sees while a run trains: a live bar on a terminal, a line per epoch anywhere."""

from contextlib import ExitStack

from gatewright.extras import require


class Progress(ExitStack):
    """A bar over a run's optimizer steps, of which some may be done, with a line above it for each finished epoch."""

    def __init__(self, total_steps: int, done: int = 0, *, show: bool = True) -> None:
        super().__init__()
        columns = require("rich.progress", "train")
        self.console = require("rich.console", "train").Console(quiet=not show)
        self._bar = columns.Progress(
            columns.TextColumn("{task.description}"),
            columns.BarColumn(),
            columns.MofNCompleteColumn(),
            columns.TextColumn("loss {task.fields[loss]}"),
            columns.TimeElapsedColumn(),
            columns.TimeRemainingColumn(),
            console=self.console,
            # Without a terminal a bar would be one more line of noise; the lines per epoch remain.
            disable=not self.console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=done, loss="-")
        self.enter_context(self._bar)

    def advance(self, loss: float | None = None) -> None:
        """Show one more step, and the loss where it is known."""
        self._bar.update(self._task, advance=1, **({} if loss is None else {"loss": f"{loss:.3f}"}))

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self.console.file.flush()  # A log file is read while the run goes on.
